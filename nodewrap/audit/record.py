"""How a record becomes one line: the Python twin of csrc/json.c, byte for byte. docs/audit.md, "The line", is the definition of both.

The launcher writes its records in C; this one serves the tools that write from Python, and the tests that hold the two against each other.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Union

Value = Union[str, bytes, int, list[str], list[bytes]]

#: Bytes of a line with its newline.
RECORD_MAX = 4096

#: Bytes that a value which may be cut has between its quotes or brackets, tried in turn until the line fits; the first stands for "whole".
CAPS = (RECORD_MAX, 2048, 1024, 512, 256, 128, 64)

#: Strings that the caller or the payload chose. Other strings are what the site established: they are never cut below FLOOR bytes.
CLAIMED = ("process.", "nodewrap.declared.", "event.")
FLOOR = 512

#: What a terminal or a log reader would obey, or show as nothing: first and last code point of each range.
ACTIVE = (
    (0, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x61C, 0x61C), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x2069), (0xFEFF, 0xFEFF),
)

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-@")


def render(fields: list[tuple[str, Value]]) -> bytes:
    """fields, as (dotted path, value), to one line with its newline, at most RECORD_MAX bytes.

    Values: str, bytes, bool, int (64 bits, signed), list of str or of bytes; bytes are taken for UTF-8, a str may carry stray ones as U+DC80–DCFF.
    Fields with a common prefix stand together. Raises ValueError for a name used twice or left and re-entered, for a bad name or value, and
    when the line does not fit although every value is cut.
    """
    for cap in CAPS:
        line = _line(fields, cap)
        if len(line) <= RECORD_MAX:
            return line
    raise ValueError(f"the record has {len(line)} bytes, more than {RECORD_MAX}, though every value is cut")


def _line(fields: list[tuple[str, Value]], cap: int) -> bytes:
    out, used, inside = bytearray(b"{"), {""}, ""
    for field, given in fields:
        for path, text in _members(field, given, cap):
            inside = _enter(out, used, inside, path)
            out += b'"' + path.rpartition(".")[2].encode() + b'":' + text + b","
    _leave(out, inside, "")
    return bytes(_closed(out)) + b"}\n"


def _enter(out: bytearray, used: set[str], inside: str, path: str) -> str:
    """Close and open objects in out until path's own is the innermost; returns its path. used: every path taken so far."""
    parent = path.rpartition(".")[0]
    names = path.split(".")
    while inside and not (parent + ".").startswith(inside + "."):
        inside = _leave(out, inside, inside.rpartition(".")[0])
    while inside != parent:
        name = names[inside.count(".") + 1 if inside else 0]
        inside = _claim(used, f"{inside}.{name}" if inside else name)
        out += b'"' + name.encode() + b'":{'
    _claim(used, path)
    return inside


def _leave(out: bytearray, inside: str, target: str) -> str:
    while inside != target:
        _closed(out).extend(b"},")
        inside = inside.rpartition(".")[0]
    return inside


def _closed(out: bytearray) -> bytearray:
    """out without the comma behind its last member."""
    if out.endswith(b","):
        del out[-1]
    return out


def _claim(used: set[str], path: str) -> str:
    name = path.rpartition(".")[2]
    if path in used or not name or not set(name) <= _NAME:
        raise ValueError(f"field {path!r}: a name stands once, its neighbours with it, and is made of letters, digits, _, - and @")
    used.add(path)
    return path


def _members(path: str, value: Value, cap: int) -> Iterator[tuple[str, bytes]]:
    """The field as it is written, then its ``_b64`` and ``_cut`` when needed; each as (path, JSON)."""
    if isinstance(value, list):
        yield from _list(path, [_raw(item) for item in value], cap)
    elif isinstance(value, (str, bytes)):
        yield from _string(path, _raw(value), cap if path.startswith(CLAIMED) else max(cap, FLOOR))
    elif isinstance(value, bool):
        yield path, b"true" if value else b"false"
    elif isinstance(value, int) and -2**63 <= value < 2**63:
        yield path, b"%d" % value
    else:
        raise ValueError(f"field {path!r}: {type(value).__name__} of this size or kind is no value of a record")


def _string(path: str, raw: bytes, cap: int) -> Iterator[tuple[str, bytes]]:
    text, kept = _quoted(raw, cap)
    yield path, text
    if not _valid(kept):
        yield path + "_b64", _base64(kept)
    if kept != raw:
        yield path + "_cut", b"%d" % len(raw)


def _list(path: str, items: list[bytes], cap: int) -> Iterator[tuple[str, bytes]]:
    texts: list[bytes] = []
    kept: list[bytes] = []
    room = cap
    for item in items:
        room -= 2 + (1 if texts else 0)  # the quotes, and the comma before all but the first
        if room < 0:
            break
        text, part = _quoted(item, room)
        texts.append(text)
        kept.append(part)
        room -= len(text) - 2
        if part != item:
            break
    yield path, b"[" + b",".join(texts) + b"]"
    if not all(map(_valid, kept)):
        yield path + "_b64", b"[" + b",".join(map(_base64, kept)) + b"]"
    if kept != items:
        yield path + "_cut", b"%d" % len(items)


def _raw(value: str | bytes) -> bytes:
    """value as the bytes that it stands for, without NUL: C strings end there."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise ValueError("a string of a record cannot contain NUL")
    return raw


def _valid(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _quoted(raw: bytes, cap: int) -> tuple[bytes, bytes]:
    """raw as a JSON string of at most cap bytes between the quotes, and the part of raw that it stands for."""
    units, length, kept = [], 0, 0
    for char in raw.decode("utf-8", "surrogateescape"):
        unit = _unit(char)
        length += len(unit)
        if length > cap:
            break
        units.append(unit)
        kept += len(char.encode("utf-8", "surrogateescape"))
    return b'"' + b"".join(units) + b'"', raw[:kept]


def _unit(char: str) -> bytes:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return b"\xef\xbf\xbd"
    if char in '"\\':
        return b"\\" + char.encode()
    if any(first <= code <= last for first, last in ACTIVE):
        return b"\\u%04x" % code
    return char.encode()


def _base64(raw: bytes) -> bytes:
    return b'"' + base64.b64encode(raw) + b'"'
