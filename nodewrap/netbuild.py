"""One network namespace for a payload, made in a process of its own: a link to the node, one address, its rules. Run as root by netd.

A child because it moves between namespaces, and because what hangs here (rtnetlink's lock, nft) must not hang netd, which kills it after a while.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nodewrap import network
from nodewrap.guard import Network, Network6, colons, dotted
from nodewrap.netkernel import NetError, namespace, netfilter, nft, node_addresses, resolvers

#: Both ends have the same: with NOARP the kernel addresses frames to the sender's own (net/ipv4/arp.c, arp_constructor), and asks for no neighbour.
MAC = "02:4e:57:00:00:01"
CLONE_NEWNET, IFF_UP, IFF_NOARP = 0x40000000, 0x1, 0x80
SCOPE_LINK, AF_INET, AF_INET6, IFA_F_NODAD = 253, 2, 10, 2
#: Seconds for an address to become free: a namespace that ended takes its link with it a moment later (net/core/net_namespace.c, cleanup_net).
PATIENCE = 1.0


class Built(NamedTuple):
    """address: of the payload. link: index of the node's side. Beside them descriptors go: the namespace, and a netfilter socket in it."""

    address: int
    link: int


ANSWER = struct.Struct("=II240s")


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """In a new network namespace; back in the old one afterwards."""
    old = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    namespace("unshare", CLONE_NEWNET)
    try:
        yield
    finally:
        namespace("setns", old, (CLONE_NEWNET,))
        os.close(old)


def overlap(wanted: Network | Network6) -> str:
    """A route of the node's that the range of private addresses collides with, or "". Payloads' own routes are none, nor are those to nowhere."""
    width, family = (128, AF_INET6) if isinstance(wanted, Network6) else (32, AF_INET)
    with IPRoute() as route:
        links = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in route.get_links()}
        for message in route.get_routes(family=family):
            to, bits = message.get_attr("RTA_DST"), message["dst_len"]
            name = links.get(message.get_attr("RTA_OIF"), "")
            if not to or bits == 0 or name.startswith(network.LINK) or (family == AF_INET6 and name in ("", "lo")):
                continue
            address, shorter = int.from_bytes(socket.inet_pton(family, to), "big"), width - min(bits, wanted.bits)
            if address >> shorter == wanted.address >> shorter:
                return f"{to}/{bits} on {name or 'this node'}"
    return ""


def build(wanted: Network, six: Network6 | None, start: int, numbers: bytes) -> tuple[Built, list[int]]:
    """A namespace with the rules of ``numbers``, under the first free address of the range from the ``start``-th on. Raises NetError."""
    made = network.decode(numbers)
    node, (remote, local) = node_addresses(six is not None), resolvers(six is not None)
    with open("/proc/self/net/dev", encoding="ascii") as devices, IPRoute() as outside:
        with inside():  # what is open stays the node's
            _settle("default", six)
            address, link = _link(outside, devices, wanted, start)
            _within(address, six)
            if local:
                _write("net/ipv4/conf/eth0/route_localnet", "1")
            nft(network.namespace_ruleset(made, remote, node, local, six is not None))
            descriptors = [os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC), netfilter()]
        _settle(f"{network.LINK}{address:08x}", six)
        outside.link("set", index=link, flags=IFF_UP | IFF_NOARP, change=IFF_UP | IFF_NOARP)
        outside.route("add", family=AF_INET, dst=dotted(address), dst_len=32, oif=link, scope=SCOPE_LINK)
        if six:
            outside.route("add", family=AF_INET6, dst=colons(six.of(address)), dst_len=128, oif=link)
    return Built(address, link), descriptors


def _within(address: int, six: Network6 | None) -> None:
    """The payload's side of the link."""
    with IPRoute() as route:
        eth0 = route.link_lookup(ifname="eth0")[0]
        route.link("set", index=1, flags=IFF_UP, change=IFF_UP)
        route.addr("add", index=eth0, address=dotted(address), prefixlen=32)
        route.link("set", index=eth0, flags=IFF_UP | IFF_NOARP, change=IFF_UP | IFF_NOARP)
        route.route("add", family=AF_INET, dst=dotted(0), dst_len=0, oif=eth0, scope=SCOPE_LINK)
        if six:
            route.addr("add", family=AF_INET6, index=eth0, address=colons(six.of(address)), prefixlen=128, flags=IFA_F_NODAD)
            route.route("add", family=AF_INET6, dst="::", dst_len=0, oif=eth0)


def _settle(link: str, six: Network6 | None) -> None:
    """Before it is up. No IPv6 at all, or only what we give: no link-local address, by which neighbours and routers would be looked for."""
    if six:
        for name, value in (("addr_gen_mode", "1"), ("accept_ra", "0"), ("autoconf", "0"), ("accept_redirects", "0")):
            _write(f"net/ipv6/conf/{link}/{name}", value)
    _write(f"net/ipv6/conf/{link}/disable_ipv6", "0" if six else "1")


def _write(name: str, text: str) -> None:
    """A setting of the namespace that we are in. Without IPv6 in the kernel there is none of IPv6's."""
    with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{name}", "w", encoding="ascii") as file:
        file.write(text)


def _link(outside: Any, devices: TextIO, wanted: Network, start: int) -> tuple[int, int]:
    """(address, index of the node's side). The name says the address, and a name is taken once: it is the lease, and ends with the namespace.

    devices: /proc/net/dev of the node, so that only names are tried that look free.
    """
    size = (1 << (32 - wanted.bits)) - 2
    end = time.monotonic() + PATIENCE
    while True:
        devices.seek(0)
        taken = {line.partition(":")[0].strip() for line in devices}
        for address in (wanted.address + 1 + (start + at) % size for at in range(size)):
            name = f"{network.LINK}{address:08x}"
            index = 0 if name in taken else _try_link(outside, name)
            if index:
                return address, index
        if time.monotonic() > end:
            raise NetError(f"every address of {wanted} is taken ({size}); widen network in the guard, or wait")
        time.sleep(0.05)


def _try_link(route: Any, name: str) -> int:
    """The index, 0 when the name is taken."""
    peer = {"ifname": "eth0", "address": MAC, "net_ns_pid": os.getpid()}
    try:
        route.link("add", ifname=name, kind="veth", address=MAC, peer=peer)
    except NetlinkError as wrong:
        if wrong.code == errno.EEXIST:
            return 0
        raise NetError(f"no link {name}: {os.strerror(wrong.code)}") from None
    return int(route.link_lookup(ifname=name)[0])


def remove(link: int) -> None:
    """Take a link away that a namespace, kept by somebody, would still have. Its index is never another's: the kernel counts up."""
    with IPRoute() as route, contextlib.suppress(NetlinkError):
        route.link("del", index=link)


def send(to: socket.socket, built: Built | None, descriptors: list[int], error: str = "") -> None:
    """Tell netd."""
    body = ANSWER.pack(*(built or (0, 0)), error.encode("utf-8", "replace")[:239])
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    to.sendmsg([body], control)


def main(to: socket.socket, wanted: Network, six: Network6 | None, start: int, numbers: bytes) -> None:
    """The child's whole life: build, tell, end."""
    built: Built | None = None
    descriptors: list[int] = []
    error = ""
    try:
        built, descriptors = build(wanted, six, start, numbers)
    except NetError as wrong:
        error = str(wrong)
    except Exception as wrong:  # noqa: BLE001  what pyroute2 and the system raise is many things, and all are told
        error = f"{type(wrong).__name__}: {wrong}"
    send(to, built, descriptors, error)
