"""Leases (docs/lease.md): the Python twin of ``csrc/leasefile.c``, and the list of those of a site.

The twin exists to disagree, as that of the guard does. `ps`, `kill` and `sweep --deep` read leases with it; none of them writes or removes one.
What comes from the file system is ``str`` with surrogate escapes for bytes that are not UTF-8 (os.fsdecode).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nodewrap.decision import FACTS
from nodewrap.guard import MAX_LINES, MODES, GuardError, Words, _number, _words

VERSION, NEWLINE = "2", b"\n"
MAX_BYTES, MAX_WORD = 262144, 900  # of a lease; of an encoded word
MAX_FILES, MAX_FACTS = 4, 160
MAX_PID, MAX_32, MAX_64 = (1 << 31) - 1, (1 << 32) - 1, (1 << 64) - 1
HOWS = ("plain", "idmap", "chown")
PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-:=,@+")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
NAME = re.compile(r".{36}\.lease", re.S)


class LeaseError(ValueError):
    """Why a file is no lease that can be relied on; one line without the file's name."""


class Process(NamedTuple):
    """One process of one boot: pid, and its start in clock ticks since boot (field 22 of /proc/PID/stat)."""

    pid: int
    ticks: int


class Launcher(NamedTuple):
    """The launcher's name and its front process."""

    name: str
    pid: int
    ticks: int


class Pilot(NamedTuple):
    """Who called: ids, and the process that did."""

    uid: int
    gid: int
    pid: int


class Ids(NamedTuple):
    uid: int
    gid: int


class Block(NamedTuple):
    """``size`` ids from ``first``."""

    first: int
    size: int


class Mode(NamedTuple):
    name: str
    profile: str


class Work(NamedTuple):
    """The work directory: how it was handed over; device, inode, time of birth in nanoseconds since 1970 (0: unknown)."""

    how: str
    dev: int
    ino: int
    btime: int


class Handle(NamedTuple):
    """The number that the file system gave the work directory (name_to_handle_at(2)): type, and its bytes in hexadecimal."""

    type: int
    bytes: str


@dataclass
class Lease:
    """One run's lease; a line of docs/lease.md each. time: microseconds since 1970. A line that is absent: None, "", or no entry."""

    run: str
    boot: str
    time: int
    launcher: Launcher
    pilot: Pilot
    mode: Mode
    id: Ids
    inside: Ids
    block: Block
    account: str | None = None
    lock: int | None = None
    cgroup: str | None = None
    disk: str | None = None
    work: Work | None = None
    handle: Handle | None = None
    path: str = ""
    files: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    keeper: Process | None = None
    init: Process | None = None
    session: int | None = None
    address: int | None = None
    starting: bool = False

    @property
    def front(self) -> Process:
        """The front process."""
        return Process(self.launcher.pid, self.launcher.ticks)

    def fact(self, *keys: str) -> str:
        """The value of the first of these facts that is there, else ""."""
        return next((value for key in keys for name, value in self.facts if name == key), "")


# ---- words ----


def _encoded(key: str, value: bytes) -> tuple[str, bytes]:
    """A line with as much of the value as fits into one word; the rest of the value."""
    word, at = "", 0
    while at < len(value) and len(word) + 3 <= MAX_WORD:
        word += chr(value[at]) if value[at] in PLAIN else f"%{value[at]:02X}"
        at += 1
    return f"{key} {word or '%'}\n", value[at:]


def _decoded(word: str) -> str:
    """Only what is written by ``_encoded`` is taken: no byte has two forms."""
    if word == "%":
        return ""
    found = bytearray()
    for plain, escaped in re.findall(r"([^%])|%([0-9A-F]{2}|)", word):
        byte = ord(plain) if plain else int(escaped or "0", 16)
        if byte == 0 or (byte in PLAIN) != bool(plain):
            raise ValueError
        found.append(byte)
    return os.fsdecode(bytes(found))


def _uuid(word: str) -> str:
    return _one_of(word, [word] if UUID.fullmatch(word) else [])


def _one_of(word: str, known: Container[str]) -> str:
    if word not in known:
        raise ValueError
    return word


def _pid(word: str) -> int:
    pid = _number(word, MAX_PID)
    if pid == 0:  # kill(2) takes 0 for a whole group
        raise ValueError
    return pid


def _32(word: str) -> int:
    return _number(word, MAX_32)


