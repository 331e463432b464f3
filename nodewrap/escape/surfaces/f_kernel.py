"""F: kernel and namespaces. A payload is judged by the descriptors, namespaces and mounts that it then has, seen from outside."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodewrap.escape.arena import Arena, Live, NotRunError, hostile
from nodewrap.escape.evidence import descriptors, namespace, sockets, traced_by, tree
from nodewrap.escape.model import (
    BARE_PROFILE,
    NESTED_NAMESPACES,
    PASSED_DESCRIPTOR,
    SAME_ID_BARE,
    SHARED_COUNTERS,
    Configuration,
    Seen,
    attack,
    left_out,
)
from nodewrap.escape.wrappers import PATH

MNT_DETACH = 2
NAME_TO_HANDLE_AT = {"aarch64": 264}.get(platform.machine(), 303)
OLD_KERNEL = "a replay needs a kernel that has the hole;"
left_out(
    F04=f"{OLD_KERNEL} what it is after is tried by C25 and D14 (set-id files)",
    F09="the site's Apptainer mounts an image's files, inside the payload's walls",
    F10="as F09: nodewrap mounts no console, and its pts is made before any image is looked at",
    F12="as F09: /dev is nodewrap's own tmpfs, made before the image is looked at", F21=f"{OLD_KERNEL} its gate is F01",
    F24=f"{OLD_KERNEL} it has no gate, UDP sockets are every payload's", F25=f"{OLD_KERNEL} it has no gate, reflink and O_DIRECT are every payload's",
    F26=f"{OLD_KERNEL} it has no gate, pipes and mappings are every payload's",
    F36="needs a GPU", F37="needs an image hook of a GPU runtime on the node",
    F39="needs the node's core_pattern changed; the kernel runs that helper for every crash on the node, whoever's it is",
)


def _is_log_only(at: Configuration) -> bool:
    """The filter is the profile's, whatever the identity: tried where the identity stops least."""
    return at.mode == "log-only"


def _held(arena: Arena, function: str, *words: object, look: Callable[[Live], list[Any]]) -> tuple[list[Any], str]:
    """Start that payload, look at it while it holds what it got, end it. What was seen, and what it said."""
    live = arena.begin_payload("f_kernel", function, *words)
    said = live.hear()
    found = look(live) if said or live.process.poll() is None else []
    ran = live.end(b"")
    if not ran.started and not arena.refusal:
        raise NotRunError(f"the payload did not start: {ran.line}")
    return found, said[:120]


def _host_mounts() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="backslashreplace").splitlines()
    return [line.split()[4] for line in lines]


def _roots(arena: Arena) -> Path:
    """A directory of root's that the pilot cannot change: where root has its victims, and programs that it starts."""
    top = arena.home.with_name(f"{arena.home.name}-root")
    if not top.exists():
        top.mkdir()
        top.chmod(0o755)
        arena.undo(lambda: shutil.rmtree(top))
    return top


def _umount(path: Path) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(path), MNT_DETACH)


def _wrapped(arena: Arena, command: list[str]) -> list[str]:
    """The whole command line of the wrapper, to be started by something else."""
    argv = arena.wrapper.argv(command, str(arena.work), [])
    return [shutil.which(argv[0], path=PATH) or argv[0], *argv[1:]]


# ---- namespaces of its own ----


def _nested(arena: Arena, function: str) -> Seen:
    """The user namespaces of all its processes, before and afterwards."""
    live = arena.begin_payload("f_kernel", function)
    if live.hear() != "before":
        raise NotRunError(f"the payload did not start: {live.end(b'').line}")
    before = {namespace(pid) for pid in tree(live)}
    assert live.process.stdin is not None
    live.process.stdin.write(b"\n")
    said = live.hear()
    after = {namespace(pid) for pid in tree(live)}
    live.end(b"")
    return Seen(bool(after - before), f"{len(after - before)} user namespaces of its own ({said})")


@attack("F01", "filter (strict)", needs=("userns", "root"), accepted=(NESTED_NAMESPACES,))
def nested_user_namespace(arena: Arena) -> Seen:
    """By clone and unshare, and with bits set above those that the kernel looks at (CVE-2019-10063's trick)."""
    return _nested(arena, "nested")


