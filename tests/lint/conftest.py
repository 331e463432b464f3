"""Linters are tests: one command checks everything (tests/lint)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.need import need, search_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tracked():
    """tracked(*globs): the files that git knows or would add, matching one of the globs."""
    need("git")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    return lambda *globs: [file for file in files if any(file.relative_to(ROOT).match(glob) for glob in globs)]


@pytest.fixture
def clean():
    """clean(program, *args): run it in the checkout; anything but exit status 0 fails with what it printed."""

    def run(program, *args, stdin=None):
        need(program)
        argv = [program, *map(str, args)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, input=stdin, env={**os.environ, "PATH": search_path()})
        if done.returncode != 0:
            pytest.fail(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
        return done.stdout

    return run
