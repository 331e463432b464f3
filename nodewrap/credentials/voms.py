"""Who the VO says the user is: verification of the VOMS attribute certificates in a proxy."""

from __future__ import annotations

import re

from nodewrap.credentials.attribute import NO_REVOCATION, Ac, read_acs
from nodewrap.credentials.certificate import VOMS_ACS, Certificate
from nodewrap.credentials.errors import deny, show
from nodewrap.credentials.keys import signed_by
from nodewrap.credentials.names import same_text
from nodewrap.credentials.path import check_path
from nodewrap.credentials.trust import VOMS_TIME, X509_TIME, Context
from nodewrap.model import Refusal

#: Exit status of what is wrong with the site (model.Refusal).
INTERNAL = 202

#: Names become a path below vomsdir: no slash, no leading dot.
_AUTHORITY = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,254})://([A-Za-z0-9][A-Za-z0-9.-]{0,254}):[0-9]{1,5}")

#: The grammar of the VOMS servers: groups, then at most one role and one capability.
_FQAN = re.compile(r"(/[\w.-]+)+(/Role=[\w.-]+)?(/Capability=[\w.-]+)?", re.ASCII)


class Attributes:
    """vo: of the first attribute certificate, "" when there is none. fqans: short form, in order. expires: seconds since 1970, 0 when none."""

    __slots__ = ("expires", "fqans", "vo")

    def __init__(self) -> None:
        self.vo = ""
        self.fqans: list[str] = []
        self.expires = 0


def check_voms(chain: list[Certificate], context: Context) -> Attributes:
    """Attributes from ``chain`` (leaf … end-entity certificate): those of the proxy nearest to the leaf that has any, each checked in full.

    Refusal NW-VOMS-… when there are none or one is not good; with allow_without_voms a note instead, and then no attribute at all.
    A file of the site's that cannot be read says nothing about them: that (202) stays what it is.
    """
    try:
        return _read_attributes(chain, context)
    except Refusal as found:
        if found.exit == INTERNAL:
            raise
        refusal = _as_voms(found)
        if not context.options.allow_without_voms:
            raise refusal from found.__cause__
        context.note(f"no VOMS attributes: {refusal.code}: {refusal.text}")
        return Attributes()


def short_fqan(fqan: str) -> str:
    """``fqan`` without ``/Role=NULL`` and ``/Capability=NULL``, which say nothing: one spelling for one right."""
    for nothing in ("/Capability=NULL", "/Role=NULL"):
        if fqan.endswith(nothing):
            fqan = fqan[: -len(nothing)]
    return fqan


def _as_voms(refusal: Refusal) -> Refusal:
    """A fault in the VOMS server's own certificate path keeps its text, and is told apart from one in the user's."""
    if refusal.code.startswith("NW-VOMS-"):
        return refusal
    return deny("NW-VOMS-SERVER", f"VOMS attribute certificate: {refusal.text} [{refusal.code}]")


def _read_attributes(chain: list[Certificate], context: Context) -> Attributes:
    carrier = next((proxy for proxy in chain[:-1] if VOMS_ACS in proxy.extensions), None)
    if carrier is None:
        raise deny(
            "NW-VOMS-NONE",
            f"{chain[-1].subject.oneline}: the proxy carries no VOMS attributes; "
            "make it with voms-proxy-init -voms, or set allow_without_voms",
        )
    found = Attributes()
    for ac in read_acs(carrier.extensions[VOMS_ACS][1]):
        vo, expires = _check_ac(ac, chain[-1], context)
        found.vo = found.vo or vo
        found.fqans.extend(_check_fqan(fqan, vo) for fqan in ac.fqans)
        found.expires = min(found.expires or expires, expires)
    return found


def _check_ac(ac: Ac, eec: Certificate, context: Context) -> tuple[str, int]:
    """(VO, end of the evidence) of a good attribute certificate."""
    vo, host = _check_authority(ac)
    if ac.holder_issuer.rdns != eec.issuer.rdns or ac.holder_serial != eec.serial:
        raise deny(
            "NW-VOMS-HOLDER",
            f"the attribute certificate of VO {vo} belongs to another certificate than {eec.subject.oneline}; "
            "make a new proxy",
        )
    context.check_time(ac.not_before, ac.not_after, f"attribute certificate of VO {vo}", VOMS_TIME)
    _check_extensions(ac, vo, context)
    server = _check_signature(ac, vo)
    cas = _check_server(server, ac, context)
    _check_lsc(vo, host, [server, *cas], context)
    return vo, min([ac.not_after, server.not_after] + [ca.not_after for ca in cas])


