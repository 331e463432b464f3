"""csrc/decision.c and check.c against nodewrap/decision.py: the same bytes are a decision or none, mean the same, and stay within the same guard."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodewrap import _core, wire
from nodewrap import decision as twin
from nodewrap.guard import Guard, Range, render_guard
from tests.differential.test_guard_twin import poisoned

ffi, lib = _core.ffi, _core.lib
WIRE = Path(__file__).parents[2] / "docs/wire.md"
CALLER, ARGS, ENVS = 2000, 4, 8
GUARD = Guard(
    launcher="setuid", python="/p", script="/s", child=(990, 990), policy="/d", state="/v", audit="/a", caller_uid=(Range(2000, 2000),),
    switch_uid=(Range(1999, 2001), Range(3000, 3999)), switch_gid=(Range(3000, 3999),), map_uid=(Range(100000, 165535),),
    allow={"switch": ("strict", "none"), "map": ("batch",), "log-only": ("none",)},
)


# ---- what C says ----


def c_value(value):
    """A field of a C struct as Python has it: char * is bytes or None, struct nw_bytes is bytes."""
    if ffi.typeof(value) == ffi.typeof("char *") or ffi.typeof(value) == ffi.typeof("const char *"):
        return ffi.string(value) if value else None
    return bytes(ffi.buffer(value.p, value.len)) if ffi.typeof(value).cname == "struct nw_bytes" else value


def c_object(made, there):
    """The C struct `there` as the twin's class of `made`: lists by their count, the rest by name."""
    for each in fields(made):
        value, now = getattr(there, each.name), getattr(made, each.name)
        if isinstance(now, list):
            part = {"account": twin.Account, "map": twin.Mapping, "limit": twin.Limit, "file": twin.File, "fact": twin.Fact}.get(each.name)
            items = [value[at] for at in range(getattr(there, each.name + "s"))]
            value = [c_object(part(), item) if part else item if isinstance(item, int) else c_value(item) for item in items]
        elif isinstance(now, str):
            value = twin.MODES[value] if value >= 0 else ""
        setattr(made, each.name, value if isinstance(value, (int, list, str)) else c_value(value))
    return made


def c_guard(guard):
    text, found, error = render_guard(guard).encode(), ffi.new("struct nw_guard *"), ffi.new("struct nw_err *")
    assert lib.nw_guard_parse(ffi.new("char[]", text), len(text), found, error) == 0, ffi.string(error.text)
    return found


def in_c(body, guard, privileged, caller, args, envs):
    """(the decision or None, code of the refusal or "")."""
    arena, there, error = ffi.new("char[]", len(body) + 1), poisoned("struct nw_decision *"), ffi.new("struct nw_err *")
    exact = ffi.new("unsigned char[]", body) if body else ffi.new("unsigned char[1]")
    if lib.nw_decision_decode(exact, len(body), arena, there, error):
        assert (error.exit, ffi.string(error.code)) == (202, b"NW-CHILD")
        assert (there.verdict, there.mode, there.status_fd, there.facts, there.accounts, there.profile) == (0, -1, -1, 0, 0, ffi.NULL)
        return None, "NW-CHILD"
    found = c_object(twin.Decision(), there)
    if lib.nw_decision_check(there, c_guard(guard), privileged, caller, args, envs, error):
        assert (error.exit, ffi.string(error.code)) == (202, b"NW-GUARD")
        return found, "NW-GUARD"
    return found, ""


def in_python(body, guard, privileged, caller, args, envs):
    found = None
    try:
        found = twin.decode(body)
        twin.check(found, guard, privileged, caller, args, envs)
    except twin.DecisionError as no:
        return found, no.code
    return found, ""


def same(body, guard=GUARD, privileged=True, caller=CALLER, args=ARGS, envs=ENVS):
    """The outcome ("", NW-CHILD, NW-GUARD), on which both agree, as on every value."""
    c, python = in_c(body, guard, privileged, caller, args, envs), in_python(body, guard, privileged, caller, args, envs)
    assert c == python
    return c[1]


