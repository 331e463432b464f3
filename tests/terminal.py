"""A terminal with a small shell on it that knows one job: the launcher, in the foreground or the background, as an interactive pilot starts it.

``Terminal(node, argv)``: ``type(text)``, ``shown(text)`` (waits for it), ``order(word)`` to the shell ("fg", "bg"), ``event()`` its next word
("stopped", "exit N"), ``modes()`` of the terminal, ``before``, those it had when nobody used it yet, ``close()``.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import termios
import time

SHELL = """
import os, sys
for fd, at in ((int(sys.argv[2]), 13), (int(sys.argv[3]), 14), (13, 3), (14, 4)):
    os.dup2(fd, at)
os.closerange(5, 100)
import fcntl, json, os, select, signal, sys, termios
argv, files, background = json.loads(sys.argv[1])
orders, events = 3, 4
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    if not background:
        os.tcsetpgrp(2, os.getpgrp())
    for fd, path in files.items():
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), int(fd))
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.closerange(3, 5)
    os.execv(argv[0], argv)
def tell(word):
    os.write(events, (word + "\\n").encode())
buffer = b""
while True:
    pid, status = os.waitpid(job, os.WNOHANG | os.WUNTRACED)
    if pid and os.WIFSTOPPED(status):
        os.tcsetpgrp(2, os.getpgrp())
        tell("stopped")
    elif pid:
        os.tcsetpgrp(2, os.getpgrp())
        tell("exit %d" % os.waitstatus_to_exitcode(status))
        break
    if not select.select([orders], [], [], 0.01)[0]:
        continue
    word = os.read(orders, 100).decode().split()
    if not word:
        os.killpg(job, signal.SIGKILL)
        break
    if word[0] == "fg":
        os.tcsetpgrp(2, job)
        os.killpg(job, signal.SIGCONT)
    elif word[0] == "bg":
        os.killpg(job, signal.SIGCONT)
while os.read(orders, 100):
    pass
"""


class Terminal:
    """files: {descriptor: path} for the job instead of the terminal. background: the job does not get the terminal."""

    def __init__(self, node, argv, files=None, background=False, size=(24, 80)):
        self.master, self.slave = pty.openpty()
        os.fchown(self.slave, node.pilot.uid, node.pilot.gid)
        self.resize(*size)
        self.text = b""
        self.before = self.modes()
        orders, events = os.pipe(), os.pipe()
        job = json.dumps([[os.fspath(word) for word in argv], files or {}, background])
        shell = ["/usr/bin/python3", "-I", "-c", SHELL, job, str(orders[0]), str(events[1])]
        self.process = node.site.start(shell, stdin=self.slave, stdout=self.slave, stderr=self.slave, fds=(orders[0], events[1]))
        os.close(orders[0])
        os.close(events[1])
        self.orders, self.events = orders[1], os.fdopen(events[0])

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text)

    def read(self, seconds):
        """What appears on it in that time, or until something does; False when nothing."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self.text += os.read(self.master, 65536)
        return True

    def shown(self, text, seconds=10):
        """Waits until text has appeared; everything up to it."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, f"{text} is not in {self.text[-2000:]}"
            self.read(0.1)
        found, _, self.text = self.text.partition(text)
        return found + text

    def order(self, word):
        os.write(self.orders, word.encode())

    def event(self, seconds=15):
        """Meanwhile the terminal is read: nobody waits for us."""
        end = time.monotonic() + seconds
        while not select.select([self.events], [], [], 0.02)[0]:
            assert time.monotonic() < end, f"no event; shown: {self.text[-2000:]}"
            self.read(0.0)
        while self.read(0.0):
            pass
        return self.events.readline().strip()

    def modes(self):
        return termios.tcgetattr(self.slave)

    def is_raw(self):
        return not self.modes()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def close(self):
        os.close(self.orders)
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.events.close()
            os.close(self.master)
            os.close(self.slave)