def _64(word: str) -> int:
    return _number(word, MAX_64)


def _mode(word: str) -> str:
    return _one_of(word, MODES)


def _how(word: str) -> str:
    return _one_of(word, HOWS)


def _fact(word: str) -> str:
    return _one_of(word, FACTS)


def _pair(key: str, value: str) -> tuple[str, str]:
    return key, value


# ---- a file ----

class Line(NamedTuple):
    """What makes a value of the words behind a line's first one, and how each of them is read."""

    make: Callable[..., Any]
    read: tuple[Callable[[str], Any], ...] = ()


#: In the order in which they are written; those of AFTER behind "ready".
BEFORE = {
    "run": Line(str, (_uuid,)), "boot": Line(str, (_uuid,)), "time": Line(int, (_64,)), "launcher": Line(Launcher, (str, _pid, _64)),
    "pilot": Line(Pilot, (_32, _32, _32)), "mode": Line(Mode, (_mode, str)), "id": Line(Ids, (_32, _32)), "inside": Line(Ids, (_32, _32)),
    "block": Line(Block, (_32, _32)), "account": Line(str, (_decoded,)), "lock": Line(int, (_32,)), "cgroup": Line(str, (_decoded,)),
    "disk": Line(str, (_decoded,)),
    "work": Line(Work, (_how, _64, _64, _64)), "handle": Line(Handle, (_32, _decoded)), "path": Line(str, (_decoded,)),
    "file": Line(str, (_decoded,)), "fact": Line(_pair, (_fact, _decoded)), "ready": Line(bool),
}
AFTER = {"keeper": Line(Process, (_pid, _64)), "init": Line(Process, (_pid, _64)), "session": Line(int, (_32,)), "address": Line(int, (_32,)),
         "starting": Line(lambda: True)}
MANY = {"path": MAX_LINES, "file": MAX_FILES, "fact": MAX_FACTS}
NEEDED = ("run", "boot", "time", "launcher", "pilot", "mode", "id", "inside", "block", "ready")


def parse(data: bytes) -> Lease:
    """The lease in these bytes. Raises LeaseError."""
    found: dict[str, list[Any]] = {}
    path_line = 0
    for number, words in _lines(data):
        key, known = words[0], AFTER if "ready" in found else BEFORE
        if key not in BEFORE and key not in AFTER:
            raise LeaseError(f"line {number}: an unknown word")
        if key not in known or (key in found and key not in MANY):
            raise LeaseError(f"line {number}: out of place")
        values, torn = found.setdefault(key, []), key == "path" and (path_line not in (0, number - 1) or words[1:] == ["%"])
        if len(words) != len(known[key].read) + 1:
            raise LeaseError(f"line {number}: not the right number of words")
        try:
            values.append(known[key].make(*(read(word) for read, word in zip(known[key].read, words[1:]))))
        except ValueError:
            torn = True
        if torn or len(values) > MANY.get(key, 1):
            raise LeaseError(f"line {number}: a bad value")
        path_line = number if key == "path" else path_line
    if not found.keys() >= set(NEEDED):
        raise LeaseError(f"line {data.count(NEWLINE)}: not complete")
    return _lease(found)


def _lease(found: dict[str, list[Any]]) -> Lease:
    """The lease of what stood on its lines. The parts of a path are joined as bytes: a cut may lie inside a character."""
    singles = {key: values[0] for key, values in found.items() if key not in MANY and key != "ready"}
    path = os.fsdecode(b"".join(os.fsencode(part) for part in found.get("path", [])))
    return Lease(**singles, path=path, files=found.get("file", []), facts=found.get("fact", []))


def _lines(data: bytes) -> Iterator[tuple[int, Words]]:
    """The lines behind the first one, which says what the file is."""
    lines = _words(data)
    try:
        number, words = next(lines, (data.count(NEWLINE), [""]))
        if words[0] != "nodewrap-lease":
            raise LeaseError(f"line {number}: not a lease")
        if words[1:] != [VERSION]:
            raise LeaseError(f"line {number}: a lease of another version of nodewrap")
        yield from lines
    except GuardError as wrong:
        raise LeaseError(f"line {wrong.line or MAX_LINES + 1}: not a line of words") from None


