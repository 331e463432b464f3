"""Distinguished names: OpenSSL's one-line form, its canonical form, and the two hashes that name files in a CA directory.

The one-line form (``X509_NAME_oneline``) is what LCMAPS, grid-mapfiles and ban lists use, and they hold it as OpenSSL wrote it before version 3:
``/`` and ``+`` in a value stand as they are (OpenSSL 3 writes ``\\/`` and ``\\+``; ``modern`` takes both). That form is not injective: a value may
hold what looks like the next attribute. Names that could be read as another name are refused here, so that equal text means equal name.
"""

from __future__ import annotations

import hashlib
import re

from asn1crypto import core, parser  # type: ignore[import-untyped]

from nodewrap.credentials.errors import deny, parsing, show

#: Attribute types with the short names that OpenSSL prints (obj_mac.h). Any other type is refused: its one-line form would depend on the
#: OpenSSL that printed the ban list.
SHORT = {
    "2.5.4.3": "CN", "2.5.4.4": "SN", "2.5.4.5": "serialNumber", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST", "2.5.4.9": "street",
    "2.5.4.10": "O", "2.5.4.11": "OU", "2.5.4.12": "title", "2.5.4.13": "description", "2.5.4.15": "businessCategory",
    "2.5.4.16": "postalAddress", "2.5.4.17": "postalCode", "2.5.4.20": "telephoneNumber", "2.5.4.41": "name", "2.5.4.42": "GN",
    "2.5.4.43": "initials", "2.5.4.44": "generationQualifier", "2.5.4.45": "x500UniqueIdentifier", "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym", "2.5.4.97": "organizationIdentifier", "0.9.2342.19200300.100.1.1": "UID", "0.9.2342.19200300.100.1.3": "mail",
    "0.9.2342.19200300.100.1.25": "DC", "1.2.840.113549.1.9.1": "emailAddress", "1.2.840.113549.1.9.2": "unstructuredName",
    "1.2.840.113549.1.9.8": "unstructuredAddress",
}

#: ASN.1 string types that are taken, with the encoding OpenSSL assumes when it canonicalises (T61String as Latin-1).
#: BMPString and UniversalString carry NUL bytes in their one-line form and are refused.
_STRINGS = {12: "utf-8", 19: "ascii", 20: "latin-1", 22: "ascii"}

#: A value that, in one-line form, could be read as the start of another attribute ("/CN=" or, in a multi-valued RDN, "+CN=").
_LOOKS_LIKE_RDN = re.compile(rb"[/+]\s*[A-Za-z0-9.]+\s*=")

#: OpenSSL writes a byte above 0x7e as ``\\xHH`` and, from version 3, ``\\/`` and ``\\+``, but never escapes the backslash itself.
_ESCAPE = b"\\"

_OTHER_SPELLINGS = (
    ("\\/", "/"), ("\\+", "+"), ("/Email=", "/emailAddress="), ("/E=", "/emailAddress="), ("/EMAILADDRESS=", "/emailAddress="), ("/USERID=", "/UID="),
)

#: Limit (architecture I17): RDNs of a name, attributes of an RDN.
MAX_RDNS = 32


class _Attribute(core.Sequence):  # type: ignore[misc]
    _fields = [("type", core.ObjectIdentifier), ("value", core.Any)]


class _Rdn(core.SetOf):  # type: ignore[misc]
    _child_spec = _Attribute


