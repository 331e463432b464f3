"""What this node's own files say: guard, applied policy, profiles, accounts. Read once; what could not be read is kept as its reason."""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass, field
from typing import Any

from nodewrap import _paths, profiles
from nodewrap.guard import Guard, GuardError, Profile, parse_guard, parse_profiles
from nodewrap.policy import store
from nodewrap.policy.positions import toml

NOBODY = 65534


@dataclass
class Node:
    """guard, policy: None when they cannot be read, and why is in guard_error, policy_error. caller: (uid, gid) of an ordinary caller."""

    workdir: str
    root: bool = False
    caller: tuple[int, int] = (NOBODY, NOBODY)
    guard: Guard | None = None
    guard_error: str = ""
    policy: dict[str, Any] | None = None
    policy_error: str = ""
    profiles: dict[str, Profile] = field(default_factory=dict)
    profiles_from: str = ""

    @property
    def current(self) -> str:
        """Directory of the applied policy."""
        return self.guard.policy if self.guard else f"{_paths.STATEDIR}/policy/current"


def look(workdir: str, guard_path: str = _paths.GUARD) -> Node:
    """The node as it is now. workdir: a directory on the file system where payloads work."""
    node = Node(workdir, os.geteuid() == 0 and unmapped() < 0)  # root of a container is a caller like others
    _read_guard(node, guard_path)
    node.caller = _caller(node)
    _read_policy(node)
    _read_profiles(node)
    return node


def _read_guard(node: Node, path: str) -> None:
    try:
        with open(path, "rb") as file:
            node.guard = parse_guard(file.read())
    except (OSError, GuardError) as wrong:
        node.guard_error = f"{path}: {wrong.strerror if isinstance(wrong, OSError) else wrong}"


def _caller(node: Node) -> tuple[int, int]:
    return ordinary_caller(node.guard) if node.root else (os.getuid(), os.getgid())


def ordinary_caller(guard: Guard | None) -> tuple[int, int]:
    """uid and gid of somebody without privilege that the guard lets call: an account in its first ranges, else nobody."""
    for bounds in guard.caller_uid if guard else ():
        for entry in pwd.getpwall():
            if bounds.first <= entry.pw_uid <= bounds.last:
                return entry.pw_uid, entry.pw_gid
    return NOBODY, NOBODY


def _read_policy(node: Node) -> None:
    try:
        node.policy = store.load(f"{node.current}/policy.bin")
    except FileNotFoundError:
        node.policy_error = f"{node.current} has no policy"
    except (OSError, ValueError) as wrong:
        node.policy_error = str(wrong)


def _read_profiles(node: Node) -> None:
    """Of the applied policy; else the shipped ones, so that a new node can be looked at before it has a policy."""
    try:
        with open(f"{node.current}/profiles", "rb") as file:
            node.profiles, node.profiles_from = parse_profiles(file.read()), "the applied policy"
    except (OSError, GuardError):
        node.profiles, node.profiles_from = _shipped()


def _shipped() -> tuple[dict[str, Profile], str]:
    for path in (f"{_paths.SYSCONFDIR}/profiles.toml", f"{_paths.SITE}/policies/profiles.toml"):
        try:
            with open(path, encoding="utf-8") as file:
                tables = toml.loads(file.read())["profile"]
        except FileNotFoundError:
            continue
        return parse_profiles(profiles.render(profiles.merge(tables, {})).encode()), path
    return {}, "nowhere"


def unmapped() -> int:
    """In a container the id of all that has none there, root's files among them: the userns launcher takes it for root (csrc/sys.c). Else -1."""
    with open("/proc/self/uid_map", encoding="ascii") as uid_map, open("/proc/sys/kernel/overflowuid", encoding="ascii") as overflow:
        return -1 if uid_map.readline().split()[2] == "4294967295" else int(overflow.read())


def distrust(path: str, owner: int = 0) -> str:
    """Why root must not rely on this path, "" when it may: every part belongs to root (or owner) and nobody else may write it.

    The launcher checks the same, by descriptor (csrc/path.c). Symbolic links are followed: their targets are looked at.
    """
    real = os.path.realpath(path)
    parts = [real[:at] or "/" for at, char in enumerate(real) if char == "/"] + [real]
    for part in parts:
        try:
            info = os.stat(part)
        except OSError as wrong:
            return f"{part}: {wrong.strerror}"
        if info.st_uid not in (0, owner, unmapped()):
            return f"{part} belongs to uid {info.st_uid}, not to root"
        if info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and info.st_gid != 0):
            return f"{part} is writable by others than root"
    return ""
