"""A tree, entry by entry, by descriptors: no link is followed, no mount is entered, and no depth is too deep.

One directory is open at a time; the way up is "..", which is believed only when it is the directory that was left (somebody may move what is walked).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass
class Entry:
    """name in the open directory dir, valid until the next entry is asked for. path: from the top, for people. depth: 1 in the top itself.

    after: it is a directory, and comes a second time, when all below it has been walked. error: why it could not be entered. skip: set to stay out.
    """

    dir: int
    name: str
    path: str
    depth: int
    stat: os.stat_result
    after: bool = False
    error: str = ""
    skip: bool = False

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.stat.st_mode)


class MovedError(Exception):
    """Somebody moved a directory that was being walked; the walk has ended."""


def mount_points() -> frozenset[str]:
    """Paths where something is mounted: looking at them would already ask what is mounted there, and a FUSE server may never answer."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return frozenset(unescaped(line.split()[4]) for line in lines)


def unescaped(word: str) -> str:
    """A word of mountinfo, in which blank, tab, newline and backslash are octal (proc(5))."""
    for octal, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(octal, char)
    return word


def mount_id(fd: int) -> str:
    """Which mount the descriptor is on: a device number alone does not tell bind mounts from each other."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(line for line in lines if line.startswith("mnt_id:"))


@dataclass
class _Level:
    """A directory on the way down: which one it is, what of it is still to be walked, and the entry that it is."""

    identity: tuple[int, int]
    names: list[str]
    entry: Entry | None


class Walk:
    """Walks what is below top, a directory's descriptor, which stays the caller's. mend: make our own directories enterable that are not."""

    def __init__(self, top: int, path: str, mend: bool = False, mounts: frozenset[str] = frozenset()) -> None:
        self.top, self.path, self.mend, self.mounts = top, path, mend, mounts
        self.mount = mount_id(top)
        self.now = -1

    def __iter__(self) -> Iterator[Entry]:
        """Every entry; directories that are entered before and after what is in them. Raises MovedError."""
        levels: list[_Level] = []
        try:
            self._enter(levels, os.dup(self.top), None)
            while levels:
                if levels[-1].names:
                    yield from self._next(levels)
                else:
                    yield from self._leave(levels)
        finally:
            if self.now >= 0:
                os.close(self.now)
                self.now = -1

    def _enter(self, levels: list[_Level], fd: int, entry: Entry | None) -> None:
        if self.now >= 0:
            os.close(self.now)
        self.now = fd
        info = os.fstat(fd)
        levels.append(_Level((info.st_dev, info.st_ino), sorted(os.listdir(fd), reverse=True), entry))

    def _next(self, levels: list[_Level]) -> Iterator[Entry]:
        name, above = levels[-1].names.pop(), levels[-1].entry
        path = f"{above.path if above else self.path}/{name}"
        if path in self.mounts:
            return
        try:
            entry = Entry(self.now, name, path, len(levels), os.stat(name, dir_fd=self.now, follow_symlinks=False))
        except FileNotFoundError:
            return
        fd = self._open(entry) if entry.is_dir else -1
        yield entry
        if fd >= 0 and not entry.skip:
            self._enter(levels, fd, entry)
        elif fd >= 0:
            os.close(fd)

    def _open(self, entry: Entry) -> int:
        """The directory, -1 when it is another mount's, or cannot be opened: then the entry says so."""
        place = -1
        try:
            place = os.open(entry.name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.dir)
            if mount_id(place) != self.mount:
                entry.error = "something is mounted on it"
                return -1
            if self.mend and entry.stat.st_mode & 0o700 != 0o700:
                os.chmod(f"/proc/self/fd/{place}", 0o700)
            return os.open(f"/proc/self/fd/{place}/.", DIRECTORY)
        except OSError as wrong:
            entry.error = wrong.strerror or "cannot be entered"
            return -1
        finally:
            if place >= 0:
                os.close(place)

    def _leave(self, levels: list[_Level]) -> Iterator[Entry]:
        left = levels.pop()
        if not levels or left.entry is None:
            return
        up = os.open("..", DIRECTORY, dir_fd=self.now)
        info = os.fstat(up)
        os.close(self.now)
        self.now = up
        if (info.st_dev, info.st_ino) != levels[-1].identity:
            raise MovedError(left.entry.path)
        left.entry.after, left.entry.dir = True, up
        yield left.entry
