"""What a run with a private network can leave on the node (docs/network.md): the link of a namespace that somebody keeps, and its connections.

For netd, which takes both away. Raw netlink: the table of connections may have 100,000 entries, which the kernel picks from by address.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator

from nodewrap import netbuild, network
from nodewrap.guard import Network, Network6
from nodewrap.netkernel import DONE, DUMP, ERROR, NETLINK_NETFILTER, REQUEST, _attribute, _nested

#: A lease's line of the address (docs/lease.md); no other line can look like it.
LEASED = re.compile(rb"^address ([0-9]{1,10})$", re.M)
NAME = re.compile(rf"{network.LINK}([0-9a-f]{{8}})")
#: nfnetlink_conntrack.h, nfnetlink.h, netlink.h.
CT, CT_GET, CT_DELETE, CT_STATS = 1 << 8, 1, 2, 5
CTA_TUPLE_ORIG, CTA_ID, CTA_FILTER, TUPLE_IP, STATS_ENTRIES = 1, 12, 25, 1, 1
#: Of an address, by its length: the family, and the attribute of who began (CTA_IP_V4_SRC, CTA_IP_V6_SRC).
SOURCE = {4: (socket.AF_INET, 1), 16: (socket.AF_INET6, 3)}
FILTER_ORIG, FILTER_REPLY, BY_SOURCE = 1, 2, 1
ACK, NESTED = 4, 0x8000
HEADER = struct.Struct("=IHHII")
PATIENCE = 2.0


def links(wanted: Network) -> dict[int, int]:
    """Payloads' links on the node, index -> address, of this range."""
    found = {}
    for index, name in socket.if_nameindex():
        match = NAME.fullmatch(name)
        if match and int(match[1], 16) >> (32 - wanted.bits) == wanted.address >> (32 - wanted.bits):
            found[index] = int(match[1], 16)
    return found


def leased(directory: str) -> set[int]:
    """Addresses of the runs that are not finished, by their leases. Raises OSError."""
    found: set[int] = set()
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(directory, name), "rb") as file:  # released meanwhile
            found.update(int(match) for match in LEASED.findall(file.read()))
    return found


def end(left: list[tuple[int, int]], wanted: Network, six: Network6 | None = None) -> None:
    """Take away links (index, 0: gone) and connections (address, 0: has none; and of its one of IPv6). Raises OSError when connections stay.

    An address that has a link again is another run's already: its connections go when that one ends, the old ones with them.
    """
    for link, _ in left:
        if link:
            netbuild.remove(link)
    addresses = [address for _, address in left if address]
    if addresses:
        with netfilter() as sock:
            for address in addresses:
                _forget_ended(sock, address, wanted, [address.to_bytes(4, "big"), *([six.of(address).to_bytes(16, "big")] if six else [])])


def _forget_ended(sock: socket.socket, address: int, wanted: Network, sources: list[bytes]) -> None:
    """Looked for the link after the connections: what was there when no run had the address is nobody's who lives, and only that goes."""
    found = [(source, connection) for source in sources for connection in _connections(sock, source)]
    if address not in links(wanted).values():
        for source, connection in found:
            _forget(sock, source, connection)


# ---- the table of connections ----


def netfilter() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    sock.settimeout(PATIENCE)
    sock.bind((0, 0))
    return sock


def entries(sock: socket.socket) -> int:
    """How many connections its namespace has in the table. Raises OSError where the kernel does not say (nf_conntrack_netlink)."""
    _send(sock, CT_STATS, 0, bytes(4))
    for _, body in _answers(sock.recv(1 << 16)):
        for kind, value in _nested(body):
            if kind == STATS_ENTRIES:
                return int.from_bytes(value, "big")
    raise OSError("netfilter answers something else")


def _forget(sock: socket.socket, source: bytes, connection: list[tuple[int, bytes]]) -> None:
    """Delete it, unless it has ended by itself. Raises OSError."""
    _send(sock, CT_DELETE, ACK, source, *(_attribute(kind, value) for kind, value in connection))
    with contextlib.suppress(FileNotFoundError):
        list(_answers(sock.recv(1 << 16)))


def _connections(sock: socket.socket, source: bytes) -> Iterator[list[tuple[int, bytes]]]:
    """Those that this address opened, by what each can be deleted: what it began with, and its number, so that it is no other's that has begun since.

    Raises OSError. Before Linux 5.8 the kernel sends all, and we pick; of IPv6 also later: its filter leaves out what it should pick
    (nf_conntrack_netlink.c, ctnetlink_filter_match_tuple).
    """
    flags = _attribute(FILTER_ORIG, struct.pack("=I", BY_SOURCE)) + _attribute(FILTER_REPLY, struct.pack("=I", 0))
    by = SOURCE[len(source)][1]
    wanted = _attribute(NESTED | TUPLE_IP, _attribute(by, source))
    pick = _attribute(NESTED | CTA_TUPLE_ORIG, wanted) + _attribute(NESTED | CTA_FILTER, flags)
    _send(sock, CT_GET, DUMP, source, pick if len(source) == 4 else b"")
    while True:
        for kind, body in _answers(sock.recv(1 << 17)):
            if kind == DONE:
                return
            found = dict(_nested(body))
            began = found.get(CTA_TUPLE_ORIG, b"")
            if dict(_nested(dict(_nested(began)).get(TUPLE_IP, b""))).get(by) == source:
                yield [(NESTED | CTA_TUPLE_ORIG, began), (CTA_ID, found.get(CTA_ID, b""))]


def _send(sock: socket.socket, kind: int, flags: int, source: bytes, *attributes: bytes) -> None:
    body = struct.pack("=BBH", SOURCE[len(source)][0], 0, 0) + b"".join(attributes)
    sock.send(HEADER.pack(len(body) + HEADER.size, CT | kind, REQUEST | flags, 1, 0) + body)


def _answers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, attributes) of each message. Raises OSError for an error among them."""
    at = 0
    while at + HEADER.size <= len(data):
        length, kind = HEADER.unpack_from(data, at)[:2]
        if kind == ERROR:
            number = -struct.unpack_from("=i", data, at + HEADER.size)[0]
            if number:
                raise OSError(number, os.strerror(number))
        yield kind, data[at + HEADER.size + 4:at + length]
        at += max((length + 3) & ~3, HEADER.size)
