"""``nodewrap escape-test`` as an administrator or a pilot calls it, on a real installation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.files import CHECKOUT
from tests.node import SUBJECT, until
from tests.site import ROOT

WHO = ("--declare", "vo=map", "--declare", f"subject={SUBJECT}")
ONE = ("--mode", "map", "--profile", "strict", *WHO)


@pytest.fixture
def home(node, session):
    """Where the suite works: root's directory when root runs it, else the pilot's."""
    path = (Path("/home") if ROOT else Path.home()) / f"nwt{session.tag}-suite"
    path.mkdir()
    path.chmod(0o755)
    if ROOT and not node.privileged:
        os.chown(path, node.pilot.uid, node.pilot.gid)
    yield path
    shutil.rmtree(path)


def argv(node, home, *words):
    """As root for the setuid launcher, as the pilot for the other one."""
    caller = ["--caller", node.pilot.name] if ROOT and node.privileged else []
    return [node.site.binary, "escape-test", "--home", home, *caller, *words]


def heed():
    """Ctrl-C, also where these tests were started in the background of a shell: it ignores SIGINT for them (POSIX, 2.11)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def who(node):
    return node.site.owner() if ROOT else {}


def run(node, home, *words, timeout=120):
    env = node.site.environment(node.pilot)
    return subprocess.run(argv(node, home, *words), capture_output=True, text=True, cwd="/", env=env, timeout=timeout, check=False, **who(node))


def test_attacks_are_told_and_nothing_is_left(node, home):
    done = run(node, home, "--only", "C01", "--only", "C13", *ONE)
    assert done.returncode == 0, done
    assert "2 attacks, 2 tries: nothing open that is not documented" in done.stdout
    assert os.listdir(home) == []


def test_documented_opening_is_no_failure_and_is_counted(node, home):
    who_only = ("--declare", "vo=log-only", "--declare", f"subject={SUBJECT}")
    done = run(node, home, "--only", "C13", "--mode", "log-only", "--profile", "none", *who_only, "--report", "json")
    found = json.loads(done.stdout[done.stdout.index("{\n") :])["results"]
    assert done.returncode == 0, done
    assert [(one["outcome"], one["accepted"]) for one in found if one["configuration"] != "-"] == [("leaked", "same-id-none")]


@pytest.mark.parametrize("form", ["html", "junit"])
def test_report_is_written_where_it_is_said(node, home, tmp_path_factory, form):
    out = home / "report"
    done = run(node, home, "--only", "C01", *ONE, "--report", form, "--output", out)
    assert done.returncode == 0, done
    assert "C01" in out.read_text()
    if form == "junit":
        assert ET.parse(out).getroot().tag == "testsuites"


def test_as_root_it_works_below_the_state_directory_by_itself(setuid_node):
    words = ["--caller", setuid_node.pilot.name, "--only", "C13", *ONE]
    done = subprocess.run([setuid_node.site.binary, "escape-test", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "1 attacks, 1 tries: nothing open" in done.stdout
    assert not list(setuid_node.site.state.glob("nodewrap-escape-*"))


def test_root_does_not_work_below_a_directory_that_is_the_pilots(setuid_node):
    """Its links would lead root's removals elsewhere."""
    words = ["--caller", setuid_node.pilot.name, "--home", setuid_node.pilot.home, *ONE]
    done = subprocess.run([setuid_node.site.binary, "escape-test", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(":")[0]) == (202, "NW-ESCAPE-HOME")


def test_policy_that_forbids_the_caller_is_told_with_its_own_words(node, home):
    done = run(node, home, "--only", "C01", "--mode", "map", "--profile", "strict", "--declare", "vo=nobody", "--declare", f"subject={SUBJECT}")
    assert (done.returncode, done.stdout) == (202, "")
    assert "left out: nodewrap: NW-" in done.stderr
    assert "NW-ESCAPE-POLICY" in done.stderr


@pytest.mark.parametrize(("words", "status", "code"), [
    (("--only", "Z99"), 201, "NW-USAGE"), (("--only", "c01"), 201, "NW-USAGE"), (("--mode", "nonsense"), 202, "NW-ESCAPE-CONFIGURATION"),
    (("--launcher", "socket"), 202, "NW-ESCAPE-LAUNCHER"),
])
def test_what_cannot_be_chosen_is_told_in_one_line(node, home, words, status, code):
    done = run(node, home, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert code in done.stderr


def test_unknown_pilot_account_is_told(setuid_node, home):
    done = subprocess.run([setuid_node.site.binary, "escape-test", "--caller", "nobody-of-that-name"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(":")[0]) == (202, "NW-ESCAPE-CALLER")


def test_root_is_no_pilot(setuid_node):
    done = subprocess.run([setuid_node.site.binary, "escape-test", "--caller", "root"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(":")[0]) == (202, "NW-ESCAPE-CALLER")


def test_node_without_nodewrap_is_told(tmp_path):
    env = {**os.environ, "NODEWRAP_PREFIX": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-m", "nodewrap", "escape-test"], capture_output=True, text=True, cwd="/", env=env, check=False)
    assert (done.returncode, done.stderr.partition(":")[0]) == (202, "NW-ESCAPE-SITE")


def test_half_an_installation_is_told_and_not_called_safe(node, home):
    """The launcher is gone, the guard is there."""
    aside = node.site.binary.with_name("aside")
    launcher = node.site.prefix / f"libexec/nodewrap/nodewrap-{node.site.launcher}"
    launcher.rename(aside)
    try:
        done = run(node, home, "--only", "C01", *ONE)
    finally:
        aside.rename(launcher)
    assert done.returncode == 202, done
    assert "NW-ESCAPE-POLICY" in done.stderr


def test_interrupted_suite_says_what_it_found_and_leaves_nothing(node, home):
    env = node.site.environment(node.pilot)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv(node, home, "--only", "C", *WHO), cwd="/", env=env, preexec_fn=heed, **pipes, **who(node)) as suite:
        try:
            until(lambda: any(home.glob("nodewrap-escape-*/*")), "an attack is tried")
            suite.send_signal(signal.SIGINT)
            out, err = suite.communicate(timeout=60)
        finally:
            suite.kill()
    assert suite.returncode == 130, (out, err)
    assert "NW-ESCAPE-INTERRUPTED" in err
    assert "tries" in out
    assert os.listdir(home) == []
    until(node.is_clean, "the runs that it had begun have ended")


def test_second_suite_of_the_same_caller_is_refused_while_one_runs(node, home):
    env = node.site.environment(node.pilot)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv(node, home, "--only", "C", *WHO), cwd="/", env=env, preexec_fn=heed, **quiet, **who(node)) as first:
        try:
            until(lambda: any(home.glob("nodewrap-escape-*/*")), "the first one is at work")
            done = run(node, home, "--only", "C01", *ONE)
        finally:
            first.send_signal(signal.SIGINT)
            first.wait(60)
    assert (done.returncode, done.stderr.partition(":")[0]) == (202, "NW-ESCAPE-BUSY")
