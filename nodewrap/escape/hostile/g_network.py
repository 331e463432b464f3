"""Surface G, inside."""

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
import time

from nodewrap.escape.hostile.common import LIBC, call, in_child, read, say

NEWNS, NEWUSER, NEWNET = 0x20000, 0x10000000, 0x40000000
MS_BIND = 4096


def tried(*ways):
    """What each way brings, or its error."""
    found = []
    for way in ways:
        try:
            said = way()
            found.append(said if isinstance(said, bytes) else str(said).encode())
        except OSError as wrong:
            found.append(f"[{wrong.strerror or wrong}]".encode())
    return b" ".join(found)


def hold(said):
    """Let the judge look, until it has seen enough."""
    say(said)
    sys.stdin.buffer.read()


def become_root(more=0):
    uid, gid = os.geteuid(), os.getegid()
    call(LIBC.unshare, NEWUSER | NEWNS | more)
    for name, text in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# ---- who answers ----


def serve(secret, *places):
    """Tell the secret to whoever connects to one of HOST/PORT."""
    servers = {}
    for host, port in (place.split("/") for place in places):
        server = socket.create_server((host, int(port)), family=family(host))
        servers[server.fileno()] = server
    say("ready")
    while True:
        for fd in select.select(list(servers), [], [])[0]:
            other, _ = servers[fd].accept()
            other.sendall(secret.encode())
            other.close()


def ask(*places):
    def hear(host, port):
        with socket.socket(family(host)) as sock:
            sock.settimeout(2)
            sock.connect((host, int(port)))
            return sock.recv(100)

    return tried(*(lambda at=place: hear(*at.split("/")) for place in places))


def connect_anew(host, port):
    """stdin, where it is a socket: undo its connection (connect(2), AF_UNSPEC), and make another, in whatever network it was made."""

    def hear():
        with socket.socket(fileno=os.dup(0)) as sock:
            sock.settimeout(2)
            call(LIBC.connect, sock.fileno(), bytes(16), 16)
            sock.connect((host, int(port)))
            return sock.recv(100)

    return tried(hear)


def ask_once(host, port):
    """A client of the pilot's."""
    return ask(f"{host}/{port}")


def take_port(port, word, shared="0"):
    """Be that service, for whoever comes, until stdin ends; shared: beside another one who lets others be there."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if int(shared) else socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", int(port)))
    server.listen(50)
    say("ready")
    while server in select.select([server, sys.stdin], [], [])[0]:
        other, _ = server.accept()
        other.sendall(word.encode())
        other.close()


def leave_listener(port):
    """A daemon that listens, and one that waits for datagrams."""
    servers = [socket.create_server(("127.0.0.1", int(port))), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
    servers[1].bind(("127.0.0.1", int(port)))
    if os.fork():
        return "listens"
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for fd in (0, 1, 2):
        os.close(fd)
    time.sleep(20)
    os._exit(0)


# ---- namespaces ----


def pin_network():
    """A network namespace of our own, held by a daemon and by a mount of it in the work directory."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        try:
            become_root(NEWNET)
            open("pin", "w").close()
            call(LIBC.mount, b"/proc/self/ns/net", b"pin", None, ctypes.c_ulong(MS_BIND), None)
        except OSError as wrong:
            os.write(writer, str(wrong.strerror).encode())
        os.write(writer, b" " + os.readlink("/proc/self/ns/net").encode())
        for fd in (0, 1, 2, writer):
            os.close(fd)
        time.sleep(20)
        os._exit(0)
    os.close(writer)
    return b"".join(iter(lambda: os.read(reader, 1000), b""))


# ---- names and addresses ----


def change_names(word, *paths):
    """Add a line to the files that say who is who: in place, by another file in its place, by a mount."""

    def written(path):
        with open(path, "a") as file:
            file.write(f"\n# {word}\n")

    def replaced(path):
        with open(f"{path}.nw", "w") as file:
            file.write(word)
        os.rename(f"{path}.nw", path)

    def remounted(path):
        become_root()
        call(LIBC.mount, b"none", path.encode(), None, ctypes.c_ulong(32 | MS_BIND), None)
        written(path)

    ways = [lambda at=path, how=how: how(at) for path in paths for how in (written, replaced)]
    return tried(*ways, *(lambda at=path: in_child(remounted, at) for path in paths))


def who_talks():
    """Every address and port that /proc/net shows."""
    return b" ".join(word for name in ("tcp", "tcp6", "udp", "unix") for line in lines(f"/proc/net/{name}") for word in line.split()[1:3])


def lines(path):
    try:
        return read(path).splitlines()[1:]
    except OSError:
        return []


# ---- neighbours ----


def listen_to_groups(secret, port, group, group6):
    """A neighbour: it says "ready", then what reaches it by broadcast and multicast."""
    four, six = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    four.bind(("", int(port)))
    four.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + socket.inet_aton("10.87.0.1"))
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    six.bind(("", int(port)))
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, group6) + struct.pack("I", int(secret)))
    say("ready")
    while True:
        for sock in select.select([four, six], [], [])[0]:
            said, who = sock.recvfrom(100)
            say(said.decode("ascii", "replace") + f" from {who[0]}")


def shout(word, port, group, group6, broadcast, index):
    def send(to, level, name, value):
        with socket.socket(family(to), socket.SOCK_DGRAM) as sock:
            sock.setsockopt(level, name, value)
            return sock.sendto(word.encode(), (to, int(port)))

    return tried(
        lambda: send(group, socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.87.0.1")),
        lambda: send(group6, socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, int(index)),
        lambda: send(broadcast, socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
    )


def sniff(seconds, word):
    """Packets of everybody's, as we are and as root of a user namespace (whose rights end at this network namespace's owner)."""

    def heard(root):
        if root:
            become_root()
        with socket.socket(17, socket.SOCK_RAW, socket.htons(3)) as sock:
            say("listens")
            end, found = time.monotonic() + float(seconds), b""
            while time.monotonic() < end and word.encode() not in found:
                if select.select([sock], [], [], 0.05)[0]:
                    found += sock.recv(65536)
            return found.hex()

    for root in (False, True):
        try:
            return in_child(heard, root)
        except OSError as wrong:
            say(f"not: {errno.errorcode.get(wrong.errno or 0)}")
    return None


def take_ports(host, port):
    """Every port that connections from here may have."""
    sockets, why = [socket.socket() for _ in range(900)], "no end"
    count = 0
    try:
        for sock in sockets:
            sock.settimeout(2)
            sock.connect((host, int(port)))
            count += 1
    except OSError as wrong:
        why = str(wrong.strerror or wrong)
    hold(f"{count} connections: {why}")


# ---- the pilot's children ----


def keep_environment():
    """A pilot that is about to start something with its environment."""
    LIBC.prctl(0x59616D61, ctypes.c_ulong(-1 & (1 << 64) - 1), 0, 0, 0)  # PR_SET_PTRACER, any: where Yama runs
    say("ready")
    signal.pause()


def change_environment(pid, word):
    """The proxy that the pilot's children will use, in the pilot's memory."""
    at = int(read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[47])  # env_start, field 50 (proc_pid_stat(5))
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(at)
        where = memory.read(4096).index(b"https_proxy=") + len(b"https_proxy=")
        memory.seek(at + where)
        memory.write(word.encode())
    return "written"
