"""A certificate authority, a VOMS server, users and proxies, honest and forged, for the attacks on credentials. Keys are P-256: made in no time."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asn1crypto import cms, core  # type: ignore[import-untyped]
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nodewrap.credentials.names import read_name

VO, HOST, BASE = "testvo", "voms.example.org", "/DC=org/DC=example"
INHERIT_ALL, LIMITED, PROXY_INFO = "1.3.6.1.5.5.7.21.1", "1.3.6.1.4.1.3536.1.1.1.9", "1.3.6.1.5.5.7.1.14"
ACS, FQANS, AC_CERTIFICATES = (f"1.3.6.1.4.1.8005.100.100.{number}" for number in (5, 4, 10))
PILOT = f"/{VO}/Role=pilot/Capability=NULL"
DAY = 86400
_OIDS = {
    "DC": NameOID.DOMAIN_COMPONENT, "O": NameOID.ORGANIZATION_NAME, "OU": NameOID.ORGANIZATIONAL_UNIT_NAME, "CN": NameOID.COMMON_NAME,
    "UID": NameOID.USER_ID, "emailAddress": NameOID.EMAIL_ADDRESS,
}
Key = ec.EllipticCurvePrivateKey


@functools.cache
def key(label: str) -> Key:
    """The same for the same label."""
    return ec.generate_private_key(ec.SECP256R1())


def dn(text: str) -> x509.Name:
    """X.509 name of a one-line DN whose values hold no slash."""
    return x509.Name([x509.NameAttribute(_OIDS[kind], value) for kind, value in (part.split("=", 1) for part in text.strip("/").split("/"))])


def when(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc)


def usage(*names: str) -> tuple[x509.ExtensionType, bool]:
    bits = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign")
    return x509.KeyUsage(**{bit: bit in names for bit in bits}, encipher_only=False, decipher_only=False), True


def basic(ca: bool, length: int | None = None) -> tuple[x509.ExtensionType, bool]:
    return x509.BasicConstraints(ca, length), True


class Pair:
    """A certificate with its key."""

    def __init__(self, cert: x509.Certificate, private: Key) -> None:
        self.cert, self.key = cert, private

    @property
    def der(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    @property
    def name(self) -> str:
        """One-line DN."""
        return str(read_name(self.raw("subject")).oneline)

    def raw(self, which: str) -> bytes:
        return bytes(asn1.Certificate.load(self.der)["tbs_certificate"][which].dump())

    def file(self, *above: Pair) -> bytes:
        """A proxy file: certificate, key, then the certificates above."""
        return self.pem + self.key_pem + b"".join(other.pem for other in above)


Extensions = Sequence[tuple[x509.ExtensionType, bool]]


def certificate(
    subject: x509.Name, issuer: x509.Name, private: Key, signer: Key, extensions: Extensions, start: float = -3600, end: float = 30 * DAY,
) -> Pair:
    """Any certificate. start, end: seconds from now."""
    now = time.time()
    builder = x509.CertificateBuilder(issuer, subject, private.public_key(), x509.random_serial_number(), when(now + start), when(now + end))
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return Pair(builder.sign(signer, hashes.SHA256()), private)


class Pki:
    """directory: where certificates/ and vomsdir/ are made, readable by all. ca, voms, alice: what an honest site and its user have. salt: another
    one has other keys under the same names."""

    def __init__(self, directory: Path, salt: str = "") -> None:
        self.salt = salt
        self.ca_dir, self.voms_dir = directory / "certificates", directory / "vomsdir"
        for path in (directory, self.ca_dir, self.voms_dir, self.voms_dir / VO):
            path.mkdir()
            path.chmod(0o755)
        self.ca = self.authority(f"{BASE}/CN=Test CA")
        self.alice = self.user("Alice Tester")
        self.voms = self.user(HOST)
        self.trust_ca(self.ca)
        self.write_crl()
        self.put(self.voms_dir / VO / f"{HOST}.lsc", f"{self.voms.name}\n{self.ca.name}\n")

    def _key(self, label: str) -> Key:
        return key(self.salt + label)

    @property
    def trust(self) -> tuple[Path, Path]:
        return self.ca_dir, self.voms_dir

    @staticmethod
    def put(path: Path, content: str | bytes) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(0o644)

    def authority(self, name: str, issuer: Pair | None = None, length: int | None = None, extensions: Extensions | None = None) -> Pair:
        private = self._key(name)
        given = extensions if extensions is not None else [basic(True, length), usage("key_cert_sign", "crl_sign")]
        return certificate(dn(name), issuer.cert.subject if issuer else dn(name), private, issuer.key if issuer else private, given)

    def user(self, cn: str, issuer: Pair | None = None, subject: x509.Name | None = None, **more: Any) -> Pair:
        """An end-entity certificate; subject: instead of one with that CN. more: as certificate()."""
        issuer = issuer or self.ca
        name = subject or dn(f"{BASE}/O=Users/CN={cn}")
        given = {"extensions": [basic(False), usage("digital_signature", "key_encipherment")], **more}
        return certificate(name, issuer.cert.subject, self._key(cn), issuer.key, **given)

    def trust_ca(self, ca: Pair, subjects: Sequence[str] = (f"{BASE}/*",)) -> None:
        """The site trusts it, for these subjects."""
        patterns = " ".join(f'"{subject}"' for subject in subjects)
        text = f"access_id_CA X509 '{ca.name}'\npos_rights globus CA:sign\ncond_subjects globus '{patterns}'\n"
        for name in self.hashes(ca):
            self.put(self.ca_dir / f"{name}.0", ca.pem)
            self.put(self.ca_dir / f"{name}.signing_policy", text)

    @staticmethod
    def hashes(ca: Pair) -> tuple[str, str]:
        name = read_name(ca.raw("subject"))
        return name.hash_new(), name.hash_old()

    def write_crl(self, revoked: Sequence[Pair] = (), start: float = -3600, end: float = DAY, signer: Key | None = None) -> None:
        now = time.time()
        entries = [x509.RevokedCertificateBuilder(pair.cert.serial_number, when(now - 60)).build() for pair in revoked]
        builder = x509.CertificateRevocationListBuilder(self.ca.cert.subject, when(now + start), when(now + end), revoked_certificates=entries)
        for name in self.hashes(self.ca):
            self.put(self.ca_dir / f"{name}.r0", builder.sign(signer or self.ca.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def proxy(
        self, issuer: Pair | None = None, *, limited: bool = False, language: str = "", length: int | None = None, acs: Sequence[bytes] | None = None,
        start: float = -3600, end: float = DAY, subject: x509.Name | None = None, legacy: bool = False, signer: Key | None = None,
        label: str = "a proxy",
    ) -> Pair:
        """A proxy below issuer (alice), by default a good one: with her attribute certificate where she is the issuer."""
        issuer = issuer or self.alice
        cn = ("limited proxy" if limited else "proxy") if legacy else "4711"
        name = subject or x509.Name([*issuer.cert.subject, x509.NameAttribute(NameOID.COMMON_NAME, cn)])
        added = [usage("digital_signature", "key_encipherment")]
        if not legacy:
            said = proxy_info(language or (LIMITED if limited else INHERIT_ALL), length)
            added.append((x509.UnrecognizedExtension(x509.ObjectIdentifier(PROXY_INFO), said), True))
        carried = [self.ac()] if acs is None and issuer is self.alice else acs or []
        if carried:
            added.append((x509.UnrecognizedExtension(x509.ObjectIdentifier(ACS), tlv(0x30, tlv(0x30, *carried))), False))
        return certificate(name, issuer.cert.subject, self._key(label), signer or issuer.key, added, start, end)

    def good(self) -> bytes:
        """Alice's proxy file."""
        return self.proxy().file(self.alice)

    def ac(
        self, holder: Pair | None = None, server: Pair | None = None, *, fqans: Sequence[str] = (PILOT,), vo: str = VO, start: float = -3600,
        end: float = DAY, signer: Key | None = None,
    ) -> bytes:
        """A VOMS attribute certificate in DER, by default a good one of alice's."""
        holder, server, now = holder or self.alice, server or self.voms, time.time()
        authority = tlv(0x86, f"{vo}://{HOST}:15000".encode())
        syntax = cms.IetfAttrSyntax.load(tlv(0x30, tlv(0xA0, authority), tlv(0x30, *[tlv(0x04, fqan.encode()) for fqan in fqans])))
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(server.key.public_key()).public_bytes()
        listed = [("2.5.29.56", core.Null().dump()), ("2.5.29.35", identifier), (AC_CERTIFICATES, tlv(0x30, tlv(0x30, server.der)))]
        info = cms.AttributeCertificateInfoV2({
            "version": "v2",
            "holder": {"base_certificate_id": {"issuer": [_directory(holder.raw("issuer"))], "serial": holder.cert.serial_number}},
            "issuer": cms.AttCertIssuer("v2_form", {"issuer_name": [_directory(server.raw("subject"))]}),
            "signature": {"algorithm": "sha256_ecdsa"},
            "serial_number": 1,
            "att_cert_validity_period": {"not_before_time": when(now + start), "not_after_time": when(now + end)},
            "attributes": [{"type": FQANS, "values": [syntax]}],
            "extensions": [{"extn_id": oid, "critical": False, "extn_value": core.ParsableOctetString(value)} for oid, value in listed],
        })
        signature = (signer or server.key).sign(info.dump(), ec.ECDSA(hashes.SHA256()))
        return tlv(0x30, info.dump(), info["signature"].dump(), tlv(0x03, b"\0", signature))


def proxy_info(language: str, length: int | None) -> bytes:
    """proxyCertInfo of RFC 3820."""
    return tlv(0x30, b"" if length is None else core.Integer(length).dump(), tlv(0x30, core.ObjectIdentifier(language).dump()))


def tlv(tag: int, *contents: bytes) -> bytes:
    """DER of a value with a one-byte tag."""
    body = b"".join(contents)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag]) + (size if len(body) < 128 else bytes([0x80 + len(size)]) + size) + body


def _directory(name: bytes) -> Any:
    return asn1.GeneralName("directory_name", asn1.Name.load(name))
