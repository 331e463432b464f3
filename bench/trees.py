"""Large trees: what hand-back and removal cost beside ``rm -rf`` (``--only trees``); and csrc/tree.c alone, for the tests of hostile trees."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from bench.node import BUILD, CHECKOUT
from tests.site import command

SOURCES = ("tree", "harm", "ids", "sys", "path", "err")


class Walked(NamedTuple):
    """What bench/walk.c printed: its counts by name (us, peak_kib, entries, …), and what it left, as csrc/tree.c tells it."""

    count: dict[str, int]
    left: list[bytes]


def walker() -> Path:
    """bench/walk.c as a program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    files = [CHECKOUT / "bench/walk.c", *(CHECKOUT / f"csrc/{name}.c" for name in SOURCES)]
    new = BUILD / f"walk.{os.getpid()}"
    flags = ["-std=gnu11", "-O2", "-static", "-ffunction-sections", "-Wl,--gc-sections", "-I", CHECKOUT / "csrc"]
    command(os.environ.get("CC", "gcc"), *flags, "-o", new, *files)
    return new.rename(BUILD / "walk")


def argv(program: Path, top: Path | str, order: str, uid: int, gid: int, **more: int) -> list[str]:
    return [str(program), str(top), order, str(uid), str(gid), *(f"{name}={value}" for name, value in more.items())]


def parsed(text: str) -> Walked:
    lines = [line.split() for line in text.splitlines()]
    left = [bytes.fromhex(value) for name, value in lines if name == "path"]
    return Walked({name: int(value) for name, value in lines if name != "path"}, left)


def walk(program: Path, top: Path | str, order: str, uid: int, gid: int, **more: int) -> Walked:
    """Walk top in that order (chown, plain, remove) with the rights of uid and gid."""
    return parsed(subprocess.run(argv(program, top, order, uid, gid, **more), stdout=subprocess.PIPE, text=True, check=True).stdout)
