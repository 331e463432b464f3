"""The path to a trusted CA: lookup by hash, CA rules, signing policies, revocation lists."""

from __future__ import annotations

import pytest
from asn1crypto import core
from cryptography import x509

from nodewrap.credentials.policyfile import allowed
from nodewrap.credentials.trust import MAX_LOOKUPS, Context, Options
from nodewrap.model import Refusal
from tests.pki import BASE, CA_USAGE, DAY, Pki, dn, key, key_usage

ALICE = f"{BASE}/O=Users/CN=Alice Tester"


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def credential(pki, *above, user=None):
    user = user or pki.alice
    return pki.forge_proxy(user, acs=[pki.forge_ac(user)]).file(user, *above)


def below(pki, *cas):
    """A credential of alice issued by the last of ``cas``."""
    return credential(pki, *cas, user=pki.user("Alice Tester", issuer=cas[-1]))


# Lookup


def test_ca_that_is_not_in_the_directory_is_not_trusted(pki):
    rogue = pki.make_ca(f"{BASE}/CN=Rogue CA")
    assert pki.refusal(below(pki, rogue)) == (203, "NW-X509-UNTRUSTED")


def test_own_ca_under_the_name_of_a_trusted_one_is_not_trusted(pki):
    """Attack H09: same name, other key; the file brings the CA along."""
    rogue = type(pki.ca)(pki.make_ca(pki.ca.name).cert, key("rogue"))
    user = pki.user("Alice Tester", issuer=rogue)
    assert pki.refusal(pki.forge_proxy(user, acs=[pki.forge_ac(user)]).file(user, rogue)) == (203, "NW-X509-UNTRUSTED")


@pytest.mark.parametrize("which", [0, 1])
def test_ca_is_found_by_either_hash(pki, which):
    for path in pki.ca_dir.glob(f"{pki.hashes(pki.ca)[which]}.*"):
        path.unlink()
    subject = pki.verify(credential(pki))
    assert (subject.dn, subject.notes) == (ALICE, [])


def test_cas_whose_hashes_collide_are_tried_in_turn(pki):
    """.0 holds another key of the same name (or another name with that hash), .1 the right one."""
    for hash_ in pki.hashes(pki.ca):
        (pki.ca_dir / f"{hash_}.1").write_bytes(pki.ca.pem)
        (pki.ca_dir / f"{hash_}.0").write_bytes(pki.make_ca(f"{BASE}/CN=Another").pem)
    assert pki.verify(credential(pki)).dn == ALICE


@pytest.mark.parametrize("expired", [0, 1])
def test_renewed_ca_with_the_same_key_is_found_beside_the_expired_one(pki, expired):
    pki.trust_ca(pki.make_ca(pki.ca.name, start=-2 * DAY, end=-DAY), number=expired)
    pki.trust_ca(pki.ca, number=1 - expired)
    assert pki.verify(credential(pki)).dn == ALICE


def test_gap_in_the_numbers_ends_the_search(pki):
    for hash_ in pki.hashes(pki.ca):
        (pki.ca_dir / f"{hash_}.0").rename(pki.ca_dir / f"{hash_}.2")
    assert pki.refusal(credential(pki)) == (203, "NW-X509-UNTRUSTED")


def test_unreadable_ca_file_is_a_refusal_that_names_it(pki):
    for hash_ in pki.hashes(pki.ca):
        (pki.ca_dir / f"{hash_}.0").write_bytes(pki.ca.pem.replace(b"MII", b"MIA", 1))
    with pytest.raises(Refusal, match=f"{pki.hashes(pki.ca)[0]}.0 in the CA directory"):
        pki.verify(credential(pki))


# Intermediate CAs


def test_intermediate_ca_in_the_directory_is_followed_to_its_root(pki):
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", pki.ca)
    pki.trust_ca(sub)
    pki.write_crl(sub)
    user = pki.user("Alice Tester", issuer=sub)
    subject = pki.verify(credential(pki, user=user))
    assert (subject.dn, subject.issuer, subject.notes) == (ALICE, f"{BASE}/CN=Sub CA", [])


def test_intermediate_ca_without_its_root_is_not_trusted(pki):
    root = pki.make_ca(f"{BASE}/CN=Far Root")
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", root)
    pki.trust_ca(sub)
    assert pki.refusal(credential(pki, user=pki.user("Alice Tester", issuer=sub))) == (203, "NW-X509-UNTRUSTED")


def test_intermediate_ca_from_the_file_needs_a_signing_policy_where_required(pki):
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", pki.ca)
    assert pki.refusal(below(pki, sub)) == (203, "NW-X509-POLICY")
    assert pki.verify(below(pki, sub), signing_policy="if-present").notes[0].startswith("no signing policy")


def sub_ca(pki, **more):
    """Credential below a sub-CA with the given faults, in the directory."""
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", pki.ca, **more)
    pki.trust_ca(sub)
    return credential(pki, user=pki.user("Alice Tester", issuer=sub))


