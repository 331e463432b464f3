"""``nodewrap sweep``, what it prints, and what ps, kill and sweep make of leases and lease directories that are not as they should be."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.need import need
from tests.node import abandon, until

WAIT = ("/bin/sleep", "60")


def call(node, *argv, timeout=60):
    """nodewrap as its administrator -> CompletedProcess."""
    who = {"env": node.site.environment(node.pilot), "cwd": "/", **node.site.owner()}
    return subprocess.run([node.site.binary, *argv], capture_output=True, text=True, timeout=timeout, check=False, **who)


def dead_run(node, kind="map"):
    """A run whose front and keeper were killed at once -> its id. Its lease is left."""
    return abandon(node, node.start(kind, *WAIT))


def lease_of(node, run):
    return node.site.state / "leases" / f"{run}.lease"


def test_sweep_tells_what_it_finished_and_the_second_one_has_nothing_to_do(node):
    run = dead_run(node)
    done = call(node, "sweep")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run} is finished\n", "")
    assert node.is_clean()
    done = call(node, "sweep")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sweep_of_one_run_leaves_the_others(node):
    lives = [node.start("map", *WAIT) for _ in range(2)]  # the start of the second would sweep the first one, were it dead
    runs = [abandon(node, live) for live in lives]
    done = call(node, "sweep", "--run", runs[0][-12:])
    assert (done.returncode, done.stdout) == (0, f"{runs[0]} is finished\n")
    assert node.site.leases() == [f"{runs[1]}.lease"]
    assert call(node, "sweep", "--json").stdout == json.dumps({"run": runs[1], "state": "swept"}) + "\n"
    done = call(node, "sweep", "--run", runs[0])
    assert (done.returncode, done.stdout) == (0, f"{runs[0]} has no lease: nothing of it is left\n")


def test_a_broken_lease_is_told_by_all_three_and_forgotten_when_told_to(setuid_node):
    run = dead_run(setuid_node)
    lease_of(setuid_node, run).write_text("nodewrap-lease 3\n")
    done = call(setuid_node, "sweep", "--quiet")
    assert done.returncode == 1
    assert done.stdout.startswith(f"{run} has a lease that cannot be relied on: NW-LEASE: ")
    shown = call(setuid_node, "ps")
    assert shown.returncode == 1
    assert "another version" in shown.stderr
    killed = call(setuid_node, "kill", run)
    assert (killed.returncode, killed.stdout) == (1, f"{run} NW-LEASE: line 1: a lease of another version of nodewrap\n")
    done = call(setuid_node, "sweep", "--forget", run)
    assert done.returncode == 0
    assert "is forgotten" in done.stdout
    assert setuid_node.site.leases() == []
    assert setuid_node.run("map", "/bin/true").rc == 0, "and its block is free again"


@pytest.mark.parametrize("words", [
    ["--run", "ffffffff"], ["--run", "x"], ["--remove"], ["--path", "/tmp"], ["--deep", "--run", "x"], ["--deep", "--path", "tmp"],
    ["--run", "x", "--forget", "y"], ["--deep", "--path", "/no/such"], ["--whatever"],
])
def test_a_wrong_command_line_is_the_callers_mistake(setuid_node, words):
    done = call(setuid_node, "sweep", *words)
    assert (done.returncode, done.stdout) == (201, "")
    assert "NW-" in done.stderr


# ---- from timers and epilogues ----


def test_the_epilogue_finishes_dead_runs_with_an_empty_environment_and_says_nothing(setuid_node):
    run = dead_run(setuid_node)
    done = subprocess.run(["env", "-i", setuid_node.site.prefix / "libexec/nodewrap/epilogue"], capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert f"{run}.lease" not in setuid_node.site.leases()
    assert setuid_node.is_clean()


def test_the_epilogue_fails_the_node_only_where_the_site_wants_it(setuid_node):
    path = lease_of(setuid_node, str(uuid.uuid4()))
    path.touch(0o600)
    path.write_text("x")
    epilogue = str(setuid_node.site.prefix / "libexec/nodewrap/epilogue")
    words = [["env", "-i", epilogue], ["env", "-i", "NODEWRAP_EPILOGUE_STRICT=1", epilogue]]
    said = [subprocess.run(argv, capture_output=True, text=True, check=False) for argv in words]
    path.unlink()
    assert [done.returncode for done in said] == [0, 1]
    assert (said[0].stderr, "NW-LEASE" in said[1].stderr) == ("", True)


def test_what_the_unit_starts_is_the_sweep(setuid_node):
    text = (setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep.service").read_text()
    (command,) = [line.partition("=")[2] for line in text.splitlines() if line.startswith("ExecStart=")]
    run = dead_run(setuid_node)
    done = subprocess.run(command.split(), capture_output=True, text=True, cwd="/", check=False, env={})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert f"{run}.lease" not in setuid_node.site.leases()
    assert "[Timer]" in (setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep.timer").read_text()


# ---- the lease directory ----


@pytest.fixture
def leases(setuid_node):
    """The lease directory; put back as it was."""
    path = setuid_node.site.state / "leases"
    yield path
    subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)
    path.mkdir(exist_ok=True)
    os.chown(path, 0, 0)
    path.chmod(0o700)


def every(node):
    return [call(node, *words) for words in (["ps"], ["kill", "--all"], ["sweep"])]


@pytest.mark.parametrize(("change", "says"), [
    (lambda path, node: path.chmod(0o777), "writable by others"),
    (lambda path, node: os.chown(path, node.pilot.uid, -1), "belongs to uid"),
])
def test_a_lease_directory_that_others_could_write_to_is_refused_by_all(setuid_node, leases, change, says):
    run = dead_run(setuid_node)
    change(leases, setuid_node)
    said = every(setuid_node)
    assert [(done.returncode, done.stdout) for done in said] == [(202, "")] * 3
    assert all(says in done.stderr and str(leases) in done.stderr for done in said), said
    os.chown(leases, 0, 0)
    leases.chmod(0o700)
    assert call(setuid_node, "sweep").stdout == f"{run} is finished\n"


def test_a_missing_lease_directory_means_no_runs(setuid_node, leases):
    leases.rmdir()
    assert [(done.returncode, done.stdout, done.stderr) for done in every(setuid_node)] == [(0, "", "")] * 3
    assert setuid_node.run("map", "/bin/true").rc == 0


def test_a_lease_directory_on_a_file_system_of_its_own_serves_as_well(setuid_node, leases):
    need("root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700,size=1m", "leases", leases], check=True)
    run = dead_run(setuid_node, "pool")
    assert call(setuid_node, "ps").stdout.splitlines()[1].startswith(run)
    assert call(setuid_node, "sweep").stdout == f"{run} is finished\n"


# ---- files that are no leases ----


@pytest.mark.parametrize("what", ["foreign-owner", "open-mode", "link", "directory", "fifo", "large", "binary"])
def test_a_file_that_is_no_lease_is_shown_with_the_reason_and_touched_by_none(setuid_node, what):
    run = str(uuid.uuid4())
    path = lease_of(setuid_node, run)
    makers = {"link": lambda: path.symlink_to("/etc/passwd"), "directory": path.mkdir, "fifo": lambda: os.mkfifo(path, 0o600),
              "large": lambda: path.write_bytes(b"#\n" * 200000), "binary": lambda: path.write_bytes(bytes(range(256)) * 10)}
    makers.get(what, lambda: path.write_text("nodewrap-lease 2\n"))()
    if what != "link":
        path.chmod(0o666 if what == "open-mode" else 0o600)
    if what == "foreign-owner":
        os.chown(path, setuid_node.pilot.uid, -1)
    shown, killed, swept = call(setuid_node, "ps"), call(setuid_node, "kill", "--all"), call(setuid_node, "sweep", "--quiet")
    left = os.path.lexists(path)
    path.rmdir() if what == "directory" else path.unlink()
    assert (shown.returncode, killed.returncode, swept.returncode, left) == (1, 1, 1, True)
    assert f"{run}: " in shown.stderr
    assert killed.stdout.startswith(f"{run} NW-LEASE: ")
    assert swept.stdout.startswith(f"{run} has a lease that cannot be relied on: NW-LEASE: ")


def test_other_names_in_the_lease_directory_are_nobodys_business(setuid_node):
    path = setuid_node.site.state / "leases" / "README"
    path.write_text("hello\n")
    said = every(setuid_node)
    path.unlink()
    assert [(done.returncode, done.stdout) for done in said] == [(0, "")] * 3


# ---- pids that come again ----

REUSE = """
import json, os, signal, subprocess, sys, time
binary, uid, gid, *argv = sys.argv[1:]
open("/proc/sys/kernel/pid_max", "w").write("400")
reader, writer = os.pipe()
argv = [str(writer) if word == "FD" else word for word in argv]
def child():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid
def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
while (pid := child()) < 300: end(pid)  # RESERVED_PIDS (kernel/pid.c): those below come once
end(pid)
who = dict(user=int(uid), group=int(gid), extra_groups=json.loads(os.environ["GROUPS"]))
run = subprocess.Popen(argv, pass_fds=[writer], cwd="/", start_new_session=True, **who)
os.close(writer)
started = json.loads(os.fdopen(reader).readline())
keeper = int(open(f"/proc/{run.pid}/task/{run.pid}/children").read())
for pid in (run.pid, keeper): os.kill(pid, signal.SIGSTOP)
for pid in (keeper, run.pid): os.kill(pid, signal.SIGKILL)
run.wait()
try:
    while os.waitpid(-1, 0): pass  # keeper and init: we are pid 1 here, and a zombie keeps its session's number
