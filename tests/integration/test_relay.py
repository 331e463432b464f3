"""Files as the payload's stdin, stdout and stderr: the launcher carries the bytes, exactly, and nothing of the pilot's changes by it (I14)."""

from __future__ import annotations

import array
import fcntl
import hashlib
import os
import random
import select
import socket
import subprocess
import threading
import time

import pytest

from tests.fusefs import FuseFs
from tests.need import need
from tests.node import status_of, until

PIPE, WIDE = 64 << 10, 256 << 10
#: Around what a pipe holds, before and after it was widened.
SIZES = [0, 1, 4095, 4096, 4097, PIPE - 1, PIPE, PIPE + 1, WIDE - 1, WIDE, WIDE + 1, PIPE + WIDE, 3 * WIDE + 12345]
#: Writes its stdin to its stdout in pieces of 1 to 9,000 bytes.
PIECES = "import os, random\nrandom.seed(7)\nwhile data := os.read(0, random.randint(1, 9000)):\n    assert os.write(1, data) == len(data)"
#: Sends its stdout out of its namespaces, to a socket at the path given, and ends.
SEND_OUT = """
import array, os, socket, sys
os.write(1, b"before\\n")
out = socket.socket(socket.AF_UNIX)
out.connect(sys.argv[1])
out.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
"""


def python(code, *words):
    return ("/usr/bin/python3", "-I", "-c", code, *words)


def carried(node, command, source, target, mode="wb", kind="map", profile="batch", **more):
    """Exit status and stderr of a payload between two files."""
    with open(source, "rb") as stdin, open(target, mode) as stdout:
        process = node.site.start(node.argv(kind, command, profile, **more), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("mode", ["wb", "ab"], ids=["spliced", "appended"])
def test_every_size_passes_unchanged_in_one_piece_and_in_many(node, tmp_path, mode):
    """An appending target takes no splice(2): what is under way then goes by write(2)."""
    source, target = tmp_path / "in", tmp_path / "out"
    rest = random.Random(3)
    for size, command in [(size, ["/bin/cat"]) for size in SIZES] + [(SIZES[-1], python(PIECES))]:
        data = rest.randbytes(size)
        source.write_bytes(data)
        target.write_bytes(b"")
        assert carried(node, command, source, target, mode) == (0, b"")
        assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(data).digest(), size


def test_pilot_may_make_its_file_appending_while_much_is_under_way(node, tmp_path):
    """Flags belong to the open file, which the pilot shares: splice(2) is refused from then on (EINVAL), with bytes in the launcher's own pipe."""
    target = tmp_path / "out"
    code = "import os\nblock = bytes(range(256)) * 1024\nfor i in range(400):\n    os.write(1, block)"
    with open(target, "wb") as stdout:
        process = node.site.start(node.argv("map", python(code)), stdin=subprocess.DEVNULL, stdout=stdout)
        until(lambda: target.stat().st_size > WIDE, "it writes")
        while process.poll() is None:
            for flags in (os.O_APPEND, 0):
                fcntl.fcntl(stdout, fcntl.F_SETFL, flags)
                time.sleep(0.001)
        assert process.returncode == 0
    assert target.read_bytes() == bytes(range(256)) * 1024 * 400


@pytest.mark.parametrize(("want", "size"), [(0, 5000), (1000, 5000), (1000, 10 << 20), (100000, 10 << 20), (5000, 5000)])
def test_file_as_stdin_is_left_where_the_payload_stopped_reading(node, tmp_path, want, size):
    """As if it had had the file itself: a shell's `{ nodewrap run -- head -n 1; cat; } <list` goes on with the second line."""
    source = tmp_path / "in"
    source.write_bytes(bytes(size))
    code = f"import os\nn = {want}\nwhile n:\n    n -= len(os.read(0, n))"
    with open(source, "rb") as stdin:
        process = node.site.start(node.argv("map", python(code)), stdin=stdin, stdout=subprocess.DEVNULL)
        assert process.wait(30) == 0
        assert os.lseek(stdin.fileno(), 0, os.SEEK_CUR) == want


def test_flags_of_the_pilots_open_files_stay_as_they_are(node, tmp_path):
    (tmp_path / "in").write_bytes(bytes(1 << 20))
    pipe = os.pipe()
    with open(tmp_path / "in", "rb") as stdin, open(tmp_path / "out", "ab") as stdout:
        descriptors = (stdin.fileno(), stdout.fileno(), pipe[1])
        before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in descriptors]
        process = node.site.start(node.argv("map", ["/bin/sh", "-c", "head -c 100; read -r x"]), stdin=stdin, stdout=stdout, stderr=pipe[1])
        seen = set()
        over = False
        while not over:
            over = process.poll() is not None
            seen.add(tuple(fcntl.fcntl(fd, fcntl.F_GETFL) for fd in descriptors))
            time.sleep(0.001)
    os.close(pipe[0])
    os.close(pipe[1])
    assert seen == {tuple(before)}


