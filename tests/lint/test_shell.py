"""Shell scripts: shellcheck, and POSIX sh where the first line says so."""

from __future__ import annotations


def test_shellcheck_finds_nothing(clean, tracked):
    files = tracked("*.sh", ".ci/*", "demo/*", "packaging/*", "packaging/*/*", "tests/*/*")
    scripts = [file for file in files if file.read_bytes()[:24].split(b"\n")[0].endswith(b"sh")]
    assert scripts
    clean("shellcheck", *scripts)


def test_scripts_are_executable(tracked):
    assert [str(file) for file in tracked("*.sh", ".ci/*") if not file.stat().st_mode & 0o100] == []
