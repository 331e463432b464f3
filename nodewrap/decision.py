"""A DECISION as the launcher reads and bounds it (docs/wire.md, docs/guard.md): the Python twin of ``csrc/decision.c`` and ``csrc/check.c``.

The launcher alone decides; this twin exists to disagree. Differential tests feed both the same bytes and the same guard, and whatever one accepts and
the other refuses, or reads otherwise, is a mistake in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nodewrap import wire
from nodewrap.guard import MODES, Guard, Range

SAY, PERMIT, DENY, MISTAKE, ERROR = range(5)
RESOURCES = 16  # RLIM_NLIMITS of <sys/resource.h>
RUN_LIMITS = range(32, 43)  # enum nw_limit_kind
MAX_FILE, MAX_BLOCK, MAX_INSIDE, MAX_GRACE_MS = 65536, 65536, 2**31 - 1, 600_000
#: What a child may set in a record (docs/wire.md); True: may repeat.
FACTS = {
    **dict.fromkeys(("subject.dn", "subject.issuer", "subject.sub", "subject.vo", "subject.assurance", "subject.serial", "subject.expires"), False),
    **dict.fromkeys(("subject.credential", "rule.name", "rule.ruleset", "policy.digest", "declared.subject", "declared.vo"), False),
    **dict.fromkeys(("declared.job_id", "declared.id", "args.sha256", "reason", "caller.name"), False),
    **dict.fromkeys(("declared.image", "image.path", "image.kind", "image.digest", "image.file", "image.runtime"), False),
    **dict.fromkeys(("subject.fqan", "declared.fqan", "note"), True),
}


class DecisionError(ValueError):
    """code: ``NW-CHILD`` when the bytes are no DECISION, ``NW-GUARD`` when what they say leaves the guard."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


# ---- what it says: names as in csrc/decision.h, strings as bytes, absent ones None ----


@dataclass
class Account:
    uid: int = 0
    gid: int = 0
    group: list[int] = field(default_factory=list)
    name: bytes | None = None
    home: bytes | None = None
    set: list[bytes] = field(default_factory=list)


@dataclass
class Mapping:
    inside_uid: int = 0
    inside_gid: int = 0
    size: int = 0
    first: int = 0
    count: int = 0


@dataclass
class Limit:
    resource: int = 0
    value: int = 0
    must: bool = False


@dataclass
class File:
    path: bytes = b""
    content: bytes = b""
    mode: int = 0
    temporary: bool = False


@dataclass
class Fact:
    key: bytes = b""
    value: bytes = b""


@dataclass
class Decision:
    """mode: "" when absent. status_fd: -1 when absent. A list holds what may repeat, and ``map``, which has room for one."""

    verdict: int = SAY
    exit: int = 0
    code: bytes | None = None
    text: bytes | None = None
    mode: str = ""
    profile: bytes | None = None
    account: list[Account] = field(default_factory=list)
    exclusive: bool = False
    map: list[Mapping] = field(default_factory=list)
    workdir: bytes | None = None
    cwd: bytes | None = None
    expose: list[bytes] = field(default_factory=list)
    argv_from: int = 0
    search: bool = False
    keep: list[int] = field(default_factory=list)
    set: list[bytes] = field(default_factory=list)
    wall_ms: int = 0
    grace_ms: int = 0
    limit: list[Limit] = field(default_factory=list)
    status_fd: int = -1
    file: list[File] = field(default_factory=list)
    fact: list[Fact] = field(default_factory=list)
    umask: int = 0o077
    alarm: bool = False
    syslog: bytes | None = None
    before: list[bytes] = field(default_factory=list)
    image: bool = False


# ---- reading ----

#: tag: (name, how a value is read, how many there is room for: 0 for a field that stands once)
Table = dict[int, tuple[str, Callable[[bytes], Any], int]]


def _up_to(highest: int) -> Callable[[bytes], int]:
    def read(value: bytes) -> int:
        number = wire.integer(value)
        if number > highest:
            raise ValueError(f"{number} is more than {highest}")
        return number

    return read


def _text(longest: int) -> Callable[[bytes], bytes]:
    def read(value: bytes) -> bytes:
        if len(value) > longest or b"\0" in value:
            raise ValueError(f"a string of more than {longest} bytes, or with NUL")
        return value

    return read


def _flag(value: bytes) -> bool:
    return _up_to(1)(value) == 1


def _mode(value: bytes) -> str:
    return MODES[[mode.encode() for mode in MODES].index(value)]


def _version(value: bytes) -> None:
    if wire.integer(value) != 1:
        raise ValueError("another version")


def _struct(made: Callable[[], Any], table: Table, needed: set[int]) -> Callable[[bytes], Any]:
    return lambda value: _fill(made(), value, table, needed)


