"""nodewrap.guard: what it accepts, what it refuses, and at which line (docs/guard.md)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nodewrap.guard import GuardError, Op, Range, parse_guard, parse_profiles, render_guard

CHECKOUT = Path(__file__).parents[2]
LEAST = """\
nodewrap-guard 1
launcher setuid
python /usr/bin/python3
script /usr/libexec/nodewrap/serve.py
child 990 991
policy /var/lib/nodewrap/policy
state /var/lib/nodewrap
audit /var/log/nodewrap/audit.jsonl
caller-uid 1000-1999
"""


def refused(text, line, words):
    with pytest.raises(GuardError, match=words) as error:
        parse_guard(text if isinstance(text, bytes) else text.encode())
    assert error.value.line == line


def test_the_least_guard_has_the_defaults_of_the_document():
    guard = parse_guard(LEAST.encode())
    assert (guard.launcher, guard.child, guard.caller_uid) == ("setuid", (990, 991), (Range(1000, 1999),))
    assert (guard.audit_on_failure, guard.syslog, guard.deadline_ms, guard.max_wall_s) == ("deny", False, 10000, 604800)
    assert (guard.policyd, guard.cgroup, guard.switch_uid, guard.map_uid, guard.allow) == ("", "", (), (), {})


def test_every_line_of_the_document_is_read():
    more = LEAST + """\
  # a comment	with a tab, and many more words than thirty-two: a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h
policyd /run/nodewrap/policyd
audit-on-failure run-and-flag
syslog yes
ca-dir /etc/grid-security/certificates
voms-dir /etc/grid-security/vomsdir
cgroup /sys/fs/cgroup
deadline-ms 120000

