"""What the compiled filters answer, call by call: the BPF is run by tests/bpf.py against rules written down here a second time."""

from __future__ import annotations

import errno
import random

import pyseccomp as sc
import pytest

from nodewrap import seccomp
from tests import bpf

ABIS = {"i386": 0x40000003, "arm": 0x40000028}
HIGH = 0xABCD_0000_0000_0000


def number(call):
    return seccomp._number(call)


@pytest.fixture(scope="module")
def strict():
    return seccomp.payload_program({"nested_userns": False})


@pytest.fixture(scope="module")
def batch():
    return seccomp.payload_program({"nested_userns": True})


def refusal(program, call, *args):
    """The errno that the program answers with, 0 when the call is allowed."""
    action = bpf.answer(program, number(call), args)
    if action == bpf.ALLOW:
        return 0
    assert action & 0xFFFF0000 == bpf.ERRNO, f"{call}{args}: {action:#x}"
    return action & 0xFFFF


def test_every_rule_has_a_reason_and_names_a_call_that_exists_somewhere():
    rules = [*seccomp.payload_rules(False), *seccomp.load_rules(), *seccomp.decide_rules(), *seccomp.policyd_rules()]
    assert [rule for rule in rules if not rule.why] == []
    assert {number(rule.call) for rule in rules}


def test_a_call_that_libseccomp_does_not_know_is_an_error_not_a_hole():
    with pytest.raises(OSError, match="does not know the system call 'no_such_call'"):
        seccomp.program([seccomp.Rule("no_such_call", seccomp.fail(1), (), "x")], sc.ALLOW)


@pytest.mark.parametrize("abi", sorted(ABIS))
def test_foreign_abis_end_the_process(strict, abi):
    assert bpf.answer(strict, 1, (), ABIS[abi]) == bpf.KILL_PROCESS


@pytest.mark.skipif(bpf.AUDIT_ARCH != 0xC000003E, reason="x32 exists on x86-64 only")
def test_x32_calls_are_answered_enosys_in_payloads_and_killed_in_the_policy_child(strict):
    assert bpf.answer(strict, 0x40000000 | 1) == bpf.ERRNO | errno.ENOSYS
    assert bpf.answer(seccomp.program(seccomp.load_rules(), seccomp.fail(errno.ENOSYS)), 0x40000000 | 1) == bpf.KILL_PROCESS


def test_calls_newer_than_the_last_reviewed_one_do_not_exist(strict, batch):
    for program in (strict, batch):
        assert bpf.answer(program, seccomp.LAST_REVIEWED) == bpf.ALLOW
        assert all(bpf.answer(program, newer) == bpf.ERRNO | errno.ENOSYS for newer in range(seccomp.LAST_REVIEWED + 1, 600))


def expected_socket(family, kind, protocol):
    if family not in (1, 2, 10, 16):
        return errno.EAFNOSUPPORT
    if family == 16:
        return errno.EPROTONOSUPPORT if protocol else 0
    bad = family in (2, 10) and ((kind & 0xF) in (4, 5, 6, 10) or protocol in (33, 115, 132, 136, 256))
    return errno.EPROTONOSUPPORT if bad else 0


def test_socket_families_and_protocols_are_exactly_those_of_the_floor(strict, batch):
    for family in range(60):
        for kind in (1, 2, 3, 4, 5, 6, 10, 1 | 0o2000000, 5 | 0o4000):
            for protocol in (0, 1, 6, 12, 17, 33, 58, 115, 132, 136, 255, 256, 262):
                for program in (strict, batch):
                    assert refusal(program, "socket", family, kind, protocol) == expected_socket(family, kind, protocol), (family, kind, protocol)


def test_high_bits_of_an_argument_open_no_socket_family(strict):
    for family in range(60):
        if expected_socket(family, 1, 0):
            assert refusal(strict, "socket", HIGH | family, 1, 0)
    assert refusal(strict, "socket", 16, 3, HIGH | 12)
    assert refusal(strict, "socket", 2, HIGH | 5, 0)
    assert refusal(strict, "socketpair", HIGH | 40, 1, 0)


def test_socketpair_is_unix_only(strict):
    assert [family for family in range(60) if not refusal(strict, "socketpair", family, 1, 0)] == [1]


@pytest.mark.parametrize("command", [seccomp.TIOCSTI, seccomp.TIOCLINUX, seccomp.TIOCSETD])
@pytest.mark.parametrize("high", [0, HIGH, 1 << 32])
def test_typing_into_terminals_is_refused_whatever_the_high_bits(batch, command, high):
    assert refusal(batch, "ioctl", 0, command | high) == errno.EPERM
    assert refusal(batch, "ioctl", 0, command + 1) == 0


def expected_personality(value):
    value &= 0xFFFFFFFF
    if value == 0xFFFFFFFF:
        return 0
    return errno.EPERM if value & (0x80000000 | 0x0100000 | 0x0200000 | 0x0400000) else 0


