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

from nodewrap.guard import colons, dotted

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


def resolvers(six: bool = False) -> tuple[list[str], dict[str, str]]:
    """Resolvers of the node, and for those on its loopback one that answers in their place (namespace_ruleset). six: those of IPv6, too."""
    named = _nameservers(RESOLV_CONF, six)
    local = [address for address in named if address.startswith("127.")]
    behind = [address for address in _nameservers(UPSTREAM, six) if not address.startswith("127.")] if local else []
    remote = [address for address in named if address not in local]
    four = next((address for address in behind if ":" not in address), "")
    return list(dict.fromkeys(remote + behind)), dict.fromkeys(local, four) if four else {}


def _nameservers(path: str, six: bool) -> list[str]:
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            words = [line.split() for line in file]
    except OSError:
        return []
    for line in words:
        if line[:1] == ["nameserver"] and len(line) > 1:
            found += _plain(line[1], six)
    return found


def _plain(word: str, six: bool) -> list[str]:
    """The address as the kernel writes it, if it is one that a payload could reach at all: not of a link, nor of the node's loopback in IPv6."""
    with contextlib.suppress(OSError):
        return [dotted(int.from_bytes(socket.inet_pton(socket.AF_INET, word), "big"))]
    with contextlib.suppress(OSError):
        number = int.from_bytes(socket.inet_pton(socket.AF_INET6, word), "big") if six else 0
        return [colons(number)] if number > 1 and number >> 118 != 0x3FA else []
    return []


def netfilter() -> int:
    """A socket that asks this namespace's netfilter, wherever it is read later."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as made:
        made.bind((0, 0))
        return made.detach()


# ---- what the kernel tells, in its own words ----

NFNL_TABLES = 10 << 8
GET_TABLE, GET_ELEMENTS = 1, 13
REQUEST, DUMP, ERROR, DONE = 1, 0x300, 2, 3
FAMILIES, FAMILY_INET = (2, 10), 1
GET_ADDRESSES, IFA_ADDRESS, IFA_LOCAL = 22, 1, 2
#: One place that a payload opened connections to, in words. So many are told at most.
REMOTE = struct.Struct("64s")
REMOTES = 32
#: What netfilter said of it: protocol, port, connections, address.
Row = tuple[int, int, int, bytes]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def _request(kind: int, flags: int, family: int, *attributes: bytes) -> bytes:
    body = struct.pack("=BBH", family, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", len(body) + 16, NFNL_TABLES | kind, REQUEST | flags, 1, 0) + body


def has_table(name: str) -> bool:
    """Whether the node has tables of that name, for IPv4 and IPv6. Raises OSError when netfilter does not say."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
        sock.settimeout(2)
        sock.bind((0, 0))
        return all(_has(sock, family, name) for family in FAMILIES)


def _has(sock: socket.socket, family: int, name: str) -> bool:
    sock.send(_request(GET_TABLE, 0, family, _attribute(1, name.encode() + b"\0")))
    kind: int = struct.unpack_from("=H", sock.recv(1 << 16), 4)[0]
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


def node_addresses(six: bool = False) -> list[str]:
    """The node's own addresses, without loopback. six: those of IPv6, too. Raises OSError."""
    found = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE) as sock:
        for family in (socket.AF_INET, socket.AF_INET6)[:1 + six]:
            for message in _dump(sock, struct.pack("=IHHIIBxxxI", 24, GET_ADDRESSES, REQUEST | DUMP, 1, 0, family, 0)):
                parts = dict(_nested(message[8:]))
                found.add(socket.inet_ntop(family, parts.get(IFA_LOCAL) or parts[IFA_ADDRESS]))
    return sorted(address for address in found if not address.startswith("127.") and address != "::1")


def opened(netfilter: int) -> list[Row]:
    """Where connections went, most first, by the sets that the namespace's rules fill. netfilter: a socket in the namespace."""
    found: list[Row] = []
    with socket.socket(fileno=os.dup(netfilter)) as sock, contextlib.suppress(OSError):
        for name in (b"seen\0", b"seen6\0"):
            for message in _dump(sock, _request(GET_ELEMENTS, DUMP, FAMILY_INET, _attribute(1, b"nodewrap\0"), _attribute(2, name))):
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
    """Of NFTA_SET_ELEM_LIST_ELEMENTS (3): each has a key (1), whose value (1) is address, protocol and port, and a counter (7).

    In the key each begins at a multiple of 4 bytes.
    """
    for kind, many in _nested(data):
        for _, element in _nested(many) if kind == 3 else ():
            parts: dict[int, Any] = dict(_nested(element))
            key = dict(_nested(parts.get(1, b""))).get(1, b"")
            expression = dict(_nested(parts.get(7, b"")))
            counter = dict(_nested(expression.get(2, b"")))
            if len(key) in (12, 24):
                where, rest = key[:-8], key[-8:]
                yield rest[0], int.from_bytes(rest[4:6], "big"), min(int.from_bytes(counter.get(2, b""), "big"), 0xFFFFFFFF), where


def words(row: Row) -> str:
    """``tcp 192.0.2.7:443 x12``, ``udp [2001:db8::1]:53 x1``."""
    protocol, port, count, address = row
    number = int.from_bytes(address, "big")
    where = dotted(number) if len(address) == 4 else f"[{colons(number)}]"
    return f"{'tcp' if protocol == 6 else 'udp'} {where}:{port} x{count}"


def tell(netfilter: int) -> bytes:
    """What a launcher is told at the end of its run: REMOTES places at most; one byte when there is none."""
    return b"".join(REMOTE.pack(words(row).encode()) for row in opened(netfilter)[:REMOTES]) or b"\0"
