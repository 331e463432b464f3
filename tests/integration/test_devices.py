"""Devices by policy: patterns that are looked at when the payload starts, and never anything but character devices."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tests.need import need

OWN = """
[profile.batch]
add = {{ devices = ["{tag}n*?", "{tag}d/*?", "{tag}d/render1?", "{tag}late*?"] }}
"""
LOOK = r"""
import json, os, stat
found = {}
for top, _, names in os.walk("/dev"):
    for name in names:
        path = f"{top}/{name}"
        if "TAG" in path:
            info = os.stat(path)
            with open(path, "r+b", 0) as file:
                found[path[5:]] = [stat.S_ISCHR(info.st_mode), file.write(b"x"), os.fstatvfs(file.fileno()).f_flag & os.ST_NOEXEC != 0]
print(json.dumps(found))
"""


@pytest.fixture
def tag():
    """Nodes of /dev/null's kind in the machine's own /dev, under names of this test; a link, a file and a block device among them."""
    need("root")
    tag = f"nwt{os.getpid()}"
    top = Path("/dev") / f"{tag}d"
    paths = [Path(f"/dev/{tag}n0"), Path(f"/dev/{tag}n1"), top / "render1", top / "card0"]
    other = [Path(f"/dev/{tag}nlink"), Path(f"/dev/{tag}nfile"), Path(f"/dev/{tag}nblock"), Path(f"/dev/{tag}x")]
    try:
        top.mkdir()
        try:
            for path in paths:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
                path.chmod(0o666)
            os.mknod(other[2], stat.S_IFBLK | 0o600, os.makedev(7, 250))
            os.mknod(other[3], stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("needs CAP_MKNOD")
        other[0].symlink_to(other[3])
        other[1].touch()
        yield tag
    finally:
        for path in [*paths, *other, *Path("/dev").glob(f"{tag}late*")]:
            path.unlink(missing_ok=True)
        top.rmdir()


@pytest.fixture
def given(node, tag):
    node.site.policy(node.policy_text() + OWN.format(tag=tag))
    yield node
    node.open_policy()


def test_a_pattern_gives_the_character_devices_that_are_there_when_the_payload_starts(given, tag):
    code = LOOK.replace("TAG", tag)
    works = [True, 1, True]
    now = {f"{tag}n0": works, f"{tag}n1": works, f"{tag}d/render1": works, f"{tag}d/card0": works}
    assert given.python("log-only", code) == now
    os.mknod(f"/dev/{tag}late0", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(f"/dev/{tag}late0", 0o666)
    assert given.python("log-only", code) == {**now, f"{tag}late0": works}


def test_a_name_that_has_become_a_block_device_is_refused(setuid_node, tag):
    node = setuid_node
    name = Path(f"/dev/{tag}n0")
    node.site.policy(node.policy_text() + f'\n[profile.batch]\nadd = {{ devices = ["{tag}n0"] }}\n')
    try:
        assert list(node.python("log-only", LOOK.replace("TAG", tag))) == [f"{tag}n0"]
        name.unlink()
        os.mknod(name, stat.S_IFBLK | 0o666, os.makedev(7, 250))
        ran = node.run("log-only", "/bin/true")
        assert (ran.rc, b"is no character device" in ran.err) == (202, True), ran
    finally:
        node.open_policy()


def test_the_example_for_gpus_is_a_policy_that_can_be_applied(node):
    example = (Path(__file__).parents[2] / "policies/gpu.toml").read_text()
    node.site.policy(node.policy_text().replace('"batch"', '"batch", "gpu"') + example)
    node.open_guard(allow=["log-only batch gpu"])
    try:
        code = "import json, os; print(json.dumps([os.path.exists('/dev/null'), os.path.exists('/sys')]))"
        assert node.python("log-only", code, profile="gpu") == json.loads("[true, true]")
    finally:
        node.open_guard()
        node.open_policy()
