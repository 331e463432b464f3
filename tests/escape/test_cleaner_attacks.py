"""Who looks after a payload's files, its time and its end, against a pilot that shares an id with it. Each was seen to work before it was closed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import uuid
from pathlib import Path

import pytest

from tests.escape.test_launcher_attacks import owned
from tests.fusefs import FuseFs
from tests.integration.test_disk import on_disk
from tests.integration.test_limits import limited
from tests.need import need
from tests.node import abandon, alive, status_of, until

#: What the id of another process allows, or not: {what: name of the error, or "done"}. argv: pid.
MEDDLE = """
import ctypes, errno, json, os, resource, signal, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
def traced():
    if libc.ptrace(0x4206, pid, None, None):  # PTRACE_SEIZE
        raise OSError(ctypes.get_errno(), "")
said = {}
for what, way in {
    "limit": lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)), "trace": traced, "stop": lambda: os.kill(pid, signal.SIGSTOP),
    "kill": lambda: os.kill(pid, signal.SIGKILL),
}.items():
    try:
        way()
        said[what] = "done"
    except OSError as wrong:
        said[what] = errno.errorcode[wrong.errno]
print(json.dumps(said))
"""
REFUSED = dict.fromkeys(("limit", "trace", "stop", "kill"), "EPERM")


def cleaners(node):
    """pids of this site's processes that use files as the pilot, but for those that obey it: fronts, and who writes it a status line, as the pilot in
    every id and for a moment. Were a cleaner like that, none would be met."""
    found = []
    for pid in node.launchers():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/{pid}/comm").read_text()
            real, _, _, files = status_of(pid)["Uid"]
            found += [pid] * (files == str(node.pilot.uid) != real and not name.startswith("nw-"))
    return found


def meddled(node, seconds=10.0):
    """What the pilot can do to the next cleaner, which is held meanwhile."""

    def held():
        for pid in cleaners(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            if pid in cleaners(node):
                return pid
        return None

    pid = until(held, "somebody cleans up", seconds)
    assert int(status_of(pid)["CapEff"][0], 16) & ~((1 << 0) | (1 << 2) | (1 << 9)) == 0, "chown, dac_read_search, linux_immutable at most"
    said, _ = node.site.start(["/usr/bin/python3", "-I", "-c", MEDDLE, str(pid)], stdout=subprocess.PIPE).communicate(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    return json.loads(said)


def many(path, account, count=15000):
    """A directory in which there is something to do for a while."""
    owned(path, account)
    for i in range(count):
        (path / str(i)).symlink_to("x")
    return path


def waiting(node, kind, profile, script, *words, options=()):
    """A payload that makes something, says so, and ends when its stdin does."""
    live = node.start(kind, "/bin/sh", "-c", f"{script}; echo ready; read x || exit 0", "sh", *words, profile=profile, options=options)
    assert live.process.stdout.readline() == b"ready\n"
    return live


@pytest.mark.parametrize(("kind", "profile"), [("log-only", "none"), ("map", "batch")])
def test_pilot_can_do_nothing_to_who_takes_its_directory_back(setuid_node, home, kind, profile):
    """The walk had the pilot's ids: stopped or killed by it, the lease stayed, and each sweep before another run waited for it."""
    live = waiting(setuid_node, kind, profile, ":", options=["--workdir", str(many(home / "w", setuid_node.pilot))])
    live.process.stdin.close()
    assert meddled(setuid_node) == REFUSED
    assert live.process.wait(30) == 0
    shutil.rmtree(home / "w")


def test_pilot_can_do_nothing_to_who_takes_a_dead_runs_directory_back(setuid_node, home):
    abandon(setuid_node, waiting(setuid_node, "log-only", "none", ":", options=["--workdir", str(many(home / "w", setuid_node.pilot))]))
    swept = []
    sweep = threading.Thread(target=lambda: swept.extend(setuid_node.sweep()[:1]))
    sweep.start()
    assert meddled(setuid_node) == REFUSED
    sweep.join()
    assert swept == [0]
    shutil.rmtree(home / "w")


def test_payload_can_do_nothing_to_who_measures_its_directory(setuid_node, home):
    """With the pilot's id it could kill the look at scratch, each time."""
    limited(setuid_node, 'scratch = "1GiB"')
    live = waiting(setuid_node, "log-only", "none", ":", options=["--workdir", str(many(home / "w", setuid_node.pilot))])
    assert meddled(setuid_node) == REFUSED
    live.process.stdin.close()
    assert live.process.wait(30) == 0
    shutil.rmtree(home / "w")


def test_pilot_can_do_nothing_to_who_removes_private_directories(setuid_node):
    with contextlib.closing(on_disk(setuid_node, "log-only")) as made:
        node, kind, place = next(made)
        live = waiting(node, kind, "batch", "seq 40000 | (cd /tmp && xargs touch)")
        live.process.stdin.close()
        assert meddled(node) == REFUSED
        assert live.process.wait(30) == 0
        assert list(place.iterdir()) == []


def test_pilot_can_do_nothing_to_who_removes_ipc_objects_of_a_shared_id(setuid_node):
    """System V asks for the effective id; signals for the real and the saved one."""
    mark = f"nwt{uuid.uuid4().hex}"
    live = waiting(setuid_node, "log-only", "none", f"seq -f /dev/shm/{mark}-%g 40000 | xargs touch")
    live.process.stdin.close()
    assert meddled(setuid_node) == REFUSED
    assert live.process.wait(30) == 0
    assert not list(Path("/dev/shm").glob(f"{mark}*"))


def test_file_system_that_hangs_does_not_keep_daemons_of_an_ended_payload_alive(setuid_node, home):
    """Who looked at scratch was awaited first, and who waits for such an answer does not die of KILL: the rest of the payload went on."""
    need("fuse")
    limited(setuid_node, 'scratch = "1GiB"')
    place = owned(home / "m", setuid_node.pilot)
    fs = FuseFs(place, setuid_node.pilot.uid, setuid_node.pilot.gid)
    try:
        script = "cd /; setsid sleep 600 </dev/null >/dev/null 2>&1 & echo $!; read x || exit 0"
        live = setuid_node.start("log-only", "/bin/sh", "-c", script, profile="none", options=["--workdir", str(place)])
        daemon = int(live.process.stdout.readline())
        fs.tell(hold="readdir")
        until(lambda: fs.tell(held=1) > 0, "somebody looks at it")
        live.process.stdin.close()
        until(lambda: not alive(daemon), "its end", 5)
        assert live.process.wait(20) == 202, "and who waits is told of"
    finally:
        fs.close()
    until(lambda: setuid_node.sweep()[0] == 0, "then it is finished", 20)
    place.rmdir()
