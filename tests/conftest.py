"""Fixtures shared by all tests: the machine's throw-away installations and accounts."""

from __future__ import annotations

import os
import signal

import pytest

from tests.need import need
from tests.site import Session


@pytest.fixture(scope="session")
def session():
    """The session's accounts and installations; taken back at the end, also after a failure, Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM", returncode=143))
    made = Session()
    yield made
    made.close()


def installation(session, launcher):
    need(*{"setuid": ["root"], "userns": ["userns"]}[launcher])
    return session.site(launcher)


@pytest.fixture(params=["setuid", "userns"])
def site(request, session):
    """An installation, once for each launcher. The guard is put back afterwards."""
    made = installation(session, request.param)
    yield made
    made.reset()


@pytest.fixture
def setuid_site(session):
    """The installation with the setuid launcher: what needs account switching."""
    made = installation(session, "setuid")
    yield made
    made.reset()


@pytest.fixture
def userns_site(session):
    """The installation with the unprivileged launcher."""
    made = installation(session, "userns")
    yield made
    made.reset()


@pytest.fixture
def pilot(session):
    """The account that calls nodewrap: a member of the callers' group."""
    return session.accounts["pilot"]


def pytest_report_header():
    strict = os.environ.get("NODEWRAP_MUST_WORK", "0") not in ("", "0")
    who = "root" if os.geteuid() == 0 else "not root: tests that switch accounts are left out"
    return f"nodewrap: {who}; a missing capability is {'a failure' if strict else 'a skip'}"
