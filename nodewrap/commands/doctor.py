"""``nodewrap doctor``: what this node can do, and what to do about what it cannot."""

from __future__ import annotations

import argparse
import os
import sys

from nodewrap.doctor import report
from nodewrap.doctor.checks import drifts
from nodewrap.doctor.matrix import cells, examine, verdict
from nodewrap.doctor.node import look


def configure(parser: argparse.ArgumentParser) -> None:
    """Add doctor's options to its parser."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--workdir", default=os.getcwd(), metavar="DIR", help="a directory where payloads work, for what depends on its file system")


def main(arguments: argparse.Namespace) -> int:
    """Returns 0 when the configured launcher can run the applied policy's rules, else 1."""
    node = look(os.path.abspath(arguments.workdir))
    findings = examine(node)
    table = cells(node, findings)
    problems = verdict(node, findings, table)
    make = report.as_json if arguments.json else report.as_text
    sys.stdout.write(make(node, findings, drifts(), table, problems) + "\n")
    return 1 if problems else 0
