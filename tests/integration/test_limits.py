"""Limits of a run (docs/limits.md): what holds them, and that each end by a limit is told apart.

Cgroup limits need a kernel with the controllers in cgroup v2: `make test-kernel` has one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import V2
from tests.integration.test_disk import PROFILES
from tests.need import need
from tests.node import until

MIB = 1 << 20
CONTROLLERS = ("memory", "pids", "cpu", "io")
#: Takes n MiB, told when it has them, and stays. A sleeper beside it, which a kill of one process would leave.
HOG = """
import subprocess, sys, time
subprocess.Popen(["sleep", "1000"])
x = bytearray(b"x") * (int(sys.argv[1]) << 20)
print("has it", flush=True)
time.sleep(1000)
"""


def limited(node, limits, slot=None):
    """The node's policy with these lines in [limits]; for a slot the guard has the cgroup tree, which `make install` names for setuid alone."""
    if slot:
        node.open_guard(cgroup=str(V2))
    node.site.policy(node.policy_text().replace('grace = "1s"', f'grace = "1s"\n{limits}'))


class Slot:
    """A job's cgroup, delegated to the pilot, which is in a group of its own below. As a context: we are in the pilot's place, with who we start."""

    def __init__(self, pilot, delegated=True):
        self.top = V2 / f"nwtest-limits-{os.getpid()}"
        self.place = self.top / "pilot"
        (V2 / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS))
        for group in (self.top, self.place):
            group.mkdir()
            for path in (group, group / "cgroup.procs", group / "cgroup.subtree_control"):
                os.chown(path, *(pilot.uid, pilot.gid) if delegated else (0, 0))
        self.place.chmod(0o755)

    def __enter__(self):
        (self.place / "cgroup.procs").write_text("0")

    def __exit__(self, *_):
        (V2 / "cgroup.procs").write_text("0")

    def runs(self):
        return [path for where in (self.top, self.place) for path in where.glob("nodewrap-*")]

    def close(self):
        (self.top / "cgroup.kill").write_text("1")
        until(lambda: "populated 0" in (self.top / "cgroup.events").read_text(), "the slot is empty")
        for group in [*self.runs(), self.place, self.top]:
            group.rmdir()


@pytest.fixture
def slot(session):
    need("root", "cgroup2")
    if not set(CONTROLLERS) <= set((V2 / "cgroup.controllers").read_text().split()):
        # Not need(): a build machine with cgroup v1 cannot be given them. The kernel that has them is too slow for every build.
        pytest.skip("no memory, pids, cpu, io in cgroup v2 here: make test-kernel runs this")
    made = Slot(session.accounts["pilot"])
    yield made
    made.close()


KINDS = {"setuid": "static", "userns": "map"}


def kind(node):
    return KINDS[node.site.launcher]


def hog(size):
    return ("/usr/bin/python3", "-I", "-c", HOG, str(size))


# ---- by cgroup ----


def test_limits_stand_in_the_runs_own_cgroup(node, slot):
    limited(node, 'memory = "256MiB"\nswap = "1MiB"\nprocesses = 99\ncpus = 0.5\ncpu_weight = 50\nio_weight = 20', slot)
    with slot:
        live = node.start(kind(node), "sleep", "60", profile="strict")
    (group,) = slot.runs()
    assert group.parent == slot.top, "where the pilot is, a group hands nothing down"
    wanted = {
        "memory.max": str(256 * MIB), "memory.swap.max": str(MIB), "memory.oom.group": "1", "pids.max": "100", "cpu.max": "50000 100000",
        "cpu.weight": "50", "io.weight": "default 20",
    }
    assert {name: (group / name).read_text().strip() for name in wanted} == wanted
    assert not [what for what in live.events[0].get("degrade", ()) if what.startswith("limit-")]
    owner = 0 if node.privileged else node.pilot.uid
    assert {(group / name).stat().st_uid for name in wanted} == {owner}
    start = node.site.records()[-1]
    assert start["nodewrap"]["limits"] == {"memory": 256 * MIB, "swap": MIB, "processes": 99, "cpus": 50000, "cpu_weight": 50, "io_weight": 20}
    os.kill(live.pid, signal.SIGTERM)
    assert live.end()[0] == 143
    assert live.events[-1]["by"] == "exit"
    assert not slot.runs()


