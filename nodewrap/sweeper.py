"""Calling ``nodewrap-sweep`` (csrc/sweep.c), which alone finishes dead runs, and reading what it says."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from nodewrap import _paths
from nodewrap.live import SiteError

STATES = ("live", "swept", "left", "broken", "forgotten")


def sweep(run: str = "", forget: str = "") -> list[dict[str, Any]]:
    """Finish dead runs, or one, or remove the lease of one. Returns what became of each lease: ``run``, ``state`` (of STATES), ``code``, ``text``.

    Raises SiteError when the program cannot be called, or says that it could not do its work.
    """
    path = f"{_paths.LIBEXEC}/nodewrap-sweep"
    argv = [path, *(["--run", run] if run else []), *(["--forget", forget] if forget else [])]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as wrong:
        raise SiteError("NW-SWEEP", f"{path}: {wrong.strerror}; install it again (make install)") from None
    found = [_line(line) for line in done.stdout.splitlines()]
    if done.returncode not in (0, 1):
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        code, _, text = said.removeprefix("nodewrap: ").partition(": ")
        known = code.startswith("NW-") and text
        raise SiteError(code if known else "NW-SWEEP", text if known else f"{path} ended with {done.returncode}: {said[:300]}")
    return found


def _line(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    if not isinstance(said, dict) or said.get("state") not in STATES or not isinstance(said.get("run"), str):
        raise SiteError("NW-SWEEP", f"nodewrap-sweep says {line[:100]!r}, which this version does not know; install both from one version")
    return {"run": said["run"], "state": said["state"], "code": str(said.get("code", "")), "text": str(said.get("text", ""))}
