"""``nodewrap kill``: end runs, and see them gone: SIGTERM to the front process, which hands it on; after a grace SIGKILL; then the sweep.

Nothing is signalled but by pidfd, and only after the start time in the lease was compared: a lease may name a pid that is somebody else's by now.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from dataclasses import dataclass, field

import psutil

from nodewrap import lease, live, sweeper
from nodewrap.commands.audit import safe

GRACE_S = 10.0
#: For the keeper: 10 s for processes (csrc/cleanup.c), and trees take their time.
PATIENCE_S = 60.0
NAMED = f"a run's id, or {live.SHORTEST} digits or more with which it, or its last group, begins"
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add kill's options to its parser."""
    parser.add_argument("run", nargs="*", metavar="RUN", help=NAMED)
    parser.add_argument("--subject", default="", metavar="DN", help="all of this subject, proved or declared")
    parser.add_argument("--vo", default="", help="all of this VO")
    parser.add_argument("--all", action="store_true", help="all that ps shows")
    parser.add_argument("--grace", type=grace, default=GRACE_S, metavar="TIME", help="between SIGTERM and SIGKILL: seconds, or 500ms, 10s, 2m (10s)")


def grace(word: str) -> float:
    """Seconds of ``--grace``. Raises ValueError."""
    unit = next((unit for unit in UNITS if word.endswith(unit)), "")
    seconds = float(word[: len(word) - len(unit)]) * UNITS.get(unit, 1.0)
    if not 0 <= seconds <= 86400:
        raise ValueError
    return seconds


def main(arguments: argparse.Namespace) -> int:
    """Returns 0 when all that were meant are gone, 1 when one is not, 201 when none or several are meant, 202 when the site cannot be looked at."""
    try:
        at = live.site()
        chosen = choose(live.runs(at), arguments)
    except live.SiteError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 202
    except UnclearError as error:
        print(f"nodewrap: {error}", file=sys.stderr)
        return 201
    targets = [Target(run) for run in chosen]
    end(targets, arguments.grace)
    answers = [answer(target, at) for target in targets]
    for target, (_, text) in zip(targets, answers):
        print(f"{target.run.id} {safe(text)}")
    return 0 if all(gone for gone, _ in answers) else 1


# ---- choosing ----


class UnclearError(Exception):
    """The command line names no run, or not one."""


def choose(found: list[live.Run], arguments: argparse.Namespace) -> list[live.Run]:
    """The runs that are meant, each once, in their order. Raises UnclearError."""
    if bool(arguments.run) + bool(arguments.subject) + bool(arguments.vo) + arguments.all != 1:
        raise UnclearError("NW-USAGE: wants runs, or one of --subject, --vo, --all; next: nodewrap ps")
    if arguments.all:
        return found
    if arguments.run:
        called = [named(found, word) for word in arguments.run]
        return [run for run in found if run in called]
    if any(run.lease is None and run.state != "broken" for run in found):
        raise UnclearError("NW-RUN: who the subjects are is not for this account to know; name the runs, or --all, or call it as root")
    wanted = [run for run in found if run.lease and _whose(run.lease, arguments.subject, arguments.vo)]
    if not wanted:
        raise UnclearError(f"NW-RUN: no run of {safe(arguments.subject or arguments.vo)} is here; next: nodewrap ps")
    return wanted


def _whose(told: lease.Lease, subject: str, vo: str) -> bool:
    keys = ("subject.dn", "declared.subject") if subject else ("subject.vo", "declared.vo")
    return any(key in keys and value == (subject or vo) for key, value in told.facts)


def named(found: list[live.Run], word: str) -> live.Run:
    """The one run that word names. Raises UnclearError."""
    matching = [run for run in found if run.named(word)]
    if len(matching) != 1:
        why = f"{len(matching)} runs are called" if matching else "no run is called"
        raise UnclearError(f"NW-RUN: {why} {safe(word)[:60]!r} (at least {live.SHORTEST} digits of its id); next: nodewrap ps")
    return matching[0]


# ---- ending ----


