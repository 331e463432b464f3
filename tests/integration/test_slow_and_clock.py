"""Records on a disk that does not answer, by a clock that is set, and in files that are rotated, removed or replaced while runs are live: no number
is used twice, no run begins without its records, and nobody waits for ever but for its own disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nodewrap.audit import log
from tests.c import FLAGS
from tests.files import CHECKOUT
from tests.fusefs import FuseFs
from tests.need import need
from tests.node import alive, status_of, until
from tests.site import command


def entries(path):
    with open(path, "rb") as file:
        return list(log.entries(log.lines(file)))


def records(path):
    found = entries(path)
    assert [entry.text for entry in found if not log.sound(entry.flaw)] == []
    return [entry.record for entry in found if entry.record]


def numbers(path):
    return [found["event"]["sequence"] for found in records(path)]


def actions(found):
    return [entry["event"]["action"] for entry in found]


@pytest.fixture
def write(audit_probe, private):
    """Words of tests/c/audit_probe.c -> what it says of each action. The log is private/log."""

    def write(*words):
        done = subprocess.run([audit_probe, private / "log", *words], capture_output=True, text=True, check=True, timeout=60)
        return [line.split()[0] for line in done.stdout.splitlines()]

    return write


@pytest.fixture
def begin(audit_probe, private):
    """As write, but only started -> Popen. Killed at the end."""
    started = []

    def begin(*words):
        started.append(subprocess.Popen([audit_probe, private / "log", *words], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def fuse(place, node=None):
    need("root")
    made = FuseFs(place, *((node.pilot.uid, node.pilot.gid) if node and not node.privileged else (0, 0)))
    try:
        yield made
    finally:
        made.close()


def held(disk):
    until(lambda: disk.tell(held=1), "an operation waits")


# ---- a disk that does not answer ----


def test_who_waits_for_a_hung_disk_waits_alone(write, begin, private):
    """One writer has the lock and no answer. The others are refused in time; when the disk is back, nothing is missing."""
    with fuse(private) as disk:
        assert write("start") == ["ok"]
        disk.tell(hold="write")
        first = begin("start")
        held(disk)
        before = time.monotonic()
        assert write("start") == ["NW-AUDIT"]
        assert time.monotonic() - before < 10
        disk.tell(hold=None)
        assert first.communicate(timeout=10)[0] == "ok\n"
        assert write("start") == ["ok"]
        assert numbers(private / "log") == [1, 2, 3]


def test_nobody_waits_until_somebody_elses_record_is_on_disk(write, audit_probe, private):
    need("strace")
    assert write("start") == ["ok"]
    slow = ["strace", "-f", "-o", "/dev/null", "-e", "inject=fdatasync:delay_enter=6000000", audit_probe, private / "log", "start"]
    first = subprocess.Popen(slow, stdout=subprocess.PIPE, text=True)
    until(lambda: (private / "log").read_bytes().count(b"\n") == 2, "the first record is written")
    assert write("start") == ["ok"]
    assert first.poll() is None, "its sync goes on"
    assert first.communicate(timeout=30)[0] == "ok\n"
    assert numbers(private / "log") == [1, 2, 3]


def test_a_writer_that_is_killed_leaves_no_lock(write, begin, private):
    with fuse(private) as disk:
        assert write("start") == ["ok"]
        disk.tell(hold="write")
        first = begin("start")
        held(disk)
        first.kill()  # which takes effect once it has its answer
        disk.tell(hold=None)
        first.wait(10)
        assert write("start") == ["ok"]
        assert numbers(private / "log") == list(range(1, 1 + len(numbers(private / "log"))))


def test_frozen_file_system_keeps_one_writer_and_refuses_the_others(write, begin, private, tmp_path):
    need("root", "fsfreeze", "mkfs.ext4")
    image = tmp_path / "image"
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    command("mkfs.ext4", "-q", image)
    command("mount", "-o", "loop", image, private)
    try:
        assert write("start") == ["ok"]
        command("fsfreeze", "-f", private)
        try:
            first = begin("start")
            until(lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D", "the writer waits")
            assert write("start") == ["NW-AUDIT"]
        finally:
            command("fsfreeze", "-u", private)
        assert first.communicate(timeout=10)[0] == "ok\n"
        assert write("start") == ["ok"]
        assert numbers(private / "log") == [1, 2, 3]
    finally:
        command("umount", private)


def test_slow_disk_makes_a_run_slow_and_nothing_else(node):
    place = node.site.audit.parent
    with fuse(place, node) as disk:
        disk.tell(delay=0.2)
        ran = node.run("map", "/bin/sh", "-c", "exit 7")
        assert (ran.rc, ran.err) == (7, b"")
        assert [action for action in actions(records(node.site.audit)) if action != "degrade"] == ["authorize", "start", "exit", "cleanup"]


def test_run_whose_first_record_gets_no_answer_can_be_killed(node, home):
    """The setuid launcher's keeper then ends it, and its records are complete."""
    canary, place = home / "canary", node.site.audit.parent
    with fuse(place, node) as disk:
        disk.tell(hold="write")
        process = node.site.start(node.argv("map", ["/bin/sh", "-c", f"sleep 1; touch {canary}"]))
        held(disk)
        process.kill()
        if node.privileged:  # the front at once; the process that has no answer yet is not the pilot's
            process.wait(5)
        disk.tell(hold=None)
        process.wait(10)
        until(lambda: not node.launchers(), "the keeper has gone")
        assert not canary.exists()
        if not node.privileged:  # nobody outlives the launcher there
            assert node.sweep()[0] == 0
        found = actions(records(node.site.audit))
        assert found.count("start") == found.count("exit")
        assert found[-1] in ("error", "cleanup")
    assert node.site.leases() == []


