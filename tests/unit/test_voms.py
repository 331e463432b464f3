"""VOMS attribute certificates: who may say what about whom. No attributes is never what a bad one turns into (attack B26)."""

from __future__ import annotations

import pytest
from asn1crypto import core
from asn1crypto import x509 as asn1
from cryptography import x509

from nodewrap.credentials import DirectoryTrust, Refusal, short_fqan
from tests.need import need
from tests.pki import (
    ACS,
    BASE,
    DAY,
    FQANS,
    HOST,
    NO_REVOCATION,
    PILOT,
    PLAIN,
    TARGETS,
    VO,
    Pki,
    key,
    key_usage,
    other_algorithm,
    targets,
    tlv,
    wrap_acs,
    wrap_certificates,
)

NO_REV = (NO_REVOCATION, False, core.Null().dump())


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def credential(pki, *acs, **more):
    return pki.forge_proxy(pki.alice, acs=acs, **more).file(pki.alice)


def raw(pki, value):
    """A credential whose VOMS extension holds these bytes."""
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(ACS), value)
    return pki.forge_proxy(pki.alice, extensions=[(extension, False)]).file(pki.alice)


def test_forged_certificate_differs_from_a_real_one_in_nothing_that_matters(pki):
    """The fixture: each bad one below differs from this good one in one thing."""
    subject = pki.verify(credential(pki, pki.forge_ac(fqans=[PILOT, PLAIN])))
    assert (subject.dn, subject.vo, subject.fqans) == (pki.alice.name, VO, ["/testvo/Role=pilot", "/testvo"])


def test_real_proxy_with_generic_attributes_is_accepted(pki):
    need("voms-proxy-fake")
    assert pki.verify(pki.proxy(args=("-rfc", "-ga", "nickname=alice (testvo)")).read_bytes()).fqans == ["/testvo/Role=pilot"]


def test_real_expired_attribute_certificate_is_denied(pki):
    need("voms-proxy-fake")
    assert pki.refusal(pki.proxy(args=("-rfc", "-pastac", "30:00")).read_bytes()) == (203, "NW-VOMS-EXPIRED")


def test_real_proxy_for_other_hosts_is_denied(pki):
    need("voms-proxy-fake")
    assert pki.refusal(pki.proxy(args=("-rfc", "-target", "wn9.example.org")).read_bytes(), target_host="wn1.example.org") == (203, "NW-VOMS-TARGET")


def test_real_proxy_without_attributes_is_denied_unless_allowed(pki):
    need("voms-proxy-fake")
    data = pki.proxy(fqans=()).read_bytes()
    assert pki.refusal(data) == (203, "NW-VOMS-NONE")
    subject = pki.verify(data, allow_without_voms=True)
    assert (subject.vo, subject.fqans) == ("", [])
    assert subject.notes[0].startswith("no VOMS attributes: NW-VOMS-NONE")


def other_key(pki):
    return {"signer": key("mallory")}


def signed_by_the_user(pki):
    return {"server": pki.alice}


def other_holder(pki):
    return {"holder": pki.pilot}


def other_issuer_name(pki):
    return {"issuers": [pki.alice]}


def two_issuer_names(pki):
    return {"issuers": [pki.voms, pki.voms]}


def holder_named_twice(pki):
    return {"holder_more": {"entity_name": [asn1.GeneralName("directory_name", asn1.Name.load(pki.pilot.asn1_name("subject")))]}}


def rogue_server(pki):
    return {"server": pki.host(HOST, issuer=pki.make_ca(f"{BASE}/CN=Rogue CA"))}


def server_that_is_a_ca(pki):
    return {"server": pki.ca}


def server_that_may_not_sign(pki):
    return {"server": pki.host(HOST, extensions=[(key_usage("key_encipherment"), True)])}


def expired_server(pki):
    return {"server": pki.host(HOST, start=-2 * DAY, end=-DAY)}


