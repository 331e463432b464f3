"""What an outside tester got, who had README and SECURITY.md alone. Each was seen to work before it was closed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import container
from tests.integration.test_apptainer import policy
from tests.need import need
from tests.node import until

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
#: In an image: what each letter means is done to the socket by which nodewrap-inside tells that the command begins (NW_INSIDE + 1, csrc/run.h).
SAY = r"""
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
	static char many[4096] = "x";
	int bad = argc != 2, zero = 0, missing = ENOENT, minus = -1;
	for (char *p = argv[1]; !bad && *p; p++) {
		if (*p == 'b') bad = send(21, "x", 1, 0) != 1;
		else if (*p == 'e') bad = send(21, "", 0, 0) != 0;
		else if (*p == '5') bad = send(21, many, 5, 0) != 5;
		else if (*p == 'l') bad = send(21, many, sizeof many, 0) != sizeof many;
		else if (*p == '0') bad = send(21, &zero, sizeof zero, 0) != sizeof zero;
		else if (*p == 'E') bad = send(21, &missing, sizeof missing, 0) != sizeof missing;
		else if (*p == 'm') bad = send(21, &minus, sizeof minus, 0) != sizeof minus;
		else if (*p == 's') bad = shutdown(21, SHUT_WR);
		else if (*p == 'f' && fork()) return 0;
		else if (*p == 'f') bad = usleep(500000);
		else bad = 1;
	}
	return bad;
}
"""
#: The payload: its own timer slack, in ns; then it waits for longer than its wall time, by a slack of its own.
SLACK = """
import ctypes, sys, time
print(open("/proc/self/timerslack_ns").read(), flush=True)
ctypes.CDLL(None).prctl(29, ctypes.c_ulong(50000))  # PR_SET_TIMERSLACK
time.sleep(float(sys.argv[1]))
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


# ---- a process that holds its own mmap_lock ----

#: In user and mount namespaces of its own, serves FUSE there and answers no READ: one child reads a page, so that it stays locked; another maps the
#: file (FOPEN_DIRECT_IO: invalidate_inode_pages2), and waits for that page with its mmap_lock held. All have the name that it is called with.
HOLD = """
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.prctl(15, sys.argv[1].encode())
uid, gid = os.getuid(), os.getgid()
assert libc.unshare(0x10020000) == 0, os.strerror(ctypes.get_errno())
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
    open(f"/proc/self/{name}", "w").write(text)
place = sys.argv[2]
os.makedirs(place)
fuse = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse
assert libc.mount(b"f", place.encode(), b"fuse", ctypes.c_ulong(6), options) == 0, os.strerror(ctypes.get_errno())
def attr(number):
    return struct.pack("<QQQQQQIIIIIIIIII", number, 65536, 128, 0, 0, 0, 0, 0, 0, 0o40755 if number == 1 else 0o100644, 1, 0, 0, 0, 4096, 0)
def serve():
    opens = 0
    while True:
        request = os.read(fuse, 1 << 20)
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode == 15:  # READ
            os.write(told, b"r")
        if opcode in (2, 15, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET too
            continue
        bad, said = 0, b""
        if opcode == 26:  # INIT
            said = struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 64, 48, 4096, 1, 0, 0, 0)
        elif opcode == 1:  # LOOKUP
            said = struct.pack("<QQQQII", 2, 0, 1000, 1000, 0, 0) + attr(2)
        elif opcode == 3:  # GETATTR
            said = struct.pack("<QII", 1000, 0, 0) + attr(node)
        elif opcode == 14:  # OPEN: the first one FOPEN_KEEP_CACHE, the second FOPEN_DIRECT_IO
            opens += 1
            said = struct.pack("<QII", opens, 2 if opens == 1 else 1, 0)
        else:
            bad = -38
        os.write(fuse, struct.pack("<IiQ", 16 + len(said), bad, unique) + said)
hear, told = os.pipe()
if os.fork() == 0:
    serve()
first, second = (os.open(place + "/f", os.O_RDONLY) for _ in range(2))
if os.fork() == 0:
    os.close(fuse)
    os._exit(len(os.read(first, 4096)))
os.read(hear, 1)
mapper = os.fork()
if mapper == 0:
    os.close(fuse)
    libc.mmap(None, 4096, 1, 2, second, ctypes.c_long(0))
    os._exit(0)
while open("/proc/%d/stat" % mapper).read().rpartition(")")[2].split()[0] != "D":
    time.sleep(0.01)
print("holds", flush=True)
time.sleep(60)
"""


