"""C: processes. What survives, what hides, what reaches the pilot's."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from nodewrap.escape.arena import Arena, Live, NotRunError, Ran, hostile
from nodewrap.escape.model import BARE_PROFILE, OWN_SERVER, PILOTS_GROUP, SAME_ID_BARE, Configuration, Seen, attack, left_out
from nodewrap.live import comm

ENDS = "end of the pid namespace; cgroup.kill; sweep of the uid"
APART = "pid namespace; other uid"


def not_compat(at: Configuration) -> bool:
    """What takes its time is tried where the mechanism differs: in none there is no pid namespace, and compat ends processes as batch does."""
    return at.profile != "compat"


# ---- what survives ----


def held(arena: Arena, ran: Ran) -> Seen:
    """Whether anything that has inherited the payload's lock is alive (flock(2)): asked of the kernel, whatever its name and state."""
    with open(arena.work / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Seen(True, f"alive after the payload's end: its lock is held ({ran.line})")
    return Seen(False, f"gone with the payload: its lock is free ({ran.line}, {ran.seconds:.2f} s)")


def survives(arena: Arena, function: str, *words: object) -> Seen:
    return held(arena, arena.payload("c_processes", function, "lock", *words))


@attack("C01", ENDS)
def double_forked_daemon(arena: Arena) -> Seen:
    return survives(arena, "daemon")


@attack("C02", "wall limit: TERM, then KILL", once=True, seconds=60)
def ignores_requests(arena: Arena) -> Seen:
    """It ignores TERM, HUP and INT, and has a limit of one second. Without a wrapper TERM is sent as well, and it just stays."""
    live = arena.begin_payload("c_processes", "stubborn", "lock", options=["--wall", "1s"])
    assert live.hear() == "ready"
    if not arena.control:
        return held(arena, live.end(seconds=40))
    live.process.terminate()
    time.sleep(0.3)
    return held(arena, Ran(None, b"SIGTERM was sent", b"", 0.3, True))


@attack("C03", ENDS, only=not_compat)
def fork_bomb(arena: Arena) -> Seen:
    """200 processes that fork and die while they are being ended."""
    return survives(arena, "bomb", 200)


@attack("C04", ENDS, only=not_compat)
def pid_hopper(arena: Arena) -> Seen:
    return survives(arena, "hopper")


@attack("C05", ENDS, only=not_compat)
def stopped_traced_waiting(arena: Arena) -> Seen:
    return survives(arena, "stuck")


@attack("C18", ENDS, only=not_compat)
def subreaper(arena: Arena) -> Seen:
    return survives(arena, "subreaper")


@attack("C22", "nothing goes by names", only=not_compat)
def other_names(arena: Arena) -> Seen:
    return survives(arena, "renamed", "kworker/0:1", "nodewrap-setuid", "(sd-pam)")


@attack("C23", ENDS, only=not_compat)
def dead_leader(arena: Arena) -> Seen:
    return survives(arena, "headless")


def family_with(what: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Our descendants of whom that holds; of those that end meanwhile it does not."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [one] * what(one)
    return found


@attack("C14", "init reaps; so does the launcher in none")
def zombie_flood(arena: Arena) -> Seen:
    """150 orphans that have ended, counted from outside while the payload lives. Without a wrapper they fall to us, who do not collect them."""
    live = arena.begin_payload("c_processes", "zombies", 150)
    assert live.hear() == "done"

    def count() -> int:
        return len(family_with(lambda one: one.status() == psutil.STATUS_ZOMBIE))

    if not arena.control:
        arena.until(lambda: count() < 20, 10)
    found = count()
    live.end(b"")
    return Seen(found >= 100, f"{found} zombies of 150")


@attack("C24", "cgroup.kill; pids of 0 are skipped", needs=("cgroup2", "userns"))
def pid_zero(arena: Arena) -> Seen:
    """The control is a cleaner that signals what cgroup.procs says, in a process namespace, where all others stand there as 0: it kills itself."""
    if arena.control:
        ran = arena.run("unshare", "--user", "--map-root-user", "--pid", "--fork", "--", *hostile("c_processes", "careless_killer"))
        return Seen(ran.rc == -signal.SIGKILL, f"the careless cleaner killed its own process group ({ran.line})")
    ran = arena.payload("c_processes", "dying", 60)
    return Seen(ran.rc != 42, f"the cleaner is alive and tells the payload's code ({ran.line})")


@attack("C31", "wall limit: TERM, then KILL", once=True)
def stopped_for_ever(arena: Arena) -> Seen:
    live = arena.begin_payload("c_processes", "forever", options=["--wall", "1s"])
    assert live.hear() == "ready"
    ran = live.end(seconds=2 if arena.control else 20)
    return Seen(ran.rc is None, f"{'still there' if ran.rc is None else 'ended'} after {ran.seconds:.1f} s, the limit is 1 s ({ran.line})")


def slacken() -> None:
    """As long as it gets: no wait would end before something happens (prctl(2), PR_SET_TIMERSLACK)."""
    if ctypes.CDLL(None, use_errno=True).prctl(29, ctypes.c_ulong(10**18)):
        raise OSError(ctypes.get_errno(), "prctl")


@attack("C39", "launchers take the kernel's timer slack first of all", once=True, peers=False)
def late_clock(arena: Arena) -> Seen:
    """The payload ends by itself after 5 s, its limit is one second. The control is a careless wrapper that waits so long and then kills."""
    words = hostile("c_processes", "sleeper", 5)
    if arena.control:
        ran = arena.run(*hostile("c_processes", "careless_limit", 1), *words, preexec_fn=slacken)
    else:
        ran = arena.run(*words, options=["--wall", "1s"], preexec_fn=slacken, seconds=20)
    return Seen(ran.rc == 0, f"{'slept to its end' if ran.rc == 0 else 'ended'} after {ran.seconds:.1f} s, the limit is 1 s ({ran.line})")


CONNECTIONS = Path("/sys/fs/fuse/connections")


def connections() -> set[str]:
    """The node's FUSE connections. From here on their list is mounted for all that this try starts, as systemd does it for everybody."""
    libc, none, private = ctypes.CDLL(None, use_errno=True), b"none", ctypes.c_ulong(0x44000)  # MS_REC | MS_PRIVATE
    if libc.unshare(0x20000) or libc.mount(none, b"/", None, private, None):
        raise OSError(ctypes.get_errno(), "a mount namespace")
    if libc.mount(none, bytes(CONNECTIONS), b"fusectl", None, None) and ctypes.get_errno() != errno.EBUSY:  # EBUSY: it is mounted there
        raise OSError(ctypes.get_errno(), "fusectl")
    return {one.name for one in CONNECTIONS.iterdir()}


def cut_at_the_end(arena: Arena, others: set[str], uid: int) -> Callable[[], object]:
    """Of that uid's FUSE connections those that others has not; the end is that of the try, also by a signal, or when this is called: it waits for a
    child of the try's, which does it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writer)
            os.read(reader, 1)
            for one in CONNECTIONS.iterdir():
                with suppress(OSError):  # others' come and go
                    if one.name not in others and one.stat().st_uid == uid:
                        (one / "abort").write_text("1")
        finally:
            os._exit(0)
    os.close(reader)

    @functools.cache
    def end() -> None:
        os.close(writer)
        os.waitpid(pid, 0)

    arena.undo(end)
    return end


@attack("C36", "its FUSE connections are cut, where the id is the run's alone; strict: no user namespace", needs=("root", "fuse", "userns"),
        accepted=(OWN_SERVER,), only=not_compat, peers=False)
def waits_for_itself(arena: Arena) -> Seen:
    """Its wrapper is killed then, and another run made, which finishes it where no keeper does."""
    others = connections()
    live = arena.begin_payload("c_processes", "own_server", "lock")
    pid, said = live.pid(), live.hear()
    if said == "waits":
        cut_at_the_end(arena, others, psutil.Process(pid).uids().real)
    live.kill()
    began, ran = time.monotonic(), Ran(None, said.encode(), b"", 0, True)
    if not arena.control:
        arena.run("/bin/true", refusal=True)
    arena.until(lambda: not held(arena, ran).reached, 0.2 if arena.control else 10)
    return held(arena, replace(ran, seconds=time.monotonic() - began))


@attack("C40", "who looks at processes asks for nothing that takes their mmap_lock", needs=("root", "fuse", "userns"), peers=False,
        only=lambda at: at.profile in ("batch", "none"))
def locked_memory(arena: Arena) -> Seen:
    """The pilot asks ``nodewrap ps``, whose row is this run's. The control reads each process's command line, as psutil and ps(1) do."""
    others = connections()
    live = arena.begin_payload("c_processes", "locked_memory")
    pid, said = live.pid(), live.hear()
    if said != "holds":
        raise NotRunError(f"it holds nothing: {said or live.end(seconds=1).line}")
    cut = cut_at_the_end(arena, others, psutil.Process(pid).uids().real)
    at = arena.wrapper.configuration
    look = [at.binary, "ps", "--json"] if at else ["/bin/cat", *(f"/proc/{one.pid}/cmdline" for one in psutil.Process(pid).children(recursive=True))]
    ran = arena.run(*look, as_is=True, seconds=8)
    cut()
    live.end(b"")
    if at and ran.rc is not None and not ran.out:
        raise NotRunError(f"ps does not tell the run: {ran.line}")
    return Seen(ran.rc is None, f"who looks {'waits' if ran.rc is None else 'is told'} ({ran.seconds:.1f} s, status {ran.rc})")


# ---- the payload's own end ----


@attack("C16", "kernel ignores signals to init; other uid", accepted=(SAME_ID_BARE,))
def kill_the_parent(arena: Arena) -> Seen:
    """Stop and kill pid 1 and the parent, then end with 42: whoever waits has to tell so."""
    words = hostile("c_processes", "kill_parents")
    ran = arena.run("/bin/sh", "-c", '"$@"; exit $?', "sh", *words) if arena.control else arena.run(*words, "1")
    return Seen(ran.rc != 42, f"who waits tells {ran.rc} ({ran.line})")


@attack("C17", "the payload is never pid 1", control="rootless")
def own_signal(arena: Arena) -> Seen:
    words = hostile("c_processes", "term_self")
    ran = arena.run("unshare", "--pid", "--fork", "--", *words) if arena.control else arena.run(*words)
    return Seen(ran.rc not in (-signal.SIGTERM, 128 + signal.SIGTERM), f"SIGTERM to itself: {ran.line}")


@attack("C38", "init lets go of whoever makes it a tracer", peers=False)
def init_made_tracer(arena: Arena) -> Seen:
    """The control is a parent that takes the first word of waitpid(2) for the end."""
    words = hostile("c_processes", "tracee")
    ran = arena.run(*(hostile("c_processes", "careless_waiter") if arena.control else ()), *words)
    return Seen(ran.rc != 42, f"42 came back as {ran.rc} ({ran.line})")


@attack("C20", "init tells the payload's own end")
def orphans_code(arena: Arena) -> Seen:
    """The control is an init that takes the last status for the payload's."""
    words = hostile("c_processes", "orphan_code")
    ran = arena.run(*(hostile("c_processes", "careless_init") if arena.control else ()), *words)
    return Seen(ran.rc != 42, f"42 came back as {ran.rc}")


# ---- what reaches the pilot's ----


class Canary:
    """A process of the pilot's outside, with the nonce in its memory and in an open file."""

    def __init__(self, arena: Arena) -> None:
        top = arena.mkdir(arena.home / "cwd")
        arena.secret(top / "secret")
        self.live: Live = arena.accomplice("c_processes", "canary", cwd=top)
        self.pid = self.live.process.pid
        self.address, self.fd = map(int, (top / "where").read_text().split())

    def answer(self) -> tuple[int, str]:
        """Signals that it got, the first 32 bytes of its memory."""
        assert self.live.process.stdin is not None
        self.live.process.stdin.write(b"\n")
        self.live.process.stdin.flush()
        hits, _, text = self.live.hear().partition(" ")
        return int(hits), text


@attack("C10", APART, accepted=(SAME_ID_BARE,))
def signal_everybody(arena: Arena) -> Seen:
    """kill(-1), to the pilot's process and its group, with a signal that hurts nobody: the process counts those that it got."""
    canary = Canary(arena)
    ran = arena.payload("c_processes", "signal_all", canary.pid)
    hits, _ = canary.answer()
    return Seen(hits > 0, f"the pilot's process got {hits} signals ({ran.line})")


@attack("C11", APART, accepted=(SAME_ID_BARE,))
def ptrace_the_pilot(arena: Arena) -> Seen:
    """Write into a process of the pilot's. Judged by what it says that its memory is then."""
    canary, word = Canary(arena), secrets.token_hex(4)
    ran = arena.payload("c_processes", "poke", canary.pid, canary.address, word)
    _, text = canary.answer()
    return Seen(text.startswith(word), f"memory of the pilot's process {'changed' if text.startswith(word) else 'is as it was'} ({ran.line})")


@attack("C12", APART, accepted=(SAME_ID_BARE,))
def memory_and_descriptors(arena: Arena) -> Seen:
    """process_vm_readv of the pilot's process, then pidfd_getfd of its open file."""
    canary = Canary(arena)
    return arena.has_nonce(arena.payload("c_processes", "steal", canary.pid, canary.address, canary.fd))


@attack("C37", "filter; Landlock; other uid", accepted=(SAME_ID_BARE,))
def descriptors_by_a_socket(arena: Arena) -> Seen:
    """The socket is in the work directory: whoever the payload is, it may connect."""
    arena.secret(arena.mkdir(arena.home / "cwd") / "secret")
    arena.accomplice("c_processes", "reachable", arena.work / "door", cwd=arena.home / "cwd")
    return arena.has_nonce(arena.payload("c_processes", "steal_by_socket", arena.work / "door"))


@attack("C13", "pid namespace; other uid or not dumpable", accepted=(SAME_ID_BARE,))
def proc_of_the_pilot(arena: Arena) -> Seen:
    """The nonce is in the victim's working directory and an open file."""
    arena.secret(arena.mkdir(arena.home / "cwd") / "secret")
    victim = arena.accomplice("c_processes", "victim", cwd=arena.home / "cwd", wait=True)
    return arena.has_nonce(arena.payload("c_processes", "proc_files", victim.process.pid))


@attack("C34", APART, accepted=(SAME_ID_BARE,))
def signal_by_the_kernel(arena: Arena) -> Seen:
    canary = Canary(arena)
    ran = arena.payload("c_processes", "sigio", canary.pid)
    hits, _ = canary.answer()
    return Seen(hits > 0, f"the pilot's process got {hits} signals ({ran.line})")


@attack("C25", "no_new_privs; nosuid; the owner has no number inside", needs=("root",))
def setid_programs(arena: Arena) -> Seen:
    """The node's su, and a copy of cat that is root's and set-uid in the work directory. Judged by the processes' effective ids from outside."""
    canary = arena.work / "canary"
    canary.write_bytes(Path("/bin/cat").read_bytes())
    canary.chmod(0o4755)
    live = arena.begin_payload("c_processes", "setids", "./canary", f"su {arena.caller.name} -c true")
    said = live.hear()
    names = {comm(one.pid) for one in family_with(lambda one: one.uids().effective == 0)} & {"canary", "su"}
    live.end(b"")
    return Seen(bool(names), f"with root's rights: {', '.join(sorted(names)) or 'none'} ({said})")


def listen(arena: Arena, path: Path, mode: int) -> None:
    """Whoever connects to that socket is told the nonce."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    path.chmod(mode)
    arena.own(path)
    arena.undo(path.unlink)
    sock.listen(8)

    def serve() -> None:
        with suppress(OSError):
            while True:
                with sock.accept()[0] as other:
                    other.sendall(arena.nonce.encode())

    threading.Thread(target=serve, daemon=True).start()


@attack("C28", "sockets of services are not in the root", needs=("root",), accepted=(BARE_PROFILE,))
def sockets_of_services(arena: Arena) -> Seen:
    """A service's socket below /run that everybody may connect to."""
    top = Path(f"/run/nodewrap-escape-{arena.nonce[:12]}")
    top.mkdir(mode=0o755)
    arena.undo(top.rmdir)
    listen(arena, top / "docker.sock", 0o666)
    return arena.has_nonce(arena.payload("c_processes", "hear", top / "docker.sock"))


@attack("C29", "built root; environment from an allow-list", accepted=(SAME_ID_BARE,))
def agents(arena: Arena) -> Seen:
    """An agent's socket, where ssh-agent makes it, told in the environment too."""
    top = Path(f"/tmp/ssh-{arena.nonce[:12]}")
    arena.undo(lambda: top.rmdir())
    arena.mkdir(top)
    listen(arena, top / "agent.1", 0o600)
    return arena.has_nonce(arena.payload("c_processes", "hear", env={"SSH_AUTH_SOCK": str(top / "agent.1")}))


@attack("C30", "homes are empty and the run's own, or not shown", accepted=(BARE_PROFILE,))
def start_up_files(arena: Arena) -> Seen:
    """Write beside .bashrc where the pilot's home is, and in the payload's; a second payload, in another directory, looks into its home."""
    name, env = f".nodewrap-escape-{arena.nonce[:12]}", {"HOME": str(arena.home)}
    first = arena.payload("c_processes", "poison", name, arena.nonce, arena.home, env=env)
    if (arena.home / name).exists():
        return Seen(True, f"written into the pilot's home ({first.line})")
    arena.work = arena.mkdir(arena.home / "another", 0o755)
    return arena.has_nonce(arena.payload("c_processes", "poisoned", name, env=env))


# ---- control groups ----


def delegated(arena: Arena) -> Path:
    """A control group that is the pilot's: this try, and so all that it starts, is in its half ``pilot``; nobody is in ``other``."""
    mount = Path(next(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line))
    before = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    top = mount / f"escape-{arena.nonce[:12]}"
    arena.undo(lambda: remove_group(top, Path(f"{mount}{before}")))
    for path in (top, top / "pilot", top / "other"):
        path.mkdir()
        for one in (path, path / "cgroup.procs", path / "cgroup.subtree_control", path / "cgroup.threads"):
            arena.own(one)
    (top / "pilot/cgroup.procs").write_text(str(os.getpid()))
    return top


def remove_group(top: Path, back: Path) -> None:
    (back / "cgroup.procs").write_text(str(os.getpid()))
    (top / "cgroup.kill").write_text("1")
    end = time.monotonic() + 5
    while top.exists() and time.monotonic() < end:
        for where, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(where)


def strangers(top: Path) -> list[str]:
    """Groups below it that we did not make."""
    return sorted(str(Path(where).relative_to(top)) for where, _, _ in os.walk(top) if Path(where) not in (top, top / "pilot", top / "other"))


@attack("C07", "cgroup.kill, which ends what is frozen; cgroup tree read-only or not shown", needs=("root", "cgroup2"), only=not_compat)
def frozen_group(arena: Arena) -> Seen:
    top = delegated(arena)
    return held(arena, arena.payload("c_processes", "freeze", "lock", top / "pilot", top / "other"))


@attack("C08", "cgroup tree read-only or not shown; other uid", needs=("root", "cgroup2"), accepted=(SAME_ID_BARE,))
def another_group(arena: Arena) -> Seen:
    """Judged by what stands in the other group's cgroup.procs while the payload lives."""
    top = delegated(arena)
    live = arena.begin_payload("c_processes", "move", top / "other")
    said = live.hear()
    moved = (top / "other/cgroup.procs").read_text().split()
    live.end(b"")
    return Seen(bool(moved), f"{len(moved)} processes in the pilot's other group ({said})")


@attack("C09", "groups are removed from the bottom up", needs=("root", "cgroup2"), only=not_compat, accepted=(SAME_ID_BARE, PILOTS_GROUP))
def crowd_of_groups(arena: Arena) -> Seen:
    """300 groups below each group that the payload may write to. What is left at the end was not removed."""
    top = delegated(arena)
    ran = arena.payload("c_processes", "crowd", 100, top / "pilot", top / "other")
    found = strangers(top)
    return Seen(bool(found), f"{len(found)} groups left, {found[:2]} ({ran.line})")


left_out(
    C26="needs cron and at running: their commands are set-id programs (C25), their spools are looked at after every try (D16)",
    C27="needs systemd with user managers and D-Bus: distribution-kernel lane; SECURITY.md says what stays open in none",
    C32="nobody but the node's root can move its clocks, so no control may try it; a time namespace cannot be moved once it is entered",
    C35="no control can succeed: the kernel cancels a task's writes in flight when it ends; that none outlives the run is C01 to C23",
)
