"""Doctor: what its probes find on this very kernel, and what the matrix makes of findings."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import tempfile
import time
from pathlib import Path

import pytest

from nodewrap import seccomp
from nodewrap.doctor import checks, matrix, probe, report
from nodewrap.doctor.checks import Finding
from nodewrap.doctor.node import NOBODY, Node, distrust, look
from nodewrap.guard import Guard, Op, Profile, Range
from tests.need import need

YES = Finding(True, "works")
GOOD = {check.name: YES for check in checks.CHECKS}
PROFILES = {
    "strict": Profile("strict", ("pid", "mount", "net"), "seccomp.strict.bpf", ops=[Op("proc")]),
    "batch": Profile("batch", ("pid", "mount"), "seccomp.batch.bpf", landlock=("abstract",), degrade=True, ops=[Op("proc"), Op("dev", "fuse")]),
    "none": Profile("none"),
}


def node(launcher="setuid", rules=(), **changes):
    guard = Guard(launcher, "/p", "/s", (990, 990), policy="/p", state="/s", audit="/a", caller_uid=(Range(1000, 1000),))
    guard.switch_uid = guard.switch_gid = guard.map_uid = (Range(20000, 20010),)
    guard.allow = dict.fromkeys(("switch", "map", "log-only"), ("strict", "batch", "none"))
    return Node("/", True, (1000, 1000), guard=guard, policy={"rules": list(rules)}, profiles=PROFILES, profiles_from="here", **changes)


def state(findings, launcher, mode, profile, on=None):
    return next(cell for cell in matrix.cells(on or node(launcher), findings) if cell[:3] == (launcher, mode, profile))


# ---- the matrix ----


def test_a_node_that_has_everything_says_yes_to_all_but_switching_without_privilege():
    no = [(cell.launcher, cell.mode) for cell in matrix.cells(node(), GOOD) if cell.state != "yes"]
    assert set(no) == {("userns", "switch")}


def test_what_is_missing_is_no_where_the_profile_refuses_and_degraded_where_it_degrades():
    findings = {**GOOD, "seccomp": Finding(False, "no seccomp")}
    assert state(findings, "setuid", "switch", "strict").state == "no"
    assert state(findings, "setuid", "switch", "batch").state == "degraded"
    assert state(findings, "setuid", "switch", "none").state == "yes"


@pytest.mark.parametrize(("missing", "concerned"), [
    ("root.net", {("setuid", "strict"), ("socket", "strict")}), ("landlock", {("setuid", "batch"), ("socket", "batch"), ("userns", "batch")}),
    ("fuse", set()), ("caller.net", {("userns", "strict")}),
    ("caller.proc", {("userns", "strict"), ("userns", "batch")}),
    ("launcher.setuid", {("setuid", "strict"), ("setuid", "batch"), ("setuid", "none")}),
    ("caller.user", {("userns", "strict"), ("userns", "batch"), ("userns", "none")}),
])
def test_a_missing_thing_concerns_exactly_who_needs_it(missing, concerned):
    found = matrix.cells(node(), {**GOOD, missing: Finding(False, "missing")})
    assert {(cell.launcher, cell.profile) for cell in found if cell.state != "yes" and cell.mode == "log-only"} == concerned


def test_without_user_namespaces_there_is_one_reason_not_ten():
    findings = {name: Finding(False, "no") if name.startswith("caller.") else finding for name, finding in GOOD.items()}
    assert [reason.check for reason in state(findings, "userns", "log-only", "strict").reasons] == ["caller.user"]


def test_every_no_has_a_reason_and_a_next_step():
    for name in GOOD:
        for cell in matrix.cells(node(), {**GOOD, name: Finding(False, "missing")}):
            assert (cell.state == "yes") == (not cell.reasons)
            assert all(reason.saw and (reason.next or name in ("caller.user", "callers")) for reason in cell.reasons)


def test_what_only_root_can_try_is_never_a_yes():
    findings = {**GOOD, "root.pid": Finding(None, "not tried: only root can", "run nodewrap doctor as root")}
    assert state(findings, "setuid", "switch", "batch").state == "no"


def test_modes_that_the_guard_gives_no_ids_to_are_no():
    bare = node()
    bare.guard.switch_uid = bare.guard.map_uid = ()
    assert state(GOOD, "setuid", "switch", "batch", bare).reasons[0].saw == "no line 'switch-uid'"
    assert state(GOOD, "setuid", "map", "batch", bare).reasons[0].saw == "no line 'map-uid'"
    assert state(GOOD, "setuid", "log-only", "batch", bare).state == "yes"


# ---- the verdict ----


def rule(mode="switch", *profiles, more=(), run=(), must=False):
    identities = [{"mode": mode}, *({"mode": other} for other in more)]
    limits = {"run": dict(run), "must": must}
    return {"name": "analysis", "profiles": list(profiles or ["batch"]), "identities": identities, "limits": limits}


def verdict(on, findings=None):
    findings = findings or GOOD
    return matrix.verdict(on, findings, matrix.cells(on, findings))


def test_rules_that_can_run_degraded_are_fine():
    assert verdict(node(rules=[rule(), rule("map", "strict")]), {**GOOD, "landlock": Finding(False, "none")}) == []


@pytest.mark.parametrize(("run", "must", "refused"), [({32: 1 << 30}, True, True), ({32: 1 << 30}, False, False), ({38: 1 << 30}, True, False)])
def test_a_rule_whose_limits_must_be_held_and_cannot_is_named(run, must, refused):
    missing = {**GOOD, "limits": Finding(False, "nothing is delegated", "delegate it")}
    wanted = ["rule analysis: limits.on_missing is refuse, and nothing is delegated; next: delegate it"]
    assert verdict(node(rules=[rule(run=run, must=must)]), missing) == (wanted if refused else [])
    assert verdict(node(rules=[rule(run=run, must=must)])) == []


def test_a_rule_that_the_launcher_cannot_run_is_named_with_its_reason():
    found = verdict(node("userns", [rule("switch")]))
    assert found == ["rule analysis: switch with batch: another account's uid needs privilege; next: use mode map, or the setuid launcher"]


def test_one_identity_that_works_is_enough_for_a_rule():
    assert verdict(node("userns", [rule("switch", more=["map"])])) == []


def test_what_the_guard_does_not_allow_cannot_run():
    on = node(rules=[rule("map", "strict")])
    on.guard.allow = {"map": ("batch",)}
    assert len(verdict(on)) == 1
    assert "the guard does not allow map with strict" in verdict(on)[0]


@pytest.mark.parametrize("name", ["guard", "child", "policy", "state", "audit"])
def test_without_the_basics_nothing_is_ready(name):
    assert verdict(node(), {**GOOD, name: Finding(False, "is broken")})[0].startswith(f"{name}: is broken; next: ")


# ---- the probes, on this kernel ----


def test_an_attempt_says_why_it_failed_or_that_it_was_ended():
    assert probe.attempt(lambda: None) == ""
    assert probe.attempt(lambda: os.open("/no/such", os.O_RDONLY)) == "No such file or directory"
    assert probe.attempt(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "the attempt was ended by SIGKILL"
    assert "ZeroDivisionError" in probe.attempt(lambda: 1 // 0)


def test_an_attempt_as_somebody_else_has_nothing_of_roots():
    """Processes of that id may trace it: root's terminal, descriptors, directory and session would be theirs."""
    need("root")
    secret = os.open("/etc/shadow", os.O_RDONLY)
    try:
        told = probe.attempt(_tell_all, NOBODY, NOBODY)
    finally:
        os.close(secret)
    assert told == "['/dev/null', '/dev/null', '/dev/null', 'pipe'] / True"