BAD = {
    "expired": ({"start": -2 * DAY, "end": -DAY}, "NW-VOMS-EXPIRED"),
    "not yet valid": ({"start": DAY, "end": 2 * DAY}, "NW-VOMS-FUTURE"),
    "other key signed": (other_key, "NW-VOMS-SIGNATURE"),
    "other issuer name": (other_issuer_name, "NW-VOMS-SIGNATURE"),
    "other holder": (other_holder, "NW-VOMS-HOLDER"),
    "other serial": ({"serial": 1}, "NW-VOMS-HOLDER"),
    "no server certificate": ({"certificates": []}, "NW-VOMS-CERTIFICATE"),
    "signed by the user": (signed_by_the_user, "NW-VOMS-LSC"),
    "server of an unknown CA": (rogue_server, "NW-VOMS-SERVER"),
    "server is a CA": (server_that_is_a_ca, "NW-VOMS-SERVER"),
    "server may not sign": (server_that_may_not_sign, "NW-VOMS-SERVER"),
    "expired server": (expired_server, "NW-VOMS-SERVER"),
    "unknown VO": ({"authority": f"othervo://{HOST}:15000", "fqans": ["/othervo"]}, "NW-VOMS-LSC"),
    "unknown host": ({"authority": f"{VO}://voms2.example.org:15000"}, "NW-VOMS-LSC"),
    "authority climbs": ({"authority": f"..://{HOST}:15000"}, "NW-VOMS-VO"),
    "authority with a slash": ({"authority": f"{VO}/../x://{HOST}:15000"}, "NW-VOMS-VO"),
    "host with a slash": ({"authority": f"{VO}://a/../{HOST}:15000"}, "NW-VOMS-VO"),
    "authority is text": ({"authority": "hello"}, "NW-VOMS-VO"),
    "authority with a newline": ({"authority": f"{VO}\n://{HOST}:15000"}, "NW-VOMS-VO"),
    "no noRevAvail": ({"extensions": []}, "NW-VOMS-EXTENSION"),
    "unknown critical": ({"extensions": [NO_REV, ("1.2.3.4", True, b"\x05\x00")]}, "NW-VOMS-EXTENSION"),
    "extension twice": ({"extensions": [NO_REV, NO_REV]}, "NW-VOMS-PARSE"),
    "other host": ({"extensions": [NO_REV, (TARGETS, True, targets("wn9.example.org"))]}, "NW-VOMS-TARGET"),
    "no host at all": ({"extensions": [NO_REV, (TARGETS, True, targets())]}, "NW-VOMS-TARGET"),
    "version 1": ({"version": "v1"}, "NW-VOMS-PARSE"),
    "two issuer names": (two_issuer_names, "NW-VOMS-PARSE"),
    "holder by name alone": (lambda pki: {"holder_more": {"base_certificate_id": None, **holder_named_twice(pki)["holder_more"]}}, "NW-VOMS-PARSE"),
    "holder by name too": (holder_named_twice, "NW-VOMS-PARSE"),
    "no attribute": ({"attributes": []}, "NW-VOMS-PARSE"),
    "other attribute alone": ({"attributes": ["1.2.3.4"]}, "NW-VOMS-PARSE"),
    "FQAN attribute twice": ({"attributes": [FQANS, FQANS]}, "NW-VOMS-PARSE"),
    "33 attributes": ({"attributes": [FQANS, *["1.2.3.4"] * 32]}, "NW-VOMS-PARSE"),
    "no FQAN": ({"fqans": []}, "NW-VOMS-PARSE"),
    "257 FQANs": ({"fqans": [PILOT] * 257}, "NW-VOMS-PARSE"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_attribute_certificate_is_denied_and_never_just_ignored(pki, name):
    change, code = BAD[name]
    data = credential(pki, pki.forge_ac(**(change(pki) if callable(change) else change)))
    assert pki.refusal(data, target_host="wn1.example.org") == (203, code)
    subject = pki.verify(data, allow_without_voms=True, target_host="wn1.example.org")
    assert (subject.vo, subject.fqans) == ("", [])
    assert code in subject.notes[-1]


@pytest.mark.parametrize("fqan", [
    "/othervo", "/othervo/Role=pilot", "/testvo2", "/testvoevil/Role=pilot", "testvo", "", "/", "//testvo", "/testvo/", "/testvo//x",
    "/testvo/../othervo/x y",
    "/testvo/Role=", "/testvo/Role=a/Role=b", "/testvo/Capability=x/Role=y", "/testvo/Role=a\n", "/testvo/x=y", "/Role=pilot", "/testvo/Role=a b",
])
def test_fqan_outside_of_the_vo_or_malformed_is_denied(pki, fqan):
    assert pki.refusal(credential(pki, pki.forge_ac(fqans=[PILOT, fqan]))) == (203, "NW-VOMS-FQAN")


def test_fqan_that_is_not_ascii_is_denied(pki):
    assert pki.refusal(credential(pki, pki.forge_ac(fqans=["/testvo/é"]))) == (203, "NW-VOMS-PARSE")


@pytest.mark.parametrize(("long", "short"), [
    ("/vo/Role=NULL/Capability=NULL", "/vo"), ("/vo/Role=NULL", "/vo"), ("/vo/Capability=NULL", "/vo"),
    ("/vo/g/Role=x/Capability=NULL", "/vo/g/Role=x"),
    ("/vo/Role=NULLA", "/vo/Role=NULLA"), ("/vo/Role=x/Capability=y", "/vo/Role=x/Capability=y"), ("/vo", "/vo"),
])
def test_fqan_has_one_spelling(long, short):
    assert short_fqan(long) == short
    assert short_fqan(short) == short


@pytest.mark.parametrize("host", ["wn1.example.org", "WN1.Example.Org"])
@pytest.mark.parametrize("target", ["wn1.example.org", "https://wn1.example.org", "WN1.example.org"])
def test_attribute_certificate_for_our_host_is_accepted(pki, host, target):
    ac = pki.forge_ac(extensions=[NO_REV, (TARGETS, True, targets("wn0.example.org", target))])
    assert pki.verify(credential(pki, ac), target_host=host).vo == VO


def test_targeted_attribute_certificate_is_denied_when_our_name_is_not_set(pki):
    ac = pki.forge_ac(extensions=[NO_REV, (TARGETS, True, targets(""))])
    assert pki.refusal(credential(pki, ac), target_host="") == (203, "NW-VOMS-TARGET")


# LSC files


def test_missing_lsc_is_named_in_the_refusal(pki):
    ac = pki.forge_ac(authority=f"othervo://{HOST}:15000", fqans=["/othervo"])
    with pytest.raises(Refusal, match=f"othervo/{HOST}.lsc is missing in vomsdir"):
        pki.verify(credential(pki, ac))


def test_lsc_may_name_several_chains_with_comments(pki):
    split = "------ NEXT CHAIN ------"
    pki.write_lsc(VO, ["# old", "/CN=old", "/CN=old CA", split, "", f"  {pki.voms.name}", pki.ca.name, split])
    assert pki.verify(credential(pki, pki.forge_ac())).vo == VO


@pytest.mark.parametrize("lines", [
    lambda pki: [pki.ca.name, pki.voms.name],
    lambda pki: [pki.voms.name],
    lambda pki: [],
    lambda pki: [pki.voms.name, f"{BASE}/CN=Other CA"],
    lambda pki: [f"{BASE}/O=Hosts/CN=voms2.example.org", pki.ca.name],
    lambda pki: [pki.voms.name, "------ NEXT CHAIN ------", pki.ca.name],
    lambda pki: [pki.voms.name, pki.ca.name, pki.ca.name],
])
def test_lsc_that_does_not_name_the_server_and_its_ca_in_order_is_denied(pki, lines):
    pki.write_lsc(VO, lines(pki))
    assert pki.refusal(credential(pki, pki.forge_ac())) == (203, "NW-VOMS-LSC")


@pytest.mark.parametrize("lenient", [False, True])
def test_lsc_that_the_site_has_and_that_cannot_be_read_is_the_sites_fault_whatever_it_tolerates(pki, lenient, monkeypatch):
    file = pki.voms_dir / VO / f"{HOST}.lsc"
    file.write_bytes(b"\xff")
    assert pki.refusal(credential(pki, pki.forge_ac()), allow_without_voms=lenient) == (202, "NW-TRUST")

    def unreadable(trust, name):
        raise Refusal(202, "NW-TRUST", f"trust anchor {name}: Input/output error; see voms-dir in the guard")

    monkeypatch.setattr(DirectoryTrust, "voms", unreadable)
    assert pki.refusal(credential(pki, pki.forge_ac()), allow_without_voms=lenient) == (202, "NW-TRUST")


def test_server_below_an_intermediate_ca_that_comes_along_is_accepted(pki):
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", pki.ca)
    server = pki.host(HOST, issuer=sub)
    ac = pki.forge_ac(server=server, certificates=[server, sub])
    for lines in ([server.name, sub.name], [server.name, sub.name, pki.ca.name]):
        pki.write_lsc(VO, lines)
        assert pki.verify(credential(pki, ac), signing_policy="if-present").vo == VO
    pki.write_lsc(VO, [server.name, pki.ca.name])
    assert pki.refusal(credential(pki, ac), signing_policy="if-present") == (203, "NW-VOMS-LSC")


def test_revoked_server_is_denied(pki):
    pki.write_crl(revoked=[pki.voms])
    assert pki.refusal(credential(pki, pki.forge_ac())) == (203, "NW-VOMS-SERVER")


# Where it stands


def test_attribute_certificate_of_the_proxy_nearest_to_the_leaf_counts(pki):
    first = pki.forge_proxy(pki.alice, acs=[pki.forge_ac(fqans=[PLAIN])], private=key("one"))
    second = pki.forge_proxy(first, acs=[pki.forge_ac(fqans=[PILOT])], private=key("two"))
    third = pki.forge_proxy(second, private=key("three"))
    assert pki.verify(third.file(second, first, pki.alice)).fqans == ["/testvo/Role=pilot"]


def test_bad_attribute_certificate_near_the_leaf_is_not_passed_over_for_a_good_one_above(pki):
    first = pki.forge_proxy(pki.alice, acs=[pki.forge_ac()], private=key("one"))
    second = pki.forge_proxy(first, acs=[pki.forge_ac(signer=key("mallory"))], private=key("two"))
    assert pki.refusal(second.file(first, pki.alice)) == (203, "NW-VOMS-SIGNATURE")


def test_attribute_certificate_of_the_issuer_of_a_delegation_is_not_the_holders(pki):
    """Mallory puts alice's attribute certificate into her own proxy."""
    mallory = pki.user("Mallory")
    assert pki.refusal(pki.forge_proxy(mallory, acs=[pki.forge_ac()]).file(mallory)) == (203, "NW-VOMS-HOLDER")


def test_same_serial_of_another_ca_is_another_holder(pki):
    other = pki.make_ca(f"{BASE}/CN=Other CA")
    pki.trust_ca(other)
    pki.write_crl(other)
    twin = pki.user("Alice Tester", issuer=other, serial=pki.alice.cert.serial_number)
    assert pki.refusal(pki.forge_proxy(twin, acs=[pki.forge_ac()]).file(twin)) == (203, "NW-VOMS-HOLDER")


def second_vo(pki):
    pki.write_lsc("vo2", [pki.voms.name, pki.ca.name])
    return pki.forge_ac(authority=f"vo2://{HOST}:15001", fqans=["/vo2/Role=x"])


def test_two_vos_give_the_first_ones_name_and_all_fqans(pki):
    subject = pki.verify(credential(pki, pki.forge_ac(), second_vo(pki)))
    assert (subject.vo, subject.fqans) == (VO, ["/testvo/Role=pilot", "/vo2/Role=x"])


def test_one_bad_attribute_certificate_among_good_ones_is_denied(pki):
    assert pki.refusal(credential(pki, pki.forge_ac(), pki.forge_ac(end=-DAY, start=-2 * DAY))) == (203, "NW-VOMS-EXPIRED")


def test_expiry_includes_the_attribute_certificate(pki):
    import time

    assert abs(pki.verify(credential(pki, pki.forge_ac(end=1000))).expires - time.time() - 1000) < 60


@pytest.mark.parametrize("value", [
    b"", b"\x05\x00", wrap_acs([]), tlv(0x30), wrap_acs([b"\x30\x00"]), wrap_acs([b"\x30\x03\x02\x01\x01"]), wrap_acs([b"\x30\x84\xff\xff\xff\xff"]),
    b"\x30\x80" * 500, wrap_acs([]) + b"\0",
])
def test_extension_that_holds_no_attribute_certificate_is_denied(pki, value):
    assert pki.refusal(raw(pki, value)) == (203, "NW-VOMS-PARSE")


def test_truncated_attribute_certificate_is_denied(pki):
    ac = pki.forge_ac()
    assert pki.refusal(raw(pki, wrap_acs([ac])[:-10])) == (203, "NW-VOMS-PARSE")


def test_attribute_certificate_with_two_signature_algorithms_is_denied(pki):
    assert pki.refusal(credential(pki, other_algorithm(pki.forge_ac()))) == (203, "NW-VOMS-PARSE")


def test_too_many_attribute_certificates_are_denied(pki):
    assert pki.refusal(credential(pki, *[pki.forge_ac()] * 9)) == (203, "NW-VOMS-PARSE")


def test_certificates_extension_of_junk_is_denied(pki):
    ac = pki.forge_ac(certificates=[], extensions=[NO_REV, ("1.3.6.1.4.1.8005.100.100.10", False, wrap_certificates([pki.voms])[:-3])])
    assert pki.refusal(credential(pki, ac)) == (203, "NW-VOMS-PARSE")
