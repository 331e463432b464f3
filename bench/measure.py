"""The measurements themselves; each returns rows for bench/table.py."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import Case, declared
from bench.node import CHECKOUT, Node, Place, compiled
from tests.site import ROOT

WARMUP = 5
#: In no profile, as most of what a node mounts: what is shown to the payload is copied once more.
MOUNTS_AT = "/mnt"


class Times(NamedTuple):
    """us: sorted microseconds of the good starts. rounds: the same in the order of the rounds."""

    case: Case
    us: list[float]
    failed: int
    busy: int
    rounds: tuple[float, ...] = ()

    def at(self, share: float) -> float:
        return self.us[round(share * (len(self.us) - 1))] / 1000 if self.us else float("nan")


def refused(node: Node, case: Case) -> str:
    """What a peer says when it does not work on this node, "" when it does."""
    with sudo_rule(node):
        done = subprocess.run([compiled("timer"), "1", "0"], input=_lines(node, [case]), text=True, stdout=subprocess.PIPE, check=True)
        if done.stdout.split("\t")[1] == "0":
            return ""
        ran = node.places["userns"].site.run(case.argv, env=dict(line[4:].split("=", 1) for line in case.lines if line.startswith("env ")))
    return ran.err.decode(errors="replace").strip().partition("\n")[0] or f"exit status {ran.rc}"


def starts(node: Node, cases: list[Case], runs: int, mounts: int = 0) -> list[Times]:
    """Each case started so often, round robin (bench/timer.c). mounts: so many more on the host, in a mount namespace of the timer's own."""
    argv = [compiled("timer"), str(runs), str(WARMUP)]
    if mounts:
        argv += [str(mounts), MOUNTS_AT]
    env = node.places["userns"].site.environment(node.pilot)
    with sudo_rule(node):
        done = subprocess.run(argv, input=_lines(node, cases), env=env, cwd=node.pilot.home, text=True, stdout=subprocess.PIPE, check=True)
    times = []
    for case, line in zip(cases, done.stdout.splitlines()):
        _, failed, busy, *us = line.split("\t")
        times.append(Times(case, sorted(map(float, us)), int(failed), int(busy), tuple(map(float, us))))
    return times


def _lines(node: Node, cases: list[Case]) -> str:
    ids = [f"uid {node.pilot.uid}", *(f"gid {gid}" for gid in (node.pilot.gid, *node.pilot.groups))] if ROOT else []
    return "".join(f"{line}\n" for case in cases for line in (f"case {case.name}", *ids, *case.lines, *(f"arg {word}" for word in case.argv)))


@contextmanager
def sudo_rule(node: Node) -> Iterator[None]:
    """The pilot may become user1 without a password; taken back afterwards."""
    rule = Path("/etc/sudoers.d") / f"nodewrap-bench-{os.getpid()}"
    if not (ROOT and rule.parent.is_dir()):
        yield
        return
    rule.write_text(f"{node.pilot.name} ALL=({node.session.accounts['user1'].name}) NOPASSWD: ALL\n")
    rule.chmod(0o440)
    try:
        yield
    finally:
        rule.unlink()


class Kill(NamedTuple):
    """processes: how many there were. seconds: from the order to end until the run was over. left: processes of the account then."""

    name: str
    processes: int
    seconds: float
    left: int


def kills(node: Node, runs: int) -> list[Kill]:
    """Trees in a leased pool account, and their end."""
    place = node.places["setuid"]
    place.point(place.guards[True, True])
    tree = place.site.prefix / "tree"  # profile batch shows /opt
    tree.write_bytes(compiled("tree").read_bytes())
    tree.chmod(0o755)
    idle = [_exit(node, place, (str(tree), "idle", "5000")) for _ in range(runs)]
    return idle + [_killed(node, place, (str(tree), "bomb")) for _ in range(runs)]


def _exit(node: Node, place: Place, payload: tuple[str, ...]) -> Kill:
    """The payload's first process ends by itself, told so by the end of its stdin: until the launcher has ended."""
    with _started(place, "switch", payload) as process:
        count = int(process.stdout.readline())
        began = time.monotonic()
        process.stdin.close()
        process.wait()
        seconds = time.monotonic() - began
    return Kill("5,000 idle processes, left by a payload that ends", count, seconds, _left(node, place))


def _killed(node: Node, place: Place, payload: tuple[str, ...]) -> Kill:
    """SIGKILL to the launcher, as a batch system does: until its keeper, which ends, proves and records, has ended. Not by an end of the
    payload's own: among 2,000 that fork, its first process may wait a minute for its turn to end, without any nodewrap about it."""
    with _started(place, "bomb", payload) as process:
        time.sleep(2)
        keeper = os.pidfd_open(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()))
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
        began = time.monotonic()
        process.kill()
        select.select([keeper], [], [])
        seconds = time.monotonic() - began
        os.close(keeper)
    return Kill("fork bomb, at most 2,000, killed", len(pids), seconds, _left(node, place))


@contextmanager
def _started(place: Place, vo: str, payload: tuple[str, ...]) -> Iterator[Any]:
    with place.site.start([place.site.binary, "run", *declared(vo), "--", *payload], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _left(node: Node, place: Place) -> int:
    pool = [account for role, account in node.session.accounts.items() if role.startswith("pool")]
    return sum(len(place.site.processes(account)) for account in pool)


class Memory(NamedTuple):
    """Kilobytes of one process (proc(5), smaps_rollup): all that is resident, and with pages that processes share divided among them."""

    launcher: str
    part: str
    rss: int
    pss: int


def memory(node: Node) -> list[Memory]:
    """The processes of each launcher while a payload sleeps."""
    return [found for place in node.places.values() for found in _memory(place)]


def _memory(place: Place) -> Iterator[Memory]:
    guard = place.guards[True, False]
    place.point(guard)
    ask = (*declared("map"), "--", "/bin/sh", "-c", "echo; exec sleep 60")
    process: Any = place.site.start([place.site.binary, "run", *ask], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        for name, pid in family(process.pid):
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
            yield Memory(place.site.launcher, name, int(sizes["Rss"]), int(sizes["Pss"]))
    finally:
        process.terminate()
        process.wait()


def family(pid: int) -> Iterator[tuple[str, int]]:
    """(name, pid) of the launcher's processes: itself and what it started, down to the payload."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    if not name.startswith(("nodewrap", "nw-")):  # the front: nw-RUN
        return
    yield name, pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from family(int(child))


def lines_of_c() -> tuple[int, int]:
    """(all lines, those that are neither blank nor comment) in csrc/."""
    texts = [path.read_text(encoding="utf-8") for path in (CHECKOUT / "csrc").glob("*.[ch]")]
    bare = [re.sub(r"/\*.*?\*/", "", text, flags=re.S) for text in texts]
    return sum(len(text.splitlines()) for text in texts), sum(bool(line.strip()) for text in bare for line in text.splitlines())
