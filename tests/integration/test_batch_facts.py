"""What a batch system sees of a payload and does to it, across uids: suspended and continued with the job, found, measured, charged (I15)."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.need import need
from tests.node import promised, status_of, until
from tests.site import ROOT, SLOWNESS

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
    ids = {"user": node.pilot.uid, "group": node.pilot.gid, "extra_groups": []} if ROOT else {}
    return subprocess.run(argv, stderr=subprocess.DEVNULL, check=False, **ids).returncode


def ended(live):
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(10) == 143


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
    assert as_pilot(node, "kill", f"-{stop}", str(live.process.pid)) == 0
    until(lambda: not said(live, 1) & who, "they stop, and stay so")
    assert as_pilot(node, "kill", "-CONT", str(live.process.pid)) == 0
    until(lambda: said(live, 0.2) == ALL, "and go on", 3)
    ended(live)


@pytest.mark.parametrize(("trap", "code"), [("exit 5", 5), ("", 137)])
@pytest.mark.parametrize("cgroup", [True, False])
def test_the_wall_limit_holds_while_suspended(setuid_node, trap, code, cgroup):
    """The time runs on, and at its end the payload is let go to heed TERM, though the front, which only the batch system may continue, is not."""
    if not cgroup:
        setuid_node.open_guard(cgroup=None)
    before = setuid_node.site.audit_size()
    live = setuid_node.start("pool", "/bin/sh", "-c", f"trap '{trap}' TERM; echo ready; while :; do sleep 0.05; done", options=["--wall", "3"])
    assert live.process.stdout.readline() == b"ready\n"
    live.process.send_signal(signal.SIGSTOP)
    until(lambda: not setuid_node.payload_processes(), "the payload ends at its limit")
    until(lambda: "cleanup" in setuid_node.actions(before), "and is recorded")
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
    until(setuid_node.is_clean, "the keeper has finished", promised())


def test_looking_after_the_front_costs_next_to_nothing(setuid_node):
    """Field 1 of /proc/PID/schedstat: nanoseconds on a processor. Five looks a second take 0.05 % of one here, and ten times that is allowed."""
    live = setuid_node.start("static", "/bin/sleep", "60")
    (keeper,) = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    ran = lambda: int(Path(f"/proc/{keeper}/schedstat").read_text().split()[0])  # noqa: E731
    before = ran()
    time.sleep(2)
    assert ran() - before < 10_000_000 * SLOWNESS


# ---- found: the tracking group ----


TRACKING, OTHER = 2000000000 + os.getpid() % 100000 * 2, 2000000001 + os.getpid() % 100000 * 2


def in_job(node):
    """The pilot as a batch system starts it, which takes root: with the job's tracking group among its own, and another group beside it."""
    need("root")
    account = copy.copy(node.pilot)
    account.groups = [*node.pilot.groups, TRACKING, OTHER]
    return account


def groups_of(pid):
    return {int(word) for word in status_of(pid)["Groups"]}


def own_groups(node, live):
    """Those of the account that the payload runs under; a block of ids has none."""
    return next((set(account.groups) for account in node.site.accounts.values() if account.uid == os.stat(f"/proc/{live.pid}").st_uid), set())


@pytest.mark.parametrize(("kind", "profile"), [("static", "strict"), ("pool", "none"), ("map", "batch"), ("block", "strict")])
def test_the_payload_keeps_the_tracking_group_and_no_other(setuid_node, kind, profile):
    """Seen from outside, as condor_procd and Grid Engine's execd look for it, on a grandchild with a session of its own."""
    setuid_node.open_guard(tracking_gid=f"1000000000-1000000001 {TRACKING}-{TRACKING}")
    live = setuid_node.start(kind, "/bin/sh", "-c", "setsid sleep 60 & sleep 60", user=in_job(setuid_node), profile=profile)
    until(lambda: len(setuid_node.payload_processes()) == 3, "three processes")
    assert [groups_of(pid) for pid in setuid_node.payload_processes()] == [{TRACKING} | own_groups(setuid_node, live)] * 3
    ended(live)


@pytest.mark.parametrize("kind", ["static", "map"])
def test_without_a_range_no_group_of_the_callers_is_kept(setuid_node, kind):
    live = setuid_node.start(kind, "/bin/sleep", "60", user=in_job(setuid_node))
    assert groups_of(live.pid) == own_groups(setuid_node, live)


@pytest.mark.parametrize(("launcher", "kind"), [("setuid", "log-only"), ("userns", "log-only"), ("userns", "map")])
def test_a_payload_with_the_pilots_id_keeps_all_of_the_pilots_groups(request, launcher, kind):
    node = request.getfixturevalue(f"{launcher}_node")
    live = node.start(kind, "/bin/sleep", "60", user=in_job(node))
    assert groups_of(live.pid) == set(in_job(node).groups)
    ended(live)


DROP = """
import ctypes, json, os
def refused(act):
    try:
        act()
    except PermissionError:
        return True
    return False
def write(name, text):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
uid, gid = os.getuid(), os.getgid()
said = [len(os.getgroups()), refused(lambda: os.setgroups([]))]
ctypes.CDLL(None).unshare(0x10000000)
said.append(refused(lambda: write("gid_map", f"0 {gid} 1")))
write("setgroups", "deny")
write("uid_map", f"0 {uid} 1")
write("gid_map", f"0 {gid} 1")
said += [os.getuid(), refused(lambda: os.setgroups([])), len(os.getgroups())]
print(json.dumps(said))
"""


