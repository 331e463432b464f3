"""``nodewrap ps`` and ``nodewrap kill`` on live runs: what they show, to whom, and that what was killed is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.node import KINDS, MODES, SUBJECT, abandon, alive, until

WAIT = ("/bin/sleep", "60")
STUBBORN = ("/bin/sh", "-c", "trap '' TERM; echo ready; for i in 1 2 3; do sleep 60 & done; while :; do sleep 60; done")
BUSY = ("/bin/sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo ready; sleep 60")


def call(node, *argv, user=None, timeout=60):
    """nodewrap as its administrator, or that account -> CompletedProcess."""
    ids = {"user": user.uid, "group": user.gid, "extra_groups": user.groups} if user else node.site.owner()
    who = {"env": node.site.environment(user or node.pilot), "cwd": "/", **ids}
    return subprocess.run([node.site.binary, *argv], capture_output=True, text=True, timeout=timeout, check=False, **who)


def ps(node, user=None):
    """What ``ps --json`` prints, by run."""
    done = call(node, "ps", "--json", user=user)
    assert (done.returncode, done.stderr) == (0, ""), done
    return {row["run"]: row for row in map(json.loads, done.stdout.splitlines())}


def run_of(live):
    return live.events[0]["run"]


def keeper_of(live):
    (child,) = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    return int(child)


def swept(node):
    """What a test leaves running is ended; without a keeper its lease takes a sweep."""
    yield node
    node.close()
    assert node.sweep()[0] == 0


@pytest.fixture
def node(node):
    yield from swept(node)


@pytest.fixture
def setuid_node(setuid_node):
    yield from swept(setuid_node)


@pytest.fixture
def userns_node(userns_node):
    yield from swept(userns_node)


CASES = [(launcher, kind) for launcher, kinds in KINDS.items() for kind in kinds if (launcher, kind) != ("userns", "block")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.getfixturevalue(f"{request.param[0]}_node"), request.param[1]


# ---- ps ----


def test_ps_shows_whose_run_it_is_and_what_it_uses(case):
    node, kind = case
    live = node.start(kind, *BUSY)
    assert live.process.stdout.readline() == b"ready\n"
    until(lambda: next(iter(ps(node).values()))["processes"] == 2, "the shell and its sleep; front, keeper and init are ours")
    (row,) = ps(node).values()
    assert (row["run"], row["state"], row["subject"], row["vo"], row["assurance"]) == (run_of(live), "running", SUBJECT, kind, "declared")
    assert (row["pilot"], row["mode"], row["profile"]) == (node.pilot.uid, MODES[kind], "batch")
    assert row["uid"] == os.stat(f"/proc/{live.pid}").st_uid
    assert row["cpu"] > 0.05
    assert row["memory_kind"] == "rss"
    assert 1 << 20 < row["memory"] < 64 << 20
    assert 0 < row["age"] < 60


def test_ps_table_has_a_line_for_each_run_and_hides_no_terminal_escape(setuid_node):
    first, second = setuid_node.start("pool", *WAIT), setuid_node.start("map", *WAIT)
    lines = call(setuid_node, "ps").stdout.splitlines()
    assert lines[0].split()[:3] == ["RUN", "STATE", "SUBJECT"]
    assert [line.split()[0] for line in lines[1:]] == [run_of(first), run_of(second)]
    assert f"{SUBJECT}?" in lines[1]
    assert "switch/batch" in lines[1]


def test_a_subject_with_control_characters_reaches_no_terminal(node):
    live = node.start("map", *WAIT)
    abandon(node, live)
    path = node.site.state / "leases" / f"{run_of(live)}.lease"
    path.write_text(path.read_text().replace("fact subject.dn ", "fact subject.dn %1B%5B31m%0Aroot%20%E2%80%AErunning"))
    done = call(node, "ps")
    assert "\\x1b[31m\\nroot \\u202erunning" in done.stdout
    assert len(done.stdout.splitlines()) == 2


def test_nothing_runs_and_ps_prints_nothing(node):
    done = call(node, "ps")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_caller_sees_its_own_runs_without_what_the_lease_says(setuid_node):
    live = setuid_node.start("pool", *WAIT)
    (row,) = ps(setuid_node, setuid_node.pilot).values()
    assert row["run"] == run_of(live)[-12:]
    assert (row["state"], row["pilot"], row["subject"], row["processes"], row["memory_kind"]) == ("running", setuid_node.pilot.uid, None, 1, "rss")
    assert ps(setuid_node, setuid_node.site.accounts["outsider"]) == {}


def test_a_payload_cannot_pass_for_a_front_process(setuid_node):
    """Any process may call itself so; none of the payload's has root's id behind the caller's."""
    name = "nw-0123456789ab"
    code = f"open('/proc/self/comm', 'w').write({name!r}); print('ready', flush=True); import time; time.sleep(60)"
    live = setuid_node.start("log-only", "/usr/bin/python3", "-I", "-c", code, profile="none")
    assert live.process.stdout.readline() == b"ready\n"
    assert Path(f"/proc/{live.pid}/comm").read_text().strip() == name
    assert list(ps(setuid_node, setuid_node.pilot)) == [run_of(live)[-12:]]


