"""What a payload can reach: a pilot that leaves a secret in every place, a payload that looks for them, and the table of what it may find.

One file of the standard library alone, because it runs on both sides, as ``python3 -I -c SOURCE ROLE ...``:

plant   the pilot. Plants one fresh secret in each place, starts the payload, collects what reached the pilot's side meanwhile, and prints one JSON
        document: what is open, and what both sides say.
victim  a process of the pilot's, with secrets in its arguments, environment, memory, descriptors and working directory.
look    the payload. It is told where to look, never what is there: that it prints a secret proves that it read it.
leave   the payload of the rows about what is left: a process that has left its session, files, System V memory and a queue.

What it finds is judged by the pilot: a secret that came back, a connection or a signal that arrived. A payload's word alone counts only for what
exists nowhere but in itself (a system call that worked).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import platform
import pty
import re
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time

#: What is looked for: {item: what stands in the table}. docs/isolation.md has its rows in this order.
ITEMS = {
    "env": "pilot's token in the environment",
    "fd": "inherited descriptor of a pilot's directory",
    "seen": "pilot's process visible",
    "signal": "pilot's process can be signalled",
    "trace": "pilot's process can be read: memory, environment, descriptors, directory",
    "abstract": "pilot's abstract sockets",
    "named": "pilot's socket in /tmp",
    "loopback": "pilot's port on loopback",
    "sysv": "pilot's System V memory, semaphore, queue",
    "mqueue": "pilot's POSIX queue",
    "shm": "file in /dev/shm",
    "tmp": "file in /tmp",
    "vartmp": "file in /var/tmp",
    "home": "file in the pilot's home",
    "credential": "pilot's credential files",
    "session_key": "key in the session keyring",
    "user_key": "key in the user keyring",
    "userns": "nested user namespace",
    "vsock": "AF_VSOCK",
    "alg": "AF_ALG",
    "packet": "AF_PACKET",
    "netlink": "netlink other than route",
    "io_uring": "io_uring",
    "disk": "raw disk, memory or kvm node in /dev",
    "mknod": "device node made",
    "tty": "pilot's terminal is its controlling one",
    "tiocsti": "TIOCSTI on the pilot's terminal",
    "setid": "set-id bits put on a file",
    "gain": "set-id program of the node gives its rights",
    "dmesg": "kernel's log",
    "writable": "/sys or /proc/sys writable",
    "cgroups": "cgroup tree of the node visible",
    "cgroup": "another cgroup of the pilot's entered",
}
#: An ordinary account has these on few nodes, so root is who must find them open (the positive control).
ROOT_ONLY = {"writable", "dmesg"}
#: What a node may lack altogether: a closed one then says nothing about the tool that is measured.
NODE_MAY_LACK = {"userns", "vsock", "alg", "packet", "netlink", "io_uring", "disk", "tiocsti", "gain", "dmesg", "cgroups", "cgroup"}

#: What is open in each profile, whatever launcher and mode: the one list that tests hold nodewrap to and docs/isolation.md shows.
#: batch and compat have the host's network, containers of the payload's own, and /sys read-only, which tells the names of the node's groups.
SHARED = {"loopback", "userns", "cgroups"}
#: none leaves what the identity alone does not close: in every mode what the kernel and the node give to everybody, ...
WORLD = {"seen", "abstract", "named", "sysv", "mqueue", "shm", "tmp", "vartmp", "home", "vsock", "alg", "packet"}
WORLD |= {"netlink", "io_uring", "disk", "mknod", "setid"}
OPEN = {"strict": set(), "batch": SHARED, "compat": SHARED, "none": SHARED | WORLD}
#: ... under the pilot's own id (log-only, and map by the userns launcher without a delegated range) also what is the pilot's, ...
OF_THE_PILOTS_ID = {"signal", "credential", "cgroup"}
#: ... and outside of a user namespace of its own also what the kernel gives to the same id in the same namespace.
OF_ITS_NAMESPACE = {"trace", "user_key"}
GATES = ("mem", "port", "kmem", "kvm", "loop-control", "snapshot", "nvram")
#: Trees of kernel settings. Not all of /sys: it has ten thousands of files.
SETTINGS = ("/proc/sys/kernel", "/proc/sys/vm", "/proc/sys/fs", "/proc/sys/net", "/sys/kernel", "/sys/power", "/sys/module/kernel")
SECRET = "nwsecret"
FACTS = "@facts@"  # a word of the payload's command that the pilot replaces
PTS = 16  # the pilot's terminal has at least this number, so that it is no first one of a /dev/pts of the payload's own
VICTIM_FD = 200  # above all that the pilot has open
KEYCTL, ADD_KEY = {"aarch64": (219, 217)}.get(platform.machine(), (250, 248))
IO_URING_SETUP = 425
SESSION, USER = -3, -4
TIOCSTI, TIOCGDEV = 0x5412, 0x80045432
CLONE_NEWUSER = 0x10000000
AF_ALG, AF_VSOCK, AF_PACKET, AF_NETLINK = 38, 40, 17, 16


def libc():
    found = ctypes.CDLL(None, use_errno=True)
    found.shmat.restype, found.shmat.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    found.shmdt.argtypes = (ctypes.c_void_p,)
    return found


def librt():
    return ctypes.CDLL("librt.so.1", use_errno=True)  # a stub with the same names from glibc 2.34 on


def raw(function, *args):
    """The result of a C function; OSError when it is negative."""
    found = function(*args)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


# ---- the payload ----


class Look:
    """loot: {item: [secrets]}. said: {item: "ok" or the name of the error}, of each way that was tried."""

    def __init__(self, facts):
        self.facts, self.loot, self.said = facts, {}, {}

    def take(self, item, way, *args):
        """One way to an item: what it returns is searched for secrets, an OSError is an answer."""
        try:
            found = way(*args)
        except OSError as wrong:
            self.said.setdefault(item, []).append(errno.errorcode.get(wrong.errno, str(wrong)))
            return
        self.said.setdefault(item, []).append("ok")
        data = found if isinstance(found, bytes) else str(found).encode()
        self.loot.setdefault(item, []).extend(word.decode() for word in re.findall(rb"nwsecret-\w+-[0-9a-f]+", data))

    def all(self):
        for name in [name for name in dir(self) if name.startswith("find_")]:
            getattr(self, name)()
        return {"loot": self.loot, "said": self.said, "uid": os.getuid(), "pid": os.getpid()}

    # the pilot

    def find_environment(self):
        self.take("env", lambda: dict(os.environ))
        self.take("env", read, "/proc/self/environ")

    def find_descriptors(self):
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                self.take("fd", lambda at=int(name): os.read(os.open("secret", os.O_RDONLY, dir_fd=at), 100))

    def find_processes(self):
        others = [path for path in glob.glob("/proc/[0-9]*") if path != f"/proc/{os.getpid()}"]
        for path in others:
            self.take("seen", read, f"{path}/cmdline")
            self.take("trace", read, f"{path}/environ")
        victim, address = self.facts["victim"], self.facts["address"]
        self.take("trace", read_memory, victim, address)
        for name in (f"fd/{VICTIM_FD}", "cwd/secret", f"root{self.facts['private']}/secret"):
            self.take("trace", read, f"/proc/{victim}/{name}")
        if victim != os.getpid():
            self.take("signal", os.kill, victim, signal.SIGUSR1)

    def find_sockets(self):
        facts = self.facts
        self.take("abstract", hear, socket.AF_UNIX, "\0" + facts["abstract"])
        self.take("abstract", tell, "\0" + facts["datagram"], facts["word"])
        self.take("named", hear, socket.AF_UNIX, facts["socket"])
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            self.take("loopback", hear, family, (host, facts["port"]))

    def find_ipc(self):
        key = self.facts["key"]
        for way in (read_shm, read_sem, read_msg):
            self.take("sysv", way, key)
        self.take("mqueue", read_queue, self.facts["queue"])
        self.take("mqueue", lambda: b"".join(read(path) for path in glob.glob("/dev/mqueue/*")))

    def find_files(self):
        for item in ("shm", "tmp", "vartmp", "home"):
            self.take(item, read, self.facts["files"][item])
        for path in self.facts["credentials"]:
            self.take("credential", read, path)

    def find_keys(self):
        self.take("session_key", read_key, SESSION, self.facts["key_name"])
        self.take("session_key", read_number, self.facts["session_key"])
        self.take("user_key", read_number, self.facts["user_key"])
        self.take("user_key", keyctl, 8, USER, SESSION)  # KEYCTL_LINK: its keys count as our own then (keyrings(7), possession)
        self.take("user_key", read_key, USER, self.facts["key_name"])

    def find_terminal(self):
        word = self.facts["word"]
        for fd in (0, 1, 2):
            if os.isatty(fd) and os.fstat(fd).st_rdev == self.facts["tty"]:
                self.take("tiocsti", type_into, fd, word)
        self.take("tty", self.controlling)

    def controlling(self):
        """Secret-free: it is the pilot's when the device's number is."""
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        number = struct.unpack("I", fcntl.ioctl(fd, TIOCGDEV, bytes(4)))[0]
        if number != self.facts["tty"]:
            raise OSError(errno.ENXIO, "another terminal")
        self.take("tiocsti", type_into, fd, self.facts["word"])

    # the kernel

    def find_kernel(self):
        for item, family in (("vsock", AF_VSOCK), ("alg", AF_ALG), ("packet", AF_PACKET)):
            self.take(item, answers, family, 0)
        for protocol in (4, 6, 9, 12, 15):  # sock_diag, xfrm, audit, netfilter, uevent
            self.take("netlink", answers, AF_NETLINK, protocol)
        self.take("io_uring", lambda: os.close(raw(libc().syscall, IO_URING_SETUP, 4, bytes(120))))
        self.take("userns", nested)
        self.take("dmesg", lambda: raw(libc().klogctl, 3, ctypes.create_string_buffer(100), 100))
        self.take("dmesg", lambda: os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)))
        self.take("writable", writable)

    def find_devices(self):
        self.take("disk", disks)
        path = f"/tmp/{self.facts['word']}-node"
        self.take("mknod", os.mknod, path, 0o600 | stat.S_IFCHR, os.makedev(0, 0))  # the one that needs no capability: overlayfs' whiteout
        self.take("mknod", os.mknod, path + "b", 0o600 | stat.S_IFBLK, os.makedev(7, 0))
        unlink(path), unlink(path + "b")

    def find_set_id(self):
        for top in (".", "/tmp"):
            for bit in (stat.S_ISUID, stat.S_ISGID):
                self.take("setid", set_id, f"{top}/{self.facts['word']}-setid", bit)
        self.take("gain", gain)

    def find_cgroups(self):
        self.take("cgroups", cgroups)
        if self.facts["cgroup"]:
            self.take("cgroup", enter, self.facts["cgroup"])


def read(path):
    with open(path, "rb") as file:
        return file.read(1 << 20)


def unlink(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def hear(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(5)
        sock.connect(address)
        return sock.recv(100)


def tell(address, word):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(word.encode(), address)


class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def read_memory(pid, address):
    mine = ctypes.create_string_buffer(100)
    local, remote = Iovec(ctypes.addressof(mine), 100), Iovec(address, 100)
    raw(libc().process_vm_readv, pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0))
    return mine.raw


def read_shm(key):
    found = raw(libc().shmget, key, 0, 0)
    at = libc().shmat(found, None, 0o10000)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "shmat")
    return ctypes.string_at(at, 100)


def read_sem(key):
    return f"{SECRET}-sysv-{raw(libc().semctl, raw(libc().semget, key, 1, 0), 0, 12):x}"  # GETVAL


def read_msg(key):
    message = ctypes.create_string_buffer(200)
    raw(libc().msgrcv, raw(libc().msgget, key, 0), message, ctypes.c_size_t(100), ctypes.c_long(0), 0o4000)
    return message.raw


def read_queue(name):
    queue, message = raw(librt().mq_open, name.encode(), os.O_RDONLY | os.O_NONBLOCK), ctypes.create_string_buffer(8192)
    raw(librt().mq_receive, queue, message, ctypes.c_size_t(8192), None)
    return message.raw


def keyctl(*args):
    return raw(libc().syscall, KEYCTL, *args)


def read_key(ring, name):
    return read_number(keyctl(10, ring, b"user", name.encode(), 0))  # KEYCTL_SEARCH


def read_number(number):
    content = ctypes.create_string_buffer(100)
    keyctl(11, number, content, ctypes.c_size_t(100))  # KEYCTL_READ
    return content.raw


def type_into(fd, word):
    for letter in word:
        fcntl.ioctl(fd, TIOCSTI, letter.encode())


def answers(family, protocol):
    """The kernel has that family and lets us near it: any answer but these is from behind the door."""
    closed = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ENOSYS)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try:
            socket.socket(family, kind, protocol).close()
            return
        except OSError as wrong:
            if wrong.errno in closed and (family == AF_NETLINK or wrong.errno != errno.EPROTONOSUPPORT):
                raise
    # a family that only refuses (packet: EPERM) is there all the same


def in_child(work):
    """What work() raises, from a child: it changes what cannot be changed back."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"0")
        except OSError as wrong:
            os.write(writer, str(wrong.errno).encode())
        finally:
            os._exit(0)
    os.close(writer)
    number = int(os.read(reader, 10) or errno.EPIPE)
    os.close(reader)
    os.waitpid(pid, 0)
    if number:
        raise OSError(number, os.strerror(number))


