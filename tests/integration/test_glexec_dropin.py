"""glexec by name: what pilots written for glexec 0.9 set, call and rely on, with real proxies (docs/glexec.md).

The steps of the CMS probe: test_mkgltempdir_glexec.py.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.need import need
from tests.pki import PLAIN, Pki

SHOW = 'echo "$(id -u) $(id -g) $PWD $HOME $X509_USER_PROXY"; stat -c "%u %a" "$X509_USER_PROXY"; cat "$X509_USER_PROXY"'


@pytest.fixture(scope="module")
def pki(session):
    need("root", "voms-proxy-fake")
    made = Pki(session.top / "pki-glexec")
    made.user("Bob Tester")
    yield made
    shutil.rmtree(made.directory)


class Glexec:
    """A site where every user of testvo runs as user1. call(*words, **options): glexec with Alice's proxy."""

    def __init__(self, node, pki, directory):
        self.node, self.pki, self.directory = node, pki, directory
        self.site, self.pilot = node.site, node.pilot
        self.user = node.site.accounts.get("user1")
        self.proxy = self.keep(pki.proxy().read_bytes(), "alice.pem")

    def keep(self, text, name, mode=0o600):
        """A file of the pilot's."""
        path = self.directory / name
        path.unlink(missing_ok=True)
        path.write_bytes(text)
        os.chown(path, self.pilot.uid, self.pilot.gid)
        path.chmod(mode)
        return path

    def call(self, *words, env=None, **more):
        settings = {"GLEXEC_CLIENT_CERT": str(self.proxy), **(env or {})}
        return self.site.run([self.site.prefix / "bin/glexec", *words], env=settings, **more)

    def sh(self, script, **more):
        return self.call("/bin/sh", "-c", script, **more)


def opened(node, pki, home, kind):
    node.open_guard(ca_dir=str(pki.ca_dir), voms_dir=str(pki.voms_dir))
    text = node.policy_text(kinds=[kind], assurance="credential").replace(f'vo = "{kind}"', 'vo = "testvo"')
    text = text.replace('lease = "exclusive"', 'lease = "shared"')  # an account that keeps its home, as glexec's had
    node.site.policy(text + '\n[[ban]]\ndn = "/DC=org/DC=example/O=Users/CN=Bob Tester"\nreason = "test"\n')
    directory = home / "glexec"
    directory.mkdir()
    os.chown(directory, node.pilot.uid, node.pilot.gid)
    yield Glexec(node, pki, directory)
    shutil.rmtree(directory)
    node.open_policy()


@pytest.fixture
def glexec(setuid_node, pki, home):
    yield from opened(setuid_node, pki, home, "static")


@pytest.fixture(params=[("setuid", "log-only"), ("setuid", "map"), ("userns", "log-only"), ("userns", "map")], ids="-".join)
def elsewhere(request, pki, home):
    """Modes without accounts, which glexec called log-only or did not have."""
    launcher, kind = request.param
    yield from opened(request.getfixturevalue(f"{launcher}_node"), pki, home, kind)


def refused(ran, exit, *codes):
    assert (ran.rc, ran.out) == (exit, b""), ran
    assert ran.err.startswith(tuple(f"nodewrap: {code}: ".encode() for code in codes)), ran
    assert ran.err.count(b"\n") == 1
    return ran


# ---- what the payload gets ----