def _put(lease: Lease, key: str, value: Any, next_to_path: bool) -> None:
    """One line's value to its place. The parts of a path are joined, and stand on lines one behind the other."""
    if key == "path":
        if not next_to_path:
            raise ValueError
        lease.path = os.fsdecode(os.fsencode(lease.path) + os.fsencode(value))
    elif key in MANY:
        found: list[Any] = lease.files if key == "file" else lease.facts
        if len(found) == (MAX_FILES if key == "file" else MAX_FACTS):
            raise ValueError
        found.append(value)
    elif key != "ready":
        setattr(lease, key, value)


def render(lease: Lease) -> bytes:
    """The text of a lease up to "ready", as the launcher writes it; values that do not fit into a word are cut, a path takes several."""
    text = f"nodewrap-lease {VERSION}\n"
    for key, value in (*_singles(lease), *_values(lease)):
        if isinstance(value, str):
            line, rest = _encoded(key, os.fsencode(value))
            text += line
            while key == "path" and rest:
                line, rest = _encoded(key, rest)
                text += line
        else:
            text += " ".join([key, *map(str, value)]) + "\n"
    return text.encode("ascii") + b"ready\n"


def _singles(lease: Lease) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for key in NEEDED[:-1]:
        value = getattr(lease, key)
        yield key, value if isinstance(value, tuple) else (value,)


def _values(lease: Lease) -> Iterator[tuple[str, Any]]:
    """Lines that need not be there, those with encoded words as str."""
    if lease.account is not None:
        yield "account", lease.account
    if lease.lock is not None:
        yield "lock", (lease.lock,)
    if lease.cgroup is not None:
        yield "cgroup", lease.cgroup
    if lease.disk is not None:
        yield "disk", lease.disk
    if lease.work is not None:
        yield "work", lease.work
    if lease.handle is not None:
        yield f"handle {lease.handle.type}", lease.handle.bytes
    if lease.path:
        yield "path", lease.path
    yield from (("file", file) for file in lease.files)
    yield from ((f"fact {key}", value) for key, value in lease.facts)


# ---- the leases of a site ----


@dataclass
class Found:
    """One file of the lease directory. lease: None when it is empty, or "error" says why it cannot be relied on.

    alive: somebody holds its lock. writing: and has not written all of it yet.
    """

    name: str
    lease: Lease | None
    alive: bool
    error: str = ""
    writing: bool = False

    @property
    def run(self) -> str:
        """The run's id, by the file's name."""
        return self.name[:36]


def alive(file: int) -> bool:
    """Whether somebody holds the lock of this open lease. Shared and let go at once: two that look do not see each other.

    Never for an empty file: its launcher is about to take the lock, and must not find it taken.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def leases(directory: str, owner: int) -> list[Found]:
    """The leases of a directory, oldest first (ids sort by time). owner: whose they must be. Raises OSError when it cannot be read."""
    found = []
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in sorted(filter(NAME.fullmatch, os.listdir(top))):
            one = _look(top, name, owner)
            found += [one] if one else []
    finally:
        os.close(top)
    return found


def _look(top: int, name: str, owner: int) -> Found | None:
    """None when it went away meanwhile."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=top)
    except FileNotFoundError:
        return None
    except OSError as wrong:
        return Found(name, None, False, f"cannot be opened: {wrong.strerror}")
    try:
        return _read(file, name, owner)
    finally:
        os.close(file)


def _read(file: int, name: str, owner: int) -> Found | None:
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode):
        return Found(name, None, False, "is no regular file")
    if info.st_uid != owner or info.st_mode & 0o077:
        return Found(name, None, False, f"belongs to uid {info.st_uid} and has mode {info.st_mode & 0o7777:04o}, not to {owner} with 0600")
    data = os.read(file, MAX_BYTES + 1)
    if not data:
        return Found(name, None, False)
    held = alive(file)
    if os.fstat(file).st_nlink == 0:  # ended while we looked
        return None
    try:
        if len(data) > MAX_BYTES:
            raise LeaseError(f"longer than {MAX_BYTES} bytes")
        lease = parse(data[: data.rfind(NEWLINE) + 1])  # a death within an appended line: that one was not written
        if f"{lease.run}.lease" != name:
            raise LeaseError(f"says that it is run {lease.run}")
    except LeaseError as wrong:
        return Found(name, None, held, str(wrong), held and b"\nready\n" not in data)
    return Found(name, lease, held)
