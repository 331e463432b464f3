"""What a dead run, its pilot or its payload tried against the sweep that finishes it, and got, once. Each was seen to work before it was closed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nodewrap import lease
from tests.escape.conftest import inside
from tests.escape.test_launcher_attacks import owned
from tests.integration.test_hostile_child import hostile, permit  # noqa: F401 (a fixture)
from tests.integration.test_sweep import is_clean
from tests.need import need
from tests.node import abandon, alive, kill, status_of, until

LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def hanging(where, account):
    """A FUSE file system of that account's on where, open to others (user_allow_other), that takes every request and answers none."""
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id={account.uid},group_id={account.gid},allow_other"
    assert LIBC.mount(b"hang", os.fsencode(where), b"fuse", 0, options.encode()) == 0, os.strerror(ctypes.get_errno())
    try:
        request = os.read(fuse, 1 << 17)  # FUSE_INIT, answered in the shape of protocol 7.23 (include/uapi/linux/fuse.h)
        unique = struct.unpack_from("<IIQ", request)[2]
        os.write(fuse, struct.pack("<IiQ", 80, 0, unique) + struct.pack("<IIIIHHIIHHI28x", 7, 23, 4096, 0, 4, 4, 4096, 1, 0, 0, 0))
        threading.Thread(target=swallow, args=(fuse,), daemon=True).start()
        yield fuse
    finally:
        LIBC.umount2(os.fsencode(where), 3)  # MNT_FORCE | MNT_DETACH: what waits gets an error
        os.close(fuse)


def swallow(fuse):
    with contextlib.suppress(OSError):
        while os.read(fuse, 1 << 17):
            pass


def start(node, kind, profile, *options, script="echo ready; exec sleep 600"):
    live = node.start(kind, "/bin/sh", "-c", script, profile=profile, options=options)
    assert live.process.stdout.readline() == b"ready\n"
    return live


def end_launchers(node):
    """All at once, so that none does anything more."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in node.launchers():
            with contextlib.suppress(ProcessLookupError):  # who writes a record is soon gone
                os.kill(pid, number)
    until(lambda: not node.launchers(), "they are dead, and hold no lock")


def walkers(node):
    """pids of walks through work directories: the launcher's processes that are root but use files as the pilot."""
    found = []
    for pid in node.launchers():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others live a millisecond
            found += [pid] * (status_of(pid)["Uid"] == ["0", "0", "0", str(node.pilot.uid)])
    return found


# ---- a pilot's directory against the other runs of the node ----


