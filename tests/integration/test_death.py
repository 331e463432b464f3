"""Death in every order: whoever is killed, by whom, and whatever the payload does about it, nothing is left and the record is complete (I7, I9, I22).
Of the policy child: test_policy_child.py; of every process at every system call: tests/crash.

A setuid run is finished by the keeper alone, without another call; what kills the keeper too, and a launcher without one, leaves it to the sweep.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.need import need
from tests.node import kill, promised, status_of, until
from tests.site import ROOT

#: Sleepers by which a run's processes are known wherever they went: a number of seconds that nobody else sleeps.
MARK = 600000 + os.getpid()
#: A child, three daemons that forked twice, all deaf to every signal that can be ignored, and the first process as well.
DEAF = f"""
trap '' HUP INT QUIT TERM USR1 USR2 TSTP TTIN TTOU XCPU
for i in 1 2 3; do (setsid sleep {MARK} >/dev/null 2>&1 </dev/null &); done
sleep {MARK} &
echo ready
sleep {MARK}
"""
CASES = [
    ("setuid", "static", "batch"), ("setuid", "pool", "none"), ("setuid", "map", "none"), ("setuid", "log-only", "batch"),
    ("setuid", "log-only", "none"), ("userns", "map", "batch"), ("userns", "log-only", "none"),
]


def python(code, *words):
    return ("/usr/bin/python3", "-I", "-c", code, *words)


def marked():
    """pids of processes that carry the mark as a word, without pilot and launcher ("nodewrap run"), who were given it for the payload."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [int(pid)] * (str(MARK).encode() in words[1:] and b"run" not in words)
    return found


@pytest.fixture(autouse=True)
def _nobody_is_left():
    yield
    left = marked()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comm(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


#: The pilot starts its arguments, in a session of their own when the first one says so (as PanDA's does), and exits when its stdin ends. Its own
#: stdin is the payload's only when that is a terminal.
PILOT = """
import os, subprocess, sys
subprocess.Popen(sys.argv[2:], stdin=None if os.isatty(0) else subprocess.DEVNULL, start_new_session=sys.argv[1] == "apart")
try:
    sys.stdin.read()
except OSError:
    pass  # a terminal that is gone
"""


class Run:
    """A payload below a pilot of its own. pilot: Popen; front, keeper (None without one), init, payload: pids."""

    def __init__(self, node, kind, profile, command, options=(), apart="", **more):
        argv = [os.fspath(word) for word in node.argv(kind, command, profile, options)]
        self.node, self.kind, self.profile = node, kind, profile
        self.before = node.site.audit_size()
        pipe = subprocess.PIPE
        self.pilot = node.site.start(python(PILOT, apart, *argv), **{"stdin": pipe, "stdout": pipe, "stderr": pipe, **more})
        self.node.pilots.append(self.pilot)
        told, _, _ = select.select([self.pilot.stdout], [], [], 20)  # the pilot has that pipe too, and outlives a launcher that refuses
        assert told, self.pilot.stderr and os.read(self.pilot.stderr.fileno(), 65536)
        assert self.pilot.stdout.readline() == b"ready\n", self.pilot.communicate(timeout=10)
        (self.front,) = children(self.pilot.pid)
        (below,) = [pid for pid in children(self.front) if not comm(pid).startswith("nw-")]  # a guard of the terminal has the front's name
        self.keeper, self.init = (below, children(below)[0]) if node.privileged else (None, below)
        self.payload = children(self.init)[0]

    def signal(self, who, name):
        """By the pilot's uid, as pilots and batch systems do."""
        ids = {"user": self.node.pilot.uid, "group": self.node.pilot.gid, "extra_groups": []} if ROOT else {}
        subprocess.run(["kill", f"-{name}", "--", str(who)], check=True, **ids)

    def must_be_over(self, by, swept=False):
        """Everything is gone in time, and the run has one end on record. by: what ended it, "" where nobody knows. swept: it takes a sweep."""
        node = self.node
        gone = lambda: not marked() and node.is_clean()  # noqa: E731
        if swept:
            until(lambda: not node.launchers(), "the launcher's processes have ended", promised())
            code, reports, err = node.sweep()
            assert (code, [report["state"] for report in reports], err) == (0, ["swept"], "")
        until(gone, "nothing is left", promised())
        self.recorded(by, swept)
        assert node.run(self.kind, "/bin/true", profile=self.profile).rc == 0, "the account is free"

    def recorded(self, by, swept):
        records = [record for record in self.node.site.records(self.before) if record["event"]["action"] != "handover"]  # of a work directory
        done = [record["event"]["action"] for record in records]
        assert (done.count("start"), done.count("exit"), done.count("cleanup"), done[-2:]) == (1, 1, 1, ["exit", "cleanup"])
        assert records[-1]["nodewrap"]["cleanup"]["processes_left"] == 0
        assert bool(records[-1]["nodewrap"].get("swept")) == swept
        assert by in ("", records[-2].get("process", {}).get("ended_by"))


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    """case(command, **more): a Run of that case."""
    launcher, kind, profile = request.param
    node = request.getfixturevalue(f"{launcher}_node")
    node.pilots = []
    yield lambda command=("/bin/sh", "-c", DEAF), **more: Run(node, kind, profile, command, **more)
    for pilot in node.pilots:
        kill(pilot)
        for stream in (pilot.stdin, pilot.stdout, pilot.stderr):
            if stream:
                stream.close()


# ---- who dies ----


def test_the_launcher_is_told_to_end_stopped_and_killed(case):
    """As HTCondor and Slurm do. The payload does not listen."""
    run = case()
    until(lambda: len(marked()) == 5, "all of it runs")
    for name in ("CONT", "TERM", "INT", "HUP", "STOP"):
        run.signal(run.front, name)
    time.sleep(0.3)
    assert len(marked()) == 5
    run.signal(run.front, "KILL")
    run.must_be_over("front" if run.keeper else "", swept=not run.keeper)


def test_the_pilot_is_killed(case):
    run = case()
    run.signal(run.pilot.pid, "KILL")
    run.must_be_over("pilot")


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "setuid"], indirect=True, ids="-".join)
def test_the_pilot_stops_the_launcher_and_is_killed(case):
    """Nobody would continue the front any more: it neither sees its pilot's death nor may it stay as the pilot's orphan."""
    run = case(apart="apart")
    run.signal(run.front, "STOP")
    time.sleep(0.3)
    run.signal(run.pilot.pid, "KILL")
    run.must_be_over("pilot")


