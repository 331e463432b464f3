"""Surface C, inside."""

import ctypes
import errno
import fcntl
import glob
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from nodewrap.escape.hostile.common import LIBC, call, in_child, read, say, syscall

SET_NAME, SET_PTRACER, SET_CHILD_SUBREAPER = 15, 0x59616D61, 36
TRACEME, POKEDATA, ATTACH, DETACH = 0, 5, 16, 17
F_SETSIG = 10
SET_TIMERSLACK = 29
CLONE, EXIT = (220, 93) if os.uname().machine == "aarch64" else (56, 60)
PIDFD_OPEN, PIDFD_GETFD = 434, 438
CLONE_VFORK = 0x4000
SO_PEERPIDFD = 77
NEWUSER, NEWNS, NEWCGROUP = 0x10000000, 0x20000, 0x02000000
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def hold(path):
    """A lock on that file, which lives as long as any process that has inherited it (flock(2)): the judge asks for it."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def drop_stdio():
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def daemonize():
    """True in a process of its own session whose parents are gone; the payload's own process goes on with False."""
    if os.fork():
        os.wait()
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    drop_stdio()
    return True


def rest(seconds=60):
    """What outlives its payload ends some time by itself."""
    time.sleep(seconds)
    os._exit(0)


def tell(path, text):
    with open(path, "w") as file:
        file.write(str(text))


def become_root(more=0):
    """In a user namespace, with mounts of our own and more."""
    ids = os.getuid(), os.getgid()
    call(LIBC.unshare, NEWUSER | NEWNS | more)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
        tell(f"/proc/self/{name}", text)


# ---- what survives ----


def daemon(path):
    """Fork twice, leave the session, ignore what can be ignored."""
    hold(path)
    if daemonize():
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        rest()


def sleeper(seconds):
    """With a timer slack of our own, whatever the caller's was."""
    LIBC.prctl(SET_TIMERSLACK, ctypes.c_ulong(50000))
    time.sleep(float(seconds))


def careless_limit(seconds, *argv):
    """A wrapper with a wall limit that waits with the timer slack of its caller."""
    with subprocess.Popen(argv) as payload:
        if not select.select([os.pidfd_open(payload.pid)], [], [], float(seconds))[0]:
            payload.kill()
        payload.wait()
        os._exit(payload.returncode and 1)


def stubborn(path):
    """The payload itself ignores what asks it to end."""
    hold(path)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    say("ready")
    rest()


def bomb(path, processes):
    """Processes that fork whenever one of that many places is free, and die at once or later; the payload ends in the middle of it."""
    hold(path)
    places, end = os.pipe(), time.monotonic() + 4
    os.write(places[1], b"." * int(processes))
    if not os.fork():
        os.setsid()
        drop_stdio()
        while time.monotonic() < end and os.read(places[0], 1):
            if not os.fork():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                continue
            if os.getpid() % 3:  # a third forks on
                time.sleep(0.01)
                os.write(places[1], b".")
                os._exit(0)
        os._exit(0)
    time.sleep(0.15)


def hopper(path):
    """A process that is never the same for long: it forks and ends."""
    hold(path)
    if daemonize():
        end = time.monotonic() + 3
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
            os.setsid()
        os._exit(0)
    time.sleep(0.05)


def stuck(path):
    """Processes that no ordinary signal ends: stopped, traced and stopped, waiting for a child of vfork."""
    hold(path)
    if os.fork() == 0:
        drop_stdio()
        os.kill(os.getpid(), signal.SIGSTOP)
        rest()
    if os.fork() == 0:
        drop_stdio()
        if os.fork() == 0:
            LIBC.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
        rest()
    if os.fork() == 0:
        drop_stdio()
        syscall(CLONE, CLONE_VFORK | signal.SIGCHLD, None, None, None, None)  # without CLONE_VM: the parent waits, nothing is shared
        rest()
    time.sleep(0.05)


