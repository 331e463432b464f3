"""A pilot whose cgroup is its own (delegated): what it tried with the names and places of groups. Each was seen to work before it was closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import pytest

from tests.escape.conftest import inside
from tests.escape.test_sweep_attacks import end_launchers
from tests.integration.conftest import CPU_V1
from tests.need import need
from tests.node import alive, kill, until

OWN = f"nwtest-own-{os.getpid()}"


def as_pilot(node, group, script, *words):
    """A process of the pilot's in its group."""
    return inside(node, group, ["/bin/sh", "-c", script, "sh", *words])


def run_group(place):
    """The group of the run that is on, once it is there."""
    return until(lambda: next(place.glob("nodewrap-*"), None), "a group of the run's own", 20)


def test_group_that_the_pilot_puts_in_place_of_the_runs_is_not_taken_for_it(setuid_node, delegated_cgroup):
    """Between mkdir(2) and open(2), here held apart: the payload went into a group that its pilot froze, killed and lifted the limits of."""
    need("strace")
    place, before = delegated_cgroup(OWN), setuid_node.site.audit_size()
    slow = ("strace", "-f", "-u", setuid_node.pilot.name, "-e", "trace=mkdir", "-e", "inject=mkdir:delay_exit=3000000", "-o", "/dev/null")
    run = inside(setuid_node, place, setuid_node.argv("static", ["/bin/true"], "batch"), *slow)
    group = run_group(place)
    assert as_pilot(setuid_node, place, 'rmdir "$1" && mkdir "$1"', group).wait(5) == 0
    assert run.wait(60) == 0
    (degrade,) = [record for record in setuid_node.site.records(before) if record["event"]["action"] == "degrade"]
    assert degrade["nodewrap"]["degrade"] == ["cgroup"]


def test_group_that_the_pilot_puts_in_place_of_a_dead_runs_does_not_keep_its_lease(setuid_node, delegated_cgroup):
    """It was the run's by its name: what is in it was killed, and as it could not be removed the account was lost."""
    place = delegated_cgroup(OWN)
    os.chown(place / "cgroup.procs", setuid_node.pilot.uid, setuid_node.pilot.gid)
    run = inside(setuid_node, place, setuid_node.argv("static", ["/bin/sleep", "600"], "batch"))
    group = run_group(place)
    until(lambda: "populated 1" in (group / "cgroup.events").read_text(), "it runs")
    until(lambda: (setuid_node.site.state / "leases" / setuid_node.site.leases()[0]).read_text().endswith("starting\n"), "it is on record")
    end_launchers(setuid_node)
    run.wait()
    until(lambda: "populated 0" in (group / "cgroup.events").read_text(), "it is dead")
    script = 'rmdir "$1" && mkdir "$1" "$1/sub" && echo $$ >"$1/sub/cgroup.procs" && exec sleep 600'
    own = as_pilot(setuid_node, place, script, group)
    try:
        until(lambda: (group / "sub").is_dir() and (group / "sub/cgroup.procs").read_text(), "the pilot is in its place")
        code, reports, _ = setuid_node.sweep()
        assert (code, [report["state"] for report in reports]) == (0, ["swept"])
        assert alive(own.pid), "what is the pilot's is left alone"
    finally:
        own.kill()
        own.wait()
        for path in (group / "sub", group):
            until(lambda path=path: "populated 0" in (path / "cgroup.events").read_text(), "empty")
            path.rmdir()


def test_records_of_a_run_without_a_group_of_its_own_are_not_written_in_the_pilots(setuid_node, delegated_cgroup):
    """A group of a name that no lease can hold gives the run none of its own; frozen there with the log's lock, it kept all runs waiting."""
    place = delegated_cgroup(f"..{OWN}")
    counter = setuid_node.site.audit.with_name(setuid_node.site.audit.name + ".sequence")
    assert setuid_node.run("log-only", "/bin/true").rc == 0  # there is a log
    with open(counter, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = inside(setuid_node, place, setuid_node.argv("log-only", ["/bin/true"], "batch"))
        (writer,) = until(lambda: holders(setuid_node, counter), "somebody waits for the log's lock")
        where = Path(f"/proc/{writer}/cgroup").read_text().splitlines()[-1]
    assert run.wait(30) == 0
    assert OWN not in where


def holders(node, path):
    """pids of this site's processes that have it open."""
    found = []
    for pid in node.launchers():
        with contextlib.suppress(OSError):
            found += [pid] * any(os.readlink(link) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    return found


def removed(path):
    until(lambda: not (path / "tasks").read_text(), "it is empty")
    path.rmdir()


@pytest.fixture
def far_down():
    """A group of the cpu hierarchy of cgroup v1, of such a name that what is in /proc/PID/cgroup from byte 511 of its line on looks like v2's."""
    need("root")
    if not (CPU_V1 / "tasks").exists():
        pytest.skip("no cgroup v1 here: then there is but one line")
    (line,) = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if "cpu" in line.split(":")[1].split(",")]
    before = line.rpartition(":")[0] + f":/{OWN}/{'a' * 200}/{'b' * 200}/"
    made = [CPU_V1]
    for name in (OWN, "a" * 200, "b" * 200, "c" * (511 - len(before)) + "0::", "x"):
        made.append(made[-1] / name)
        made[-1].mkdir()
    yield made[-1]
    for path in reversed(made[1:]):
        removed(path)


def test_long_name_in_another_hierarchy_does_not_hide_the_pilots_group(setuid_node, delegated_cgroup, far_down):
    """Read in pieces, the second one was taken for the line of cgroup v2: the run had its group where the pilot wanted it, or none."""
    place, before = delegated_cgroup(OWN), setuid_node.site.audit_size()
    words = ("/bin/sh", "-c", 'echo $$ >"$0/tasks" && exec "$@"', far_down, "setpriv", f"--reuid={setuid_node.pilot.uid}",
             f"--regid={setuid_node.pilot.gid}", f"--groups={','.join(map(str, setuid_node.pilot.groups))}")
    run = inside(setuid_node, place, setuid_node.argv("log-only", ["/bin/sleep", "600"], "batch"), *words)
    try:
        group = run_group(place)
        until(lambda: "start" in setuid_node.actions(before), "it runs")
        assert (group / "cgroup.procs").read_text(), "the payload is there"
    finally:
        kill(run)
        until(lambda: not setuid_node.site.leases(), "its keeper has ended it")
    assert "degrade" not in setuid_node.actions(before)