# ---- decisions that are right but for what was done to them ----


ACCOUNT = [(1, 3001), (2, 3002), (3, 3003), (4, "user"), (5, "/home/user"), (6, "USER=user")]
BASES = {
    "switch": [(1, 1), (2, 1), (6, "switch"), (7, "strict"), (8, ACCOUNT), (9, 1), (11, "/w"), (12, "/w/d"), (13, "/x"), (14, 1),
               (15, 1), (16, 0), (16, 7), (17, "A=b"), (18, 1000), (19, 500),
               (20, [(1, 7), (2, 64)]), (20, [(1, 32), (2, 2**30), (3, 1)]), (21, 3), (22, [(1, "/w/p"), (2, b"\0x"), (3, 0o600), (4, 0)]),
               (23, [(1, "subject.dn"), (2, "/CN=x")]), (23, [(1, "note"), (2, "y")]), (24, 0o22), (26, 0), (27, "line")],
    "map": [(1, 1), (2, 1), (6, "map"), (7, "batch"), (10, [(1, 1000), (2, 1000), (3, 65536)]), (14, 1)],
    "one": [(1, 1), (2, 1), (6, "map"), (7, "batch"), (10, [(1, 1000), (2, 1000), (3, 1), (4, 0), (5, 0)]), (14, 1)],
    "log-only": [(1, 1), (2, 1), (6, "log-only"), (7, "none"), (14, 3), (11, "/w")],
    "image": [(1, 1), (2, 1), (6, "log-only"), (7, "none"), (14, 3), (28, "/p"), (28, ""), (29, 1), (23, [(1, "image.path"), (2, "/i")])],
    "deny": [(1, 1), (2, 2), (4, "NW-BAN"), (5, "banned"), (23, [(1, "rule.name"), (2, "b")]), (26, 1)],
    "say": [(1, 1), (2, 0), (3, 5), (5, "usage\n")],
}
NUMBERS = st.sampled_from([
    0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 38, 39, 255, 256, 511, 0o700, 0o701, 0o777, 0o1000, 999, 1000, 1999, 2000, 2001, 3000, 3999, 4000,
    65535, 65536, 65537, 99999, 100000, 165535, 600000, 600001, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**63, 2**64 - 1,
]) | st.integers(0, 2**64 - 1)
TEXTS = st.sampled_from([
    "", "/", "x", "/..", "/a/..", "/a/../b", "/..a", "/a..", "..", "//", "/a/...", "switch", "map", "log-only", "log-onl", "mapx", "strict", "batch",
    "none", "note", "subject.dn", "nodewrap.run", "/" + "x" * 254, "/" + "x" * 255, "/" + "x" * 4094, "/" + "x" * 4095, "x" * 31, "x" * 32,
    "x" * 64, "x" * 65, "x" * 4096, "x" * 4097, "\udcff\udc80",
])
VALUES = NUMBERS | TEXTS | st.binary(max_size=12) | st.just([])
CHANGES = st.lists(st.tuples(
    st.sampled_from(["value", "value", "value", "drop", "again", "tag", "insert", "swap", "inside", "inside", "inside"]),
    st.integers(0, 99), st.integers(0, 31), VALUES,
), max_size=4)


def changed(parts, changes):
    """The fields with some of them changed; "inside" changes the fields of a struct."""
    parts = list(parts)
    for how, where, tag, value in changes:
        at = where % len(parts) if parts else 0
        old = parts[at] if parts else (tag, value)
        inner = [number for number, (_, found) in enumerate(parts) if isinstance(found, list) and found]
        if how == "inside" and inner:
            at = inner[where % len(inner)]
            new = [(parts[at][0], changed(parts[at][1], [(("value", "drop", "again", "tag", "insert")[tag % 5], where, tag % 8, value)]))]
        else:
            ways = {"drop": [], "again": [old, old], "tag": [(tag, old[1])], "insert": [(tag, value), old], "swap": [old, *parts[:1]]}
            new = ways.get(how, [(old[0], value)])
        parts[at:at + 1] = new
    return parts


