"""The parser and writer of leases (csrc/leasefile.c) against their twin: the same bytes are taken, or refused with the same words."""

from __future__ import annotations

import os

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodewrap import _core, lease
from nodewrap.decision import FACTS

ffi, lib = _core.ffi, _core.lib
RUN = "0198f3c2-5b6a-7000-8000-0123456789ab"
LEASE = f"""\
nodewrap-lease 2
run {RUN}
boot 11111111-2222-3333-4444-555555555555
time 1700000000000000
launcher setuid 4711 123456
pilot 1000 1001 99
mode switch batch
id 20001 20002
inside 20001 20002
block 20001 1
account atlusr01
lock 20001
cgroup /sys/fs/cgroup/x%20y/nodewrap-{RUN}
disk /scratch/nodewrap/{RUN}
work chown 2049 131 1600000000000000000
handle 1 0af34c
path /scratch/%0A
path %C3%A9/job1
file /tmp/x509up_u20001
fact subject.dn /DC=org/CN=Ann%20Example
fact rule.name %
ready
keeper 4712 123457
init 4713 123458
session 17
address 180816642
starting
""".encode()


def text(chars):
    return os.fsdecode(ffi.string(chars)) if chars != ffi.NULL else ""


def poisoned(kind):
    """Memory as a caller might have it: what the parser does not write shows."""
    made = ffi.new(kind)
    ffi.memmove(made, b"\xaa" * ffi.sizeof(made[0]), ffi.sizeof(made[0]))
    return made


def from_c(c):
    """struct nw_lease as the twin's Lease."""
    return lease.Lease(
        text(c.run), text(c.boot), c.time_us, lease.Launcher(text(c.launcher), c.front, c.front_ticks),
        lease.Pilot(c.pilot_uid, c.pilot_gid, c.pilot_pid), lease.Mode(lease.MODES[c.mode], text(c.profile)), lease.Ids(c.uid, c.gid),
        lease.Ids(c.inside_uid, c.inside_gid), lease.Block(c.first, c.size), text(c.account) if c.has_account else None,
        c.lock if c.has_lock else None, text(c.cgroup) if c.has_cgroup else None, text(c.disk) if c.has_disk else None,
        lease.Work(lease.HOWS[c.how], c.dev, c.ino, c.btime) if c.has_work else None,
        lease.Handle(c.handle_type, text(c.handle)) if c.has_handle else None, text(c.path), [text(c.file[i]) for i in range(c.files)],
        [(text(c.fact[i].key), text(c.fact[i].value)) for i in range(c.facts)],
        lease.Process(c.keeper, c.keeper_ticks) if c.has_keeper else None, lease.Process(c.init, c.init_ticks) if c.has_init else None,
        c.session if c.has_session else None, c.address if c.has_address else None, bool(c.starting),
    )


def c_parse(data):
    """The Lease, or the error's text."""
    found, error, buffer = poisoned("struct nw_lease *"), ffi.new("struct nw_err *"), ffi.new("char[]", data + b"\0")
    if lib.nw_lease_parse(buffer, len(data), found, error):
        assert (error.exit, text(error.code)) == (202, "NW-LEASE")
        return text(error.text)
    return from_c(found)


def python_parse(data):
    try:
        return lease.parse(data)
    except lease.LeaseError as wrong:
        return str(wrong)


def c_render(told):
    """What C writes of a Lease; None when it does not fit."""
    keep, c = [], ffi.new("struct nw_lease *")

    def chars(value):
        keep.append(ffi.new("char[]", os.fsencode(value)))
        return keep[-1]

    c.run, c.boot, c.time_us, c.profile, c.path = chars(told.run), chars(told.boot), told.time, chars(told.mode.profile), chars(told.path)
    c.launcher, c.front, c.front_ticks = chars(told.launcher.name), told.launcher.pid, told.launcher.ticks
    c.pilot_uid, c.pilot_gid, c.pilot_pid = told.pilot
    (c.uid, c.gid), (c.inside_uid, c.inside_gid), (c.first, c.size), c.mode = told.id, told.inside, told.block, lease.MODES.index(told.mode.name)
    if told.account is not None:
        c.has_account, c.account = True, chars(told.account)
    if told.lock is not None:
        c.has_lock, c.lock = True, told.lock
    if told.cgroup is not None:
        c.has_cgroup, c.cgroup = True, chars(told.cgroup)
    if told.disk is not None:
        c.has_disk, c.disk = True, chars(told.disk)
    if told.work:
        c.has_work, c.how, (c.dev, c.ino, c.btime) = True, lease.HOWS.index(told.work.how), told.work[1:]
    if told.handle:
        c.has_handle, c.handle_type, c.handle = True, told.handle.type, chars(told.handle.bytes)
    c.files, c.facts = len(told.files), len(told.facts)
    for i, name in enumerate(told.files):
        c.file[i] = chars(name)
    for i, (key, value) in enumerate(told.facts):
        c.fact[i].key, c.fact[i].value = chars(key), chars(value)
    to = ffi.new("char[]", lib.NW_LEASE_MAX)
    length = lib.nw_lease_write(c, to, lib.NW_LEASE_MAX)
    return bytes(ffi.buffer(to, length)) if length else None


