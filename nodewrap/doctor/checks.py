"""Everything `doctor` looks at, one row each: what it is called, why nodewrap cares, how it is tried, what to do when it is missing."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil

from nodewrap import _paths, apptainer, seccomp
from nodewrap.doctor import container, network, probe
from nodewrap.doctor.node import Node, distrust
from nodewrap.guard import NAMESPACES, Range

#: Landlock's versions with renaming between directories (Linux 5.19), TCP ports (6.7), scopes for abstract sockets and signals (6.12).
LANDLOCK_FILES, LANDLOCK_TCP, LANDLOCK_SCOPES = 2, 4, 6
STATE_SPACE, AUDIT_SPACE, TMP_SPACE = 1 << 20, 100 << 20, 1 << 30  # bytes
FILTER_SUFFIX = ".bpf"


class Finding(NamedTuple):
    """yes: True there, False missing, None could not be tried (not root). saw: one line. next: what to do about a missing one."""

    yes: bool | None
    saw: str
    next: str = ""


class Check(NamedTuple):
    """name: stable, for --json and the matrix. why: what nodewrap does with it. next: may be more precise in the finding."""

    name: str
    why: str
    look: Callable[[Node], Finding]
    next: str


def _tried(problem: str, saw: str = "works") -> Finding:
    return Finding(not problem, problem or saw)


def _needs_root(look: Callable[[Node], Finding]) -> Callable[[Node], Finding]:
    return lambda node: look(node) if node.root else Finding(None, "not tried: only root can", "run nodewrap doctor as root")


def _text(path: str) -> str:
    """A small file of /proc or /sys, "" when it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


# ---- kernel ----


def _root_namespace(kind: str) -> Callable[[Node], Finding]:
    return _needs_root(lambda node: _tried(probe.attempt(probe.try_namespace(kind, nested=False))))


def _caller_namespace(kind: str) -> Callable[[Node], Finding]:
    return lambda node: _tried(probe.attempt(probe.try_namespace(kind, nested=True), *_as_caller(node)))


def _caller_user(node: Node) -> Finding:
    problem = probe.attempt(probe.try_namespace("user", nested=True), *_as_caller(node))
    return Finding(not problem, problem or "works", _userns_next() if problem else "")


def _as_caller(node: Node) -> tuple[int, int]:
    return node.caller if node.root else (-1, -1)


