"""Bad input: one clear line on stderr, the right exit code, a record where one can be written, and nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.need import need
from tests.node import kill, until
from tests.pki import Pki
from tests.site import command

FATAL = ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CPU")
LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_") and name not in (*FATAL, "RLIMIT_OFILE")]


def refused(ran, exit, *codes, recorded=True):
    """One line, one of the codes, that exit status; on record unless it was not possible; nothing on stdout."""
    assert (ran.rc, ran.out) == (exit, b""), ran
    assert ran.err.startswith(tuple(f"nodewrap: {code}: ".encode() for code in codes)), ran
    assert ran.err.count(b"\n") == 1, ran
    assert ran.err.endswith(b"\n"), ran
    assert len(ran.err) < 900, ran
    if recorded:
        last = ran.records[-1]["event"]
        assert (last["action"], last["code"]) == ("deny" if exit == 203 else "error", ran.err.split()[1].decode().rstrip(":"))
    return ran


@pytest.fixture
def own(node, home):
    """A directory of the pilot's."""
    top = home / "own"
    top.mkdir()
    os.chown(top, node.pilot.uid, node.pilot.gid)
    yield top
    subprocess.run(["rm", "-rf", top], check=True)


def owned(node, path, text=b"x", mode=0o600):
    path.write_bytes(text)
    os.chown(path, node.pilot.uid, node.pilot.gid)
    path.chmod(mode)
    return path


# ---- what the process inherits ----


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2)], ids=str)
def test_refusal_with_closed_descriptors_is_on_record_and_goes_into_no_file(node, closed):
    argv = [os.fspath(word) for word in (node.site.binary, "run", "--declare", "vo=none", "--declare", "subject=/CN=x", "--", "/bin/true")]
    wrapper = f"import os\nfor fd in {closed!r}:\n    os.close(fd)\nos.execv({argv[0]!r}, {argv!r})"
    ran = node.site.run(["/usr/bin/python3", "-I", "-c", wrapper])
    assert ran.rc == 203
    assert ran.record("deny")["event"]["code"] == "NW-NO-RULE"
    assert b"nodewrap: " not in node.site.audit.read_bytes()


@pytest.mark.parametrize("name", LIMITS)
def test_resource_limit_of_zero_is_told_or_does_no_harm(node, name):
    """AS, DATA, STACK and CPU of 0 are left out: the kernel then kills every program at its exec or next tick, ours too."""
    number = getattr(resource, name)
    binary = node.site.prefix / f"libexec/nodewrap/nodewrap-{node.site.launcher}"
    env = {"NODEWRAP_GUARD": str(node.site.sysconf / "guard")}
    argv = node.argv("map", ["/bin/true"], launcher=binary)
    process = node.site.start(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              preexec_fn=lambda: resource.setrlimit(number, (0, 0)))
    _, err = process.communicate(timeout=30)
    told = process.returncode == 201 and err.startswith(b"nodewrap: NW-LIMIT: " + name.encode()) and err.count(b"\n") == 1
    # Real root may raise the limit for itself (CAP_SYS_RESOURCE); the payload then starts under what the pilot had: 0 files is no program.
    harmless = (process.returncode, err) == (0, b"") or (node.privileged and process.returncode in (126, 127, 137) and err.count(b"\n") <= 1)
    assert told or harmless, (process.returncode, err)


@pytest.mark.parametrize(("name", "value"), [("RLIMIT_AS", 64 << 20), ("RLIMIT_DATA", 16 << 20), ("RLIMIT_STACK", 128 << 10), ("RLIMIT_NOFILE", 20)])
def test_resource_limit_that_is_too_small_is_told_or_raised(node, name, value):
    number = getattr(resource, name)
    binary = node.site.prefix / f"libexec/nodewrap/nodewrap-{node.site.launcher}"
    env = {"NODEWRAP_GUARD": str(node.site.sysconf / "guard")}
    argv = node.argv("map", ["/bin/true"], launcher=binary)
    process = node.site.start(argv, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              preexec_fn=lambda: resource.setrlimit(number, (value, value)))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 or (process.returncode == 201 and err.startswith(b"nodewrap: NW-LIMIT: ")), (process.returncode, err)