def test_output_that_the_file_does_not_take_is_an_error_of_the_runs(node, tmp_path):
    """The payload writes into a pipe and cannot be told: then its pilot is, and does not take the file for whole."""
    with open("/dev/full", "wb") as full:
        process = node.site.start(node.argv("map", ["/bin/echo", "lost"]), stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 202
    assert err.startswith(b"nodewrap: NW-STDIO: the payload's stdout could not be written to its end: No space left on device")
    assert err.count(b"\n") == 1
    most = 96 << 20  # more than the log of these tests, for which the limit holds too
    with open(tmp_path / "small", "wb") as small:
        command = ["/usr/bin/head", "-c", str(most + 10000), "/dev/zero"]
        limited = ["/usr/bin/prlimit", f"--fsize={most}", "--", *map(str, node.argv("map", command))]
        process = node.site.start(limited, stdin=subprocess.DEVNULL, stdout=small, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, b"NW-STDIO" in err, (tmp_path / "small").stat().st_size) == (202, True, most)
    (tmp_path / "small").unlink()


def test_stdin_that_is_a_directory_is_nobodys_error(node, tmp_path):
    stdin = os.open(tmp_path, os.O_RDONLY)
    process = node.site.start(node.argv("map", ["/bin/cat"]), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(stdin)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 0


def test_who_has_got_the_payloads_pipe_does_not_keep_the_launcher(setuid_node, home, tmp_path):
    """Out of its namespaces by a socket in a directory that it was shown: nothing that its holder writes later arrives."""
    place, target = home / "rendezvous", tmp_path / "out"
    place.mkdir()
    os.chown(place, setuid_node.pilot.uid, setuid_node.pilot.gid)
    with socket.socket(socket.AF_UNIX) as listener, open(target, "wb") as stdout:
        listener.bind(str(place / "socket"))
        os.chown(place / "socket", setuid_node.pilot.uid, setuid_node.pilot.gid)
        listener.listen()
        argv = setuid_node.argv("map", python(SEND_OUT, str(place / "socket")), options=["--expose", str(place)])
        process = setuid_node.site.start(argv, stdin=subprocess.DEVNULL, stdout=stdout)
        listener.settimeout(20)
        connection, _ = listener.accept()
        with connection:
            fds = array.array("i")
            _, control, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4))
            fds.frombytes(control[0][2])
            began = time.monotonic()
            os.set_blocking(fds[0], False)
            while process.poll() is None and time.monotonic() - began < 20:
                try:
                    os.write(fds[0], b"after\n")
                except BlockingIOError:
                    time.sleep(0.001)
                except BrokenPipeError:
                    break
            assert process.wait(20) == 0
            os.close(fds[0])
    (place / "socket").unlink()
    place.rmdir()
    assert target.read_text().startswith("before\n")


def test_file_system_that_hangs_does_not_keep_the_payload_from_being_killed(setuid_node, tmp_path_factory):
    """splice(2) from its pipe into such a file would hold the pipe's lock, for which a writer waits without heeding SIGKILL."""
    need("root", "fuse")
    place = tmp_path_factory.mktemp("fuse")
    fs = FuseFs(place, setuid_node.pilot.uid, setuid_node.pilot.gid)
    before = setuid_node.site.audit_size()
    try:
        with open(place / "log", "wb") as stdout:
            fs.tell(hold="write")
            argv = setuid_node.argv("map", ["/usr/bin/yes"], options=["--wall", "1s"])
            process = setuid_node.site.start(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)
            until(lambda: "cleanup" in setuid_node.actions(before), "it was ended at its wall limit", 15)
            (record,) = [record for record in setuid_node.site.records(before) if record["event"]["action"] == "cleanup"]
            assert record["nodewrap"]["cleanup"]["processes_left"] == 0
            fs.tell(hold=None)
            assert process.communicate(timeout=20)[1] == b""
            assert process.returncode == 143
    finally:
        fs.tell(hold=None)
        fs.close()


# ---- whose rights the pilot's own descriptors are used with ----


