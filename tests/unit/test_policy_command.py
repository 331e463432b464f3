"""`nodewrap policy` as an administrator runs it: the real command, real files, a directory of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nodewrap.policy import compile as compiler
from nodewrap.policy import install, store
from tests.policy_tools import CALLER, SITE, good

ROOT = Path(__file__).parents[2]
RULE = '[[rule]]\nname = "r"\nwhen = { vo = "atlas" }\nidentity = { mode = "map" }\nprofile = "strict"\n'
GUARD = """nodewrap-guard 1
launcher setuid
python /usr/bin/python3
script /x
child 990 990
policy %s/policy/current
state /x
audit /x
caller-uid 1-60000
map-uid 2000000000-2000065535
max-wall-s 3600
allow map batch
"""


@pytest.fixture
def run(tmp_path):
    config = tmp_path / "etc"
    config.mkdir(mode=0o755)

    def nodewrap(*argv, text=None, guard=None):
        if text is not None:
            (config / "nodewrap.toml").write_text(text)
        if guard is not None:
            (config / "guard").write_text(guard)
        where = [] if argv[0] == "check" else ["--policy-dir", str(tmp_path / "policy")]
        argv = [sys.executable, "-m", "nodewrap", "policy", argv[0], "--config", str(config), *where, *argv[1:]]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.replace(str(tmp_path), ""), done.stderr.replace(str(tmp_path), "")

    return nodewrap


def test_check_is_silent_on_a_good_policy_and_changes_nothing(run, tmp_path):
    assert run("check", text=SITE + CALLER + RULE) == (0, "", "")
    assert not (tmp_path / "policy").exists()


def test_check_prints_every_problem_and_fails(run):
    status, out, _ = run("check", text=SITE + CALLER + RULE + "limts = 1\nexpires = 1\n")
    assert status == 1
    assert out == (
        "/etc/nodewrap.toml:12: NW-POLICY-KEY unknown key 'limts' in [rule]; did you mean 'limits'?\n"
        "/etc/nodewrap.toml:13: NW-POLICY-TYPE rule.expires is a number 1; next: write a date without quotes, such as 2027-06-30\n"
    )


def test_warnings_are_printed_and_do_not_fail(run):
    status, out, _ = run("check", text=SITE + RULE)
    assert status == 0
    assert "NW-POLICY-CONTRADICTION warning: there is no [[caller]]" in out


def test_apply_installs_what_the_launcher_and_the_child_read(run, tmp_path):
    status, out, _ = run("apply", text=SITE + CALLER + RULE)
    assert status == 0, out
    current = tmp_path / "policy" / "current"
    policy = store.load(str(current / "policy.bin"))
    assert {"policy.bin", "policy.json", "profiles", "child-load.bpf", "child-decide.bpf", "seccomp.strict.bpf"} <= set(os.listdir(current))
    assert json.loads((current / "policy.json").read_text())["digest"] == policy["digest"]
    assert hashlib.sha256(compiler.canonical(policy).encode()).hexdigest() == policy["digest"]
    assert hashlib.sha256(compiler.canonical(json.loads((current / "policy.json").read_text())).encode()).hexdigest() == policy["digest"]
    assert os.readlink(current) == "1"
    assert (current / "profiles").read_text().startswith("nodewrap-profiles 1\n")
    assert {path.stat().st_mode & 0o7777 for path in current.iterdir()} == {0o644}


def test_roots_umask_does_not_lock_the_policy_child_out(run, tmp_path):
    old = os.umask(0o077)
    try:
        assert run("apply", text=SITE + CALLER + RULE)[0] == 0
    finally:
        os.umask(old)
    policy = tmp_path / "policy"
    assert [path.stat().st_mode & 0o7777 for path in (policy, policy / "1", policy / "1" / "policy.bin")] == [0o755, 0o755, 0o644]


def test_broken_edit_never_reaches_the_node(run, tmp_path):
    run("apply", text=SITE + CALLER + RULE)
    status, _, err = run("apply", text=SITE + CALLER + RULE + "limts = 1\n")
    assert status == 1
    assert err.startswith("NW-POLICY-REFUSED: not applied")
    assert install.current(str(tmp_path / "policy")) == 1
    assert sorted(os.listdir(tmp_path / "policy")) == ["1", "current"]


def test_five_earlier_policies_are_kept_and_rollback_goes_to_them(run, tmp_path):
    for number in range(8):
        assert run("apply", text=SITE + f'contact = "c{number}"\n' + CALLER + RULE)[0] == 0
    directory = str(tmp_path / "policy")
    assert install.generations(directory) == [3, 4, 5, 6, 7, 8]
    assert run("rollback")[0] == 0
    assert store.load(directory + "/current/policy.bin")["site"]["contact"] == "c6"
    assert run("rollback")[0] == 0
    assert run("rollback", "4")[0] == 0
    assert install.current(directory) == 4
    status, _, err = run("rollback", "2")
    assert (status, err) == (202, "NW-POLICY-ROLLBACK: /policy has no generation 2 (has 3, 4, 5, 6, 7, 8); next: name one\n")
    assert run("apply")[0] == 0
    assert install.current(directory) == 9


def test_digest_tells_policies_apart_and_not_their_spelling(tmp_path):
    one = good(tmp_path / "a", SITE + CALLER + RULE)
    same = good(tmp_path / "b", "# comment\n" + SITE + CALLER + RULE.replace('vo = "atlas"', 'vo = ["ATLAS"]'))
    other = good(tmp_path / "c", SITE + CALLER + RULE.replace("atlas", "cms"))
    assert one["digest"] == same["digest"] != other["digest"]


def test_reader_sees_a_whole_policy_at_every_moment(tmp_path):
    directory = str(tmp_path / "policy")
    policy = good(tmp_path / "a", SITE + CALLER + RULE)
    install.install(directory, policy)
    done = threading.Event()
    seen = []

    def read():
        while not done.is_set():
            seen.append(store.load(directory + "/current/policy.bin")["digest"])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        rounds = 0
        while rounds < 4 or (len(seen) <= 10 and reader.is_alive()):
            install.install(directory, policy)
            install.rollback(directory)
            rounds += 1
    finally:
        done.set()
        reader.join()
    assert len(seen) > 10
    assert set(seen) == {policy["digest"]}


def test_leftover_of_a_killed_apply_is_no_obstacle(run, tmp_path):
    run("apply", text=SITE + CALLER + RULE)
    (tmp_path / "policy" / ".new.2").mkdir()
    (tmp_path / "policy" / ".new.2" / "policy.bin").write_bytes(b"half")
    (tmp_path / "policy" / ".current.new").symlink_to("7")
    assert run("apply")[0] == 0
    assert sorted(os.listdir(tmp_path / "policy")) == ["1", "2", "current"]


@pytest.mark.parametrize("data", [b"", b"junk", b"i\x01\x00\x00\x00", b"{0", None])
def test_what_is_no_policy_is_not_loaded(tmp_path, data):
    path = tmp_path / "policy.bin"
    path.write_bytes(b"x" * (store.MAX_BYTES + 1) if data is None else data)
    with pytest.raises(ValueError, match=r"^NW-POLICY-LOAD: .*; next: run 'nodewrap policy apply'"):
        store.load(str(path))


def test_apply_says_what_the_guard_never_permits(run, tmp_path):
    rule = RULE + 'limits = { wall = "2h" }\n'
    status, out, _ = run("apply", text=SITE + CALLER + rule, guard=GUARD % tmp_path)
    assert status == 0
    assert out.splitlines()[:2] == [
        "/etc/nodewrap.toml:10: NW-POLICY-GUARD warning: rule 'r': the guard allows mode map no profile of strict: the rule can never permit; "
        "next: change /etc/guard or the rule",
        "/etc/nodewrap.toml:12: NW-POLICY-GUARD warning: rule 'r': wall is 7200 s, /etc/guard ends runs at 3600 s; next: change one of them",
    ]


def test_policy_directory_is_the_one_that_the_guard_names(run, tmp_path):
    run("check", text=SITE + CALLER + RULE, guard=GUARD % tmp_path)
    argv = [sys.executable, "-m", "nodewrap", "policy", "apply", "--config", str(tmp_path / "etc")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert install.current(str(tmp_path / "policy")) == 1


def test_bad_guard_is_named_with_its_line(run):
    status, _, err = run("check", text=SITE + CALLER + RULE, guard="nodewrap-guard 1\nlauncher magic\n")
    assert status == 202
    assert err.startswith("NW-GUARD: /etc/guard:2: ")


def test_show_tells_what_is_in_force(run):
    run("apply", text=SITE + CALLER + RULE + 'expires = 2027-06-30\n[[ban]]\nname = "b7"\nvo = "evil"\n')
    status, out, _ = run("show")
    assert status == 0
    assert out.startswith("policy 1 in /policy (kept: 1)\ndigest ")
    assert "\nrule r: map; profile strict; until 2027-07-01T00:00Z\nban b7\n" in out
    assert json.loads(run("show", "--json")[1])["rules"][0]["name"] == "r"


def test_explain_prints_every_step(run):
    run("apply", text=SITE + CALLER + RULE + 'expires = 2027-06-30\n[[ban]]\ndn = "/CN=Mallory"\nreason = "incident 7"\n')
    asked = ["--caller", "plt01", "--vo", "atlas", "--assurance", "credential"]
    status, out, _ = run("explain", *asked, "--dn", "/CN=Ann", "--at", "2027-06-30T23:59")
    assert status == 0
    assert out.splitlines()[1:] == [
        "site T", "bans: none applies", "caller plt01: known, vo atlas", "assurance credential: enough, site asks for credential", "rule r: matches",
        "permit: mode map, profile strict"]
    assert run("explain", *asked, "--dn", "/CN=Ann", "--at", "2027-07-01")[0] == 1
    asked += ["--at", "2027-06-01"]  # before the rule expires, whenever this runs
    status, out, _ = run("explain", *asked, "--dn", "CN = mallory")
    assert status == 1
    assert "deny NW-BANNED: ban ban-1 by dn, incident 7" in out
    assert json.loads(run("explain", *asked, "--mode", "log-only", "--json")[1])["code"] == "NW-MODE"
    assert "NW-BYPASS" in run("explain", *asked, "--dn", "/CN=Ann", "--internal-error")[1]


def test_explain_says_what_the_profile_of_a_permit_closes_and_why(run):
    asked = ["explain", "--sources", "--caller", "plt01", "--vo", "atlas", "--assurance", "credential", "--surface"]
    own = '[profile.strict]\nlandlock = ["files?", "tcp"]\ntcp_connect = [443, 1094]\n'
    status, out, _ = run(*asked, text=SITE + CALLER + RULE + own)
    assert status == 0
    assert "landlock files: files are read and run where the profile shows them" in out
    assert "a kernel without it: recorded" in out
    assert "landlock tcp: TCP by list (Linux 6.7); bind none; connect 443 1094; a kernel without it: refused" in out
    assert "seccomp EPERM: ioctl*: types into the caller's terminal" in out
    assert "seccomp ENOTSUP: sendto* sendmsg* sendmmsg*: connects past Landlock's rules for TCP" in out
    assert "seccomp" not in run(*asked, "--at", "2000-01-01", "--mode", "log-only", text=SITE + CALLER + RULE)[1]


def test_explain_can_use_sources_that_are_not_applied(run):
    status, out, _ = run("explain", "--sources", "--caller", "plt01", "--vo", "atlas", "--assurance", "credential", text=SITE + CALLER + RULE)
    assert (status, out.splitlines()[-1]) == (0, "permit: mode map, profile strict")
    status, _, err = run("explain", "--caller", "plt01")
    assert (status, err) == (202, "NW-POLICY-FILE: /policy/current/policy.bin: No such file or directory; next: run 'nodewrap policy apply'\n")


@pytest.mark.parametrize("example", ["nodewrap", "switch", "map", "log-only", "userns"])
def test_shipped_examples_are_clean(run, example):
    assert run("check", "--no-accounts", text=(ROOT / "policies" / f"{example}.toml").read_text()) == (0, "", "")


def test_usage_mistakes_end_with_201():
    for argv in ([], ["polcy"], ["policy"], ["policy", "check", "--confg", "x"], ["policy", "rollback", "x"]):
        done = subprocess.run([sys.executable, "-m", "nodewrap", *argv], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout) == (201, "")
        assert done.stderr.splitlines()[-1].startswith("NW-USAGE: ")


def test_a_verbs_module_is_imported_only_for_that_verb():
    code = "import sys; from nodewrap import cli; sys.argv = ['x']; cli._parser('policy'); print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "nodewrap.commands.policy" in done.stdout.split()
    assert "nodewrap.commands.audit" not in done.stdout.split()
