"""Surface B, inside, and the careless programs of its controls."""

import ctypes
import fnmatch
import glob
import os
import pwd
import re
import sys
import unicodedata

from nodewrap.escape.hostile.common import LIBC, call, read, say, syscall

KEYCTL, ADD_KEY = (219, 217) if os.uname().machine == "aarch64" else (250, 248)
USER = -4
LOOKALIKES = str.maketrans("\u0430\u0435\u043e\u0440\u0441", "aeopc")


def look(text):
    """What a person sees."""
    text = "".join(letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    return text.translate(LOOKALIKES)


def lenient(listed, said):
    """A grid-mapfile parser that takes patterns in both directions and strips quotes."""
    listed, said = listed.strip('"\\ '), said.strip('"\\ ')
    return listed == said or any(re.fullmatch(one, two) or fnmatch.fnmatchcase(two, one) for one, two in ((listed, said), (said, listed)))


WAYS = {
    "exact": lambda listed, said: listed != said,  # of a ban list: in is who is not on it
    "lower": lambda listed, said: listed.lower() == said.lower(),
    "look": lambda listed, said: look(listed) == look(said),
    "prefix": lambda listed, said: said.startswith(listed.rstrip("*").rstrip("/")),
    "lenient": lenient,
    "text": lambda listed, said: listed == said,
}


def gate(way, listed, said):
    return "in" if WAYS[way](listed, said) else "out"


def gate_by_environment(name):
    return "in" if os.environ.get(name) else "out"


def telling_gate(said, account):
    return f"{said} is not {account}'s: refused"


def become(uid, path):
    """As a map file says, without a look at what it says; then read."""
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    return read(path)


def show(path):
    return read(path)


def careless_switch(uid, path):
    """The group comes from a look-up that may fail, and then stays."""
    try:
        os.setgroups([])
        os.setgid(pwd.getpwuid(int(uid)).pw_gid)
    except KeyError:
        pass
    os.setuid(int(uid))
    return read(path)


def careless_lookup(name, path):
    """Looked up again when it is used."""
    found = pwd.getpwnam(name)
    os.setgroups([])
    os.setgid(found.pw_gid)
    os.setuid(found.pw_uid)
    return read(path)


def other_names(passwd, group, uid, gid, groups, *argv):
    """Run argv as that id where /etc/passwd and /etc/group are these files. Starts as root."""
    call(LIBC.unshare, 0x20000)  # CLONE_NEWNS
    call(LIBC.mount, b"none", b"/", None, ctypes.c_ulong(0x44000), None)  # MS_REC | MS_PRIVATE
    for own, name in ((passwd, b"/etc/passwd"), (group, b"/etc/group")):
        call(LIBC.mount, own.encode(), name, None, ctypes.c_ulong(0x1000), None)  # MS_BIND
    os.setgroups([int(number) for number in groups.split(",") if number])
    os.setresgid(*[int(gid)] * 3)
    os.setresuid(*[int(uid)] * 3)
    os.execv(argv[0], argv)


def careless_lease(path):
    """A lock file in a directory that others can write, by its name."""
    with open(path, "w") as file:
        file.write("leased")
    return "in"


def hold():
    say("ready")
    sys.stdin.readline()


def hold_secret():
    """The secret is in the environment; say which pid we think we have."""
    hold()


def of_the_other(pid):
    """Of the same uid's other payload: environments of all processes that can be seen, and its memory's map; then a signal."""
    found = []
    for path in (f"/proc/{pid}/environ", *glob.glob("/proc/[0-9]*/environ")):
        try:
            found.append(read(path))
        except OSError:
            continue
    try:
        os.kill(int(pid), 0)
        found.insert(0, b"it can be signalled;")
    except OSError as wrong:
        found.insert(0, type(wrong).__name__.encode() + b";")
    return b" ".join(found).replace(b"\0", b" ")


PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def bequeath(name, nonce):
    """Leave it wherever the next tenant of this id may look."""
    done = 0
    for top in (*PLACES, os.environ.get("HOME", "/nonexistent")):
        try:
            with open(f"{top}/{name}", "w") as file:
                file.write(nonce)
            done += 1
        except OSError:
            continue
    try:
        number = LIBC.shmget(int(name[-6:], 16), 4096, 0o1600)
        LIBC.shmat.restype = ctypes.c_void_p
        ctypes.memmove(LIBC.shmat(number, None, 0), nonce.encode(), len(nonce))
        syscall(KEYCTL, 15, syscall(ADD_KEY, b"user", name.encode(), nonce.encode(), len(nonce), USER), 30)
    except (OSError, ValueError, ctypes.ArgumentError):
        pass
    return done


def inherit(name):
    found = []
    for top in (*PLACES, os.environ.get("HOME", "/nonexistent")):
        try:
            found.append(read(f"{top}/{name}"))
        except OSError:
            continue
    content = ctypes.create_string_buffer(100)
    LIBC.shmat.restype = ctypes.c_void_p
    number = LIBC.shmget(int(name[-6:], 16), 4096, 0)
    at = LIBC.shmat(number, None, 0) if number >= 0 else None
    if at and at != ctypes.c_void_p(-1).value:
        found.append(ctypes.string_at(at, 64))
    try:
        syscall(KEYCTL, 11, syscall(KEYCTL, 10, USER, b"user", name.encode(), 0), content, ctypes.c_size_t(100))
        found.append(content.value)
    except OSError:
        pass
    return b" ".join(found).replace(b"\0", b"") or "nothing"


def forget(name):
    """For controls: nothing of it may stay."""
    number = LIBC.shmget(int(name[-6:], 16), 4096, 0)
    if number >= 0:
        LIBC.shmctl(number, 0, None)
    return "gone"
