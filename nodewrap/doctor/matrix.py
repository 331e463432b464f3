"""From findings to answers: launcher x mode x profile, each yes, degraded or no, with the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from nodewrap import _paths
from nodewrap.doctor.checks import CHECKS, Finding
from nodewrap.doctor.node import Node
from nodewrap.guard import MODES, Profile

SCRATCH = 38  # NW_LIMIT_SCRATCH: of file systems, which every node has
LAUNCHERS = ("setuid", "socket", "userns")
Findings = dict[str, Finding]


class Reason(NamedTuple):
    """fatal: the profile's on-missing cannot soften it. check: a name in CHECKS, or where the answer was found. saw, next: one line each."""

    fatal: bool
    check: str
    saw: str
    next: str


class Cell(NamedTuple):
    launcher: str
    mode: str
    profile: str
    state: str
    reasons: tuple[Reason, ...]


def examine(node: Node) -> Findings:
    """Every check, tried now, in the table's order."""
    return {check.name: check.look(node) for check in CHECKS}


def cells(node: Node, findings: Findings) -> list[Cell]:
    return [_cell(node, findings, launcher, mode, profile) for launcher in LAUNCHERS for mode in MODES for profile in node.profiles.values()]


#: What the launcher does in another way by itself and says so in the record, whatever on-missing says: chown instead of an idmapped mount, one
#: id instead of a range. A device that is absent or closed is no part of a profile: it stands in the list of the node's facts.
RECORDED = ("root.idmap", "newuidmap")


def _cell(node: Node, findings: Findings, launcher: str, mode: str, profile: Profile) -> Cell:
    reasons = tuple(_reasons(node, findings, launcher, mode, profile))
    refused = [reason for reason in reasons if reason.check not in RECORDED and not reason.check.endswith("?")]
    fatal = any(reason.fatal for reason in reasons) or (refused and not profile.degrade)
    return Cell(launcher, mode, profile.name, "no" if fatal else "degraded" if reasons else "yes", reasons)


def _reasons(node: Node, findings: Findings, launcher: str, mode: str, profile: Profile) -> Iterator[Reason]:
    for name in (f"launcher.{launcher}", *(("caller.user",) if launcher == "userns" else ())):
        yield from _missing(findings, name, fatal=True)
    yield from _mode(node, findings, launcher, mode)
    side = "caller" if launcher == "userns" else "root"
    for name in _wanted(profile, side):
        if side == "root" or not name.startswith("caller.") or findings["caller.user"].yes:  # without user namespaces the others follow
            yield from _missing(findings, name, fatal=False)
    if profile.network:
        yield from _missing(findings, "pasta" if launcher == "userns" else "netd", fatal=False)
    yield from _walls(findings, profile)
    if any(op.kind == "disk" for op in profile.ops):
        yield from _missing(findings, "tmp-dir", fatal=True)
    if node.guard and node.guard.cgroup:
        yield from _missing(findings, "cgroup", fatal=False)
    if launcher != "userns" and mode != "log-only" and "mount" in profile.namespaces:
        yield from _missing(findings, "root.idmap", fatal=False)


def _mode(node: Node, findings: Findings, launcher: str, mode: str) -> Iterator[Reason]:
    if mode == "switch" and launcher == "userns":
        yield Reason(True, "mode", "another account's uid needs privilege", "use mode map, or the setuid launcher")
    elif mode == "switch":
        yield from _missing(findings, "accounts", fatal=True)
        if node.guard and not node.guard.switch_uid:
            yield Reason(True, "guard", "no line 'switch-uid'", f"name the target accounts' ids in {_paths.GUARD}")
    elif mode == "map" and launcher == "userns":
        yield from _missing(findings, "newuidmap", fatal=False)
    elif mode == "map" and node.guard and not node.guard.map_uid:
        yield Reason(True, "guard", "no line 'map-uid'", f"name a range of ids without accounts in {_paths.GUARD}")


def _wanted(profile: Profile, side: str) -> Iterator[str]:
    """The checks that what the profile asks for rests on."""
    yield from (f"{side}.{kind}" for kind in profile.namespaces)
    kinds = {op.kind for op in profile.ops}
    if "proc" in kinds:
        yield f"{side}.proc"
    if profile.seccomp:
        yield from ("seccomp", "keyring")


#: What Landlock closes, and the check that it rests on.
WALLS = {"abstract": "landlock", "signals": "landlock", "files": "landlock.files", "tcp": "landlock.tcp"}


def _walls(findings: Findings, profile: Profile) -> Iterator[Reason]:
    """One reason for each check; a "?" behind it: the profile goes on without, and says so in the record."""
    wanted = {name: {wall for wall in profile.landlock if WALLS[wall.rstrip("?")] == name} for name in WALLS.values()}
    for name, walls in wanted.items():
        optional = all(wall.endswith("?") for wall in walls)
        yield from (reason._replace(check=name + "?" * optional) for reason in (_missing(findings, name, fatal=False) if walls else ()))


def _missing(findings: Findings, name: str, fatal: bool) -> Iterator[Reason]:
    finding = findings[name]
    if not finding.yes:
        yield Reason(fatal or finding.yes is None, name, finding.saw, next_step(name, finding))


def next_step(name: str, finding: Finding) -> str:
    return finding.next or next(check.next for check in CHECKS if check.name == name)


def verdict(node: Node, findings: Findings, table: list[Cell]) -> list[str]:
    """Why the configured launcher cannot run the applied policy's rules; empty when it can run each of them, degraded or not."""
    basics = [name for name in ("guard", "child", "policy", "state", "audit") if findings[name].yes is False]
    if basics or not node.guard or not node.policy:
        return [f"{name}: {findings[name].saw}; next: {next_step(name, findings[name])}" for name in basics]
    known = {(cell.mode, cell.profile): cell for cell in table if cell.launcher == node.guard.launcher}
    limits = [line for rule in node.policy["rules"] for line in _limits(rule, findings["limits"])]
    return [line for rule in node.policy["rules"] for line in _rule(node, rule, known)] + limits


def _limits(rule: dict[str, Any], finding: Finding) -> Iterator[str]:
    """A run with limits that its cgroup must hold, and cannot."""
    if rule["limits"]["must"] and set(rule["limits"]["run"]) - {SCRATCH} and not finding.yes:
        yield f"rule {rule['name']}: limits.on_missing is refuse, and {finding.saw}; next: {next_step('limits', finding)}"


def _rule(node: Node, rule: dict[str, list[dict[str, str]]], known: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """A rule may list several identities, of which the launcher takes one that it can: one that works is enough."""
    for profile in rule["profiles"]:
        problems = [_pair(node, identity["mode"], str(profile), known) for identity in rule["identities"]]
        if all(problems):
            yield f"rule {rule['name']}: {problems[0]}"


def _pair(node: Node, mode: str, profile: str, known: dict[tuple[str, str], Cell]) -> str:
    if node.guard and profile not in node.guard.allow.get(mode, ()):
        return f"the guard does not allow {mode} with {profile}; next: 'allow {mode} {profile}' in {_paths.GUARD}"
    cell = known.get((mode, profile))
    if cell is None:
        return f"there is no profile {profile}; next: run nodewrap policy apply"
    reason = next((reason for reason in cell.reasons if reason.fatal), cell.reasons[0] if cell.reasons else None)
    return f"{mode} with {profile}: {reason.saw}; next: {reason.next}" if cell.state == "no" and reason else ""