@pytest.mark.parametrize("end", ["wall", "signal", "pilot"])
def test_limits_and_signals_work_while_the_log_does_not(node, end):
    """The payload ends in time; only the record of it waits for the disk, and the run with it."""
    place = node.site.audit.parent
    with fuse(place, node) as disk:
        live = node.start("map", "/bin/sleep", "60", options=["--wall", "4"] if end == "wall" else [])
        disk.tell(hold="write")
        if end == "signal":
            live.process.terminate()
        if end == "pilot":
            live.process.kill()
        until(lambda: not alive(live.pid), "the payload has ended")
        if end != "pilot" or node.privileged:
            held(disk)
        disk.tell(hold=None)
        live.process.wait(20)
        until(lambda: not node.launchers(), "the keeper has gone")
        if end == "pilot" and not node.privileged:
            assert node.sweep()[0] == 0
        assert actions(records(node.site.audit))[-2:] == ["exit", "cleanup"]
    assert node.site.leases() == []


# ---- a pilot that owns its cgroup ----


def test_pilot_that_freezes_its_cgroup_keeps_nobody_from_writing_records(setuid_node, job):
    """Who writes, with the locks held, is not in it, and is wholly root's."""
    node, place = setuid_node, setuid_node.site.audit.parent
    for path in (job.v2, job.v2 / "cgroup.procs", job.v2 / "cgroup.freeze"):
        os.chown(path, node.pilot.uid, node.pilot.gid)  # delegated
    with fuse(place) as disk:
        assert node.run("map", "/bin/true").rc == 0
        disk.tell(hold="write")
        with job:
            process = node.site.start(node.argv("map", ["/bin/true"]))
        held(disk)
        (writer,) = [pid for pid in node.launchers() if Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1] == "0::/"]
        assert status_of(writer)["Uid"] == ["0"] * 4
        (job.v2 / "cgroup.freeze").write_text("1")
        until(lambda: "frozen 1" in (job.v2 / "cgroup.events").read_text(), "frozen")
        try:
            disk.tell(hold=None)
            assert node.run("map", "/bin/true", timeout=20).rc == 0
            assert process.poll() is None
        finally:
            (job.v2 / "cgroup.freeze").write_text("0")
        assert process.wait(20) == 0
        assert len(set(numbers(node.site.audit))) == len(numbers(node.site.audit))


# ---- a clock that is set ----


def test_numbers_go_on_when_the_clock_goes_back_and_times_say_so(write, private):
    assert write("start", "set", "clock=-86400", "start", "set", "clock=86400", "start", "set", "clock=0", "start") == ["ok"] * 4
    found = records(private / "log")
    times = [entry["@timestamp"] for entry in found]
    assert numbers(private / "log") == [1, 2, 3, 4]
    assert times[1] < times[0] < times[3] < times[2]


def test_patience_with_a_lock_does_not_follow_the_clock(write, begin, private):
    with fuse(private) as disk:
        assert write("start") == ["ok"]
        disk.tell(hold="write")
        begin("start")
        held(disk)
        for step in ("clock=-86400", "clock=86400"):
            before = time.monotonic()
            assert write("set", step, "start") == ["NW-AUDIT"]
            assert 0.9 < time.monotonic() - before < 5