def _tell_all():
    numbers = sorted(map(int, os.listdir("/proc/self/fd")))
    named = [os.readlink(f"/proc/self/fd/{number}").partition(":")[0] for number in numbers[:-1]]  # the last is of the listing
    raise OSError(f"{named} {os.getcwd()} {os.getsid(0) == os.getpid()}")


def test_an_attempt_that_is_stopped_or_floods_ends_and_its_words_are_bounded(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 1)
    began = time.monotonic()
    assert "ended by SIG" in probe.attempt(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert time.monotonic() - began < 5

    def flood():
        raise OSError("\x1b[2J" * 1000)

    told = probe.attempt(flood)
    assert len(told) <= probe.MOST
    assert told.isprintable()


def test_an_attempt_as_somebody_else_has_their_ids_and_no_groups():
    need("root")

    def work():
        assert os.getresuid() == (NOBODY,) * 3
        assert os.getresgid() == (NOBODY,) * 3
        assert os.getgroups() == []

    assert probe.attempt(work, NOBODY, NOBODY) == ""


def test_probes_leave_this_process_as_it_was():
    before = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    fds = len(os.listdir("/proc/self/fd"))
    matrix.examine(look("/"))
    assert {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")} == before
    assert len(os.listdir("/proc/self/fd")) == fds
    assert "Seccomp:\t0" in Path("/proc/self/status").read_text()
    with pytest.raises(ChildProcessError):
        os.wait()


def test_a_forbidden_namespace_is_found_to_be_forbidden():
    need("userns")
    program = seccomp.payload_program({"nested_userns": False})
    assert probe.attempt(probe.try_namespace("user", nested=True)) == ""

    def jailed():
        probe.load_filter(program)
        problem = probe.attempt(probe.try_namespace("user", nested=True))
        raise OSError(problem)

    assert probe.attempt(jailed) == "Operation not permitted"


def test_a_masked_proc_is_found_out():
    """As in a container that mounts something over a part of /proc: a nested procfs is refused (mount_too_revealing, Linux 4.2)."""
    need("root")

    def work():
        probe.unshare("mount")
        probe._mount(b"none", b"/", b"none", probe.MS_REC | probe.MS_PRIVATE)
        probe._mount(b"none", b"/proc/sys", b"tmpfs", 0)
        raise OSError(probe.attempt(probe.try_proc(nested=True), NOBODY, NOBODY))

    assert probe.attempt(probe.try_proc(nested=True), NOBODY, NOBODY) == ""
    assert probe.attempt(work) == "Operation not permitted"


def test_idmapped_mounts_are_tried_on_the_file_system_of_the_work_directory():
    need("root")
    assert probe.attempt(probe.try_idmap("/proc")) != ""  # procfs has no FS_ALLOW_IDMAP
    assert "No such file" in probe.attempt(probe.try_idmap("/no/such"))


def test_a_broken_filter_is_found_out():
    assert probe.attempt(probe.try_filter(seccomp.payload_program({"nested_userns": True}))) == ""
    assert probe.attempt(probe.try_filter(bytes(8))) == "Invalid argument"


def test_an_interpreter_that_does_not_start_in_its_jail_is_found_out():
    program = seccomp.program(seccomp.load_rules(), seccomp.fail(38))
    assert probe.attempt(probe.try_start(["/usr/bin/python3", "-I", "-S", "-B", "-c", "import pwd"], program)) == ""
    assert "exit 3" in probe.attempt(probe.try_start(["/usr/bin/python3", "-I", "-c", "raise SystemExit(3)"], program))


# ---- the node's own files ----


@pytest.fixture
def own():
    """A directory below the home directory: unlike pytest's, none above it is writable by others."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as made:
        yield Path(made)


def test_paths_that_others_can_write_are_not_trusted(own):
    file = own / "guard"
    file.touch()
    assert distrust(str(file), os.geteuid()) == ""
    file.chmod(0o666)
    assert distrust(str(file), os.geteuid()) == f"{file} is writable by others than root"
    file.chmod(0o600)
    own.chmod(0o707)
    assert distrust(str(file), os.geteuid()) == f"{own} is writable by others than root"
    assert distrust("/tmp") == "/tmp is writable by others than root"


def test_paths_of_somebody_else_are_not_trusted(own):
    need("root")
    (own / "link").symlink_to(own / "file")
    (own / "file").touch()
    os.chown(own / "file", NOBODY, NOBODY)
    assert distrust(str(own / "link")) == f"{own / 'file'} belongs to uid {NOBODY}, not to root"
    assert distrust(str(own / "link"), NOBODY) == ""
    assert distrust(str(own / "missing")) == f"{own / 'missing'}: No such file or directory"


def test_a_guard_that_cannot_be_read_is_reported_with_its_line(tmp_path):
    (tmp_path / "guard").write_text("nodewrap-guard 1\nshell /bin/sh\n")
    found = look("/", str(tmp_path / "guard"))
    assert found.guard is None
    assert found.guard_error == f"{tmp_path / 'guard'}: line 2: shell: unknown word"
    assert look("/", str(tmp_path / "none")).guard_error == f"{tmp_path / 'none'}: No such file or directory"


def test_the_setuid_bit_and_who_may_execute_are_looked_at(tmp_path):
    need("root")
    file = tmp_path / "launcher"
    file.touch()
    for mode, words in ((0o755, "not setuid root"), (0o4755, "executed by everybody"), (0o4750, "")):
        file.chmod(mode)
        assert words in checks._setuid_problem(str(file))
        assert bool(words) == bool(checks._setuid_problem(str(file)))
    os.chown(file, NOBODY, 0)
    file.chmod(0o4750)
    assert "not setuid root" in checks._setuid_problem(str(file))


def test_an_account_that_changed_since_the_policy_was_applied_is_found():
    here = checks.pwd.getpwuid(os.getuid())
    assert checks._account_problem(here.pw_name, here.pw_uid, here.pw_gid) == ""
    assert "in the policy" in checks._account_problem(here.pw_name, here.pw_uid + 1, here.pw_gid)
    assert "not on the node" in checks._account_problem("no-such-account", 1, 1)


def test_accounts_outside_the_guard_are_found():
    here = checks.pwd.getpwuid(os.getuid())
    account = {"name": here.pw_name, "uid": here.pw_uid, "gid": here.pw_gid}
    on = node(rules=[{"name": "r", "profiles": ["batch"], "identities": [{"mode": "switch", "accounts": [account]}]}])
    assert checks._accounts(on).yes is False
    assert "outside switch-uid" in checks._accounts(on).saw
    on.guard.switch_uid, on.guard.switch_gid = (Range(here.pw_uid, here.pw_uid),), (Range(here.pw_gid, here.pw_gid),)
    assert checks._accounts(on).yes is True


def test_a_tracking_group_that_somebody_is_in_is_found():
    on, own = node(), os.getgid()
    assert checks._tracking(on).yes is None
    on.guard.tracking_gid = (Range(4294967000, 4294967001),)
    assert checks._tracking(on).yes is True
    on.guard.tracking_gid = (Range(4294967000, 4294967001), Range(own, own))
    assert checks._tracking(on).yes is False
    assert checks.grp.getgrgid(own).gr_name in checks._tracking(on).saw


def test_a_missing_audit_directory_is_found():
    on = node()
    on.guard.audit = "/no/such/audit.jsonl"
    assert checks._directory(checks._audit_directory, 1)(on).saw == "/no: No such file or directory"


def test_a_full_audit_directory_is_found():
    need("root")  # nobody else may write into a directory that the check trusts
    on = node()
    on.guard.audit = "/usr/audit.jsonl"
    found = checks._directory(checks._audit_directory, 1 << 60)(on)
    assert "MiB free" in found.saw
    assert found.yes is False


def test_a_missing_syslog_socket_is_found():
    on = node()
    assert checks._syslog(on).yes is None
    on.guard.syslog = True
    assert checks._syslog(on).yes is (os.path.exists("/dev/log") and stat.S_ISSOCK(os.stat("/dev/log").st_mode) and _listens("/dev/log"))


def _listens(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        return client.connect_ex(path) == 0


def test_a_cgroup_that_cannot_be_written_is_found():
    on = node()
    on.guard.cgroup = "/proc"
    assert checks._cgroup(on).yes is False
    assert state({**GOOD, "cgroup": checks._cgroup(on)}, "setuid", "log-only", "strict", on).state == "no"
    on.guard.cgroup = ""
    assert checks._cgroup(on).yes is None
    assert state({**GOOD, "cgroup": checks._cgroup(on)}, "setuid", "log-only", "strict", on).state == "yes"


ALL = "cpuset cpu io memory pids"


@pytest.mark.parametrize(("own", "files", "owner", "yes", "said"), [
    ("/slot/pilot", {"": ALL, "slot": ALL}, True, True, "slot is delegated to a caller: cpuset cpu io memory pids"),
    ("/slot/pilot", {"": ALL, "slot": "pids"}, True, False, "slot is delegated to a caller: pids"),
    ("/slot/pilot", {"": ALL, "slot": ALL}, False, False, "slot is not delegated to a caller, {top}/slot/pilot hands down: nothing"),
    ("/", {"": ALL}, False, False, "is not delegated to a caller, {top} hands down: nothing"),
    ("/", {"": "hugetlb"}, True, False, "{top} has no memory, pids, cpu (hugetlb)"),
])
def test_limits_of_a_run_as_a_whole_need_a_group_that_is_the_callers_above_its_own(tmp_path, monkeypatch, own, files, owner, yes, said):
    (tmp_path / "slot/pilot").mkdir(parents=True)
    for group in ("", "slot", "slot/pilot"):
        (tmp_path / group / "cgroup.controllers").write_text(files.get(group, "") + "\n")
        (tmp_path / group / "cgroup.subtree_control").write_text("\n")
    monkeypatch.setattr(checks, "_own_cgroup", lambda: own)
    on = node()
    on.guard.cgroup, on.guard.caller_uid = str(tmp_path), (Range(os.getuid(), os.getuid()),) if owner else ()
    found = checks._limits(on)
    assert found.yes is yes
    assert said.format(top=tmp_path) in found.saw


@pytest.mark.parametrize(("limit", "yes"), [(34, True), (37, False), (39, False), (42, False)])
def test_a_limit_of_disks_needs_their_controller_and_no_other_limit_does(tmp_path, monkeypatch, limit, yes):
    (tmp_path / "slot/pilot").mkdir(parents=True)
    for group, text in (("", ALL), ("slot", "cpu memory pids")):
        (tmp_path / group / "cgroup.controllers").write_text(text + "\n")
    monkeypatch.setattr(checks, "_own_cgroup", lambda: "/slot/pilot")
    on = node()
    on.guard.cgroup, on.guard.caller_uid = str(tmp_path), (Range(os.getuid(), os.getuid()),)
    on.policy = {"rules": [{"limits": {"run": {limit: 1}}}]}
    assert checks._limits(on).yes is yes


@pytest.mark.parametrize(("line", "yes"), [
    ("36 1 {0} / / rw - ext4 /dev/x rw,prjquota", True), ("36 1 {0} / / rw - xfs /dev/x rw,pquota,noquota", True),
    ("36 1 {0} / / rw - ext4 /dev/x rw,usrquota", False), ("36 1 0:9999 / / rw - ext4 /dev/x rw,prjquota", False), ("", False),
])
def test_a_file_system_that_counts_by_project_is_known_by_its_mount(tmp_path, monkeypatch, line, yes):
    number = tmp_path.stat().st_dev
    monkeypatch.setattr(checks, "_text", lambda _: line.format(f"{os.major(number)}:{os.minor(number)}"))
    assert checks._counts_projects(str(tmp_path)) is yes


def test_a_cgroup_that_is_mounted_can_be_made_and_is_gone_afterwards():
    """In a group of the test's own: in the mount's, runs beside this test have theirs come and go."""
    need("root", "cgroup2")
    place = next(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line)
    own = Path(place) / f"nwtest-doctor-{os.getpid()}"
    own.mkdir()
    try:
        before = sorted(os.listdir(own))
        assert probe.attempt(probe.try_cgroup(str(own))) == ""
        assert sorted(os.listdir(own)) == before
    finally:
        own.rmdir()


# ---- the report ----


def test_text_and_json_say_the_same():
    on = node(rules=[rule("switch")])
    findings = {**GOOD, "seccomp": Finding(False, "no seccomp")}
    table = matrix.cells(on, findings)
    problems = ["rule analysis: because; next: do"]
    text = report.as_text(on, findings, checks.drifts(), table, problems)
    data = json.loads(report.as_json(on, findings, checks.drifts(), table, problems))
    assert data["ok"] is False
    assert data["problems"] == problems
    assert f"Not ready: {problems[0]}" in text
    assert {(cell["launcher"], cell["mode"], cell["profile"], cell["state"]) for cell in data["matrix"]} == {cell[:4] for cell in table}
    rows = [line.split() for line in text.splitlines() if line.startswith("  setuid  ")]
    assert rows[0] == ["setuid", "switch", "no", "degraded", "yes"]
    assert set(data["checks"]) == {check.name for check in checks.CHECKS}


def test_a_ready_node_says_so():
    on = node()
    assert "The setuid launcher can run every rule of the applied policy." in report.as_text(on, GOOD, [], matrix.cells(on, GOOD), [])