def test_payload_is_the_mapped_user_in_its_home_with_its_own_copy_of_the_proxy(glexec):
    ran = glexec.sh(SHOW)
    assert (ran.rc, ran.err) == (0, b""), ran
    first, owner, *text = ran.text.split("\n", 2)
    uid, gid, cwd, home, proxy = first.split()
    assert (int(uid), int(gid), cwd, home) == (glexec.user.uid, glexec.user.gid, str(glexec.user.home), str(glexec.user.home))
    assert re.fullmatch(rf"/tmp/x509up_u{glexec.user.uid}\.glexec\.\d+", proxy)
    assert owner == f"{glexec.user.uid} 600"
    assert text[0].encode() == glexec.proxy.read_bytes()
    start = ran.record("start")
    assert start["nodewrap"]["subject"]["dn"] == glexec.pki.alice.name
    assert start["nodewrap"]["subject"]["assurance"] == "credential"
    assert start["nodewrap"]["subject"]["fqans"] == ["/testvo/Role=pilot"]
    assert (start["user"]["name"], start["nodewrap"]["profile"]) == (glexec.user.name, "compat")


def test_copy_comes_from_the_source_proxy_and_identity_from_the_client_certificate(glexec):
    other = glexec.keep(glexec.pki.proxy(fqans=(PLAIN,)).read_bytes(), "source.pem")
    ran = glexec.sh("cat $X509_USER_PROXY", env={"GLEXEC_SOURCE_PROXY": str(other)})
    assert (ran.rc, ran.out) == (0, other.read_bytes())
    assert ran.record("start")["nodewrap"]["subject"]["fqans"] == ["/testvo/Role=pilot"]


def test_target_proxy_is_written_where_it_is_asked_for(glexec):
    target = glexec.user.home / "proxy"
    ran = glexec.sh("echo $X509_USER_PROXY", env={"GLEXEC_TARGET_PROXY": str(target)})
    assert (ran.rc, ran.text.strip()) == (0, str(target))
    info = target.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (glexec.user.uid, glexec.user.gid, 0o600)
    assert target.read_bytes() == glexec.proxy.read_bytes()
    target.unlink()


def test_call_without_a_command_only_refreshes_the_target_proxy(glexec):
    target = glexec.user.home / "refreshed"
    target.write_text("old, and longer than nothing")
    os.chown(target, glexec.user.uid, glexec.user.gid)
    target.chmod(0o644)
    ran = glexec.call(env={"GLEXEC_TARGET_PROXY": str(target)})
    assert (ran.rc, ran.out, ran.err) == (0, b"", b"")
    assert target.read_bytes() == glexec.proxy.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    target.unlink()


def test_target_proxy_of_somebody_else_is_never_overwritten(glexec):
    """A file of another owner, a hard link, a symbolic link, a FIFO, a directory that the user may not write."""
    home = glexec.user.home
    foreign, link, fifo = home / "foreign", home / "link", home / "fifo"
    foreign.write_text("keep")
    foreign.chmod(0o666)
    link.symlink_to(foreign)
    os.mkfifo(fifo, 0o666)
    for target in (foreign, link, fifo, "/etc/x509up", "/nonexistent/x"):
        refused(glexec.call("/bin/true", env={"GLEXEC_TARGET_PROXY": str(target)}), 201, "NW-FILE")
    assert foreign.read_text() == "keep"
    for path in (foreign, link, fifo):
        path.unlink()


def test_no_copy_is_made_for_dev_null(glexec):
    ran = glexec.sh('echo "[$X509_USER_PROXY]"; ls /tmp', env={"GLEXEC_TARGET_PROXY": "/dev/null"})
    assert (ran.rc, ran.out) == (0, b"[]\n")
    refused(glexec.call(env={"GLEXEC_TARGET_PROXY": "/dev/null"}), 201, "NW-USAGE-COMMAND")


def test_environment_is_cleared_but_for_glexecs_own_and_what_policy_keeps(glexec):
    env = {"GLEXEC_ID": "job 1", "GLEXEC_ENV": "packed", "SECRET": "x", "LD_PRELOAD": "", "MALLOC_CHECK_": "0", "X509_USER_PROXY": "/pilots/own",
           "OMP_NUM_THREADS": "2", "BASH_ENV": "/tmp/x"}
    got = dict(line.split("=", 1) for line in glexec.call("/usr/bin/env", env=env).text.splitlines())
    assert {"GLEXEC_CLIENT_CERT", "GLEXEC_ID", "GLEXEC_ENV", "PATH", "HOME", "USER", "LOGNAME", "X509_USER_PROXY", "OMP_NUM_THREADS"} <= set(got)
    assert not {"SECRET", "LD_PRELOAD", "MALLOC_CHECK_", "BASH_ENV"} & set(got)
    assert got["X509_USER_PROXY"] != "/pilots/own"
    assert (got["USER"], got["HOME"]) == (glexec.user.name, str(glexec.user.home))


