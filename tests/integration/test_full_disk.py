"""A file system that is full, read-only or failing, at every byte: nothing runs without its records, what runs has room for its end, and what
cannot be recorded stays in its lease (I6, I9). NODEWRAP_ALL_POINTS=1 tries every byte where the launcher itself is run, not a sample."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from nodewrap.audit import log, record
from tests.fusefs import FuseFs
from tests.need import need
from tests.node import until
from tests.site import ROOT, command

ALL = os.environ.get("NODEWRAP_ALL_POINTS", "0") not in ("", "0")
MIB = 1 << 20


def sample(last):
    """Byte offsets 0..last: all of them, or both ends and what lies between at odd distances."""
    return range(last + 1) if ALL else sorted({0, 1, 2, 21, 22, last - 2, last - 1, last, *range(7, last, max(1, last // 7))})


def entries(path):
    with open(path, "rb") as file:
        return list(log.entries(log.lines(file)))


def records(path):
    """The file's records; a flaw that no gap record accounts for is an error."""
    found = entries(path)
    assert [entry.text for entry in found if not log.sound(entry.flaw)] == []
    return [entry.record for entry in found if entry.record]


def numbers(path):
    return [found["event"]["sequence"] for found in records(path)]


def actions(path):
    return [found["event"]["action"] for found in records(path)]


@contextmanager
def tmpfs(place, size, node=None):
    """A small file system over place, its root the trusted owner's."""
    need("root")
    owner = f",uid={node.pilot.uid},gid={node.pilot.gid}" if node and not node.privileged else ""
    command("mount", "-t", "tmpfs", "-o", f"size={size},mode=750{owner}", "none", place)
    try:
        yield place
    finally:
        command("umount", place)


@contextmanager
def fuse(place, node=None):
    need("root")
    made = FuseFs(place, *((node.pilot.uid, node.pilot.gid) if node and not node.privileged else (0, 0)))
    try:
        yield made
    finally:
        made.close()


def fill(place):
    """Take all that is free."""
    with open(place / "filler", "ab", buffering=0) as filler:
        for size in (1 << 16, 4096, 1):
            with pytest.raises(OSError, match="No space left"):
                pour(filler, size)


def pour(file, size):
    while file.write(b"x" * size):
        pass


LONG = ("set", "argc=900")  # a record of the greatest length


# ---- csrc/audit.c by itself, at every byte ----


@pytest.fixture
def write(audit_probe):
    """(directory, words of tests/c/audit_probe.c) -> what it says of each action."""

    def write(place, *words):
        done = subprocess.run([audit_probe, place / "log", *words], capture_output=True, text=True, check=True, timeout=60)
        return [line.split()[0] for line in done.stdout.splitlines()]

    return write


def earlier(size):
    """A log of exactly size bytes with one record, number 41."""
    empty = len(record.render([("event.sequence", 41), ("event.action", "x"), ("pad", [])]))
    return record.render([("event.sequence", 41), ("event.action", "x"), ("pad", ["x" * (size - empty - 2)])])


def fill_for_starts(write, place):
    """Fill, and use up what is there beyond what is set aside for ends: no other run may begin."""
    fill(place)
    for _ in range(40):
        if "NW-AUDIT" in write(place, *LONG, *["start"] * 10):
            return
    raise AssertionError("runs begin on a full disk")


def prepare(place, free):
    """The log has one record; free bytes are left in its last page, and no other page is."""
    (place / "filler").unlink(missing_ok=True)
    with open(place / "log.sequence", "r+b" if (place / "log.sequence").exists() else "wb") as counter:
        counter.write(b"%020d\n" % 41)  # in its place: what is set aside behind it stays
    (place / "log").write_bytes(earlier(4096 - free))
    fill(place)
    return (place / "log").read_bytes()


def test_a_log_full_at_any_byte_of_a_record_takes_it_whole_or_not_at_all(write, private):
    """tmpfs gives pages: the log's last one is filled up to k bytes, all others are taken. What was set aside is not there."""
    assert write(private, "set", "started=7", "exit") == ["ok"]
    length = (private / "log").stat().st_size + 1  # 41 has one digit more than 1
    with tmpfs(private, "64k") as place:
        for free in range(length + 1):
            before = prepare(place, free)
            assert write(place, "start") == ["NW-AUDIT"], free
            assert (place / "log").read_bytes() == before
            assert write(place, "set", "started=7", "exit") == ["ok" if free == length else "NW-AUDIT"], free
            assert (place / "log").read_bytes().startswith(before)
            assert numbers(place / "log") == ([41, 42] if free == length else [41])


