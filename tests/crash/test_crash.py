"""The crash matrix (docs/reliability.md): what a run does, in which order; and samples of the points at which it is killed or fails."""

from __future__ import annotations

import errno
import re
import subprocess
import sys

import pytest

from tests.crash.cases import CASES, Case
from tests.crash.points import Listing, Point, syscall_names
from tests.files import CHECKOUT

SEED = 20261121


@pytest.fixture(params=[case for case in CASES if case.count("/") == 2 and "subuid" not in case])
def listing(request, session, tools):
    return Listing(Case(session, tools, request.param).run("-l").lines)


def order(calls, name, about):
    """Places, among all calls of the run, of those with that name that are about something with that ending."""
    return [at for at, call, what in calls if call == name and what.endswith(about)]


def test_lease_is_durable_before_there_is_anything_to_undo_and_the_start_record_before_the_exec(listing):
    calls = sorted(call for process in listing.processes.values() for call in process.calls)
    roles = {process.role: process for process in listing.processes.values()}
    synced = min(order(calls, "fsync", ".lease"))
    undo = [at for at, call, what in calls if call == "fchownat" or (call == "mkdir" and "nodewrap-" in what)]
    undo += [at for at, call, _ in listing.processes[roles["init"].parent].calls if call == "clone3"]  # others start writers of records by it
    assert synced < min(undo)
    executed = max(at for at, call, _ in roles["payload"].calls if call == "execve")
    written = max(at for at in order(calls, "write", "audit.jsonl") if at < executed)
    assert [at for at in order(calls, "fdatasync", "audit.jsonl") if written < at < executed]


@pytest.fixture
def case(session, tools):
    made = Case(session, tools, "setuid/map/batch")
    yield made
    made.reset()


def test_child_that_cannot_be_watched_keeps_nobody_waiting(case):
    """Out of descriptors at the worst moment: no pidfd. The namespaces for an idmapped mount are held by a child that never ends by itself."""
    points = [Point("f", process.place, n, errno.EMFILE) for process, n, name in Listing(case.run("-l").lines).calls() if name == "pidfd_open"]
    assert len(points) > 2
    for point in points:
        case.fresh()
        outcome = case.run("-t", "10", *point.option())
        assert (outcome.hits != [], outcome.hangs) == (True, []), point


@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
def test_start_that_may_be_on_record_has_its_end_on_record(case, call):
    """Its line is in the log when the counter or the disk fails: nothing is executed, and no reader waits for the end of what has begun."""
    for _ in range(10):  # a log that has grown may have to be given room: one call more
        case.fresh()
        listing = Listing(case.run("-l").lines)
        keeper = next(process for process in listing.processes.values() if process.role == "keeper")
        n = max(n for n, (order, name, _) in enumerate(keeper.calls, 1) if name == call and order < listing.phase("lease")[1])
        before = case.site.audit_size()
        case.fresh()
        outcome = case.run(*Point("f", keeper.place, n, errno.EIO).option())
        if [syscall_names()[number] for _, _, number in outcome.hits] == [call]:
            break
    assert (outcome.status, outcome.out) == (202, b"")
    assert b"NW-AUDIT-UNSURE" in outcome.err
    actions = [record["event"]["action"] for record in case.site.records(before)]
    assert actions == ["authorize", "start", "exit", "cleanup", "error"]


def matrix(*options):
    """(what the matrix printed, number of points, of violations)"""
    argv = [sys.executable, "-m", "tests.crash.matrix", *map(str, options)]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    total, bad = re.search(r"^(\d+) points .*: (\d+) violations", done.stdout, re.M).groups() if done.stdout else (0, 0)
    return f"{done.stdout[-20000:]}{done.stderr[-4000:]}", int(total), int(bad)


def test_whatever_is_killed_from_the_lease_to_the_exec_and_from_the_end_to_the_release_a_sweep_leaves_nothing(tools):
    """Each process before each second call, and all at once; one kind per launcher. The others: make crash."""
    said, total, bad = matrix("--phases", "--part", "1/2")
    assert total > 1000, said
    assert bad == 0, said


def test_whatever_is_killed_or_fails_anywhere_a_sweep_leaves_nothing(tools):
    """A sample of all cases: runs, sweeps, next runs; kills and failing calls."""
    said, total, bad = matrix("--sample", 400, "--seed", SEED)
    assert total == 400, said
    assert bad == 0, said
