"""D: files and cleanup. Trees that mislead, hold up or outlive who cleans them; what leads out of the outputs.

The mark of most of them is a FIFO: nodewrap takes those away at the end (docs/isolation.md, "What comes back"). One that stays tells that its cleaner
did not come there; one that goes outside of the work directory, that it was misled. Controls end with a cleaner as they are often written.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import secrets
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nodewrap.escape.arena import Arena, NotRunError, Ran
from nodewrap.escape.model import BARE_PROFILE, FILE_LOCKS, SAME_ID_BARE, Configuration, Seen, attack, left_out

FIFO = "fifo"
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
WALK = "walk by descriptor, after all processes have ended"
LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, PRIVATE, DETACH = 0x20000, 0x44000, 2
GETFLAGS, SETFLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10


# ---- looking ----


def below(arena: Arena, top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All entries, by path, as the pilot sees them who has opened its own closed directories."""
    with arena.as_caller():
        todo = [os.fsencode(top)]
        while todo:
            here = todo.pop()
            with suppress(PermissionError):
                os.chmod(here, 0o700, follow_symlinks=True)
            for entry in os.scandir(here):
                about = entry.stat(follow_symlinks=False)
                yield repr(entry.path[len(os.fsencode(top)) + 1:])[2:-1], about
                if stat.S_ISDIR(about.st_mode):
                    todo.append(entry.path)


def fifos(arena: Arena, top: Path | None = None) -> list[str]:
    return sorted(path for path, about in below(arena, top or arena.work) if stat.S_ISFIFO(about.st_mode))


def cleaned(arena: Arena, ran: Ran, cleaner: str) -> Seen:
    """Whether FIFOs are left in the work directory. For the control that cleaner of hostile/d_files.py goes over it."""
    said = f" after {cleaner}: {arena.payload('d_files', cleaner, arena.work).line}" if arena.control else ""
    if ran.rc is None:
        return Seen(True, f"not ended in {ran.seconds:.0f} s")
    found = fifos(arena)
    return Seen(bool(found), f"{len(found)} FIFOs left, {[name[:30] for name in found[:3]]} ({ran.line}{said})")


def lines_are_whole(arena: Arena) -> bool:
    """Every line of the log since then is a record."""
    if not arena.audit or not os.access(arena.audit, os.R_OK):
        return True
    with open(arena.audit, "rb") as file:
        file.seek(arena._offset)
        text = file.read()
    return text.count(b"\n") >= len(arena.records()) and not any(one in text.replace(b"\n", b"") for one in (b"\x1b", b"\x07", "\u202e".encode()))


# ---- mounts of the try's own ----


def own_mounts() -> None:
    """From here on, and for all that is started from here on, mounts are this process's own: nobody else sees them, and they go with us."""
    for bad in (LIBC.unshare(NEWNS), LIBC.mount(b"none", b"/", None, ctypes.c_ulong(PRIVATE), None)):
        if bad:
            raise OSError(ctypes.get_errno(), "mount namespace")


def mount(arena: Arena, kind: str, at: str | Path, options: str) -> None:
    if LIBC.mount(kind.encode(), os.fsencode(at), kind.encode(), ctypes.c_ulong(0), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {kind}")
    arena.undo(lambda: LIBC.umount2(os.fsencode(at), DETACH))


# ---- trees ----


@attack("D07", WALK)
def deep_tree(arena: Arena) -> Seen:
    """1,200 levels: longer than a path may be, deeper than scripting languages recurse."""
    ran = arena.payload("d_files", "deep", "deep", 1200)
    return at_the_bottom(arena, ran, "deep")


@attack("D33", WALK)
def long_paths(arena: Arena) -> Seen:
    """40 levels with names of 250 bytes: nothing below the 16th has a path that open(2) takes."""
    ran = arena.payload("d_files", "deep", "n" * 250, 40)
    return at_the_bottom(arena, ran, "n" * 250)


def at_the_bottom(arena: Arena, ran: Ran, name: str) -> Seen:
    said = f", after sweep: {arena.payload('d_files', 'sweep', arena.work).line}" if arena.control else ""
    with arena.as_caller():
        here, levels = os.open(arena.work, os.O_RDONLY), 0
        while True:
            try:
                lower = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=here)
            except FileNotFoundError:
                break
            os.close(here)
            here, levels = lower, levels + 1
        found = FIFO in os.listdir(here)
        os.close(here)
    return Seen(found, f"the FIFO below {levels} directories is {'there' if found else 'gone'} ({ran.line}{said})")


