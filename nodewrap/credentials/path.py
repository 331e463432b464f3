"""From a certificate up to a self-signed CA of the CA directory."""

from __future__ import annotations

from collections.abc import Iterator

from nodewrap.credentials import pem, policyfile
from nodewrap.credentials.certificate import Certificate, read_certificate
from nodewrap.credentials.crl import check_revocation
from nodewrap.credentials.errors import deny, parsing
from nodewrap.credentials.names import Name
from nodewrap.credentials.trust import X509_TIME, Context

#: CAs above an end-entity certificate, and CAs whose names share a hash.
MAX_CAS = 8
MAX_COLLISIONS = 4


def check_path(certificate: Certificate, spare: list[Certificate], context: Context) -> list[Certificate]:
    """The CAs above ``certificate``, root last. spare: certificates that came along and may serve as intermediate CAs.

    Each link: signature, CA flag, key usage, path length, validity, signing policy, CRL. Refusal NW-X509-…
    """
    cas: list[Certificate] = []
    below = certificate
    while not (cas and below.self_issued()):
        if len(cas) == MAX_CAS:
            raise deny("NW-X509-CHAIN", f"more than {MAX_CAS} CAs above {certificate.subject.oneline}; use a certificate with a shorter chain")
        ca = _find_issuer(below, spare, context)
        _check_ca(ca, cas, context)
        _check_signing_policy(below, ca, context)
        check_revocation(below, ca, _hashes(ca), context)
        cas.append(ca)
        below = ca
    return cas


def _hashes(ca: Certificate) -> tuple[str, str]:
    return ca.subject.hash_new(), ca.subject.hash_old()


def _find_issuer(certificate: Certificate, spare: list[Certificate], context: Context) -> Certificate:
    """The first that signed ``certificate`` and is valid now, else the first that signed it: a renewed CA stands beside the old one, with one key."""
    reason, stale = "there is none with that name", None
    for ca in _candidates(certificate.issuer, spare, context):
        reason = "none with that name signed it"
        if ca.signed(certificate):
            stale = stale or ca
            if context.is_time(ca.not_before, ca.not_after):
                return ca
    if stale is not None:
        return stale
    name, file = certificate.issuer.oneline, f"{certificate.issuer.hash_new()}.0"
    raise deny(
        "NW-X509-UNTRUSTED",
        f"{certificate.subject.oneline}: issuer {name} is not a trusted CA: {reason} in the CA directory ({file}); "
        "install it if the site trusts it",
    )


def _candidates(issuer: Name, spare: list[Certificate], context: Context) -> Iterator[Certificate]:
    """Those of that name in the CA directory, then those that came along; a self-issued one ends the path, so it counts only from the directory."""
    for hash_ in (issuer.hash_new(), issuer.hash_old()):
        yield from (ca for ca in _in_directory(hash_, context) if ca.subject.rdns == issuer.rdns)
    yield from (ca for ca in spare if ca.subject.rdns == issuer.rdns and not ca.self_issued())


def _in_directory(hash_: str, context: Context) -> Iterator[Certificate]:
    """The CAs in ``hash.0``, ``hash.1`` … (names whose hashes collide, or one name with two keys)."""
    for number in range(MAX_COLLISIONS):
        name = f"{hash_}.{number}"
        text = context.ca(name)
        if text is None:
            return
        for der in pem.certificates(text, name, "NW-X509-PARSE", 203)[:1]:
            yield read_certificate(der, f"{name} in the CA directory")


def _check_ca(ca: Certificate, below: list[Certificate], context: Context) -> None:
    name = ca.subject.oneline
    if ca.is_ca is not True or ca.kind() != "eec":
        raise deny("NW-X509-CA", f"{name} signed a certificate but is not a CA (basicConstraints); use a certificate from a real CA")
    if ca.usage is not None and "key_cert_sign" not in ca.usage:
        raise deny("NW-X509-CA", f"{name} may not sign certificates (keyUsage); use a certificate from a CA that may")
    if 0 <= ca.path_length < len(below):
        raise deny("NW-X509-PATHLEN", f"too many CAs below {name}: its path length is {ca.path_length}; use a certificate with a shorter chain")
    context.check_time(ca.not_before, ca.not_after, f"CA certificate {name}", X509_TIME)


def _check_signing_policy(certificate: Certificate, ca: Certificate, context: Context) -> None:
    for hash_ in _hashes(ca):
        file = f"{hash_}.signing_policy"
        data = context.ca(file)
        if data is not None:
            with parsing(f"{file} in the CA directory", "NW-X509-POLICY"):
                text = data.decode("utf-8")
            if policyfile.allowed(text, ca.subject.oneline, certificate.subject.oneline, file):
                return
            raise deny(
                "NW-X509-POLICY",
                f"{ca.subject.oneline} may not sign {certificate.subject.oneline} ({file} in the CA directory); "
                "use a certificate in the CA's namespace",
            )
    if context.options.signing_policy == "require":
        raise deny(
            "NW-X509-POLICY",
            f"no signing policy of {ca.subject.oneline} ({_hashes(ca)[0]}.signing_policy in the CA directory); "
            "install it, or set signing_policy to if-present",
        )
    context.note(f"no signing policy of {ca.subject.oneline}")
