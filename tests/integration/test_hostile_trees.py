"""Hostile trees (I8, I18, I19): csrc/tree.c against what a payload can leave; directly where no launcher is needed for it (bench/walk.c)."""

from __future__ import annotations

import os
import subprocess

import pytest

from bench import trees
from tests.need import need

#: Ids that no account has.
PAYLOAD, PILOT, STRANGER = 1700000001, 1700000002, 1700000003


@pytest.fixture(scope="module")
def walker():
    need("root", "gcc")
    return trees.walker()


@pytest.fixture
def shared(tmp_path):
    """A directory in which everybody may write, as /tmp."""
    for path in (*tmp_path.parents[:3], tmp_path):  # pytest keeps them for itself
        path.chmod(path.stat().st_mode | 0o711)
    top = tmp_path / "shared"
    top.mkdir()
    top.chmod(0o1777)
    yield top
    subprocess.run(["rm", "-rf", "--one-file-system", top], check=True)


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


# ---- removing what an id left in directories that others share ----


def remove(walker, top, last=PAYLOAD):
    return trees.walk(walker, top, "remove", PAYLOAD, PAYLOAD, last=last)


def test_what_an_id_owns_in_a_shared_directory_is_removed_and_the_rest_stays(walker, shared):
    fill(shared, PAYLOAD, "a", "d/", "d/e/", "d/e/f", "d/g", "empty/")
    fill(shared, STRANGER, "s", "t/", "t/u")
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
    assert b"theirs" in left[0]


def test_closed_directories_are_removed(walker, shared):
    fill(shared, PAYLOAD, "d/", "d/e/", "d/e/f")
    for name in ("d/e/f", "d/e", "d"):
        (shared / name).chmod(0)
    assert remove(walker, shared).count["left"] == 0
    assert listing(shared) == []


def test_link_to_a_directory_is_removed_and_not_followed(walker, shared, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    fill(victim, PAYLOAD, "precious")
    os.symlink(victim, shared / "link")
    os.lchown(shared / "link", PAYLOAD, PAYLOAD)
    remove(walker, shared)
    assert (listing(shared), listing(victim)) == ([], ["precious"])


def test_mount_below_is_not_entered_by_removal(walker, shared):
    fill(shared, PAYLOAD, "d/", "d/mounted/", "d/own")
    subprocess.run(["mount", "-t", "tmpfs", "none", shared / "d/mounted"], check=True)
    try:
        fill(shared, PAYLOAD, "d/mounted/precious")
        os.chown(shared / "d/mounted", PAYLOAD, PAYLOAD)
        count, left = remove(walker, shared)
        assert listing(shared) == ["d", "d/mounted", "d/mounted/precious"]
        assert (count["removed"], count["left"]) == (1, 1)
        assert b"mounted" in left[0]
    finally:
        subprocess.run(["umount", shared / "d/mounted"], check=True)
