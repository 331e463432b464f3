"""Surface A, inside: what callers do to themselves before they execute the wrapper (argv: the last words), and what payloads look at."""

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time

from nodewrap.escape.hostile.common import LIBC, call, read, say

SET_DUMPABLE = 4

# ---- before the wrapper ----


def then(argv):
    os.execvpe(argv[0], argv, os.environ)


def nameless(program, *env):
    """argc 0. Since Linux 5.18 the kernel gives an empty argv[0]."""
    words = [word.encode() for word in env]
    LIBC.execve(program.encode(), (ctypes.c_char_p * 1)(None), (ctypes.c_char_p * (len(words) + 1))(*words, None))
    raise OSError(ctypes.get_errno(), "execve")


def close_std(which, *argv):
    for fd in which.split(","):
        os.close(int(fd))
    then(argv)


def many_fds(directory, *argv):
    """300 descriptors, among them the directory and the file in it."""
    opened = [os.open(directory, os.O_RDONLY), os.open(f"{directory}/secret", os.O_RDONLY)]
    for fd in opened:
        os.set_inheritable(fd, True)
    for _ in range(300):
        fcntl.fcntl(opened[0], fcntl.F_DUPFD, 3)
    then(argv)


def deaf(*argv):
    """Every signal blocked or ignored."""
    for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    then(argv)


def limited(name, value, *argv):
    resource.setrlimit(getattr(resource, name), (int(value), int(value)))
    then(argv)


def masked(umask, *argv):
    os.umask(int(umask, 8))
    then(argv)


def no_new_privs(*argv):
    call(LIBC.prctl, 38, 1, 0, 0, 0)
    then(argv)


def odd_personality(*argv):
    """READ_IMPLIES_EXEC and ADDR_NO_RANDOMIZE (linux/personality.h)."""
    call(LIBC.personality, ctypes.c_ulong(0x0400000 | 0x0040000))
    then(argv)


def named(program, name, *argv):
    """The same program under another argv[0]; argv[0] itself is left out."""
    os.execve(program, [name, *argv[1:]], os.environ)


def by_descriptor(*argv):
    """Executed by /proc/self/fd/N, as fexecve(3) does."""
    fd = os.open(argv[0], os.O_RDONLY)
    os.set_inheritable(fd, True)
    os.execve(f"/proc/self/fd/{fd}", argv, os.environ)


def from_memory(*argv):
    """A copy of it in memory."""
    fd = os.memfd_create("copy", 0)
    os.write(fd, read(argv[0], 1 << 26))
    os.execve(f"/proc/self/fd/{fd}", argv, os.environ)


def lowly(*argv):
    """First to be killed for want of memory, last to run."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.nice(5)  # more would make the attack itself wait on a busy node
    then(argv)


def become(uid, gid, groups):
    os.setgroups([int(one) for one in groups.split(",") if one])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))


def with_capabilities(uid, gid, groups, *argv):
    """As root: become the caller with CAP_DAC_READ_SEARCH (2) inheritable and ambient, and with securebits that keep it (capabilities(7))."""
    call(LIBC.prctl, 28, 0x10, 0, 0, 0)  # PR_SET_SECUREBITS, SECBIT_KEEP_CAPS
    become(uid, gid, groups)
    header, data = struct.pack("II", 0x20080522, 0), struct.pack("6I", 4, 4, 4, 0, 0, 0)
    call(LIBC.capset, header, data)
    call(LIBC.prctl, 47, 2, 2, 0, 0)  # PR_CAP_AMBIENT, RAISE
    then(argv)


def failing_switch(first, last, answer, uid, gid, groups, *argv):
    """As root and pid 1 of a pid namespace: become the caller, under a filter that answers setresuid(2) and setuid(2) to first..last with that errno.
    Such a filter is what the kernel's own failures look like (RLIMIT_NPROC); 0, "done", is what the "fake root" of containers answers. Last we
    tell whether a process of root's beside it is alive: who believes to be another id may call kill(-1)."""
    canary = os.fork()
    if canary == 0:
        time.sleep(30)
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        install_switch_filter(int(first), int(last), int(answer))
        become(uid, gid, groups)
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
        then(argv)
    while os.waitpid(-1, 0)[0] != pid:
        pass
    time.sleep(0.05)
    with open(f"/proc/{canary}/stat") as file:
        say("the process beside it was killed" if ") Z " in file.read() else "the process beside it lives")


