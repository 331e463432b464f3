"""Doing something as another uid: in a child that has become it for good, so that whatever is touched is touched with its rights alone.

Processes of that uid may signal the child, stop it too; they may not trace it (it is not dumpable, ptrace(2)) unless it says dumpable().
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

PR_SET_DUMPABLE = 4
LIBC = ctypes.CDLL(None, use_errno=True)


def dumpable() -> None:
    """For the child, when no other process of its uid is alive: else its own /proc/self/fdinfo is root's (before Linux 5.14)."""
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def as_owner(uid: int, gid: int, work: Callable[[], Any], seconds: float | None = None) -> Any:
    """What work() returned (a JSON value) in a child of that uid and gid without other groups.

    Raises OSError when it could not do its work, or was not done after that many seconds: then it is killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(uid, gid, work, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        done = bool(select.select([pipe], [], [], seconds)[0])
        if not done:
            os.kill(child, signal.SIGKILL)
        said = pipe.read() if done else b""
    _, status = os.waitpid(child, 0)
    if status or not said:
        raise OSError(f"the process that became uid {uid} ended with {status}")
    return json.loads(said)


def _child(uid: int, gid: int, work: Callable[[], Any], writer: int) -> None:
    status = 1
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        if (os.getresuid(), os.getresgid()) != ((uid,) * 3, (gid,) * 3):  # an inherited filter said that it was done: work() would be root's
            raise PermissionError(f"not uid {uid} and gid {gid} after all")
        said = json.dumps(work()).encode()
        while said:
            said = said[os.write(writer, said):]
        status = 0
    except BaseException:  # noqa: BLE001  a forked child reports whatever went wrong, and ends
        traceback.print_exc()
    finally:
        os._exit(status)
