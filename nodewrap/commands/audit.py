"""``nodewrap audit show``: the audit file for people. docs/audit.md, "Reading"."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from nodewrap import _paths
from nodewrap.audit import log
from nodewrap.guard import GuardError, parse_guard

FLAWS_TOLD = 50
AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: What a line says behind time, action and outcome, in this order, when the record has it.
DETAILS = (
    ("code", "event.code"), ("rule", "rule.name"), ("pid", "process.pid"), ("exit", "process.exit_code"), ("signal", "process.signal"),
    ("by", "process.ended_by"), ("cpu_s", "nodewrap.usage.cpu_s"),
    ("wall_s", "nodewrap.usage.wall_s"), ("rss_kb", "nodewrap.usage.rss_kb"), ("killed", "nodewrap.cleanup.killed"),
    ("removed", "nodewrap.cleanup.removed"), ("left", "nodewrap.cleanup.left"), ("job", "nodewrap.declared.job_id"),
    ("message", "event.message"), ("reason", "event.reason"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add ``show`` and its options to the parser of ``nodewrap audit``."""
    show = parser.add_subparsers(dest="audit_command", required=True).add_parser("show", help="print records for people", allow_abbrev=False)
    show.add_argument("file", nargs="?", help="audit file (default: the one that the guard names)")
    show.add_argument("--run", default="", metavar="ID", help="of this run; the beginning of its id is enough")
    show.add_argument("--user", default="", metavar="UID", help="of this payload or pilot account, by uid or name")
    show.add_argument("--dn", default="", help="whose subject contains this")
    show.add_argument("--action", action="append", default=[], help="of this kind (may be repeated)")
    show.add_argument("--since", metavar="T", type=since, help="not older: a time (2026-11-20T21:00, UTC) or an age (90s, 30m, 12h, 7d)")
    show.add_argument("--follow", action="store_true", help="go on as records are written")
    show.add_argument("--json", action="store_true", help="the records' own lines")