def damaged(body, damage):
    at, byte, how = damage
    at %= len(body) + 1
    return {"keep": body, "cut": body[:at], "flip": body[:at] + bytes([byte]) + body[at + 1:], "more": body[:at] + bytes([byte]) + body[at:]}[how]


RANGES = st.lists(st.tuples(st.integers(1000, 1002) | NUMBERS, st.integers(0, 5000)), max_size=3).map(
    lambda pairs: tuple(Range(first, min(first + more, 4294967292)) for first, more in pairs if 1000 <= first <= 4294967292))
NAMES = st.lists(st.sampled_from(["strict", "batch", "none", "x" * 31]), min_size=1, max_size=3).map(tuple)
ALLOW = st.dictionaries(st.sampled_from(twin.MODES), NAMES)
GUARDS = st.builds(lambda uid, gid, block, allow: Guard(**{**vars(GUARD), "switch_uid": uid, "switch_gid": gid, "map_uid": block, "allow": allow}),
                   RANGES, RANGES, RANGES, ALLOW)
BODIES = st.builds(lambda base, changes, damage: damaged(wire.pack(changed(BASES[base], changes)), damage), st.sampled_from(sorted(BASES)), CHANGES,
                   st.tuples(st.integers(0, 2000), st.integers(0, 255), st.sampled_from(["keep"] * 8 + ["cut", "flip", "more"])))


def test_decisions_are_read_and_bounded_alike():
    seen = Counter()

    @settings(max_examples=4000, deadline=None)
    @given(BODIES, st.just(GUARD) | GUARDS, st.booleans(), st.sampled_from([CALLER, 3001, 0, 2**32 - 1]), st.integers(0, 4), st.integers(0, 8))
    def compare(body, guard, privileged, caller, args, envs):
        seen[same(body, guard, privileged, caller, args, envs)] += 1

    compare()
    assert all(seen[outcome] > 200 for outcome in ("", "NW-CHILD", "NW-GUARD")), seen


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=60) | st.lists(st.tuples(st.integers(0, 40), VALUES), max_size=6).map(wire.pack))
def test_bytes_without_a_plan_are_refused_alike(body):
    same(body)


@pytest.mark.parametrize("base", BASES)
def test_unchanged_decisions_are_accepted_by_both(base):
    assert same(wire.pack(BASES[base])) == ""


