"""Leases in a directory (nodewrap/lease.py): which are alive, which cannot be relied on, and that looking disturbs nobody. Runs as any user."""

from __future__ import annotations

import fcntl
import os
import uuid

import pytest

from nodewrap import lease, live
from nodewrap.commands import kill

RUN = "0198f3c2-5b6a-7000-8000-0123456789ab"


def told(**more):
    values = {"run": RUN, "boot": str(uuid.UUID(int=0)), "time": 1, "launcher": lease.Launcher("userns", 4711, 1),
              "pilot": lease.Pilot(1000, 1000, 9), "mode": lease.Mode("map", "batch"), "id": lease.Ids(1, 1), "inside": lease.Ids(1, 1),
              "block": lease.Block(1, 1)}
    return lease.Lease(**{**values, **more})


@pytest.fixture
def put(tmp_path):
    """put(data, run, mode): a lease file with that content -> its path."""

    def write(data=None, run=RUN, mode=0o600):
        path = tmp_path / f"{run}.lease"
        path.write_bytes(lease.render(told(run=run)) if data is None else data)
        path.chmod(mode)
        return path

    return write


def found(path):
    (one,) = lease.leases(str(path.parent), os.getuid())
    return one


def test_a_lease_is_alive_exactly_while_somebody_holds_its_lock(put):
    path = put()
    assert not found(path).alive
    with open(path, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert found(path).alive
        assert found(path).lease == told()
    assert not found(path).alive


def test_looking_does_not_hide_a_lease_from_another_look_nor_keep_its_lock(put):
    path = put()
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as another ps has it for a moment
        assert not found(path).alive
    with open(path, "rb+") as sweeper:
        fcntl.flock(sweeper, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_lock_of_an_empty_lease_is_never_touched(put, monkeypatch):
    """Its launcher is between making and locking it."""
    path = put(b"")
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("it was locked"))
    assert (found(path).lease, found(path).error) == (None, "")


@pytest.mark.parametrize(("data", "says"), [
    (b"x\n", "not a lease"), (b"nodewrap-lease 3\nwhatever\n", "another version"), (b"nodewrap-lease 2\n", "not complete"), (b"\0\n", "not a line"),
    (b"#\n" * 140_000, "longer than"), (None, "says that it is run"),
])
def test_what_is_no_lease_has_a_reason(put, data, says):
    path = put(lease.render(told(run=RUN.replace("0", "1"))) if data is None else data)
    assert found(path).lease is None
    assert says in found(path).error


def test_a_line_that_was_being_appended_counts_as_not_written(put):
    path = put(lease.render(told()) + b"starting\nkeeper 12")
    assert found(path).lease == told(starting=True)


def test_a_lease_that_is_being_written_is_not_broken(put):
    path = put(lease.render(told())[:40])
    with open(path, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert found(path).writing
    assert not found(path).writing


def test_a_file_that_others_can_write_or_that_is_no_file_is_not_believed(put, tmp_path):
    assert "0666" in found(put(mode=0o666)).error
    (tmp_path / f"{RUN}.lease").unlink()
    (tmp_path / f"{RUN}.lease").symlink_to("/etc/passwd")
    assert "cannot be opened" in found(tmp_path / f"{RUN}.lease").error
    (tmp_path / f"{RUN}.lease").unlink()
    os.mkfifo(tmp_path / f"{RUN}.lease", 0o600)
    assert "no regular file" in found(tmp_path / f"{RUN}.lease").error


def test_somebody_elses_file_is_not_believed(put):
    (one,) = lease.leases(str(put().parent), os.getuid() + 1)
    assert one.lease is None
    assert f"belongs to uid {os.getuid()}" in one.error


def test_other_names_are_not_looked_at(put, tmp_path):
    (tmp_path / "README").write_text("x")
    assert [one.run for one in lease.leases(str(put().parent), os.getuid())] == [RUN]


@pytest.mark.parametrize(("word", "fits"), [
    (RUN, True), (RUN[:8], True), (RUN[:7], False), (RUN.replace("-", "")[:13], True), (RUN[-12:], True), (RUN[-12:-4], True), (RUN[-11:], False),
    ("f" * 8, False), ("", False), (RUN + "0", False),
])
def test_a_word_names_a_run_by_its_beginning_or_its_last_group(word, fits):
    assert live.Run(RUN, "running").named(word) == fits


@pytest.mark.parametrize(("word", "fits"), [(RUN, True), (RUN[-12:], True), (RUN[-12:-4], True), (RUN[:8], False), (RUN[:-12] + "f" * 12, False)])
def test_a_run_of_which_only_the_last_group_is_known_is_named_by_that_or_the_whole_id(word, fits):
    assert live.Run(RUN[-12:], "running").named(word) == fits


def test_a_pid_of_another_start_is_no_process_of_the_runs():
    table, ticks = live.Table(), live.ticks(os.getpid())
    assert ticks
    assert table.find(lease.Process(os.getpid(), ticks)).pid == os.getpid()
    assert table.find(lease.Process(os.getpid(), ticks - 1)) is None
    assert table.find(lease.Process(0, 0)) is None
    assert table.find(None) is None


def test_a_pidfd_is_of_the_process_that_was_meant_or_of_none():
    ticks = live.ticks(os.getpid())
    assert kill.pidfd(lease.Process(os.getpid(), ticks + 1)) == -1
    assert kill.pidfd(lease.Process(0, 0)) == -1
    assert kill.pidfd(lease.Process(-1, 0)) == -1
    fd = kill.pidfd(lease.Process(os.getpid(), ticks))
    assert fd >= 0
    os.close(fd)
