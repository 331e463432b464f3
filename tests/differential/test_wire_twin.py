"""csrc/wire.c against nodewrap/wire.py: what is a field, an integer, a string, a frame's header."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodewrap import _core, wire

ffi, lib = _core.ffi, _core.lib
NUMBERS = st.sampled_from([0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
EDGES = st.sampled_from([b"", b"\0", b"a\0", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\xff" * 9])
VALUES = NUMBERS | st.binary(max_size=20) | st.text(max_size=6) | EDGES
FIELDS = st.lists(st.tuples(st.sampled_from([0, 1, 255, 256, 32767, 32768, 65535]) | st.integers(0, 65535), VALUES), max_size=6)


def c_fields(body):
    """[(tag, value)] or None when the bytes are not fields to the last one. The memory ends where the body does (seen under ASan)."""
    data = ffi.new("unsigned char[]", max(len(body), 1))
    ffi.memmove(data, body, len(body))
    reader, field, found = ffi.new("struct nw_reader *", {"p": data, "end": data + len(body)}), ffi.new("struct nw_field *"), []
    while (got := lib.nw_next(reader, field)) > 0:
        found.append((field.tag, bytes(ffi.buffer(field.value, field.len))))
    return None if got < 0 else found


def python_fields(body):
    try:
        return wire.unpack(body)
    except wire.WireError:
        return None


def c_integer(value):
    data, number = ffi.new("unsigned char[]", max(len(value), 1)), ffi.new("uint64_t *")
    ffi.memmove(data, value, len(value))
    return None if lib.nw_int(ffi.new("struct nw_field *", {"value": data, "len": len(value)}), number) else number[0]


def python_integer(value):
    try:
        return wire.integer(value)
    except wire.WireError:
        return None


def damaged(body, how, at, byte):
    at %= len(body) + 1
    return {"keep": body, "cut": body[:at], "flip": body[:at] + bytes([byte]) + body[at + 1:], "more": body + bytes([byte]) * (at % 9)}[how]


def test_bodies_are_taken_apart_alike():
    seen = Counter()

    @settings(max_examples=2000, deadline=None)
    @given(FIELDS, st.sampled_from(["keep", "cut", "flip", "more"]), st.integers(0, 300), st.integers(0, 255))
    @example([], "keep", 0, 0)
    @example([(1, b"x")], "more", 6, 0)
    def compare(fields, how, at, byte):
        body = damaged(wire.pack(fields), how, at, byte)
        found = c_fields(body)
        assert found == python_fields(body)
        if how == "keep":
            assert [tag for tag, _ in found] == [tag for tag, _ in fields]
        seen["refused" if found is None else "fields" if found else "empty"] += 1

    compare()
    assert seen["refused"] > 200
    assert seen["fields"] > 200
    assert seen["empty"] > 0


@given(st.binary(max_size=40))
def test_any_bytes_are_taken_apart_alike(body):
    assert c_fields(body) == python_fields(body)


def test_every_cut_of_a_body_is_refused_alike_unless_it_falls_between_fields():
    body = wire.pack([(1, 7), (2, b""), (65535, b"abc")])
    outcomes = {at: c_fields(body[:at]) for at in range(len(body) + 1)}
    assert outcomes == {at: python_fields(body[:at]) for at in range(len(body) + 1)}
    assert [at for at, found in outcomes.items() if found is not None] == [0, 14, 20, len(body)]


@given(NUMBERS.map(lambda number: number.to_bytes(8, "little")) | st.binary(max_size=17))
@example(b"")
@example(bytes(7))
@example(bytes(9))
def test_integers_are_eight_bytes_for_both(value):
    assert c_integer(value) == python_integer(value)
    assert (c_integer(value) is None) == (len(value) != 8)


@given(st.binary(max_size=40), st.integers(0, 40))
@example(b"", 0)
@example(b"ab", 1)
@example(b"ab", 2)
@example(b"a\0", 2)
@example(b"\0", 1)
def test_strings_have_no_nul_and_keep_their_bound(value, most):
    data = ffi.new("unsigned char[]", max(len(value), 1))
    ffi.memmove(data, value, len(value))
    refused = lib.nw_is_string(ffi.new("struct nw_field *", {"value": data, "len": len(value)}), most)
    assert (refused == 0) == (len(value) <= most and b"\0" not in value)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_headers_are_two_little_endian_words(length, kind):
    found = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    lib.nw_frame_header(length.to_bytes(4, "little") + kind.to_bytes(4, "little"), *found)
    assert (found[0][0], found[1][0]) == (length, kind)
