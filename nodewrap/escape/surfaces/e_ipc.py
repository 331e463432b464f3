"""E: IPC and terminals. What outlives its maker, what is reached by name or number, and who else reads the terminal."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import shutil
import socket
import struct
import subprocess
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

from nodewrap.escape.arena import Arena, NotRunError, hostile
from nodewrap.escape.evidence import sockets
from nodewrap.escape.model import (
    ABSTRACT_SOCKETS,
    BARE_PROFILE,
    PIPE_FLAGS,
    PIPE_OF_THE_SAME_ID,
    QUEUES_UNSEEN,
    SAME_ID_BARE,
    WATCHED_DIRECTORIES,
    Seen,
    attack,
    left_out,
)
from nodewrap.escape.wrappers import PATH

AF_VSOCK, IPC_RMID = 40, 0
left_out(E12="needs a virtual console of the machine as the pilot's terminal; the filter answers TIOCLINUX as it does TIOCSTI (E10, E11)")


# ---- objects of the kernel's ----


def _sysv(key: int) -> list[str]:
    """Which kinds of System V object have that key, in our IPC namespace."""
    tables = {kind: Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:] for kind in ("shm", "sem", "msg")}
    return [kind for kind, lines in tables.items() if any(int(line.split()[0]) == key for line in lines)]


def _remove_sysv(key: int) -> None:
    libc = ctypes.CDLL(None)
    if (shm := libc.shmget(key, 0, 0)) >= 0:
        libc.shmctl(shm, IPC_RMID, None)
    if (sem := libc.semget(key, 0, 0)) >= 0:
        libc.semctl(sem, 0, IPC_RMID)
    if (msg := libc.msgget(key, 0)) >= 0:
        libc.msgctl(msg, IPC_RMID, None)


def _key(arena: Arena) -> int:
    """A key of this try; what has it goes at the end, where it is still there."""
    key = int(arena.nonce[:7], 16) | 1
    arena.undo(lambda: _remove_sysv(key))
    return key


def _queue(arena: Arena) -> str:
    """The name of a queue of this try, likewise."""
    name = f"/nw{arena.nonce[::-1]}"
    arena.undo(lambda: ctypes.CDLL("librt.so.1").mq_unlink(name.encode()))
    return name


@attack("E01", "ipc namespace; removed as the id that made it", accepted=(SAME_ID_BARE,))
def sysv_left(arena: Arena) -> Seen:
    key = _key(arena)
    ran = arena.payload("e_ipc", "leave_sysv", key)
    left = _sysv(key)
    return Seen(bool(left), f"left: {', '.join(left) or 'nothing'} ({ran.line})")


@attack("E02", "ipc namespace", accepted=(BARE_PROFILE,))
def sysv_of_the_pilot(arena: Arena) -> Seen:
    """The pilot's segment and queue are open to everybody: nothing but the namespace is in the way."""
    key = _key(arena)
    arena.accomplice("e_ipc", "plant_sysv", key, arena.nonce)
    return arena.has_nonce(arena.payload("e_ipc", "read_sysv", key))


@attack("E03", "ipc namespace", accepted=(BARE_PROFILE,))
def queue_of_the_pilot(arena: Arena) -> Seen:
    name = _queue(arena)
    arena.accomplice("e_ipc", "plant_queue", name, arena.nonce)
    return arena.has_nonce(arena.payload("e_ipc", "read_queue", name))


@attack("E21", "ipc namespace; removed as the id that made it", accepted=(SAME_ID_BARE, QUEUES_UNSEEN))
def queue_left(arena: Arena) -> Seen:
    name = _queue(arena)
    ran = arena.payload("e_ipc", "leave_queue", name)
    found = ctypes.CDLL("librt.so.1").mq_open(name.encode(), os.O_RDONLY | os.O_CLOEXEC)
    if found >= 0:
        os.close(found)
    return Seen(found >= 0, f"the queue {'is there' if found >= 0 else 'is not there'} after the end ({ran.line})")


def _shm(name: str) -> list[Path]:
    """A file, and a POSIX semaphore's."""
    return [Path(f"/dev/shm/{prefix}{name}") for prefix in ("", "sem.")]


