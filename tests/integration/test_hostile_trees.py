"""Hostile trees (I8, I18, I19): csrc/tree.c against what a payload, and those who help it, can leave (bench/walk.c runs it alone).

Orders of the walk: ``plain``, where all is the pilot's on disk (idmapped, log-only); ``chown``, where the payload's goes back to the pilot;
``remove``, what an id left in a directory that others share. Whole runs with such trees: test_cleanup.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import trees
from bench.node import compiled
from tests.need import need
from tests.node import until

#: Ids that no account has.
PAYLOAD, PILOT, STRANGER = 1700000001, 1700000002, 1700000003
CAP_CHOWN = 1
BOTH = ["plain", "chown"]
LIBC = ctypes.CDLL(None, use_errno=True)
EXCHANGE = 2


@pytest.fixture(scope="module")
def walker():
    need("root", "gcc")
    return trees.walker()


@pytest.fixture(scope="module")
def grow():
    return compiled("grow")


@pytest.fixture
def place(tmp_path):
    """A directory that everybody reaches; cleaned of the deepest trees afterwards."""
    for path in (*tmp_path.parents[:3], tmp_path):  # pytest keeps them for itself
        path.chmod(path.stat().st_mode | 0o711)
    yield tmp_path
    subprocess.run(["chattr", "-R", "-ia", tmp_path], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["rm", "-rf", "--one-file-system", tmp_path], check=True)


@contextmanager
def mounted(at, *words):
    """mount(8) with those words, at that directory."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", *words, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@contextmanager
def ext4(place, size="256M", *options):
    """An ext4 of its own, open to all."""
    need("loop", "mkfs.ext4")
    image = place / "image"
    subprocess.run(["truncate", "-s", size, image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", *options, image], check=True)
    with mounted(place / "ext4", "-o", "loop", image) as top:
        top.chmod(0o755)
        yield top
    image.unlink()


@pytest.fixture
def disk(place):
    with ext4(place) as top:
        yield top


@pytest.fixture
def memory(place):
    with mounted(place / "memory", "-t", "tmpfs", "-o", "size=4g,nr_inodes=3m,mode=755", "none") as top:
        yield top


class Tree:
    """A work directory in the hands of who owns it before that order of the walk. back(): give it back to the pilot -> count, left."""

    def __init__(self, walker, order, top):
        self.walker, self.order, self.top = walker, order, top
        self.owner = PILOT if order == "plain" else PAYLOAD
        self.mkdir(".")

    def own(self, name, uid=None):
        os.lchown(self.top / name, uid or self.owner, uid or self.owner)
        return self.top / name

    def mkdir(self, name, mode=0o755):
        (self.top / name).mkdir()
        (self.top / name).chmod(mode)
        return self.own(name)

    def write(self, name, text="", uid=None):
        (self.top / name).write_text(text)
        return self.own(name, uid)

    def link(self, name, to):
        os.symlink(to, self.top / name)
        return self.own(name)

    def fifo(self, name):
        os.mkfifo(self.top / name)
        return self.own(name)

    def argv(self, **more):
        more = {"to": PILOT, "group": PILOT, **more}
        return trees.argv(self.walker, self.top, self.order, self.owner, self.owner, **more)

    def back(self, **more):
        done = subprocess.run(self.argv(**more), stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        return trees.parsed(done.stdout)

    def owners(self):
        found = subprocess.run(["find", self.top, "-printf", "%U\\0"], stdout=subprocess.PIPE, check=True)
        return {int(uid) for uid in found.stdout.split(b"\0")[:-1]}


@pytest.fixture(params=BOTH)
def tree(request, walker, place):
    return Tree(walker, request.param, place / "work")


@pytest.fixture(params=BOTH)
def disk_tree(request, walker, disk):
    return Tree(walker, request.param, disk / "work")


def fill(top, uid, *names):
    """Make names below top for uid: NAME/ a directory, NAME a file."""
    for name in names:
        path = top / name
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(name)
        os.lchown(path, uid, uid)


def listing(top):
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


def acl(*entries):
    """A POSIX ACL as the kernel takes it: (tag, rights, id)…"""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


#: Owner rwx, a stranger rwx, the group nothing, mask rwx, others nothing.
GRANT = acl((1, 7, 0xFFFFFFFF), (2, 7, STRANGER), (4, 0, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF))
ACCESS, DEFAULT, CAPS = "system.posix_acl_access", "system.posix_acl_default", "security.capability"
#: Version 2: CAP_SYS_ADMIN, permitted and effective.
ARMS = struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0)


def chattr(flags, path):
    need("chattr")
    subprocess.run(["chattr", flags, path], check=True)


def exchange(a, b):
    return LIBC.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), EXCHANGE)


