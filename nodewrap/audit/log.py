"""Reading audit files back: every byte of any file is accounted for, as a record or as a flaw, and nothing in it can harm the reader.

docs/audit.md, "Reading". Flaws are found whatever the caller looks for: a filter must not hide that records are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

#: Longer lines are no records: twenty times what a writer may write, so that other versions' records still pass.
LINE_MAX = 80 * 1024
POLL_S = 0.2

Record = dict[str, Any]


class Entry:
    """One line of the file.

    offset: where it starts. raw: its bytes without the newline. record: the parsed object, None when it is none. flaw: "" or one of
    ``torn damaged sealed missing order``, told by ``text``. A line can be a record and show a flaw: ``missing`` is what is not before it.
    """

    __slots__ = ("flaw", "offset", "raw", "record", "text")

    def __init__(self, offset: int, raw: bytes, record: Record | None, flaw: str = "", text: str = "") -> None:
        self.offset = offset
        self.raw = raw
        self.record = record
        self.flaw = flaw
        self.text = text


def get(record: Record, path: str) -> Any:
    """Value at a dotted path, None when absent or when something on the way is no object."""
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def text(record: Record, path: str) -> str:
    """As get, when it is a string or a number; else ""."""
    value = get(record, path)
    return value if isinstance(value, str) else str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def parse(raw: bytes) -> Record | None:
    """One line (no newline) as a record: a JSON object with an integer event.sequence and a string event.action; else None.

    Strict where json is not: duplicate names, NaN and a lone surrogate are no JSON of ours (attack I03).
    """
    try:
        record = json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_constant)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or isinstance(get(record, "event.sequence"), bool):
        return None
    return record if isinstance(get(record, "event.sequence"), int) and isinstance(get(record, "event.action"), str) else None


def _object(pairs: list[tuple[str, Any]]) -> Record:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def lines(file: BinaryIO, follow: bool = False) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline, if it has one) of the file from where it stands; over-long lines come in pieces of LINE_MAX.

    follow: at the end wait for more, for ever; a piece without newline is then held back until its end arrives.
    """
    offset, held = file.tell(), b""
    while True:
        piece = file.readline(LINE_MAX - len(held))
        held += piece
        if held and (held.endswith(b"\n") or len(held) >= LINE_MAX or (not piece and not follow)):
            yield offset, held
            offset, held = offset + len(held), b""
        elif not piece and not follow:
            return
        elif not piece:
            time.sleep(POLL_S)


def entries(found: Iterable[tuple[int, bytes]]) -> Iterator[Entry]:
    """What lines gives, judged. A damaged line is held back for one step: a ``gap`` record behind it makes it ``sealed``."""
    last: int | None = None
    held: list[Entry] = []
    for offset, raw in found:
        record = parse(raw[:-1]) if raw.endswith(b"\n") else None
        if record is None:
            yield from held
            held = [_damaged(offset, raw)]
            continue
        entry = Entry(offset, raw[:-1], record)
        last = _in_order(entry, last)
        yield from _sealed(held) if text(record, "event.action") == "gap" else held
        held = []
        yield entry
    yield from held


def _damaged(offset: int, raw: bytes) -> Entry:
    if raw.endswith(b"\n"):
        return Entry(offset, raw[:-1], None, "damaged", f"line at byte {offset} is no record ({len(raw)} bytes)")
    return Entry(offset, raw, None, "torn", f"line at byte {offset} has no end ({len(raw)} bytes): its writer died, or is writing")


def _sealed(held: list[Entry]) -> list[Entry]:
    """The damaged line, if there is one, that a gap record follows: it is accounted for."""
    for entry in held:
        entry.flaw, entry.text = "sealed", entry.text + ", sealed by the gap record behind it"
    return held


def _in_order(entry: Entry, last: int | None) -> int:
    """Compare the entry's sequence with the last one; returns it."""
    record = entry.record or {}
    number = int(get(record, "event.sequence"))
    if last is not None and number <= last:
        entry.flaw, entry.text = "order", f"sequence {number} at byte {entry.offset} comes after {last}"
    elif last is not None and number > last + 1 and text(record, "event.action") != "gap":
        entry.flaw, entry.text = "missing", f"sequence {last + 1} to {number - 1} missing before byte {entry.offset}"
    return number


def sound(flaw: str) -> bool:
    """True when nothing is wrong, or what is wrong has been accounted for by a ``gap`` record."""
    return flaw in ("", "sealed")


class Filter:
    """Which records to show; every criterion that is set must hold.

    run: beginning of a run id. user: uid or account, the payload's or the pilot's. dn: part of the subject's DN, verified or declared.
    actions: any of them. since: RFC 3339 time in UTC with ``Z``, compared as text: the records' own form sorts by time.
    """

    __slots__ = ("actions", "dn", "run", "since", "user")

    def __init__(self, run: str = "", user: str = "", dn: str = "", actions: Iterable[str] = (), since: str = "") -> None:
        self.run = run
        self.user = user
        self.dn = dn
        self.actions = frozenset(actions)
        self.since = since

    def match(self, record: Record) -> bool:
        """True when the record is to be shown."""
        return (
            run_of(record).startswith(self.run)
            and (not self.user or self.user in [text(record, path) for path in ("user.id", "user.name", "nodewrap.pilot.uid", "nodewrap.pilot.name")])
            and any(self.dn in text(record, path) for path in ("nodewrap.subject.dn", "nodewrap.declared.subject"))
            and (not self.actions or text(record, "event.action") in self.actions)
            and text(record, "@timestamp") >= self.since
        )


def run_of(record: Record) -> str:
    """Id of the run that the record belongs to, "" when to none."""
    return text(record, "nodewrap.run.id") or text(record, "process.entity_id")
