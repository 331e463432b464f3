"""The filters under the real kernel: each refused call is made, with and without the filter, and real interpreters run in the policy child's jail."""

from __future__ import annotations

import errno
import glob
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyseccomp as sc
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nodewrap import seccomp
from tests import bpf
from tests.need import need

NOBODY = 65534
STRICT = seccomp.payload_program({"nested_userns": False})
BATCH = seccomp.payload_program({"nested_userns": True})
LOAD = seccomp.program(seccomp.load_rules(), seccomp.fail(errno.ENOSYS))
DECIDE = seccomp.program(seccomp.decide_rules(), sc.KILL_PROCESS)
WHOLE = sorted((rule.call, rule.action & 0xFFFF) for rule in seccomp.payload_rules(False) if not rule.where and seccomp._number(rule.call) >= 0)
#: Calls that this kernel itself answers like the filter, whatever the arguments: removed from Linux, or switched off by its configuration.
SAME_WITHOUT = {
    "_sysctl", "create_module", "get_kernel_syms", "lookup_dcookie", "nfsservctl", "query_module", "uselib", "sysfs", "ustat", "vhangup",
}
#: Arguments with which a call shows that it exists; all others get -1 everywhere, which no call likes and none acts on.
ARGS = {"modify_ldt": (0, 0, 0)}


def as_nobody(work):
    """The work in a process without privilege, if this one has some."""

    def run():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        return work()

    return run


@pytest.mark.parametrize(("call", "expected"), WHOLE)
def test_a_refused_call_gives_its_errno_and_not_without_the_filter(call, expected):
    need("root")  # without privilege, the kernel refuses most of these by itself
    args = ARGS.get(call, (-1,) * 6)
    assert bpf.in_child(lambda: bpf.call(seccomp._number(call), *args), STRICT) == -expected
    if call not in SAME_WITHOUT:
        assert bpf.in_child(lambda: bpf.call(seccomp._number(call), *args)) != -expected


def number(call):
    return seccomp._number(call)


def both(work, program=STRICT):
    """(under the filter, without it)"""
    return bpf.in_child(work, program), bpf.in_child(work)


def test_vsock_and_packet_sockets_cannot_be_made():
    need("root")
    for family, kind in ((socket.AF_VSOCK, socket.SOCK_STREAM), (socket.AF_PACKET, socket.SOCK_DGRAM)):
        filtered, bare = both(lambda family=family, kind=kind: bpf.call(number("socket"), family, kind, 0))
        assert filtered == -errno.EAFNOSUPPORT
        assert bare >= 0


def test_netlink_is_route_only():
    filtered, bare = both(lambda: bpf.call(number("socket"), socket.AF_NETLINK, socket.SOCK_RAW, 9))  # NETLINK_AUDIT
    assert filtered == -errno.EPROTONOSUPPORT
    assert bare >= 0
    assert bpf.in_child(lambda: bpf.call(number("socket"), socket.AF_NETLINK, socket.SOCK_RAW, 0), STRICT) >= 0


def test_ordinary_sockets_work():
    def work():
        with socket.socket() as server, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), socket.socketpair()[0]:
            server.bind(("127.0.0.1", 0))
            server.listen()
            with socket.create_connection(server.getsockname()):
                return len(socket.if_nameindex())

    assert bpf.in_child(work, STRICT) >= 1


def test_packet_filter_tables_cannot_be_set_even_with_a_network_namespace_of_ones_own():
    need("root")

    def work():
        assert bpf.call(number("unshare"), 0x40000000) == 0
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 255) as raw:
            return bpf.call(number("setsockopt"), raw.fileno(), 0, 64, bytes(200), 200)

    filtered, bare = both(work, BATCH)
    assert filtered == -errno.EPERM
    assert bare not in (-errno.EPERM, -errno.EACCES)  # EINVAL from the tables, ENOPROTOOPT from a kernel without them


def test_io_uring_cannot_be_set_up():
    filtered, bare = both(lambda: bpf.call(number("io_uring_setup"), 4, bytes(120)))
    assert filtered == -errno.ENOSYS
    assert bare >= 0


