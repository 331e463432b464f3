"""C: processes. What survives, what hides, what reaches the pilot's."""

from __future__ import annotations

from nodewrap.escape.arena import Arena
from nodewrap.escape.model import SAME_ID_BARE, Seen, attack


@attack("C01", "end of the pid namespace; cgroup.kill; sweep of the uid")
def double_forked_daemon(arena: Arena) -> Seen:
    """The daemon touches a file of its work directory again and again: it is alive while that file changes."""
    ran = arena.payload("c_processes", "daemon", "beat")
    beat = arena.work / "beat"

    def is_alive() -> bool:
        now = beat.stat().st_mtime_ns if beat.exists() else 0
        return arena.until(lambda: beat.exists() and beat.stat().st_mtime_ns > now, 0.3)

    alive = is_alive()
    return Seen(alive, f"the daemon still writes after the payload's end ({ran.line})" if alive else f"it writes no more ({ran.line})")


@attack("C13", "pid namespace; other uid or not dumpable", accepted=(SAME_ID_BARE,))
def proc_of_the_pilot(arena: Arena) -> Seen:
    """The nonce is in the victim's environment, arguments' tail, working directory and an open file."""
    arena.secret(arena.mkdir(arena.home / "cwd") / "secret")
    victim = arena.accomplice("c_processes", "victim", cwd=arena.home / "cwd", wait=True)
    return arena.has_nonce(arena.payload("c_processes", "proc_files", victim.process.pid))