@attack("F18", "clone3 is answered ENOSYS", needs=("userns", "root"), accepted=(BARE_PROFILE,))
def flags_behind_a_pointer(arena: Arena) -> Seen:
    return _nested(arena, "behind_a_pointer")


@attack("F02", "filter (strict)", control="rootless", needs=("userns", "root"), accepted=(NESTED_NAMESPACES,), only=_is_log_only)
def mount_by_descriptor(arena: Arena) -> Seen:
    """The gate of CVE-2022-0185: a file system context, as we are and as root of a user namespace."""
    found, said = _held(arena, "fs_context", look=lambda live: [one for one in descriptors(live) if "fscontext" in one.link])
    return Seen(bool(found), f"{len(found)} file system contexts open ({said})")


@attack("F31", "descriptors closed; init is not dumpable", control="root", needs=("root",), only=lambda at: at.profile != "none")
def setns_back(arena: Arena) -> Seen:
    """The nonce is in a directory of the pilot's that the payload's root does not have. Control: walls with a descriptor left open."""
    path = arena.secret(arena.mkdir(arena.home / "hidden", 0o755) / "secret", 0o644)
    return arena.has_nonce(arena.payload("f_kernel", "careless_walls" if arena.control else "setns_back", path))


@attack("F06", "nothing of the host lies below the payload's mounts", control="rootless", needs=("userns",), accepted=(BARE_PROFILE,))
def mask_taken_off(arena: Arena) -> Seen:
    """The nonce is in the host's /tmp, where the payload has a tmpfs. Control: a tmpfs that it may take off itself."""
    top = Path("/tmp") / f"nw{arena.nonce[:8]}"
    arena.undo(top.rmdir)
    path = arena.secret(arena.mkdir(top, 0o755) / "secret", 0o644)
    ran = arena.payload("f_kernel", "careless_mask" if arena.control else "uncover", path)
    return arena.has_nonce(ran)


@attack("F07", "private mount namespace; no capability in the first user namespace", control="root", needs=("root",))
def mounts_reach_the_host(arena: Arena) -> Seen:
    place = arena.mkdir(arena.work / "place", 0o777)
    arena.undo(lambda: _umount(place))
    found, said = _held(arena, "mount_at", place, look=lambda live: [one for one in _host_mounts() if one == str(place)])
    return Seen(bool(found), f"the host has {'a' if found else 'no'} mount there ({said})")


@attack("F43", "mounts keep the flags that they were locked with; the filter in strict", accepted=(BARE_PROFILE,), needs=("root",))
def read_only_made_writable(arena: Arena) -> Seen:
    """A file of mode 0666 in /opt, which batch and compat show read-only."""
    top = Path("/opt") / f"nodewrap-escape-{arena.nonce[:8]}"
    arena.undo(lambda: shutil.rmtree(top))
    top.mkdir()
    top.chmod(0o755)
    victim = top / "victim"
    victim.write_text(arena.nonce)
    victim.chmod(0o666)
    ran = arena.payload("f_kernel", "remount_and_write", victim, "changed")
    changed = victim.read_text() != arena.nonce
    return Seen(changed, f"the file is {'another' if changed else 'as it was'} ({ran.line})")


# ---- the kernel's settings ----

SETTINGS = (
    "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/randomize_va_space",
    "/proc/sys/vm/overcommit_memory", "/proc/sys/fs/suid_dumpable", "/proc/sys/fs/binfmt_misc/register", "/sys/kernel/uevent_helper",
    "/sys/kernel/mm/ksm/run", "/sys/power/state",
)


@attack("F08", "read-only and owned by the first user namespace's root", control="root", needs=("root",))
def kernel_settings(arena: Arena) -> Seen:
    """Opened for writing, seen from outside; nothing is written. As we are, and on /proc and /sys of namespaces of its own."""

    def look(live: Live) -> list[str]:
        return [one.link for one in descriptors(live) if one.writes and one.link.endswith(SETTINGS)]

    found, said = _held(arena, "open_settings", *SETTINGS, look=look)
    return Seen(bool(found), f"open for writing: {', '.join(found) or 'none'} ({said})")


@attack("F11", "the launcher writes nothing to /proc where it is not in the first user namespace, or has no privilege", control="root",
        needs=("root", "userns"), refusal=True, peers=False)