def test_work_directory_that_hangs_keeps_no_other_run_waiting(setuid_node, home):
    """A process that waits for FUSE's answer (or a lost NFS server) does not die of SIGKILL: the next run of anybody waited for it for ever."""
    top = owned(home / "m", setuid_node.pilot)
    work = owned(top / "w", setuid_node.pilot)
    abandon(setuid_node, start(setuid_node, "log-only", "none", "--workdir", str(work)))
    shutil.rmtree(work)
    try:
        with hanging(top, setuid_node.pilot):
            for _ in range(2):
                run = setuid_node.site.start(setuid_node.argv("log-only", ["/bin/true"]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                assert run.wait(8) == 0
        until(lambda: setuid_node.sweep()[0] == 0 and not setuid_node.site.leases(), "then it is finished")
    finally:
        shutil.rmtree(top)


def test_stopped_walk_of_a_dead_run_keeps_nothing_of_the_run_that_swept(setuid_node, home):
    """Its pilot had the right to stop the walk. Stopped, it outlived its sweeper, with the lease's lock and the other pilot's --status-fd."""
    work = owned(home / "w", setuid_node.pilot)
    abandon(setuid_node, start(setuid_node, "log-only", "none", "--workdir", str(work)))
    for i in range(60000):
        (work / str(i)).symlink_to("x")
    reader, writer = os.pipe()
    stopped = []
    try:
        argv = setuid_node.argv("log-only", ["/bin/true"], "none", ["--status-fd", str(writer)])
        run = setuid_node.site.start(argv, fds=(writer,))
        os.close(writer)
        stopped = until(lambda: walkers(setuid_node), "a walk")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        os.set_blocking(reader, True)
        ended = threading.Event()
        threading.Thread(target=lambda: (drain(reader), ended.set()), daemon=True).start()
        assert run.wait(20) == 0
        assert ended.wait(5), "somebody has --status-fd still"
        assert not any(map(alive, stopped))
        assert setuid_node.sweep()[0] == 0
    finally:
        for pid in filter(alive, stopped):
            os.kill(pid, signal.SIGKILL)
        until(lambda: setuid_node.sweep()[0] == 0, "swept")
        shutil.rmtree(work)


def drain(fd):
    while os.read(fd, 4096):
        pass


def test_directory_of_a_dead_run_is_given_back_before_its_pilot_asks_for_it_again(setuid_node, home):
    """The check of its owner came before the sweep: the pilot who always uses one directory was refused until somebody else swept."""
    work = owned(home / "w", setuid_node.pilot)
    try:
        abandon(setuid_node, start(setuid_node, "static", "none", "--workdir", str(work)))
        ran = setuid_node.run("static", "/bin/true", profile="none", options=["--workdir", str(work)])
        assert ran.rc == 0, ran
    finally:
        setuid_node.sweep()
        shutil.rmtree(work)


# ---- a pilot that wants its dead run never to be finished ----

#: Becomes the parent of all orphans below it and never waits for one.
ADOPT = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
subprocess.Popen(sys.argv[1:])
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["log-only", "static"])
def test_zombies_that_the_pilot_does_not_reap_are_dead(setuid_node, kind):
    """They count as processes of their id and session until they are reaped: the account was lost, and each next run 2 s later."""
    script = "for i in 1 2 3; do setsid sleep 600 >/dev/null 2>&1 </dev/null & done; sleep 600"
    argv = setuid_node.argv(kind, ["/bin/sh", "-c", script], "none")
    before = setuid_node.site.audit_size()
    pilot = setuid_node.site.start(["/usr/bin/python3", "-I", "-c", ADOPT, *argv])
    try:
        until(lambda: "start" in setuid_node.actions(before), "it runs")
        time.sleep(0.5)
        end_launchers(setuid_node)
        began = time.monotonic()
        code, reports, _ = setuid_node.sweep()
        assert (code, [report["state"] for report in reports]) == (0, ["swept"])
        assert time.monotonic() - began < 5
    finally:
        pilot.kill()
        pilot.wait()
        setuid_node.sweep()


@pytest.mark.parametrize("names", [("..x",), ("%" * 250, "%" * 250)], ids=["dots", "long"])
def test_cgroup_that_a_lease_cannot_name_is_not_used(setuid_node, delegated_cgroup, names):
    """The lease said what check() of the sweep refuses: an account was lost until an administrator forgot the run."""
    place = delegated_cgroup(*names)
    before = setuid_node.site.audit_size()
    run = inside(setuid_node, place, setuid_node.argv("static", ["/bin/sleep", "600"], "batch"))
    until(lambda: {"start", "error"} & set(setuid_node.actions(before)), "it runs, or is refused")
    end_launchers(setuid_node)
    run.wait()
    code, reports, _ = setuid_node.sweep()
    assert (code, [report["state"] for report in reports]) == (0, ["swept"]), reports


def test_no_lease_is_locked_inside_the_pilots_cgroup(setuid_node, tmp_path):
    """Who looked for dead leases took their locks, and that of a run that began: frozen then by its pilot, it kept all waiting."""
    need("strace", "cgroup2")
    abandon(setuid_node, start(setuid_node, "log-only", "none"))
    (dead,) = setuid_node.site.leases()
    trace = tmp_path / "trace"
    words = ["strace", "-f", "-y", "-u", setuid_node.pilot.name, "-e", "trace=flock,write", "-o", trace, *setuid_node.argv("log-only", ["/bin/true"])]
    assert subprocess.run(list(map(os.fspath, words)), env=setuid_node.site.environment(setuid_node.pilot), cwd="/", timeout=60).returncode == 0
    lines = trace.read_text().splitlines()
    moved = next(n for n, line in enumerate(lines) if "/cgroup.procs>" in line)
    locked = [n for n, line in enumerate(lines) if "flock(" in line and dead in line]
    assert moved < locked[0], "the sweep is out of it first"
    assert not setuid_node.site.leases(), "and has finished the dead run"


def test_full_status_pipe_does_not_keep_the_lease_of_a_killed_launcher_alive(userns_node):
    """The line is written by a child, which had the lease's lock and waited for ever."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    before = userns_node.site.audit_size()
    argv = userns_node.argv("log-only", ["/bin/sleep", "600"], "none", ["--status-fd", str(writer)])
    run = userns_node.site.start(argv, fds=(writer,))
    try:
        until(lambda: "start" in userns_node.actions(before), "it runs")
        time.sleep(0.3)
        run.kill()
        run.wait()
        until(lambda: not userns_node.launchers(), "they are dead, and hold no lock")
        code, reports, _ = userns_node.sweep()
        assert (code, [report["state"] for report in reports]) == (0, ["swept"])
    finally:
        os.close(reader)
        os.close(writer)


# ---- a payload that waits for itself ----

#: Mounts FUSE in namespaces of its own, has a thread look up a name there, reads the question and never answers: KILL does not end that thread, which
#: keeps the server's descriptor open. What it says first is how that began; the argument is how long the rest lives.
WAITS_FOR_ITSELF = r"""
import ctypes, os, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()
libc.unshare(0x10000000 | 0x20000)
for name, text in ("setgroups", "deny"), ("uid_map", "0 %d 1" % uid), ("gid_map", "0 %d 1" % gid):
    open("/proc/self/" + name, "w").write(text)
place = "/tmp/m%d" % os.getpid()  # profile none: the node's /tmp
os.mkdir(place)
fuse = os.open("/dev/fuse", os.O_RDWR)
if libc.mount(b"x", place.encode(), b"fuse", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse):
    sys.exit(os.strerror(ctypes.get_errno()))
unique = struct.unpack_from("<IIQ", os.read(fuse, 1 << 17))[2]
os.write(fuse, struct.pack("<IiQ", 80, 0, unique) + struct.pack("<IIIIHHIIHHI28x", 7, 23, 4096, 0, 4, 4, 4096, 1, 0, 0, 0))
threading.Thread(target=os.stat, args=(place + "/x",), daemon=True).start()
os.read(fuse, 1 << 17)
print("stuck", flush=True)
time.sleep(float(sys.argv[1]))
os._exit(0)
"""


def stuck(node, kind, profile="batch", *options, seconds=600):
    need("root", "fuse")
    live = node.start(kind, "/usr/bin/python3", "-I", "-c", WAITS_FOR_ITSELF, str(seconds), profile=profile, options=options)
    said = live.process.stdout.readline()
    assert said == b"stuck\n", (said, live.process.communicate(timeout=10))
    return live


@pytest.mark.parametrize("profile", ["batch", "none"])
@pytest.mark.parametrize("kind", ["pool", "map", "block"])
def test_payload_that_waits_for_its_own_fuse_server_ends_with_its_time(setuid_node, kind, profile, home):
    """Nothing ended it: account, ids and lease were gone until an administrator cut the connection, and each later run of anybody waited 2 s."""
    before = setuid_node.site.audit_size()
    others = owned(home / "m", setuid_node.pilot)
    try:
        with hanging(others, setuid_node.pilot) as fuse:
            began = time.monotonic()
            live = stuck(setuid_node, kind, profile, "--wall", "3")
            assert live.end(timeout=45)[0] == 128 + signal.SIGKILL
            assert time.monotonic() - began < 15
            poll = select.poll()
            poll.register(fuse, select.POLLOUT)
            assert poll.poll(0) == [(fuse, select.POLLOUT)], "another's connection is left alone"
    finally:
        shutil.rmtree(others)
    cleanup = setuid_node.site.records(before)[-1]
    assert (cleanup["event"]["action"], cleanup["nodewrap"]["cleanup"]["processes_left"]) == ("cleanup", 0)
    assert is_clean(setuid_node)


@contextlib.contextmanager
def unreaped():
    """Orphans below us become our children (PR_SET_CHILD_SUBREAPER), reaped in the end and not before: as by an init that takes its time."""
    before = set(children())
    assert LIBC.prctl(36, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        LIBC.prctl(36, 0, 0, 0, 0)
        for pid in set(children()) - before:
            if not alive(pid):
                os.waitpid(pid, 0)


def children():
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.parametrize("profile", ["batch", "none"])
@pytest.mark.parametrize("kind", ["pool", "map"])
def test_dead_run_that_waits_for_its_own_fuse_server_is_swept(setuid_node, kind, profile):
    """With front and keeper dead, it is for the sweep before anybody's next run, within its two seconds, whoever reaps it and when."""
    with unreaped():
        abandon(setuid_node, stuck(setuid_node, kind, profile, seconds=0.5))
        before = setuid_node.site.audit_size()
        assert setuid_node.run("log-only", "/bin/true").rc == 0
        assert swept(setuid_node, before) == ["exit", "cleanup"]
    assert is_clean(setuid_node)


def swept(node, before):
    return [record["event"]["action"] for record in node.site.records(before) if record["nodewrap"].get("swept")]


#: Every connection of that uid is cut: what an administrator does by hand.
CUT = """
cd /sys/fs/fuse/connections && { mountpoint -q . || mount -t fusectl x "$PWD"; } && cd "$PWD"
for c in *; do [ "$(stat -c %u "$c")" != "$1" ] || echo 1 >"$c/abort"; done
"""


def cut(uid):
    subprocess.run(["unshare", "-m", "/bin/sh", "-ec", CUT, "sh", str(uid)], check=True, timeout=20)


def test_dead_run_that_cannot_be_ended_is_recorded_when_it_has_ended(setuid_node):
    """Each sweep that failed added one more exit and cleanup. The pilot's own id: its connections may be others', and are not cut."""
    abandon(setuid_node, stuck(setuid_node, "log-only", seconds=0.5))
    before = setuid_node.site.audit_size()
    try:
        code, reports, _ = setuid_node.sweep()
        assert (code, [report["state"] for report in reports], setuid_node.actions(before)) == (1, ["left"], [])
    finally:
        cut(setuid_node.pilot.uid)
    until(lambda: setuid_node.sweep()[0] == 0, "swept")
    assert swept(setuid_node, before) == ["exit", "cleanup"]


def test_payload_that_waits_for_its_own_fuse_server_under_the_userns_launcher(userns_node, delegated):
    """Without privilege by the list of connections that the node has mounted, as the root of the payload's user namespace."""
    need("root", "fuse")
    node, pilot = userns_node, userns_node.pilot
    mounted = 'mountpoint -q "$0" || mount -t fusectl fusectl "$0"; u=$1 g=$2 && shift 2 && exec setpriv --reuid=$u --regid=$g --clear-groups "$@"'
    argv = node.argv("block", ["/usr/bin/python3", "-I", "-c", WAITS_FOR_ITSELF, "600"], options=["--wall", "1"])
    before, began = node.site.audit_size(), time.monotonic()
    words = ["unshare", "-m", "/bin/sh", "-ec", mounted, "/sys/fs/fuse/connections", pilot.uid, pilot.gid, *argv]
    run = subprocess.Popen(list(map(os.fspath, map(str, words))), env=node.site.environment(pilot), cwd="/", stdout=subprocess.PIPE)
    try:
        assert run.communicate(timeout=45)[0] == b"stuck\n"
        assert time.monotonic() - began < 10
    finally:
        kill(run)
    cleanup = node.site.records(before)[-1]
    assert (cleanup["event"]["action"], cleanup["nodewrap"]["cleanup"]["processes_left"]) == ("cleanup", 0)


# ---- a payload that is faster than who ends it ----

#: In a session of its own, and once its run is dead: forks and exits for ever, so that a pid read anywhere is stale; or, with an argument, sends that
#: signal to all that it may, for ever.
FAST = """
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	if (fork())
		for (;;) pause();
	pid_t parent = getppid();
	setsid();
	signal(SIGCHLD, SIG_IGN);
	puts("ready");
	fflush(stdout);
	while (getppid() == parent) usleep(1000);
	for (;;)
		if (argc > 1) kill(-1, atoi(argv[1]));
		else if (fork() > 0) _exit(0);
}
"""


@pytest.fixture(scope="session")
def fast(session):
    need("gcc", "strace")
    path = session.top / "fast"
    subprocess.run(["gcc", "-O2", "-x", "c", "-o", path, "-"], input=FAST.encode(), check=True)
    return path


def dead(node, kind, *argv):
    """A run of that program in profile none, whose launchers are dead, on a node without cgroup v2 and login ids: only its ids lead to it."""
    node.open_guard(cgroup=None)
    live = node.start(kind, *argv, profile="none")
    assert live.process.stdout.readline() == b"ready\n"
    abandon(node, live)
    forget_session(node)


def forget_session(node):
    (name,) = node.site.leases()
    path = node.site.state / "leases" / name
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if not line.startswith(b"session ")))