def test_personality_may_be_asked_and_set_harmlessly_but_undoes_no_mitigation(strict):
    dice = random.Random(1)
    values = [0, 8, 0x20000, 0x40000, 0x40008, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, *(1 << bit for bit in range(32))]
    values += [0xFFFFFFFF & ~(1 << bit) for bit in range(32)] + [dice.getrandbits(32) for _ in range(500)]
    for value in values:
        assert refusal(strict, "personality", value) == expected_personality(value), hex(value)
        assert refusal(strict, "personality", value | HIGH) == expected_personality(value), hex(value)


MODES = [0o644, 0o755, 0o1777, 0o4755, 0o2755, 0o6755, 0o4000, 0o2000]


OLD = [("chmod", 1), ("creat", 1)] if number("chmod") >= 0 else []  # aarch64 has no such calls


@pytest.mark.parametrize(("call", "arg"), [("fchmod", 1), ("fchmodat", 2), ("fchmodat2", 2), *OLD])
def test_set_id_bits_are_refused_wherever_a_mode_is_given(batch, call, arg):
    for mode in MODES:
        for high in (0, HIGH, 0xFFFF0000):
            assert refusal(batch, call, *[0] * arg, mode | high) == (errno.EPERM if mode & 0o6000 else 0)


def test_open_looks_at_its_mode_only_when_it_makes_a_file(batch):
    for mode in MODES:
        for flags in (0, 1, 0o2, seccomp.O_CREAT | 1, 0o200000, 0o20200002):
            making = bool(flags & (seccomp.O_CREAT | seccomp.O_TMPFILE_BIT))
            assert refusal(batch, "openat", 0, 0, flags, mode) == (errno.EPERM if making and mode & 0o6000 else 0), (oct(flags), oct(mode))


def test_device_nodes_are_refused_and_fifos_are_not(batch):
    for kind, allowed in ((0o010000, True), (0o100000, True), (0o140000, True), (0o020000, False), (0o060000, False), (0, True)):
        assert refusal(batch, "mknodat", 0, 0, kind | 0o600) == (0 if allowed else errno.EPERM)
        assert refusal(batch, "mknodat", 0, 0, kind | 0o4600) == errno.EPERM


def test_strict_makes_no_namespace_by_clone_or_unshare_and_batch_does(strict, batch):
    for flag in seccomp.NAMESPACE_FLAGS:
        for call in ("clone", "unshare"):
            assert refusal(strict, call, flag | 17) == errno.EPERM
            assert refusal(strict, call, HIGH | flag) == errno.EPERM
            assert refusal(batch, call, flag | 17) == 0
    assert refusal(strict, "unshare", seccomp.CLONE_NEWTIME) == errno.EPERM
    assert refusal(strict, "clone", 0x3D0F00) == 0  # a thread, as the C library makes it
    assert refusal(strict, "clone", 17) == 0
    for program in (strict, batch):
        assert refusal(program, "clone3") == errno.ENOSYS


def test_containers_inside_batch_keep_their_system_calls(strict, batch):
    for call in ("mount", "umount2", "pivot_root", "chroot", "setns", "fsopen", "fsmount", "move_mount", "open_tree", "mount_setattr"):
        assert refusal(batch, call) == 0
        assert refusal(strict, call) == errno.EPERM


@pytest.mark.parametrize("call", ["read", "execve", "futex", "seccomp", "prctl", "ptrace", "process_vm_readv", "landlock_restrict_self"])
def test_what_payloads_need_stays_open(strict, call):
    assert refusal(strict, call) == 0


def test_the_policy_child_opens_files_only_for_reading():
    load = seccomp.program(seccomp.load_rules(), seccomp.fail(errno.ENOSYS))
    for flags in (0, 0o2000000, 0o200000, 0o400000):
        assert refusal(load, "openat", 0, 0, flags) == 0
    for flags in (1, 2, 3, 0o100, 0o1000, 0o20200000, 0o102):
        assert refusal(load, "openat", 0, 0, flags) == errno.ENOSYS


def test_the_second_filter_maps_nothing_executable_and_kills_what_it_does_not_know():
    decide = seccomp.program(seccomp.decide_rules(), sc.KILL_PROCESS)
    for call in ("mmap", "mprotect"):
        assert bpf.answer(decide, number(call), (0, 4096, 3)) == bpf.ALLOW
        assert bpf.answer(decide, number(call), (0, 4096, 5)) == bpf.KILL_PROCESS
        assert bpf.answer(decide, number(call), (0, 4096, HIGH | 4)) == bpf.KILL_PROCESS
    for call in ("execve", "clone", "socket", "connect", "bind", "kill", "ptrace", "seccomp", "dup", "unlinkat", "mkdirat", "bpf"):
        assert bpf.answer(decide, number(call)) == bpf.KILL_PROCESS, call


