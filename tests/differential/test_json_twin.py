"""csrc/json.c against nodewrap/audit/record.py on whole records: many fields, long lists, any bytes, cut at every place where a cap can fall."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodewrap._core import ffi, lib

from nodewrap.audit import record
from tests.differential.test_json_differential import BYTES, from_c

#: Paths of a real record in its order; lists are marked by their name.
PATHS = (
    "event.action", "event.reason", "@timestamp", "user.name", "process.entity_id", "process.executable", "process.args", "rule.name",
    "nodewrap.schema", "nodewrap.run.id", "nodewrap.notes",
    "nodewrap.subject.dn", "nodewrap.subject.fqans", "nodewrap.declared.job_id", "nodewrap.declared.fqans",
    "nodewrap.degrade", "nodewrap.isolation.seccomp",
)
LISTS = ("process.args", "nodewrap.notes", "nodewrap.subject.fqans", "nodewrap.declared.fqans", "nodewrap.degrade")
UNITS = st.sampled_from([b"", b"a", b"\xff", b"\n", b'"', b"\xc3\xa9", b"\xe2\x80\xae", b"\xf0\x9f\x98\x80", b"\xc2", b"\x1b[0m"])
TIMES = st.integers(0, 900) | st.sampled_from([1, 62, 63, 64, 65, 127, 128, 129, 510, 512])
LONG = st.builds(lambda unit, times, tail: unit * times + tail, UNITS, TIMES, BYTES)
STRINGS = BYTES | LONG
FIELDS = st.lists(st.sampled_from(PATHS), unique=True, max_size=8).flatmap(lambda paths: st.tuples(*[
    st.tuples(st.just(path), st.lists(STRINGS, max_size=40) if path in LISTS else STRINGS | st.integers(-2**63, 2**63 - 1) | st.booleans())
    for path in sorted(paths, key=PATHS.index)
]).map(list))


def python_line(fields):
    try:
        return record.render(fields)
    except ValueError:
        return b""


def test_whole_records_are_written_alike():
    seen = Counter()

    @settings(max_examples=1500, deadline=None)
    @given(FIELDS)
    def compare(fields):
        line = from_c(fields)
        assert line == python_line(fields)
        assert line.count(b"\n") == (1 if line else 0)
        seen["cut" if b'_cut":' in line else "whole" if line else "refused"] += 1
        if line:
            json.loads(line)

    compare()
    assert all(seen[outcome] > 50 for outcome in ("cut", "whole")), seen
    assert seen["refused"] < 500, seen


@pytest.mark.parametrize("size", range(12))
def test_lists_are_cut_alike_wherever_the_cap_falls(size):
    """Strings of one size, as many as make the line too long: the last one kept ends at every distance from the cap."""
    for first in range(40):
        fields = [("process.args", [b"x" * first, *[b"y" * size] * 3000])]
        assert from_c(fields) == python_line(fields) != b""


@pytest.mark.parametrize("unit", [b"a", b"\n", b"\xff", b"\xc3\xa9", b"\xf0\x9f\x98\x80"])
@pytest.mark.parametrize("path", ["event.reason", "nodewrap.subject.dn", "nodewrap.declared.job_id"])
def test_strings_are_cut_alike_wherever_the_cap_falls(unit, path):
    for before in range(8):
        fields = [(path, b"x" * before + unit * 4100)]
        assert from_c(fields) == python_line(fields) != b""


def test_times_are_written_as_python_writes_them():
    """Each day of 400 years and more, and any microsecond until the year 9999."""
    epoch = datetime(1970, 1, 1)
    room = ffi.new("char[28]")

    def same(microseconds):
        lib.nw_utc(room, 28, microseconds)
        assert ffi.string(room).decode() == (epoch + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds") + "Z"

    for day in range(150_000):
        same(day * 86_400_000_000)
    given(st.integers(0, int((datetime.max - epoch).total_seconds()) * 1_000_000 - 1))(settings(max_examples=5000, deadline=None)(same))()
