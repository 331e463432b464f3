"""An X.509 certificate as plain values: read once, by two parsers that must agree.

cryptography (strict DER, in Rust) gates the outer structure and gives the key; asn1crypto gives names and extensions. asn1crypto reads lazily:
everything that is needed is taken here, inside ``parsing``, so no parser runs later.
"""

from __future__ import annotations

import hashlib
from typing import Any

from asn1crypto import core, x509  # type: ignore[import-untyped]
from cryptography import x509 as strict

from nodewrap.credentials.errors import deny, parsing
from nodewrap.credentials.keys import PublicKey, check_strength, signed_by
from nodewrap.credentials.names import Name, read_name

RFC_PROXY = "1.3.6.1.5.5.7.1.14"
GT3_PROXY = "1.3.6.1.4.1.3536.1.222"
INHERIT_ALL = "1.3.6.1.5.5.7.21.1"
LIMITED = "1.3.6.1.4.1.3536.1.1.1.9"
VOMS_ACS = "1.3.6.1.4.1.8005.100.100.5"

BASIC_CONSTRAINTS = "2.5.29.19"
KEY_USAGE = "2.5.29.15"
ALTERNATIVE_NAMES = ("2.5.29.17", "2.5.29.18")
NAME_CONSTRAINTS = "2.5.29.30"

#: Extensions that may be critical. Processed: basicConstraints, keyUsage, proxyCertInfo. Harmless for what is decided here: alternative names,
#: extended key usage, key identifiers, certificate policies (no policy is required of the path). Name constraints are not processed, so refused.
_UNDERSTOOD = {
    BASIC_CONSTRAINTS, KEY_USAGE, RFC_PROXY, GT3_PROXY, *ALTERNATIVE_NAMES, "2.5.29.37", "2.5.29.14", "2.5.29.35", "2.5.29.32",
}

#: Limit (architecture I17): asn1crypto takes 20 µs for each, and a file could hold tens of thousands.
MAX_EXTENSIONS = 64


class _Policy(core.Sequence):  # type: ignore[misc]
    _fields = [("language", core.ObjectIdentifier), ("policy", core.OctetString, {"optional": True})]


class _RfcProxyInfo(core.Sequence):  # type: ignore[misc]
    """RFC 3820, 3.8."""

    _fields = [("path_length", core.Integer, {"optional": True}), ("policy", _Policy)]


class _Gt3ProxyInfo(core.Sequence):  # type: ignore[misc]
    """The draft that Globus 3 shipped: the other order, and a tagged path length."""

    _fields = [("policy", _Policy), ("path_length", core.Integer, {"explicit": 1, "optional": True})]


class ProxyInfo:
    """proxyCertInfo. kind: ``rfc`` or ``gt3``. path_length: -1 when unlimited. language: dotted OID. has_policy: a policy text follows it."""

    __slots__ = ("has_policy", "kind", "language", "path_length")

    def __init__(self, kind: str, info: Any) -> None:
        length = info["path_length"].native
        if length is not None and length < 0:
            raise ValueError("negative path length")
        self.kind = kind
        self.path_length = -1 if length is None else int(length)
        self.language = str(info["policy"]["language"].dotted)
        self.has_policy = info["policy"]["policy"].native is not None


class Certificate:
    """Plain values. not_before, not_after: seconds since 1970. is_ca: basicConstraints CA, None when absent. path_length: -1 when unlimited.

    usage: names of the keyUsage bits, None when absent. proxy: ProxyInfo or None. extensions: {dotted OID: (critical, DER of the value)}.
    algorithm: dotted OID of the signature. tbs: the signed bytes.
    """

    __slots__ = (
        "algorithm", "der", "extensions", "is_ca", "issuer", "key", "not_after", "not_before", "path_length", "proxy", "serial",
        "signature", "subject", "tbs", "usage",
    )

    der: bytes
    tbs: bytes
    signature: bytes
    algorithm: str
    key: PublicKey
    subject: Name
    issuer: Name
    serial: int
    not_before: int
    not_after: int
    extensions: dict[str, tuple[bool, bytes]]
    is_ca: bool | None
    path_length: int
    usage: frozenset[str] | None
    proxy: ProxyInfo | None

    def fingerprint(self) -> str:
        return hashlib.sha256(self.der).hexdigest()

    def signed(self, other: Certificate) -> bool:
        """Whether ``other`` carries a signature by this certificate's key."""
        return signed_by(self.key, other.algorithm, other.signature, other.tbs, other.subject.oneline)

    def self_issued(self) -> bool:
        return self.subject.rdns == self.issuer.rdns

    def legacy_cn(self) -> str:
        """``proxy`` or ``limited proxy`` when the name is the issuer's and one such CN (Globus 2), else ""."""
        named = self.subject.last_cn in ("proxy", "limited proxy") and self.subject.rdns[:-1] == self.issuer.rdns
        return self.subject.last_cn if named else ""

    def kind(self) -> str:
        """``rfc``, ``gt3``, ``legacy`` or, when it is no proxy, ``eec``."""
        if self.proxy is not None:
            return self.proxy.kind
        return "legacy" if self.legacy_cn() else "eec"