def test_the_end_of_a_run_is_written_at_any_byte_at_which_the_log_is_full(write, private):
    """The run set room aside when it began; its log was rotated since, so that only the counter's room is left."""
    with tmpfs(private, "4m") as place:
        for free in range(0, 900, 1 if ALL else 13):
            (place / "filler").unlink(missing_ok=True)
            (place / "log").unlink(missing_ok=True)
            assert write(place, "start") == ["ok"]
            prepare(place, free)
            assert write(place, "start") == ["NW-AUDIT"], free
            assert write(place, "set", "started=7", "exit", "cleanup") == ["ok", "ok"], free
            assert numbers(place / "log") == [41, 42, 43]


def test_a_torn_record_of_any_length_is_sealed_and_no_number_is_used_twice(write, private):
    assert write(private, "start", "start") == ["ok", "ok"]
    one, two = (private / "log").read_bytes().splitlines(keepends=True)
    for torn in range(1, len(two)):
        (private / "log").write_bytes(one + two[:torn])
        (private / "log.sequence").write_text(f"{1:020}\n")
        assert write(private, "start") == ["ok"]
        assert [(entry.flaw, bool(entry.record)) for entry in entries(private / "log")] == [("", True), ("sealed", False), ("", True), ("", True)]
        assert (numbers(private / "log"), actions(private / "log")) == ([1, 2, 3], ["start", "gap", "start"])


@pytest.mark.parametrize("rotated", [False, True])
def test_room_that_is_set_aside_is_enough_for_the_ends_of_300_runs(write, private, rotated):
    with tmpfs(private, "4m") as place:
        assert write(place, "set", "argc=30", "start") == ["ok"]
        fill_for_starts(write, place)
        if rotated:
            (place / "log").rename(place / "log.1")  # the log's own room goes with it
        said = write(place, "set", "argc=30", "set", "started=7", *["exit", "handover", "cleanup"] * 300)
        assert said == ["ok"] * 900
        assert numbers(place / "log") == list(range(numbers(place / "log")[0], numbers(place / "log")[-1] + 1))


def test_room_is_set_aside_again_once_there_is_some(write, private):
    with tmpfs(private, "8m") as place:
        assert write(place, "start") == ["ok"]
        fill(place)
        while "NW-AUDIT" not in write(place, "set", "started=7", *LONG, *["exit"] * 100):
            pass
        assert write(place, "start") == ["NW-AUDIT"]
        (place / "filler").unlink()
        assert write(place, "start") == ["ok"]
        fill_for_starts(write, place)
        assert write(place, "set", "started=7", *["exit"] * 100) == ["ok"] * 100
        assert numbers(place / "log") == list(range(1, len(numbers(place / "log")) + 1))


@pytest.mark.parametrize("action", ["deny", "error", "authorize", "degrade"])
def test_who_is_refused_uses_no_room_that_others_need_for_their_end(write, private, action):
    with tmpfs(private, "4m") as place:
        assert write(place, "start") == ["ok"]
        fill_for_starts(write, place)
        assert write(place, *[action] * 3) == ["NW-AUDIT"] * 3
        assert write(place, "set", "started=7", "exit") == ["ok"]


@pytest.mark.parametrize(("operation", "error"), [("write", "EIO"), ("fsync", "EIO"), ("open", "EIO"), ("write", "EDQUOT"), ("write", "EROFS")])
def test_an_error_of_the_device_is_told_and_leaves_no_flaw(write, private, operation, error):
    with fuse(private) as disk:
        assert write(private, "start") == ["ok"]
        disk.tell(fail=[operation, getattr(errno, error)])
        code = "NW-AUDIT-UNSURE" if operation == "fsync" else "NW-AUDIT"  # written, but where
        assert write(private, "start", "set", "started=7", "exit", "cleanup") == [code] * 3
        disk.tell(fail=None)
        assert write(private, "start") == ["ok"]
        assert numbers(private / "log") == list(range(1, len(numbers(private / "log")) + 1))