def main(arguments: argparse.Namespace) -> int:
    """Run what ``configure`` parsed. Returns 0; 1 when the file has flaws that no gap record accounts for; 2 when it cannot be read."""
    wanted = log.Filter(arguments.run, arguments.user, arguments.dn, arguments.action, arguments.since or "")
    try:
        with open(arguments.file or audit_file(), "rb") as file:
            return _show(log.entries(log.lines(file, arguments.follow)), wanted, arguments)
    except OSError as error:
        print(f"nodewrap: NW-AUDIT-READ: {safe(str(error.filename))}: {error.strerror}; name another file, or read it as root", file=sys.stderr)
        return 2
    except GuardError as error:
        print(f"nodewrap: NW-AUDIT-READ: {_paths.GUARD}: {error}; mend it, or name the audit file", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # how --follow ends
        return 0


def _show(entries: Iterable[log.Entry], wanted: log.Filter, arguments: argparse.Namespace) -> int:
    if arguments.follow:
        return _follow(entries, wanted, arguments.json)
    runs: dict[str, list[log.Entry]] = {}
    flaws = []
    for entry in entries:
        if entry.flaw:
            flaws.append(entry)
        if entry.record is not None and wanted.match(entry.record):
            runs.setdefault(log.run_of(entry.record) or f"at {entry.offset}", []).append(entry)
    _tell(flaws, sys.stderr if arguments.json else sys.stdout)
    for group in runs.values():
        sys.stdout.writelines(line + "\n" for line in (map(original, group) if arguments.json else paragraph(group)))
    return 0 if all(log.sound(entry.flaw) for entry in flaws) else 1


def _follow(entries: Iterable[log.Entry], wanted: log.Filter, as_json: bool) -> int:
    for entry in entries:
        _tell([entry] if entry.flaw else [], sys.stderr if as_json else sys.stdout)
        if entry.record is not None and wanted.match(entry.record):
            print(original(entry) if as_json else f"{log.run_of(entry.record)[-12:]:12}  {line(entry.record)}  {who(entry.record)}", flush=True)
    return 0


def _tell(flaws: list[log.Entry], out: TextIO) -> None:
    for entry in flaws[:FLAWS_TOLD]:
        print(f"! {entry.flaw}: {entry.text}", file=out)
    if len(flaws) > FLAWS_TOLD:
        print(f"! and {len(flaws) - FLAWS_TOLD} flaws more", file=out)


def original(entry: log.Entry) -> str:
    """The record's own line. It was valid JSON; characters that a foreign writer left unescaped are escaped as JSON can: the value is the same."""
    return "".join(char if char.isprintable() else _json_escape(char) for char in entry.raw.decode())


def _json_escape(char: str) -> str:
    pairs = char.encode("utf-16-be").hex()
    return " " if char in "\t\r" else "".join("\\u" + pairs[i:i + 4] for i in range(0, len(pairs), 4))


def paragraph(group: list[log.Entry]) -> Iterator[str]:
    """The records of one run: a line that says whose it was, then one line each."""
    records = [entry.record for entry in group if entry.record is not None]
    fullest = max(records, key=lambda record: len(who(record)))
    yield f"run {safe(log.run_of(fullest)) or '-'}  {who(fullest)}"
    for record in records:
        yield "  " + line(record)
    yield ""


def line(record: log.Record) -> str:
    """Time, action, outcome, details: one line without anything that a terminal would obey."""
    shown = [f"{label}={safe(value)}" for label, value in ((label, log.text(record, path)) for label, path in DETAILS) if value]
    shown += ["swept"] * (log.get(record, "nodewrap.swept") is True)
    for label, path in (("degrade", "nodewrap.degrade"), ("left_path", "nodewrap.cleanup.left_paths")):
        shown += [f"{label}={safe(item)}" for item in _strings(record, path)]
    command = shlex.join(_strings(record, "process.args"))
    stamp, action, outcome = (safe(log.text(record, path)) for path in ("@timestamp", "event.action", "event.outcome"))
    return f"{stamp:27} {action:9} {outcome:7} {' '.join(shown)}{'  $ ' + safe(command) if command else ''}".rstrip()


def who(record: log.Record) -> str:
    """Account, subject, VO, mode and profile, pilot, as far as the record says."""
    declared = log.text(record, "nodewrap.declared.subject")
    parts = [
        _account(record, "user.name", "user.id"),
        log.text(record, "nodewrap.subject.dn") or (f"declared {declared}" if declared else ""),
        log.text(record, "nodewrap.subject.vo"),
        "/".join(filter(None, [log.text(record, "nodewrap.mode"), log.text(record, "nodewrap.profile")])),
        "pilot " + _account(record, "nodewrap.pilot.name", "nodewrap.pilot.uid"),
    ]
    return "  ".join(safe(part) for part in parts if part not in ("", "pilot "))


def _account(record: log.Record, name: str, uid: str) -> str:
    shown = log.text(record, uid)
    return f"{log.text(record, name)}({shown})" if shown else ""


def _strings(record: log.Record, path: str) -> list[str]:
    value = log.get(record, path)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def safe(value: str) -> str:
    """value as one line that a terminal shows and does not obey (attack E14): what is not printable is escaped as Python writes it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in value)


def since(value: str) -> str:
    """``--since`` as the records' own time form: an age (``12h``) or an ISO 8601 time, UTC when it does not say. Raises ValueError."""
    utc, unit, digits = datetime.timezone.utc, AGES.get(value[-1:]), value[:-1]
    if unit and digits.isascii() and digits.isdigit() and len(digits) <= 5:
        when = datetime.datetime.now(utc) - datetime.timedelta(seconds=int(digits) * unit)
    else:
        when = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
    if not 1970 <= when.year <= 9000:
        raise ValueError(f"{value!r} is no time of a record")
    return when.replace(tzinfo=when.tzinfo or utc).astimezone(utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def audit_file() -> str:
    """The file that the guard names, or where an installation puts it when there is no guard to read."""
    try:
        return parse_guard(Path(_paths.GUARD).read_bytes()).audit
    except FileNotFoundError:
        return _paths.LOGDIR + "/audit.jsonl"
