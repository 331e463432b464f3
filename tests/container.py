"""A real Apptainer (make deps unpacks one where the node has none) and tiny images for it, made of this node's own busybox."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.files import CHECKOUT
from tests.need import need, search_path

OWN = CHECKOUT / "build/apptainer"
PROGRAMS = (
    "sh", "cat", "chmod", "echo", "env", "false", "grep", "head", "id", "kill", "ls", "mkdir", "mount", "ps", "pwd", "sleep", "test", "touch", "true",
)


def program():
    """Path of apptainer: the node's, or the one that make deps unpacked. Skips when there is none."""
    if (OWN / "usr/bin/apptainer").exists():
        return OWN / "usr/bin/apptainer"
    need("apptainer")
    return Path(os.path.realpath(shutil.which("apptainer", path=search_path())))


def profile(name="batch"):
    """What the policy adds to a profile so that the payload finds that Apptainer."""
    return f'[profile.{name}]\nadd = {{ read_only = ["{OWN}"] }}\n' if program().is_relative_to(OWN) else ""


def tree(path):
    """An image as a directory: busybox and the directories that a container wants."""
    need("busybox")
    busybox = shutil.which("busybox", path=search_path())
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var/tmp"):
        (path / name).mkdir(parents=True, exist_ok=True)
    shutil.copy2(busybox, path / "bin/busybox")
    for name in PROGRAMS:
        (path / "bin" / name).symlink_to("busybox")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (path / "etc/group").write_text("root:x:0:\n")
    (path / "made-for-the-test").write_text("yes\n")
    return path


def node_tree(path):
    """The node's own system as an image: empty places, and links where it has links. node_binds says what is bound there."""
    path.mkdir()
    for name in ("dev", "etc", "home", "opt", "proc", "root", "run", "sys", "tmp", "usr", "var/tmp"):
        (path / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            (path / name).symlink_to(os.readlink(f"/{name}"))
        elif os.path.isdir(f"/{name}"):
            (path / name).mkdir()
    for name in ("passwd", "group", "hosts", "localtime", "resolv.conf"):  # Apptainer warns when it cannot put its own there
        (path / "etc" / name).touch()
    return path


def node_binds(*more):
    """Options of apptainer exec that fill node_tree's image; more: directories at their own places."""
    names = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
    system = [name for name in names if os.path.isdir(name) and not os.path.islink(name)]
    return [word for place in ("/usr:/usr:ro", "/etc:/etc:ro", *system, *more) for word in ("--bind", os.fspath(place))]


def sif(path, source, account):
    """A SIF file of that directory, built by that account (as root, Apptainer asks for capabilities that containers' hosts may not have)."""
    need("mksquashfs")
    ids = {"user": account.uid, "group": account.gid, "extra_groups": account.groups} if os.geteuid() == 0 else {}
    scratch = path.parent / "apptainer-build"
    scratch.mkdir()
    os.chown(scratch, account.uid, account.gid)
    env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(scratch), "APPTAINER_TMPDIR": str(scratch), "APPTAINER_CACHEDIR": str(scratch)}
    argv = [program(), "--quiet", "build", scratch / "image.sif", source]
    done = subprocess.run(argv, env=env, cwd=scratch, capture_output=True, text=True, timeout=60, check=False, **ids)
    assert done.returncode == 0, done.stderr
    (scratch / "image.sif").rename(path)
    shutil.rmtree(scratch)
    return path