def test_a_run_out_of_memory_ends_as_a_whole_and_says_so(node, slot):
    limited(node, 'memory = "96MiB"', slot)
    before = node.site.audit_size()
    with slot:
        live = node.start(kind(node), "/bin/sh", "-c", '"$@"; echo survived', "sh", *hog(400), profile="batch")
    code, out, err = live.end()
    assert (code, out, err) == (137, b"", b"")
    assert live.events[-1]["by"] == "oom"
    (end,) = [record for record in node.site.records(before) if record["event"]["action"] == "exit"]
    assert end["process"]["ended_by"] == "oom"
    assert end["nodewrap"]["usage"]["oom_kills"] >= 2
    assert 64 * MIB < end["nodewrap"]["usage"].get("memory_peak", 96 * MIB) <= 97 * MIB  # memory.peak: since Linux 5.19


def test_memory_that_somebody_else_ran_out_of_is_told_apart(node, slot):
    limited(node, 'memory = "1GiB"', slot)
    (slot.top / "memory.max").write_text(str(96 * MIB))
    with slot:
        live = node.start(kind(node), *hog(400))
    assert live.end()[0] == 137
    assert live.events[-1]["by"] == "oom-outside"


def test_a_run_killed_for_memory_while_its_keeper_was_dead_is_recorded_so_by_the_sweep(setuid_node, slot):
    limited(setuid_node, 'memory = "96MiB"', slot)
    before = setuid_node.site.audit_size()
    with slot:
        live = setuid_node.start("static", "/bin/sh", "-c", 'read go; exec "$@"', "sh", *hog(400), profile="batch")
    front = live.process.pid
    (keeper,) = map(int, Path(f"/proc/{front}/task/{front}/children").read_text().split())
    os.kill(keeper, signal.SIGSTOP)
    os.kill(front, signal.SIGSTOP)
    live.process.stdin.write(b"go\n")
    live.process.stdin.flush()
    (group,) = slot.runs()
    until(lambda: "populated 0" in (group / "cgroup.events").read_text() or "oom_kill 0" not in (group / "memory.events").read_text(), "the kill")
    for pid in (front, keeper):
        os.kill(pid, signal.SIGKILL)
    live.process.wait()
    until(lambda: setuid_node.sweep() and not setuid_node.site.leases(), "swept", 20)
    (end,) = [record for record in setuid_node.site.records(before) if record["event"]["action"] == "exit"]
    assert end["nodewrap"]["swept"] is True
    assert end["process"]["ended_by"] == "oom"
    assert end["nodewrap"]["usage"]["oom_kills"] >= 1


def test_forks_beyond_the_limit_are_refused_and_counted(node, slot):
    limited(node, "processes = 20", slot)
    code = """
import json, os, time
n = 0
try:
    while n < 100:
        if os.fork() == 0:
            time.sleep(1000)
        n += 1
except BlockingIOError:
    pass
print(json.dumps(n))
"""
    with slot:
        before = node.site.audit_size()
        assert node.python(kind(node), code, profile="batch") == 19
    (end,) = [record for record in node.site.records(before) if record["event"]["action"] == "exit"]
    assert end["nodewrap"]["usage"]["forks_refused"] >= 1
    assert end["process"]["ended_by"] == "exit"


