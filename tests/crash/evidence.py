"""What the audit log of many runs at once must say, judged from its text and from what the soak itself did and saw. Nothing here runs anything.

Lines:     every one is a record, and the numbers go on by one; or it is a torn one, and the next is the ``gap`` record that seals it.
Runs:      start, exit, cleanup in that order, each once; a swept pair besides only when somebody died in between, and a second one only when its
           first sweeper was ended (by the soak, by a launcher after its 2 s) or could not write (a full disk).
Attempts:  who was executed has a start; who saw the payload's own code has its exit and cleanup on record already; who was refused without having
           been killed, and with room on the disks, was refused for want of an id, and that is on record too.
"""

from __future__ import annotations

import collections
import datetime
import json
import re
from dataclasses import dataclass, field

from tests.crash.judge import LINE, PAYLOADS_CODE, REFUSED

BUSY = "NW-POOL-BUSY"
#: How long a launcher sweeps before its own run (csrc/sweep.c, BEFORE_RUN_MS); a little less, as its clock starts before the record's.
PATIENCE_S = 1.9
#: What a sweep writes of a run.
SWEPT = ("exit", "handover", "cleanup")
NONCE = re.compile(r"\A[0-9a-f]{16}\Z")


@dataclass
class Attempt:
    """One call of the launcher. plan: words to say which. began, ended: seconds since 1970. status: -n for signal n. err: bytes. kills: roles that
    were killed. full: a disk was full at some time meanwhile."""

    nonce: str
    plan: str
    began: float
    ended: float = 0.0
    status: int = 0
    err: bytes = b""
    kills: list = field(default_factory=list)
    full: bool = False

    def code(self):
        """NW-… of a refusal, "" when there was none."""
        line = LINE.search(self.err)
        return line.group(0).split(b": ")[1].decode() if line else ""


@dataclass
class Seen:
    """What the soak did and saw. attempts: {nonce: Attempt}. executed: nonces that payloads said. cut: {run: times at which one who had its lease was
    killed}. full: [(from, to)] when a disk was full."""

    attempts: dict
    executed: set
    cut: dict
    full: list


class Log:
    """The lines of a log. records: parsed, in order. gaps: how many torn lines were sealed. problems: what is wrong."""

    def __init__(self, text):
        self.records, self.gaps, self.problems, torn = [], 0, [], None
        if text and not text.endswith(b"\n"):
            self.problems.append("audit: torn tail")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                number, action = record["event"]["sequence"], record["event"]["action"]
            except (ValueError, KeyError, TypeError):
                self._unsealed(torn)
                torn = line
                continue
            if action == "gap":
                self.gaps += 1
                self.problems += [] if torn is not None else [f"audit: number {number} is a gap behind a whole record"]
            else:
                self._unsealed(torn)
            torn = None
            self._count(number)
            self.records.append(record)
        self._unsealed(torn)

    def _unsealed(self, torn):
        if torn is not None:
            self.problems.append(f"audit: no record, and no gap behind it: {torn[:80]!r}")

    def _count(self, number):
        before = self.records[-1]["event"]["sequence"] if self.records else 0
        if number != before + 1:
            self.problems.append(f"audit: number {number} after {before}")

    def runs(self):
        """{run: [its records]}"""
        found = collections.defaultdict(list)
        for record in self.records:
            found[record["nodewrap"]["run"]["id"]].append(record)
        return found


def action(record):
    return record["event"]["action"]


def swept(record):
    return bool(record["nodewrap"].get("swept"))


def when(record):
    """Seconds since 1970."""
    return datetime.datetime.fromisoformat(record["@timestamp"].replace("Z", "+00:00")).timestamp()


def nonce_of(records):
    """The nonce that the command of these records has, or None."""
    words = [word for record in records for word in record.get("process", {}).get("args", ()) if NONCE.match(word)]
    return words[0] if words else None


def impatient(runs):
    """[(from, to)] of launchers that spent their two seconds of sweeping between these records: they ended their sweepers then."""
    spans = []
    for records in runs.values():
        own = [record for record in records if not swept(record)]
        spans += [(when(a), when(b)) for a, b in zip(own, own[1:]) if action(a) == "authorize" and when(b) - when(a) >= PATIENCE_S]
    return spans


