"""Puts a compiled policy in force: ``<policy dir>/<n>/`` beside the earlier ones, then one atomic move of the link ``current``."""

from __future__ import annotations

import fcntl
import json
import marshal
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nodewrap import profiles, seccomp

#: Generations kept besides the one in force.
KEEP = 5
CURRENT = "current"


class InstallError(Exception):
    """Nothing was changed; the text is one line."""


def generations(directory: str) -> list[int]:
    """Numbers of the complete generations in ``directory``, oldest first."""
    try:
        found = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in found if name.isascii() and name.isdigit())


def current(directory: str) -> int:
    """The generation in force, 0 when there is none."""
    try:
        target = os.readlink(os.path.join(directory, CURRENT))
    except FileNotFoundError:
        return 0
    return int(target) if target.isdigit() else 0


def install(directory: str, policy: dict[str, Any]) -> int:
    """Writes ``policy`` as a new generation, makes it current, drops the oldest beyond KEEP. Returns its number.

    Everything is on disk before its name is: a crash at any point leaves the old policy in force. Raises OSError, InstallError, ProfileError.
    """
    if not os.path.isdir(directory):
        os.makedirs(directory)
        os.chmod(directory, 0o755)  # noqa: S103  for the policy child, as in _fill
    with _locked(directory):
        number = max([*generations(directory), current(directory)], default=0) + 1
        staged = os.path.join(directory, f".new.{number}")
        if os.path.lexists(staged):  # of an apply that was killed
            shutil.rmtree(staged)
        os.mkdir(staged)
        _fill(staged, policy)
        os.rename(staged, os.path.join(directory, str(number)))
        _sync(directory)
        _point(directory, number)
        _prune(directory, number)
    return number


def rollback(directory: str, number: int = 0) -> int:
    """Makes generation ``number`` current, or the one before the current. Returns it. Raises InstallError when it is not there."""
    with _locked(directory):
        known = generations(directory)
        wanted = number or max((n for n in known if n < current(directory)), default=0)
        if wanted not in known:
            have = ", ".join(map(str, known)) or "none"
            raise InstallError(f"NW-POLICY-ROLLBACK: {directory} has no generation {wanted or 'before the current one'} (has {have}); next: name one")
        _point(directory, wanted)
    return wanted


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """One writer at a time; the lock ends with the descriptor, however this process ends."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _fill(directory: str, policy: dict[str, Any]) -> None:
    """All files of one generation, readable by the policy child, synced."""
    _write(directory, "policy.bin", marshal.dumps(policy))
    _write(directory, "policy.json", json.dumps(policy, sort_keys=True, indent=1).encode() + b"\n")
    _write(directory, "profiles", profiles.render(policy["profiles"]).encode())
    seccomp.compile_all(policy["profiles"], directory)
    for name, numbers in profiles.networks(policy["profiles"]).items():
        _write(directory, name, numbers)
    for name in os.listdir(directory):
        os.chmod(os.path.join(directory, name), 0o644)
        _sync(os.path.join(directory, name))
    os.chmod(directory, 0o755)  # noqa: S103  the policy child, another user, reads here, whatever the umask of root was
    _sync(directory)


def _write(directory: str, name: str, data: bytes) -> None:
    with open(os.path.join(directory, name), "xb") as file:
        file.write(data)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _point(directory: str, number: int) -> None:
    """rename(2) replaces the link in one step: a reader sees the old generation or the new one, never none."""
    staged = os.path.join(directory, ".current.new")
    if os.path.lexists(staged):
        os.unlink(staged)
    os.symlink(str(number), staged)
    os.rename(staged, os.path.join(directory, CURRENT))
    _sync(directory)


def _prune(directory: str, number: int) -> None:
    for old in [n for n in generations(directory) if n != number][:-KEEP]:
        shutil.rmtree(os.path.join(directory, str(old)))


