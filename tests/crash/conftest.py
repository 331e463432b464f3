"""What the crash matrix and the soak share."""

from __future__ import annotations

import os

import pytest

from tests.crash.cases import Tools
from tests.need import need


@pytest.fixture(scope="session")
def tools(session):
    """nth, the payload and a proxy, made once."""
    need("root", "cc")
    if os.uname().machine != "x86_64":
        pytest.skip("nth.c knows the registers of x86-64 alone")
    return Tools(session.top)
