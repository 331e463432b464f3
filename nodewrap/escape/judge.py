"""What a run left on the node: everything countable before and after it, seen from outside (attacks.md's "unwrapped invariants")."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Container, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodewrap.audit.log import run_of
from nodewrap.deep import things
from nodewrap.guard import Guard, Range

#: Where everybody may write on most nodes; only their first level, as others work there.
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/var/spool/cron/crontabs", "/var/spool/at", "/var/mail")  # noqa: S108  looked at alone
#: How the directories of suites begin.
DIRECTORY = "nodewrap-escape-"
#: Other work on the node comes and goes meanwhile; what is the try's own and stays is still there then.
SETTLE_S = 2.0


class Ids:
    """Uids that payloads have on this node (guard: switch-uid, map-uid; delegated: subordinate ranges), and the pilot's. An ``in`` tells."""

    def __init__(self, guard: Guard, pilot: int, delegated: Iterable[Range] = ()) -> None:
        self.ranges = (*guard.switch_uid, *guard.map_uid, *delegated)
        self.pilot = pilot

    def __contains__(self, uid: object) -> bool:
        return isinstance(uid, int) and (uid == self.pilot or any(one.first <= uid <= one.last for one in self.ranges))


@dataclass
class Snapshot:
    """kind -> what there is, one line each."""

    things: dict[str, Counter[str]] = field(default_factory=dict)

    def since(self, before: Snapshot) -> list[str]:
        """What is here and was not before, sorted: "kind: line"."""
        found = []
        for kind, now in self.things.items():
            found += [f"{kind}: {line}" for line in (now - before.things.get(kind, Counter()))]
        return sorted(found)


def snapshot(ids: Ids, state: str) -> Snapshot:
    """Now. state: the site's directory of leases ("" where it may not be read)."""
    found = {
        "file": _files(ids), "ipc": Counter(f"{one.what} {one.detail}" for one in things.ipc(ids)), "mount": _mounts(),
        "listener": _listeners(ids), "cgroup": _groups(), "lease": _leases(state),
    }
    if os.geteuid() == 0:
        found["queue"] = _queues(ids)
    return Snapshot(found)


def litter(before: Snapshot, ids: Ids, state: str, runs: Container[str] | None) -> list[str]:
    """What is new since before, and stays. runs: ids of the try's own runs, None when not known: only their cgroups and leases count."""
    end = time.monotonic() + SETTLE_S
    while (found := [line for line in snapshot(ids, state).since(before) if _is_ours(line, runs, state)]) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _is_ours(line: str, runs: Container[str] | None, state: str) -> bool:
    """Mounts come and go on a node (automounters): those count that are where tries and runs are."""
    kind, _, name = line.partition(": ")
    if kind == "mount":
        return f"/{DIRECTORY}" in name or (bool(state) and name.startswith(f"{state}/"))
    return kind not in ("cgroup", "lease") or runs is None or name.rpartition("/")[2].removeprefix("nodewrap-") in runs


def _files(ids: Ids) -> Counter[str]:
    found: Counter[str] = Counter()
    for place in PLACES:
        with suppress(OSError):
            for entry in os.scandir(place):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid in ids:
                        found[entry.path] += 1
    return found


def _mounts() -> Counter[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="backslashreplace").splitlines()
    return Counter(line.split()[4] for line in lines)


def _queues(ids: Ids) -> Counter[str]:
    top = things.mqueue_directory()
    try:
        return Counter(one.what for one in things.queues(ids, top))
    finally:
        os.close(top)


def _listeners(ids: Ids) -> Counter[str]:
    """Sockets that wait for somebody: TCP in state LISTEN (0A) and UDP of these uids, abstract names of anybody."""
    found: Counter[str] = Counter()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                row = line.split()
                if int(row[7]) in ids and (row[3] == "0A" or name.startswith("udp")):
                    found[f"{name} {row[1]}"] += 1
    return found


def _groups() -> Counter[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="backslashreplace").splitlines()
    mounts = [line.split()[4] for line in lines if " - cgroup2 " in line]
    found: Counter[str] = Counter()
    for top in mounts[:1]:
        for where, names, _ in os.walk(top):
            found.update(f"{where}/{name}" for name in names if name.startswith("nodewrap-"))
    return found


def _leases(state: str) -> Counter[str]:
    with suppress(OSError):
        return Counter(os.listdir(f"{state}/leases"))
    return Counter()


def record_flaws(records: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the records of runs that are over: exactly one start and one end each, as far as any payload started."""
    runs: dict[str, Counter[str]] = {}
    for record in records:
        run = run_of(record)
        runs.setdefault(run, Counter())[str(record["event"]["action"])] += 1
    wrong = []
    for run, actions in runs.items():
        if run and actions["start"] and (actions["start"], actions["exit"], actions["cleanup"]) != (1, 1, 1):
            wrong.append(f"record: run {run}: {dict(actions)}")
    return wrong
