"""Images that a policy names, looked at when it is compiled (docs/apptainer.md). Root's slow path."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nodewrap import apptainer
from nodewrap.deep.files import file_system

#: Here a read lease tells whether anybody has a file open for writing or mapped so, and the first write through a mapping that is made afterwards
#: sets the times (page_mkwrite). Not overlayfs: what is mapped there is the file below, of which its lease does not know. Not tmpfs: it maps pages
#: writable at once (mm/mmap.c, vma_wants_writenotify) and sets no time. Not NFS, CIFS, FUSE: they are written elsewhere, and EAGAIN means less there.
LEASED = ("ext2", "ext3", "ext4", "xfs", "btrfs")
#: Nobody writes these.
STILL = ("squashfs", "erofs", "iso9660")
#: The kernel's times are those of its last tick, 10 ms at most: what is written in one tick has one time.
TICK_S = 0.02
#: What is known of a file that somebody may be writing: no file has this key, so every run with it is refused.
WRITTEN: dict[str, Any] = {"key": [], "sha256": ""}


def suits(profile: dict[str, Any]) -> bool:
    """Can an unprivileged container be made in this profile?"""
    return {"mount", "pid"} <= set(profile.get("namespaces", ())) and bool(profile.get("nested_userns"))


def pin(path: str) -> tuple[str, dict[str, Any], str]:
    """(where path really is, ``{"key", "sha256"}``, doubt): of a directory, which cannot be digested, the second is empty. Raises OSError.

    Times tell of every later change, but of those by who has it open for writing already: pages that are mapped writable and dirty are changed
    without any fault, so without a new time. Such a file is WRITTEN. doubt: why that cannot be told here, or "".
    """
    real = os.path.realpath(path)
    if not stat.S_ISREG(os.stat(real).st_mode):
        return real, {}, ""
    with open(real, "rb") as file, _leased(file.fileno()) as (written, doubt):
        time.sleep(TICK_S)
        before, state = apptainer.key(file.fileno(), os.fstat(file.fileno())), hashlib.sha256()
        while not written and (part := file.read(1 << 20)):
            state.update(part)
        after = apptainer.key(file.fileno(), os.fstat(file.fileno()))
    return (real, WRITTEN, "") if written or before != after else (real, {"key": after, "sha256": state.hexdigest()}, doubt)


@contextmanager
def _leased(fd: int) -> Iterator[tuple[bool, str]]:
    """(is it open for writing, why that is not known). If neither, who opens it for writing meanwhile waits (fcntl(2), F_SETLEASE).

    Of that we are told by SIGIO, which ends whoever does not expect it: anybody could end us so.
    """
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        yield _lease(fd)
    finally:
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        signal.signal(signal.SIGIO, before)


def _lease(fd: int) -> tuple[bool, str]:
    kind, info = file_system(fd), os.fstat(fd)
    if kind in STILL:
        return False, ""
    if kind not in (*LEASED, "overlay"):
        return False, f"it is on {kind}"
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True, ""
        if error.errno == errno.EACCES and info.st_uid == 0 and not info.st_mode & 0o022:
            return False, ""  # ours are only leases of our own files (CAP_LEASE), and this one is root's alone to write
        return False, f"no lease is to be had of it: {error.strerror}"
    return False, "it is on overlay" if kind == "overlay" else ""