@contextlib.contextmanager
def ext4(place, features="^quota", option="noatime"):
    """64 MiB of it on a loop device, at that place, which is made. Skips where the kernel knows no such option."""
    need("root", "mkfs.ext4")
    with contextlib.suppress(FileNotFoundError):  # a kernel without modules: it is built in, or cannot be had
        subprocess.run([Path("/proc/sys/kernel/modprobe").read_text().strip(), "loop"], check=False)
    need("loop")
    image = place.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    place.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", "-O", features, image], check=True)
        done = subprocess.run(["mount", "-o", f"loop,{option}", image, place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no ext4 with {option} on a loop device here ({done.stderr.decode().strip()[:80]}): make test-kernel runs this")
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)  # what a test that failed left there ends later
    finally:
        place.rmdir()
        image.unlink()


@pytest.fixture
def disk(home, node, slot):
    """A work directory on a disk of its own."""
    with ext4(home / "disk") as place:
        os.chown(place, node.pilot.uid, node.pilot.gid)
        yield place


#: Eight MiB to the disk: through memory, and past it. Prints the seconds of each. A file belongs to the group that wrote it first.
WRITES = "for how in conv=fsync oflag=direct; do rm -f x; dd if=/dev/zero of=x bs=1M count=8 $how 2>&1 |" \
    " sed -n 's/.*copied, \\([0-9.e-]*\\) s.*/\\1/p'; done"


def test_a_payload_reads_and_writes_each_disk_no_faster_than_its_limit(node, slot, disk):
    options = ["--workdir", str(disk)]
    free = node.sh(kind(node), WRITES, options=options)
    limited(node, 'io_read = "100MiB"\nio_write = "2MiB"\nio_read_ops = 5000\nio_write_ops = 500', slot)
    with slot:
        live = node.start(kind(node), "/bin/sh", "-c", f"read go; {WRITES}", options=options)
    (group,) = slot.runs()
    lines = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in (group / "io.max").read_text().splitlines()}
    assert lines.keys() == {path.read_text().strip() for path in Path("/sys/block").glob("*/dev")}
    assert set(lines.values()) == {f"rbps={100 * MIB} wbps={2 * MIB} riops=5000 wiops=500"}
    wanted = {"io_read": 100 * MIB, "io_write": 2 * MIB, "io_read_ops": 5000, "io_write_ops": 500}
    assert node.site.records()[-1]["nodewrap"]["limits"] == wanted
    assert not [what for what in live.events[0].get("degrade", ()) if what.startswith("limit-")]
    code, out, err = live.end(b"go\n", 60)
    assert (code, err) == (0, b"")
    assert [3.5 < float(limit) > 1.5 * float(without) for limit, without in zip(out.split(), free.text.split())] == [True, True], (out, free)


def test_a_limit_on_writing_that_would_miss_what_goes_through_memory_is_not_held(node, slot, disk):
    limited(node, 'io_read = "100MiB"\nio_write = "2MiB"', slot)
    try:
        (V2 / "cgroup.subtree_control").write_text("-memory")
    except OSError:  # EBUSY
        pytest.skip("groups of the node's own have memory: it cannot be taken away")
    try:
        with slot:
            live = node.start(kind(node), "sleep", "60", options=["--workdir", str(disk)])
    finally:
        (V2 / "cgroup.subtree_control").write_text("+memory")
    assert [what for what in live.events[0]["degrade"] if what.startswith("limit-")] == ["limit-io_write"]
    os.kill(live.pid, signal.SIGTERM)
    assert live.end()[0] == 143


ESCAPE = """
import ctypes, json, os
from pathlib import Path

def tried(path, text):
    try:
        Path(path).write_text(text)
    except OSError as error:
        return os.strerror(error.errno)
    return "done"

def attack(tree):
    own = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")][0][3:]
    groups = [tree, tree + own, os.path.dirname(tree + own), os.path.dirname(tree + own) + "/pilot"]
    found = {group + "/" + name: tried(group + "/" + name, text)
             for group in dict.fromkeys(groups)
             for name, text in (("memory.max", "max"), ("cgroup.procs", "0"), ("cgroup.subtree_control", "-memory"))}
    return [path for path, said in found.items() if said == "done"]

open_ = attack(TREE)
libc = ctypes.CDLL(None, use_errno=True)
again = "/tmp/cgroup"
os.mkdir(again)
uid, gid = os.getuid(), os.getgid()
mounted = False
if libc.unshare(0x10000000 | 0x00020000 | 0x02000000) == 0:   # user, mount, cgroup
    tried("/proc/self/setgroups", "deny")
    tried("/proc/self/uid_map", f"0 {uid} 1")
    tried("/proc/self/gid_map", f"0 {gid} 1")
    mounted = libc.mount(b"none", again.encode(), b"cgroup2", 0, None) == 0
    open_ += attack(again) if mounted else []
print(json.dumps([mounted, open_]), flush=True)
input()
"""


