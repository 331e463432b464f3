"""A file system in memory whose writes fail, fall short or wait as a test says: the kernel's own short writes, EIO and hangs for real programs.

``FuseFs(place)`` mounts it (root, /dev/fuse); the server is a process of its own, ``python -m tests.fusefs PLACE UID GID``, that takes commands
on stdin, one JSON object a line, and answers each with a line: {"room": N or null} bytes that files may still grow by; {"fail": [OP, ERRNO]}
an operation that fails (null: none); {"hold": OP} one that waits until {"hold": null}; {"delay": S} for each write; {"held": 1} asks how many wait.
Operations: write, fsync, open, unlink, readdir.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time

from tests.files import CHECKOUT

ROOT_ID = 1
HEADER = struct.Struct("<IIQQIIII")  # len opcode unique nodeid uid gid pid padding
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")  # ino size blocks atime mtime ctime, their ns, mode nlink uid gid rdev blksize flags
REQUEST_MAX = (1 << 17) + 4096
NO_REPLY = (2, 36, 42)  # FORGET INTERRUPT BATCH_FORGET


class Node:
    """A file or directory: mode, uid, gid; data of a file, names (name -> node id) of a directory."""

    def __init__(self, number, mode, uid, gid):
        self.number, self.mode, self.uid, self.gid, self.data, self.names, self.links = number, mode, uid, gid, bytearray(), {}, 1

    def attr(self):
        size, kind = len(self.data), 2 if stat.S_ISDIR(self.mode) else self.links
        return ATTR.pack(self.number, size, -(-size // 512), 0, 0, 0, 0, 0, 0, self.mode, kind, self.uid, self.gid, 0, 4096, 0)


class Server:
    """The FUSE protocol (linux/fuse.h, 7.31), as far as the launchers and a shell need it."""

    def __init__(self, fd, uid, gid):
        self.fd, self.lock, self.change = fd, threading.Lock(), threading.Condition()
        self.nodes = {ROOT_ID: Node(ROOT_ID, stat.S_IFDIR | 0o750, uid, gid)}
        self.room = self.fail = self.hold = None
        self.delay = self.held = 0
        self.calls = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 9: self.mkdir, 10: self.unlink, 11: self.unlink, 12: self.rename, 14: self.open,
            15: self.read, 16: self.write, 17: self.statfs, 18: self.nothing, 20: self.fsync, 25: self.nothing, 26: self.init, 27: self.opendir,
            28: self.readdir, 29: self.nothing, 30: self.nothing, 35: self.create, 45: self.rename2,
        }

    def serve(self):
        """Answer until the file system is unmounted."""
        while True:
            try:
                request = os.read(self.fd, REQUEST_MAX)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            head = HEADER.unpack_from(request)
            if head[1] not in NO_REPLY:
                threading.Thread(target=self.answer, args=(head, request[HEADER.size:]), daemon=True).start()

    def answer(self, head, body):
        _, opcode, unique, node, uid, gid, _, _ = head
        call, said, bad = self.calls.get(opcode), b"", 0
        try:
            if call is None:
                raise OSError(errno.ENOSYS, "")
            self.obstruct({16: "write", 20: "fsync", 14: "open", 35: "open", 10: "unlink", 28: "readdir"}.get(opcode))
            with self.lock:
                said = call(self.nodes[node] if node else None, body, uid, gid)
        except OSError as error:
            bad = -(error.errno or errno.EIO)
        try:
            os.write(self.fd, struct.pack("<IiQ", 16 + len(said), bad, unique) + said)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the caller was killed meanwhile
                raise

    def obstruct(self, name):
        if name == "write" and self.delay:
            time.sleep(self.delay)
        with self.change:
            self.held += 1
            self.change.wait_for(lambda: name is None or self.hold != name)
            self.held -= 1
        if self.fail and self.fail[0] == name:
            raise OSError(self.fail[1], "")

    # ---- operations: (node, body, uid, gid) -> the answer's body ----

    def entry(self, node):
        return struct.pack("<QQQQII", node.number, 0, 0, 0, 0, 0) + node.attr()

    def child(self, parent, name):
        if name not in parent.names:
            raise OSError(errno.ENOENT, "")
        return self.nodes[parent.names[name]]

    def add(self, parent, name, mode, uid, gid):
        if name in parent.names:
            raise OSError(errno.EEXIST, "")
        made = Node(max(self.nodes) + 1, mode, uid, gid)
        self.nodes[made.number] = made
        parent.names[name] = made.number
        return made

    def init(self, node, body, uid, gid):
        _, minor, ahead, _ = struct.unpack_from("<IIII", body)
        return struct.pack("<IIIIHHIIHHI28x", 7, min(minor, 31), ahead, 1 << 5, 16, 12, 1 << 17, 1, 32, 0, 0)

    def lookup(self, node, body, uid, gid):
        return self.entry(self.child(node, body.rstrip(b"\0")))

    def getattr(self, node, body, uid, gid):
        return struct.pack("<QII", 0, 0, 0) + node.attr()

    def setattr(self, node, body, uid, gid):
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        mode, _, new_uid, new_gid = struct.unpack_from("<IIII", body, 68)
        if valid & 1:
            node.mode = stat.S_IFMT(node.mode) | mode & 0o7777
        if valid & 2:
            node.uid = new_uid
        if valid & 4:
            node.gid = new_gid
        if valid & 8:
            self.resize(node, size)
        return self.getattr(node, body, uid, gid)

    def resize(self, node, size):
        """A hole takes no room here; what is cut off is given back."""
        if self.room is not None:
            self.room += max(0, len(node.data) - size)
        node.data[size:] = bytes(max(0, size - len(node.data)))

    def mkdir(self, node, body, uid, gid):
        mode, _ = struct.unpack_from("<II", body)
        return self.entry(self.add(node, body[8:].rstrip(b"\0"), stat.S_IFDIR | mode, uid, gid))

    def create(self, node, body, uid, gid):
        _, mode = struct.unpack_from("<II", body)
        return self.entry(self.add(node, body[16:].rstrip(b"\0"), mode, uid, gid)) + self.opened()

    def unlink(self, node, body, uid, gid):
        gone = self.child(node, body.rstrip(b"\0"))
        del node.names[body.rstrip(b"\0")]
        gone.links = 0
        return b""

    def rename(self, node, body, uid, gid):
        (target,) = struct.unpack_from("<Q", body)
        old, new = body[8:].rstrip(b"\0").split(b"\0")
        self.nodes[target].names[new] = node.names.pop(old)
        return b""

    def rename2(self, node, body, uid, gid):
        return self.rename(node, body[:8] + body[16:], uid, gid)

    def opened(self):
        return struct.pack("<QII", 0, 0, 0)

    def open(self, node, body, uid, gid):
        return self.opened()

    def opendir(self, node, body, uid, gid):
        return self.opened()

    def nothing(self, node, body, uid, gid):
        return b""

    fsync = nothing

    def read(self, node, body, uid, gid):
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(node.data[offset:offset + size])

    def write(self, node, body, uid, gid):
        _, offset, size = struct.unpack_from("<QQI", body)
        data = body[40:40 + size]
        grown = max(0, offset + size - len(node.data))
        if self.room is not None and grown > self.room:
            data = data[:max(0, size - grown + self.room)]
            grown = self.room
            if not data:
                raise OSError(errno.ENOSPC, "")
        if self.room is not None:
            self.room -= grown
        node.data[offset:offset + len(data)] = data
        return struct.pack("<II", len(data), 0)

    def statfs(self, node, body, uid, gid):
        return struct.pack("<QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0)

    def readdir(self, node, body, uid, gid):
        _, offset, size = struct.unpack_from("<QQI", body)
        found = [(b".", node), (b"..", node), *((name, self.nodes[number]) for name, number in node.names.items())]
        said = b""
        for index, (name, entry) in enumerate(found[offset:], offset + 1):
            record = struct.pack("<QQII", entry.number, index, len(name), stat.S_IFMT(entry.mode) >> 12) + name
            record += b"\0" * (-len(record) % 8)
            if len(said) + len(record) > size:
                break
            said += record
        return said


def main(place, uid, gid):
    fd, libc = os.open("/dev/fuse", os.O_RDWR), ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40750,user_id=0,group_id=0,default_permissions,allow_other"
    if libc.mount(b"nodewrap-test", place.encode(), b"fuse", 6, options.encode()):  # nosuid, nodev
        raise OSError(ctypes.get_errno(), "mount")
    server = Server(fd, uid, gid)
    threading.Thread(target=server.serve, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        asked = command.pop("held", None)
        with server.change:
            for name, value in command.items():
                setattr(server, name, value)
            server.change.notify_all()
            print(server.held if asked else server.room, flush=True)


class FuseFs:
    """One mount. place: an empty directory; uid, gid: who owns its root. tell(room=0): see the module; returns the server's answer."""

    def __init__(self, place, uid=0, gid=0):
        self.place = place
        words = [sys.executable, "-m", "tests.fusefs", str(place), str(uid), str(gid)]
        self.server = subprocess.Popen(words, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"

    def tell(self, **command):
        print(json.dumps(command), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline().replace("None", "null"))

    def close(self):
        self.tell(hold=None, delay=0, fail=None, room=None)
        subprocess.run(["umount", "-l", str(self.place)], check=True)
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
