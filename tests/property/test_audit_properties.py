"""A record says what was put in, in one line that nothing can break; a reader survives any file."""

from __future__ import annotations

import base64
import io
import json

from hypothesis import given
from hypothesis import strategies as st

from nodewrap.audit import log, record
from nodewrap.commands import audit

TEXT = st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))
BYTES = st.one_of(st.binary(max_size=40), TEXT).map(lambda raw: raw.replace(b"\0", b""))
VALUES = st.one_of(BYTES, st.integers(-2**63, 2**63 - 1), st.booleans(), st.lists(BYTES, max_size=5))
OBJECTS = st.dictionaries(st.sampled_from("xyz"), VALUES, min_size=1)
FIELDS = st.dictionaries(st.text(alphabet="abc@_-9", min_size=1, max_size=4), st.one_of(VALUES, OBJECTS), max_size=6)
LONG = st.one_of(st.binary(max_size=30).map(lambda raw: raw.replace(b"\0", b"") * 400), st.lists(BYTES.map(lambda raw: raw * 60), max_size=40))
LONG_FIELDS = st.sampled_from(["process.args", "process.executable", "nodewrap.declared.job_id", "event.message", "nodewrap.subject.dn"])
GOOD_LINES = [b"\n", b'{"event":{"sequence":1,"action":"start"}}\n', b'{"event":{"sequence":2,"action":"gap"}}\n']
KEYS = ["event", "process", "nodewrap", "user", "host", "run", "id", "subject", "dn", "args", "degrade", "cleanup", "pilot", "@timestamp"]
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=9), st.floats(allow_nan=False))


def flat(tree):
    return [(name, value) if not isinstance(value, dict) else (f"{name}.{inner}", item)
            for name, value in tree.items() for inner, item in (value.items() if isinstance(value, dict) else [("", None)])]


def back(made, path):
    """The value at path as bytes, from the base64 twin when there is one."""
    for name in path.split(".")[:-1]:
        made = made[name]
    name = path.rpartition(".")[2]
    value, twin = made[name], made.get(name + "_b64")
    if isinstance(value, list):
        return [base64.b64decode(item) for item in twin] if twin is not None else [item.encode() for item in value]
    return base64.b64decode(twin) if twin is not None else value.encode() if isinstance(value, str) else value


@given(FIELDS)
def test_every_value_comes_back_from_one_clean_line(tree):
    fields = flat(tree)
    line = record.render(fields)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert all(byte >= 0x20 and byte != 0x7F for byte in line[:-1])
    assert not {c for c in line.decode()[:-1] for first, last in record.ACTIVE if first <= ord(c) <= last}
    made = json.loads(line)
    for path, value in fields:
        assert back(made, path) == value
        assert type(back(made, path)) is type(value)


@given(st.lists(st.tuples(LONG_FIELDS, LONG), unique_by=lambda field: field[0]))
def test_cut_values_are_beginnings_of_the_whole_and_the_line_fits(fields):
    fields = sorted(fields)
    line = record.render(fields)
    assert len(line) <= record.RECORD_MAX
    made = json.loads(line)
    for path, value in fields:
        kept = back(made, path)
        if isinstance(value, bytes):
            assert value.startswith(kept)
            assert log.get(made, path + "_cut") == (len(value) if kept != value else None)
        else:
            assert all(whole == part for whole, part in zip(value[:-1], kept[:-1]))
            assert not kept or value[len(kept) - 1].startswith(kept[-1])
            assert log.get(made, path + "_cut") == (len(value) if kept != value else None)


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(GOOD_LINES))))
def test_reader_accounts_for_every_byte_and_prints_nothing_active(pieces):
    data = b"".join(pieces)
    found = list(log.entries(log.lines(io.BytesIO(data))))
    ends = [entry.offset for entry in found[1:]] + [len(data)]
    assert b"".join(data[entry.offset:end] for entry, end in zip(found, ends)) == data
    assert all((entry.record is not None) or entry.flaw in ("torn", "damaged", "sealed") for entry in found)
    shown = [(audit.line(entry.record), audit.who(entry.record), audit.original(entry)) for entry in found if entry.record]
    assert all(row.isprintable() for rows in shown for row in rows)


def nest(inner):
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=5))


@given(st.recursive(LEAVES, nest, max_leaves=20))
def test_records_of_any_shape_are_shown_as_one_printable_line(value):
    text = json.dumps({"event": {"sequence": 1, "action": "x"}, "nodewrap": value, "process": value, "user": value}, ensure_ascii=False)
    made = log.parse(text.encode("utf-8", "surrogatepass"))
    if made is not None:
        assert audit.line(made).isprintable()
        assert audit.who(made).isprintable()
        assert isinstance(log.Filter(user="1", dn="x").match(made), bool)


@given(st.text(max_size=20))
def test_since_gives_a_time_that_sorts_with_records_or_refuses(text):
    try:
        made = audit.since(text)
    except ValueError:
        return
    assert len(made) == len("2026-11-20T21:00:00.000000Z")
