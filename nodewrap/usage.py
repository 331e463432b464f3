"""What both request styles (``nodewrap run``, ``glexec``) check alike: words, paths, numbers, and the caller's mistakes (201).

Hot path: stdlib only, and of that nothing that costs an import.
"""

from nodewrap import model

#: PATH_MAX without the NUL (limits.h): the kernel takes no longer path.
PATH_BYTES = 4095

#: Free text that goes into every record of the run (``--job-id``, ``GLEXEC_ID``, ``--declare``): a record is one line of 4 KiB (docs/audit.md).
CLAIM_BYTES = 256


def mistake(code: str, text: str) -> model.Refusal:
    """The caller's mistake, to be raised: exit 201, code ``NW-USAGE-<code>``, one line of text."""
    return model.Refusal(201, "NW-USAGE-" + code, text)


def decode(raw: bytes) -> str:
    """Bytes of argv or environment as text that loses nothing: byte 0xNN that is not UTF-8 becomes U+DCNN (PEP 383)."""
    return raw.decode("utf-8", "surrogateescape")


def shown(value: str) -> str:
    """value for an error message: quoted, escaped by repr (control, bidi and stray bytes too), at most 80 characters of it."""
    return repr(value) if len(value) <= 80 else repr(value[:80]) + "…"


def lookup(env: list[bytes], name: bytes) -> "str | None":
    """Value of the first entry NAME=value, as getenv(3) finds it; None when there is none."""
    prefix = name + b"="
    for entry in env:
        if entry.startswith(prefix):
            return decode(entry[len(prefix):])
    return None


def path(where: str, value: str, cwd: bytes) -> str:
    """value as an absolute path without ``.``, ``..`` and doubled slashes; a relative one is taken from cwd, as the caller means it.

    ``..`` is refused, not resolved: by name it would mean something else than by the kernel when a component is a symbolic link.
    """
    full = value if value.startswith("/") else decode(cwd) + "/" + value
    if not value:
        raise mistake("PATH", f"{where} is empty; give an absolute path")
    if "\0" in value:
        raise mistake("PATH", f"{where}: {shown(value)} contains a NUL byte, which no path can")
    if not value.startswith("/") and not cwd.startswith(b"/"):
        raise mistake("PATH", f"{where}: {shown(value)} is relative and the current directory is not known; give an absolute path")
    parts = [part for part in full.split("/") if part not in ("", ".")]
    clean = "/" + "/".join(parts)
    if ".." in parts:
        raise mistake("PATH", f"{where}: {shown(value)} contains '..'; give the path without it (readlink -f)")
    if len(clean.encode("utf-8", "surrogateescape")) > PATH_BYTES:
        raise mistake("PATH", f"{where}: the path is longer than {PATH_BYTES} bytes; use a shorter one")
    return clean


def number(where: str, value: str, low: int, high: int) -> int:
    """value as a plain decimal between low and high: no sign, blank, leading zero, underscore or foreign digit (attack A35)."""
    plain = value.isascii() and value.isdigit() and len(value) <= 18 and (value == "0" or value[0] != "0")
    if not plain or not low <= int(value) <= high:
        raise mistake("NUMBER", f"{where}: {shown(value)} is not a plain decimal number from {low} to {high}")
    return int(value)


def claim(where: str, value: str) -> str:
    """value when it is 1 to CLAIM_BYTES bytes of printable UTF-8: what goes into the record as the pilot's word."""
    if not value or not value.isprintable():
        raise mistake("CLAIM", f"{where}: {shown(value)} must be printable UTF-8 text, not empty")
    if len(value.encode()) > CLAIM_BYTES:
        raise mistake("CLAIM", f"{where}: the text is longer than {CLAIM_BYTES} bytes; shorten it")
    return value
