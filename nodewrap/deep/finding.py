"""One thing that belongs to a leasable id without a lease."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Finding:
    """kind: process, file, ipc, queue, key, linger. what: pid, path or id. since: seconds since 1970 when it was made or last written, 0: unknown.

    mark: what tells it from another thing under the same name (start time, inode). entries: of a tree. left: why it is still there.
    """

    kind: str
    uid: int
    what: str
    since: float = 0.0
    detail: str = ""
    mark: str = ""
    root: str = ""
    entries: int = 1
    removed: bool = False
    left: str = ""

    def as_dict(self, owner: str) -> dict[str, Any]:
        """As `--json` prints it; age in seconds, null when it is not known."""
        told = {key: value for key, value in asdict(self).items() if key not in ("since", "mark", "root")}
        return {**told, "owner": owner, "age": round(max(0.0, time.time() - self.since), 1) if self.since else None}
