"""A node that permits everything, for the tests of the launchers. After each test nothing of its payloads may be left."""

from __future__ import annotations

import pytest

from tests.conftest import installation
from tests.node import Node


def opened(session, launcher):
    site = installation(session, launcher)
    node = Node(site)
    yield node
    node.close()
    left = node.leftovers()
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
