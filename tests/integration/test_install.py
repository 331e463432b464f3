"""make install and make uninstall, really run: into a root-owned prefix as root, below the home directory as an ordinary user, and staged."""

from __future__ import annotations

import grp
import os
import pwd
import resource
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.files import CHECKOUT, checkout_files
from tests.need import need
from tests.site import command, exists

FLAG_UNCHECKED_HASH = 0b01  # PEP 552: hash-based, check_source bit clear


def tree(top):
    """Every path below top, without what is inside the Python environment."""
    return sorted(str(path.relative_to(top)) for path in Path(top).rglob("*") if "site-packages" not in path.parts)


def make(target, prefix, *words):
    return command("make", "-C", CHECKOUT, target, f"PREFIX={prefix}", f"OBJDIR={prefix}.obj", *words)


@pytest.fixture
def prefix(session):
    """A path for one installation of this test's own, removed with what stands there."""
    path = session.top / "install"
    yield path
    for left in (path, Path(f"{path}.obj"), Path(f"{path}.stage")):
        shutil.rmtree(left, ignore_errors=True)


@pytest.fixture
def names(session):
    """Make variables for accounts that nobody else has."""
    service, callers = f"nwt{session.tag}-new", f"nwt{session.tag}-newc"
    session._note("user", service)
    session._note("group", callers)
    return [f"SERVICE_USER={service}", f"CALLERS={callers}"]


# ---- what is installed ----


def test_setuid_launcher_is_root_4750_with_the_callers_group(setuid_site, session):
    info = (setuid_site.prefix / "libexec/nodewrap/nodewrap-setuid").stat()
    assert stat.S_IMODE(info.st_mode) == 0o4750
    assert (info.st_uid, info.st_gid) == (0, grp.getgrnam(session.callers).gr_gid)


@pytest.fixture
def with_musl(node):
    """The node's launcher as LAUNCHER_CC=packaging/musl-cc makes it, beside the other one. It is compiled once for all tests."""
    need("musl-gcc")
    objects = node.site.session.top / f"musl-{node.site.launcher}"
    ours = node.site.prefix / f"libexec/nodewrap/nodewrap-{node.site.launcher}"
    program = ours.with_name("nodewrap-musl")
    node.site.make("launchers", OBJDIR=objects, LAUNCHER_CC="packaging/musl-cc")
    try:
        shutil.copy(objects / ours.name, program)
        os.chown(program, ours.stat().st_uid, ours.stat().st_gid)
        program.chmod(stat.S_IMODE(ours.stat().st_mode))
        yield program
    finally:
        program.unlink(missing_ok=True)


def test_launcher_with_musl_runs_payloads_and_does_not_ask_the_processor_what_it_can(node, with_musl):
    """Each cpuid is answered by a virtual machine's monitor; glibc's start has some twenty (docs/benchmarks.md)."""
    need("objdump")
    code = command("objdump", "-d", "--no-show-raw-insn", with_musl)
    assert "syscall" in code
    assert "cpuid" not in code
    ran = node.site.run(node.argv("map", ["/bin/echo", "ran"], launcher=with_musl), env={"NODEWRAP_GUARD": str(node.site.sysconf / "guard")})
    assert (ran.rc, ran.out, ran.err) == (0, b"ran\n", b"")
    assert ran.record("cleanup")["nodewrap"]["cleanup"]["processes_left"] == 0


@pytest.mark.parametrize("files", [0, 2])
def test_launcher_with_musl_tells_of_a_limit_that_musl_itself_would_end_at_without_a_word(node, with_musl, files):
    short = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # noqa: E731
    process = node.site.start(node.argv("map", ["/bin/true"], launcher=with_musl), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=short)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 201
    assert err.startswith(b"nodewrap: NW-LIMIT: RLIMIT_NOFILE")
    assert err.count(b"\n") == 1


def test_outsider_cannot_execute_the_setuid_launcher(setuid_site, session):
    launcher = setuid_site.prefix / "libexec/nodewrap/nodewrap-setuid"
    done = setuid_site.run(["/bin/sh", "-c", f"exec {launcher} run -- /bin/true"], user=session.accounts["outsider"])
    assert done.rc == 126
    assert b"ermission denied" in done.err


def test_everything_of_a_root_installation_is_root_owned_and_writable_by_root_alone(setuid_site):
    wrong = []
    for path in setuid_site.prefix.rglob("*"):
        info = path.lstat()
        if info.st_uid != 0 or (info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode)):
            wrong.append(str(path))
    assert wrong == []


def test_leases_are_private_and_the_log_is_for_root_and_adm(setuid_site):
    assert stat.S_IMODE((setuid_site.state / "leases").stat().st_mode) == 0o700
    assert stat.S_IMODE(setuid_site.audit.parent.stat().st_mode) == 0o750


def test_launchers_are_static_and_hardened(site):
    need("readelf")
    binary = site.prefix / f"libexec/nodewrap/nodewrap-{site.launcher}"
    headers = command("readelf", "-W", "-h", "-l", "-d", binary)
    assert "DYN" in headers  # position independent
    assert "GNU_RELRO" in headers
    assert "INTERP" not in headers  # static: no ld.so between the caller and the first line of the launcher
    assert " RWE " not in headers


def test_installed_paths_do_not_follow_the_environment(site):
    argv = [site.prefix / "lib/nodewrap/venv/bin/python3", "-I", "-c", "from nodewrap import _paths; print(_paths.GUARD)"]
    done = site.run(argv, env={"NODEWRAP_PREFIX": "/elsewhere", "NODEWRAP_SYSCONFDIR": "/elsewhere"})
    assert done.text.strip() == str(site.sysconf / "guard")


