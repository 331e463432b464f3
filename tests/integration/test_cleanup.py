"""What is left when a run has ended (I7, I8, I18, I19).

No process, no mount, no lease; and of files only what belongs to the pilot and leads nowhere.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.need import need
from tests.node import alive, delegated_ids, until
from tests.site import command

#: launcher, kind, profile, how the work directory is handed over. Profile none has no mounts, so nothing can be mapped.
WORK = [
    ("setuid", "static", "batch", "idmap"), ("setuid", "map", "strict", "idmap"), ("setuid", "block", "compat", "idmap"),
    ("setuid", "static", "none", "chown"), ("setuid", "map", "none", "chown"), ("setuid", "log-only", "batch", "plain"),
    ("userns", "map", "batch", "plain"), ("userns", "log-only", "none", "plain"),
]
CHOWNED = [case for case in WORK if case[3] == "chown"]
TREES = [
    ("setuid", "static", "batch"), ("setuid", "static", "none"), ("setuid", "log-only", "none"),
    ("userns", "map", "strict"), ("userns", "log-only", "none"),
]
MARK = f"nwcleanup{os.getpid()}"


def python(code, *words):
    return ("/usr/bin/python3", "-I", "-c", f"# {MARK}\n{code}", *words)


def marked():
    """Processes of this module's payloads, whatever their uid."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [int(pid)] * (f"# {MARK}".encode() in line and b"nodewrap" not in line.split(b"\0")[0])
    return found


@pytest.fixture(params=TREES, ids="-".join)
def case(request):
    """run(*command): as the payload of that case; afterwards no process of it may be left."""
    launcher, kind, profile = request.param
    node = request.getfixturevalue(f"{launcher}_node")

    def run(*words, **more):
        ran = node.run(kind, *words, profile=profile, **more)
        assert [pid for pid in marked() if alive(pid)] == []
        assert ran.record("cleanup")["nodewrap"]["cleanup"]["processes_left"] == 0
        for place in node.site.read_guard().get("cgroup", []):
            own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
            assert not Path(f"{place}{own}/nodewrap-{ran.record('start')['nodewrap']['run']['id']}").exists()
        return ran

    return run


class Work:
    """A work directory in use: node, how (its way of handing over), top (its path). run: a payload in it."""

    def __init__(self, request, home, param):
        self.launcher, self.kind, self.profile, self.how = param
        self.node = request.getfixturevalue(f"{self.launcher}_node")
        if self.launcher == "userns" and self.kind == "map" and delegated_ids(self.node.pilot.name):
            self.how = "chown"
        self.top = home / "work"
        self.top.mkdir(mode=0o755)
        self.give(self.top)

    def give(self, path):
        os.chown(path, self.node.pilot.uid, self.node.pilot.gid, follow_symlinks=False)

    def run(self, *words, **more):
        return self.node.run(self.kind, *words, profile=self.profile, options=["--workdir", str(self.top)], **more)

    def sh(self, script, **more):
        return self.run("/bin/sh", "-c", script, **more)

    def python(self, code, **more):
        return self.run(*python(code), **more)

    def owners(self):
        """(uid, gid) of everything below, the directory itself among it."""
        listing = command("find", self.top, "-printf", "%U %G\\0").split("\0")[:-1]
        return {tuple(map(int, line.split())) for line in listing}

    def is_the_pilots(self):
        return self.owners() == {(self.node.pilot.uid, self.node.pilot.gid)}


@pytest.fixture(params=WORK, ids="-".join)
def work(request, home):
    made = Work(request, home, request.param)
    yield made
    subprocess.run(["rm", "-rf", made.top], check=True)


@pytest.fixture(params=CHOWNED, ids="-".join)
def chowned(request, home):
    made = Work(request, home, request.param)
    yield made
    subprocess.run(["rm", "-rf", made.top], check=True)


# ---- processes (I7) ----


def test_daemons_that_forked_twice_and_left_the_session_are_ended(case):
    code = """
import os, signal, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
            time.sleep(60)
        os._exit(0)
    os.wait()
"""
    assert case(*python(code)).rc == 0


def test_tree_of_300_processes_is_ended_at_once(case):
    code = """
import os, time
made = 0
for _ in range(300):
    if os.fork() == 0:
        if made % 3 == 0:
            os.setsid()
        time.sleep(60)
        os._exit(0)
    made += 1
"""
    ran = case(*python(code))
    assert ran.rc == 0
    assert ran.seconds < 5


