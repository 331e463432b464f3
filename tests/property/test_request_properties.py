"""Whatever a caller types: an answer, never a crash, and the payload's own words untouched."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from nodewrap import environment, glexec, model, request, usage

NAMES = st.sampled_from([b"nodewrap", b"/usr/bin/nodewrap", b"glexec", b"/x/glexec", b"", b"-", b"\xff"])
OTHERS = [b"--help", b"--token", b"--", b"-h", b"-v", b"--bad", b"--mode=map", b"--wall=1h"]
OPTION = st.sampled_from([*(name.encode() for name in request.OPTIONS), *OTHERS])
VALUE = st.sampled_from([b"/w", b"map", b"5", b"1h", b"A=b", b"subject=/CN=a", b"fqan=/a", b"LD_X=1", b"", b"500", b"/bin/sh", b"/a/gltmp.x/y"])
WORD = st.one_of(OPTION, VALUE, st.binary(max_size=20))
ENTRY = st.one_of(st.binary(max_size=30), st.builds(lambda name, value: name + b"=" + value,
    st.sampled_from([b"GLEXEC_CLIENT_CERT", b"GLEXEC_SOURCE_PROXY", b"GLEXEC_TARGET_PROXY", b"GLEXEC_MODE", b"GLEXEC_ID", b"PATH"]),
    st.one_of(st.binary(max_size=20), st.sampled_from([b"/p", b"lcmaps_verify_account"]))))
CWD = st.one_of(st.just(b"/home/pilot"), st.just(b""), st.binary(max_size=10))


def outcome(argv, env, cwd):
    """The Ask, or the Refusal or Say; anything else escapes and fails the test."""
    try:
        return request.parse(argv, env, cwd)
    except (model.Refusal, model.Say) as answer:
        return answer


def is_one_line(answer):
    return answer.exit == 201 and answer.code.startswith("NW-") and "\n" not in answer.text and all(c.isprintable() for c in answer.text)


def is_sound(ask, argv):
    claims = [ask.job_id, ask.declared_id, *(claim for said in ask.declared.values() for claim in said)]
    paths = [ask.credential, ask.source_proxy, ask.target_proxy, ask.workdir, *ask.expose]
    return (
        1 <= ask.argv_from <= len(argv)
        and (ask.argv_from < len(argv) or ask.style == "glexec")
        and all(path == "" or (path.startswith("/") and "\0" not in path and ".." not in path.split("/")) for path in paths)
        and not any(environment.never(entry.partition("=")[0]) for entry in ask.env_set)
        and (ask.status_fd == -1 or ask.status_fd >= 3)
        and 0 <= ask.wall_s <= request.WALL_MAX
        and all(text.isprintable() and len(text.encode()) <= usage.CLAIM_BYTES for text in claims)
        and ask.mode in ("", *request.MODES)
        and len(ask.expose) <= request.EXPOSE_MAX
    )


@given(NAMES, st.lists(WORD, max_size=12), st.lists(ENTRY, max_size=8), CWD)
def test_every_request_has_an_answer(name, words, env, cwd):
    for argv in ([name, *words], [name, b"run", *words], words):
        answer = outcome(argv, env, cwd)
        if isinstance(answer, model.Refusal):
            assert is_one_line(answer)
        elif isinstance(answer, model.Ask):
            assert is_sound(answer, argv)
        else:
            assert answer.exit == 0


SOUND = st.sampled_from([b"--mode=map", b"--wall=5", b"--job-id=x", b"--workdir=/w", b"--profile=p"])


@given(st.lists(SOUND, unique=True), st.lists(st.binary(max_size=9), min_size=1))
def test_words_of_the_payload_are_never_looked_at(options, payload):
    payload = [word.replace(b"\0", b"") for word in payload]
    argv = [b"nodewrap", b"run", *options, b"--", *payload]
    before = list(argv)
    answer = outcome(argv, [], b"/")
    assert argv == before
    if payload[0]:
        assert argv[answer.argv_from:] == payload
    else:
        assert answer.code == "NW-USAGE-COMMAND"


@given(st.lists(st.binary(max_size=9)))
def test_words_of_a_glexec_payload_are_never_looked_at(payload):
    words = [b"/bin/sh", *(word.replace(b"\0", b"") for word in payload)]
    assert outcome([b"glexec", *words], [b"GLEXEC_CLIENT_CERT=/p"], b"/").argv_from == 1


@given(st.lists(st.text(), max_size=5), st.text(), st.text())
@example(["/a/gltmp.x/y", "\udcff/gltmp."], "\ud800", "\n")
def test_syslog_line_is_one_short_printable_line_whatever_it_quotes(command, name, cwd):
    line = glexec.line(name, name, name, name, cwd, command)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 960


@given(st.lists(st.text(alphabet="/.gltmp x'", max_size=30), max_size=6))
def test_found_temp_directories_are_clean_paths_that_the_words_contain(words):
    for path in glexec.temp_directories(words):
        assert path.startswith("/")
        assert path.rpartition("/")[2].startswith(glexec.TEMP_PREFIX)
        assert any(path in word for word in words)
        assert not {"", ".", ".."} & set(path.split("/")[1:])
