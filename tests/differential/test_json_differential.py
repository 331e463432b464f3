"""csrc/json.c and nodewrap/audit/record.py write the same bytes for the same record (docs/audit.md, "The line")."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from nodewrap._core import ffi, lib

from nodewrap.audit import record

PIECES = st.sampled_from([
    b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x82", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98\x80", b"\xc2\x85", b"\xe2\x80\xae", b'"', b"\\",
    b"\n", b"a", b"\x7f", b"\xdf\xbf", b"\xe0\x9f\xbf", b"\xef\xbf\xbf", b"\xf0\x8f\xbf\xbf", b"\xf5\x80\x80\x80", b"\xe2\x80\xa7", b"\xe2\x81\xaa",
])
BYTES = st.one_of(st.binary(max_size=20), st.lists(PIECES, max_size=8).map(b"".join)).map(lambda raw: raw.replace(b"\0", b""))
VALUES = st.one_of(BYTES, st.booleans(), st.integers(-2**63, 2**63 - 1), st.lists(BYTES, max_size=4))
NAMES = st.text(alphabet="ab_-@", min_size=1, max_size=3)
TREES = st.recursive(VALUES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=4), max_leaves=12)


def flat(tree, path=""):
    """A tree of dicts as fields in order."""
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [field for name, value in tree.items() for field in flat(value, f"{path}.{name}" if path else name)]


def from_c(fields):
    """As the launcher does: with less of every claim until the line fits (docs/audit.md, "The line")."""
    lines = (_from_c(fields, cap) for cap in (4096, 2048, 1024, 512, 256, 128, 64))
    return next((line for line in lines if line), b"")


def _from_c(fields, cap):
    buffer, json = ffi.new("char[]", 4096), ffi.new("struct nw_json *")
    lib.nw_json_begin(json, buffer, 4096, cap)
    for path, value in fields:
        name = path.encode()
        if isinstance(value, bool):
            lib.nw_json_bool(json, name, value)
        elif isinstance(value, int):
            lib.nw_json_int(json, name, value)
        elif isinstance(value, bytes):
            lib.nw_json_string(json, name, ffi.new("char[]", value))
        else:
            items = [ffi.new("char[]", item) for item in value]
            lib.nw_json_strings(json, name, ffi.new("char *[]", items), len(items))
    return bytes(ffi.buffer(buffer, lib.nw_json_end(json)))


@given(TREES.filter(lambda tree: isinstance(tree, dict)))
@example({"a": {"b": {"-": 1}, "a": b"\xff"}, "ab": [b"\xff", b"x"], "b": []})
def test_c_and_python_write_the_same_line(tree):
    assert from_c(flat(tree)) == record.render(flat(tree))


CUT = st.tuples(st.sampled_from(["process.args", "nodewrap.declared.id", "user.name"]), st.integers(0, 6000), PIECES)


@given(st.lists(CUT, min_size=1, max_size=3))
def test_c_and_python_cut_the_same(parts):
    named = [(f"{name}{at}", size, piece) for at, (name, size, piece) in enumerate(sorted(parts))]
    fields = [(name, [piece * (size // 3)] if name.startswith("process") else piece * size) for name, size, piece in named]
    try:
        expected = record.render(fields)
    except ValueError:
        expected = b""
    assert from_c(fields) == expected


@given(BYTES)
def test_c_and_python_escape_every_string_alike(raw):
    assert from_c([("a", raw)]) == record.render([("a", raw)])


def test_every_code_point_is_written_alike():
    for first in range(0, 0x110000, 256):
        text = "".join(chr(code) for code in range(first, first + 256) if code and not 0xD800 <= code < 0xE000).encode()
        assert from_c([("process.x", text)]) == record.render([("process.x", text)])


@given(BYTES)
@example(b"./\x1b]2;x\x07\xc2\x9b31m\xe2\x80\xae\r")
def test_messages_hold_nothing_that_a_terminal_obeys(raw):
    """nw_plain: what stays is what a record writes as it is, the rest is as many question marks."""
    text = ffi.new("char[]", raw)
    lib.nw_plain(text)
    letters = [(letter, letter.encode("utf-8", "surrogateescape")) for letter in raw.decode("utf-8", "surrogateescape")]
    is_plain = {letter: record.render([("a", own)]) in (b'{"a":"%s"}\n' % own, b'{"a":"\\%s"}\n' % own) for letter, own in letters}
    assert ffi.string(text) == b"".join(own if is_plain[letter] else b"?" * len(own) for letter, own in letters)
