"""nodewrap run's command line: what each word means, and one clear refusal for each that means nothing."""

from __future__ import annotations

import pytest

from nodewrap import model, request


def parse(*words, cwd=b"/home/pilot"):
    argv = [b"/usr/local/bin/nodewrap", b"run", *(word.encode("utf-8", "surrogateescape") for word in words)]
    return request.parse(argv, [], cwd)


def refused(*words, cwd=b"/home/pilot"):
    with pytest.raises(model.Refusal) as caught:
        parse(*words, cwd=cwd)
    assert caught.value.exit == 201
    assert "\n" not in caught.value.text
    return caught.value.code


def test_every_option_reaches_its_field_in_both_spellings():
    words = {
        "--mode": "map", "--profile": "strict", "--credential": "/p.pem", "--declare": "subject=/CN=jane", "--workdir": "/w", "--env": "A=b=c",
        "--status-fd": "5", "--job-id": "job 7", "--wall": "90", "--expose": "/x",
    }
    apart = parse(*[part for pair in words.items() for part in pair], "--", "cmd")
    glued = parse(*[f"{name}={value}" for name, value in words.items()], "cmd")
    for ask in (apart, glued):
        assert (ask.mode, ask.profile, ask.credential, ask.declared, ask.workdir) == ("map", "strict", "/p.pem", {"subject": ["/CN=jane"]}, "/w")
        assert (ask.env_set, ask.status_fd, ask.job_id, ask.wall_s, ask.expose) == (["A=b=c"], 5, "job 7", 90, ["/x"])
        assert ask.style == "run"


def test_all_options_are_in_the_help_and_none_other():
    named = {word.split("=")[0].strip(",") for word in request.HELP.split() if word.startswith("--") and len(word) > 2}
    assert named - {"--", "--name", "--help", "--version"} == set(request.OPTIONS)


def test_first_word_that_is_no_option_starts_the_command():
    ask = parse("--mode", "map", "ls", "--mode", "x", "--")
    assert (ask.argv_from, ask.search) == (4, True)


@pytest.mark.parametrize("payload", ["-x", "--", "--mode", "@file", "-", "--help"])
def test_what_stands_behind_two_dashes_is_the_command_whatever_it_is(payload):
    assert parse("--", payload, "--version").argv_from == 3


def test_command_with_a_slash_is_not_searched():
    assert not parse("./run.sh").search
    assert parse("run.sh").search


@pytest.mark.parametrize("word", ["--mod=map", "--mod", "-m", "--mode-x=map", "-", "---", "--=", "--Mode=map", "--envx"])
def test_abbreviated_and_unknown_options_are_refused(word):
    assert refused(word, "map", "true") == "NW-USAGE-OPTION"


@pytest.mark.parametrize("name", ["--token", "--envelope", "--input", "--output"])
def test_options_of_a_later_version_are_refused_by_name(name):
    assert refused(name, "x", "--", "true") == "NW-OPTION"


@pytest.mark.parametrize("name", sorted(set(request.OPTIONS) - request.REPEATED))
def test_single_option_given_twice_is_refused(name):
    value = {"--status-fd": "5", "--wall": "5", "--mode": "map"}.get(name, "/x" if name != "--profile" else "x")
    assert refused(name, value, f"{name}={value}", "true") == "NW-USAGE-OPTION"


@pytest.mark.parametrize("name", sorted(request.OPTIONS))
def test_option_without_its_value_is_refused(name):
    assert refused(name) == "NW-USAGE-OPTION"
    assert refused(name + "=", "true").startswith("NW-USAGE-")


@pytest.mark.parametrize("words", [(), ("--",), ("--mode", "map"), ("",), ("--", "")])
def test_missing_command_is_refused(words):
    assert refused(*words) == "NW-USAGE-COMMAND"


@pytest.mark.parametrize("text", ["", "-1", " 5", "5 ", "+5", "0x5", "05", "1_0", "٥", "5.0", "1e1", "4294967296", str(2**64 + 5), "0", "1", "2"])
def test_descriptor_that_is_no_plain_number_from_three_up_is_refused(text):
    assert refused("--status-fd", text, "true") == "NW-USAGE-NUMBER"


@pytest.mark.parametrize(("text", "seconds"), [("1", 1), ("90s", 90), ("30m", 1800), ("72h", 259200), ("366d", 366 * 86400)])
def test_wall_time_takes_seconds_and_units(text, seconds):
    assert parse("--wall", text, "true").wall_s == seconds


@pytest.mark.parametrize("text", ["0", "h", "-1h", "1.5h", "01h", "1w", "1 h", "367d", "99999999999999999999", "1hh", "0s", "1H"])
def test_wall_time_that_is_none_is_refused(text):
    assert refused("--wall", text, "true") == "NW-USAGE-NUMBER"


def test_relative_paths_are_taken_from_the_callers_directory():
    ask = parse("--workdir", "job/./7//", "--credential", "p.pem", "--expose=.", "true")
    assert (ask.workdir, ask.credential, ask.expose) == ("/home/pilot/job/7", "/home/pilot/p.pem", ["/home/pilot"])


@pytest.mark.parametrize("option", ["--workdir", "--credential", "--expose"])
@pytest.mark.parametrize("path", ["..", "/a/../b", "", "/" + "x" * 4095])
def test_paths_that_cannot_be_followed_by_name_are_refused(option, path):
    assert refused(option, path, "true") == "NW-USAGE-PATH"


