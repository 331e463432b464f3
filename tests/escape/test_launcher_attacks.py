"""What a hostile caller, payload or policy child tried against the setuid launcher and got, once. Each was seen to work before it was closed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from nodewrap import wire
from tests.site import command

#: Exchanges two names for ever, and makes them anew when the launcher has removed one. argv: directory, file to link to or "", pause in s.
SWAP = """
import ctypes, os, sys, time
libc, where, victim, pause = ctypes.CDLL(None), *sys.argv[1:3], float(sys.argv[3])
os.chdir(where)
print("ready", flush=True)
while True:
    if libc.renameat2(-100, b"a", -100, b"b", 2) and victim:
        for name in ("a", "b"):
            if os.path.lexists(name):
                os.unlink(name)
        try:
            open("a", "w").close()
            os.link(victim, "b")
        except OSError:
            continue
    time.sleep(pause) if pause else None
"""


@contextlib.contextmanager
def as_pilot(node, code, *words):
    """A process of the pilot's beside the run."""
    process = node.site.start(["/usr/bin/python3", "-I", "-c", code, *words], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def owned(path, account):
    path.mkdir()
    os.chown(path, account.uid, account.gid)
    return path


# ---- a caller against the node ----


def test_stopped_launcher_keeps_no_other_run_waiting(setuid_node):
    """SIGSTOP is the caller's right (its real uid is the launcher's); with the log's lock held it hung every run of the node within 24 tries."""
    argv = setuid_node.argv("nobody", ["/bin/true"], "none")  # a denial: its record is synced, which takes longest
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(40):
        first = setuid_node.site.start(argv, **quiet)
        time.sleep(random.uniform(0, 0.04))
        first.send_signal(signal.SIGSTOP)
        try:
            assert setuid_node.run("log-only", "/bin/true", profile="none", timeout=20).rc == 0
        finally:
            first.send_signal(signal.SIGCONT)
            assert first.wait(20) == 203


def test_full_status_pipe_does_not_keep_a_run_beyond_its_limit(setuid_node):
    """The line would be waited for with the payload running: past its wall limit, and past the death of the front."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        options = ["--status-fd", str(writer), "--wall", "1s"]
        ran = setuid_node.run("static", "/bin/sleep", "60", options=options, fds=(writer,), timeout=20)
        assert ran.rc != 0
        assert ran.record("exit")["process"]["ended_by"] == "wall"
    finally:
        os.close(reader)
        os.close(writer)


def test_chown_walk_changes_only_what_it_has_examined(setuid_node, home):
    """Between fstatat(2) and fchownat(2) the pilot put a hard link to root's file under the name: it belonged to the pilot after 7 runs."""
    top, victim = owned(home / "race", setuid_node.pilot), home / "victim"
    victim.write_text("root's")
    victim.chmod(0o666)  # so that protected_hardlinks lets the pilot link it
    try:
        with as_pilot(setuid_node, SWAP, str(top), str(victim), "0"):
            for _ in range(30):
                ran = setuid_node.run("static", "/bin/true", profile="none", options=["--workdir", str(top)])
                assert ran.record("start")["nodewrap"]["isolation"]["workdir"] == "chown", ran
                assert victim.stat().st_uid == 0
    finally:
        shutil.rmtree(top)
        victim.unlink()


def test_payload_begins_in_the_leased_directory_whatever_its_name_leads_to_now(setuid_node, home):
    """Entered by name with root's rights, a link led to a readable directory below one that only root may pass: 15 of 40 runs read it."""
    top, private = owned(home / "w", setuid_node.pilot), home / "private"
    (private / "open").mkdir(parents=True)
    (private / "open/data").write_text("topsecret")
    private.chmod(0o700)
    owned(top / "a", setuid_node.pilot)
    (top / "b").symlink_to(private / "open")
    read = 0
    try:
        with as_pilot(setuid_node, SWAP, str(top), "", "0.003"):
            for _ in range(40):
                ran = setuid_node.run("static", "/bin/cat", "./data", profile="none", options=["--workdir", str(top / "a")])
                read += b"topsecret" in ran.out
                assert ran.rc in (1, 201), ran  # no such file in the right directory; or refused
        assert read == 0
    finally:
        shutil.rmtree(top)
        shutil.rmtree(private)


#: Takes a directory away and brings it back for ever; what was made in its place meanwhile is kept. argv: its path.
BLINK = """
import ctypes, os, sys, time
libc, path = ctypes.CDLL(None), sys.argv[1].encode()
print("ready", flush=True)
while True:
    os.rename(path, path + b"-away")
    time.sleep(0.002)
    while libc.renameat2(-100, path + b"-away", -100, path, 1):  # RENAME_NOREPLACE
        os.rename(path, path + b"-%d" % time.monotonic_ns())
    time.sleep(0.002)
"""


def test_nothing_of_roots_is_made_in_a_directory_of_the_pilots(setuid_node, home):
    """Its work directory below an exposed one was away for a moment: root made another one there."""
    top = owned(home / "top", setuid_node.pilot)
    work = owned(top / "w", setuid_node.pilot)
    options = ["--expose", str(top), "--workdir", str(work)]
    codes = set()
    try:
        assert setuid_node.run("log-only", "/bin/true", options=options).rc == 0
        with as_pilot(setuid_node, BLINK, str(work)):
            for _ in range(25):
                codes.add(setuid_node.run("log-only", "/bin/true", options=options).rc)
        owners = {path.stat().st_uid for path in top.iterdir()}
        assert owners == {setuid_node.pilot.uid}
        assert codes & {201, 202}, "it was away at the right moment, once at least"
    finally:
        shutil.rmtree(top)


# ---- a payload against what comes after it ----


def test_links_out_of_a_directory_on_overlayfs_do_not_come_back(setuid_node, home):
    """There an offset counts the entries that are left: after removals the walk came back to the wrong place and missed 156 of 400 links."""
    layers = {name: home / name for name in ("lower", "upper", "work", "merged")}
    for path in layers.values():
        path.mkdir()
    owned(layers["lower"] / "w", setuid_node.pilot)
    options = f"lowerdir={layers['lower']},upperdir={layers['upper']},workdir={layers['work']}"
    command("mount", "-t", "overlay", "none", "-o", options, layers["merged"])
    try:
        top = layers["merged"] / "w"
        script = 'cd "$1" && for i in $(seq 100); do ln -s /etc/passwd l$i; mkdir d$i; ln -s /etc d$i/m; ln -s /etc m$i; done'
        for kind, profile in (("static", "none"), ("log-only", "none"), ("static", "batch")):
            ran = setuid_node.sh(kind, script, str(top), profile=profile, options=["--workdir", str(top)])
            assert ran.rc == 0, ran
            assert [path for path in top.rglob("*") if path.is_symlink()] == []
            assert sum(1 for _ in top.rglob("*")) == 100
            assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["symlinks"] == 300
            for path in top.iterdir():
                path.rmdir()
    finally:
        command("umount", layers["merged"])
        for path in layers.values():
            shutil.rmtree(path)


def test_pipe_end_sent_out_of_the_namespace_does_not_keep_the_launcher(setuid_node, home):
    """The launcher read its relay until the end of file, which never came while an accomplice outside held the payload's stdout."""
    top, kept = owned(home / "w", setuid_node.pilot), []
    code = """
import array, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
print("all of it", flush=True)
"""
    with socket.socket(socket.AF_UNIX) as listener, open(home / "out", "wb") as out:
        listener.bind(str(top / "s"))
        os.chown(top / "s", setuid_node.pilot.uid, setuid_node.pilot.gid)
        listener.listen()
        listener.settimeout(20)

        def accomplice():
            with listener.accept()[0] as peer:
                kept.extend(socket.recv_fds(peer, 10, 4)[1])

        thread = threading.Thread(target=accomplice)
        thread.start()
        argv = setuid_node.argv("static", ["/usr/bin/python3", "-I", "-c", code, str(top / "s")], "batch", ["--workdir", str(top)])
        process = setuid_node.site.start(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE)
        try:
            assert (process.communicate(timeout=20)[1], process.returncode) == (b"", 0)
            thread.join()
            assert len(kept) == 1
            assert (home / "out").read_text() == "all of it\n"
        finally:
            process.kill()
            for fd in kept:
                os.close(fd)
    shutil.rmtree(top)
    (home / "out").unlink()


# ---- a policy child that an attacker has taken over (I2) ----


@pytest.fixture
def deciding(setuid_node):
    """deciding(*fields, command): run with a policy child that answers with a DECISION of those fields, whatever it is asked."""
    script = setuid_node.site.prefix / "libexec/nodewrap/serve.py"
    kept = script.with_name("kept.py")
    shutil.copy2(script, kept)

    def run(*fields, options=(), fds=()):
        body = wire.pack(list(fields))
        frame = len(body).to_bytes(4, "little") + (5).to_bytes(4, "little") + body
        script.write_text(f"import socket, time\ns = socket.socket(fileno=3)\ns.sendall({frame!r})\nwhile s.recv(65536): pass\n")
        return setuid_node.run("static", "/bin/ls", "-A", options=options, fds=fds)

    yield run
    kept.rename(script)


@pytest.mark.parametrize("fields", [
    [(1, 1), (2, 1), (6, "switch"), (99, b"")], [(1, 1), (2, 1), (7, "strict"), (6, "nonsense")], [(1, 1), (2, 1), (6, "switch")],
    [(1, 1), (2, 2), (23, [(1, "note"), (2, "x")]), (23, [(2, "x")])],
], ids=["permit without a profile, then an unknown field", "unknown mode", "no profile at all", "half a fact"])
def test_broken_decision_is_an_internal_error_on_record_and_crashes_nothing(deciding, fields):
    """The error's record was made from what had been read so far: a null profile, a mode beyond the table, a fact without a key."""
    ran = deciding(*fields)
    assert (ran.rc, ran.out) == (202, b""), ran
    assert ran.record("error")["event"]["code"] == "NW-CHILD"


def test_denial_with_a_bad_status_descriptor_stays_a_denial(deciding):
    """It was recorded as the caller's mistake: a banned user could hide its attempts."""
    ran = deciding((1, 1), (2, 2), (4, "NW-BAN"), (5, "banned"), (21, 99))
    assert ran.rc == 203
    assert ran.record("deny")["event"]["code"] == "NW-BAN"


def test_home_that_is_not_the_accounts_is_not_shown(deciding, setuid_node, home):
    """Named as home, any directory of the node was mounted in the payload's view, writable, whatever the profile hides."""
    user = setuid_node.site.accounts["user1"]
    (home / "inside").mkdir(mode=0o755)
    own = owned(home / "own", user)
    shown = {}
    for path in (home / "inside", own):
        account = [(1, user.uid), (2, user.gid), (4, user.name), (5, str(path))]
        first = len(setuid_node.argv("static", [])) - 1  # argv begins with the launcher
        ran = deciding((1, 1), (2, 1), (6, "switch"), (7, "compat"), (8, account), (12, str(path)), (14, first + 1))
        shown[path.name] = ran.rc
    assert shown == {"inside": 201, "own": 0}, "its own is entered; the other one is not there to be entered"
    shutil.rmtree(own)
    (home / "inside").rmdir()
