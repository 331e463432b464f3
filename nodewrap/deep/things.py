"""What an id may leave outside the file system, how it is found and how it is removed: processes, System V IPC, POSIX message queues, keys."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

import psutil

from nodewrap import live
from nodewrap.deep.finding import Finding
from nodewrap.deep.owner import KILLERS, LIBC, KilledError, as_owner

PATIENCE_S, CHASE_S, CHASE_LONGEST_S = 10.0, 0.05, 1.0
IPC_RMID = 0
FSCONFIG_CMD_CREATE = 6
#: The same on every architecture (asm-generic/unistd.h: numbers from 424 on).
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "ppc64le": 271, "s390x": 280}
KEYCTL_JOIN_SESSION_KEYRING, KEYCTL_REVOKE, KEYCTL_CLEAR, KEYCTL_LINK, KEYCTL_GET_PERSISTENT = 1, 3, 7, 8, 22
SESSION_KEYRING, USER_KEYRING, USER_SESSION_KEYRING = -3, -4, -5  # keyrings(7)


# ---- processes ----


def processes(uids: Container[int]) -> list[Finding]:
    """Live processes one of whose uids is among them. Zombies have ended: they are their parents' to fetch. Who is fetched while we look is told from
    one that lives by having no start time any more: a finding without one would be found again for ever."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = [uid for uid in process.uids() if uid in uids]
            if not mine or process.status() in live.ENDED:
                continue
            born, comm = process.create_time(), live.comm(process.pid)
            mark = live.ticks(process.pid)
            if mark is not None:
                found.append(Finding("process", mine[0], str(process.pid), born, comm, str(mark)))
        except live.GONE:
            continue
    return found


def fleeting(uids: Container[int]) -> list[Finding]:
    """One finding, without a mark, for each uid among them whose processes come and go: who forks and ends again and again has another pid before a
    listing comes to it. Pids are given upwards (pid_namespaces(7)), so that is where the next one is looked for: for CHASE_S of processor time, as
    on a busy node most of a moment may be others'."""
    found: dict[int, Finding] = {}
    last, tired, deadline = _newest(), time.thread_time() + CHASE_S, time.monotonic() + CHASE_LONGEST_S
    while time.thread_time() < tired and time.monotonic() < deadline:
        first, last = last, _newest()
        for pid in range(first, last + 2):
            with suppress(OSError, IndexError):
                status = Path(f"/proc/{pid}/status").read_text(errors="replace")
                state, ids = (status.partition(f"\n{key}:\t")[2].split("\n")[0] for key in ("State", "Uid"))
                mine = [uid for uid in map(int, ids.split()) if uid in uids]
                if mine and state[0] not in "ZX" and mine[0] not in found:
                    found[mine[0]] = Finding("process", mine[0], str(pid), time.time(), "forks and ends, again and again")
    return list(found.values())


def _newest() -> int:
    """The pid that was given last (proc(5), /proc/loadavg)."""
    return int(Path("/proc/loadavg").read_text().split()[4])


def end_processes(uid: int, gid: int) -> str:
    """End all of that uid: each by its pidfd, and, as new ones may come, by that uid's own kill(-1), which reaches nobody else's, and all at once.
    Returns why some are left, "" when all have ended.

    Linux signals under tasklist_lock, and no fork that ends later makes a child (kernel/fork.c, copy_process, "Let kill terminate clone/fork in the
    middle"). So once kill(-1) has been, nobody comes any more: who is not in a listing then has ended."""
    deadline = time.monotonic() + PATIENCE_S
    for one in processes((uid,)):
        _kill(one)
    try:
        _kill_all_as(uid, gid, deadline)
    except OSError as wrong:
        return f"kill(-1): {wrong}"
    while processes((uid,)):
        if time.monotonic() > deadline:
            return "it does not end"
        time.sleep(0.01)
    return ""


def _kill(one: Finding) -> None:
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(int(one.what))
        try:
            if str(live.ticks(int(one.what))) == one.mark:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _kill_all_as(uid: int, gid: int, deadline: float) -> None:
    """Again when another sweep's kill(-1) came first: it reaches all that have the real uid KILLERS. Raises OSError."""
    while True:
        try:
            as_owner(uid, gid, _kill_all, PATIENCE_S, KILLERS)
            return
        except KilledError:
            if time.monotonic() > deadline:
                raise


def _kill_all() -> None:
    with suppress(ProcessLookupError):  # nobody is left
        os.kill(-1, signal.SIGKILL)


# ---- System V IPC, of this IPC namespace ----