@pytest.mark.parametrize("what", ["arguments", "environment"])
@pytest.mark.parametrize("size", [1 << 20, 5 << 20])
def test_megabytes_of_arguments_or_environment_are_carried_or_told(node, what, size):
    """The kernel takes at most 6 MiB of both (3/4 of 8 MiB, fs/exec.c), from a setuid program 2 MiB."""
    unlimited = lambda: resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # noqa: E731
    words = ["x" * 131000] * (size // 131000)
    env = {f"OMP_{n}": word for n, word in enumerate(words)} if what == "environment" else {}
    argv = node.argv("map", ["/bin/true", *(words if what == "arguments" else ())])
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    assert hard == resource.RLIM_INFINITY, "the tests' own hard limit of the stack is in the way"
    process = node.site.start(argv, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=unlimited)
    _, err = process.communicate(timeout=60)
    too_long = process.returncode == 126 and err == b"nodewrap: NW-EXEC: cannot execute /bin/true: Argument list too long\n"
    assert (process.returncode, err) == (0, b"") or (size > 2 << 20 and node.privileged and too_long), (process.returncode, err)


def test_no_arguments_at_all_is_told(node):
    """argc 0 (CVE-2021-4034)."""
    binary = str(node.site.prefix / f"libexec/nodewrap/nodewrap-{node.site.launcher}")
    code = f"import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.execve({binary.encode()!r}, (ctypes.c_char_p * 1)(None), (ctypes.c_char_p * 1)(None))"
    ran = node.site.run(["/usr/bin/python3", "-I", "-c", code])
    # Since Linux 5.18 the kernel puts an empty argv[0] there.
    assert ran.rc in (201, 202), ran
    assert ran.err.startswith(b"nodewrap: NW-"), ran


def test_unknown_command_line_words_are_the_callers_mistake(node):
    for words in (["--bad"], ["--mode", "root"], ["--mode"], ["--wall", "-1"], ["--wall", "0"], ["--env", "LD_PRELOAD=/x"], ["--env", "=x"],
                  ["--status-fd", "1"], ["--status-fd", "300"], ["--workdir", "/"], ["--workdir", "/a/../b"], ["--profile", "../x"],
                  ["--declare", "x=y"]):
        refused(node.site.nodewrap("run", *words, "--", "/bin/true"), 201, *(f"NW-USAGE-{kind}" for kind in (
            "OPTION", "MODE", "NUMBER", "ENV", "PATH", "PROFILE", "DECLARE")))


# ---- the command ----


def test_command_that_cannot_run_is_told_with_its_name(node, own):
    noexec, broken, bare = own / "noexec", own / "broken", own / "bare"
    owned(node, noexec, b"#!/bin/sh\n", 0o644)
    owned(node, broken, b"#!/no/such/interpreter\n", 0o755)
    owned(node, bare, b"echo without a first line\n", 0o755)
    link = own / "loop"
    link.symlink_to("loop")
    # A missing interpreter is ENOENT, like a missing file; the shell says 127 as well.
    for words, code in (("/nonexistent", 127), ("nonexistent", 127), ("./nonexistent", 127), ("/usr", 126), (noexec, 126), (broken, 127), (bare, 126),
                        ("/etc/passwd/x", 127), ("loop/x", 126), ("x" * 300, 126), ("/" + "y" * 300, 126)):
        refused(node.run("map", words, options=["--workdir", str(own)]), code, "NW-EXEC")


def test_relative_command_is_looked_up_in_the_payloads_directory(node, own):
    owned(node, own / "tool", b"#!/bin/sh\necho tool\n", 0o755)
    ran = node.run("map", "./tool", options=["--workdir", str(own)])
    assert (ran.rc, ran.out) == (0, b"tool\n")


def test_missing_command_is_the_callers_mistake(node):
    refused(node.site.nodewrap("run"), 201, "NW-USAGE-COMMAND")
    refused(node.site.nodewrap("run", "--"), 201, "NW-USAGE-COMMAND")
    refused(node.site.nodewrap("run", "--", ""), 201, "NW-USAGE-COMMAND")


# ---- credentials ----


@pytest.fixture(scope="module")
def pki(session):
    """A PKI below the session's own root-owned directory, as the launcher wants it."""
    need("voms-proxy-fake")
    made = Pki(session.top / "pki-bad-input")
    yield made
    shutil.rmtree(made.directory)


@pytest.fixture
def trusted(node, pki):
    node.open_guard(ca_dir=str(pki.ca_dir), voms_dir=str(pki.voms_dir))
    return node


def credential(node, path):
    return node.site.nodewrap("run", "--credential", path, "--", "/bin/true")


def test_credential_that_is_no_readable_file_is_the_callers_mistake(trusted, own):
    dangling, loop, fifo = own / "dangling", own / "loop", own / "fifo"
    dangling.symlink_to(own / "nowhere")
    loop.symlink_to(loop)
    os.mkfifo(fifo)
    os.chown(fifo, trusted.pilot.uid, trusted.pilot.gid)
    big = owned(trusted, own / "big", b"")
    os.truncate(big, 1 << 30)
    unreadable = owned(trusted, own / "unreadable", mode=0o000)
    through = own / "link"
    through.symlink_to(owned(trusted, own / "file"))
    inside = (own / "missing", own / "file/x", dangling, loop, fifo, own, big, unreadable, through)
    system = ("/dev/zero", "/proc/self/environ", "/etc/shadow")
    for path in (*inside, *system):
        ran = refused(credential(trusted, path), 201, "NW-CREDENTIAL")
        assert ran.seconds < 10, path
        assert str(path).encode() in ran.err


def test_credential_that_others_may_read_or_that_is_not_the_callers_is_refused(trusted, own):
    for mode in (0o640, 0o604, 0o660, 0o602, 0o4600):
        refused(credential(trusted, owned(trusted, own / "proxy", mode=mode)), 201, "NW-CREDENTIAL-MODE")
    if trusted.privileged:
        foreign = own / "foreign"
        foreign.write_text("x")
        foreign.chmod(0o644)
        refused(credential(trusted, foreign), 201, "NW-CREDENTIAL-MODE")
    os.link(owned(trusted, own / "two"), own / "names")
    refused(credential(trusted, own / "two"), 201, "NW-CREDENTIAL-MODE")


def test_credential_without_sense_is_denied_with_its_reason(trusted, own, pki):
    good = pki.proxy().read_bytes()
    for text, codes in (
        (b"", ("NW-CREDENTIAL",)), (b"\0" * 1000, ("NW-PEM",)),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ("NW-X509-PARSE", "NW-PEM")),
        (good[:400], ("NW-PEM", "NW-X509-PARSE")), (pki.alice.pem, ("NW-KEY-MISSING", "NW-PROXY-NONE")),
    ):
        ran = credential(trusted, owned(trusted, own / "proxy", text))
        refused(ran, ran.rc, *codes)
        assert ran.rc in (201, 203)


