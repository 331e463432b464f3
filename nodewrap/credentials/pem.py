"""Split a credential file into its PEM blocks (RFC 7468), without looking inside them."""

from __future__ import annotations

import base64
import re

from nodewrap.credentials.errors import mistake, parsing

#: Limits (architecture I17): bytes of a file, certificates in it, bytes of the private key. A long chain with many FQANs is below 64 KiB, a
#: key of 8192 bits below 7. The last one also bounds the arithmetic on numbers that nobody has checked yet.
MAX_BYTES = 1 << 18
MAX_CERTIFICATES = 32
MAX_KEY_BYTES = 1 << 14

#: A body ends at the first "-----", so matching is linear in the size of the file whatever is in it.
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----[ \t]*\r?\n((?:[^-]|-(?!----))*)-----END \1-----")
_KEYS = (b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY")
_CERTIFICATES = (b"CERTIFICATE", b"X509 CERTIFICATE")


def blocks(pem: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """(label, body, whole text) of each PEM block, in order; text between blocks is ignored, as OpenSSL does."""
    return [(match[1], match[2], match[0]) for match in _BLOCK.finditer(pem)]


def certificates(pem: bytes, what: str, code: str = "NW-PEM", exit: int = 201) -> list[bytes]:
    """DER of each certificate, in order. Refusal (exit, code) when base64 is broken or there are more than MAX_CERTIFICATES."""
    with parsing(what, code, exit):
        found = [base64.b64decode(b"".join(body.split()), validate=True) for label, body, _ in blocks(pem) if label in _CERTIFICATES]
        if len(found) > MAX_CERTIFICATES:
            raise ValueError(f"more than {MAX_CERTIFICATES} certificates")
    return found


def split(pem: bytes) -> tuple[list[bytes], bytes | None]:
    """(DER certificates, leaf first; PEM text of the private key or None) of a proxy file. Refusal 201 NW-PEM, NW-KEY-READ."""
    if len(pem) > MAX_BYTES:
        raise mistake("NW-PEM", f"the credential file is larger than {MAX_BYTES} bytes; name a PEM file with a proxy")
    ders = certificates(pem, "the credential file")
    if not ders:
        raise mistake("NW-PEM", "the credential file holds no PEM certificate; name a file made by voms-proxy-init or grid-proxy-init")
    labels = blocks(pem)
    if any(b"ENCRYPTED" in label or b"ENCRYPTED" in body for label, body, _ in labels):
        raise mistake("NW-KEY-READ", "the private key is encrypted; a proxy's key must not be")
    keys = [text + b"\n" for label, _, text in labels if label in _KEYS]
    if any(len(key) > MAX_KEY_BYTES for key in keys):
        raise mistake("NW-KEY-READ", f"the private key is larger than {MAX_KEY_BYTES} bytes; make a new proxy")
    if len(keys) > 1:
        raise mistake("NW-KEY-READ", "the credential file holds more than one private key; keep the proxy's own")
    return ders, keys[0] if keys else None
