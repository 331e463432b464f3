"""Skipping, in one place and with a reason. Under ``NODEWRAP_MUST_WORK=1`` a missing thing is a failure, unless ``NODEWRAP_MAY_SKIP`` names it.

``need("pandoc")`` asks for a program, ``need("root")`` and the other names of CAPABILITIES for a property of this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Callable

import pytest

MUST_WORK = os.environ.get("NODEWRAP_MUST_WORK", "0") not in ("", "0")


def _userns() -> bool:
    """Try it, in a child: sysctls, LSMs and container filters each have their own way to say no."""
    return os.spawnlp(os.P_WAIT, "unshare", "unshare", "--user", "--map-root-user", "true") == 0


CAPABILITIES: dict[str, Callable[[], bool]] = {
    "root": lambda: os.geteuid() == 0,
    "not-root": lambda: os.geteuid() != 0,
    "userns": _userns,
    "loop": lambda: os.geteuid() == 0 and os.path.exists("/dev/loop-control"),
    "fuse": lambda: os.path.exists("/dev/fuse"),
    "cgroup2": lambda: any(" - cgroup2 " in line for line in Path("/proc/self/mountinfo").read_text().splitlines()),
}


def missing(name: str) -> bool:
    return not CAPABILITIES[name]() if name in CAPABILITIES else shutil.which(name, path=search_path()) is None


def search_path() -> str:
    """PATH with the tools that came with this interpreter's environment (ruff, mypy, shellcheck) first."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def must_work(name: str) -> bool:
    allowed = os.environ.get("NODEWRAP_MAY_SKIP", "").replace(",", " ").split()
    return MUST_WORK and name not in allowed


def need(*names: str) -> None:
    for name in names:
        if not missing(name):
            continue
        if must_work(name):
            text = f"{name} is missing and NODEWRAP_MUST_WORK is set; make deps installs it, NODEWRAP_MAY_SKIP={name} allows the gap"
            pytest.fail(text, pytrace=False)
        pytest.skip(f"needs {name}")
