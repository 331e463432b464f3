"""The invariants, checked from outside: by /proc, the file system and the audit log, never by asking nodewrap.

Of a run, once it is over:      nobody hangs; the caller sees a documented exit code, and one line NW-… when it is 201 to 203; when it sees
                                the payload's own code, all is clean and on record already.
Once it has been swept:         no process, no lease, no id held, no cgroup, no mount; the work directory is the pilot's, whole, and leads nowhere;
                                records: every line parses, the numbers go on by one, each start has its exit and cleanup, at most one of each
                                not swept, and no payload was executed without a start.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from pathlib import Path

PAYLOADS_CODE = 7
REFUSED = {201, 202, 203}
#: What the caller may see of each kind of command. A sweep: all done, something left.
CODES = {"run": {PAYLOADS_CODE, 126, 127} | REFUSED, "next": {0, 126, 127} | REFUSED, "sweep": {0, 1} | REFUSED}
LINE = re.compile(rb"nodewrap: NW-[A-Z0-9-]+: [^\n]+\n")
GONE_S = 5


class Judge:
    """Of one case. Keeps where its audit log ends."""

    def __init__(self, case):
        self.case, self.offset, self.sequence, self.problems = case, 0, 0, []
        self.records()
        self.problems = []

    # ---- records ----

    def records(self):
        """The records since the last look; what is wrong with their lines goes to problems."""
        path, found = self.case.site.audit, []
        if not path.exists():
            return found
        with open(path, "rb") as log:
            log.seek(self.offset)
            text = log.read()
        self.offset += len(text)
        if text and not text.endswith(b"\n"):
            self.problems.append("audit: torn tail")
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                self.problems.append(f"audit: no record: {line[:80]!r}")
                continue
            number = record["event"]["sequence"]
            if number != self.sequence + 1:
                self.problems.append(f"audit: number {number} after {self.sequence}")
            self.sequence = number
            found.append(record)
        return found

    def judge_records(self, records, outcome, executed):
        """executed: a payload did run (its nonce was seen). Of the records of all runs since the last look."""
        runs = {}
        for record in records:
            runs.setdefault(record["nodewrap"]["run"]["id"], []).append((record["event"]["action"], bool(record["nodewrap"].get("swept"))))
        for run, actions in runs.items():
            names = [action for action, _ in actions]
            for end in ("exit", "cleanup"):
                if "start" in names and end not in names:
                    self.problems.append(f"records: start without {end}: {names}")
                if actions.count((end, False)) > 1:
                    self.problems.append(f"records: {end} twice: {names}")
            if names.count("start") > 1:
                self.problems.append(f"records: start twice in {run}: {names}")
        if executed and not any(("start", False) in actions for actions in runs.values()):
            self.problems.append(f"records: executed without start: {list(runs.values())}")
        ends = [record["process"].get("exit_code") for record in records if record["event"]["action"] == "exit"]
        if outcome.status == 137 and 137 not in ends:
            self.problems.append(f"exit status 137, and on record: {ends}")

    # ---- what is left ----

    def left(self):
        """What the run left outside its work directory, as lines."""
        case, found = self.case, []
        end = time.monotonic() + GONE_S
        while (alive := case.processes()) and time.monotonic() < end:
            time.sleep(0.01)
        found += [f"process {pid} {what}" for pid, what in alive.items()]
        found += [f"lease {name}" for name in case.site.leases()]
        found += [f"id {path.name} held" for path in (case.site.state / "ids").glob("*") if self._held(path)]
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()  # anybody's, with any bytes
        found += [f"mount {line}" for line in mounts if f" {case.session.top}/" in line]
        found += [f"disk {path}" for path in case.scratch.glob("*")]
        found += [f"file {path}" for path in case.in_tmp("x509up_u*.glexec.*", case.owns)]
        return found + self._outlived()

    def _outlived(self):
        """What outlives processes, of ids that only payloads have. Of the pilot's own id nothing is anybody's for certain."""
        mine = self.case.in_tmp("nw-crash-*", self._payloads)
        for kind, uid in (("shm", 9), ("sem", 6), ("msg", 9)):
            lines = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
            mine += [f"{kind} {line.split()[1]}" for line in lines if self._payloads(int(line.split()[uid]))]
        return [f"outlived: {thing}" for thing in mine]

    def _payloads(self, uid):
        return self.case.owns(uid) and uid != self.case.pilot.uid

    def _held(self, path):
        """An id is held by a lock, or by a dead run that has a lease: what died between the two had nothing yet (csrc/lease.c, claimed)."""
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            run = file.read(36).decode()
        return len(run) == 36 and f"{run}.lease" in self.case.site.leases()

    def payload_died(self):
        """With whom was killed, before anybody sweeps; and so did the rest of a pid namespace."""
        end = time.monotonic() + GONE_S
        while found := [what for what in self.case.processes().values() if self.case.profile != "none" or what.endswith(" nw-main")]:
            if time.monotonic() > end:
                self.problems.append(f"outlived whom it should have died with: {found}")
                return
            time.sleep(0.01)

    def cgroups(self, runs):
        """Directories of these runs' cgroups."""
        places = self.case.site.read_guard().get("cgroup", [])
        own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
        paths = [Path(f"{place}{own if own != '/' else ''}/nodewrap-{run}") for place in places for run in runs]
        return [f"cgroup {path}" for path in paths if path.exists()]

    def work(self):
        """What is wrong with the work directory, as lines: all of it is the pilot's, carries no rights, leads nowhere."""
        case, found = self.case, []
        if (case.work / "given/input").read_text() != case.nonce:
            found.append("work: the pilot's own file is another one")
        for directory, directories, files in os.walk(case.work):
            links = [name for name in directories if os.path.islink(os.path.join(directory, name))]
            for path in [Path(directory, name) for name in (".", *links, *files)]:
                found += self._entry(path, path.lstat())
        return found

    def _entry(self, path, st):
        case, name = self.case, path.relative_to(self.case.work)
        if (st.st_uid, st.st_gid) != (case.pilot.uid, case.pilot.gid):
            yield f"work: {name} belongs to {st.st_uid}:{st.st_gid}"
        if stat.S_ISLNK(st.st_mode):
            if os.path.relpath(os.path.join(path.parent, os.readlink(path)), case.work).startswith(".."):
                yield f"work: {name} leads to {os.readlink(path)}"
        elif not (stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)):
            yield f"work: {name} is special"
        elif st.st_mode & (stat.S_ISUID | stat.S_ISGID):
            yield f"work: {name} has mode {st.st_mode:o}"

    # ---- the whole ----

    def over(self, outcome, killed):
        """Right after the command. killed: places that were killed; "all"."""
        say = self.problems.append
        for hang in outcome.hangs:
            say(f"hang: {hang}")
        status, err = outcome.status, outcome.err
        # 137: the payload died of SIGKILL, and that is what the record of its end says (judge_records).
        if status not in CODES[self.case.victim] and not (status == -9 and killed & {"0", "all"}) and status != 137:
            say(f"exit status {status}, {err[-300:]!r}")
        lines = LINE.findall(err)
        if b"".join(lines) != err:
            say(f"stderr: {err[-300:]!r}")
        # Two: what went wrong, and that it could not be recorded.
        if status in REFUSED and not (1 <= len(lines) <= 2 and len(set(lines)) == len(lines)):
            say(f"exit {status} with {len(lines)} lines on stderr: {err[-300:]!r}")
        if self.case.victim == "run" and outcome.out not in (b"", self.case.nonce.encode()):
            say(f"stdout: {outcome.out[:80]!r}")

    def clean(self, records, when):
        """Nothing is left to be done. records: those of the runs. when: words for the problems."""
        runs = {record["nodewrap"]["run"]["id"] for record in records}
        self.problems += [f"{when}: {line}" for line in [*self.left(), *self.cgroups(runs), *self.work()]]

    def verdict(self):
        """The problems so far, which are forgotten."""
        found, self.problems = self.problems, []
        return found
