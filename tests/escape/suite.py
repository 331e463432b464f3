"""``make escape``: the suite against throw-away installations of both launchers, all modes and profiles; ``make escape-peers``: other tools.

python -m tests.escape.suite [--only ID|SURFACE]... [--profile NAME]... [--kind NAME]... [--launcher NAME]... [--report FORMAT] [--output FILE]
    [--each-mode-once] [--peers]
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

from nodewrap.escape.model import Caller, Configuration, Outcome, attacks, catalogue
from nodewrap.escape.report import FORMATS, terminal
from nodewrap.escape.suite import Suite, not_played
from nodewrap.escape.wrappers import peers
from nodewrap.guard import Range
from tests.node import BLOCK, DELEGATED, MODES, PROFILES, SUBJECT, Node
from tests.site import ROOT, Session, account_command

#: What CI tries: every launcher and mode, and every profile.
EACH_MODE_ONCE = {
    ("setuid", "static", "strict"), ("setuid", "map", "batch"), ("setuid", "log-only", "batch"), ("setuid", "static", "none"),
    ("userns", "map", "strict"), ("userns", "block", "batch"), ("userns", "log-only", "compat"),
}


#: What stands beside the peers in docs/escape.md.
BESIDE_PEERS = {("setuid", "static", "strict"), ("setuid", "static", "batch"), ("userns", "map", "strict")}
BEGIN, END = "<!-- made by make escape-peers -->", "<!-- end -->"
CELLS = {
    Outcome.BLOCKED: "stopped", Outcome.LEAKED: "**open**", Outcome.DIRTY: "leaves litter", Outcome.NOT_EXERCISED: "–", Outcome.BROKEN: "?",
}


def caller(session):
    pilot = session.accounts["pilot"]
    return Caller(pilot.name, pilot.uid, pilot.gid, tuple(pilot.groups), str(pilot.home))


def configurations(node, kinds=(), profiles=PROFILES):
    """All that this launcher gives."""
    found = []
    for kind in node.kinds:
        for profile in profiles:
            if not kinds or kind in kinds:
                who = ("--declare", f"vo={kind}", "--declare", f"subject={SUBJECT}")
                guard = str(node.site.sysconf / "guard")
                delegated = MODES[kind] == "map" and (ROOT or kind == "block")  # Place gives the pilot a range where it can
                found.append(Configuration(node.site.launcher, MODES[kind], profile, str(node.site.binary), guard, who, kind, delegated))
    return found


class Place:
    """A session with what the suite needs: open nodes of the launchers, a home of the pilot's that profiles do not show, a delegated range."""

    def __init__(self, launchers, session=None):
        self.own = session is None
        self.session = session or Session()
        self.home = (Path("/home") if ROOT else Path.home()) / f"nwt{self.session.tag}-attacks"
        self.delegated = ()
        try:
            self.caller = caller(self.session)
            self.home.mkdir()
            self.home.chmod(0o755)
            if ROOT:
                span = f"{DELEGATED}-{DELEGATED + BLOCK - 1}"
                account_command("usermod", "--add-subuids", span, "--add-subgids", span, self.caller.name)
                self.delegated = (Range(DELEGATED, DELEGATED + BLOCK - 1),)
            self.nodes = [Node(self.session.site(launcher)) for launcher in launchers]
        except BaseException:
            self.close()
            raise

    def suite(self, tell):
        account = self.session.accounts.get("user2")
        return Suite(self.caller, self.home, (account.uid, account.gid) if ROOT else None, self.delegated, tell)

    def close(self):
        for node in getattr(self, "nodes", ()):
            node.close()
            node.site.reset()
        shutil.rmtree(self.home, ignore_errors=True)
        if self.delegated:
            span = f"{DELEGATED}-{DELEGATED + BLOCK - 1}"
            account_command("usermod", "--del-subuids", span, "--del-subgids", span, self.caller.name)
        if self.own:
            self.session.close()


def main():
    parser = argparse.ArgumentParser(prog="make escape", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--launcher", action="append", choices=("setuid", "userns"))
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--profile", action="append", choices=PROFILES)
    parser.add_argument("--report", choices=sorted(FORMATS))
    parser.add_argument("--output")
    parser.add_argument("--image", default="", help="for the peer apptainer: a directory or SIF file")
    parser.add_argument("--each-mode-once", action="store_true", help="every launcher and mode in one profile each, as CI does it")
    parser.add_argument("--session", help="the installations of that test session (pickled), instead of new ones")
    parser.add_argument("--table", metavar="FILE", help="with --peers: write the table into that page")
    parser.add_argument("--peers", action="store_true", help="attacks on payloads alone, on other tools too")
    parser.add_argument("-v", action="store_true", help="tell every result")
    arguments = parser.parse_args()
    chosen, results, began = attacks(tuple(arguments.only)), [], time.monotonic()

    def tell(one):
        terminal.progress(one, results)
        if arguments.v and not one.is_failure:
            print(f"{one.configuration}: {one.attack}: {one.outcome.value}{f' (accepted: {one.accepted})' if one.accepted else ''}: {one.seen} "
                  f"[{one.seconds:.2f} s] {one.litter or ''} control: {one.control}", file=sys.stderr)

    session = pickle.loads(Path(arguments.session).read_bytes()) if arguments.session else None
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ended either way, it takes back what it made
    place = Place(arguments.launcher or (("setuid", "userns") if ROOT else ("userns",)), session)
    try:
        with place.suite(tell) as suite:
            for node in place.nodes:
                every = configurations(node, arguments.kind, arguments.profile or PROFILES)
                only = BESIDE_PEERS if arguments.peers else EACH_MODE_ONCE if arguments.each_mode_once else ()
                at_all = [at for at in every if not only or (at.launcher, at.kind, at.profile) in only]
                suite.run([one for one in chosen if one.peers or not arguments.peers], at_all)
            if arguments.peers:
                suite.against(chosen, peers(suite.other, arguments.image))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        place.close()
    every = [*results, *(one for one in not_played() if not arguments.only or one.attack in arguments.only or one.attack[0] in arguments.only)]
    print(terminal.table(every) + f"{time.monotonic() - began:.0f} s")
    if arguments.report:
        text = FORMATS[arguments.report](every)
        Path(arguments.output).write_text(text) if arguments.output else print(text)
    if arguments.table:
        write_table(Path(arguments.table), results)
    return int(any(one.is_failure for one in results if one.configuration.count("/") == 2))


def write_table(path, results):
    """The page with the table of these results between its marks."""
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    names = list(dict.fromkeys(one.configuration for one in results))
    cells = {(one.attack, one.configuration): one.outcome for one in results}
    lines = [f"| | tries | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for key in (key for key in catalogue() if any((key, name) in cells for name in names)):
        row = [CELLS.get(cells.get((key, name)), "") for name in names]
        if any(cell not in ("", CELLS[Outcome.NOT_EXERCISED]) for cell in row):
            lines.append(f"| {key} | {catalogue()[key].tries.replace('|', chr(92) + '|')} | {' | '.join(row)} |")
    counts = [sum(cells.get((key, name)) is Outcome.LEAKED for key in catalogue()) for name in names]
    lines.append(f"| | **reached their aim** | {' | '.join(f'**{count}**' for count in counts)} |")
    path.write_text(f"{head}{BEGIN}\n{chr(10).join(lines)}\n{END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
