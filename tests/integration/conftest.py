"""A node that permits everything, for the tests of the launchers. After each test nothing of its payloads may be left."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.conftest import installation
from tests.need import need
from tests.node import BLOCK, DELEGATED, Node
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


class Syslog:
    """The node's /dev/log, as long as a test runs. lines(): what came meanwhile."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind("/dev/log")
        os.chmod("/dev/log", 0o666)

    def lines(self):
        found = []
        while True:
            try:
                found.append(self.socket.recv(1 << 16))
            except BlockingIOError:
                return found

    def close(self):
        os.unlink("/dev/log")
        self.socket.close()


@pytest.fixture
def syslog():
    need("root")
    if os.path.lexists("/dev/log"):
        pytest.skip("this node has a syslog of its own at /dev/log")
    made = Syslog()
    yield made
    made.close()