_id, _u64 = _up_to(2**32 - 1), _up_to(2**64 - 1)
_ACCOUNT: Table = {
    1: ("uid", _id, 0), 2: ("gid", _id, 0), 3: ("group", _id, 32), 4: ("name", _text(255), 0), 5: ("home", _text(255), 0), 6: ("set", _text(4096), 4),
}
_MAP: Table = {tag: (name, _id, 0) for tag, name in enumerate(("inside_uid", "inside_gid", "size", "first", "count"), 1)}
_LIMIT: Table = {1: ("resource", _id, 0), 2: ("value", _u64, 0), 3: ("must", _flag, 0)}
_FILE: Table = {1: ("path", _text(4095), 0), 2: ("content", bytes, 0), 3: ("mode", _id, 0), 4: ("temporary", _flag, 0)}
_FACT: Table = {1: ("key", _text(64), 0), 2: ("value", _text(4096), 0)}
_DECISION: Table = {
    1: ("", _version, 0), 2: ("verdict", _up_to(ERROR), 0), 3: ("exit", _up_to(255), 0), 4: ("code", _text(31), 0), 5: ("text", _text(65536), 0),
    6: ("mode", _mode, 0), 7: ("profile", _text(31), 0), 8: ("account", _struct(Account, _ACCOUNT, {1, 2, 4}), 512), 9: ("exclusive", _flag, 0),
    10: ("map", _struct(Mapping, _MAP, {1, 2, 3}), 1), 11: ("workdir", _text(4095), 0), 12: ("cwd", _text(4095), 0), 13: ("expose", _text(4095), 16),
    14: ("argv_from", _u64, 0), 15: ("search", _flag, 0), 16: ("keep", _id, 4096), 17: ("set", _text(131072), 512), 18: ("wall_ms", _u64, 0),
    19: ("grace_ms", _u64, 0), 20: ("limit", _struct(Limit, _LIMIT, {1, 2}), 20), 21: ("status_fd", _up_to(255), 0),
    22: ("file", _struct(File, _FILE, {1, 2, 3, 4}), 4), 23: ("fact", _struct(Fact, _FACT, {1, 2}), 160), 24: ("umask", _id, 0),
    26: ("alarm", _flag, 0), 27: ("syslog", _text(4096), 0), 28: ("before", _text(4095), 128), 29: ("image", _flag, 0),
}


def _fill(made: Any, body: bytes, table: Table, needed: set[int]) -> Any:
    seen = set()
    for tag, value in wire.unpack(body):
        name, read, room = table[tag]
        found = read(value)
        if room and len(getattr(made, name)) < room:
            getattr(made, name).append(found)
        elif room or tag in seen:
            raise ValueError(f"field {tag} stands too often")
        elif name:
            setattr(made, name, found)
        seen.add(tag)
    if not needed <= seen:
        raise ValueError(f"fields {sorted(needed - seen)} are missing")
    return made


def decode(body: bytes) -> Decision:
    """The decision in these bytes. Raises DecisionError (NW-CHILD)."""
    try:
        found: Decision = _fill(Decision(), body, _DECISION, {1, 2})
        if any(fact.key.decode("latin-1") not in FACTS for fact in found.fact):
            raise ValueError("a fact that a child may not set")
        if found.verdict == PERMIT and (not found.mode or found.profile is None):
            raise ValueError("a permit without mode or profile")
    except (ValueError, KeyError, wire.WireError) as wrong:
        raise DecisionError("NW-CHILD", str(wrong)) from None
    return found


# ---- bounds ----


def _within(ranges: tuple[Range, ...], number: int) -> bool:
    return any(found.first <= number <= found.last for found in ranges)


def _is_path(path: bytes | None) -> bool:
    return path is None or (path.startswith(b"/") and b".." not in path.split(b"/"))


def _account_fits(account: Account, guard: Guard, caller: int) -> bool:
    groups = all(_within(guard.switch_gid, gid) for gid in (account.gid, *account.group))
    return groups and _within(guard.switch_uid, account.uid) and account.uid != caller and _is_path(account.home)


def _map_fits(block: Mapping, guard: Guard, privileged: bool) -> bool:
    inside = (block.inside_uid, block.inside_gid)
    highest = MAX_INSIDE if block.size == 1 else block.size - 1
    if not 1 <= block.size <= MAX_BLOCK or not all(1 <= number <= min(highest, MAX_INSIDE) for number in inside):
        return False
    if privileged:
        return not block.first and not block.count and bool(guard.map_uid)
    return not block.count or block.count >= block.size


def _identity_fits(decision: Decision, guard: Guard, privileged: bool, caller: int) -> bool:
    if decision.mode == "switch":
        one = len(decision.account) == 1 or (bool(decision.account) and decision.exclusive)
        return privileged and one and not decision.map and all(_account_fits(account, guard, caller) for account in decision.account)
    if decision.account or decision.exclusive:
        return False
    if decision.mode == "map":
        return bool(decision.map) and _map_fits(decision.map[0], guard, privileged)
    return not decision.map


def _rest_fits(decision: Decision, args: int, envs: int) -> bool:
    paths = [*decision.expose, *(file.path for file in decision.file), decision.workdir, decision.cwd]
    return (
        (decision.argv_from < args or (decision.argv_from == args and bool(decision.file)))
        and all(index < envs for index in decision.keep)
        and all(map(_is_path, [*paths, *decision.before[:1]]))
        and all(len(file.content) <= MAX_FILE and not file.mode & ~0o700 for file in decision.file)
        and all(limit.resource < RESOURCES or limit.resource in RUN_LIMITS for limit in decision.limit)
        and not decision.umask & ~0o777 and decision.grace_ms <= MAX_GRACE_MS and decision.status_fd != 0
    )


def check(decision: Decision, guard: Guard, privileged: bool, caller: int, args: int, envs: int) -> None:
    """May this caller (uid), with that many arguments and environment entries, be given this? Raises DecisionError (NW-GUARD)."""
    if decision.verdict != PERMIT:
        return
    if (decision.profile or b"").decode("latin-1") not in guard.allow.get(decision.mode, ()):
        raise DecisionError("NW-GUARD", "this mode with this profile is not on an allow line")
    if not _identity_fits(decision, guard, privileged, caller):
        raise DecisionError("NW-GUARD", "the identity leaves the guard")
    if not _rest_fits(decision, args, envs):
        raise DecisionError("NW-GUARD", "a path, index, limit or descriptor is out of bounds")