def test_pilots_descriptors_are_used_with_the_pilots_rights(setuid_node, tmp_path):
    """Where the kernel asks at read(2) who is there: addresses of root's processes (proc(5), startcode, startstack), which are 0 or 1 for others."""
    node, stat = setuid_node, "/proc/self/stat"

    def words(argv, **who):
        with open(stat, "rb") as stdin:  # this process's, root
            done = subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, **who)
            return done.communicate(timeout=20)[0].rpartition(b")")[2].split()[23:26]

    assert words(["/bin/cat"])[2] != b"0"  # what root sees
    mine = words(["/bin/cat"], user=node.pilot.uid, group=node.pilot.gid, extra_groups=[])
    with open(stat, "rb") as stdin:
        process = node.site.start(node.argv("map", ["/bin/cat"]), stdin=stdin, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.rpartition(b")")[2].split()[23:26] == mine


def test_front_has_the_pilots_effective_ids_while_the_payload_runs(setuid_node):
    live = setuid_node.start("map", "/bin/sh", "-c", "read x")
    pilot = str(setuid_node.pilot.uid)

    def ids():
        lines = status_of(live.process.pid)
        return lines["Uid"], lines["CapEff"][0].strip("0")

    until(lambda: ids() == ([pilot, pilot, "0", pilot], ""), "it is the pilot's: the keeper does not wait for it")
    assert live.end(b"\n")[0] == 0


@pytest.mark.parametrize("profile", ["batch", "strict"])
def test_socket_of_the_pilots_network_is_not_handed_over(node, profile):
    """connect(2) with AF_UNSPEC and then with an address would take it anywhere in the pilot's network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with mine, peer:
            process = node.site.start(
                node.argv("map", ["/bin/sh", "-c", "stat -L -c %F /proc/self/fd/0; cat"], profile), stdin=mine, stdout=subprocess.PIPE
            )
            peer.sendall(b"bytes\n")
            peer.shutdown(socket.SHUT_WR)
            assert process.communicate(timeout=20)[0] == b"fifo\nbytes\n"


def stdio(node, command, mine, **more):
    """A payload whose stdin, stdout and stderr are one socket, as inetd and ssh start programs."""
    process = node.site.start(node.argv("map", command, **more), stdin=mine, stdout=mine, stderr=mine)
    mine.close()
    return process


@pytest.mark.parametrize("blocking", [True, False])
def test_one_local_socket_as_stdio_carries_both_ways_to_the_end_of_each(node, blocking):
    mine, peer = socket.socketpair()
    data = random.Random(3).randbytes(SIZES[-1])
    with peer, socket.socket(fileno=os.dup(mine.fileno())) as again:
        mine.setblocking(blocking)
        before = fcntl.fcntl(again, fcntl.F_GETFL)
        process = stdio(node, ["/bin/sh", "-c", "/bin/cat; echo end >&2"], mine)
        sender = threading.Thread(target=lambda: (peer.sendall(data), peer.shutdown(socket.SHUT_WR)))
        sender.start()
        got = b""
        while not got.endswith(b"end\n"):
            got += peer.recv(1 << 20)
        sender.join(20)
        assert (process.wait(20), fcntl.fcntl(again, fcntl.F_GETFL)) == (0, before)
        again.close()
        assert peer.recv(1) == b""
    assert got == data + b"end\n"


def test_peer_of_a_socket_that_has_gone_is_a_broken_pipe_and_no_error_of_the_runs(node):
    mine, peer = socket.socketpair()
    process = stdio(node, ["/usr/bin/yes"], mine)
    peer.recv(1)
    peer.close()
    assert process.wait(20) == 141
    mine, peer = socket.socketpair()
    process = stdio(node, ["/bin/sh", "-c", "echo unread; sleep 1; exit 3"], mine)
    select.select([peer], [], [], 20)
    peer.close()  # ECONNRESET for its stdin
    assert process.wait(20) == 3
    assert stdio(node, ["/bin/true"], socket.socket(socket.AF_UNIX)).wait(20) == 0  # never had one


def test_peer_that_does_not_take_more_keeps_nobody(node):
    mine, peer = socket.socketpair()
    with peer:
        process = stdio(node, ["/usr/bin/yes"], mine)
        select.select([peer], [], [], 20)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(5) == 143


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_socket_of_messages_is_refused_where_it_would_have_to_be_carried(node, kind):
    for profile, code in (("batch", 202), ("none", 0)):
        mine, peer = socket.socketpair(socket.AF_UNIX, kind)
        with mine, peer:
            process = node.site.start(node.argv("map", ["/bin/true"], profile), stdin=mine, stderr=subprocess.PIPE)
            _, err = process.communicate(timeout=20)
        assert process.returncode == code, err
        assert err.startswith(b"nodewrap: NW-STDIO: cannot arrange stdin, stdout, stderr: Protocol wrong type for socket") == (code != 0)
