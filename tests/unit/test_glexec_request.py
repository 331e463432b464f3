"""glexec's contract as its callers rely on it (HTCondor, DIRAC, glideinWMS, PanDA, the CMS probe)."""

from __future__ import annotations

import pytest

from nodewrap import glexec, model, request

CERT = {"GLEXEC_CLIENT_CERT": "/home/pilot/payload.pem"}


def parse(*words, env=None, cwd=b"/home/pilot"):
    entries = [f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in (CERT if env is None else env).items()]
    return request.parse([b"/usr/sbin/glexec", *(word.encode() for word in words)], entries, cwd)


def refused(*words, env=None, cwd=b"/home/pilot"):
    with pytest.raises(model.Refusal) as caught:
        parse(*words, env=env, cwd=cwd)
    assert caught.value.exit == 201
    assert "\n" not in caught.value.text
    return caught.value.code


def test_command_follows_the_name_and_is_never_searched():
    ask = parse("/usr/bin/id", "-u")
    assert (ask.style, ask.argv_from, ask.search, ask.credential) == ("glexec", 1, False, "/home/pilot/payload.pem")


def test_source_proxy_falls_back_to_the_client_certificate():
    assert parse("/bin/true").source_proxy == "/home/pilot/payload.pem"
    assert parse("/bin/true", env={**CERT, "GLEXEC_SOURCE_PROXY": "/s"}).source_proxy == "/s"


def test_relative_certificate_is_taken_from_the_current_directory():
    assert parse("/bin/true", env={"GLEXEC_CLIENT_CERT": "x509up_u501_1"}).credential == "/home/pilot/x509up_u501_1"


@pytest.mark.parametrize("env", [
    {}, {"GLEXEC_CLIENT_CERT": ""}, {**CERT, "GLEXEC_SOURCE_PROXY": ""}, {"X509_USER_PROXY": "/p"}, {"SSL_CLIENT_CERT": "PEM"},
])
def test_missing_or_empty_proxy_is_the_callers_mistake(env):
    assert refused("/bin/true", env=env) == "NW-USAGE-PROXY"
    assert refused(env=env) == "NW-USAGE-PROXY"


@pytest.mark.parametrize("path", ["", "x", "./x", "/a/", "/a/../b", "/"])
def test_target_that_is_no_absolute_file_name_is_refused(path):
    assert refused("/bin/true", env={**CERT, "GLEXEC_TARGET_PROXY": path}) in ("NW-USAGE-TARGET", "NW-USAGE-PATH")


def test_target_proxy_defaults_to_glexecs_name_and_dev_null_is_none():
    assert glexec.target_proxy(parse("/bin/true"), 4981, 17556) == "/tmp/x509up_u4981.glexec.17556"
    assert glexec.target_proxy(parse("/bin/true", env={**CERT, "GLEXEC_TARGET_PROXY": "/dev/null"}), 1, 2) == ""
    assert glexec.target_proxy(parse("/bin/true", env={**CERT, "GLEXEC_TARGET_PROXY": "/t/p"}), 1, 2) == "/t/p"


def test_call_without_a_command_asks_for_the_proxy_alone():
    ask = parse(env={**CERT, "GLEXEC_TARGET_PROXY": "/t/p"})
    assert (ask.argv_from, ask.target_proxy) == (1, "/t/p")
    assert refused(env={**CERT, "GLEXEC_TARGET_PROXY": "/dev/null"}) == "NW-USAGE-COMMAND"


def test_first_entry_of_a_name_counts_as_for_getenv():
    env = [b"GLEXEC_CLIENT_CERTX=/no", b"GLEXEC_CLIENT_CERT=/first", b"GLEXEC_CLIENT_CERT=/second"]
    assert request.parse([b"glexec", b"/bin/true"], env, b"/").credential == "/first"


@pytest.mark.parametrize("command", ["id", "./id", "bin/id", "//bin/id", "/bin//id", "/bin/../bin/id", "/bin/./id", "/bin/", "/", ""])
def test_command_that_is_not_plainly_absolute_is_refused(command):
    assert refused(command) == "NW-USAGE-COMMAND"


def test_command_longer_than_path_max_is_refused():
    assert parse("/" + "x" * 4094).argv_from == 1
    assert refused("/" + "x" * 4095) == "NW-USAGE-COMMAND"


@pytest.mark.parametrize("option", ["-V", "--help", "-x", "-", "--", "-hv"])
def test_unknown_option_is_refused(option):
    assert refused(option) == "NW-USAGE-OPTION"


@pytest.mark.parametrize(("option", "start"), [("-h", "usage: glexec"), ("-v", "glexec version")])
def test_help_and_version_need_no_proxy(option, start):
    with pytest.raises(model.Say) as caught:
        parse(option, env={})
    assert caught.value.exit == 0
    assert caught.value.text.startswith(start)


