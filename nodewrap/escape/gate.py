"""The gate: requests to a site of the pilot's own that must be let in, or not, and what a careless gatekeeper makes of the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Union

from nodewrap.escape.arena import Arena, NotRunError
from nodewrap.escape.model import Seen
from nodewrap.escape.ownsite import Answer, OwnSite
from nodewrap.escape.pki import VO, Pki

#: A file to present, and what to change at the trust anchors before.
Flaw = Union[bytes, "tuple[Callable[[], object], bytes]"]
Flaws = Mapping[str, Flaw]


def let_in(arena: Arena, make: Callable[[Pki], Flaws], more: str = "", good: Callable[[Pki], bytes] = Pki.good, believe: str = "believe",
           env: Callable[[], dict[str, str]] = dict) -> Seen:
    """Each of make's files is presented. more: tables of the site's policy. believe: the careless gatekeeper. env: for the flawed ones."""
    pki = Pki(arena.home / "pki")
    if arena.control:
        return _believed(arena, make(pki), believe, env())
    site = OwnSite(arena, trust=pki.trust)
    if problems := site.apply(site.text(more, assurance="credential", when=f'vo = "{VO}"')):
        raise NotRunError(problems[0])
    if not (answer := site.credential(good(pki))).started:
        raise NotRunError(f"the good proxy is refused too: {answer.ran.line}")
    return seen(asked(site, make(pki), env()))


def asked(site: OwnSite, flaws: Flaws, env: dict[str, str]) -> dict[str, Answer]:
    """Four at a time, but one by one where the trust anchors change in between."""
    found: dict[str, Answer] = {}
    names = list(flaws)
    at_a_time = 4 if all(isinstance(flaw, bytes) for flaw in flaws.values()) else 1
    for first in range(0, len(names), at_a_time):
        begun = [(name, site.presented(_prepared(flaws[name]), env=env)) for name in names[first : first + at_a_time]]
        found.update((name, Answer(live.end())) for name, live in begun)
    return found


def seen(found: Mapping[str, Answer]) -> Seen:
    """Reached: one of them was let in."""
    return Seen(any(answer.started for answer in found.values()), ", ".join(f"{name}: {answer.word}" for name, answer in found.items()))


def _prepared(flaw: Flaw) -> bytes:
    if isinstance(flaw, bytes):
        return flaw
    flaw[0]()
    return flaw[1]


def _believed(arena: Arena, flaws: Flaws, believe: str, env: dict[str, str]) -> Seen:
    said = {name: arena.payload("h_credentials", believe, pilots_file(arena, _prepared(flaw)), env=env).text for name, flaw in flaws.items()}
    return Seen(all(word == "in" for word in said.values()), f"a gatekeeper that believes the file: {said}")


def pilots_file(arena: Arena, content: bytes, name: str = "proxy.pem", mode: int = 0o600) -> Path:
    path = arena.home / name
    path.write_bytes(content)
    path.chmod(mode)
    arena.own(path)
    return path


def named(
    arena: Arena, policy: Callable[[OwnSite], str], good: str, others: Mapping[str, str], listed: str, careless: str, flags: bool = False,
) -> Seen:
    """Subjects by name alone (assurance declared). policy: of the site. good: the DN that is let in. others: DNs that must not be, by what is odd
    with them (flags: they are FQANs). Control: ``gate`` of hostile/b_identity.py compares each of them with listed in the careless way."""
    if arena.control:
        said = {name: arena.payload("b_identity", "gate", careless, listed, text).text for name, text in others.items()}
        return Seen(all(word == "in" for word in said.values()), f"a gatekeeper that compares by {careless}: {said}")
    site = OwnSite(arena)
    if problems := site.apply(policy(site)):
        raise NotRunError(problems[0])

    def ask(text: str) -> Answer:
        return site.declared("/CN=x", options=["--declare", f"fqan={text}"]) if flags else site.declared(text)

    if not (answer := ask(good)).started:
        raise NotRunError(f"the good one is refused too: {answer.ran.line}")
    return seen({name: ask(text) for name, text in others.items()})
