"""The soak, short (docs/reliability.md); that its judge sees what it is there to see; and what it has found."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal

import pytest

from tests.crash.cases import Case
from tests.crash.evidence import Attempt, Log, Seen, Verdicts, when
from tests.crash.judge import PAYLOADS_CODE, Judge
from tests.crash.points import Listing, Point
from tests.crash.soak import soak
from tests.need import need


@pytest.fixture(scope="module")
def soaked():
    need("root", "cc")
    made = soak(seconds=25, runs=8, seed="ci", pace=0.3)
    yield made
    made.close()


def test_nothing_is_left_or_lost_whatever_is_killed_among_many_runs(soaked):
    print(soaked.summary())
    assert soaked.violations == []
    assert soaked.counts["starts"] > 30
    assert sum(soaked.kills.values()) > 10
    assert soaked.counts["disks filled"] > 0
    assert len(soaked.seen.executed) > 10


# ---- the judge, on the log of that soak with something wrong ----


def verdict(soaked, lines):
    """Problems that the judge has with these lines as the log of the setuid site."""
    place = soaked.places["setuid"]
    attempts = {nonce: attempt for nonce, attempt in soaked.seen.attempts.items() if " setuid/" in attempt.plan}
    return Verdicts(Log(b"".join(lines)), Seen(attempts, soaked.seen.executed, {}, []), place.judge).all()


@pytest.fixture
def lines(soaked):
    """The log, up to the last record of the soak itself."""
    return soaked.places["setuid"].site.audit.read_bytes().splitlines(keepends=True)


def undisturbed(soaked, lines, action):
    """Index of the record of that action of a run that nobody killed."""
    calm = {attempt.nonce for attempt in soaked.seen.attempts.values() if attempt.status == PAYLOADS_CODE and not attempt.kills}
    runs = [record["nodewrap"]["run"]["id"] for record in map(json.loads, lines) if calm & set(record.get("process", {}).get("args", ()))]
    records = list(map(json.loads, lines))
    return next(i for i, record in enumerate(records) if record["event"]["action"] == action and record["nodewrap"]["run"]["id"] in runs)


def renumbered(lines):
    """So that only what is missing tells."""
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records, 1):
        record["event"]["sequence"] = number
    return [json.dumps(record).encode() + b"\n" for record in records]


@pytest.mark.parametrize("action", ["start", "exit", "cleanup"])
def test_judge_sees_a_record_that_is_missing(soaked, lines, action):
    whole = renumbered([line for line in lines if line.startswith(b"{")])
    at = undisturbed(soaked, whole, action)
    run = json.loads(whole[at])["nodewrap"]["run"]["id"]
    before = set(verdict(soaked, whole))
    found = set(verdict(soaked, renumbered(whole[:at] + whole[at + 1 :]))) - before
    assert any(run in problem for problem in found) or any("on record is" in problem for problem in found)
    assert any("number" in problem for problem in verdict(soaked, whole[:at] + whole[at + 1 :]))


def test_judge_sees_a_torn_line_and_takes_it_only_before_a_gap(soaked, lines):
    whole = renumbered([line for line in lines if line.startswith(b"{")])
    at = undisturbed(soaked, whole, "start")
    torn = [*whole[:at], b'{"event":{"sequ!\n', *whole[at:]]
    assert any("no gap behind it" in problem for problem in Log(b"".join(torn)).problems)
    gap = copy.deepcopy(json.loads(whole[at]))
    gap["event"]["action"] = "gap"
    sealed = Log(b"".join([*torn[: at + 1], json.dumps(gap).encode() + b"\n"]))
    assert (sealed.problems, sealed.gaps) == ([], 1)
    assert Log(b"".join([*whole[:at], json.dumps(gap).encode() + b"\n"])).problems
    assert Log(b"".join(whole)[:-5]).problems


def test_judge_sees_a_record_and_a_number_twice(soaked, lines):
    whole = renumbered([line for line in lines if line.startswith(b"{")])
    at = undisturbed(soaked, whole, "exit")
    assert any("exit twice" in problem for problem in verdict(soaked, renumbered([*whole[: at + 1], *whole[at:]])))
    assert any("number" in problem for problem in verdict(soaked, [*whole[: at + 1], *whole[at:]]))


def test_judge_sees_a_second_sweep_that_nothing_explains(soaked, lines):
    whole = renumbered([line for line in lines if line.startswith(b"{")])
    at = undisturbed(soaked, whole, "cleanup")
    record = json.loads(whole[at])
    record["nodewrap"]["swept"] = True
    twice = [json.dumps(record).encode() + b"\n"] * 2
    record["@timestamp"] = "2100-01-01T00:00:00.000000Z"
    problems = verdict(soaked, renumbered([*whole, *twice, json.dumps(record).encode() + b"\n"]))
    assert any("swept after its own cleanup" in problem for problem in problems)
    assert any("nobody had cut the sweep short" in problem for problem in problems)


@pytest.mark.parametrize(("missing", "left", "explained"), [((), 0, False), (("exit",), 0, True), ((), 1, True)], ids=["whole", "no exit", "left"])
def test_judge_lets_a_kill_before_a_sweeps_records_explain_only_one_that_was_not_whole(soaked, lines, missing, left, explained):
    """Who was killed then did a part of the sweep: wrote a record, or cleaned."""
    start = next(record for record in map(json.loads, lines) if record["event"]["action"] == "start")
    run = start["nodewrap"]["run"]["id"]

    def at(action, second, **cleanup):
        nodewrap = {**start["nodewrap"], "swept": True, "cleanup": cleanup}
        return {**start, "event": {"action": action}, "@timestamp": f"2100-01-01T00:00:{second:02}.000000Z", "nodewrap": nodewrap}

    first = [at(action, 10, left=left) for action in ("exit", "handover", "cleanup") if action not in missing]
    records = [start, *first, *(at(action, 20, left=0) for action in ("exit", "handover", "cleanup"))]
    cut = {run: [when(first[0]) - 5]}
    verdicts = Verdicts(Log(b""), Seen({}, set(), cut, []), soaked.places["setuid"].judge)
    assert (list(verdicts._pairs(run, records)) == []) == explained
    verdicts.seen.cut[run] = [when(first[0]) + 5]
    assert list(verdicts._pairs(run, records)) == []


def test_judge_sees_a_refusal_and_an_execution_without_reason_or_record(soaked, lines):
    place = soaked.places["setuid"]
    refused = Attempt("0" * 16, "made up", 0, 1, 202, b"nodewrap: NW-INIT: no\n")
    problems = Verdicts(Log(b"".join(lines)), Seen({refused.nonce: refused}, {refused.nonce}, {}, []), place.judge).all()
    assert any("executed, and on record is only []" in problem for problem in problems)
    assert any("though nobody was killed" in problem for problem in problems)


# ---- what it has found ----


def test_child_that_holds_a_namespace_dies_with_who_needs_it(session, tools):
    """It has a copy of the id's lock and of the front's socket: the id was never free again, and the front waited for ever."""
    case = Case(session, tools, "setuid/static/batch")
    judge = Judge(case)
    processes = Listing(case.run("-l").lines).processes.values()
    # Who needs it writes the map first of all; what the child itself does until it is ended is a race.
    points = [Point("k", process.place, n) for process in processes for n, (_, _, about) in enumerate(process.calls, 1) if about.endswith("uid_map")]
    assert points
    for point in points:
        case.fresh()
        outcome = case.run("-t", "10", *point.option())
        case.sweep()
        top = f"{session.top}/"  # other crash tests may be at work beside us, with payloads of the same name
        left = [line for line in judge.left() if top in line or not line.startswith("process ")]
        for pid in [pid for pid, what in case.processes().items() if what.startswith(top)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        case.node.forget()
        assert (outcome.hits != [], outcome.hangs, left) == (True, [], [])
