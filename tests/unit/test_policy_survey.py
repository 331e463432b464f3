"""Every answer of the survey of 60 sites (WLCG, 2010) can be said as a policy and is decided as answered; what contradicts itself is reported.

The data file has the normalised answers; what a condition's words mean here is `kind`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nodewrap.policy import evaluate
from tests.policy_tools import CALLER, compiled, facts

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "data" / "site-policies.csv").read_text(encoding="utf-8").splitlines()))
EARLY, LATE = 1795219200, 1893456000  # 2026-11-21, 2030-01-01
MODES = {"setuid": "switch", "log_only": "log-only"}
RULE = """
[[rule]]
name = "all"
identity = [{ mode = "log-only" }, { mode = "switch", account = "usr01", lease = "shared" }]
profile = "batch"
"""


def kind(norm, condition):
    """plain, until (for now), later (changes by date) or needs (somebody must assert that the condition holds)."""
    if norm in ("depends", "yes-with-conditions"):
        return "needs"
    if norm in ("no", "unknown") or not condition or condition.startswith(("but ", "as minimum", "tentative")):
        return "plain"
    return "until" if condition.startswith("for now") else "later" if condition == "moving to require" else "needs"


def scopes(row):
    return json.loads(row["scopes_json"] or "{}")


def answer(row, question, scope):
    """(norm, condition) as given for a scope; "" is the site as a whole. A question that other scopes answer and this one does not is open."""
    tables = scopes(row)
    if any(question in table for table in tables.values()):
        return tables.get(scope, {}).get(question, "unknown"), ""
    return row[f"{question}_norm"], row[f"{question}_conditions"]


def setting(question, norm):
    if question == "mupj":
        return f'multi_user = "{ {"no": "no", "unknown": "undecided"}.get(norm, "yes") }"'
    if question == "bypass":
        return f'on_internal_error = "{ {"no": "deny", "unknown": "undecided"}.get(norm, "log-only") }"'
    return f'modes = {{ {MODES[question]} = "{ {"unknown": "undecided"}.get(norm, norm) }" }}'


def when(scope):
    if not scope or scope == "vo:*":
        return ""
    return f'when = {{ vo = "{scope[3:]}" }}\n' if scope.startswith("vo:") else f'when = {{ host = "@{scope.replace(" ", "-")}" }}\n'


def stances(row, question, scope):
    """The stances that say this answer, none when the answer is the base's no."""
    norm, condition = answer(row, question, scope)
    if norm in ("no", "unknown"):
        return
    head = f'\n[[stance]]\nname = "{question}{"-" + scope.replace(" ", "-") if scope else ""}'
    body = f'"\n{when(scope)}{setting(question, norm)}\n'
    which = kind(norm, condition)
    yield head + body + {"needs": f'needs = ["c-{question}"]\n', "until": "expires = 2027-12-31\n"}.get(which, "")
    if which == "later":
        yield head + f'-later"\n{when(scope)}{setting(question, "require")}\nnot_before = 2028-01-01\n'


def policy_text(row, met):
    asserted = 'by = "VO manager"\non = 2026-11-01\nreference = "ticket 1"\n' if met else ""
    base = {question: answer(row, question, "")[0] for question in ("mupj", "setuid", "log_only", "bypass")}
    undecided = {question: "undecided" if norm == "unknown" and not scopes(row) else "no" for question, norm in base.items()}
    parts = [f'[site]\nname = "{row["site"]}"\nmulti_user = "{undecided["mupj"]}"\n']
    parts += [f'modes = {{ switch = "{undecided["setuid"]}", log-only = "{undecided["log_only"]}" }}\n']
    parts += ['on_internal_error = "undecided"\n'] if undecided["bypass"] == "undecided" else []
    parts += [f'\n[hosts]\n{chr(10).join(lines)}\n'] if (lines := host_lines(row)) else []
    parts += [f'\n[assertion.c-{question}]\ntext = "as answered"\n{asserted}' for question in base]
    every = sorted(scopes(row), key=lambda scope: scope != "vo:*") or [""]
    for question in base:
        scoped = any(question in table for table in scopes(row).values())
        parts += [text for scope in (every if scoped else [""]) for text in stances(row, question, scope)]
    return "".join(parts) + CALLER + RULE


def host_lines(row):
    return [f'{scope.replace(" ", "-")} = ["{host_of(scope)}"]' for scope in scopes(row) if not scope.startswith("vo:")]


def host_of(scope):
    return "n-" + scope.replace(" ", "-").lower()


def holds(row, question, scope, met, late):
    """What the site answered, decided without the policy code: "no", or the norm in force."""
    norm, condition = answer(row, question, scope)
    which = kind(norm, condition)
    if norm in ("no", "unknown") or (which == "needs" and not met) or (which == "until" and late):
        return "no"
    return "require" if which == "later" and late else norm


def request(scope, late, **more):
    vo = scope[3:] if scope.startswith("vo:") and scope != "vo:*" else "cms"
    return facts(vo=vo, fqans=(), host=host_of(scope), now=LATE if late else EARLY, **more)


def test_the_survey_is_complete():
    assert len(ROWS) == 60
    assert len({row["site"] for row in ROWS}) == 60


@pytest.mark.parametrize("met", [False, True], ids=["open", "asserted"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["site"])
def test_site_is_decided_as_it_answered(tmp_path, row, met):
    policy, problems = compiled(tmp_path, policy_text(row, met))
    assert policy is not None, problems
    for scope in list(scopes(row)) or [""]:
        for late in (False, True):
            expected = {question: holds(row, question, scope, met, late) for question in ("mupj", "setuid", "log_only", "bypass")}
            given = {mode: evaluate.evaluate(policy, request(scope, late, mode=mode)).permit for mode in MODES.values()}
            is_open = expected["mupj"] != "no"
            assert given["switch"] == (is_open and expected["setuid"] != "no"), (scope, late, expected)
            assert given["log-only"] == (is_open and expected["log_only"] != "no" and expected["setuid"] != "require"), (scope, late, expected)
            past_error = evaluate.on_internal_error(policy, request(scope, late)).permit
            assert past_error == (is_open and expected["bypass"] != "no"), (scope, late, expected)


def reported(tmp_path, row, words):
    return any(words in line for line in compiled(tmp_path, policy_text(row, True))[1])


def test_sites_that_accept_pilots_and_refuse_every_mode_are_reported(tmp_path):
    found = {row["site"] for row in ROWS if reported(tmp_path / row["site"], row, "no mode of identity is allowed")}
    undecided = {row["site"] for row in ROWS if row["setuid_norm"] == row["log_only_norm"] == "unknown"}
    assert found - undecided == {"USCMS-T2-Wisconsin"}


def test_sites_that_run_past_errors_and_refuse_log_only_are_reported(tmp_path):
    found = {row["site"] for row in ROWS if reported(tmp_path / row["site"], row, "modes.log-only = no refuses")}
    assert found == {row["site"] for row in ROWS if row["log_only_norm"] == "no" and row["bypass_norm"] in ("yes", "depends")}
    assert {"ES-T2-CIEMAT", "USATLAS"} <= found


def test_undecided_sites_are_told_so(tmp_path):
    found = {row["site"] for row in ROWS if reported(tmp_path / row["site"], row, "NW-POLICY-UNDECIDED")}
    assert found == {row["site"] for row in ROWS if "unknown" in (row["setuid_norm"], row["log_only_norm"], row["bypass_norm"])}