def test_streams_pass_through(glexec):
    """HTCondor pipes a tar stream through glexec."""
    data = bytes(range(256)) * 4096
    ran = glexec.sh("cat; echo problem >&2", stdin=data)
    assert (ran.rc, ran.out, ran.err) == (0, data, b"problem\n")


def test_umask_of_the_payload_is_glexecs(glexec):
    assert glexec.sh("umask").text.strip() == "0022"


def test_line_of_the_factory_test_works(glexec):
    """glideinWMS: env GLEXEC_CLIENT_CERT=… glexec $(readlink -f /bin/sh) -c 'id && echo "Hello World"'."""
    shell = os.path.realpath("/bin/sh")
    ran = glexec.call(shell, "-c", 'id && echo "Hello World"')
    assert (ran.rc, ran.text.splitlines()[-1]) == (0, "Hello World")


# ---- exit status ----


CODES = [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("exit 201", 204), ("exit 203", 204), ("exit 204", 204),
         ("kill -9 $$", 137), ("kill -15 $$", 143), ("exec /nonexistent", 127)]


@pytest.mark.parametrize(("script", "code"), CODES)
def test_exit_status_is_the_commands(glexec, script, code):
    assert glexec.sh(script).rc == code


def test_command_not_found_is_127_and_not_executable_126(glexec):
    refused(glexec.call("/nonexistent"), 127, "NW-EXEC")
    refused(glexec.call("/etc/passwd"), 126, "NW-EXEC")


@pytest.mark.parametrize("words", [["true"], ["./true"], ["/bin/../bin/true"], ["-x"], ["--", "/bin/true"], [""]], ids=repr)
def test_command_that_is_no_plain_absolute_path_is_the_callers_mistake(glexec, words):
    refused(glexec.call(*words), 201, "NW-USAGE-COMMAND", "NW-USAGE-OPTION")


def test_usage_and_version_need_no_proxy(glexec):
    for word, text in (("-h", "usage: glexec"), ("-v", "glexec version")):
        ran = glexec.call(word, env={"GLEXEC_CLIENT_CERT": None})
        assert (ran.rc, ran.err) == (0, b"")
        assert text in ran.text


# ---- the proxy ----


MISTAKES = [{"GLEXEC_CLIENT_CERT": None}, {"GLEXEC_CLIENT_CERT": ""}, {"GLEXEC_SOURCE_PROXY": ""}, {"GLEXEC_CLIENT_CERT": "/nonexistent"},
            {"GLEXEC_SOURCE_PROXY": "/nonexistent"}, {"GLEXEC_TARGET_PROXY": "relative"}, {"GLEXEC_MODE": "other"}]


@pytest.mark.parametrize("env", MISTAKES, ids=repr)
def test_missing_or_empty_settings_are_the_callers_mistake(glexec, env):
    refused(glexec.call("/bin/true", env=env), 201, "NW-USAGE-PROXY", "NW-CREDENTIAL", "NW-USAGE-TARGET", "NW-USAGE-MODE")


