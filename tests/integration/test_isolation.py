"""What a payload can reach of the pilot, of the node and of the kernel (I10, I14, I18, I20, I21).

A pilot that has everything open, and a payload that tries.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess

import pytest

from nodewrap.doctor.probe import landlock_abi
from tests.node import CALL, KINDS

#: Runs as the pilot: leaves a mark in every place that the payload must not reach, opens 10,000 descriptors, and starts the payload.
PILOT = r"""
import ctypes, json, os, resource, socket, subprocess, sys
argv, mark = json.loads(sys.argv[1]), sys.argv[2]
libc, rt = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("librt.so.1", use_errno=True)
def must(value, what):
    assert value >= 0, (what, os.strerror(ctypes.get_errno()))
    return value
key = int(mark[-6:], 16)
made = [f"{top}/{mark}" for top in ("/tmp", "/var/tmp", "/dev/shm", os.environ["HOME"])]
for path in made:
    with open(path, "w") as file:
        file.write(mark)
    os.chmod(path, 0o666)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))   # the soft limit of a login is often 1024
private = os.environ["HOME"] + "/private"
os.mkdir(private, 0o700)
directory = os.open(private, os.O_RDONLY)
for number in range(directory + 1, min(10000, most)):
    os.dup2(directory, number)
os.dup2(directory, 3)
ids = [must(libc.shmget(key, 4096, 0o1666), "shmget"), must(libc.semget(key, 1, 0o1666), "semget"), must(libc.msgget(key, 0o1666), "msgget")]
queue = b"/" + mark.encode()
must(rt.mq_open(queue, os.O_RDWR | os.O_CREAT, 0o666, None), "mq_open")
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\0" + mark); abstract.listen(5)
port = socket.create_server(("127.0.0.1", 0))
joined = libc.syscall(250, 1, None) >= 0   # KEYCTL_JOIN_SESSION_KEYRING
if joined:
    must(libc.syscall(248, b"user", mark.encode(), b"secret", 6, -3), "add_key")
facts = {"pid": os.getpid(), "key": key, "port": port.getsockname()[1], "made": made, "private": private, "mark": mark, "keyring": joined}
try:
    done = subprocess.run(argv, close_fds=False, input=json.dumps(facts).encode(), stdout=subprocess.PIPE)
    sys.stdout.write(done.stdout.decode())
finally:
    for path in made:
        os.unlink(path)
    os.rmdir(private)
    rt.mq_unlink(queue)
    libc.shmctl(ids[0], 0, None), libc.semctl(ids[1], 0, 0), libc.msgctl(ids[2], 0, None)
sys.exit(done.returncode)
"""

PAYLOAD = CALL + r"""
import ctypes, errno, glob, json, os, signal, socket, subprocess, sys
facts = json.load(sys.stdin)
pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
libc, rt = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("librt.so.1", use_errno=True)
def raw(function, *args):
    return errno.errorcode[ctypes.get_errno()] if function(*args) < 0 else "ok"