def test_ps_tells_stopped_runs_and_those_that_wait_for_a_sweep(node):
    kind = "map"
    live = node.start(kind, *WAIT)
    os.kill(live.pid, signal.SIGSTOP)
    until(lambda: ps(node)[run_of(live)]["state"] == "stopped", "it is seen stopped", 5)
    os.kill(live.pid, signal.SIGCONT)
    assert ps(node)[run_of(live)]["state"] == "running"
    abandon(node, live)
    row = ps(node)[run_of(live)]
    assert (row["state"], row["processes"]) == ("dead", 0)
    assert call(node, "sweep", "--quiet").returncode == 0
    assert ps(node) == {}


def test_ps_takes_no_lock_that_a_starting_run_or_a_sweep_would_miss(setuid_node):
    """ps runs in a loop beside starts: none of them is refused."""
    loop = "while :; do {} ps --json >/dev/null; done"
    looping = subprocess.Popen(["/bin/sh", "-c", loop.format(setuid_node.site.binary)], start_new_session=True, cwd="/")
    try:
        for _ in range(10):
            assert setuid_node.run("pool", "/bin/true").rc == 0
    finally:
        os.killpg(looping.pid, signal.SIGKILL)
        looping.wait()


# ---- kill ----


def test_kill_by_id_ends_the_run_with_a_record_and_leaves_nothing(case):
    node, kind = case
    before = node.site.audit_size()
    live = node.start(kind, *WAIT)
    done = call(node, "kill", run_of(live))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run_of(live)} ended\n", "")
    assert live.end()[0] == 128 + signal.SIGTERM
    assert node.is_clean()
    assert [record["event"]["action"] for record in node.site.records(before)][-2:] == ["exit", "cleanup"]


def test_kill_ends_what_ignores_term_after_the_grace_and_it_is_gone_when_kill_returns(case):
    node, kind = case
    before = node.site.audit_size()
    live = node.start(kind, *STUBBORN)
    assert live.process.stdout.readline() == b"ready\n"
    began = time.monotonic()
    done = call(node, "kill", "--grace", "500ms", run_of(live)[-12:])
    assert (done.returncode, done.stderr) == (0, "")
    assert 0.5 < time.monotonic() - began < 20
    assert not alive(live.pid)
    assert node.is_clean()
    assert [record["event"]["action"] for record in node.site.records(before)][-1] == "cleanup"
    live.process.wait()


def test_the_caller_kills_its_own_runs_and_nobody_elses(setuid_node):
    live = setuid_node.start("pool", *STUBBORN)
    assert live.process.stdout.readline() == b"ready\n"
    other = call(setuid_node, "kill", run_of(live), user=setuid_node.site.accounts["outsider"])
    assert other.returncode == 201
    assert "NW-RUN" in other.stderr
    assert alive(live.pid)
    done = call(setuid_node, "kill", "--grace", "0", run_of(live), user=setuid_node.pilot)
    assert (done.returncode, done.stdout) == (0, f"{run_of(live)[-12:]} killed\n")
    assert not alive(live.pid)
    assert setuid_node.is_clean()


def test_kill_ends_a_stopped_run(node):
    live = node.start("map", *WAIT)
    live.process.send_signal(signal.SIGSTOP)
    until(lambda: ps(node)[run_of(live)]["state"] == "stopped", "it is seen stopped", 5)
    done = call(node, "kill", "--grace", "5", run_of(live))
    assert (done.returncode, done.stdout) == (0, f"{run_of(live)} ended\n")
    assert node.is_clean()


def test_kill_by_vo_and_subject_chooses_by_the_lease(setuid_node):
    lives = {kind: setuid_node.start(kind, *WAIT) for kind in ("pool", "map", "log-only")}
    done = call(setuid_node, "kill", "--vo", "map")
    assert (done.returncode, done.stdout) == (0, f"{run_of(lives['map'])} ended\n")
    assert alive(lives["pool"].pid)
    done = call(setuid_node, "kill", "--vo", "nobody")
    assert (done.returncode, done.stdout) == (201, "")
    done = call(setuid_node, "kill", "--subject", SUBJECT)
    assert sorted(done.stdout.split()[::2]) == sorted(run_of(lives[kind]) for kind in ("pool", "log-only"))
    assert setuid_node.is_clean()


