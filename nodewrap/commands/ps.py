"""``nodewrap ps``: the runs on this node now. Root sees all; another caller its own."""

from __future__ import annotations

import argparse
import json
import pwd
import sys
from typing import Any

from nodewrap import live
from nodewrap.commands.audit import safe

UNITS = "BKMGTP"
COLUMNS = ("RUN", "STATE", "SUBJECT", "VO", "PILOT", "MODE", "ACCOUNT", "PROCS", "CPU", "MEM", "AGE")
WEAK = (None, "none", "declared")
RIGHT = ("PROCS", "CPU", "MEM", "AGE")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add ps's options to its parser."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every number as it is")


def main(arguments: argparse.Namespace) -> int:
    """Returns 0, 1 when a lease is there that cannot be relied on, 202 when the site cannot be looked at."""
    try:
        found = [described(run) for run in live.runs(live.site())]
    except live.SiteError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 202
    if arguments.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in found)
    elif found:
        _print([list(COLUMNS), *(shown(row) for row in found)])
    for row in found:
        if row["note"] and not arguments.json:
            print(f"nodewrap: {row['run']}: {safe(row['note'])}", file=sys.stderr)
    return int(any(row["state"] == "broken" for row in found))


def described(run: live.Run) -> dict[str, Any]:
    """What `--json` prints of a run. Ids are numbers, unknown values null; memory in bytes, cpu and age in seconds.

    memory_kind: "rss", see live.memory. processes: of the payload, without nodewrap's own.
    """
    told = run.lease
    row: dict[str, Any] = {"run": run.id, "state": run.state, "note": run.note, "subject": None, "assurance": None, "vo": None, "pilot": None,
                           "mode": None, "profile": None, "account": None, "uid": None}
    if told:
        row.update(
            subject=told.fact("subject.dn", "declared.subject") or None, assurance=told.fact("subject.assurance") or None,
            vo=told.fact("subject.vo", "declared.vo") or None, pilot=told.pilot.uid, mode=told.mode.name, profile=told.mode.profile,
            account=told.account, uid=told.id.uid,
        )
    elif run.front:
        row["pilot"] = run.front.uids().real
    row.update(processes=len(run.payload), cpu=round(live.cpu(run), 2), memory=live.memory(run), memory_kind="rss", age=round(live.age(run), 1))
    return row


def shown(row: dict[str, Any]) -> list[str]:
    """A row as words of the table: what is not known is "-"; a subject that nobody vouched for has a question mark."""
    subject = "-" if row["subject"] is None else row["subject"] + "?" * (row["assurance"] in WEAK)
    mode = f"{row['mode']}/{row['profile']}" if row["mode"] else "-"
    account = row["account"] or _name(row["uid"])
    words = [row["run"], row["state"], subject, row["vo"] or "-", _name(row["pilot"]), mode, account, str(row["processes"])]
    return [safe(word) for word in [*words, f"{row['cpu']:.1f}s", _bytes(row["memory"]), _age(row["age"])]]


def _name(uid: int | None) -> str:
    try:
        return "-" if uid is None else pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _bytes(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.0f}{UNITS[unit]}" if number >= 10 or unit == 0 else f"{number:.1f}{UNITS[unit]}"


def _age(seconds: float) -> str:
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    return f"{days}d{hours % 24:02}h" if days else f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"


def _print(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        words = [word.rjust(width) if name in RIGHT else word.ljust(width) for name, word, width in zip(COLUMNS, row, widths)]
        print("  ".join(words).rstrip())
