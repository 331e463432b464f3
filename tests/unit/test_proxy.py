"""Proxy chains: each good kind is the user, each bad one is refused with its own code."""

from __future__ import annotations

import re
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.need import need
from tests.pki import DAY, INDEPENDENT, INHERIT_ALL, PILOT, PLAIN, PROXY_INFO, Pki, dn, key, key_usage, proxy_info

ALICE = "/DC=org/DC=example/O=Users/CN=Alice Tester"


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def proxy(pki, *levels, **more):
    """A credential file: proxies with the given options below alice, the last one the leaf; the first carries a good attribute certificate."""
    chain = [pki.alice]
    for number, level in enumerate(levels or ({},)):
        acs = [pki.forge_ac()] if number == 0 else []
        chain.insert(0, pki.forge_proxy(chain[0], **{"acs": acs, "private": key(f"level {number}"), **more, **level}))
    return chain[0].file(*chain[1:])


REAL = {
    "rfc": (("-rfc",), "rfc", False),
    "limited": (("-rfc", "-limited"), "rfc", True),
    "legacy": (("-proxyver", "2"), "legacy", False),
    "legacy limited": (("-proxyver", "2", "-limited"), "legacy", True),
    "gt3": (("-proxyver", "3"), "gt3", False),
    "gt3 limited": (("-proxyver", "3", "-limited"), "gt3", True),
}


@pytest.mark.parametrize("name", REAL)
def test_real_proxy_of_each_kind_is_its_user_with_its_fqans(pki, name):
    need("voms-proxy-fake")
    args, kind, limited = REAL[name]
    subject = pki.verify(pki.proxy(args=args, fqans=(PILOT, PLAIN)).read_bytes())
    assert (subject.dn, subject.issuer, subject.assurance) == (ALICE, "/DC=org/DC=example/CN=Test CA", "credential")
    assert (subject.kind, subject.limited, subject.has_key, subject.vo) == (kind, limited, True, "testvo")
    assert subject.fqans == ["/testvo/Role=pilot", "/testvo"]
    assert subject.serial == str(pki.alice.cert.serial_number)
    assert 0 < subject.expires - time.time() <= DAY + 300
    assert re.fullmatch(r"[0-9a-f]{64}", subject.fingerprint)
    assert subject.notes == []


def test_real_delegated_proxy_is_still_the_same_user(pki):
    need("voms-proxy-fake")
    subject = pki.verify(pki.delegate(pki.proxy()))
    assert (subject.dn, subject.fqans, subject.kind, subject.limited) == (ALICE, ["/testvo/Role=pilot"], "rfc", False)


def test_limited_delegation_makes_the_result_limited(pki):
    assert pki.verify(proxy(pki, {}, {"limited": True})).limited is True
    assert pki.verify(proxy(pki, {}, {})).limited is False


def test_expiry_is_that_of_the_shortest_link(pki):
    subject = pki.verify(proxy(pki, {"end": 1000}, {"end": 5000}))
    assert abs(subject.expires - time.time() - 1000) < 60


def test_certificates_above_may_stand_in_any_order(pki):
    first = pki.forge_proxy(pki.alice, acs=[pki.forge_ac()], private=key("level 0"))
    second = pki.forge_proxy(first, private=key("level 1"))
    assert pki.verify(second.file(pki.alice, first)).dn == ALICE


def test_text_between_pem_blocks_and_crlf_are_harmless(pki):
    data = proxy(pki)
    assert pki.verify(b"subject=/CN=Somebody Else\n" + data.replace(b"-----BEGIN CERT", b"issuer= /CN=x\n-----BEGIN CERT")).dn == ALICE
    assert pki.verify(data.replace(b"\n", b"\r\n")).dn == ALICE


P256, P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize("private", [P256, P384, ed25519.Ed25519PrivateKey.generate()])
def test_elliptic_proxy_key_is_accepted_and_proved(pki, private, monkeypatch):
    monkeypatch.setattr("tests.pki.key_pem", pkcs8)
    leaf = pki.forge_proxy(pki.alice, private=private, acs=[pki.forge_ac()])
    assert pki.verify(leaf.file(pki.alice)).has_key is True
    other = type(leaf)(leaf.cert, key("level 0"))
    assert pki.refusal(other.file(pki.alice)) == (201, "NW-KEY-MISMATCH")


def pkcs8(private):
    from cryptography.hazmat.primitives import serialization

    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def other_name(pki):
    return {"subject": dn("/DC=org/DC=example/O=Users/CN=Mallory/CN=1")}


