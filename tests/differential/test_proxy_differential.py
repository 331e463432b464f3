"""Proxy chains: our verdict against ``verify-proxy-tool``, the LCMAPS verifier (OpenSSL with grid extensions). Where we differ, a test says why."""

from __future__ import annotations

import os
import subprocess

import pytest
from cryptography import x509

from nodewrap.credentials import Refusal
from tests.need import need
from tests.pki import BASE, DAY, INDEPENDENT, Pki, dn, key, key_usage

ALICE = f"{BASE}/O=Users/CN=Alice Tester"


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def tool(pki, data):
    """True: the LCMAPS verifier accepts the file now."""
    need("verify-proxy-tool")
    file = pki.directory / "asked.pem"
    file.unlink(missing_ok=True)
    file.touch(0o600)
    file.write_bytes(data)
    done = subprocess.run(["verify-proxy-tool", "-d", "-q", file], capture_output=True, env={"PATH": os.defpath, "X509_CERT_DIR": str(pki.ca_dir)})
    assert done.returncode in (0, 2), done.stderr
    return done.returncode == 0


def ours(pki, data, **options):
    try:
        pki.verify(data, **{"allow_without_voms": True, "allow_plain": True, **options})
    except Refusal:
        return False
    return True


def chain(pki, *levels, user=None):
    above = [user or pki.alice]
    for number, level in enumerate(levels):
        above.insert(0, pki.forge_proxy(above[0], **{"private": key(f"level {number}"), **level}))
    return above[0].file(*above[1:])


@pytest.mark.parametrize("args", [
    ("-rfc",), ("-rfc", "-limited"), ("-proxyver", "2"), ("-proxyver", "2", "-limited"), ("-proxyver", "3"), ("-proxyver", "3", "-limited"),
    ("-rfc", "-path-length", "0"),
])
@pytest.mark.parametrize("depth", [1, 2])
def test_real_proxies_and_delegations_of_them(pki, args, depth):
    need("voms-proxy-fake")
    file = pki.proxy(args=args)
    data = file.read_bytes() if depth == 1 else pki.delegate(file, limited="-limited" in args)
    if depth == 2 and "-proxyver" in args:
        return mixed_is_refused_by_both(pki, data)
    return must_agree(pki, data, depth == 1 or "-path-length" not in args)


def mixed_is_refused_by_both(pki, data):
    assert (tool(pki, data), ours(pki, data)) == (False, False)


def must_agree(pki, data, expected):
    assert (tool(pki, data), ours(pki, data)) == (expected, expected)


def test_real_expired_proxy(pki):
    need("voms-proxy-fake")
    must_agree(pki, pki.proxy(args=("-rfc", "-pastproxy", "30:00", "-hours", "12")).read_bytes(), False)


SAN = x509.SubjectAlternativeName([x509.DNSName("wn1.example.org")])
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
SAME = {
    "good": ([{}], True),
    "five levels": ([{}] * 5, True),
    "limited below full": ([{}, {"limited": True}], True),
    "limited twice": ([{"limited": True}] * 2, True),
    "full below limited": ([{"limited": True}, {}], False),
    "gt3 full below limited": ([{"limited": True, "kind": "gt3"}, {"kind": "gt3"}], False),
    "legacy full below limited": ([{"limited": True, "kind": "legacy"}, {"kind": "legacy"}], False),
    "path length kept": ([{"path_length": 1}, {}], True),
    "path length exceeded": ([{"path_length": 1}, {}, {}], False),
    "path length 0 exceeded": ([{"path_length": 0}, {}], False),
    "legacy below rfc": ([{}, {"kind": "legacy"}], False),
    "rfc below legacy": ([{"kind": "legacy"}, {}], False),
    "expired": ([{"start": -2 * DAY, "end": -DAY}], False),
    "not yet valid": ([{"start": DAY, "end": 2 * DAY}], False),
    "expired in the middle": ([{"start": -2 * DAY, "end": -DAY}, {}], False),
    "other name": ([{"subject": dn(f"{BASE}/O=Users/CN=Mallory/CN=1")}], False),
    "two CNs": ([{"subject": dn(f"{ALICE}/CN=1/CN=2")}], False),
    "last RDN no CN": ([{"subject": dn(f"{ALICE}/OU=1")}], False),
    "CA true": ([{"extensions": [(x509.BasicConstraints(True, None), True)]}], False),
    "alternative name": ([{"extensions": [(SAN, False)]}], False),
    "unknown critical": ([{"extensions": [(UNKNOWN, True)]}], False),
    "unknown not critical": ([{"extensions": [(UNKNOWN, False)]}], True),
    "info not critical": ([{"critical": False}], False),
    "wrong key signed": ([{"signer": key("mallory")}], False),
}