def waits_for_mmap_lock(pid):
    """Whether who reads its cmdline waits. The reader can be killed (fs/proc/base.c, get_mm_cmdline: mmap_read_lock_killable)."""
    try:
        subprocess.run(["/bin/cat", f"/proc/{pid}/cmdline"], stdout=subprocess.DEVNULL, timeout=2, check=False)
    except subprocess.TimeoutExpired:
        return True
    return False


def cut_fuse(uid, place):
    """Who waits for FUSE servers mounted by that uid goes on: their ends' own closing would wait for them too (FUSE_FLUSH)."""
    script = 'mount -t fusectl none "$1" && for at in "$1"/*; do if [ "$(stat -c %u "$at")" = "$0" ]; then echo 1 >"$at/abort"; fi; done'
    subprocess.run(["unshare", "--mount", "/bin/sh", "-c", script, str(uid), place], check=True)


@pytest.fixture
def holder(setuid_node):
    """A run in which a process holds its own mmap_lock. Its name is long enough for psutil to ask for more, and that of a front process."""
    need("root", "fuse")
    live = setuid_node.start("pool", "/usr/bin/python3", "-I", "-c", HOLD, "nw-0123456789ab", "/tmp/m")
    assert live.process.stdout.readline() == b"holds\n", live.process.stderr.read()
    assert any(waits_for_mmap_lock(pid) for pid in setuid_node.payload_processes())
    return live


def ask(node, *argv, user=None):
    """nodewrap as root or that account, which has 20 s -> CompletedProcess. Raises subprocess.TimeoutExpired."""
    who = {"user": user.uid, "group": user.gid, "extra_groups": user.groups} if user else {}
    environment = node.site.environment(user or node.pilot)
    return subprocess.run([node.site.binary, *argv], capture_output=True, text=True, timeout=20, check=False, env=environment, cwd="/", **who)


def test_who_looks_at_a_process_that_holds_its_mmap_lock_does_not_wait_for_it(setuid_node, holder):
    for user in (None, setuid_node.pilot):
        done = ask(setuid_node, "ps", "--json", user=user)
        (row,) = map(json.loads, done.stdout.splitlines())
        assert holder.events[0]["run"].endswith(row["run"])
        assert row["processes"] == 4
        assert row["memory"] > 1 << 20
    assert ask(setuid_node, "sweep", "--deep").returncode == 0
    assert ask(setuid_node, "doctor").returncode in (0, 1)
    assert setuid_node.run("map", "/bin/true").rc == 0
    done = ask(setuid_node, "kill", "--all", "--grace", "1s")
    assert (done.returncode, done.stderr) == (0, "")
    assert setuid_node.is_clean()


def test_deep_sweep_names_a_process_that_holds_its_mmap_lock(setuid_node):
    """One of a pool account without any lease, whose name psutil would ask more about."""
    need("root", "fuse")
    pool, place = setuid_node.site.accounts["pool01"], tempfile.mkdtemp(dir="/var/tmp")
    os.chown(place, pool.uid, pool.gid)
    argv = ["/usr/bin/python3", "-I", "-c", HOLD, "fifteen-letters", f"{place}/m"]
    started = subprocess.Popen(argv, user=pool.uid, group=pool.gid, extra_groups=[], stdout=subprocess.PIPE, start_new_session=True, cwd="/")
    try:
        assert started.stdout.readline() == b"holds\n"
        done = ask(setuid_node, "sweep", "--deep", "--json")
        rows = [row for row in map(json.loads, done.stdout.splitlines()) if row["kind"] == "process" and row["uid"] == pool.uid]
        assert {row["detail"] for row in rows} == {"fifteen-letters"}
        assert len(rows) == 4
    finally:
        cut_fuse(pool.uid, place)
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        until(lambda: not setuid_node.payload_processes(), "they are gone")
        shutil.rmtree(place)