@attack("E04", "private /dev/shm", accepted=(BARE_PROFILE,))
def shm_of_the_pilot(arena: Arena) -> Seen:
    name = f"nw{arena.nonce[::-1]}"
    for path in _shm(name):
        arena.secret(path, 0o644)
    return arena.has_nonce(arena.payload("e_ipc", "read_shm", name))


@attack("E22", "private /dev/shm; removed as the id that made it", accepted=(SAME_ID_BARE,))
def shm_left(arena: Arena) -> Seen:
    name = f"nw{arena.nonce}"
    ran = arena.payload("e_ipc", "leave_shm", name)
    left = [path for path in _shm(name) if path.exists()]
    for path in left:
        arena.undo(path.unlink)
    return Seen(bool(left), f"left: {', '.join(map(str, left)) or 'nothing'} (status {ran.rc})")


# ---- sockets ----


def _root(arena: Arena) -> dict[str, Any]:
    """For Popen: an accomplice that is a daemon of the node's, where the suite is root."""
    return {"user": 0, "group": 0, "extra_groups": []} if arena.is_root else {}


@attack("E05", "network namespace (strict); Landlock (batch, compat)", accepted=(ABSTRACT_SOCKETS,))
def abstract_sockets(arena: Arena) -> Seen:
    """One of the pilot's and, where the suite is root, one of a daemon of the node's."""
    names = [f"nw{arena.nonce[:8]}-pilot", f"nw{arena.nonce[:8]}-node"]
    arena.accomplice("e_ipc", "serve_abstract", names[0], arena.nonce)
    arena.accomplice("e_ipc", "serve_abstract", names[1], arena.nonce, **_root(arena))
    return arena.has_nonce(arena.payload("e_ipc", "ask_abstract", *names))


@attack("E06", "the built root shows no place where daemons have sockets", accepted=(BARE_PROFILE,))
def path_sockets(arena: Arena) -> Seen:
    """As D-Bus, munge or the batch system have them: in /run, and where pilots put theirs; mode 0666."""
    tops = ["/tmp", "/var/tmp", "/dev/shm", str(arena.home), *(["/run"] if arena.is_root else [])]
    paths = [Path(top) / f"nw{arena.nonce[:8]}" for top in tops]
    for path in paths:
        arena.undo(path.unlink)
    arena.accomplice("e_ipc", "serve_paths", arena.nonce, *paths, **_root(arena))
    return arena.has_nonce(arena.payload("e_ipc", "ask_paths", *paths))


@attack("E15", "no capability in the first user namespace; the kernel translates pids and uids", control="root", needs=("root",))
def forged_credentials(arena: Arena) -> Seen:
    """The judge's socket is in the work directory, so everybody reaches it; it counts what the kernel says about who wrote."""
    path = arena.work / "control"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with arena.as_caller():
            server.bind(str(path))
            path.chmod(0o777)
        server.setblocking(False)
        ran = arena.payload("e_ipc", "forge_credentials", path, os.getpid(), arena.caller.uid)
        told = []
        with suppress(BlockingIOError):
            while True:
                _, more, _, _ = server.recvmsg(16, 256)
                told += [struct.unpack("iII", data) for level, kind, data in more if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)]
    forged = [one for one in told if one[0] == os.getpid() or one[1] == 0]
    return Seen(bool(forged), f"{len(told)} messages, as (pid, uid, gid) of somebody else: {forged or 'none'} ({ran.line})")


# ---- keys ----


@attack("E07", "a session keyring of its own", needs=("keys",))
def session_keyring(arena: Arena) -> Seen:
    """The pilot has the nonce in its session keyring, which exec hands on."""
    name = f"nw{arena.nonce[:8]}"
    command = hostile("e_ipc", "find_keys", name)
    argv = [*arena.wrapper.argv(command, str(arena.work), [])]
    ran = arena.begin(*hostile("e_ipc", "exec_with_key", name, arena.nonce, shutil.which(argv[0], path=PATH) or argv[0], *argv[1:]), as_is=True).end()
    return arena.has_nonce(ran)


@attack("E23", "ENOSYS to key calls; keyrings of its own user namespace or uid", needs=("keys",), accepted=(SAME_ID_BARE,))
def user_keyring(arena: Arena) -> Seen:
    name = f"nw{arena.nonce[:8]}"
    number = arena.accomplice("e_ipc", "plant_key", name, arena.nonce, -4).hear()
    arena.undo(lambda: arena.accomplice("e_ipc", "drop_key", number, wait=False).end())
    return arena.has_nonce(arena.payload("e_ipc", "find_keys", name, number))