def test_trust_directory_that_is_not_the_sites_own_is_an_internal_error_and_past_it_runs_nobody_who_may_be_banned(node, own, pki):
    text = node.policy_text(kinds=["log-only"], assurance="credential").replace('vo = "log-only"', 'vo = "testvo"')
    lenient = text.replace("[limits]", 'on_internal_error = "log-only"\n\n[limits]', 1)
    proxy = owned(node, own / "proxy", pki.proxy().read_bytes())
    ran_past = []
    for site, allow in ((text, False), (lenient, True), (lenient + '\n[[ban]]\ndn = "/CN=Somebody else"\n', False)):
        node.site.policy(site)
        for name in ("ca_dir", "voms_dir"):
            for broken in (own.parent / "missing", own):  # the second is the pilot's, who could speak for every VO
                node.open_guard(**{"ca_dir": str(pki.ca_dir), "voms_dir": str(pki.voms_dir), name: str(broken)})
                if broken == own and not node.privileged:
                    continue  # its own site
                ran = credential(node, proxy)
                if allow:
                    assert (ran.rc, ran.record("start")["user"]["id"]) == (0, str(node.pilot.uid)), ran
                    ran_past.append(name)
                else:
                    refused(ran, 202, "NW-TRUST")
                    assert f"see {name.replace('_', '-')} in the guard" in ran.err.decode()
    assert set(ran_past) == {"ca_dir", "voms_dir"}
    node.open_policy()


