"""What of the pilot's environment a payload sees."""

from __future__ import annotations

import pytest

from nodewrap import environment, model

KEEP = {"keep": ["LANG", "OMP_*", "_CONDOR_*", "*_PROXY", "A*C*E"], "strip": ["_CONDOR_SECRET*", "OMP_X"], "set": {}}


def run(env, policy=None, style="run", env_set=(), home="/home/pool1", name="pool1", target=""):
    """(kept entries as text, what is set as a dict)"""
    ask = model.Ask(style)
    ask.env_set = list(env_set)
    raw = [entry.encode("utf-8", "surrogateescape") for entry in env]
    keep, new = environment.environment(KEEP if policy is None else policy, ask, raw, home, name, target)
    return [env[index] for index in keep], dict(entry.split("=", 1) for entry in new)


def test_empty_policy_keeps_nothing():
    assert run(["LANG=C", "PATH=/evil", "A=b"], policy={})[0] == []


def test_patterns_keep_and_strip_takes_back():
    env = ["LANG=C", "LANGUAGE=x", "OMP_NUM=2", "OMP_X=1", "_CONDOR_A=1", "_CONDOR_SECRETS=1", "http_PROXY=p", "AxCxE=1", "ACE=1", "ACEx=1", "xACE=1"]
    assert run(env)[0] == ["LANG=C", "OMP_NUM=2", "_CONDOR_A=1", "http_PROXY=p", "AxCxE=1", "ACE=1"]


def test_identity_variables_are_the_payloads_own():
    kept, new = run(["HOME=/home/pilot", "USER=pilot", "PATH=/evil", "X509_USER_PROXY=/pilot"], policy={"keep": ["*"]}, target="/tmp/p")
    assert kept == []
    own = {"HOME": "/home/pool1", "USER": "pool1", "LOGNAME": "pool1", "X509_USER_PROXY": "/tmp/p"}
    assert new == {"PATH": "/usr/local/bin:/usr/bin:/bin", "TMPDIR": "/tmp", **own}


@pytest.mark.parametrize("target", ["", "/dev/null"])
def test_payload_without_proxy_has_no_proxy_variable(target):
    kept, new = run(["X509_USER_PROXY=/pilot"], policy={"keep": ["*"]}, target=target)
    assert kept == []
    assert "X509_USER_PROXY" not in new


def test_account_without_home_and_name_gets_a_writable_home_and_no_lie():
    new = run([], home="", name="")[1]
    assert new["HOME"] == "/tmp"
    assert "USER" not in new


def test_callers_values_beat_defaults_and_the_sites_beat_the_callers():
    asked = ["A=pilot", "PATH=/p", "HOME=/w", "USER=root", "C=pilot"]
    new = run(["A=old"], policy={"keep": ["A"], "set": {"A": "site", "B": "site"}}, env_set=asked)[1]
    assert (new["A"], new["B"], new["C"], new["PATH"], new["HOME"], new["USER"]) == ("site", "site", "pilot", "/p", "/w", "pool1")


def test_glexec_style_keeps_glexecs_variables_and_run_does_not():
    env = ["GLEXEC_ENV=x", "GLEXEC_CLIENT_CERT=/p", "SSL_CLIENT_CERT=PEM", "OTHER=1"]
    assert run(env, style="glexec")[0] == ["GLEXEC_ENV=x", "GLEXEC_CLIENT_CERT=/p"]
    assert run(env)[0] == []


def test_first_of_equal_names_counts_even_when_it_is_dropped():
    assert run(["LANG=() { evil; }", "LANG=C"])[0] == []
    assert run(["LANG=C", "LANG=D"])[0] == ["LANG=C"]


def test_entries_that_are_none_are_dropped():
    assert run(["LANG", "=LANG", "", "LANG=", "OMP_\udcff=1"], policy={"keep": ["*"]})[0] == ["LANG=", "OMP_\udcff=1"]


@pytest.mark.parametrize("name", [
    "LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "LD_", "MALLOC_CHECK_", "PYTHONPATH", "PYTHONSTARTUP", "BASH_ENV", "ENV", "IFS", "SHELLOPTS", "PS4",
    "BASH_FUNC_ls%%", "GLIBC_TUNABLES", "GCONV_PATH", "NLSPATH", "LOCPATH", "RES_OPTIONS", "HOSTALIASES", "PERL5LIB", "PERL5OPT", "RUBYOPT",
    "NODE_OPTIONS", "OPENSSL_CONF", "SSLKEYLOGFILE", "X509_USER_PROXY", "X509_USER_KEY", "X509_USER_CERT", "BEARER_TOKEN", "BEARER_TOKEN_FILE",
    "JALIEN_TOKEN_KEY", "SSH_AUTH_SOCK", "SSL_CLIENT_CERT",
])
def test_banned_name_enters_by_no_door(name):
    kept, new = run([f"{name}=x"], policy={"keep": ["*", name]}, env_set=[f"{name}=x"])
    assert (kept, name in new) == ([], False)
    with pytest.raises(model.Refusal) as caught:
        run([], policy={"set": {name: "x"}})
    assert (caught.value.exit, caught.value.code) == (202, "NW-ENV-POLICY")


@pytest.mark.parametrize("policy", [
    {"keep": "LANG"}, {"keep": [1]}, {"strip": {}}, {"set": []}, {"set": {"A": 1}}, {"set": {"": "x"}}, {"set": {"A=B": "x"}},
    {"set": {"A": "x\0"}}, {"set": {"A": "() {"}},
])
def test_policy_of_another_shape_is_an_internal_error(policy):
    with pytest.raises(model.Refusal) as caught:
        run([], policy=policy)
    assert (caught.value.exit, caught.value.code) == (202, "NW-ENV-POLICY")