WORDS = [
    b"0", b"1", b"-1", b"00", b"+1", b"4294967295", b"4294967296", b"2147483647", b"2147483648", b"18446744073709551615", b"18446744073709551616",
    b"%", b"%%", b"%2", b"%20", b"%2f", b"%2F", b"%00", b"%zz", b"%C3%A9", b"%FF", b"a%", b"a%2", b"!", b"~", b"x" * 899, b"switch", b"plain", b"3",
    b"nodewrap-lease", b"ready", b"ready\nready", b"starting", b"path /x", b"file %", b"file /a\nfile /b\nfile /c\nfile /d", b"fact a b",
    b"keeper 0 1", b"init 1 1", b"handle 1 00", b"session 1", b"address 1",
    b"lock 1", b"#", b"\t", b"\n", b"\0", b"\x7f", b"\xff", RUN.encode().upper(),
    RUN.encode()[:-1], b"path %", b"%0A", b"work idmap 1 2 3", b"cgroup /", b"account x", b"a " * 40,
]
edits = st.lists(st.tuples(st.sampled_from(["word", "append", "repeat", "move", "drop", "insert", "grow"]), st.integers(0, 10**6),
                           st.integers(0, 40), st.sampled_from(WORDS) | st.binary(max_size=12)), min_size=1, max_size=3)


def edited(base, changes):
    """The base with some lines or words exchanged: close enough to right that the deep ends of the parsers are reached."""
    lines = base.split(b"\n")
    for how, where, which, word in changes:
        at, other = where % len(lines), where // 7 % len(lines)
        words = lines[at].split(b" ")
        words[which % len(words)] = word
        new = {"word": [b" ".join(words)], "append": [lines[at] + b" " + word], "repeat": [lines[at], lines[other]], "move": [lines[other]],
               "drop": [], "insert": [word, lines[at]], "grow": [lines[at]] * 170}[how]
        lines[at:at + 1] = new
        lines = lines or [b""]
    return b"\n".join(lines)


@settings(max_examples=4000)
@given(edits.map(lambda changes: edited(LEASE, changes)) | st.binary(max_size=200).map(lambda tail: LEASE + tail))
@example(LEASE)
@example(b"")
@example(b"\n\n# nothing\n")
@example(b"nodewrap-lease 3\nwhatever it says\n")
@example(LEASE[:-1])
@example(LEASE.replace(b"path %", b"\npath %"))
@example(LEASE + b"\n" * 977)
@example(LEASE + b"\n" * 978)
@example(LEASE.replace(b"fact rule.name %\n", b"fact rule.name %\n" * 159))
@example(LEASE.replace(b"fact rule.name %\n", b"fact rule.name %\n" * 160))
@example(LEASE.replace(b"file /", b"file /y\nfile /y\nfile /y\nfile /"))
@example(LEASE.replace(b"file /", b"file /y\nfile /y\nfile /y\nfile /y\nfile /"))
@example(LEASE.replace(b"file /", b"path /y\nfile /"))
@example(LEASE.replace(b"path /scratch/%0A\n", b"path %\n"))
def test_both_parsers_make_the_same_of_a_lease_and_refuse_with_the_same_words(data):
    assert c_parse(data) == python_parse(data)


names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=70)
anything = st.binary(max_size=1200).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"0")))
short = st.binary(max_size=40).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"0")))
ids, big = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
pids = st.integers(1, 2**31 - 1)
told_leases = st.builds(
    lease.Lease, run=st.just(RUN), boot=st.just(RUN), time=big,
    launcher=st.builds(lease.Launcher, names, pids, big), pilot=st.builds(lease.Pilot, ids, ids, ids),
    mode=st.builds(lease.Mode, st.sampled_from(lease.MODES), names), id=st.builds(lease.Ids, ids, ids), inside=st.builds(lease.Ids, ids, ids),
    block=st.builds(lease.Block, ids, ids), account=st.none() | short, lock=st.none() | ids, cgroup=st.none() | short,
    disk=st.none() | short,
    work=st.none() | st.builds(lease.Work, st.sampled_from(lease.HOWS), big, big, big),
    handle=st.none() | st.builds(lease.Handle, ids, short), path=anything, files=st.lists(short, max_size=4),
    facts=st.lists(st.tuples(st.sampled_from(sorted(FACTS)), short), max_size=8),
)


@given(told_leases)
def test_both_write_the_same_lease_and_read_it_back_to_the_same(told):
    written = lease.render(told)
    assert c_render(told) == written
    assert lease.parse(written) == told
    assert c_parse(written) == told


@given(told_leases, anything)
def test_a_long_value_is_cut_by_both_at_the_same_byte(told, value):
    told.files, told.facts = [value], [("subject.dn", value)]
    written = lease.render(told)
    assert c_render(told) == written
    read = lease.parse(written)
    assert os.fsencode(value).startswith(os.fsencode(read.files[0]))
    assert max(map(len, written.split())) <= lease.MAX_WORD