@dataclass
class Target:
    """One run to be ended. front, rest: pidfds of its front process (-1: none), and of those that end after it (the keeper)."""

    run: live.Run
    front: int = -1
    rest: list[int] = field(default_factory=list)
    killed: bool = False
    refused: str = ""

    def __post_init__(self) -> None:
        told = self.run.lease
        if self.run.front:
            self.front = pidfd(told.front) if told else pidfd_of(self.run.front)
        if told:
            self.rest = [fd for fd in [pidfd(told.keeper) if told.keeper and self.run.keeper else -1] if fd >= 0]
        else:
            self.rest = [fd for fd in (pidfd_of(process) for process in self.run.members if process != self.run.front) if fd >= 0]

    def signal(self, number: int) -> None:
        if self.front < 0 or self.refused or ended([self.front], 0):
            return
        try:
            signal.pidfd_send_signal(self.front, number)
        except ProcessLookupError:
            return
        except PermissionError:
            self.refused = "its front process is not yours to signal; call it as root or as the account that started it"

    def close(self) -> None:
        for fd in [self.front, *self.rest]:
            if fd >= 0:
                os.close(fd)


def pidfd(named: lease.Process) -> int:
    """A pidfd of just that process, -1 when it is gone. Opened first: of two looks at one number the second then is at the same process."""
    if named.pid <= 0:
        return -1
    try:
        fd = os.pidfd_open(named.pid)
    except ProcessLookupError:
        return -1
    if live.ticks(named.pid) == named.ticks:
        return fd
    os.close(fd)
    return -1


def pidfd_of(process: psutil.Process) -> int:
    """The same of a process that was seen before."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return -1
    if process.is_running():
        return fd
    os.close(fd)
    return -1


def ended(fds: list[int], seconds: float) -> bool:
    """Whether all these processes have ended, after waiting for it that long at most."""
    deadline, poll, left = time.monotonic() + seconds, select.poll(), {fd for fd in fds if fd >= 0}
    for fd in left:
        poll.register(fd, select.POLLIN)  # a pidfd is readable when its process has ended (pidfd_open(2))
    while left:
        for fd, _ in poll.poll(max(0, deadline - time.monotonic()) * 1000):
            poll.unregister(fd)
            left.discard(fd)
        if left and time.monotonic() >= deadline:
            return False
    return True


def end(targets: list[Target], grace_s: float) -> None:
    """TERM to all, KILL after the grace to what is left, then time for the keepers. A stopped front takes its TERM only when it goes on."""
    fronts = [target.front for target in targets]
    for target in targets:
        target.signal(signal.SIGTERM)
        target.signal(signal.SIGCONT)
    ended(fronts, grace_s)
    for target in targets:
        target.killed = target.front >= 0 and not ended([target.front], 0)
        target.signal(signal.SIGKILL)
    ended([fd for target in targets if not target.refused for fd in [target.front, *target.rest]], PATIENCE_S)


def answer(target: Target, at: live.Site) -> tuple[bool, str]:
    """Whether the run is gone, and the line that says so."""
    how = "killed" if target.killed else "ended"
    over = ended([target.front, *target.rest], 0)
    target.close()
    if target.refused:
        return False, f"NW-KILL: {target.refused}"
    if target.run.lease is None and target.run.front:
        return over, how if over else f"NW-KILL: {BUSY}"
    now = next((run for run in live.runs(at) if run.id == target.run.id), None)
    if now is None:
        return True, how
    if now.state == "dead":
        return _swept(target, how)
    if now.state in ("broken", "starting"):
        return False, f"NW-LEASE: {now.note or 'it is just starting; call again'}"
    return False, f"NW-KILL: {BUSY}"


BUSY = "it has not ended yet; see nodewrap ps, and the processes in state D"


def _swept(target: Target, how: str) -> tuple[bool, str]:
    try:
        told = sweeper.sweep(run=target.run.id)
    except live.SiteError as error:
        return False, str(error)
    for said in told:
        if said["state"] in ("left", "broken"):
            return False, f"{said['code']}: {said['text']}"
        if said["state"] == "live":
            return False, f"NW-KILL: {BUSY}"
    return True, how if target.front >= 0 else "swept"
