"""The nodes of the integration tests, attacked."""

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import node, setuid_node, userns_node  # noqa: F401 (fixtures)
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
