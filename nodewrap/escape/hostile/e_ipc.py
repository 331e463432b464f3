"""Surface E, inside."""

import ctypes
import fcntl
import mmap
import os
import platform
import select
import signal
import socket
import struct
import sys
import termios
import time

from nodewrap.escape.hostile.common import LIBC, call, in_child, read, say, syscall

KEYCTL, ADD_KEY = {"aarch64": (219, 217)}.get(platform.machine(), (250, 248))
PTRACER = 0x59616D61
TIOCSTI = 0x5412
LIBC.shmat.restype, LIBC.shmat.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


def librt():
    return ctypes.CDLL("librt.so.1", use_errno=True)


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


# ---- System V and POSIX objects ----


def leave_sysv(key):
    key = int(key)
    return tried(lambda: call(LIBC.shmget, key, 4096, 0o1666), lambda: call(LIBC.semget, key, 1, 0o1666), lambda: call(LIBC.msgget, key, 0o1666))


def plant_sysv(key, secret):
    """The pilot's segment, semaphore and queue, open to everybody."""
    key, secret = int(key), secret.encode()
    at = LIBC.shmat(call(LIBC.shmget, key, 4096, 0o1666), None, 0)
    ctypes.memmove(at, secret, len(secret))
    call(LIBC.msgsnd, call(LIBC.msgget, key, 0o1666), struct.pack("l", 1) + secret, ctypes.c_size_t(len(secret)), 0)
    say("ready")
    signal.pause()


def read_sysv(key):
    def segment():
        at = LIBC.shmat(call(LIBC.shmget, int(key), 0, 0), None, 0o10000)
        if at == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "shmat")
        return ctypes.string_at(at, 100)

    def queue():
        message = ctypes.create_string_buffer(200)
        call(LIBC.msgrcv, call(LIBC.msgget, int(key), 0), message, ctypes.c_size_t(100), ctypes.c_long(0), 0o4000)
        return message.raw

    return tried(segment, queue)


def leave_queue(name):
    os.umask(0)
    return call(librt().mq_open, name.encode(), os.O_RDWR | os.O_CREAT, 0o666, None)


def plant_queue(name, secret):
    os.umask(0)
    queue = call(librt().mq_open, name.encode(), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, None)
    call(librt().mq_send, queue, secret.encode(), ctypes.c_size_t(len(secret)), 0)
    say("ready")
    signal.pause()


def read_queue(name):
    def message():
        found = ctypes.create_string_buffer(8192)
        call(librt().mq_receive, call(librt().mq_open, name.encode(), os.O_RDONLY | os.O_NONBLOCK), found, ctypes.c_size_t(8192), None)
        return found.raw.rstrip(b"\0")

    return tried(message, lambda: read(f"/dev/mqueue{name}"))


def leave_shm(name):
    os.umask(0)
    for path in (f"/dev/shm/{name}", f"/dev/shm/sem.{name}"):
        with open(path, "w") as file:
            file.write(name)
    return os.listdir("/dev/shm")


def read_shm(name):
    return tried(lambda: read(f"/dev/shm/{name}"), lambda: read(f"/dev/shm/sem.{name}"), lambda: read(f"/proc/1/root/dev/shm/{name}"))


# ---- sockets ----


def serve_abstract(name, secret):
    """The pilot's: a stream that tells the secret to whoever comes."""
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0" + name)
    server.listen(5)
    say("ready")
    while True:
        other, _ = server.accept()
        other.sendall(secret.encode())
        other.close()


def serve_paths(secret, *paths):
    """The same at paths, open to everybody."""
    servers = {}
    for path in paths:
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        os.chmod(path, 0o666)
        server.listen(5)
        servers[server.fileno()] = server
    say("ready")
    while True:
        for fd in select.select(list(servers), [], [])[0]:
            other, _ = servers[fd].accept()
            other.sendall(secret.encode())
            other.close()


def hear(address):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(3)
        sock.connect(address)
        return sock.recv(100)


def ask_abstract(*names):
    return tried(*(lambda at=name: hear("\0" + at) for name in names))


def ask_paths(*paths):
    return tried(*(lambda at=path: hear(at) for path in paths), *(lambda at=path: hear(f"/proc/1/root{at}") for path in paths))


def forge_credentials(path, pid, uid):
    """Say to the socket that we are that process, and root or that uid: as we are, and as root of a user namespace."""

    def say_who(who, number, flags=0):
        if flags:
            call(LIBC.unshare, flags)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(path)
            sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("iII", number, who, who))])

    ways = [(who, number, flags) for who in (0, int(uid)) for number in (int(pid), os.getpid()) for flags in (0, 0x10000000)]
    return tried(*(lambda way=way: in_child(say_who, *way) for way in ways))


# ---- what 0 to 2 are ----


def by_socket(word):
    """Give a directory of ours away through stdin, and take what was sent."""

    def give():
        with socket.socket(fileno=os.dup(0)) as sock:
            return socket.send_fds(sock, [word.encode()], [os.open("/", os.O_RDONLY)])

    def take():
        with socket.socket(fileno=os.dup(0)) as sock:
            return os.pread(socket.recv_fds(sock, 10, 1)[1][0], 100, 0)

    return tried(give, take)


def read_back(fd):
    return tried(lambda: os.read(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK), 100))


def leave_flags():
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_NONBLOCK)
    return "set"


def write_into_stdin(word):
    return tried(lambda: os.write(os.open("/proc/self/fd/0", os.O_WRONLY | os.O_NONBLOCK), word.encode()))