@attack("D08", WALK, once=True)
def crowded_directory(arena: Arena) -> Seen:
    """8,500 links with long names, more than a command line takes, gone over within 25 seconds."""
    return cleaned(arena, arena.payload("d_files", "crowd", 8500, seconds=25), "sweep_by_pattern")


@attack("D09", "names are bytes, never text; records escape them")
def odd_names(arena: Arena) -> Seen:
    seen = cleaned(arena, arena.payload("d_files", "odd_names"), "sweep_by_lines")
    return seen if lines_are_whole(arena) else Seen(True, f"a name stands in the audit log as it is ({seen.what})")


@attack("D28", "names are bytes, never text")
def surrogate_names(arena: Arena) -> Seen:
    """The same tree; the control is a cleaner that tells what it does."""
    ran = arena.payload("d_files", "odd_names")
    return cleaned(arena, ran, "sweep_by_names") if ran.rc == 0 else Seen(True, f"the run did not end well ({ran.line})")


@attack("D10", "modes are opened before going in")
def closed_directories(arena: Arena) -> Seen:
    return cleaned(arena, arena.payload("d_files", "closed"), "sweep")


@attack("D24", "processes end before files are looked at")
def made_again(arena: Arena) -> Seen:
    """A daemon makes a FIFO again whenever it is gone."""
    ran = arena.payload("d_files", "again", FIFO)
    if arena.control:
        arena.payload("d_files", "sweep", arena.work)
        arena.until(lambda: fifos(arena))
    else:
        time.sleep(0.03)
    found = fifos(arena)
    return Seen(bool(found), f"{len(found)} FIFOs there after the end ({ran.line})")


@attack("D21", "FIFOs, sockets, devices are taken away; the filter refuses devices")
def special_outputs(arena: Arena) -> Seen:
    ran = arena.payload("d_files", "specials")
    found = sorted(path for path, about in below(arena, arena.work) if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)))
    return Seen(bool(found), f"who reads the outputs would meet {found} ({ran.line})")


@attack("D32", "the filter refuses devices; the walk takes them away")
def whiteouts(arena: Arena) -> Seen:
    """A whiteout left in what becomes an upper directory hides a file of the lower one."""
    ran = arena.payload("d_files", "whiteout")
    found = sorted(path for path, about in below(arena, arena.work) if stat.S_ISCHR(about.st_mode))
    return Seen(bool(found), f"{len(found)} whiteouts left ({ran.line})")


@attack("D20", "links that lead out are taken away")
def links_out(arena: Arena) -> Seen:
    """Whoever collects the outputs opens each of them: root, or the pilot where the suite is not root. The secret is one level up."""
    secret = arena.secret()
    ran = arena.payload("d_files", "links", secret, secret.name)
    found = []
    for where, directories, names in os.walk(arena.work):
        for name in (*names, *directories, *(f"{one}/{secret.name}" for one in directories)):
            with suppress(OSError):
                if arena.nonce in Path(where, name).read_text(errors="replace"):
                    found.append(os.path.relpath(f"{where}/{name}", arena.work))
    return Seen(bool(found), f"the secret is read by {sorted(found)} ({ran.line})")


@attack("D14", "the filter refuses set-id bits; the walk takes them off")
def setid_shell(arena: Arena) -> Seen:
    ran = arena.payload("d_files", "setids")
    modes = [(path, about.st_mode) for path, about in below(arena, arena.work) if stat.S_ISREG(about.st_mode)]
    found = sorted(f"{path} {mode & 0o7777:o}" for path, mode in modes if mode & 0o6000)
    return Seen(bool(found), f"set-id programs left: {found} ({ran.line})")


def attributes(arena: Arena, *names: str) -> list[str]:
    """Entries of the work directory that have one of these."""
    found = []
    for path, _ in list(below(arena, arena.work)):
        with suppress(OSError):
            found += [f"{path} {name}" for name in os.listxattr(arena.work / path, follow_symlinks=False) if name in names]
    return sorted(found)


@attack("D12", "ACLs are taken off")
def default_acl(arena: Arena) -> Seen:
    ran = arena.payload("d_files", "acls", *(arena.other or ())[:1])
    found = attributes(arena, "system.posix_acl_access", "system.posix_acl_default")
    return Seen(bool(found), f"ACLs left: {found} ({ran.line})")


