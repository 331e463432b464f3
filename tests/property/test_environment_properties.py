"""No environment, policy or option brings a banned name to a payload, and no name comes twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewrap import environment, model

PREFIXED = [prefix + "X" for prefix in environment.HOOK_PREFIXES + environment.SECRET_PREFIXES]
BANNED = st.sampled_from([*sorted(environment.HOOKS | environment.SECRETS), *PREFIXED])
NAME = st.one_of(BANNED, st.sampled_from(["LANG", "A", "AB", "GLEXEC_X", "PATH", "HOME"]), st.text(max_size=6))
ENTRY = st.one_of(
    st.tuples(NAME.map(lambda name: name.encode("utf-8", "surrogatepass")), st.one_of(st.binary(max_size=6), st.just(b"() { x; }"))).map(b"=".join),
    st.binary(max_size=12),
)
PATTERN = st.one_of(st.just("*"), NAME, st.builds(lambda a, b: a + "*" + b, NAME, st.text(max_size=3)))
POLICY = st.fixed_dictionaries({}, optional={"keep": st.lists(PATTERN, max_size=6), "strip": st.lists(PATTERN, max_size=3),
                                             "set": st.dictionaries(NAME, st.text(max_size=5), max_size=3)})


ASKED = st.lists(st.builds("{}={}".format, NAME, st.text(max_size=4)), max_size=4)


def is_refused_rightly(policy):
    return any(environment.never(name) or environment.function(value) or not name or "=" in name or "\0" in name + value
               for name, value in policy.get("set", {}).items())


@given(POLICY, st.sampled_from(["run", "glexec"]), st.lists(ENTRY, max_size=10), ASKED, st.sampled_from(["", "/dev/null", "/tmp/p"]))
def test_banned_name_never_reaches_the_payload(policy, style, env, asked, target):
    ask = model.Ask(style)
    ask.env_set = asked
    if is_refused_rightly(policy):
        with pytest.raises(model.Refusal, match=r"env\.set"):
            environment.environment(policy, ask, env, "/home/x", "x", target)
        return
    keep, new = environment.environment(policy, ask, env, "/home/x", "x", target)
    payload = [env[index] for index in keep] + [entry.encode("utf-8", "surrogatepass") for entry in new]
    names = [entry.partition(b"=")[0] for entry in payload]
    assert len(set(names)) == len(names)
    assert all(b"=" in entry and not entry.startswith(b"=") for entry in [env[index] for index in keep])
    assert not any(entry.partition(b"=")[2].startswith(b"()") for entry in payload)
    banned = [name for name in names if environment.never(name.decode("utf-8", "surrogateescape"))]
    assert banned == ([b"X509_USER_PROXY"] if target == "/tmp/p" else [])
    assert keep == sorted(set(keep))


@given(st.lists(ENTRY, max_size=10), st.lists(PATTERN, max_size=4))
def test_what_is_kept_is_what_getenv_finds(env, patterns):
    keep, _ = environment.environment({"keep": patterns}, model.Ask("run"), env, "", "", "")
    for index in keep:
        name = env[index].partition(b"=")[0]
        assert not any(entry.startswith(name + b"=") for entry in env[:index])