def test_proxy_that_is_swapped_while_it_is_checked_is_used_as_it_was_checked(setuid_node, pki, home):
    """Two users' proxies take turns under one name: who is on record is whose proxy the payload holds, in every run. And no run is refused
    because its file was replaced by rename(2) meanwhile, as renewal does."""
    need("root")
    setuid_node.open_guard(ca_dir=str(pki.ca_dir), voms_dir=str(pki.voms_dir))
    pilot = setuid_node.pilot
    text = setuid_node.policy_text(kinds=["log-only"], assurance="credential").replace('vo = "log-only"', 'vo = "testvo"')
    pki.user("Bob Tester")
    files = [owned(setuid_node, home / f"proxy{n}", pki.proxy(user).read_bytes()) for n, user in enumerate(("Alice Tester", "Bob Tester"))]
    name, stop = home / "proxy", threading.Event()

    def swap():
        for file in itertools.cycle(files):
            if stop.is_set():
                return
            spare = home / "spare"
            with contextlib.suppress(FileExistsError):
                shutil.copyfile(file, spare)
                os.chown(spare, pilot.uid, pilot.gid)
                spare.chmod(0o600)
                spare.rename(name)

    setuid_node.site.policy(text)
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        until(name.exists, "the first proxy")
        seen, rounds = set(), 0
        while rounds < 12 or (len(seen) < 2 and rounds < 60):
            rounds += 1
            ran = setuid_node.site.nodewrap("run", "--credential", name, "--profile", "batch", "--", "/bin/sh", "-c", "cat $X509_USER_PROXY")
            assert ran.rc == 0, ran
            dn = ran.record("start")["nodewrap"]["subject"]["dn"]
            assert pki.verify(ran.out).dn == dn
            seen.add(dn)
    finally:
        stop.set()
        thread.join()
        setuid_node.open_policy()
        for path in (*files, name):
            path.unlink()
    assert len(seen) == 2


# ---- work directories ----


def test_work_directory_that_is_not_the_callers_is_refused(node, own):
    link, file, closed = own / "link", owned(node, own / "file"), own / "closed"
    link.symlink_to(own)
    (closed / "in").mkdir(parents=True)
    for path in (closed, closed / "in"):
        os.chown(path, node.pilot.uid, node.pilot.gid)
    closed.chmod(0)
    cases = [("/etc", "NW-WORKDIR-OWNER"), (link, "NW-WORKDIR"), (file, "NW-WORKDIR"), (own / "missing", "NW-WORKDIR"), ("/proc/self", "NW-WORKDIR"),
             (closed / "in", "NW-WORKDIR"), ("/root", "NW-WORKDIR-OWNER"), ("/tmp", "NW-WORKDIR-OWNER")]
    for path, code in cases:
        ran = node.run("map", "/bin/true", options=["--workdir", str(path)])
        refused(ran, 201, code, "NW-WORKDIR-OWNER" if path == "/proc/self" else code)
    closed.chmod(0o700)


def test_exposed_directory_that_is_not_the_callers_is_refused(node, own):
    refused(node.run("map", "/bin/true", options=["--expose", "/etc"]), 201, "NW-WORKDIR-OWNER")
    refused(node.run("map", "/bin/true", options=["--expose", str(own / "missing")]), 201, "NW-WORKDIR")


def test_work_directory_that_holds_the_pilots_credential_is_refused(node, own):
    proxy = owned(node, own / "pilot.pem")
    ran = node.run("map", "/bin/true", options=["--workdir", str(own)], env={"X509_USER_PROXY": str(proxy)})
    refused(ran, 201, "NW-WORKDIR-SECRET")


def test_current_directory_that_was_removed_does_no_harm(node, own):
    gone = own / "gone"
    gone.mkdir()
    gone.chmod(0o777)
    argv = [os.fspath(word) for word in node.argv("map", ["/bin/pwd"])]
    code = f"import os\nos.chdir({str(gone)!r})\nos.rmdir({str(gone)!r})\nos.execv({argv[0]!r}, {argv!r})"
    os.chown(own, node.pilot.uid, node.pilot.gid)
    ran = node.site.run(["/usr/bin/python3", "-I", "-c", code], cwd=own)
    assert (ran.rc, ran.out) == (0, b"/tmp\n"), ran


# ---- policy ----