def test_bytecode_is_never_checked_against_the_source_nor_rewritten(site):
    caches = list((site.prefix / "lib/nodewrap/venv").rglob("nodewrap/__pycache__/*.pyc"))
    assert caches
    assert {int.from_bytes(path.read_bytes()[4:8], "little") for path in caches} == {FLAG_UNCHECKED_HASH}


def test_core_extension_is_installed_and_loads(site):
    argv = [site.prefix / "lib/nodewrap/venv/bin/python3", "-I", "-c", "from nodewrap import _core; print(_core.lib.nw_next)"]
    assert site.run(argv).rc == 0


def test_first_guard_is_accepted_by_the_launchers_own_parser(site):
    """The parser that the launcher uses, through cffi, on the very file."""
    code = (
        "import sys; from nodewrap._core import ffi, lib; text = open(sys.argv[1], 'rb').read(); g = ffi.new('struct nw_guard *'); "
        "e = ffi.new('struct nw_err *'); r = lib.nw_guard_parse(ffi.new('char[]', text), len(text), g, e); "
        "print(r, ffi.string(lib.nw_launcher_name(g)).decode() if r == 0 else r, ffi.string(e.text).decode())"
    )
    done = site.run([site.prefix / "lib/nodewrap/venv/bin/python3", "-I", "-c", code, site.sysconf / "guard"])
    assert done.text.split() == ["0", site.launcher]


def test_first_guard_of_root_allows_no_mode(setuid_site):
    assert "allow" not in setuid_site.first_guard


# ---- again, and back ----


def test_uninstall_with_purge_takes_back_exactly_what_install_made(session, prefix, names):
    need("root")
    before = tree(session.top)
    make("install", prefix, *names)
    make("uninstall", prefix, "PURGE=1", *names)
    shutil.rmtree(f"{prefix}.obj")
    assert tree(session.top) == before
    assert not exists("passwd", names[0].partition("=")[2])
    assert not exists("group", names[1].partition("=")[2])


def test_uninstall_without_purge_keeps_policy_state_and_log(session, prefix, names):
    need("root")
    make("install", prefix, *names)
    (prefix / "var/log/nodewrap/audit.jsonl").write_text("{}\n")
    make("uninstall", prefix, *names)
    left = tree(prefix)
    assert {"etc/nodewrap/guard", "var/log/nodewrap/audit.jsonl", "var/lib/nodewrap/leases"} <= set(left)
    assert not [path for path in left if path.startswith(("bin", "lib", "share"))]
    make("uninstall", prefix, "PURGE=1", *names)
    assert not prefix.exists()


def test_second_install_keeps_an_edited_policy_and_the_guard(prefix):
    launcher = "LAUNCHER=userns"
    make("install", prefix, launcher)
    shipped = prefix / "etc/nodewrap/profiles.toml"
    edited = {shipped: shipped.read_text() + "# mine\n", prefix / "etc/nodewrap/guard": "nodewrap-guard 1\n"}
    for path, text in edited.items():
        path.write_text(text)
    said = make("install", prefix, launcher)
    assert [path.read_text() for path in edited] == list(edited.values())
    assert Path(f"{shipped}.dist").read_text() == (CHECKOUT / "policies" / shipped.name).read_text()
    assert f"kept your {shipped}" in said


def test_staged_install_makes_no_account_and_says_what_the_package_must_do(session, prefix, names):
    need("root")  # another user stages the userns launcher, which needs nothing of the package
    stage = Path(f"{prefix}.stage")
    said = make("install", prefix, f"DESTDIR={stage}", *names)
    assert not prefix.exists()
    assert not exists("passwd", names[0].partition("=")[2])
    assert "chmod 4750" in said
    assert not [path for path in stage.rglob("*") if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o6000]
    assert str(stage) not in (stage / str(prefix).lstrip("/") / "lib/nodewrap/venv/pyvenv.cfg").read_text()


@pytest.mark.parametrize("prefix_name", ["with blank", "quo'te", "new\nline", "am&p", "pi|pe"])
def test_prefix_that_the_guard_cannot_carry_is_refused(session, prefix_name):
    script = CHECKOUT / "packaging/install.sh"
    settings = dict.fromkeys(("SYSCONFDIR", "STATEDIR", "LOGDIR", "RUNDIR", "MANDIR", "LIB", "LIBEXEC"), "/x")
    environment = {**os.environ, **settings, "DESTDIR": "", "PREFIX": f"/x/{prefix_name}"}
    done = subprocess.run([script, "install"], env=environment, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 1
    assert "cannot carry" in done.stderr


def test_ordinary_user_installs_the_userns_launcher_alone_from_a_clone(session):
    """A clone of what is tracked, owned by the user: make install PREFIX=$HOME/x, with nothing of root's but the packages already fetched."""
    need("root")
    user = session.accounts["outsider"]
    clone, prefix = user.home / "clone", user.home / "x"
    for path in checkout_files():
        target = clone / path.relative_to(CHECKOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    command("chown", "-R", f"{user.uid}:{user.gid}", clone)
    ids = {"user": user.uid, "group": user.gid, "extra_groups": user.groups}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(user.home), **{key: value for key, value in os.environ.items() if key.startswith("PIP_")}}
    said = command("make", "-C", clone, "install", f"PREFIX={prefix}", env=environment, **ids)
    assert "launcher userns" in said
    installed = {path.name for path in (prefix / "libexec/nodewrap").iterdir()}
    assert {"first-guard", "nodewrap-userns", "serve.py"} <= installed
    assert "nodewrap-setuid" not in installed
    assert (prefix / "etc/nodewrap/guard").read_text().splitlines()[2] == "launcher userns"
    assert {pwd.getpwuid(path.lstat().st_uid).pw_name for path in prefix.rglob("*")} == {user.name}
