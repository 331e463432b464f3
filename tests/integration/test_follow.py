"""Places that follow the host's mounts (/cvmfs): what is mounted there while the payload runs, by hand or by the kernel's automounter, appears."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from nodewrap.doctor.probe import landlock_abi
from tests.need import need

OWN = """
[profile.strict]
add = {{ follow = ["{place}"] }}

[profile.batch]
add = {{ follow = ["{place}?"], read_only = ["{still}"] }}
"""
#: Tells that it runs, waits for a line, and says what is in that file and whether it can be written; so long as there are lines.
SHELL = 'echo ready; while read path; do cat "$path" 2>/dev/null || echo none; (echo there >"$path") 2>/dev/null && echo yes || echo no; done; exit 0'
MS_SHARED, MS_PRIVATE, MS_BIND = 1 << 20, 1 << 18, 4096
AUTOFS_READY, MISSING_INDIRECT, PACKET = 0x9360, 3, 304  # linux/auto_fs.h


def mount(source, target, kind, flags=0, options=None):
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [os.fsencode(word) if word is not None else None for word in (source, target, kind)]
    if libc.mount(*encoded, ctypes.c_ulong(flags), options and options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


@pytest.fixture
def place(node, home):
    """A directory whose mounts are shared, as systemd makes the root's; and one that is not followed."""
    need("root")
    top = home / "follow"
    for path in (top / "cvmfs", top / "still"):
        path.mkdir(parents=True)
    try:
        mount(top, top, None, MS_BIND)
        mount(None, top, None, MS_PRIVATE)  # else, below a shared root, what is mounted in it is mounted below it too
        mount(None, top, None, MS_SHARED)
        node.site.policy(node.policy_text() + OWN.format(place=top / "cvmfs", still=top / "still"))
        yield top
    finally:
        node.open_policy()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith(str(top)):
                subprocess.run(["umount", "-l", line.split()[4]], check=True)
        subprocess.run(["rm", "-rf", top], check=True)


@pytest.fixture
def start(node):
    """Starts a payload of that profile. One that waits for a mount that never comes is ended, and says nothing more."""
    timers = []

    def started(profile):
        live = node.start("log-only", "/bin/sh", "-c", SHELL, profile=profile)
        timers.append(threading.Timer(20, live.process.kill))
        timers[-1].start()
        assert live.process.stdout.readline() == b"ready\n"
        return live

    yield started
    for timer in timers:
        timer.cancel()


def ask(live, path):
    live.process.stdin.write(os.fsencode(path) + b"\n")
    live.process.stdin.flush()
    return [live.process.stdout.readline().decode().strip() for _ in range(2)]


@pytest.mark.parametrize("profile", ["strict", "batch"])
def test_a_mount_made_later_on_the_host_appears_and_goes_with_it(start, place, profile):
    later, still = place / "cvmfs/later", place / "still/later"
    later.mkdir()
    still.mkdir()
    live = start(profile)
    assert ask(live, later / "file") == ["none", "no"]
    for path in (later, still):
        mount("nwtest", path, "tmpfs", 0, "mode=0755")
        (path / "file").write_text("there\n")
    assert ask(live, later / "file") == ["there", "no"]
    assert ask(live, still / "file") == ["none", "no"]
    subprocess.run(["umount", later], check=True)
    assert ask(live, later / "file") == ["none", "no"]
    assert live.end()[:2] == (0, b"")


@pytest.mark.skipif(landlock_abi() < 2, reason="needs Landlock ABI 2")
def test_what_is_mounted_later_is_the_hosts_to_protect_and_in_strict_landlocks_too(start, place):
    later = place / "cvmfs/later"
    later.mkdir()
    for profile, written in (("batch", "yes"), ("strict", "no")):
        live = start(profile)
        mount("nwtest", later, "tmpfs", 0, "mode=0777")
        (later / "file").write_text("there\n")
        (later / "file").chmod(0o666)
        assert ask(live, later / "file") == ["there", written]
        assert live.end()[:2] == (0, b"")
        subprocess.run(["umount", later], check=True)


def automount(place, writing):
    """The automounter of place: whatever name is asked for is a file system with that name in it (autofs.rst, protocol 5). It ends with the test, and
    then look-ups fail."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.setpgid(0, 0)
    reader, writer = os.pipe()
    mount("nwtest", place, "autofs", 0, f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,indirect")
    top = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    os.write(writing, b"1")
    while packet := os.read(reader, PACKET):
        _, kind, token = struct.unpack_from("=iiI", packet)
        name = packet[44:].split(b"\0")[0].decode()
        assert kind == MISSING_INDIRECT
        (place / name).mkdir()
        mount("nwtest", place / name, "tmpfs", 0, "mode=0755")
        (place / name / "file").write_text(f"{name}\n")
        fcntl.ioctl(top, AUTOFS_READY, token)


def test_the_automounter_is_asked_by_the_payload_and_its_mount_appears(start, place):
    if "autofs" not in Path("/proc/filesystems").read_text():
        pytest.skip("needs autofs in the kernel")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            automount(place / "cvmfs", writer)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"1", "the automounter did not start"
        live = start("strict")
        assert ask(live, place / "cvmfs/atlas.example.org/file") == ["atlas.example.org", "no"]
        assert ask(live, place / "cvmfs/cms.example.org/file") == ["cms.example.org", "no"]
        assert live.end()[:2] == (0, b"")
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
