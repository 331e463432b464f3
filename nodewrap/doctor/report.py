"""Doctor's findings for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from nodewrap.doctor.checks import CHECKS, Finding
from nodewrap.doctor.matrix import LAUNCHERS, Cell, Findings, Reason, next_step
from nodewrap.doctor.node import Node
from nodewrap.guard import MODES

WORDS = {True: "yes", False: "no", None: "-"}


def as_json(node: Node, findings: Findings, drifts: list[tuple[str, Finding]], table: list[Cell], problems: list[str]) -> str:
    """One object: ok, problems, launcher, checks, node (drift) and matrix. yes is true, false, or null for what could not be tried."""
    return json.dumps({
        "ok": not problems, "problems": problems, "launcher": node.guard.launcher if node.guard else None, "profiles": node.profiles_from,
        "checks": {check.name: {**findings[check.name]._asdict(), "why": check.why} for check in CHECKS},
        "node": {name: finding._asdict() for name, finding in drifts},
        "matrix": [{**cell._asdict(), "reasons": [reason._asdict() for reason in cell.reasons]} for cell in table],
    }, indent=1)


def as_text(node: Node, findings: Findings, drifts: list[tuple[str, Finding]], table: list[Cell], problems: list[str]) -> str:
    return "\n".join([*_checks(findings), "", *_drifts(drifts), "", *_matrix(node, table), "", *_reasons(table), *_end(node, problems)])


def _checks(findings: Findings) -> Iterator[str]:
    yield "This node:"
    for check in CHECKS:
        finding = findings[check.name]
        yield f"  {WORDS[finding.yes]:4}{check.name:17}{finding.saw}"
        if finding.yes is False:
            yield f"      {'':15}  {check.why}; next: {next_step(check.name, finding)}"


def _drifts(drifts: list[tuple[str, Finding]]) -> Iterator[str]:
    yield "Settings that weaken it:"
    weak = [(name, finding) for name, finding in drifts if finding.yes is False]
    for name, finding in weak:
        yield f"  {name:21}{finding.saw}; next: {finding.next}"
    if not weak:
        yield "  none of those looked at"


def _matrix(node: Node, table: list[Cell]) -> Iterator[str]:
    names = list(node.profiles)
    yield f"What runs here (profiles of {node.profiles_from}):"
    yield f"  {'launcher':10}{'mode':10}" + "".join(f"{name:12}" for name in names)
    for launcher in LAUNCHERS:
        for mode in MODES:
            row = {cell.profile: cell.state for cell in table if (cell.launcher, cell.mode) == (launcher, mode)}
            yield f"  {launcher:10}{mode:10}" + "".join(f"{row[name]:12}" for name in names)


def _reasons(table: list[Cell]) -> Iterator[str]:
    """Each reason once, with where it applies: most of them concern whole rows."""
    where: dict[Reason, list[Cell]] = {}
    for cell in table:
        for reason in cell.reasons:
            where.setdefault(reason, []).append(cell)
    if where:
        yield "Why not:"
    for reason, cells in where.items():
        yield f"  {reason.check:17}{reason.saw}; next: {reason.next}"
        yield f"  {'':17}concerns {_summary(cells)}"


def _summary(cells: list[Cell]) -> str:
    parts = [sorted({getattr(cell, name) for cell in cells}) for name in ("launcher", "mode", "profile")]
    return " / ".join(", ".join(part) for part in parts)


def _end(node: Node, problems: list[str]) -> Iterator[str]:
    yield ""
    if not problems and node.guard:
        yield f"The {node.guard.launcher} launcher can run every rule of the applied policy."
    for problem in problems:
        yield f"Not ready: {problem}"
