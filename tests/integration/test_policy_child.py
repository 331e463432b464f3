"""The jail of the policy child, asked from inside it, and the ways to it (I2, I3). What a hostile one can decide: test_hostile_child.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.need import need
from tests.node import alive, until

#: Replies with a text that the launcher prints: the only way out of the jail. serve is the real one, from the installation.
PREAMBLE = """
import errno, json, os, resource, signal, struct, sys
sys.path.insert(0, {site!r})
from nodewrap import serve, wire
import _socket
sock = _socket.socket(fileno=3)
def say(found):
    wire.send(sock, wire.DECISION, [(1, 1), (2, 0), (3, 0), (5, json.dumps(found))])
    os._exit(0)
def tried(work, *args):
    try:
        return repr(work(*args))
    except OSError as wrong:
        return errno.errorcode[wrong.errno]
"""
BEFORE = """
hello = serve.Hello(wire.receive(sock, wire.HELLO)[0])
wire.receive(sock, wire.REQUEST)
"""
#: As serve() does: policy, lock, and then what an attacker would do with the first byte of the caller's.
LOCKED = """
hello = serve.Hello(wire.receive(sock, wire.HELLO)[0])
(program,) = [part for part in serve.load_policy(hello) if isinstance(part, bytes)]
serve.lock(program)
wire.receive(sock, wire.REQUEST)
"""


@pytest.fixture
def probe(node):
    """probe(code, **more): what a run whose policy child is that script comes to -> Result."""
    script = node.site.prefix / "libexec/nodewrap/probe.py"
    site = subprocess.run([node.site.prefix / "lib/nodewrap/venv/bin/python3", "-I", "-c", "import nodewrap; print(nodewrap.__path__[0])"],
                          capture_output=True, text=True, check=True).stdout.strip()
    preamble = PREAMBLE.format(site=str(Path(site).parent))
    node.open_guard(script=str(script), deadline_ms="5000")

    def run(code, **more):
        node.site.write(script, preamble + code)
        return node.site.nodewrap("run", "--credential", "/nonexistent", "--", "/bin/true", **more)

    yield run
    script.unlink()


@pytest.fixture
def sleeper():
    """sleeper(node): its policy child hears nothing and sleeps."""
    made = []

    def make(node):
        script = node.site.prefix / "libexec/nodewrap/probe.py"
        node.site.write(script, "import time\ntime.sleep(60)\n")
        node.open_guard(script=str(script))
        made.append(script)

    yield make
    for script in made:
        script.unlink()


def said(ran):
    assert (ran.rc, ran.err) == (0, b""), ran
    return json.loads(ran.out)


def refused(ran, *codes):
    assert (ran.rc, ran.out) == (202, b""), ran
    assert ran.err.startswith(tuple(f"nodewrap: {code}: ".encode() for code in codes)), ran
    assert ran.err.count(b"\n") == 1
    return ran


# ---- the jail, before the lock ----


def test_child_has_no_rights_no_groups_and_no_way_to_gain_any(probe, node):
    found = said(probe(BEFORE + "say({line.split(':')[0]: line.split()[1:] for line in open('/proc/self/status')})"))
    sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"] + ["CapBnd"] * node.privileged
    assert {int(found[name][0], 16) for name in sets} == {0}
    assert (found["NoNewPrivs"], found["Seccomp"]) == (["1"], ["2"])
    assert (int(found["SigBlk"][0], 16), found["Groups"] == [] or not node.privileged) == (0, True)
    child = node.site.read_guard().get("child")
    owner = child[0].split()[0] if child else str(node.pilot.uid)
    assert set(found["Uid"]) == {owner}
    assert owner != str(node.pilot.uid) or not node.privileged


def test_child_inherits_nothing_of_the_caller(probe, node, home):
    code = """
fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}
say([dict(os.environ), fds, os.getcwd(), os.getsid(0) == os.getpid(), sys.argv[1:], sys.flags.isolated, sys.flags.dont_write_bytecode])
"""
    with open(home / "open", "w") as inherited:
        env = {"PYTHONPATH": "/tmp", "PYTHONSTARTUP": "/tmp/x", "LD_PRELOAD": "", "SECRET": "x"}
        environ, fds, cwd, leads, argv, isolated, nobytecode = said(probe(BEFORE + code, env=env, fds=(inherited.fileno(),), cwd=home))
    (home / "open").unlink()
    assert environ == {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    assert {fds.pop(fd) for fd in "012"} == {"/dev/null"}
    assert fds.pop("3").startswith("socket:")
    assert len(fds) <= 1  # the listing's own
    assert (cwd, leads, argv, isolated, nobytecode) == ("/", True, [], 1, 1)


def test_child_cannot_write_connect_fork_or_signal_even_before_the_lock(probe):
    code = """
