"""One try of an attack, bounded: in a process of its own, ended after its time with everything that it started, reported by a pipe."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import psutil

from nodewrap.escape.arena import Arena, NotRunError
from nodewrap.escape.model import Attack, Seen
from nodewrap.live import ENDED, comm

PR_SET_CHILD_SUBREAPER = 36
#: What a wrapper's own helpers may take to finish when their front was killed (docs/reliability.md: two seconds), on a busy machine.
SETTLE_S = 10.0
#: No try may fill the disk: of one file.
LARGEST_FILE = 1 << 30


class Try(NamedTuple):
    """seen: None when there is no answer, and error says why: "not run: ..." or "broken: ...". left: processes that outlived it, one line each."""

    seen: Seen | None
    error: str
    left: list[str]
    seconds: float


def adopt_orphans() -> None:
    """What hostile code leaves behind, daemons too, becomes our child (prctl(2), PR_SET_CHILD_SUBREAPER), so that we can see and end all of it."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def attempt(attack: Attack, arena: Callable[[], Arena], settle: bool) -> Try:
    """Run it. settle: what is left of it has SETTLE_S to go by itself before it counts; without, it is ended at once."""
    began = time.monotonic()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(attack, arena, writer)
    os.close(writer)
    try:
        told = _hear(reader, began + attack.seconds)
    finally:
        os.close(reader)
        _end(pid)
        left = _left(SETTLE_S if settle else 0.0)
        end_children()
    seconds = time.monotonic() - began
    if told is None:
        return Try(None, f"broken: not done in {attack.seconds:g} s", left, seconds)
    said = json.loads(told) if told else {"error": "broken: it died without a word"}
    return Try(Seen(*said["seen"]) if "seen" in said else None, said.get("error", ""), left, seconds)


def _child(attack: Attack, arena: Callable[[], Arena], writer: int) -> None:
    """Never returns."""
    status, said = 1, dict[str, object]()
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        adopt_orphans()
        try:
            with arena().open_() as place:
                said = {"seen": list(place.exercised(attack.run(place)))}
        except NotRunError as why:
            said = {"error": f"not run: {why}"}
        except BaseException as wrong:  # noqa: BLE001  whatever it is, the suite goes on and says so
            last = traceback.extract_tb(wrong.__traceback__)[-1]
            said = {"error": f"broken: {type(wrong).__name__}: {wrong} ({os.path.basename(last.filename)}:{last.lineno})"}
        os.write(writer, json.dumps(said).encode() + b"\n")
        status = 0
    finally:
        os._exit(status)


def _hear(reader: int, end: float) -> bytes | None:
    """The child's one line, "" when it ended without; None when neither came in time. What it left behind may hold the pipe open."""
    told = b""
    while (rest := end - time.monotonic()) > 0:
        if not select.select([reader], [], [], rest)[0]:
            break
        more = os.read(reader, 65536)
        told += more
        if not more or told.endswith(b"\n"):
            return told
    return None


def _end(pid: int) -> None:
    """The try's own process; what it started becomes ours."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def children() -> list[psutil.Process]:
    """All that descends from us and lives."""
    _reap()
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            if one.status() not in ENDED:
                found.append(one)
        except psutil.Error:
            continue
    return found


def _left(seconds: float) -> list[str]:
    end = time.monotonic() + seconds
    while (found := children()) and time.monotonic() < end:
        time.sleep(0.01)
    said = []
    for one in found:
        try:
            said.append(f"process {one.pid} of uid {one.uids().real}: {comm(one.pid)}")
        except psutil.Error:
            continue
    return said


def end_children() -> None:
    """KILL until nothing is left; what is not ours to kill (another uid's, when we are not root) is left alone."""
    end = time.monotonic() + 10
    while (found := children()) and time.monotonic() < end:
        for one in found:
            try:
                one.kill()
            except psutil.Error:
                continue
        time.sleep(0.005)