def test_the_pilot_exits_and_leaves_the_launcher(case):
    run = case()
    run.pilot.stdin.close()
    assert run.pilot.wait(10) == 0
    run.must_be_over("pilot")


def test_the_pilots_terminal_is_closed(case):
    """The session's leader and the foreground group, pilot and launcher, get SIGHUP. The payload's own is hung up, and it does not listen."""
    master, slave = pty.openpty()
    os.fchmod(slave, 0o666)
    run = case(stdin=slave, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    os.close(master)
    run.must_be_over("pilot")


def test_the_process_group_is_killed(case):
    run = case()
    run.signal(-run.pilot.pid, "KILL")
    run.must_be_over("", swept=not run.keeper)


def test_everything_of_the_pilots_uid_is_killed(case):
    need("root")
    run = case()
    run.signal(-1, "KILL")
    run.must_be_over("", swept=not run.keeper)


def test_the_whole_cgroup_of_the_job_is_killed(case, job):
    """Everything at once, with the keeper."""
    with job:
        run = case()
    job.kill()
    run.must_be_over("", swept=True)


def test_init_is_killed_from_outside(case):
    run = case()
    os.kill(run.init, signal.SIGKILL)
    run.must_be_over("")


def test_the_payloads_first_process_is_killed_from_outside(case):
    run = case()
    os.kill(run.payload, signal.SIGKILL)
    run.must_be_over("exit")


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "setuid"], indirect=True, ids="-".join)
def test_the_keeper_is_killed_and_the_front_has_it_swept(case):
    run = case()
    os.kill(run.keeper, signal.SIGKILL)
    until(lambda: not marked() and run.node.is_clean(), "nothing is left", promised())
    run.recorded("", swept=True)


# ---- what the payload does about it ----


