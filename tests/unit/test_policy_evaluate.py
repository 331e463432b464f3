"""Decisions on small policies: order of the steps, every denial code, and what a pilot may ask for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nodewrap.policy import evaluate
from tests.policy_tools import CALLER, SITE, facts, good

RULE = '[[rule]]\nname = "r"\nwhen = { vo = "atlas" }\nidentity = { mode = "map" }\nprofile = "strict"\n'


@pytest.fixture
def policy(tmp_path):
    return lambda text, **more: good(tmp_path, text, **more)


def decide(policy, **more):
    return evaluate.evaluate(policy, facts(**more))


def test_first_matching_rule_decides(policy):
    second = RULE.replace('"r"', '"s"').replace("strict", "batch").replace('{ vo = "atlas" }', '{ vo = "atlas", fqan = "/atlas/*" }')
    verdict = decide(policy(SITE + CALLER + second + RULE))
    assert (verdict.permit, verdict.exit, verdict.rule, verdict.profile, verdict.mode) == (True, 0, "s", "batch", "map")
    assert verdict.identity == {"mode": "map", "inside_uid": 1000, "inside_gid": 1000, "size": 1}


def test_nothing_is_permitted_without_a_rule(policy):
    verdict = decide(policy(SITE + CALLER))
    assert (verdict.permit, verdict.exit, verdict.code) == (False, 203, "NW-NO-RULE")


def test_default_deny_names_the_closest_miss(policy):
    other = RULE.replace('"r"', '"cms"').replace("atlas", "cms")
    near = RULE.replace("{ vo", '{ fqan = "/atlas/uk/*", vo')
    verdict = decide(policy(SITE + CALLER + other + near))
    assert verdict.steps[-1] == "deny NW-NO-RULE: closest is rule r, which fails on: fqan"
    assert "closest fails on fqan" in verdict.text


def test_denial_tells_the_pilot_no_rule_account_or_pattern(policy):
    pool = '[pool.secretpool]\naccounts = ["usr[01-03]"]\n'
    rule = RULE.replace('"r"', '"secretrule"').replace("{ vo", '{ dn = "/CN=Secret*", vo')
    rule = rule.replace('mode = "map"', 'mode = "switch", pool = "secretpool"')
    ban = '[[ban]]\nname = "secretban"\ndn = "/CN=Mallory"\nreason = "secretreason"\n'
    made = policy(SITE + CALLER + pool + rule + ban)
    for verdict in (decide(made), decide(made, dn="/CN=Mallory"), decide(made, caller="x"), decide(made, dn="/CN=Secret", mode="map")):
        assert not verdict.permit
        assert "ecret" not in verdict.text
        assert "usr0" not in verdict.text


@pytest.mark.parametrize("order", [0, 1])
def test_ban_comes_before_every_rule_and_before_the_caller(policy, order):
    parts = [RULE, '[[ban]]\ndn = "/DC=org/DC=example/CN=Ann"\nreason = "x"\n']
    made = policy(SITE + CALLER + parts[order] + parts[1 - order])
    assert decide(made).code == "NW-BANNED"
    assert decide(made, caller="nobody-we-know").code == "NW-BANNED"
    assert decide(made, dn="/DC=org/DC=example/CN=Bob").permit


@pytest.mark.parametrize(("ban", "who", "banned"), [
    ('vo = "ATLAS"', {}, True), ('vo = "cms"', {}, False), ('fqan = "/atlas/*"', {}, True), ('fqan = "/ATLAS"', {}, True),
    ('fqan = "/atlas/Role=bad"', {}, False), ('fqan = "/atlas/Role=bad"', {"fqans": ("/atlas", "/atlas/role=BAD")}, True),
    ('caller = "plt01"', {}, True), ('caller = "plt*"', {}, True), ('caller = "plt02"', {}, False),
    ('issuer = "https://iam.example.org/"\nsub = "1f"', {"issuer": "https://IAM.example.org", "sub": "1f"}, True),
    ('issuer = "https://iam.example.org/"\nsub = "1f"', {"issuer": "https://IAM.example.org", "sub": "2f"}, False),
    ('issuer = "/DC=org/CN=Bad CA"', {"issuer": "/dc=org/CN=bad ca"}, True), ('dn_glob = "/DC=org/DC=example/*"', {}, True),
    ('dn_glob = "/DC=org/*/CN=B*"', {}, False), ('dn = ["/CN=x", "CN=Ann,DC=example,DC=org"]', {}, True),
    ('dn = "/DC=org/DC=example/CN=A*"', {}, False),
])
def test_ban_by(policy, ban, who, banned):
    verdict = decide(policy(SITE + CALLER + RULE + f"[[ban]]\n{ban}\n"), **who)
    assert (verdict.code == "NW-BANNED") is banned
    assert verdict.permit is not banned


@pytest.mark.parametrize(("ban", "who"), [
    ('fqan = "/atlas/bad/*"', {"fqans": ()}), ('fqan = "/atlas/bad/*"', {"fqans": ("/x/y",)}), ('vo = "cms"', {"vo": "", "fqans": ()}),
    ('caller = "plt09"', {"caller": "", "groups": ["pilots"]}),
])
def test_who_hides_what_is_banned_is_refused(policy, ban, who):
    open_rule = RULE.replace('when = { vo = "atlas" }\n', "")
    made = policy(SITE + '[[caller]]\naccount = ["plt*"]\ngroup = ["pilots"]\n' + open_rule + f"[[ban]]\n{ban}\n")
    assert decide(made, **who).code == "NW-BANNED"


def test_ban_ends_on_its_date_and_begins_on_its_date(policy):
    made = policy(SITE + CALLER + RULE + '[[ban]]\ndn = "/DC=org/DC=example/CN=Ann"\nnot_before = 2026-12-01\nexpires = 2026-12-24\n')
    assert decide(made).permit
    assert decide(made, now=1796083200).code == "NW-BANNED"  # 2026-12-01T00:00Z
    assert decide(made, now=1798156799).code == "NW-BANNED"  # 2026-12-24T23:59:59Z
    assert decide(made, now=1798156800).permit


def test_expired_rule_is_skipped_with_a_step_and_its_own_code(policy):
    made = policy(SITE + CALLER + RULE + "expires = 2026-11-30\n")
    assert decide(made).permit
    verdict = decide(made, now=1796083200)
    assert verdict.code == "NW-EXPIRED"
    assert "rule r: no, expired" in verdict.steps


def test_rule_waits_for_its_assertion(policy):
    text = SITE + CALLER + RULE + 'needs = ["jail"]\n[assertion.jail]\ntext = "jobs run in a VM"\n'
    assert decide(policy(text)).code == "NW-CONDITION"
    verdict = decide(policy(text + 'by = "admin"\non = 2026-11-01\nreference = "ticket 7"\nexpires = 2026-12-31\n'))
    assert verdict.permit
    assert "needs jail: admin on 2026-11-01 (ticket 7)" in verdict.steps
    assert decide(policy(text + 'by = "a"\non = 2026-11-01\nreference = "t"\nexpires = 2026-11-02\n')).code == "NW-EXPIRED"


def test_liability_is_in_the_steps(policy):
    rule = RULE.replace('"map"', '"log-only"') + 'liability = { by = "VO manager", on = 2026-11-01, reference = "doc 4" }\n'
    site = SITE.replace('name = "T"', 'name = "T"\nliability_for = ["log-only"]')
    assert "needs liability: VO manager on 2026-11-01 (doc 4)" in decide(policy(site + CALLER + rule)).steps


def test_assurance_below_the_sites_and_below_the_rules(policy):
    made = policy(SITE + CALLER + RULE.replace("{ vo", '{ assurance = "signed", vo'))
    assert decide(made, assurance="declared").text.count("needs credential, has declared") == 1
    verdict = decide(made)
    assert verdict.code == "NW-ASSURANCE"
    assert "needs signed, has credential" in verdict.text
    assert decide(made, assurance="bound").permit
    assert decide(made, assurance="nonsense").code == "NW-ASSURANCE"


@pytest.mark.parametrize(("text", "code"), [
    (SITE.replace('"yes"', '"no"'), "NW-SITE-CLOSED"), (SITE + 'closed = "downtime"\n', "NW-SITE-CLOSED"),
    (SITE + 'needs = ["x"]\n[assertion.x]\ntext = "x"\n', "NW-SITE-CLOSED"),
    (SITE.replace("map = \"allow\"", "map = \"no\""), "NW-MODE"),
    (SITE.replace("switch = \"allow\"", "switch = \"require\""), "NW-MODE"), (SITE.replace("map = \"allow\"", "map = \"require\""), ""),
    (SITE.replace("log-only = \"allow\"", "log-only = \"require\""), ""),
])
def test_site_stance(policy, text, code):
    assert decide(policy(text + CALLER + RULE)).code == code


def test_stances_are_laid_over_the_site_in_order(policy):
    stances = """
