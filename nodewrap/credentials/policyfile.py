"""Globus signing policy files (EACL): which names a CA may sign. They are the site's, root-owned, but parsed like anything else."""

from __future__ import annotations

import re

from nodewrap.credentials.errors import deny
from nodewrap.credentials.names import modern, same_text

_LINE = re.compile(r"^\s*(access_id_CA|pos_rights|neg_rights|cond_subjects)\s+(\S+)\s+(.*?)\s*$")
_PATTERN = re.compile(r'"([^"]*)"|([^\s"]+)')


def allowed(text: str, ca: str, subject: str, file: str) -> bool:
    """Whether the policy in ``text`` lets CA ``ca`` sign ``subject`` (one-line DNs). Refusal NW-X509-POLICY when the file is not understood."""
    patterns = [pattern for name, found in _entries(text, file) if same_text(name, ca) for pattern in found]
    return any(_matches(pattern, subject) for pattern in patterns)


def _entries(text: str, file: str) -> list[tuple[str, list[str]]]:
    """[(CA name, subject patterns)] of the entries that grant CA:sign."""
    entries: list[tuple[str, list[str]]] = []
    signs = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or match[1] == "neg_rights":
            raise deny("NW-X509-POLICY", f"{file} line {number} is not understood (access_id_CA, pos_rights, cond_subjects); correct the file")
        word, kind, value = match.groups()
        if word == "access_id_CA":
            entries.append((_unquote(value), []))
            signs = False
        elif word == "pos_rights":
            signs = kind == "globus" and value.strip("'\"") == "CA:sign"
        elif signs and kind == "globus" and entries:
            entries[-1][1].extend(_patterns(value))
    return entries


def _unquote(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _patterns(value: str) -> list[str]:
    inner = _unquote(value) if value.startswith("'") else value
    return [quoted or bare for quoted, bare in _PATTERN.findall(inner)]


def _matches(pattern: str, subject: str) -> bool:
    """``*`` any text, ``?`` one character, everything else literally. A file is trusted; its stars are few."""
    expression = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in modern(pattern))
    return re.fullmatch(expression, modern(subject), re.DOTALL) is not None