def install_switch_filter(first, last, answer):
    code = 0x00050000 | answer  # SECCOMP_RET_ERRNO
    rules = [
        (0x20, 0, 0, 0), (0x15, 1, 0, 117), (0x15, 0, 4, 105),  # the call's number: setresuid, setuid on x86-64
        (0x20, 0, 0, 16), (0x35, 0, 2, first), (0x25, 1, 0, last), (0x06, 0, 0, code), (0x06, 0, 0, 0x7FFF0000),
    ]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    call(LIBC.prctl, 22, 2, struct.pack("HxxxxxxP", len(rules), ctypes.addressof(text)), 0, 0)


def fake_root(source, target, *argv):
    """Root of an own user namespace, where source is mounted over target."""
    uid, gid = os.getuid(), os.getgid()
    call(LIBC.unshare, 0x10000000 | 0x00020000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    call(LIBC.mount, b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    call(LIBC.mount, source.encode(), target.encode(), None, 0x1000, None)
    then(argv)


def by_a_thread(*argv):
    """The wrapper is the child of a thread, which ends when that one has a child itself; its status is ours."""
    started = []

    def work():
        started.append(subprocess.Popen(argv))
        pid, end = started[0].pid, time.monotonic() + 3
        while not read(f"/proc/{pid}/task/{pid}/children") and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    try:
        sys.exit(abs(started[0].wait(10)))
    except subprocess.TimeoutExpired:
        sys.exit(99)


def by_a_dying_parent(count, seconds, patience, *argv):
    """Start it that often by a parent that is gone within so many seconds of its first child, for which it waits so long: what is started by who has
    gone before cannot be told from an orphan's start."""
    for _ in range(int(count)):
        pid = os.fork()
        if pid == 0:
            started = os.fork()
            if started == 0:
                os.setsid()
                null = os.open("/dev/null", os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                then(argv)
            end, gone = time.monotonic() + float(patience), os.WEXITED | os.WNOHANG | os.WNOWAIT
            while not read(f"/proc/{started}/task/{started}/children") and time.monotonic() < end and not os.waitid(os.P_PID, started, gone):
                time.sleep(0.0005)
            time.sleep(random.random() * float(seconds))
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    return "started"


def executed(*argv):
    """By a program that everybody can execute."""
    then(argv)


# ---- careless wrappers: what past ones did, as controls ----


def careless_log(log, *argv):
    """Log what is done, whatever descriptor that is, whatever comes of it."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(fd, b"start\n")
    except OSError:
        pass
    os.set_inheritable(fd, True)
    then(argv)


def careless_status(fd, *argv):
    """What happens is told with the ids that the wrapper has."""
    os.write(int(fd), b"started\n")
    os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)


def careless_lease(lease, *argv):
    """A lease, a child, the lease's end; an error on the way is somebody else's business."""
    with open(lease, "w") as file:
        file.write("held")
        with open(f"{lease}.log", "w") as log:
            log.write("start")
        relay = [os.pipe() for _ in range(5)]
        os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)
        del relay
    os.unlink(lease)
    os.unlink(f"{lease}.log")


def careless_switch(uid, gid, *argv):
    """Become somebody else, without a look at what came of it."""
    LIBC.setgroups(0, None)
    LIBC.setgid(int(gid))
    LIBC.setresuid(int(uid), int(uid), int(uid))
    then(argv)


def careless_tie(uid, gid, *argv):
    """To die with the parent, and only then become somebody else, which the kernel forgets the first for (prctl(2))."""
    call(LIBC.prctl, 1, signal.SIGKILL, 0, 0, 0)
    become(uid, gid, "")
    then(argv)


def careless_thread_tie(*argv):
    """To die with the parent, which is a thread for the kernel."""
    call(LIBC.prctl, 1, signal.SIGKILL, 0, 0, 0)
    then(argv)


def careless_words(*argv):
    """Options anywhere, by any beginning of their names."""
    import argparse

    parser = argparse.ArgumentParser(fromfile_prefix_chars="@")
    parser.add_argument("--profile")
    _, rest = parser.parse_known_args(argv)
    then(rest)


def careless_shell(*argv):
    """One string out of many, for a shell."""
    then(["/bin/sh", "-c", " ".join(argv)])


def careless_lookup(root):
    """Look an account up after entering the image."""
    import pwd

    os.chroot(root)
    try:
        pwd.getpwnam("nobody-of-that-name")
    except KeyError:
        pass


def careless_check(tool, *argv):
    """Root runs a tool if it is the pilot's no more than this: looked at first, executed by name later."""
    if os.stat(tool).st_mode & 0o022:
        return "refused"
    say("checked")
    sys.stdin.readline()
    then([tool, *argv])


def careless_config(path, *argv):
    """Whoever is root here is root, and what is there is the configuration."""
    if os.geteuid() == 0 and os.path.exists(path):
        then([read(path).decode().split()[1], *argv])
    return "not root"


def careless_temporary(path):
    with open(path, "w") as file:
        file.write("state")


def careless_queue(path, *argv):
    """One at a time, with the lock held by a process that its caller may stop."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        time.sleep(0.05)
        os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)


# ---- payloads ----


def write_word(*parts):
    """To all three of the standard descriptors. In parts: the whole word is in no record of the command line."""
    for fd in (0, 1, 2):
        try:
            os.write(fd, "".join(parts).encode() + b"\n")
        except OSError:
            continue


def descriptors():
    """All that is open, and what is in it."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        for path, at in (("secret", int(name)), (f"/proc/self/fd/{name}", None)):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=at)
                found.append(os.read(fd, 100))
                os.close(fd)
            except OSError:
                continue
    return b" ".join(found)


def where():
    """The working directory and what is next to us."""
    found = [os.readlink("/proc/self/cwd").encode()]
    for path in ("secret", "../secret"):
        try:
            found.append(read(path))
        except OSError as wrong:
            found.append(type(wrong).__name__.encode())
    return b" ".join(found)


def who(*path):
    """Our ids, and that file if we can read it."""
    say(f"{os.getresuid()} {os.getresgid()} {os.getgroups()}")
    return read(path[0]) if path else None


def environment(*names):
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def words(*argv):
    return repr(argv)


def many_words(*argv):
    """Sizes and a digest of what arrived."""
    import hashlib

    return hashlib.sha256(b"".join(os.fsencode(word) + b"\0" for word in argv)).hexdigest()


def beat(path):
    """Alive while the file changes."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with open(path, "w") as file:
            file.write(str(time.monotonic()))
        time.sleep(0.01)


def mute(code):
    """Write, and do not care whether it arrived."""
    try:
        os.write(1, b"a result\n")
    except OSError:
        pass
    os._exit(int(code))


def talkative():
    """Fill stdout."""
    while True:
        os.write(1, b"x" * 65536)


def overwrite(seconds):
    """Hold the programs of all processes that we see by O_PATH; when they are executed no more, open them for writing and write what is there."""
    held: dict[int, int] = {}
    say("ready")
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                fd = os.open(f"/proc/{pid}/exe", os.O_PATH)
                held.setdefault(os.fstat(fd).st_ino, fd)
            except OSError:
                continue
        for fd in held.values():
            try:
                file = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            except OSError:
                continue
            os.pwrite(file, os.pread(file, 1, 0), 0)
            os.close(file)
        time.sleep(0.005)
    return f"{len(held)} programs seen"


def call_helpers(*commands):
    """Each command, split at blanks, from here and from a user namespace of ours; what they say."""
    said = []
    for command in commands:
        for before in ([], ["/usr/bin/unshare", "-Ur"]):
            try:
                ran = subprocess.run([*before, *command.split("\t")], capture_output=True, timeout=10, check=False)
                said.append(ran.stdout + ran.stderr[:100])
            except OSError as wrong:
                said.append(str(wrong).encode())
    return b" ".join(said).replace(b"\n", b" ")


# ---- beside the wrapper ----


def trace(seconds, *argv):
    """Start it, and try to trace, and to read the memory of, it and all that it starts, for as long as it runs: those for which it worked."""
    null = os.open("/dev/null", os.O_RDWR)
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)])
    found, tries, end = set(), 0, time.monotonic() + float(seconds)
    while time.monotonic() < end and read(f"/proc/{pid}/stat").decode().rpartition(")")[2].split()[0] != "Z":
        for one in family(pid):
            try:
                name = name_of(one)
                ids = read(f"/proc/{one}/status").decode().split("Uid:\t")[1].split("\n")[0].split()
            except OSError:
                continue
            tries += 1
            if name.startswith("python") and ids == [str(os.getuid())] * 4:  # not executed yet; the policy child's interpreter has an id of its own
                continue
            name = seize(one) or (can_read(one) and name_of(one))  # it may have become the payload since: that one is the pilot's own
            if name:
                found.add(f"{name}:{'/'.join(ids)}")
    return f"{tries} tries: {sorted(found)}"


def family(pid):
    """It and its descendants."""
    found, ring = [], [pid]
    while ring:
        found += ring
        below = []
        for one in ring:
            try:
                below += [int(word) for word in read(f"/proc/{one}/task/{one}/children").split()]
            except OSError:
                continue
        ring = below
    return found


def name_of(pid):
    """"" when it has gone."""
    try:
        return read(f"/proc/{pid}/stat").decode().split("(")[1].split(")")[0]
    except OSError:
        return ""


def seize(pid):
    """The name of what was traced, read while it stood still; "" when it could not be."""
    if LIBC.ptrace(0x4206, pid, None, None) < 0:  # PTRACE_SEIZE
        return ""
    LIBC.ptrace(0x4207, pid, None, None)  # PTRACE_INTERRUPT
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    name = name_of(pid)
    LIBC.ptrace(17, pid, None, None)  # PTRACE_DETACH
    return name


def can_read(pid):
    try:
        return len(read(f"/proc/{pid}/mem", 1)) >= 0
    except OSError as wrong:
        return wrong.errno == errno.EIO  # address 0 is not mapped: it was opened


# ---- beside root's doctor ----


def watch_for_terminals():
    """The first process of our uid, of another session, that has a terminal, or a word of root's environment."""
    say("ready")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # others' come and go
                if os.stat(f"/proc/{pid}").st_uid != os.getuid() or os.getsid(int(pid)) == os.getsid(0):
                    continue
                terminal, environment = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[4], read(f"/proc/{pid}/environ")
                if terminal != b"0" or b"NW_ROOTS_OWN" in environment:
                    return say(f"found {pid}: terminal {terminal.decode()}, stdin {os.readlink(f'/proc/{pid}/fd/0')}")


def careless_doctor(uid, gid):
    """Tries things as another user, in children that keep all that is root's."""
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setresgid(int(gid), int(gid), int(gid))
            os.setresuid(int(uid), int(uid), int(uid))
            LIBC.prctl(SET_DUMPABLE, 1, 0, 0, 0)
            time.sleep(0.2)
            os._exit(0)
        os.waitpid(pid, 0)
