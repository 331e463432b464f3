"""nodewrap in containers, and containers in payloads (I20): whole pilots run in one, and payloads bring theirs."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from tests import container
from tests.need import need
from tests.node import KINDS, PROFILES

#: Ends with 7 and leaves a process, a file, and what it saw: its id, and how many processes.
PAYLOAD = '''sleep 98765 & id -u >out; ls /proc | grep -c "^[0-9]" >>out
ln -s out inside; ln -s home/out through; ln -s /etc/passwd outside; mkfifo fifo; exit 7'''
#: Runs its arguments; then tells, still in the container, which processes of the payload are left there.
IN_CONTAINER = """
"$@"; rc=$?
for one in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$one; echo; done 2>/dev/null | grep -x 'sleep 98765 '
exit $rc
"""
UNSHARE = ("unshare", "-Urpf", "--mount-proc")
BWRAP = ("bwrap", "--unshare-user", "--unshare-pid", "--die-with-parent", "--dev-bind", "/", "/", "--proc", "/proc")
#: What experiments start inside a payload, and what pid 1 of it sees.
SANDBOXES = {
    "unshare": UNSHARE, "bwrap": ("bwrap", "--unshare-all", "--share-net", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
    "bwrap-own-net": ("bwrap", "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
                      "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
}


CONTAINERS = ("bwrap", "unshare", "self", "apptainer")


@pytest.fixture
def work(home, session):
    path = home / "nested"
    path.mkdir()
    os.chown(path, session.accounts["pilot"].uid, session.accounts["pilot"].gid)
    yield path
    shutil.rmtree(path)


def outer(node, name, work):
    """The container around nodewrap, as words before its command line."""
    if name == "self":  # state and log must be writable: the inner run has its own lease and records
        need("root")  # an ordinary user's installation is in its home, which batch does not show
        return list(map(os.fspath, node.argv("log-only", (), "batch", ["--workdir", work, "--expose", node.site.prefix / "var"])))
    if name == "apptainer":
        image = next(work.parent.glob("node-image"), None) or container.node_tree(work.parent / "node-image")
        binds = container.node_binds(node.site.session.top, work.parent)
        return [os.fspath(container.program()), "--quiet", "exec", "-C", "--no-home", "--pwd", os.fspath(work), *binds, os.fspath(image)]
    need(name)
    return list({"unshare": UNSHARE, "bwrap": BWRAP}[name])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["map", "log-only"])
@pytest.mark.parametrize("box", CONTAINERS)
def test_launcher_without_privilege_runs_and_cleans_inside_a_container(userns_node, work, box, kind, profile):
    node = userns_node
    (work / "home").symlink_to("..")  # the pilot's own, which stays where the kernel can be asked what leads through it
    time.sleep(0.05)
    if box == "unshare":  # the pilot is root there
        node.site.policy(node.policy_text().replace(f'account = ["{node.pilot.name}"]', f'account = ["{node.pilot.name}", "root"]'))
    inner = list(map(os.fspath, node.argv(kind, ["/bin/sh", "-c", PAYLOAD], profile, ["--workdir", work])))
    ran = node.site.run([*outer(node, box, work), "/bin/sh", "-c", IN_CONTAINER, "sh", *inner], cwd=work)
    assert (ran.rc, ran.err, ran.out) == (7, b"", b"")
    uid, processes = (work / "out").read_text().split()
    assert uid == ("1000" if kind == "map" else "0" if box == "unshare" else str(node.pilot.uid))
    assert profile == "none" or int(processes) <= 5
    assert (work / "out").stat().st_uid == node.pilot.uid
    left = sorted(os.listdir(work))
    assert left == (["inside", "out", "through"] if box == "self" else ["home", "inside", "out"])
    assert not (work / "through").exists()
    ends = [record for record in ran.records if record["event"]["action"] == "cleanup"]
    assert len(ends) == (2 if box == "self" else 1)


def test_range_of_ids_that_a_container_does_not_have_is_not_asked_for(userns_node, delegated, work):
    """The host's /etc/subuid is there, its ids are not (user_namespaces(7)): newuidmap would refuse, and one id is to be had."""
    node = userns_node
    inner = list(map(os.fspath, node.argv("map", ["/bin/cat", "/proc/self/uid_map"], "batch", ["--workdir", work])))
    ran = node.site.run([*outer(node, "bwrap", work), "/bin/sh", "-c", IN_CONTAINER, "sh", *inner], cwd=work)
    assert (ran.rc, ran.err, ran.text.split()) == (0, b"", ["1000", str(node.pilot.uid), "1"])


