"""Which files make up the checkout: what git knows or would add; in an unpacked archive, everything but what make and Python leave behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
MADE = {"build", "__pycache__", ".hypothesis", ".git"}


def checkout_files():
    """Absolute paths of existing files."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode == 0:
        return [CHECKOUT / name for name in done.stdout.splitlines() if (CHECKOUT / name).is_file()]
    found = [path for path in CHECKOUT.rglob("*") if path.is_file() and not MADE & set(path.relative_to(CHECKOUT).parts)]
    return [path for path in found if not path.name.startswith("_core.")]
