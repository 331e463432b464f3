"""The resident policy child under the real launchers: the same answers as a spawned one, and nothing that one worker's end could spoil."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.need import need
from tests.node import alive, until

POLICY = """
[site]
name = "TEST"
multi_user = "yes"
modes = {{ log-only = "allow", map = "allow" }}
minimum_assurance = "declared"

[[caller]]
account = ["{pilot}"]

[[ban]]
dn = "/CN=mallory"
reason = "test"

[[rule]]
name = "{rule}"
identity = {{ mode = "log-only" }}
profile = ["none", "batch"]
"""
RUN = ("run", "--profile", "batch", "--declare", "subject=/CN=user", "--")


class Resident:
    """A site with ``nodewrap policyd`` running. process: its Popen."""

    def __init__(self, site):
        self.site = site
        self.path = site.prefix / "run/policyd"
        self.apply("all")
        site.guard(allow=["log-only batch none"], policyd=str(self.path))
        self.process = self.start()

    def apply(self, rule):
        self.site.policy(POLICY.format(pilot=self.site.pilot.name, rule=rule))

    def start(self, ready=True):
        """Popen of policyd as the site's administrator, once it has said that it listens."""
        site = self.site
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(b"\0nodewrap-test-" + os.urandom(8).hex().encode())
        notify.settimeout(20)
        argv = [site.binary, "policyd", "--guard", site.sysconf / "guard"]
        owner = {"user": site.pilot.uid, "group": site.pilot.gid, "extra_groups": site.pilot.groups} if self.pilots else {}
        name = "@" + notify.getsockname()[1:].decode()
        env = {**site.environment(site.pilot), "NOTIFY_SOCKET": name}
        process = subprocess.Popen(argv, env=env, cwd="/", stderr=subprocess.PIPE, **owner)
        with notify:
            assert not ready or notify.recv(100) == b"READY=1"
        return process

    @property
    def pilots(self):
        return os.geteuid() == 0 and self.site.launcher == "userns"

    def stop(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        return self.process.wait(20)

    def workers(self, many=4):
        """pids of the workers; waits until there are so many."""
        for _ in range(400):
            found = [pid for pool in children(self.process.pid) for pid in children(pool)]
            if len(found) >= many:
                return found
            time.sleep(0.01)
        raise AssertionError(f"no {many} workers in 4 s")

    def until_gone(self, workers, many):
        """Wait until so many of them are, and no more."""
        gone = lambda: [pid for pid in workers if not os.path.exists(f"/proc/{pid}")]  # noqa: E731  "children" may leave one out (proc(5))
        until(lambda: len(gone()) >= many, f"{many} workers have ended")
        assert len(gone()) == many


def children(pid):
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
    return []


def status(pid):
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


@pytest.fixture
def resident(site):
    made = Resident(site)
    yield made
    if made.process.poll() is None:
        made.stop()
    made.process.stderr.close()


def test_resident_child_decides_as_a_spawned_one_does(resident):
    site = resident.site
    banned, other = ("run", "--declare", "subject=/CN=mallory", "--", "true"), ("run", "--profile", "strict", "--", "true")
    asked = ((*RUN, "true"), banned, other, ("run", "--bad"))
    warm = [site.nodewrap(*argv) for argv in asked]
    site.guard(policyd=None)
    cold = [site.nodewrap(*argv) for argv in asked]
    assert [ran.rc for ran in warm] == [ran.rc for ran in cold] == [0, 203, 203, 201]
    assert [ran.err for ran in warm] == [ran.err for ran in cold]
    facts = [[[record["event"]["action"], record.get("nodewrap", {}).get("rule")] for record in ran.records] for ran in (*warm, *cold)]
    assert facts[: len(asked)] == facts[len(asked) :]


def test_credential_is_verified_by_a_worker(resident, tmp_path):
    """A file that is no credential is refused by the X.509 code itself, which the worker had loaded before its lock."""
    site = resident.site
    junk = site.pilot.home / "junk"
    junk.write_text("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
    junk.chmod(0o600)
    os.chown(junk, site.pilot.uid, site.pilot.gid)
    warm = site.nodewrap("run", "--credential", junk, "--", "true")
    site.guard(policyd=None)
    cold = site.nodewrap("run", "--credential", junk, "--", "true")
    assert (warm.rc, warm.err) == (cold.rc, cold.err)
    assert warm.rc in (201, 203)
    assert b"NW-" in warm.err


def test_workers_have_no_rights_to_lose(resident):
    worker = status(resident.workers()[0])
    expected = int(resident.site.read_guard()["child"][0].split()[0]) if resident.site.launcher == "setuid" else resident.site.pilot.uid
    assert set(worker["Uid"].split()) == {str(expected)}
    assert worker["NoNewPrivs"] == "1"
    assert worker["Seccomp"] == "2"
    assert int(worker["CapEff"], 16) == int(worker["CapPrm"], 16) == 0
    if os.geteuid() == 0:  # it is not dumpable: nobody else sees its descriptors
        assert os.readlink(f"/proc/{resident.workers()[0]}/fd/0") == "/dev/null"


def test_parent_of_the_pool_keeps_no_capability(resident):
    parent = status(resident.process.pid)
    assert int(parent["CapEff"], 16) == int(parent["CapPrm"], 16) == 0


def test_each_request_gets_a_process_of_its_own(resident):
    for _ in range(2):
        before = set(resident.workers())
        assert resident.site.nodewrap(*RUN, "true").rc == 0
        resident.until_gone(before, 1)


@pytest.mark.parametrize("told", [b"x", b"d", b"tt"], ids=["nonsense", "answered before asked", "asked twice"])
def test_worker_that_tells_what_no_worker_does_is_ended(resident, told):
    """As one could that was taken over by what it read: by each telling it would put its deadline off, or keep the pool awake."""
    need("root")
    worker = resident.workers()[0]
    pipes = [Path(f"/proc/{worker}/fd/{name}") for name in os.listdir(f"/proc/{worker}/fd")]
    (tell,) = [path for path in pipes if path.is_fifo() and path.lstat().st_mode & 0o600 == 0o200]  # it may write there (proc(5))
    with tell.open("wb", buffering=0) as pipe:
        pipe.write(told)
    until(lambda: worker not in resident.workers(), "it is ended")
    assert resident.site.nodewrap(*RUN, "true").rc == 0


def test_applied_policy_is_seen_by_the_next_request(resident):
    for rule in ("first", "second", "third"):
        resident.apply(rule)
        assert resident.site.nodewrap(*RUN, "true").record("start")["rule"]["name"] == rule


def test_worker_killed_with_a_request_in_hand_is_an_end_of_file_and_is_replaced(resident):
    workers = set(resident.workers())
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(resident.path))
        asking.settimeout(20)
        assert len(resident.workers(5)) == 5  # its replacement is there, so it was taken
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert asking.recv(1) == b""
    resident.until_gone(workers, 4)  # who is killed while it waits for a connection takes one that comes at that moment
    assert resident.site.nodewrap(*RUN, "true").rc == 0


def test_resident_child_that_hangs_up_is_an_internal_error(resident):
    """What the launcher sees of a killed worker, at every point where it can happen: nothing is started, and it says so (I3, I11)."""
    resident.stop()
    for length in (0, 8, 100):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(resident.path))
            os.chown(resident.path, resident.site.pilot.uid if resident.pilots else -1, -1)
            server.listen()
            running = resident.site.start([resident.site.binary, *RUN, "true"], stderr=subprocess.PIPE)
            taken, _ = server.accept()
            assert len(taken.recv(length)) == length
            taken.close()
            _, err = running.communicate(timeout=20)
        resident.path.unlink()
        assert (running.returncode, b"NW-CHILD" in err) == (202, True)


