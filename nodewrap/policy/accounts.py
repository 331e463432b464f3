"""Target accounts of mode ``switch``, looked up once, when the policy is compiled, and refused where they would give more than a user has."""

from __future__ import annotations

import grp
import os
import pwd
import re
from typing import Any

#: Ids below this belong to the system (login.defs of every distribution we know; csrc/guard.c refuses them again).
FIRST_ID = 1000
LAST_ID = 2**31 - 1
#: Bounds of one decision (csrc/decision.h: NW_ACCOUNTS, NW_GROUPS).
MOST, MOST_GROUPS = 512, 32
CALLERS = "nodewrap-callers"
#: Groups that amount to root or to other people's data, whatever number they have.
POWERFUL = frozenset((
    "root", "adm", "admin", "bin", "crontab", "daemon", "disk", "docker", "incus", "incus-admin", "input", "kmem", "kvm", "libvirt", "libvirt-qemu",
    "lxd", "mem", "nodewrap", "podman", "shadow", "slurm", "ssl-cert", "staff", "sudo", "sys", "systemd-journal", "tape", "tty", "utmp", "wheel",
    CALLERS,
))


class AccountError(Exception):
    """Why an account cannot be a target; the text is one line."""


def lookup(name: str) -> dict[str, Any]:
    """``{"name", "uid", "gid", "groups", "home"}`` of a local account. Raises AccountError when it does not exist or must not be a target."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise AccountError(f"account {name!r} does not exist on this node; next: create it, or correct the name") from None
    groups = sorted(set(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    _refuse_ids(name, entry.pw_uid, groups)
    _refuse_groups(name, groups)
    if not re.fullmatch(r"/[!-~]*", entry.pw_dir):
        raise AccountError(f"account {name!r} has home {entry.pw_dir!r}; next: give it an absolute path without blanks")
    return {"name": entry.pw_name, "uid": entry.pw_uid, "gid": entry.pw_gid, "groups": groups, "home": entry.pw_dir}


def _refuse_ids(name: str, uid: int, groups: list[int]) -> None:
    if not FIRST_ID <= uid <= LAST_ID or uid == 65534:
        raise AccountError(f"account {name!r} has uid {uid}, which is not a user's ({FIRST_ID} and up, not 65534); next: use another account")
    for gid in groups:
        if not FIRST_ID <= gid <= LAST_ID or gid == 65534:
            raise AccountError(f"account {name!r} is in group {group_name(gid)}, a system group; next: take it out, or use another account")


def _refuse_groups(name: str, groups: list[int]) -> None:
    if len(groups) > MOST_GROUPS:
        raise AccountError(f"account {name!r} is in {len(groups)} groups, the launcher takes {MOST_GROUPS}; next: take it out of some")
    for gid in groups:
        if group_name(gid) in POWERFUL:
            raise AccountError(f"account {name!r} is in group {group_name(gid)}, which gives more than a user has; next: take it out")


def group_name(gid: int) -> str:
    """Of that number; the number itself where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def with_prefix(prefix: str) -> list[str]:
    """All local accounts named ``prefix`` and digits, sorted: the classic pool."""
    return sorted(entry.pw_name for entry in pwd.getpwall() if re.fullmatch(re.escape(prefix) + r"[0-9]+", entry.pw_name))


def expand(pattern: str) -> list[str]:
    """``wn[01-03]`` as ``wn01 wn02 wn03``; a first number with leading zeros sets the width. No brackets: the name itself.

    Raises ValueError for a range that runs backwards or holds more than 10,000 names.
    """
    found = re.fullmatch(r"([^\[\]]*)\[(\d{1,9})-(\d{1,9})\]([^\[\]]*)", pattern)
    if not found:
        return [pattern]
    first, last = int(found[2]), int(found[3])
    if not 0 <= last - first < 10_000:
        raise ValueError(f"range {pattern!r} is empty or has more than 10000 names; next: write the smaller number first, or split it")
    return [f"{found[1]}{number:0{len(found[2])}d}{found[4]}" for number in range(first, last + 1)]
