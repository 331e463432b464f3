"""The runs that live on this node, and what belongs to them: for `ps`, `kill` and `sweep --deep`.

Of other people's processes only files of /proc are read that take no lock of theirs: stat, status, statm, comm. cmdline, environ, maps and smaps take
mmap_lock (fs/proc/base.c, task_mmu.c), which a process can hold for as long as it likes: in mmap(2) of a file of its own FUSE server. psutil reads
cmdline too: in name(), where a name has all of its 15 characters.

Who may read the leases (root; with the userns launcher their owner) has them from there. Another caller of the setuid launcher has its own runs
from the front processes: their name is ``nw-`` and the last twelve digits of the run's id, their real uid the caller's, another one root's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from nodewrap import _paths, lease
from nodewrap.doctor.node import distrust
from nodewrap.guard import Guard, GuardError, parse_guard

FRONT = "nw-"
TAIL = 12  # digits of an id that stand in a front's name: the random ones of a UUIDv7
SHORTEST = 8  # digits that name a run on a command line
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # not fetched by its parent yet, or just being fetched (X, kernel/exit.c, release_task)
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
GONE = psutil.Error  # ended meanwhile, or not for us to see (hidepid)


class SiteError(Exception):
    """What keeps a command from looking at the site. code: ``NW-…``; the text is one line with the next step."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


@dataclass
class Site:
    """guard: the bounds in force, read from path. owner: whose leases can be relied on: root's, with the userns launcher the caller's own."""

    path: str
    guard: Guard
    owner: int

    @property
    def privileged(self) -> bool:
        """Runs are root's to look after, not their callers'."""
        return self.guard.launcher != "userns"

    @property
    def leases(self) -> str:
        return f"{self.guard.state}/leases"


def site() -> Site:
    """This node's site, or the one that ``NODEWRAP_GUARD`` names, as for nodewrap-sweep. Raises SiteError."""
    named = os.environ.get("NODEWRAP_GUARD", "")
    path = named if named.startswith("/") else _paths.GUARD
    why = distrust(path, os.geteuid())
    if why:
        raise SiteError("NW-GUARD", f"{why}; call this as the account that the site belongs to, or see nodewrap doctor")
    try:
        guard = parse_guard(Path(path).read_bytes())
    except OSError as wrong:
        raise SiteError("NW-GUARD", f"{path}: {wrong.strerror}; next: nodewrap doctor") from None
    except GuardError as wrong:
        raise SiteError("NW-GUARD", f"{path}: {wrong}; mend it (nodewrap-guard(5))") from None
    return Site(path, guard, os.geteuid() if guard.launcher == "userns" else 0)


# ---- processes ----


def ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot, which with the pid names it; None when there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def comm(pid: int) -> str:
    """The name that a process has given itself, 15 bytes at most; "" when there is none."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes()[:-1])
    except (FileNotFoundError, ProcessLookupError):
        return ""


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Table:
    """The node's processes at one moment. parents: pid -> its children."""

    def __init__(self) -> None:
        self.processes = {process.pid: process for process in psutil.process_iter()}
        self.children: dict[int, list[psutil.Process]] = {}
        for process in self.processes.values():
            try:
                self.children.setdefault(process.ppid(), []).append(process)
            except GONE:
                continue

    def find(self, named: lease.Process | None) -> psutil.Process | None:
        """The process of that pid and start, None when it is another one or none."""
        if named is None or named.pid <= 0 or ticks(named.pid) != named.ticks:
            return None
        return self.processes.get(named.pid)

    def below(self, tops: Iterable[psutil.Process]) -> list[psutil.Process]:
        """These and all their descendants, each once, parents first."""
        found = {process.pid: process for process in tops}
        queue = list(found.values())
        while queue:
            for child in self.children.get(queue.pop(0).pid, []):
                if child.pid not in found:
                    found[child.pid] = child
                    queue.append(child)
        return list(found.values())


# ---- runs ----


