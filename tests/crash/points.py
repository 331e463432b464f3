"""Points: a place (which process), a number (which of its system calls) and what happens there; and the list of all that a run has."""

from __future__ import annotations

import errno
import functools
import re
import subprocess
from dataclasses import dataclass, field

PAYLOADS = {"nw-crash", "true"}
WAITS = {"poll", "wait4", "read", "recvfrom"}


@functools.cache
def syscall_names():
    """{number: name} of this machine, as the kernel's own header has them."""
    header = subprocess.run(["cc", "-dM", "-E", "-include", "sys/syscall.h", "-xc", "/dev/null"], check=True, capture_output=True, text=True).stdout
    return {int(number): name for name, number in re.findall(r"#define __NR_(\w+) (\d+)\n", header)}


@dataclass(frozen=True)
class Point:
    """what: a letter of nth.c's options; K: as k, and the payload does not end by itself, as it does not with w. n: from 1. arg: milliseconds of
    holding, or the errno."""

    what: str
    place: str
    n: int
    arg: int = 0

    def __str__(self):
        tail = f":{errno.errorcode[self.arg]}" if self.what == "f" else f":{self.arg}" if self.arg else ""
        return f"{self.what}:{self.place}:{self.n}{tail}"

    def option(self):
        """The words for nth."""
        return [f"-{self.what.replace('K', 'k')}", f"{self.place}:{self.n}:{self.arg}"]


def parse(text):
    """What ``str`` of points, joined by "+", was made of."""
    found = []
    for part in text.split("+"):
        what, place, n, *rest = part.split(":")
        arg = 0 if not rest else getattr(errno, rest[0]) if what == "f" else int(rest[0])
        found.append(Point(what, place, int(n), arg))
    return tuple(found)


def text_of(points):
    return "+".join(map(str, points))


@dataclass
class Process:
    """One process of a run. place, parent: places. calls: [(order among all calls of the run, name, what it is about)], execs: names executed after
    so many calls. role: what it is in a run of nodewrap."""

    place: str
    calls: list = field(default_factory=list)
    execs: list = field(default_factory=list)
    role: str = "?"

    @property
    def parent(self):
        return self.place.rpartition(".")[0]


