"""Certificate revocation lists from the CA directory (``<hash>.r0`` …)."""

from __future__ import annotations

from asn1crypto import crl as asn1  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from nodewrap.credentials.certificate import Certificate, check_known, read_extensions
from nodewrap.credentials.errors import deny, parsing
from nodewrap.credentials.keys import signed_by
from nodewrap.credentials.names import read_name
from nodewrap.credentials.trust import Context

#: Non-critical in practice; an issuing distribution point (indirect or partial list) or a delta indicator is critical and refused.
_UNDERSTOOD = {"2.5.29.20", "2.5.29.35"}

MAX_LISTS = 4


def check_revocation(certificate: Certificate, ca: Certificate, hashes: tuple[str, str], context: Context) -> None:
    """Refusal NW-X509-REVOKED, or NW-X509-CRL when a good list is required and there is none; else what was missing becomes a note."""
    for hash_ in hashes:
        for number in range(MAX_LISTS):
            name = f"{hash_}.r{number}"
            pem = context.ca(name)
            if pem is None:
                break
            if apply(pem, name, certificate, ca, context):
                return
    _missing(f"no CRL of {ca.subject.oneline} ({hashes[0]}.r0)", context)


def _missing(text: str, context: Context) -> None:
    if context.options.crl == "require":
        raise deny("NW-X509-CRL", f"{text} in the CA directory, and CRLs are required; run fetch-crl")
    context.note(text)


def apply(pem: bytes, name: str, certificate: Certificate, ca: Certificate, context: Context) -> bool:
    """Whether the list in file ``name`` is of ``ca``; then it was applied. A list with a bad signature is refused, whatever the options say."""
    with parsing(f"{name} in the CA directory", "NW-X509-CRL"):
        parsed = x509.load_pem_x509_crl(pem)
        fields = asn1.CertificateList.load(parsed.public_bytes(Encoding.DER), strict=True)
        body = fields["tbs_cert_list"]
        tbs, issuer, algorithm = body.dump(), body["issuer"].dump(), fields["signature_algorithm"]["algorithm"].dotted
        signature = fields["signature"].native
        times = int(body["this_update"].native.timestamp()), _seconds(body["next_update"])
        extensions = read_extensions(body["crl_extensions"])
        revoked = parsed.get_revoked_certificate_by_serial_number(certificate.serial) is not None
    if read_name(issuer).rdns != ca.subject.rdns:
        return False
    check_known(extensions, _UNDERSTOOD, f"{name} in the CA directory", "NW-X509-CRL")
    if not signed_by(ca.key, algorithm, signature, tbs, name) or (ca.usage is not None and "crl_sign" not in ca.usage):
        raise deny("NW-X509-CRL", f"{name} in the CA directory is not signed by {ca.subject.oneline}; run fetch-crl")
    if revoked:
        raise deny(
            "NW-X509-REVOKED",
            f"{certificate.subject.oneline} (serial {certificate.serial}) was revoked by {ca.subject.oneline}; "
            "get a new certificate",
        )
    _check_age(times, ca, context)
    return True


def _check_age(times: tuple[int, int], ca: Certificate, context: Context) -> None:
    skew = context.options.clock_skew_s
    if context.now > times[1] + skew:
        _missing(f"only an expired CRL of {ca.subject.oneline}", context)
    if context.now < times[0] - skew:
        _missing(f"only a CRL of {ca.subject.oneline} from the future", context)


def _seconds(next_update: object) -> int:
    """nextUpdate in seconds; 0, long past, when the list does not say (RFC 5280 5.1.2.5 demands it)."""
    native = getattr(next_update, "native", None)
    return int(native.timestamp()) if native is not None else 0
