"""Whatever a site writes and ``check`` finds nothing in, the launcher's format can hold; guards survive being written and read."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nodewrap import profiles
from nodewrap.guard import HIGHEST_ID, MAX_WALL_S, MODES, Guard, GuardError, Range, parse_guard, parse_profiles, render_guard

PARTS = st.text(string.ascii_letters + string.digits + "._-+@?", min_size=1, max_size=12)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
SIZES = st.tuples(st.integers(0, 10**13), st.sampled_from(["", "KiB", "MiB", "GiB", "TiB"])).map(lambda pair: f"{pair[0]}{pair[1]}")
TABLES = st.fixed_dictionaries(
    {"system": st.just(["/usr"]), "devices": st.just(["null"]), "seccomp": st.just(True), "nested_userns": st.just(False)},
    optional={
        "namespaces": st.lists(st.sampled_from(profiles.NAMESPACES), max_size=7),
        "landlock": st.lists(st.sampled_from(["abstract", "signals?", "files", "tcp", "tcp?"]), max_size=3),
        "tcp_bind": st.lists(st.integers(-1, 65536), max_size=33), "tcp_connect": st.lists(st.integers(0, 65535), max_size=3, unique=True),
        "on_missing": st.sampled_from(["refuse", "degrade", ""]), "hostname": st.text(string.printable, max_size=70),
        "read_only": st.lists(PATHS, max_size=5), "writable": st.lists(PATHS, max_size=5), "follow": st.lists(PATHS, max_size=5),
        "tmpfs": st.dictionaries(PATHS, SIZES, max_size=3), "proc": st.booleans(), "mqueue": st.booleans(), "home": st.booleans(),
        "disk": st.lists(PATHS, max_size=2), "accounts": st.booleans(),
    },
)


@given(st.text(string.ascii_lowercase + string.digits + "-.", min_size=1, max_size=34), TABLES)
def test_what_check_accepts_the_launcher_reads_as_it_was_meant(name, table):
    assume(not profiles.check(name, table))
    found = parse_profiles(profiles.render({name: table}).encode())[name]
    assert found.namespaces == tuple(table.get("namespaces", ()))
    assert found.hostname == table.get("hostname", "")
    shown = {(op.path, op.writable, op.optional) for op in found.ops if op.kind in ("bind", "slave")}
    for key in ("read_only", "writable", "follow"):
        assert {(path.rstrip("?"), key == "writable", path.endswith("?")) for path in table.get(key, ())} <= shown


IDS = st.integers(1000, HIGHEST_ID)
RANGES = st.lists(st.tuples(IDS, IDS).map(lambda pair: Range(min(pair), max(pair))), max_size=16).map(tuple)
FILES = PATHS.filter(lambda path: "/./" not in path + "/" and "/../" not in path + "/")
NAMES = st.lists(st.text(string.ascii_letters, min_size=1, max_size=31), min_size=1, max_size=16).map(tuple)
GUARDS = st.builds(
    Guard, launcher=st.sampled_from(["setuid", "socket", "userns"]), python=FILES, script=FILES, policy=FILES, state=FILES, audit=FILES,
    child=st.tuples(st.integers(1, HIGHEST_ID), st.integers(1, HIGHEST_ID)), policyd=st.just("") | FILES, cgroup=st.just("") | FILES,
    tmp_dir=st.just("") | FILES,
    audit_on_failure=st.sampled_from(["deny", "run-and-flag", "run"]), syslog=st.booleans(), deadline_ms=st.integers(1, 120000),
    max_wall_s=st.integers(1, MAX_WALL_S), caller_uid=RANGES.filter(len), switch_uid=RANGES, switch_gid=RANGES, map_uid=RANGES,
    allow=st.dictionaries(st.sampled_from(MODES), NAMES),
)


@given(GUARDS)
def test_a_guard_survives_being_written_and_read(guard):
    assert parse_guard(render_guard(guard).encode()) == guard


@given(st.binary(max_size=400))
def test_any_bytes_are_a_guard_or_an_error_of_one_line(data):
    for parse in (parse_guard, parse_profiles):
        with pytest.raises(GuardError) as error:
            parse(data)
        assert str(error.value).isprintable()
