"""``python -m tests.crash.matrix``: choose points, have them tried by workers, count. Exit status 1 when an invariant was violated.

--all               every point: kill before and after each call, and all processes at once; every call fails with every errno that applies; in
                    every mode and kind of both launchers (cases.py, WHOLE)
--sample N          N of these, chosen by --seed
--part I/N          of what was asked for, the I-th of N parts (1/N … N/N), which together are the whole
--skip N            without the first N: to go on with one that was interrupted, by its last line of progress
--deaths            all kills under a running payload
--phases            these, and all kills of the phases lease -> exec and kill -> release, of one kind per launcher
--only CASE POINT   one point again, as a violation prints it: setuid/static/batch k:0.3:120 (see points.py)
--again FILE        the points of the violations in that output of before
--list CASE         the processes and calls of a run
--case GLOB         these cases only (again: more)      --kills, --faults   these points only      --roles A,B   these processes only
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

from tests.crash.cases import CASES, WHOLE
from tests.crash.points import Listing, parse, text_of

#: One kind per launcher whose every point of the two phases that matter most is tried each time; chown is the one with most to undo.
PHASES = {"setuid/static/batch": ("lease", "kill"), "userns/map/batch": ("lease", "kill")}
CHUNK = 25
WORKERS = 2


class Pool:
    """Workers, each with a session of its own. ask: tasks in, answers out."""

    def __init__(self, count):
        self.tasks, self.answers = queue.Queue(), queue.Queue()
        self.workers = [
            subprocess.Popen([sys.executable, "-m", "tests.crash.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        for worker in self.workers:
            threading.Thread(target=self._serve, args=(worker,), daemon=True).start()

    def _serve(self, worker):
        try:
            while (task := self.tasks.get()) is not None:
                worker.stdin.write(json.dumps(task) + "\n")
                worker.stdin.flush()
                while "done" not in (answer := json.loads(worker.stdout.readline())):
                    self.answers.put(answer)
        except (OSError, ValueError) as error:  # the worker has ended: its traceback is on stderr
            self.answers.put({"died": str(error)})

    def ask(self, tasks, answers):
        """Answers to these tasks, as they come. answers: how many there will be."""
        for task in tasks:
            self.tasks.put(task)
        for _ in range(answers):
            answer = self.answers.get()
            if "died" in answer:
                raise RuntimeError(f"a worker died: {answer['died']}")
            yield answer

    def close(self, at_once):
        """Each takes back its session, when it has done its last task or at once."""
        for worker in self.workers:
            if at_once:
                worker.terminate()
            worker.stdin.close()
        for worker in self.workers:
            worker.wait(120)


class Tally:
    """Answers, counted and printed."""

    def __init__(self):
        self.count, self.missed, self.slow, self.bad, self.began = collections.Counter(), 0, [], [], time.monotonic()

    def add(self, answer):
        self.count[answer["point"][0]] += 1
        self.missed += not answer["hits"]
        if sum(self.count.values()) % 1000 == 0:
            print(f"# {self.summary().splitlines()[0]}", file=sys.stderr, flush=True)
        if answer["seconds"] > 10:
            self.slow.append((answer["seconds"], answer["case"], answer["point"]))
        if answer["problems"]:
            self.bad.append(answer)
            print(f"VIOLATION --only {answer['case']} {answer['point']}  ({', '.join(answer['hits'])}; status {answer['status']})", flush=True)
            for line in answer["problems"][:8]:
                print(f"    {line}", flush=True)
            if len(answer["problems"]) > 8:
                print(f"    and {len(answer['problems']) - 8} more")

    def summary(self):
        total, seconds = sum(self.count.values()), time.monotonic() - self.began
        words = {"k": "killed before a call", "a": "killed after it", "A": "all killed at once", "K": "killed under a running payload",
                 "w": "killed in a wait for its end",
                 "f": "call failed", "s": "half written"}
        parts = ", ".join(f"{words[what]} {self.count[what]}" for what in words if self.count[what])
        lines = [f"{total} points ({parts}): {len(self.bad)} violations, {seconds:.0f} s; {self.missed} not reached (timing)"]
        lines += [f"slow: {taken:.1f} s {case} {point}" for taken, case, point in sorted(self.slow, reverse=True)[:10]]
        return "\n".join(lines)


def listings(pool, cases):
    tasks = [{"case": case, "list": True} for case in cases]
    return {answer["case"]: Listing(answer["lines"]) for answer in pool.ask(tasks, len(tasks))}


def candidates(case, listing, asked):
    """All points of that case which were asked for."""
    found = []
    if not asked.faults:
        found += listing.kills() + listing.kills_after()
    if not asked.kills:
        found += listing.faults()
    if asked.roles:
        found = [point for point in found if listing.processes[point.place].role in asked.roles.split(",")]
    return [(case, (point,)) for point in found] + ([] if asked.faults or asked.roles else deaths(case, listing))


def deaths(case, listing):
    """Of a run; a sweep has no payload."""
    return [(case, points) for points in listing.deaths()] if case.count("/") == 2 else []


def chosen(found, asked):
    """(case, points) of everything to try, in an order that changes cases rarely."""
    points = []
    for case, listing in found.items():
        if (asked.all and case in WHOLE) or asked.sample:
            points += candidates(case, listing, asked)
    if asked.sample and asked.sample < len(points):
        points = random.Random(asked.seed).sample(points, asked.sample)
    if asked.phases:
        for case in PHASES.keys() & found.keys():
            points += [(case, (point,)) for point in found[case].kills(phases=PHASES[case])]
    if asked.phases or asked.deaths:
        for case, listing in found.items():
            points += deaths(case, listing)
    place = {case: i for i, case in enumerate(CASES)}
    part, parts = map(int, asked.part.split("/"))
    return sorted(set(points), key=lambda pair: (place[pair[0]], text_of(pair[1])))[part - 1 :: parts][asked.skip :]


def chunks(points):
    """Tasks of the workers."""
    by_case = collections.defaultdict(list)
    for case, point in points:
        by_case[case].append(text_of(point))
    return [{"case": case, "points": texts[i : i + CHUNK]} for case, texts in by_case.items() for i in range(0, len(texts), CHUNK)]


def show(listing):
    for process in listing.processes.values():
        print(f"{process.place}  {process.role}  {len(process.calls)} calls")
        for n, (order, name, about) in enumerate(process.calls, 1):
            print(f"    {n:5} {order:6} {name} {about}")


def parsed(argv):
    parser = argparse.ArgumentParser(prog="tests.crash.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--sample", type=int, default=0, metavar="N")
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--deaths", action="store_true")
    parser.add_argument("--only", nargs=2, metavar=("CASE", "POINT"))
    parser.add_argument("--again", metavar="FILE")
    parser.add_argument("--list", metavar="CASE", choices=CASES)
    parser.add_argument("--case", action="append", metavar="GLOB")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--roles", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, metavar="N")
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--workers", type=int, default=WORKERS)
    return parser.parse_args(argv)


def violations(path):
    """(case, points) of the lines that Tally printed."""
    with open(path, encoding="utf-8") as lines:
        found = {tuple(line.split()[2:4]) for line in lines if line.startswith("VIOLATION")}
    return [(case, parse(text)) for case, text in sorted(found)]


def attempt(pool, asked):
    """Everything that was asked for -> Tally."""
    tally = Tally()
    if asked.only or asked.again:
        tasks = chunks(violations(asked.again) if asked.again else [(asked.only[0], parse(asked.only[1]))])
    else:
        cases = [case for case in CASES if any(fnmatch.fnmatch(case, one) for one in asked.case or ["*"])]
        tasks = chunks(chosen(listings(pool, cases), asked))
    for answer in pool.ask(tasks, sum(len(task["points"]) for task in tasks)):
        tally.add(answer)
    return tally


def main(argv=None):
    asked = parsed(argv)
    if os.geteuid() != 0 or os.uname().machine != "x86_64":
        sys.exit("the crash matrix needs root and an x86-64 machine")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool, done = Pool(1 if asked.only or asked.list else asked.workers), False
    try:
        if asked.list:
            show(listings(pool, [asked.list])[asked.list])
            return 0
        tally = attempt(pool, asked)
        done = True
    finally:
        pool.close(at_once=not done)
    print(tally.summary(), flush=True)
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
