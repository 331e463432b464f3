"""What a payload makes below its run's own control group, where that one is the payload's too: the userns launcher with a ``cgroup`` line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nodewrap.escape.arena import hostile
from tests.need import need
from tests.node import until

CROWD = 40


@pytest.fixture
def slot(userns_node):
    """A group delegated to the pilot, which we are in, with what we start; the guard names the tree."""
    need("root", "cgroup2", "userns")
    mount = Path(next(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line))
    before = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    userns_node.open_guard(cgroup=str(mount))
    top, pilot = mount / f"nwtest-groups-{os.getpid()}", userns_node.pilot
    top.mkdir()
    for path in (top, top / "cgroup.procs", top / "cgroup.subtree_control"):
        os.chown(path, pilot.uid, pilot.gid)
    (top / "cgroup.procs").write_text("0")
    yield top
    Path(f"{mount}{before}/cgroup.procs").write_text("0")
    (top / "cgroup.kill").write_text("1")
    until(lambda: "populated 0" in (top / "cgroup.events").read_text(), "the group is empty")
    for where, _, _ in os.walk(top, topdown=False):
        os.rmdir(where)


def test_groups_that_a_payload_makes_below_its_own_go_with_the_run(userns_node, slot):
    began = time.monotonic()
    ran = userns_node.run("log-only", *hostile("c_processes", "crowd", CROWD))
    assert b"made below groups" in ran.out, ran
    assert (ran.rc, ran.err) == (0, b""), ran
    assert [path.name for path in slot.iterdir() if path.is_dir()] == []
    assert userns_node.is_clean()
    assert time.monotonic() - began < 10
