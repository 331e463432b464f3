"""The command line: a table of verbs, and no module of a verb imported before it is called."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from nodewrap import __version__

#: verb: (module, one line for --help). The module has ``configure(parser)`` and ``main(arguments) -> exit status``.
VERBS = {
    "policy": ("nodewrap.commands.policy", "check, apply, roll back, show and explain the site's policy"),
    "doctor": ("nodewrap.commands.doctor", "what this node can do, and why not"),
    "ps": ("nodewrap.commands.ps", "the runs on this node now"),
    "kill": ("nodewrap.commands.kill", "end runs"),
    "sweep": ("nodewrap.commands.sweep", "finish what dead runs left"),
    "policyd": ("nodewrap.commands.policyd", "keep the policy child resident"),
    "netd": ("nodewrap.commands.netd", "keep private networks ready for payloads"),
    "escape-test": ("nodewrap.commands.escape_test", "attack this node's nodewrap with hostile payloads, and tell what stopped them"),
    "audit": ("nodewrap.commands.audit", "read the audit log"),
}
#: Drop-ins with a command line of their own: ``main(argv without the name) -> exit status``.
PROGRAMS = {"mkgltempdir": "nodewrap.commands.mkgltempdir"}


def main(argv: list[str]) -> int:
    """Runs one verb; argv without the program's name. Returns the exit status: 201 for a mistake in argv, else the verb's own."""
    if argv and argv[0] in PROGRAMS:
        return int(import_module(PROGRAMS[argv[0]]).main(argv[1:]))
    arguments = _parser(argv[0] if argv else "").parse_args(argv)
    try:
        status = int(import_module(VERBS[arguments.verb][0]).main(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is wrong, and nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line with a code, and status 201 (architecture, section 7)."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse declares NoReturn, and exit() is one
        self.exit(201, f"NW-USAGE: {message}; next: {self.prog} --help\n")


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The tree; only the chosen verb's branch is grown."""
    parser = _Parser(prog="nodewrap", description="Runs payloads isolated, under their own identity. 'nodewrap run --help' is the launcher's.")
    parser.add_argument("--version", action="version", version=f"nodewrap {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (module, text) in VERBS.items():
        branch = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        if verb == chosen:
            import_module(module).configure(branch)
    return parser