@attack("D13", "capabilities are taken off; strict: no user namespace", needs=("userns",))
def file_capabilities(arena: Arena) -> Seen:
    ran = arena.payload("d_files", "capabilities")
    found = attributes(arena, "security.capability")
    return Seen(bool(found), f"capabilities left: {found} ({ran.line})")


@attack("D11", "flags are cleared, or what they keep is named in the record", needs=("root",), peers=False)
def immutable(arena: Arena) -> Seen:
    """A helper of root's has made a directory of the outputs immutable. Who has no right to change that leaves its FIFO, and has to say so."""
    live = arena.begin_payload("d_files", "fifo", "fixed")
    assert live.hear() == "ready"
    fd = os.open(arena.work / "fixed", os.O_RDONLY | os.O_NOFOLLOW)
    arena.undo(lambda: set_flags(fd, 0))
    set_flags(fd, IMMUTABLE)
    ran = live.end(b"")
    if arena.control:
        arena.payload("d_files", "sweep", arena.work)
    left, named = FIFO in os.listdir(fd), "fixed" in left_paths(arena)
    return Seen(left and not named, f"its FIFO is {'left' if left else 'gone'}, {'named' if named else 'not named'} in the record ({ran.line})")


def left_paths(arena: Arena) -> str:
    """What the record of the run names as left."""
    cleanups = [one["nodewrap"]["cleanup"] for one in arena.records() if one["event"]["action"] == "cleanup"]
    return " ".join(str(path) for one in cleanups for path in one.get("left_paths", ()))


def set_flags(fd: int, more: int) -> None:
    try:
        old = struct.unpack("l", fcntl.ioctl(fd, GETFLAGS, bytes(8)))[0]
        fcntl.ioctl(fd, SETFLAGS, struct.pack("l", old & ~IMMUTABLE | more))
    except OSError as wrong:
        raise NotRunError(f"flags cannot be set here: {wrong.strerror}") from None


# ---- with the pilot's help ----


def victim(arena: Arena) -> Path:
    """A directory of the pilot's outside of the work directory, with a FIFO."""
    top = arena.mkdir(arena.home / "victim")
    with arena.as_caller():
        os.mkfifo(top / FIFO)
    return top


def moved_away(arena: Arena, instead: Path | None) -> tuple[Path, Ran]:
    """The work directory is renamed while the payload runs, and a link put in its place; the control's cleaner then goes where the name leads."""
    live = arena.begin_payload("d_files", "fifo")
    assert live.hear() == "ready"
    moved = arena.home / "moved"
    with arena.as_caller():
        arena.work.rename(moved)
        if instead:
            arena.work.symlink_to(instead)
    ran = live.end(b"")
    if arena.control:
        arena.like(work=arena.home).payload("d_files", "sweep", arena.work)
    return moved, ran


@attack("D02", "the work directory is held by descriptor", peers=False)
def work_directory_becomes_link(arena: Arena) -> Seen:
    top = victim(arena)
    _, ran = moved_away(arena, top)
    hit = not (top / FIFO).exists()
    return Seen(hit, f"the FIFO outside is {'gone' if hit else 'there'} ({ran.line})")


@attack("D25", "the work directory is held by descriptor", peers=False)
def work_directory_renamed(arena: Arena) -> Seen:
    moved, ran = moved_away(arena, None)
    found = fifos(arena, moved)
    return Seen(bool(found), f"{len(found)} FIFOs left in the directory that was renamed ({ran.line})")


@attack("D01", WALK + ", which follows no link", once=True, peers=False, seconds=40)
def swap_while_cleaned(arena: Arena) -> Seen:
    """50 directories are exchanged for links to one outside while the cleaner is in them. Control: until it is misled; else four runs."""
    top, count = victim(arena), 50
    began = time.monotonic()
    rounds = 1 if arena.control else 4
    for _ in range(rounds):
        live = arena.begin_payload("d_files", "pairs", count, top, "directory")
        assert live.hear() == "ready"
        swapper = arena.accomplice("d_files", "swap", arena.work, count)
        live.end(b"")
        if arena.control:
            arena.payload("d_files", "sweep", arena.work, top / FIFO, 8)
        swapper.kill()
        swapper.end()
        subprocess.run(["/bin/rm", "-rf", "--", *map(str, arena.work.iterdir())], check=True)
    hit = not (top / FIFO).exists()
    return Seen(hit, f"the FIFO outside is {'gone' if hit else 'there'} after {time.monotonic() - began:.2f} s, {rounds} runs")


