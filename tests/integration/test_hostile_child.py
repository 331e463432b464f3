"""The policy child taken over by an attacker (I2, I3): its script is replaced. Nothing beyond the guard is given, and the record says so."""

from __future__ import annotations

import os
import resource
import shutil

import pytest

from nodewrap import wire

HEARD = """
import os, signal, socket, struct, time
s = socket.socket(fileno=3)
def frame():
    header = b""
    while len(header) < 8:
        header += s.recv(8 - len(header))
    left = struct.unpack("<II", header)[0]
    while left:
        left -= len(s.recv(left))
frame(), frame()
"""
MISBEHAVIOUR = {
    "it ends at once": "import os\nos._exit(0)",
    "it crashes": HEARD + "os.kill(os.getpid(), signal.SIGSEGV)",
    "it says nonsense": HEARD + "s.sendall(b'A' * 100)",
    "it announces 4 GiB": HEARD + "s.sendall(struct.pack('<II', 0xffffffff, 5))",
    "it ends in the middle of a frame": HEARD + "s.sendall(struct.pack('<II', 100, 5) + b'x')",
    "it kills the launcher": HEARD + "os.kill(os.getppid(), signal.SIGKILL)",
    "it opens the network": HEARD + "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "it writes a file": HEARD + "os.open('/tmp/x', os.O_CREAT | os.O_WRONLY)",
    "it starts a process": HEARD + "os.fork()",
}


@pytest.fixture
def hostile(setuid_node):
    """hostile(script): what comes of a run whose policy child is that script."""
    script = setuid_node.site.prefix / "libexec/nodewrap/serve.py"
    kept = script.with_name("kept.py")
    shutil.copy2(script, kept)

    def run(text):
        script.write_text(text)
        return setuid_node.sh("static", "id")

    yield run
    kept.rename(script)


def deciding(*fields):
    """A script that answers with a DECISION of those fields."""
    body = wire.pack(list(fields))
    return HEARD + f"s.sendall(struct.pack('<II', {len(body)}, 5) + {body!r})\ntime.sleep(1)"


def permit(mode, profile="strict", *more):
    return deciding((1, 1), (2, 1), (6, mode), (7, profile), (14, 9), *more)


def refused(ran, code):
    """An internal error, one line with that code, on record; nothing started."""
    assert (ran.rc, ran.out) == (202, b""), ran
    assert ran.err.startswith(f"nodewrap: {code}: ".encode()), ran
    assert ran.err.count(b"\n") == 1
    assert [record["event"]["action"] for record in ran.records] == ["error"]


@pytest.mark.parametrize("script", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_misbehaviour_of_the_child_is_an_internal_error(hostile, script):
    refused(hostile(script), "NW-CHILD")


def test_silence_of_the_child_ends_at_the_deadline(hostile, setuid_node):
    setuid_node.open_guard(deadline_ms="1500")
    ran = hostile(HEARD + "time.sleep(60)")
    refused(ran, "NW-CHILD")
    assert b"deadline" in ran.err
    assert 1.4 < ran.seconds < 10


@pytest.mark.parametrize("field", [
    (8, [(1, 0), (2, 0), (4, "root")]), (8, [(1, 1), (2, 1), (4, "daemon")]), "pilot", "gid 0", "group 0",
], ids=["root", "daemon", "the pilot", "gid 0", "supplementary group 0"])
def test_account_outside_the_guard_is_refused(hostile, setuid_node, field):
    pilot, user = setuid_node.pilot, setuid_node.site.accounts["user1"]
    made = {
        "pilot": (8, [(1, pilot.uid), (2, pilot.gid), (4, "x")]), "gid 0": (8, [(1, user.uid), (2, 0), (4, "x")]),
        "group 0": (8, [(1, user.uid), (2, user.gid), (3, 0), (4, "x")]),
    }
    refused(hostile(permit("switch", "strict", made.get(field, field) if isinstance(field, str) else field)), "NW-GUARD")


@pytest.mark.parametrize("block", [
    [(1, 0), (2, 0), (3, 1)], [(1, 1000), (2, 1000), (3, 1), (4, 0), (5, 1)], [(1, 1000), (2, 1000), (3, 1000000)], [(1, 70000), (2, 1), (3, 65536)],
], ids=["root inside", "ids of its own choice", "a million ids", "id outside the block"])
def test_ids_outside_the_guard_are_refused(hostile, block):
    refused(hostile(permit("map", "strict", (10, block))), "NW-GUARD")


def test_profile_or_mode_that_the_guard_does_not_allow_is_refused(hostile, setuid_node):
    setuid_node.open_guard(allow=["map strict"])
    for mode, profile in (("log-only", "strict"), ("map", "none"), ("map", "../strict")):
        refused(hostile(permit(mode, profile, (10, [(1, 1000), (2, 1000), (3, 1)])) if mode == "map" else permit(mode, profile)), "NW-GUARD")


def test_places_that_are_not_the_callers_are_refused(hostile):
    for tag in (11, 13):
        ran = hostile(permit("log-only", "strict", (tag, "/etc")))
        assert (ran.rc, ran.out) == (201, b"")
        assert b"NW-WORKDIR-OWNER" in ran.err


def test_fields_of_the_record_that_are_not_its_to_set_are_refused(hostile):
    for key in ("event.action", "nodewrap.mode", "user.id", "process.entity_id"):
        refused(hostile(permit("log-only", "strict", (23, [(1, key), (2, "x")]))), "NW-CHILD")


def written(path, mode):
    return permit("log-only", "strict", (22, [(1, path), (2, b"x"), (3, mode), (4, 0)]), (20, [(1, 4), (2, 0)]))


def test_file_that_it_wants_written_carries_no_rights_and_stays_in_the_payloads_view(hostile):
    refused(hostile(written("/tmp/x", 0o4755)), "NW-GUARD")
    ran = hostile(written("/etc/nodewrap-hostile", 0o600))
    assert ran.rc == 201, ran
    assert b"NW-FILE" in ran.err
    assert not os.path.exists("/etc/nodewrap-hostile")


@pytest.mark.parametrize("profile", ["batch", "none"])
def test_image_that_was_never_opened_is_not_shown(hostile, profile):
    refused(hostile(permit("log-only", profile, (29, 1))), "NW-CHILD")


@pytest.mark.parametrize("value", [(1 << 64) - 2, (1 << 64) - 1])
def test_endless_processor_time_stays_endless(hostile, value):
    """The grace that is added to the hard limit made it a few seconds, below the soft one."""
    ran = hostile(permit("log-only", "none", (19, 60000), (20, [(1, resource.RLIMIT_CPU), (2, value)])))
    assert (ran.rc, ran.err) == (0, b""), ran
