"""Files of an id without a lease: found as root, removed with their owner's own rights, by descriptors all the way."""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from nodewrap.deep.finding import Finding
from nodewrap.deep.owner import as_owner, dumpable
from nodewrap.deep.walk import DIRECTORY, MovedError, Walk, mount_id, mount_points

PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")  # noqa: S108  where everybody may write: they are searched, not written to
SPOOLS = ("/var/spool/cron", "/var/spool/at", "/var/mail", "/var/spool/mail")
LINGER = "/var/lib/systemd/linger"
SKELETON = "/etc/skel"
#: File systems of this node alone. On a shared one the same id may be leased on another node, whose leases are not to be seen from here.
LOCAL = frozenset(("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs"))
MOST = 100_000


def find(uids: Container[int], places: list[str], homes: list[str], notes: list[str]) -> list[Finding]:
    """The uppermost files and directories of these ids below places and homes, with the number of the owner's entries in each.

    A home itself is no finding, nor is what it has from the skeleton. What could not be looked at is added to notes.
    """
    found: list[Finding] = []
    done: set[tuple[int, int]] = set()
    mounts = mount_points()
    for path in [*places, *homes]:
        try:
            top = os.open(os.path.realpath(path), DIRECTORY)
        except FileNotFoundError:
            continue
        except OSError as wrong:
            notes.append(f"{path}: {wrong.strerror}")
            continue
        try:
            info, kind = os.fstat(top), file_system(top)
            if kind not in LOCAL:
                notes.append(f"{path} is on {kind}, where other nodes may run under these ids: not looked at")
            elif (info.st_dev, info.st_ino) not in done:
                done.add((info.st_dev, info.st_ino))
                _search(Walk(top, os.path.realpath(path), mounts=mounts), uids, found, notes, path in homes)
        finally:
            os.close(top)
    return found


def file_system(fd: int) -> str:
    """The type of the file system, as /proc/self/mountinfo names it."""
    number = mount_id(fd).split()[1]
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        if line.split()[0] == number:
            return line.partition(" - ")[2].split()[0]
    return "a file system that is not mounted here"


def _search(walk: Walk, uids: Container[int], found: list[Finding], notes: list[str], home: bool) -> None:
    above: list[Finding | None] = [None]  # the finding that covers the directory of that depth
    try:
        for entry in walk:
            if entry.after:
                continue
            owner, cover = entry.stat.st_uid, above[entry.depth - 1]
            if cover and cover.uid == owner:
                cover.entries += 1
            elif owner in uids and not (home and entry.depth == 1 and _is_skeleton(entry.dir, entry.name)):
                cover = Finding("file", owner, entry.path, entry.stat.st_mtime, _kind(entry.stat.st_mode), str(entry.stat.st_ino), walk.path)
                found.append(cover)
            else:
                cover = None
            del above[entry.depth:]
            above.append(cover)
            if entry.error:
                notes.append(f"{entry.path}: {entry.error}")
            if len(found) >= MOST:
                notes.append(f"more than {MOST} files: remove these, then look again")
                return
    except MovedError as moved:
        notes.append(f"{moved} was moved while it was looked at: look again")


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFSOCK: "socket", stat.S_IFIFO: "fifo"}
    return names.get(stat.S_IFMT(mode), "device") + (" setuid" if mode & stat.S_ISUID and not stat.S_ISDIR(mode) else "")


def _is_skeleton(directory: int, name: str) -> bool:
    """A home's file that useradd(8) put there, unchanged."""
    fd = -1
    with suppress(OSError):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        pattern = f"{SKELETON}/{name}"
        regular = stat.S_ISREG(os.fstat(fd).st_mode) and stat.S_ISREG(os.lstat(pattern).st_mode)
        same = regular and filecmp.cmp(f"/proc/self/fd/{fd}", pattern, shallow=False)
        os.close(fd)
        return same
    if fd >= 0:
        os.close(fd)
    return False