def attempts(records):
    """Swept records, by the sweep that wrote them: each goes on in this order, and may leave one out."""
    found = []
    for record in records:
        if not found or SWEPT.index(action(record)) <= SWEPT.index(action(found[-1][-1])):
            found.append([])
        found[-1].append(record)
    return found


class Verdicts:
    """Of one site. why: a count of what explained second swept pairs."""

    def __init__(self, log, seen, judge):
        self.log, self.seen, self.judge, self.why = log, seen, judge, collections.Counter()
        self.runs = log.runs()
        self.spans = impatient(self.runs)

    def all(self):
        """Every problem, as lines."""
        found, by_nonce = list(self.log.problems), {}
        for run, records in self.runs.items():
            nonce = nonce_of(records)
            by_nonce.setdefault(nonce, []).extend(records)
            attempt = self.seen.attempts.get(nonce)
            plan = attempt.plan if attempt else "before the soak, or its first record is missing"
            found += [f"run {run} ({plan}): {line}" for line in self._run(run, records, nonce in self.seen.executed)]
        for attempt in self.seen.attempts.values():
            found += [f"run of {attempt.plan}: {line}" for line in self._attempt(attempt, by_nonce.get(attempt.nonce, []))]
        return found

    def _run(self, run, records, executed):
        attempt = self.seen.attempts.get(nonce_of(records))
        self.judge.judge_records(records, attempt or Attempt("", "", 0), executed)
        yield from self.judge.verdict()
        names = [action(record) for record in records if not swept(record)]
        order = [name for name in names if name in ("authorize", "start", "exit", "cleanup")]
        if order != sorted(order, key=("authorize", "start", "exit", "cleanup").index):
            yield f"records: in this order: {names}"
        if "cleanup" in names and any(map(swept, records)) and not self._died_before_release(run, records):
            yield f"records: swept after its own cleanup: {[when(record) for record in records]}"
        yield from self._pairs(run, records)

    def _died_before_release(self, run, records):
        """Between cleanup and the end of the lease only a kill, or a record that could not be written, can come."""
        attempt = self.seen.attempts.get(nonce_of(records))
        return attempt is None or attempt.kills or attempt.full

    def _pairs(self, run, records):
        """Swept once; again only when the one who did it before was ended, or somebody who did a part of it."""
        own = max((when(record) for record in records if not swept(record)), default=0)
        tries = attempts([record for record in records if swept(record) and action(record) in SWEPT])
        actions = {action(record) for ends in tries for record in ends}
        for ends, following in zip(tries, tries[1:]):
            whole = {action(record) for record in ends} == actions and not any(record["nodewrap"].get("cleanup", {}).get("left") for record in ends)
            reason = self._reason(run, when(ends[0]) if whole else own, when(ends[-1]), when(following[0]), records)
            self.why[reason or "nothing"] += 1
            if reason is None:
                yield f"records: swept again, and nobody had cut the sweep short: {[(action(r), swept(r), r['@timestamp']) for r in records]}"

    def _reason(self, run, begin, first, again, records):
        if any(begin <= time <= again for time in self.seen.cut.get(run, ())):
            return "sweeper killed"
        if any(at <= again and begin <= to for at, to in self.seen.full):
            return "disk full"
        if any(record["nodewrap"].get("cleanup", {}).get("processes_left") for record in records):
            return "a process did not end in time"
        return "2 s were over" if any(at <= first <= to + 0.5 for at, to in self.spans) else None

    def _attempt(self, attempt, records):
        names = [action(record) for record in records if not swept(record)]
        if attempt.nonce in self.seen.executed and "start" not in names:
            yield f"executed, and on record is only {names}"
        if attempt.status == PAYLOADS_CODE:
            codes = [record["process"].get("exit_code") for record in records if action(record) == "exit" and not swept(record)]
            if codes != [PAYLOADS_CODE] or "cleanup" not in names:
                yield f"the caller saw {PAYLOADS_CODE}, and on record is {names}, exit codes {codes}"
        elif not attempt.kills:
            if attempt.status not in REFUSED or (attempt.code() != BUSY and not attempt.full):
                yield f"exit {attempt.status}, though nobody was killed{'' if attempt.full else ' and no disk was full'}: {attempt.err[-300:]!r}"
            elif not attempt.full and [record["event"].get("code") for record in records if action(record) == "error"] != [BUSY]:
                yield f"a refusal that is not on record: {attempt.code()}, {names}"
