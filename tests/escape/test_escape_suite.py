"""Every attack of the suite (nodewrap/escape) against real installations: each launcher, mode and profile (``make escape``: all combinations).

The suite runs once, beside other tests (tests/conftest.py); each attack's results are looked at by a test of its name, in which the CVEs stand that
it replays.
"""

from __future__ import annotations

import re

import pytest

from nodewrap.escape.model import LEFT_OUT, attacks, catalogue
from tests.files import CHECKOUT
from tests.need import need

ATTACKS = attacks()
FLAW = re.compile(r"CVE-\d+-\d+|GHSA(?:-\w{4}){3}")


def name(attack):
    return "-".join([attack.id, *FLAW.findall(attack.row.replays)])


@pytest.fixture(scope="module")
def results(escape_suite):
    """{id of an attack: [result, as in the JSON report]}"""
    need("userns")
    found = {}
    for one in escape_suite():
        found.setdefault(one["attack"], []).append(one)
    return found


@pytest.mark.parametrize("attack", ATTACKS, ids=name)
def test_attack_is_stopped_or_a_documented_risk(results, attack):
    if attack.id not in results:
        need("root")
    mine = results[attack.id]
    assert [one for one in mine if one["failure"]] == []
    exercised = [one for one in mine if one["outcome"] != "not exercised"]
    if not exercised:
        pytest.skip(f"{attack.id}: {mine[0]['seen']}")


def test_every_attack_of_the_catalogue_is_played_or_says_why_not():
    assert catalogue().keys() - {attack.id for attack in ATTACKS} - LEFT_OUT.keys() == set()


def test_every_vulnerability_of_the_catalogue_has_its_lesson_and_names_the_attack():
    """docs/cve-lessons.md: a row of the table for each, with the ids of the attacks that replay it."""
    rows = [line.split("|") for line in (CHECKOUT / "docs/cve-lessons.md").read_text().splitlines() if line.startswith("| ")]
    told = {(cve, key) for row in rows for cve in FLAW.findall(row[1]) for key in re.findall(r"[A-K]\d\d", row[4])}
    assert {(cve, key) for key, row in catalogue().items() for cve in FLAW.findall(row.replays)} - told == set()


def test_more_than_two_hundred_attacks_are_played():
    assert len(ATTACKS) >= 200


def test_every_accepted_risk_stands_in_the_security_document():
    text = (CHECKOUT / "SECURITY.md").read_text().partition("## Accepted risks")[2].partition("\n## ")[0]
    assert {risk.key for attack in ATTACKS for risk in attack.accepted} - set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)) == set()
