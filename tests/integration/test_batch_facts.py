"""What a batch system sees of a payload and does to it, across uids: suspended and continued with the job, found, measured, charged (I15)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.node import until

#: The payload's first process, a child, and a daemon in a session of its own, each saying its letter again and again.
LETTERS = """
import os, time
def say(letter):
    while True:
        os.write(1, letter)
        time.sleep(0.01)
if os.fork() == 0:
    say(b"b")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        say(b"c")
    os._exit(0)
say(b"a")
"""
ALL, GROUP = set(b"abc"), set(b"ab")


def python(code, *words):
    return ("/usr/bin/python3", "-I", "-c", code, *words)


def as_pilot(node, *argv):
    """The exit status of argv run by the pilot."""
    pilot = node.pilot
    return subprocess.run(argv, user=pilot.uid, group=pilot.gid, extra_groups=[], stderr=subprocess.DEVNULL, check=False).returncode


def said(live, seconds):
    """The letters that come within that time, without those that lie there already."""
    os.set_blocking(live.process.stdout.fileno(), False)
    live.process.stdout.read()
    end, heard = time.monotonic() + seconds, set()
    while (left := end - time.monotonic()) > 0:
        if select.select([live.process.stdout], [], [], left)[0]:
            heard |= set(live.process.stdout.read() or b"")
    return heard


# ---- suspended with the job ----


#: launcher, kind, profile, with a cgroup, signal, who then stops. STOP cannot be caught; the userns launcher has no keeper to see it.
SUSPENDED = [
    ("setuid", "static", "strict", True, "STOP", ALL), ("setuid", "map", "batch", True, "STOP", ALL),
    ("setuid", "pool", "none", True, "STOP", ALL), ("setuid", "log-only", "none", True, "STOP", ALL),
    ("setuid", "pool", "strict", False, "STOP", ALL), ("setuid", "block", "batch", False, "STOP", ALL),
    ("setuid", "pool", "none", False, "STOP", GROUP), ("setuid", "static", "batch", True, "TSTP", ALL),
    ("userns", "map", "batch", False, "TSTP", GROUP), ("userns", "log-only", "none", False, "TSTP", GROUP),
]


@pytest.mark.parametrize(("launcher", "kind", "profile", "cgroup", "stop", "who"), SUSPENDED)
def test_a_suspended_front_suspends_the_payload_and_continues_it(request, launcher, kind, profile, cgroup, stop, who):
    """As HTCondor suspends a job: a signal to the one pid that it knows, by the pilot's uid. The payload is of another, and in other sessions."""
    node = request.getfixturevalue(f"{launcher}_node")
    if not cgroup:
        node.open_guard(cgroup=None)
    live = node.start(kind, *python(LETTERS), profile=profile)
    until(lambda: said(live, 0.2) == ALL, "all of the payload runs")
    for _ in range(2):
        assert as_pilot(node, "kill", f"-{stop}", str(live.process.pid)) == 0
        until(lambda: not said(live, 0.3) & who, "they stop", 3)
        assert as_pilot(node, "kill", "-CONT", str(live.process.pid)) == 0
        until(lambda: said(live, 0.2) == ALL, "and go on", 3)
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(10) == 143


@pytest.mark.parametrize(("trap", "code"), [("exit 5", 5), ("", 137)])
@pytest.mark.parametrize("cgroup", [True, False])
def test_the_wall_limit_holds_while_suspended(setuid_node, trap, code, cgroup):
    """The time runs on, and at its end the payload is let go to heed TERM, though the front, which only the batch system may continue, is not."""
    if not cgroup:
        setuid_node.open_guard(cgroup=None)
    before = setuid_node.site.audit_size()
    live = setuid_node.start("pool", "/bin/sh", "-c", f"trap '{trap}' TERM; while :; do sleep 0.05; done", options=["--wall", "1"])
    live.process.send_signal(signal.SIGSTOP)
    until(lambda: not setuid_node.payload_processes(), "the payload ends at its limit", 5)
    until(lambda: "cleanup" in setuid_node.actions(before), "and is recorded", 5)
    for late in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCONT):  # passed on, to nobody, before the front looks what the keeper has said
        live.process.send_signal(late)
    assert live.end()[::2] == (code, b"")
    (end,) = [record for record in setuid_node.site.records(before) if record["event"]["action"] == "exit"]
    assert end["process"]["ended_by"] == "wall"


@pytest.mark.parametrize("cgroup", [True, False])
@pytest.mark.parametrize("profile", ["batch", "none"])
def test_a_suspended_payload_is_killed_like_any_other(setuid_node, profile, cgroup):
    if not cgroup:
        setuid_node.open_guard(cgroup=None)
    live = setuid_node.start("pool", *python(LETTERS), profile=profile)
    until(lambda: said(live, 0.2) == ALL, "all of the payload runs")
    live.process.send_signal(signal.SIGSTOP)
    until(lambda: not said(live, 0.3) & GROUP, "it stops", 3)
    live.process.kill()
    live.process.wait()
    until(setuid_node.is_clean, "the keeper has finished", 2)


def test_looking_after_the_front_costs_next_to_nothing(setuid_node):
    """Field 1 of /proc/PID/schedstat: nanoseconds on a processor. Five looks a second; 0.1 % of a processor would be 1 ms a second."""
    live = setuid_node.start("static", "/bin/sleep", "60")
    (keeper,) = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    ran = lambda: int(Path(f"/proc/{keeper}/schedstat").read_text().split()[0])  # noqa: E731
    before = ran()
    time.sleep(2)
    assert ran() - before < 2_000_000
