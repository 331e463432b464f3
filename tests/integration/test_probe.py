"""All that tests/probe.py looks for: open to a bare process of the pilot's, closed in strict, and exactly the documented openings elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nodewrap.doctor.probe import landlock_abi
from tests import probe
from tests.files import CHECKOUT
from tests.need import missing
from tests.node import KINDS, PROFILES, has_pilots_id
from tests.site import ROOT

LOOK = probe.command("look", probe.FACTS)


@pytest.fixture(scope="module")
def cgroup(session):
    """The pilot's delegated group, None where there is nothing to delegate with."""
    if not ROOT or missing("cgroup2"):
        yield None
        return
    made = probe.Cgroup(f"nwprobe-{session.tag}", session.accounts["pilot"].uid)
    yield made
    made.close()


@pytest.fixture(scope="module")
def bare(session, home, cgroup):
    """What is open to the pilot's own processes, without any tool between."""
    pilot = session.accounts["pilot"]
    ids = {"user": pilot.uid, "group": pilot.gid, "extra_groups": pilot.groups} if ROOT else {}

    def start(argv, **pipes):
        return subprocess.Popen(argv, cwd=home, start_new_session=True, env={"PATH": "/usr/bin:/bin"}, **ids, **pipes)

    return probe.measure(start, LOOK, home, cgroup)


def closed(document):
    return {item for item, there in document["open"].items() if not there}


# ---- the probe itself: what it calls closed must mean something ----


def test_everything_is_open_to_a_bare_process_of_the_pilot(bare):
    assert closed(bare) - probe.ROOT_ONLY - probe.NODE_MAY_LACK == set(), bare["said"]


def test_the_pilots_own_evidence_agrees(bare):
    assert bare["evidence"] == {"signal": True, "typed": bare["open"]["tiocsti"], "datagram": True, "heard": ["abstract", "loopback", "named"]}


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_what_only_root_may_is_open_to_a_bare_process_of_root(tmp_path):
    found = probe.measure(lambda argv, **pipes: subprocess.Popen(argv, cwd=tmp_path, start_new_session=True, **pipes), LOOK, tmp_path)
    assert closed(found) & probe.ROOT_ONLY == set(), found["said"]


def test_the_table_in_the_documentation_is_whole_and_says_what_is_documented_here():
    done = subprocess.run([sys.executable, CHECKOUT / "packaging/probe_table.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done


# ---- nodewrap ----


def cases():
    for launcher, kinds in KINDS.items():
        for kind in kinds:
            yield from (pytest.param(launcher, kind, profile, id=f"{launcher}-{kind}-{profile}") for profile in PROFILES)


@pytest.mark.parametrize(("launcher", "kind", "profile"), list(cases()))
def test_exactly_what_is_documented_is_open(request, home, bare, cgroup, launcher, kind, profile):
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    node = request.getfixturevalue(f"{launcher}_node")
    work = home / "work"
    work.mkdir()
    os.chown(work, node.pilot.uid, node.pilot.gid)
    try:
        argv = node.argv(kind, LOOK, profile, ["--workdir", work])
        found = probe.measure(lambda argv, **pipes: node.site.start(argv, cwd=home, **pipes), argv, home, cgroup)
        left = os.listdir(work)
    finally:
        subprocess.run(["rm", "-rf", "--", work], check=True)
    assert (found["rc"], found["err"], left) == (0, "", []), found
    is_open = {item for item, there in found["open"].items() if there}
    like = "block" if kind == "map" and not has_pilots_id(node, kind) else kind  # an id of a range
    unscoped = {"abstract"} if profile in ("batch", "compat") and landlock_abi() < 6 else set()  # recorded as "degrade"
    assert is_open == probe.documented(launcher, like, profile) - (closed(bare) & probe.NODE_MAY_LACK) | unscoped, found["said"]