[hosts]
old = ["wn[001-050]", "gpu*"]
[[stance]]
name = "old nodes"
when = { host = "@old" }
modes = { map = "no" }
[[stance]]
name = "alice"
when = { vo = "alice" }
modes = { map = "allow" }
[[stance]]
name = "later"
not_before = 2027-01-01
closed = "moved"
""".replace('"old nodes"', '"old"')
    made = policy(SITE + stances + CALLER + RULE.replace('"atlas"', '["atlas", "alice"]'))
    assert decide(made).permit
    assert decide(made, host="WN007.example.org").code == "NW-MODE"
    assert decide(made, host="gpu1").code == "NW-MODE"
    assert decide(made, host="wn051").permit
    assert decide(made, host="wn007", vo="alice", fqans=()).permit
    assert decide(made, now=1798761600).code == "NW-SITE-CLOSED"


def test_unknown_caller_is_refused(policy):
    made = policy(SITE + '[[caller]]\naccount = ["plt*"]\n[[caller]]\ngroup = "pilots"\n[[caller]]\nuid = ["2000-2009", "3000"]\n' + RULE)
    assert decide(made, caller="mallory").code == "NW-CALLER"
    assert decide(made, caller="mallory", groups=["pilots"]).permit
    assert decide(made, caller="", uid=2009).permit
    assert decide(made, caller="", uid=2010).code == "NW-CALLER"
    assert decide(made, caller="xplt01").code == "NW-CALLER"


def test_caller_of_one_vo_runs_no_other_vos_payloads(policy):
    made = policy(SITE + '[[caller]]\naccount = ["plt*"]\nvo = "atlas"\n' + RULE.replace('when = { vo = "atlas" }\n', ""))
    assert decide(made).permit
    assert decide(made, vo="cms", fqans=("/cms",)).code == "NW-CALLER"
    assert decide(made, vo="", fqans=()).code == "NW-CALLER"


def test_callers_vo_stands_in_only_where_no_credential_could_have_shown_one(policy):
    low = SITE + 'minimum_assurance = "none"\n'
    made = policy(low + '[[caller]]\naccount = ["plt*"]\nvo = "atlas"\n' + RULE)
    assert decide(made, dn="", vo="", fqans=(), assurance="none").permit
    assert decide(made, dn="/CN=x", vo="", fqans=(), assurance="declared").permit
    assert not decide(made, vo="", fqans=(), assurance="credential").permit


TWO = """\
[[rule]]
name = "r"
identity = [{ mode = "map" }, { mode = "log-only" }, { mode = "switch", account = "usr01" }]
profile = ["batch", "strict"]
"""


@pytest.mark.parametrize(("asked", "given"), [
    ({}, "map"), ({"mode": "map"}, "map"), ({"mode": "switch"}, "switch"), ({"mode": "log-only"}, ""), ({"mode": "root"}, ""),
    ({"launcher": "userns"}, "map"), ({"launcher": "userns", "mode": "switch"}, ""),
])
def test_pilot_may_ask_for_more_separation_and_never_for_less(policy, asked, given):
    verdict = decide(policy(SITE + CALLER + TWO), **asked)
    assert verdict.mode == given
    assert verdict.code == ("" if given else "NW-MODE")


def test_pilot_may_ask_for_a_listed_profile_only(policy):
    made = policy(SITE + CALLER + TWO)
    assert decide(made).profile == "batch"
    assert decide(made, profile="strict").profile == "strict"
    assert decide(made, profile="none").code == "NW-PROFILE"


def test_limits_and_environment_are_compiled(policy):
    text = SITE + CALLER + RULE + """limits = { wall = "72h", grace = "30s", memory = "4GiB", cpu = "2h", scratch = "20GiB" }
