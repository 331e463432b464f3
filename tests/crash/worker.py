"""Tries points, in a session of its own: tasks come as JSON lines on stdin, answers go as JSON lines to stdout.

{"case": …, "list": true}                          -> {"case": …, "lines": …}             the words of nth -l
{"case": …, "points": ["k:0.3:7", …]}              -> one {"case", "point", "hits", "problems", "seconds", "status"} for each
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zlib

from tests.crash.cases import Case, Tools
from tests.crash.judge import PAYLOADS_CODE, Judge
from tests.crash.points import ERRNOS, parse, syscall_names, text_of
from tests.site import Session

CLONE_NEWPID, CLONE_NEWIPC, CLONE_NEWNS, PR_SET_PDEATHSIG = 0x20000000, 0x08000000, 0x00020000, 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Worker:
    """case, judge: those of the last task."""

    def __init__(self, session):
        self.session = session
        self.tools = Tools(session.top)
        self.case = None

    def turn_to(self, name):
        if self.case is None or self.case.name != name:
            self.case = Case(self.session, self.tools, name)
            self.judge = Judge(self.case)

    def list(self):
        self.command()  # the first run of a site makes its files
        outcome = self.command("-l")
        assert outcome.status in (0, PAYLOADS_CODE), outcome
        self.judge.records()
        return outcome.lines

    def command(self, *options, **how):
        """The case's command, from the beginning: there is a dead run when it is a sweep."""
        case = self.case
        case.fresh()
        self.before = case.die() if case.victim != "run" else None
        return case.run(*options, victim=case.victim, **how)

    def attempt(self, points):
        """One run with these points, swept and judged. {hits, problems, seconds, status}"""
        case, judge, began = self.case, self.judge, time.monotonic()
        stay = any(point.what in "Kw" for point in points)
        outcome = self.command(*[word for point in points for word in point.option()], stay=stay)
        killed = {"all"} if any(point.what == "A" for point in points) else {point.place for point in points if point.what in "kaKw"}
        if stay and len(outcome.hits) < len(points):
            case.reset()  # nobody was killed, and the payload went on: this time there were fewer calls
            judge.records()
            return {"hits": [], "problems": [], "seconds": time.monotonic() - began, "status": outcome.status}
        judge.over(outcome, killed)
        if stay:
            judge.payload_died()
        records = judge.records()
        started = any(record["event"]["action"] == "start" for record in records)
        kept = case.launcher == "setuid" and killed == {"0"} and started  # by the keeper, when the front alone is gone
        if case.victim == "run" and (outcome.status not in (202, -9) or kept):
            judge.clean(records, "before the sweep")
        records += self.finish(points)
        judge.judge_records(records, outcome, bool((self.before or outcome).out))
        judge.clean(records, "after the sweep")
        problems = judge.verdict()
        if problems:
            problems.append(f"on record: {[shown(record) for record in records]}")
        if problems:
            case.reset()
        if not all(map(could_be, points, outcome.hits)):
            return {"hits": [], "problems": [], "seconds": time.monotonic() - began, "status": outcome.status}
        names = [f"{place} {n} {syscall_names().get(number, number)}" for place, n, number in outcome.hits]
        return {"hits": names, "problems": problems, "seconds": time.monotonic() - began, "status": outcome.status}

    def finish(self, points):
        """A sweep, or for one point in eight another run, which sweeps before it begins; the records since. Both say nothing of trouble."""
        by = self.case.next_run if zlib.crc32(text_of(points).encode()) % 8 == 0 else self.case.sweep
        code, said = by()
        if code or b"nodewrap:" in said:
            self.judge.problems.append(f"{by.__name__}: exit {code}, {said[-300:]!r}")
        return self.judge.records()


def could_be(point, hit):
    """Calls are counted, and runs differ by a call now and then: an error that the call that was met never returns proves nothing."""
    return point.what != "f" or point.arg in ERRNOS.get(syscall_names().get(hit[2], ""), ())


def shown(record):
    """A record in a few words, for a report."""
    words = [record["event"]["action"], record["event"].get("code"), "swept" if record["nodewrap"].get("swept") else None]
    if record["event"]["action"] == "exit":
        words += [record["process"].get("ended_by"), str(record["process"].get("exit_code"))]
    return " ".join(word for word in words if word)


def work(session):
    """Task after task until stdin ends."""
    worker = Worker(session)
    for line in sys.stdin:
        task = json.loads(line)
        worker.turn_to(task["case"])
        if task.get("list"):
            print(json.dumps({"case": task["case"], "lines": worker.list()}), flush=True)
        for text in task.get("points", ()):
            print(json.dumps({"case": task["case"], "point": text, **worker.attempt(parse(text))}), flush=True)
        print(json.dumps({"done": True}), flush=True)
    if worker.case:
        worker.case.forget_ipc()


def ending(function, *words):
    """Call it in a process that ends with it, and with us. Its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        function(*words)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def inside(session):
    """The first process of a pid namespace: others' processes are neither in the way of a look through /proc, nor in that of our kills."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    worker = ending(work, session)
    while os.wait()[0] != worker:  # what dead runs left is ours to reap
        continue


def outside(session):
    if LIBC.unshare(CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    os.waitpid(ending(inside, session), 0)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    session = Session()
    worker = ending(outside, session)
    try:
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    finally:
        os.kill(worker, signal.SIGKILL)  # when we are to end at once; it is our child, ended or not
        os.waitpid(worker, 0)
        session.close()


if __name__ == "__main__":
    main()