def test_proxy_with_wrong_mode_or_owner_is_refused(glexec):
    text = glexec.proxy.read_bytes()
    for mode in (0o644, 0o640, 0o666):
        refused(glexec.call("/bin/true", env={"GLEXEC_CLIENT_CERT": str(glexec.keep(text, "wrong.pem", mode))}), 201, "NW-CREDENTIAL-MODE")
    path = glexec.keep(text, "wrong.pem")
    os.chown(path, glexec.user.uid, -1)
    refused(glexec.call("/bin/true", env={"GLEXEC_CLIENT_CERT": str(path)}), 201, "NW-CREDENTIAL")
    os.chown(path, glexec.pilot.uid, -1)
    path.chmod(0o644)
    refused(glexec.call("/bin/true", env={"GLEXEC_SOURCE_PROXY": str(path)}), 201, "NW-CREDENTIAL-MODE")


def test_expired_untrusted_and_plain_credentials_are_denied(glexec):
    pki = glexec.pki
    pki.user("Eve Stranger", issuer=pki.make_ca("/DC=org/DC=elsewhere/CN=Other CA"))
    for text, codes in (
        (pki.proxy(args=("-rfc", "-pastproxy", "30:00", "-hours", "12")).read_bytes(), ("NW-PROXY-EXPIRED",)),
        (pki.proxy("Eve Stranger").read_bytes(), ("NW-X509-UNTRUSTED",)),
        (pki.alice.pem + pki.alice.key_pem, ("NW-PROXY-NONE",)),
        (pki.proxy(fqans=()).read_bytes(), ("NW-VOMS-NONE",)),
    ):
        ran = refused(glexec.call("/bin/true", env={"GLEXEC_CLIENT_CERT": str(glexec.keep(text, "bad.pem"))}), 203, *codes)
        assert ran.record("deny")["event"]["code"] in codes


def test_banned_user_is_denied_under_a_limited_proxy_too(glexec):
    for args in (("-rfc",), ("-rfc", "-limited"), ("-proxyver", "2")):
        proxy = glexec.keep(glexec.pki.proxy("Bob Tester", args=args).read_bytes(), "bob.pem")
        ran = refused(glexec.call("/bin/true", env={"GLEXEC_CLIENT_CERT": str(proxy)}), 203, "NW-BANNED")
        assert ran.record("deny")["nodewrap"]["subject"]["dn"].endswith("CN=Bob Tester")


def test_pilots_own_proxy_is_no_payloads(glexec):
    own = glexec.keep(glexec.proxy.read_bytes(), "pilot.pem")
    refused(glexec.call("/bin/true", env={"X509_USER_PROXY": str(own)}), 203, "NW-PILOT-CREDENTIAL")


def test_caller_outside_the_group_is_denied(glexec, session):
    """203, as glexec answered a caller that was not on its white list; nothing of nodewrap ran, so there is no record."""
    ran = glexec.call("/bin/true", user=session.accounts["outsider"])
    assert ran.rc == 203, ran
    assert ran.err.startswith(b"nodewrap: NW-CALLER: ")
    assert ran.records == []


# ---- verify, identification, syslog ----


def test_verify_mode_runs_only_as_the_account_that_is_named(glexec):
    env = {"GLEXEC_MODE": "lcmaps_verify_account"}
    uid, gid = str(glexec.user.uid), str(glexec.user.gid)
    assert glexec.call(uid, gid, "/usr/bin/id", "-u", env=env).text.strip() == uid
    refused(glexec.call(str(glexec.pilot.uid), gid, "/usr/bin/id", env=env), 203, "NW-GLEXEC-VERIFY")
    refused(glexec.call(uid, str(glexec.pilot.gid), "/usr/bin/id", env=env), 203, "NW-GLEXEC-VERIFY")
    for words in ([uid, gid], ["root", gid, "/bin/true"], ["0", "0", "/bin/true"], ["/bin/true"]):
        refused(glexec.call(*words, env=env), 201, "NW-USAGE-COMMAND", "NW-USAGE-NUMBER")


