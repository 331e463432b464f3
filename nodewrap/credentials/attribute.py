"""A VOMS attribute certificate (RFC 5755, OGF GFD.182) as plain values."""

from __future__ import annotations

from typing import Any

from asn1crypto import cms, core, parser, x509  # type: ignore[import-untyped]

from nodewrap.credentials.certificate import Certificate, check_known, read_certificate, read_extensions
from nodewrap.credentials.errors import parsing
from nodewrap.credentials.names import Name, read_name

FQANS = "1.3.6.1.4.1.8005.100.100.4"
CERTIFICATES = "1.3.6.1.4.1.8005.100.100.10"
GENERIC = "1.3.6.1.4.1.8005.100.100.11"
TARGETS = "2.5.29.55"
NO_REVOCATION = "2.5.29.56"

_UNDERSTOOD = {CERTIFICATES, GENERIC, TARGETS, NO_REVOCATION, "2.5.29.35"}

#: Limits (architecture I17): attribute certificates in a proxy and certificates in one, FQANs, attributes, target hosts.
MAX_ACS = 8
MAX_FQANS = 256
MAX_ATTRIBUTES = 32
MAX_TARGETS = 256


class _Attribute(core.Sequence):  # type: ignore[misc]
    _fields = [("type", core.ObjectIdentifier), ("values", core.SetOf, {"spec": core.Any})]


