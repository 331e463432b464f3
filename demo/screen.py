"""What the demonstration prints: plain lines for a terminal of 80 columns or more, colour only where somebody sees it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap

COLOUR = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
WIDTH = max(80, min(120, shutil.get_terminal_size((100, 24)).columns))
BOLD, DIM, GREEN, RED = "1", "2", "32", "31"


def paint(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


def section(title: str) -> None:
    print("\n" + paint(BOLD, f"── {title} " + "─" * max(3, WIDTH - len(title) - 4)), flush=True)


def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False), flush=True)


def command(argv: list[str], who: str = "", env: dict[str, str] | None = None) -> None:
    """The command line as one would type it."""
    words = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()] + [shlex.quote(str(word)) for word in argv]
    lines = textwrap.wrap(f"{who}$ " + " ".join(words), WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    print(paint(BOLD, " \\\n      ".join(lines)), flush=True)


def block(title: str, text: str, wrap: bool = True) -> None:
    """Output of something, under its title, indented; empty lines left out. wrap False: what is too long is cut."""
    print(paint(DIM, f"  {title}"))
    for line in filter(str.strip, text.splitlines()):
        options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "    "}
        for part in textwrap.wrap(line, WIDTH - 6, **options) if wrap else [cut(line, WIDTH - 4)]:
            print(f"  {paint(DIM, '│')} {part}")
    sys.stdout.flush()


def cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for number, row in enumerate([head, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        print(paint(BOLD, line) if number == 0 else verdict(line))


def verdict(line: str) -> str:
    return paint(GREEN, line) if line.endswith("OK") else paint(RED, line) if line.endswith("FAILED") else line
