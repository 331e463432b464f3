"""What a demonstration could leave on a machine, listed before and after: accounts, groups, mounts, files, IPC objects.

Tests and other demonstrations may run beside it: what carries the name of one of their sessions is theirs, and is not compared.
"""

from __future__ import annotations

import os
import pwd
import re
import threading
from collections.abc import Iterator
from pathlib import Path

ACCOUNT_FILES = ("passwd", "group", "subuid", "subgid")
PLACES = ("/opt", "/srv", "/var/lib", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run", "/var/mail", "/var/spool/mail", "/var/spool/cron")
OTHERS = re.compile(r"nwt[0-9a-f]{4}|nodewrap-test-|pytest-|nwdemo-|nodewrap-demo-")
#: In places that everybody uses, ours are: these names, and files whose owner has no account.
NAMES = re.compile(r"nodewrap|nwt[0-9a-f]{4}|nwdemo|x509up|gltmp")


def snapshot() -> dict[str, set[str]]:
    """{kind: names} of everything that a run could leave behind."""
    found = {f"/etc/{name}": set(_lines(f"/etc/{name}")) for name in ACCOUNT_FILES}
    found["mounts"] = {line.split()[4] for line in _lines("/proc/self/mountinfo")}
    places = [Path(place) for place in {*PLACES, str(Path.home())} if os.access(place, os.R_OK)]
    found["files"] = {str(path) for place in places for path in place.iterdir() if _ours(path)}
    found["IPC objects"] = {name for kind in ("msg", "sem", "shm") for name in _ipc(kind)}
    return found


def difference(before: dict[str, set[str]], after: dict[str, set[str]], mine: str) -> list[str]:
    """What is new or gone, one line each. mine: a name that is this demonstration's even though it looks like a test's."""
    changes = [(kind, "new", name) for kind in after for name in sorted(after[kind] - before[kind])]
    changes += [(kind, "gone", name) for kind in after for name in sorted(before[kind] - after[kind])]
    return [f"{kind}: {what} {name}" for kind, what, name in changes if mine in name or not OTHERS.search(name)]


def _ours(path: Path) -> bool:
    try:
        return bool(NAMES.search(path.name)) or not _has_account(path.lstat().st_uid)
    except FileNotFoundError:
        return False  # gone between the two looks


def _ipc(kind: str) -> set[str]:
    """Those that a payload can have made: of an id without an account, as the demonstration's are in the end, or, without root, of the caller's."""
    header, *rows = [line.split() for line in _lines(f"/proc/sysvipc/{kind}")] or [["uid"]]
    owner = header.index("uid")
    return {f"{kind} {row[1]}" for row in rows if not _has_account(uid := int(row[owner])) or uid == os.getuid() != 0}


def _has_account(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def cgroups(runs: set[str]) -> list[str]:
    """Control groups of these runs that are still there."""
    tops = [line.split()[4] for line in _lines("/proc/self/mountinfo") if " - cgroup2 " in line]
    return [path for top in tops for path, _, _ in os.walk(top) if path.rpartition("/nodewrap-")[2] in runs]


def processes_with(mark: str) -> list[int]:
    """pids whose command line carries the mark."""
    return [pid for pid, words in _commands() if any(mark in word for word in words)]


def _commands() -> Iterator[tuple[int, list[str]]]:
    """(pid, command line) of every process."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield int(pid), Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended between the two looks


class Watch(threading.Thread):
    """Looks, while a run lasts, which uids its command has outside: ``uids``. argv: the command exactly as the payload executes it."""

    def __init__(self, argv: list[str]) -> None:
        super().__init__(daemon=True)
        self.argv, self.over = argv, threading.Event()
        self.uids: set[int] = set()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.002):
            for pid, words in _commands():
                if words == self.argv:
                    self.look(pid)

    def look(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        self.uids |= {int(number) for line in status.splitlines() if line.startswith("Uid:") for number in line.split()[1:]}

    def result(self) -> set[int]:
        self.over.set()
        self.join()
        return self.uids
