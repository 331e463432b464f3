"""The report that people read while it runs, and the table at the end."""

from __future__ import annotations

import sys

from nodewrap.escape.model import SURFACES, Outcome, Result, catalogue

WORD = {one: one.value if one in (Outcome.BLOCKED, Outcome.NOT_EXERCISED) else one.value.upper() for one in Outcome}


def progress(one: Result, results: list[Result]) -> None:
    """Note the result; what failed is told at once, the rest counted on a terminal."""
    results.append(one)
    if one.is_failure:
        sys.stderr.write(f"{one.configuration}: {_line(one)}\n")
    elif sys.stderr.isatty():
        sys.stderr.write(f"\r{len(results)} tried, at {one.attack} in {one.configuration}\x1b[K")
        sys.stderr.flush()


def _line(one: Result) -> str:
    litter = f" [left: {'; '.join(one.litter)}]" if one.litter else ""
    return f"{one.attack} {catalogue()[one.attack].tries}: {WORD[one.outcome]}: {one.seen}{litter}"


def table(results: list[Result]) -> str:
    """A line per configuration and outcome, then what is open, what is accepted, and what could not be tried and why."""
    names = [name for name in dict.fromkeys(one.configuration for one in results) if name != "-"]
    width = max([len(name) for name in names], default=10)
    text = ["", f"{'':{width}}  " + "  ".join(f"{word:>13}" for word in (*WORD.values(), "of it accepted"))]
    for name in names:
        mine = [one for one in results if one.configuration == name]
        counts = [sum(one.outcome is outcome for one in mine) for outcome in WORD]
        counts.append(sum(bool(one.accepted) and one.outcome in (Outcome.LEAKED, Outcome.DIRTY) for one in mine))
        text.append(f"{name:{width}}  " + "  ".join(f"{count:>13}" for count in counts))
    for letter, title in SURFACES.items():
        mine = [one for one in results if one.attack[0] == letter]
        if any(one.is_failure for one in mine):
            text += ["", f"{letter} {title}"] + [f"  {one.configuration}: {_line(one)}" for one in mine if one.is_failure]
    missed: dict[tuple[str, str], int] = {}
    for one in results:
        if one.outcome is Outcome.NOT_EXERCISED:
            missed[one.attack, one.seen] = missed.get((one.attack, one.seen), 0) + 1
    text += ["", "Not exercised:"] + [f"  {key}  {why}" for key, why in missed] if missed else []
    failed = sum(one.is_failure for one in results)
    verdict = f"{failed} OPEN OR BROKEN" if failed else "nothing open that is not documented"
    text += ["", f"{len({one.attack for one in results})} attacks, {len(results)} tries: {verdict}"]
    return "\n".join(text) + "\n"