def test_keys_of_the_uid_cannot_be_reached():
    view = (11, -4, 0, 0)  # KEYCTL_READ of the user keyring
    filtered, bare = both(lambda: bpf.call(number("keyctl"), *view))
    assert filtered == -errno.ENOSYS
    assert bare >= 0


@pytest.mark.parametrize("high", [0, 1 << 32, 0xABCD << 48])
def test_tiocsti_is_refused_whatever_the_high_bits(high):
    def work():
        _, terminal = pty.openpty()
        os.setsid()
        os.close(os.open(os.ttyname(terminal), os.O_RDWR))  # becomes the controlling terminal
        return bpf.call(number("ioctl"), terminal, seccomp.TIOCSTI | high, b"x")

    filtered, bare = both(work)
    assert filtered == -errno.EPERM
    assert bare == 0 or Path("/proc/sys/dev/tty/legacy_tiocsti").read_text().strip() == "0"


def test_set_id_bits_cannot_be_set(tmp_path):
    tmp_path.chmod(0o777)
    file = tmp_path / "f"
    file.touch()
    name = os.fsencode(file)
    calls = {
        "fchmodat": (-100, name, 0o4755, 0), "fchmodat2": (-100, name, 0o2755, 0), "mknodat": (-100, name + b"n", 0o104755, 0),
        "openat": (-100, name + b"o", seccomp.O_CREAT | 1, 0o4755),
    }
    for call, args in calls.items():
        filtered, bare = both(lambda call=call, args=args: bpf.call(number(call), *args))
        assert filtered == -errno.EPERM, call
        assert bare >= 0, call
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o6000]  # what the bare runs left: the attack is real


def test_tools_that_want_set_id_bits_fail_and_say_so(tmp_path):
    (tmp_path / "f").touch()
    done = subprocess.run(["chmod", "u+s", tmp_path / "f"], capture_output=True, text=True, preexec_fn=lambda: bpf.load(BATCH))
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr
    assert subprocess.run(["chmod", "700", tmp_path / "f"], preexec_fn=lambda: bpf.load(BATCH)).returncode == 0


def test_device_nodes_cannot_be_made(tmp_path):
    need("root")
    filtered, bare = both(lambda: bpf.call(number("mknodat"), -100, os.fsencode(tmp_path / "d"), 0o020600, 0x103), BATCH)
    assert (filtered, bare) == (-errno.EPERM, 0)


def test_user_namespaces_open_in_batch_and_not_in_strict():
    need("userns")
    work = as_nobody(lambda: bpf.call(number("unshare"), seccomp.CLONE_NEWUSER))
    assert bpf.in_child(work, STRICT) == -errno.EPERM
    assert bpf.in_child(work, BATCH) == 0


def test_clone_with_a_namespace_flag_is_refused_in_strict():
    need("userns")

    def work():
        pid = bpf.call(number("clone"), seccomp.CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        return pid if pid < 0 else os.waitpid(pid, 0)[1]

    filtered, bare = both(as_nobody(work))
    assert (filtered, bare) == (-errno.EPERM, 0)


def test_real_containers_run_inside_the_batch_filter_and_not_inside_strict():
    need("userns")
    argv = ["unshare", "-Urpf", "--mount-proc", "sh", "-c", "test $$ = 1 && mount -t tmpfs none /mnt && echo inside"]
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=lambda: bpf.load(BATCH))
    assert (done.returncode, done.stdout) == (0, "inside\n"), done.stderr
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=lambda: bpf.load(STRICT))
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr


def test_threads_processes_and_nested_filters_work_in_strict():
    code = "import os, threading as t; a = t.Thread(target=print, args=('thread',)); a.start(); a.join(); print(os.popen('echo sub').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=lambda: bpf.load(STRICT))
    assert done.stdout.split() == ["thread", "sub"], done.stderr
    assert bpf.in_child(lambda: bpf.call(number("clone3"), -1, -1), STRICT, BATCH) == -errno.ENOSYS


