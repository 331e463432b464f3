"""What a payload can do with the open files of its pilot's stdin, stdout and stderr, beyond the bytes that they carry."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest

#: Its 0 and 2: what it learns by them and takes or gives away through them, by name. Each is None where the kernel says no.
HANDLE = """
import array, fcntl, json, os, socket, stat, struct

def tried(what):
    try:
        return str(what())
    except OSError:
        return None

def mine():
    return socket.socket(fileno=os.dup(fd))

def interfaces():
    room = array.array("B", bytes(4096))
    return struct.unpack("iL", fcntl.ioctl(fd, 0x8912, struct.pack("iL", 4096, room.buffer_info()[0])))[0]

seen = {}
for fd in (0, 2):
    seen[fd] = [
        stat.S_ISSOCK(os.fstat(fd).st_mode) or None,
        tried(interfaces),
        tried(lambda: mine().bind("\\0nwt-taken-%d" % fd)),
        tried(lambda: socket.send_fds(mine(), [b"x"], [os.open("/", os.O_RDONLY)])),
        tried(lambda: mine().getsockopt(socket.SOL_SOCKET, 77)),
    ]
print(json.dumps(seen))
"""
REOPEN = """
import os
try:
    print(os.read(os.open("/proc/self/fd/2", os.O_RDONLY | os.O_NONBLOCK), 99))
except OSError:
    print(None)
"""


def python(code):
    return ["/usr/bin/python3", "-I", "-c", code]


@pytest.mark.parametrize("profile", ["batch", "strict"])
@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET], ids=["local", "network"])
def test_socket_as_stdio_gives_nothing_of_the_pilots_network_and_carries_no_descriptor(node, profile, family):
    if family == socket.AF_UNIX:
        mine, peer = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            mine = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
    with mine, peer:
        process = node.site.start(node.argv("map", python(HANDLE), profile), stdin=mine, stdout=subprocess.PIPE, stderr=mine)
        out, _ = process.communicate(timeout=20)
        mine.close()
        assert process.returncode == 0
        assert json.loads(out) == {"0": [None] * 5, "2": [None] * 5}
        assert socket.recv_fds(peer, 10, 9)[:2] == (b"", [])


def test_pipe_as_output_cannot_be_read_by_a_payload_with_the_pilots_id(node):
    reader, writer = os.pipe()
    with open(reader, "rb") as mine:
        os.write(writer, b"of others\n")
        if os.geteuid() == 0:
            os.fchown(writer, node.pilot.uid, node.pilot.gid)
        process = node.site.start(node.argv("log-only", python(REOPEN)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer)
        os.close(writer)
        assert process.communicate(timeout=20)[0] == b"None\n"
        assert (process.returncode, mine.read()) == (0, b"of others\n")
