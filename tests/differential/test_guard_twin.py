"""The launcher's parser of guard and profiles (csrc/guard.c) against its twin: the same bytes are accepted or refused, and mean the same."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodewrap import _core, profiles
from nodewrap import guard as twin
from nodewrap.policy.positions import toml

ffi, lib = _core.ffi, _core.lib
CHECKOUT = Path(__file__).parents[2]
GUARD = b"""\
nodewrap-guard 1
launcher setuid
python /usr/bin/python3
script /a/b
child 990 990
policy /p
state /s
audit /a
caller-uid 1-5 1000-2000
switch-uid 1000-2000
switch-gid 1000-2000
map-uid 70000-80000
tracking-gid 201-201 750-757
allow switch strict batch
allow map strict
max-wall-s 7
deadline-ms 120000
audit-on-failure run
syslog yes
cgroup /sys/fs/cgroup
tmp-dir /scratch
netd /run/n
network 10.200.0.0/16
network6 fd12:3456:789a::/64 nat
"""
SITE = {"z": {"like": "strict", "network": "private"}}
PROFILES = profiles.render(profiles.merge(toml.loads((CHECKOUT / "policies/profiles.toml").read_text())["profile"], SITE)).encode()
OPS = ("bind", "slave", "link", "tmpfs", "dev", "proc", "mqueue", "home", "accounts", "disk")
RW, OPTIONAL = 1, 2  # enum nw_op_flag


def text(chars):
    return ffi.string(chars).decode("ascii")


def ranges(found):
    return tuple(twin.Range(found.r[at].first, found.r[at].last) for at in range(found.n))


def poisoned(kind):
    """Memory as a caller might have it: what the parser does not write shows."""
    made = ffi.new(kind)
    ffi.memmove(made, b"\xaa" * ffi.sizeof(made[0]), ffi.sizeof(made[0]))
    return made


def c_guard(data):
    """What C makes of it, as the twin's Guard, or None."""
    guard, error = poisoned("struct nw_guard *"), ffi.new("struct nw_err *")
    if lib.nw_guard_parse(ffi.new("char[]", data + b"\0"), len(data), guard, error):
        assert error.exit == 202
        assert text(error.text)
        return None
    names = ("python", "script", "policyd", "policy", "state", "audit", "ca_dir", "voms_dir", "cgroup", "tmp_dir", "netd")
    bounds = ("caller_uid", "switch_uid", "switch_gid", "map_uid", "tracking_gid")
    allow = {mode: tuple(text(guard.allow[at].name[n]) for n in range(guard.allow[at].n)) for at, mode in enumerate(twin.MODES) if guard.allow[at].n}
    return twin.Guard(
        launcher=text(lib.nw_launcher_name(guard)),
        **{name: text(getattr(guard, name)) for name in names}, **{name: ranges(getattr(guard, name)) for name in bounds}, allow=allow,
        network=twin.Network(guard.network, bin(guard.netmask).count("1")) if guard.netmask else None,
        network6=twin.Network6(int.from_bytes(bytes(guard.network6), "big"), guard.bits6, bool(guard.nat6)) if guard.bits6 else None,
        child=(guard.child_uid, guard.child_gid) if guard.has_child else None, deadline_ms=guard.deadline_ms, max_wall_s=guard.max_wall_s,
        audit_on_failure=("deny", "run-and-flag", "run")[guard.audit_on_failure], syslog=bool(guard.syslog),
    )


def c_profile(data, name):
    """What C makes of the profile of that name, as the twin's Profile, or None."""
    profile, error = poisoned("struct nw_profile *"), ffi.new("struct nw_err *")
    if lib.nw_profile_parse(ffi.new("char[]", data + b"\0"), len(data), name.encode(), profile, error):
        assert error.exit == 202
        assert text(error.text)
        return None
    ops = [twin.Op(OPS[op.kind], text(op.path), text(op.arg), bool(op.flags & RW), bool(op.flags & OPTIONAL), op.mode, op.size)
           for op in profile.op[0:profile.n]]
    return twin.Profile(
        text(profile.name), tuple(kind for bit, kind in enumerate(twin.NAMESPACES) if profile.namespaces >> bit & 1), text(profile.seccomp),
        text(profile.network),
        tuple(kind + "?" * (profile.landlock_optional >> bit & 1) for bit, kind in enumerate(twin.LANDLOCK) if profile.landlock >> bit & 1),
        tuple(profile.tcp_bind.port[0:profile.tcp_bind.n]), tuple(profile.tcp_connect.port[0:profile.tcp_connect.n]),
        bool(profile.degrade), text(profile.hostname), ops,
    )


