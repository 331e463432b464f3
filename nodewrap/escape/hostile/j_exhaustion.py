"""Surface J, inside."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

from nodewrap.escape.hostile.common import LIBC, call, say

TMP = ("/tmp", "/var/tmp", "/dev/shm")


def forks(most):
    """That many sleeping processes, or as many as there may be."""
    made = []
    for _ in range(int(most)):
        try:
            pid = os.fork()
        except OSError:
            break
        if pid == 0:
            time.sleep(20)
            os._exit(0)
        made.append(pid)
    say(f"{len(made)}")
    sys.stdin.read()
    for pid in made:
        os.kill(pid, signal.SIGKILL)


def neighbour(limit):
    """May fork while its id has that many processes (RLIMIT_NPROC); tries it at each line of stdin."""
    resource.setrlimit(resource.RLIMIT_NPROC, (int(limit), int(limit)))
    say("ready")
    for _ in sys.stdin:
        try:
            pid = os.fork()
        except OSError as wrong:
            say(f"no: {wrong.strerror}")
            continue
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        say("forked")


def keep_memory(word, key, mebibytes):
    """Files in memory, a System V segment, a memfd and a daemon that holds it; then killed."""
    size = int(mebibytes) << 20
    for top in TMP:
        try:
            with open(f"{top}/{word}", "wb") as file:
                file.truncate(size)
                file.write(b"x" * (1 << 20))
        except OSError:
            continue
    call(LIBC.shmget, int(key), ctypes.c_size_t(size), 0o1666)
    fd = os.memfd_create(word)
    os.write(fd, b"x" * size)
    if os.fork() == 0:
        os.setsid()
        for number in (0, 1, 2):
            os.close(number)
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def fill(mebibytes, *places):
    """Each place as full as it gets, with no more than so much."""
    said = []
    for place in places:
        path, count = f"{place}/filled-{os.getpid()}", 0
        try:
            with open(path, "wb", buffering=0) as file:
                for _ in range(int(mebibytes)):
                    count += file.write(b"x" * (1 << 20))
        except OSError as wrong:
            said.append(f"{place}: {count >> 20} MiB, {wrong.strerror}")
        else:
            said.append(f"{place}: {count >> 20} MiB")
    say("ready: " + "; ".join(said))
    sys.stdin.read()
    for place in places:
        try:
            os.unlink(f"{place}/filled-{os.getpid()}")
        except OSError:
            continue


def segments(most):
    """That many System V segments of one page."""
    count = 0
    for _ in range(int(most)):
        if LIBC.shmget(0, ctypes.c_size_t(4096), 0o1666) < 0:  # IPC_PRIVATE
            break
        count += 1
    say(f"ready: {count} segments")
    sys.stdin.read()


def root_of_namespaces(flags):
    """As who may: new namespaces, in a user namespace of our own when we are not root."""
    if os.geteuid() == 0:
        call(LIBC.unshare, flags)
        return
    uid, gid = os.getuid(), os.getgid()
    call(LIBC.unshare, 0x10000000 | flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mounts(most):
    """That many mounts where we are, if we may, else in a namespace of our own."""
    def bind():
        return LIBC.mount(b"/proc", b"/proc", None, 0x1000, None)

    if bind():
        root_of_namespaces(0x00020000)
    count = sum(bind() == 0 for _ in range(int(most)))
    say(f"ready: {count} mounts")
    sys.stdin.read()


def namespaces(most, mark):
    """That many network namespaces, each held by a daemon. mark: by which it is known from outside."""
    count = 0
    for _ in range(int(most)):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.setsid()
                LIBC.prctl(15, mark.encode())  # PR_SET_NAME
                root_of_namespaces(0x40000000)
                os.write(writer, b"1")
            finally:
                os.close(writer)
                for number in (0, 1, 2):
                    os.close(number)
                time.sleep(20)
                os._exit(0)
        os.close(writer)
        count += len(os.read(reader, 1))
        os.close(reader)
    return f"{count} namespaces"


def deep_namespaces(levels, path):
    """A pid namespace in a pid namespace, and so on; in the last one a daemon that writes."""
    level = 0
    while level < int(levels):
        try:
            root_of_namespaces(0x20000000)
        except OSError as wrong:
            say(f"{level} levels: {wrong.strerror}")
            break
        level += 1
        pid = os.fork()
        if pid:
            if level == 1:
                await_file(path)
            for number in (0, 1, 2):
                os.close(number)
            time.sleep(20)
            os._exit(0)
    else:
        say(f"{level} levels")
    if level == 0:
        return
    for number in (0, 1, 2):
        os.close(number)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with open(path, "w") as file:
            file.write(str(time.monotonic()))
        time.sleep(0.01)


def await_file(path):
    """The outermost: its end is the payload's."""
    end = time.monotonic() + 3
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.01)
    os._exit(0)