class _Name(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Rdn


class Name:
    """A distinguished name. der: as found. oneline: ``/DC=…/CN=…``, ASCII. rdns: canonical DER, one entry per RDN. last_cn: see ``_last_cn``.

    Two names are equal when ``rdns`` are, which is what ``X509_NAME_cmp`` compares.
    """

    __slots__ = ("der", "last_cn", "oneline", "rdns")

    def __init__(self, der: bytes, rdns: list[list[tuple[str, int, bytes]]]) -> None:
        self.der = der
        self.oneline = "".join(_oneline_rdn(rdn) for rdn in rdns)
        self.rdns = tuple(_canonical_rdn(rdn) for rdn in rdns)
        self.last_cn = _last_cn(rdns)

    def hash_new(self) -> str:
        """8 hex digits, ``openssl x509 -subject_hash``: SHA-1 of the canonical form, first four bytes, little endian."""
        return _short_hash(hashlib.sha1(b"".join(self.rdns), usedforsecurity=False).digest())

    def hash_old(self) -> str:
        """8 hex digits, ``openssl x509 -subject_hash_old``: MD5 of the DER as it stands."""
        return _short_hash(hashlib.md5(self.der, usedforsecurity=False).digest())


def read_name(der: bytes) -> Name:
    """Name from its DER; Refusal NW-X509-DN when it cannot be written in one unambiguous line, NW-X509-PARSE when it is no name."""
    with parsing("a distinguished name"):
        parsed = _Name.load(der, strict=True)
        if len(parsed) > MAX_RDNS or any(len(rdn) > MAX_RDNS for rdn in parsed):
            raise ValueError(f"more than {MAX_RDNS} parts")
        rdns = [[_attribute(attribute) for attribute in rdn] for rdn in parsed]
        if _encode(rdns) != der:
            raise ValueError("not DER")
    for rdn in rdns:
        for oid, tag, value in rdn:
            _check_value(oid, tag, value)
    return Name(der, rdns)


def same_text(left: str, right: str) -> bool:
    """Whether two one-line DNs from site files (LSC, signing policy) mean the same, see ``modern``."""
    return modern(left) == modern(right)


def modern(dn: str) -> str:
    """``dn`` with ``Email``, ``E`` and ``USERID`` written as OpenSSL does now, and without the escapes of OpenSSL 3: one spelling for one name."""
    for old, new in _OTHER_SPELLINGS:
        dn = dn.replace(old, new)
    return dn


def _attribute(attribute: core.Sequence) -> tuple[str, int, bytes]:
    _, _, tag, _, value, _ = parser.parse(attribute["value"].dump(), strict=True)
    return attribute["type"].dotted, tag, value


def _encode(rdns: list[list[tuple[str, int, bytes]]]) -> bytes:
    """The one DER of these attributes: asn1crypto would also read BER, where one name has many encodings (and many old hashes).

    Encoded as primitive universal strings: any other class or constructed form differs from what was found, and is refused with it.
    """
    sets = [b"".join(_tlv(1, 16, _oid(oid) + _tlv(0, tag, value)) for oid, tag, value in rdn) for rdn in rdns]
    return _tlv(1, 16, b"".join(_tlv(1, 17, attributes) for attributes in sets))


def _check_value(oid: str, tag: int, value: bytes) -> None:
    if oid not in SHORT:
        raise deny("NW-X509-DN", f"attribute type {oid} in a distinguished name has no agreed short name; the CA must issue a plainer name")
    text = show(value.decode("latin-1"))
    if tag not in _STRINGS:
        raise deny(
            "NW-X509-DN",
            f"{SHORT[oid]} of a distinguished name has ASN.1 string type {tag}; "
            "only UTF8, Printable, IA5 and T61 are taken",
        )
    if not value.strip() or value != value.strip(b" ") or any(byte < 0x20 or byte == 0x7F for byte in value):
        raise deny("NW-X509-DN", f"{SHORT[oid]} of a distinguished name is empty, begins or ends with a blank, or holds a control byte: {text}")
    if _LOOKS_LIKE_RDN.search(value) or _ESCAPE in value:
        raise deny(
            "NW-X509-DN",
            f"{SHORT[oid]}={text} could be read as another name in one-line form (holds /TYPE=, +TYPE= or a backslash); "
            "the CA must reissue it",
        )
    with parsing(f"{SHORT[oid]}={text}", "NW-X509-DN"):
        value.decode(_STRINGS[tag])


def _oneline_rdn(rdn: list[tuple[str, int, bytes]]) -> str:
    return "/" + "+".join(f"{SHORT[oid]}={_escape(value)}" for oid, _, value in rdn)


def _escape(value: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02X}" for byte in value)


def _canonical_rdn(rdn: list[tuple[str, int, bytes]]) -> bytes:
    entries = sorted(_canonical_entry(oid, value.decode(_STRINGS[tag])) for oid, tag, value in rdn)
    return _tlv(1, 17, b"".join(entries))


def _canonical_entry(oid: str, text: str) -> bytes:
    """x_name.c: as UTF8String, outer blanks cut, inner runs of blanks to one, ASCII letters to lower case."""
    folded = re.sub(r"[ ]+", " ", text.strip(" "))
    lowered = "".join(c.lower() if c < "\x80" else c for c in folded)
    return _tlv(1, 16, _oid(oid) + _tlv(0, 12, lowered.encode()))


def _last_cn(rdns: list[list[tuple[str, int, bytes]]]) -> str:
    """Text of the last RDN when that is one CN alone, else ""."""
    if not rdns or len(rdns[-1]) != 1 or rdns[-1][0][0] != "2.5.4.3":
        return ""
    _, tag, value = rdns[-1][0]
    return value.decode(_STRINGS[tag])


def _oid(dotted: str) -> bytes:
    return bytes(core.ObjectIdentifier(dotted).dump())


def _tlv(method: int, tag: int, contents: bytes) -> bytes:
    return bytes(parser.emit(0, method, tag, contents))


def _short_hash(digest: bytes) -> str:
    return f"{int.from_bytes(digest[:4], 'little'):08x}"