def is_chowned(at: Configuration) -> bool:
    """Owners are changed at the end: there is no idmapped mount in none."""
    return at.launcher == "setuid" and at.profile == "none" and at.mode != "log-only"


def roots_file(arena: Arena) -> Path:
    """Of root's, set-uid, so that each of owner, mode and content would tell."""
    path = arena.home / "roots"
    path.write_text(arena.nonce)
    path.chmod(0o4711)
    return path


def is_touched(arena: Arena, path: Path) -> bool:
    about = path.stat()
    return (about.st_uid, about.st_gid, about.st_mode & 0o7777, path.read_text()) != (0, 0, 0o4711, arena.nonce)


@attack("D03", "chown by descriptor, never through a link", control="root", needs=("root",), only=is_chowned, once=True, peers=False, seconds=60)
def race_the_chown(arena: Arena) -> Seen:
    """As D01, with files that are exchanged for links to one of root's while owners are changed."""
    path, count = roots_file(arena), 50
    for _ in range(1 if arena.control else 4):
        live = arena.begin_payload("d_files", "pairs", count, path, "file")
        assert live.hear() == "ready"
        swapper = arena.accomplice("d_files", "swap", arena.work, count)
        live.end(b"")
        if arena.control:
            arena.payload("d_files", "give", arena.work, arena.caller.uid, path, 8)
        swapper.kill()
        swapper.end()
        subprocess.run(["/bin/rm", "-rf", "--", *map(str, arena.work.iterdir())], check=True)
    return Seen(is_touched(arena, path), f"root's file is {'changed' if is_touched(arena, path) else 'as it was'}")


@attack("D04", "hard links to what is neither the payload's nor the pilot's are left alone", control="root", needs=("root",), peers=False)
def hard_link(arena: Arena) -> Seen:
    """As where fs.protected_hardlinks is 0: we make the link to a file of root's ourselves, while the payload runs."""
    path = roots_file(arena)
    live = arena.begin_payload("d_files", "fifo")
    assert live.hear() == "ready"
    os.link(path, arena.work / "linked")
    ran = live.end(b"")
    if arena.control:
        arena.payload("d_files", "give", arena.work, arena.caller.uid)
    return Seen(is_touched(arena, path), f"root's file is {'changed' if is_touched(arena, path) else 'as it was'} ({ran.line})")


@attack("D06", "mounts inside are not entered", needs=("root", "fuse"), peers=False, seconds=40)
def hung_mount(arena: Arena) -> Seen:
    """A FUSE file system in the work directory whose server never answers, mounted while the payload runs."""
    own_mounts()
    at = arena.mkdir(arena.work / "hung")
    live = arena.begin_payload("d_files", "fifo")
    assert live.hear() == "ready"
    fd = os.open("/dev/fuse", os.O_RDWR)
    arena.undo(lambda: os.close(fd))
    mount(arena, "fuse", at, f"fd={fd},rootmode=40000,user_id={arena.caller.uid},group_id={arena.caller.gid},allow_other")
    ran = live.end(b"", seconds=15)
    if arena.control:
        ran = arena.begin_payload("d_files", "sweep", arena.work).end(seconds=1)
    return Seen(ran.rc is None, f"{'not ended' if ran.rc is None else 'ended'} after {ran.seconds:.1f} s, left: {left_paths(arena)!r} ({ran.line})")


# ---- what outlives ----


def others() -> list[str]:
    """Directories of root's near the top of the node's tree that everybody may write to, besides those of temporary files."""
    found = []
    for top in ("/", "/var", "/var/spool", "/var/lib", "/var/cache", "/run", "/dev", "/srv", "/mnt"):
        with suppress(OSError):
            for entry in os.scandir(top):
                about = entry.stat(follow_symlinks=False)
                found += [entry.path] * (stat.S_ISDIR(about.st_mode) and about.st_uid == 0 and bool(about.st_mode & 0o002))
    return sorted(set(found) - {*TEMPORARY, "/dev/mqueue"})


def left_in(arena: Arena, *tops: str) -> Seen:
    """A file in each of these directories."""
    name = f"nodewrap-escape-{secrets.token_hex(6)}"
    ran = arena.payload("d_files", "litter", name, *tops)
    found = [top for top in tops if os.path.lexists(f"{top}/{name}")]
    for top in found:
        os.unlink(f"{top}/{name}")
    return Seen(bool(found), f"left in {found} ({ran.line})")


