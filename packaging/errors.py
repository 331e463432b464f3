"""Keep docs/errors.md true: every ``NW-`` code that the code can print has one line there, and no other has.

``errors.py --check`` prints what differs and exits 1; ``errors.py --add`` adds a line for each code that has none, with its first message as
the meaning, to be edited by whoever added the code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOC = Path("docs/errors.md")
CODE = re.compile(r'"(NW-[A-Z0-9]+(?:-[A-Z0-9]+)*)(?=[": ])')
MISTAKE = re.compile(r'\bmistake\("([A-Z]+)"')  # nodewrap/usage.py composes NW-USAGE-…
ROW = re.compile(r"^\| `(NW-[A-Z0-9-]+)` \|", re.M)
MESSAGE = re.compile(r'(?:mistake\()?"(?:NW-)?[A-Z0-9-]+(?:",\s*f?"|: )((?:[^"\\]|\\.)*)"')


def sources() -> list[Path]:
    return sorted([*Path("csrc").glob("*.[ch]"), *Path("nodewrap").rglob("*.py")])


def used() -> dict[str, str]:
    """code -> the first message it is used with, "" when that is not a literal beside it."""
    found: dict[str, str] = {}
    for source in sources():
        text = source.read_text(encoding="utf-8")
        for prefix, pattern in (("", CODE), ("NW-USAGE-", MISTAKE)):
            for match in pattern.finditer(text):
                message = MESSAGE.match(text, match.start())
                found[prefix + match[1]] = found.get(prefix + match[1]) or (message[1].replace('\\"', "'").replace("|", "/") if message else "")
    return found


def documented() -> list[str]:
    return ROW.findall(DOC.read_text(encoding="utf-8"))


def check() -> int:
    code, doc = set(used()), documented()
    for name in sorted(code - set(doc)):
        print(f"{DOC}: {name} is used in the code and has no line; run packaging/errors.py --add and edit it")
    for name in sorted(set(doc) - code):
        print(f"{DOC}: {name} has a line and is nowhere in the code; remove the line")
    for name in sorted({name for name in doc if doc.count(name) > 1}):
        print(f"{DOC}: {name} has more than one line")
    return int(code != set(doc) or len(doc) != len(set(doc)))


def add() -> int:
    head, _, table = DOC.read_text(encoding="utf-8").partition("|---|---|---|\n")
    rows = [line for line in table.splitlines() if line]
    rows += [f"| `{name}` | {message} |  |" for name, message in used().items() if name not in documented()]
    DOC.write_text(head + "|---|---|---|\n" + "\n".join(sorted(rows)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(add() if "--add" in sys.argv else check())