@pytest.mark.parametrize("who", ["static", "map", "log-only"])
@pytest.mark.parametrize("profile", ["batch", "strict"])
def test_a_payload_cannot_lift_its_limits_nor_leave_its_group(node, slot, who, profile):
    """By what it sees of the cgroup tree, and by a tree that it mounts in namespaces of its own. map with one id and log-only: the pilot's own id."""
    if who not in node.kinds:
        pytest.skip("switch takes privilege")
    limited(node, 'memory = "256MiB"', slot)
    code = ESCAPE.replace("TREE", repr(str(V2)))
    with slot:
        live = node.start(who, "/usr/bin/python3", "-I", "-c", f"input()\n{code}", profile=profile)
    (group,) = slot.runs()
    live.process.stdin.write(b"\n")
    live.process.stdin.flush()
    mounted, opened = json.loads(live.process.stdout.readline())
    assert mounted is (profile == "batch"), "the attack was made"
    assert (group / "memory.max").read_text() == f"{256 * MIB}\n"
    assert str(live.pid) in (group / "cgroup.procs").read_text().split()
    own = {f"/tmp/cgroup/{name}" for name in ("cgroup.procs", "cgroup.subtree_control")}
    assert {os.path.normpath(path) for path in opened} <= own
    live.process.stdin.write(b"\n")
    assert live.end()[0] == 0


# ---- where the cgroup does not hold them ----


@pytest.fixture
def undelegated(session):
    """A slot without controllers for who is in it, as most batch jobs are today; without cgroup v2 there is none to be in."""
    need("root", "cgroup2")
    slot = contextlib.nullcontext()
    if "memory" in (V2 / "cgroup.controllers").read_text():
        slot = Slot(session.accounts["pilot"], delegated=False)
    yield slot
    if isinstance(slot, Slot):
        slot.close()


OWN = "import resource as r; print(r.getrlimit(r.RLIMIT_DATA)[1], r.getrlimit(r.RLIMIT_NPROC)[1])"


def test_what_no_cgroup_holds_is_recorded_and_left_to_the_payloads_own_limits(node, undelegated):
    limited(node, 'memory = "256MiB"\nprocesses = 99\ncpus = 2')
    with undelegated:
        ran = node.run(kind(node), "/usr/bin/python3", "-c", OWN, profile="strict")
    assert (ran.rc, ran.text.split()) == (0, [str(256 * MIB), "99"])
    assert {"limit-memory", "limit-swap", "limit-processes", "limit-cpus"} <= set(ran.record("degrade")["nodewrap"]["degrade"])
    assert "limits" not in ran.record("start")["nodewrap"]


def test_what_no_cgroup_holds_is_refused_where_the_policy_says_so(node, undelegated):
    limited(node, 'memory = "256MiB"\non_missing = "refuse"')
    with undelegated:
        ran = node.sh(kind(node), "echo ran", profile="batch")
    assert (ran.rc, ran.out) == (202, b"")
    assert ran.err.startswith(b'nodewrap: NW-LIMIT-CGROUP: nothing here holds the limit "memory"')
    assert [record["event"]["action"] for record in ran.records] == ["error"]


def test_defaults_ask_no_cgroup_for_anything(node):
    ran = node.run(kind(node), "true", profile="batch")
    assert ran.rc == 0
    assert not [what for record in ran.records for what in record["nodewrap"].get("degrade", ()) if what.startswith("limit-")]


# ---- of each process ----


@pytest.mark.parametrize(("limits", "script", "code", "by"), [
    ('file_size = "1MiB"', "exec dd if=/dev/zero of=big bs=64k count=32 2>/dev/null", 153, "file_size"),
    ('cpu = "1s"', "while :; do :; done", 152, "cpu"),
    ('cpu = "1h"', "kill -XCPU $$; sleep 9", 152, "cpu"),
    ("", "kill -XFSZ $$; sleep 9", 153, "exit"),
])
def test_an_end_by_a_limit_of_the_process_is_told(node, home, limits, script, code, by):
    limited(node, limits)
    ran = node.sh(kind(node), script, profile="batch", options=["--workdir", str(workdir(node, home))])
    assert (ran.rc, ran.record("exit")["process"]["ended_by"]) == (code, by)