# ---- removing what an id left in directories that others share ----


@pytest.fixture
def shared(place):
    """A directory in which everybody may write, as /tmp."""
    top = place / "shared"
    top.mkdir()
    top.chmod(0o1777)
    return top


def remove(walker, top, last=PAYLOAD):
    return trees.walk(walker, top, "remove", PAYLOAD, PAYLOAD, last=last)


def test_what_an_id_owns_in_a_shared_directory_is_removed_and_the_rest_stays(walker, shared):
    fill(shared, PAYLOAD, "a", "d/", "d/e/", "d/e/f", "d/g", "empty/")
    fill(shared, STRANGER, "s", "t/", "t/u")
    (shared / "t").chmod(0o700)
    os.symlink("/etc/passwd", shared / "d/link")
    os.lchown(shared / "d/link", PAYLOAD, PAYLOAD)
    os.mkfifo(shared / "d/fifo")
    os.chown(shared / "d/fifo", PAYLOAD, PAYLOAD)
    count, left = remove(walker, shared)
    assert listing(shared) == ["s", "t", "t/u"]
    assert (count["removed"], count["foreign"], count["left"], left) == (8, 0, 0, [])


def test_what_belongs_to_others_in_a_removed_directory_stays_and_is_told_once(walker, shared):
    fill(shared, PAYLOAD, "d/", "d/e/", "d/e/own", "d/own")
    fill(shared, STRANGER, "d/e/theirs")
    count, left = remove(walker, shared)
    assert listing(shared) == ["d", "d/e", "d/e/theirs"]
    assert (count["removed"], count["foreign"], count["left"]) == (2, 1, 1)
    assert left == [b"d/e/theirs (uid %d): Operation not permitted" % STRANGER]


def test_closed_directories_are_removed(walker, shared):
    fill(shared, PAYLOAD, "d/", "d/e/", "d/e/f", "r/", "r/f")
    for name, mode in (("d/e/f", 0), ("d/e", 0), ("d", 0), ("r", 0o500)):
        (shared / name).chmod(mode)
    assert remove(walker, shared).count["left"] == 0
    assert listing(shared) == []


def test_link_to_a_directory_is_removed_and_not_followed(walker, shared, place):
    victim = place / "victim"
    victim.mkdir()
    fill(victim, PAYLOAD, "precious")
    os.symlink(victim, shared / "link")
    os.lchown(shared / "link", PAYLOAD, PAYLOAD)
    remove(walker, shared)
    assert (listing(shared), listing(victim)) == ([], ["precious"])


def test_mount_below_is_not_entered_by_removal(walker, shared):
    fill(shared, PAYLOAD, "d/", "d/mounted/", "d/own")
    with mounted(shared / "d/mounted", "-t", "tmpfs", "none"):
        fill(shared, PAYLOAD, "d/mounted/precious")
        os.chown(shared / "d/mounted", PAYLOAD, PAYLOAD)
        count, left = remove(walker, shared)
        assert listing(shared) == ["d", "d/mounted", "d/mounted/precious"]
        assert (count["removed"], left) == (1, [b"d/mounted: a mount point"])


@pytest.mark.parametrize(("shape", "n"), [("deep", 3000), ("mixed", 20000), ("wide", 20000), ("dirs", 10000)])
def test_large_trees_are_removed_whole(walker, grow, shared, shape, n):
    subprocess.run([grow, shared / "tree", shape, str(PAYLOAD), str(n)], check=True)
    count, left = remove(walker, shared)
    assert (os.listdir(shared), left) == ([], [])
    assert count["removed"] == count["entries"] >= n


def test_removal_of_a_large_tree_leaves_what_is_not_the_ids_and_counts_it_once(walker, grow, shared):
    """Both workers meet directories of others."""
    subprocess.run([grow, shared / "tree", "mixed", str(PAYLOAD), "60000"], check=True)
    foreign = sorted(shared.glob("tree/sub*/part1/file000003"))
    for path in foreign:
        os.chown(path, STRANGER, STRANGER)
    count, left = remove(walker, shared)
    assert sorted(path for path in shared.rglob("*") if not path.is_dir()) == foreign
    assert (count["foreign"], count["left"], len(left)) == (len(foreign), len(foreign), 4)
    assert len(foreign) > 5


