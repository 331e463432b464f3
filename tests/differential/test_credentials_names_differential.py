"""One-line names and CA file hashes against OpenSSL itself."""

from __future__ import annotations

import subprocess

import pytest
from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodewrap.credentials.names import SHORT, read_name, same_text
from nodewrap.model import Refusal
from tests.need import need
from tests.pki import key, tlv, when


def certificate_named(der: bytes) -> bytes:
    """PEM of a certificate with that subject; not signed, OpenSSL only has to print it."""
    placeholder = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder(placeholder, placeholder, key("any").public_key(), 1, when(0), when(1))
    made = builder.sign(key("any"), hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    from asn1crypto import pem
    from asn1crypto import x509 as asn1

    fields = asn1.Certificate.load(made)["tbs_certificate"]
    parts = [fields[name].dump() for name in ("version", "serial_number", "signature", "issuer", "validity")]
    tbs = tlv(0x30, *parts, der, fields["subject_public_key_info"].dump())
    return pem.armor("CERTIFICATE", tlv(0x30, tbs, fields["signature"].dump(), tlv(0x03, b"\0" * 257)))


def openssl(pem: bytes) -> tuple[str, str, str]:
    """(one-line name, new hash, old hash) as OpenSSL says."""
    argv = ["openssl", "x509", "-noout", "-subject", "-nameopt", "compat", "-subject_hash", "-subject_hash_old"]
    lines = subprocess.run(argv, input=pem, capture_output=True, check=True).stdout.decode().splitlines()
    subject = next(line for line in lines if line.startswith("subject="))
    new, old = (line for line in lines if not line.startswith("subject="))
    return subject[len("subject=") :].lstrip(" "), new, old


def name(*rdns) -> bytes:
    sets = [sorted(tlv(0x30, core.ObjectIdentifier(oid).dump(), tlv(tag, value)) for oid, tag, value in rdn) for rdn in rdns]
    return tlv(0x30, *[tlv(0x31, *attributes) for attributes in sets])


def must_agree(der: bytes) -> None:
    made = read_name(der)
    shown, *hashes_ = openssl(certificate_named(der))
    # OpenSSL 3 escapes these two; site files hold the older form.
    assert made.oneline == shown.replace("\\/", "/").replace("\\+", "+")
    assert [made.hash_new(), made.hash_old()] == hashes_
    assert same_text(made.oneline, shown)


@pytest.mark.parametrize("oid", SHORT)
def test_short_name_of_each_attribute_type_is_openssls(oid):
    need("openssl")
    must_agree(name([(oid, 12, b"value")], [("2.5.4.3", 12, b"x")]))


TEXT = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=20)
ASCII = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=20)
VALUE = st.one_of(
    TEXT.map(lambda text: (12, text.encode())),
    st.tuples(st.sampled_from([19, 22]), ASCII.map(str.encode)),
    st.text(st.characters(min_codepoint=0xA0, max_codepoint=0xFF), min_size=1, max_size=9).map(lambda text: (20, text.encode("latin-1"))),
    st.sampled_from([(12, b"two  blanks"), (12, b" outer "), (19, b"CERN"), (12, "ÄÖ İ".encode()), (12, b"a\xc2\xa0b"), (12, b"host/x.y")]),
)
RDN = st.lists(st.tuples(st.sampled_from(sorted(SHORT)), VALUE).map(lambda pair: (pair[0], *pair[1])), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(RDN, min_size=1, max_size=5))
def test_any_name_that_we_take_is_written_and_hashed_as_openssl_does(rdns):
    need("openssl")
    der = name(*rdns)
    try:
        read_name(der)
    except Refusal:
        return
    must_agree(der)