except ChildProcessError: pass
impostors = {}
for _ in range(1000):
    pid = child()
    if pid in (run.pid, keeper): impostors[pid] = "front" if pid == run.pid else "keeper"
    else: end(pid)
    if len(impostors) == 2: break
call = lambda *words: subprocess.run([binary, *words], capture_output=True, text=True, cwd="/")
shown = call("ps", "--json")
killed = call("kill", "--grace", "0", "--all")
alive = [pid for pid in impostors if os.waitpid(pid, os.WNOHANG) == (0, 0)]
print(json.dumps({"run": started["run"], "impostors": sorted(impostors.values()), "alive": len(alive), "shown": shown.stdout, "killed": killed.stdout,
                  "err": shown.stderr + killed.stderr}))
for pid in alive: os.kill(pid, signal.SIGKILL)
"""


def has_own_pid_max():
    """A pid namespace has a limit of its own. Asked by a number at which nobody on the node would have to do without processes."""
    limit = Path("/proc/sys/kernel/pid_max")
    before = limit.read_text()
    lower = f"echo {int(before) - 1} >{limit}"
    subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "/bin/sh", "-c", lower], check=True)
    if limit.read_text() == before:
        return True
    limit.write_text(before)
    return False


def test_pids_that_were_really_given_out_again_are_neither_shown_nor_killed(setuid_node):
    """In a pid namespace with 400 pids (its own limit since Linux 6.14) front's and keeper's numbers come again within a moment."""
    node = setuid_node
    argv = node.argv("map", WAIT, options=["--status-fd", "FD"])
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "/usr/bin/python3", "-I", "-c", REUSE]
    words = [*alone, node.site.binary, node.pilot.uid, node.pilot.gid, *argv]
    environment = {**node.site.environment(node.pilot), "GROUPS": json.dumps(node.pilot.groups)}
    if not has_own_pid_max():
        pytest.skip("pid_max is the node's, not the namespace's (before Linux 6.14)")
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["impostors"], said["alive"], said["err"]) == (["front", "keeper"], 2, "")
    row = json.loads(said["shown"])
    assert (row["run"], row["state"], row["processes"], row["memory"]) == (said["run"], "dead", 0, 0)
    assert said["killed"] == f"{said['run']} swept\n"
    until(node.is_clean, "the run is finished")
