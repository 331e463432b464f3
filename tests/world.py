"""A node and, behind its link, the world: network namespaces of the tests' own, with servers that tell callers their address."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading

from nodewrap import netbuild, netkernel

NODE, WORLD, OTHER, METADATA = "198.18.0.1", "203.0.113.10", "203.0.113.20", "169.254.169.254"
#: Of a policy, for tests of private networks; with them NAMES.
PROFILES = """
[profile.net]
like = "strict"
network = "private"

[profile.lan]
like = "strict"
network = { mode = "private", allow = ["203.0.113.0/24:80", "udp any:5000-5001"], deny = ["203.0.113.20"], dns = false }

[profile.meta]
like = "batch"
network = { mode = "private", allow = ["169.254.169.254:80"] }

[profile.maybe]
like = "net"
on_missing = "degrade"

[profile.wide]
like = "strict"
network = "host"
landlock = ["abstract"]
"""
NAMES = ("net", "lan", "meta", "maybe", "wide")
#: What the payload tries, one line of "tcp ADDRESS PORT" each -> what came back, or the error's name.
TRY = """
import errno, socket, sys
for line in sys.argv[1:]:
    kind, host, port = line.split()
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.settimeout(1)
    try:
        s.connect((host, int(port)))
        s.sendall(b"x")
        print(s.recv(100).decode(), flush=True)
    except OSError as wrong:
        print(errno.errorcode.get(wrong.errno, "timeout"), flush=True)
"""
CLOSED = {"EHOSTUNREACH", "EACCES", "ENETUNREACH", "ECONNREFUSED", "timeout", "EPERM"}


class World:
    """A node (the test process is in it meanwhile) and, behind its link, the world: namespaces of our own. Its servers tell callers their address."""

    def __init__(self):
        self.stack, self.servers = contextlib.ExitStack(), []
        self.outside = os.open("/proc/self/ns/net", os.O_RDONLY)
        netkernel.namespace("unshare", netbuild.CLONE_NEWNET)
        self.world = os.open("/proc/self/ns/net", os.O_RDONLY)
        addresses = [WORLD, OTHER, METADATA, "100.100.100.200", *netkernel.resolvers()[0]]
        ip("link set lo up")
        for address in addresses:
            ip(f"addr add {address}/32 dev lo")
        netkernel.namespace("unshare", netbuild.CLONE_NEWNET)
        ip("link set lo up")
        link = f"link add up0 type veth peer name up1 netns /proc/{os.getpid()}/fd/{self.world}"
        for line in (link, f"addr add {NODE}/24 dev up0", "link set up0 up", "route add default via 198.18.0.2"):
            ip(line)
        self.node = os.open("/proc/self/ns/net", os.O_RDONLY)
        with self.inside():
            ip("addr add 198.18.0.2/24 dev up1")
            ip("link set up1 up")
            for address in addresses:
                self.serve(address)
        forward("1")

    @contextlib.contextmanager
    def inside(self):
        """The test process is in the world meanwhile."""
        netkernel.namespace("setns", self.world, (netbuild.CLONE_NEWNET,))
        try:
            yield
        finally:
            netkernel.namespace("setns", self.node, (netbuild.CLONE_NEWNET,))

    def serve(self, address, ports=(80, 443)):
        for kind, port in [("tcp", port) for port in ports] + [("udp", 53), ("udp", 5000), ("udp", 5002)]:
            server = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address, port))
            if kind == "tcp":
                server.listen(20)
            self.servers.append(server)
            threading.Thread(target=answer, args=(server, kind), daemon=True).start()

    def close(self):
        netkernel.namespace("setns", self.outside, (netbuild.CLONE_NEWNET,))
        for server in self.servers:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        for descriptor in (self.outside, self.world, self.node):
            os.close(descriptor)


def answer(server, kind):
    """One line for each who comes: its address, as seen here."""
    with contextlib.suppress(OSError):
        while True:
            if kind == "udp":
                _, peer = server.recvfrom(10)
                if peer is None:  # shut down
                    return
                server.sendto(peer[0].encode(), peer)
                continue
            connection, peer = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(peer[0].encode())
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(2)
                while connection.recv(10):  # closed with something unread, what was sent might be lost on the way (tcp(7): a reset)
                    pass


def ip(line):
    subprocess.run(["ip", *line.split()], check=True)


def forward(value):
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write(value)


@contextlib.contextmanager
def listening():
    """A port of the node's, on all its addresses, as a pilot might have one."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        thread = threading.Thread(target=answer, args=(server, "tcp"))
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def reachable(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False