def _check_authority(ac: Ac) -> tuple[str, str]:
    match = _AUTHORITY.fullmatch(ac.authority)
    if match is None:
        raise deny("NW-VOMS-VO", f"policy authority {show(ac.authority)} of the attribute certificate is not vo://host:port; make a new proxy")
    return match[1], match[2]


def _check_extensions(ac: Ac, vo: str, context: Context) -> None:
    if NO_REVOCATION not in ac.extensions:
        raise deny(
            "NW-VOMS-EXTENSION",
            f"the attribute certificate of VO {vo} lacks noRevAvail, and nodewrap has no revocation list for such; "
            "ask the VO",
        )
    if ac.targets is not None and not _is_target(ac.targets, context.options.target_host):
        raise deny(
            "NW-VOMS-TARGET",
            f"the attribute certificate of VO {vo} is for other hosts than {show(context.options.target_host)} (target_host); "
            "make a new proxy",
        )


def _is_target(targets: list[str], host: str) -> bool:
    """VOMS writes a host as URI or DNS name; host names have no case."""
    return bool(host) and any(target.split("://")[-1].lower() == host.lower() for target in targets)


def _check_signature(ac: Ac, vo: str) -> Certificate:
    if not ac.certificates:
        raise deny(
            "NW-VOMS-CERTIFICATE",
            f"the attribute certificate of VO {vo} does not carry its server's certificate; "
            "make a new proxy with a current VOMS server",
        )
    server = ac.certificates[0]
    named = server.subject.rdns == ac.issuer.rdns
    if not named or not signed_by(server.key, ac.algorithm, ac.signature, ac.tbs, f"the attribute certificate of VO {vo}"):
        raise deny(
            "NW-VOMS-SIGNATURE",
            f"the attribute certificate of VO {vo} is not signed by the certificate that it carries ({server.subject.oneline}); "
            "make a new proxy",
        )
    return server


def _check_server(server: Certificate, ac: Ac, context: Context) -> list[Certificate]:
    """The CAs above the VOMS server's certificate, which must be a plain end-entity one that may sign."""
    name = server.subject.oneline
    if server.is_ca or server.kind() != "eec" or (server.usage is not None and "digital_signature" not in server.usage):
        raise deny(
            "NW-VOMS-SERVER",
            f"{name} is not a server certificate that may sign (CA, proxy, or keyUsage without digitalSignature); "
            "ask the VO",
        )
    context.check_time(server.not_before, server.not_after, f"VOMS server certificate {name}", X509_TIME)
    return check_path(server, ac.certificates[1:], context)


def _check_lsc(vo: str, host: str, path: list[Certificate], context: Context) -> None:
    """An LSC file names the server and the CAs above it, in order, as far up as it likes but at least one CA; several chains may stand in it."""
    file = f"{vo}/{host}.lsc"
    data = context.voms(file)
    if data is None:
        raise deny(
            "NW-VOMS-LSC",
            f"{file} is missing in vomsdir, so VOMS server {host} may not speak for VO {vo}; "
            "install the VO's LSC file if it may",
        )
    try:
        chains = _lsc_chains(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refusal(INTERNAL, "NW-TRUST", f"{file} in vomsdir is no text (UTF-8); install the VO's LSC file again") from error
    names = [certificate.subject.oneline for certificate in path]
    if not any(_fits(chain, names) for chain in chains):
        raise deny("NW-VOMS-LSC", f"{file} in vomsdir does not name {names[0]} issued by {names[1]}; correct the file if the VO's server changed")


def _fits(chain: list[str], names: list[str]) -> bool:
    return 2 <= len(chain) <= len(names) and all(same_text(line, name) for line, name in zip(chain, names))


def _lsc_chains(text: str) -> list[list[str]]:
    """Chains of DNs; ``------ NEXT CHAIN ------`` parts them, ``#`` starts a comment."""
    chains: list[list[str]] = [[]]
    for line in (raw.strip() for raw in text.splitlines()):
        if line.startswith("---"):
            chains.append([])
        elif line and not line.startswith("#"):
            chains[-1].append(line)
    return chains


def _check_fqan(fqan: str, vo: str) -> str:
    short = short_fqan(fqan)
    if _FQAN.fullmatch(fqan) is None or not (short + "/").startswith(f"/{vo}/"):
        raise deny("NW-VOMS-FQAN", f"FQAN {show(fqan)} is malformed or outside of VO {vo}; a VOMS server may speak for its own VO only")
    return short
