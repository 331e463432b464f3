"""The credential file: PEM, certificates, the private key."""

from __future__ import annotations

import random
import time

import pytest
from asn1crypto import core, pem
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from nodewrap.credentials import Refusal, errors, fingerprint
from tests.pki import ACS, Pair, Pki, certificate, dn, key, other_algorithm, tlv


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


@pytest.fixture
def leaf(pki):
    return pki.forge_proxy(pki.alice, acs=[pki.forge_ac()])


def test_key_must_be_there(pki, leaf):
    assert pki.refusal(leaf.pem + pki.alice.pem) == (201, "NW-KEY-MISSING")


def test_fingerprint_of_a_file_is_that_of_its_subject(pki, leaf):
    assert fingerprint(leaf.file(pki.alice)) == fingerprint(leaf.pem) == pki.verify(leaf.file(pki.alice)).fingerprint
    assert fingerprint(pki.alice.pem) != fingerprint(leaf.pem)


@pytest.mark.parametrize("data", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n"])
def test_file_without_a_certificate_has_no_fingerprint(data):
    assert fingerprint(data) == ""


def test_key_may_be_absent_where_the_caller_says_so(pki, leaf):
    subject = pki.verify(leaf.pem + pki.alice.pem, require_key=False)
    assert (subject.dn, subject.has_key) == (pki.alice.name, False)


@pytest.mark.parametrize("require_key", [True, False])
def test_key_of_another_is_denied(pki, leaf, require_key):
    swapped = Pair(leaf.cert, key("somebody else"))
    assert pki.refusal(swapped.file(pki.alice), require_key=require_key) == (201, "NW-KEY-MISMATCH")


def test_key_of_the_user_does_not_stand_for_the_proxys(pki, leaf):
    assert pki.refusal(Pair(leaf.cert, pki.alice.key).file(pki.alice)) == (201, "NW-KEY-MISMATCH")


def test_made_up_key_with_the_right_modulus_is_denied(pki, leaf):
    """Comparing public halves, as X509_check_private_key does, would let it pass: everything in it but modulus and exponent is invented."""
    numbers, other = leaf.key.public_key().public_numbers(), key("somebody else").private_numbers()
    integers = [0, numbers.n, numbers.e, other.d, other.p, other.q, other.dmp1, other.dmq1, other.iqmp]
    body = b"".join(core.Integer(integer).dump() for integer in integers)
    der = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    assert pki.refusal(leaf.pem + pem.armor("RSA PRIVATE KEY", der) + pki.alice.pem)[0] == 201


def test_encrypted_key_is_denied(pki, leaf):
    locked = leaf.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x"))
    assert pki.refusal(leaf.pem + locked + pki.alice.pem) == (201, "NW-KEY-READ")
    form, lock = serialization.PrivateFormat.TraditionalOpenSSL, serialization.BestAvailableEncryption(b"x")
    old = leaf.key.private_bytes(serialization.Encoding.PEM, form, lock)
    assert pki.refusal(leaf.pem + old + pki.alice.pem) == (201, "NW-KEY-READ")


def test_two_keys_are_denied(pki, leaf):
    assert pki.refusal(leaf.file(pki.alice) + key_text(pki)) == (201, "NW-KEY-READ")


def key_text(pki):
    return pki.alice.key_pem


def test_garbage_key_is_denied(pki, leaf):
    junk = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    assert pki.refusal(leaf.pem + junk + pki.alice.pem) == (201, "NW-KEY-READ")


RANDOM = random.Random(7)
NO_PEM = {
    "empty": b"",
    "one NUL": b"\0",
    "text": b"hello\n",
    "a mebibyte of junk": RANDOM.randbytes(1 << 20),
    "dashes": b"-" * (1 << 18),
    "unfinished headers": b"-----BEGIN CERTIFICATE-----\n" * 9000,
    "more than 256 KiB": b"x" * ((1 << 18) + 1),
    "private stranger": b"-----BEGIN NONSENSE-----\nAAAA\n-----END NONSENSE-----\n",
    "not base64": b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n",
    "33 certificates": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" * 33,
    "key alone": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
}


@pytest.mark.parametrize("name", NO_PEM)
def test_file_that_is_no_proxy_is_the_callers_mistake(pki, name):
    assert pki.refusal(NO_PEM[name]) == (201, "NW-PEM")


def test_certificate_block_of_junk_is_denied(pki):
    assert pki.refusal(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n") == (203, "NW-X509-PARSE")


@pytest.mark.parametrize("cut", [1, 10, 100, 400])
def test_truncated_certificate_is_denied(pki, leaf, cut):
    assert pki.refusal(pem.armor("CERTIFICATE", leaf.der[:-cut]) + leaf.key_pem + pki.alice.pem) == (203, "NW-X509-PARSE")


def test_bytes_behind_a_certificate_are_denied(pki, leaf):
    assert pki.refusal(pem.armor("CERTIFICATE", leaf.der + b"\0") + leaf.key_pem + pki.alice.pem) == (203, "NW-X509-PARSE")


def test_our_own_bug_is_not_dressed_up_as_a_refusal(pki, leaf, monkeypatch):
    """Only library calls stand inside ``parsing``: an error in a check of ours surfaces."""
    monkeypatch.setattr("nodewrap.credentials.proxy._check_usage", lambda *_: {}["bug"])
    with pytest.raises(KeyError):
        pki.verify(leaf.file(pki.alice))


def test_refusal_keeps_the_parsers_exception():
    with pytest.raises(Refusal) as caught, errors.parsing("it"):
        int("x")
    assert isinstance(caught.value.__cause__, ValueError)


def test_certificate_with_two_signature_algorithms_is_denied(pki, leaf):
    broken = pem.armor("CERTIFICATE", other_algorithm(leaf.der))
    assert pki.refusal(broken + leaf.key_pem + pki.alice.pem) == (203, "NW-X509-PARSE")


def test_certificate_on_which_two_parsers_disagree_is_denied(pki, leaf, monkeypatch):
    monkeypatch.setattr("nodewrap.credentials.certificate.strict.load_der_x509_certificate", lambda der: pki.alice.cert)
    assert pki.refusal(leaf.file(pki.alice)) == (203, "NW-X509-PARSE")


def test_certificate_without_a_name_is_denied(pki):
    nameless = pki.user("Alice Tester", subject=x509.Name([]))
    assert pki.refusal(nameless.file(), allow_plain=True) == (203, "NW-X509-DN")


# Cost: what a file of the allowed size can make us do (architecture I17)


def quick(pki, data, **more):
    """The refusal, which must come within two seconds of processor time; the launcher's deadline is ten of the clock."""
    start = time.process_time()
    found = pki.refusal(data, **more)
    assert time.process_time() - start < 2
    return found


def with_extension(pki, oid, value):
    return pki.forge_proxy(pki.alice, extensions=[(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), False)]).file(pki.alice)


@pytest.mark.parametrize("value", [
    tlv(0x30, tlv(0x30, b"\x30\x00" * 40000)), tlv(0x30, b"\x30\x00" * 40000), b"\x30\x84\x00\x00\x00\x00" * 10000, b"\x30\x80" * 40000,
])
def test_swarm_of_attribute_certificates_is_refused_soon(pki, value):
    assert quick(pki, with_extension(pki, ACS, value)) == (203, "NW-VOMS-PARSE")


def test_swarm_of_extensions_is_refused_soon(pki):
    many = [(x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.{number}"), b""), False) for number in range(8000)]
    assert quick(pki, pki.forge_proxy(pki.alice, extensions=many).file(pki.alice)) == (203, "NW-X509-PARSE")


def test_swarm_of_rdns_is_refused_soon(pki):
    many = x509.Name([*pki.alice.cert.subject, *[x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")] * 8000])
    assert quick(pki, pki.forge_proxy(pki.alice, subject=many).file(pki.alice)) == (203, "NW-X509-PARSE")


def test_swarm_of_certificates_with_one_name_is_refused_soon(pki):
    """Each could have signed the leaf: the most verifications that one file can ask for."""
    big = rsa.generate_private_key(65537, 4096)
    leaf = pki.forge_proxy(pki.alice, signer=key("nobody"))
    others = [pki.user("Alice Tester", private=big) for _ in range(31)]
    assert quick(pki, leaf.file(*others)) == (203, "NW-X509-CHAIN")


@pytest.mark.parametrize("which", range(6))
def test_key_with_huge_secret_numbers_is_refused_soon(pki, leaf, which):
    """With OpenSSL's own check off, exponentiation by such numbers would take hours."""
    public, real = leaf.key.public_key().public_numbers(), leaf.key.private_numbers()
    secrets = [real.d, real.p, real.q, real.dmp1, real.dmq1, real.iqmp]
    secrets[which] = 2**80000 - 1
    body = b"".join(core.Integer(integer).dump() for integer in (0, public.n, public.e, *secrets))
    assert quick(pki, leaf.pem + pem.armor("RSA PRIVATE KEY", tlv(0x30, body)) + pki.alice.pem)[0] == 201


def test_huge_private_key_is_refused_unread(pki, leaf):
    """Read, it would be NW-KEY-MISMATCH."""
    public = leaf.key.public_key().public_numbers()
    body = b"".join(core.Integer(integer).dump() for integer in (0, public.n, public.e, *[2**30000 - 1] * 6))
    assert quick(pki, leaf.pem + pem.armor("RSA PRIVATE KEY", tlv(0x30, body)) + pki.alice.pem) == (201, "NW-KEY-READ")


def test_huge_file_is_refused_unread(pki, leaf):
    assert pki.refusal(leaf.file(pki.alice) + b"x" * (1 << 18)) == (201, "NW-PEM")


def test_huge_public_key_is_refused_soon(pki):
    numbers = rsa.RSAPublicNumbers(65537, 2**70000 + 1)
    try:
        public = numbers.public_key()
    except ValueError:
        public = rsa.RSAPublicNumbers(65537, 2**16000 + 1).public_key()
    made = certificate(dn("/CN=x"), dn("/CN=y"), public, key("any"))
    assert quick(pki, made.public_bytes(serialization.Encoding.PEM), require_key=False) == (203, "NW-X509-KEY")