def test_descriptors_and_file_sizes_are_limited(node):
    limited(node, 'files = 64\nfile_size = "1MiB"\ncore = "0B"')
    ran = node.sh(kind(node), "ulimit -n; ulimit -f; ulimit -c")
    assert (ran.rc, ran.text.split()) == (0, ["64", "2048", "0"])


def workdir(node, home):
    work = home / "limited"  # goes with the home; a name that no other test's directory has
    shutil.rmtree(work, ignore_errors=True)
    subprocess.run(["install", "-d", "-o", str(node.pilot.uid), "-g", str(node.pilot.gid), work], check=True)
    return work


@pytest.mark.parametrize(("launcher", "who", "profile"), [("setuid", "map", "strict"), ("setuid", "pool", "none"), ("userns", "block", "batch")])
def test_a_work_directory_that_outgrows_scratch_ends_the_run(request, home, delegated, launcher, who, profile):
    """Mapped, given away, in a user namespace. What the payload closes against everybody is measured too; it gets TERM first."""
    node = request.getfixturevalue(f"{launcher}_node")
    limited(node, 'scratch = "8MiB"')
    fill = "mkdir -p a/b && head -c 20000000 /dev/urandom >a/b/x && chmod 0 a/b/x a/b a"
    script = f"{fill} && trap 'echo term; exit 9' TERM; while :; do sleep 0.1; done"
    ran = node.sh(who, script, profile=profile, options=["--wall", "40", "--workdir", str(workdir(node, home))])
    assert (ran.rc, ran.out) == (9, b"term\n"), ran
    assert ran.record("exit")["process"]["ended_by"] == "scratch"


def test_what_is_within_scratch_is_left_alone_however_many_names_it_has(setuid_node, home):
    node = setuid_node
    limited(node, 'scratch = "8MiB"')
    script = "head -c 5000000 /dev/urandom >x; for i in 1 2 3 4 5; do ln x y$i; done; truncate -s 1G hole; sleep 7"
    ran = node.sh(kind(node), script, options=["--workdir", str(workdir(node, home))])
    assert (ran.rc, ran.record("exit")["process"]["ended_by"]) == (0, "exit")


def test_scratch_without_a_mount_namespace_is_not_held_and_said_so(node):
    limited(node, 'scratch = "8MiB"')
    assert "limit-scratch" in node.sh("log-only", "true", profile="none").record("degrade")["nodewrap"]["degrade"]


@pytest.fixture
def counted(setuid_node):
    """tmp-dir, with 8 MiB of scratch for a run, on a file system that counts by project."""
    node = setuid_node
    with ext4(node.site.prefix / "counted", "quota,project", "prjquota") as place:
        node.open_guard(tmp_dir=str(place))
        node.site.policy(node.policy_text().replace('grace = "1s"', 'grace = "1s"\nscratch = "8MiB"') + PROFILES)
        yield place
        node.open_guard(tmp_dir=None)
        node.open_policy()