@pytest.fixture(scope="module", params=[-3600, 3600])
def stepped(request, tmp_path_factory):
    """A userns launcher whose wall clock is set by that many seconds whenever it looks; the seconds."""
    need("gcc")
    place = tmp_path_factory.mktemp("stepped")
    for parent in (place, *place.parents[:2]):
        parent.chmod(0o755)
    others = {"launch_setuid.c", "launch_socket.c", "launch_sweep.c", "launch_inside.c", "front.c"}
    sources = [path for path in (CHECKOUT / "csrc").glob("*.c") if path.name not in others]
    defines = ['-DNW_VERSION="0"', *(f'-DNW_{name}="/nonexistent"' for name in ("GUARD", "LIBEXEC", "PYTHON_CLI")), f"-DSTEP={request.param}"]
    command("gcc", *FLAGS, *defines, "-Wl,--wrap=clock_gettime", "-o", place / "nodewrap-userns", *sources, CHECKOUT / "tests/c/stepped_clock.c")
    return place / "nodewrap-userns", request.param


def test_wall_limit_and_usage_do_not_follow_a_clock_that_is_set(userns_node, stepped):
    node, before = userns_node, userns_node.site.audit_size()
    argv = node.argv("map", ["/bin/sleep", "60"], options=["--wall", "1"], launcher=stepped[0])
    began = time.monotonic()
    process = node.site.start(argv, env={"NODEWRAP_GUARD": str(node.site.sysconf / "guard")}, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + signal.SIGTERM, b"")
    assert 1 <= time.monotonic() - began < 10
    found = node.site.records(before)
    (end,) = [entry for entry in found if entry["event"]["action"] == "exit"]
    assert end["process"]["ended_by"] == "wall"
    assert 1 <= float(end["nodewrap"]["usage"]["wall_s"]) < 10
    times = [entry["@timestamp"] for entry in found]
    assert times == sorted(times, reverse=stepped[1] < 0)
    sequence = [entry["event"]["sequence"] for entry in found]
    assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))


# ---- rotation, removal ----


def all_numbers(place):
    """Of the log and its rotated parts, each part in order."""
    found = []
    for path in place.glob("log*"):
        if path.name != "log.sequence":
            assert numbers(path) == sorted(numbers(path))
            found += numbers(path)
    return sorted(found)


def test_no_record_is_lost_and_no_number_used_twice_while_the_log_is_rotated(begin, private):
    """By renaming, every few milliseconds, with six writers at work."""
    writers = [begin("set", "sync=0", *["start"] * 1500) for _ in range(6)]
    turn = 0
    while any(writer.poll() is None for writer in writers):
        if (private / "log").exists():
            (private / "log").rename(private / f"log.{turn}")
            turn += 1
        time.sleep(0.001)
    assert [set(writer.communicate()[0].split()) for writer in writers] == [{"ok"}] * 6
    assert turn > 3
    assert all_numbers(private) == list(range(1, 9001))


def test_no_number_is_used_twice_while_the_counter_is_removed(begin, private):
    writers = [begin("set", "sync=0", *["start"] * 200) for _ in range(6)]
    while any(writer.poll() is None for writer in writers):
        (private / "log.sequence").unlink(missing_ok=True)
        time.sleep(0.003)
    assert [set(writer.communicate()[0].split()) for writer in writers] == [{"ok"}] * 6
    assert numbers(private / "log") == list(range(1, 1201))