@pytest.mark.parametrize("box", CONTAINERS)
def test_doctor_tells_in_the_container_what_runs_there(userns_node, work, box):
    """The same as outside: all of it, but what the kernel lacks (Landlock before Linux 6.12)."""
    node = userns_node
    inside, outside = (states(node.site.run([*box_of, node.site.binary, "doctor", "--json"], cwd=work)) for box_of in (outer(node, box, work), ()))
    assert inside == outside
    assert set(inside) == set(PROFILES)
    assert "no" not in inside.values()


def states(doctors):
    """{profile: state} of mode log-only."""
    cells = json.loads(doctors.out)["matrix"]
    return {cell["profile"]: cell["state"] for cell in cells if (cell["launcher"], cell["mode"]) == ("userns", "log-only")}


def payloads():
    for launcher, kinds in KINDS.items():
        yield from (pytest.param(launcher, kind, id=f"{launcher}-{kind}") for kind in kinds)


@pytest.mark.parametrize(("launcher", "kind"), list(payloads()))
def test_containers_work_in_a_batch_payload_and_not_in_a_strict_one(request, launcher, kind):
    need("bwrap", "unshare")
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    node = request.getfixturevalue(f"{launcher}_node")
    script = "".join(f"{' '.join(words)} sh -c 'test $(ls /proc | grep -c \"^[0-9]\") -le 5 && echo {name}'\n" for name, words in SANDBOXES.items())
    assert node.sh(kind, script, profile="batch").text.split() == list(SANDBOXES)
    assert node.sh(kind, script, profile="compat").text.split() == list(SANDBOXES)
    strict = node.sh(kind, script, profile="strict")
    assert strict.out == b""
    assert strict.err.count(b"ermi") == len(SANDBOXES), strict.err  # "not permitted", "No permissions": each was really tried


@pytest.fixture
def busybox(home):
    """The directory of a tiny image, where no profile shows it."""
    container.program()
    path = container.tree(home / "busybox")
    yield path
    shutil.rmtree(path)


def with_apptainer(node, top):
    """The payload sees the tests' Apptainer, and may bring images that are below top."""
    text = node.policy_text().replace('"batch", "strict"]\n', f'"batch", "strict"]\nimage = "{top}/*"\n')
    shown = container.profile() + container.profile("strict")
    node.site.policy(f'{text}\n[apptainer]\nprogram = "{container.program()}"\n{shown}')


@pytest.mark.parametrize(("launcher", "kind"), list(payloads()))
def test_payloads_own_apptainer_contains_everything_in_batch_and_nothing_in_strict(request, busybox, work, launcher, kind):
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    node = request.getfixturevalue(f"{launcher}_node")
    with_apptainer(node, work.parent)
    shutil.copytree(busybox, work / "image", symlinks=True)
    for top, _, _ in os.walk(work / "image"):
        os.chown(top, node.pilot.uid, node.pilot.gid)
    script = 'cat /made-for-the-test; ls /proc | grep -c "^[0-9]"'
    command = [container.program(), "--quiet", "exec", "-C", "--pwd", "/", work / "image", "sh", "-c", script]
    ran = node.run(kind, *command, profile="batch", options=["--workdir", work])
    said = ran.text.split()
    assert (ran.rc, ran.err, said[0]) == (0, b"", "yes"), ran
    assert int(said[1]) <= 5
    strict = node.run(kind, *command, profile="strict", options=["--workdir", work])
    assert strict.rc != 0
    assert strict.out == b""
    assert b"not allowed to create user namespace" in strict.err, strict


def test_pilot_in_a_container_runs_payloads_in_a_second_one(userns_node, busybox, work):
    """LHCb's case: the whole pilot is in Apptainer, and each payload in one of its own, three user namespaces deep."""
    node = userns_node
    with_apptainer(node, work.parent)
    payload = ["/bin/sh", "-c", "cat /made-for-the-test; echo $$ >made; sleep 98765 & exit 7"]
    inner = list(map(os.fspath, node.argv("map", payload, "batch", ["--workdir", work, "--image", busybox])))
    mine = [word for place in (container.OWN,) if place.exists() for word in ("--bind", os.fspath(place))]
    box = outer(node, "apptainer", work)
    ran = node.site.run([*box[:-1], *mine, box[-1], "/bin/sh", "-c", IN_CONTAINER, "sh", *inner], cwd=work)
    assert (ran.rc, ran.err, ran.out) == (7, b"", b"yes\n"), ran
    assert os.listdir(work) == ["made"]
    assert (work / "made").stat().st_uid == node.pilot.uid
    assert ran.record("start")["nodewrap"]["image"]["path"] == str(busybox)
    assert ran.record("cleanup")["nodewrap"]["cleanup"]["processes_left"] == 0
