"""Acting in the name of another uid: only when the process has really become it."""

from __future__ import annotations

import os

import pytest

from nodewrap.deep.owner import as_owner
from tests.need import need


def test_who_did_not_become_the_owner_does_nothing_in_its_name(monkeypatch, tmp_path):
    """Filters of containers answer "done" and do nothing ("fake root"): kill(-1) as such an owner would be root's."""
    need("root")
    assert as_owner(61234, 61234, os.getuid) == 61234
    monkeypatch.setattr(os, "setresuid", lambda *ids: None)
    with pytest.raises(OSError, match="became uid 61234"):
        as_owner(61234, 61234, lambda: (tmp_path / "touched").touch())
    assert not (tmp_path / "touched").exists()