say({
    "write": tried(os.open, "/tmp/nwchild", os.O_CREAT | os.O_WRONLY), "append": tried(os.open, "/dev/null", os.O_RDWR),
    "mkdir": tried(os.mkdir, "/tmp/nwchild"), "unlink": tried(os.unlink, "/tmp/nwchild"), "chmod": tried(os.chmod, "/tmp", 0o777),
    "inet": tried(_socket.socket, 2, 1), "netlink": tried(_socket.socket, 16, 3), "fork": tried(os.fork),
    "kill": tried(os.kill, os.getppid(), 0), "setuid": tried(os.setuid, 0), "size": resource.getrlimit(resource.RLIMIT_FSIZE),
})
"""
    found = said(probe(BEFORE + code))
    assert found.pop("size") == [0, 0]
    assert set(found.values()) <= {"ENOSYS", "EPERM", "EACCES", "EAFNOSUPPORT"}, found


def test_pilot_cannot_signal_trace_or_read_the_child(setuid_node, sleeper):
    """(The unprivileged launcher's child is the pilot's own process.)"""
    node = setuid_node
    sleeper(node)
    process = node.site.start(node.argv("static", ["/bin/true"]), stderr=subprocess.DEVNULL)
    child = until(lambda: children(process.pid), "the child starts")[0]
    pilot = {"user": node.pilot.uid, "group": node.pilot.gid, "extra_groups": [], "capture_output": True}
    assert subprocess.run(["kill", "-0", str(child)], **pilot).returncode != 0
    for name in ("environ", "mem", "fd/3"):
        assert subprocess.run(["cat", f"/proc/{child}/{name}"], **pilot).returncode != 0
    process.terminate()
    os.kill(child, signal.SIGKILL)
    assert process.wait(20) == 202


def children(pid):
    """Those that have become the script."""
    try:
        pids = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in pids if b"probe.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_child_killed_from_outside_is_an_internal_error(node, sleeper):
    sleeper(node)
    process = node.site.start(node.argv("map", ["/bin/true"]), stderr=subprocess.PIPE)
    child = until(lambda: children(process.pid), "the child starts")[0]
    os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err.count(b"\n")) == (202, 1)
    assert err.startswith(b"nodewrap: NW-CHILD: ")


def test_child_dies_with_a_launcher_that_is_killed(node, sleeper):
    sleeper(node)
    process = node.site.start(node.argv("map", ["/bin/true"]))
    child = until(lambda: children(process.pid), "the child starts")[0]
    process.kill()
    process.wait()
    until(lambda: not alive(child), "the child dies with its launcher")


# ---- after the lock ----

FORBIDDEN = {
    "socket": "_socket.socket(2, 1)", "unix socket": "_socket.socket(1, 1)", "fork": "os.fork()", "exec": "os.execv('/bin/true', ['true'])",
    "kill": "os.kill(os.getppid(), 0)", "unlink": "os.unlink('/tmp/x')", "chmod": "os.chmod('/tmp', 0o777)", "times": "os.utime(3)",
    "ptrace": "__import__('ctypes').CDLL(None).ptrace(16, os.getppid(), 0, 0)", "pipe": "os.pipe()", "chdir": "os.chdir('/tmp')",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_locked_child_that_does_something_else_is_ended_by_the_kernel(probe, name):
    code = FORBIDDEN[name]
    before = "import ctypes\n" if "ctypes" in code else ""  # loaded while it still can be
    ran = probe(before + LOCKED + code + "\nsay('went on')")
    refused(ran, "NW-CHILD")
    assert b"SIGSYS" in ran.err, ran


def test_locked_child_still_answers(probe):
    """The control of the others."""
    assert said(probe(LOCKED + "say('ok')")) == "ok"


@pytest.mark.parametrize("path", ["/etc/passwd", "/tmp/x", "/proc/self/mem", "/dev/null"])
def test_locked_child_opens_nothing_by_name(probe, path):
    found = said(probe(LOCKED + f"say([tried(os.open, {path!r}, flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT)])"))
    assert set(found) == {"EACCES"}


def test_locked_child_makes_no_executable_memory(probe):
    ran = probe("import mmap\n" + LOCKED + "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)\nsay('went on')")
    refused(ran, "NW-CHILD")


# ---- the files that it may ask for (I4) ----

ASK = """
def ask(kind, path):
    wire.send(sock, wire.OPEN, [(1, kind), (2, path)])
    fields, fd = wire.receive(sock, wire.OPENED)
    number = wire.integer(fields[0][1])
    return errno.errorcode[number] if number else os.read(fd, 100).decode("utf-8", "replace")
