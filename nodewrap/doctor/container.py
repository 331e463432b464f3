"""Containers by Apptainer (docs/apptainer.md): tried for real, with an image made of this node's own directories."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from nodewrap import _paths, apptainer
from nodewrap.doctor import probe

LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
PLACES = ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "var")
SECONDS = 30


def programs(policy: dict[str, Any] | None) -> list[str]:
    """The runtimes that the applied policy names."""
    return sorted({rule["image"]["program"] for rule in (policy or {}).get("rules", ()) if rule.get("image")})


def version(program: str) -> str:
    """One line; raises OSError when it does not even start."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode:
        raise OSError(f"exit {done.returncode} {done.stderr.strip()[-200:]}")
    return done.stdout.strip()


def try_container(program: str, image: str) -> Callable[[], None]:
    """A container of that image in which the node's own /usr is bound: true(1) runs there, as payloads' commands do (csrc/container.c)."""

    def work() -> None:
        plain = [f"/{name}" for name in LINKS if os.path.isdir(f"/{name}") and not os.path.islink(f"/{name}")]
        binds = [word for place in ("/usr", *plain) for word in ("--bind", f"{place}:{place}:ro")]
        argv = [program, "--quiet", "--nocolor", "exec", "--contain", "--no-home", *binds, image, apptainer.INSIDE, "/usr/bin/env", "true"]
        env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": image, "APPTAINER_CONFIGDIR": f"{image}/own"}
        os.chdir("/")
        code, told, said = _ran(argv, env)
        if code or not told:
            raise OSError(f"exit {code}{'' if told else ' before the command'}: {' '.join(said.split())[-300:]}")

    return work


def _ran(argv: list[str], env: dict[str, str]) -> tuple[int, bytes, str]:
    """The exit code, what nodewrap-inside told (nothing when it was not reached), and what was said. In a process of one's own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said, own = os.memfd_create("said"), os.open(f"{_paths.LIBEXEC}/nodewrap-inside", os.O_RDONLY)
    first = int(apptainer.INSIDE.rpartition("/")[2]) - 2
    wanted = {1: said, 2: said, first: said, first + 1: theirs.fileno(), first + 2: own}
    above = {place: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first + 3) for place, fd in wanted.items()}
    pid = os.posix_spawn(argv[0], argv, env, file_actions=[(os.POSIX_SPAWN_DUP2, fd, place) for place, fd in above.items()])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = ours.recv(4) if select.select([ours], [], [], 0)[0] else b""
    return code, told, os.pread(said, 1 << 16, 0).decode(errors="replace")


def problem(program: str, uid: int, gid: int) -> str:
    """Why no container can be made here by that user, or ""."""
    image = tempfile.mkdtemp(prefix="nodewrap-doctor-")
    try:
        os.chmod(image, 0o755)  # noqa: S103  the caller, who is somebody else, must get in
        for name in PLACES:
            os.mkdir(f"{image}/{name}")
        os.mkdir(f"{image}/own")
        os.chown(f"{image}/own", uid, gid)
        for name in LINKS:
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), f"{image}/{name}")
            elif os.path.isdir(f"/{name}"):
                os.mkdir(f"{image}/{name}")
        return probe.attempt(try_container(program, image), uid, gid)
    finally:
        shutil.rmtree(image)


def mounts_sif(program: str, fuse: bool) -> str:
    """How SIF files get mounted here, or ""; fuse: may the caller open /dev/fuse?"""
    own = [os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(program))), "libexec/apptainer/bin")]
    path = os.pathsep.join(["/usr/bin", "/bin", "/usr/sbin", "/sbin", *own])
    mounter = shutil.which("squashfuse_ll", path=path) or shutil.which("squashfuse", path=path)
    if fuse and mounter:
        return f"mounted by {mounter}"
    unpacker = shutil.which("unsquashfs", path=path)
    return f"unpacked by {unpacker} at every start, since {'there is no squashfuse' if fuse else '/dev/fuse cannot be opened'}" if unpacker else ""
