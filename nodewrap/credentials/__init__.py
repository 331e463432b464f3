"""Verification of X.509 proxies and VOMS attribute certificates (docs/credentials.md).

Runs in the jailed policy child on bytes that the pilot chose. The child imports this package before it locks itself in: afterwards nothing is
imported, no file is opened, no thread started. ``warm`` sees to what the libraries would do lazily, and runs on import.
"""

from __future__ import annotations

import hashlib
import warnings

from nodewrap.credentials.certificate import Certificate, read_certificate
from nodewrap.credentials.errors import mistake
from nodewrap.credentials.keys import check_private_key
from nodewrap.credentials.path import check_path
from nodewrap.credentials.pem import certificates, split
from nodewrap.credentials.proxy import check_proxies, find_chain
from nodewrap.credentials.trust import Context, DirectoryTrust, Options, Trust
from nodewrap.credentials.voms import check_voms, short_fqan
from nodewrap.credentials.warm import warm
from nodewrap.model import Refusal, Subject

__all__ = ["DirectoryTrust", "Options", "Refusal", "Subject", "Trust", "fingerprint", "short_fqan", "verify", "warm"]


def verify(pem: bytes, trust: Trust, now: int, *, require_key: bool = True, options: Options | None = None) -> Subject:
    """The Subject that the proxy file ``pem`` proves at ``now`` (seconds since 1970), assurance ``credential``.

    Raises Refusal: 201 NW-PEM, NW-KEY-… when the file itself is wrong, 203 NW-X509-…, NW-PROXY-…, NW-VOMS-… when it proves nothing here.
    """
    context = Context(trust, now, Options() if options is None else options)
    with warnings.catch_warnings():
        # cryptography warns of odd certificates; showing a warning opens source files, which kills the locked child.
        warnings.simplefilter("ignore")
        return _verify(pem, context, require_key)


def fingerprint(pem: bytes) -> str:
    """SHA-256 hex of the first certificate in ``pem``, unverified, to compare with ``Subject.fingerprint``; "" when there is none."""
    try:
        ders = certificates(pem, "the file")
    except Refusal:
        return ""
    return hashlib.sha256(ders[0]).hexdigest() if ders else ""


def _verify(pem: bytes, context: Context, require_key: bool) -> Subject:
    ders, key = split(pem)
    leaf, *others = [read_certificate(der, f"certificate {number} of the credential file") for number, der in enumerate(ders, 1)]
    has_key = _check_key(key, leaf, require_key)
    chain, spare = find_chain(leaf, others)
    limited = check_proxies(chain, context)
    cas = check_path(chain[-1], spare, context)
    attributes = check_voms(chain, context)
    subject = _describe(chain, cas)
    subject.has_key, subject.limited, subject.notes = has_key, limited, context.notes
    subject.vo, subject.fqans = attributes.vo, attributes.fqans
    subject.expires = min(subject.expires, attributes.expires or subject.expires)
    return subject


def _check_key(key: bytes | None, leaf: Certificate, require_key: bool) -> bool:
    if key is None and require_key:
        raise mistake("NW-KEY-MISSING", "the credential file holds no private key; name the whole proxy file")
    if key is None:
        return False
    check_private_key(key, leaf.key)
    return True


def _describe(chain: list[Certificate], cas: list[Certificate]) -> Subject:
    eec = chain[-1]
    subject = Subject("credential", eec.subject.oneline)
    subject.issuer = eec.issuer.oneline
    subject.serial = str(eec.serial)
    subject.kind = chain[0].kind()
    subject.fingerprint = chain[0].fingerprint()
    subject.expires = min(certificate.not_after for certificate in chain + cas)
    return subject


warm()
