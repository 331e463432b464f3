"""Frames and fields of docs/wire.md: what the launcher and the policy child say to each other. Hot path; twin of csrc/wire.c and decision.c.

A field's header, tag and length, is read and written as one number of 6 bytes. A value is int (8 bytes), bytes, or a list of fields for a struct; a
message is a list of ``(tag, value)``. Socket objects are ``_socket.socket``: importing ``socket`` costs 8 ms for things the child does not use.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HELLO, REQUEST, OPEN, OPENED, DECISION = 1, 2, 3, 4, 5
LIMIT = {HELLO: 4096, REQUEST: 8 << 20, OPEN: 8192, OPENED: 8192, DECISION: 1 << 20}
HEADER = 8


class WireError(Exception):
    """The other side said something that is not in docs/wire.md, or hung up."""


def pack(fields: "list[tuple[int, Any]]") -> bytes:
    """Fields as bytes. int -> 8 bytes little endian, str -> its bytes (surrogateescape), bytes as they are, list -> nested fields."""
    out = []
    for tag, value in fields:
        if isinstance(value, int):
            out.append((tag | 8 << 16 | value << 48).to_bytes(14, "little"))
            continue
        if isinstance(value, str):
            body = value.encode("utf-8", "surrogateescape")
        elif isinstance(value, list):
            body = pack(value)
        else:
            body = bytes(value)
        out.append((tag | len(body) << 16).to_bytes(6, "little") + body)
    return b"".join(out)


def unpack(body: bytes) -> "list[tuple[int, bytes]]":
    """The fields of a body, in order. Raises WireError when the bytes are not fields to the last one."""
    fields = []
    at, end = 0, len(body)
    while at < end:
        header = int.from_bytes(body[at:at + 6], "little")
        at += 6
        following = at + (header >> 16)
        if following > end:
            raise WireError("a field is cut short")
        fields.append((header & 0xFFFF, body[at:following]))
        at = following
    return fields


def integer(value: bytes) -> int:
    """An integer field. Raises WireError when it is not 8 bytes."""
    if len(value) != 8:
        raise WireError("an integer is not 8 bytes long")
    return int.from_bytes(value, "little")


def send(sock: "Any", kind: int, fields: "list[tuple[int, Any]]") -> None:
    """One frame of ``kind`` with ``fields``. Raises WireError when it is longer than its kind may be, OSError when the other side is gone."""
    body = pack(fields)
    if len(body) > LIMIT[kind]:
        raise WireError("the frame is longer than its kind may be")
    sock.sendall(len(body).to_bytes(4, "little") + kind.to_bytes(4, "little") + body)


def receive(sock: "Any", kind: int) -> "tuple[list[tuple[int, bytes]], int]":
    """Fields of the next frame, which must be of ``kind``, and the descriptor that came with it (-1: none)."""
    header, fd = _exactly(sock, HEADER)
    length, got = int.from_bytes(header[:4], "little"), int.from_bytes(header[4:], "little")
    if got != kind or length > LIMIT[kind]:
        raise WireError("not the frame that was expected")
    body, _ = _exactly(sock, length)
    return unpack(body), fd


def _exactly(sock: "Any", count: int) -> "tuple[bytes, int]":
    parts, fd = [], -1
    while count:
        data, ancillary, _, _ = sock.recvmsg(min(count, 1 << 16), 64)
        for level, kind, value in ancillary:
            if (level, kind) == (1, 1):  # SOL_SOCKET, SCM_RIGHTS
                fd = int.from_bytes(value[:4], "little")
        if not data:
            raise WireError("the other side hung up")
        parts.append(data)
        count -= len(data)
    return b"".join(parts), fd
