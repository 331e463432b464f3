"""Trying kernel features, each in a forked child that may be left broken: nothing here changes the process that asks, or the node.

Every ``try_*`` function raises OSError with the kernel's reason, or returns; ``attempt`` runs one in a child, as another user where asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable

CLONE = {"mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
OPEN_TREE, MOUNT_SETATTR, LANDLOCK_CREATE_RULESET = 428, 442, 444  # the same on every architecture
KEYCTL = {"x86_64": 250, "aarch64": 219}.get(platform.machine(), -1)
KEYCTL_JOIN_SESSION_KEYRING, LANDLOCK_CREATE_RULESET_VERSION = 1, 1
OPEN_TREE_CLONE, AT_EMPTY_PATH, MOUNT_ATTR_IDMAP = 1, 0x1000, 0x00100000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
SECONDS, MOST = 10, 300


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *args: int | bytes) -> int:
    words = [ctypes.c_char_p(arg) if isinstance(arg, bytes) else ctypes.c_long(arg) for arg in args]
    return _checked(_libc().syscall(ctypes.c_long(number), *words))


def attempt(work: Callable[[], object], uid: int = -1, gid: int = -1) -> str:
    """Run ``work`` in a child, as uid and gid without further groups when they are given: "" when it returned, else one line of why not.

    Other processes of that uid may stop, trace or kill the child: it has nothing of ours, and what it says is bounded.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(work, uid, gid, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = select.select([pipe], [], [], SECONDS + 1)[0]
        text = os.read(reading, MOST).decode(errors="replace") if told else ""
    os.kill(pid, signal.SIGKILL)  # it has said what it had to, or is stopped; the status of one that is ending stays what it is
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and not text:
        return f"the attempt was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return "".join(char if char.isprintable() else "?" for char in text)


def _child(work: Callable[[], object], uid: int, gid: int, writing: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        if uid >= 0:
            writing = _detach(writing)
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            _checked(_libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))  # else /proc/self belongs to root, and no uid_map can be written
        work()
    except OSError as wrong:
        os.write(writing, (wrong.strerror or str(wrong)).encode())
    except BaseException as wrong:  # a child that returned would go on as a second doctor
        os.write(writing, repr(wrong).encode())
    finally:
        os._exit(0)


def _detach(writing: int) -> int:
    """Let go of all that is the asking process's, root's: its terminal, descriptors, directory and keys. What is kept has number 3."""
    os.setsid()
    os.chdir("/")
    kept = os.dup2(writing, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    with contextlib.suppress(OSError):  # a kernel without keys, or a filter
        _syscall(KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, 0)
    return kept


def unshare(*kinds: str) -> None:
    """unshare(2) of these namespaces, into a user namespace mapped to root first when "user" is among them."""
    uid, gid = os.geteuid(), os.getegid()
    _checked(_libc().unshare(sum(CLONE[kind] for kind in kinds)))
    if "user" in kinds:
        write_maps("self", uid, gid)


def write_maps(who: int | str, uid: int = -1, gid: int = -1) -> None:
    """Of the new user namespace of that process: we, or whoever uid and gid are, are its root."""
    _write(f"/proc/{who}/setgroups", "deny")  # user_namespaces(7): before gid_map, for whoever has no CAP_SETGID outside
    _write(f"/proc/{who}/uid_map", f"0 {os.geteuid() if uid < 0 else uid} 1")
    _write(f"/proc/{who}/gid_map", f"0 {os.getegid() if gid < 0 else gid} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def try_namespace(kind: str, nested: bool) -> Callable[[], None]:
    """A namespace of this kind; nested: inside a new user namespace, as somebody without privilege has to."""
    return lambda: unshare(*(("user", kind) if nested and kind != "user" else (kind,)))


def try_proc(nested: bool) -> Callable[[], None]:
    """A fresh /proc in a new pid namespace. Refused ("Operation not permitted") where the visible /proc has something mounted over it."""

    def work() -> None:
        unshare(*(("user", "mount", "pid") if nested else ("mount", "pid")))
        _mount(b"none", b"/", b"none", MS_REC | MS_PRIVATE)
        problem = attempt(lambda: _mount(b"proc", b"/proc", b"proc", 0))
        if problem:
            raise OSError(problem)

    return work


def _mount(source: bytes, target: bytes, kind: bytes, flags: int) -> None:
    _checked(_libc().mount(source, target, kind, ctypes.c_ulong(flags), None))


def try_idmap(directory: str) -> Callable[[], None]:
    """An idmapped mount of the directory's file system (mount_setattr(2), Linux 5.12 and per file system)."""

    def work() -> None:
        tree = _syscall(OPEN_TREE, -100, os.fsencode(directory), OPEN_TREE_CLONE | os.O_CLOEXEC)
        asleep = holder()
        try:
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{asleep}/{name}", "1000 20000 1")
            space = os.open(f"/proc/{asleep}/ns/user", os.O_RDONLY)
            attributes = struct.pack("=4Q", MOUNT_ATTR_IDMAP, 0, 0, space)
            _syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes))
        finally:
            os.kill(asleep, signal.SIGKILL)
            os.waitpid(asleep, 0)

    return work


def holder(*kinds: str) -> int:
    """A process in a user namespace without maps, and in what others kinds names, asleep; the caller kills it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _checked(_libc().unshare(CLONE["user"] | sum(CLONE[kind] for kind in kinds)))
            os.write(writing, b"1")
            time.sleep(SECONDS)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not pipe.read(1):
            os.waitpid(pid, 0)
            raise OSError("no user namespace can be made")
    return pid


def try_newuidmap(first: int, count: int) -> Callable[[], None]:
    """newuidmap(1) gives the caller's own user namespace this delegated range."""

    def work() -> None:
        asleep = holder()
        try:
            for tool in ("newuidmap", "newgidmap"):
                argv = [tool, str(asleep), "0", str(os.getuid() if tool == "newuidmap" else os.getgid()), "1", "1", str(first), str(count)]
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise OSError(f"{tool}: {done.stderr.strip()[:200]}")
        finally:
            os.kill(asleep, signal.SIGKILL)
            os.waitpid(asleep, 0)

    return work


def try_cgroup(parent: str) -> Callable[[], None]:
    """A cgroup of one's own below this one, which can be killed as a whole (cgroup.kill, Linux 5.14)."""

    def work() -> None:
        group = f"{parent.rstrip('/')}/nodewrap-doctor.{os.getpid()}"
        os.mkdir(group)
        try:
            if not os.path.exists(f"{group}/cgroup.kill"):
                raise OSError("no cgroup.kill (Linux 5.14)")
        finally:
            os.rmdir(group)

    return work


def landlock_abi() -> int:
    """Landlock's version in this kernel, 0 when it has none (landlock_create_ruleset(2))."""
    try:
        return _syscall(LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def try_keyring() -> None:
    """A session keyring of one's own."""
    _syscall(KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, 0)


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def load_filter(program: bytes) -> None:
    """Load BPF as nodewrap/seccomp.py writes it into this thread, for good. Raises OSError."""
    code = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // 8, ctypes.addressof(code))
    libc = _libc()
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0))


def try_filter(program: bytes) -> Callable[[], None]:
    return lambda: load_filter(program)


def try_start(argv: list[str], program: bytes) -> Callable[[], None]:
    """The program starts, and ends with 0, under this filter."""

    def work() -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env={}, preexec_fn=lambda: load_filter(program))
        if done.returncode:
            raise OSError(f"exit {done.returncode} {done.stderr.strip()[-200:]}")

    return work