def traced_sweep(node, *options):
    command = ["strace", "-f", "-o", "/dev/null", *options, node.site.prefix / "libexec/nodewrap/nodewrap-sweep"]
    ran = subprocess.run(command, capture_output=True, check=False, timeout=60)
    return ran.returncode, json.loads(ran.stdout)["state"]


def test_nothing_is_swept_while_every_sweepers_kill_is_forestalled(setuid_node, fast):
    """A sweeper dead before its kill(-1) has proved nothing, and a look at /proc misses who hops."""
    node = setuid_node
    dead(node, "static", fast)
    before = node.site.audit_size()
    assert traced_sweep(node, "-e", "trace=kill", "-e", "inject=kill:signal=KILL:when=1") == (1, "left")
    assert node.actions(before) == []
    assert hops(node), "it is at work still"
    code, reports, _ = node.sweep()
    assert (code, [report["state"] for report in reports]) == (0, ["swept"])
    assert not hops(node)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_payload_ends_no_sweeper_before_it_is_ended(setuid_node, fast, number):
    """Who has an id may signal who comes to end it, had it nothing but that id. This one takes its time."""
    dead(setuid_node, "static", fast, str(int(number)))
    assert traced_sweep(setuid_node, "-e", "trace=capset", "-e", "inject=capset:delay_exit=20000") == (0, "swept")
    assert is_clean(setuid_node)