@attack("E08", "ENOSYS to key calls; keyrings emptied at the end", needs=("keys",), accepted=(SAME_ID_BARE,))
def keyring_of_the_job_before(arena: Arena) -> Seen:
    name = f"nw{arena.nonce[:8]}"
    first = arena.payload("e_ipc", "add_key", name, arena.nonce, -4)
    number = first.text if first.text.isdigit() else "0"
    arena.undo(lambda: arena.accomplice("e_ipc", "drop_key", number, wait=False).end())
    seen = arena.has_nonce(arena.payload("e_ipc", "find_keys", name, number))
    return Seen(seen.reached, f"the first said {first.line}, the second {seen.what}")


# ---- terminals ----


class Terminal:
    """The pilot's terminal. master: its far side; slave: a descriptor of the judge's own, by which it looks at the state of things."""

    def __init__(self, arena: Arena) -> None:
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)
        arena.own(self.name)
        arena.undo(self.close)
        how = termios.tcgetattr(self.slave)
        how[3] &= ~(termios.ICANON | termios.ECHO)
        how[6][termios.VMIN] = how[6][termios.VTIME] = 0
        termios.tcsetattr(self.slave, termios.TCSANOW, how)

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)

    def popen(self) -> dict[str, Any]:
        """For Popen: stdin, and the controlling terminal of the session that begins there."""
        return {"stdin": self.slave, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}

    def typed(self) -> bytes:
        """What waits to be read by the pilot."""
        return os.read(self.slave, 4096)

    def shown(self) -> bytes:
        """What the pilot's screen got."""
        os.set_blocking(self.master, False)
        with suppress(BlockingIOError):
            return os.read(self.master, 4096)
        return b""


def _type(arena: Arena, high: int) -> Seen:
    terminal = Terminal(arena)
    ran = arena.begin_payload("e_ipc", "type_in", arena.nonce, high, **terminal.popen()).end()
    typed = terminal.typed()
    return Seen(arena.nonce.encode() in typed, f"{len(typed)} bytes typed into the pilot's terminal ({ran.line})")


@attack("E10", "own session and terminal; filter", needs=("tiocsti",))
def tiocsti(arena: Arena) -> Seen:
    return _type(arena, 0)


@attack("E11", "own session and terminal; the filter compares the bits that the kernel looks at", needs=("tiocsti",))
def tiocsti_high_bits(arena: Arena) -> Seen:
    return _type(arena, 1)


@attack("E13", "own session; own terminal")
def foreground_stolen(arena: Arena) -> Seen:
    """Who is in front on the pilot's terminal is asked at its far side: it must be the wrapper's group still."""
    terminal = Terminal(arena)
    live = arena.begin_payload("e_ipc", "take_foreground", **terminal.popen())
    said = live.hear()
    front = os.tcgetpgrp(terminal.master)
    over = live.process.poll() is not None  # nobody is in front of a terminal whose session has ended
    ran = live.end()
    if not said or over:
        raise NotRunError(f"{'looked at too late' if said else 'the payload did not start'}: {ran.line}")
    return Seen(front != live.process.pid, f"in front is {'the wrapper' if front == live.process.pid else 'a group of the payload'} ({said[:80]})")


@attack("E24", "own terminal; the pilot's is put back at the end")
def terminal_left_deaf(arena: Arena) -> Seen:
    terminal = Terminal(arena)
    before = termios.tcgetattr(terminal.slave)
    before[3] |= termios.ICANON | termios.ECHO | termios.ISIG
    termios.tcsetattr(terminal.slave, termios.TCSANOW, before)
    ran = arena.begin_payload("e_ipc", "deafen", **terminal.popen()).end()
    changed = termios.tcgetattr(terminal.slave)[:4] != before[:4]
    return Seen(changed, f"the terminal's settings are {'others' if changed else 'as before'} after the end ({ran.line})")


@attack("E26", "a /dev/pts of its own; other uid", accepted=(SAME_ID_BARE,))
def terminal_by_name(arena: Arena) -> Seen:
    terminal = Terminal(arena)
    ran = arena.payload("e_ipc", "write_to", terminal.name, arena.nonce)
    return Seen(arena.nonce.encode() in terminal.shown(), f"by {terminal.name}: {ran.line}")


