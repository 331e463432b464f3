"""A certificate authority, a VOMS server, users and real proxies, in a directory. For the tests and the demonstration.

``Pki(directory)`` makes what a grid site and its users have: ``certificates/`` (the CA under both hashes, signing policy, CRL), ``vomsdir/``
(LSC file), certificates with keys. ``proxy`` runs the real ``voms-proxy-fake``, ``delegate`` adds a level below. ``forge_*`` make what no honest
tool makes.
Needs ``voms-proxy-fake`` (package voms-clients), cryptography and asn1crypto.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import subprocess
import time
from pathlib import Path

from asn1crypto import cms, core
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nodewrap.credentials import DirectoryTrust, Options, Refusal, Subject, verify
from nodewrap.credentials.names import read_name

VO = "testvo"
HOST = "voms.example.org"
BASE = "/DC=org/DC=example"
INHERIT_ALL = "1.3.6.1.5.5.7.21.1"
INDEPENDENT = "1.3.6.1.5.5.7.21.2"
LIMITED = "1.3.6.1.4.1.3536.1.1.1.9"
ACS = "1.3.6.1.4.1.8005.100.100.5"
PROXY_INFO = {"rfc": "1.3.6.1.5.5.7.1.14", "gt3": "1.3.6.1.4.1.3536.1.222"}
PILOT, PLAIN = f"/{VO}/Role=pilot/Capability=NULL", f"/{VO}/Role=NULL/Capability=NULL"
DAY = 86400

_OIDS = {
    "DC": NameOID.DOMAIN_COMPONENT, "O": NameOID.ORGANIZATION_NAME, "OU": NameOID.ORGANIZATIONAL_UNIT_NAME, "CN": NameOID.COMMON_NAME,
    "C": NameOID.COUNTRY_NAME, "UID": NameOID.USER_ID, "emailAddress": NameOID.EMAIL_ADDRESS,
}


@functools.cache
def key(label: str) -> rsa.RSAPrivateKey:
    """An RSA key, the same for the same label for the life of the process: making one takes 0.1 s."""
    return rsa.generate_private_key(65537, 2048)


def dn(text: str) -> x509.Name:
    """X.509 name of a one-line DN whose values hold no slash."""
    pairs = [part.split("=", 1) for part in text.strip("/").split("/")]
    return x509.Name([x509.NameAttribute(_OIDS[kind], value) for kind, value in pairs])


def when(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc)


def key_pem(private) -> bytes:
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())


def key_usage(*names: str) -> x509.KeyUsage:
    bits = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
        "encipher_only", "decipher_only",
    )
    return x509.KeyUsage(**{bit: bit in names for bit in bits})


USER_USAGE = (key_usage("digital_signature", "key_encipherment", "data_encipherment"), True)
CA_USAGE = (key_usage("key_cert_sign", "crl_sign"), True)


def certificate(subject, issuer, public, signer, extensions=(), start=-3600, end=365 * DAY, serial=None, algorithm=None) -> x509.Certificate:
    """Any certificate. subject, issuer: x509.Name. start, end: seconds from now. extensions: (value, critical) pairs."""
    now = time.time()
    builder = x509.CertificateBuilder(issuer, subject, public, serial or x509.random_serial_number(), when(now + start), when(now + end))
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(signer, algorithm or hashes.SHA256())


def identifiers(private, issuer) -> list:
    """Subject and authority key identifiers: voms-proxy-fake copies them and fails without."""
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
    return [(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), False), (authority, False)]


class Pair:
    """A certificate with its key. pem, key_pem: bytes. name: one-line DN."""

    def __init__(self, cert: x509.Certificate, private) -> None:
        self.cert, self.key = cert, private

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.DER)

    @property
    def key_pem(self) -> bytes:
        return key_pem(self.key)

    @property
    def name(self) -> str:
        return read_name(self.asn1_name("subject")).oneline

    def asn1_name(self, which: str) -> bytes:
        return asn1.Certificate.load(self.der)["tbs_certificate"][which].dump()

    def file(self, *others: Pair) -> bytes:
        """A proxy file: certificate, key, then the certificates above."""
        return self.pem + self.key_pem + b"".join(other.pem for other in others)


class Pki:
    """directory: where everything is. ca, voms, alice, pilot: Pairs. ca_dir, voms_dir: what a site has in /etc/grid-security."""

    def __init__(self, directory) -> None:
        self.directory = Path(directory)
        self.ca_dir, self.voms_dir = self.directory / "certificates", self.directory / "vomsdir"
        self.ca_dir.mkdir(parents=True)
        (self.voms_dir / VO).mkdir(parents=True)
        self.ca = self.make_ca(f"{BASE}/CN=Test CA")
        self.alice = self.user("Alice Tester")
        self.pilot = self.user("Pilot Robot")
        self.voms = self.host(HOST)
        self.trust_ca(self.ca)
        self.write_crl()
        self.write_lsc(VO, [self.voms.name, self.ca.name])

    # Certificates

    def make_ca(self, name: str, issuer: Pair | None = None, path_length: int | None = None, **more) -> Pair:
        """A CA, self-signed when ``issuer`` is None."""
        private = key(name)
        extensions = more.pop("extensions", [(x509.BasicConstraints(True, path_length), True), CA_USAGE])
        above = issuer.cert.subject if issuer else dn(name)
        return Pair(certificate(dn(name), above, private.public_key(), issuer.key if issuer else private, extensions, **more), private)

    def user(self, cn: str, issuer: Pair | None = None, subject: x509.Name | None = None, **more) -> Pair:
        """An end-entity certificate; as files ``<cn>.pem`` and ``<cn>.key`` with blanks as ``-``."""
        private = more.pop("private", None) or key(cn)
        issuer = issuer or self.ca
        extensions = more.pop("extensions", [(x509.BasicConstraints(False, None), True), USER_USAGE, *identifiers(private, issuer.key)])
        name = dn(f"{BASE}/O=Users/CN={cn}") if subject is None else subject
        made = certificate(name, issuer.cert.subject, private.public_key(), issuer.key, extensions, **more)
        return self.save(cn, Pair(made, private))

    def host(self, name: str, issuer: Pair | None = None, **more) -> Pair:
        extensions = [
            (x509.BasicConstraints(False, None), True), (key_usage("digital_signature", "key_encipherment"), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False),
            (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
            *identifiers(key(name), (issuer or self.ca).key),
        ]
        return self.user(name, issuer, dn(f"{BASE}/O=Hosts/CN={name}"), **{"extensions": extensions, **more})

    def save(self, name: str, pair: Pair) -> Pair:
        """Write ``<name>.pem`` and ``<name>.key`` (mode 0400, which the tools insist on)."""
        for path, content in ((self.cert_file(name), pair.pem), (self.key_file(name), pair.key_pem)):
            path.unlink(missing_ok=True)
            path.touch(0o600)
            path.write_bytes(content)
            path.chmod(0o400)
        return pair

    def cert_file(self, name: str) -> Path:
        return self.directory / f"{name.replace(' ', '-')}.pem"

    def key_file(self, name: str) -> Path:
        return self.directory / f"{name.replace(' ', '-')}.key"

    # What the site has

    def hashes(self, ca: Pair) -> tuple[str, str]:
        name = read_name(ca.asn1_name("subject"))
        return name.hash_new(), name.hash_old()

    def trust_ca(self, ca: Pair, subjects=(f"{BASE}/*",), number: int = 0) -> None:
        """Install ``ca`` with a signing policy for ``subjects``."""
        patterns = " ".join(f'"{subject}"' for subject in subjects)
        policy = f"# made for tests\naccess_id_CA   X509   '{ca.name}'\npos_rights     globus CA:sign\ncond_subjects  globus '{patterns}'\n"
        for name in self.hashes(ca):
            (self.ca_dir / f"{name}.{number}").write_bytes(ca.pem)
            (self.ca_dir / f"{name}.signing_policy").write_text(policy)

    def write_crl(self, ca: Pair | None = None, revoked=(), start=-3600, end=30 * DAY, signer=None, extensions=()) -> None:
        """A CRL of ``ca`` that names the serials of ``revoked``; start, end: seconds from now."""
        ca, now = ca or self.ca, time.time()
        entries = [x509.RevokedCertificateBuilder(pair.cert.serial_number, when(now + start)).build() for pair in revoked]
        builder = x509.CertificateRevocationListBuilder(ca.cert.subject, when(now + start), when(now + end), revoked_certificates=entries)
        for value, critical in extensions:
            builder = builder.add_extension(value, critical)
        for name in self.hashes(ca):
            (self.ca_dir / f"{name}.r0").write_bytes(builder.sign(signer or ca.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def remove_crl(self) -> None:
        for path in self.ca_dir.glob("*.r0"):
            path.unlink()

    def write_lsc(self, vo: str, lines, host: str = HOST) -> None:
        (self.voms_dir / vo).mkdir(exist_ok=True)
        (self.voms_dir / vo / f"{host}.lsc").write_text("".join(f"{line}\n" for line in lines))

    def trust(self) -> DirectoryTrust:
        return DirectoryTrust(str(self.ca_dir), str(self.voms_dir))

    # What nodewrap says of it

    def verify(self, data: bytes, now: float | None = None, require_key: bool = True, **options) -> Subject:
        """``nodewrap.credentials.verify`` with this site's trust; options: attributes of ``Options``."""
        wanted = Options()
        for name, value in options.items():
            setattr(wanted, name, value)
        return verify(data, self.trust(), int(time.time() if now is None else now), require_key=require_key, options=wanted)

    def refusal(self, data: bytes, **more) -> tuple[int, str]:
        """(exit, code) of the Refusal that ``verify`` raises; AssertionError when it raises none, or its text is not one printable line."""
        try:
            subject = self.verify(data, **more)
        except Refusal as refusal:
            found = refusal
        else:
            raise AssertionError(f"accepted as {subject.dn} {subject.fqans}")
        assert found.text.isprintable(), found.text
        assert found.text.isascii(), found.text
        return found.exit, found.code

    # Real proxies

    def proxy(self, user: str = "Alice Tester", fqans=(PILOT,), args=("-rfc",), vo: str = VO, name: str = "") -> Path:
        """A proxy file made by ``voms-proxy-fake``. args: its options. fqans: empty for a proxy without attributes."""
        out = self.directory / (name or f"proxy-{time.monotonic_ns()}.pem")
        command = ["voms-proxy-fake", "-cert", self.cert_file(user), "-key", self.key_file(user), "-certdir", self.ca_dir, "-bits", "2048"]
        command += ["-out", out]
        command += ["-hours", "24"] if "-hours" not in args else []
        if fqans:
            command += ["-hostcert", self.cert_file(HOST), "-hostkey", self.key_file(HOST), "-voms", vo, "-uri", f"{HOST}:15000", "-newformat"]
            command += ["-vomslife", "24", *[word for fqan in fqans for word in ("-fqan", fqan)]]
        # HOME: it writes a random seed file there. With -target voms-clients 2.1 ends by a fault half of the time (where its memory lies).
        for _ in range(30):
            done = subprocess.run([*command, *args], capture_output=True, text=True, env={"PATH": os.defpath, "HOME": str(self.directory)})
            if done.returncode != -signal.SIGSEGV:
                break
        if done.returncode or not out.exists():
            raise RuntimeError(f"voms-proxy-fake failed: {done.stdout}{done.stderr}")
        return out

    def load(self, path: Path) -> tuple[Pair, list[Pair]]:
        """(leaf with its key, the certificates above; their keys are not known) of a proxy file."""
        content = path.read_bytes()
        leaf, *above = x509.load_pem_x509_certificates(content)
        return Pair(leaf, serialization.load_pem_private_key(content, None)), [Pair(cert, None) for cert in above]

    def delegate(self, path: Path, **more) -> bytes:
        """The proxy file one level below the one in ``path``; more: as ``forge_proxy``."""
        leaf, above = self.load(path)
        return self.forge_proxy(leaf, **more).file(leaf, *above)

    # What no honest tool makes

    def forge_proxy(
        self, issuer: Pair, kind: str = "rfc", limited: bool = False, *, language: str = "", path_length: int | None = None, cn: str = "",
        critical: bool = True, extensions=None, acs=(), subject: x509.Name | None = None, signer=None, usage=USER_USAGE, private=None,
        start=-3600, end=DAY, **more,
    ) -> Pair:
        """A proxy below ``issuer``, by default a good one. kind: rfc, gt3, legacy. acs: attribute certificates (DER) to carry."""
        private = private or key("a proxy")
        cn = cn or (("limited proxy" if limited else "proxy") if kind == "legacy" else "4711")
        name = subject or x509.Name([*issuer.cert.subject, x509.NameAttribute(NameOID.COMMON_NAME, cn)])
        added = [usage] if usage else []
        if kind != "legacy":
            value = proxy_info(kind, language or (LIMITED if limited else INHERIT_ALL), path_length)
            added.append((x509.UnrecognizedExtension(x509.ObjectIdentifier(PROXY_INFO[kind]), value), critical))
        if acs:
            added.append((x509.UnrecognizedExtension(x509.ObjectIdentifier(ACS), wrap_acs(acs)), False))
        added += extensions or []
        made = certificate(name, issuer.cert.subject, private.public_key(), signer or issuer.key, added, start, end, **more)
        return Pair(made, private)

    def forge_ac(self, holder: Pair | None = None, server: Pair | None = None, **change) -> bytes:
        """An attribute certificate in DER, by default a good one for alice. change: see the names below."""
        holder, server, now = holder or self.alice, server or self.voms, time.time()
        fqans = [tlv(0x04, fqan.encode()) for fqan in change.get("fqans", [PILOT])]
        authority = tlv(0x86, change.get("authority", f"{VO}://{HOST}:15000").encode())
        syntax = cms.IetfAttrSyntax.load(tlv(0x30, tlv(0xA0, authority), tlv(0x30, *fqans)))
        carried = change.get("certificates", [server])
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(server.key.public_key()).public_bytes()
        extensions = [*change.get("extensions", [(NO_REVOCATION, False, core.Null().dump())]), ("2.5.29.35", False, authority_key)]
        extensions = [*extensions, (AC_CERTIFICATES, False, wrap_certificates(carried))] if carried else extensions
        holder_id = {"issuer": [_directory(holder.asn1_name("issuer"))], "serial": change.get("serial", holder.cert.serial_number)}
        issuer_names = [_directory(one.asn1_name("subject")) for one in change.get("issuers", [server])]
        validity = {"not_before_time": when(now + change.get("start", -3600)), "not_after_time": when(now + change.get("end", DAY))}
        listed = [{"extn_id": oid, "critical": critical, "extn_value": core.ParsableOctetString(value)} for oid, critical, value in extensions]
        info = cms.AttributeCertificateInfoV2({
            "version": change.get("version", "v2"),
            "holder": {name: value for name, value in {"base_certificate_id": holder_id, **change.get("holder_more", {})}.items() if value},
            "issuer": cms.AttCertIssuer("v2_form", {"issuer_name": issuer_names}),
            "signature": {"algorithm": "sha256_rsa", "parameters": core.Null()},
            "serial_number": 1,
            "att_cert_validity_period": validity,
            "attributes": [{"type": oid, "values": [syntax]} for oid in change.get("attributes", [FQANS])],
            "extensions": listed,
        })
        return sign_ac(info, change.get("signer", server.key))


