"""Doing something with another uid's rights alone: in a child that has its effective uid, and whose other ids are nobody's.

Processes of that uid can neither signal the child nor trace it: kill(2) asks for the real or saved uid, ptrace(2) for all three.
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
#: No caller, account or leased id (HIGHEST_ID of nodewrap/guard.py). Two, as kill(2) asks for the sender's real uid too: whoever ends an id's
#: processes with kill(-1) would else end who removes another id's files for a second sweep.
NOBODYS, KILLERS = 4294967294, 4294967293


class KilledError(OSError):
    """SIGKILL came before the work was done."""


def dumpable() -> None:
    """For the child: else its own /proc/self/fdinfo is root's (before Linux 5.14)."""
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def as_owner(uid: int, gid: int, work: Callable[[], Any], seconds: float | None = None, other: int = NOBODYS) -> Any:
    """What work() returned (a JSON value) in a child with that uid's and gid's rights, without other groups.

    other: its real and saved uid. Keys ask for the real one (keyrings(7)), so that is the owner's for them: processes of the uid may then signal the
    child, and it needs a bound in seconds. Raises OSError when it could not do its work, KilledError when it was killed, as it is after that many
    seconds.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(uid, gid, work, writer, other)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        done = bool(select.select([pipe], [], [], seconds)[0])
        if not done:
            os.kill(child, signal.SIGKILL)
        said = pipe.read() if done else b""
    _, status = os.waitpid(child, 0)
    if status == signal.SIGKILL:
        raise KilledError(f"the process that became uid {uid} was killed")
    if status or not said:
        raise OSError(f"the process that became uid {uid} ended with {status}")
    return json.loads(said)


def _child(uid: int, gid: int, work: Callable[[], Any], writer: int, other: int) -> None:
    status = 1
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(other, uid, other)
        if (os.getresuid(), os.getresgid()) != ((other, uid, other), (gid,) * 3):  # an inherited filter said that it was done: work() would be root's
            raise PermissionError(f"not uid {uid} and gid {gid} after all")
        said = json.dumps(work()).encode()
        while said:
            said = said[os.write(writer, said):]
        status = 0
    except BaseException:  # noqa: BLE001  a forked child reports whatever went wrong, and ends
        traceback.print_exc()
    finally:
        os._exit(status)
