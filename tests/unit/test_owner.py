"""Acting in the name of another uid: only when the process has really become it."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

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
