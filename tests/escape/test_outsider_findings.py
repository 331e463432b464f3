"""What an outside tester got, who had README and SECURITY.md alone. Each was seen to work before it was closed."""

from __future__ import annotations

import signal

import pytest

#: Connected to the pilot by an abstract socket, takes the pilot's first open file above its standard ones, as the kernel shows it.
TAKE = """
import ctypes, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def take(name):
    peer = socket.socket(socket.AF_UNIX)
    peer.connect("\\0" + name)
    pidfd = struct.unpack("i", peer.getsockopt(1, 77, 4))[0]  # SO_PEERPIDFD
    for number in range(3, 64):
        got = libc.syscall(438, pidfd, number, 0)  # pidfd_getfd
        if got >= 0:
            return f"took {os.readlink(f'/proc/self/fd/{got}')}"
    return os.strerror(ctypes.get_errno())
"""
#: The pilot: starts the payload (argv) while it listens on a socket, a private file open, and prints what it says.
PILOT = """
import os, socket, subprocess, sys
secret = os.open(sys.argv[1], os.O_RDONLY | os.O_CREAT, 0o600)
ours = socket.socket(socket.AF_UNIX)
ours.bind("\\0" + sys.argv[1])
ours.listen()
with subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
    print(run.stdout.read().decode())
"""
#: The pilot: --status-fd is a socket of its own that tells who sends; prints the uids of all that came.
LISTEN = """
import socket, struct, subprocess, sys
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
argv = [word.replace("@fd@", str(theirs.fileno())) for word in sys.argv[1:]]
subprocess.run(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
theirs.close()
uids = []
while True:
    data, extra, _, _ = ours.recvmsg(65536, 1024)
    if not data:
        break
    uids += [struct.unpack("3i", body)[1] for _, kind, body in extra if kind == socket.SCM_CREDENTIALS]
print(*uids)
"""


@pytest.mark.parametrize("command", ["/bin/true", "/no/such/command"])
def test_status_lines_come_from_the_pilot_and_never_from_root(setuid_node, command):
    """A reader that trusts the sender's uid, as syslog does, would have believed them root's words."""
    argv = setuid_node.argv("map", [command], "strict", ["--status-fd", "@fd@"])
    ran = setuid_node.site.run(["/usr/bin/python3", "-c", LISTEN, *argv])
    uids = set(map(int, ran.out.split()))
    assert uids == {setuid_node.pilot.uid}, ran


def test_open_files_of_the_pilot_cannot_be_taken_through_a_socket_of_its_own(setuid_node, home):
    """By the filter alone, for kernels on which Landlock does not stop it; under the pilot's own id."""
    policy = setuid_node.policy_text().replace('profile = ["none"', 'profile = ["open", "none"')
    setuid_node.open_guard(allow=["switch none", "map none", "log-only open none compat batch strict"])
    setuid_node.site.policy(policy + '\n[profile.open]\nlike = "batch"\nlandlock = []\n')
    try:
        code = f"{TAKE}\nprint(take({str(home / 'private')!r}))"
        argv = setuid_node.argv("log-only", ["/usr/bin/python3", "-I", "-c", code], "open")
        ran = setuid_node.site.run(["/usr/bin/python3", "-c", PILOT, home / "private", *argv], cwd=home)
    finally:
        setuid_node.open_guard()
        setuid_node.open_policy()
    assert "took" not in ran.text, ran
    assert "Operation not permitted" in ran.text or "Protocol not available" in ran.text, ran


@pytest.mark.parametrize("profile", ["batch", "none"])
def test_payload_that_makes_init_its_tracer_still_ends_by_its_signal(node, profile):
    """waitpid(2) tells a tracer of every stop: the first one was taken for the end, and was 255."""
    code = "import ctypes, os, signal; ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.kill(os.getpid(), signal.SIGUSR1); os._exit(3)"
    ran = node.run("log-only", "/usr/bin/python3", "-I", "-c", code, profile=profile)
    assert ran.rc == 128 + signal.SIGUSR1, ran
    assert ran.record("exit")["process"]["exit_code"] == 128 + signal.SIGUSR1


def test_traced_payload_goes_on_after_exec(node):
    """The stop is SIGTRAP there, which would kill it."""
    code = "import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.execv('/bin/sh', ['sh', '-c', 'exit 7'])"
    assert node.run("log-only", "/usr/bin/python3", "-I", "-c", code).rc == 7