@pytest.mark.parametrize("kind", ["static", "map"])
def test_the_payload_cannot_leave_the_tracking_group(setuid_node, kind):
    """Not even as root of a user namespace of its own (user_namespaces(7), setgroups)."""
    setuid_node.open_guard(tracking_gid=f"{TRACKING}-{TRACKING}")
    groups = 1 + (kind == "static")  # and the account's own
    assert setuid_node.python(kind, DROP, user=in_job(setuid_node)) == [groups, True, True, 0, True, groups]


# ---- inherited ----


RUNS = [
    ("setuid", "static", "strict"), ("setuid", "pool", "none"), ("setuid", "map", "batch"), ("setuid", "block", "compat"),
    ("setuid", "log-only", "batch"), ("setuid", "log-only", "none"), ("userns", "map", "batch"), ("userns", "log-only", "none"),
]  # fmt: skip
LIBC = ctypes.CDLL(None, use_errno=True)
IOPRIO_SET, IOPRIO_GET = {"x86_64": (251, 252), "aarch64": (30, 31)}.get(os.uname().machine, (0, 0))
LOW_IO = 2 << 13 | 6  # class "best effort", level 6


def lowered():
    """What batch systems do to a job before they start it."""
    os.nice(7)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    LIBC.syscall(IOPRIO_SET, 1, 0, LOW_IO)


def seen(pid):
    oom = int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    return os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid), os.sched_getaffinity(pid), LIBC.syscall(IOPRIO_GET, 1, pid), oom


@pytest.mark.parametrize(("launcher", "kind", "profile"), RUNS)
def test_niceness_scheduling_class_processors_io_priority_and_oom_score_are_the_payloads(request, launcher, kind, profile):
    node = request.getfixturevalue(f"{launcher}_node")
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    own.write_text("321")
    try:
        live = node.start(kind, "/bin/sleep", "60", profile=profile, preexec_fn=lowered)
    finally:
        own.write_text(before)
    assert seen(live.pid) == (min(19, os.nice(0) + 7), os.SCHED_BATCH, {max(os.sched_getaffinity(0))}, LOW_IO, 321)
    ended(live)


def cgroups_of(pid):
    """{controllers: path}; "" is v2."""
    return {line.split(":")[1]: line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}


@pytest.mark.parametrize(("launcher", "kind", "profile"), RUNS)
def test_the_payload_is_in_the_jobs_cgroups_or_just_below(request, job, launcher, kind, profile):
    node = request.getfixturevalue(f"{launcher}_node")
    with job:
        live = node.start(kind, "/bin/sleep", "60", profile=profile)
    front, payload = cgroups_of(live.process.pid), cgroups_of(live.pid)
    below = payload.pop("").removeprefix(front.pop("") + "/")
    assert front == payload
    assert (below.startswith("nodewrap-") and "/" not in below) if launcher == "setuid" else below == f"/{job.v2.name}"
    ended(live)


# ---- accounted ----


#: An orphan with a session of its own uses the processor for 0.3 s and 100 MB; the payload's first process waits until it has ended.
USED = """
import os, time
ends = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        kept = b"x" * 100_000_000
        while time.process_time() < 0.3:
            pass
    os._exit(0)
os.wait()
os.close(ends[1])
os.read(ends[0], 1)
time.sleep(0.1)
"""
PILOT = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


@pytest.mark.parametrize(("launcher", "kind", "profile"), RUNS)
def test_what_the_payload_uses_is_the_pilots_childrens_and_the_jobs(request, job, launcher, kind, profile):
    """getrusage(RUSAGE_CHILDREN) of the pilot, by the chain of waits, and the job's cgroup; orphans included."""
    node = request.getfixturevalue(f"{launcher}_node")
    with job:
        ran = node.site.run(python(PILOT, *map(os.fspath, node.argv(kind, python(USED), profile))))
    code, seconds, kilobytes = json.loads(ran.out)
    assert (code, ran.err) == (0, b"")
    assert seconds >= 0.3
    assert kilobytes >= 100_000_000 >> 10
    assert job.used_us() >= 300_000


def those(processes, what):
    """Those of whom that holds; of others, that end meanwhile, it does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [process] * what(process)
    return found


def orphans(node):
    """The pilot's processes that belong to nobody any more."""
    return those(psutil.process_iter(), lambda process: process.ppid() == 1 and process.uids().real == node.pilot.uid)


@pytest.mark.parametrize(("launcher", "kind", "profile"), RUNS)
def test_everything_of_the_payload_is_a_descendant_of_the_front_while_it_runs(request, launcher, kind, profile):
    """DIRAC, PanDA and condor_procd add up processors and memory by walking from parent to child."""
    node = request.getfixturevalue(f"{launcher}_node")
    before = orphans(node)  # of an earlier test, which the node's init has yet to reap
    live = node.start(kind, *python(LETTERS), profile=profile)
    until(lambda: said(live, 0.2) == ALL, "all of the payload runs")
    below = psutil.Process(live.process.pid).children(recursive=True)
    assert len(those(below, lambda process: process.name() == "python3" and process.status() != "zombie")) == 3
    assert [process for process in orphans(node) if process not in before] == []
    ended(live)