def _userns_next() -> str:
    """Which of the switches that forbid unprivileged user namespaces is set here."""
    if _text("/proc/sys/user/max_user_namespaces") == "0":
        return "sysctl -w user.max_user_namespaces=15000, and keep it in /etc/sysctl.d"
    if _text("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "sysctl -w kernel.unprivileged_userns_clone=1, and keep it in /etc/sysctl.d"
    if _text("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return f"load an AppArmor profile with 'userns,' for {_paths.LIBEXEC}/nodewrap-userns (kernel.apparmor_restrict_unprivileged_userns is 1)"
    return "see user_namespaces(7): a chroot, a container's seccomp filter or an LSM forbids it here"


def _root_proc(node: Node) -> Finding:
    return _tried(probe.attempt(probe.try_proc(nested=False)))


def _caller_proc(node: Node) -> Finding:
    return _tried(probe.attempt(probe.try_proc(nested=True), *_as_caller(node)), "a fresh /proc can be mounted in a nested namespace")


def _idmap(node: Node) -> Finding:
    problem = probe.attempt(probe.try_idmap(node.workdir))
    return Finding(not problem, f"{node.workdir}: {problem or 'works'}")


def _landlock(what: str, needed: int) -> Callable[[Node], Finding]:
    def look(_: Node) -> Finding:
        abi = probe.landlock_abi()
        return Finding(abi >= needed, f"ABI {abi}, {what} needs {needed}" if abi else "this kernel has none")

    return look


def _seccomp(node: Node) -> Finding:
    """The filters in force, or on a node without policy the strictest shipped one, loaded for real."""
    programs = {name: _read(f"{node.current}/{name}") for name in _filters(node)}
    if not programs:
        programs = {"compiled just now": seccomp.payload_program({"nested_userns": False})}
    for name, program in programs.items():
        problem = probe.attempt(probe.try_filter(program))
        if problem:
            return Finding(False, f"{name}: {problem}")
    return Finding(True, f"{len(programs)} filters load")


def _filters(node: Node) -> list[str]:
    try:
        return sorted(name for name in os.listdir(node.current) if name.endswith(FILTER_SUFFIX))
    except OSError:
        return []


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _keyring(node: Node) -> Finding:
    problem = probe.attempt(probe.try_keyring, *_as_caller(node))
    if problem == os.strerror(errno.ENOSYS):  # nor has the payload, which shares our kernel and our filter
        return Finding(True, "there are no keys here: the kernel has none, or a filter around us closes them")
    return _tried(problem)


def _fuse(node: Node) -> Finding:
    return _tried(probe.attempt(lambda: os.close(os.open("/dev/fuse", os.O_RDWR)), *_as_caller(node)))


def _apptainer(node: Node) -> Finding:
    """Each runtime that a rule names: its version, and a container really made with it."""
    found = container.programs(node.policy)
    if not found:
        return Finding(None, "no rule has images", "add image = [PATH or pattern, …] to a [[rule]] if payloads shall run in containers")
    told = []
    for program in found:
        try:
            told.append(f"{program}: {container.version(program)}")
        except (OSError, subprocess.SubprocessError) as wrong:
            return Finding(False, f"{program}: {wrong.strerror or wrong if isinstance(wrong, OSError) else wrong}")
        problem = apptainer.userns() or container.problem(program, *_as_caller(node))
        if problem:
            return Finding(False, f"{told[-1]}: {problem}", "correct what Apptainer says; try as a caller: apptainer exec --contain DIR true")
    return Finding(True, ", ".join(told) + ", a container was made")


def _sif(node: Node) -> Finding:
    found, fuse = container.programs(node.policy), bool(_fuse(node).yes)
    if not found:
        return Finding(None, "no rule has images")
    told = {program: container.mounts_sif(program, fuse) for program in found}
    missing = [program for program, how in told.items() if not how]
    return Finding(not missing, "; ".join(f"{program}: {how or 'neither squashfuse with /dev/fuse nor unsquashfs'}" for program, how in told.items()))


def _terminal(node: Node) -> Finding:
    try:
        for fd in os.openpty():
            os.close(fd)
    except OSError as wrong:
        return Finding(False, f"no pty: {wrong.strerror}")
    return Finding(True, "a pty was made")


def _cgroup(node: Node) -> Finding:
    place = node.guard.cgroup if node.guard else ""
    if not place:
        return Finding(None, "the guard names no cgroup directory", f"put 'cgroup DIR' into {_paths.GUARD} (mount -t cgroup2 if nothing is mounted)")
    own = f"{place}{_own_cgroup()}"
    who = _as_caller(node) if node.guard and node.guard.launcher == "userns" else (-1, -1)
    problem = probe.attempt(probe.try_cgroup(own), *who)
    return Finding(not problem, f"{own}: {problem or 'writable; controllers: ' + (_text(own + '/cgroup.controllers') or 'none')}")


#: What limits of a run as a whole rest on (docs/limits.md).
CONTROLLERS = ("memory", "pids", "cpu")
#: NW_LIMIT_IO_*: what takes one more.
IO = frozenset((37, 39, 40, 41, 42))


def _limits(node: Node) -> Finding:
    """What a run gets that is started where doctor is: the pilot's place, when it is asked there."""
    place = node.guard.cgroup if node.guard else ""
    if not place:
        return Finding(None, "the guard names no cgroup directory", f"put 'cgroup DIR' into {_paths.GUARD} if the policy limits runs as a whole")
    wanted = CONTROLLERS + ("io",) * any(IO & set(rule["limits"]["run"]) for rule in (node.policy or {}).get("rules", ()))
    there = _text(f"{place}/cgroup.controllers").split()
    absent = [name for name in wanted if name not in there]
    if absent:
        saw = f"{place} has no {', '.join(absent)} ({' '.join(there) or 'no controllers'}): cgroup v1 has them, or the kernel lacks them"
        return Finding(False, saw, "boot with systemd.unified_cgroup_hierarchy=1")
    own = _own_cgroup()
    group, above = place + own.rstrip("/"), os.path.dirname(place + own)
    delegated = own != "/" and node.guard is not None and _owned_by_callers(above, node.guard.caller_uid)
    given = _text(f"{above}/cgroup.controllers" if delegated else f"{group}/cgroup.subtree_control").split()
    lacking = [name for name in wanted if name not in given]
    where = f"{above} is delegated to a caller" if delegated else f"{above} is not delegated to a caller, {group} hands down"
    return Finding(not lacking, f"{where}: {' '.join(given) or 'nothing'}")


def _owned_by_callers(group: str, callers: tuple[Range, ...]) -> bool:
    uid = os.stat(group).st_uid
    return any(first <= uid <= last for first, last in callers)


def _own_cgroup() -> str:
    lines = [line.split(":", 2)[2] for line in _text("/proc/self/cgroup").splitlines() if line.startswith("0::")]
    return lines[0] if lines else "/"


def _netd(node: Node) -> Finding:
    if not (node.guard and node.guard.network and node.guard.netd):
        wanted = any(profile.network for profile in node.profiles.values())
        return Finding(False if wanted else None, "the guard has no lines 'netd' and 'network'", "add them if payloads shall have private networks")
    if not node.root:
        return Finding(None, "not tried: only root can", "run nodewrap doctor as root")
    wrong, step = network.problem(node.guard)
    return Finding(not wrong, wrong or f"{node.guard.network}, {network.resolvers()}{network.forgets()}", step)


def _pasta(node: Node) -> Finding:
    wanted = node.guard and node.guard.launcher == "userns" and any(profile.network for profile in node.profiles.values())
    if not (node.guard and node.guard.network):
        return Finding(False if wanted else None, "the guard has no line 'network'", "add it if payloads shall have private networks")
    lacks = probe.attempt(network.lacks, *_as_caller(node))
    if lacks:
        return Finding(False, lacks.partition("; ")[0], lacks.partition("; ")[2])
    range_ = node.guard.network
    return _tried(probe.attempt(lambda: network.without_privilege(range_), *_as_caller(node)), f"{range_}, {network.resolvers()}")


def _newuidmap(node: Node) -> Finding:
    name, first, count = _delegated(node.caller[0])
    if not shutil.which("newuidmap"):
        return Finding(False, "there is no newuidmap", "install the package uidmap (Debian) or shadow-utils-subid (EL)")
    if not count:
        return Finding(False, f"/etc/subuid has no range for {name}", f"usermod --add-subuids FIRST-LAST --add-subgids FIRST-LAST {name}")
    return _tried(probe.attempt(probe.try_newuidmap(first, count), *_as_caller(node)), f"{name} has {count} ids from {first}")


def _delegated(uid: int) -> tuple[str, int, int]:
    """Name, first id and number of ids of the uid's first line in /etc/subuid (subuid(5)); 0, 0 when it has none."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    for line in _text("/etc/subuid").splitlines():
        parts = line.split(":")
        if len(parts) == 3 and parts[0] in (name, str(uid)) and parts[1].isdigit() and parts[2].isdigit():
            return name, int(parts[1]), int(parts[2])
    return name, 0, 0


# ---- the installation ----


def _guard(node: Node) -> Finding:
    if not node.guard:
        return Finding(False, node.guard_error, "run make install, or write the line that is missing (docs/guard.md)")
    problem = distrust(_paths.GUARD, node.caller[0] if node.guard.launcher == "userns" else 0)
    return Finding(not problem, problem or f"{_paths.GUARD}, launcher {node.guard.launcher}")


def _launcher(name: str) -> Callable[[Node], Finding]:
    def look(node: Node) -> Finding:
        path = f"{_paths.LIBEXEC}/nodewrap-{name}"
        if not os.path.exists(path):
            return Finding(False, f"{path} is not installed")
        problem = distrust(path, node.caller[0] if name == "userns" else 0) or (_setuid_problem(path) if name == "setuid" else "")
        return Finding(not problem, problem or path)

    return look


def _setuid_problem(path: str) -> str:
    info = os.stat(path)
    if info.st_uid != 0 or not info.st_mode & stat.S_ISUID:
        return f"{path} is not setuid root (mode {stat.S_IMODE(info.st_mode):o}); chown root:CALLERS and chmod 4750 it"
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return f"{path} lies on a file system mounted nosuid"
    if "NoNewPrivs:\t1" in _text("/proc/self/status"):
        return "no_new_privs is set for this process: from here, and inside containers, no setuid program gains anything"
    return f"{path} may be executed by everybody; chmod 4750 it" if info.st_mode & stat.S_IXOTH else ""


def _child(node: Node) -> Finding:
    if not node.guard:
        return Finding(False, "no guard")
    for path in (node.guard.python, node.guard.script):
        problem = distrust(path, node.caller[0] if node.guard.launcher == "userns" else 0)
        if problem:
            return Finding(False, problem)
    program = seccomp.program(seccomp.load_rules(), seccomp.fail(38))  # 38: ENOSYS, as compile_all
    ids = node.guard.child if node.root and node.guard.child else (-1, -1)
    start = probe.try_start([node.guard.python, "-I", "-S", "-B", "-c", "import pwd, socket"], program)
    return _tried(probe.attempt(start, *ids), f"{node.guard.python} starts in its jail")


def _policy(node: Node) -> Finding:
    return Finding(node.policy is not None, node.policy_error or f"{node.current}, {len((node.policy or {}).get('rules', ()))} rules")


def _accounts(node: Node) -> Finding:
    """Accounts are compiled into the policy; what changed on the node since would be used as it was."""
    for account in _targets(node):
        problem = _account_problem(account["name"], account["uid"], account["gid"])
        if problem:
            return Finding(False, problem)
    outside = [account["name"] for account in _targets(node) if not _within(node, account)]
    if outside:
        return Finding(False, f"{', '.join(outside[:5])}: outside switch-uid or switch-gid of the guard", f"widen them in {_paths.GUARD}")
    return Finding(True, f"{len(list(_targets(node)))} accounts")


def _targets(node: Node) -> Iterator[dict[str, Any]]:
    for rule in (node.policy or {}).get("rules", ()):
        for identity in rule["identities"]:
            yield from identity.get("accounts", ())


def _account_problem(name: str, uid: int, gid: int) -> str:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return f"account {name} is in the policy and not on the node"
    return "" if (entry.pw_uid, entry.pw_gid) == (uid, gid) else f"account {name} is {entry.pw_uid}:{entry.pw_gid} here and {uid}:{gid} in the policy"


def _within(node: Node, account: dict[str, Any]) -> bool:
    guard = node.guard
    if not guard:
        return False
    pairs = ((account["uid"], guard.switch_uid), (account["gid"], guard.switch_gid))
    return all(any(bounds.first <= value <= bounds.last for bounds in ranges) for value, ranges in pairs)


def _tracking(node: Node) -> Finding:
    """A group that somebody is in for another reason would be handed to payloads with all that it may read."""
    ranges = node.guard.tracking_gid if node.guard else ()
    if not ranges:
        return Finding(None, "no groups are named", "put 'tracking-gid FIRST-LAST' into the guard if the batch system finds processes by a group id")
    inside = [group for group in grp.getgrall() if any(first <= group.gr_gid <= last for first, last in ranges)]
    primary = {user.pw_gid for user in pwd.getpwall()}
    used = [group.gr_name for group in inside if group.gr_mem or group.gr_gid in primary]
    rights = f"{', '.join(used[:5])} with members: payloads of a member keep the group's rights"
    return Finding(not used, rights if used else " ".join(f"{first}-{last}" for first, last in ranges))


def _directory(pick: Callable[[Node], str], space: int) -> Callable[[Node], Finding]:
    """A directory of ours: there, trusted, writable for who writes it, and with so many bytes free."""

    def look(node: Node) -> Finding:
        if not node.guard:
            return Finding(False, "no guard")
        path, mine = pick(node), node.root or node.guard.launcher == "userns"
        problem = distrust(path, node.caller[0] if node.guard.launcher == "userns" else 0)
        if problem:
            return Finding(False, problem)
        if not os.access(path, os.W_OK):
            return Finding(False if mine else None, f"{path} is not writable for this user")
        free = psutil.disk_usage(path).free
        return Finding(free >= space, f"{path}: {free >> 20} MiB free" + ("" if free >= space else f", {space >> 20} wanted"))

    return look


def _syslog(node: Node) -> Finding:
    if not (node.guard and node.guard.syslog):
        return Finding(None, "not asked for", "put 'syslog yes' into the guard if records shall go there too")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.connect("/dev/log")
    except OSError as wrong:
        return Finding(False, f"/dev/log: {wrong.strerror}")
    return Finding(True, "/dev/log takes records")


def _callers(node: Node) -> Finding:
    """Members of the group that may execute the setuid launcher: the group that the file belongs to."""
    try:
        group = os.stat(f"{_paths.LIBEXEC}/nodewrap-setuid").st_gid
        entry = grp.getgrgid(group)
    except (FileNotFoundError, KeyError) as wrong:
        return Finding(None, f"no setuid launcher with a group: {wrong}")
    members = sorted({*entry.gr_mem, *(user.pw_name for user in pwd.getpwall() if user.pw_gid == group)})
    missing = "" if members else f"{entry.gr_name} has no member: nobody may start the setuid launcher"
    return Finding(bool(members), missing or f"{entry.gr_name}: {', '.join(members[:8])}", f"usermod --append --groups {entry.gr_name} PILOT")


def _state_directory(node: Node) -> str:
    return node.guard.state if node.guard else ""


def _tmp_directory(node: Node) -> str:
    return node.guard.tmp_dir if node.guard else ""


def _tmp(node: Node) -> Finding:
    if not _tmp_directory(node):
        return Finding(None, "the guard names no tmp-dir", f"put 'tmp-dir DIR' into {_paths.GUARD}, or use tmpfs in the profile")
    found = _directory(_tmp_directory, TMP_SPACE)(node)
    held = "project quotas hold scratch (mode map)" if _counts_projects(_tmp_directory(node)) else "no project quotas: the size is looked at"
    return found._replace(saw=f"{found.saw}; {held}") if found.yes else found


def _counts_projects(path: str) -> bool:
    """Is that place on a file system that is mounted with quotas for projects (ext4: prjquota; XFS: prjquota, pquota)?"""
    number = os.stat(path).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    lines = [line.split() for line in _text("/proc/self/mountinfo").splitlines()]
    return any(fields[2] == wanted and {"prjquota", "pquota"} & set(fields[-1].split(",")) for fields in lines)


def _audit_directory(node: Node) -> str:
    return os.path.dirname(node.guard.audit) if node.guard else ""


_ROOT_NEXT = "a container without CAP_SYS_ADMIN cannot: run on the node itself"
_PROC_NEXT = "run the pilot's container with an unmasked /proc (systempaths=unconfined), or unmount what lies over /proc"
_FILES_NEXT = "Linux 5.19 with landlock among the LSMs (lsm=landlock,…), or 'files?' in the profile, which goes on without"
_TCP_NEXT = "Linux 6.7 with landlock among the LSMs (lsm=landlock,…), or a network namespace (strict)"
_LANDLOCK_NEXT = "Linux 6.12 with landlock among the LSMs (lsm=landlock,…), or the strict profile"
_LIMITS_NEXT = "a pilot in a group of its own below one that is its account's (systemd: Delegate=yes, DelegateSubgroup=pilot; docs/limits.md)"
CHECKS = (
    Check("guard", "the bounds on every decision", _guard, "chown root and chmod go-w what the finding names"),
    Check("child", "the interpreter that evaluates policy, in its jail", _child, "name a root-owned python3 and script in the guard"),
    Check("policy", "who may run what", _policy, "run nodewrap policy apply"),
    Check("accounts", "switch uses accounts as they were when the policy was applied", _accounts, "run nodewrap policy apply again"),
    Check("tracking", "payloads keep the groups by which a batch system finds processes", _tracking, "name only the batch system's in tracking-gid"),
    Check("state", "leases: no durable lease, no run", _directory(_state_directory, STATE_SPACE), "free space, or correct 'state' in the guard"),
    Check("audit", "records: no durable record, no run", _directory(_audit_directory, AUDIT_SPACE), "free space, or correct 'audit' in the guard"),
    Check("tmp-dir", "private /tmp on disk, where a profile says disk", _tmp, "free space, or correct 'tmp-dir' in the guard"),
    Check("syslog", "a second place for records", _syslog, "start a syslog service, or write 'syslog no' into the guard"),
    Check("launcher.setuid", "privilege for switch and map", _launcher("setuid"), "make install as root"),
    Check("launcher.userns", "the launcher without privilege", _launcher("userns"), "make install"),
    Check("launcher.socket", "privilege without a setuid program", _launcher("socket"), "use the setuid or the userns launcher"),
    Check("callers", "only members of its group may start the setuid launcher", _callers, ""),
    *(Check(f"root.{kind}", "privileged launchers isolate with it", _root_namespace(kind), _ROOT_NEXT) for kind in NAMESPACES),
    Check("root.proc", "a fresh /proc of the payload's pid namespace", _needs_root(_root_proc), "unmount what lies over /proc"),
    Check("root.idmap", "the work directory becomes the payload's without chown", _needs_root(_idmap), "keep work on ext4 or xfs, Linux 5.12 on"),
    Check("caller.user", "everything the userns launcher does", _caller_user, ""),
    *(Check(f"caller.{kind}", "the userns launcher isolates with it", _caller_namespace(kind), "see user_namespaces(7)") for kind in NAMESPACES),
    Check("caller.proc", "a fresh /proc for the userns launcher and for containers inside payloads", _caller_proc, _PROC_NEXT),
    Check("newuidmap", "map with ids of its own for the userns launcher", _newuidmap, "newuidmap and newgidmap must be setuid root; see subuid(5)"),
    Check("seccomp", "the kernel-surface filters", _seccomp, "run nodewrap policy apply; the kernel needs CONFIG_SECCOMP_FILTER"),
    Check("landlock", "abstract sockets of the pilot out of reach", _landlock("scopes for sockets and signals", LANDLOCK_SCOPES), _LANDLOCK_NEXT),
    Check("landlock.files", "a second wall around files", _landlock("files", LANDLOCK_FILES), _FILES_NEXT),
    Check("landlock.tcp", "TCP ports by list", _landlock("TCP ports", LANDLOCK_TCP), _TCP_NEXT),
    Check("keyring", "a session keyring that is not the pilot's", _keyring, "CONFIG_KEYS, and no container's filter that forbids keyctl"),
    Check("cgroup", "killing everything at once, limits", _cgroup, "delegate a cgroup v2 subtree to who starts nodewrap (systemd: Delegate=yes)"),
    Check("limits", "memory, processes, CPU of a run as a whole, when it is started here", _limits, _LIMITS_NEXT),
    Check("netd", "private networks", _netd, network.NEXT),
    Check("pasta", "private networks of the userns launcher", _pasta, network.NEXT),
    Check("terminal", "a pilot with a terminal gives its payload another one", _terminal, "mount devpts on /dev/pts; see /proc/sys/kernel/pty/max"),
    Check("fuse", "containers inside payloads mount their images with it", _fuse, "modprobe fuse, and mode 0666 for /dev/fuse"),
    Check("apptainer", "payloads in containers", _apptainer, "install Apptainer, or correct apptainer.program in the policy"),
    Check("apptainer.sif", "images that are files", _sif, "install squashfuse, modprobe fuse, and mode 0666 for /dev/fuse; or squashfs-tools"),
)


# ---- drift: settings that weaken a node without breaking nodewrap ----


class Drift(NamedTuple):
    path: str
    good: tuple[str, ...]
    why: str


_SYS = "/proc/sys/"
DRIFTS = (
    Drift(_SYS + "dev/tty/legacy_tiocsti", ("0",), "any process may type into its terminal; the filter closes that for payloads only"),
    Drift(_SYS + "fs/protected_symlinks", ("1",), "links in world-writable directories lead privileged programs astray"),
    Drift(_SYS + "fs/protected_hardlinks", ("1",), "anybody may link to others' files in shared directories"),
    Drift(_SYS + "kernel/yama/ptrace_scope", ("1", "2", "3"), "log-only payloads of profile none may trace the pilot"),
    Drift(_SYS + "kernel/unprivileged_bpf_disabled", ("1", "2"), "bpf(2) is open to processes outside payloads"),
)


def drifts() -> list[tuple[str, Finding]]:
    """Settings of the node worth changing, by name; yes is None where this kernel has no such switch."""
    found = [(os.path.basename(drift.path), _drift(drift)) for drift in DRIFTS]
    return [*found, ("hidepid", _hidepid())]


def _drift(drift: Drift) -> Finding:
    value = _text(drift.path)
    if not value:
        return Finding(None, f"{drift.path}: this kernel has no such switch")
    if value in drift.good:
        return Finding(True, f"{drift.path} is {value}")
    name = drift.path[len(_SYS):].replace("/", ".")
    return Finding(False, f"{drift.path} is {value}: {drift.why}", f"sysctl -w {name}={drift.good[0]}, and keep it in /etc/sysctl.d")


def _hidepid() -> Finding:
    options = [line.split(" - ", 1)[1] for line in _text("/proc/self/mountinfo").splitlines() if line.split(" ")[4] == "/proc"]
    hidden = any("hidepid=" in text and "hidepid=0" not in text and "hidepid=off" not in text for text in options)
    return Finding(not hidden, "hidepid is set: pilots lose sight of their payloads' use, and nested containers their /proc" if hidden else "not set",
                   "remount /proc with hidepid=0" if hidden else "")