def test_a_caller_that_does_not_know_subjects_is_told_so(setuid_node):
    live = setuid_node.start("pool", *WAIT)
    done = call(setuid_node, "kill", "--subject", SUBJECT, user=setuid_node.pilot)
    assert done.returncode == 201
    assert "as root" in done.stderr
    assert alive(live.pid)


def test_kill_all_ends_all_and_sweeps_the_dead(node):
    dead, live = node.start("map", *WAIT), node.start("map", *WAIT)
    abandon(node, dead)
    done = call(node, "kill", "--all")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.splitlines()) == {f"{run_of(dead)} swept", f"{run_of(live)} ended"}
    assert node.is_clean()


@pytest.mark.parametrize("words", [["0000000"], ["ffffffff"], [], ["--all", "--vo", "x"], ["../../etc"], ["--grace", "-1", "--all"]])
def test_a_word_that_names_no_run_is_the_callers_mistake(setuid_node, words):
    done = call(setuid_node, "kill", *words)
    assert (done.returncode, done.stdout) == (201, "")
    assert "NW-" in done.stderr


def test_a_beginning_that_fits_two_runs_kills_neither(setuid_node):
    lives = [setuid_node.start("map", *WAIT) for _ in range(3)]
    # The time's upper bits: they change once in 66 seconds, so of three runs two begin alike.
    [(beginning, many)] = Counter(run_of(live)[:8] for live in lives).most_common(1)
    assert many >= 2
    done = call(setuid_node, "kill", beginning)
    assert done.returncode == 201
    assert f"{many} runs" in done.stderr
    assert all(alive(live.pid) for live in lives)


# ---- pids that are somebody else's by now ----


def forged(node, live, **changes):
    """Rewrite the lease of a run whose front and keeper are dead; the words of a line by its key."""
    path = node.site.state / "leases" / f"{run_of(live)}.lease"
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    lines = [[line[0], *changes.get(line[0], line[1:])] for line in lines]
    path.write_text("".join(" ".join(line) + "\n" for line in lines))


def ticks(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_reused_pid_is_neither_shown_nor_signalled(node):
    """As after pid reuse: the pid of the lease is another process, with a start time of its own."""
    live = node.start("map", *WAIT)
    abandon(node, live)
    victim = subprocess.Popen(["/bin/sleep", "60"], **node.site.owner())
    try:
        words = (node.site.state / "leases" / f"{run_of(live)}.lease").read_text().split()
        launcher = words[words.index("launcher") + 1]
        forged(node, live, launcher=[launcher, str(victim.pid), str(int(ticks(victim.pid)) - 1)], keeper=[str(victim.pid), "1"])
        row = ps(node)[run_of(live)]
        assert (row["state"], row["processes"], row["memory"]) == ("dead", 0, 0)
        done = call(node, "kill", "--grace", "0", run_of(live))
        assert (done.returncode, done.stdout) == (0, f"{run_of(live)} swept\n")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_pids_of_an_earlier_boot_are_nobodys(node):
    live = node.start("map", *WAIT)
    abandon(node, live)
    victim = subprocess.Popen(["/bin/sleep", "60"], **node.site.owner())
    try:
        words = (node.site.state / "leases" / f"{run_of(live)}.lease").read_text().split()
        launcher = words[words.index("launcher") + 1]
        forged(node, live, boot=["00000000-0000-0000-0000-000000000000"], launcher=[launcher, str(victim.pid), ticks(victim.pid)])
        row = ps(node)[run_of(live)]
        assert (row["state"], row["memory"], row["note"]) == ("dead", 0, "of an earlier boot")
        assert call(node, "kill", "--grace", "0", run_of(live)).returncode == 0
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


# ---- a site that cannot be looked at ----


def test_somebody_elses_site_is_refused_with_the_next_step(userns_node):
    if os.geteuid() == 0:
        done = subprocess.run([userns_node.site.binary, "ps"], capture_output=True, text=True, check=False)
        assert done.returncode == 202
        assert "NW-GUARD" in done.stderr
        assert "as the account" in done.stderr
    else:
        assert call(userns_node, "ps").returncode == 0


def test_a_guard_that_is_not_understood_is_an_error_of_the_sites(setuid_node):
    setuid_node.site.write(setuid_node.site.sysconf / "guard", "nodewrap-guard 9\n")
    said = [call(setuid_node, *words) for words in (["ps"], ["kill", "--all"], ["sweep"], ["sweep", "--deep"])]
    setuid_node.site.reset()
    assert [done.returncode for done in said] == [202] * 4
    assert all(done.stderr.startswith("nodewrap: NW-GUARD") for done in said)