@pytest.mark.parametrize("option", ["--workdir", "--expose"])
def test_root_directory_cannot_become_the_payloads(option):
    assert refused(option, "//", "true") == "NW-USAGE-PATH"
    assert refused(option, ".", "true", cwd=b"/") == "NW-USAGE-PATH"


def test_relative_path_without_known_directory_is_refused():
    assert refused("--workdir", "x", "true", cwd=b"") == "NW-USAGE-PATH"
    assert refused("--workdir", "x", "true", cwd=b"(unreachable)/x") == "NW-USAGE-PATH"


def test_path_of_exactly_path_max_is_accepted_and_bytes_count():
    assert len(parse("--workdir", "/" + "x" * 4094, "true").workdir) == 4095
    assert refused("--workdir", "/" + "é" * 2048, "true") == "NW-USAGE-PATH"


def test_credential_is_what_the_payload_gets():
    ask = parse("--credential", "/p.pem", "true")
    assert ask.source_proxy == ask.credential == "/p.pem"


def test_several_fqans_stay_in_order():
    ask = parse("--declare", "fqan=/a", "--declare=fqan=/a/b", "--declare", "vo=a", "true")
    assert ask.declared == {"fqan": ["/a", "/a/b"], "vo": ["a"]}


@pytest.mark.parametrize("claim", [
    "subject", "subject=", "subject=jane", "subject=/CN=a\nb", "subject=/CN=\x1b[2J", "subject=/CN=\u202ex", "subject=/CN=\udcff", "vo=", "vo=a\x7f",
    "fqan=a", "dn=/CN=a", "=x", "", "subject=/" + "x" * 256, "account=0:0",
])
def test_claim_that_is_no_printable_text_of_a_known_name_is_refused(claim):
    assert refused("--declare", claim, "true") in ("NW-USAGE-DECLARE", "NW-USAGE-CLAIM")


@pytest.mark.parametrize("name", ["subject", "vo"])
def test_second_subject_and_vo_are_refused(name):
    assert refused("--declare", f"{name}=/a", "--declare", f"{name}=/b", "true") == "NW-USAGE-DECLARE"


def test_counted_options_end_at_their_limit():
    fqans = [f"--declare=fqan=/a/{i}" for i in range(65)]
    assert len(parse(*fqans[:64], "true").declared["fqan"]) == 64
    assert refused(*fqans, "true") == "NW-USAGE-DECLARE"
    assert refused(*[f"--env=A{i}=" for i in range(257)], "true") == "NW-USAGE-LIMIT"
    assert refused(*[f"--expose=/a{i}" for i in range(33)], "true") == "NW-USAGE-LIMIT"


@pytest.mark.parametrize("entry", [
    "A", "=b", "", "1A=b", "A-B=c", "A B=c", "Ä=b", "LD_PRELOAD=/x", "X509_USER_PROXY=/p", "BASH_FUNC_x%%=()", "A=() { :;}",
])
def test_variable_that_may_not_be_passed_is_refused(entry):
    assert refused("--env", entry, "true") == "NW-USAGE-ENV"


def test_variable_given_twice_is_refused_though_one_is_the_beginning_of_another():
    assert parse("--env=AB=1", "--env=A=1", "true").env_set == ["AB=1", "A=1"]
    assert refused("--env=A=1", "--env=A=2", "true") == "NW-USAGE-ENV"


@pytest.mark.parametrize("text", ["", "a\nb", "\x1b]0;x\x07", "\udc80", "x" * 257, "\u2028"])
def test_job_id_that_could_spoil_a_record_is_refused(text):
    assert refused("--job-id", text, "true") == "NW-USAGE-CLAIM"


@pytest.mark.parametrize("mode", ["", "root", "Map", "log_only", "map "])
def test_unknown_mode_is_refused(mode):
    assert refused("--mode", mode, "true") == "NW-USAGE-MODE"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "é", "x" * 65])
def test_profile_name_that_could_be_a_path_is_refused(name):
    assert refused("--profile", name, "true") == "NW-USAGE-PROFILE"


@pytest.mark.parametrize("argv", [[], [b"nodewrap"], [b"nodewrap", b""], [b""], [b"nodewrap", b"runx"], [b"nodewrap", b"policy", b"apply"]])
def test_call_without_the_verb_is_refused(argv):
    with pytest.raises(model.Refusal) as caught:
        request.parse(argv, [], b"/")
    assert (caught.value.exit, caught.value.code[:9]) == (201, "NW-USAGE-")


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("run", "--help"), ("run", "-h"), ("run", "--mode", "map", "--help", "x")])
def test_help_is_said_and_nothing_runs(words):
    with pytest.raises(model.Say) as caught:
        request.parse([b"nodewrap", *(word.encode() for word in words)], [], b"/")
    assert (caught.value.exit, caught.value.text) == (0, request.HELP)


def test_help_behind_the_command_belongs_to_the_command():
    assert parse("true", "--help").argv_from == 2


def test_version_is_said():
    for argv in ([b"nodewrap", b"--version"], [b"nodewrap", b"run", b"--version"]):
        with pytest.raises(model.Say) as caught:
            request.parse(argv, [], b"/")
        assert caught.value.text.startswith("nodewrap ")


def test_name_of_the_program_selects_the_style_and_no_mode():
    assert request.parse([b"-odd-name", b"run", b"true"], [], b"/").mode == ""
    assert request.parse([b"/opt/x/glexec", b"/bin/true"], [b"GLEXEC_CLIENT_CERT=/p"], b"/").style == "glexec"