def test_identification_is_on_record_and_cannot_break_a_line(glexec):
    ran = glexec.call("/bin/true", env={"GLEXEC_ID": 'job\n"},"user":{"id":"0"}\x1b[2J'})
    assert ran.rc == 0
    assert ran.record("start")["nodewrap"]["declared"] == {"id": "job??},?user?:{?id?:?0?}?[2J"}
    assert ran.record("start")["user"]["id"] == str(glexec.user.uid)


def test_syslog_has_glexecs_own_line(glexec, syslog):
    assert glexec.call("/bin/echo", "a b", "c\nd").rc == 0
    lines = [line for line in syslog.lines() if b"real_user(" in line and glexec.pilot.name.encode() in line]
    (line,) = [line.decode() for line in lines]
    pattern = (
        rf'<\d+>[a-z]+\[\d+\]: real_user\({glexec.pilot.name}\),real_group\([^)]*\)->mapped_user\({glexec.user.name}\),mapped_group\([^)]*\) '
        r'cwd: "[^"]*" cmd: "/bin/echo" \(="/bin/echo"\) args: "a b c\?d"'
    )
    assert re.fullmatch(pattern, line), line


# ---- mkgltempdir ----


TEMPORARY = [((), 0o755, 0o700), (("-t", "777"), 0o755, 0o777), (("-m", "0711", "-t", "0750"), 0o711, 0o750)]


@pytest.mark.parametrize(("options", "outer", "inner"), TEMPORARY, ids=repr)
def test_mkgltempdir_makes_what_its_options_say(glexec, options, outer, inner):
    env = {"GLEXEC_CLIENT_CERT": str(glexec.proxy), "GLEXEC_LOCATION": None, "GLITE_LOCATION": None}
    tool = glexec.site.prefix / "bin/mkgltempdir"
    place = glexec.directory.parent
    ran = glexec.site.run([tool, *options, place], env=env)
    assert (ran.rc, ran.err) == (0, b""), ran
    made = Path(ran.text.strip())
    assert made.parent.parent == place
    found = [(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in (made.parent, made)]
    assert found == [(glexec.pilot.uid, outer), (glexec.pilot.uid, inner)]  # id-mapped: on disk all is the pilot's
    assert glexec.call("/usr/bin/stat", "-c", "%u", made).text.strip() == str(glexec.user.uid)
    assert glexec.call("/usr/bin/touch", made / "file").rc == 0
    assert glexec.site.run([tool, "-r", made], env=env).rc == 201
    assert glexec.site.run([tool, "-r", "-f", made], env=env).rc == 0
    assert not made.parent.exists()


# ---- without accounts ----


def test_glexec_works_in_modes_without_accounts(elsewhere):
    ran = elsewhere.sh('id -u; cat "$X509_USER_PROXY"')
    assert (ran.rc, ran.err) == (0, b""), ran
    uid, _, text = ran.text.partition("\n")
    expected = {"map": "1000", "log-only": str(elsewhere.pilot.uid)}[ran.record("start")["nodewrap"]["mode"]]
    assert uid == expected
    assert text.encode() == elsewhere.proxy.read_bytes()
    assert elsewhere.sh("exit 203").rc == 204


def test_name_of_the_program_gives_no_right(glexec):
    """A link called glexec, or one called anything else, to the same launcher: same policy."""
    launcher = glexec.site.prefix / "libexec/nodewrap/nodewrap-setuid"
    ran = glexec.site.run(["/bin/bash", "-c", f"exec -a glexec {launcher} /usr/bin/id -u"], env={"GLEXEC_CLIENT_CERT": str(glexec.proxy)})
    assert ran.text.strip() == str(glexec.user.uid)
    ran = glexec.site.run(["/bin/bash", "-c", f"exec -a anything {launcher} /usr/bin/id -u"], env={"GLEXEC_CLIENT_CERT": str(glexec.proxy)})
    assert (ran.rc, ran.err.startswith(b"nodewrap: NW-USAGE-VERB: ")) == (201, True)
    assert subprocess.run(["test", "-x", launcher]).returncode == 0
