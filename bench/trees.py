"""Large trees: what hand-back and removal cost beside ``rm -rf`` (``--only trees``); and csrc/tree.c alone, for the tests of hostile trees."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.node import BUILD, CHECKOUT, compiled
from tests.site import ROOT, command

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


#: Of bench/grow.c, and how many entries it is asked for.
SHAPES = {"wide": 100_000, "dirs": 100_000, "mixed": 30_000, "deep": 5_000}
#: What is done with a tree (bench/walk.c). The first is what ``rm -rf`` does.
ORDERS = ("remove", "plain", "chown")
RM, OWNER, TO = "rm -rf", 1_999_000_001, 1_999_000_002


class Cleaned(NamedTuple):
    """seconds: the median. peak_kib: at most; 0 where it was not looked at. ratio: to ``rm -rf`` on the same tree, the median of the rounds'."""

    shape: str
    entries: int
    what: str
    seconds: float
    ratio: float
    peak_kib: int


def cleaned(where: Path, rounds: int, shapes: dict[str, int]) -> list[Cleaned]:
    """Every shape grown and cleaned in each way, one after the other, so often; below where, in a directory of its own."""
    program, grow, found = walker(), compiled("grow"), []
    ids = (OWNER, TO) if ROOT else (os.getuid(), os.getuid())
    top = Path(tempfile.mkdtemp(prefix="nodewrap-bench-", dir=where))
    try:
        top.chmod(0o711)
        (top / "in").mkdir()
        os.chown(top / "in", ids[0], -1)
        for shape, n in shapes.items():
            seconds: dict[str, list[float]] = {what: [] for what in (RM, *ORDERS)}
            peak = dict.fromkeys(seconds, 0)
            for _ in range(rounds):
                for what in seconds if ROOT else (RM, "remove", "plain"):
                    subprocess.run([grow, top / "in/tree", shape, str(ids[0]), str(n)], check=True)
                    took, kib = _clean(program, top, what, ids)
                    seconds[what].append(took)
                    peak[what] = max(peak[what], kib)
            found += [
                Cleaned(shape, n, what, statistics.median(took), statistics.median(map(lambda a, b: a / b, took, seconds[RM])), peak[what])
                for what, took in seconds.items() if took
            ]
        return found
    finally:
        command("rm", "-rf", "--", top)


def _clean(program: Path, top: Path, what: str, ids: tuple[int, int]) -> tuple[float, int]:
    """(seconds, most memory in KiB) of one; both from a process's start to its end. The tree is gone afterwards."""
    tree = top / "in/tree"
    to = {"to": ids[1], "group": ids[1]} if what == "chown" else {}
    order = argv(program, top / "in" if what == "remove" else tree, what, ids[0], ids[0], **to)
    began = time.monotonic()
    done = subprocess.run(["rm", "-rf", "--", tree] if what == RM else order, stdout=subprocess.PIPE, text=True, check=True)
    took = time.monotonic() - began
    left = parsed(done.stdout).count if done.stdout else {}
    if left.get("left") or (what in (RM, "remove") and tree.exists()):
        raise RuntimeError(f"{what}: something is left of {tree}: {left}")
    command("rm", "-rf", "--", tree)
    return took, left.get("peak_kib", 0)


def places() -> list[tuple[str, Path, dict[str, int]]]:
    """Where trees are grown, and which: in memory where there is room, and smaller ones on disk (/var/tmp)."""
    found = [("on disk", Path("/var/tmp"), {shape: n // 20 for shape, n in SHAPES.items()})]
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30:
        found.insert(0, ("in memory", memory, SHAPES))
    return found