NAMES = x509.NameConstraints([x509.DirectoryName(dn(f"{BASE}/O=Users"))], None)
MINUS = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.19"), bytes.fromhex("30060101ff0201ff"))
FAULTS = {
    "negative path length": ({"extensions": [(MINUS, True), CA_USAGE]}, "NW-X509-PARSE"),
    "no CA": ({"extensions": [(x509.BasicConstraints(False, None), True)]}, "NW-X509-CA"),
    "no basicConstraints": ({"extensions": []}, "NW-X509-CA"),
    "may not sign": ({"extensions": [(x509.BasicConstraints(True, None), True), (key_usage("crl_sign"), True)]}, "NW-X509-CA"),
    "expired": ({"start": -2 * DAY, "end": -DAY}, "NW-X509-EXPIRED"),
    "name constraints": ({"extensions": [(x509.BasicConstraints(True, None), True), CA_USAGE, (NAMES, True)]}, "NW-X509-EXTENSION"),
    "quiet name constraints": ({"extensions": [(x509.BasicConstraints(True, None), True), CA_USAGE, (NAMES, False)]}, "NW-X509-EXTENSION"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_intermediate_ca_is_denied(pki, name):
    change, code = FAULTS[name]
    assert pki.refusal(sub_ca(pki, **change)) == (203, code)


def test_path_length_of_a_ca_is_kept(pki):
    """Root with path length 0: no CA below it."""
    pki.ca = pki.make_ca(f"{BASE}/CN=Test CA", path_length=0)
    pki.trust_ca(pki.ca)
    assert pki.verify(credential(pki)).dn == ALICE
    assert pki.refusal(sub_ca(pki)) == (203, "NW-X509-PATHLEN")


def test_expired_root_is_denied(pki):
    pki.trust_ca(pki.make_ca(f"{BASE}/CN=Test CA", start=-2 * DAY, end=-DAY))
    assert pki.refusal(credential(pki)) == (203, "NW-X509-EXPIRED")


def test_endless_cas_are_denied_within_the_lookup_limit(pki):
    cas = [pki.ca]
    for number in range(10):
        cas.append(pki.make_ca(f"{BASE}/CN=Sub {number}", cas[-1]))
        pki.trust_ca(cas[-1])
    assert pki.refusal(credential(pki, user=pki.user("Alice Tester", issuer=cas[-1]))) == (203, "NW-X509-CHAIN")


def test_no_credential_asks_for_more_files_than_the_launcher_answers(pki):
    context = Context(pki.trust(), 0, Options())
    for number in range(MAX_LOOKUPS):
        assert context.ca(f"{number}.0") is None
    assert context.ca("0.0") is None  # asked before: costs nothing
    with pytest.raises(Refusal, match="trust files"):
        context.voms("one/more.lsc")
    assert MAX_LOOKUPS < 64


def test_sha1_signature_is_denied(pki):
    """The algorithm is refused before the signature is looked at, so renaming it (cryptography does not sign with SHA-1 any more) will do."""
    sha256, sha1 = core.ObjectIdentifier("1.2.840.113549.1.1.11").dump(), core.ObjectIdentifier("1.2.840.113549.1.1.5").dump()
    weak = x509.load_der_x509_certificate(pki.alice.der.replace(sha256, sha1))
    assert pki.refusal(credential(pki, user=type(pki.alice)(weak, pki.alice.key))) == (203, "NW-X509-ALGORITHM")


# Signing policies


def test_user_outside_the_cas_namespace_is_denied(pki):
    pki.trust_ca(pki.ca, subjects=("/DC=org/DC=other/*",))
    for wanted in ("require", "if-present"):
        assert pki.refusal(credential(pki), signing_policy=wanted) == (203, "NW-X509-POLICY")


def test_missing_signing_policy_is_denied_where_required(pki):
    for path in pki.ca_dir.glob("*.signing_policy"):
        path.unlink()
    assert pki.refusal(credential(pki)) == (203, "NW-X509-POLICY")
    assert pki.verify(credential(pki), signing_policy="if-present").notes == [f"no signing policy of {pki.ca.name}"]


EACL = """# comment
access_id_CA  X509  '/C=X/CN=One'
pos_rights    globus  CA:sign
cond_subjects globus  '"/C=X/O=a/*" "/C=X/O=b/CN=?"'

access_id_CA  X509    "/C=X/CN=Two/Email=ca@x"
pos_rights    globus  CA:sign
cond_subjects globus  "/C=Y/*"
access_id_CA  X509    '/C=X/CN=Three'
pos_rights    globus  CA:other
cond_subjects globus  '"*"'
"""


@pytest.mark.parametrize(("ca", "subject", "expected"), [
    ("/C=X/CN=One", "/C=X/O=a/CN=u", True),
    ("/C=X/CN=One", "/C=X/O=a/OU=b/CN=u", True),
    ("/C=X/CN=One", "/C=X/O=b/CN=u", True),
    ("/C=X/CN=One", "/C=X/O=b/CN=uv", False),
    ("/C=X/CN=One", "/C=X/O=aa/CN=u", False),
    ("/C=X/CN=One", "/C=x/O=a/CN=u", False),
    ("/C=X/CN=One", "/C=Y/CN=u", False),
    ("/C=X/CN=Two/emailAddress=ca@x", "/C=Y/CN=u", True),
    ("/C=X/CN=Two/emailAddress=ca@x", "/C=X/O=a/CN=u", False),
    ("/C=X/CN=Three", "/C=Y/CN=u", False),
    ("/C=X/CN=Four", "/C=Y/CN=u", False),
])
def test_signing_policy_allows_what_it_names(ca, subject, expected):
    assert allowed(EACL, ca, subject, "f") is expected


def test_dots_and_brackets_in_a_signing_policy_are_literal():
    text = "access_id_CA X509 '/CN=c'\npos_rights globus CA:sign\ncond_subjects globus '\"/O=a.b/CN=[x]*\"'\n"
    assert allowed(text, "/CN=c", "/O=a.b/CN=[x]y", "f")
    assert not allowed(text, "/CN=c", "/O=aXb/CN=[x]y", "f")
    assert not allowed(text, "/CN=c", "/O=a.b/CN=xy", "f")


@pytest.mark.parametrize("line", ["cond_subject globus '*'", "neg_rights globus CA:sign", "nonsense"])
def test_signing_policy_that_is_not_understood_is_a_refusal(line):
    with pytest.raises(Refusal, match="f line 1"):
        allowed(line, "/CN=c", "/CN=u", "f")


@pytest.mark.parametrize("option", ["crl", "signing_policy"])
def test_misspelt_option_is_an_error_and_not_the_weaker_choice(pki, option):
    with pytest.raises(ValueError, match="requires"):
        pki.verify(credential(pki), **{option: "requires"})
    with pytest.raises(AttributeError):
        pki.verify(credential(pki), crls="require")


# Revocation


def test_revoked_user_is_denied(pki):
    pki.write_crl(revoked=[pki.alice])
    assert pki.refusal(credential(pki)) == (203, "NW-X509-REVOKED")
    assert pki.verify(credential(pki, user=pki.pilot)).dn == pki.pilot.name


def test_revoked_intermediate_ca_is_denied(pki):
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", pki.ca)
    pki.trust_ca(sub)
    pki.write_crl(revoked=[sub])
    assert pki.refusal(credential(pki, user=pki.user("Alice Tester", issuer=sub))) == (203, "NW-X509-REVOKED")


def test_missing_crl_is_denied_where_required_and_noted_else(pki):
    pki.remove_crl()
    assert pki.refusal(credential(pki), crl="require") == (203, "NW-X509-CRL")
    assert pki.verify(credential(pki)).notes == [f"no CRL of {pki.ca.name} ({pki.hashes(pki.ca)[0]}.r0)"]


@pytest.mark.parametrize(("start", "end"), [(-3 * DAY, -2 * DAY), (DAY, 2 * DAY)])
def test_crl_outside_its_validity_is_denied_where_required_and_noted_else(pki, start, end):
    pki.write_crl(start=start, end=end)
    assert pki.refusal(credential(pki), crl="require") == (203, "NW-X509-CRL")
    assert "CRL of" in pki.verify(credential(pki)).notes[0]


def test_expired_crl_still_revokes(pki):
    pki.write_crl(revoked=[pki.alice], start=-3 * DAY, end=-2 * DAY)
    assert pki.refusal(credential(pki)) == (203, "NW-X509-REVOKED")


def test_crl_signed_by_another_key_is_denied_always(pki):
    pki.write_crl(signer=key("rogue"))
    assert pki.refusal(credential(pki)) == (203, "NW-X509-CRL")


def test_crl_of_a_ca_that_may_not_sign_crls_is_denied(pki):
    pki.ca = pki.make_ca(pki.ca.name, extensions=[(x509.BasicConstraints(True, None), True), (key_usage("key_cert_sign"), True)])
    pki.trust_ca(pki.ca)
    assert pki.refusal(credential(pki)) == (203, "NW-X509-CRL")


def test_partial_crl_is_denied(pki):
    point = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)
    pki.write_crl(extensions=[(point, True)])
    assert pki.refusal(credential(pki)) == (203, "NW-X509-CRL")


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
def test_unreadable_crl_is_denied_always(pki, content):
    for hash_ in pki.hashes(pki.ca):
        (pki.ca_dir / f"{hash_}.r0").write_bytes(content)
    assert pki.refusal(credential(pki)) == (203, "NW-X509-CRL")


def test_crl_of_a_ca_with_the_same_hash_is_passed_over(pki):
    other = pki.make_ca(f"{BASE}/CN=Another")
    pki.write_crl(other, revoked=[pki.alice])
    for mine, its in zip(pki.hashes(pki.ca), pki.hashes(other)):
        (pki.ca_dir / f"{mine}.r0").rename(pki.ca_dir / f"{mine}.r1")
        (pki.ca_dir / f"{its}.r0").rename(pki.ca_dir / f"{mine}.r0")
    assert pki.verify(credential(pki), crl="require").notes == []