max-wall-s 31622400
switch-uid 20001-20100 30000-30000
switch-gid	20001-20100
map-uid 2000000000-2000065535
tracking-gid 750-757 20101-20200
allow switch strict batch
allow log-only none
"""
    guard = parse_guard(more.encode())
    assert guard.switch_uid == (Range(20001, 20100), Range(30000, 30000))
    assert guard.tracking_gid == (Range(750, 757), Range(20101, 20200))
    assert guard.allow == {"switch": ("strict", "batch"), "log-only": ("none",)}
    assert (guard.deadline_ms, guard.max_wall_s, guard.syslog, guard.audit_on_failure) == (120000, 31622400, True, "run-and-flag")
    assert (guard.policyd, guard.cgroup, guard.ca_dir) == ("/run/nodewrap/policyd", "/sys/fs/cgroup", "/etc/grid-security/certificates")
    assert parse_guard(render_guard(guard).encode()) == guard


@pytest.mark.parametrize("key", ["launcher", "python", "script", "child", "policy", "state", "audit", "caller-uid"])
def test_a_needed_line_that_is_missing_is_named(key):
    refused("".join(line for line in LEAST.splitlines(True) if line.split()[0] != key), 0, f"no line '{key}'")


def test_the_unprivileged_launcher_needs_no_child_line():
    text = LEAST.replace("setuid", "userns").replace("child 990 991\n", "")
    assert parse_guard(text.encode()).child is None


@pytest.mark.parametrize("line", [*LEAST.splitlines(True)[1:], "syslog yes\n", "allow map strict\n", "switch-uid 1000-1000\n"])
def test_a_line_that_stands_twice_is_refused(line):
    text = LEAST if line in LEAST else LEAST + line
    refused(text + line, text.count("\n") + 1, "stands twice")


@pytest.mark.parametrize(("line", "why"), [
    ("shell /bin/sh", "unknown word"), ("Launcher setuid", "unknown word"), ("deadline-ms 0", "below"),
    ("deadline-ms 120001", "not a number from 0 to 120000"), ("deadline-ms +5", "sign"), ("deadline-ms 010", "leading zero"),
    ("deadline-ms 0x10", "not a number"), ("deadline-ms 99999999999999999999999", "not a number"), ("deadline-ms", "one word"),
    ("deadline-ms 5 5", "one word"), ("max-wall-s 31622401", "not a number"), ("syslog maybe", "not one of"),
    ("audit-on-failure ignore", "not one of"), ("switch-uid 999-2000", "begins below 1000"), ("switch-uid 0-0", "begins below"),
    ("switch-gid 2000-1999", "not a range"), ("switch-uid 2000", "not a range"), ("switch-uid 1000-4294967293", "not a number"),
    ("switch-uid -1-1000", "not a number"), ("switch-uid 1000--1", "not a number"), ("map-uid", "wants 1 to 16"),
    ("map-uid " + "1000-1001 " * 17, "wants 1 to 16"), ("policyd run/x", "absolute path"), ("policyd /run//x", "absolute path"),
    ("policyd /run/../x", "absolute"), ("policyd /run/", "absolute path"), ("policyd /run/./x", "absolute path"),
    ("policyd /" + "x" * 255, "at most 255"), ("policyd", "one word"), ("allow fly strict", "not one of"), ("allow map", "wants a mode"),
    ("allow map ../x", "not a name"), ("allow map -x", "not a name"), ("allow map " + "x" * 32, "name"), ("allow map " + "x " * 17, "1 to 16"),
    ("tracking-gid 200-757", "begins below 201"), ("tracking-gid 750", "not a range"),
    ("switch-uid 1000-1001 " + "#" * 1100, "longer than 1023"), ("x " * 33, "more than 32 words"),
])
def test_a_bad_line_is_refused_at_its_number(line, why):
    refused(LEAST + line + "\n", 10, why)


@pytest.mark.parametrize("uid", ["0-5", "0-0"])
def test_root_is_never_a_caller(uid):
    refused(LEAST.replace("1000-1999", uid), 9, "begins below 1")


@pytest.mark.parametrize("ids", ["0 5", "5 0", "5", "5 5 5", "4294967293 5"])
def test_the_child_is_never_root(ids):
    refused(LEAST.replace("990 991", ids), 5, "child")


@pytest.mark.parametrize("byte", [b"\0", b"\x01", b"\r", b"\x0b", b"\x7f", b"\x80", "é".encode()])
def test_bytes_that_are_not_printable_ascii_are_refused_even_in_comments(byte):
    refused(LEAST.encode() + b"# " + byte + b"\n", 10, "not printable ASCII")


def test_a_torn_last_line_is_refused():
    refused(LEAST[:-1], 9, "no newline at the end")


def test_the_bounds_of_the_file_are_the_documents():
    header = LEAST.count("\n")
    assert parse_guard((LEAST + "\n" * (1000 - header)).encode())
    refused(LEAST + "\n" * (1001 - header), 0, "more than 1000 lines")
    refused(LEAST + ("#" * 1023 + "\n") * 256, 0, "longer than 262144 bytes")
    assert parse_guard((LEAST + "#" * 1023 + "\n").encode())
    refused(LEAST + "#" * 1024 + "\n", 10, "longer than 1023 bytes")


@pytest.mark.parametrize("text", ["", "\n", "nodewrap-guard 2\n", "nodewrap-profiles 1\n", "launcher setuid\nnodewrap-guard 1\n", "nodewrap-guard\n"])
def test_another_first_line_is_refused(text):
    refused(text, 0, "the first line is not")


@pytest.mark.parametrize("launcher", ["setuid", "userns"])
def test_the_guard_that_make_install_writes_is_one(launcher):
    script = (CHECKOUT / "packaging/first-guard.in").read_text()
    for name in ("PYTHON", "LIBEXEC", "STATEDIR", "LOGDIR", "SYSCONFDIR"):
        script = script.replace(f"@{name}@", f"/place/{name.lower()}")
    script = script.replace("@LAUNCHER@", launcher).replace("@SERVICE_USER@", "nobody").replace("@CALLERS@", "callers")
    somebody = {"user": 65534} if os.geteuid() == 0 and launcher == "userns" else {}
    done = subprocess.run(["sh", "-s"], input=script.encode(), stdout=subprocess.PIPE, check=True, **somebody)
    assert parse_guard(done.stdout).launcher == launcher


PROFILES = """\
nodewrap-profiles 1
profile strict
namespace pid mount net
seccomp seccomp.strict.bpf
landlock abstract
on-missing degrade
hostname node
bind ro /usr
bind rw? /data
slave ro? /cvmfs
link /bin usr/bin
tmpfs /tmp 1777 4096
dev null tty
proc
mqueue
home
profile none
"""


def test_every_line_of_a_profile_is_read_in_its_order():
    both = parse_profiles(PROFILES.encode())
    strict, none = both["strict"], both["none"]
    assert (strict.namespaces, strict.seccomp, strict.hostname) == (("pid", "mount", "net"), "seccomp.strict.bpf", "node")
    assert (strict.landlock, strict.degrade) == (("abstract",), True)
    assert strict.ops == [
        Op("bind", "/usr"), Op("bind", "/data", writable=True, optional=True), Op("slave", "/cvmfs", optional=True), Op("link", "/bin", "usr/bin"),
        Op("tmpfs", "/tmp", mode=0o1777, size=4096), Op("dev", "null"), Op("dev", "tty"), Op("proc"), Op("mqueue"), Op("home"),
    ]
    assert (none.namespaces, none.seccomp, none.landlock, none.degrade, none.ops) == ((), "", (), False, [])


@pytest.mark.parametrize("line", [*PROFILES.splitlines()[2:7], "proc", "mqueue", "home"])
def test_a_setting_stands_once_in_a_profile_and_again_in_the_next(line):
    assert parse_profiles((PROFILES + line + "\n").encode())
    with pytest.raises(GuardError, match="stands twice"):
        parse_profiles(PROFILES.replace("profile none", line + "\nprofile none").encode())


@pytest.mark.parametrize(("line", "why"), [
    ("profile strict", "stands twice"), ("profile", "one word"), ("profile .x", "not a name"), ("profile a b", "one word"),
    ("mount /x", "unknown word"), ("namespace pid pid", "each once"), ("namespace user", "not one of"), ("namespace", "wants kinds"),
    ("seccomp a/b", "not a name"), ("seccomp " + "x" * 64, "at most 63"),
    ("landlock udp", "not one of"), ("landlock tcp tcp?", "each once"), ("landlock tcp??", "not one of"),
    ("tcp-bind 65536", "not a number"), ("tcp-connect", "wants ports"), ("landlock", "wants kinds"), ("on-missing shrug", "not one of"),
    ("bind ro", "wants a mode and a path"), ("bind rx /x", "not one of"), ("bind ro x", "absolute path"), ("bind ro /", "itself"),
    ("bind ro? /x/../y", "absolute path"), ("tmpfs /t 1777", "octal"), ("tmpfs /t 2777 4096", "octal mode up to 1777"),
    ("tmpfs /t 8 4096", "octal"), ("tmpfs /t 1777 4095", "below 4096"), ("tmpfs /t 1777 1125899906842625", "not a number"),
    ("tmpfs / 1777 4096", "itself"), ("dev", "wants names"), ("dev ../sda", "not a name"), ("dev *", "not a name"),
    ("dev a/b/c", "not a name"), ("dev /a", "not a name"), ("dev a/", "not a name"), ("dev a*b", "not a name"), ("dev a**", "not a name"),
    ("proc\n" + ("dev " + "n " * 31 + "\n") * 5 + "dev a b c d e f", "more than 160"), ("link /x", "wants a path"), ("link / x", "itself"),
    ("proc all", "stands alone"), ("hostname a b", "one word"), ("hostname -a", "not a name"),
])
def test_a_bad_line_of_a_profile_is_refused(line, why):
    with pytest.raises(GuardError, match=why):
        parse_profiles((PROFILES + line + "\n").encode())


def test_lines_before_the_first_profile_are_refused():
    with pytest.raises(GuardError, match="before the first profile"):
        parse_profiles(b"nodewrap-profiles 1\nproc\n")


def test_there_are_at_most_sixteen_profiles():
    lines = [f"profile p{number}\n" for number in range(17)]
    assert len(parse_profiles(("nodewrap-profiles 1\n" + "".join(lines[:16])).encode())) == 16
    with pytest.raises(GuardError, match="more than 16 profiles"):
        parse_profiles(("nodewrap-profiles 1\n" + "".join(lines)).encode())
