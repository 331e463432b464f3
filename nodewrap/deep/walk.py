"""A tree, entry by entry, by descriptors: no link is followed, no mount is entered, and no depth is too deep.

One directory is open at a time; the way up is "..", which is believed only when it is the directory that was left (somebody may move what is walked).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATH_MAX = 4096  # linux/limits.h
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass
class Entry:
    """name in the open directory dir, valid until the next entry is asked for. depth: 1 in the top itself.

    after: it is a directory, and comes a second time, when all below it has been walked. error: why it could not be entered. skip: set to stay out.
    """

    dir: int
    name: str
    depth: int
    stat: os.stat_result
    walk: Walk
    after: bool = False
    error: str = ""
    skip: bool = False

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.stat.st_mode)

    @property
    def path(self) -> str:
        """From the top, for people: longer than any path that the kernel would take, when the tree is."""
        return "/".join([self.walk.path, *(level.name for level in self.walk.levels[1:self.depth]), self.name])


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
    """A directory on the way down: which one it is, what of it is still to be walked, and the entry that it is (None: the top).

    path: "" when it is too long to be a mount point's. Whole paths of a deep tree would take as much memory as its depth squared.
    """

    identity: tuple[int, int]
    names: list[str]
    entry: Entry | None
    path: str

    @property
    def name(self) -> str:
        return self.entry.name if self.entry else ""


class Walk:
    """Walks what is below top, a directory's descriptor, which stays the caller's. mend: make our own directories enterable that are not."""

    def __init__(self, top: int, path: str, mend: bool = False, mounts: frozenset[str] = frozenset()) -> None:
        self.top, self.path, self.mend, self.mounts = top, path, mend, mounts
        self.mount = mount_id(top)
        self.now = -1
        self.levels: list[_Level] = []

    def __iter__(self) -> Iterator[Entry]:
        """Every entry; directories that are entered before and after what is in them. Raises MovedError."""
        self.levels = []
        try:
            self._enter(os.dup(self.top), None, self.path)
            while self.levels:
                if self.levels[-1].names:
                    yield from self._next(self.levels[-1])
                else:
                    yield from self._leave()
        finally:
            if self.now >= 0:
                os.close(self.now)
                self.now = -1

    def _enter(self, fd: int, entry: Entry | None, path: str) -> None:
        if self.now >= 0:
            os.close(self.now)
        self.now = fd
        info = os.fstat(fd)
        names = sorted(os.listdir(fd), reverse=True)
        self.levels.append(_Level((info.st_dev, info.st_ino), names, entry, path if len(path) < PATH_MAX else ""))

    def _next(self, level: _Level) -> Iterator[Entry]:
        name = level.names.pop()
        path = f"{level.path}/{name}" if level.path else ""
        if path in self.mounts:
            return
        try:
            entry = Entry(self.now, name, len(self.levels), os.stat(name, dir_fd=self.now, follow_symlinks=False), self)
        except FileNotFoundError:
            return
        fd = self._open(entry) if entry.is_dir else -1
        yield entry
        if fd >= 0 and not entry.skip:
            self._enter(fd, entry, path)
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

    def _leave(self) -> Iterator[Entry]:
        left = self.levels.pop()
        if not self.levels or left.entry is None:
            return
        up = os.open("..", DIRECTORY, dir_fd=self.now)
        info = os.fstat(up)
        os.close(self.now)
        self.now = up
        if (info.st_dev, info.st_ino) != self.levels[-1].identity:
            raise MovedError(left.entry.path)
        left.entry.after, left.entry.dir = True, up
        yield left.entry
