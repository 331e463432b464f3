"""What holds for every request: evaluation is total and repeatable, a ban wins under every spelling, a wish never widens what is given."""

from __future__ import annotations

import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodewrap import model
from nodewrap.policy import evaluate, lint, names
from tests.policy_tools import CALLER, SITE, facts, good

RULES = """
[[rule]]
name = "uk"
when = { vo = "atlas", fqan = "/atlas/uk/*" }
identity = [{ mode = "map" }, { mode = "switch", account = "usr01" }]
profile = ["batch", "strict"]
[[rule]]
name = "atlas"
when = { vo = "atlas", assurance = "declared" }
identity = [{ mode = "log-only" }, { mode = "map" }]
profile = ["compat", "batch"]
expires = 2027-06-30
[[rule]]
name = "dn"
when = { dn = "/DC=org/DC=example/*", host = "wn*", launcher = ["setuid", "socket"] }
identity = { mode = "switch", account = "usr02" }
profile = "strict"
[[rule]]
name = "rest"
when = { group = "pilots" }
identity = { mode = "log-only" }
profile = "none"
"""
SITES = {
    "open": SITE + 'minimum_assurance = "none"\n', "switch": SITE.replace('switch = "allow"', 'switch = "require"'),
    "stance": SITE + 'minimum_assurance = "none"\n[[stance]]\nname = "x"\nwhen = { vo = "cms" }\nmodes = { log-only = "no" }\nclosed = ""\n',
    "past-errors": SITE + 'on_internal_error = "log-only"\n',
}
BAN_KINDS = [
    'dn = "/DC=org/DC=example/CN=Ann"', 'vo = "atlas"', 'fqan = "/atlas/uk/*"', 'caller = "plt01"', 'issuer = "https://iam"\nsub = "1"',
    'dn_glob = "/DC=org/*"',
]


def policy(text):
    with tempfile.TemporaryDirectory() as directory:
        return good(Path(directory) / "c", text)


@pytest.fixture(scope="module")
def policies():
    return {name: policy(site + CALLER + RULES) for name, site in SITES.items()}


@pytest.fixture(scope="module")
def banning():
    return {ban: policy(SITES["open"] + CALLER + RULES + f"[[ban]]\n{ban}\n") for ban in BAN_KINDS}


KNOWN = ["", "/DC=org/DC=example/CN=Ann", "CN=Ann,DC=example,DC=org", "/CN=x/CN=proxy", "/", "=", "\\x", "/CN=\\xff\ud800\udcff"]
people = st.sampled_from(KNOWN) | st.text(max_size=30)
requests = st.builds(
    facts,
    caller=st.sampled_from(["plt01", "plt02", "", "x"]) | st.text(max_size=5), dn=people, vo=st.sampled_from(["", "atlas", "ATLAS", "cms"]),
    fqans=st.lists(st.sampled_from(["/atlas", "/atlas/uk", "/atlas/uk/Role=x", "/cms", "", "/", "//"]) | st.text(max_size=10), max_size=3),
    assurance=st.sampled_from([*model.ASSURANCE, "?"]), issuer=st.sampled_from(["", "https://iam/", "/CN=CA"]) | st.text(max_size=10),
    sub=st.sampled_from(["", "1"]), launcher=st.sampled_from(["setuid", "socket", "userns"]), now=st.integers(0, 2**33),
    groups=st.just(["pilots"]) | st.just([]), host=st.sampled_from(["wn1", "WN1.example.org", "x", ""]),
)
asked = st.tuples(st.sampled_from(["", "switch", "map", "log-only", "none", "?"]), st.sampled_from(["", "strict", "batch", "compat", "none", "?"]))


def told(verdict):
    return {name: getattr(verdict, name) for name in verdict.__slots__}


@settings(deadline=None)
@given(request=requests, wish=asked, name=st.sampled_from(sorted(SITES)))
def test_evaluation_is_total_and_deterministic(policies, request, wish, name):
    request.mode, request.profile = wish
    for decide in (evaluate.evaluate, evaluate.on_internal_error):
        first = decide(policies[name], request)
        assert told(first) == told(decide(policies[name], request))
        assert first.permit == (first.code == "") == (first.exit == 0)
        assert first.permit or (first.exit == 203 and first.code.startswith("NW-") and "\n" not in first.text)
        assert first.steps


