"""What every kind of private network needs of the kernel (docs/network.md): nft, netfilter's answers, the node's resolvers and addresses.

Without libraries: ``netrun`` loads this for each run. netd, which lives long, has pyroute2 besides (``netbuild``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

from nodewrap.guard import dotted

NFT = "/usr/sbin/nft"
RESOLV_CONF = "/etc/resolv.conf"
#: Where systemd-resolved names those behind its own address on loopback.
UPSTREAM = "/run/systemd/resolve/resolv.conf"
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12

_libc = ctypes.CDLL(None, use_errno=True)


class NetError(Exception):
    """Why there is no network; one line, which the caller reads."""


def namespace(call: str, argument: int, flags: tuple[int, ...] = ()) -> None:
    """unshare or setns, which Python has from 3.12 on. Raises NetError."""
    if getattr(_libc, call)(argument, *flags):
        number = ctypes.get_errno()
        raise NetError(f"{call}: {os.strerror(number)}")


def nft(text: str) -> None:
    """Apply rules in this namespace, all or nothing. Raises NetError."""
    try:
        done = subprocess.run([NFT, "-f", "-"], input=text.encode(), capture_output=True, env={"LC_ALL": "C"}, timeout=10, check=False)
    except FileNotFoundError:
        raise NetError(f"{NFT} is missing; install the package nftables") from None
    except subprocess.TimeoutExpired:
        raise NetError(f"{NFT} hangs") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
        raise NetError(f"{NFT}: {said[0][:160]}")


def resolvers() -> tuple[list[str], dict[str, str]]:
    """IPv4 resolvers of the node, and for those on its loopback one that answers in their place (namespace_ruleset)."""
    named = _nameservers(RESOLV_CONF)
    local = [address for address in named if address.startswith("127.")]
    behind = [address for address in _nameservers(UPSTREAM) if not address.startswith("127.")] if local else []
    remote = [address for address in named if address not in local]
    return list(dict.fromkeys(remote + behind)), dict.fromkeys(local, behind[0]) if behind else {}


def _nameservers(path: str) -> list[str]:
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            words = [line.split() for line in file]
    except OSError:
        return []
    for line in words:
        with contextlib.suppress(OSError):
            if line[:1] == ["nameserver"] and len(line) > 1:
                found.append(dotted(int.from_bytes(socket.inet_pton(socket.AF_INET, line[1]), "big")))
    return found


def netfilter() -> int:
    """A socket that asks this namespace's netfilter, wherever it is read later."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as made:
        made.bind((0, 0))
        return made.detach()


# ---- what the kernel tells, in its own words ----

NFNL_TABLES = 10 << 8
GET_TABLE, GET_ELEMENTS = 1, 13
REQUEST, DUMP, ERROR, DONE = 1, 0x300, 2, 3
FAMILY_IP, FAMILY_INET = 2, 1
GET_ADDRESSES, IFA_ADDRESS, IFA_LOCAL = 22, 1, 2
#: One place that a payload opened connections to, in words. So many are told at most.
REMOTE = struct.Struct("48s")
REMOTES = 32
#: What netfilter said of it: protocol, port, connections, address.
Row = tuple[int, int, int, bytes]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def _request(kind: int, flags: int, family: int, *attributes: bytes) -> bytes:
    body = struct.pack("=BBH", family, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", len(body) + 16, NFNL_TABLES | kind, REQUEST | flags, 1, 0) + body


def has_table(name: str) -> bool:
    """Whether the node has a table of that name. Raises OSError when netfilter does not say."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
        sock.settimeout(2)
        sock.bind((0, 0))
        sock.send(_request(GET_TABLE, 0, FAMILY_IP, _attribute(1, name.encode() + b"\0")))
        answer = sock.recv(1 << 16)
    kind: int = struct.unpack_from("=H", answer, 4)[0]
    return kind != ERROR


def _dump(sock: socket.socket, request: bytes) -> Iterator[bytes]:
    """The messages of an answer, without their headers. Raises OSError."""
    sock.settimeout(1)
    sock.send(request)
    while True:
        answer, at = sock.recv(1 << 17), 0
        while at + 16 <= len(answer):
            length, kind = struct.unpack_from("=IH", answer, at)
            if kind in (DONE, ERROR) or length < 16:
                return
            yield answer[at + 16:at + length]
            at += (length + 3) & ~3


def node_addresses() -> list[str]:
    """The node's own IPv4 addresses, without loopback. Raises OSError."""
    found = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE) as sock:
        for message in _dump(sock, struct.pack("=IHHIIBxxxI", 24, GET_ADDRESSES, REQUEST | DUMP, 1, 0, socket.AF_INET, 0)):
            parts = dict(_nested(message[8:]))
            found.add(socket.inet_ntop(socket.AF_INET, parts.get(IFA_LOCAL) or parts[IFA_ADDRESS]))
    return sorted(address for address in found if not address.startswith("127."))


def opened(netfilter: int) -> list[Row]:
    """Where connections went, most first, by the set that the namespace's rules fill. netfilter: a socket in the namespace."""
    found: list[Row] = []
    request = _request(GET_ELEMENTS, DUMP, FAMILY_INET, _attribute(1, b"nodewrap\0"), _attribute(2, b"seen\0"))
    with socket.socket(fileno=os.dup(netfilter)) as sock, contextlib.suppress(OSError):
        for message in _dump(sock, request):
            found += _elements(message[4:])
    return sorted(found, key=lambda row: (-row[2], row))


def _nested(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4:at + length]
        at += (length + 3) & ~3


def _elements(data: bytes) -> Iterator[Row]:
    """Of NFTA_SET_ELEM_LIST_ELEMENTS (3): each has a key (1), whose value (1) is address, protocol and port in 4 bytes each, and a counter (7)."""
    for kind, many in _nested(data):
        for _, element in _nested(many) if kind == 3 else ():
            parts: dict[int, Any] = dict(_nested(element))
            key = dict(_nested(parts.get(1, b""))).get(1, b"")
            expression = dict(_nested(parts.get(7, b"")))
            counter = dict(_nested(expression.get(2, b"")))
            if len(key) >= 12:
                yield key[4], int.from_bytes(key[8:10], "big"), min(int.from_bytes(counter.get(2, b""), "big"), 0xFFFFFFFF), key[:4]


def words(row: Row) -> str:
    """``tcp 192.0.2.7:443 x12``."""
    protocol, port, count, address = row
    return f"{'tcp' if protocol == 6 else 'udp'} {dotted(int.from_bytes(address, 'big'))}:{port} x{count}"


def tell(netfilter: int) -> bytes:
    """What a launcher is told at the end of its run: REMOTES places at most; one byte when there is none."""
    return b"".join(REMOTE.pack(words(row).encode()) for row in opened(netfilter)[:REMOTES]) or b"\0"