def test_id_keeps_its_words_and_loses_what_could_forge_a_line():
    assert parse("/bin/true", env={**CERT, "GLEXEC_ID": 'job 7\nroot: "x\x1b[2J\udcff'}).declared_id == "job 7?root: ?x?[2J?"
    long = parse("/bin/true", env={**CERT, "GLEXEC_ID": "x" * 9999}).declared_id
    assert (len(long), long[-3:]) == (256, "...")


def test_verify_form_names_the_account_that_must_come_out():
    ask = parse("500", "600", "/bin/id", env={**CERT, "GLEXEC_MODE": "lcmaps_verify_account"})
    assert (ask.argv_from, ask.declared) == (3, {"account": ["500:600"]})
    glexec.verify(ask, 500, 600)
    for uid, gid in ((501, 600), (500, 0)):
        with pytest.raises(model.Refusal) as caught:
            glexec.verify(ask, uid, gid)
        assert caught.value.exit == 203


def test_plain_form_verifies_nothing():
    ask = parse("/bin/true")
    glexec.verify(ask, 1, 1)
    assert ask.declared == {}


@pytest.mark.parametrize("uid", ["-1", "4294967295", "4294967294", " 0", "+0", "0x0", "0", "00", "4294967296", "", "1e3", "root"])
def test_verify_form_refuses_what_is_no_account(uid):
    env = {**CERT, "GLEXEC_MODE": "lcmaps_verify_account"}
    assert refused(uid, "600", "/bin/id", env=env) in ("NW-USAGE-NUMBER", "NW-USAGE-OPTION")
    assert refused("600", uid, "/bin/id", env=env) == "NW-USAGE-NUMBER"


def test_verify_form_without_command_and_unknown_mode_are_refused():
    assert refused("500", "600", env={**CERT, "GLEXEC_MODE": "lcmaps_verify_account"}) == "NW-USAGE-COMMAND"
    assert refused("/bin/true", env={**CERT, "GLEXEC_MODE": "root"}) == "NW-USAGE-MODE"
    assert parse("/bin/true", env={**CERT, "GLEXEC_MODE": ""}).argv_from == 1


@pytest.mark.parametrize(("words", "expected"), [
    (["/bin/cp", "/w/gltmp.a/payload.sh", "/w/gltmp.a/target"], ["/w/gltmp.a"]),
    (["/w/gltmp.a/target/run.sh", "/v/gltmp.b"], ["/w/gltmp.a", "/v/gltmp.b"]),
    (["/bin/sh", "-c", "cd /w/gltmp.a/target&&exec './x' >/w/gltmp.b/out"], ["/w/gltmp.a", "/w/gltmp.b"]),
    (["/bin/tar", "--directory=/w/gltmp.a/target"], ["/w/gltmp.a"]),
    (["/w/.gltmp-1/gltmp.a/target/gltmp.inner/x"], ["/w/.gltmp-1/gltmp.a"]),
    (["/bin/cat", "w/gltmp.a/x", "/w/../gltmp.a/x", "/w//gltmp.a", "/wgltmp.a/x", "gltmp.a", "/w/gltmp/x"], []),
])
def test_directories_of_mkgltempdir_are_found_in_the_command(words, expected):
    assert parse(*words).expose == expected


def test_directory_of_mkgltempdir_is_found_in_the_target_proxy():
    assert parse("/bin/true", env={**CERT, "GLEXEC_TARGET_PROXY": "/w/gltmp.a/target/user_proxy"}).expose == ["/w/gltmp.a"]


def test_number_of_exposed_directories_is_bounded():
    assert len(parse("/bin/ls", *[f"/w/gltmp.{i}" for i in range(99)]).expose) == glexec.EXPOSE_MAX


def test_syslog_line_is_the_one_that_glexec_wrote():
    start = 'real_user(pilot),real_group(grid)->mapped_user(pool1),mapped_group(grid) cwd: "/home/pool1" '
    who = ("pilot", "grid", "pool1", "grid", "/home/pool1")
    assert glexec.line(*who, ["/usr/bin/id"]) == start + 'cmd: "/usr/bin/id" (="/usr/bin/id")'
    assert glexec.line(*who, ["/bin/sleep", "60"]) == start + 'cmd: "/bin/sleep" (="/bin/sleep") args: "60"'


def test_syslog_line_cannot_be_forged_or_grow():
    evil = 'x" args: "y\n<0>kernel: \x1b[2J\udcff\\' * 200
    line = glexec.line(evil, evil, evil, evil, evil, [evil, evil])
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 960  # and the tag before it: RFC 3164 ends a line at 1,024
    assert line.count('"') == 8
