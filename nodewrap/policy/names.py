"""Names as policy compares them: DNs, FQANs, issuers, globs. Pure, and on the hot path.

Rules compare a DN exactly, after the *types* and the blanks are made uniform: two DNs that differ in a letter's case are two people (attack B01).
Bans compare as X.500 itself does (RFC 4518: case, width, composition and invisible characters do not count), so that no spelling slips
through (I12); too wide a ban only denies. ``unicodedata`` is imported here and not when needed: by then the policy child may open no file.
"""

from unicodedata import category, normalize

_EMAIL = "EMAILADDRESS"
_TYPES = {
    "E": _EMAIL, "EMAIL": _EMAIL, "PKCS9EMAIL": _EMAIL, "1.2.840.113549.1.9.1": _EMAIL,
    "USERID": "UID", "0.9.2342.19200300.100.1.1": "UID",
    "DOMAINCOMPONENT": "DC", "0.9.2342.19200300.100.1.25": "DC",
    "COMMONNAME": "CN", "2.5.4.3": "CN", "SURNAME": "SN", "2.5.4.4": "SN", "2.5.4.5": "SERIALNUMBER",
    "COUNTRYNAME": "C", "COUNTRY": "C", "2.5.4.6": "C", "LOCALITYNAME": "L", "LOCALITY": "L", "2.5.4.7": "L",
    "STATEORPROVINCENAME": "ST", "S": "ST", "SP": "ST", "2.5.4.8": "ST", "STREETADDRESS": "STREET", "2.5.4.9": "STREET",
    "ORGANIZATIONNAME": "O", "ORGANIZATION": "O", "2.5.4.10": "O", "ORGANIZATIONALUNITNAME": "OU", "ORGANIZATIONALUNIT": "OU", "2.5.4.11": "OU",
    "TITLE": "T", "2.5.4.12": "T", "GIVENNAME": "GN", "G": "GN", "2.5.4.42": "GN", "2.5.4.46": "DNQUALIFIER",
}
_HEX = "0123456789abcdefABCDEF"
# RFC 4518 section 2.2: mapped to nothing, besides the categories Cc and Cf.
_INVISIBLE = "\u034f\u180b\u180c\u180d\ufffc" + "".join(map(chr, range(0xFE00, 0xFE10)))


def _type(text: str) -> str:
    """Canonical attribute type, or "" when ``text`` cannot be one."""
    name = text.strip().upper()
    if name.startswith("OID."):
        name = name[4:]
    plain = name.replace(".", "").replace("-", "")
    return _TYPES.get(name, name) if plain.isalnum() and plain.isascii() else ""


def _escaped(text: str, start: int) -> int:
    """Length of the escape at ``start`` (a backslash): 4 for OpenSSL's ``\\xHH``, 3 for RFC 4514's ``\\HH``, else 0."""
    for mark, size in (("x", 4), ("", 3)):
        digits = text[start + 1 + len(mark):start + size]
        if text.startswith(mark, start + 1) and len(digits) == 2 and digits[0] in _HEX and digits[1] in _HEX:
            return size
    return 0


def _bytes(char: str) -> bytes:
    """UTF-8; a byte that came in as a surrogate (PEP 383) is that byte again, any other lone surrogate is ``?``."""
    try:
        return char.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"?"


def _unescape(text: str) -> str:
    """``text`` with hexadecimal escapes as the characters they are; bytes that are not UTF-8 are Latin-1, as T61String means it."""
    out = bytearray()
    at = 0
    while at < len(text):
        size = _escaped(text, at) if text[at] == "\\" else 0
        out += bytes([int(text[at + size - 2:at + size], 16)]) if size else _bytes(text[at])
        at += size or 1
    try:
        return out.decode("utf-8")
    except UnicodeDecodeError:
        return out.decode("latin-1")


def _value(text: str) -> str:
    """A value with escapes resolved, composed (NFC), blanks collapsed."""
    if "\\" in text or not text.isascii():
        text = _unescape(text)
    return " ".join((text if text.isascii() else normalize("NFC", text)).split())


def _cut(text: str, mark: str) -> "list[str]":
    """``text`` at each ``mark`` that a ``TYPE=`` follows; any other belongs to the value (``/CN=host/wn1.example.org``, ``CN=C++``)."""
    pieces: list[str] = []
    for piece in text.split(mark):
        head, equals, _ = piece.partition("=")
        if pieces and not (equals and _type(head)):
            pieces[-1] += mark + piece
        else:
            pieces.append(piece)
    return pieces


def _pair(text: str) -> str:
    head, equals, value = text.partition("=")
    return (_type(head) or "?") + "=" + _value(_der(value)) if equals else "?=" + _value(text)


def _rdn(text: str) -> str:
    """One RDN; the attributes of a multi-valued one are a set, so they are sorted."""
    return "+".join(sorted([_pair(piece) for piece in _cut(text, "+")]))


def _hide(char: str) -> str:
    """An escaped or quoted character as a hexadecimal escape, so that no later step takes it for a separator."""
    return f"\\x{ord(char):02X}" if char.isascii() else char


def _split(dn: str) -> "list[str]":
    """The RFC 4514 form, cut at the commas and semicolons that are neither escaped nor quoted."""
    pieces = [""]
    quoted = False
    at = 0
    while at < len(dn):
        char = dn[at]
        size = 1
        if char == "\\":
            size = _escaped(dn, at) or 2
            pieces[-1] += dn[at:at + size] if size > 2 else _hide(dn[at + 1:at + 2] or char)
        elif char == '"':
            quoted = not quoted
        elif char in ",;" and not quoted:
            pieces.append("")
        else:
            pieces[-1] += _hide(char) if quoted else char
        at += size
    return pieces


