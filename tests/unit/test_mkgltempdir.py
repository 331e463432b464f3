"""mkgltempdir against a real change of account: the glexec beside it is a script that runs its command as another uid, or as the same one.

As root, the caller is a uid without any right but CAP_SETUID and CAP_SETGID, which it hands down to that script: files are checked as for any pilot.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nodewrap import model
from nodewrap.commands import mkgltempdir
from tests.need import need

PILOT, OTHER = 79998, 79999  # no accounts
CODE = Path(mkgltempdir.__file__).parents[2]
AS_PILOT = ["setpriv", f"--reuid={PILOT}", f"--regid={PILOT}", "--clear-groups", "--inh-caps=+setuid,+setgid", "--ambient-caps=+setuid,+setgid", "--"]
AS_OTHER = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", "--inh-caps=-all", "--"]


@pytest.fixture
def base(tmp_path):
    """A directory that any uid may walk into, as a pilot's scratch is."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o711)
    return tmp_path


@pytest.fixture
def glexec(base, monkeypatch):
    """glexec(as_other) installs one in GLEXEC_LOCATION, and gives base to its caller; it notes each call's words and environment in base/calls."""

    def install(as_other, before="true"):
        if as_other:
            need("root", "setpriv")
            shutil.copytree(CODE / "nodewrap", base / "code/nodewrap", ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
            os.chown(base, PILOT, PILOT)
        place = base / "site/sbin"
        place.mkdir(parents=True, exist_ok=True)
        switch = " ".join(AS_OTHER) if as_other else ""
        script = f'#!/bin/sh\necho "$GLEXEC_TARGET_PROXY $GLEXEC_MODE $*" >>{base}/calls\n{before} || exit 203\nexec {switch} "$@"\n'
        (place / "glexec").write_text(script)
        (place / "glexec").chmod(0o755)
        monkeypatch.delenv("OSG_GLEXEC_LOCATION", raising=False)
        monkeypatch.setenv("GLEXEC_LOCATION", str(base / "site"))

    return install


def run(*words, base=None, **options):
    """(exit status, stdout, stderr) of the program in its own process, as pilots call it; base: as PILOT, with the code that was copied there."""
    script = "import sys; from nodewrap.commands.mkgltempdir import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(base / "code" if base else CODE)}
    argv = [*(AS_PILOT if base else []), os.path.realpath(sys.executable), "-B", "-c", script, *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=options.get("cwd", base))
    return done.returncode, done.stdout, done.stderr


def made(*words, **options):
    status, out, err = run(*words, **options)
    assert (status, err) == (0, "")
    return Path(out.rstrip("\n"))


def leftovers(base):
    return sorted(path.name for path in base.iterdir() if "gltmp" in path.name)


@pytest.mark.parametrize("as_other", [True, False])
def test_inner_directory_is_the_payloads_and_outer_one_the_callers(base, glexec, as_other):
    glexec(as_other)
    inner = made(base, base=base if as_other else None)
    assert inner.parent.parent == base
    assert inner.parent.name.startswith("gltmp.")
    assert (inner.stat().st_uid, stat.S_IMODE(inner.stat().st_mode)) == (OTHER if as_other else os.geteuid(), 0o700)
    assert (inner.parent.stat().st_uid, stat.S_IMODE(inner.parent.stat().st_mode)) == (PILOT if as_other else os.geteuid(), 0o755)
    assert leftovers(base) == [inner.parent.name]


def test_modes_are_those_asked_for_whatever_the_umask(base, glexec):
    glexec(False)
    old = os.umask(0o077)
    try:
        inner = made("-t", "777", "-m", "0711", base)
    finally:
        os.umask(old)
    assert (stat.S_IMODE(inner.stat().st_mode), stat.S_IMODE(inner.parent.stat().st_mode)) == (0o777, 0o711)


def test_current_directory_is_the_default_and_relative_names_work(base, glexec):
    glexec(False)
    (base / "sub").mkdir()
    assert made(cwd=base).parent.parent == base
    assert made("sub", cwd=base).parent.parent == base / "sub"


def test_glexec_is_called_without_proxy_copy_and_in_its_plain_mode(base, glexec, monkeypatch):
    glexec(False)
    monkeypatch.setenv("GLEXEC_TARGET_PROXY", "/somewhere/proxy")
    monkeypatch.setenv("GLEXEC_MODE", "lcmaps_verify_account")
    made(base)
    call = (base / "calls").read_text()
    assert call.startswith("/dev/null lcmaps_get_account /")
    assert call.split()[2:5] == [os.path.realpath(shutil.which("mkdir", path=mkgltempdir.SYSTEM_PATH)), "-m", "0700"]


def test_empty_directory_is_removed_without_asking_glexec(base, glexec):
    glexec(True)
    inner = made("-m", "555", base, base=base)
    (base / "calls").unlink()
    assert run("-r", inner, base=base) == (0, "", "")
    assert leftovers(base) == []
    assert not (base / "calls").exists()


def test_full_directory_is_refused_and_removed_by_force(base, glexec):
    glexec(True)
    inner = made(base, base=base)
    subprocess.run([*AS_OTHER, "sh", "-c", f"mkdir -p {inner}/a/b; echo x >{inner}/a/b/c; ln -s / {inner}/l"], check=True)
    (inner.parent / "mine").write_text("the pilot's")
    status, _, err = run("-r", inner, base=base)
    assert (status, err.count("\n")) == (201, 1)
    assert "NW-GLTMP-NOTEMPTY" in err
    assert (inner / "a/b/c").exists()
    assert run("-r", "-f", f"{inner}/", base=base) == (0, "", "")
    assert leftovers(base) == []
    assert Path("/etc/passwd").exists()


def test_refusal_of_glexec_is_passed_on_and_leaves_nothing(base, glexec):
    glexec(False, before="false")
    status, out, err = run(base)
    assert (status, out) == (203, "")
    assert "NW-GLTMP-GLEXEC" in err
    assert leftovers(base) == []


def test_failure_after_the_inner_directory_was_made_leaves_nothing(base, glexec):
    glexec(False, before='"$@"; false')
    assert run(base)[0] == 203
    assert leftovers(base) == []


def test_nobody_else_can_put_a_directory_there_first(base, glexec):
    """While the outer directory is writable for the payload, another uid that lists base sees no name that leads into it."""
    spy = " ".join(AS_OTHER).replace(str(OTHER), "79997")
    glexec(True, before=f"{spy} sh -c 'cd {base} && echo .gltmp-*; ls .gltmp-*/; true' >{base}/spied 2>&1")
    base.chmod(0o755)
    inner = made(base, base=base)
    seen = (base / "spied").read_text()
    assert seen.startswith(".gltmp-")
    assert "Permission denied" in seen
    assert inner.parent.name.partition(".")[2] not in seen


@pytest.mark.parametrize("words", [
    ["-x"], ["-t"], ["a", "b"], ["--remove", "x"], ["-r"], ["-t", "888"], ["-t", "77"], ["-t", "4755"], ["-m", "02755"], ["-m", "-755"],
    ["-t", "0o77"], ["-t", "\u0667\u0667\u0667"],
])
def test_bad_options_are_one_line_and_201(base, words):
    status, out, err = run(*words, cwd=base)
    assert (status, out, err.count("\n")) == (201, "", 1)
    assert err.startswith("mkgltempdir: NW-GLTMP-")


def test_help_is_printed():
    status, out, err = run("-h")
    assert (status, err) == (0, "")
    assert out.startswith("usage: mkgltempdir")


def test_directory_that_cannot_be_named_in_a_command_is_refused(base, glexec):
    glexec(False)
    (base / "a b").mkdir()
    status, _, err = run(base / "a b")
    assert status == 201
    assert "NW-GLTMP-PATH" in err
    assert list((base / "a b").iterdir()) == []


def test_missing_base_is_a_system_error_with_its_name(base, glexec):
    glexec(False)
    status, _, err = run(base / "none")
    assert (status, err.count("\n")) == (202, 1)
    assert "none" in err


@pytest.mark.parametrize("victim", ["plain", "gltmp.x", "gltmp.x/other", "gltmp.x/link", "gltmp.link/target"])
def test_only_what_mkgltempdir_made_is_removed(base, victim):
    real = base / "real"
    (real / "target").mkdir(parents=True)
    for path in (base / "plain", base / "gltmp.x/other"):
        path.mkdir(parents=True)
    (base / "gltmp.x/link").symlink_to(real)
    (base / "gltmp.link").symlink_to(real)
    status, _, err = run("-rf", base / victim)
    assert (status, err.count("\n")) == (201, 1)
    assert (real / "target").is_dir()
    assert (base / victim).is_dir()


def test_target_that_is_a_link_is_not_followed(base):
    (base / "real").mkdir()
    (base / "gltmp.x").mkdir()
    (base / "gltmp.x/target").symlink_to(base / "real")
    assert run("-rf", base / "gltmp.x/target")[0] == 201
    assert (base / "real").is_dir()


def test_directory_of_another_account_is_refused(base):
    need("root")
    (base / "gltmp.x/target").mkdir(parents=True)
    os.chown(base / "gltmp.x", OTHER, OTHER)
    status, _, err = run("-r", base / "gltmp.x/target")
    assert status == 201
    assert "no directory of yours" in err


def test_glexec_is_looked_for_where_pilots_look(base, monkeypatch):
    for name in ("one", "two/sbin/glexec", "three/sbin/glexec", "four/glexec"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("#!/bin/sh\n")
        (base / name).chmod(0o755)
    monkeypatch.setattr(mkgltempdir._paths, "LIBEXEC", str(base / "none/libexec/nodewrap"))
    settings = {"OSG_GLEXEC_LOCATION": base / "one", "GLEXEC_LOCATION": base / "two", "GLITE_LOCATION": base / "three", "PATH": base / "four"}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    found = []
    for name in settings:
        found.append(os.path.relpath(mkgltempdir.glexec_program(), base))
        monkeypatch.setenv(name, "" if name != "OSG_GLEXEC_LOCATION" else str(base / "nothing"))
    assert found == ["one", "two/sbin/glexec", "three/sbin/glexec", "four/glexec"]
    if not os.access("/usr/sbin/glexec", os.X_OK):
        with pytest.raises(model.Refusal):
            mkgltempdir.glexec_program()