def writes_to_proc_redirected(arena: Arena) -> Seen:
    """The caller starts it where /proc is its own directory, full of links to a file of root's. Control: a careless program of root's."""
    victim = _roots(arena) / "victim"
    victim.write_text("-")
    victim.chmod(0o600)
    command = hostile("f_kernel", "careless_writer", arena.nonce)
    argv = command if arena.control else _wrapped(arena, ["/bin/true"])
    ran = arena.begin(*hostile("f_kernel", "false_proc", victim, *argv), as_is=True).end()
    changed = victim.read_text() != "-"
    return Seen(changed, f"root's file is {'changed' if changed else 'as it was'} ({ran.line})")


@attack("F32", "refused where no /proc of its own can be mounted", needs=("userns", "root"), refusal=True, peers=False,
        only=lambda at: at.launcher == "userns" and at.profile != "none")
def proc_of_the_host_kept(arena: Arena) -> Seen:
    """In a container whose /proc is partly covered the kernel refuses a new one. Control: a wrapper that goes on with the old one, which is none."""
    victim = arena.accomplice("f_kernel", "victim", arena.nonce)
    command = hostile("f_kernel", "cmdline", victim.process.pid)
    if arena.control:
        return arena.has_nonce(arena.run(*command))
    return arena.has_nonce(arena.begin(*hostile("f_kernel", "masked_proc", *_wrapped(arena, command)), as_is=True).end())


@attack("F30", "cgroup namespace; no capability in the first user namespace", control="root", needs=("root",))
def release_agent(arena: Arena) -> Seen:
    """The kernel itself would start the agent, outside of everything."""
    marker, script = _roots(arena) / "marker", _roots(arena) / "agent"
    script.write_text(f"#!/bin/sh\necho {arena.nonce} >{marker}\n")
    script.chmod(0o755)
    place = arena.work / "cg"
    arena.undo(lambda: _umount(place))
    ran = arena.payload("f_kernel", "release_agent", f"nw{arena.nonce[:8]}", script)
    came = arena.until(marker.exists, 1.0 if arena.control else 0.1)
    return Seen(came, f"the agent {'ran' if came else 'did not run'} ({ran.line})")


# ---- files by other ways than names ----


def _handle(path: Path) -> tuple[int, str]:
    """Type and bytes of the file's handle (name_to_handle_at(2)). Raises NotRunError where the file system has none."""
    libc, buffer, mount = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8 + 128), ctypes.c_int()
    ctypes.c_uint.from_buffer(buffer).value = 128
    if libc.syscall(NAME_TO_HANDLE_AT, -100, os.fsencode(path), buffer, ctypes.byref(mount), 0):
        raise NotRunError(f"no file handles on this file system: {os.strerror(ctypes.get_errno())}")
    size, kind = ctypes.c_uint.from_buffer(buffer).value, ctypes.c_int.from_buffer(buffer, 4).value
    return kind, buffer.raw[8:8 + size].hex()


@attack("F15", "filter; no capability in the first user namespace", control="root", needs=("root",))
def file_by_handle(arena: Arena) -> Seen:
    """The payload is told the handle of a file of the pilot's, mode 0600, on the file system of its work directory."""
    kind, content = _handle(arena.secret())
    return arena.has_nonce(arena.payload("f_kernel", "by_handle", kind, content))


@attack("F33", "descriptors closed; directories are not handed on", accepted=(BARE_PROFILE,))
def proc_by_descriptor(arena: Arena) -> Seen:
    """The pilot's /proc is open, and is standard input too; the nonce is among a process' arguments."""
    victim = arena.accomplice("f_kernel", "victim", arena.nonce)
    top = os.open("/proc", os.O_RDONLY)
    try:
        script = f'for at in /proc/self/fd/*; do cat "$at/{victim.process.pid}/cmdline"; done'
        ran = arena.begin("/bin/sh", "-c", script, fds=(top,), stdin=top).end()
    finally:
        os.close(top)
    return arena.has_nonce(ran)


@attack("F34", "Landlock (strict)", accepted=(PASSED_DESCRIPTOR,))
def directory_passed_in(arena: Arena) -> Seen:
    """By an accomplice outside, through a socket in the work directory."""
    outside = arena.mkdir(arena.home / "outside", 0o755)
    arena.secret(outside / "secret", 0o644)
    arena.accomplice("f_kernel", "give_directory", arena.work / "door", outside)
    return arena.has_nonce(arena.payload("f_kernel", "receive_directory", arena.work / "door"))