def opened(pid):
    """Paths of what the process has open."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return found


def test_who_waited_for_a_counter_that_was_removed_writes_the_new_one(write, begin, private):
    """One has the locks, another one waits for them; what the latter has open is not the counter any more."""
    with fuse(private) as disk:
        assert write("start") == ["ok"]
        disk.tell(hold="write")
        first = begin("start")
        held(disk)
        second = begin("start")
        until(lambda: str(private / "log.sequence") in opened(second.pid), "it has it open")
        (private / "log.sequence").unlink()
        disk.tell(hold=None)
        assert [process.communicate(timeout=10)[0] for process in (first, second)] == ["ok\n"] * 2
        (private / "log").unlink()
        assert write("start") == ["ok"]
        assert numbers(private / "log") == [4]


def test_numbers_go_on_after_copytruncate_and_removal_of_the_log(write, private):
    assert write("start", "start") == ["ok"] * 2
    (private / "log.1").write_bytes((private / "log").read_bytes())
    os.truncate(private / "log", 0)
    assert write("set", "started=7", "exit") == ["ok"]
    (private / "log").unlink()
    assert write("start") == ["ok"]
    assert (numbers(private / "log.1"), numbers(private / "log")) == ([1, 2], [4])


@pytest.mark.parametrize(("counter", "number"), [
    (None, 4), (b"", 4), (b"junk", 4), (b"%020d" % 9, 4), (b"%020d\n" % 1, 4), (b"%020d\n" % 3, 4), (b"%020d\n" % 900, 901), (b"9" * 20 + b"\n", 4),
    (b"\0" * 21, 4), (b"%021d\n" % 900, 4), (b"%020d\n\n" % 900, 901), (b"-%019d\n" % 900, 4), (b"%020d\n" % (2**63 - 1), 4),
])
def test_number_is_the_greater_one_of_log_and_counter(write, private, counter, number):
    assert write("start", "start", "start") == ["ok"] * 3
    (private / "log.sequence").unlink()
    if counter is not None:
        (private / "log.sequence").write_bytes(counter)
    assert write("start", "start") == ["ok"] * 2
    assert [found["event"]["sequence"] for found in (entry.record for entry in entries(private / "log"))] == [1, 2, 3, number, number + 1]
    (private / "log").unlink()
    assert write("start") == ["ok"]
    assert numbers(private / "log") == [number + 2]


def test_counter_that_is_no_number_and_a_log_without_one_are_an_error_that_says_what_to_do(audit_probe, private):
    (private / "log.sequence").write_bytes(b"junk\n")
    said = subprocess.run([audit_probe, private / "log", "start"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "log.sequence is no number and the log has none; remove it to begin at 1" in said
    assert (private / "log").read_bytes() == b""
    (private / "log.sequence").unlink()
    assert subprocess.run([audit_probe, private / "log", "start"], capture_output=True, text=True, check=True, timeout=60).stdout == "ok\n"


@pytest.mark.parametrize("junk", [
    b"x" * 99 + b"\n", b"\0" * 4096 + b"\n", b'{"event":{"sequence":99,"action":"x"}!\n', b'x{"event":{"sequence":99,"action":"x"}}\n',
])
def test_last_record_is_found_wherever_it_is_when_nothing_else_knows_its_number(write, private, junk):
    """Behind it a site's administrator, or a power cut, has put much else."""
    assert write("set", "argc=900", "start", "start", "start") == ["ok"] * 3
    for lines in (1, 90, 7):
        last = [entry.record for entry in entries(private / "log") if entry.record][-1]["event"]["sequence"]
        with open(private / "log", "ab") as file:
            file.write(junk * lines)
        (private / "log.sequence").unlink()
        assert write("start") == ["ok"]
        assert [entry.record for entry in entries(private / "log") if entry.record][-1]["event"]["sequence"] == last + 1


def test_zeros_between_records_hide_none(write, private):
    """As a file system leaves them after a power cut."""
    assert write("start") == ["ok"]
    with open(private / "log", "ab") as file:
        file.write(b"\0" * 512)
    assert write("start", "start") == ["ok"] * 2
    (private / "log.sequence").unlink()
    assert write("start") == ["ok"]
    assert numbers(private / "log") == [1, 2, 3, 4, 5]


# ---- replaced files ----


@contextlib.contextmanager
def replaced(path, make):
    """The file away, and something else under its name."""
    kept = path.with_name(path.name + ".kept")
    path.rename(kept)
    try:
        make(path)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        kept.rename(path)


def refused(node, home):
    canary = home / "sang"
    process = node.site.start(node.argv("map", ["/bin/touch", canary]), stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.count(b"\n")) == (202, 1)
    assert not canary.exists()
    assert node.site.leases() == []
    return err.decode()


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.sequence"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "socket"])
def test_file_of_another_kind_is_named_and_nothing_runs(node, home, name, kind):
    assert node.run("map", "/bin/true").rc == 0
    make = {
        "link": lambda path: path.symlink_to("/dev/null"), "fifo": os.mkfifo, "directory": Path.mkdir,
        "socket": lambda path: os.mknod(path, 0o140600),
    }[kind]
    with replaced(node.site.audit.with_name(name), lambda path: (make(path), own(node, path))):
        said = refused(node, home)
        assert f"{name} is no regular file" in said if kind == "fifo" else name in said
    assert node.run("map", "/bin/true").rc == 0


def own(node, path):
    if os.geteuid() == 0:
        os.chown(path, *((0, 0) if node.privileged else (node.pilot.uid, node.pilot.gid)), follow_symlinks=False)


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.sequence"])
def test_file_that_others_may_write_is_named_and_nothing_runs(node, home, name):
    assert node.run("map", "/bin/true").rc == 0
    path = node.site.audit.with_name(name)
    before = path.stat()
    path.chmod(0o666)
    try:
        assert f'"{name}" is writable by others' in refused(node, home)
        path.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(path, node.site.accounts["outsider"].uid, -1)
            assert (f'"{name}" belongs to uid' if node.privileged else f"{name}: Permission denied") in refused(node, home)
    finally:
        os.chown(path, before.st_uid, before.st_gid)
        path.chmod(0o640)
    assert node.run("map", "/bin/true").rc == 0