BROKEN = {
    "unknown key": ('[site]\nname = "T"\nmulti_usr = "yes"\n', "NW-POLICY-KEY"),
    "wrong type": ('[site]\nname = 5\nmulti_user = "yes"\nmodes = {}\n', "NW-POLICY-TYPE"),
    "no TOML": ("[site\n", "NW-POLICY-SYNTAX"),
    "duplicate rule": ("{whole}" + '\n[[rule]]\nname = "map"\nidentity = { mode = "map" }\nprofile = "batch"\n', "NW-POLICY-DUPLICATE"),
    "unknown profile": ("{whole}" + '\n[[rule]]\nname = "x"\nidentity = { mode = "map" }\nprofile = "nonesuch"\n', "NW-POLICY-REFERENCE"),
}
NO_ACCOUNT = {
    "unknown user": ('identity = { mode = "switch", account = "nwt-nobody-here" }', "NW-POLICY-ACCOUNT"),
    "root": ('identity = { mode = "switch", account = "root" }', "NW-POLICY-ACCOUNT"),
    "unknown pool": ('identity = { mode = "switch", pool = "nonesuch" }', "NW-POLICY-REFERENCE"),
}


def apply_fails(node, text, code):
    """The administrator is told where, and the policy in force stays in force."""
    whole = node.policy_text()
    before = os.readlink(node.site.state / "policy/current")
    try:
        with pytest.raises(RuntimeError) as told:
            node.site.policy(text.replace("{whole}", whole))
        assert "nodewrap.toml:" in str(told.value)
        assert code in str(told.value)
        assert os.readlink(node.site.state / "policy/current") == before
        assert node.run("map", "/bin/true").rc == 0
    finally:
        node.site.write(node.site.sysconf / "nodewrap.toml", whole)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_policy_is_told_with_its_line_and_does_not_reach_the_node(node, name):
    apply_fails(node, *BROKEN[name])


@pytest.mark.parametrize("name", NO_ACCOUNT)
def test_account_or_pool_that_is_not_there_is_told_when_the_policy_is_applied(setuid_node, name):
    identity, code = NO_ACCOUNT[name]
    apply_fails(setuid_node, "{whole}" + f'\n[[rule]]\nname = "x"\n{identity}\nprofile = "batch"\n', code)


def test_empty_pool_is_told_when_the_policy_is_applied(setuid_node):
    text = "{whole}" + '\n[pool.empty]\naccounts = []\n[[rule]]\nname = "x"\nidentity = { mode = "switch", pool = "empty" }\nprofile = "batch"\n'
    apply_fails(setuid_node, text, "NW-POLICY-")


def test_policy_that_others_may_write_is_not_applied(node):
    source = node.site.sysconf / "nodewrap.toml"
    source.chmod(0o666)
    try:
        with pytest.raises(RuntimeError, match="NW-POLICY-OWNER"):
            node.site.admin("policy", "apply")
    finally:
        source.chmod(0o644)


@contextlib.contextmanager
def changed(path, text=None, mode=None):
    """The file with that text or mode for a while; text None: as it is; b"": empty; False: not there."""
    info, kept = path.stat(), path.read_bytes()
    if text is False:
        path.unlink()
    elif text is not None:
        path.write_bytes(text)
    if mode is not None:
        path.chmod(mode)
    try:
        yield
    finally:
        path.write_bytes(kept)
        os.chown(path, info.st_uid, info.st_gid)
        path.chmod(stat.S_IMODE(info.st_mode))


@pytest.mark.parametrize("name", ["policy.bin", "profiles", "child-load.bpf", "child-decide.bpf"])
def test_compiled_policy_that_is_missing_damaged_or_writable_by_others_means_that_nothing_runs(node, name):
    path = node.site.state / "policy/current" / name
    for text, mode in ((False, None), (b"", None), (b"garbage" * 100, None), (None, 0o666)):
        with changed(path, text, mode):
            ran = node.run("map", "/bin/true")
            refused(ran, 202, "NW-POLICY-LOAD", "NW-PATH", "NW-PATH-WRITABLE", "NW-GUARD-SYNTAX", "NW-SECCOMP", "NW-CHILD", "NW-PROFILE", "NW-POLICY")


# ---- the guard ----


def test_guard_that_is_missing_or_not_understood_means_that_nothing_runs(node):
    guard = node.site.sysconf / "guard"
    whole = guard.read_bytes()
    cases = {
        False: ("NW-PATH",), b"": ("NW-GUARD-SYNTAX",),
        whole + b"unknown-word 1\n": ("NW-GUARD-SYNTAX",), whole.replace(b"-guard 1", b"-guard 2"): ("NW-GUARD-SYNTAX",),
        whole + b"# \xff\n": ("NW-GUARD-SYNTAX",), whole + b"# x" * 100000: ("NW-GUARD-SYNTAX", "NW-PATH"), whole[:-1]: ("NW-GUARD-SYNTAX",),
        whole + b"switch-uid 0-99\n": ("NW-GUARD-SYNTAX",),
    }
    for text, codes in cases.items():
        with changed(guard, text):
            ran = node.site.run([node.site.prefix / f"libexec/nodewrap/nodewrap-{node.site.launcher}", "run", "--", "/bin/true"],
                                env={"NODEWRAP_GUARD": str(guard)})
            refused(ran, 202, *codes, recorded=False)
            assert str(guard).encode() in ran.err