FQANS = "1.3.6.1.4.1.8005.100.100.4"
AC_CERTIFICATES = "1.3.6.1.4.1.8005.100.100.10"
NO_REVOCATION = "2.5.29.56"
TARGETS = "2.5.29.55"


def sign_ac(info, private) -> bytes:
    signature = private.sign(info.dump(), padding.PKCS1v15(), hashes.SHA256())
    return tlv(0x30, info.dump(), info["signature"].dump(), tlv(0x03, b"\0", signature))


def tlv(tag: int, *contents: bytes) -> bytes:
    """DER of a constructed or primitive value with a one-byte tag."""
    body = b"".join(contents)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag]) + (size if len(body) < 128 else bytes([0x80 + len(size)]) + size) + body


SHA256_RSA, SHA384_RSA = (core.ObjectIdentifier(f"1.2.840.113549.1.1.{number}").dump() for number in (11, 12))


def other_algorithm(der: bytes) -> bytes:
    """A certificate or attribute certificate that names another signature algorithm outside than inside."""
    place = der.rindex(SHA256_RSA)
    return der[:place] + SHA384_RSA + der[place + len(SHA256_RSA) :]


def wrap_acs(acs) -> bytes:
    return tlv(0x30, tlv(0x30, *acs))


def wrap_certificates(pairs) -> bytes:
    return tlv(0x30, tlv(0x30, *[pair.der for pair in pairs]))


def targets(*uris: str) -> bytes:
    """Value of the AC targeting extension: name targets, as VOMS writes them."""
    return tlv(0x30, tlv(0x30, *[tlv(0xA0, tlv(0x86, uri.encode())) for uri in uris]))


def proxy_info(kind: str, language: str, path_length: int | None) -> bytes:
    policy = tlv(0x30, core.ObjectIdentifier(language).dump())
    length = b"" if path_length is None else core.Integer(path_length).dump()
    if kind == "rfc":
        return tlv(0x30, length, policy)
    return tlv(0x30, policy, tlv(0xA1, length) if length else b"")


def _directory(name: bytes):
    return asn1.GeneralName("directory_name", asn1.Name.load(name))