@pytest.mark.parametrize("kind", ["static", "map", "block"])
def test_dead_run_is_swept_when_nobody_of_its_ids_lives_whoever_they_are_counted_for(setuid_node, kind):
    """Mode map's processes are counted for root, who made their user namespace: the kernel's count of their id said none. They wait for FUSE."""
    setuid_node.open_guard(cgroup=None)
    with unreaped():
        live = stuck(setuid_node, kind, "none")
        uid = status_of(live.pid)["Uid"][0]
        abandon(setuid_node, live)
        forget_session(setuid_node)
        try:
            code, reports, _ = setuid_node.sweep()
            assert (code, [report["state"] for report in reports]) == (0, ["swept"])
            assert not setuid_node.payload_processes()
        finally:
            cut(uid)


def test_sweep_waits_for_its_children_where_its_caller_ignores_their_end(setuid_node):
    """SIGCHLD ignored is handed on by exec, and leaves nobody to be waited for (wait(2)): each sweep said "left"."""
    abandon(setuid_node, start(setuid_node, "static", "none"))
    ignoring = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = ["/usr/bin/python3", "-I", "-c", ignoring, setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep"]
    ran = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert (ran.returncode, json.loads(ran.stdout)["state"]) == (0, "swept")


def hops(node):
    """New pids come under that account, zombies or not."""
    first = set(node.site.processes(node.site.accounts["user1"]))
    time.sleep(0.05)
    return bool(set(node.site.processes(node.site.accounts["user1"])) - first)


# ---- a policy child that wants another file removed ----


def test_file_whose_name_a_lease_cannot_hold_is_not_written(hostile, setuid_node, home):  # noqa: F811
    """Its name was cut in the lease, and what had the shorter name was removed by the sweep."""
    path = owned(home / "w", setuid_node.pilot) / ("%" * 200) / ("%" * 150)
    owned(path.parent, setuid_node.pilot)
    assert lease._encoded("file", os.fsencode(path))[1], "it is cut"
    ran = hostile(permit("log-only", "none", (22, [(1, str(path)), (2, b"x"), (3, 0o600), (4, 1)])))
    assert (ran.rc, ran.out, b"NW-STATE" in ran.err) == (202, b"", True), ran
    shutil.rmtree(home / "w")