def test_tree_that_goes_on_forking_is_ended(case):
    """Two that replace each other: whoever kills by a list of pids comes too late."""
    code = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def relay():
    end = time.time() + 60
    while time.time() < end:
        if os.fork():
            os._exit(0)
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        relay()
time.sleep(0.1)
"""
    assert case(*python(code)).rc == 0


def test_stopped_processes_are_ended(case):
    code = "import os, signal, time\nif os.fork() == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(60)\ntime.sleep(0.1)"
    assert case(*python(code)).rc == 0


def test_background_process_does_not_keep_the_pilot_waiting_for_the_end_of_output(case):
    """It holds stdout: without its end the pilot would wait for the end of the pipe."""
    ran = case("/bin/sh", "-c", "sleep 60 & echo said")
    assert (ran.rc, ran.out) == (0, b"said\n")
    assert ran.seconds < 10


def test_number_of_killed_processes_is_on_record(setuid_node):
    ran = setuid_node.sh("static", "sleep 60 & sleep 60 & sleep 60 & sleep 0.1")
    assert ran.record("cleanup")["nodewrap"]["cleanup"]["killed"] == 3


# ---- the work directory: whose it is ----


def test_work_directory_is_the_payloads_during_the_run_and_the_pilots_after_it(work):
    (work.top / "before").write_text("from the pilot")
    work.give(work.top / "before")
    ran = work.sh('set -e; cat before >after; mkdir -p a/b; echo x >a/b/c; chmod 600 after; stat -c "%u" . before after a/b/c; id -u; pwd')
    assert ran.rc == 0, ran
    *inside, uid, where = ran.text.split()
    assert set(inside) == {uid}
    assert where == str(work.top)
    assert work.is_the_pilots()
    assert (work.top / "after").read_text() == "from the pilot"
    assert ran.record("start")["nodewrap"]["isolation"]["workdir"] == work.how
    handed = ran.record("handover")["nodewrap"]["cleanup"]
    assert handed["left"] == 0
    assert handed["neutralised"] == {"symlinks": 0, "special": 0, "suid": 0, "foreign": 0, "flags": 0, "acls": 0}


def test_files_on_disk_are_the_pilots_throughout_an_idmapped_run(setuid_node, home):
    top = home / "live"
    top.mkdir()
    os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
    live = setuid_node.start("static", "/bin/sh", "-c", "echo x >made; echo ready; read x", options=["--workdir", str(top)])
    assert live.process.stdout.readline() == b"ready\n"
    info = (top / "made").stat()
    assert (info.st_uid, info.st_gid) == (setuid_node.pilot.uid, setuid_node.pilot.gid)
    assert live.end(b"\n")[0] == 0
    shutil.rmtree(top)


def test_nobody_but_pilot_and_payload_can_write_there_during_the_run(setuid_node, home):
    """It never becomes world-writable."""
    top = home / "live"
    top.mkdir(mode=0o700)
    os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
    for profile in ("batch", "none"):
        live = setuid_node.start("static", "/bin/sh", "-c", "echo ready; read x", options=["--workdir", str(top)], profile=profile)
        assert live.process.stdout.readline() == b"ready\n"
        assert stat.S_IMODE(top.stat().st_mode) & 0o077 == 0
        assert live.end(b"\n")[0] == 0
    shutil.rmtree(top)


def test_directory_comes_back_when_the_payload_is_killed_or_never_ran(chowned):
    """Ended by a signal; by the wall limit; command not found."""
    assert chowned.sh("echo x >made; kill -9 $$").rc == 137
    assert chowned.is_the_pilots()
    assert chowned.run("/nonexistent").rc == 127
    assert chowned.is_the_pilots()


def test_directory_comes_back_from_a_file_system_that_cannot_be_mapped(setuid_node, home):
    """ramfs has no idmapped mounts: the launcher changes the owner, there and back."""
    need("root")
    top = home / "ram"
    top.mkdir()
    command("mount", "-t", "ramfs", "-o", "mode=755", "none", top)
    try:
        os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
        ran = setuid_node.sh("static", "mkdir d && echo x >d/f && stat -c %u d/f && id -u", options=["--workdir", str(top)])
        assert ran.rc == 0, ran
        assert len(set(ran.text.split())) == 1
        assert ran.record("start")["nodewrap"]["isolation"]["workdir"] == "chown"
        assert {(path.stat().st_uid, path.stat().st_gid) for path in (top, *top.rglob("*"))} == {(setuid_node.pilot.uid, setuid_node.pilot.gid)}
    finally:
        command("umount", top)
        top.rmdir()


def test_immutable_file_of_the_payloads_comes_back_and_one_of_the_pilots_stays_immutable(chowned):
    """Only root can have made it so; the launcher clears it where it has to change its owner, and says so."""
    need("root", "chattr")
    for name in ("pilots", "payloads"):
        (chowned.top / name).write_text("x")
        chowned.give(chowned.top / name)
    command("chattr", "+i", chowned.top / "pilots")
    live = chowned.node.start(chowned.kind, "/bin/sh", "-c", "echo ready; read x", profile=chowned.profile, options=["--workdir", str(chowned.top)])
    try:
        assert live.process.stdout.readline() == b"ready\n"
        command("chattr", "+i", chowned.top / "payloads")
        assert live.end(b"\n")[0] == 0
        assert chowned.is_the_pilots()
        assert "i" in command("lsattr", chowned.top / "pilots").split()[0]
        handed = next(record for record in reversed(chowned.node.site.records()) if record["event"]["action"] == "handover")["nodewrap"]["cleanup"]
        assert (handed["left"], handed["neutralised"]["flags"]) == (0, 1)
    finally:
        for name in ("pilots", "payloads"):
            command("chattr", "-i", chowned.top / name)


def test_what_cannot_be_given_back_is_reported_with_its_path(work):
    """A mount in the work directory is not the payload's, and is not entered. Its name breaks no record."""
    need("root")
    places = [work.top / name for name in ("mounted", os.fsdecode(b"\xff\n\x1b[2J"))]
    live = work.node.start(work.kind, "/bin/sh", "-c", "echo ready; read x", profile=work.profile, options=["--workdir", str(work.top)])
    assert live.process.stdout.readline() == b"ready\n"
    for place in places:
        place.mkdir()
        command("mount", "-t", "tmpfs", "none", place)
        os.mkfifo(place / "fifo")
    try:
        assert live.end(b"\n")[0] == 0
        ends = {record["event"]["action"]: record for record in work.node.site.records()}
        handed = ends["handover"]["nodewrap"]["cleanup"]
        assert (handed["left"], handed["neutralised"]["special"]) == (2, 0)
        assert [ends[action]["event"]["outcome"] for action in ("exit", "handover", "cleanup")] == ["success", "failure", "failure"]
        assert "mounted: a mount point" in handed["left_paths"]
        assert [os.listdir(place) for place in places] == [["fifo"], ["fifo"]]
    finally:
        for place in places:
            command("umount", place)