def test_deep_and_wide_at_once_is_removed_whole(walker, shared):
    """Each directory of a deep chain has more than one below: the way back up goes on where it left off, on file systems of both kinds."""
    for files in (64, 1024):
        made = comb(shared / "comb", PAYLOAD)
        argv = trees.argv(walker, shared, "remove", PAYLOAD, PAYLOAD)
        done = subprocess.run(["prlimit", f"--nofile={files}", *argv], stdout=subprocess.PIPE, text=True, check=True)
        count, left = trees.parsed(done.stdout)
        assert (os.listdir(shared), count["removed"], left) == ([], made, [])


def comb(top, uid, depth=40):
    """A chain of directories of that depth, in each of which three more, with a file and a FIFO, and one that is itself 20 deep."""
    made = []
    for level in range(depth):
        path = top.joinpath(*["d"] * level)
        made.append(path)
        made += [path / f"a{n}" for n in range(3)]
        made += [path.joinpath("z", *["z"] * n) for n in range(20 if level % 10 == 0 else 1)]
    for path in made:
        path.mkdir()
        (path / "file").touch()
        os.mkfifo(path / "fifo")
    for path in made:
        for name in (".", "file", "fifo"):
            os.chown(path / name, uid, uid)
    return 3 * len(made)


# ---- depth and width ----


@pytest.mark.parametrize("order", BOTH)
def test_tree_20000_levels_deep_comes_back(walker, grow, memory, order):
    owner = PAYLOAD if order == "chown" else PILOT
    subprocess.run([grow, memory / "work", "deep", str(owner), "20000"], check=True)
    script = "import os, sys\nfor _ in range(20000):\n    os.chdir('d')\nos.mkfifo('p')\nos.chown('p', *2 * [int(sys.argv[1])])"
    subprocess.run([sys.executable, "-c", script, str(owner)], cwd=memory / "work", check=True)
    count, left = trees.walk(walker, memory / "work", order, owner, owner, to=PILOT, group=PILOT)
    assert (count["entries"], count["special"], left) == (20001, 1, [])
    found = subprocess.run(["find", memory / "work", "-uid", str(PILOT), "-printf", "x"], stdout=subprocess.PIPE, check=True)
    assert len(found.stdout) == 20001


