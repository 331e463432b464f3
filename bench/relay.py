"""Bytes through a payload's stdin and stdout: files, which the launcher relays, beside the same through cat and a pipe; and what silence costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from bench.cases import declared
from bench.measure import family
from bench.node import Node, Place

BLOCK = "128K"
SIZE = 1 << 30
IDLE_S = 5.0
READ = ("/bin/dd", "of=/dev/null", f"bs={BLOCK}", "status=none")
WRITE = ("/bin/dd", "if=/dev/zero", f"bs={BLOCK}", f"count={SIZE}", "iflag=count_bytes", "status=none")


class Flow(NamedTuple):
    """seconds: of each round, for SIZE bytes. judged: is there a promise."""

    name: str
    seconds: list[float]
    judged: bool

    @property
    def gb_s(self) -> float:
        return SIZE / statistics.median(self.seconds) / 1e9

    @property
    def best(self) -> float:
        return SIZE / min(self.seconds) / 1e9


class Idle(NamedTuple):
    """Processor time of the launcher's processes, per cent of one processor, while a payload waits with files as stdio."""

    launcher: str
    percent: float


class Way:
    """One way from source to target: what stands left of ``|``, and right of it; "" for none. append: O_APPEND on the target."""

    def __init__(self, name: str, argv: list[str], source: str = "", target: str = "", then: list[str] | None = None, append: bool = False) -> None:
        self.name, self.argv, self.source, self.target, self.then, self.append = name, argv, source, target, then, append


def flows(node: Node, rounds: int) -> list[Flow]:
    """Round robin, so that a slow spell of the machine hits all alike."""
    directory = node.memory or node.session.top
    source, target = directory / "source", directory / "target"
    with open(source, "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(bytes(1 << 20))
    ways = _ways(node)
    took: dict[str, list[float]] = {way.name: [] for way in ways}
    try:
        for _ in range(rounds):
            for way in ways:
                took[way.name].append(_once(node, way, source, target))
    finally:
        source.unlink()
        target.unlink(missing_ok=True)
    return [Flow(name, seconds, ": std" in name and name.endswith("file")) for name, seconds in took.items()]


def _ways(node: Node) -> list[Way]:
    found = [
        Way("file | cat | dd", ["/bin/cat"], "source", "", list(READ)),
        Way("dd | cat > file", list(WRITE), "", "target", ["/bin/cat"]),
        Way("dd | dd", list(WRITE), "", "", list(READ)),
        Way("dd < file", list(READ), "source"),
        Way("dd > file", list(WRITE), "", "target"),
    ]
    for name, place in node.places.items():
        place.point(place.guards[True, False])
        found += [
            Way(f"{name}: stdin from a file", _run(place, READ), "source"),
            Way(f"{name}: stdout to a file", _run(place, WRITE), "", "target"),
            Way(f"{name}: stdout to a file, appended", _run(place, WRITE), "", "target", append=True),
            Way(f"{name}: stdout to a pipe, handed over", _run(place, WRITE), "", "", list(READ)),
        ]
    return found


def _run(place: Place, command: tuple[str, ...]) -> list[str]:
    return [str(place.site.binary), "run", *declared("map"), "--", *command]


def _once(node: Node, way: Way, source: Path, target: Path) -> float:
    """Seconds; both programs by the pilot's account, the target new each time."""
    site = next(iter(node.places.values())).site
    target.unlink(missing_ok=True)
    where = target if way.target else os.devnull
    with open(source if way.source else os.devnull, "rb") as stdin, open(where, "ab" if way.append else "wb") as last:
        began = time.monotonic()
        first = site.start(way.argv, stdin=stdin, stdout=subprocess.PIPE if way.then else last)
        codes = [] if not way.then else [site.start(way.then, stdin=first.stdout, stdout=last).wait()]
        codes.append(first.wait())
        seconds = time.monotonic() - began
    if first.stdout:
        first.stdout.close()
    assert not any(codes), (way.name, codes)
    assert not way.target or target.stat().st_size == SIZE, way.name
    return seconds


def idle(node: Node) -> list[Idle]:
    return [Idle(place.site.launcher, _idle(node, place)) for place in node.places.values()]


def _idle(node: Node, place: Place) -> float:
    place.point(place.guards[True, False])
    path = (node.memory or node.session.top) / "idle"
    path.write_bytes(bytes(1 << 20))
    with open(path, "rb") as stdin, open(path.with_name("idle.out"), "wb") as stdout:
        process = place.site.start(_run(place, ("/bin/sleep", "60")), stdin=stdin, stdout=stdout, stderr=stdout)
        try:
            time.sleep(1.0)
            before, began = _on_processor(process.pid), time.monotonic()
            time.sleep(IDLE_S)
            return 100 * (_on_processor(process.pid) - before) / (time.monotonic() - began)
        finally:
            process.terminate()
            process.wait()
            for file in (path, path.with_name("idle.out")):
                file.unlink()


def _on_processor(pid: int) -> float:
    """Seconds of that launcher's processes together (schedstat: nanoseconds)."""
    return sum(int(Path(f"/proc/{one}/schedstat").read_text().split()[0]) for _, one in family(pid)) / 1e9