C = """
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	(void)argc;
	if (strcmp(argv[1], "hop") == 0) { /* twenty that fork and exit for ever: a pid read anywhere is stale */
		signal(SIGCHLD, SIG_IGN);
		for (int i = 0; i < 20; i++)
			if (fork() == 0) {
				if (i & 1) setsid();
				for (;;)
					if (fork() > 0) _exit(0);
			}
	} else if (strcmp(argv[1], "many") == 0) {
		for (int i = 0; i < 5000; i++)
			if (fork() == 0) {
				setsid();
				for (;;) pause();
			}
	} else { /* parents in state D, and stopped, the first one too */
		for (int i = 0; i < 5; i++)
			if (fork() == 0 && vfork() == 0)
				for (;;) pause();
		for (int i = 0; i < 5; i++)
			if (fork() == 0) {
				setsid();
				raise(SIGSTOP);
				for (;;) pause();
			}
		puts("ready");
		fflush(stdout);
		raise(SIGSTOP);
	}
	puts("ready");
	fflush(stdout);
	for (;;) pause();
}
"""


@pytest.fixture(scope="session")
def restless(session):
    """That program, where profile batch shows it to a payload: of an ordinary user's files only in the work directory."""
    need("gcc")
    path = session.top / "restless/program"
    path.parent.mkdir()
    subprocess.run(["gcc", "-O2", "-x", "c", "-o", path, "-"], input=C.encode(), check=True)
    return os.fspath(path)


@pytest.mark.parametrize("how", ["hop", "sleep"])
def test_a_restless_payload_ends_with_its_pilot(case, restless, how):
    run = case((restless, how, str(MARK)), options=() if ROOT else ("--workdir", os.path.dirname(restless)))
    time.sleep(0.1)
    run.signal(run.pilot.pid, "KILL")
    run.must_be_over("pilot")


@pytest.mark.parametrize("case", [("setuid", "pool", "batch"), ("setuid", "static", "none")], indirect=True, ids="-".join)
def test_five_thousand_sessions_end_with_the_launcher(case, restless):
    run = case((restless, "many", str(MARK)))
    assert len(run.node.payload_processes()) == 5001
    run.signal(run.front, "KILL")
    run.must_be_over("front")


@pytest.fixture
def frozen(session):
    """A file system of its own, that everybody may write to. freeze(): whoever writes then sleeps, and not even SIGKILL wakes it (fsfreeze(8))."""
    need("root", "mkfs.ext4", "fsfreeze")
    image, place = session.top / "frozen.img", session.top / "frozen"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    place.chmod(0o777)

    def freeze(on):
        subprocess.run(["fsfreeze", "-f" if on else "-u", place], check=on, stderr=subprocess.DEVNULL)

    yield place, freeze
    freeze(False)
    subprocess.run(["umount", place], check=True)
    image.unlink()
    place.rmdir()


WRITER = "import os, sys, time\nfile = open(sys.argv[2], 'wb', 0)\nos.write(1, b'ready\\n')\nwhile True:\n    file.write(b'x')\n    time.sleep(0.01)"


@pytest.fixture
def work(home, session):
    path = home / "deadly"
    path.mkdir()
    os.chown(path, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.mark.parametrize("case", [("setuid", "static", "none")], indirect=True, ids="-".join)
def test_a_process_that_cannot_die_is_reported_and_nothing_is_handed_on_before_a_sweep(case, frozen, work):
    """The keeper does not wait for ever (cleanup.c, PATIENCE_MS). While somebody may still write as that account, nobody else gets it, and the
    pilot does not get the work directory."""
    place, freeze = frozen
    run = case(python(WRITER, str(MARK), os.fspath(place / "file")), options=["--workdir", os.fspath(work)])
    payload = status_of(run.payload)["Uid"][0]
    freeze(True)
    until(lambda: status_of(run.payload)["State"][0] == "D", "it sleeps for good")
    run.signal(run.front, "KILL")
    until(lambda: not run.node.launchers(), "the keeper gives up", 45)
    records = {record["event"]["action"]: record for record in run.node.site.records(run.before)}
    assert list(records)[-2:] == ["exit", "cleanup"]
    assert records["cleanup"]["nodewrap"]["cleanup"]["processes_left"] == 1
    assert marked() == [run.payload]
    assert str(work.stat().st_uid) == payload
    assert b"NW-POOL-BUSY" in run.node.run(run.kind, "/bin/true", profile=run.profile).err
    freeze(False)
    until(lambda: not marked(), "it dies as soon as it can")
    assert run.node.sweep()[0] == 0
    assert work.stat().st_uid == run.node.pilot.uid
    assert run.node.run(run.kind, "/bin/true", profile=run.profile).rc == 0, "the account is free"