# ---- what goes back (I18, I19) ----


def test_links_that_lead_out_are_removed_and_others_stay(work):
    outside = ["/etc/passwd", "../x", "d/../../x", "/", "..", ".", "/tmp/x", "d/../../../etc", f"{work.top}x", f"{work.top}/../x"]
    inside = ["file", "d/file", "./file", f"{work.top}/file", f"{work.top}"]
    lines = [f"ln -s '{to}' out{n}" for n, to in enumerate(outside) if to != "."] + [f"ln -s '{to}' in{n}" for n, to in enumerate(inside)]
    ran = work.sh("set -e; mkdir d; : >file; ln -s ../file d/up; ln -s ../../file d/out; " + "; ".join(lines))
    assert ran.rc == 0, ran
    left = {path.name for path in work.top.rglob("*") if path.is_symlink()}
    assert left == {f"in{n}" for n in range(len(inside))} | {"up"}
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["symlinks"] == len(outside)
    assert work.is_the_pilots()


def test_links_that_lead_out_stay_when_the_pilot_made_them_before(work):
    """And no link of the payload's leads out through one of them."""
    (work.top / "software").symlink_to("/cvmfs/example.org")
    (work.top / "home").symlink_to("..")
    (work.top / "moved").symlink_to("/etc/hosts")
    for name in ("software", "home", "moved"):
        work.give(work.top / name)
    time.sleep(0.05)  # the clock that stamps files ticks every 1 to 10 ms
    ran = work.sh("set -e; ln -s home/secret direct; mkdir d; ln -s ../home/secret d/below; ln -s /etc/passwd out; mv moved away; ln -s d/file fine")
    assert ran.rc == 0, ran
    assert sorted(path.name for path in work.top.rglob("*")) == ["d", "fine", "home", "software"]
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["symlinks"] == 4
    assert work.is_the_pilots()


