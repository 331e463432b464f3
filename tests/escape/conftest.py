"""The nodes of the integration tests, attacked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import delegated, node, setuid_node, userns_node  # noqa: F401 (fixtures)
from tests.site import ROOT


@pytest.fixture
def home(session):
    """A directory of the pilot's outside what profiles show, which payloads may pass; gone with the test, whatever it left."""
    path = (Path("/home") if ROOT else Path.home()) / f"nwt{session.tag}-escape"
    path.mkdir()
    path.chmod(0o755)
    os.chown(path, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def delegated_cgroup(setuid_node):  # noqa: F811
    """make(name): a cgroup of the pilot's below the tests', as batch systems delegate them."""
    (base,) = setuid_node.site.read_guard().get("cgroup") or [None]
    if not base:
        pytest.skip("no cgroup2 on this node")
    made = []

    def make(*names):
        path = Path(base)
        for name in names:
            path = path / name
            path.mkdir()
            made.append(path)
            os.chown(path, setuid_node.pilot.uid, setuid_node.pilot.gid)
        return path

    yield make
    for path in reversed(made):
        for below in filter(Path.is_dir, path.iterdir()):
            below.rmdir()
        path.rmdir()


def inside(where, group, argv, *before):
    """argv started as the pilot of that node in that group -> Popen. before: words of a program that root runs it by, and that becomes the pilot."""
    pilot = where.pilot
    become = before or ("setpriv", f"--reuid={pilot.uid}", f"--regid={pilot.gid}", f"--groups={','.join(map(str, pilot.groups))}")
    words = ["/bin/sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', group, *become, *argv]
    return subprocess.Popen(list(map(os.fspath, words)), env=where.site.environment(pilot), cwd="/")
