"""Who the payload is by name: /etc/passwd and /etc/group of every profile with a root of its own say the same as its ids and its environment."""

from __future__ import annotations

import os
import pwd

import pytest

from tests.node import KINDS

LOOK = r"""
import grp, json, os, pwd
me, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
def writable(path):
    try:
        open(path, "a").close()
    except OSError:
        return False
    return True
print(json.dumps({
    "uid": os.getuid(), "name": me.pw_name, "gid": me.pw_gid, "home": me.pw_dir, "group": group.gr_gid, "by name": pwd.getpwnam(me.pw_name).pw_uid,
    "environment": [os.environ[name] for name in ("USER", "LOGNAME", "HOME")], "root": [pwd.getpwuid(0).pw_name, grp.getgrgid(0).gr_name],
    "writable": [path for path in ("/etc/passwd", "/etc/group", "/etc/new") if writable(path)],
    "names": [line.partition(":")[0] for line in open("/etc/passwd")],
    "uids": [line.split(":")[2] for line in open("/etc/passwd") if line.count(":") > 5],
}))
"""
CASES = [(launcher, kind, profile) for launcher, kinds in KINDS.items() for kind in kinds for profile in ("strict", "batch")
         if (launcher, kind) != ("userns", "block")]  # wants a delegated range


def look(node, kind, **more):
    """What the payload sees. Where /etc is the host's (batch) the kernel takes our file off its name when the host replaces its own (rename(2) of a
    place that is a mount point elsewhere): useradd of another session does that, and then it is looked at again."""
    for _ in range(5):
        before = [os.stat(path).st_ino for path in ("/etc/passwd", "/etc/group")]
        found = node.python(kind, LOOK, **more)
        if before == [os.stat(path).st_ino for path in ("/etc/passwd", "/etc/group")]:
            break
    return found


@pytest.mark.parametrize(("launcher", "kind", "profile"), CASES)
def test_the_payload_finds_itself_by_uid_with_the_name_and_home_of_its_environment(request, launcher, kind, profile):
    node = request.getfixturevalue(f"{launcher}_node")
    found = look(node, kind, profile=profile)
    assert [found["name"], found["name"], found["home"]] == found["environment"]
    assert (found["by name"], found["gid"]) == (found["uid"], found["group"])
    if kind in ("map", "block"):
        assert found["name"] == "payload"
    elif kind == "log-only":
        assert found["name"] == node.pilot.name
    assert found["root"] == ["root", "root"]
    assert {"root", node.pilot.name} <= set(found["names"])
    assert found["writable"] == []


def test_the_host_entry_of_the_same_number_comes_second(setuid_node):
    """In mode map uid 1000 is the payload, whoever has that number on the node."""
    user = setuid_node.site.accounts["user1"]
    policy = setuid_node.policy_text().replace('{ mode = "map" }', f'{{ mode = "map", inside_uid = {user.uid}, inside_gid = {user.gid} }}')
    setuid_node.site.policy(policy)
    try:
        found = look(setuid_node, "map")
    finally:
        setuid_node.open_policy()
    assert (found["uid"], found["name"]) == (user.uid, "payload")
    assert found["uids"].count(str(user.uid)) == 2


@pytest.mark.parametrize("home", ["/a\nroot::0:0::/:/bin/sh", "/a:b", "relative", "/" + "x" * 300, ""])
def test_a_home_that_is_no_field_of_the_file_makes_no_line_of_its_own(node, home):
    found = look(node, "map", options=["--env", f"HOME={home}"])
    assert (found["home"], found["by name"]) == ("/", found["uid"])
    assert found["root"] == ["root", "root"]
    assert found["uids"].count("0") == sum(entry.pw_uid == 0 for entry in pwd.getpwall())
