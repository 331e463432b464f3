"""Make the libraries do now what they would do at first use: fetch algorithms, seed the generator, import, read configuration.

After it the policy child forbids open, exec and executable memory. ``tests/integration/test_credentials_syscalls.py`` holds us to it.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from nodewrap.credentials import crl, keys
from nodewrap.credentials.certificate import Certificate, read_certificate
from nodewrap.credentials.trust import Context, Options, Trust
from nodewrap.model import Refusal

#: Mersenne primes: an RSA key of 1128 bits without a secret in this file, and without the time to make one.
_P, _Q, _E = 2**521 - 1, 2**607 - 1, 65537

_THEN = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
_LATER = datetime.datetime(2027, 1, 1, tzinfo=datetime.timezone.utc)


class _NoTrust(Trust):
    def ca(self, name: str) -> bytes | None:
        return None

    def voms(self, name: str) -> bytes | None:
        return None


def warm() -> None:
    """Use every algorithm and every parser once. About 3 ms; idempotent, no lasting effect of its own."""
    private = _rsa()
    for key in (private, ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()):
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        keys.check_private_key(pem, key.public_key())
        _refuse_each(key.public_key())
    ca = _certificate(private)
    _warm_crl(private, ca)
    _warm_errors()


def _rsa() -> rsa.RSAPrivateKey:
    d = pow(_E, -1, (_P - 1) * (_Q - 1))
    public = rsa.RSAPublicNumbers(_E, _P * _Q)
    numbers = rsa.RSAPrivateNumbers(_P, _Q, d, d % (_P - 1), d % (_Q - 1), rsa.rsa_crt_iqmp(_P, _Q), public)
    return numbers.private_key(**keys.LOAD)


def _refuse_each(key: keys.PublicKey) -> None:
    """A signature of zeros fails after the algorithms were fetched, which is all that is wanted."""
    for algorithm in keys.ALGORITHMS:
        keys.signed_by(key, algorithm, bytes(64), b"", "")


def _certificate(private: rsa.RSAPrivateKey) -> Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "warm")])
    builder = x509.CertificateBuilder(name, name, private.public_key(), 1, _THEN, _LATER).add_extension(x509.BasicConstraints(True, 0), True)
    made = read_certificate(builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.DER), "warm")
    made.signed(made)
    made.subject.hash_new(), made.subject.hash_old(), made.fingerprint()
    return made


def _warm_crl(private: rsa.RSAPrivateKey, ca: Certificate) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "warm")])
    revoked = x509.RevokedCertificateBuilder(2, _THEN).build()
    made = x509.CertificateRevocationListBuilder(name, _THEN, _LATER, revoked_certificates=[revoked]).sign(private, hashes.SHA256())
    context = Context(_NoTrust(), int(_THEN.timestamp()), Options())
    crl.apply(made.public_bytes(serialization.Encoding.PEM), "warm.r0", ca, ca, context)


def _warm_errors() -> None:
    """The way of a refusal: each library's exceptions."""
    for junk in (b"", b"\x30\x03\x02\x01\x01"):
        try:
            read_certificate(junk, "warm")
        except Refusal:
            continue
