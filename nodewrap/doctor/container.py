"""Containers by Apptainer (docs/apptainer.md): tried for real, with an image made of this node's own directories."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

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
    """A container of that image in which the node's own /usr is bound: true(1) runs there."""

    def work() -> None:
        plain = [f"/{name}" for name in LINKS if os.path.isdir(f"/{name}") and not os.path.islink(f"/{name}")]
        binds = [word for place in ("/usr", *plain) for word in ("--bind", f"{place}:{place}:ro")]
        argv = [program, "--quiet", "--nocolor", "exec", "--contain", "--no-home", *binds, image, "/usr/bin/env", "true"]
        env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": image, "APPTAINER_CONFIGDIR": f"{image}/own"}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", env=env, timeout=SECONDS)
        if done.returncode:
            raise OSError(f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}")

    return work


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