DEVICES = ("kmsg", "kvm", "mem", "port", "loop-control", "loop0", "sda", "vda", "nvme0n1", "dm-0", "uinput", "snapshot", "cuse", "btrfs-control")
GATES = {"c 1:1", "c 1:2", "c 1:4", "c 1:11", "c 10:232", "c 10:237", "c 10:223", "c 10:231", "c 10:203", "c 10:234"}


@attack("F35", "a /dev of its own; filter; nodev", control="root", needs=("root",), accepted=(BARE_PROFILE,))
def device_nodes(arena: Arena) -> Seen:
    """What is open of them is asked of the kernel: block devices, memory, log, kvm, and what makes others."""

    def look(live: Live) -> list[str]:
        return sorted({one.device for one in descriptors(live) if one.device.startswith("b") or one.device in GATES})

    found, said = _held(arena, "open_devices", *(f"/dev/{name}" for name in DEVICES), look=look)
    return Seen(bool(found), f"open: {', '.join(found) or 'none'} ({said})")


@attack("F42", "no_new_privs; nosuid", needs=("root",))
def set_id_program_in_the_work_directory(arena: Arena) -> Seen:
    """As an image brings them: root's own copy of cat, 4755, beside a file of root's."""
    for name, content, mode in (("cat", Path("/bin/cat").read_bytes(), 0o4755), ("secret", arena.nonce.encode(), 0o600)):
        path = _roots(arena) / name
        path.write_bytes(content)
        path.chmod(mode)
        path.rename(arena.work / name)
    return arena.has_nonce(arena.run("./cat", "secret"))


# ---- doors to the kernel: sockets and special descriptors that are then open ----


def _family(arena: Arena, *wanted: tuple[int, int, int]) -> Seen:
    """wanted: family, type, protocol (0: any)."""

    def look(live: Live) -> list[tuple[int, int]]:
        found = sockets(live)
        return sorted({one for one in found if any(one[0] == family and protocol in (0, one[1]) for family, _, protocol in wanted)})

    found, said = _held(arena, "open_sockets", *(":".join(map(str, one)) for one in wanted), look=look)
    return Seen(bool(found), f"open sockets (family, protocol): {found or 'none'} ({said})")


@attack("F03", "filter: netlink of nf_tables", needs=("root", "userns"), accepted=(BARE_PROFILE,), only=_is_log_only)
def nf_tables_gate(arena: Arena) -> Seen:
    return _family(arena, (16, 3, 12))


@attack("F19", "filter: address family", needs=("root", "alg"), accepted=(BARE_PROFILE,), only=_is_log_only)
def af_alg_gate(arena: Arena) -> Seen:
    return _family(arena, (38, 5, 0))


@attack("F20", "filter: netlink of xfrm", needs=("root", "userns"), accepted=(BARE_PROFILE,), only=_is_log_only)
def xfrm_gate(arena: Arena) -> Seen:
    return _family(arena, (16, 3, 6))


@attack("F22", "filter: address family; io_uring is answered ENOSYS (E17)", needs=("root", "rds"), accepted=(BARE_PROFILE,), only=_is_log_only)
def rds_gate(arena: Arena) -> Seen:
    return _family(arena, (21, 5, 0))


@attack("F23", "filter: protocol", needs=("root", "sctp"), accepted=(BARE_PROFILE,), only=_is_log_only)
def sctp_gate(arena: Arena) -> Seen:
    return _family(arena, (2, 1, 132))


@attack("F29", "filter: address families and protocols other than the four, before the kernel looks for a module", needs=("root",),
        accepted=(BARE_PROFILE,), only=_is_log_only)
def families_beyond_the_four(arena: Arena) -> Seen:
    """Each family that Linux has numbers for, and transports and netlinks; those of the four that payloads need do not count."""
    families = [(number, kind, 0) for number in range(3, 47) if number not in (10, 16) for kind in (1, 2, 3, 5)]
    others = [(2, 2, 136), (2, 6, 33), (2, 2, 115), *((16, 3, number) for number in range(1, 23))]
    return _family(arena, *families, *others)


