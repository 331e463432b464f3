"""Dead runs are finished from their leases, by nodewrap-sweep and by the next run (csrc/sweep.c, I9)."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tests.node import KINDS, MAP_BLOCKS, abandon, alive, until

#: Sleepers by which a run is known wherever its processes went: a number of seconds that nobody else sleeps.
MARK = 500000 + os.getpid()
DAEMONS = f"for i in 1 2 3; do setsid sleep {MARK} >/dev/null 2>&1 </dev/null & done; echo ready; trap '' TERM; sleep {MARK}"


def sleepers():
    """pids of processes that carry the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * (path.read_bytes().split(b"\0")[:2] == [b"sleep", b"%d" % MARK])
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def _nobody_sleeps_on():
    yield
    left = sleepers()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def keeper_of(live):
    (child,) = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    return int(child)


def is_clean(node):
    """Nothing is left. What a sweep has killed may take a moment to end."""
    return not any(node.settled().values())


def actions(records):
    return [record["event"]["action"] for record in records]


CASES = [(launcher, kind, profile) for launcher, kinds in KINDS.items() for kind in kinds for profile in ("batch", "none")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    launcher, kind, profile = request.param
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    return request.getfixturevalue(f"{launcher}_node"), kind, profile


@pytest.fixture
def work(home, session):
    path = home / "swept"
    path.mkdir()
    os.chown(path, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


def start(node, kind, profile, *options, script=DAEMONS):
    live = node.start(kind, "/bin/sh", "-c", script, profile=profile, options=options)
    assert live.process.stdout.readline() == b"ready\n"
    return live


def test_a_run_whose_every_process_was_killed_is_finished_by_the_sweep(case, work):
    node, kind, profile = case
    before = node.site.audit_size()
    live = start(node, kind, profile, "--workdir", str(work), script="echo x >out; mkdir d; ln -s /etc/passwd d/escape; " + DAEMONS)
    abandon(node, live)
    assert node.site.leases()
    code, reports, err = node.sweep()
    assert (code, [report["state"] for report in reports], err) == (0, ["swept"], "")
    assert is_clean(node), node.leftovers()
    assert sleepers() == []
    assert {path.lstat().st_uid for path in (work, work / "out", work / "d")} == {node.pilot.uid}
    assert os.listdir(work / "d") == []
    records = node.site.records(before)
    assert actions(records)[-3:] == ["exit", "handover", "cleanup"]
    assert all(record["nodewrap"]["swept"] for record in records[-3:])
    assert {record["nodewrap"]["run"]["id"] for record in records} == {reports[0]["run"]}
    assert records[-1]["nodewrap"]["subject"] == records[-4]["nodewrap"]["subject"]
    assert node.sweep() == (0, [], ""), "once is enough"


@pytest.mark.parametrize("kind", ["static", "log-only"])
def test_the_next_run_finishes_a_dead_one_before_it_needs_its_account(setuid_node, kind):
    live = start(setuid_node, kind, "batch")
    abandon(setuid_node, live)
    ran = setuid_node.run(kind, "/bin/true")
    assert ran.rc == 0, ran
    assert is_clean(setuid_node)
    done = [action for action in actions(ran.records) if action != "degrade"]  # of a kernel without all of Landlock
    assert done == ["exit", "cleanup", "authorize", "start", "exit", "cleanup"]


def test_a_live_run_is_not_swept(node):
    live = start(node, "log-only", "batch", script="echo ready; sleep 60")
    code, reports, _ = node.sweep()
    assert (code, [report["state"] for report in reports]) == (0, ["live"])
    assert alive(live.pid)
    live.process.terminate()
    live.end()


def test_an_account_of_a_run_that_cannot_be_finished_is_not_leased_again(setuid_node):
    """The lease cannot be read any more: its account stays taken, and the next run gets the other one, then none."""
    live = start(setuid_node, "static", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    lease = setuid_node.site.state / "leases" / name
    text = lease.read_text()
    lease.write_text(text.replace("nodewrap-lease 2", "nodewrap-lease 3"))
    ran = setuid_node.run("static", "/bin/true")
    assert ran.rc == 202
    assert b"NW-POOL-BUSY" in ran.err
    assert b"nodewrap sweep" in ran.err
    lease.write_text(text)
    assert setuid_node.run("static", "/bin/true").rc == 0


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "without-ready": lambda text: text.split("ready\n")[0],
    "later-version": lambda text: text.replace("nodewrap-lease 2", "nodewrap-lease 3"),
    "garbage": lambda text: "\x00\xff" * 300,
    "other-run": lambda text: text.replace("\nrun 0", "\nrun 1"),
    "root-ids": lambda text: "".join("id 0 0\n" if line.startswith("id ") else line for line in text.splitlines(True)),
    "foreign-ids": lambda text: "".join("id 1 1\nblock 1 1\n" if line.startswith("id ") else "" if line.startswith("block ") else line
                                        for line in text.splitlines(True)),
    "foreign-cgroup": lambda text: text.replace("ready\n", "cgroup /sys/fs/cgroup/system.slice\nready\n") if "cgroup " not in text else "x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_lease_that_is_not_understood_is_reported_and_nothing_is_touched(setuid_node, work, damage):
    live = start(setuid_node, "static", "none", "--workdir", str(work), script="echo x >out; echo ready; sleep 60")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    lease, before = setuid_node.site.state / "leases" / name, setuid_node.site.audit_size()
    text = lease.read_text()
    lease.write_bytes(DAMAGE[damage](text).encode("latin-1"))
    owner = work.stat().st_uid
    code, reports, _ = setuid_node.sweep()
    assert (code, [(report["state"], report["code"]) for report in reports]) == (1, [("broken", "NW-LEASE")])
    assert "--forget" in reports[0]["text"]
    assert setuid_node.site.leases() == [name]
    assert (work.stat().st_uid, setuid_node.site.audit_size()) == (owner, before)
    assert owner != setuid_node.pilot.uid
    lease.write_text(text)
    assert setuid_node.sweep()[0] == 0
    assert (work / "out").stat().st_uid == setuid_node.pilot.uid


@pytest.mark.parametrize("what", ["foreign-owner", "open-mode", "link", "directory", "fifo"])
def test_a_lease_that_is_not_the_trusted_owners_own_file_is_reported_and_left(setuid_node, what):
    leases = setuid_node.site.state / "leases"
    path = leases / f"{uuid.uuid4()}.lease"
    if what == "link":
        path.symlink_to("/etc/passwd")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.touch(0o666 if what == "open-mode" else 0o600)
        path.chmod(0o666 if what == "open-mode" else 0o600)
    if what == "foreign-owner":
        os.chown(path, setuid_node.pilot.uid, -1)
    code, reports, _ = setuid_node.sweep()
    left = os.path.lexists(path)
    assert setuid_node.run("log-only", "/bin/true").rc == 0, "runs go on"
    path.rmdir() if what == "directory" else path.unlink()
    assert (code, [(report["state"], report["code"]) for report in reports], left) == (1, [("broken", "NW-LEASE")], True)


def test_an_empty_lease_is_a_run_that_had_not_begun_and_is_removed(setuid_node):
    path = setuid_node.site.state / "leases" / f"{uuid.uuid4()}.lease"
    path.touch(0o600)
    before = setuid_node.site.audit_size()
    assert setuid_node.sweep()[0] == 0
    assert not path.exists()
    assert setuid_node.site.audit_size() == before


def test_a_line_that_was_being_appended_at_the_death_counts_as_not_written(setuid_node):
    live = start(setuid_node, "log-only", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    with open(setuid_node.site.state / "leases" / name, "a") as lease:
        lease.write("keeper 12")
    assert setuid_node.sweep()[0] == 0
    assert is_clean(setuid_node)


@pytest.fixture
def aside(work):
    """Another name for the work directory."""
    path = work.with_name("aside")
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


KEPT = "echo x >out; cp /bin/true tool; chmod 4755 tool; echo ready; sleep 60"


@pytest.mark.parametrize("behind", ["nothing", "directory", "link"])
def test_a_pilot_that_renames_the_directory_of_its_dead_run_keeps_nothing_of_the_payloads(setuid_node, work, aside, behind):
    """A set-id program there would be the account's, which the next payload gets. What has the old name now is not touched."""
    live = start(setuid_node, "static", "none", "--workdir", str(work), script=KEPT)
    abandon(setuid_node, live)
    (account,) = {path.stat().st_uid for path in (work, work / "tool")}
    work.rename(aside)
    if behind == "directory":
        work.mkdir()
        os.chown(work, account, -1)
    elif behind == "link":
        work.symlink_to("/etc")
    owner = work.lstat().st_uid if os.path.lexists(work) else None
    assert setuid_node.sweep()[0] == 0
    assert {path.stat().st_uid for path in (aside, aside / "out", aside / "tool")} == {setuid_node.pilot.uid}
    assert (aside / "tool").stat().st_mode & 0o7000 == 0
    assert (work.lstat().st_uid if os.path.lexists(work) else None) == owner
    assert is_clean(setuid_node)
    if behind == "link":
        work.unlink()


def test_a_directory_that_is_gone_is_named_in_the_record(setuid_node, work):
    live = start(setuid_node, "static", "none", "--workdir", str(work), script=KEPT)
    abandon(setuid_node, live)
    subprocess.run(["rm", "-rf", work], check=True)
    before = setuid_node.site.audit_size()
    assert setuid_node.sweep()[0] == 0
    assert str(work) in setuid_node.site.records(before)[-1]["nodewrap"]["cleanup"]["left_paths"][0]
    assert is_clean(setuid_node)


@pytest.fixture
def scratch(home, session):
    """A work directory on a file system of its own."""
    top = home / "scratch"
    top.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", top], check=True)
    work = top / "work"
    work.mkdir()
    os.chown(work, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield work
    subprocess.run(["umount", top], check=True)
    top.rmdir()


def test_a_directory_that_is_not_seen_from_the_sweeps_mount_namespace_keeps_its_lease(setuid_node, scratch):
    """An epilogue in a job's namespace without the job's scratch: the account is not free while files there are the payload's."""
    live = start(setuid_node, "static", "none", "--workdir", str(scratch), script=KEPT)
    abandon(setuid_node, live)
    sweeper = setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep"
    hidden = f"umount {scratch.parent} && exec {sweeper}"
    ran = subprocess.run(["unshare", "--mount", "/bin/sh", "-c", hidden], capture_output=True, check=False, timeout=60)
    assert (ran.returncode, json.loads(ran.stdout)["state"]) == (1, "left"), ran
    assert setuid_node.site.leases()
    assert setuid_node.sweep()[0] == 0
    assert (scratch / "out").stat().st_uid == setuid_node.pilot.uid


def test_after_a_reboot_files_and_records_are_finished_and_no_process_is_looked_for(setuid_node, work):
    """Another boot id: device numbers may differ, the appended lines may be lost, and an audit session of that number is somebody else's."""
    live = start(setuid_node, "static", "none", "--workdir", str(work), script="echo x >out; echo ready; sleep 60")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    lease = setuid_node.site.state / "leases" / name
    login = "echo 0 >/proc/self/loginuid; cat /proc/self/sessionid; echo; exec sleep 60"
    bystander = subprocess.Popen(["/bin/sh", "-c", login], stdout=subprocess.PIPE)
    session = bystander.stdout.readline().decode().strip()
    lines = lease.read_text().split("ready\n")[0].splitlines()
    lines = [f"boot {uuid.uuid4()}" if line.startswith("boot ") else line for line in lines]
    lines = [" ".join(["work", line.split()[1], "1", *line.split()[3:]]) if line.startswith("work ") else line for line in lines]
    lease.write_text("\n".join([*lines, "ready", f"session {session}", ""]))
    before = setuid_node.site.audit_size()
    assert setuid_node.sweep()[0] == 0
    still = bystander.poll() is None
    bystander.kill()
    bystander.communicate()
    assert still
    assert actions(setuid_node.site.records(before)) == ["exit", "handover", "cleanup"]
    assert (work / "out").stat().st_uid == setuid_node.pilot.uid
    assert is_clean(setuid_node)


def test_a_run_that_never_started_has_a_cleanup_and_no_exit(setuid_node):
    live = start(setuid_node, "pool", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    lease = setuid_node.site.state / "leases" / name
    lease.write_text(lease.read_text().split("ready\n")[0] + "ready\n")
    before = setuid_node.site.audit_size()
    assert setuid_node.sweep()[0] == 0
    assert actions(setuid_node.site.records(before)) == ["cleanup"]


def test_many_sweepers_at_once_finish_each_dead_run_once(setuid_node):
    before = setuid_node.site.audit_size()
    for live in [start(setuid_node, kind, "none") for kind in ("static", "pool", "pool", "map", "block", "log-only")]:
        abandon(setuid_node, live)
    argv = [setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep"]
    sweepers = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(6)]
    swept = [report for sweeper in sweepers for report in map(json.loads, sweeper.communicate()[0].splitlines()) if report["state"] == "swept"]
    assert len(swept) == 6
    done = actions(setuid_node.site.records(before))
    assert (done.count("exit"), done.count("cleanup")) == (6, 6)
    assert is_clean(setuid_node)


def test_forget_removes_the_lease_and_its_account_is_free_again(setuid_node):
    live = start(setuid_node, "static", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    run = name.split(".")[0]
    (setuid_node.site.state / "leases" / name).write_text("x")
    assert setuid_node.sweep()[0] == 1
    before = setuid_node.site.audit_size()
    assert setuid_node.sweep("--forget", run)[1] == [{"run": run, "state": "forgotten"}]
    (record,) = setuid_node.site.records(before)
    assert (record["event"]["action"], record["event"]["outcome"], record["nodewrap"]["run"]["id"]) == ("forget", "failure", run)
    assert "uid 0" in record["event"]["message"]
    assert "uid" not in record["nodewrap"]["pilot"], "not known from a lease like that"
    assert setuid_node.run("static", "/bin/true").rc == 0


def test_what_a_forgotten_lease_says_of_its_run_is_on_record_and_without_a_record_it_stays(setuid_node):
    live = start(setuid_node, "static", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    run, log = name.split(".")[0], setuid_node.site.audit
    before = setuid_node.site.audit_size()
    log.chmod(0o666)  # not trusted, so nothing can be recorded
    code, reports, _ = setuid_node.sweep("--forget", run)
    log.chmod(0o640)
    assert (code, reports[0]["state"], reports[0]["code"]) == (1, "left", "NW-PATH-WRITABLE")
    assert setuid_node.site.leases() == [name]
    assert setuid_node.sweep("--forget", run)[1][0]["state"] == "forgotten"
    (record,) = setuid_node.site.records(before)
    assert record["nodewrap"]["subject"]["dn"]
    assert record["nodewrap"]["pilot"]["uid"] == str(setuid_node.pilot.uid)
    assert record["user"]["id"] == str(setuid_node.site.accounts["user1"].uid)
    assert setuid_node.run("static", "/bin/true").rc == 0, "its account is free again"


def test_a_lease_whose_sweeper_is_dead_but_cannot_be_reaped_at_once_counts_as_swept(setuid_node):
    """A debugger has a zombie first, and hands it on when it has waited for it itself (ptrace(2))."""
    live = start(setuid_node, "static", "batch")
    abandon(setuid_node, live)
    libc = ctypes.CDLL(None, use_errno=True)
    with open(setuid_node.site.state / "ids" / str(setuid_node.site.accounts["user1"].uid), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # for which it waits a second
        process = subprocess.Popen([setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep"], stdout=subprocess.PIPE)
        child = int(until(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip(), "its sweeper"))
        assert libc.ptrace(0x4206, child, None, None) == 0  # PTRACE_SEIZE

    def goes_on():
        """A traced process stops for each signal; its end is left to be waited for."""
        with contextlib.suppress(ChildProcessError):  # it has ended
            stop = os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOHANG)
        if alive(child) and stop:
            libc.ptrace(7, child, None, stop.si_status & 0x7F)  # PTRACE_CONT
        return not alive(child)

    try:
        until(goes_on, "it has finished")
        time.sleep(0.3)
    finally:
        os.waitpid(child, 0x40000000)  # __WALL
    out, _ = process.communicate(timeout=20)
    assert json.loads(out)["state"] == "swept"
    assert process.returncode == 0


#: What makes a lease that a sweep cannot finish: a work directory on a file system that it does not see.
ELSEWHERE = "work chown 1 2 3\nhandle 1 00\npath /nonexistent-nodewrap/x\nready\n"


def test_an_id_whose_lock_lost_its_content_with_the_power_is_not_leased_again(setuid_node):
    """The lease is synced, ids/N is not: after a power cut it may be empty."""
    live = start(setuid_node, "static", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    lease = setuid_node.site.state / "leases" / name
    text = lease.read_text()
    lease.write_text(text.replace("ready\n", ELSEWHERE))
    lock = setuid_node.site.state / "ids" / str(setuid_node.site.accounts["user1"].uid)
    whole = lock.read_bytes()
    for lost in (b"", bytes(len(whole))):
        lock.write_bytes(lost)
        ran = setuid_node.run("static", "/bin/true")
        assert (ran.rc, b"NW-POOL-BUSY" in ran.err) == (202, True), ran
        assert lock.read_bytes() == whole
    lease.write_text(text)
    assert setuid_node.run("static", "/bin/true").rc == 0


def test_leases_that_take_all_the_time_do_not_keep_the_others_from_their_turn_for_ever(setuid_node):
    """Before a run there are two seconds for eight at once; each of these waits one for a lock that somebody else has."""
    live = start(setuid_node, "map", "batch")
    abandon(setuid_node, live)
    (name,) = setuid_node.site.leases()
    directory, ids = setuid_node.site.state / "leases", setuid_node.site.state / "ids"
    text, uid = (directory / name).read_text(), (directory / name).read_text().split("\nid ")[1].split()[0]
    made, locks = {}, []
    for number in range(1, 28):
        run, own = str(uuid.UUID(int=uuid.UUID(name[:36]).int + number)), str(int(uid) + number)
        lines = [line.replace(name[:36], run) for line in text.splitlines(True) if not line.startswith(("cgroup", "init", "keeper", "starting"))]
        other = [" ".join(own if word == uid else word for word in line.rstrip("\n").split(" ")) + "\n" for line in lines]
        (directory / f"{run}.lease").touch(mode=0o600)
        (directory / f"{run}.lease").write_text("".join(other))
        (ids / own).write_text(f"{run}          1\n")
        made[f"{run}.lease"] = own
    order = [entry.name for entry in os.scandir(directory) if entry.name in made]
    for lease in order[:-1]:
        locks.append(os.open(ids / made[lease], os.O_RDWR))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
    try:
        for _ in range(12):
            assert setuid_node.run("log-only", "/bin/true").rc == 0
            if not (directory / order[-1]).exists():
                break
        else:
            pytest.fail("the last one never had its turn")
    finally:
        for lock in locks:
            os.close(lock)
    code, reports, _ = setuid_node.sweep()
    assert code == 0, reports
    assert is_clean(setuid_node)


def test_a_live_run_cannot_be_forgotten(setuid_node):
    live = start(setuid_node, "map", "batch")
    (name,) = setuid_node.site.leases()
    assert setuid_node.sweep("--forget", name.split(".")[0])[1][0]["state"] == "live"
    assert setuid_node.site.leases() == [name]
    live.process.kill()


def test_the_sweep_of_a_setuid_site_is_roots_alone(setuid_node):
    ran = setuid_node.site.run([setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep"])
    assert ran.rc == 202
    assert b"NW-PRIVILEGE" in ran.err


def test_no_block_that_overlaps_a_dead_runs_is_leased(setuid_node):
    """Blocks of other sizes: their byte-range locks died with the run."""
    for live in [start(setuid_node, "block", "batch") for _ in range(MAP_BLOCKS)]:
        abandon(setuid_node, live)
    leases = [setuid_node.site.state / "leases" / name for name in setuid_node.site.leases()]
    texts = {lease: lease.read_text() for lease in leases}
    for lease in leases:
        lease.write_text("x")
    ran = setuid_node.run("map", "/bin/true")
    for lease, text in texts.items():
        lease.write_text(text)
    assert ran.rc == 202
    assert b"NW-POOL-BUSY" in ran.err
    assert setuid_node.sweep()[0] == 0
