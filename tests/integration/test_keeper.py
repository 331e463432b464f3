"""The keeper (csrc/keeper.c): whoever kills the front process, the run is ended, cleaned and recorded without another call (I9, I15)."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.node import alive, promised, status_of, until

WAIT = ("/bin/sleep", "60")
DAEMONS = ("/bin/sh", "-c", "for i in 1 2 3; do setsid sleep 60 >/dev/null 2>&1 </dev/null & done; trap '' TERM; sleep 60")
PROFILES = ("strict", "batch", "none")


def keeper_of(live):
    (child,) = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["static", "pool", "map", "log-only"])
def test_a_killed_front_leaves_nothing_and_the_record_is_complete(setuid_node, kind, profile):
    before = setuid_node.site.audit_size()
    live = setuid_node.start(kind, *DAEMONS, profile=profile)
    live.process.kill()
    live.process.wait()
    until(lambda: not alive(live.pid) and not setuid_node.launchers() and setuid_node.is_clean(), "the keeper has finished", promised())
    records = setuid_node.site.records(before)
    (end,) = [record for record in records if record["event"]["action"] == "exit"]
    assert (end["process"]["ended_by"], end["process"]["exit_code"]) == ("front", 137)
    assert [record["event"]["action"] for record in records][-1] == "cleanup"
    assert records[-1]["nodewrap"]["cleanup"]["processes_left"] == 0


@pytest.mark.parametrize("profile", ["batch", "none"])
def test_a_killed_front_does_not_keep_the_work_directory_from_coming_back(setuid_node, tmp_path_factory, profile):
    work = setuid_node.pilot.home / f"kept-{profile}"
    work.mkdir()
    os.chown(work, setuid_node.pilot.uid, setuid_node.pilot.gid)
    live = setuid_node.start("static", "/bin/sh", "-c", "echo x > out; ln -s /etc/passwd escape; echo ready; sleep 60", profile=profile,
                             options=["--workdir", str(work)])
    assert live.process.stdout.readline() == b"ready\n"
    live.process.kill()
    live.process.wait()
    until(setuid_node.is_clean, "the keeper has finished", promised())
    assert {path.stat().st_uid for path in (work, work / "out")} == {setuid_node.pilot.uid}
    assert sorted(os.listdir(work)) == ["out"]


def test_the_pilot_cannot_signal_the_keeper_and_it_is_no_orphan_of_the_pilots(setuid_node):
    live = setuid_node.start("log-only", *WAIT)
    keeper, pilot = keeper_of(live), setuid_node.pilot
    assert status_of(keeper)["Uid"] == ["0"] * 4
    sent = subprocess.run(["kill", "-9", str(keeper)], user=pilot.uid, group=pilot.gid, extra_groups=[], stderr=subprocess.DEVNULL, check=False)
    assert sent.returncode != 0
    assert alive(keeper)
    assert os.getsid(keeper) != os.getsid(live.process.pid)
    live.process.send_signal(signal.SIGTERM)
    assert live.end()[0] == 128 + signal.SIGTERM


def test_the_keeper_holds_none_of_the_pilots_descriptors(setuid_node):
    """A pilot that waits for the end of a pipe must not wait for us: the status descriptor alone is held, to be written to."""
    reader, writer = os.pipe()
    live = setuid_node.start("static", *WAIT, more_fds=(writer,))
    os.close(writer)
    held = {os.readlink(f"/proc/{keeper_of(live)}/fd/{fd}") for fd in (0, 1, 2)}
    assert held == {"/dev/null"}
    assert os.read(reader, 1) == b"", "nobody but the pilot has the other end any more"
    os.close(reader)
    live.process.kill()
    assert live.process.stdout.read() == b""
    until(setuid_node.is_clean, "the keeper has finished", promised())


def test_a_keeper_killed_by_root_ends_the_payload_and_is_an_internal_error(setuid_node):
    live = setuid_node.start("map", *WAIT)
    os.kill(keeper_of(live), signal.SIGKILL)
    code, _, err = live.end()
    assert code == 202
    assert b"NW-KEEPER" in err
    assert b"a sweep has finished" in err
    assert not alive(live.pid)
    assert setuid_node.is_clean()


def test_a_killed_process_group_is_still_cleaned_and_recorded(setuid_node):
    """Batch systems and PanDA kill the group of the job: the keeper is in none of its."""
    before = setuid_node.site.audit_size()
    live = setuid_node.start("pool", *DAEMONS)
    os.killpg(live.process.pid, signal.SIGKILL)
    live.process.wait()
    until(setuid_node.is_clean, "the keeper has finished", promised())
    assert "cleanup" in [record["event"]["action"] for record in setuid_node.site.records(before)]