# ---- what ends on a screen ----

CONTROLS = ("\x1b", "\x07", "\x9b", "\u202e", "\r")
ESCAPES = "\x1b]2;{}\x07\x9b31m\u202e\r"


def _raw(shown: bytes) -> list[str]:
    return [letter for letter in CONTROLS if letter.encode() in shown]


@attack("E14", "records are JSON with escapes, and so is what the viewer prints", peers=False, once=True)
def escapes_in_the_log(arena: Arena) -> Seen:
    """In argv and job id. Control: a log as scripts write it, shown by cat."""
    word, at = ESCAPES.format(arena.nonce), arena.wrapper.configuration
    if at is None:
        log = arena.work / "log"
        arena.run("/bin/sh", "-c", 'echo "started: $*" >"$0"', str(log), word)
        shown = log.read_bytes()
    else:
        arena.run("/bin/true", word)
        arena.run("/bin/true", word, options=["--job-id", word], refusal=True)
        shown = subprocess.run([at.binary, "audit", "show"], capture_output=True, check=False).stdout[-65536:]
        shown += Path(arena.audit).read_bytes()[-65536:] if arena.records() else b""
    raw = _raw(shown)
    return Seen(bool(raw), f"{len(shown)} bytes of log shown, of them controls: {raw or 'none'}")


@attack("E27", "messages quote what they name", peers=False, refusal=True, once=True)
def escapes_in_messages(arena: Arena) -> Seen:
    """A program that does not exist, an option that is unknown and a work directory that is none, with controls in their names."""
    word = ESCAPES.format(arena.nonce)
    if arena.control:
        said = arena.run("/bin/sh", "-c", 'printf "sh: %s: not found\\n" "$0" >&2', word).err
    else:
        said = arena.run(f"./{word}").err + arena.run("/bin/true", options=[f"--{word}"]).err
        said += arena.run("/bin/true", options=["--workdir", f"{arena.home}/{word}"]).err
    raw = _raw(said)
    return Seen(bool(raw), f"{len(said)} bytes of messages, of them controls: {raw or 'none'}")


# ---- what is shared with the pilot ----


@attack("E19", "end of every process: a mapping ends with the last one")
def mapping_changed_late(arena: Arena) -> Seen:
    data = arena.work / "data"
    with arena.as_caller():
        data.write_bytes(b"-" * 32)
        data.chmod(0o666)
    ran = arena.payload("e_ipc", "change_file", "data", arena.nonce)
    late = arena.until(lambda: data.read_bytes() != b"-" * 32, 0.5)
    return Seen(late, f"the file {'changed' if late else 'stayed as it was'} after the end ({ran.line})")


@attack("E25", "stdout is a pipe of the payload's own, carried by the launcher", accepted=(BARE_PROFILE,))
def log_of_the_pilot_rewritten(arena: Arena) -> Seen:
    log = arena.home / "log"
    with arena.as_caller():
        log.write_bytes(b"-" * 32 + b"\nearlier\n")
    with log.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        ran = arena.begin_payload("e_ipc", "change_stdout", arena.nonce, stdout=file).end()
    changed = not log.read_bytes().startswith(b"-" * 32)
    return Seen(changed, f"the log's first line {'is another' if changed else 'is as it was'} ({ran.err.decode('utf-8', 'replace')[:100]})")


@attack("E28", "sockets are relayed: bytes alone go through", accepted=(BARE_PROFILE,))
def descriptors_by_stdin(arena: Arena) -> Seen:
    """Who is at the other end sends an open file of the pilot's, and counts what descriptors come."""
    file = os.open(arena.secret(), os.O_RDONLY)
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [file])
    ours.settimeout(5)
    live = arena.begin_payload("e_ipc", "by_socket", "y", stdin=theirs)
    theirs.close()
    ran = live.end()
    got = socket.recv_fds(ours, 10, 1)[1] if ran.text.startswith("1 ") else []
    seen = arena.has_nonce(ran)
    return Seen(seen.reached or bool(got), f"{len(got)} descriptors came out; {seen.what}")


def _pipe(arena: Arena) -> tuple[int, int]:
    """The pilot's, for reading and for writing; both are the judge's too."""
    ends = os.pipe()
    if arena.is_root:
        os.fchown(ends[0], arena.caller.uid, arena.caller.gid)
    return ends


