"""The backend's own words: which images a rule allows, what their digest says, and what is put in front of the command (docs/apptainer.md)."""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewrap import apptainer, model
from nodewrap.policy import images
from tests.need import need
from tests.policy_tools import CALLER, SITE, compiled

RULE = '[[rule]]\nname = "r"\nidentity = {{ mode = "map" }}\nprofile = "batch"\n{}\n'


@pytest.fixture
def rule(tmp_path):
    """rule(text): the compiled images of a rule with these lines."""

    def made(text):
        policy, problems = compiled(tmp_path, SITE + CALLER + RULE.format(text))
        assert policy, problems
        return policy["rules"][0]["image"]

    return made


def examined(path, allowed, asked=None):
    """What comes of an image at path under a rule, or the code of the refusal."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return apptainer.examine(fd, asked or str(path), str(path), 0, allowed)
    except model.Refusal as no:
        return no.code
    finally:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)  # closed in every case


def sif(path, size):
    path.write_bytes(b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + b"x" * (size - 42))
    return path


@pytest.mark.parametrize(("pattern", "path", "yes"), [
    ("/images/*", "/images/a", True), ("/images/*", "/images/a/b/c.sif", True), ("/images/*", "/imagesevil/a", False), ("/images/*", "/", False),
    ("/images/el*.sif", "/images/el9.sif", True), ("/images/el*.sif", "/images/el9/x.sif", False), ("/images/*/x", "/images/a/x", True),
    ("/images/*/x", "/images/a/b/x", False), ("/images/a", "/images/a", True), ("/images/a", "/images/a/b", False),
])
def test_pattern_allows_what_it_says(rule, pattern, path, yes):
    assert apptainer.allowed(rule(f'image = "{pattern}"'), "/asked", path) is yes


@given(st.lists(st.sampled_from(["a", "b", "images", "..", ".", "*", "evil"]), min_size=1, max_size=5))
def test_only_what_lies_below_the_directory_is_allowed(parts):
    path = "/" + "/".join(parts)
    allowed = apptainer.allowed({"names": ["/images/*"], "patterns": [[True, [["images"]]]]}, path, path)
    assert allowed == (parts[0] == "images")


def test_name_in_the_policy_may_be_a_link_and_a_pattern_asked_for_by_its_letters_is_none(rule):
    allowed = rule('image = ["/latest", "/images/*"]')
    assert apptainer.allowed(allowed, "/latest", "/elsewhere/el9")
    assert not apptainer.allowed(allowed, "/images/*", "/elsewhere/el9")


def test_digest_is_of_the_whole_of_a_small_file_and_of_the_head_of_a_large_one(tmp_path):
    allowed = {"names": [], "patterns": [[True, []]], "pinned": {}}
    small, large = sif(tmp_path / "small", 1 << 20), sif(tmp_path / "large", (1 << 20) + 1)
    assert examined(small, allowed).digest == "sha256:" + hashlib.sha256(small.read_bytes()).hexdigest()
    assert examined(large, allowed).digest == "sha256-first-32768:" + hashlib.sha256(large.read_bytes()[:32768]).hexdigest()


@pytest.mark.parametrize("change", ["written", "replaced", "touched", "grown"])
def test_pinned_file_is_known_again_until_anything_about_it_changes(tmp_path, change):
    path = sif(tmp_path / "image", 3 << 20)
    real, known, _ = images.pin(str(path))
    allowed = {"names": [str(path)], "patterns": [], "pinned": {str(path): known}}
    assert (real, examined(path, allowed).digest) == (str(path), "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest())
    before = path.stat()
    if change == "replaced":
        sif(tmp_path / "new", 3 << 20).rename(path)
    elif change != "touched":
        with path.open("r+b" if change == "written" else "ab") as file:
            file.write(b"#")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert examined(path, allowed) == "NW-IMAGE-CHANGED"


class Mounted:
    """An image in a file system that can be mounted anew, then with another device number: overlay (has a number of its own) or FUSE (has none)."""

    def __init__(self, top, kind):
        self.top, self.kind, self.place = top, kind, top / "place"
        for name in ("place", "lower", "upper", "work", "other"):
            (top / name).mkdir()
        self.file = self.place / "image"
        self.fill(b"x")
        self.mount()

    def fill(self, byte):
        """The same inode, size and times, whatever is in it."""
        tree = self.top / "upper"
        (tree / "image").write_bytes(b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + byte * (1 << 20))
        os.utime(tree / "image", (10**9, 10**9))
        if self.kind == "fuse":
            squashfs = ["mksquashfs", tree, self.top / "packed", "-noappend", "-quiet", "-no-progress"]
            subprocess.run(squashfs, check=True, stdout=subprocess.DEVNULL)

    def mount(self):
        overlay = ["mount", "-t", "overlay", "overlay", "-o", ",".join(f"{n}dir={self.top / n}" for n in ("lower", "upper", "work")), self.place]
        subprocess.run(overlay if self.kind == "overlay" else ["squashfuse", self.top / "packed", self.place], check=True)

    def umount(self):
        subprocess.run(["umount", self.place], check=True)

    def again(self):
        """Other file systems get the device number meanwhile. The kernel gives the lowest that is free (get_anon_bdev), and tests beside this one
        take and free some too: so on until it is another."""
        before = self.file.stat().st_dev
        for _ in range(50):
            self.umount()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.top / "other"], check=True)
            self.mount()
            if self.file.stat().st_dev != before:
                return
        pytest.fail(f"50 new file systems, and the image is on device {before} again")

    def gone(self):
        for place in (self.place, self.top / "other"):
            while place.is_mount():  # on `other` as many as it took
                subprocess.run(["umount", place], check=True)


@pytest.fixture(params=["overlay", "fuse"])
def mounted(request, tmp_path):
    need("root", *["fuse", "squashfuse", "mksquashfs"] * (request.param == "fuse"))
    made = Mounted(tmp_path, request.param)
    yield made
    made.gone()


def test_pinned_file_is_known_again_when_its_file_system_has_been_mounted_anew(mounted, monkeypatch):
    path = mounted.file
    known = images.pin(str(path))[1]
    allowed = {"names": [str(path)], "patterns": [], "pinned": {str(path): known}}
    mounted.again()
    assert examined(path, allowed).digest == "sha256:" + known["sha256"]
    monkeypatch.setattr(apptainer, "AGAIN", 0)  # as for a larger file: by its number or not at all
    assert getattr(examined(path, allowed), "kind", "NW-IMAGE-CHANGED") == ("sif" if mounted.kind == "overlay" else "NW-IMAGE-CHANGED")


def test_other_content_under_the_same_inode_size_and_times_is_refused_on_a_file_system_mounted_anew(mounted):
    path = mounted.file
    known = images.pin(str(path))[1]
    before = path.stat()
    mounted.fill(b"y")
    mounted.again()
    after = path.stat()
    assert [getattr(after, name) for name in ("st_ino", "st_size", "st_mtime_ns")] == [before.st_ino, before.st_size, before.st_mtime_ns]
    assert examined(path, {"names": [str(path)], "patterns": [], "pinned": {str(path): known}}) == "NW-IMAGE-CHANGED"


def test_named_link_that_leads_to_another_file_than_at_apply_is_refused(tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(sif(tmp_path / "one", 100))
    known = images.pin(str(link))[1]
    allowed = {"names": [str(link)], "patterns": [], "pinned": {str(link): known, str(tmp_path / "one"): known}}
    assert examined(tmp_path / "one", allowed, str(link)).kind == "sif"
    assert examined(sif(tmp_path / "two", 100), allowed, str(link)) == "NW-IMAGE-CHANGED"


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"#!/usr/bin/env run-singularity\n\0SIF"])
def test_file_that_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert examined(tmp_path / "x", {"names": [], "patterns": [[True, []]], "pinned": {}}) == "NW-IMAGE"


def test_words_hold_the_sites_options_and_no_path_that_the_runtime_would_read_as_two(rule):
    allowed = rule('image = "/i/*"\napptainer = { bind = ["/cvmfs", "/a:/b:ro"], options = ["nv", "nv"] }')
    ask = model.Ask()
    ask.workdir, ask.expose = "/w", ["/more"]
    words = apptainer.words(allowed, ask)
    assert words[:6] == ["/usr/bin/apptainer", "--quiet", "--nocolor", "exec", "--contain", "--nv"]
    assert words[-2:] == ["/.image", "/proc/self/fd/22"]
    assert [words[at + 1] for at, word in enumerate(words) if word == "--bind"] == ["/tmp", "/var/tmp", "/more", "/cvmfs", "/a:/b:ro"]
    for bad in ("/w:/etc", "/w,ro", '/w"', "/w\\"):
        ask.expose = [bad]
        with pytest.raises(model.Refusal, match="Apptainer takes no"):
            apptainer.words(allowed, ask)
