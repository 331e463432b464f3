"""Linters are tests: one command checks everything (tests/lint)."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.files import CHECKOUT as ROOT
from tests.files import checkout_files
from tests.need import need, search_path


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tracked():
    """tracked(*globs): the checkout's files that match one of the globs."""
    files = checkout_files()
    return lambda *globs: [file for file in files if any(file.relative_to(ROOT).match(glob) for glob in globs)]


@pytest.fixture
def clean():
    """clean(program, *args): run it in the checkout; anything but exit status 0 fails with what it printed."""

    def run(program, *args, stdin=None):
        need(program)
        argv = [*map(str, (program, *args))]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, input=stdin, env={**os.environ, "PATH": search_path()})
        if done.returncode != 0:
            pytest.fail(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
        return done.stdout

    return run
