"""``nodewrap policyd``: the resident policy child."""

from __future__ import annotations

import argparse
import sys

from nodewrap import _paths, policyd


def configure(parser: argparse.ArgumentParser) -> None:
    """Add policyd's options to its parser."""
    parser.add_argument("--guard", default=_paths.GUARD, metavar="PATH", help=f"the guard that names the socket and the policy ({_paths.GUARD})")
    wait = f"how many wait for a request (1-32, {policyd.WORKERS})"
    parser.add_argument("--workers", type=int, choices=range(1, 33), default=policyd.WORKERS, metavar="N", help=wait)


def main(arguments: argparse.Namespace) -> int:
    """Stays in the foreground. Returns 0 after SIGTERM, SIGINT or SIGHUP, 202 when it could not serve."""
    try:
        policyd.run(arguments.guard, arguments.workers)
    except policyd.PolicydError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 202
    return 0
