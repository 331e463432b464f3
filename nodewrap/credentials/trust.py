"""Where trust anchors come from, and what the site wants checked."""

from __future__ import annotations

import abc
import os

from nodewrap.credentials.errors import deny

#: How many files one verification may ask for; the launcher answers at most 64 in all (docs/wire.md).
MAX_LOOKUPS = 48


#: The codes of ``Context.check_time``, by what is not valid.
X509_TIME = ("NW-X509-FUTURE", "NW-X509-EXPIRED")
PROXY_TIME = ("NW-PROXY-FUTURE", "NW-PROXY-EXPIRED")
VOMS_TIME = ("NW-VOMS-FUTURE", "NW-VOMS-EXPIRED")


class Trust(abc.ABC):
    """Gives trust files by name; listing is not possible. None: there is no such file. Any other failure is the implementation's Refusal."""

    @abc.abstractmethod
    def ca(self, name: str) -> bytes | None:
        """A file of the CA directory: ``1a2b3c4d.0``, ``1a2b3c4d.r0``, ``1a2b3c4d.signing_policy``."""

    @abc.abstractmethod
    def voms(self, name: str) -> bytes | None:
        """A file of vomsdir: ``testvo/voms.example.org.lsc``."""


class DirectoryTrust(Trust):
    """Trust read from directories, for tools and tests. OSError other than "no such file" passes through: it is the tool's to report."""

    def __init__(self, ca_dir: str, voms_dir: str) -> None:
        self._ca_dir = ca_dir
        self._voms_dir = voms_dir

    def ca(self, name: str) -> bytes | None:
        return _read(os.path.join(self._ca_dir, name))

    def voms(self, name: str) -> bytes | None:
        return _read(os.path.join(self._voms_dir, name))


class Options:
    """What the site wants. Set attributes after construction; all have defaults.

    allow_limited: take limited proxies. allow_plain: take an end-entity certificate without a proxy. allow_without_voms: no, or no good,
    attribute certificate gives a note and no FQANs instead of a refusal. crl, signing_policy: ``require`` or ``if-present``.
    max_proxy_lifetime_s: of each proxy, notAfter - notBefore, 0 no limit. clock_skew_s: tolerance at both ends of each validity.
    target_host: our name for attribute certificates that are issued for certain hosts; "" matches none of them.
    """

    __slots__ = (
        "allow_limited", "allow_plain", "allow_without_voms", "clock_skew_s", "crl", "max_proxy_lifetime_s", "signing_policy", "target_host",
    )

    def __init__(self) -> None:
        self.allow_limited = True
        self.allow_plain = False
        self.allow_without_voms = False
        self.crl = "if-present"
        self.signing_policy = "require"
        self.max_proxy_lifetime_s = 0
        self.clock_skew_s = 300
        self.target_host = ""


class Context:
    """One verification: its trust (each file asked for once), time, options, and what was tolerated. ValueError: an option has no such value."""

    __slots__ = ("_seen", "_trust", "notes", "now", "options")

    def __init__(self, trust: Trust, now: int, options: Options) -> None:
        for mode in (options.crl, options.signing_policy):
            if mode not in ("require", "if-present"):
                raise ValueError(f"crl and signing_policy are require or if-present, not {mode!r}")
        self._trust = trust
        self._seen: dict[tuple[str, str], bytes | None] = {}
        self.now = now
        self.options = options
        self.notes: list[str] = []

    def ca(self, name: str) -> bytes | None:
        return self._once("ca", name)

    def voms(self, name: str) -> bytes | None:
        return self._once("voms", name)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def is_time(self, not_before: int, not_after: int) -> bool:
        skew = self.options.clock_skew_s
        return not_before - skew <= self.now <= not_after + skew

    def check_time(self, not_before: int, not_after: int, what: str, codes: tuple[str, str]) -> None:
        """Refusal with ``codes`` (not yet valid, expired) outside of the validity, clock_skew_s granted at both ends."""
        if self.is_time(not_before, not_after):
            return
        if self.now < not_before:
            raise deny(codes[0], f"{what} is valid in {not_before - self.now} s only; check the clock of this node and of the issuer")
        raise deny(codes[1], f"{what} expired {self.now - not_after} s ago; renew it")

    def _once(self, kind: str, name: str) -> bytes | None:
        key = (kind, name)
        if key not in self._seen:
            if len(self._seen) >= MAX_LOOKUPS:
                raise deny("NW-X509-CHAIN", f"the credential needs more than {MAX_LOOKUPS} trust files; use one with a shorter chain")
            self._seen[key] = self._trust.ca(name) if kind == "ca" else self._trust.voms(name)
        return self._seen[key]


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
