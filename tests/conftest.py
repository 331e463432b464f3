"""Fixtures shared by all tests: the machine's throw-away installations and accounts."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.files import CHECKOUT
from tests.need import MUST_WORK, missing, need
from tests.site import Session

# A loaded machine, or a core under ASan, is slow but not wrong. A build machine sees the same examples each time; elsewhere they vary and find more.
settings.register_profile("nodewrap", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=MUST_WORK)
settings.load_profile("nodewrap")


#: Tests that touch nothing of the machine, beside which the escape suite does its work; then come those that look at its results.
ALONE = ("unit", "property", "differential", "lint")
SUITE = "test_escape_suite.py"


def pytest_collection_modifyitems(items):
    def rank(item):
        return 0 if item.path.relative_to(CHECKOUT / "tests").parts[0] in ALONE else 1 if item.path.name == SUITE else 2

    items.sort(key=rank)


def pytest_collection_finish():
    """Thousands of tests are there to stay: looked through again and again, they would keep a test waiting for 50 ms in the middle."""
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM", returncode=143))  # so that what was made is taken back


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


@pytest.fixture(scope="session", autouse=True)
def escape_suite(request, fuse_for_everybody, tmp_path_factory):
    """The suite in a process of its own, as it ends all that descends from it, with its own accounts and installations. What is given waits for it
    and returns its results as in the JSON report; None where no test asks for them."""
    if not any(item.path.name == SUITE for item in request.session.items) or missing("userns"):
        yield None
        return
    where = tmp_path_factory.mktemp("escape")
    ready = os.environ.get("NODEWRAP_TEST_SESSION")
    how = ["--each-mode-once", "--report", "json", "--output", where / "out", *(["--session", ready] if ready else [])]
    with open(where / "said", "w") as said:
        end = not_a_child([sys.executable, "-m", "tests.escape.suite", *map(str, how)], said)

    def results():
        assert select.select([end], [], [], 1500)[0], "the escape suite has not ended after 25 minutes"
        assert (where / "out").exists(), (where / "said").read_text()[-6000:]
        return json.loads((where / "out").read_text())["results"]

    try:
        yield results
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(end, signal.SIGTERM)  # it takes back what it made
        select.select([end], [], [], 120)
        os.close(end)


def not_a_child(argv, output):
    """Starts it in a session of its own and returns its pidfd. Tests look at all that descends from them, and wait for any child."""
    code = "import os, sys\npid = os.fork()\nif pid:\n  print(pid)\nelse:\n  os.setsid(); os.dup2(2, 1); os.execv(sys.argv[1], sys.argv[1:])"
    starter = [sys.executable, "-c", code, *argv]
    told = subprocess.run(starter, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output, check=True)
    return os.pidfd_open(int(told.stdout))


@pytest.fixture(scope="session")
def session():
    """The session's accounts and installations; taken back at the end, also after a failure, Ctrl-C or SIGTERM."""
    if "NODEWRAP_TEST_SESSION" in os.environ:  # made outside of the machine that we are in (tests/kernel), which forgets everything at its end
        yield pickle.loads(Path(os.environ["NODEWRAP_TEST_SESSION"]).read_bytes())
        return
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
