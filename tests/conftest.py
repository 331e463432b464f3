"""Fixtures shared by all tests: the machine's throw-away installations and accounts."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.need import MUST_WORK, need
from tests.site import Session

# A loaded machine, or a core under ASan, is slow but not wrong. A build machine sees the same examples each time; elsewhere they vary and find more.
settings.register_profile("nodewrap", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=MUST_WORK)
settings.load_profile("nodewrap")


def pytest_collection_finish():
    """Thousands of tests are there to stay: looked through again and again, they would keep a test waiting for 50 ms in the middle."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fuse_for_everybody():
    """/dev/fuse as udev has it (50-udev-default.rules: 0666), also where there is no udev: the kernel makes it 0600 (fs/fuse/dev.c). Put back."""
    device = Path("/dev/fuse")
    mode = stat.S_IMODE(device.stat().st_mode) if os.geteuid() == 0 and device.is_char_device() else 0o666
    if mode != 0o666:
        device.chmod(0o666)
    yield
    if mode != 0o666:
        device.chmod(mode)


@pytest.fixture(scope="session")
def session():
    """The session's accounts and installations; taken back at the end, also after a failure, Ctrl-C or SIGTERM."""
    if "NODEWRAP_TEST_SESSION" in os.environ:  # made outside of the machine that we are in (tests/kernel), which forgets everything at its end
        yield pickle.loads(Path(os.environ["NODEWRAP_TEST_SESSION"]).read_bytes())
        return
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
    who = "root" if os.geteuid() == 0 else "not root: tests that switch accounts are left out"
    return f"nodewrap: {who}; a missing capability is {'a failure' if MUST_WORK else 'a skip'}"