def read_certificate(der: bytes, what: str) -> Certificate:
    """Certificate from DER. Refusal NW-X509-PARSE, NW-X509-DN, NW-X509-KEY, NW-X509-EXTENSION."""
    made = Certificate()
    made.der = der
    with parsing(what):
        parsed = strict.load_der_x509_certificate(der)
        fields = x509.Certificate.load(der, strict=True)
        _read_signature(made, fields, parsed)
        key = parsed.public_key()
        subject, issuer = _read_fields(made, fields["tbs_certificate"])
    made.subject, made.issuer = read_name(subject), read_name(issuer)
    if not made.subject.rdns:
        raise deny("NW-X509-DN", f"{what} has an empty subject; only certificates with a distinguished name are accepted")
    made.key = check_strength(key, made.subject.oneline)
    _check_critical(made)
    return made


def _read_signature(made: Certificate, fields: Any, parsed: strict.Certificate) -> None:
    made.tbs = fields["tbs_certificate"].dump()
    made.signature = fields["signature_value"].native
    made.algorithm = fields["signature_algorithm"]["algorithm"].dotted
    if fields["signature_algorithm"].dump() != fields["tbs_certificate"]["signature"].dump():
        raise ValueError("signature algorithm differs inside and outside")
    if made.tbs != parsed.tbs_certificate_bytes or made.signature != parsed.signature:
        raise ValueError("two parsers disagree")


def _read_fields(made: Certificate, tbs: Any) -> tuple[bytes, bytes]:
    made.serial = int(tbs["serial_number"].native)
    made.not_before = int(tbs["validity"]["not_before"].native.timestamp())
    made.not_after = int(tbs["validity"]["not_after"].native.timestamp())
    made.extensions = read_extensions(tbs["extensions"])
    _read_constraints(made)
    made.usage = _read_usage(made.extensions)
    made.proxy = _read_proxy(made.extensions)
    return tbs["subject"].dump(), tbs["issuer"].dump()


def read_extensions(extensions: Any) -> dict[str, tuple[bool, bytes]]:
    """{OID: (critical, value)}; ValueError on a repeated one or too many. To be called inside ``parsing``."""
    found: dict[str, tuple[bool, bytes]] = {}
    if len(extensions) > MAX_EXTENSIONS:
        raise ValueError(f"more than {MAX_EXTENSIONS} extensions")
    for extension in extensions:
        oid = str(extension["extn_id"].dotted)
        if oid in found:
            raise ValueError(f"extension {oid} twice")
        found[oid] = (bool(extension["critical"].native), bytes(extension["extn_value"].contents))
    return found


def check_known(extensions: dict[str, tuple[bool, bytes]], known: set[str], what: str, code: str) -> None:
    """Refusal when a critical extension is not in ``known`` (RFC 5280 4.2, RFC 5755 4.3)."""
    for oid, (critical, _) in extensions.items():
        if critical and oid not in known:
            raise deny(code, f"{what} has critical extension {oid}, which nodewrap does not process; use a certificate without it")


def _read_constraints(made: Certificate) -> None:
    made.is_ca, made.path_length = None, -1
    if BASIC_CONSTRAINTS in made.extensions:
        value = x509.BasicConstraints.load(made.extensions[BASIC_CONSTRAINTS][1], strict=True)
        length = value["path_len_constraint"].native
        made.is_ca, made.path_length = bool(value["ca"].native), -1 if length is None else int(length)
        if length is not None and length < 0:
            raise ValueError("negative path length")


def _read_usage(extensions: dict[str, tuple[bool, bytes]]) -> frozenset[str] | None:
    if KEY_USAGE not in extensions:
        return None
    return frozenset(x509.KeyUsage.load(extensions[KEY_USAGE][1], strict=True).native)


def _read_proxy(extensions: dict[str, tuple[bool, bytes]]) -> ProxyInfo | None:
    if RFC_PROXY in extensions and GT3_PROXY in extensions:
        raise ValueError("both an RFC and a GT3 proxy")
    if RFC_PROXY in extensions:
        return ProxyInfo("rfc", _RfcProxyInfo.load(extensions[RFC_PROXY][1], strict=True))
    if GT3_PROXY in extensions:
        return ProxyInfo("gt3", _Gt3ProxyInfo.load(extensions[GT3_PROXY][1], strict=True))
    return None


def _check_critical(made: Certificate) -> None:
    check_known(made.extensions, _UNDERSTOOD, made.subject.oneline, "NW-X509-EXTENSION")
    if NAME_CONSTRAINTS in made.extensions:
        raise deny("NW-X509-EXTENSION", f"{made.subject.oneline} has name constraints, which nodewrap does not process; use a CA without them")
