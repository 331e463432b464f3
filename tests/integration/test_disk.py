"""Private directories on disk (profile key disk): as good as those in memory, and gone with the run, whatever is in them and whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.node import abandon, delegated_ids

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
    try:
        yield node, kind, place
    finally:  # also for who takes it by a loop that ends early
        node.open_guard(tmp_dir=None)
        node.open_policy()
        subprocess.run(["rm", "-rf", place], check=True)


def test_tmp_is_a_private_directory_on_disk_and_gone_with_the_run(case):
    node, kind, place = case
    for profile in ("strict", "batch"):
        found = node.python(kind, LOOK, profile=profile)
        assert "tmpfs" not in found["kind"]
        several = kind == "block" or (not node.privileged and kind == "map" and delegated_ids(node.pilot.name))  # or one that the launcher is not
        assert (found["empty"], found["mode"]) == ([[], []], ["0o1777" if several else "0o1700"] * 2)
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


def other_makes(place, uid, *made):
    """What comes of it when somebody else, who was given a descriptor of the directory, makes these there: True or the error's name, for each."""
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    code = ("import errno, json, os, sys\nfound = []\nfor name in sys.argv[2:]:\n try:\n"
            "  os.mkdir(name.rstrip('/'), 0o700, dir_fd=int(sys.argv[1])) if name[-1] == '/' else "
            "os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=int(sys.argv[1])))\n  found.append(True)\n"
            " except OSError as wrong:\n  found.append(errno.errorcode[wrong.errno])\nprint(json.dumps(found))")
    try:
        argv = ["/usr/bin/python3", "-I", "-c", code, str(directory), *made]
        ran = subprocess.run(argv, pass_fds=[directory], user=uid, group=uid, extra_groups=[], capture_output=True, check=True)
        return json.loads(ran.stdout)
    finally:
        os.close(directory)


@pytest.mark.parametrize("kind", ["static", "pool", "map", "log-only"])
def test_others_make_nothing_there_whatever_descriptor_they_were_given(setuid_node, session, kind):
    for node, _, place in on_disk(setuid_node, kind):
        live = node.start(kind, "/bin/sh", "-c", "echo ready; sleep 60")
        assert live.process.stdout.readline() == b"ready\n"
        (run,) = place.iterdir()
        for path in run.iterdir():
            assert other_makes(path, session.accounts["outsider"].uid, "file", "directory/") == ["EACCES", "EACCES"]
        live.process.send_signal(signal.SIGTERM)
        live.end()
        assert list(place.iterdir()) == []


def test_what_others_make_where_the_payload_lets_them_goes_as_far_as_its_rights_go_and_the_rest_is_on_record(setuid_node, session):
    outsider = session.accounts["outsider"].uid
    for node, _, place in on_disk(setuid_node, "pool"):
        for deep in (False, True):
            live = node.start("pool", "/bin/sh", "-c", "mkdir /tmp/open; chmod 777 /tmp /tmp/open; echo ready; sleep 60")
            assert live.process.stdout.readline() == b"ready\n"
            (run,) = place.iterdir()
            (tmp,) = [path.parent for path in run.glob("*/open")]
            made = ["file", "directory/", "open/file", "open/directory/"] + ["directory/in"] * deep
            assert other_makes(tmp, outsider, *made) == [True] * len(made)
            before = node.site.audit_size()
            live.process.send_signal(signal.SIGTERM)
            live.end()
            (record,) = [record for record in node.site.records(before) if record["event"]["action"] == "cleanup"]
            assert node.site.leases() == []
            assert [path.name for path in run.glob("*/*")] == ["directory"] * deep
            assert ("directory" in str(record)) is deep, record
        argv = [node.site.binary, "sweep", "--deep"]
        ran = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", env=node.site.environment(node.pilot), timeout=200)
        assert f"{run} is left of a run that has ended" in ran.stderr


def abandoned(node, kind):
    """A run whose processes are all killed at once."""
    live = node.start(kind, "/bin/sh", "-c", "mkdir /tmp/a && echo x >/tmp/a/b && chmod 0 /tmp/a; echo ready; sleep 60")
    assert live.process.stdout.readline() == b"ready\n"
    abandon(node, live)


def test_a_dead_run_leaves_it_to_the_sweep(case):
    node, kind, place = case
    abandoned(node, kind)
    assert len(list(place.iterdir())) == 1
    assert node.sweep()[0] == 0
    assert list(place.iterdir()) == []
    assert not any(node.settled().values())


@pytest.mark.parametrize("other", ["{place}", "{place}x/{run}", "{place}/{run}/0"])
def test_a_lease_that_names_another_directory_is_left_alone(disk, other):
    node, kind, place = disk
    abandoned(node, kind)
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