env = { keep = ["FOO_*"], strip = ["FOO_SECRET"], set = { A = "b" } }
[limits]
files = 1024
[env]
keep = ["TZ"]
set = { A = "a", B = "c" }
"""
    verdict = decide(policy(text))
    assert verdict.limits == {
        "wall_s": 259200, "grace_s": 30, "rlimits": {0: 7200, 2: 4 << 30, 4: 0, 6: 16384, 7: 1024}, "must": False,
        "run": {32: 4 << 30, 33: 0, 38: 20 << 30},
    }
    assert verdict.env["keep"] == ["TZ", "FOO_*"]
    assert "FOO_SECRET" in verdict.env["strip"]
    assert verdict.env["set"] == {"A": "b", "B": "c"}


def test_a_rule_has_its_own_limits_of_the_run_over_the_sites(policy):
    text = SITE + CALLER + RULE + """limits = { memory = "1GiB", swap = "2GiB", cpus = 1.5, on_missing = "refuse" }
[limits]
processes = 50
cpus = 8
io_weight = 10
io_write = "100MiB"
io_read_ops = 5000
"""
    limits = decide(policy(text)).limits
    assert (limits["run"], limits["must"]) == ({32: 1 << 30, 33: 2 << 30, 34: 50, 35: 150_000, 37: 10, 40: 100 << 20, 41: 5000}, True)


def test_a_policy_without_limits_asks_nothing_of_a_cgroup(policy):
    assert decide(policy(SITE + CALLER + RULE)).limits["run"] == {}


def test_internal_error_is_a_bypass_only_where_the_site_says_so_and_never_for_the_banned(policy):
    ban = '[[ban]]\ndn = "/CN=Mallory"\n'
    closed = evaluate.on_internal_error(policy(SITE + CALLER + RULE + ban), facts())
    assert (closed.permit, closed.code, closed.alarm) == (False, "NW-BYPASS", True)
    made = policy(SITE + 'on_internal_error = "log-only"\n' + CALLER + RULE + ban)
    verdict = evaluate.on_internal_error(made, facts())
    assert (verdict.permit, verdict.mode, verdict.profile, verdict.alarm) == (True, "log-only", "strict", True)
    assert evaluate.on_internal_error(made, facts(dn="CN=mallory")).code == "NW-BANNED"
    assert evaluate.on_internal_error(made, facts(dn="")).code == "NW-BYPASS"
    assert evaluate.on_internal_error(made, facts(caller="x")).code == "NW-CALLER"


@pytest.mark.parametrize(("ban", "asked"), [
    ('dn = "/CN=Mallory"', True), ('dn_glob = "/CN=M*"', True), ('fqan = "/cms/*"', True), ('vo = "cms"', True), ('issuer = "/CN=Bad CA"', True),
    ('issuer = "https://x.example.org"\nsub = "1"', True), ('caller = "plt09"', False), ('caller = "q*"', False),
    ('dn = "/CN=Mallory"\nexpires = 2026-01-01', False), ('dn = "/CN=Mallory"\nnot_before = 2027-01-01', False),
])
def test_bypass_needs_a_name_that_is_vouched_for_where_a_ban_would_ask_for_it(policy, ban, asked):
    made = policy(SITE + 'on_internal_error = "log-only"\n' + CALLER + RULE + f"[[ban]]\n{ban}\n")
    assert evaluate.on_internal_error(made, facts()).permit
    for assurance in ("none", "declared"):  # the site asks for a credential
        verdict = evaluate.on_internal_error(made, facts(assurance=assurance))
        assert (verdict.permit, verdict.code, verdict.alarm) == (not asked, "NW-BYPASS" * asked, True)
    declared = policy(SITE + 'on_internal_error = "log-only"\nminimum_assurance = "declared"\n' + CALLER + RULE + f"[[ban]]\n{ban}\n")
    assert evaluate.on_internal_error(declared, facts(assurance="declared")).permit, "as without an error: it is all that the site asks for"
    assert evaluate.on_internal_error(declared, facts(assurance="none")).permit is not asked


@pytest.mark.parametrize(("when", "over", "stopped"), [
    ('vo = "atlas"', "", True), ('vo = "cms"', "", True), ('caller = "plt*"', "", True), ('caller = "q*"', "", False), ('host = "wn02"', "", False),
    ('launcher = "userns"', "", False), ('vo = "atlas"', "expires = 2026-01-01\n", False),
])
def test_bypass_is_not_for_callers_one_of_whose_rules_wants_a_container(policy, when, over, stopped):
    boxed = RULE.replace('{ vo = "atlas" }', f"{{ {when} }}").replace('"r"', '"boxed"').replace('"strict"', '"batch"')
    site = SITE + 'on_internal_error = "log-only"\n' + CALLER + boxed + 'image = ["/cvmfs/x/*"]\n' + over
    last = RULE.replace('vo = "atlas"', 'issuer = "/CN=CA"')
    assert evaluate.on_internal_error(policy(site + last), facts()).permit, "images are allowed and not a must"
    verdict = evaluate.on_internal_error(policy(site + 'backend = "apptainer"\n' + last), facts())
    assert (verdict.permit, verdict.code) == (not stopped, "NW-BYPASS" * stopped)


def test_running_payload_of_a_banned_subject_is_found(policy):
    made = policy(SITE + CALLER + RULE + '[[ban]]\nname = "incident-7"\ndn = "/CN=Mallory"\nreason = "stolen key"\n')
    assert evaluate.banned(made, facts()) == ""
    assert "incident-7" in evaluate.banned(made, facts(dn="/CN=mallory"))


def test_bans_cost_nothing_each_and_rules_a_few_calls_each(policy):
    """Counted, not timed: calls of functions, Python's and C's, on the way to a permit by the last rule."""

    def calls(rules, bans):
        texts = [RULE.replace('"r"', f'"r{n}"').replace("{ vo", f'{{ fqan = "/atlas/g{n}/*", vo') for n in range(rules)]
        made = policy(SITE + CALLER + "".join(texts) + "".join(f'[[ban]]\ndn = "/DC=org/CN=Bad {n}"\n' for n in range(bans)))
        asked, seen = facts(fqans=(f"/atlas/g{rules - 1}",)), []
        sys.setprofile(lambda frame, event, arg: seen.append(event))
        permit = evaluate.evaluate(made, asked).permit
        sys.setprofile(None)
        assert permit
        return seen.count("call") + seen.count("c_call")

    assert calls(10, 1000) - calls(10, 1) == 0
    assert calls(200, 1) - calls(10, 1) < 190 * 25


def test_hot_path_imports_nothing_slow():
    banned = {"re", "json", "typing", "dataclasses", "enum", "argparse", "logging", "collections", "functools", "inspect", "pathlib", "datetime"}
    code = "import nodewrap.policy.evaluate, nodewrap.policy.store; print(' '.join(sys.modules))"
    root = str(Path(evaluate.__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert "nodewrap.policy.evaluate" in done.stdout.split()
    assert not banned & set(done.stdout.split())


