"""Dead runs are finished from their leases, by nodewrap-sweep and by the next run (csrc/sweep.c, I9)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.node import alive

DAEMONS = ("/bin/sh", "-c", "for i in 1 2 3; do setsid sleep 60 >/dev/null 2>&1 </dev/null & done; echo ready; trap '' TERM; sleep 60")


def keeper_of(live):
    (child,) = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    return int(child)


def abandon(node, live):
    """Kill front and keeper at once, so that neither does anything more: what is left is the lease's."""
    pids = [live.process.pid, keeper_of(live)] if node.privileged else [live.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    live.process.wait()


def actions(records):
    return [record["event"]["action"] for record in records]


@pytest.mark.parametrize("profile", ["batch", "none"])
@pytest.mark.parametrize("kind", ["static", "pool", "map", "block", "log-only"])
def test_a_run_whose_every_process_was_killed_is_finished_by_the_sweep(node, kind, profile):
    if kind not in node.kinds:
        pytest.skip("needs the setuid launcher")
    before = node.site.audit_size()
    live = node.start(kind, *DAEMONS, profile=profile)
    assert live.process.stdout.readline() == b"ready\n"
    abandon(node, live)
    assert node.site.leases()
    code, reports, err = node.sweep()
    assert (code, [report["state"] for report in reports], err) == (0, ["swept"], "")
    assert node.is_clean(), node.leftovers()
    assert not alive(live.pid)
    records = node.site.records(before)
    assert actions(records)[-2:] == ["exit", "cleanup"]
    #    assert all(record["nodewrap"]["swept"] for record in records[-2:])
    assert records[-1]["nodewrap"]["run"]["id"] == reports[0]["run"]
