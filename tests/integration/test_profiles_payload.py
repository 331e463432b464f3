"""What a payload finds in each profile, asked from inside, started by the real launchers."""

from __future__ import annotations

import json

import pytest

from tests.integration.test_doctor_site import POLICY

PROBE = r"""
import ctypes, errno, json, os, pty, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(work):
    try:
        work()
    except OSError as wrong:
        return errno.errorcode[wrong.errno]
    return "ok"
def raw(number, *args):
    return errno.errorcode[ctypes.get_errno()] if libc.syscall(number, *args) < 0 else "ok"
def suid():
    open("/tmp/f", "w").close()
    os.chmod("/tmp/f", 0o4755)
container = ["unshare", "-Urpf", "--mount-proc", "sh", "-c", "test $$ = 1"]
print(json.dumps({
    "root": sorted(os.listdir("/")), "etc": sorted(os.listdir("/etc")), "dev": sorted(os.listdir("/dev")),
    "links": [os.path.islink(path) for path in ("/dev/stdin", "/dev/fd", "/dev/ptmx")],
    "interfaces": sorted(name for _, name in socket.if_nameindex()), "pids": sorted(int(pid) for pid in os.listdir("/proc") if pid.isdigit()),
    "pty": call(pty.openpty), "vsock": call(lambda: socket.socket(40, socket.SOCK_STREAM)), "suid": call(suid), "io_uring": raw(425, 4, bytes(120)),
    "container": subprocess.run(container, capture_output=True).returncode, "user": call(lambda: __import__("pwd").getpwuid(os.getuid())),
    "tmp": [os.statvfs(path).f_blocks * os.statvfs(path).f_frsize for path in ("/tmp", "/var/tmp", "/dev/shm")],
    "write": call(lambda: open("/usr/x", "w")),
    "nnp": [line.split()[1] for line in open("/proc/self/status") if line.startswith(("NoNewPrivs", "Seccomp:"))],
}))
"""
NODES = {"null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr", "ptmx", "pts", "shm", "mqueue"}


@pytest.fixture
def inside(site):
    """inside(profile): what the probe found."""
    site.guard(allow=["log-only none batch strict"])
    site.policy(POLICY.format(pilot=site.pilot.name, profiles='["batch", "strict"]'))

    def probe(profile):
        ran = site.nodewrap("run", "--profile", profile, "--declare", "subject=/CN=x", "--", "/usr/bin/python3", "-I", "-c", PROBE)
        assert ran.rc == 0, ran
        return json.loads(ran.out)

    return probe


def test_strict_shows_a_minimal_node(inside):
    found = inside("strict")
    assert not {"home", "root", "srv", "mnt", "opt", "boot", "run"} & set(found["root"])
    assert "shadow" not in found["etc"]
    assert {"passwd", "group"} <= set(found["etc"])
    assert set(found["dev"]) == NODES
    assert found["interfaces"] == ["lo"]
    assert found["tmp"] == [4 << 30, 1 << 30, 2 << 30]


def test_batch_shows_the_hosts_network_and_configuration_but_no_homes(inside):
    found = inside("batch")
    assert not {"home", "root", "srv", "mnt", "boot"} & set(found["root"])
    assert "shadow" in found["etc"]
    assert NODES <= set(found["dev"]) <= NODES | {"fuse"}
    assert found["tmp"] == [8 << 30, 2 << 30, 8 << 30]


@pytest.mark.parametrize("profile", ["strict", "batch"])
def test_the_floor_holds_in_every_profile(inside, profile):
    found = inside(profile)
    assert (found["vsock"], found["io_uring"], found["suid"], found["write"]) == ("EAFNOSUPPORT", "ENOSYS", "EPERM", "EROFS")
    assert found["nnp"] == ["1", "2"]
    assert len(found["pids"]) <= 3
    assert 1 in found["pids"]


@pytest.mark.parametrize("profile", ["strict", "batch"])
def test_what_programs_expect_works_in_every_profile(inside, profile):
    found = inside(profile)
    assert (found["pty"], found["user"]) == ("ok", "ok")
    assert found["links"] == [True, True, True]


@pytest.mark.parametrize(("profile", "works"), [("strict", False), ("batch", True)])
def test_containers_inside_work_in_batch_only(inside, profile, works):
    assert (inside(profile)["container"] == 0) == works