def two_cns(pki):
    return {"subject": dn(f"{ALICE}/CN=1/CN=2")}


def not_a_cn(pki):
    return {"subject": dn(f"{ALICE}/OU=1")}


def two_values_in_last_rdn(pki):
    added = x509.RelativeDistinguishedName([x509.NameAttribute(x509.NameOID.COMMON_NAME, "1"), x509.NameAttribute(x509.NameOID.USER_ID, "2")])
    return {"subject": x509.Name([*pki.alice.cert.subject.rdns, added])}


SAN = x509.SubjectAlternativeName([x509.DNSName("wn1.example.org")])
IAN = x509.IssuerAlternativeName([x509.DNSName("wn1.example.org")])
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")

BAD = {
    "expired": ({"start": -2 * DAY, "end": -DAY}, "NW-PROXY-EXPIRED"),
    "not yet valid": ({"start": DAY, "end": 2 * DAY}, "NW-PROXY-FUTURE"),
    "other name": (other_name, "NW-PROXY-NAME"),
    "two CNs": (two_cns, "NW-PROXY-NAME"),
    "last RDN no CN": (not_a_cn, "NW-PROXY-NAME"),
    "last RDN of two": (two_values_in_last_rdn, "NW-PROXY-NAME"),
    "independent": ({"language": INDEPENDENT}, "NW-PROXY-POLICY"),
    "unknown language": ({"language": "1.2.3.4.5"}, "NW-PROXY-POLICY"),
    "CA true": ({"extensions": [(x509.BasicConstraints(True, None), True)]}, "NW-PROXY-EXTENSION"),
    "alternative name": ({"extensions": [(SAN, False)]}, "NW-PROXY-EXTENSION"),
    "issuer alternative name": ({"extensions": [(IAN, False)]}, "NW-PROXY-EXTENSION"),
    "info not critical": ({"critical": False}, "NW-PROXY-EXTENSION"),
    "unknown critical": ({"extensions": [(UNKNOWN, True)]}, "NW-X509-EXTENSION"),
    "signs certificates": ({"usage": (key_usage("digital_signature", "key_cert_sign"), True)}, "NW-PROXY-USAGE"),
    "cannot sign": ({"usage": (key_usage("key_encipherment"), True)}, "NW-PROXY-USAGE"),
    "wrong key signed": ({"signer": key("mallory")}, "NW-X509-CHAIN"),
    "negative path length": ({"path_length": -1}, "NW-X509-PARSE"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_proxy_is_denied(pki, name):
    change, code = BAD[name]
    assert pki.refusal(proxy(pki, change(pki) if callable(change) else change)) == (203, code)


def test_proxy_of_two_kinds_at_once_is_denied(pki):
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier(PROXY_INFO["gt3"]), proxy_info("gt3", INHERIT_ALL, None))
    assert pki.refusal(proxy(pki, {"extensions": [(other, True)]})) == (203, "NW-X509-PARSE")


def test_unknown_extension_that_is_not_critical_is_ignored(pki):
    assert pki.verify(proxy(pki, {"extensions": [(UNKNOWN, False)]})).dn == ALICE


def test_clock_skew_is_granted_up_to_its_bound(pki):
    late = proxy(pki, {"start": -DAY, "end": -100})
    assert pki.verify(late).dn == ALICE
    assert pki.refusal(late, clock_skew_s=50) == (203, "NW-PROXY-EXPIRED")
    assert pki.verify(proxy(pki, {"start": 100})).dn == ALICE
    assert pki.refusal(proxy(pki, {"start": 100}), clock_skew_s=50) == (203, "NW-PROXY-FUTURE")


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/Anchorage"])
def test_time_zone_of_the_node_does_not_move_the_verdict(pki, zone, monkeypatch):
    """Attack H18."""
    good, late = proxy(pki, {"start": -600, "end": 600}), proxy(pki, {"start": -7200, "end": -3600})
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert pki.verify(good).dn == ALICE
        assert pki.refusal(late) == (203, "NW-PROXY-EXPIRED")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_proxy_longer_than_the_site_allows_is_denied(pki):
    assert pki.refusal(proxy(pki, {"end": 10 * DAY}), max_proxy_lifetime_s=5 * DAY) == (203, "NW-PROXY-LIFETIME")
    assert pki.verify(proxy(pki, {"end": 4 * DAY}), max_proxy_lifetime_s=5 * DAY).dn == ALICE


@pytest.mark.parametrize(("kind", "length", "levels", "accepted"), [
    ("rfc", 0, 1, True), ("rfc", 0, 2, False), ("rfc", 1, 2, True), ("rfc", 1, 3, False), ("gt3", 0, 2, False),
])
def test_path_length_bounds_the_proxies_below(pki, kind, length, levels, accepted):
    data = proxy(pki, {"path_length": length}, *[{}] * (levels - 1), kind=kind)
    if accepted:
        assert pki.verify(data).dn == ALICE
    else:
        assert pki.refusal(data) == (203, "NW-PROXY-PATHLEN")


@pytest.mark.parametrize("kind", ["rfc", "gt3", "legacy"])
def test_full_proxy_below_a_limited_one_is_denied(pki, kind):
    assert pki.refusal(proxy(pki, {"limited": True}, {}, kind=kind)) == (203, "NW-PROXY-LIMITED")


def test_limited_proxy_is_denied_where_the_site_says_so(pki):
    assert pki.refusal(proxy(pki, {"limited": True}), allow_limited=False) == (203, "NW-PROXY-LIMITED")


@pytest.mark.parametrize(("above", "below"), [("rfc", "legacy"), ("legacy", "rfc"), ("gt3", "rfc"), ("rfc", "gt3")])
def test_kinds_do_not_mix(pki, above, below):
    assert pki.refusal(proxy(pki, {"kind": above}, {"kind": below})) == (203, "NW-PROXY-MIXED")


def test_endless_delegation_is_denied(pki):
    assert pki.refusal(proxy(pki, *[{}] * 20, path_length=None)) == (203, "NW-PROXY-DEPTH")


def test_end_entity_that_is_a_ca_signs_no_proxy(pki):
    usage = key_usage("digital_signature", "key_cert_sign")
    pki.alice = pki.user("Alice Tester", extensions=[(x509.BasicConstraints(True, None), True), (usage, True)])
    assert pki.refusal(proxy(pki)) == (203, "NW-X509-EEC-CA")


def test_proxy_signed_by_the_trusted_ca_itself_is_denied(pki):
    leaf = pki.forge_proxy(pki.ca)
    assert pki.refusal(leaf.file(pki.ca)) == (203, "NW-X509-EEC-CA")


def test_user_certificate_as_ca_of_another_user_is_denied(pki):
    """Alice signs a certificate for "Bob" with her own key, and a proxy below it."""
    bob = pki.user("Bob Victim", issuer=pki.alice)
    assert pki.refusal(pki.forge_proxy(bob).file(bob, pki.alice)) == (203, "NW-X509-CA")


def test_user_key_without_digital_signature_signs_no_proxy(pki):
    pki.alice = pki.user("Alice Tester", extensions=[(x509.BasicConstraints(False, None), True), (key_usage("key_encipherment"), True)])
    assert pki.refusal(proxy(pki)) == (203, "NW-PROXY-USAGE")


@pytest.mark.parametrize(("start", "end", "code"), [(-2 * DAY, -DAY, "NW-X509-EXPIRED"), (DAY, 2 * DAY, "NW-X509-FUTURE")])
def test_user_certificate_outside_its_validity_is_denied(pki, start, end, code):
    pki.alice = pki.user("Alice Tester", start=start, end=end)
    assert pki.refusal(proxy(pki)) == (203, code)


def test_plain_certificate_is_denied_unless_allowed(pki):
    data = pki.alice.file()
    assert pki.refusal(data) == (203, "NW-PROXY-NONE")
    assert pki.refusal(data, allow_plain=True) == (203, "NW-VOMS-NONE")
    subject = pki.verify(data, allow_plain=True, allow_without_voms=True)
    assert (subject.dn, subject.kind, subject.vo, subject.fqans) == (ALICE, "eec", "", [])


def test_chain_without_the_user_certificate_is_denied(pki):
    assert pki.refusal(pki.forge_proxy(pki.alice).file()) == (203, "NW-X509-CHAIN")


def test_legacy_name_of_a_users_certificate_is_no_proxy(pki):
    """A CA may well call a user "proxy": only the issuer's own name and one CN make a legacy proxy."""
    pki.alice = pki.user("Alice Tester", subject=dn("/DC=org/DC=example/O=Users/CN=proxy"))
    assert pki.verify(proxy(pki)).dn == "/DC=org/DC=example/O=Users/CN=proxy"


def test_weak_proxy_key_is_denied(pki):
    from cryptography.hazmat.primitives.asymmetric import dsa

    private = dsa.generate_private_key(1024)
    assert pki.refusal(pki.forge_proxy(pki.alice, private=private).pem + pki.alice.pem, require_key=False) == (203, "NW-X509-KEY")


