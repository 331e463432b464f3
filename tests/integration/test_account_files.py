"""Who the payload is by name: /etc/passwd and /etc/group of every profile with a root of its own say the same as its ids and its environment."""

from __future__ import annotations

import os
import pwd
import subprocess

import pytest

from tests.need import need
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


def versions():
    """Which files the host has there. With their times: the second of two replacements is often given the inode of the file before the first."""
    return [(info.st_ino, info.st_ctime_ns) for info in map(os.stat, ("/etc/passwd", "/etc/group"))]


def look(node, kind, **more):
    """What the payload sees. Where /etc is the host's (batch) the kernel takes our file off its name when the host replaces its own (rename(2) of a
    place that is a mount point elsewhere): useradd of another session does that, and then it is looked at again."""
    for _ in range(5):
        before = versions()
        found = node.python(kind, LOOK, **more)
        if before == versions():
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


#: Makes a copy of /etc in /mnt. cp(1) fails for a file that is gone when it comes to it, as those are that useradd has there for a moment.
COPY = "mount -t tmpfs none /mnt && { cp -a /etc/. /mnt 2>/dev/null; test -s /mnt/passwd && test -s /mnt/group; }"
#: Replaces the account files of an /etc of its own for ever. In the mount namespace that argv's other words run in, as the pilot.
RENEW = f"""
import os, subprocess, sys
subprocess.run("{COPY} && mount --bind /mnt /etc", shell=True, check=True)
child = os.fork()
while child == 0:
    for name in ("/etc/passwd", "/etc/group"):
        with open(name, "rb") as old, open(name + ".new", "wb") as new:
            new.write(old.read())
        os.replace(name + ".new", name)
codes = [subprocess.run(sys.argv[1:], stdout=2).returncode for _ in range(30)]
os.kill(child, 9)
print(codes)
"""


def as_pilot(node):
    """Words of a program that becomes the pilot, whatever is in the account files."""
    return ["setpriv", f"--reuid={node.pilot.uid}", f"--regid={node.pilot.gid}", f"--groups={','.join(map(str, node.pilot.groups))}"]


def test_account_files_that_are_replaced_at_that_moment_are_no_obstacle(setuid_node):
    """What was to be mounted on had no name any more: one of some runs that began beside useradd(8) was NW-MOUNT."""
    need("unshare")
    words = ["unshare", "-m", "/usr/bin/python3", "-I", "-c", RENEW, *as_pilot(setuid_node), *map(str, setuid_node.argv("log-only", ["/bin/true"]))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=setuid_node.site.environment(setuid_node.pilot), cwd="/")
    assert done.stdout == f"{[0] * 30}\n", done.stderr


@pytest.mark.parametrize(
    ("call", "kind"), [("poll", "log-only"), ("poll", "map"), ("flock", "map"), ("flock", "block"), ("clone", "map"), ("clone", "static")],
)
def test_reason_of_an_init_that_has_ended_is_not_lost(setuid_node, call, kind):
    """On a busy node it was gone before the launcher looked, which then said that init had ended or hung. Here each call of that name comes late: of
    clone(2) the payload's, and init's word crosses the launcher's; of flock(2) the log's: by then the payload's request for its ids lies there."""
    need("unshare", "strace")
    hide = f'{COPY} && rm /mnt/group && mount --bind /mnt /etc && exec "$@"'
    late = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:delay_enter=100000", *as_pilot(setuid_node)]
    words = ["unshare", "-m", "/bin/sh", "-c", hide, "sh", *late, *map(str, setuid_node.argv(kind, ["/bin/true"]))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=setuid_node.site.environment(setuid_node.pilot), cwd="/")
    assert (done.returncode, done.stderr.split(": ")[1:3]) == (202, ["NW-MOUNT", "cannot make /etc/group"]), done.stderr


@pytest.mark.parametrize("kind", ["map", "static"])
def test_reason_of_an_init_that_gives_up_at_once_is_not_lost(setuid_node, kind):
    """Before the launcher's word, which then lies unread in its socket: the reader of the reason gets ECONNRESET first."""
    need("strace")
    late = ["strace", "-f", "-o", "/dev/null", "-e", "trace=poll,pipe2", "-e", "inject=poll:delay_enter=50000", "-e", "inject=pipe2:error=EMFILE"]
    words = [*late, *as_pilot(setuid_node), *map(str, setuid_node.argv(kind, ["/bin/true"]))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=setuid_node.site.environment(setuid_node.pilot), cwd="/")
    # Why is said in the C library's words.
    assert (done.returncode, done.stderr.split(": ")[:3]) == (202, ["nodewrap", "NW-INIT", "no process for the payload"])