def ipc(uids: Container[int]) -> list[Finding]:
    """Shared memory, message queues and semaphores whose owner or maker is among them; what is "shm 5"."""
    found = []
    for kind in ("shm", "msg", "sem"):
        lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        columns = lines[0].split()
        for line in lines[1:]:
            row = dict(zip(columns, map(int, line.split())))
            mine = [row[key] for key in ("uid", "cuid") if row[key] in uids]
            if mine:
                found.append(Finding("ipc", mine[0], f"{kind} {row[columns[1]]}", float(row["ctime"]), f"key {row['key'] & 0xFFFFFFFF:#010x}"))
    return found


def remove_ipc(one: Finding) -> str:
    """Removes it; returns why that failed, "" when it is gone. Called as the owner."""
    kind, number = one.what.split()
    calls = {"shm": (LIBC.shmctl, (IPC_RMID, None)), "msg": (LIBC.msgctl, (IPC_RMID, None)), "sem": (LIBC.semctl, (0, IPC_RMID))}
    call, rest = calls[kind]
    if call(int(number), *rest) == 0:
        return ""
    why = ctypes.get_errno()
    return "" if why in (errno.EINVAL, errno.EIDRM) else os.strerror(why)  # no such id any more


# ---- POSIX message queues, of this IPC namespace ----


def mqueue_directory() -> int:
    """A descriptor of this namespace's queues, wherever they are mounted or not (fsopen(2)). Raises OSError."""
    context = _syscall(SYS_FSOPEN, b"mqueue", 0)
    try:
        _syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(SYS_FSMOUNT, context, 0, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def _syscall(number: int, *arguments: object) -> int:
    result = int(LIBC.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def queues(uids: Container[int], top: int) -> list[Finding]:
    """Queues whose owner is among them."""
    found = []
    for name in os.listdir(top):
        with suppress(FileNotFoundError):
            info = os.stat(name, dir_fd=top, follow_symlinks=False)
            if info.st_uid in uids:
                found.append(Finding("queue", info.st_uid, f"/{name}", info.st_mtime, mark=str(info.st_ino)))
    return found


def remove_queue(one: Finding, top: int) -> str:
    """As remove_ipc. The directory is sticky: nobody but the owner, whose processes are gone, puts another queue under this name."""
    try:
        if str(os.stat(one.what[1:], dir_fd=top, follow_symlinks=False).st_ino) != one.mark:
            return "another one has its name"
        os.unlink(one.what[1:], dir_fd=top)
    except FileNotFoundError:
        return ""
    except OSError as wrong:
        return str(wrong.strerror)
    return ""


# ---- keys ----


def key_holders(uids: Container[int]) -> list[int]:
    """Those among them that own any key (/proc/key-users), be it but the empty keyrings that the kernel made for them."""
    lines = [line.split() for line in Path("/proc/key-users").read_text().splitlines()]
    return [uid for uid in (int(words[0].rstrip(":")) for words in lines) if uid in uids]


def own_keys(uid: int) -> list[str]:
    """What /proc/keys shows to its owner of keys that are alive: "id type description", without the kernel's own keyrings. Called as the owner.

    root itself sees but those that everybody may view (keyrings(7)).
    """
    found = []
    for line in Path("/proc/keys").read_text(errors="replace").splitlines():
        words = line.split(None, 8)
        number, flags, owner, kind, rest = words[0], words[1], words[5], words[7], words[8] if len(words) > 8 else ""
        kernels = kind == "keyring" and rest.startswith((f"_uid.{uid}:", f"_uid_ses.{uid}:", f"_persistent.{uid}:"))
        if int(owner) == uid and not set(flags) & {"R", "D"} and not kernels:
            found.append(f"{number} {kind} {rest.rstrip()}")
    return found


def remove_key(one: Finding) -> str:
    """Revokes the key and empties the user's keyrings; returns why it is left, "" when it is gone. Called as the owner.

    A key lets its possessor do more than its owner, and whoever has the keyring that it is in possesses it: so the user's keyrings first come into a
    session keyring of our own.
    """
    number = SYS_KEYCTL.get(os.uname().machine)
    if number is None:
        return f"the keyctl call of {os.uname().machine} is not known here"
    why = "it is in use"
    _syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None)
    for ring in (USER_KEYRING, USER_SESSION_KEYRING):
        _syscall(number, KEYCTL_LINK, ring, SESSION_KEYRING)
    with suppress(OSError):  # where the kernel has persistent keyrings
        _syscall(number, KEYCTL_GET_PERSISTENT, -1, SESSION_KEYRING)
    try:
        _syscall(number, KEYCTL_REVOKE, int(one.what, 16))
    except OSError as wrong:
        why = str(wrong.strerror)
    for ring in (USER_KEYRING, USER_SESSION_KEYRING):
        _syscall(number, KEYCTL_CLEAR, ring)
    for _ in range(100):  # one that only lost its last keyring goes a moment later (security/keys/gc.c)
        if not any(key.startswith(one.what) for key in own_keys(one.uid)):
            return ""
        time.sleep(0.01)
    return why