def quota_of(place, project):
    """(hard limit in KiB, files) of a project there."""
    found = ctypes.create_string_buffer(72)
    fd = os.open(place, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(443, fd, 0x800007 << 8 | 2, project, found) == 0, os.strerror(ctypes.get_errno())  # quotactl_fd(2), Q_GETQUOTA, PRJQUOTA
    finally:
        os.close(fd)
    return struct.unpack_from("QQQQQQ", found)[0], struct.unpack_from("QQQQQQ", found)[5]


#: Take a directory out of its project (FS_IOC_FSSETXATTR), and keep it from handing the project down (FS_IOC_SETFLAGS); then write there.
OUT_OF_PROJECT = """
import fcntl, json, os, struct
os.mkdir("/tmp/out")
fd = os.open("/tmp/out", os.O_RDONLY)
found = bytearray(28)
fcntl.ioctl(fd, 0x801C581F, found)
project = struct.unpack_from("I", found, 12)[0]
said = []
for call, words in ((0x401C5820, struct.pack("IIIII8x", 0, 0, 0, 0, 0)), (0x40086602, struct.pack("l", 0x80000))):
    try:
        fcntl.ioctl(fd, call, words)
        said.append("done")
    except OSError as wrong:
        said.append(wrong.strerror)
written = 0
try:
    with open("/tmp/out/x", "wb", 0) as file:
        while written < 30 << 20:
            written += file.write(bytes(1 << 16))
except OSError as wrong:
    said.append(wrong.strerror)
print(json.dumps([project, said, written]))
"""


@pytest.mark.parametrize("who", ["map", "block"])
def test_private_directories_on_disk_are_no_larger_than_scratch_to_the_block(setuid_node, counted, who):
    script = "head -c 20000000 /dev/zero >/tmp/x; wc -c </tmp/x; head -c 100000 /dev/zero >/var/tmp/y; rm /tmp/x;" \
        " head -c 4000000 /dev/zero >/var/tmp/z && echo again"
    ran = setuid_node.sh(who, script)
    written, *rest = ran.text.split()
    assert (ran.rc, rest) == (0, ["again"]), ran
    assert 7 * MIB < int(written) <= 8 * MIB
    assert ran.err.count(b"quota exceeded") == 2, ran
    project, said, written = setuid_node.python(who, OUT_OF_PROJECT)
    assert "Disk quota exceeded" in said, said
    assert 7 * MIB < written <= 8 * MIB
    assert quota_of(counted, project) == (0, 0)


def test_quota_of_a_run_that_was_killed_is_gone_with_its_directory(setuid_node, counted):
    live = setuid_node.start("map", "/bin/sh", "-c", "echo x >/tmp/x; echo up; sleep 60")
    assert live.process.stdout.readline() == b"up\n"
    project = Path(f"/proc/{live.pid}").stat().st_uid
    limit, files = quota_of(counted, project)
    assert (limit, files > 3) == (8192, True)
    front = live.process.pid
    (keeper,) = map(int, Path(f"/proc/{front}/task/{front}/children").read_text().split())
    for pid in (keeper, front):
        os.kill(pid, signal.SIGKILL)
    live.process.wait()
    until(lambda: setuid_node.sweep() and not setuid_node.site.leases(), "swept", 20)
    assert quota_of(counted, project) == (0, 0)
    assert [path.name for path in counted.iterdir()] == ["lost+found"]


@pytest.mark.parametrize("profile", ["strict", "compat"])
def test_file_systems_in_memory_are_no_larger_than_scratch(node, profile):
    limited(node, 'scratch = "2MiB"')
    script = "head -c 3000000 /dev/zero >/tmp/x; wc -c </tmp/x; df -B1 --output=size /tmp /var/tmp /dev/shm | tail -n +2"
    ran = node.sh(kind(node), script, profile=profile)
    written, *sizes = map(int, ran.text.split())
    assert (written, sizes) == (2 * MIB, [2 * MIB] * 3), ran


def test_a_payload_with_room_for_one_descriptor_more_is_started(node):
    """Its limit is the pilot's own. Its socket is descriptor 3 until exec, and a pidfd had no place beside it."""
    for who in ("map", "log-only"):
        ran = node.site.run(["prlimit", "--nofile=4:1024", *node.argv(who, ["/bin/true"])])
        assert (ran.rc, ran.err) == (0, b""), ran


# As many descriptors on their way, in messages that nobody has read, as an id may have, and some more (unix(7), ETOOMANYREFS).
FLYING = """
import array, contextlib, socket, sys
pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(8)]
with contextlib.suppress(OSError):
    for one, _ in pairs:
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))])
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("who", "role"), [("static", "user1"), ("log-only", "pilot")])
def test_descriptors_that_others_of_its_id_have_on_their_way_keep_no_payload_from_its_start(setuid_node, who, role):
    """Another payload's, where an account is shared."""
    site, few = setuid_node.site, ["prlimit", "--nofile=1024:4096"]
    words = [*few, sys.executable, "-I", "-c", FLYING]
    with site.start(words, user=site.accounts[role], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as others:
        assert others.stdout.readline() == b"\n"
        ran = site.run([*few, *setuid_node.argv(who, ["/bin/true"])])
        others.stdin.close()
    assert (ran.rc, ran.err) == (0, b""), ran