"""


def test_files_are_opened_with_the_callers_rights_and_only_plain_ones(probe, node, home):
    mine = home / "mine"
    mine.write_text("pilot's")
    os.chown(mine, node.pilot.uid, node.pilot.gid)
    mine.chmod(0o600)
    asked = [str(mine), "/etc/shadow", "/root/.bashrc", "/proc/self/environ", "/proc/self/mem", "/proc/self/root/etc/shadow", "/dev/null", "/tmp"]
    found = said(probe(BEFORE + ASK + f"say([ask(1, path) for path in {asked!r}])"))
    mine.unlink()
    assert found[0] == "pilot's"
    assert not [text for text in found[1:] if text not in ("EACCES", "ENOENT", "EINVAL", "EISDIR", "ELOOP")], found
    assert found[1] == "EACCES"


def test_anchors_are_those_below_the_named_directory_alone(probe, node):
    top = node.site.session.top / "anchors"
    (top / "below").mkdir(parents=True)
    (top / "below/good.0").write_text("anchor")
    (top / "below/out").symlink_to("/etc/passwd")
    (top / "secret").write_text("x")
    if not node.privileged and os.geteuid() == 0:
        shutil.chown(top, node.pilot.uid, node.pilot.gid)
    node.open_guard(script=str(node.site.prefix / "libexec/nodewrap/probe.py"), ca_dir=str(top / "below"))
    asked = ["good.0", "out", "../secret", "/etc/passwd", "missing"]
    found = said(probe(BEFORE + ASK + f"say([ask(2, path) for path in {asked!r}] + [ask(3, 'good.0')])"))
    shutil.rmtree(top)
    assert found == ["anchor", "EXDEV", "EXDEV", "EXDEV", "ENOENT", "ENOENT"]


def test_number_of_files_is_bounded(probe):
    refused(probe(BEFORE + ASK + "say([ask(1, '/etc/passwd') for _ in range(70)])"), "NW-CHILD")


NONSENSE = ["(4, [(1, 9), (2, '/x')])", "(3, [(1, 9), (2, '/x')])", "(3, [(1, 1)])", "(3, [(1, 1), (2, 'a' * 5000)])", "(5, [])", "(5, [(99, 1)])",
            "(5, [(1, 1), (2, 1)])", "(5, [(1, 1), (2, 9)])", "(5, [(1, 2), (2, 0)])", "(9, [])"]


@pytest.mark.parametrize("frame", NONSENSE)
def test_nonsense_in_the_exchange_is_an_internal_error(probe, frame):
    refused(probe(BEFORE + f"kind, fields = {frame}\nbody = wire.pack(fields)\nsock.send(struct.pack('<II', len(body), kind) + body)\nos._exit(0)"),
            "NW-CHILD", "NW-GUARD")


# ---- the ways to it: root's own all the way (I3) ----


@pytest.fixture
def stranger(node, home):
    """A directory that belongs to somebody who is neither root nor, for the unprivileged launcher, the caller."""
    need("root")
    path = home / "stranger"
    path.mkdir()
    os.chown(path, node.site.accounts["outsider"].uid, 0)
    yield path
    shutil.rmtree(path)


def places(node):
    guard = node.site.read_guard()
    return {key: Path(guard[key][0]) for key in ("script", "python", "policy", "state", "audit")}


@pytest.mark.parametrize("key", ["script", "python", "policy", "state", "audit"])
def test_path_through_somebody_elses_directory_is_refused(node, stranger, key):
    real = places(node)[key]
    if real.is_dir():
        shutil.copytree(real, stranger / "x", symlinks=False)
    elif key == "audit":
        (stranger / "x").touch()
    else:
        shutil.copy2(real, stranger / "x")
    node.open_guard(**{key: str(stranger / "x")})
    ran = node.run("map", "/bin/true")
    refused(ran, "NW-PATH-OWNER")
    assert b"stranger" in ran.err


@pytest.mark.parametrize("key", ["script", "python", "policy", "state"])
def test_link_that_somebody_else_owns_is_refused(node, home, key):
    need("root")
    link = home / "link"
    link.symlink_to(places(node)[key])
    os.chown(link, node.site.accounts["outsider"].uid, 0, follow_symlinks=False)
    os.chown(home, 0, 0)
    try:
        node.open_guard(**{key: str(link)})
        refused(node.run("map", "/bin/true"), "NW-PATH-OWNER")
    finally:
        os.chown(home, node.pilot.uid, node.pilot.gid)
        link.unlink()


@pytest.mark.parametrize("key", ["script", "python"])
def test_path_through_a_directory_that_all_may_write_is_refused(node, key):
    """Sticky or not: in /tmp anybody can put the name there first."""
    copy = Path("/tmp") / f"nwt{os.getpid()}"
    shutil.copy2(places(node)[key], copy)
    try:
        node.open_guard(**{key: str(copy)})
        refused(node.run("map", "/bin/true"), "NW-PATH-WRITABLE")
    finally:
        copy.unlink()


USELESS = [("script", "/nonexistent"), ("python", "/nonexistent"), ("python", "/etc/passwd"), ("policy", "/nonexistent"),
           ("state", "/nonexistent"), ("python", "/usr"), ("script", "/usr")]


@pytest.mark.parametrize(("key", "value"), USELESS)
def test_path_that_leads_to_nothing_useful_is_an_internal_error(node, key, value):
    node.open_guard(**{key: value})
    refused(node.run("map", "/bin/true"), "NW-PATH", "NW-CHILD")