LOG_ONLY = BASES["log-only"]
LIMITS = {
    "accounts": (512, lambda n: [*BASES["switch"][:4], (9, 1), (14, 1), *[(8, [(1, 3000 + at % 1000), (2, 3000), (4, "u")]) for at in range(n)]]),
    "groups": (32, lambda n: [*BASES["switch"][:4], (14, 1), (8, [(1, 3001), (2, 3000), (4, "u"), *[(3, 3000 + at) for at in range(n)]])]),
    "account environment": (4, lambda n: [*BASES["switch"][:4], (14, 1),
        (8, [(1, 3001), (2, 3000), (4, "u"), *[(6, f"A{at}=") for at in range(n)]])]),
    "home": (255, lambda n: [*BASES["switch"][:4], (14, 1), (8, [(1, 3001), (2, 3000), (4, "u"), (5, "/" + "h" * (n - 1))])]),
    "keeps": (4096, lambda n: [*LOG_ONLY, *[(16, at % 8) for at in range(n)]]),
    "sets": (512, lambda n: [*LOG_ONLY, *[(17, f"A{at}=") for at in range(n)]]),
    "set": (131072, lambda n: [*LOG_ONLY, (17, "A" * n)]),
    "exposes": (16, lambda n: [*LOG_ONLY, *[(13, f"/{at}") for at in range(n)]]),
    "limits": (20, lambda n: [*LOG_ONLY, *[(20, [(1, at % 16), (2, 2**64 - 1 - at)]) for at in range(n)]]),
    "resource": (15, lambda n: [*LOG_ONLY, (20, [(1, n), (2, 0)])]),
    "limit of the run": (42, lambda n: [*LOG_ONLY, (20, [(1, n), (2, 0), (3, 1)])]),
    "files": (4, lambda n: [*LOG_ONLY, *[(22, [(1, "/f"), (2, b""), (3, 0), (4, 1)]) for _ in range(n)]]),
    "file": (65536, lambda n: [*LOG_ONLY, (22, [(1, "/f"), (2, b"\0" * n), (3, 0o700), (4, 0)])]),
    "facts": (160, lambda n: [*LOG_ONLY, *[(23, [(1, "note"), (2, str(at))]) for at in range(n)]]),
    "fact": (4096, lambda n: [*LOG_ONLY, (23, [(1, "note"), (2, "x" * n)])]),
    "profile": (31, lambda n: [(1, 1), (2, 2), (7, "x" * n)]),
    "text": (65536, lambda n: [(1, 1), (2, 2), (5, "x" * n)]),
    "workdir": (4095, lambda n: [*LOG_ONLY[:-1], (11, "/" + "w" * (n - 1))]),
    "argument": (3, lambda n: [*LOG_ONLY[:4], (14, n)]),
    "grace": (600000, lambda n: [*LOG_ONLY, (19, n)]),
    "umask": (0o777, lambda n: [*LOG_ONLY, (24, n)]),
    "status descriptor": (255, lambda n: [*LOG_ONLY, (21, n)]),
    "block": (65536, lambda n: [*BASES["map"][:4], (14, 1), (10, [(1, 65535 if n == 65536 else 1), (2, 1), (3, n)])]),
    "id inside": (65535, lambda n: [*BASES["map"][:4], (14, 1), (10, [(1, n), (2, 1), (3, 65536)])]),
    "one id inside": (2**31 - 1, lambda n: [*BASES["map"][:4], (14, 1), (10, [(1, n), (2, 1), (3, 1)])]),
    "account name": (255, lambda n: [*BASES["switch"][:4], (14, 1), (8, [(1, 3001), (2, 3000), (4, "u" * n)])]),
    "entry of an account": (4096, lambda n: [*BASES["switch"][:4], (14, 1), (8, [(1, 3001), (2, 3000), (4, "u"), (6, "A" * n)])]),
    "code": (31, lambda n: [(1, 1), (2, 2), (4, "x" * n)]),
    "syslog": (4096, lambda n: [*LOG_ONLY, (27, "x" * n)]),
    "words in front": (128, lambda n: [*LOG_ONLY, *[(28, f"/{at}") for at in range(n)]]),
    "word in front": (4095, lambda n: [*LOG_ONLY, (28, "/" + "w" * (n - 1))]),
    "image": (1, lambda n: [*LOG_ONLY, (29, n)]),
    "cwd": (4095, lambda n: [*LOG_ONLY, (12, "/" + "w" * (n - 1))]),
    "exposed path": (4095, lambda n: [*LOG_ONLY, (13, "/" + "w" * (n - 1))]),
    "file's path": (4095, lambda n: [*LOG_ONLY, (22, [(1, "/" + "w" * (n - 1)), (2, b""), (3, 0), (4, 0)])]),
    "verdict": (4, lambda n: [(1, 1), (2, n)]),
    "exit": (255, lambda n: [(1, 1), (2, 0), (3, n)]),
    "kept index": (7, lambda n: [*LOG_ONLY, (16, n)]),
    "command or files": (4, lambda n: [*LOG_ONLY[:4], (14, n), (22, [(1, "/f"), (2, b""), (3, 0), (4, 0)])]),
    "account uid": (3999, lambda n: [*BASES["switch"][:4], (14, 1), (8, [(1, n), (2, 3000), (4, "u")])]),
    "account gid": (3999, lambda n: [*BASES["switch"][:4], (14, 1), (8, [(1, 3000), (2, n), (4, "u")])]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_last_allowed_value_is_accepted_and_the_next_refused_by_both(name):
    most, build = LIMITS[name]
    assert same(wire.pack(build(most))) == ""
    assert same(wire.pack(build(most + 1))) in ("NW-CHILD", "NW-GUARD")


def test_delegated_range_is_bounded_alike_without_privilege():
    for count in (0, 65535, 65536, 65537):
        parts = [*BASES["map"][:4], (14, 1), (10, [(1, 1), (2, 1), (3, 65536), (4, 100000), (5, count)])]
        assert same(wire.pack(parts), privileged=False) == ("NW-GUARD" if count == 65535 else "")
        assert same(wire.pack(parts), privileged=True) == "NW-GUARD"


PLACES = {
    "workdir": lambda path: [*LOG_ONLY[:-1], (11, path)], "cwd": lambda path: [*LOG_ONLY, (12, path)], "expose": lambda path: [*LOG_ONLY, (13, path)],
    "program in front": lambda path: [*LOG_ONLY, (28, path), (28, "..")],
    "file": lambda path: [*LOG_ONLY, (22, [(1, path), (2, b""), (3, 0), (4, 0)])],
    "home": lambda path: [*BASES["switch"][:4], (14, 1), (8, [(1, 3001), (2, 3000), (4, "u"), (5, path)])],
}


@pytest.mark.parametrize("place", PLACES)
def test_paths_are_absolute_and_never_lead_up(place):
    for path in ("/", "/a", "/a..", "/..a", "/a/...", "/a/.b", "//"):
        assert same(wire.pack(PLACES[place](path))) == ""
    for path in ("", "a", "..", "/..", "/a/..", "/a/../b", "/../a", "//../a", "/..a/..", "/a/..b/../c"):
        assert same(wire.pack(PLACES[place](path))) == "NW-GUARD"


def test_callers_own_uid_is_no_account_to_switch_to():
    for uid, outcome in ((CALLER - 1, ""), (CALLER, "NW-GUARD"), (CALLER + 1, "")):
        assert same(wire.pack([*BASES["switch"][:4], (14, 1), (8, [(1, uid), (2, 3000), (4, "u")])])) == outcome


def test_facts_are_those_that_the_page_lists():
    listed = re.search(r"Audit keys a child may set.*?`(.*?)`", WIRE.read_text(encoding="utf-8"), re.S).group(1).split()
    assert {name.rstrip("*"): name.endswith("*") for name in listed} == twin.FACTS
    many = ffi.new("bool *")
    for name, repeats in twin.FACTS.items():
        assert lib.nw_fact_path(name.encode(), many) != ffi.NULL
        assert bool(many[0]) == repeats
    for name in ("", "note ", "subject", "subject.dnx", "nodewrap.run.id", "event.sequence"):
        assert lib.nw_fact_path(name.encode(), many) == ffi.NULL


def test_classes_of_the_twin_have_the_fields_of_the_header():
    """A field that C has and the twin does not would never be compared."""
    for made, kind in ((twin.Decision, "nw_decision"), (twin.Account, "nw_account"), (twin.Mapping, "nw_mapping"), (twin.Limit, "nw_limit"),
                       (twin.File, "nw_file"), (twin.Fact, "nw_fact")):
        assert is_dataclass(made)
        own = {each.name for each in fields(made)}
        counts = {name + "s" for name, there in ffi.typeof("struct " + kind).fields if there.type.kind == "array"}
        assert {name for name, _ in ffi.typeof("struct " + kind).fields} - counts == own