class Listing:
    """All processes of one undisturbed run, by place."""

    def __init__(self, lines):
        names, self.processes, order = syscall_names(), {}, 0
        for kind, *words in lines:
            if kind == "call":
                order += 1
                self.process(words[0]).calls.append((order, names[int(words[2])], words[3] if len(words) > 3 else ""))
            elif kind == "exec":
                self.process(words[0]).execs.append((int(words[1]), words[2]))
            elif kind == "born":
                self.process(words[0])
        self.total = order
        for process in self.processes.values():
            process.role = self._role(process)

    def process(self, place):
        return self.processes.setdefault(place, Process(place))

    def _role(self, process):
        """Told by what it does; a helper's helpers are what their parent is."""
        names = {name for _, name, _ in process.calls}
        programs = [name for _, name in process.execs]
        if process.place == "0":
            return "front"
        if any(name.startswith("python") for name in programs):
            return "policy"
        if PAYLOADS & set(programs):
            return "payload"
        if programs:
            return programs[-1]
        if any(child.parent == process.place and PAYLOADS & {name for _, name in child.execs} for child in self.processes.values()):
            return "init"
        if "clone3" in names:
            return "keeper"
        if "fdatasync" in names or any("audit.jsonl" in about for _, _, about in process.calls):
            return "recorder"
        if "getdents64" in names:
            return "walker"
        if "kill" in names or (process.parent and self.process(process.parent).role == "sweeper"):
            return "sweeper"
        return "idmap" if "pause" in names else "status" if "write" in names else "helper"

    def _limit(self, process):
        """How many calls are ours: up to the exec of a program that is none of nodewrap's."""
        foreign = process.role not in ("front", "payload") and process.execs
        return process.execs[0][0] if foreign else len(process.calls)

    def phase(self, name):
        """(first, last) order of calls. start: up to the lease. lease: from the first look at the locks to the payload's exec. kill: from its end,
        which init is the first to hear of."""
        of = [(order, call, about) for process in self.processes.values() for order, call, about in process.calls]
        lease = min(order for order, call, about in of if call == "openat" and about == "leases")
        payload = next(process for process in self.processes.values() if process.role == "payload")
        exec_ = max(order for order, call, _ in payload.calls if call == "execve")
        init = next(process for process in self.processes.values() if process.role == "init")
        kill = min((order for order, _, _ in init.calls if order > exec_), default=self.total)
        return {"start": (1, lease - 1), "lease": (lease, exec_), "run": (exec_ + 1, kill - 1), "kill": (kill, self.total)}[name]

    def calls(self, phases=(), foreign=6):
        """(process, n, name) of the calls of these phases (default: all). Of the policy child, once it is Python, and of newuidmap, that many evenly
        spread: each is one point."""
        spans = [self.phase(name) for name in phases] or [(1, self.total)]
        for process in self.processes.values():
            limit = self._limit(process)
            step = max(1, (len(process.calls) - limit) // foreign) if foreign else 0
            for n, (order, name, _) in enumerate(process.calls, 1):
                if any(first <= order <= last for first, last in spans) and (n <= limit or (step and n % step == 0)):
                    yield process, n, name

    def kills(self, **which):
        """Points at which to kill: before each call, and all processes at once before each. Not where the call before has changed nothing that is
        there after a death: who dies then leaves what it would have left one call earlier."""
        apart = [(process.place, n) for process, n, _ in self.calls(**which) if n == 1 or process.calls[n - 2][1] not in PRIVATE]
        return [Point(what, place, n) for place, n in apart for what in "kA"]

    def kills_after(self, **which):
        """After each call, held for a while so that the other processes run as far as they can without this one. Not after those of PRIVATE."""
        return [Point("a", process.place, n, 20) for process, n, name in self.calls(**which) if name not in PRIVATE]

    def deaths(self):
        """[points] to be tried together. While the payload runs and would run on: the death of each process that must end it, and of the front and
        the keeper together. Before each call from the payload's exec on up to that in which it waits for the end, held until the payload has done
        what it does first; and in that wait."""
        found, waiting = [], {}
        first, last = self.phase("run")
        for process in self.processes.values():
            if process.role not in ("front", "keeper", "init"):
                continue
            during = [(n, name) for n, (order, name, _) in enumerate(process.calls, 1) if first <= order <= last]
            until = next((i for i, (_, name) in enumerate(during) if name in WAITS), len(during))
            found += [(Point("K", process.place, n, 50),) for n, _ in during[:until]]
            waiting[process.role] = Point("w", process.place, 0, 300)
            found.append((waiting[process.role],))
        if {"front", "keeper"} <= waiting.keys():
            found.append((waiting["front"], waiting["keeper"]))
        return found

    def faults(self, **which):
        """Each call with each errno that applies to it; not in Python and newuidmap, whose errors are not ours, nor before main(), where they are
        libc's: our first call is umask(2)."""
        found, first = [], next(n for n, (_, name, _) in enumerate(self.processes["0"].calls, 1) if name == "umask")
        for process, n, name in self.calls(**which, foreign=0):
            if process.place == "0" and n < first:
                continue
            found += [Point("f", process.place, n, number) for number in ERRNOS.get(name, ())]
            if name in SHORT:
                found.append(Point("s", process.place, n))
        return found


def _table(text):
    """{name: (errno, ...)} of lines "errnos: names"."""
    table = {}
    for line in text.strip().splitlines():
        errnos, _, names = line.partition(":")
        for name in names.split():
            table[name] = table.get(name, ()) + tuple(getattr(errno, word) for word in errnos.split())
    return table


#: What can happen to a call on a machine that is short of something, old, interrupted, or forbids it (section 2 of the manual).
#: Left out are calls that cannot fail (getpid, umask, the read-only get*id), and those of libc's start (brk, arch_prctl, set_*, rseq, mprotect:
#: what happens before main() is libc's).
ERRNOS = _table("""
EMFILE ENOMEM EIO: openat openat2 open open_tree fsopen fsmount memfd_create
EINTR ENOSPC: openat
EACCES: openat2
EMFILE ENFILE ENOMEM: socket socketpair pipe2 signalfd4 dup dup2 pidfd_open landlock_create_ruleset
EMFILE: fcntl
EAGAIN ENOMEM: clone clone3 fork vfork
ENOMEM: mmap poll keyctl seccomp landlock_restrict_self mount_setattr fsconfig move_mount mount umount2 pivot_root setsockopt
EPERM: mount_setattr fsconfig move_mount mount umount2 pivot_root open_tree fsopen fsmount keyctl seccomp landlock_restrict_self setsid capset
EPERM: prctl prlimit64 setresuid setresgid setgroups setuid chown fchownat fchmod chmod kill pidfd_send_signal setns unshare
EPERM: mknodat mkdirat mkdir symlinkat unlink unlinkat clone clone3 rmdir
EAGAIN: setresuid
EINTR: poll wait4 flock fcntl read write recvfrom recvmsg sendto sendmsg close
EINVAL: clone3 openat2 mount_setattr open_tree pidfd_open pidfd_send_signal landlock_create_ruleset close_range
ENOSYS: clone3 openat2 mount_setattr open_tree pidfd_open landlock_create_ruleset close_range
EIO: read pread64 write pwrite64 fsync fdatasync ftruncate truncate getdents64 newfstatat readlinkat readlink lseek unlink unlinkat mkdir mkdirat
EIO: rmdir chmod fchownat getxattr close mknodat symlinkat flock statfs fstatfs access chdir fchdir
ENOSPC: write pwrite64 fsync fdatasync mkdir mkdirat mknodat symlinkat
ENOMEM: read newfstatat getdents64 execve chdir
EIO EMFILE EACCES: execve
EAGAIN: read recvfrom recvmsg sendto sendmsg fcntl
ENOLCK: flock fcntl
EBUSY: rmdir
ENOENT: chdir rmdir unlink
ESRCH: kill pidfd_send_signal pidfd_open
""")
SHORT = ("write", "pwrite64")
#: Calls that change nothing but the process that makes them, or nothing at all: its memory, its own settings, what it knows.
_PRIVATE = """
access arch_prctl brk capget capset fstat fstatfs futex getcwd getdents64 getegid geteuid getgid getgroups getpid getppid getrandom getresgid
getresuid getsockname getsockopt gettid getuid getxattr lgetxattr listxattr llistxattr lseek lstat madvise mmap mprotect munmap name_to_handle_at
newfstatat pread64 prctl prlimit64 readlink readlinkat rseq rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity set_robust_list
set_tid_address sigaltstack stat statfs statx sysinfo umask uname
"""
PRIVATE = frozenset(_PRIVATE.split())