@attack("F17", "32-bit system calls end the process", needs=("root", "ia32"), accepted=(BARE_PROFILE,), only=_is_log_only)
def sockets_by_foreign_calls(arena: Arena) -> Seen:
    """AF_VSOCK, which the filter refuses, by the i386 socketcall and socket."""
    found, said = _held(arena, "foreign_sockets", look=lambda live: [one for one in sockets(live) if one[0] == 40])
    return Seen(bool(found), f"open sockets (family, protocol): {found or 'none'} ({said})")


@attack("F28", "filter", control="root", needs=("root",), accepted=(BARE_PROFILE,), only=_is_log_only)
def doors_to_the_kernel(arena: Arena) -> Seen:
    kinds = ("bpf", "perf_event", "userfaultfd", "fanotify")
    found, said = _held(arena, "open_doors", look=lambda live: [one.link for one in descriptors(live) if any(kind in one.link for kind in kinds)])
    return Seen(bool(found), f"open: {', '.join(found) or 'none'} ({said})")


# ---- other processes, and what is counted for a user ----


@attack("F38", "pid namespace; init is not dumpable", needs=("root",), accepted=(SAME_ID_BARE,))
def tracing_those_who_come_near(arena: Arena) -> Seen:
    """The pilot's process, our parent and pid 1: whom the payload traces is asked of the kernel."""
    victim = arena.accomplice("f_kernel", "victim", "x")
    found, said = _held(arena, "trace", victim.process.pid, look=traced_by)
    return Seen(bool(found), f"{len(found)} processes traced ({said})")


@attack("F40", "another kernel uid (switch, map of the setuid launcher)", accepted=(SHARED_COUNTERS,))
def counters_of_the_user(arena: Arena) -> Seen:
    """The payload takes every inotify instance of its user; then the pilot asks for one."""
    live = arena.begin_payload("f_kernel", "exhaust_inotify")
    said = live.hear()
    pilot = arena.accomplice("f_kernel", "can_watch", wait=False).end()
    live.end(b"")
    return Seen("EMFILE" in pilot.text, f"the pilot: {pilot.text} (the payload: {said})")


# ---- traps in the way of mounts ----


def _victim(arena: Arena, mode: int) -> Path:
    """A directory of root's, with the nonce in it."""
    top = _roots(arena) / "victim"
    top.mkdir()
    (top / "secret").write_text(arena.nonce)
    top.chmod(mode)
    return top


@attack("F13", "the way to a mount is walked by descriptor, without links", control="root", needs=("root",), refusal=True, peers=False,
        only=lambda at: at.profile in ("strict", "none"))
def link_under_a_mount_target(arena: Arena) -> Seen:
    """An earlier payload left a link in the work directory; the pilot's next run exposes and works in what lies below it."""
    top = _victim(arena, 0o755)
    with arena.as_caller():
        (arena.work / "link").symlink_to(top)
    target = arena.work / "link/new"
    if arena.control:
        ran = arena.payload("f_kernel", "careless_makedirs", target)
    else:
        ran = arena.run("/bin/true", options=["--expose", str(target)])
        arena.run("/bin/true", options=["--workdir", str(target)])
    about = top.stat()
    made = sorted(os.listdir(top)) != ["secret"] or (about.st_uid, about.st_mode & 0o7777) != (0, 0o755)
    return Seen(made, f"root's directory is {'changed' if made else 'as it was'} ({ran.line})")


@attack("F14", "the work directory is opened once, without links, and used by descriptor", control="root", needs=("root",), refusal=True, peers=False,
        once=True, seconds=60)
def link_swapped_under_a_mount_target(arena: Arena) -> Seen:
    """The pilot exchanges its work directory and a link to root's for ever while it starts runs in it. The payload reads what is there."""
    top = _victim(arena, 0o700)
    place, trap = arena.mkdir(arena.home / "place", 0o755), arena.home / "trap"
    with arena.as_caller():
        (place / "secret").write_text("nothing")
        trap.symlink_to(top)
    arena.accomplice("f_kernel", "swap", place, trap)
    if arena.control:
        return arena.has_nonce(arena.payload("f_kernel", "careless_open", place, arena.caller.uid))
    came: dict[str, int] = {}
    seen = Seen(False, "")
    for _ in range(25):
        seen = arena.has_nonce(arena.like(work=place).run("/bin/cat", "secret", cwd=arena.home))
        came[seen.what[:90]] = came.get(seen.what[:90], 0) + 1
        if seen.reached:
            break
    return Seen(seen.reached, f"{sum(came.values())} starts: {came}")