class _Attributes(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Attribute


class _Info(core.Sequence):  # type: ignore[misc]
    _fields = [
        ("version", core.Integer),
        ("holder", cms.Holder),
        ("issuer", cms.AttCertIssuer),
        ("signature", x509.SignedDigestAlgorithm),
        ("serial_number", core.Integer),
        ("validity", cms.AttCertValidityPeriod),
        ("attributes", _Attributes),
        ("issuer_unique_id", core.OctetBitString, {"optional": True}),
        ("extensions", x509.Extensions, {"optional": True}),
    ]


class _Ac(core.Sequence):  # type: ignore[misc]
    _fields = [("info", _Info), ("algorithm", x509.SignedDigestAlgorithm), ("signature", core.OctetBitString)]


class _Acs(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Ac


class _AcSequence(core.SequenceOf):  # type: ignore[misc]
    """VOMS wraps the list once more than the RFC would."""

    _child_spec = _Acs


class _Certificates(core.SequenceOf):  # type: ignore[misc]
    _child_spec = x509.Certificate


class _CertificateSequence(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Certificates


class _Target(core.Choice):  # type: ignore[misc]
    _alternatives = [
        ("name", x509.GeneralName, {"explicit": 0}), ("group", x509.GeneralName, {"explicit": 1}), ("certificate", core.Any, {"explicit": 2}),
    ]


class _Targets(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Target


class _TargetSequence(core.SequenceOf):  # type: ignore[misc]
    """VOMS: SEQUENCE of the RFC's SEQUENCE OF Target."""

    _child_spec = _Targets


class Ac:
    """Plain values. holder_issuer, holder_serial: whose certificate it is for. authority: ``vo://host:port``. fqans: as written.

    targets: host names or URIs, None when it is for any host. certificates: the VOMS server's, then those above it.
    """

    __slots__ = (
        "algorithm", "authority", "certificates", "extensions", "fqans", "holder_issuer", "holder_serial", "issuer", "not_after", "not_before",
        "signature", "targets", "tbs",
    )

    tbs: bytes
    signature: bytes
    algorithm: str
    holder_issuer: Name
    holder_serial: int
    issuer: Name
    not_before: int
    not_after: int
    authority: str
    fqans: list[str]
    targets: list[str] | None
    certificates: list[Certificate]
    extensions: dict[str, tuple[bool, bytes]]


def read_acs(value: bytes) -> list[Ac]:
    """The attribute certificates in the value of extension 1.3.6.1.4.1.8005.100.100.5. Refusal NW-VOMS-PARSE, NW-VOMS-EXTENSION, NW-X509-…"""
    with parsing("the VOMS extension of the proxy", "NW-VOMS-PARSE"):
        found = _flatten(_AcSequence.load(value, strict=True), MAX_ACS)
        if not found:
            raise ValueError("no attribute certificate")
    return [_read_ac(ac) for ac in found]


def _flatten(nested: Any, limit: int) -> list[Any]:
    """The elements of a SEQUENCE OF SEQUENCE OF; ValueError beyond ``limit``, before they are looked at."""
    if len(nested) > limit or sum(len(some) for some in nested) > limit:
        raise ValueError(f"more than {limit} elements")
    return [one for some in nested for one in some]


def _read_ac(fields: Any) -> Ac:
    ac = Ac()
    with parsing("a VOMS attribute certificate", "NW-VOMS-PARSE"):
        info = fields["info"]
        ac.tbs, ac.signature, ac.algorithm = info.dump(), fields["signature"].native, fields["algorithm"]["algorithm"].dotted
        if info["version"].native != 1 or fields["algorithm"].dump() != info["signature"].dump():
            raise ValueError("not version 2, or signature algorithm differs inside and outside")
        holder, ac.holder_serial = _read_holder(info["holder"])
        issuer = _directory_name(info["issuer"].chosen["issuer_name"]) if info["issuer"].name == "v2_form" else b""
        ac.not_before = int(info["validity"]["not_before_time"].native.timestamp())
        ac.not_after = int(info["validity"]["not_after_time"].native.timestamp())
        ac.authority, ac.fqans = _read_fqans(info["attributes"])
        ac.extensions = read_extensions(info["extensions"])
        ac.targets = _read_targets(ac.extensions)
        ders = _read_certificates(ac.extensions)
    ac.holder_issuer, ac.issuer = read_name(holder), read_name(issuer)
    check_known(ac.extensions, _UNDERSTOOD, "the VOMS attribute certificate", "NW-VOMS-EXTENSION")
    ac.certificates = [read_certificate(der, "a certificate in the VOMS attribute certificate") for der in ders]
    return ac


def _read_holder(holder: Any) -> tuple[bytes, int]:
    """(issuer DER, serial): VOMS names its holder by baseCertificateID alone; anything more would have to be checked too."""
    given = [name for name in ("base_certificate_id", "entity_name", "object_digest_info") if not isinstance(holder[name], core.Void)]
    if given != ["base_certificate_id"]:
        raise ValueError("holder is not named by issuer and serial alone")
    return _directory_name(holder["base_certificate_id"]["issuer"]), int(holder["base_certificate_id"]["serial"].native)


def _directory_name(names: Any) -> bytes:
    if len(names) != 1 or names[0].name != "directory_name":
        raise ValueError("not one directory name")
    # directoryName is [4] EXPLICIT (X.680: a CHOICE cannot be tagged otherwise); the name is what the tag holds.
    return bytes(parser.parse(names[0].dump(), strict=True)[4])


def _read_fqans(attributes: Any) -> tuple[str, list[str]]:
    """(``vo://host:port``, FQANs) from the one FQAN attribute; other attributes are the business of others."""
    if len(attributes) > MAX_ATTRIBUTES:
        raise ValueError(f"more than {MAX_ATTRIBUTES} attributes")
    values = [attribute["values"] for attribute in attributes if attribute["type"].dotted == FQANS]
    if len(values) != 1 or len(values[0]) != 1:
        raise ValueError("not exactly one FQAN attribute")
    syntax = cms.IetfAttrSyntax.load(values[0][0].dump(), strict=True)
    authority = syntax["policy_authority"]
    if len(authority) != 1 or authority[0].name != "uniform_resource_identifier" or not 0 < len(syntax["values"]) <= MAX_FQANS:
        raise ValueError("not one policy authority, or no FQAN, or too many")
    # The raw bytes, as ASCII: asn1crypto would turn a URI into an IRI, that is, into another text than the one that was signed.
    return authority[0].chosen.contents.decode("ascii"), [bytes(value.chosen.contents).decode("ascii") for value in syntax["values"]]


def _read_targets(extensions: dict[str, tuple[bool, bytes]]) -> list[str] | None:
    if TARGETS not in extensions:
        return None
    targets = _flatten(_TargetSequence.load(extensions[TARGETS][1], strict=True), MAX_TARGETS)
    names = [target.chosen.chosen for target in targets if target.name == "name"]
    return [name.contents.decode("ascii") for name in names if isinstance(name, (x509.URI, x509.DNSName))]


def _read_certificates(extensions: dict[str, tuple[bool, bytes]]) -> list[bytes]:
    if CERTIFICATES not in extensions:
        return []
    return [bytes(one.dump()) for one in _flatten(_CertificateSequence.load(extensions[CERTIFICATES][1], strict=True), MAX_ACS)]


