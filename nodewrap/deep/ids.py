"""Which ids are nodewrap's to lease, whose they are now, and how to keep one from being leased while it is cleaned.

An id is looked at only when nobody but a run can have it: accounts of exclusive rules within the guard's ``switch-uid`` that no other rule
gives shared, and ``map-uid`` ranges without the ids that are accounts or delegated in /etc/subuid. One with a lease, alive or dead, is left alone.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodewrap import lease
from nodewrap.doctor.node import distrust
from nodewrap.guard import Guard, Range
from nodewrap.live import Site, SiteError
from nodewrap.policy import store


@dataclass
class Account:
    """A target account of the applied policy, as it was when that was compiled."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass
class Leasable:
    """accounts: by uid. ranges: of map-uid. delegated: ranges of /etc/subuid. notes: what was left out, and why."""

    accounts: dict[int, Account] = field(default_factory=dict)
    ranges: tuple[Range, ...] = ()
    delegated: tuple[Range, ...] = ()
    notes: list[str] = field(default_factory=list)
    known: dict[int, bool] = field(default_factory=dict)

    def __contains__(self, uid: int) -> bool:
        if uid not in self.known:
            self.known[uid] = uid in self.accounts or self._of_a_block(uid)
        return self.known[uid]

    def _of_a_block(self, uid: int) -> bool:
        if not _within(self.ranges, uid):
            return False
        why = "is delegated in /etc/subuid" if _within(self.delegated, uid) else "is an account's" if _is_account(uid) else ""
        if why:
            self.notes.append(f"uid {uid} of map-uid {why} and is not looked at; take it out of map-uid in the guard")
        return not why

    def gid(self, uid: int) -> int:
        """The group of the payload that has this uid."""
        return self.accounts[uid].gid if uid in self.accounts else uid

    def name(self, uid: int) -> str:
        return self.accounts[uid].name if uid in self.accounts else str(uid)


def _within(ranges: tuple[Range, ...], uid: int) -> bool:
    return any(part.first <= uid <= part.last for part in ranges)


def _is_account(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def leasable(guard: Guard) -> Leasable:
    """The ids that guard and applied policy give to runs alone."""
    found = Leasable(ranges=guard.map_uid, delegated=_delegated())
    try:
        rules = store.load(f"{guard.policy}/policy.bin")["rules"]
    except (OSError, ValueError) as wrong:
        found.notes.append(f"no accounts are looked at: {wrong}")
        return found
    identities = [identity for rule in rules for identity in rule["identities"] if identity["mode"] == "switch"]
    shared = {account["uid"] for identity in identities if not identity["exclusive"] for account in identity["accounts"]}
    for account in (account for identity in identities if identity["exclusive"] for account in identity["accounts"]):
        if account["uid"] in shared:
            found.notes.append(f"account {account['name']} is not looked at: a rule gives it shared")
        elif _within(guard.switch_uid, account["uid"]):
            found.accounts[account["uid"]] = Account(account["name"], account["uid"], account["gid"], account["home"])
    return found


def _delegated() -> tuple[Range, ...]:
    try:
        lines = Path("/etc/subuid").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ()
    found = [re.fullmatch(r"[^:#]+:([0-9]{1,10}):([0-9]{1,10})", line.strip()) for line in lines]
    return tuple(Range(int(match[1]), int(match[1]) + int(match[2]) - 1) for match in found if match)


# ---- whose they are now ----


class Locks:
    """The locks and leases of a site: csrc/lease.c takes the same ones in the same way. Raises SiteError when its directories cannot be relied on."""

    def __init__(self, at: Site) -> None:
        self.at, self.directory = at, f"{at.guard.state}/ids"
        why = distrust(at.guard.state)
        if not why:
            with suppress(FileExistsError):  # a start or another sweep may make it at the same time
                os.mkdir(self.directory, 0o700)
            why = distrust(self.directory)
        if why:
            raise SiteError("NW-STATE", f"{why}; see state in {at.path}")

    def claimed(self) -> list[range]:
        """Ids that a lease names, whether it is alive, dead or not understood, or that were locked for one."""
        found = [one for one in self._leases() if one.lease]
        taken = [range(one.lease.block.first, one.lease.block.first + one.lease.block.size) for one in found if one.lease]
        taken += [range(one.lease.id.uid, one.lease.id.uid + 1) for one in found if one.lease]
        return taken + self._locked_for({one.run for one in self._leases()})

    def _leases(self) -> list[lease.Found]:
        try:
            return lease.leases(self.at.leases, self.at.owner)
        except FileNotFoundError:
            return []

    def _locked_for(self, runs: set[str]) -> list[range]:
        """By the content of the locks: "RUN SIZE"."""
        taken = []
        for path in Path(self.directory).iterdir():
            words = path.read_text(encoding="ascii", errors="replace").split() if path.name.isdigit() else []
            if words and words[0] in runs:
                size = int(words[1]) if len(words) > 1 and words[1].isdigit() else 1
                taken.append(range(int(path.name), int(path.name) + size))
        return taken

    @contextmanager
    def hold(self, uid: int, account: bool) -> Iterator[bool]:
        """Keep the id from being leased as long as the block runs; False when it is leased, or has a lease that is not finished."""
        names: list[tuple[str, Any]] = [("map", struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, uid, 1, 0))]
        held = []
        try:
            if account:
                names.insert(0, (str(uid), None))
            for name, part in names:
                held.append(os.open(f"{self.directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
                if part is None:
                    fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    fcntl.fcntl(held[-1], fcntl.F_OFD_SETLK, part)
            free = not any(uid in taken for taken in self.claimed())
        except (BlockingIOError, PermissionError):
            free = False
        try:
            yield free
        finally:
            for fd in held:
                os.close(fd)