def _der(value: str) -> str:
    """RFC 4514's ``#hex`` (a BER string with a short length) as its text; anything else as it stands."""
    digits = value.strip()
    if not digits.startswith("#") or len(digits) < 5 or any(d not in _HEX for d in digits[1:]) or len(digits) % 2 == 0:
        return value
    return bytes.fromhex(digits[5:]).decode("utf-8", "replace")


def components(dn: str) -> "list[str]":
    """``TYPE=value`` of each RDN, root first, types canonical, blanks collapsed. The RFC 4514 form (leaf first) is turned round."""
    dn = dn.strip()
    if not dn:
        return []
    pieces = _cut(dn[1:], "/") if dn.startswith("/") else _split(dn)[::-1]
    return [_rdn(piece) for piece in pieces]


def canonical_dn(dn: str) -> str:
    """One spelling for rules and messages: ``/DC=ch/DC=cern/CN=mallory``; "" stays ""."""
    return "".join("/" + part for part in components(dn))


def fold(text: str) -> str:
    """RFC 4518 preparation: what X.500's caseIgnoreMatch compares."""
    if not (text.isascii() and text.isprintable()):
        kept = [c for c in text if c.isspace() or (category(c) not in ("Cc", "Cf") and c not in _INVISIBLE)]
        text = normalize("NFKC", normalize("NFKC", "".join(kept)).casefold())
    return " ".join(text.lower().split())


def _orders(dn: str) -> "list[list[str]]":
    """Folded components; both directions of a comma form, because OpenSSL 1.1 and later print it root first and RFC 4514 leaf first."""
    parts = [fold(part) for part in components(dn)]
    return [parts] if not parts or dn.strip().startswith("/") else [parts, parts[::-1]]


def _is_proxy(part: str, digits: bool) -> bool:
    return part in ("cn=proxy", "cn=limited proxy") or (digits and part.startswith("cn=") and part[3:].isdigit())


def _key(parts: "list[str]") -> str:
    # Joined as text: a CN that holds "/CN=b" and two CNs look alike in the one-line form, so a ban of either bans both.
    return "".join("/" + part for part in parts)


def ban_keys(dn: str) -> "list[str]":
    """Keys under which a ban of ``dn`` is filed; names of legacy proxies are cut off, a ban is on the person."""
    keys = []
    for parts in _orders(dn):
        while len(parts) > 1 and _is_proxy(parts[-1], False):
            parts = parts[:-1]
        keys.append(_key(parts))
    return keys


def subject_keys(dn: str) -> "list[str]":
    """Keys to look ``dn`` up with: itself, and itself without the CNs that proxies append (RFC 3820: a serial number)."""
    keys = []
    for parts in _orders(dn):
        keys.append(_key(parts))
        while len(parts) > 1 and _is_proxy(parts[-1], True):
            parts = parts[:-1]
            keys.append(_key(parts))
    return keys


def fqan_parts(fqan: str) -> "list[str]":
    """Groups and role of an FQAN; ``Role=NULL`` and ``Capability=NULL`` say nothing and are dropped. Not an FQAN: []."""
    if not fqan.startswith("/"):
        return []
    parts = fqan[1:].split("/")
    kept = [part for part in parts if part.lower() not in ("role=null", "capability=null")]
    return kept if "" not in kept else []


def fqan_folded(fqan: str) -> "list[str]":
    """The same for bans: case and doubled slashes do not count."""
    parts = [fold(part) for part in fqan.split("/")]
    return [part for part in parts if part and part not in ("role=null", "capability=null")]


def issuer(text: str) -> str:
    """Canonical issuer: a CA's DN, or a URL with scheme and host in lower case and no slash at the end."""
    text = text.strip()
    if "://" not in text:
        return canonical_dn(text) if "=" in text else text
    scheme, _, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    return (scheme.lower() + "://" + host.lower() + slash + path).rstrip("/")


def glob(parts: "list[str]", text: str) -> bool:
    """``parts`` is a pattern split at ``*``; no other character is special (B08), and time is linear (K12)."""
    if len(parts) == 1:
        return text == parts[0]
    end = len(text) - len(parts[-1])
    at = len(parts[0])
    if end < at or not text.startswith(parts[0]) or not text.endswith(parts[-1]):
        return False
    for part in parts[1:-1]:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def tree_pattern(parts: "list[str]") -> "list[object]":
    """Pattern on components as ``[below, [glob, …]]``: a last component ``*`` means the node itself and all below."""
    below = bool(parts) and parts[-1] == "*"
    return [below, [part.split("*") for part in (parts[:-1] if below else parts)]]


def dn_pattern(text: str) -> "list[object]":
    """Pattern on a DN in one-line form; ``/*`` at the end means all names below."""
    below = text.endswith("/*")
    return tree_pattern(components(text[:-2] if below else text) + ["*"] * below)


def tree_match(pattern: "list[object]", parts: "list[str]") -> bool:
    """``*`` inside a component never crosses to the next one: ``/atlas/*`` cannot match ``/atlasevil`` (B09)."""
    below, globs = pattern
    assert isinstance(globs, list)
    if not parts or len(parts) < len(globs) or (len(parts) > len(globs) and not below):
        return False
    return all(glob(one, part) for one, part in zip(globs, parts))