@settings(deadline=None)
@given(request=requests, wish=asked, name=st.sampled_from(sorted(SITES)))
def test_a_request_never_widens_what_is_given_unasked(policies, request, wish, name):
    base = evaluate.evaluate(policies[name], request)
    request.mode, request.profile = wish
    verdict = evaluate.evaluate(policies[name], request)
    if verdict.permit:
        assert base.permit
        assert base.rule == verdict.rule
        assert evaluate.MODES.index(verdict.mode) >= evaluate.MODES.index(base.mode)
        assert lint.STRENGTH.index(verdict.profile) >= lint.STRENGTH.index(base.profile)


@settings(deadline=None)
@given(request=requests, ban=st.sampled_from(BAN_KINDS))
def test_adding_a_ban_never_permits_more(policies, banning, request, ban):
    before, after = evaluate.evaluate(policies["open"], request), evaluate.evaluate(banning[ban], request)
    assert before.permit or not after.permit
    if after.permit:
        assert after.identity == before.identity


ALIASES = {
    "DC": ["DC", "dc", "domainComponent", "0.9.2342.19200300.100.1.25"], "OU": ["OU", "ou", "2.5.4.11"],
    "CN": ["CN", "cn", "commonName", "OID.2.5.4.3"], "UID": ["UID", "USERID", "userId", "0.9.2342.19200300.100.1.1"],
    "E": ["E", "Email", "emailAddress", "EMAILADDRESS", "1.2.840.113549.1.9.1"],
}
letters = st.sampled_from("abzAZ09 .-'@éÉßñÅ中\u0301")
values = st.text(alphabet=letters, min_size=1, max_size=12).filter(lambda text: text.strip(" \u0301") == text and text)
dns = st.lists(st.tuples(st.sampled_from(sorted(ALIASES)), values), min_size=1, max_size=5)


@st.composite
def respelled(draw, rdns):
    """Some other way to write the same name."""
    parts = [(draw(st.sampled_from(ALIASES[name])), draw(st.sampled_from(RESPELL))(value)) for name, value in rdns]
    blank = draw(st.sampled_from(["", " ", "  "]))
    if draw(st.booleans()):
        return "".join(f"/{blank}{name}{blank}={blank}{value}{blank}" for name, value in parts) + draw(st.sampled_from(["", "/CN=proxy", "/CN=123"]))
    order = parts if draw(st.booleans()) else parts[::-1]
    return draw(st.sampled_from([",", ";", ", "])).join(f"{name}{blank}={blank}{value}" for name, value in order)


RESPELL = [
    str, str.upper, str.lower, str.casefold, lambda text: unicodedata.normalize("NFD", text), lambda text: unicodedata.normalize("NFC", text),
    lambda text: text.replace(" ", "  "), lambda text: "\u200b".join(text),
    lambda text: "".join(f"\\x{byte:02X}" if byte > 0x7E else chr(byte) for byte in text.encode()),
]


@settings(deadline=None, max_examples=300)
@given(data=st.data(), rdns=dns)
def test_a_ban_wins_under_every_spelling_of_the_name(data, rdns):
    ban, subject = data.draw(respelled(rdns)), data.draw(respelled(rdns))
    assert set(names.ban_keys(ban.removesuffix("/CN=123"))) & set(names.subject_keys(subject)), (ban, subject)


@settings(deadline=None)
@given(data=st.data())
def test_a_banned_person_is_refused_however_the_name_is_written(banning, data):
    subject = data.draw(respelled([("DC", "org"), ("DC", "example"), ("CN", "Ann")]))
    verdict = evaluate.evaluate(banning[BAN_KINDS[0]], facts(dn=subject))
    assert verdict.code == "NW-BANNED", subject


@given(text=st.text(max_size=60))
def test_any_text_as_a_ban_catches_itself(text):
    assert set(names.ban_keys(text)) & set(names.subject_keys(text))


@given(pattern=st.text(alphabet="ab*", max_size=8), text=st.text(alphabet="ab", max_size=12))
def test_glob_is_the_shells_star(pattern, text):
    import fnmatch

    assert names.glob(pattern.split("*"), text) == fnmatch.fnmatchcase(text, pattern)