@pytest.mark.parametrize("name", SAME)
def test_verdict_is_that_of_lcmaps(pki, name):
    levels, expected = SAME[name]
    must_agree(pki, chain(pki, *levels), expected)


def test_users_and_cas_are_judged_as_lcmaps_does(pki):
    rogue = pki.make_ca(f"{BASE}/CN=Rogue CA")
    must_agree(pki, chain(pki, {}, user=pki.user("Alice Tester", issuer=rogue)), False)
    must_agree(pki, chain(pki, {}, user=pki.user("Alice Tester", start=-2 * DAY, end=-DAY)), False)
    must_agree(pki, chain(pki, {}, user=pki.ca), False)
    bob = pki.user("Bob Victim", issuer=pki.alice)
    must_agree(pki, pki.forge_proxy(bob).file(bob, pki.alice), False)
    must_agree(pki, chain(pki), True)


def test_intermediate_cas_are_followed_as_lcmaps_does(pki):
    sub = pki.make_ca(f"{BASE}/CN=Sub CA", pki.ca)
    user = pki.user("Alice Tester", issuer=sub)
    must_agree(pki, chain(pki, {}, user=user), False)
    pki.trust_ca(sub)
    must_agree(pki, chain(pki, {}, user=user), True)
    must_agree(pki, chain(pki, {}, user=pki.user("Alice Tester", issuer=pki.make_ca(f"{BASE}/CN=No CA", pki.ca, extensions=[]))), False)


def test_crls_are_obeyed_as_lcmaps_does(pki):
    data = chain(pki, {})
    pki.write_crl(revoked=[pki.alice])
    must_agree(pki, data, False)
    pki.remove_crl()
    must_agree(pki, data, True)


# Where we differ, on purpose


def test_expired_crl_is_refused_by_lcmaps_and_by_us_where_required(pki):
    pki.write_crl(start=-3 * DAY, end=-2 * DAY)
    data = chain(pki, {})
    assert (tool(pki, data), ours(pki, data, crl="require"), ours(pki, data)) == (False, False, True)


@pytest.mark.parametrize("language", [INDEPENDENT, "1.2.3.4.5"])
def test_policy_that_cannot_be_enforced_is_refused_by_us_alone(pki, language):
    """RFC 3820 4.1.4: with such a policy the proxy does not simply have its user's rights; LCMAPS warns."""
    data = chain(pki, {"language": language})
    assert (tool(pki, data), ours(pki, data)) == (True, False)


def test_proxy_whose_key_may_not_sign_is_refused_by_us_alone(pki):
    """RFC 3820 3.7: digitalSignature MUST be asserted."""
    data = chain(pki, {"usage": (key_usage("key_encipherment"), True)})
    assert (tool(pki, data), ours(pki, data)) == (True, False)


@pytest.mark.parametrize("kind", ["legacy", "gt3"])
def test_delegation_of_old_kinds_is_accepted_by_us_alone(pki, kind):
    """OpenSSL 3 does not know these as proxies and asks their user's certificate for keyCertSign when there are two of them."""
    data = chain(pki, {"kind": kind}, {"kind": kind})
    assert (tool(pki, data), ours(pki, data)) == (False, True)


def test_signing_policy_is_enforced_by_us_alone(pki):
    pki.trust_ca(pki.ca, subjects=("/DC=org/DC=other/*",))
    data = chain(pki, {})
    assert (tool(pki, data), ours(pki, data)) == (True, False)
