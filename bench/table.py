"""Figures as text: fixed columns, and beside each promise whether it was kept."""

from __future__ import annotations

from bench.containers import BACKEND, Cost
from bench.measure import Kill, Memory, Times
from bench.relay import Flow, Idle
from bench.trees import RM, Cleaned

KILL_S, MEMORY_KB, C_LINES, GB_S, IDLE_PERCENT, OF_RM = 0.5, 3072, 3500, 2.0, 3.0, 1.0
HEAD = ("", "n", "busy", "p50 ms", "p99 ms", "× bare", "+ ms", "promised", "")


def kept(value: float, bound: float) -> str:
    return "kept" if value <= bound else "MISSED"


def of_starts(times: list[Times]) -> list[str]:
    """One line a case; the first case is the bare exec that the others are compared with."""
    bare = times[0].at(0.5)
    return _columns([HEAD, *(_start(one, bare) for one in times)])


def _start(one: Times, bare: float) -> tuple[str, ...]:
    p50 = one.at(0.5)
    promise = (f"+{one.case.target:g}", kept(p50 - bare, one.case.target)) if one.case.target else ("", "")
    name = one.case.name + (f" ({one.failed} FAILED)" if one.failed else "")
    return (name, str(len(one.us)), str(one.busy), f"{p50:.2f}", f"{one.at(0.99):.2f}", f"{p50 / bare:.1f}", f"{p50 - bare:+.2f}", *promise)


def of_containers(costs: list[Cost]) -> list[str]:
    """unsettled: the promise lies between the bounds of what was measured; more rounds, or an idle machine, would tell."""
    head = ("", "ms", "Apptainer's own", "nodewrap's start", "backend's", "95 % within", "promised", "")
    return _columns([head, *(_container(one) for one in costs)])


def _container(one: Cost) -> tuple[str, ...]:
    ms, (low, high) = [f"{value:.1f}" for value in (one.contained, one.direct, one.own, one.backend)], one.bounds
    judged = "unsettled" if low <= BACKEND < high else kept(high, BACKEND)
    return (one.launcher, *ms, f"{low:+.1f}…{high:+.1f}", f"{BACKEND:g}", judged)


def of_flows(flows: list[Flow]) -> list[str]:
    return _columns([("", "GB/s p50", "best", "promised", ""), *map(_flow, flows)])


def _flow(one: Flow) -> tuple[str, ...]:
    promise = (f"{GB_S:g}", kept(-one.gb_s, -GB_S)) if one.judged else ("", "")
    return (one.name, f"{one.gb_s:.2f}", f"{one.best:.2f}", *promise)


def of_idle(found: list[Idle]) -> list[str]:
    rows = [(one.launcher, f"{one.percent:.3f}", f"{IDLE_PERCENT:g}", kept(one.percent, IDLE_PERCENT)) for one in found]
    return _columns([("", "% of a processor", "promised", ""), *rows])


def of_kills(kills: list[Kill]) -> list[str]:
    head = ("", "processes", "s until proved", "left", "promised", "")
    return _columns([head, *(_kill(one) for one in kills)])


def _kill(one: Kill) -> tuple[str, ...]:
    judged = "MISSED" if one.left else kept(one.seconds, KILL_S)
    return (one.name, str(one.processes), f"{one.seconds:.3f}", str(one.left), f"{KILL_S}", judged)


def of_trees(found: list[Cleaned]) -> list[str]:
    """remove is what rm does; the other two look at every entry and give it back."""
    return _columns([("", "entries", "s p50", "× rm -rf", "peak KiB", "promised", ""), *map(_tree, found)])


def _tree(one: Cleaned) -> tuple[str, ...]:
    name = (f"{one.shape}: {one.what}", f"{one.entries}", f"{one.seconds:.3f}")
    if one.what == RM:
        return (*name, "", "", "", "")
    return (*name, f"{one.ratio:.2f}", str(one.peak_kib), f"{OF_RM:g}", kept(one.ratio, OF_RM))


def of_memory(parts: list[Memory]) -> list[str]:
    """Judged by the sum of Pss: what the processes share (one program's pages) is there once."""
    rows: list[tuple[str, ...]] = [("", "Rss KiB", "Pss KiB", "promised", "")]
    for launcher in sorted({part.launcher for part in parts}):
        own = [part for part in parts if part.launcher == launcher]
        rows += [(f"{launcher}: {part.part}", str(part.rss), str(part.pss), "", "") for part in own]
        total = sum(part.pss for part in own)
        rows.append((f"{launcher}: together", str(sum(part.rss for part in own)), str(total), str(MEMORY_KB), kept(total, MEMORY_KB)))
    return _columns(rows)


def of_lines(every: int, code: int) -> list[str]:
    rows = (("C in csrc/, all lines", every), ("C in csrc/, without comments and blank lines", code))
    return _columns([("", "lines", "promised", ""), *((name, str(count), str(C_LINES), kept(count, C_LINES)) for name, count in rows)])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """First column to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
