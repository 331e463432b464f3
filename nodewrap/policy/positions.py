"""Line numbers of a TOML document's keys. `tomllib` gives none, and an error without its line is a search.

Walks text that `tomllib` has accepted already, so it only needs to know where things begin and end, not whether they are right.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from typing import Any, Union

if sys.version_info >= (3, 11):
    import tomllib as toml
else:
    import tomli as toml

__all__ = ["Path", "positions", "toml"]

Path = tuple[Union[str, int], ...]
_SPACE = " \t\r\n"


def positions(text: str, document: dict[str, Any]) -> dict[Path, int]:
    """Line (from 1) of every table, key and array element, by its path in ``document``: what `tomllib.loads(text)` returned."""
    return _Walk(text).document()


class _Walk:
    """One pass over the text. ``at``: where we are; ``base``: path of the table that the last header opened."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.newlines = [at for at, char in enumerate(self.text) if char == "\n"]
        self.base: Path = ()
        self.found: dict[Path, int] = {}
        self.sizes: dict[Path, int] = {}

    def document(self) -> dict[Path, int]:
        self._skip()
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                self._header()
            else:
                self._pair(self.base)
            self._skip()
        return self.found

    def _line(self) -> int:
        return bisect_right(self.newlines, self.at - 1) + 1

    def _skip(self, more: str = "") -> None:
        """Past blanks, newlines, comments and the characters of ``more``."""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif char in _SPACE or char in more:
                self.at += 1
            else:
                return

    def _header(self) -> None:
        """``[a.b]`` or ``[[a.b]]``; a name on the way that is an array of tables means its last table."""
        line = self._line()
        double = self.text.startswith("[[", self.at)
        self.at += 2 if double else 1
        keys = self._keys("]")
        self.at += 2 if double else 1
        path: Path = ()
        for key in keys[:-1]:
            path = self._last((*path, key))
            self.found.setdefault(path, line)
        path = (*path, keys[-1])
        self.found.setdefault(path, line)
        if double:
            number = self.sizes.get(path, 0)
            self.sizes[path] = number + 1
            path = (*path, number)
        self.base = path if double else self._last(path)
        self.found[self.base] = line

    def _last(self, path: Path) -> Path:
        return (*path, self.sizes[path] - 1) if path in self.sizes else path

    def _keys(self, stop: str) -> list[str]:
        """A dotted key, up to and not past ``stop``."""
        keys = []
        while True:
            self._skip()
            keys.append(self._quoted() if self.text[self.at] in "\"'" else self._bare(stop))
            self._skip()
            if self.text[self.at] == stop:
                return keys
            self.at += 1  # the dot

    def _bare(self, stop: str) -> str:
        start = self.at
        while self.text[self.at] not in _SPACE + "." + stop:
            self.at += 1
        return self.text[start:self.at]

    def _quoted(self) -> str:
        start = self.at
        self._string()
        return str(toml.loads("k = " + self.text[start:self.at])["k"])

    def _pair(self, base: Path) -> None:
        line = self._line()
        path = base
        for key in self._keys("="):
            path = (*path, key)
            self.found.setdefault(path, line)
        self.at += 1
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip()
        char = self.text[self.at]
        if char in "\"'":
            self._string()
        elif char == "[":
            self._array(path)
        elif char == "{":
            self._inline(path)
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def _string(self) -> None:
        """Past one string of any of the four kinds."""
        quote = self.text[self.at]
        mark = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(mark)
        while not self.text.startswith(mark, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(mark)
        while len(mark) == 3 and self.text.startswith(quote, self.at):  # """a"""" ends with a quote of its own
            self.at += 1

    def _array(self, path: Path) -> None:
        self.at += 1
        self._skip(",")
        number = 0
        while self.text[self.at] != "]":
            place = (*path, number)
            self.found[place] = self._line()
            self._value(place)
            self._skip(",")
            number += 1
        self.at += 1

    def _inline(self, path: Path) -> None:
        self.at += 1
        self._skip(",")
        while self.text[self.at] != "}":
            self._pair(path)
            self._skip(",")
        self.at += 1