def lingering(names: dict[str, int]) -> list[Finding]:
    """Accounts that systemd keeps a session for (loginctl enable-linger), among these: the file is root's, and named after the account."""
    found = []
    for name, uid in names.items():
        with suppress(FileNotFoundError):
            info = os.lstat(f"{LINGER}/{name}")
            found.append(Finding("linger", uid, f"{LINGER}/{name}", info.st_mtime, "loginctl enable-linger", str(info.st_ino), LINGER))
    return found


def there(one: Finding) -> bool:
    """Whether its name still leads to what was found."""
    try:
        above = _reach(one)
    except OSError:
        return False
    try:
        return str(os.stat(os.path.basename(one.what), dir_fd=above, follow_symlinks=False).st_ino) == one.mark
    except OSError:
        return False
    finally:
        os.close(above)


# ---- removing ----


def remove(one: Finding, gid: int) -> str:
    """Removes the file or tree; returns why something of it is left, "" when it is gone. Its owner has no process and the id is not leased.

    The contents go with the owner's rights. The name itself goes with them too, or, where the owner may not write to its directory, with root's:
    the entry of a file that was just seen to be the owner's, in a directory that was reached without following a link.
    """
    try:
        above = _reach(one)
    except OSError as wrong:
        return f"cannot be reached any more: {wrong.strerror}"
    try:
        name = os.path.basename(one.what)
        place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except FileNotFoundError:
        os.close(above)
        return ""
    try:
        info = os.fstat(place)
        if info.st_uid != (0 if one.kind == "linger" else one.uid) or str(info.st_ino) != one.mark:
            return "it is another file by now"
        if mount_id(place) != mount_id(above):
            return "something is mounted on it"
        return _remove(one, gid, above, name, place, stat.S_ISDIR(info.st_mode))
    except OSError as wrong:
        return str(wrong.strerror or wrong)
    finally:
        os.close(place)
        os.close(above)


def _reach(one: Finding) -> int:
    """The directory that the finding is in, from its root down, through nothing but directories of the root's mount. Raises OSError."""
    now = os.open(one.root, DIRECTORY)
    mount = mount_id(now)
    for part in one.what[len(one.root):].strip("/").split("/")[:-1]:
        last = now
        try:
            now = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=last)
        finally:
            os.close(last)
        if mount_id(now) != mount:
            os.close(now)
            raise OSError(0, "something is mounted on the way")
    return now


def _remove(one: Finding, gid: int, above: int, name: str, place: int, is_dir: bool) -> str:
    left: list[str] = []
    if is_dir:
        top = os.open(f"/proc/self/fd/{place}/.", DIRECTORY)
        try:
            left = as_owner(one.uid, gid, lambda: _empty(top, one))
        finally:
            os.close(top)
    if left:
        return left[0] + (f" (and {len(left) - 1} more)" if len(left) > 1 else "")
    if one.kind == "linger" or not as_owner(one.uid, gid, lambda: _unlink(above, name, is_dir) == ""):
        return _unlink(above, name, is_dir)
    return ""


def _unlink(above: int, name: str, is_dir: bool) -> str:
    try:
        (os.rmdir if is_dir else os.unlink)(name, dir_fd=above)
    except FileNotFoundError:
        return ""
    except OSError as wrong:
        return f"{name}: {wrong.strerror}"
    return ""


def _empty(top: int, one: Finding) -> list[str]:
    """Removes what is the owner's below its directory; what is left, with the reason (the first of them: 100). Called as the owner."""
    left: list[str] = []
    dumpable()
    os.fchmod(top, 0o700)
    try:
        for entry in Walk(top, one.what, mend=True):
            if entry.is_dir and not entry.after and not entry.error:
                continue
            foreign = f"belongs to uid {entry.stat.st_uid}" if entry.stat.st_uid != one.uid else ""
            why = foreign or entry.error or _unlink(entry.dir, entry.name, entry.is_dir)
            left += [f"{entry.path}: {why}"] if why and len(left) < 100 else []
    except MovedError as moved:
        left.append(f"{moved}: moved meanwhile")
    return left
