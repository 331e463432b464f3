"""The proxies of a credential: RFC 3820, the Globus 3 draft of it, and Globus 2 by name ("legacy")."""

from __future__ import annotations

from nodewrap.credentials.certificate import ALTERNATIVE_NAMES, INHERIT_ALL, LIMITED, Certificate
from nodewrap.credentials.errors import deny
from nodewrap.credentials.trust import PROXY_TIME, X509_TIME, Context

MAX_PROXIES = 16


def find_chain(leaf: Certificate, others: list[Certificate]) -> tuple[list[Certificate], list[Certificate]]:
    """(leaf … end-entity certificate, each signed by the next; the certificates left over). Refusal NW-X509-CHAIN, NW-PROXY-DEPTH."""
    chain, spare = [leaf], list(others)
    while chain[-1].kind() != "eec":
        if len(chain) > MAX_PROXIES:
            raise deny("NW-PROXY-DEPTH", f"more than {MAX_PROXIES} proxies in a row; delegate from a shorter chain")
        issuer = _find_signer(chain[-1], spare)
        spare.remove(issuer)
        chain.append(issuer)
    return chain, spare


def check_proxies(chain: list[Certificate], context: Context) -> bool:
    """Check every proxy of ``chain`` (leaf … end-entity certificate). Returns whether one is limited. Refusal NW-PROXY-…, NW-X509-…"""
    _check_end_entity(chain[-1], context)
    limited = False
    for depth in range(len(chain) - 2, -1, -1):
        proxy, issuer = chain[depth], chain[depth + 1]
        _check_shape(proxy, issuer)
        _check_usage(proxy, issuer)
        _check_times(proxy, context)
        _check_length(proxy, depth)
        limited = _check_rights(proxy, limited)
    _check_wanted(chain, limited, context)
    return limited


def _find_signer(proxy: Certificate, spare: list[Certificate]) -> Certificate:
    named = [other for other in spare if other.subject.rdns == proxy.issuer.rdns]
    for other in named:
        if other.signed(proxy):
            return other
    reason = "has another key than the one that signed it" if named else "is not in the credential file"
    raise deny("NW-X509-CHAIN", f"the issuer of proxy {proxy.subject.oneline} {reason}; put the whole chain into the file, leaf first")


def _check_end_entity(eec: Certificate, context: Context) -> None:
    if eec.is_ca:
        raise deny("NW-X509-EEC-CA", f"{eec.subject.oneline} is a CA; a CA's certificate is not a user's, and signs no proxy")
    context.check_time(eec.not_before, eec.not_after, f"certificate {eec.subject.oneline}", X509_TIME)


def _check_shape(proxy: Certificate, issuer: Certificate) -> None:
    """RFC 3820 3.4 to 3.8: name, no CA, no alternative names, one kind for the whole chain, critical proxyCertInfo."""
    name = proxy.subject.oneline
    if proxy.subject.rdns[:-1] != issuer.subject.rdns or not proxy.subject.last_cn:
        raise deny("NW-PROXY-NAME", f"proxy {name} is not named as its issuer {issuer.subject.oneline} and one CN; make a new proxy")
    if issuer.kind() not in ("eec", proxy.kind()):
        raise deny("NW-PROXY-MIXED", f"proxy {name} is of kind {proxy.kind()} and its issuer of kind {issuer.kind()}; delegate with one kind")
    if proxy.is_ca or any(oid in proxy.extensions for oid in ALTERNATIVE_NAMES):
        raise deny("NW-PROXY-EXTENSION", f"proxy {name} says it is a CA or has alternative names (RFC 3820 3.5, 3.9); make a new proxy")
    if proxy.kind() == "rfc" and not proxy.extensions["1.3.6.1.5.5.7.1.14"][0]:
        raise deny("NW-PROXY-EXTENSION", f"proxyCertInfo of proxy {name} is not critical (RFC 3820 3.8); make a new proxy")


def _check_usage(proxy: Certificate, issuer: Certificate) -> None:
    """RFC 3820 3.1 and 3.7: who signs proxies has digitalSignature, if it has keyUsage at all; no proxy signs certificates."""
    for holder in (proxy, issuer):
        if holder.usage is not None and "digital_signature" not in holder.usage:
            raise deny(
                "NW-PROXY-USAGE",
                f"keyUsage of {holder.subject.oneline} lacks digitalSignature; "
                "make a new proxy from a certificate that has it",
            )
    if proxy.usage is not None and "key_cert_sign" in proxy.usage:
        raise deny("NW-PROXY-USAGE", f"keyUsage of proxy {proxy.subject.oneline} has keyCertSign; make a new proxy")


def _check_times(proxy: Certificate, context: Context) -> None:
    name, most = proxy.subject.oneline, context.options.max_proxy_lifetime_s
    context.check_time(proxy.not_before, proxy.not_after, f"proxy {name}", PROXY_TIME)
    if most and proxy.not_after - proxy.not_before > most:
        raise deny(
            "NW-PROXY-LIFETIME",
            f"proxy {name} is made for {proxy.not_after - proxy.not_before} s, allowed are {most} (max_proxy_lifetime_s); "
            "make a shorter one",
        )


def _check_length(proxy: Certificate, below: int) -> None:
    """``below``: how many proxies come after this one, which its path length bounds."""
    if proxy.proxy is not None and 0 <= proxy.proxy.path_length < below:
        raise deny(
            "NW-PROXY-PATHLEN",
            f"{below} proxies below {proxy.subject.oneline}, its path length allows {proxy.proxy.path_length}; "
            "delegate less often",
        )


def _check_rights(proxy: Certificate, limited: bool) -> bool:
    """Whether ``proxy`` is limited; limited: whether its issuer is."""
    name = proxy.subject.oneline
    if proxy.proxy is None:
        is_limited = proxy.legacy_cn() == "limited proxy"
    elif proxy.proxy.language in (INHERIT_ALL, LIMITED) and not proxy.proxy.has_policy:
        is_limited = proxy.proxy.language == LIMITED
    else:
        raise deny(
            "NW-PROXY-POLICY",
            f"proxy {name} has policy language {proxy.proxy.language}, which nodewrap cannot enforce; "
            "use a full or a limited proxy",
        )
    if limited and not is_limited:
        raise deny("NW-PROXY-LIMITED", f"full proxy {name} below a limited one; delegate a limited proxy")
    return is_limited


def _check_wanted(chain: list[Certificate], limited: bool, context: Context) -> None:
    if len(chain) == 1 and not context.options.allow_plain:
        raise deny("NW-PROXY-NONE", f"{chain[0].subject.oneline} is a certificate, not a proxy; make a proxy (voms-proxy-init), or set allow_plain")
    if limited and not context.options.allow_limited:
        raise deny("NW-PROXY-LIMITED", f"{chain[0].subject.oneline} is a limited proxy, and allow_limited is off; use a full proxy")