def python_guard(data):
    try:
        return twin.parse_guard(data)
    except twin.GuardError:
        return None


def python_profile(data, name):
    try:
        found = twin.parse_profiles(data).get(name)
    except twin.GuardError:
        return None
    if found:
        found.namespaces = tuple(kind for kind in twin.NAMESPACES if kind in found.namespaces)  # C keeps a set
    return found


WORDS = [
    b"launcher", b"0", b"1", b"-1", b"00", b"010", b"+1", b"/", b"//", b"/a/..", b"/a/.b", b"/a/", b"/" + b"x" * 254, b"/" + b"x" * 255, b"1-1",
    b"0-0", b"999-1000", b"1000-1000", b"4294967292-4294967292", b"4294967293-4294967293", b"5-4", b"ro", b"rw?", b"tmpfs", b"proc", b"home",
    b"landlock abstract", b"on-missing degrade", b"1777", b"01777", b"2777", b"4095", b"4096", b"1125899906842624", b"1125899906842625", b"x" * 31,
    b"x" * 32, b"x" * 63, b"x" * 64, b".a", b"-a", b"_a", b"\t", b" ", b"\n", b"#", b"\x7f", b"\0", b"\xff", b"allow map a b", b"profile z\n",
    b"profile strict", b"seccomp a", b"hostname", b"dev null", b"null " * 31, b"18446744073709551616", b"99999999999999999999", b"31622400",
    b"31622401", b"0.0.0.0/8", b"10.0.0.0/7", b"10.0.0.0/30", b"10.0.0.0/31", b"10.0.0.4/29", b"10.0.0.8/29", b"10.0.0/16",
    b"10.0.0.0.0/16", b"10.0.0.256/30", b"10/0.0.0/8", b"10.0.0.0/08", b"10.0.0.0/", b"10.0.0.0", b"10.0.0.0/16/16", b"network 10.0.0.0/8\n",
    b"fd00::/64", b"fd00::/96", b"fd00::/97", b"fd00::/15", b"fd00::1/64", b"fd00:0:0:8000::/49", b"fd00:0:0:8000::/48", b"fe80::/64",
    b"fd00::1.2.3.4/96", b"2001:db8::/32", b"::/16", b"ff00::/16", b"fd00::%lo/64",
    b"[fd00::]/64", b"fd00::/064", b"FD00::/64", b"fd00:::/64", b"nat", b"routed",
    b"network6 2001:db8:1::/48 routed\n",
    b"120001", b"bind ro /x", b"link /a b", b"200-201", b"201-201", b"tracking-gid 201-201\n",
]
edits = st.lists(st.tuples(st.sampled_from(["word", "append", "repeat", "drop", "insert", "grow"]), st.integers(0, 10**6), st.integers(0, 40),
                           st.sampled_from(WORDS) | st.binary(max_size=12)), min_size=1, max_size=3)


def edited(base, changes):
    """The base with some lines or words exchanged: close enough to right that the deep ends of the parsers are reached."""
    lines = base.split(b"\n")
    for how, where, which, word in changes:
        at = where % len(lines)
        words = lines[at].split(b" ")
        words[which % len(words)] = word
        new = {"word": [b" ".join(words)], "append": [lines[at] + b" " + word], "repeat": [lines[at], lines[where // 7 % len(lines)]], "drop": [],
               "insert": [word, lines[at]], "grow": [lines[at] * 30]}[how]
        lines[at:at + 1] = new
        lines = lines or [b""]
    return b"\n".join(lines)


@settings(max_examples=3000, deadline=None)
@given(edits.map(lambda changes: edited(GUARD, changes)) | st.binary(max_size=200).map(lambda tail: GUARD + tail))
@example(GUARD)
@example(GUARD + b"\n" * 981)
@example(GUARD + b"\n" * 982)
@example(GUARD + b"#" * 1023 + b"\n")
@example(GUARD + b"#" * 1024 + b"\n")
@example(b"")
def test_both_parsers_make_the_same_of_a_guard(data):
    assert c_guard(data) == python_guard(data)


@settings(max_examples=3000, deadline=None)
@given(edits.map(lambda changes: edited(PROFILES, changes)), st.sampled_from(["strict", "batch", "none", "z"]))
@example(PROFILES, "compat")
@example(b"nodewrap-profiles 1\n", "strict")
def test_both_parsers_make_the_same_of_profiles(data, name):
    assert c_profile(data, name) == python_profile(data, name)


def test_the_shipped_profiles_and_a_full_guard_are_accepted_by_both():
    assert c_guard(GUARD) is not None
    for name in ("strict", "batch", "compat", "none", "z"):
        assert c_profile(PROFILES, name) is not None
