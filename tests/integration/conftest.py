"""A node that permits everything, for the tests of the launchers. After each test nothing of its payloads may be left."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import threading
from pathlib import Path

import pytest

from tests import c
from tests.conftest import installation
from tests.need import need
from tests.node import BLOCK, DELEGATED, V2, Node, until
from tests.site import ROOT, account_command


def opened(session, launcher):
    site = installation(session, launcher)
    node = Node(site)
    yield node
    node.close()
    left = node.settled()
    node.forget()
    site.reset()
    assert not any(left.values()), left


@pytest.fixture(params=["setuid", "userns"])
def node(request, session):
    """Both launchers, one after the other."""
    yield from opened(session, request.param)


@pytest.fixture
def setuid_node(session):
    yield from opened(session, "setuid")


@pytest.fixture
def userns_node(session):
    yield from opened(session, "userns")


@pytest.fixture
def delegated(session):
    """The pilot has a range of subordinate ids, as useradd gives it to people. (first, count)"""
    need("root")
    first, name = DELEGATED, session.accounts["pilot"].name
    span = f"{first}-{first + BLOCK - 1}"
    account_command("usermod", "--add-subuids", span, "--add-subgids", span, name)
    yield first, BLOCK
    account_command("usermod", "--del-subuids", span, "--del-subgids", span, name)


@pytest.fixture(scope="session")
def home(session):
    """A directory of the pilot's where pilots have theirs: the session's own are in /opt, which profiles show. Open to who knows a name in it."""
    path = (Path("/home") if ROOT else Path.home()) / f"nwt{session.tag}-home"
    path.mkdir()
    path.chmod(0o711)
    os.chown(path, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield path
    shutil.rmtree(path)


CPU_V1 = Path("/sys/fs/cgroup/cpu")


class Job:
    """The groups of a batch job, in cgroup v2 and in one hierarchy of v1 where the node has that. Who uses it as a context is in them meanwhile."""

    def __init__(self):
        name = f"nwtest-job-{os.getpid()}"
        self.v2 = V2 / name
        self.groups = [self.v2] + [CPU_V1 / name] * (CPU_V1 / "tasks").exists()
        for group in self.groups:
            group.mkdir()

    def __enter__(self):
        for group in self.groups:
            (group / "cgroup.procs").write_text("0")

    def __exit__(self, *_):
        for group in self.groups:
            (group.parent / "cgroup.procs").write_text("0")

    def kill(self):
        (self.v2 / "cgroup.kill").write_text("1")

    def close(self):
        self.kill()
        for group in self.groups:
            until(lambda group=group: not (group / "cgroup.procs").read_text(), "the job is empty")
            for left in [*group.glob("nodewrap-*"), group]:
                left.rmdir()

    def used_us(self):
        """Microseconds that the job has been on a processor."""
        (line,) = [line for line in (self.v2 / "cpu.stat").read_text().splitlines() if line.startswith("usage_usec")]
        return int(line.split()[1])


@pytest.fixture
def job():
    need("root", "cgroup2")
    made = Job()
    yield made
    made.close()


@pytest.fixture(scope="session")
def audit_probe(tmp_path_factory):
    """csrc/audit.c as a program of its own (tests/c/audit_probe.c); it waits for the locks one second, not thirty."""
    need("gcc")
    return c.build("audit_probe", c.AUDIT, tmp_path_factory.mktemp("probe"), ["-DPATIENCE_MS=1000", "-Wl,--wrap=clock_gettime"])


@pytest.fixture
def private():
    """An empty directory on a path that only its owner may write, as records want it: /tmp is none."""
    path = Path.home() / f"nw-test-{os.getpid()}"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


class Syslog:
    """The node's /dev/log, as long as a test runs, read all the time: the kernel keeps ten messages, and the machine's other sessions send some.
    lines(): what came since the last call."""

    def __init__(self):
        self.socket, self.lock, self.found, self.ended = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), threading.Lock(), [], threading.Event()
        self.socket.setblocking(False)
        self.socket.bind("/dev/log")
        os.chmod("/dev/log", 0o666)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        while not self.ended.is_set():
            select.select([self.socket], [], [], 0.1)
            self._drain()

    def _drain(self):
        with self.lock, contextlib.suppress(BlockingIOError):
            while True:
                self.found.append(self.socket.recv(1 << 16))

    def lines(self):
        self._drain()
        with self.lock:
            found, self.found = self.found, []
        return found

    def close(self):
        os.unlink("/dev/log")
        self.ended.set()
        self.reader.join()
        self.socket.close()


@pytest.fixture
def syslog():
    need("root")
    if os.path.lexists("/dev/log"):
        pytest.skip("this node has a syslog of its own at /dev/log")
    made = Syslog()
    yield made
    made.close()
