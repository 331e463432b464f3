"""The policy held against the guard: what the launcher would refuse whatever Python says (docs/guard.md)."""

from __future__ import annotations

from typing import Any

from nodewrap import network
from nodewrap.guard import Guard, Range
from nodewrap.policy.positions import Path
from nodewrap.policy.source import Sources

Table = dict[str, Any]


def compare(sources: Sources, policy: Table, guard: Guard, where: str) -> None:
    """Reports, as warnings, what a rule gives and ``guard`` (of file ``where``) never permits: the guard is another administrator's word."""
    for number, rule in enumerate(policy["rules"]):
        path: Path = ("rule", number)
        refused = [why for identity in rule["identities"] for why in _identity(rule, identity, guard)]
        never = all(list(_identity(rule, identity, guard)) for identity in rule["identities"])
        for why in refused:
            fate = "the rule can never permit" if never else "this mode can never be permitted"
            sources.report((*path, "identity"), "NW-POLICY-GUARD", f"rule {rule['name']!r}: {why}: {fate}; next: change {where} or the rule", True)
        for name in [name for name in rule["profiles"] if policy["profiles"][name].get("disk") and not guard.tmp_dir]:
            text = f"rule {rule['name']!r}: profile {name} wants directories on disk, {where} has no tmp-dir: it can never start; next: add that line"
            sources.report((*path, "profile"), "NW-POLICY-GUARD", text, True)
        for name in [name for name in rule["profiles"] if network.mode(policy["profiles"][name]) == "private" and _no_network(guard)]:
            text = f"rule {rule['name']!r}: profile {name} wants a private network, {where} has {_no_network(guard)}; next: docs/network.md"
            sources.report((*path, "profile"), "NW-POLICY-GUARD", text, True)
        if guard.max_wall_s < rule["limits"]["wall_s"]:
            text = f"rule {rule['name']!r}: wall is {rule['limits']['wall_s']} s, {where} ends runs at {guard.max_wall_s} s; next: change one of them"
            sources.report((*path, "limits"), "NW-POLICY-GUARD", text, True)


def _no_network(guard: Guard) -> str:
    """Why this guard gives nobody a private network, or ""."""
    if guard.launcher == "userns":
        return "" if guard.network else "no line network"
    return "" if guard.netd and guard.network else "no lines netd and network"


def _identity(rule: Table, identity: Table, guard: Guard) -> list[str]:
    mode = identity["mode"]
    why = []
    if guard.launcher == "userns" and mode == "switch":
        why.append("launcher userns cannot switch accounts")
    if not set(rule["profiles"]) & set(guard.allow.get(mode, ())):
        why.append(f"the guard allows mode {mode} no profile of {', '.join(rule['profiles'])}")
    if mode == "map" and guard.launcher != "userns" and not _fits(guard.map_uid, identity["size"]):
        why.append(f"the guard's map-uid has no block of {identity['size']} ids")
    outside = [account["name"] for account in identity.get("accounts", ()) if not _inside(account, guard)]
    if outside and mode == "switch":
        why.append(f"{len(outside)} of {len(identity['accounts'])} accounts are outside the guard's switch-uid and switch-gid ({outside[0]}…)")
    return why


def _fits(ranges: tuple[Range, ...], size: int) -> bool:
    return any(part.last - part.first + 1 >= size for part in ranges)


def _inside(account: Table, guard: Guard) -> bool:
    groups = [account["gid"], *account["groups"]]
    return _in(guard.switch_uid, account["uid"]) and all(_in(guard.switch_gid, gid) for gid in groups)


def _in(ranges: tuple[Range, ...], number: int) -> bool:
    return any(part.first <= number <= part.last for part in ranges)