@dataclass
class Run:
    """One run. id: whole, or its last digits where no more is known. state: running, stopped, starting, dead (to be swept) or broken (see note).

    front, keeper, init: live processes of nodewrap's own, None when there is none. members: those, and all their descendants.
    """

    id: str
    state: str
    note: str = ""
    lease: lease.Lease | None = None
    front: psutil.Process | None = None
    keeper: psutil.Process | None = None
    init: psutil.Process | None = None
    members: list[psutil.Process] = field(default_factory=list)

    def named(self, word: str) -> bool:
        """Whether word, SHORTEST digits at least, begins the id or its last group, or is the whole id."""
        digits, own = word.replace("-", "").lower(), self.id.replace("-", "")
        return len(digits) >= SHORTEST and (own.startswith(digits) or own[-TAIL:].startswith(digits) or (len(digits) == 32 and digits.endswith(own)))

    @property
    def payload(self) -> list[psutil.Process]:
        """The members without front, keeper and init."""
        own = [process.pid for process in (self.front, self.keeper, self.init) if process]
        return [process for process in self.members if process.pid not in own]


def runs(at: Site) -> list[Run]:
    """The site's runs, oldest first, as far as this user may know of them. Raises SiteError."""
    why = distrust(at.leases, at.owner) if os.path.lexists(at.leases) else ""
    if why:
        raise SiteError("NW-STATE", f"{why}; leases there cannot be relied on, see state in {at.path}")
    try:
        found = lease.leases(at.leases, at.owner)
    except PermissionError:
        if not at.privileged or os.geteuid() == 0:
            raise SiteError("NW-STATE", f"{at.leases} cannot be read; run this as the account that owns it") from None
        return _fronts(Table(), os.getuid())
    except FileNotFoundError:
        return []  # the launcher makes it
    except OSError as wrong:
        raise SiteError("NW-STATE", f"{at.leases}: {wrong.strerror}; it must be a directory of mode 0700, see state in {at.path}") from None
    table, boot = Table(), boot_id()
    return [_run(one, table, boot) for one in found]


def _run(one: lease.Found, table: Table, boot: str) -> Run:
    told = one.lease
    if told is None:
        state = "broken" if one.error and not one.writing else "starting"
        return Run(one.run, state, one.error)
    run = Run(one.run, "running" if one.alive else "dead", lease=told)
    if told.boot == boot:
        run.front, run.keeper, run.init = table.find(told.front), table.find(told.keeper), table.find(told.init)
        run.members = table.below(process for process in (run.front, run.keeper, run.init) if process)
    elif not one.alive:
        run.note = "of an earlier boot"
    return _stopped(run)


def _stopped(run: Run) -> Run:
    """A run is stopped when its front is, or all of its payload."""
    payload = [_status(process) for process in run.payload]
    if run.state == "running" and (_status(run.front) in STOPPED or (payload and all(status in STOPPED for status in payload))):
        run.state = "stopped"
    return run


def _uid(process: psutil.Process) -> int:
    try:
        return int(process.uids().real)
    except GONE:
        return -1


def _status(process: psutil.Process | None) -> str:
    try:
        return str(process.status()) if process else ""
    except GONE:
        return ""


def _fronts(table: Table, caller: int) -> list[Run]:
    """The caller's own front processes. Their privilege cannot be had by a payload, whatever name it gives itself."""
    found = []
    for process in table.processes.values():
        try:
            name, uids = comm(process.pid), process.uids()
        except GONE:
            continue
        digits = name[len(FRONT):]
        if name.startswith(FRONT) and len(digits) == TAIL and uids.real == caller and 0 in (uids.effective, uids.saved):
            keeper = next((child for child in table.children.get(process.pid, []) if _uid(child) == 0), None)
            init = next((child for child in table.children.get(keeper.pid, []) if _uid(child) == 0), None) if keeper else None
            found.append(_stopped(Run(digits, "running", "", None, process, keeper, init, table.below([process]))))
    return sorted(found, key=lambda run: age(run), reverse=True)


# ---- what they use ----


def cpu(run: Run) -> float:
    """CPU seconds of its processes, those that have ended and were waited for included."""
    total = 0.0
    for process in run.members:
        try:
            used = process.cpu_times()
        except GONE:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def memory(run: Run) -> int:
    """Bytes: the sum of resident pages, of statm. Pages that several share count several times; smaps alone divides them, and is not to be had."""
    total = 0
    for process in run.members:
        try:
            total += process.memory_info().rss
        except GONE:
            continue
    return total


def age(run: Run) -> float:
    """Seconds since it began; 0 when that is not known."""
    if run.lease:
        return max(0.0, time.time() - run.lease.time / 1e6)
    return max(0.0, time.time() - run.front.create_time()) if run.front else 0.0