def test_a_file_system_that_cannot_set_room_aside_is_used_as_it_is(write, private):
    """FUSE here has no fallocate(2), as NFS before 4.2. Cut at any byte, the record is taken back."""
    with fuse(private) as disk:
        assert write(private, "start", "set", "started=7", "exit") == ["ok", "ok"]
        before = (private / "log").read_bytes()
        for room in range(0, len(before.splitlines()[0]), 1 if ALL else 29):
            disk.tell(room=room)
            assert write(private, "start") == ["NW-AUDIT"]
            assert (private / "log").read_bytes() == before
        disk.tell(room=None)
        assert write(private, "start") == ["ok"]


# ---- the launchers ----


@pytest.fixture
def work(node, home):
    """Options that give the payload a work directory, and the file that it leaves there."""
    top = home / "full"
    top.mkdir()
    os.chown(top, node.pilot.uid, node.pilot.gid)
    yield ["--workdir", str(top)], top / "sang"
    shutil.rmtree(top)


def refused(node, work, words=()):
    """A run that may not start: its message."""
    process = node.site.start(node.argv("map", ["/bin/touch", work[1], *words], options=work[0]), stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 202, err
    assert len(err.splitlines()) == 1, err
    assert not work[1].exists(), "the payload ran without a record"
    return err


def sleeper(node, work, code=5):
    """A payload that waits for a line and leaves a file."""
    return node.start("map", "/bin/sh", "-c", f"read x; echo >{work[1]}; exit {code}", options=work[0])


def test_full_log_means_that_nothing_runs(node, work):
    place = node.site.audit.parent
    with tmpfs(place, "16k", node):
        fill(place)
        assert b"No space left" in refused(node, work)
    assert node.site.leases() == []


def test_disk_that_fills_between_authorize_and_start_means_that_nothing_runs(node, work):
    """On a file system that cannot set room aside: authorize fits, of start only k bytes do."""
    place = node.site.audit.parent
    with fuse(place, node) as disk:
        (place / "audit.jsonl.sequence").write_bytes(b"%020d\n" % 1000)  # numbers of one length
        os.chown(place / "audit.jsonl.sequence", place.stat().st_uid, place.stat().st_gid)
        assert node.run("map", "/bin/touch", work[1], options=work[0]).rc == 0
        work[1].unlink()
        sizes = [len(line) for line in node.site.audit.read_bytes().splitlines(keepends=True)]
        length = dict(zip(actions(node.site.audit), sizes))
        for free in sample(length["start"] - 9):  # pids have not always as many digits
            before = len(records(node.site.audit))
            disk.tell(room=length["authorize"] + free)
            refused(node, work)
            disk.tell(room=None)
            assert actions(node.site.audit)[before:before + 1] == ["authorize"], free
            assert "start" not in actions(node.site.audit)[before:]
    assert node.site.leases() == []


def test_lease_cut_short_at_any_byte_means_that_nothing_runs(node, work):
    """The file system of the leases is full."""
    place = node.site.state / "leases"
    with fuse(place, node) as disk:
        live = sleeper(node, work)
        (length,) = [path.stat().st_size for path in place.glob("*.lease")]
        live.end(b"\n")
        work[1].unlink()
        for room in sample(length - 20):  # here too
            disk.tell(room=room)
            assert refused(node, work).startswith(b"nodewrap: NW-")
            disk.tell(room=None)
            assert [path.stat().st_size for path in place.glob("*.lease")] in ([], [0]), room
        disk.tell(room=None, fail=["fsync", errno.EIO])
        assert b"Input/output error" in refused(node, work)


def test_start_that_is_in_the_log_but_perhaps_not_on_disk_executes_nothing_and_has_its_end_there(node, work):
    with fuse(node.site.audit.parent, node) as disk:
        disk.tell(fail=["fsync", errno.EIO])
        assert b"Input/output error" in refused(node, work)
        assert [action for action in actions(node.site.audit) if action != "degrade"] == ["authorize", "start", "exit", "cleanup", "error"]
        assert [found["event"]["outcome"] for found in records(node.site.audit) if found["event"]["action"] == "exit"] == ["unknown"]
        disk.tell(fail=None)
        assert swept(node)[-1] == ("cleanup", "success", True)  # that one was not certain either


def test_a_run_that_has_started_records_its_end_on_a_full_disk(node, work):
    place = node.site.audit.parent
    with tmpfs(place, "4m", node):
        live = sleeper(node, work)
        fill(place)
        assert 202 in (node.run("map", "/bin/true", "y" * 3000).rc for _ in range(20))  # what is set aside ahead is used up first
        assert b"No space left" in refused(node, work, ["y" * 3000])
        assert live.end(b"\n") == (5, b"", b"")
        found = records(node.site.audit)
        assert [entry["event"]["action"] for entry in found][-3:] == ["exit", "handover", "cleanup"]
        assert found[-3]["process"]["exit_code"] == 5
        assert not any("records_lost" in entry["nodewrap"] for entry in found)
    assert node.site.leases() == []


def test_also_when_the_log_was_rotated_meanwhile(node, work):
    place = node.site.audit.parent
    with tmpfs(place, "4m", node):
        live = sleeper(node, work)
        node.site.audit.rename(place / "audit.jsonl.1")
        fill(place)
        assert live.end(b"\n") == (5, b"", b"")
        assert actions(node.site.audit) == ["exit", "handover", "cleanup"]
        assert numbers(node.site.audit)[0] == numbers(place / "audit.jsonl.1")[-1] + 1


def test_twenty_runs_end_on_a_full_disk(node):
    place = node.site.audit.parent
    with tmpfs(place, "4m", node):
        lives = [node.start("log-only", "/bin/sh", "-c", "read x; exit 3") for _ in range(20)]
        fill(place)
        for live in lives:
            live.process.stdin.write(b"\n")
            live.process.stdin.flush()
        assert [live.end()[0] for live in lives] == [3] * 20
        found = actions(node.site.audit)
        assert [found.count(action) for action in ("authorize", "start", "exit", "cleanup")] == [20] * 4


def exhaust(node, place):
    """The disk is full and what was set aside is gone: the log's by rotation, the counter's by truncation. Returns the log's new name."""
    node.site.audit.rename(place / "audit.jsonl.1")
    os.truncate(place / "audit.jsonl.sequence", 21)
    fill(place)
    return place / "audit.jsonl.1"


def swept(node):
    """What a sweep writes once the disk has room."""
    before = len(records(node.site.audit))
    assert node.sweep()[0] == 0
    assert node.site.leases() == []
    return [(found["event"]["action"], found["event"]["outcome"], found["nodewrap"]["swept"]) for found in records(node.site.audit)[before:]]


def test_end_that_cannot_be_recorded_at_all_stays_in_the_lease_and_goes_to_syslog(setuid_node, syslog):
    """And a sweep writes it when there is room."""
    node, place = setuid_node, setuid_node.site.audit.parent
    with tmpfs(place, "4m", node):
        live = node.start("map", "/bin/sh", "-c", "read x; exit 5")
        (lease,) = node.site.leases()
        rotated = exhaust(node, place)
        code, out, err = live.end(b"\n")
        assert (code, out) == (202, b"")
        assert err.startswith(b"nodewrap: NW-CLEANUP: ")
        assert node.site.leases() == [lease]
        assert (actions(rotated)[-1], records(node.site.audit)) == ("start", [])
        copies = [json.loads(line.partition(b": ")[2]) for line in syslog.lines() if lease.partition(".")[0].encode() in line]
        assert [(copy["event"]["action"], copy["event"]["sequence"]) for copy in copies[-2:]] == [("exit", 0), ("cleanup", 0)]
        assert copies[-2]["process"]["exit_code"] == 5
        assert node.sweep()[0] == 1
        assert node.site.leases() == [lease]
        (place / "filler").unlink()
        assert swept(node) == [("exit", "unknown", True), ("cleanup", "success", True)]
        assert numbers(node.site.audit)[0] == numbers(rotated)[-1] + 1


@pytest.mark.parametrize("policy", ["run-and-flag", "run"])
def test_site_may_let_ends_go_unrecorded(setuid_node, policy):
    node, place = setuid_node, setuid_node.site.audit.parent
    node.open_guard(audit_on_failure=policy)
    with tmpfs(place, "4m", node):
        live = node.start("map", "/bin/sh", "-c", "read x; exit 5")
        exhaust(node, place)
        assert live.end(b"\n") == (5, b"", b"")
    assert node.site.leases() == []


def test_log_that_becomes_read_only_under_a_run_leaves_its_lease(setuid_node, work_of_setuid):
    node, place = setuid_node, setuid_node.site.audit.parent
    with tmpfs(place, "4m", node):
        live = sleeper(node, work_of_setuid)
        command("mount", "-o", "remount,ro", place)
        assert b"Read-only file system" in refused(node, (work_of_setuid[0], work_of_setuid[1].with_name("other")))
        assert live.end(b"\n")[0] == 202
        assert len(node.site.leases()) == 1
        command("mount", "-o", "remount,rw", place)
        assert actions(node.site.audit)[-1] == "start"
        assert swept(node)[0] == ("exit", "unknown", True)


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_a_front_that_is_killed_while_the_disk_does_not_answer_gets_nothing_executed(setuid_node, work_of_setuid, operation):
    """The keeper waits in the record of authorize (write), or in that of start (fsync), and looks for the front when it goes on."""
    options, file = work_of_setuid
    with fuse(setuid_node.site.audit.parent, setuid_node) as disk:
        disk.tell(hold=operation)
        process = setuid_node.site.start(setuid_node.argv("map", ["/bin/touch", file], options=options))
        until(lambda: disk.tell(held=1), "a record waits")
        process.kill()
        process.wait()
        disk.tell(hold=None)
        until(lambda: not setuid_node.launchers() and not setuid_node.site.leases(), "the keeper has ended it")
        found = [action for action in actions(setuid_node.site.audit) if action != "degrade"]
        assert not file.exists()
        assert found == (["authorize", "error"] if operation == "write" else ["authorize", "start", "exit", "cleanup", "error"]), found
        assert [one["event"].get("code") for one in records(setuid_node.site.audit) if one["event"]["action"] == "error"] == ["NW-GONE"]


@pytest.fixture
def work_of_setuid(setuid_node, home):
    top = home / "full"
    top.mkdir()
    os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
    yield ["--workdir", str(top)], top / "sang"
    shutil.rmtree(top)


def test_full_work_directory_is_the_payloads_own_affair(node, work):
    """It runs, finds its disk full, and comes back and is recorded as ever."""
    place = work[1].parent
    with tmpfs(place, "1m"):
        os.chown(place, node.pilot.uid, node.pilot.gid)
        ran = node.run("map", "/bin/sh", "-c", f"cat /dev/zero >{work[1]}; ln -s /etc/passwd {place}/out", options=work[0])
        assert b"No space left" in ran.err
        assert ran.record("cleanup")["nodewrap"]["cleanup"]["left"] == 0
        assert {path.stat().st_uid for path in (place, work[1])} == {node.pilot.uid}
        assert not os.path.lexists(place / "out")
    assert node.site.leases() == []


def test_the_reserve_is_not_only_roots(userns_node, home):
    """The caller of the userns launcher may not use the blocks that ext4 keeps for root: its room must be real."""
    need("root", "mkfs.ext4")
    node, place, image = userns_node, userns_node.site.audit.parent, home / "image"
    os.truncate(os.open(image, os.O_CREAT | os.O_RDWR), 16 * MIB)
    command("mkfs.ext4", "-q", "-m", "20", image)
    command("mount", "-o", "loop", image, place)
    try:
        os.chown(place, node.pilot.uid, node.pilot.gid)
        place.chmod(0o750)
        assert ROOT
        live = node.start("map", "/bin/sh", "-c", "read x; exit 5")
        script = f"cat /dev/zero >{place}/filler; sync {place}/filler; cat /dev/zero >>{place}/filler; exit 0"
        subprocess.run(["sh", "-c", script], user=node.pilot.uid, group=node.pilot.gid, stderr=subprocess.DEVNULL, check=True)
        assert os.statvfs(place).f_bavail << 10 < MIB < os.statvfs(place).f_bfree << 10
        assert 202 in (node.run("map", "/bin/true", "y" * 3000).rc for _ in range(20))  # ext4 leaves the last blocks for its own tables
        assert live.end(b"\n") == (5, b"", b"")
        assert actions(node.site.audit)[-2:] == ["exit", "cleanup"]
    finally:
        command("umount", place)
        image.unlink()


