"""Changed credentials are refused or the same: never another subject, never another exception."""

from __future__ import annotations

import base64
import random
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodewrap.credentials import Refusal, verify
from nodewrap.credentials.policyfile import allowed
from nodewrap.credentials.voms import short_fqan
from tests.fuzz_credentials import ANY_OF_VO, BLOCK, Bug, check, corpus, facts, mutate, resigned_ac, resigned_leaf
from tests.need import need
from tests.pki import Pki


@pytest.fixture(scope="module")
def site():
    """(credentials by name, trust, time, facts of their subjects)"""
    need("voms-proxy-fake")
    with tempfile.TemporaryDirectory() as directory:
        pki = Pki(Path(directory) / "pki")
        good, now = corpus(pki), int(time.time())
        trust = pki.trust()
        trust.pki = pki
        yield good, trust, now, {facts(verify(data, trust, now)) for data in good.values()}


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 4), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), block=st.integers(0, 9))
def test_one_flipped_bit_never_makes_another_subject(site, which, place, bit, block):
    good, trust, now, subjects = site
    data = list(good.values())[which]
    blocks = list(BLOCK.finditer(data))
    match = blocks[block % len(blocks)]
    der = bytearray(base64.b64decode(match[2]))
    der[int(place * len(der))] ^= 1 << bit
    changed = data[: match.start(2)] + base64.encodebytes(bytes(der)) + data[match.end(2) :]
    assert check(changed, trust, now, subjects)


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_any_damage_never_makes_another_subject(site, which, seed):
    good, trust, now, subjects = site
    assert check(mutate(list(good.values())[which], random.Random(seed)), trust, now, subjects)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), who=st.sampled_from(["user", "server"]))
def test_damage_with_a_good_signature_never_makes_another_user_or_vo(site, seed, who):
    """A hostile user signs damaged proxies; a hostile VOMS server signs damaged attribute certificates, and may say what it likes of its own VO."""
    _, trust, now, subjects = site
    if who == "user":
        assert check(resigned_leaf(trust.pki, random.Random(seed)), trust, now, subjects)
    else:
        any_of_vo = {(*one[:3], ANY_OF_VO, *one[4:]) for one in subjects}
        assert check(resigned_ac(trust.pki, random.Random(seed)), trust, now, any_of_vo)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000))
def test_any_bytes_are_refused(site, data):
    _, trust, now, _ = site
    assert check(data, trust, now, set()) != "ok"
    block = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(data) + b"-----END CERTIFICATE-----\n"
    assert check(block, trust, now, set()) != "ok"


@settings(max_examples=200, deadline=None)
@given(now=st.integers(-(2**63), 2**63))
def test_verdict_at_any_other_time_is_a_refusal(site, now):
    good, trust, made, _ = site
    if abs(now - made) > 2 * 86400:
        assert check(good["rfc"], trust, now, set()) in ("NW-PROXY-EXPIRED", "NW-PROXY-FUTURE", "NW-X509-EXPIRED", "NW-X509-FUTURE")


def test_the_check_itself_notices_another_subject_and_a_bug_of_ours(site, monkeypatch):
    good, trust, now, _ = site
    with pytest.raises(Bug, match="another subject"):
        check(good["rfc"], trust, now, set())
    monkeypatch.setattr("nodewrap.credentials.certificate._read_usage", None)
    with pytest.raises(Bug, match="'NoneType' object is not callable"):
        check(good["rfc"], trust, now, set())


SEGMENT = st.text("abzAZ09.-_", min_size=1, max_size=8)


@given(groups=st.lists(SEGMENT, min_size=1, max_size=4), role=st.one_of(st.none(), SEGMENT), capability=st.one_of(st.none(), SEGMENT))
def test_short_form_is_one_for_all_spellings(groups, role, capability):
    base = "".join(f"/{group}" for group in groups)
    spelled = base + (f"/Role={role}" if role else "/Role=NULL") + (f"/Capability={capability}" if capability else "/Capability=NULL")
    short = base + (f"/Role={role}" if role and role != "NULL" else "") + (f"/Capability={capability}" if capability and capability != "NULL" else "")
    if not (capability and capability != "NULL" and (role is None or role == "NULL")):
        assert short_fqan(spelled) == short
    assert short_fqan(short_fqan(spelled)) == short_fqan(spelled)


@given(text=st.text(max_size=300), ca=st.text(max_size=20), subject=st.text(max_size=20))
def test_any_signing_policy_is_an_answer_or_a_refusal(text, ca, subject):
    try:
        assert allowed(text, ca, subject, "f") in (True, False)
    except Refusal as refusal:
        assert refusal.code == "NW-X509-POLICY"  # noqa: PT017  both outcomes are fine
