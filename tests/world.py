"""A node and, behind its link, the world: network namespaces of the tests' own, with servers that tell callers their address."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading

from nodewrap import netbuild, netkernel

NODE, WORLD, OTHER, METADATA = "198.18.0.1", "203.0.113.10", "203.0.113.20", "169.254.169.254"
#: The same of IPv6, where the machine has it.
NODE6, WORLD6, OTHER6, METADATA6, NAT64 = "2001:db8:ff::1", "2001:db8:1::10", "2001:db8:1::20", "fd00:ec2::254", "64:ff9b::a9fe:a9fe"
SIX = os.path.exists("/proc/net/if_inet6")
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

[profile.six]
like = "strict"
network = { mode = "private", allow = ["[2001:db8:1::]/48:80", "[fd00:ec2::254]:80", "any:443"], deny = ["[2001:db8:1::20]"] }

[profile.maybe]
like = "net"
on_missing = "degrade"

[profile.wide]
like = "strict"
network = "host"
landlock = ["abstract"]
"""
NAMES = ("net", "lan", "meta", "six", "maybe", "wide")
#: What the payload tries, one line of "tcp ADDRESS PORT" each -> what came back, or the error's name.
TRY = """
import errno, socket, sys
for line in sys.argv[1:]:
    kind, host, port = line.split()
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.settimeout(2)
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
        addresses = [WORLD, OTHER, METADATA, "100.100.100.200", *netkernel.resolvers()[0], *(WORLD6, OTHER6, METADATA6, NAT64) * SIX]
        ip("link set lo up")
        for address in addresses:
            ip(f"addr add {address} dev lo")
        netkernel.namespace("unshare", netbuild.CLONE_NEWNET)
        ip("link set lo up")
        link = f"link add up0 type veth peer name up1 netns /proc/{os.getpid()}/fd/{self.world}"
        for line in (link, f"addr add {NODE}/24 dev up0", "link set up0 up", "route add default via 198.18.0.2"):
            ip(line)
        for line in (f"addr add {NODE6}/64 dev up0 nodad", "route add default via 2001:db8:ff::2") * SIX:
            ip(line)
        self.node = os.open("/proc/self/ns/net", os.O_RDONLY)
        with self.inside():
            ip("addr add 198.18.0.2/24 dev up1")
            ip("link set up1 up")
            for line in ("addr add 2001:db8:ff::2/64 dev up1 nodad", f"route add fd12:3456:789a::/64 via {NODE6}") * SIX:
                ip(line)
            for address in addresses:
                self.serve(address)
        forward("1")
        if SIX:
            forward6("1")

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
            server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
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
                server.sendto(seen(peer), peer)
                continue
            connection, peer = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(seen(peer))
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(2)
                while connection.recv(10):  # closed with something unread, what was sent might be lost on the way (tcp(7): a reset)
                    pass


def seen(peer):
    return peer[0].removeprefix("::ffff:").encode()


def ip(line):
    subprocess.run(["ip", *line.split()], check=True)


def forward6(value):
    with open("/proc/sys/net/ipv6/conf/all/forwarding", "w") as file:
        file.write(value)


def forward(value):
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write(value)


@contextlib.contextmanager
def listening():
    """A port of the node's, on all its addresses, as a pilot might have one."""
    with socket.create_server(("::" if SIX else "0.0.0.0", 0), family=socket.AF_INET6 if SIX else socket.AF_INET, dualstack_ipv6=SIX) as server:
        thread = threading.Thread(target=answer, args=(server, "tcp"))
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def reachable(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False
