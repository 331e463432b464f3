"""What an attack may need of the node beyond a kernel and Python. ``root`` and ``other`` are asked of the suite itself."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nodewrap.escape.model import Attack


def _sysctl(name: str, value: str) -> Callable[[], bool]:
    path = Path("/proc/sys") / name.replace(".", "/")
    return lambda: path.exists() and path.read_text().strip() == value


def _tool(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _core_is_a_file() -> bool:
    """Dumps are written into the working directory."""
    return Path("/proc/sys/kernel/core_pattern").read_text()[:1] not in "|/"


def _socket(family: int, kind: int, protocol: int = 0) -> Callable[[], bool]:
    def made() -> bool:
        with suppress(OSError), socket.socket(family, kind, protocol):
            return True
        return False

    return made


#: {name: (condition, what is missing)}
CHECKS: dict[str, tuple[Callable[[], bool], str]] = {
    "tiocsti": (_sysctl("dev.tty.legacy_tiocsti", "1"), "dev.tty.legacy_tiocsti = 1: this kernel refuses TIOCSTI to everybody"),
    "userns": (lambda: os.path.exists("/proc/self/ns/user") and not _sysctl("user.max_user_namespaces", "0")(), "user namespaces"),
    "fuse": (lambda: os.path.exists("/dev/fuse"), "/dev/fuse"),
    "keys": (lambda: os.path.exists("/proc/keys"), "a kernel with keyrings"),
    "vsock": (_socket(40, 1), "AF_VSOCK in the kernel"),
    "alg": (_socket(38, 5), "AF_ALG in the kernel"),
    "rds": (_socket(21, 5), "RDS in the kernel"),
    "sctp": (_socket(2, 1, 132), "SCTP in the kernel"),
    "ia32": (lambda: os.uname().machine == "x86_64", "the 32-bit system calls of x86-64"),
    "ip": (lambda: os.path.exists("/sbin/ip"), "the command ip (iproute2)"),
    "gcc": (_tool("cc"), "a C compiler"),
    "cgroup2": (lambda: " - cgroup2 " in Path("/proc/self/mountinfo").read_text(), "a mounted cgroup v2"),
    "apptainer": (_tool("apptainer"), "apptainer"),
    "openssl": (_tool("openssl"), "the openssl command"),
    "kmsg": (lambda: os.access("/dev/kmsg", os.R_OK | os.W_OK), "/dev/kmsg"),
    "core": (_core_is_a_file, "kernel.core_pattern without a path or a program: core dumps go elsewhere here"),
}


def missing(attack: Attack, has_other: bool) -> str:
    """Why it cannot be tried by this suite on this node, "" when it can. Raises KeyError for a need that nobody defined."""
    for name in attack.needs:
        if name == "root":
            if os.geteuid() != 0:
                return "needs root as its judge: run the suite as root"
        elif name == "other":
            if not has_other:
                return "needs root and an account of payloads (the guard's switch-uid) for its control"
        elif not CHECKS[name][0]():
            return f"needs {CHECKS[name][1]}"
    if attack.control in ("root", "switched") and os.geteuid() != 0:
        return "its control needs root: run the suite as root"
    if attack.control == "switched" and not has_other:
        return "its control needs an account of payloads (the guard's switch-uid)"
    return ""
