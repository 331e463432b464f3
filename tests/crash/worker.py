"""Tries points, in a session of its own: tasks come as JSON lines on stdin, answers go as JSON lines to stdout.

{"case": …, "list": true}                          -> {"case": …, "lines": …}             the words of nth -l
{"case": …, "points": ["k:0.3:7", …]}              -> one {"case", "point", "hits", "problems", "seconds", "status"} for each
"""

from __future__ import annotations

import json
import signal
import sys
import time

from tests.crash.cases import Case, Tools
from tests.crash.judge import PAYLOADS_CODE, Judge
from tests.crash.points import parse, syscall_names
from tests.site import Session


class Worker:
    """session: made at the first task. case, judge: those of the last task."""

    def __init__(self):
        self.session = Session()
        self.tools = Tools(self.session.top)
        self.case = None

    def turn_to(self, name):
        if self.case is None or self.case.name != name:
            self.case = Case(self.session, self.tools, name)
            self.judge = Judge(self.case)

    def list(self):
        self.case.fresh()
        outcome = self.case.run("-l")
        assert outcome.status == PAYLOADS_CODE, outcome
        self.judge.records()
        return outcome.lines

    def attempt(self, points):
        """One run with these points, swept and judged. {hits, problems, seconds, status}"""
        case, judge, began = self.case, self.judge, time.monotonic()
        case.fresh()
        outcome = case.run(*[word for point in points for word in point.option()])
        killed = {"all"} if any(point.what == "A" for point in points) else {point.place for point in points if point.what in "ka"}
        judge.over(outcome, killed)
        records = judge.records()
        started = any(record["event"]["action"] == "start" for record in records)
        kept = case.launcher == "setuid" and killed == {"0"} and started  # by the keeper, when the front alone is gone
        if outcome.status not in (202, -9) or kept:
            judge.clean(records, "before the sweep")
        records += self.finish()
        judge.judge_records(records, bool(outcome.out))
        judge.clean(records, "after the sweep")
        problems = judge.verdict()
        if problems:
            case.reset()
        names = [f"{place} {n} {syscall_names().get(number, number)}" for place, n, number in outcome.hits]
        return {"hits": names, "problems": problems, "seconds": time.monotonic() - began, "status": outcome.status}

    def finish(self):
        """A sweep; its records. It says of each run what became of it, and is quiet otherwise."""
        code, said = self.case.sweep()
        if code or b"nodewrap:" in said:
            self.judge.problems.append(f"sweep: exit {code}, {said[-300:]!r}")
        return self.judge.records()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    worker = Worker()
    try:
        for line in sys.stdin:
            task = json.loads(line)
            worker.turn_to(task["case"])
            if task.get("list"):
                print(json.dumps({"case": task["case"], "lines": worker.list()}), flush=True)
            for text in task.get("points", ()):
                print(json.dumps({"case": task["case"], "point": text, **worker.attempt(parse(text))}), flush=True)
            print(json.dumps({"done": True}), flush=True)
    finally:
        worker.session.close()


if __name__ == "__main__":
    main()
