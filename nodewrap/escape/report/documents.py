"""JSON and JUnit XML."""

from __future__ import annotations

import json
from dataclasses import asdict
from xml.sax.saxutils import escape, quoteattr

from nodewrap.escape.model import REGISTRY, Outcome, Result, catalogue


def as_json(results: list[Result]) -> str:
    """One object: results, each with the fields of Result, its row of the catalogue and what shall stop it."""
    found = []
    for one in results:
        row = catalogue()[one.attack]
        more = {"tries": row.tries, "replays": row.replays, "stopped_by": REGISTRY[one.attack].stopped_by if one.attack in REGISTRY else ""}
        found.append({**asdict(one), "outcome": one.outcome.value, "failure": one.is_failure, **more})
    return json.dumps({"results": found}, indent=1) + "\n"


def as_junit(results: list[Result]) -> str:
    """A test suite per configuration, a test case per attack; what is not exercised is skipped, what is accepted passes and says so."""
    text = ['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>"]
    for name in dict.fromkeys(one.configuration for one in results):
        mine = [one for one in results if one.configuration == name]
        failures, skipped = sum(one.is_failure for one in mine), sum(one.outcome is Outcome.NOT_EXERCISED for one in mine)
        text.append(f'<testsuite name={quoteattr(name)} tests="{len(mine)}" failures="{failures}" skipped="{skipped}">')
        for one in mine:
            title = f"{one.attack} {catalogue()[one.attack].tries}"
            text.append(f'<testcase classname={quoteattr(name)} name={quoteattr(title)} time="{one.seconds:.3f}">')
            said = _clean("\n".join([f"{one.outcome.value}: {one.seen}", *one.litter, f"control: {one.control}"]))
            if one.is_failure:
                text.append(f"<failure message={quoteattr(one.outcome.value)}>{escape(said)}</failure>")
            elif one.outcome is Outcome.NOT_EXERCISED:
                text.append(f"<skipped message={quoteattr(_clean(one.seen))}/>")
            else:
                text.append(f"<system-out>{escape(said)}</system-out>")
            text.append("</testcase>")
        text.append("</testsuite>")
    return "\n".join([*text, "</testsuites>"]) + "\n"


def _clean(text: str) -> str:
    """Without what XML 1.0 has no way to write (section 2.2)."""
    return "".join(letter if letter in "\t\n" or " " <= letter <= "\ud7ff" or "\ue000" <= letter <= "\ufffd" else "?" for letter in text)