def nested():
    in_child(lambda: raw(libc().unshare, CLONE_NEWUSER))


def disks():
    """Nodes that are a disk, the memory or a gate to the kernel, whoever may open them."""
    bad = [path for path in glob.glob("/dev/**", recursive=True) if is_gate(path)]
    if not bad:
        raise OSError(errno.ENOENT, "none")
    return bad


def is_gate(path):
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and os.path.basename(path) in GATES)


def set_id(path, bit):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o700))
    try:
        os.chmod(path, 0o700 | bit)
        if not os.stat(path).st_mode & bit:
            raise OSError(errno.EPERM, "silently left out")
    finally:
        unlink(path)


def gain():
    """A set-id program of the node has other rights than ours when we start it."""
    programs = [path for path in ("/usr/bin/passwd", "/usr/bin/su", "/usr/bin/mount") if has_set_id(path)]
    if not programs or os.getuid() == 0:
        raise OSError(errno.ENOENT, "nothing to gain")
    with subprocess.Popen([programs[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        status = {}
        for _ in range(1000):  # exec closes the pipe that Popen waits for before it changes the ids
            status = dict(line.split(":\t", 1) for line in read(f"/proc/{child.pid}/status").decode().splitlines() if ":\t" in line)
            if status["State"][0] in "SZ" and status["Name"].strip() == os.path.basename(programs[0]):
                break
            time.sleep(0.001)
        child.kill()
    if int(status["Uid"].split()[1]) == os.geteuid():
        raise OSError(errno.EPERM, "as ourselves")


def has_set_id(path):
    return os.path.exists(path) and bool(os.stat(path).st_mode & stat.S_ISUID)


def writable():
    """Files of the kernel's that we may write, outside our own process. Names only: nothing is written."""
    found = [path for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern") if os.access(path, os.W_OK)]
    for top in SETTINGS:
        for where, _, names in os.walk(top):
            found += [path for path in (f"{where}/{name}" for name in names) if os.access(path, os.W_OK)]
    # Of mode 0666, but their handlers want a capability; AppArmor's .null is /dev/null.
    found = [path for path in found if path != "/proc/sys/kernel/ns_last_pid" and not path.startswith("/sys/kernel/security/apparmor/.")]
    if not found:
        raise OSError(errno.EROFS, "none")
    return found[:5]


def cgroups():
    """Groups of the node: directories below a mount of cgroup file systems."""
    found = [path for path in glob.glob("/sys/fs/cgroup/*/*") + glob.glob("/sys/fs/cgroup/*") if os.path.exists(f"{path}/cgroup.procs")]
    if not found:
        raise OSError(errno.ENOENT, "none")
    return found[:5]


def enter(group):
    """A child moves itself there; how it was before is not asked."""

    def move():
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write("0")

    in_child(move)


# ---- the pilot ----


class Plant:
    """Secrets in every place. facts: where, for the payload. close(): take all back."""

    def __init__(self, home, cgroup):
        self.secret = {item: f"{SECRET}-{item}-{secrets.token_hex(8)}" for item in ITEMS}
        self.word = f"nwprobe{secrets.token_hex(6)}"
        self.undo, self.heard, self.keep = [], [], []
        self.facts = {"word": self.word, "cgroup": cgroup, "key_name": self.word, "key": secrets.randbelow(1 << 30) + 1}
        self.files(home)
        self.kernel_objects()
        self.keys()
        self.listen()
        self.terminal()
        self.victim()

    def file(self, path, item, mode):
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w") as file:
            file.write(self.secret[item])
        os.chmod(path, mode)
        self.undo.append((unlink, path))
        return path

    def files(self, home):
        places = {"shm": "/dev/shm", "tmp": "/tmp", "vartmp": "/var/tmp", "home": home}
        self.facts["files"] = {item: self.file(f"{top}/{self.word}", item, 0o644) for item, top in places.items()}
        self.facts["credentials"] = [self.file(f"{top}/x509up_{self.word}", "credential", 0o600) for top in ("/tmp", home)]
        self.private = f"{home}/{self.word}-private"
        os.mkdir(self.private, 0o700)
        self.undo.append((os.rmdir, self.private))
        self.facts["private"] = self.private
        self.file(f"{self.private}/secret", "fd", 0o600)
        self.directory = os.open(self.private, os.O_RDONLY)
        os.set_inheritable(self.directory, True)
        self.cwd = f"{home}/{self.word}-cwd"
        os.mkdir(self.cwd, 0o700)
        self.undo.append((os.rmdir, self.cwd))
        self.file(f"{self.cwd}/secret", "trace", 0o600)

    def kernel_objects(self):
        key, c, rt = self.facts["key"], libc(), librt()
        shm = raw(c.shmget, key, 4096, 0o1666)
        self.undo.append((c.shmctl, shm, 0, None))
        at = c.shmat(shm, None, 0)
        ctypes.memmove(at, self.secret["sysv"].encode(), len(self.secret["sysv"]))
        c.shmdt(at)
        sem = raw(c.semget, key, 1, 0o1666)
        self.undo.append((c.semctl, sem, 0, 0))
        self.semaphore = secrets.randbelow(30000) + 1
        raw(c.semctl, sem, 0, 16, self.semaphore)  # SETVAL
        msg = raw(c.msgget, key, 0o1666)
        self.undo.append((c.msgctl, msg, 0, None))
        raw(c.msgsnd, msg, struct.pack("l", 1) + self.secret["sysv"].encode(), ctypes.c_size_t(len(self.secret["sysv"])), 0)
        self.facts["queue"] = name = f"/{self.word}"
        umask = os.umask(0)
        queue = raw(rt.mq_open, name.encode(), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, None)
        os.umask(umask)
        self.undo.append((rt.mq_unlink, name.encode()))
        raw(rt.mq_send, queue, self.secret["mqueue"].encode(), ctypes.c_size_t(len(self.secret["mqueue"])), 0)

    def keys(self):
        keyctl(1, None)  # KEYCTL_JOIN_SESSION_KEYRING
        for item, ring in (("session_key", SESSION), ("user_key", USER)):
            text = self.secret[item].encode()
            self.facts[item] = raw(libc().syscall, ADD_KEY, b"user", self.word.encode(), text, ctypes.c_size_t(len(text)), ring)
            self.undo.append((keyctl, 9, self.facts[item], ring))  # KEYCTL_UNLINK

    def listen(self):
        self.facts.update(abstract=f"{self.word}-s", datagram=f"{self.word}-d", socket=f"/tmp/{self.word}-socket")
        abstract, named = (socket.socket(socket.AF_UNIX) for _ in range(2))
        abstract.bind("\0" + self.facts["abstract"])
        named.bind(self.facts["socket"])
        os.chmod(self.facts["socket"], 0o666)
        self.undo.append((unlink, self.facts["socket"]))
        v4 = socket.create_server(("127.0.0.1", 0))
        self.facts["port"] = v4.getsockname()[1]
        servers = {"abstract": [abstract], "named": [named], "loopback": [v4]}
        if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
            try:
                servers["loopback"].append(socket.create_server(("::1", self.facts["port"]), family=socket.AF_INET6))
            except OSError:
                pass  # the node has no ::1, or the port is taken there: the other one is enough
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.datagram.bind("\0" + self.facts["datagram"])
        for item, socks in servers.items():
            for sock in socks:
                sock.listen(5)
                threading.Thread(target=self.serve, args=(item, sock), daemon=True).start()

    def serve(self, item, sock):
        while True:
            other, _ = sock.accept()
            self.heard.append(item)
            other.sendall(self.secret[item].encode())
            other.close()

    def terminal(self):
        """A terminal that is the pilot's controlling one. Its number is beyond the first ones of a /dev/pts of the payload's own."""
        while True:
            self.master, self.slave = pty.openpty()
            if int(os.ttyname(self.slave).rpartition("/")[2]) >= PTS:
                break
            self.keep.append((self.master, self.slave))
        for pair in self.keep:
            os.close(pair[0]), os.close(pair[1])
        raw_mode = termios.tcgetattr(self.slave)
        raw_mode[3] &= ~(termios.ICANON | termios.ECHO)
        raw_mode[6][termios.VMIN] = raw_mode[6][termios.VTIME] = 0
        termios.tcsetattr(self.slave, termios.TCSANOW, raw_mode)
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
        self.facts["tty"] = os.fstat(self.slave).st_rdev

    def victim(self):
        command = ["/usr/bin/python3", "-I", "-c", source(), "victim", self.secret["seen"]]
        with open(f"{self.cwd}/secret", "rb") as secret:
            os.dup2(secret.fileno(), VICTIM_FD, inheritable=True)
        env = {"NWVICTIM": self.secret["trace"], "PATH": "/usr/bin:/bin"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, cwd=self.cwd, stdin=pipe, stdout=pipe, pass_fds=(VICTIM_FD,))
        os.close(VICTIM_FD)
        self.facts["victim"], self.facts["address"] = self.process.pid, int(self.process.stdout.readline())

    def judge(self, said):
        """{item: bool} of what the payload's document and the pilot's own evidence say."""
        self.process.stdin.close()
        hit = self.process.stdout.read()
        self.process.wait()
        typed, told = b"", b""
        while letters := os.read(self.slave, 100):
            typed += letters
        try:
            told = self.datagram.recv(100)
        except BlockingIOError:
            pass
        word = self.word.encode()
        evidence = {"signal": b"hit" in hit, "typed": word in typed, "datagram": told == word, "heard": sorted(set(self.heard))}
        loot, claims = said["loot"], said["said"]
        expected = {item: {secret} for item, secret in self.secret.items()}
        expected["sysv"].add(f"{SECRET}-sysv-{self.semaphore:x}")
        verdict = {item: bool(expected[item] & set(loot.get(item, ()))) for item in PROVED}
        verdict |= {item: "ok" in claims.get(item, ()) for item in ITEMS if item not in PROVED}
        verdict["signal"] = evidence["signal"]
        verdict["abstract"] |= evidence["datagram"]
        verdict["tiocsti"] |= evidence["typed"]
        return verdict, evidence

    def close(self):
        self.process.kill()
        self.process.wait()
        for function, *args in reversed(self.undo):
            function(*args)


#: Items of which the payload brings back a secret that it was not told.
PROVED = {"env", "fd", "seen", "trace", "abstract", "named", "loopback", "sysv", "mqueue", "shm", "tmp", "vartmp", "home", "credential"}
PROVED |= {"session_key", "user_key"}


def be_victim():
    """Wait for the end of stdin; what is signalled is said on stdout."""
    hit = []
    signal.signal(signal.SIGUSR1, lambda *_: hit.append(1))
    libc().prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, any: a node with Yama shows as much as one without
    held = ctypes.create_string_buffer(os.environ["NWVICTIM"].encode() + bytes(100))
    print(ctypes.addressof(held), flush=True)
    sys.stdin.read()
    if hit:
        print("hit")


def plant(options):
    """options: argv (with FACTS as one word), home, cgroup, env. Prints the pilot's document."""
    made = Plant(options["home"], options.get("cgroup"))
    try:
        os.environ["NWPILOT_TOKEN"] = made.secret["env"]
        argv = [json.dumps(made.facts) if word == FACTS else word for word in options["argv"]]
        done = subprocess.run(argv, stdin=made.slave, capture_output=True, pass_fds=(made.directory,), timeout=50)
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        if not lines or not lines[-1].startswith("{"):
            print(json.dumps({"rc": done.returncode, "out": done.stdout.decode(errors="replace"), "err": done.stderr.decode(errors="replace")}))
            return
        said = json.loads(lines[-1])
        verdict, evidence = made.judge(said)
        print(json.dumps({"rc": done.returncode, "err": done.stderr.decode(errors="replace"), "open": verdict, "evidence": evidence, **said}))
    finally:
        made.close()


# ---- what is left ----


def leave(word):
    """A payload that leaves things behind: names carry the word; the System V key is its last 7 digits."""
    for top in ("/var/tmp", "/dev/shm", "/tmp"):
        with open(f"{top}/{word}", "w") as file:
            file.write(word)
    raw(libc().shmget, int(word[-7:], 16), 4096, 0o1666)
    raw(librt().mq_open, f"/{word}".encode(), os.O_RDWR | os.O_CREAT, 0o666, None)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            os.execv("/usr/bin/python3", ["/usr/bin/python3", "-I", "-c", "import time; time.sleep(10)", f"{word}-daemon"])
        os._exit(0)
    os.wait()


def wait(word):
    """A payload that says when it has begun, and that SIGTERM came."""

    def term(*_):
        os.write(1, b"term\n")  # not print: the signal may come while print flushes
        os._exit(0)

    signal.signal(signal.SIGTERM, term)
    print("begun", flush=True)
    signal.alarm(30)
    while True:
        signal.pause()


# ---- what is documented ----


def documented(launcher, kind, profile):
    """Items that are open to that payload. launcher, kind, profile: as in tests/node.py."""
    found = set(OPEN[profile])
    if profile == "none" and (kind == "log-only" or (launcher, kind) == ("userns", "map")):
        found |= OF_THE_PILOTS_ID | (OF_ITS_NAMESPACE if kind == "log-only" else set())
    return found


# ---- from outside, by the tests and packaging/probe_table.py ----


class Cgroup:
    """A group that is delegated to an account: the pilot is put into one half of it, and nothing belongs into the other one. Root's to make."""

    def __init__(self, word, uid):
        mounts = [line.split() for line in read("/proc/self/mountinfo").decode().splitlines() if " - cgroup2 " in line]
        self.top = f"{mounts[0][4]}/{word}"
        self.pilot, self.other = f"{self.top}/pilot", f"{self.top}/other"
        for path in (self.top, self.pilot, self.other):
            os.mkdir(path)
            os.chown(path, uid, -1)
            os.chown(f"{path}/cgroup.procs", uid, -1)

    def close(self):
        for path in (self.pilot, self.other, self.top):
            os.rmdir(path)


def measure(start, argv, home, cgroup=None):
    """The pilot's document about one payload. start(argv, **pipes): Popen as the pilot, in a session of its own. argv: with FACTS among its words."""
    pipe = subprocess.PIPE
    process = start(command("plant"), stdin=pipe, stdout=pipe, stderr=pipe)
    if cgroup:
        with open(f"{cgroup.pilot}/cgroup.procs", "w") as file:
            file.write(str(process.pid))
    options = {"argv": [os.fspath(word) for word in argv], "home": os.fspath(home), "cgroup": cgroup and cgroup.other}
    out, err = process.communicate(json.dumps(options).encode(), 60)
    assert (process.returncode, err) == (0, b""), (process.returncode, out, err)
    return json.loads(out)


def source():
    """This file, for -c: the payload's root may not have it."""
    if "__file__" not in globals():  # we came by -c ourselves
        return read("/proc/self/cmdline").split(b"\0")[3].decode()
    with open(__file__, encoding="utf-8") as file:
        return file.read()


def command(role, *words, python="/usr/bin/python3"):
    """argv that runs this file in that role."""
    return [python, "-I", "-c", source(), role, *words]


def main(role, *words):
    if role == "plant":
        plant(json.loads(sys.stdin.read()))
    elif role == "victim":
        be_victim()
    elif role == "look":
        print(json.dumps(Look(json.loads(words[0])).all()))
    else:
        {"leave": leave, "wait": wait}[role](*words)


if __name__ == "__main__":
    main(*sys.argv[1:])