def test_where_nothing_proves_the_age_of_a_link_it_goes(setuid_node, home):
    """ramfs stands for file systems with a clock of their own."""
    need("root")
    top = home / "ram"
    top.mkdir()
    command("mount", "-t", "ramfs", "-o", "mode=755", "none", top)
    try:
        (top / "software").symlink_to("/cvmfs/example.org")
        os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
        time.sleep(0.05)
        assert setuid_node.sh("static", "true", options=["--workdir", str(top)]).rc == 0
        assert os.listdir(top) == []
    finally:
        command("umount", top)
        top.rmdir()


def test_directory_of_a_run_that_never_began_is_left_as_it_is(work):
    (work.top / "software").symlink_to("/cvmfs/example.org")
    os.mkfifo(work.top / "fifo")
    for name in ("software", "fifo"):
        work.give(work.top / name)
    work.node.open_guard(cgroup="/nonexistent")
    ran = work.node.run(work.kind, "/bin/true", profile="strict", options=["--workdir", str(work.top)])
    assert (ran.rc, "NW-MISSING" in ran.err.decode()) == (202, True), ran
    assert sorted(os.listdir(work.top)) == ["fifo", "software"]
    assert work.is_the_pilots()


def test_access_lists_that_the_payload_left_do_not_go_back(work):
    code = """
import os, struct
os.mkdir("d")
grant = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in ((1, 7, -1 & 0xffffffff), (2, 7, os.getuid()), (4, 0, -1 & 0xffffffff),
    (16, 7, -1 & 0xffffffff), (32, 0, -1 & 0xffffffff)))
for name in ("system.posix_acl_access", "system.posix_acl_default"):
    os.setxattr("d", name, grant)
open("d/file", "w").close()
"""
    ran = work.python(code)
    assert ran.rc == 0, ran
    for name in ("d", "d/file"):
        assert os.listxattr(work.top / name) == []
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["acls"] == 2


def test_chain_of_links_cannot_lead_out(work):
    """Each link alone looks harmless, the two together do not: a -> d/e/f (up by a name), and so on."""
    ran = work.sh("set -e; mkdir -p d/e; ln -s d/e a; ln -s a/../../../etc/passwd b; ln -s a/../.. c; ln -s ../../d d/e/back")
    assert ran.rc == 0, ran
    for path in work.top.rglob("*"):
        assert os.path.realpath(path).startswith(str(work.top)), path


def test_fifos_and_sockets_are_removed_and_counted(work):
    code = "import os, socket\nos.mkfifo('fifo')\nos.mkdir('d')\nos.mkfifo('d/fifo')\nsocket.socket(socket.AF_UNIX).bind('socket')"
    ran = work.python(code)
    assert ran.rc == 0, ran
    assert sorted(path.name for path in work.top.rglob("*")) == ["d"]
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["special"] == 3


def test_setid_bits_cannot_be_made_or_do_not_come_back(work):
    code = """
import os
for name, mode in (("u", 0o4755), ("g", 0o2755), ("b", 0o6755)):
    open(name, "w").close()
    try:
        os.chmod(name, mode)
    except PermissionError:
        print("refused")
"""
    ran = work.python(code)
    assert ran.rc == 0, ran
    assert {stat.S_IMODE(path.stat().st_mode) & 0o7000 for path in work.top.iterdir()} == {0}
    suid = ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["suid"]
    assert (ran.text.split(), suid) == ((["refused"] * 3, 0) if work.profile != "none" else ([], 3))
    assert work.is_the_pilots()


def test_file_capabilities_cannot_be_left_behind(work):
    """In a user namespace of its own the payload is root, and may write capabilities that count there. On disk they count for nobody else."""
    code = """
import ctypes, os, struct
try:
    if os.environ.get("NEST"):
        uid, gid = os.getuid(), os.getgid()
        if ctypes.CDLL(None).unshare(0x10000000) == 0:
            open("/proc/self/setgroups", "w").write("deny")
            open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
            open("/proc/self/gid_map", "w").write(f"0 {gid} 1")
    open("tool", "w").close()
    os.setxattr("tool", "security.capability", struct.pack("<IIIII", 0x02000001, 0xffffffff, 0, 0xffffffff, 0))
    print("set")
except OSError as wrong:
    print("refused")
"""
    for nest in ("", "NEST=1"):
        ran = work.run("/usr/bin/env", *([nest] if nest else []), *python(code))
        assert ran.rc == 0, ran
        try:
            found = os.getxattr(work.top / "tool", "security.capability")
        except OSError:
            continue
        assert nest, "without a namespace of its own it has no right to"
        assert found[3] == 3, "version 3: tied to the namespace whose root made it"
        assert int.from_bytes(found[20:24], "little") >= 1000, "and that root is no root outside"


