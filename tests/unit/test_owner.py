"""Acting in the name of another uid: only when the process has really become it."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest

from nodewrap.deep import things
from nodewrap.deep.owner import as_owner
from tests.need import need


def test_who_did_not_become_the_owner_does_nothing_in_its_name(monkeypatch, tmp_path):
    """Filters of containers answer "done" and do nothing ("fake root"): kill(-1) as such an owner would be root's."""
    need("root")
    assert as_owner(61234, 61234, os.geteuid) == 61234
    monkeypatch.setattr(os, "setresuid", lambda *ids: None)
    with pytest.raises(OSError, match="became uid 61234"):
        as_owner(61234, 61234, lambda: (tmp_path / "touched").touch())
    assert not (tmp_path / "touched").exists()


#: Stops and kills all that it may, again and again, until it is killed.
HOSTILE = "import os, signal, time\nend = time.time() + 20\nwhile time.time() < end:\n  for s in signal.SIGSTOP, signal.SIGKILL:\n" \
          "    try: os.kill(-1, s)\n    except ProcessLookupError: pass"


def test_processes_of_the_owner_can_neither_stop_nor_trace_who_acts_in_its_name():
    need("root")
    with subprocess.Popen(["/usr/bin/python3", "-I", "-c", HOSTILE], user=61234, group=61234, extra_groups=[], cwd="/") as hostile:
        try:
            time.sleep(0.2)
            assert as_owner(61234, 61234, lambda: [time.sleep(0.3), os.geteuid()][1], 5) == 61234
            as_owner(61234, 61234, lambda: os.kill(hostile.pid, signal.SIGKILL), 5)
            assert hostile.wait(5) == -signal.SIGKILL
        finally:
            hostile.kill()


def test_processes_of_root_are_not_reached_in_the_owners_name():
    """kill(-1) asks for the sender's real uid too: were that root's, it would reach everybody."""
    need("root")
    assert as_owner(61234, 61234, _may_signal_parent) is False


def _may_signal_parent():
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return False
    return True


def test_ending_one_ids_processes_leaves_who_acts_for_another_alone():
    """A second sweep removes another id's files meanwhile: kill(2) asks for the sender's real uid too, and so must find another one there."""
    need("root")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(as_owner, 61235, 61235, lambda: [time.sleep(1), os.geteuid()][1], 5)
        while not busy.done():
            assert things.end_processes(61234, 61234) == ""
        assert busy.result() == 61235


def test_sweeps_that_end_processes_at_the_same_time_do_not_hinder_each_other():
    """Their killers have one real uid, so that one may end another: it is begun anew then."""
    need("root")
    ends = "import sys\nfrom nodewrap.deep import things\nfor _ in range(100):\n  why = things.end_processes(int(sys.argv[1]), 61234)\n" \
           "  assert why == '', why"
    three = [subprocess.Popen([sys.executable, "-c", ends, uid]) for uid in ("61234", "61235", "61236")]
    assert [process.wait(60) for process in three] == [0, 0, 0]
