"""Who the payload is: asked from inside, read from outside, and proved not to come back (I5)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.need import need
from tests.node import BLOCK, MAP_BLOCKS, MAP_FIRST, MODES, PROFILES, alive, delegated_ids, kill, status_of, until

PROBE = r"""
import ctypes, errno, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *args):
    return errno.errorcode[ctypes.get_errno()] if getattr(libc, name)(*args) < 0 else "ok"
caller = int(sys.argv[1])
ids = os.getresuid(), os.getresgid(), os.getgroups()
tries = {
    "setuid": raw("setuid", 0), "seteuid": raw("seteuid", 0), "setresuid": raw("setresuid", 0, 0, 0), "setgid": raw("setgid", 0),
    "setgroups": raw("setgroups", 0, None), "caller": raw("setresuid", caller, caller, caller) if caller != os.getuid() else "same",
    "setfsuid": (libc.setfsuid(0), libc.setfsuid(-1))[1], "chroot": raw("chroot", b"/"),
    "capset": raw("syscall", 126, b"\x22\x05\x08\x20" + bytes(4), b"\xff" * 24),
    "reboot": raw("sethostname", b"x", 1),
}
status = {line.split(":")[0]: line.split()[1:] for line in open("/proc/self/status")}
print(json.dumps({
    "ids": ids, "after": (os.getresuid(), os.getresgid(), os.getgroups()), "tries": tries, "status": status,
    "loginuid": int(open("/proc/self/loginuid").read()) if os.path.exists("/proc/self/loginuid") else None,
    "maps": [open(f"/proc/self/{name}_map").read().split() for name in ("uid", "gid")],
}))
"""
WAIT = ("/bin/sh", "-c", "read x")


def cases():
    for launcher, kinds in (("setuid", ("static", "pool", "map", "block", "log-only")), ("userns", ("map", "log-only"))):
        for kind in kinds:
            yield from (pytest.param((launcher, kind, profile), id=f"{launcher}-{kind}-{profile}") for profile in PROFILES)


@pytest.fixture(params=list(cases()))
def case(request):
    launcher, kind, profile = request.param
    return request.getfixturevalue(f"{launcher}_node"), kind, profile


def expected(node, kind):
    """(possible uids outside, uid inside, supplementary groups inside or None when they are the caller's)."""
    accounts, pilot = node.site.accounts, node.pilot
    if kind in ("static", "pool"):
        uids = {accounts[role].uid for role in {"static": ["user1"], "pool": ["pool01", "pool02"]}[kind]}
        return uids, None
    if kind == "log-only":
        return {pilot.uid}, pilot.uid
    if node.site.launcher == "userns":
        return delegated_ids(pilot.name) or {pilot.uid}, 1000
    return set(range(MAP_FIRST, MAP_FIRST + MAP_BLOCKS * BLOCK)), 1000


def test_ids_are_the_ones_decided_inside_and_outside_and_never_come_back(case):
    node, kind, profile = case
    live = node.start(kind, "/usr/bin/python3", "-I", "-c", "input();" + PROBE, str(node.pilot.uid), profile=profile)
    outside = status_of(live.pid)
    rc, out, err = live.end(b"\n")
    assert (rc, err) == (0, b"")
    found = json.loads(out)
    uids, inside = expected(node, kind)
    uid = int(outside["Uid"][0])
    assert uid in uids
    assert set(outside["Uid"]) == {str(uid)}
    assert len(set(outside["Gid"])) == 1
    assert found["ids"][:2] == [[inside or uid] * 3, [(node.pilot.gid if kind == "log-only" else inside) or uid] * 3]
    assert found["after"] == found["ids"]
    refused = {"setfsuid": (inside or uid,), "caller": ("same", "EPERM", "EINVAL")}  # EINVAL: an id that the namespace does not have
    assert {name: said for name, said in found["tries"].items() if said not in refused.get(name, ("EPERM", "EINVAL"))} == {}


def test_no_capability_in_any_set_and_no_way_to_gain_one(case):
    node, kind, profile = case
    status = node.python(kind, PROBE, str(node.pilot.uid), profile=profile)["status"]
    sets = ("CapInh", "CapPrm", "CapEff", "CapAmb") + (("CapBnd",) if node.privileged else ())
    assert {name: int(status[name][0], 16) for name in sets} == dict.fromkeys(sets, 0)
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["0" if profile == "none" else "2"]


def test_groups_are_the_targets_alone(setuid_node):
    pilot = setuid_node.site.accounts["pilot"]
    extra = set(pilot.groups) - {pilot.gid}
    assert extra, "the pilot must have a supplementary group for this to mean something"
    for kind in ("static", "map", "block"):
        groups = setuid_node.python(kind, PROBE, str(pilot.uid))["ids"][2]
        assert not extra & set(groups), kind
        assert pilot.gid not in groups


def test_record_names_the_ids_that_the_kernel_shows(case):
    node, kind, profile = case
    ran = node.sh(kind, "id -u", profile=profile)
    start = ran.record("start")
    uids, inside = expected(node, kind)
    assert int(start["user"]["id"]) in uids
    assert int(ran.out) == (inside or int(start["user"]["id"]))
    assert start["nodewrap"]["mode"] == MODES[kind]
    assert start["nodewrap"]["profile"] == profile
    assert start["nodewrap"]["pilot"]["uid"] == str(node.pilot.uid)


def test_account_name_stands_in_record_and_environment(setuid_node):
    ran = setuid_node.sh("static", 'echo "$USER $LOGNAME $HOME $(id -un)"')
    user = setuid_node.site.accounts["user1"]
    assert ran.text.split() == [user.name, user.name, str(user.home), user.name]
    assert ran.record("start")["user"]["name"] == user.name


def test_login_uid_is_the_payloads(setuid_node):
    """Where the kernel has audit (CONFIG_AUDITSYSCALL) the record and the kernel agree."""
    found = setuid_node.python("static", PROBE, str(setuid_node.pilot.uid))
    told = setuid_node.sh("static", "true").record("start")["nodewrap"]["isolation"]["loginuid"]
    assert told == (found["loginuid"] is not None)
    assert found["loginuid"] in (None, setuid_node.site.accounts["user1"].uid)


# ---- exclusive ----


def test_two_runs_get_two_accounts_of_the_pool_and_a_third_is_told_that_it_is_busy(setuid_node):
    first, second = setuid_node.start("pool", *WAIT), setuid_node.start("pool", *WAIT)
    uids = {status_of(live.pid)["Uid"][0] for live in (first, second)}
    assert uids == {str(setuid_node.site.accounts[role].uid) for role in ("pool01", "pool02")}
    third = setuid_node.run("pool", "/bin/true")
    assert third.rc == 202
    assert third.err.startswith(b"nodewrap: NW-POOL-BUSY: ")
    assert third.record("error")["event"]["code"] == "NW-POOL-BUSY"
    assert first.end(b"\n")[0] == 0
    assert setuid_node.run("pool", "/bin/true").rc == 0
    assert second.end(b"\n")[0] == 0


def test_concurrent_blocks_are_disjoint_and_a_payload_cannot_leave_its_own(setuid_node):
    lives = [setuid_node.start("block", *WAIT) for _ in range(MAP_BLOCKS)]
    maps = [Path(f"/proc/{live.pid}/uid_map").read_text().split() for live in lives]
    assert sorted(int(words[1]) for words in maps) == [MAP_FIRST + at * BLOCK for at in range(MAP_BLOCKS)]
    assert {(words[0], words[2]) for words in maps} == {("0", str(BLOCK))}
    assert setuid_node.run("block", "/bin/true").rc == 202
    assert setuid_node.run("map", "/bin/true").rc == 202, "a single id is not taken out of a leased block"
    assert [live.end(b"\n")[0] for live in lives] == [0] * MAP_BLOCKS


def test_single_ids_of_concurrent_runs_differ(setuid_node):
    lives = [setuid_node.start("map", *WAIT) for _ in range(4)]
    assert len({status_of(live.pid)["Uid"][0] for live in lives}) == 4
    assert [live.end(b"\n")[0] for live in lives] == [0] * 4


def test_account_is_free_again_after_its_launcher_was_killed(setuid_node):
    live = setuid_node.start("static", *WAIT)
    kill(live.process)
    until(setuid_node.is_clean, "the keeper ends the payload and gives the account back", 5)
    assert setuid_node.run("static", "/bin/true").rc == 0


# ---- delegated ids, unprivileged ----


@pytest.mark.parametrize("kind", ["map", "block"])
def test_delegated_range_gives_an_id_that_is_not_the_pilots(userns_node, delegated, kind):
    live = userns_node.start(kind, *WAIT)
    uid, gid = (int(status_of(live.pid)[name][0]) for name in ("Uid", "Gid"))
    assert live.end(b"\n")[0] == 0
    assert delegated[0] <= uid < delegated[0] + delegated[1]
    assert delegated[0] <= gid < delegated[0] + delegated[1]
    assert userns_node.python(kind, PROBE, "0")["ids"][0] == [1000] * 3


def test_pilot_cannot_be_signalled_or_read_by_a_delegated_id(userns_node, delegated):
    live = userns_node.start("block", *WAIT)
    user = int(status_of(live.pid)["Uid"][0])
    tried = subprocess.run(["kill", "-0", str(live.process.pid)], user=user, group=user, extra_groups=[], capture_output=True)
    assert tried.returncode == 1
    assert live.end(b"\n")[0] == 0


def test_block_without_a_delegated_range_is_refused_with_the_place_to_set_it(userns_node):
    if delegated_ids(userns_node.pilot.name):
        need("root")  # whoever runs this has a range; only root makes an account without
    ran = userns_node.run("block", "/bin/true")
    assert ran.rc == 202
    assert b"NW-SUBUID" in ran.err
    assert b"/etc/subuid" in ran.err


# ---- launchers and privilege (I16) ----


def test_setuid_launcher_without_its_bit_refuses(setuid_node, tmp_path):
    binary = setuid_node.site.prefix / "libexec/nodewrap/nodewrap-setuid"
    ran = setuid_node.site.run(["/usr/bin/setpriv", "--no-new-privs", binary, "run", "--", "/bin/true"])
    assert ran.rc == 202
    assert ran.err.startswith(b"nodewrap: NW-PRIVILEGE: ")


def test_root_is_no_pilot(setuid_node):
    binary = setuid_node.site.prefix / "libexec/nodewrap/nodewrap-setuid"
    ran = subprocess.run([binary, "run", "--", "/bin/true"], capture_output=True)
    assert ran.returncode == 203
    assert ran.stderr.startswith(b"nodewrap: NW-CALLER: ")


def test_userns_launcher_refuses_real_root(userns_node):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    ran = subprocess.run([userns_node.site.prefix / "libexec/nodewrap/nodewrap-userns", "run", "--", "/bin/true"], capture_output=True)
    assert ran.returncode == 202
    assert ran.stderr.startswith(b"nodewrap: NW-PRIVILEGE: ")


# ---- a pid that is somebody else's by now ----

# clone3(2) with set_tid: the number is chosen. Then a process of the pilot's, in a new user namespace that has no ids yet.
STRANGER = """
import ctypes, os, struct, sys
pid, uid, gid = map(int, sys.argv[1:])
number = (ctypes.c_int * 1)(pid)
args = ctypes.create_string_buffer(struct.pack("11Q", 0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(number), 1, 0))
made = ctypes.CDLL(None, use_errno=True).syscall(435, args, len(args) - 1)
if made == 0:
    os.execvp("setpriv", ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "unshare", "-U", "sleep", "60"])
print(made, ctypes.get_errno(), flush=True)
sys.stdin.read()
os.kill(made, 9)
os.waitpid(made, 0)
"""


@pytest.mark.parametrize("kind", ["map", "block"])
def test_leased_ids_are_mapped_for_nobody_who_has_got_the_payloads_number(setuid_node, kind):
    """The keeper waits for the log, with the payload's request for its ids before it; the payload is killed meanwhile, and a process of the pilot's
    gets its pid. It had the leased ids then, and nobody ended it."""
    need("root", "setpriv", "unshare")
    node = setuid_node
    assert node.run(kind, "/bin/true").rc == 0  # the log is there
    with open(f"{node.site.audit}.sequence", "rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = node.site.start(node.argv(kind, WAIT), stderr=subprocess.PIPE)
        payload = until(lambda: waiting_payload(node), "the payload waits for its ids")
        os.kill(payload, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{payload}").exists(), "it has been reaped")
        words = [sys.executable, "-I", "-c", STRANGER, *map(str, (payload, node.pilot.uid, node.pilot.gid))]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
            assert stranger.stdout.readline() == f"{payload} 0\n"
            until(lambda: Path(f"/proc/{payload}/comm").read_text() == "sleep\n", "the pilot's process has a user namespace")
            fcntl.flock(log, fcntl.LOCK_UN)
            _, err = process.communicate(timeout=60)
            assert Path(f"/proc/{payload}/uid_map").read_text() == Path(f"/proc/{payload}/gid_map").read_text() == ""
            stranger.stdin.close()
    assert (process.returncode, err.startswith(b"nodewrap: NW-")) == (202, True), err


@pytest.mark.parametrize("profile", ["none", "batch"])
def test_a_payload_whose_init_was_killed_is_not_executed(setuid_node, profile):
    """Without a namespace of processes nothing ends it, and its parent-death signal is set too late. Each look of the keeper's comes late here: by
    then the payload was ready."""
    need("root", "setpriv", "strace")
    node = setuid_node
    assert node.run("map", "/bin/true", profile=profile).rc == 0
    before = node.site.audit_size()
    late = ["strace", "-f", "-o", "/dev/null", "-e", "trace=poll", "-e", "inject=poll:delay_enter=100000"]
    pilot = ["setpriv", f"--reuid={node.pilot.uid}", f"--regid={node.pilot.gid}", f"--groups={','.join(map(str, node.pilot.groups))}"]
    words = [*late, *pilot, *map(str, node.argv("map", WAIT, profile=profile))]
    with open(f"{node.site.audit}.sequence", "rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=node.site.environment(node.pilot), cwd="/")
        payload = until(lambda: waiting_payload(node), "the payload waits for its ids")
        init = int(status_of(payload)["PPid"][0])
        until(lambda: Path(f"/proc/{init}/syscall").read_text().split()[0] == "61", "init has built the root")  # wait4(2)
        os.kill(init, signal.SIGKILL)
        until(lambda: not alive(init), "init has ended")
        fcntl.flock(log, fcntl.LOCK_UN)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.split(b": ")[1]) == (202, b"NW-INIT"), err
    assert "start" not in node.actions(before)
    assert not Path(f"/proc/{payload}").exists()


def waiting_payload(node):
    """pid of the payload of a run in mode map that has asked for its ids: init's child, blocked."""
    for pid in node.launchers():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one of the launcher's helpers, which has ended since
            parent = int(status_of(pid)["PPid"][0])
            if parent in node.launchers() and Path(f"/proc/{parent}/comm").read_text() == Path(f"/proc/{pid}/comm").read_text() == "nodewrap-init\n":
                return pid if Path(f"/proc/{pid}/syscall").read_text().split()[0] == "0" else None  # read(2)
    return None