def test_device_nodes_cannot_be_made(work):
    ran = work.python("import os, stat\ntry:\n    os.mknod('null', stat.S_IFCHR | 0o666, os.makedev(1, 3))\nexcept OSError:\n    print('refused')")
    assert (ran.out, list(work.top.iterdir())) == (b"refused\n", [])


# ---- hostile trees (I8) ----


@pytest.mark.parametrize("work", [WORK[0], WORK[3], WORK[6]], ids="-".join, indirect=True)  # one of each way
def test_full_work_directory_with_an_open_file_that_has_no_name_comes_back_and_is_free(work):
    """tmpfs at its size: what only a process held is gone with it."""
    need("root")
    command("mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "none", work.top)
    try:
        work.give(work.top)
        code = """
import os, sys
os.symlink("/etc/passwd", "out")
held = open("held", "wb", buffering=0)
os.unlink("held")
try:
    while True:
        held.write(bytes(65536))
except OSError as wrong:
    print(wrong.errno)
os.mkfifo("fifo")
if os.fork() == 0:
    os.pause() if hasattr(os, "pause") else __import__("signal").pause()
"""
        ran = work.python(code)
        assert (ran.rc, ran.text) == (0, "28\n"), ran
        info = os.statvfs(work.top)
        assert info.f_bavail > 0.9 * info.f_blocks
        assert (os.listdir(work.top), work.is_the_pilots()) == ([], True)
    finally:
        command("umount", work.top)


def test_sparse_file_of_a_terabyte_comes_back_at_once(work):
    ran = work.sh("truncate -s 1T big")
    assert ran.rc == 0, ran
    assert ran.seconds < 5
    assert ((work.top / "big").stat().st_size, work.is_the_pilots()) == (1 << 40, True)


@pytest.mark.parametrize("work", [WORK[0], WORK[3], WORK[6]], ids="-".join, indirect=True)  # one of each way: rm(1) takes seconds for such a tree
def test_tree_3000_levels_deep_comes_back(work):
    code = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nos.mkfifo('fifo')\nopen('leaf', 'w').close()"
    ran = work.python(code)
    assert ran.rc == 0, ran
    handed = ran.record("handover")["nodewrap"]["cleanup"]
    assert (handed["left"], handed["entries"], handed["neutralised"]["special"]) == (0, 3002, 1)
    assert work.is_the_pilots()


def test_closed_directories_and_files_come_back(work):
    ran = work.sh("set -e; mkdir -p a/b/c; echo x >a/b/c/f; mkfifo a/b/p; chmod 000 a/b/c/f a/b/c a/b a; : >g; chmod 000 g")
    assert ran.rc == 0, ran
    assert work.is_the_pilots()
    handed = ran.record("handover")["nodewrap"]["cleanup"]
    assert (handed["left"], handed["neutralised"]["special"]) == (0, 1)
    (work.top / "a/b/c/f").chmod(0o600)  # it is the pilot's, and closed still
    assert (work.top / "a/b/c/f").read_text() == "x\n"


def test_work_directory_itself_closed_by_the_payload_comes_back(work):
    ran = work.sh("mkfifo p; echo x >f; chmod 000 .")
    assert ran.rc == 0, ran
    assert work.is_the_pilots()
    assert sorted(path.name for path in work.top.iterdir()) == ["f"]
    assert ran.record("handover")["nodewrap"]["cleanup"]["left"] == 0


def test_hostile_names_come_back_and_break_no_record(work):
    names = [b"a\nb", b"\x1b[2J", b"\xff\xfe", b"-rf", b"n" * 255, "‮".encode(), b" ", b"\\", b"...", b"'\"$(x)"]
    code = f"import os\nfor name in {names!r}:\n    os.mkfifo(b'p' + name[:250])\n    open(name, 'w').close()"
    ran = work.python(code)
    assert ran.rc == 0, ran
    assert sorted(os.listdir(os.fsencode(work.top))) == sorted(names)
    assert work.is_the_pilots()
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["special"] == len(names)


def test_many_entries_of_which_each_second_is_removed_are_all_dealt_with(work):
    code = "import os\nfor n in range(3000):\n    os.mkfifo(f'p{n}') if n % 2 else open(f'f{n}', 'w').close()"
    ran = work.python(code)
    assert ran.rc == 0, ran
    assert len(os.listdir(work.top)) == 1500
    assert not [path for path in work.top.iterdir() if not path.is_file()]
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["special"] == 1500


def test_hard_link_to_somebody_elses_file_is_never_given_to_the_pilot(chowned):
    """fs.protected_hardlinks keeps a payload from making one; root makes it here."""
    other = chowned.top.parent / "others"
    other.write_text("not the pilot's")
    os.chown(other, chowned.node.site.accounts["user2"].uid, 0)
    os.link(other, chowned.top / "link")
    ran = chowned.sh("true")
    assert other.stat().st_uid == chowned.node.site.accounts["user2"].uid
    assert not (chowned.top / "link").exists()
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["foreign"] == 1
    other.unlink()


CAPS = """
import os, struct
with open("armed", "w") as file:
    file.write("text")
os.chmod("armed", 0o555)
os.setxattr("armed", "security.capability", struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0))
"""


def test_file_capabilities_of_a_nested_namespace_do_not_go_back(work):
    nested = ("/usr/bin/unshare", "-Ur", *python(CAPS))
    ran = work.node.run(work.kind, *nested, profile="batch", options=["--workdir", str(work.top)])
    assert ran.rc == 0, ran
    armed = work.top / "armed"
    assert os.listxattr(armed) == []
    assert (armed.read_text(), armed.stat().st_mode & 0o7777) == ("text", 0o555)
    assert ran.record("handover")["nodewrap"]["cleanup"]["neutralised"]["suid"] == 1


# ---- exposed directories ----


def test_exposed_directory_is_writable_and_its_own_links_stay(work):
    shown = work.top.parent / "shown"
    shutil.rmtree(shown, ignore_errors=True)
    shown.mkdir()
    (shown / "software").symlink_to("/cvmfs/example.org")  # the pilot's own, from before
    work.give(shown)
    options = ["--workdir", str(work.top), "--expose", str(shown)]
    script = f"echo x >{shown}/made "
    if work.how == "chown":  # profile none shows everything as it is, and changes no owner but the work directory's
        script = f"ls {shown}; true"
    ran = work.node.run(work.kind, "/bin/sh", "-c", script, profile=work.profile, options=options)
    assert ran.rc == 0, ran
    if work.how != "chown":
        assert sorted(path.name for path in shown.iterdir()) == ["made", "software"]
        assert ((shown / "made").stat().st_uid, (shown / "made").stat().st_gid) == (work.node.pilot.uid, work.node.pilot.gid)
    shutil.rmtree(shown)


# ---- the rest ----


def test_private_tmp_is_gone_with_the_run(setuid_node):
    name = f"/tmp/{MARK}"
    assert setuid_node.sh("static", f"echo x >{name}; cat {name}").out == b"x\n"
    assert not os.path.exists(name)
    assert setuid_node.sh("static", f"test ! -e {name}").rc == 0


def test_ipc_objects_are_gone_with_the_run(setuid_node):
    code = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.shmget(0x4e5700, 4096, 0o1666) >= 0"
    assert setuid_node.run("static", *python(code)).rc == 0
    assert f"{0x4e5700}" not in {line.split()[0] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def test_abstract_name_of_an_ended_payload_is_free(setuid_node):
    code = f"import os, socket, time\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0{MARK}')\nif os.fork() == 0:\n    time.sleep(60)"
    assert setuid_node.run("static", *python(code)).rc == 0
    with socket.socket(socket.AF_UNIX) as mine:
        mine.bind(f"\0{MARK}")


def mounts(node):
    """Mounts of this node, without those that other sessions of tests come and go with."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if str(node.site.prefix) in line or not ("/nodewrap-test-" in line or "/pytest-of-" in line)}


def test_launcher_leaves_no_mount_behind_when_it_is_killed(setuid_node, home):
    top = home / "mounted"
    top.mkdir()
    os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
    before = mounts(setuid_node)
    live = setuid_node.start("static", "/bin/sh", "-c", "read x", options=["--workdir", str(top)])
    live.process.kill()
    live.process.wait()
    until(lambda: not alive(live.pid) and setuid_node.is_clean(), "payload and keeper end", 5)
    # Nobody is left who could still unmount one of the run's; the node's own come and go.
    until(lambda: mounts(setuid_node) <= before, "no mount is left", 5)
    top.rmdir()
