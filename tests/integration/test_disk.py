"""Private directories on disk (profile key disk): as good as those in memory, and gone with the run, whatever is in them and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.node import alive, until

PROFILES = """
[profile.strict]
tmpfs = { "/dev/shm" = "64MiB" }
disk = ["/tmp", "/var/tmp"]

[profile.batch]
tmpfs = { "/dev/shm" = "64MiB" }
disk = ["/tmp", "/var/tmp"]
"""
LOOK = r"""
import json, os, stat, subprocess, sys
places = ("/tmp", "/var/tmp")
kind = subprocess.run(["stat", "-f", "-c", "%T", *places], capture_output=True, text=True).stdout.split()
empty = [os.listdir(place) for place in places]
for place in places:
    with open(place + "/own", "w") as file:
        file.write("x")
print(json.dumps({
    "kind": kind, "empty": empty, "mode": [oct(os.stat(place).st_mode & 0o7777) for place in places], "owner": os.stat("/tmp/own").st_uid,
    "uid": os.getuid(), "flags": [line.split()[5] for line in open("/proc/self/mountinfo") if line.split()[4] == "/tmp"],
}))
"""
#: What a walk by name, or one that stops at the first difficulty, would leave.
HOSTILE = r"""
cd /tmp && mkdir -p locked/in/it "$(printf 'new\nline')" deep && touch locked/in/it/x && ln -s / root && ln -s /etc/passwd locked/link
mkfifo locked/fifo && ln locked/in/it/x other && i=0; cd deep; while [ $i -lt 300 ]; do mkdir d && cd d || exit 9; i=$((i + 1)); done
seq 3000 | (cd /var/tmp && xargs touch)
chmod 000 /tmp/locked/in/it /tmp/locked/in /tmp/locked; chmod 000 /tmp/other; echo done
"""
CASES = [("setuid", "pool"), ("setuid", "block"), ("setuid", "log-only"), ("userns", "map"), ("userns", "block")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    launcher, kind = request.param
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    yield from on_disk(request.getfixturevalue(f"{launcher}_node"), kind)


@pytest.fixture
def disk(node):
    yield from on_disk(node, "log-only")


def on_disk(node, kind):
    """(node, kind, tmp-dir), with profiles that have /tmp on disk."""
    place = node.site.prefix / "scratch"
    place.mkdir(mode=0o711)
    os.chown(place, *((0, 0) if node.privileged else (node.pilot.uid, node.pilot.gid)))
    node.open_guard(tmp_dir=str(place))
    node.site.policy(node.policy_text() + PROFILES)
    yield node, kind, place
    node.open_guard(tmp_dir=None)
    node.open_policy()
    subprocess.run(["rm", "-rf", place], check=True)


def test_tmp_is_a_private_directory_on_disk_and_gone_with_the_run(case):
    node, kind, place = case
    for profile in ("strict", "batch"):
        found = node.python(kind, LOOK, profile=profile)
        assert "tmpfs" not in found["kind"]
        assert (found["empty"], found["mode"]) == ([[], []], ["0o1777", "0o1777"])
        assert found["owner"] == found["uid"]
        assert {"nosuid", "nodev"} <= set(found["flags"][0].split(","))
        assert list(place.iterdir()) == []


def test_hostile_trees_go(case):
    node, kind, place = case
    ran = node.sh(kind, HOSTILE)
    assert (ran.rc, ran.out, ran.err) == (0, b"done\n", b"")
    assert list(place.iterdir()) == []
    assert "'left_paths': []" in str(ran.records)


def test_places_where_something_was_mounted_in_it_go_too(case, home):
    node, kind, place = case
    work = Path(f"/var/tmp/nwtest-{os.getpid()}/a/work")
    work.mkdir(parents=True)
    os.chown(work, node.pilot.uid, node.pilot.gid)
    try:
        ran = node.sh(kind, "echo kept >out; ls -A /var/tmp | wc -l", options=["--workdir", work])
        assert (ran.rc, ran.out, ran.err) == (0, b"1\n", b"")
        assert (work / "out").read_text() == "kept\n"
    finally:
        subprocess.run(["rm", "-rf", work.parents[1]], check=True)
    assert list(place.iterdir()) == []


def test_nobody_else_may_pass_while_the_payload_runs(setuid_node):
    for node, _, place in on_disk(setuid_node, "static"):
        live = node.start("static", "/bin/sh", "-c", "umask 0; echo secret >/tmp/open; echo ready; sleep 60")
        assert live.process.stdout.readline() == b"ready\n"
        (run,) = place.iterdir()
        assert (run.stat().st_uid, run.stat().st_mode & 0o7777) == (0, 0o700)
        assert [path.read_text() for path in run.glob("*/open")] == ["secret\n"]
        seen = node.site.run(["/bin/sh", "-c", f"cat {run}/*/open {run}/0/open; ls {run}"])
        assert seen.out == b""
        live.process.send_signal(signal.SIGTERM)
        live.end()


def abandon(node, kind):
    """A run whose processes are all killed at once."""
    live = node.start(kind, "/bin/sh", "-c", "mkdir /tmp/a && echo x >/tmp/a/b && chmod 0 /tmp/a; echo ready; sleep 60")
    assert live.process.stdout.readline() == b"ready\n"
    children = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    pids = [live.process.pid, *(map(int, children) if node.privileged else ())]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in reversed(pids):
            os.kill(pid, number)
    live.process.wait()
    until(lambda: not any(map(alive, pids)), "they are dead")


def test_a_dead_run_leaves_it_to_the_sweep(case):
    node, kind, place = case
    abandon(node, kind)
    assert len(list(place.iterdir())) == 1
    assert node.sweep()[0] == 0
    assert list(place.iterdir()) == []
    assert not any(node.settled().values())


@pytest.mark.parametrize("other", ["{place}", "{place}x/{run}", "{place}/{run}/0"])
def test_a_lease_that_names_another_directory_is_left_alone(disk, other):
    node, kind, place = disk
    abandon(node, kind)
    (name,) = node.site.leases()
    path = node.site.state / "leases" / name
    before = path.read_text()
    (line,) = [line for line in before.splitlines() if line.startswith("disk ")]
    assert line == f"disk {place}/{name[:36]}"
    path.write_text(before.replace(line, "disk " + other.format(place=place, run=name[:36])))
    code, reports, _ = node.sweep()
    assert (code, [report["state"] for report in reports]) == (1, ["broken"])
    assert len(list(place.iterdir())) == 1
    path.write_text(before)
    assert node.sweep()[0] == 0
    assert list(place.iterdir()) == []


def test_without_a_trustworthy_tmp_dir_nothing_starts_and_apply_says_so_beforehand(disk):
    node, kind, place = disk
    place.chmod(0o777)
    ran = node.run(kind, "/bin/true")
    assert (ran.rc, b"NW-PATH-WRITABLE" in ran.err) == (202, True)
    place.chmod(0o711)
    place.rename(f"{place}.away")
    ran = node.run(kind, "/bin/true")
    assert (ran.rc, b"NW-PATH" in ran.err) == (202, True)
    Path(f"{place}.away").rename(place)
    node.open_guard(tmp_dir=None)
    ran = node.run(kind, "/bin/true")
    assert (ran.rc, b"NW-TMP-DIR" in ran.err) == (202, True)
    said = node.site.policy(node.policy_text() + PROFILES)
    assert "NW-POLICY-GUARD" in said
    assert "tmp-dir" in said
    assert node.site.leases() == []