@attack("E29", "output pipes are relayed where the payload may have the pilot's id; else other uid", accepted=(SAME_ID_BARE,))
def output_of_others(arena: Arena) -> Seen:
    """The payload's stderr is a pipe in which something of the pilot's is still to be read."""
    _, writer = _pipe(arena)
    os.write(writer, arena.nonce.encode())
    return arena.has_nonce(arena.begin_payload("e_ipc", "read_back", 2, stderr=writer).end())


@attack("E30", "nothing: pipes as stdin are handed over", accepted=(PIPE_FLAGS,))
def flags_of_the_pipe(arena: Arena) -> Seen:
    reader, _ = _pipe(arena)
    ran = arena.begin_payload("e_ipc", "leave_flags", stdin=reader).end()
    left = fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_NONBLOCK != 0
    return Seen(left, f"O_NONBLOCK is {'set' if left else 'not set'} on the pilot's pipe ({ran.line})")


@attack("E31", "other uid", accepted=(PIPE_OF_THE_SAME_ID,))
def script_of_the_next_reader(arena: Arena) -> Seen:
    """Whoever reads the pilot's pipe next reads the nonce."""
    reader, _ = _pipe(arena)
    ran = arena.begin_payload("e_ipc", "write_into_stdin", arena.nonce, stdin=reader).end()
    os.set_blocking(reader, False)
    found = b""
    with suppress(BlockingIOError):
        found = os.read(reader, 100)
    return Seen(arena.nonce.encode() in found, f"{len(found)} bytes for the next reader ({ran.line})")


@attack("E32", "nothing: whoever may read a directory may watch it (inotify(7))", accepted=(WATCHED_DIRECTORIES,))
def programs_of_others(arena: Arena) -> Seen:
    """The judge opens programs of the node, as execve(2) does, in an order that the nonce gives. Reached: the payload tells that order."""
    names = sorted(entry.name for entry in os.scandir("/usr/bin") if entry.is_file(follow_symlinks=False))[:16]
    order = [names[int(digit, 16) % len(names)] for digit in arena.nonce]
    live = arena.begin_payload("e_ipc", "watch", "/usr/bin")
    said = live.hear()
    for name in order:
        with open(f"/usr/bin/{name}", "rb"):
            pass
    told = iter(live.end(b"").text.split())
    once = [name for name, before in zip(order, [None, *order]) if name != before]  # the kernel tells of the same thing twice in a row but once
    known = sum(name in told for name in once)
    return Seen(known == len(once), f"{known} of {len(once)} programs were told in their order ({said[:80]})")


# ---- signals ----


@attack("E20", "init asks the kernel (waitpid) who ended, and how", accepted=(SAME_ID_BARE,))
def forged_siginfo(arena: Arena) -> Seen:
    """The payload tells its parent that it ended with 0. It ends with 42. Control: an init that believes the signal."""
    command = hostile("e_ipc", "forge_siginfo")
    ran = arena.run(*hostile("e_ipc", "careless_init", *command)) if arena.control else arena.run(*command)
    return Seen(ran.rc != 42, f"its status came back as {ran.rc}")


# ---- sockets of other kinds ----


def _vsock(arena: Arena, function: str, word: str) -> Seen:
    """Whether the payload then has a socket of AF_VSOCK, by a copy of its descriptor."""
    live = arena.begin_payload("f_kernel", function, word)
    said = live.hear()
    found = [one for one in sockets(live) if one[0] == AF_VSOCK] if said else []
    live.end(b"")
    return Seen(bool(found), f"{len(found)} sockets of AF_VSOCK ({said[:100]})")


@attack("E16", "filter: address family", needs=("root", "vsock"), accepted=(BARE_PROFILE,), only=lambda at: at.mode == "log-only")
def vsock(arena: Arena) -> Seen:
    return _vsock(arena, "open_sockets", f"{AF_VSOCK}:1:0")


@attack("E17", "io_uring is answered ENOSYS", needs=("root", "vsock"), accepted=(BARE_PROFILE,), only=lambda at: at.mode == "log-only")
def socket_by_io_uring(arena: Arena) -> Seen:
    """The ring makes the socket, in the kernel: no filter of system calls is asked."""
    return _vsock(arena, "ring_sockets", str(AF_VSOCK))