@attack("D16", "private tmpfs; none: swept as the payload's id", accepted=(SAME_ID_BARE,))
def temporary_files(arena: Arena) -> Seen:
    return left_in(arena, *TEMPORARY)


@attack("D36", "not in the root", accepted=(BARE_PROFILE,))
def spools_and_locks(arena: Arena) -> Seen:
    return left_in(arena, *others())


@attack("D17", "what holds it is ended", needs=("root",))
def deleted_but_open(arena: Arena) -> Seen:
    """The work directory is a file system of its own, so that what is used can be told."""
    own_mounts()
    mount(arena, "tmpfs", arena.work, f"size=32m,mode=755,uid={arena.caller.uid},gid={arena.caller.gid}")
    ran = arena.payload("d_files", "hold_deleted", 16)

    def used() -> int:
        about = os.statvfs(arena.work)
        return (about.f_blocks - about.f_bfree) * about.f_bsize >> 20

    if not arena.control:
        arena.until(lambda: used() < 8, 1)
    return Seen(used() >= 8, f"{used()} MiB used after the end ({ran.line})")


@attack("D19", "/tmp is private", needs=("root",), accepted=(BARE_PROFILE,))
def full_tmp(arena: Arena) -> Seen:
    """/tmp is a file system of 4 MiB and 100 files. Can its neighbour still write there while the payload has filled what it sees as /tmp?"""
    own_mounts()
    mount(arena, "tmpfs", "/tmp", "size=4m,nr_inodes=100,mode=1777")
    live = arena.begin_payload("d_files", "fill", "/tmp", 16, 300)
    said = live.hear()
    try:
        Path("/tmp/neighbour").write_bytes(bytes(1 << 16))
        full = False
    except OSError as wrong:
        full = wrong.errno == errno.ENOSPC
    live.end(b"")
    return Seen(full, f"the neighbour {'cannot' if full else 'can'} write in /tmp (payload: {said})")


@attack("D26", "what holds them is ended", needs=("root", "userns"))
def pinned_namespace(arena: Arena) -> Seen:
    """A daemon in namespaces of its own, held by a bind mount. Judged by who has that mount namespace after the end."""
    live = arena.begin_payload("d_files", "pin")
    said = live.hear()
    number = int(said) if said.isdigit() else 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # held by us, too, its number goes to no other namespace
            if number and namespace(pid) == number:
                arena.undo(functools.partial(os.close, os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)))
    live.end(b"")
    holders = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if number and namespace(pid) == number]
    is_hosts = number == os.stat("/proc/self/ns/mnt").st_ino
    where = ", that of the node" if is_hosts else ""
    return Seen(bool(holders) and not is_hosts, f"{len(holders)} processes in mount namespace {number}{where}")


def namespace(pid: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except OSError:
        return 0


# ---- ways out ----


@attack("D31", "descriptors are closed; the root is pivoted, not chrooted", control="rootless", needs=("userns",), accepted=(SAME_ID_BARE,))
def out_of_the_root(arena: Arena) -> Seen:
    """With a directory of the pilot's left open for the payload. The control has to leave a chroot."""
    secret = arena.secret()
    fd = os.open(arena.home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return arena.has_nonce(arena.payload("d_files", "escape", secret, "jail" if arena.control else "", fds=(fd,)))
    finally:
        os.close(fd)


@attack("D35", "nothing: out of scope", accepted=(FILE_LOCKS,))
def lock_as_a_bit(arena: Arena) -> Seen:
    """Bits by whether somebody holds a lock on a program that everybody may read: sent, then received."""
    path, sent, got = "/usr/bin/python3", "", ""
    for bit in (1, 0):
        sender = arena.accomplice("d_files", "lock", path) if bit else None
        got += arena.payload("d_files", "locked", path).text
        sent += str(bit)
        if sender:
            sender.kill()
            sender.end()
    return Seen(got == sent, f"sent {sent}, received {got}")


left_out(
    D15="no control can succeed: the kernel drops the bit for who is not in the group (since Linux 4.19)",
    D27="needs an NFS server: distribution-kernel lane",
    D29="the only secret that is written to a file is a proxy, made with O_EXCL and mode 0600 at once: surface H, tests/integration",
)