@pytest.mark.parametrize("files", [64, 1024])
@pytest.mark.parametrize("fs", ["disk", "memory"])
@pytest.mark.parametrize("order", BOTH)
def test_deep_and_wide_at_once_comes_back(walker, request, order, fs, files):
    """Also with few descriptors, where the way back is by ".."."""
    top = request.getfixturevalue(fs) / "work"
    made = Tree(walker, order, top)
    entries = comb(top / "comb", made.owner)
    done = subprocess.run(["prlimit", f"--nofile={files}", *made.argv()], stdout=subprocess.PIPE, text=True, check=True)
    count, left = trees.parsed(done.stdout)
    assert (count["entries"], count["special"], left) == (entries, entries // 3, [])
    assert made.owners() == {PILOT}


@pytest.mark.parametrize("order", BOTH)
def test_million_entries_come_back_in_the_memory_that_ten_thousand_take(walker, grow, memory, order):
    owner, peak = PAYLOAD if order == "chown" else PILOT, {}
    for n in (10000, 1000000):
        subprocess.run([grow, memory / "work", "wide", str(owner), str(n)], check=True)
        os.symlink("/etc/passwd", memory / "work/out")
        count, left = trees.walk(walker, memory / "work", order, owner, owner, first=0, to=PILOT, group=PILOT)
        assert (count["entries"], count["symlinks"], left) == (n + 1, 1, [])
        peak[n] = count["peak_kib"]
        (memory / "work").rename(memory / f"done{n}")
    assert peak[1000000] <= peak[10000] + 64
    assert peak[1000000] < 2048


@pytest.mark.parametrize("order", BOTH)
@pytest.mark.parametrize(("shape", "n"), [("mixed", 20000), ("wide", 20000), ("dirs", 10000)])
def test_two_workers_miss_nothing_and_count_nothing_twice(walker, grow, memory, order, shape, n):
    owner = PAYLOAD if order == "chown" else PILOT
    subprocess.run([grow, memory / "work", shape, str(owner), str(n)], check=True)
    harm = [path for path in sorted(memory.rglob("*")) if path.is_file()][::7]
    for path in harm:
        path.unlink()
        os.mkfifo(path)
        os.chown(path, owner, owner)
    entries = len(list(memory.rglob("*"))) - 1
    count, left = trees.walk(walker, memory / "work", order, owner, owner, to=PILOT, group=PILOT)
    assert (count["entries"], count["special"], left) == (entries, len(harm), [])
    everything = [memory / "work", *(memory / "work").rglob("*")]
    assert {path.lstat().st_uid for path in everything} == {PILOT}
    assert not [path for path in harm if path.exists()]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor has one worker (csrc/tree.c)")
def test_death_of_the_second_worker_is_told(walker, grow, memory):
    """By the pilot's hand: in a log-only run it has the walk's uid."""
    subprocess.run([grow, memory / "work", "wide", str(PAYLOAD), "300000"], check=True)
    with subprocess.Popen(trees.argv(walker, memory / "work", "chown", PAYLOAD, PAYLOAD, to=PILOT), stdout=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(until(children.read_text, "a second worker").split()[0]), signal.SIGKILL)
        count, left = trees.parsed(process.communicate()[0])
    assert count["left"] == 1
    assert b"No child processes" in left[0]


# ---- links ----


def made_before(tree):
    """since=… for a run that begins now; what is made from here on is newer."""
    time.sleep(0.05)
    now = time.clock_gettime_ns(5)  # CLOCK_REALTIME_COARSE
    time.sleep(0.05)
    return {"since": now // 10**9, "since_ns": now % 10**9}


def test_links_that_lead_out_stay_when_they_were_there_before_the_run(tree):
    tree.mkdir("d")
    tree.link("software", "/cvmfs/example.org")
    tree.link("up", "../shared")
    tree.link("d/absolute", "/etc/hosts")
    since = made_before(tree)
    tree.link("mine", "/etc/passwd")
    count, _ = tree.back(**since)
    assert listing(tree.top) == ["d", "d/absolute", "software", "up"]
    assert (count["symlinks"], count["left"]) == (1, 0)


def test_old_link_that_the_run_has_touched_or_moved_is_none_of_the_pilots(tree):
    for name in ("renamed", "linked", "owned"):
        tree.link(name, "/etc/passwd")
    tree.mkdir("a")
    tree.mkdir("a/b")
    tree.link("a/b/inside", "../../file")  # with its directory at the top it leads out
    tree.write("file")
    since = made_before(tree)
    (tree.top / "renamed").rename(tree.top / "new")
    os.link(tree.top / "linked", tree.top / "twice", follow_symlinks=False)
    tree.own("owned")
    (tree.top / "a/b").rename(tree.top / "b")
    tree.back(**since)
    assert listing(tree.top) == ["a", "b", "file"]


def test_link_of_the_run_must_not_lead_out_through_one_that_stays(tree):
    tree.mkdir("d")
    tree.link("home", "/home")
    tree.link("d/here", ".")
    since = made_before(tree)
    tree.link("direct", "home/pilot/proxy")
    tree.link("d/below", "../home/pilot/proxy")
    tree.link("chain", "direct")
    tree.link("longer", "d/here/here/below")
    tree.link("fine", "d/here/file")
    tree.link("nowhere", "d/not-yet")
    tree.link("whole", f"{tree.top}/d")
    tree.link("whole-out", f"{tree.top}/home/pilot")
    count, left = tree.back(**since)
    kept = set(listing(tree.top)) - {"chain", "longer"}  # what they name is gone before them, or after
    assert kept == {"d", "d/here", "fine", "home", "nowhere", "whole"}
    for path in tree.top.rglob("*"):
        assert path.name == "home" or os.path.realpath(path).startswith(str(tree.top)), path
    assert (count["symlinks"] >= 3, left) == (True, [])


def test_file_system_without_fractions_of_a_second_proves_less(walker, place):
    """ext4 with small inodes stores whole seconds: a link of the run would look older than the run."""
    with ext4(place, "16M", "-I", "128") as top:
        tree = Tree(walker, "plain", top / "work")
        tree.link("old", "/etc/passwd")
        now = tree.top.joinpath("old").lstat().st_ctime_ns
        assert now % 10**9 == 0
        assert tree.back(since=now // 10**9, since_ns=999999999).count["symlinks"] == 1


def test_what_was_there_before_the_run_is_left_as_it_is(walker, disk):
    """Not in order chown: to change an owner is to change a file."""
    tree = Tree(walker, "plain", disk / "work")
    tree.fifo("fifo")
    tree.write("tool").chmod(0o4755)
    tree.write("shown").chmod(0o600)
    os.setxattr(tree.top / "shown", ACCESS, GRANT)
    since = made_before(tree)
    tree.write("new").chmod(0o4755)
    count, _ = tree.back(**since)
    assert (count["special"], count["suid"], count["acls"]) == (0, 1, 0)
    assert stat.S_IMODE((tree.top / "tool").stat().st_mode) == 0o4755


def test_links_are_not_given_away_so_that_their_age_stays_known(walker, place):
    tree = Tree(walker, "chown", place / "work")
    tree.link("out", "/etc/passwd")
    tree.write("file")
    before = (tree.top / "out").lstat().st_ctime_ns
    time.sleep(0.02)
    tree.back(give=1)
    assert ((tree.top / "file").stat().st_uid, (tree.top / "out").lstat().st_uid) == (PILOT, PAYLOAD)
    assert (tree.top / "out").lstat().st_ctime_ns == before


# ---- rights ----


def test_access_lists_of_the_run_do_not_go_back(disk_tree):
    tree = disk_tree
    tree.mkdir("d")
    tree.write("d/file", "text")
    for name in ("d", "d/file", "."):
        os.setxattr(tree.top / name, ACCESS, GRANT)
    for name in ("d", "."):
        os.setxattr(tree.top / name, DEFAULT, GRANT)
    assert stat.S_IMODE((tree.top / "d/file").stat().st_mode) == 0o770, "the mask: more than the group has"
    count, left = tree.back()
    for name in ("d", "d/file", "."):
        assert os.listxattr(tree.top / name) == []
        assert stat.S_IMODE((tree.top / name).stat().st_mode) == 0o700
    assert (count["acls"], left) == (3, [])


def test_attributes_of_its_own_hide_no_rights(disk_tree):
    """So many names that the list is long; and they themselves go back."""
    tree = disk_tree
    path = tree.write("file")
    names = [f"user.{n:02}{'x' * 240}" for n in range(10)]
    for name in names:
        os.setxattr(path, name, b"")
    os.setxattr(path, ACCESS, GRANT)
    assert tree.back().count["acls"] == 1
    assert sorted(os.listxattr(path)) == names


def test_file_capabilities_and_setid_bits_do_not_go_back(disk_tree):
    tree = disk_tree
    tree.write("caps").chmod(0o555)
    tree.write("closed").chmod(0)
    for name in ("caps", "closed"):
        os.setxattr(tree.top / name, CAPS, ARMS)
    for name, mode in (("u", 0o4755), ("g", 0o2755), ("lock", 0o2644)):
        tree.write(name).chmod(mode)
    count, left = tree.back()
    assert (count["suid"], left) == (5, [])
    for name, mode in (("caps", 0o555), ("closed", 0), ("u", 0o755), ("g", 0o755), ("lock", 0o644)):
        assert (os.listxattr(tree.top / name), stat.S_IMODE((tree.top / name).stat().st_mode)) == ([], mode)


def test_sticky_and_setgid_directories_come_back_as_they_are(disk_tree):
    """Also when one is opened up, or loses an access list."""
    tree = disk_tree
    modes = {"sticky": 0o1777, "setgid": 0o2775, "both": 0o3777, "closed": 0o3000, "listed": 0o3777}
    for name, mode in modes.items():
        tree.mkdir(name)
        tree.fifo(f"{name}/fifo")
        tree.write(f"{name}/file")
        (tree.top / name).chmod(mode)
    os.setxattr(tree.top / "listed", ACCESS, GRANT)
    count, left = tree.back()
    assert (count["special"], count["suid"], left) == (5, 0, [])
    assert tree.owners() == {PILOT}
    after = {name: stat.S_IMODE((tree.top / name).stat().st_mode) for name in modes}
    assert after == {**modes, "closed": 0o3700, "listed": 0o3700}


def test_hard_links_to_what_is_neither_the_payloads_nor_the_pilots_are_removed(walker, disk):
    tree = Tree(walker, "chown", disk / "work")
    other = disk / "other"
    other.write_text("a stranger's")
    os.chown(other, STRANGER, STRANGER)
    os.link(other, tree.top / "foreign")
    tree.write("own")
    os.link(tree.top / "own", tree.top / "twice")
    count, left = tree.back()
    assert sorted(os.listdir(tree.top)) == ["own", "twice"]
    assert (count["foreign"], left) == (1, [])
    assert (other.stat().st_uid, (tree.top / "own").stat().st_uid) == (STRANGER, PILOT)


def test_closed_tree_comes_back_from_the_top_down(tree):
    tree.mkdir("d")
    tree.mkdir("d/e")
    tree.fifo("d/e/fifo")
    tree.write("d/e/file")
    tree.mkdir("readonly")
    tree.fifo("readonly/fifo")
    for name, mode in (("d/e/file", 0), ("d/e", 0), ("d", 0), ("readonly", 0o500), (".", 0)):
        (tree.top / name).chmod(mode)
    count, left = tree.back()
    assert (count["special"], left) == (2, [])
    assert tree.owners() == {PILOT}


# ---- immutable and append-only ----


def lock(tree):
    """A file, a directory with a link in it, a directory that is append-only, an armed file: all locked."""
    tree.write("file").chmod(0o644)
    tree.mkdir("d")
    tree.link("d/out", "/etc/passwd")
    tree.mkdir("a")
    tree.fifo("a/fifo")
    tree.write("armed").chmod(0o4755)
    for name, flag in (("file", "+i"), ("d", "+i"), ("a", "+a"), ("armed", "+a")):
        chattr(flag, tree.top / name)


def test_immutable_and_append_only_files_come_back_where_root_may_clear_them(disk_tree):
    tree = disk_tree
    lock(tree)
    count, left = tree.back()
    assert (count["symlinks"], count["special"], count["suid"], left) == (1, 1, 1, [])
    assert count["flags"] == (4 if tree.order == "chown" else 3), "only where something had to be changed"
    assert tree.owners() == {PILOT}


def test_immutable_files_are_named_with_their_owner_where_they_cannot_be_cleared(disk_tree):
    tree = disk_tree
    lock(tree)
    count, left = tree.back(caps=CAP_CHOWN if tree.order == "chown" else 0)
    assert (count["flags"], count["symlinks"], count["special"]) == (0, 0, 0)
    assert count["left"] >= 3
    assert all(b" (uid %d): Operation not permitted" % tree.owner in line for line in left), left
    subprocess.run(["chattr", "-R", "-ia", tree.top], check=False, stderr=subprocess.DEVNULL)


def test_files_that_root_made_immutable_before_the_run_stay_so(walker, disk):
    """The pilot's, when the payload gets the directory; and where nothing need be changed."""
    tree = Tree(walker, "chown", disk / "work")
    tree.write("file")
    chattr("+i", tree.top / "file")
    assert tree.back(give=1).count["flags"] == 0
    plain = Tree(walker, "plain", disk / "plain")
    plain.write("file")
    chattr("+i", plain.top / "file")
    assert plain.back().count["flags"] == 0
    for top in (tree.top, plain.top):
        flags = subprocess.run(["lsattr", top / "file"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0]
        assert "i" in flags
        chattr("-i", top / "file")


def test_immutable_files_are_removed(walker, shared, disk):
    fill(disk, PAYLOAD, "d/", "d/e/", "d/e/f", "g")
    disk.chmod(0o1777)
    for name in ("d/e/f", "d/e", "g"):
        chattr("+i", disk / name)
    count, left = remove(walker, disk)
    assert (sorted(os.listdir(disk)), left, count["flags"]) == (["lost+found"], [], 3)


# ---- mounts ----


def test_mounts_inside_are_neither_entered_nor_changed(tree):
    tree.mkdir("dir")
    tree.write("file")
    outside = tree.top.parent / "outside"
    outside.write_text("x")
    outside.chmod(0o4755)
    with mounted(tree.top / "dir", "-t", "tmpfs", "-o", "mode=000", "none"), mounted_file(outside, tree.top / "file"):
        os.mkfifo(tree.top / "dir/fifo")
        left = tree.back().left
        assert (tree.top / "dir/fifo").exists()
        assert sorted(left) == [b"dir: a mount point", b"file: a mount point"]
    assert (outside.stat().st_uid, stat.S_IMODE(outside.stat().st_mode)) == (0, 0o4755)


@contextmanager
def mounted_file(source, at):
    subprocess.run(["mount", "--bind", source, at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


@contextmanager
def dead_fuse(at, kind):
    """A FUSE file system at that directory or file, whose server never answers."""
    need("fuse")
    server = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={server},rootmode={kind:o},user_id=0,group_id=0,allow_other"
    assert LIBC.mount(b"dead", os.fsencode(at), b"fuse", 6, data.encode()) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        os.close(server)  # from here on it answers ENOTCONN
        subprocess.run(["umount", at], check=True)


def test_file_system_that_never_answers_delays_nothing(tree):
    tree.mkdir("dir")
    tree.write("file")
    tree.link("through", "dir/below")
    with dead_fuse(tree.top / "dir", stat.S_IFDIR), dead_fuse(tree.top / "file", stat.S_IFREG):
        process = subprocess.Popen(tree.argv(), stdout=subprocess.PIPE, text=True)
        try:
            _, left = trees.parsed(process.communicate(timeout=10)[0])
        finally:
            process.kill()
    assert sorted(left) == [b"dir: a mount point", b"file: a mount point"]
    assert not os.path.lexists(tree.top / "through")


# ---- races ----


class Victim:
    """What lies outside, with all that a walk that is led astray would change: owner, mode, attributes, entries."""

    def __init__(self, top, owner):
        self.top = top
        top.mkdir()
        (top / "below").mkdir()
        for name in ("file", "below/file"):
            (top / name).write_text("precious")
        os.mkfifo(top / "fifo")
        os.symlink("/etc/passwd", top / "link")
        for path in (top, *top.rglob("*")):
            os.lchown(path, owner, owner)
        (top / "file").chmod(0o4755)
        self.before = self.now()

    def now(self):
        return [(str(path), path.lstat().st_uid, path.lstat().st_mode) for path in sorted((self.top, *self.top.rglob("*")))]


@contextmanager
def racing(*swaps):
    """Processes that exchange the two paths of each pair as fast as they can."""
    pids = []
    for a, b in swaps:
        pid = os.fork()
        if pid == 0:
            while True:
                exchange(a, b)
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("order", [*BOTH, "remove"])
def test_whoever_exchanges_entries_meanwhile_leads_the_walk_to_nothing_outside(walker, disk, order):
    """Directory and file against links to a victim; and a directory that goes out and comes in."""
    owner = PILOT if order == "plain" else PAYLOAD
    victim = Victim(disk / "victim", owner)
    top = disk / "work"
    tree = Tree(walker, order, top)
    end = time.monotonic() + 4
    rounds = 0
    while time.monotonic() < end or rounds <= 5:
        subprocess.run(["rm", "-rf", top, disk / "out"], check=True)
        for name in (".", "real", "real/below", "moving", "moving/a", "moving/a/b"):
            tree.mkdir(name)
        for name in ("real/file", "real/below/file", "plain", "moving/a/b/file"):
            tree.write(name).chmod(0o6755)
        tree.link("link", "../victim")
        tree.link("absolute", victim.top)
        tree.link("other", "../victim/file")
        (disk / "out").mkdir()
        with racing((top / "real", top / "link"), (top / "plain", top / "other"), (top / "moving/a", disk / "out")):
            for _ in range(4):
                trees.walk(walker, top, order, owner, owner, to=PILOT, group=PILOT)
        rounds += 1
        assert victim.now() == victim.before


@pytest.mark.parametrize("files", [64, 1024])
@pytest.mark.parametrize("order", [*BOTH, "remove"])
def test_directory_moved_out_while_the_walk_is_deep_in_it_leads_it_nowhere(walker, disk, order, files):
    """Where ".." of a moved directory leads, nothing is the walk's; what is above is done all the same. With few descriptors it must go back so."""
    owner = PILOT if order == "plain" else PAYLOAD
    tree = Tree(walker, order, disk / "work")
    path = Path("first")
    for _ in range(40):
        tree.mkdir(path)
        path = path / "d"
    bottom = tree.mkdir(path)
    for n in range(30000):
        (bottom / f"f{n}").touch()
        os.chown(bottom / f"f{n}", owner, owner)
    for name in ("zlast", "first/zlast"):
        tree.mkdir(name)
        tree.fifo(f"{name}/fifo")
    victim = Victim(disk / "victim", owner)
    victim.top.chmod(0o777)
    stopped = ["/bin/sh", "-c", 'kill -STOP $$; exec "$@"', "sh", "prlimit", f"--nofile={files}", *tree.argv()]
    process = subprocess.Popen(list(map(str, stopped)), stdout=subprocess.PIPE, text=True)

    def at_bottom():
        process.send_signal(signal.SIGSTOP)
        if str(bottom) in held(process.pid):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    try:
        until(at_bottom, "the walk is at the bottom")
        tree.top.joinpath("first", *["d"] * 20).rename(victim.top / "moved")
        process.send_signal(signal.SIGCONT)
        count, left = trees.parsed(process.communicate(timeout=30)[0])
    finally:
        process.kill()
    (victim.top / "moved").rename(disk / "moved")
    victim.top.chmod(0o755)
    assert victim.now() == victim.before
    assert count["left"] == (1 if files == 64 else 0), left
    assert not (tree.top / "zlast/fifo").exists()
    assert not (tree.top / "first/zlast/fifo").exists()


def held(pid):
    """Paths of a process's descriptors."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


# ---- file systems ----


def test_file_system_that_does_not_tell_types_is_walked_whole(walker, place):
    with ext4(place, "16M", "-O", "^filetype") as top:
        for order in BOTH:
            tree = Tree(walker, order, top / order)
            entries = comb(tree.top / "comb", tree.owner, 12)
            tree.link("out", "/etc/passwd")
            count, left = tree.back()
            assert (count["entries"], count["special"], count["symlinks"], left) == (entries + 1, entries // 3, 1, [])
            assert tree.owners() == {PILOT}


def use_blocks(tree):
    tree.write("big")
    with open(tree.top / "big", "wb", buffering=0) as big:
        while True:
            big.write(bytes(1 << 16))


def use_inodes(tree):
    for n in range(100000):
        tree.write(f"f{n}")


def test_full_file_system_comes_back(walker, place):
    """Neither of the two that fill up: blocks, and inodes."""
    with ext4(place, "8M") as top:
        for order in BOTH:
            tree = Tree(walker, order, top / order)
            tree.write("armed").chmod(0o755)
            os.setxattr(tree.top / "armed", CAPS, ARMS)
            tree.mkdir("d")
            tree.link("d/out", "/etc/passwd")
            os.setxattr(tree.top / "d", ACCESS, GRANT)
            for use in (use_blocks, use_inodes):
                with pytest.raises(OSError, match="space"):
                    use(tree)
            count, left = tree.back()
            assert (count["suid"], count["acls"], count["symlinks"], left) == (1, 1, 1, [])
            assert tree.owners() == {PILOT}
            subprocess.run(["rm", "-rf", tree.top], check=True)


def test_sparse_file_of_two_terabytes_comes_back_as_it_is(disk_tree):
    path = disk_tree.write("sparse", "x")
    os.truncate(path, 2 << 40)
    path.chmod(0o755)
    os.setxattr(path, CAPS, ARMS)
    began = time.monotonic()
    count, left = disk_tree.back()
    assert time.monotonic() - began < 5
    assert (count["suid"], left, os.listxattr(path)) == (1, [], [])
    assert (path.stat().st_size, path.stat().st_blocks < 100) == (2 << 40, True)


@pytest.mark.parametrize("depth", [20, 450])
def test_merged_file_system_is_walked_whole_or_what_is_missed_is_told(walker, place, depth):
    """overlayfs: its offsets count entries, in an order that every change on the way changes."""
    for name in ("lower", "upper", "workdir"):
        (place / name).mkdir()
    lower = comb(place / "lower/comb", PAYLOAD, depth)
    layers = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/workdir"
    with mounted(place / "merged", "-t", "overlay", "-o", layers, "none") as top:
        count, left = trees.walk(walker, top, "chown", PAYLOAD, PAYLOAD, to=PILOT, group=PILOT)
        if depth < 400:
            assert (count["entries"], count["special"], left) == (lower, lower // 3, [])
            assert {path.lstat().st_uid for path in (top / "comb").rglob("*")} == {PILOT}
        else:
            assert b"File name too long" in left[0]
            assert count["special"] > 400 * 4
