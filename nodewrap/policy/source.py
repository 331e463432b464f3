"""Policy sources: who may have written them, what they say, and where each word stands.

Raises nothing for bad input: every problem becomes a `Problem` with file and line, so that one check shows them all.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import Any

from nodewrap.policy.positions import Path, positions, toml

MAX_BYTES = 1 << 20
MAX_FILES = 200


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong. warning: worth saying, and no reason to refuse."""

    file: str
    line: int
    code: str
    text: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code} {'warning: ' if self.warning else ''}{self.text}"


@dataclass
class Sources:
    """All files as one document. where: (file, line) of each path of ``document``."""

    document: dict[str, Any] = field(default_factory=dict)
    where: dict[Path, tuple[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    main: str = ""

    def place(self, path: Path) -> tuple[str, int]:
        """Where ``path`` is written, or the nearest table around it."""
        while path and path not in self.where:
            path = path[:-1]
        return self.where.get(path, (self.main, 1))

    def report(self, path: Path, code: str, text: str, warning: bool = False) -> None:
        """Files a problem at the place of ``path``."""
        file, line = self.place(path)
        self.problems.append(Problem(file, line, code, text, warning))

    def errors(self) -> list[Problem]:
        """What keeps this policy from being applied."""
        return [problem for problem in self.problems if not problem.warning]


def read(directory: str) -> Sources:
    """``nodewrap.toml`` and ``policy.d/*.toml`` (sorted) of ``directory``: tables of the same name are joined, lists of tables appended."""
    main = os.path.join(directory, "nodewrap.toml")
    sources = Sources(main=main)
    for file in [main, *_drop_ins(sources, os.path.join(directory, "policy.d"))]:
        _add_file(sources, file)
    return sources


def _drop_ins(sources: Sources, directory: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".toml") and not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        sources.problems.append(Problem(directory, 1, "NW-POLICY-READ", f"cannot be listed ({error.strerror}); next: fix its mode"))
        return []
    if len(names) > MAX_FILES:
        sources.problems.append(Problem(directory, 1, "NW-POLICY-READ", f"{len(names)} files, at most {MAX_FILES} are read; next: join some"))
    return [os.path.join(directory, name) for name in names[:MAX_FILES]]


def read_file(file: str) -> Sources:
    """One TOML file, with the same checks."""
    sources = Sources(main=file)
    _add_file(sources, file)
    return sources


def _add_file(sources: Sources, file: str) -> None:
    try:
        text = _trusted_text(file)
        document = toml.loads(text)
    except Distrust as error:
        sources.problems.append(Problem(file, 1, "NW-POLICY-OWNER", str(error)))
    except UnicodeDecodeError as error:
        sources.problems.append(Problem(file, 1, "NW-POLICY-SYNTAX", f"byte {error.start} is not UTF-8; next: save the file as UTF-8"))
    except OSError as error:
        sources.problems.append(Problem(file, 1, "NW-POLICY-READ", f"cannot be read ({error.strerror}); next: create it or fix its mode"))
    except toml.TOMLDecodeError as error:
        sources.problems.append(_syntax(file, str(error)))
    except RecursionError:
        sources.problems.append(Problem(file, 1, "NW-POLICY-SYNTAX", "nested too deeply; next: no key of a policy needs more than four levels"))
    else:
        _merge(sources, file, document, positions(text, document))


def _syntax(file: str, text: str) -> Problem:
    found = re.search(r"\(at line (\d+), column (\d+)\)", text)
    what = re.sub(r" *\(at .*\)$", "", text)
    where = f" in column {found[2]}" if found else ""
    return Problem(file, int(found[1]) if found else 1, "NW-POLICY-SYNTAX", f"not TOML{where}: {what}; next: correct this line")


def _merge(sources: Sources, file: str, document: dict[str, Any], lines: dict[Path, int]) -> None:
    shift = {key: len(sources.document.get(key, [])) for key, value in document.items() if _is_tables(value)}
    seen = dict(sources.where)
    for path, line in lines.items():
        key = path[0]
        moved = (key, path[1] + shift[str(key)], *path[2:]) if key in shift and len(path) > 1 and isinstance(path[1], int) else path
        sources.where.setdefault(moved, (file, line))
    for key, value in document.items():
        _merge_key(sources, file, (key,), value, sources.document, lines, seen)


def _merge_key(
    sources: Sources, file: str, path: Path, value: Any, into: dict[str, Any], lines: dict[Path, int], seen: dict[Path, tuple[str, int]]
) -> None:
    key = str(path[-1])
    if key not in into:
        into[key] = value
    elif _is_tables(value) and _is_tables(into[key]):
        into[key] = into[key] + value
    elif isinstance(value, dict) and isinstance(into[key], dict) and len(path) == 1:
        for name, inner in value.items():
            _merge_key(sources, file, (*path, name), inner, into[key], lines, seen)
    else:
        other = "{}:{}".format(*seen.get(path, (sources.main, 1)))
        text = f"{'.'.join(map(str, path))} is already set in {other}; next: keep one of the two"
        sources.problems.append(Problem(file, lines.get(path, 1), "NW-POLICY-DUPLICATE", text))


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# --- who may have written it ---------------------------------------------------------------------------------------------------------


class Distrust(Exception):
    """Somebody else could have written this; the text says who and where."""


def _trusted_text(file: str) -> str:
    """Content of ``file``, opened once and judged by descriptor. Raises Distrust, OSError, UnicodeDecodeError."""
    for path in dict.fromkeys((os.path.abspath(file), os.path.realpath(file))):
        _trust_parents(path)
    fd = os.open(os.path.realpath(file), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as stream:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Distrust("is not a regular file; next: put a file there")
        _trust(file, info)
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Distrust(f"is larger than {MAX_BYTES} bytes; next: split it into policy.d/")
    return data.decode("utf-8")


def _trust_parents(path: str) -> None:
    while path != "/":
        path = os.path.dirname(path)
        _trust(path, os.stat(path))


def _trust(path: str, info: os.stat_result) -> None:
    """Owner root (or who runs this), and nobody else may write. A sticky directory (/tmp) keeps others from replacing what is in it."""
    if info.st_uid not in (0, os.geteuid()):
        raise Distrust(f"{path} belongs to uid {info.st_uid}; next: chown root {path}")
    if info.st_mode & 0o022 and not (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX and info.st_uid == 0):
        who = "group" if info.st_mode & 0o020 else "anyone"
        raise Distrust(f"{path} is writable by {who} (mode {info.st_mode & 0o7777:04o}); next: chmod go-w {path}")
