"""``nodewrap netd``: private networks for payloads."""

from __future__ import annotations

import argparse
import sys

from nodewrap import _paths, netd


def configure(parser: argparse.ArgumentParser) -> None:
    """Add netd's options to its parser."""
    parser.add_argument("--guard", default=_paths.GUARD, metavar="PATH", help=f"the guard that names the socket and the addresses ({_paths.GUARD})")


def main(arguments: argparse.Namespace) -> int:
    """Stays in the foreground. Returns 0 after SIGTERM, SIGINT or SIGHUP, 202 when it could not serve."""
    try:
        netd.run(arguments.guard)
    except netd.NetdError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 202
    return 0