def subreaper(path):
    """A daemon that adopts the daemons of others."""
    hold(path)
    if daemonize():
        call(LIBC.prctl, SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        daemonize()
        rest()
    time.sleep(0.02)


def renamed(path, *names):
    """Daemons that look like the kernel's and the wrapper's own, in ps and in /proc/PID/comm."""
    os.set_inheritable(hold(path), True)
    for name in names:
        if daemonize():
            code = f"import ctypes, time; ctypes.CDLL(None).prctl({SET_NAME}, {name.encode()!r}); time.sleep(60)"
            os.execv("/usr/bin/python3", [name, "-I", "-c", code])
    time.sleep(0.05)


def headless(path):
    """A daemon whose first thread has ended: its leader is a zombie, which killers that look at states take for dead."""
    hold(path)
    if daemonize():
        threading.Thread(target=rest, daemon=True).start()
        LIBC.syscall(EXIT, 0)
    time.sleep(0.02)


def own_server(path):
    """A thread of ours looks up a name in a FUSE file system whose server we are; the question is read and never answered. Nothing wakes who waits
    for that (fs/fuse/dev.c, request_wait_answer), and it keeps the server's descriptor open."""
    hold(path)
    become_root()
    os.makedirs("own", exist_ok=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    call(LIBC.mount, b"own", b"own", b"fuse", ctypes.c_ulong(0), b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse)
    unique = struct.unpack_from("<IIQ", os.read(fuse, 1 << 17))[2]  # FUSE_INIT; its answer in the shape of protocol 7.23 (include/uapi/linux/fuse.h)
    os.write(fuse, struct.pack("<IiQ", 80, 0, unique) + struct.pack("<IIIIHHIIHHI28x", 7, 23, 4096, 0, 4, 4, 4096, 1, 0, 0, 0))
    threading.Thread(target=os.stat, args=("own/x",), daemon=True).start()
    os.read(fuse, 1 << 17)
    say("waits")
    drop_stdio()
    rest()


def locked_memory():
    """A FUSE server in namespaces of our own that answers no READ: one child reads a page, which stays locked; another maps the file for the second
    time (FOPEN_DIRECT_IO: invalidate_inode_pages2), and waits for that page with its mmap_lock held."""
    become_root()
    os.makedirs("own", exist_ok=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    call(LIBC.mount, b"own", b"own", b"fuse", ctypes.c_ulong(0), b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse)
    if os.fork() == 0:
        drop_stdio()
        serve_no_page(fuse)
    first, second = (os.open("own/file", os.O_RDONLY) for _ in range(2))
    os.set_inheritable(fuse, False)
    for work in (lambda: os.read(first, 4096), lambda: mmap.mmap(second, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)):
        if os.fork() == 0:
            os.close(fuse)
            drop_stdio()
            work()
            os._exit(0)
        time.sleep(0.3)
    say("holds")
    sys.stdin.read()


def serve_no_page(fuse):
    """The rest of the protocol (include/uapi/linux/fuse.h, 7.31), as far as it is asked. The second OPEN is answered with FOPEN_DIRECT_IO."""
    def attributes(number):
        return struct.pack("<6Q10I", number, 65536, 128, 0, 0, 0, 0, 0, 0, 0o40755 if number == 1 else 0o100644, 1, 0, 0, 0, 4096, 0)

    opens = 0
    while True:
        _, code, unique, node = struct.unpack_from("<IIQQ", os.read(fuse, 1 << 20))
        answers = {
            26: struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 64, 48, 4096, 1, 0, 0, 0),  # INIT
            1: struct.pack("<QQQQII", 2, 0, 1000, 1000, 0, 0) + attributes(2),  # LOOKUP
            3: struct.pack("<QII", 1000, 0, 0) + attributes(node),  # GETATTR
            14: struct.pack("<QII", opens, 1 if opens else 2, 0),  # OPEN: FOPEN_KEEP_CACHE at first
        }
        opens += code == 14
        if code not in (2, 15, 36, 42):  # FORGET, READ, INTERRUPT, BATCH_FORGET
            said = answers.get(code, b"")
            os.write(fuse, struct.pack("<IiQ", 16 + len(said), 0 if said else -errno.ENOSYS, unique) + said)


def zombies(count):
    """Orphans that have ended: whoever adopts them has to collect them."""
    for _ in range(int(count)):
        if os.fork() == 0:
            os.fork()
            os._exit(0)
        os.wait()
    say("done")
    sys.stdin.read()


def dying(count):
    """Many processes that are about to end when the payload does."""
    for _ in range(int(count)):
        if os.fork() == 0:
            drop_stdio()
            time.sleep(0.002 * (os.getpid() % 8))
            os._exit(0)
    os._exit(42)


def forever():
    """Stop itself: no signal but CONT and KILL goes through any more."""
    say("ready")
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


# ---- the payload's own end ----


def kill_parents(*pids):
    """Stop and kill whoever waits for us, then end with 42."""
    for pid in {os.getppid(), *map(int, pids)} - {0}:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            try:
                os.kill(pid, number)
            except OSError as wrong:
                say(f"kill({pid}): {wrong.strerror}")
    time.sleep(0.1)
    os._exit(42)


def term_self():
    """Die of the own signal, as programs that clean up do."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    say("still alive")
    os._exit(7)


def tracee():
    """Our parent is told of each signal that we get then, before we get it (ptrace(2)). One whose default is to be ignored; our code is 42."""
    say(LIBC.ptrace(TRACEME, 0, None, None))
    os.kill(os.getpid(), signal.SIGURG)
    time.sleep(0.1)
    os._exit(42)


def careless_waiter(*command):
    """For the control: what takes the first word of its child for its end."""
    status = os.waitpid(os.posix_spawn(command[0], command, os.environ), 0)[1]
    os._exit(os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.WEXITSTATUS(status))


def orphan_code():
    """An orphan ends with 0 a moment before us, another one a moment after; our own code is 42."""
    for seconds in (0.02, 0.1):
        if os.fork() == 0:
            if os.fork() == 0:
                drop_stdio()
                time.sleep(seconds)
            os._exit(0)
        os.wait()
    time.sleep(0.05)
    os._exit(42)


def careless_init(*command):
    """For the control: what waits for any child, and takes the last one's status for the payload's."""
    call(LIBC.prctl, SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.fork() == 0:
        os.execv(command[0], command)
    status = 0
    while True:
        try:
            status = os.wait()[1]
        except ChildProcessError:
            os._exit(os.WEXITSTATUS(status))


def careless_killer():
    """For the control: a cleaner that signals what cgroup.procs says. Tasks that are out of its sight stand there as 0 (cgroups(7))."""
    if os.getpid() != 1:
        return "no process namespace"  # nothing is killed that could be somebody's
    if os.fork() == 0:
        for line in read(own_groups()[0] + "/cgroup.procs").split():
            if int(line) not in (1, os.getpid()):
                os.kill(int(line), signal.SIGKILL)
        os._exit(42)
    os.wait()
    os._exit(0)


# ---- what reaches the pilot's ----


def victim():
    """A process of the pilot's with its secret open and in its working directory."""
    with open("secret"):
        say("ready")
        signal.pause()


def canary():
    """A process of the pilot's with a secret in memory and in an open file. It answers each line. where: address, descriptor."""
    hits = []
    signal.signal(signal.SIGURG, lambda *_: hits.append(1))
    LIBC.prctl(SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # a node with Yama shows as much as one without
    with open("secret", "rb") as file:
        held = ctypes.create_string_buffer(file.read() + bytes(64))
        with open("where", "w") as where:
            where.write(f"{ctypes.addressof(held)} {file.fileno()}")
        say("ready")
        while sys.stdin.readline():
            say(f"{len(hits)} {held.raw[:32].decode('ascii', 'replace')}")


def proc_files(pid):
    """What /proc tells of that process."""
    found = []
    for name in ("environ", "cmdline", "maps", "cwd/secret", f"root/proc/{pid}/cwd/secret", *(f"fd/{n}" for n in range(3, 10))):
        try:
            found.append(read(f"/proc/{pid}/{name}"))
        except OSError as wrong:
            found.append(type(wrong).__name__.encode())
    return b" ".join(found)


def signal_all(pid):
    """One whose default is to be ignored, so that nobody else is hurt."""
    said = []
    for target in (int(pid), -int(pid), -1):
        try:
            os.kill(target, signal.SIGURG)
            said.append("sent")
        except OSError as wrong:
            said.append(str(wrong.strerror))
    return said


def sigio(pid):
    """Let the kernel send it: make that process the owner of a socket that tells of input by a signal."""
    ours, other = socket.socketpair()
    fcntl.fcntl(ours, fcntl.F_SETOWN, int(pid))
    fcntl.fcntl(ours, F_SETSIG, signal.SIGURG)
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    other.send(b".")
    return "armed"


def poke(pid, address, word):
    """Write into its memory: by ptrace(2), by /proc/PID/mem."""
    number, place, word = int(pid), int(address), word.encode()
    LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    LIBC.ptrace.restype = ctypes.c_long
    try:
        call(LIBC.ptrace, ATTACH, number, None, None)
        os.waitpid(number, 0x40000000)
        call(LIBC.ptrace, POKEDATA, number, place, int.from_bytes(word[:8], sys.byteorder))
        call(LIBC.ptrace, DETACH, number, None, None)
    except OSError as wrong:
        say(wrong)
    with open(f"/proc/{number}/mem", "r+b", buffering=0) as memory:
        memory.seek(place)
        memory.write(word[:8])
    return "written"


class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def steal(pid, address, fd):
    """Read its memory, then a copy of its descriptor."""
    found = []
    for work, where in ((memory_of, address), (descriptor_of, fd)):
        try:
            found.append(work(int(pid), int(where)))
        except OSError as wrong:
            found.append(str(wrong).encode())
    return b" ".join(found)


def memory_of(pid, address):
    mine = ctypes.create_string_buffer(64)
    local, remote = Iovec(ctypes.addressof(mine), 64), Iovec(address, 64)
    call(LIBC.process_vm_readv, pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0))
    return mine.value


def descriptor_of(pid, fd):
    return os.pread(syscall(PIDFD_GETFD, syscall(PIDFD_OPEN, pid, 0), fd, 0), 64, 0)


def reachable(path):
    """A process of the pilot's with its secret open, to which everybody may connect."""
    LIBC.prctl(SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # as the canary
    with open("secret"), socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        os.chmod(path, 0o777)
        server.listen(5)
        say("ready")
        signal.pause()


def steal_by_socket(path):
    """The socket tells its peer's pidfd, in whatever process namespace that is."""
    found = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    for fd in range(3, 8):
        try:
            found.append(os.pread(syscall(PIDFD_GETFD, pidfd, fd, 0), 64, 0))
        except OSError as wrong:
            found.append(str(wrong).encode())
    return b" ".join(found)


def setids(*commands):
    """Start set-id programs that wait for a word, and wait ourselves."""
    running, pipe = [], subprocess.PIPE
    for command in commands:
        try:
            running.append(subprocess.Popen(command.split(), stdin=pipe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        except OSError as wrong:
            say(f"{command}: {wrong.strerror}")
    time.sleep(0.05)
    say("ready")
    sys.stdin.read()
    for one in running:
        try:
            one.kill()
        except OSError:
            pass


def hear(*paths):
    """What listens at these names says."""
    found = []
    for path in (*paths, *glob.glob("/tmp/ssh-*/agent*"), *filter(None, [os.environ.get("SSH_AUTH_SOCK")])):
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(2)
                sock.connect(path)
                found.append(sock.recv(100))
        except OSError as wrong:
            found.append(str(wrong).encode())
    return b" ".join(found) or b"nothing there"


def poison(name, text, *places):
    """A file beside those that shells and interpreters read when they start: in places that we are told, and in what we take for home."""
    said = []
    for place in (*places, os.environ.get("HOME", "/nowhere")):
        try:
            with open(f"{place}/{name}", "w") as file:
                file.write(text)
            said.append("written")
        except OSError as wrong:
            said.append(str(wrong.strerror))
    return said


def poisoned(name):
    """What is in that file of what we take for home; it is taken away."""
    path = f"{os.environ.get('HOME', '/nowhere')}/{name}"
    text = read(path)
    os.unlink(path)
    return text


# ---- control groups ----


def own_groups():
    """Directories of our own control group (v2), as far as it is mounted."""
    paths = [line.partition("::")[2] for line in read("/proc/self/cgroup").decode().splitlines() if line.startswith("0::")]
    tops = [line.split()[1] for line in read("/proc/self/mounts").decode().splitlines() if line.split()[2] == "cgroup2"]
    return [top + path for top in tops for path in paths if os.path.isdir(top + path)]


def mount_groups():
    """As root of a user namespace with a view of the groups of its own."""
    become_root(NEWCGROUP)
    os.makedirs("groups", exist_ok=True)
    call(LIBC.mount, b"none", b"groups", b"cgroup2", ctypes.c_ulong(0), None)
    return "groups"


def in_groups(work, groups):
    """work(group) in each of these groups, in our own, and in our own mounted by ourselves; what came of each."""
    said = []
    for group in (*groups, *own_groups()):
        try:
            said.append(work(group))
        except OSError as wrong:
            said.append(str(wrong.strerror))
    try:
        said.append(in_child(lambda: work(mount_groups())))
    except OSError as wrong:
        said.append(f"mounted: {wrong.strerror}")
    return said


def freeze(path, *groups):
    """Processes of ours that no signal wakes."""
    lock = hold(path)

    def ice(group):
        os.mkdir(f"{group}/ice")
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            drop_stdio()
            os.write(writer, b".")
            for fd in set(range(3, 64)) - {lock}:
                try:
                    os.close(fd)
                except OSError:
                    pass
            rest()
        os.read(reader, 1)
        tell(f"{group}/ice/cgroup.procs", pid)
        tell(f"{group}/ice/cgroup.freeze", 1)
        return f"frozen below {group}"

    return in_groups(ice, groups)


def crowd(count, *groups):
    """Groups in groups, some of them threaded, that whoever removes ours has to remove first."""

    def fill(group):
        for number in range(int(count)):
            os.makedirs(f"{group}/crowd{number}/in/.in")
        tell(f"{group}/crowd0/in/cgroup.type", "threaded")
        return f"made below {group}"

    return in_groups(fill, groups)


def move(group):
    """Into another group of the pilot's."""
    tell(f"{group}/cgroup.procs", 0)
    say("moved")
    sys.stdin.read()
