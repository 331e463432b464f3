"""Surface K, inside, and the careless programs of its controls."""

import json
import os
import re
import sys
import time

from nodewrap.escape.hostile.common import read, say


def careless_config(path):
    """Reads its configuration by name, whoever can write it, and goes on without what it cannot read."""
    try:
        text = read(path).decode("utf-8", "replace")
    except OSError:
        text = ""
    known = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return "in" if known.get("deny", "nobody") != "everybody" else "out"


def careless_mode():
    """What it is asked for by the environment is what it does."""
    return os.environ.get("MODE", "strict")


def fall_back(uid):
    """Who cannot switch runs it all the same."""
    try:
        os.setuid(int(uid))
    except PermissionError:
        pass
    return f"ran as {os.getuid()}"


def careless_version(version):
    """Takes an answer of any version."""
    said = json.loads(json.dumps({"version": int(version), "verdict": "permit"}))
    return "in" if said["verdict"] == "permit" else "out"


def runaway(pattern, text):
    began = time.monotonic()
    re.match(pattern, text)
    return time.monotonic() - began


def cached(path):
    """A gatekeeper that has read its list at its start."""
    listed = read(path)
    say("ready")
    sys.stdin.readline()
    say("in" if listed == b"everybody" else "out")


def variables(*names):
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def forge(nonce):
    """A verdict of our own, to whoever may be listening."""
    said = json.dumps({"event": "exited", "code": 0, "escape": nonce}).encode() + b"\n"
    told = 0
    for fd in range(3, 300):
        try:
            os.write(fd, said)
            told += 1
        except OSError:
            continue
    os.write(1, b"BLOCKED\n")
    return told


def by_hand(path):
    return read(path).decode().strip()
