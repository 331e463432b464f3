"""A profile in words, for ``nodewrap policy explain``: what the kernel refuses its payloads, and why."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from nodewrap import seccomp

Table = dict[str, Any]

#: What each of Landlock's walls closes.
LANDLOCK = {
    "abstract": "abstract sockets outside cannot be reached (Linux 6.12)", "signals": "nothing outside can be signalled (Linux 6.12)",
    "files": "files are read and run where the profile shows them, and written only where it lets them be written (Linux 5.19)",
    "tcp": "TCP by list (Linux 6.7)",
}


def walls(table: Table) -> list[str]:
    """One line for each thing that seccomp and Landlock close under this merged profile."""
    return [*_landlock(table), *_seccomp(table)]


def _landlock(table: Table) -> Iterator[str]:
    for kind in table.get("landlock", ()):
        ports = ""
        if kind.rstrip("?") == "tcp":
            ports = f"; bind {_ports(table, 'tcp_bind')}; connect {_ports(table, 'tcp_connect')}"
        missing = "recorded" if kind.endswith("?") or table["on_missing"] == "degrade" else "refused"
        yield f"landlock {kind.rstrip('?')}: {LANDLOCK[kind.rstrip('?')]}{ports}; a kernel without it: {missing}"


def _ports(table: Table, key: str) -> str:
    return " ".join(map(str, table.get(key, ()))) or "none"


def _seccomp(table: Table) -> Iterator[str]:
    """The rules by their reason, in the order of docs/isolation.md; * behind a call: by argument."""
    if not table.get("seccomp"):
        yield "seccomp: no filter"
        return
    groups: dict[tuple[str, int], dict[str, bool]] = {}
    for rule in seccomp.payload_rules(bool(table["nested_userns"]), seccomp.limits_tcp(table)):
        groups.setdefault((rule.why, rule.action), {})[rule.call] = bool(rule.where)
    for (why, action), calls in groups.items():
        yield f"seccomp {errno.errorcode[action & 0xFFFF]}: {' '.join(call + '*' * partly for call, partly in calls.items())}: {why}"
