"""What a well-formed policy says against itself: rules that nothing reaches, modes that exclude each other, permissions that ended.

Contradictions are reported, never resolved by a guess; most are warnings, because the policy still means something: the stricter reading.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from nodewrap import model
from nodewrap.policy import evaluate, names
from nodewrap.policy.positions import Path
from nodewrap.policy.source import Sources

Table = dict[str, Any]
#: The shipped profiles, weakest first. A site's own have no place in this order.
STRENGTH = ("none", "compat", "batch", "strict")


def lint(sources: Sources, document: Table, policy: Table, now: float | None = None) -> None:
    """Reports to ``sources``. document: normalised by the schema; policy: compiled from it. now: seconds since 1970, default the clock's."""
    moment = time.time() if now is None else now
    _callers(sources, document)
    _site(sources, policy)
    _dates(sources, policy, moment)
    worlds = list(_worlds(policy))
    for number in range(len(policy["rules"])):
        _unreachable(sources, document, policy, number)
        _vo_of_fqans(sources, document, number)
        _weaker(sources, policy, number)
        _liability(sources, document, number)
        _modes(sources, policy, worlds, number)


def _callers(sources: Sources, document: Table) -> None:
    if document["site"]["multi_user"] == "yes" and not document.get("caller"):
        sources.report((), "NW-POLICY-CONTRADICTION", "there is no [[caller]], so nobody may call; next: add one, if that is not meant", True)


# --- site --------------------------------------------------------------------------------------------------------------------------------


def _worlds(policy: Table) -> Iterator[Table]:
    """The modes table of the site alone, under each stance, and under all."""
    site = policy["site"]["modes"]
    yield site
    together = dict(site)
    for stance in policy["stances"]:
        changes = stance["set"].get("modes", {})
        together.update(changes)
        yield {**site, **changes}
    yield together


def permitted(modes: Table) -> list[str]:
    """The modes that a modes table gives, ``require`` taken as the least."""
    least = max((rank for rank, name in enumerate(evaluate.MODES) if modes[name] == "require"), default=0)
    return [name for rank, name in enumerate(evaluate.MODES) if modes[name] != "no" and rank >= least]


def _site(sources: Sources, policy: Table) -> None:
    base = policy["site"]
    parts: list[tuple[Path, Table]] = [(("site",), base)]
    parts += [(("stance", number), stance["set"]) for number, stance in enumerate(policy["stances"])]
    _no_mode(sources, policy, parts)
    never = all(world["log-only"] == "no" for world in _worlds(policy))
    for path, changes in parts:
        _too_weak(sources, path, changes.get("modes", {}), {**base["modes"], **changes.get("modes", {})})
        if changes.get("on_internal_error") == "log-only" and never:
            text = "on_internal_error runs payloads under the pilot's uid, which modes.log-only = no refuses; next: check that the exception is meant"
            sources.report((*path, "on_internal_error"), "NW-POLICY-CONTRADICTION", text, True)


def _no_mode(sources: Sources, policy: Table, parts: list[tuple[Path, Table]]) -> None:
    opened = [path for path, changes in parts if changes.get("multi_user")]
    if opened and not any(permitted(world) for world in _worlds(policy)):
        text = "multi_user = yes, and no mode of identity is allowed: every payload will be refused; next: allow a mode, or say multi_user = no"
        sources.report((*opened[0], "multi_user"), "NW-POLICY-CONTRADICTION", text, True)


def _too_weak(sources: Sources, path: Path, said: Table, modes: Table) -> None:
    """A mode that is allowed here, and refused because a stronger one is required."""
    required = [mode for mode in evaluate.MODES if modes[mode] == "require"]
    for mode in said:
        if modes[mode] != "no" and mode not in permitted(modes):
            why = f"modes.{mode} = {modes[mode]}, and {required[-1]} is required, which is more"
            text = f"{why}: {mode} will be refused; next: say no, or require less"
            sources.report((*path, "modes", mode), "NW-POLICY-CONTRADICTION", text, True)


