"""What the documents say exists, and what exists is in the documents."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.need import need


def test_every_error_code_is_documented_and_no_other(root):
    """docs/errors.md is made by packaging/errors.py from the calls themselves; a code without meaning and next step fails here."""
    done = subprocess.run([sys.executable, "packaging/errors.py", "--check"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pages(tracked):
    found = tracked("docs/man/*.md")
    assert found
    return found


def test_man_pages_build_without_a_warning(clean, tracked, tmp_path):
    for page in pages(tracked):
        clean("pandoc", "--fail-if-warnings", "-s", "-t", "man", "-o", tmp_path / page.stem, page)
        assert (tmp_path / page.stem).stat().st_size > 500


def test_man_pages_format_without_a_warning(clean, tracked, tmp_path):
    need("man")
    for page in pages(tracked):
        clean("pandoc", "-s", "-t", "man", "-o", tmp_path / page.stem, page)
        argv = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", tmp_path / page.stem]
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
        assert (done.returncode, done.stderr) == (0, "")


def test_every_installed_command_has_a_man_page(root):
    for command in ("nodewrap", "glexec", "mkgltempdir"):
        assert (root / f"docs/man/{command}.1.md").exists()


def test_make_alone_prints_the_targets(clean):
    text = clean("make", "-s", "--no-print-directory")
    for target in ("deps", "build", "install", "uninstall", "demo", "test", "lint", "bench", "fuzz", "asan", "man", "dist"):
        assert f"\n  {target} " in text


def test_readme_names_only_files_that_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:docs|policies|packaging|csrc|nodewrap|tests|demo)/[\w./-]+|[A-Z]+\.md)`", text)
    assert names
    assert [name for name in names if not (root / name).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGES.md", "LICENSE", "docs/errors.md"])
def test_front_door_documents_are_there(root, name):
    assert (root / name).stat().st_size > 200