def test_guard_that_others_could_have_written_means_that_nothing_runs(node):
    guard = node.site.sysconf / "guard"
    for mode in (0o666, 0o664):
        with changed(guard, None, mode):
            os.chown(guard, -1, node.pilot.gid)
            refused(node.run("map", "/bin/true"), 202, "NW-PATH-WRITABLE", recorded=False)
    node.site.sysconf.chmod(0o777)
    try:
        refused(node.run("map", "/bin/true"), 202, "NW-PATH-WRITABLE", recorded=False)
    finally:
        node.site.sysconf.chmod(0o755)


def test_guard_of_somebody_else_means_that_nothing_runs(node):
    need("root")
    guard = node.site.sysconf / "guard"
    with changed(guard):
        os.chown(guard, node.site.accounts["outsider"].uid, 0)
        refused(node.run("map", "/bin/true"), 202, "NW-PATH-OWNER", recorded=False)


def test_setuid_launcher_does_not_follow_the_callers_guard(setuid_node, home):
    """NODEWRAP_GUARD is for the launcher that has no privilege."""
    mine = home / "guard"
    mine.write_bytes((setuid_node.site.sysconf / "guard").read_bytes().replace(b"deny", b"run"))
    ran = setuid_node.sh("static", "id -u", env={"NODEWRAP_GUARD": str(mine)})
    assert ran.rc in (0, 202), ran
    assert ran.text.strip() in ("", str(setuid_node.site.accounts["user1"].uid))
    mine.unlink()


def test_caller_that_the_guard_does_not_name_is_denied(node):
    node.open_guard(caller_uid=f"{node.pilot.uid + 5000}-{node.pilot.uid + 5001}")
    ran = refused(node.run("map", "/bin/true"), 203, "NW-CALLER")
    assert b"caller-uid" in ran.err


def test_profile_and_mode_that_the_guard_does_not_allow_are_refused(node):
    node.open_guard(allow=["map strict"])
    for kind, profile in (("map", "batch"), ("log-only", "strict")):
        refused(node.run(kind, "/bin/true", profile=profile), 202, "NW-GUARD")
    assert node.run("map", "/bin/true", profile="strict").rc in (0, 202)


def test_state_directory_that_is_full_means_that_nothing_runs(setuid_node):
    need("root")
    place = setuid_node.site.state / "leases"
    command("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1,mode=700", "none", place)
    try:
        refused(setuid_node.run("static", "/bin/true"), 202, "NW-STATE")
    finally:
        command("umount", place)


def test_refusals_one_after_the_other_leave_no_descriptor_process_or_lock(setuid_node):
    """A hundred refusals, then the account is free and the log has a record of each."""
    before = setuid_node.site.audit_size()
    started = [setuid_node.site.start(setuid_node.argv("static", ["/nonexistent"]), stderr=subprocess.DEVNULL) for _ in range(20)]
    codes = {process.wait(60) for process in started}
    for process in started:
        kill(process)
    assert codes <= {127, 202}  # 202: the one account was leased
    assert setuid_node.run("static", "/bin/true").rc == 0
    errors = [record for record in setuid_node.site.records(before) if record["event"]["action"] == "error"]
    assert len(errors) == 20
    assert json.dumps(errors)


def test_interpreter_that_is_a_link_does_not_change_where_its_neighbours_are_looked_for(node):
    """A directory that was walked to is known again by the name that it has, not by that of a link out of another one."""
    site = node.site
    beside = Path(site.read_guard()["script"][0]).parent / "python-by-link"
    beside.symlink_to(Path("/usr/bin/python3").resolve())
    if not node.privileged:
        os.chown(beside, node.pilot.uid, node.pilot.gid, follow_symlinks=False)
    try:
        site.guard(python=str(beside))
        assert node.run("map", "/bin/true").rc == 0
    finally:
        beside.unlink()
