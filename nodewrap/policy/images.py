"""Images that a policy names, looked at when it is compiled (docs/apptainer.md). Root's slow path."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any

from nodewrap import apptainer


def suits(profile: dict[str, Any]) -> bool:
    """Can an unprivileged container be made in this profile?"""
    return {"mount", "pid"} <= set(profile.get("namespaces", ())) and bool(profile.get("nested_userns"))


def pin(path: str) -> tuple[str, dict[str, Any]]:
    """(where path really is, ``{"key", "sha256"}``): of a directory, which cannot be digested, the second is empty. Raises OSError."""
    real = os.path.realpath(path)
    if not stat.S_ISREG(os.stat(real).st_mode):
        return real, {}
    with open(real, "rb") as file:
        before, state = apptainer.key(file.fileno(), os.fstat(file.fileno())), hashlib.sha256()
        while part := file.read(1 << 20):
            state.update(part)
        after = apptainer.key(file.fileno(), os.fstat(file.fileno()))
    if before != after:
        raise OSError(0, "is being written")
    return real, {"key": after, "sha256": state.hexdigest()}
