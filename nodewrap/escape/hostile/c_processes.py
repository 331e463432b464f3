"""Surface C, inside."""

import os
import signal
import time

from nodewrap.escape.hostile.common import read, say


def daemon(path):
    """Fork twice, leave the session, ignore what can be ignored, and write for ever."""
    if os.fork():
        os.wait()
        return "started"
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    for fd in (0, 1, 2):
        os.close(fd)
    while True:
        with open(path, "w") as file:
            file.write(str(time.monotonic()))
        time.sleep(0.01)


def victim():
    """A process of the pilot's with its secret open and in its working directory."""
    with open("secret"):
        say("ready")
        signal.pause()


def proc_files(pid):
    """What /proc tells of that process."""
    found = []
    for name in ("environ", "cmdline", "maps", "cwd/secret", f"root/proc/{pid}/cwd/secret", *(f"fd/{n}" for n in range(3, 10))):
        try:
            found.append(read(f"/proc/{pid}/{name}"))
        except OSError as wrong:
            found.append(type(wrong).__name__.encode())
    return b" ".join(found)