def log_flood(word):
    """Lines for the kernel's log."""
    said = []
    for path in ("/dev/kmsg", "/proc/kmsg", "/dev/log"):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            for _ in range(3):
                os.write(fd, f"<4>{word}\n".encode())
            os.close(fd)
            said.append(path)
        except OSError as wrong:
            said.append(f"{path}: {wrong.strerror}")
    return ", ".join(said)


def litter(word, count):
    """So many files where everybody may write, at the very end."""
    for place in TMP:
        try:
            os.mkdir(f"{place}/{word}")
        except OSError:
            continue
        for number in range(int(count)):
            os.close(os.open(f"{place}/{word}/{number}", os.O_CREAT | os.O_WRONLY))


def hidden_work(seconds):
    """An orphan that nobody waits for uses the processor for so long."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(reader)
            end = time.process_time() + float(seconds)
            while time.process_time() < end:
                pass
            os._exit(0)
        os._exit(0)
    os.close(writer)
    os.wait()
    os.read(reader, 1)  # its end
    time.sleep(0.05)


def flood(mebibytes):
    """That much output, as fast as it goes."""
    block = b"x" * (1 << 20)
    for _ in range(int(mebibytes)):
        os.write(1, block)


def memory_files(mebibytes):
    """That much each in /tmp, in a memfd and in a tmpfs of our own namespaces; held open."""

    def fill(path):
        write(os.open(path, os.O_WRONLY | os.O_CREAT), path)

    def write(fd, path=None):
        try:
            for _ in range(int(mebibytes)):
                os.write(fd, b"x" * (1 << 20))
        finally:
            if path:
                os.unlink(path)

    def own():
        ids = os.getuid(), os.getgid()
        call(LIBC.unshare, 0x10020000)  # CLONE_NEWUSER | CLONE_NEWNS
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        call(LIBC.mount, b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)
        fill("/tmp/own")

    said = []
    for work in (lambda: fill(f"/tmp/{os.getpid()}"), lambda: write(os.memfd_create("own")), own):
        try:
            work()
            said.append("done")
        except OSError as wrong:
            said.append(str(wrong.strerror))
    say(", ".join(said))
    sys.stdin.read()


# ---- careless wrappers, as controls ----


def careless_group(path, *argv):
    """A control group for each run, and none is ever removed."""
    os.mkdir(path)
    subprocess.run(argv, check=False)


def careless_buffer(*argv):
    """All output first, then on."""
    said = subprocess.run(argv, stdout=subprocess.PIPE, check=False).stdout
    say("ready")
    sys.stdin.read()
    os.write(1, said[:100])


def careless_lock(path, *argv):
    """One at a time: who finds the lock taken gives up."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return "busy"
    time.sleep(0.05)
    os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)
    os.close(fd)
    os.unlink(path)


def careless_queue(path, *argv):
    """One at a time, with the lock held by a process that its caller may stop."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        time.sleep(0.05)
        os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)
