"""csrc/guard.c against nodewrap/guard.py on profiles and guards made line by line, and on the last allowed and first refused value of every bound."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.differential.test_guard_twin import c_guard, c_profile, python_guard, python_profile

PATHS = st.sampled_from(["/", "/a", "/a/b", "/a/", "//a", "/a//b", "/.", "/..", "/a/..", "/a/./b", "/.a", "/a..", "/...", "a", "", "/" + "x" * 254,
                         "/" + "x" * 255, "/x:y", "/\x7e", "/#", "/a/../b", "/-"])
NAMES = st.sampled_from(["null", "x" * 31, "x" * 32, "x" * 63, "x" * 64, ".a", "-a", "_", "a.b-c_D9", "a/b", "a b", "", "strict", "é"])
COUNTS = st.sampled_from(["0", "1", "4095", "4096", "1125899906842624", "1125899906842625", "18446744073709551616",
                          "18446744073709551615", "-1", "+1", "04096", "", "4k", "99999999999999999999999"])
MODES = st.sampled_from(["0", "7", "777", "1777", "1778", "2000", "01777", "07777", "", "8", "-1", "00000"])
WAYS = st.sampled_from(["ro", "rw", "ro?", "rw?", "", "r", "ro??", "RO"])
DEVICES = st.sampled_from(["a*", "*", "a/*", "a/b", "a/b*", "a/b/c", "/a", "a/", "a**", "a*b", "x" * 31 + "*", "x" * 32 + "*",
                           "x" * 31 + "/" + "x" * 31, "x" * 32 + "/a", "a/" + "x" * 32, "a/" + "x" * 31 + "*", "a/.", "a/..", "../a", "-/a", "a/-"])
WALLS = st.lists(st.sampled_from(["abstract", "signals", "files", "tcp", "abstract?", "signals?", "files?", "tcp?", "?", "tcp??", "x"]), max_size=5)
PORTS = st.sampled_from(["0", "1", "65535", "65536", "-1", "00", "", "443", "x"])
KINDS = st.lists(st.sampled_from(["pid", "ipc", "uts", "cgroup", "mount", "net", "user"]), max_size=7)


def line(*parts):
    return st.tuples(*[part if isinstance(part, st.SearchStrategy) else st.just(part) for part in parts]).map(" ".join)


LINES = st.one_of(
    line(st.sampled_from(["bind", "slave"]), WAYS, PATHS), line("link", PATHS, PATHS), line("tmpfs", PATHS, MODES, COUNTS), line("dev", NAMES),
    st.sampled_from(["accounts", "accounts x", "disk /a b"]), line("disk", PATHS), line("dev", DEVICES),
    st.sampled_from(["proc", "mqueue", "home", "proc x", "# comment", "", " \t", "profile", "unknown x", "landlock abstract", "landlock x", "dev"]),
    st.sampled_from(["on-missing refuse", "on-missing degrade", "on-missing x", "landlock", "hostname"]), line("seccomp", NAMES),
    line("hostname", NAMES), WALLS.map(lambda kinds: " ".join(["landlock", *kinds])), line(st.sampled_from(["tcp-bind", "tcp-connect"]), PORTS),
    line("tcp-bind", PORTS, PORTS),
    KINDS.map(lambda kinds: " ".join(["namespace", *kinds])), line("profile", NAMES), st.sampled_from(["profile a", "profile b", "profile strict"]),
)


def whole(lines, name="strict"):
    return "\n".join(["nodewrap-profiles 1", f"profile {name}", *lines, ""]).encode("latin-1")


def test_profiles_made_line_by_line_are_read_alike():
    seen = Counter()

    @settings(max_examples=3000, deadline=None)
    @given(st.lists(LINES, max_size=4), st.sampled_from(["strict", "a"]))
    def compare(lines, name):
        data = whole(lines)
        found = c_profile(data, name)
        assert found == python_profile(data, name)
        seen["refused" if found is None else "ops" if found.ops else "plain"] += 1

    compare()
    assert all(seen[outcome] > 50 for outcome in ("refused", "ops", "plain")), seen


ONCE = ["proc", "mqueue", "home", "accounts", "landlock abstract", "tcp-bind 1", "tcp-connect 1",
        "on-missing degrade", "on-missing refuse", "seccomp x", "hostname h", "namespace pid"]


@pytest.mark.parametrize("once", ONCE)
def test_lines_that_stand_once_are_refused_the_second_time_by_both(once):
    for lines, good in ((([once]), True), ([once, once], False), ([once, "bind ro /x", once], False)):
        assert (c_profile(whole(lines), "strict") is not None) == good
        assert (python_profile(whole(lines), "strict") is not None) == good
    again = whole([once, "profile z", once])
    assert c_profile(again, "z") == python_profile(again, "z") is not None


PROFILE_BOUNDS = {
    "places": (160, lambda n: whole([f"bind ro /{at}" for at in range(n)])),
    "places by dev": (160, lambda n: whole([*["dev " + "null " * 30] * 5, "dev " + "null " * (n - 150)])),
    "profiles": (16, lambda n: whole([f"profile p{at}" for at in range(n - 1)])),
    "lines": (1000, lambda n: whole(["#"] * (n - 2))),
    "bytes of a line": (1023, lambda n: whole(["#" * n])),
    "words": (32, lambda n: whole(["dev" + " a" * (n - 1)])),
    "name": (31, lambda n: whole(["dev " + "a" * n])),
    "file name": (63, lambda n: whole(["seccomp " + "a" * n])),
    "port": (65535, lambda n: whole([f"tcp-bind {n}"])),
    "ports": (31, lambda n: whole(["tcp-connect" + " 443" * n])),
    "path": (255, lambda n: whole(["bind ro /" + "a" * (n - 1)])),
    "target": (255, lambda n: whole(["link /a " + "a" * n])),
    "size": (1 << 50, lambda n: whole([f"tmpfs /a 0 {n}"])),
    "mode": (0o1777, lambda n: whole([f"tmpfs /a {n:o} 4096"])),
    "digits of a mode": (4, lambda n: whole([f"tmpfs /a {'0' * n} 4096"])),
    "smallest size": (-4096, lambda n: whole([f"tmpfs /a 0 {-n}"])),
    "bytes": (256 << 10, lambda n: whole(["#" * 999] * ((n - 35) // 1000) + ["#" * ((n - 35) % 1000 - 1)])),
}


@pytest.mark.parametrize("name", PROFILE_BOUNDS)
def test_the_last_allowed_value_of_a_profile_is_accepted_and_the_next_refused_by_both(name):
    most, build = PROFILE_BOUNDS[name]
    assert c_profile(build(most), "strict") == python_profile(build(most), "strict") is not None
    assert c_profile(build(most + 1), "strict") is None
    assert python_profile(build(most + 1), "strict") is None


def guard(*more, **changes):
    lines = {"launcher": "setuid", "python": "/p", "script": "/s", "child": "990 990", "policy": "/d", "state": "/v", "audit": "/a"}
    lines["caller-uid"] = "1-5"
    lines.update({key.replace("_", "-"): value for key, value in changes.items()})
    return "\n".join(["nodewrap-guard 1", *[f"{key} {value}" for key, value in lines.items()], *more, ""]).encode()


GUARD_BOUNDS = {
    "ranges": (16, lambda n: guard(caller_uid=" ".join(["1-5"] * n))),
    "id": (4294967292, lambda n: guard(caller_uid=f"1-{n}")),
    "child": (4294967292, lambda n: guard(child=f"{n} 1")),
    "child's group": (4294967292, lambda n: guard(child=f"1 {n}")),
    "deadline": (120000, lambda n: guard(f"deadline-ms {n}")),
    "wall": (366 * 86400, lambda n: guard(f"max-wall-s {n}")),
    "lowest account": (-1000, lambda n: guard(f"switch-uid {-n}-2000")),
    "lowest group": (-1000, lambda n: guard(f"switch-gid {-n}-2000")),
    "lowest block": (-1000, lambda n: guard(f"map-uid {-n}-2000")),
    "lowest caller": (-1, lambda n: guard(caller_uid=f"{-n}-5")),
    "lowest deadline": (-1, lambda n: guard(f"deadline-ms {-n}")),
    "first is not above last": (5, lambda n: guard(caller_uid=f"{n}-5")),
    "profiles of a mode": (16, lambda n: guard("allow map" + " p" * n)),
    "path": (255, lambda n: guard(script="/" + "a" * (n - 1))),
    "lines": (1000, lambda n: guard(*["#"] * (n - 9))),
}


@pytest.mark.parametrize("name", GUARD_BOUNDS)
def test_the_last_allowed_value_of_a_guard_is_accepted_and_the_next_refused_by_both(name):
    most, build = GUARD_BOUNDS[name]
    assert c_guard(build(most)) == python_guard(build(most)) is not None
    assert c_guard(build(most + 1)) is None
    assert python_guard(build(most + 1)) is None
