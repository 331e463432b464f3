"""The credential file: PEM, certificates, the private key."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives import serialization

from nodewrap.credentials import Refusal, errors
from tests.pki import Pair, Pki, key


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


@pytest.fixture
def leaf(pki):
    return pki.forge_proxy(pki.alice, acs=[pki.forge_ac()])


def test_key_must_be_there(pki, leaf):
    assert pki.refusal(leaf.pem + pki.alice.pem) == (201, "NW-KEY-MISSING")


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
    from asn1crypto import core, pem

    integers = [0, numbers.n, numbers.e, other.d, other.p, other.q, other.dmp1, other.dmq1, other.iqmp]
    body = b"".join(core.Integer(integer).dump() for integer in integers)
    der = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    assert pki.refusal(leaf.pem + pem.armor("RSA PRIVATE KEY", der) + pki.alice.pem)[0] == 201


def test_encrypted_key_is_denied(pki, leaf):
    locked = leaf.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x"))
    assert pki.refusal(leaf.pem + locked + pki.alice.pem) == (201, "NW-KEY-READ")
    old = leaf.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.BestAvailableEncryption(b"x"))
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
    "a mebibyte of dashes": b"-" * (1 << 20),
    "unfinished headers": b"-----BEGIN CERTIFICATE-----\n" * 30000,
    "more than a mebibyte": b"x" * ((1 << 20) + 1),
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
    from asn1crypto import pem

    assert pki.refusal(pem.armor("CERTIFICATE", leaf.der[:-cut]) + leaf.key_pem + pki.alice.pem) == (203, "NW-X509-PARSE")


def test_bytes_behind_a_certificate_are_denied(pki, leaf):
    from asn1crypto import pem

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