# ---- images that the policy names ----

BANNER = b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0"


@pytest.fixture
def image(node, session):
    """apply(): a file of the site owner's, named in the policy, and that applied -> what apply says; its path is image.path."""
    path = session.top / "held.sif"
    path.write_bytes(BANNER + bytes(1 << 20))
    owner = node.site.owner()
    if owner:
        os.chown(path, owner["user"], owner["group"])

    def apply():
        text = node.policy_text().replace('"batch", "strict"]\n', f'"batch", "strict"]\nimage = ["{path}"]\n')
        return node.site.policy(f'{text}\n[apptainer]\nprogram = "/bin/true"\n')

    apply.path = path
    apply.run = lambda: node.run("log-only", "true", options=["--image", str(path)])
    yield apply
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    node.open_policy()


@pytest.mark.parametrize("held", ["mapped", "open"])
def test_record_never_gives_the_old_digest_of_a_named_image_that_was_open_for_writing_at_apply(image, held):
    """Its pages are mapped writable and dirty: what is written then is no fault and sets no time."""
    with image.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[1 << 20] = memory[1 << 20]
        said = image()
        before = image.path.stat()
        if held == "mapped":
            memory[1 << 20] = 1
            after = image.path.stat()
            assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
        assert "NW-POLICY-IMAGE-OPEN" in said
        assert "in force" in said  # a ban, say, does not wait for the owner of an image
        assert (image.run().rc, image.run().err.split()[1]) == (203, b"NW-IMAGE-CHANGED:")
    assert "NW-POLICY-IMAGE" not in image()
    assert image.run().record("start")["nodewrap"]["image"]["digest"] == "sha256:" + hashlib.sha256(image.path.read_bytes()).hexdigest()


def test_whoever_opens_a_named_image_for_writing_during_apply_waits_and_ends_nobody(image):
    """The kernel tells the lease's holder by SIGIO, which ends a process that does not ignore it."""
    with image.path.open("r+b") as file:
        file.truncate(64 << 20)
    code = f"import os\nwhile True: os.close(os.open({str(image.path)!r}, os.O_RDWR))"
    writer = subprocess.Popen(["/usr/bin/python3", "-I", "-c", code])
    try:
        assert all("in force" in image() for _ in range(3))
    finally:
        writer.kill()
        writer.wait()


def test_named_image_that_became_a_directory_since_apply_is_refused(image):
    image()
    image.path.unlink()
    image.path.mkdir()
    ran = image.run()
    assert (ran.rc, ran.err.split()[1]) == (203, b"NW-IMAGE-CHANGED:"), ran


def test_named_directory_is_applied_and_run_whatever_is_open_in_it_and_has_no_digest(image):
    image.path.unlink()
    image.path.mkdir()
    with (image.path / "file").open("wb"):
        assert "NW-POLICY-IMAGE" not in image()
        assert "digest" not in image.run().record("start")["nodewrap"]["image"]


# ---- what scripts of an image say, and how late a pilot's clock may be ----


@pytest.fixture(scope="module")
def say(tmp_path_factory):
    program = tmp_path_factory.mktemp("say") / "say"
    subprocess.run(["gcc", "-Wall", "-Werror", "-static", "-o", program, "-xc", "-"], input=SAY.encode(), check=True)
    return program


@pytest.fixture
def scripted(node, home, say):
    """run(script, command): with an image whose environment script that is."""
    image = container.tree(home / "image")
    (image / "bin/say").write_bytes(say.read_bytes())
    (image / "bin/say").chmod(0o755)
    env = image / ".singularity.d/env"
    env.mkdir(parents=True)
    policy(node, [image])

    def run(script, *command):
        (env / "90-user.sh").write_text(f"{script}\n")
        return node.run("map", *command, options=["--image", image])

    yield run
    node.open_policy()


