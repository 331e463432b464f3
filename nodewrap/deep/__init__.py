"""``nodewrap sweep --deep``: what belongs to leasable ids without any lease, found, and removed when told (docs/reliability.md, "Sweeping").

Looking takes no lock: an id may be leased and free again meanwhile. So each finding is looked at once more with its id held, and counts only then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from nodewrap import live
from nodewrap.deep import files, things
from nodewrap.deep.finding import Finding
from nodewrap.deep.ids import Leasable, Locks, leasable
from nodewrap.deep.owner import as_owner
from nodewrap.lease import UUID
from nodewrap.live import Site, SiteError

LOOK_S = 5.0


@dataclass
class Report:
    """findings: by owner, then as they were found. notes: what was not looked at, and why."""

    ids: Leasable
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def deep(at: Site, paths: list[str], remove: bool) -> Report:
    """Looks everywhere, and removes what it finds when told. Raises SiteError."""
    if not at.privileged:
        raise SiteError("NW-DEEP", f"{at.path} has the userns launcher: its ids are the caller's own, and none can be told from the caller's files")
    if os.geteuid() != 0:
        raise SiteError("NW-DEEP", "only root sees the processes and files of other ids; call it as root")
    locks, report = Locks(at), Report(leasable(at.guard))
    report.notes = _runs_on_disk(at)
    found = _everything(report, Free(report.ids, locks.claimed()), paths)
    for uid in sorted({one.uid for one in found}):
        with locks.hold(uid, uid in report.ids.accounts) as free:
            if free:
                report.findings += _settle(report, [one for one in found if one.uid == uid], uid, remove)
    report.notes = [*report.ids.notes, *report.notes]  # an id is judged when something of it is met
    return report


def _runs_on_disk(at: Site) -> list[str]:
    """Directories of runs below tmp-dir (csrc/disk.c) that no lease names any more. They hold what others than the payload made, which is not ours
    to remove with root's rights: it may have been moved there."""
    top = at.guard.tmp_dir
    try:
        made = [name for name in os.listdir(top) if UUID.fullmatch(name)] if top else []
        leased = {name[:36] for name in os.listdir(at.leases)} if made else set()
    except OSError as wrong:
        return [f"directories on disk are not looked at: {wrong.filename}: {wrong.strerror}"]
    left = [f"{top}/{name}" for name in made if name not in leased and os.path.lexists(f"{top}/{name}")]
    why = "is left of a run that has ended: others made something in it (its cleanup record names it); look at it and remove it"
    return [f"{path} {why}" for path in left]


class Free:
    """The leasable ids that no lease claims."""

    def __init__(self, ids: Leasable, claimed: list[range]) -> None:
        self.ids, self.claimed = ids, claimed
        self.known: dict[int, bool] = {}

    def __contains__(self, uid: object) -> bool:
        if not isinstance(uid, int):
            return False
        if uid not in self.known:
            self.known[uid] = uid in self.ids and not any(uid in part for part in self.claimed)
        return self.known[uid]


def _everything(report: Report, free: Free, paths: list[str]) -> list[Finding]:
    accounts = report.ids.accounts.values()
    found = things.processes(free) + things.ipc(free)
    found += [one for one in things.fleeting(free) if one.uid not in {other.uid for other in found}]
    found += _queues(free, report.notes)
    for uid in things.key_holders(free):
        found += _keys(report, uid)
    found += files.find(free, [*files.PLACES, *files.SPOOLS, *paths], sorted({account.home for account in accounts}), report.notes)
    return found + files.lingering({account.name: account.uid for account in accounts if account.uid in free})


def _queues(free: Free, notes: list[str]) -> list[Finding]:
    try:
        top = things.mqueue_directory()
    except OSError as wrong:
        notes.append(f"message queues are not looked at: {wrong.strerror}")
        return []
    try:
        return things.queues(free, top)
    finally:
        os.close(top)


def _keys(report: Report, uid: int) -> list[Finding]:
    try:
        told = as_owner(uid, report.ids.gid(uid), lambda: things.own_keys(uid), LOOK_S, other=uid)
    except OSError as wrong:  # it got a process in the meantime, that of a run
        report.notes.append(f"the keys of uid {uid} are not looked at: {wrong}")
        return []
    return [Finding("key", uid, key.split()[0], detail=key.partition(" ")[2]) for key in told]


# ---- one id, held ----


def _settle(report: Report, found: list[Finding], uid: int, remove: bool) -> list[Finding]:
    """Those that are still there; with "remove" they are removed, processes first: nobody of this uid is then left to change anything."""
    found = [one for one in found if _still(one)]
    gid = report.ids.gid(uid)
    if not remove:
        return found
    why = things.end_processes(uid, gid)
    for one in found:
        one.left = _alive(one, why) if one.kind == "process" else f"its processes: {why}" if why else _removed(one, gid)
        one.removed = not one.left
    return found


def _still(one: Finding) -> bool:
    if one.kind == "process":
        return str(live.ticks(int(one.what))) == one.mark if one.mark else bool(things.fleeting((one.uid,)))
    return files.there(one) if one.kind in ("file", "linger") else True


def _alive(one: Finding, why: str) -> str:
    """A finding without a mark is whoever comes and goes, not one process."""
    return why if why and (not one.mark or _still(one)) else ""


def _removed(one: Finding, gid: int) -> str:
    """Why it is left, "" when it is gone."""
    try:
        return _remove(one, gid)
    except OSError as wrong:
        return str(wrong.strerror or wrong)


def _remove(one: Finding, gid: int) -> str:
    if one.kind in ("file", "linger"):
        return files.remove(one, gid)
    if one.kind == "ipc":
        return str(as_owner(one.uid, gid, lambda: things.remove_ipc(one)))
    if one.kind == "key":
        return str(as_owner(one.uid, gid, lambda: things.remove_key(one), LOOK_S, other=one.uid))
    top = things.mqueue_directory()
    try:
        return str(as_owner(one.uid, gid, lambda: things.remove_queue(one, top)))
    finally:
        os.close(top)