def test_packet_filter_tables_are_closed_and_other_socket_options_are_not(batch):
    for level, option in ((0, 64), (0, 96), (0, 128), (41, 64)):
        assert refusal(batch, "setsockopt", 3, level, option) == errno.EPERM
        assert refusal(batch, "setsockopt", 3, HIGH | level, HIGH | option) == errno.EPERM
    for level, option in ((1, 64), (6, 64), (0, 63), (41, 66), (41, 96), (0, 0)):
        assert refusal(batch, "setsockopt", 3, level, option) == 0


def test_what_the_second_filter_allows_the_first_allows_too():
    first = {rule.call for rule in seccomp.load_rules()}
    assert {rule.call for rule in seccomp.decide_rules() if rule.action == sc.ALLOW} <= first


def test_filters_compile_for_aarch64_with_the_same_meaning():
    known = [rule for rule in seccomp.payload_rules(False) if sc.resolve_syscall(sc.Arch.NATIVE, rule.call) != -1]
    program = seccomp.program(known, sc.ALLOW, seccomp.LAST_REVIEWED, sc.Arch.AARCH64)
    socket, unshare, ioctl = 198, 97, 29  # include/uapi/asm-generic/unistd.h
    ask = {"arch": 0xC00000B7}
    assert bpf.answer(program, socket, (40, 1, 0), **ask) == bpf.ERRNO | errno.EAFNOSUPPORT
    assert bpf.answer(program, socket, (2, 1, 0), **ask) == bpf.ALLOW
    assert bpf.answer(program, unshare, (seccomp.CLONE_NEWUSER,), **ask) == bpf.ERRNO | errno.EPERM
    assert bpf.answer(program, ioctl, (0, seccomp.TIOCSTI), **ask) == bpf.ERRNO | errno.EPERM
    assert bpf.answer(program, 1, (), 0xC000003E) == bpf.KILL_PROCESS


def met_by(rule):
    """Arguments for which every condition of the rule holds, and nothing more is asked."""
    args = [0] * 6
    for test in rule.where:
        args[test.arg] |= {sc.EQ: test.a, sc.MASKED_EQ: test.b, sc.NE: test.a + 1, sc.GT: test.a + 1}[test.op]
    return args


@pytest.mark.parametrize(("name", "audit"), [("X86_64", 0xC000003E), ("AARCH64", 0xC00000B7)])
@pytest.mark.parametrize("nested", [False, True])
def test_every_rule_answers_as_it_says_on_both_architectures(name, audit, nested):
    arch = getattr(sc.Arch, name)
    rules = [rule for rule in seccomp.payload_rules(nested, tcp=True) if sc.resolve_syscall(sc.Arch.NATIVE, rule.call) != -1]
    program = seccomp.program(rules, sc.ALLOW, seccomp.LAST_REVIEWED, sc.Arch.NATIVE if audit == bpf.AUDIT_ARCH else arch)
    numbers = {rule.call: sc.resolve_syscall(arch, rule.call) for rule in rules}
    tried = [rule for rule in rules if numbers[rule.call] >= 0]
    assert [(rule.call, rule.why) for rule in tried if bpf.answer(program, numbers[rule.call], met_by(rule), audit) != rule.action & 0xFFFFFFFF] == []
    # The others have no number on that machine: there the calls do not exist under these names (open, chmod, mknod on aarch64).
    assert {"fchmodat", "openat", "mknodat", "ioctl", "personality", "socket", "clone3", "setsockopt"} <= {rule.call for rule in tried}
    assert ({"clone", "unshare", "mount"} <= {rule.call for rule in tried}) != nested
    assert {bpf.answer(program, numbers[call], (0,) * 6, audit) for call in ("openat", "ioctl", "socketpair", "fchmod")} >= {bpf.ALLOW}


def test_ways_past_rules_for_tcp_are_closed_only_where_there_are_such_rules():
    plain, limited = (seccomp.payload_program({"nested_userns": True, "landlock": walls}) for walls in (["abstract"], ["abstract", "tcp?"]))
    for call, at in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        asked = [0] * at + [seccomp.MSG_FASTOPEN | 0x40]
        assert (refusal(plain, call, *asked), refusal(limited, call, *asked)) == (0, errno.EOPNOTSUPP)
        assert refusal(limited, call, *[0] * at, 0x40) == 0
    for family in (2, 10):
        assert (refusal(plain, "socket", family, 1, 262), refusal(limited, "socket", family, 1, HIGH | 262)) == (0, errno.EPROTONOSUPPORT)


def test_compile_all_writes_one_filter_a_profile_and_those_of_the_policy_child(tmp_path):
    tables = {"strict": {"seccomp": True, "nested_userns": False}, "none": {"seccomp": False, "nested_userns": True}}
    names = seccomp.compile_all(tables, str(tmp_path))
    assert names == ["child-decide.bpf", "child-load.bpf", "policyd.bpf", "seccomp.strict.bpf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        assert path.stat().st_size % 8 == 0
        assert path.stat().st_size // 8 <= 4096  # BPF_MAXINSNS
