"""Public keys, signatures, and the proof that a private key belongs to a certificate. All arithmetic is OpenSSL's, through cryptography."""

from __future__ import annotations

from typing import Any, Union

import cryptography
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from nodewrap.credentials.errors import deny, mistake, parsing

PublicKey = Union[rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey]

#: Signature algorithms that are taken: OID to key type and hash. MD5 and SHA-1 are missing on purpose: collisions can be bought.
ALGORITHMS: dict[str, tuple[type, Any]] = {
    "1.2.840.113549.1.1.11": (rsa.RSAPublicKey, hashes.SHA256),
    "1.2.840.113549.1.1.12": (rsa.RSAPublicKey, hashes.SHA384),
    "1.2.840.113549.1.1.13": (rsa.RSAPublicKey, hashes.SHA512),
    "1.2.840.10045.4.3.2": (ec.EllipticCurvePublicKey, hashes.SHA256),
    "1.2.840.10045.4.3.3": (ec.EllipticCurvePublicKey, hashes.SHA384),
    "1.2.840.10045.4.3.4": (ec.EllipticCurvePublicKey, hashes.SHA512),
    "1.3.101.112": (ed25519.Ed25519PublicKey, None),
}

_CURVES = ("secp256r1", "secp384r1", "secp521r1")

#: Without this switch OpenSSL tests the primes on every load: 34 ms of 36. Possession is proved below by a signature, which is all that is asked.
#: cryptography before 39 does not have it.
LOAD: dict[str, Any] = {"unsafe_skip_rsa_key_validation": True} if int(cryptography.__version__.split(".")[0]) >= 39 else {}

_CHALLENGE = b"nodewrap: proof of possession"


def check_strength(key: object, where: str) -> PublicKey:
    """The key, when its type and size are acceptable (RSA 1024 to 8192 bits, P-256/384/521, Ed25519); else Refusal NW-X509-KEY.

    The upper bounds keep one verification below a millisecond or so: a chain may ask for hundreds.
    """
    if isinstance(key, rsa.RSAPublicKey) and 1024 <= key.key_size <= 8192 and key.public_numbers().e < 2**64:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise deny("NW-X509-KEY", f"public key of {where} is of a type or size that is not accepted (RSA 1024-8192 bits, P-256, P-384, P-521, Ed25519)")


def signed_by(key: PublicKey, algorithm: str, signature: bytes, data: bytes, where: str) -> bool:
    """Whether ``signature`` of ``data`` verifies with ``key``. algorithm: dotted OID; one that is not accepted is Refusal NW-X509-ALGORITHM."""
    if algorithm not in ALGORITHMS:
        raise deny(
            "NW-X509-ALGORITHM",
            f"{where} is signed with algorithm {algorithm}; "
            "accepted are RSA and ECDSA with SHA-256 to SHA-512, and Ed25519",
        )
    kind, hash_type = ALGORITHMS[algorithm]
    if not isinstance(key, kind):
        return False
    try:
        _verify(key, signature, data, hash_type)
    except InvalidSignature:
        return False
    return True


def check_private_key(pem: bytes, key: PublicKey) -> None:
    """Prove that the private key in ``pem`` belongs to ``key`` by signing with it. Refusal 201: NW-KEY-READ, NW-KEY-MISMATCH."""
    with parsing("the private key", "NW-KEY-READ", 201):
        private = serialization.load_pem_private_key(pem, None, **LOAD)
        # Numbers that are no key make OpenSSL's signing fail with InternalError or ValueError: a bad key, not our bug.
        signature = _sign(private) if _fits(private, key) else None
    if signature is None or not _proves(key, signature):
        raise mistake("NW-KEY-MISMATCH", "the private key does not belong to the first certificate of the credential file; make a new proxy")


def _verify(key: PublicKey, signature: bytes, data: bytes, hash_type: Any) -> None:
    if isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, data, padding.PKCS1v15(), hash_type())
    elif isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, data, ec.ECDSA(hash_type()))
    else:
        key.verify(signature, data)


def _fits(private: Any, key: PublicKey) -> bool:
    """Whether the public halves agree and no secret number is larger than the modulus, so that signing with unchecked numbers takes no longer."""
    if type(private.public_key()) is not type(key) or not _same_public(private.public_key(), key):
        return False
    if not isinstance(private, rsa.RSAPrivateKey):
        return True
    numbers = private.private_numbers()
    secrets = (numbers.d, numbers.p, numbers.q, numbers.dmp1, numbers.dmq1, numbers.iqmp)
    return max(secret.bit_length() for secret in secrets) <= private.key_size


def _same_public(left: Any, right: Any) -> bool:
    raw = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return bool(left.public_bytes(*raw) == right.public_bytes(*raw))


def _sign(private: object) -> bytes | None:
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(_CHALLENGE, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(_CHALLENGE, ec.ECDSA(hashes.SHA256()))
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(_CHALLENGE)
    return None


def _proves(key: PublicKey, signature: bytes) -> bool:
    try:
        _verify(key, signature, _CHALLENGE, hashes.SHA256)
    except InvalidSignature:
        return False
    return True
