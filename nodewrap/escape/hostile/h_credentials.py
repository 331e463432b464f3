"""Surface H, inside, and the careless programs of its controls."""

import base64
import os
import re
import signal
import sys
import time

from nodewrap.escape.hostile.common import read, say, syscall

KEYCTL, ADD_KEY = (219, 217) if os.uname().machine == "aarch64" else (250, 248)
SESSION, USER = -3, -4


def blocks(path):
    return [base64.b64decode(block) for block in re.findall(rb"-----BEGIN CERTIFICATE-----([^-]*)-----END", read(path))]


def believe(path):
    """A gatekeeper that believes a credential file: whose organisation's name is written in a certificate of it is let in."""
    return "in" if any(b"example" in der for der in blocks(path)) else "out"


def ban_of_leaf(banned, name):
    return "out" if name == banned else "in"


def local_time(over):
    """Reads a time of UTC as one of ours."""
    return "in" if time.mktime(time.strptime(over, "%Y%m%d%H%M%S")) > time.time() else "out"


def trusting_parser(path):
    """Walks DER as it says that it is."""
    for der in blocks(path):
        walk(der, 0, len(der))
    return "parsed"


def walk(der, at, end):
    while at < end:
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            many = size & 0x7F
            size, at = int.from_bytes(der[at:at + many], "big"), at + many
        if tag & 0x20:
            walk(der, at, at + size)
        elif len(der[at:at + size]) != size:
            os.abort()  # what a C parser does that reads on
        at += size


def check_then_copy(path):
    """The check opens the name, and the copy opens it again."""
    end, number = time.monotonic() + 5, 0
    while time.monotonic() < end:
        number += 1
        checked, copied = read(path), read(path)
        if checked != copied:
            return f"other than what was checked, at try {number}"
    return f"always the same, {number} tries"


def take_turns(name, *files):
    content = [read(file) for file in files]
    number = 0
    while True:
        spare = f"{name}.new"
        fd = os.open(spare, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.write(fd, content[number % len(content)])
        os.close(fd)
        os.rename(spare, name)
        if number == 0:
            say("ready")
        number += 1
        time.sleep(0.0002)


def find_credentials(*paths):
    found = []
    for path in (*paths, os.environ.get("X509_USER_PROXY", ""), os.environ.get("BEARER_TOKEN_FILE", "")):
        try:
            found.append(read(path))
        except OSError as wrong:
            found.append(type(wrong).__name__.encode())
    return b" ".join([*found, read("/proc/self/environ")]).replace(b"\0", b" ")


def leave(nonce, *paths):
    made = []
    for path in paths:
        with open(path, "w") as file:
            file.write(nonce)
        made.append(path)
    return len(made)


def hold(nonce, path):
    leave(nonce, path)
    say("ready")
    sys.stdin.readline()


def remember(path):
    """A wrapper that keeps what it has read."""
    kept = read(path)
    say("ready")
    sys.stdin.readline()
    return len(kept)


def hold_key(name, nonce):
    """In the user's keyring, until our end: the key expires by itself if we cannot take it away."""
    number = syscall(ADD_KEY, b"user", name.encode(), nonce.encode(), len(nonce), USER)
    syscall(KEYCTL, 15, number, 30)  # KEYCTL_SET_TIMEOUT
    say("ready")
    signal.pause()


def find_key(name):
    import ctypes
    found = []
    for ring in (SESSION, USER):
        try:
            if ring == USER:
                syscall(KEYCTL, 8, USER, SESSION)  # KEYCTL_LINK: possession
            number = syscall(KEYCTL, 10, ring, b"user", name.encode(), 0)
            content = ctypes.create_string_buffer(100)
            syscall(KEYCTL, 11, number, content, ctypes.c_size_t(100))
            found.append(content.value)
        except OSError as wrong:
            found.append(str(wrong).encode())
    return b" ".join(found)