@pytest.mark.parametrize("said", ["b", "e", "5", "l", "E", "m", "0E", "E0", "e0E"])
def test_command_that_ran_is_told_as_run_whatever_a_script_of_the_image_said_before(scripted, said):
    """One byte made "the command never ran" (202) of it; 0 and an error made "cannot be executed" of one that ended with 127."""
    ran = scripted(f"/bin/say {said} || exit 99", "/bin/sh", "-c", "echo ran; exit 127")
    assert (ran.rc, ran.out, ran.err) == (127, b"ran\n", b""), ran
    assert "error" not in [record["event"]["action"] for record in ran.records]
    assert ran.record("exit")["process"]["exit_code"] == 127


@pytest.mark.parametrize("said", ["fE", "fb", "fEs"])
def test_command_that_ran_is_told_as_run_whatever_a_script_of_the_image_says_meanwhile(scripted, said):
    ran = scripted(f"/bin/say {said}", "/bin/sh", "-c", "sleep 1; echo ran; exit 127")
    assert (ran.rc, ran.out, ran.err) == (127, b"ran\n", b""), ran
    assert "error" not in [record["event"]["action"] for record in ran.records]


@pytest.mark.parametrize(("script", "command", "code", "word"), [
    ("exit 7", "true", 202, "NW-APPTAINER"),
    ("", "/not/there", 127, "NW-EXEC"),
    ("/bin/say E; exit 7", "true", 7, None),
    ("/bin/say 0; exit 7", "true", 7, None),
    ("/bin/say s", "true", 125, None),
    ("/bin/say b", "/not/there", 127, None),
    ("/bin/say 0", "/not/there", 127, None),
], ids=str)
def test_command_that_did_not_run_is_at_worst_told_as_run(scripted, script, command, code, word):
    ran = scripted(script, command)
    assert (ran.rc, ran.out) == (code, b""), ran
    assert [record["event"].get("code") for record in ran.records if record["event"]["action"] == "error"] == [word] * bool(word), ran


def test_what_only_exec_finds_out_is_the_commands_own_error(scripted, home):
    """An interpreter that the image does not have: the command counts as begun, and its stderr says what it was."""
    (home / "image/bin/script").write_text("#!/not/there\n")
    (home / "image/bin/script").chmod(0o755)
    ran = scripted("", "script")
    assert (ran.rc, ran.out, ran.err) == (127, b"", b"nodewrap: NW-EXEC: cannot execute in the image script: No such file or directory\n"), ran


def slack():
    """As long as it gets: no wait would end before something happens."""
    if ctypes.CDLL(None, use_errno=True).prctl(29, ctypes.c_ulong(10**18)):  # PR_SET_TIMERSLACK
        raise OSError(ctypes.get_errno(), "prctl")


def test_wall_time_is_held_in_time_whatever_timer_slack_the_pilot_had(node):
    """It comes through exec, to set-user-id programs too: launcher and keeper slept on until the payload ended by itself."""
    live = node.start("map", "/usr/bin/python3", "-I", "-c", SLACK, "12", options=["--wall", "3"], preexec_fn=slack)
    code, out, err = live.end()
    assert (code, out.split(), err) == (128 + signal.SIGTERM, [b"50000"], b"")


def test_sweep_has_a_timer_slack_of_its_own(setuid_node):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    argv = [setuid_node.site.prefix / "libexec/nodewrap/nodewrap-sweep", "--forget", "0" * 36]
    sweep = subprocess.Popen(argv, stdout=writer, preexec_fn=slack, cwd="/")  # its report has no room in the pipe
    try:
        until(lambda: Path(f"/proc/{sweep.pid}/timerslack_ns").read_text() == "50000\n", "the kernel's own")
    finally:
        sweep.kill()
        sweep.wait()
        os.close(reader)
        os.close(writer)
