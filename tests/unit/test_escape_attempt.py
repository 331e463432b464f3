"""Attacks that hang, die, leave processes or fill the disk: each is bounded, the next one runs. In processes of their own: it ends its children."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.files import CHECKOUT

CODE = """
import json, os, signal, sys, time
from nodewrap.escape.attempt import adopt_orphans, attempt, children
from nodewrap.escape.arena import Arena, NotRunError
from nodewrap.escape.model import Attack, Caller, Seen
from nodewrap.escape.wrappers import Wrapper, controls
from pathlib import Path

def hang(arena):
    time.sleep(1000)

def die(arena):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(arena):
    raise ValueError("nonsense")

def no_answer(arena):
    raise NotRunError("policy says no")

def answer(arena):
    return Seen(True, "it was")

def daemon(arena):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    os.wait()
    return Seen(False, "one was left")

def bomb(arena):
    for _ in range(50):
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
    return Seen(False, "fifty were left")

def refused(arena):
    arena.wrapper = Wrapper("refuses", lambda *_: ["/bin/false"])
    arena.begin("/bin/true").end()
    return Seen(False, "nothing came out")

def started(arena):
    refused(arena)
    arena.wrapper = Wrapper("starts", lambda words, *_: list(words))
    arena.begin("/bin/true").end()
    return Seen(False, "nothing came out")

def fill(arena):
    with open(arena.home / "big", "wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    return Seen(True, "it took a terabyte")

adopt_orphans()
home = Path(sys.argv[2])
home.mkdir()
caller = Caller("me", os.getuid(), os.getgid(), (), str(home))
attack = Attack("C01", globals()[sys.argv[1]], "", seconds=1.0 if sys.argv[1] == "hang" else 30.0)
got = attempt(attack, lambda: Arena(controls(caller, None)["bare"], True, caller, home), settle=False)
print(json.dumps([got.seen, got.error, len(got.left), len(children())]))
"""


def tried(name, home):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CODE, name, home], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "error"), [
    ("hang", "broken: not done in 1 s"), ("die", "broken: it died without a word"), ("fail", "broken: ValueError: nonsense"),
    ("no_answer", "not run: policy says no"), ("fill", "broken: OSError: [Errno 27] File too large"),
])
def test_try_without_an_answer_says_why_and_leaves_nothing(tmp_path, name, error):
    seen, said, left, alive = tried(name, tmp_path / "home")
    assert (seen, left, alive) == (None, 0, 0)
    assert said.startswith(error)


def test_attack_none_of_whose_payloads_started_is_not_stopped_but_not_run(tmp_path):
    seen, said, _, _ = tried("refused", tmp_path / "refused")
    assert (seen, said) == (None, "not run: no payload started: nothing came out")
    assert tried("started", tmp_path / "started")[:2] == [[False, "nothing came out"], ""]


def test_answer_comes_through(tmp_path):
    assert tried("answer", tmp_path / "home") == [[True, "it was"], "", 0, 0]


@pytest.mark.parametrize(("name", "many"), [("daemon", 1), ("bomb", 50)])
def test_what_outlives_a_try_is_named_and_ended(tmp_path, name, many):
    seen, _, left, alive = tried(name, tmp_path / "home")
    assert (seen[0], left, alive) == (False, many, 0)
