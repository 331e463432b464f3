"""``nodewrap sweep``: what dead runs left is finished (by nodewrap-sweep); ``--deep`` finds what belongs to leasable ids without any lease."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from nodewrap import lease, live, sweeper
from nodewrap.commands.audit import safe
from nodewrap.commands.kill import UnclearError, named
from nodewrap.deep import deep

LINES = {
    "live": "is alive", "swept": "is finished", "left": "cannot be finished yet", "broken": "has a lease that cannot be relied on",
    "forgotten": "is forgotten: its lease is gone, whatever it left is yours to look after",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add sweep's options to its parser."""
    parser.add_argument("--run", default="", metavar="RUN", help="this run alone")
    parser.add_argument("--forget", default="", metavar="RUN", help="remove this dead run's lease, whatever it says: look at what it names first")
    parser.add_argument("--deep", action="store_true", help="look for what belongs to leasable ids without any lease (root)")
    parser.add_argument("--remove", action="store_true", help="with --deep: remove it")
    parser.add_argument("--path", action="append", default=[], metavar="DIR", help="with --deep: look below this directory too (may be repeated)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quiet", action="store_true", help="print only what needs somebody")


def main(arguments: argparse.Namespace) -> int:
    """Returns 0 when nothing is left, 1 when something is, 201 for a wrong command line, 202 when it could not be looked."""
    wrong = _usage(arguments)
    if wrong:
        print(f"nodewrap: NW-USAGE: {wrong}; next: nodewrap sweep --help", file=sys.stderr)
        return 201
    try:
        left = _sweep(arguments)
        return int(_deep(arguments) | left) if arguments.deep else int(left)
    except live.SiteError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 202
    except OSError as error:
        print(f"nodewrap: NW-SWEEP: {error}; what was not looked at yet may be left", file=sys.stderr)
        return 202
    except UnclearError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 201


def _usage(arguments: argparse.Namespace) -> str:
    if arguments.run and arguments.forget:
        return "--run and --forget exclude each other"
    if (arguments.remove or arguments.path) and not arguments.deep:
        return "--remove and --path go with --deep"
    if not all(path.startswith("/") and os.path.isdir(path) for path in arguments.path):
        return "--path wants an absolute path of a directory"
    if arguments.deep and (arguments.run or arguments.forget):
        return "--deep looks at what has no lease: it takes no run"
    return ""


# ---- leases ----


def _sweep(arguments: argparse.Namespace) -> bool:
    """Whether something is left."""
    told = sweeper.sweep(_whole(arguments.run), _whole(arguments.forget))
    for said in told:
        needs = said["state"] in ("left", "broken")
        if arguments.json:
            print(json.dumps({key: value for key, value in said.items() if value}))
        elif needs:
            print(f"{safe(said['run'])} {LINES[said['state']]}: {safe(said['code'])}: {safe(said['text'])}")
        elif not arguments.quiet and (said["state"] != "live" or arguments.run):
            print(f"{safe(said['run'])} {LINES[said['state']]}")
    if arguments.run and not told and not (arguments.json or arguments.quiet):
        print(f"{safe(arguments.run)} has no lease: nothing of it is left")
    return any(said["state"] in ("left", "broken") for said in told)


def _whole(word: str) -> str:
    """The id of the run that is called so. Raises UnclearError."""
    return word if not word or lease.UUID.fullmatch(word) else named(live.runs(live.site()), word).id


# ---- ids ----


def _deep(arguments: argparse.Namespace) -> bool:
    report = deep(live.site(), arguments.path, arguments.remove)
    for note in report.notes:
        print(f"nodewrap: {safe(note)}", file=sys.stderr)
    for one in report.findings:
        row = one.as_dict(report.ids.name(one.uid))
        if arguments.json:
            print(json.dumps(row))
        elif not (arguments.quiet and one.removed):
            print(_line(row, arguments.remove))
    return any(not one.removed for one in report.findings)


def _line(row: dict[str, Any], remove: bool) -> str:
    age = "" if row["age"] is None else f", {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - row['age']))}"
    entries = f", {row['entries']} entries" if row["entries"] > 1 else ""
    what = f"{row['kind']:8}{row['owner']:12} {row['what']}  ({row['detail']}{entries}{age})"
    return safe(what + (f": left: {row['left']}" if row["left"] else ": removed" if remove else ""))
