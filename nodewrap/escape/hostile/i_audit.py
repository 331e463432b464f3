"""Surface I, inside, and the careless loggers of its controls."""

import json
import os
import sys
import time

from nodewrap.escape.hostile.common import read, say


def careless_log(path, action, *words):
    """Text into a line, as it is."""
    with open(path, "ab", buffering=0) as log:
        log.write(b'{"action": "%s", "args": "%s"}\n' % (action.encode(), " ".join(words).encode("utf-8", "surrogateescape")))
    return "in"


def careless_run(path):
    """A start in the log, no end until it ends; what it cannot write it leaves out."""
    careless_try(path, '{"action": "start"}\n')
    say("ready")
    sys.stdin.readline()
    careless_try(path, '{"action": "exit"}\n')


def careless_try(path, text):
    try:
        with open(path, "a") as log:
            log.write(text)
            log.flush()
            os.fsync(log.fileno())
    except OSError:
        pass
    return "in"


def careless_pieces(path, letter, size):
    """A record larger than one write."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for _ in range(20):
        for piece in range(8):
            os.write(fd, letter.encode() * (int(size) // 8) + (b"\n" if piece == 7 else b""))
            time.sleep(0)


def mark(path, nonce):
    """Change it without a change to what stands in it: only who may write to it can."""
    os.setxattr(path, "user.nodewrap-escape", nonce.encode())
    return "marked"


def find(path):
    return read(path)


def hold():
    say("ready")
    sys.stdin.readline()


def careless_end(path):
    """Says that all is clean, and does not look."""
    os.makedirs("kept", exist_ok=True)
    careless_try(path, json.dumps({"action": "cleanup", "left": 0}) + "\n")
    return "in"


def keep_something(path):
    """In a directory that cannot be emptied."""
    with open(path, "w") as file:
        file.write("kept")
    os.symlink("/etc/passwd", f"{path}-link")
    return "kept"