def watch(directory):
    """Which names are opened there, until stdin ends."""
    size, names, events = struct.calcsize("iIII"), [], b""
    watcher = call(LIBC.inotify_init1, os.O_NONBLOCK)
    call(LIBC.inotify_add_watch, watcher, directory.encode(), 0x20)  # IN_OPEN
    say("ready")
    while 0 not in (ready := select.select([watcher, 0], [], [])[0]) or watcher in ready:
        events = os.read(watcher, 65536)
        while events:
            length = struct.unpack_from("iIII", events)[3]
            names.append(events[size:size + length].rstrip(b"\0").decode("utf-8", "replace"))
            events = events[size + length:]
    return " ".join(names)


# ---- keys ----


def keyctl(*args):
    return syscall(KEYCTL, *args)


def add_key(name, secret, ring):
    """In a session of our own, with the user's keyring in reach; it goes by itself after half a minute."""
    keyctl(1, None)  # KEYCTL_JOIN_SESSION_KEYRING
    keyctl(8, -4, -3)  # KEYCTL_LINK: what is in it counts as possessed (keyrings(7))
    number = syscall(ADD_KEY, b"user", name.encode(), secret.encode(), ctypes.c_size_t(len(secret)), int(ring))
    keyctl(15, number, 30)  # KEYCTL_SET_TIMEOUT
    return number


def exec_with_key(name, secret, *command):
    """A pilot whose session keyring holds a secret."""
    add_key(name, secret, -3)
    os.execv(command[0], command)


def drop_key(number):
    keyctl(9, int(number), -4)  # KEYCTL_UNLINK
    return "gone"


def plant_key(name, secret, ring):
    number = add_key(name, secret, ring)
    say("ready")
    say(number)
    signal.pause()


def content(number):
    found = ctypes.create_string_buffer(100)
    keyctl(11, number, found, ctypes.c_size_t(100))  # KEYCTL_READ
    return found.raw.rstrip(b"\0")


def find_keys(name, *numbers):
    """By name in the session's, the user's and the persistent keyring, by number, and after linking the user's keyring into our session."""
    search = [lambda at=ring: content(keyctl(10, at, b"user", name.encode(), 0)) for ring in (-3, -4, -5)]
    linked = [lambda: keyctl(8, -4, -3), lambda: keyctl(22, ctypes.c_int(-1), -3)]  # KEYCTL_LINK, KEYCTL_GET_PERSISTENT
    return tried(*search, *linked, *search, *(lambda at=int(number): content(at) for number in numbers))


# ---- terminals ----


def terminals():
    found = [fd for fd in (0, 1, 2) if os.isatty(fd)]
    try:
        found.append(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        pass
    return found


def type_in(word, high):
    """TIOCSTI, letter by letter; high: what stands above the 32 bits that the kernel looks at."""

    def typed(fd):
        for letter in word.encode():
            syscall(16, fd, ctypes.c_ulong(TIOCSTI | int(high) << 32), ctypes.byref(ctypes.c_char(letter)))

    return tried(*(lambda at=fd: typed(at) for fd in terminals()))


def take_foreground():
    """Make a group of our own the one in front, on every terminal that we have; hold it until we are told to end."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    front = [lambda at=fd: os.tcsetpgrp(at, pid) for fd in terminals()]
    say(tried(*front, *(lambda at=fd: fcntl.ioctl(at, termios.TIOCSCTTY, 1) for fd in terminals())))
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)


def deafen():
    """Turn echo, signals and lines off, and leave it so."""
    for fd in terminals():
        how = termios.tcgetattr(fd)
        how[3] &= ~(termios.ECHO | termios.ISIG | termios.ICANON)
        termios.tcsetattr(fd, termios.TCSANOW, how)
    return "done"


def write_to(path, word):
    with open(path, "wb", buffering=0) as terminal:
        return terminal.write(word.encode())


# ---- mappings ----


def change_stdout(word):
    """The file behind stdout, where it is one: its beginning, by position, and through a mapping of it opened again."""

    def mapped():
        page = mmap.mmap(os.open("/proc/self/fd/1", os.O_RDWR), len(word))
        page[:] = word.encode()

    os.write(2, tried(lambda: os.pwrite(1, word.encode(), 0), mapped))


def change_file(path, word):
    """A file of the work directory, mapped; a daemon writes through the mapping after our end."""
    with open(path, "r+b") as file:
        page = mmap.mmap(file.fileno(), 32)
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for fd in (0, 1, 2):
        os.close(fd)
    time.sleep(0.2)
    page[:] = word.encode()
    os._exit(0)


# ---- signals with a story ----


def careless_init(*command):
    """An init that takes the word of a signal for whose child ended how."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.posix_spawn(command[0], command, os.environ, setsigmask=[])
    while True:
        told = signal.sigwaitinfo({signal.SIGCHLD})
        if told.si_pid == child:
            os.kill(child, signal.SIGKILL)
            sys.exit(told.si_status)


def forge_siginfo():
    """Tell our parent by rt_sigqueueinfo that we ended with 0, by every code that the kernel lets a process choose. Our status is 42."""
    parent, number = os.getppid(), 129 if platform.machine() == "x86_64" else 138
    for which in (signal.SIGCHLD, signal.SIGRTMIN, signal.SIGRTMAX) if parent > 0 else ():
        for code in (-1, -2, -3, -60, 1, 0x80):
            story = struct.pack("iiiiIIi", which, 0, code, 0, os.getpid(), 0, 0).ljust(128, b"\0")
            try:
                syscall(number, parent, int(which), story)
            except OSError:
                continue
        time.sleep(0.1)
    os._exit(42)
