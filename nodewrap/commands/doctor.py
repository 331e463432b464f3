"""``nodewrap doctor``: what this node can do, and what to do about what it cannot."""

from __future__ import annotations

import argparse
import os
import sys

from nodewrap.doctor import report
from nodewrap.doctor.checks import drifts
from nodewrap.doctor.matrix import cells, examine, verdict
from nodewrap.doctor.node import look

#: What attempts as the caller need of root's environment. Processes of the caller's may read the memory of the attempt, and the rest may be secret.
KEPT = frozenset(("PATH", "TERM", "LANG", "LC_ALL"))
BARE = "nodewrap-bare"  # an option that Python passes on and does nothing else with


def configure(parser: argparse.ArgumentParser) -> None:
    """Add doctor's options to its parser."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--workdir", default=os.getcwd(), metavar="DIR", help="a directory where payloads work, for what depends on its file system")


def bare() -> None:
    """As root: start again without the rest of the environment."""
    if os.geteuid() == 0 and BARE not in sys._xoptions:
        kept = {key: value for key, value in os.environ.items() if key in KEPT}
        os.execve(sys.executable, [sys.executable, "-I", "-X", BARE, "-m", "nodewrap", *sys.argv[1:]], kept)  # noqa: S606  ourselves


def main(arguments: argparse.Namespace) -> int:
    """Returns 0 when the configured launcher can run the applied policy's rules, else 1."""
    node = look(os.path.abspath(arguments.workdir))
    findings = examine(node)
    table = cells(node, findings)
    problems = verdict(node, findings, table)
    make = report.as_json if arguments.json else report.as_text
    sys.stdout.write(make(node, findings, drifts(), table, problems) + "\n")
    return 1 if problems else 0