def connect(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(5)
        sock.connect(address)
def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
def euid_of_setuid_program():
    with subprocess.Popen(["/usr/bin/passwd"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        child.stdout.read(1)  # Popen returns when the file descriptors are closed; the ids are changed after that (fs/exec.c, begin_new_exec)
        words = [line.split() for line in open(f"/proc/{child.pid}/status") if line.startswith("Uid")][0]
        child.kill()
    return int(words[2])
def shows_mark(path):
    return not path.startswith("/proc/self") and f"/{os.getpid()}/" not in path and mark in read(path)
def suid(path):
    open(path, "w").close()
    return call(os.chmod, path, 0o4755)
mark = facts["mark"].encode()
fds = [int(name) for name in os.listdir("/proc/self/fd")]
listing = max(fds)
frame = ctypes.create_string_buffer(8)
print(json.dumps({
    "fds": sorted(set(fds) - {listing}),
    "private": call(os.listdir, "/proc/self/fd/3"), "files": list(filter(os.path.exists, facts["made"])),
    "environ": {key: value for key, value in os.environ.items() if "PILOT" in key or facts["mark"] in value},
    "processes": list(filter(shows_mark, glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"))),
    "signal": call(os.kill, facts["pid"], 0), "kill_all": call(os.kill, -1, 0), "memory": raw(libc.ptrace, 16, facts["pid"], None, None),
    "sysv": [raw(libc.shmget, facts["key"], 0, 0), raw(libc.semget, facts["key"], 0, 0), raw(libc.msgget, facts["key"], 0)],
    "mqueue": raw(rt.mq_open, b"/" + mark, os.O_RDONLY), "abstract": call(connect, socket.AF_UNIX, "\0" + facts["mark"]),
    "tcp": call(connect, socket.AF_INET, ("127.0.0.1", facts["port"])),
    "key": raw(libc.syscall, 250, 10, -3, b"user", mark, 0), "request_key": raw(libc.syscall, 249, b"user", mark, None, 0),
    "vsock": call(socket.socket, 40, socket.SOCK_STREAM), "alg": call(socket.socket, 38, socket.SOCK_SEQPACKET),
    "packet": call(socket.socket, 17, socket.SOCK_RAW),
    "raw_ip": call(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
    "nfnetlink": call(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 12),
    "route": call(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 0), "io_uring": raw(libc.syscall, 425, 4, bytes(120)),
    "bpf": raw(libc.syscall, 321, 0, bytes(64), 64), "userfaultfd": raw(libc.syscall, 323, 0),
    "perf": raw(libc.syscall, 298, bytes(128), 0, -1, -1, 0),
    "devices": [name for name in os.listdir("/dev") if name in ("mem", "kmsg", "vda", "sda", "loop-control", "kvm", "snapshot", "port")],
    "mknod": call(os.mknod, "/tmp/null", 0o20666, os.makedev(1, 3)),
    "setuid_program": euid_of_setuid_program(), "euid": os.geteuid(),
    "suid": suid("/tmp/s"), "sgid_dir": call(os.mkdir, "/tmp/d") and call(os.chmod, "/tmp/d", 0o2755),
    "pid": os.getpid(), "sid": os.getsid(0) == os.getpid(), "pids": pids,
    "over_proc": [line.split()[4] for line in open("/proc/self/mountinfo") if line.split()[4].startswith("/proc/")],
    "userns": subprocess.run(["unshare", "-Urpf", "--mount-proc", "sh", "-c", "test $$ = 1 && ls /proc >/dev/null"], capture_output=True).returncode,
    "hostname": raw(libc.sethostname, b"evil", 4),
    "mount": raw(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None), "remount": raw(libc.mount, None, b"/usr", None, 0x1020, None),
    "tty": call(open, "/dev/tty"), "shm_writable": call(open, "/dev/shm/x", "w"),
}))
"""
#: keyctl(2): 1 is KEYCTL_JOIN_SESSION_KEYRING, 10 KEYCTL_SEARCH; -3 is the session keyring.
HOLD_KEY = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(250, 1, None)
assert libc.syscall(248, b"user", b"nwkey", b"secret", 6, -3) >= 0
"""
FIND_KEY = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(250, 10, -3, b"user", b"nwkey", 0), errno.errorcode[ctypes.get_errno()])
"""
TYPE_INTO = """
import errno, fcntl, json, os, sys, termios
def type_into(fd):
    try:
        fcntl.ioctl(fd, termios.TIOCSTI, b"x")
    except OSError as wrong:
        return errno.errorcode[wrong.errno]
    return "ok"
own = [os.isatty(fd) for fd in (0, 1, 2)]
pilots = [os.fstat(fd).st_rdev == int(sys.argv[1]) for fd in (0, 1, 2)]
print(json.dumps([own, pilots, [type_into(fd) for fd in (0, 1, 2)], sys.stdin.readline()]))
"""
FLOORED = ("strict", "batch", "compat")


@pytest.fixture(scope="module")
def found():
    """What payloads saw, once for each case."""
    return {}


def cases():
    for launcher, kinds in KINDS.items():
        for kind in kinds:
            if (launcher, kind) != ("userns", "block"):  # wants a delegated range: test_identity.py
                yield from (pytest.param((launcher, kind, profile), id=f"{launcher}-{kind}-{profile}") for profile in FLOORED)


@pytest.fixture(params=list(cases()))
def seen(request, home, found, session):
    """(what the payload saw, kind, profile)."""
    launcher, kind, profile = case = request.param
    node = request.getfixturevalue(f"{launcher}_node")
    if case not in found:
        mark = f"nwmark{os.getpid():06x}{len(found) + 1:06x}"
        argv = [os.fspath(word) for word in node.argv(kind, ["/usr/bin/python3", "-I", "-c", PAYLOAD], profile)]
        env = {"HOME": str(home), "PILOT_SECRET": mark, "OMP_NUM_THREADS": "1"}
        ran = node.site.run(["/usr/bin/python3", "-I", "-c", PILOT, json.dumps(argv), mark], env=env, cwd=home)
        assert (ran.rc, ran.err) == (0, b""), ran
        found[case] = json.loads(ran.out)
    return found[case], kind, profile


# ---- the pilot (I10) ----


def test_none_of_10000_inherited_descriptors_reaches_the_payload(seen):
    assert seen[0]["fds"] == [0, 1, 2]
    assert seen[0]["private"] in ("ENOENT", "ENOTDIR")


def test_pilots_files_in_tmp_var_tmp_dev_shm_and_home_are_not_there(seen):
    assert seen[0]["files"] == []
    assert seen[0]["shm_writable"] == "ok"


def test_pilots_environment_does_not_pass(seen):
    assert seen[0]["environ"] == {}


def test_pilots_process_cannot_be_seen_signalled_or_traced(seen):
    assert seen[0]["processes"] == []
    assert (seen[0]["signal"], seen[0]["memory"]) == ("ESRCH", "ESRCH")


def test_pilots_ipc_objects_are_not_there(seen):
    assert seen[0]["sysv"] == ["ENOENT"] * 3
    assert seen[0]["mqueue"] == "ENOENT"


def test_pilots_abstract_socket_cannot_be_reached(seen):
    """In batch and compat by Landlock's scopes, or, before Linux 6.12, by nothing, which is on record (test_landlock.py)."""
    assert seen[0]["abstract"] == ("ECONNREFUSED" if seen[2] == "strict" else "EPERM" if landlock_abi() >= 6 else "ok")


def test_pilots_loopback_service_is_out_of_reach_in_strict_and_shared_in_batch(seen):
    assert seen[0]["tcp"] == ("ECONNREFUSED" if seen[2] == "strict" else "ok")


def test_pilots_keys_are_not_found(seen):
    assert (seen[0]["key"], seen[0]["request_key"]) == ("ENOSYS", "ENOSYS")


# ---- the kernel (I21) ----


def test_address_families_beyond_unix_inet_and_route_netlink_are_closed(seen):
    assert [seen[0][name] for name in ("vsock", "alg", "packet")] == ["EAFNOSUPPORT"] * 3
    assert (seen[0]["nfnetlink"], seen[0]["raw_ip"], seen[0]["route"]) == ("EPROTONOSUPPORT", "EPERM", "ok")


def test_io_uring_bpf_perf_and_userfaultfd_are_closed(seen):
    assert [seen[0][name] for name in ("io_uring", "bpf", "perf", "userfaultfd")] == ["ENOSYS", "EPERM", "EPERM", "EPERM"]


def test_no_raw_device_is_there_or_can_be_made(seen):
    assert (seen[0]["devices"], seen[0]["mknod"]) == ([], "EPERM")


def test_mounts_and_host_name_cannot_be_changed(seen):
    assert (seen[0]["hostname"], seen[0]["mount"], seen[0]["remount"]) == ("EPERM", "EPERM", "EPERM")


def test_user_namespaces_inside_work_only_where_the_profile_grants_them(seen):
    assert (seen[0]["userns"] == 0) == (seen[2] != "strict")


# ---- set-id programs (I18) ----


def test_setuid_program_of_the_host_gives_nothing(seen):
    assert os.stat("/usr/bin/passwd").st_mode & 0o4000, "the host's passwd must be setuid for this to mean something"
    assert seen[0]["setuid_program"] == seen[0]["euid"]


def test_setid_bits_cannot_be_set(seen):
    assert (seen[0]["suid"], seen[0]["sgid_dir"]) == ("EPERM", "EPERM")


# ---- processes (I14, I20) ----


def test_payload_is_not_the_first_process_and_leads_its_own_session(seen):
    assert seen[0]["pid"] > 1
    assert seen[0]["sid"]
    assert seen[0]["tty"] == "ENXIO"


def test_proc_is_fresh_and_nothing_is_mounted_over_it(seen):
    assert seen[0]["pids"] == [1, seen[0]["pid"]]
    assert seen[0]["over_proc"] == []


# ---- without isolation ----


@pytest.mark.parametrize("kind", ["static", "map", "log-only"])
def test_session_keyring_is_fresh_even_without_isolation(setuid_node, kind):
    """Profile none has no filter, so the payload may look: the pilot's key is not in its session."""
    argv = [os.fspath(word) for word in setuid_node.argv(kind, ["/usr/bin/python3", "-I", "-c", FIND_KEY], "none")]
    pilot = f"{HOLD_KEY}os.execv({argv[0]!r}, {argv!r})"
    ran = setuid_node.site.run(["/usr/bin/python3", "-I", "-c", pilot])
    assert ran.text.split() == ["-1", "ENOKEY"], ran


def test_record_says_that_log_only_without_isolation_exposes_the_pilot(setuid_node):
    bare = setuid_node.run("log-only", "/bin/true", profile="none").record("start")
    assert bare["nodewrap"]["isolation"]["pilot_secrets_exposed"] is True
    boxed = setuid_node.run("log-only", "/bin/true", profile="batch").record("start")
    assert "pilot_secrets_exposed" not in boxed["nodewrap"]["isolation"]


# ---- the terminal ----


@pytest.mark.parametrize("profile", FLOORED)
def test_pilots_terminal_is_neither_handed_over_nor_typed_into(node, profile):
    """The terminals that the payload has as stdin and stderr are its own (test_terminal.py); stdout, a pipe, stays one."""
    master, slave = pty.openpty()
    os.fchown(slave, node.pilot.uid, node.pilot.gid)
    argv = node.argv("log-only", ["/usr/bin/python3", "-I", "-c", TYPE_INTO, str(os.fstat(slave).st_rdev)], profile)
    os.write(master, b"typed\n")
    process = node.site.start(argv, stdin=slave, stdout=subprocess.PIPE, stderr=slave)
    out, _ = process.communicate(timeout=20)
    os.close(slave)
    os.close(master)
    assert process.returncode == 0
    assert json.loads(out) == [[True, False, True], [False] * 3, ["EPERM"] * 3, "typed\n"]