I386_GETPID = bytes.fromhex("b814000000cd80c3")  # mov eax, 20; int 0x80; ret


@pytest.mark.skipif(bpf.AUDIT_ARCH != 0xC000003E, reason="i386 calls exist on x86-64 only")
def test_an_i386_call_ends_the_process():
    import ctypes
    import mmap

    def work():
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(I386_GETPID)
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() > 0

    filtered, bare = both(work)
    assert filtered == -1000 - signal.SIGSYS
    assert bare is True or bare == -1000 - signal.SIGSEGV  # SEGV: a kernel without IA32 emulation


def interpreters():
    """Every interpreter of this machine that is not older than the floor, 3.9."""
    paths = {os.path.realpath(path) for path in ["/usr/bin/python3", *glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))]}
    return sorted(path for path in paths if subprocess.run([path, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"]).returncode == 0)


@pytest.mark.parametrize("python", interpreters())
def test_interpreters_start_and_look_accounts_up_in_the_first_filter(python):
    code = "import pwd, grp, socket, hashlib; print(pwd.getpwuid(0).pw_name, grp.getgrgid(0).gr_name, hashlib.sha256(b'').hexdigest()[:4])"
    done = subprocess.run([python, "-I", "-S", "-B", "-c", code], capture_output=True, text=True, env={}, preexec_fn=lambda: bpf.load(LOAD))
    assert (done.returncode, done.stdout.split()) == (0, ["root", "root", "e3b0"]), done.stderr


def test_the_first_filter_forks_nothing_writes_no_file_and_reaches_no_network(tmp_path):
    assert bpf.in_child(lambda: bpf.call(number("clone"), signal.SIGCHLD, 0, 0, 0, 0), LOAD) == -errno.ENOSYS
    assert bpf.in_child(lambda: bpf.call(number("openat"), -100, os.fsencode(tmp_path / "f"), 0o101, 0o600), LOAD) == -errno.ENOSYS
    assert bpf.in_child(lambda: bpf.call(number("socket"), socket.AF_INET, 1, 0), LOAD) == -errno.EAFNOSUPPORT
    assert bpf.in_child(lambda: bpf.call(number("kill"), os.getppid(), 0), LOAD) == -errno.ENOSYS
    assert list(tmp_path.iterdir()) == []


VERIFY = """
import sys, os, _socket, mmap
sys.path[:0] = {path!r}
import tests.bpf as bpf
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
import asn1crypto.cms
key = serialization.load_pem_public_key(bytes.fromhex({key!r}))
algorithm = ec.ECDSA(hashes.SHA256())  # imports the back end at first use
bpf.load(bytes.fromhex({decide!r}))
key.verify(bytes.fromhex({signature!r}), b"payload", algorithm)
try:
    import tarfile
except ImportError as late:
    print(late)
{more}
print("decided")
"""


def verifying_child(more=""):
    """A real interpreter that imports the X.509 code under the first filter, loads the second, and verifies a signature."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path = [str(Path(__file__).parents[2]), *(entry for entry in sys.path if "site-packages" in entry)]
    code = VERIFY.format(path=path, key=public.hex(), decide=DECIDE.hex(), signature=key.sign(b"payload", ec.ECDSA(hashes.SHA256())).hex(), more=more)
    return subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code], capture_output=True, text=True, env={}, preexec_fn=lambda: bpf.load(LOAD))


def test_a_signature_is_verified_under_both_filters_and_a_late_import_is_an_error_with_a_reason():
    done = verifying_child()
    assert done.stdout.split("\n")[:2] == ["No module named 'tarfile'", "decided"], done.stderr


@pytest.mark.parametrize("more", [
    "os.fork()", "os.execv('/bin/sh', ['sh'])", "_socket.socket(1, 1, 0)", "os.kill(os.getppid(), 0)", "mmap.mmap(-1, 4096, prot=7)",
    "os.unlink('/nowhere')",
])
def test_anything_else_under_the_second_filter_ends_the_child(more):
    done = verifying_child(more)
    assert done.returncode == -signal.SIGSYS, (done.stdout, done.stderr)
