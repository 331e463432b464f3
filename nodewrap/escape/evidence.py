"""What the judge sees of a payload that runs: its descriptors, sockets, namespaces and tracers, asked of the kernel and not of the payload."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from nodewrap.escape.arena import Live

#: The same on every architecture (asm-generic/unistd.h).
PIDFD_GETFD = 438


class Descriptor(NamedTuple):
    """link: as /proc names it. writes: opened for writing. device: "b" or "c" and its number for devices, else ""."""

    pid: int
    fd: int
    link: str
    writes: bool
    device: str


def tree(live: Live) -> list[int]:
    """pids of the payload and what descends from it (of a wrapper that tells no pid: the wrapper too)."""
    first = live.pid()
    with suppress(psutil.Error):
        return [first, *(one.pid for one in psutil.Process(first).children(recursive=True))]
    return [first]


def descriptors(live: Live) -> list[Descriptor]:
    """All that they have open, beyond 0 to 2. Needs root for other ids' processes."""
    found = []
    for pid in tree(live):
        with suppress(OSError):
            found += [_descriptor(pid, int(name)) for name in os.listdir(f"/proc/{pid}/fd") if int(name) > 2]
    return found


def _descriptor(pid: int, fd: int) -> Descriptor:
    words = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines() if ":" in line)
    about = os.stat(f"/proc/{pid}/fd/{fd}")
    kind = "b" if stat.S_ISBLK(about.st_mode) else "c" if stat.S_ISCHR(about.st_mode) else ""
    device = f"{kind} {os.major(about.st_rdev)}:{os.minor(about.st_rdev)}" if kind else ""
    return Descriptor(pid, fd, os.readlink(f"/proc/{pid}/fd/{fd}"), int(words["flags"], 8) & os.O_ACCMODE != os.O_RDONLY, device)


def sockets(live: Live) -> list[tuple[int, int]]:
    """(address family, protocol) of each socket that they have open, of a copy of the descriptor itself (pidfd_getfd(2)). Needs root."""
    libc, found = ctypes.CDLL(None, use_errno=True), []
    for one in descriptors(live):
        if not one.link.startswith("socket:"):
            continue
        pidfd = os.pidfd_open(one.pid)
        copy = libc.syscall(PIDFD_GETFD, pidfd, one.fd, 0)
        os.close(pidfd)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        with socket.socket(0, 0, 0, copy) as sock:  # with families that Python does not know it would not find out by itself
            family, protocol = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN), 0
            with suppress(OSError):
                protocol = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
            found.append((family, protocol))
    return found


def namespace(pid: int, kind: str = "user") -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def traced_by(live: Live) -> list[int]:
    """pids outside of the payload's own that it traces."""
    own, found = set(tree(live)), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            text = (path / "status").read_text(errors="replace")
            if int(path.name) not in own and int(text.partition("TracerPid:")[2].split()[0]) in own:
                found.append(int(path.name))
    return found