def _dates(sources: Sources, policy: Table, now: float) -> None:
    for kind in ("rule", "stance", "ban"):
        for number, item in enumerate(policy[kind + "s"]):
            path: Path = (kind, number, "expires")
            if item["expires"] and item["expires"] <= item["not_before"]:
                sources.report(path, "NW-POLICY-VALUE", f"{kind} {item['name']!r} ends before it begins; next: correct one of the dates")
            elif item["expires"] and item["expires"] <= now:
                sources.report(path, "NW-POLICY-EXPIRED", f"{kind} {item['name']!r} is over; next: review it, then renew or delete it", True)


# --- rules -------------------------------------------------------------------------------------------------------------------------------


def _unreachable(sources: Sources, document: Table, policy: Table, number: int) -> None:
    for earlier in range(number):
        if _always(policy["rules"][earlier]) and _covers(document["rule"][earlier].get("when", {}), document["rule"][number].get("when", {})):
            other = document["rule"][earlier]["name"]
            where = "{}:{}".format(*sources.place(("rule", earlier)))
            name = document["rule"][number]["name"]
            text = f"rule {name!r} is never reached: rule {other!r} ({where}) matches first; next: move it up, or delete it"
            sources.report(("rule", number), "NW-POLICY-UNREACHABLE", text)
            return


def _always(rule: Table) -> bool:
    return not (rule["expires"] or rule["not_before"] or rule["unmet"])


def _covers(wide: Table, narrow: Table) -> bool:
    """Every request that ``narrow`` matches, ``wide`` matches too; judged by the words alone, so a no may still be a yes."""
    return all(key in narrow and _covers_key(key, value, narrow[key]) for key, value in wide.items())


def _covers_key(key: str, wide: Any, narrow: Any) -> bool:
    if key == "assurance":
        return model.ASSURANCE.index(wide) <= model.ASSURANCE.index(narrow)
    return all(any(_covers_pattern(key, one, other) for one in wide) for other in narrow)


def _covers_pattern(key: str, wide: str, narrow: str) -> bool:
    """A pattern read as text: what matches that, matches all that it stands for."""
    if wide == narrow:
        return True
    if key in ("fqan", "dn"):
        return wide.endswith("/*") and "*" not in wide[:-1] and (narrow + "/").startswith(wide[:-1])
    return key in ("caller", "host") and names.glob(wide.split("*"), narrow)


def _vo_of_fqans(sources: Sources, document: Table, number: int) -> None:
    when = document["rule"][number].get("when", {})
    vos = [vo.lower() for vo in when.get("vo", [])]
    roots = {part.lower() for fqan in when.get("fqan", []) for part in names.fqan_parts(fqan)[:1]}
    if vos and roots and not roots & set(vos):
        both = f"vo {', '.join(vos)} and for fqans of {', '.join(sorted(roots))}"
        text = f"rule {document['rule'][number]['name']!r} asks for {both}: nobody has both; next: correct one"
        sources.report(("rule", number, "when"), "NW-POLICY-CONTRADICTION", text)


def _weaker(sources: Sources, policy: Table, number: int) -> None:
    ranked = [name for name in policy["rules"][number]["profiles"] if name in STRENGTH]
    if ranked and any(STRENGTH.index(name) < STRENGTH.index(ranked[0]) for name in ranked):
        text = f"profile {ranked} lets a pilot ask for less than it would get; next: write the weakest first, the others may be asked for"
        sources.report(("rule", number, "profile"), "NW-POLICY-WEAKER", text)


def _liability(sources: Sources, document: Table, number: int) -> None:
    rule = document["rule"][number]
    wanted = set(document["site"].get("liability_for", [])) & {identity["mode"] for identity in rule["identity"]}
    if wanted and "liability" not in rule:
        text = f"rule {rule['name']!r} gives {', '.join(sorted(wanted))}, and site.liability_for wants a liability; next: add {{ by, on, reference }}"
        sources.report(("rule", number), "NW-POLICY-LIABILITY", text)


def _modes(sources: Sources, policy: Table, worlds: list[Table], number: int) -> None:
    rule = policy["rules"][number]
    modes = [identity["mode"] for identity in rule["identities"]]
    if not any(mode in permitted(world) for world in worlds for mode in modes):
        text = f"rule {rule['name']!r} gives {', '.join(modes)}, which the site's modes refuse: it can only deny; next: change modes or the rule"
        sources.report(("rule", number, "identity"), "NW-POLICY-CONTRADICTION", text, True)