def test_fifty_requests_at_once_are_all_answered(resident):
    argv = [resident.site.binary, "run", "--profile", "none", "--declare", "subject=/CN=user", "--", "true"]
    running = [resident.site.start(argv, stderr=subprocess.PIPE) for _ in range(50)]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert ended == [(b"", 0)] * 50


def test_strangers_cannot_connect(resident, session):
    need("root")
    stranger = session.accounts["outsider"]
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(resident.path)!r})"
    ran = resident.site.run(["/usr/bin/python3", "-I", "-c", code], user=stranger)
    assert b"PermissionError" in ran.err


def test_second_policyd_refuses_while_the_first_lives(resident):
    second = resident.start(ready=False)
    _, err = second.communicate(timeout=20)
    assert (second.returncode, err.count(b"\n")) == (202, 1)
    assert b"NW-POLICYD" in err
    assert b"served by another" in err
    assert resident.site.nodewrap(*RUN, "true").rc == 0


def test_end_is_clean_and_the_socket_goes(resident):
    workers = resident.workers()
    assert resident.stop() == 0
    assert not resident.path.exists()
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    ran = resident.site.nodewrap(*RUN, "true")
    assert ran.rc == 202
    assert b"NW-POLICYD" in ran.err


def test_place_of_a_killed_one_is_taken(resident):
    workers = resident.workers()
    resident.process.kill()
    resident.process.wait()
    assert resident.path.exists()
    resident.process.stderr.close()
    resident.process = resident.start()
    assert resident.site.nodewrap(*RUN, "true").rc == 0
    assert gone(workers)


def gone(pids):
    """True once none of them is there (the kernel kills them, one generation after the other, when their parent is dead)."""
    for _ in range(500):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.01)
    return False


def test_guard_without_a_socket_is_refused(site):
    ran = site.run([site.binary, "policyd", "--guard", site.sysconf / "guard"])
    assert ran.rc == 202
    assert b"has no line 'policyd SOCKET'" in ran.err
