"""``python -m tests.crash.soak [--seconds 600] [--runs 64] [--seed S]``: many runs at once, in all modes and under both launchers, while everything
is killed at random, sweeps go on beside them and the disks fill up and are freed; then all is let end, swept once, and judged from outside (judge.py,
evidence.py). Root. A line every 10 s; exit status 1 when an invariant was violated.

The plan of a run (launcher, kind, profile, payload, who is killed and when) follows from seed and number alone; what meets what is up to the kernel.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import itertools
import os
import random
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from tests.crash.cases import Case, drained
from tests.crash.evidence import Attempt, Log, Seen, Verdicts, swept
from tests.crash.judge import PAYLOADS_CODE, Judge
from tests.node import BLOCK, POLICY, PROFILES, RULE, SUBJECT, Node
from tests.site import Account, Session, account_command, command

HERE = Path(__file__).parent
PAYLOAD = "nw-soak"
CGROUPS = Path("/sys/fs/cgroup/unified" if Path("/sys/fs/cgroup/unified/cgroup.procs").exists() else "/sys/fs/cgroup")
HANG_S = 120
SETTLE_S = 20
HELPER_S = 12  # csrc/cleanup.c, PATIENCE_MS
MIB = 1 << 20
VAR_MIB, WORK_MIB = 320, 384
#: Places of a soak's ids: others than those of tests.site and tests.node.
FIRST_ACCOUNT = 80000 + os.getpid() % 100 * 100
FIRST_BLOCK, BLOCKS = 1200000000 + os.getpid() % 100 * 32 * BLOCK, 32
FIRST_DELEGATED, DELEGATED_BLOCKS = 1900000000 + os.getpid() % 100 * 8 * BLOCK, 8

KINDS = {
    ("setuid", "static"): 4, ("setuid", "pool"): 28, ("setuid", "map"): 18, ("setuid", "block"): 14, ("setuid", "log-only"): 14,
    ("userns", "block"): 8, ("userns", "log-only"): 14,
}
PAYLOADS = {"": 4, "d": 4, "f": 3, "w": 4, "i": 3, "l": 4, "dls": 3, "flw": 3, "dfilsw": 2}
#: (weight, shortest, longest) in ms.
LENGTHS = ((35, 0, 50), (40, 200, 2000), (25, 3000, 9000))
ROLES = {"": 33, "front": 10, "keeper": 9, "init": 6, "payload": 5, "child": 6, "sweeper": 6, "group": 7, "cgroup": 8, "pair": 6, "any": 9}
#: These have the front among them; without a keeper the front stands in for it.
FRONTS = ("front", "group", "cgroup", "pair")


def choose(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


class Plan:
    """What run n of that seed is: launcher, kind, profile, what (letters of soak.c), ms, kill (a role, "" for nobody), after (s)."""

    def __init__(self, seed, n, pace, profiles=PROFILES):
        rng = random.Random(f"{seed}:{n}")
        self.n, self.nonce = n, secrets.token_hex(8)
        self.launcher, self.kind = choose(rng, KINDS)
        self.profile = rng.choice([profile for profile in profiles if profile != "compat"])
        self.what = choose(rng, PAYLOADS)
        _, shortest, longest = rng.choices(LENGTHS, [length[0] for length in LENGTHS])[0]
        self.ms = int(rng.uniform(shortest, longest) * pace)
        self.kill = choose(rng, ROLES)
        if self.launcher == "userns" and self.kill in ("keeper", "pair"):
            self.kill = "front"
        # Before the exec as often as during the payload: a start takes some tenths of a second, and more the more there are.
        self.after = rng.uniform(0, self.ms / 1000) if rng.random() < 0.4 else 10 ** rng.uniform(-3, 0.3)

    def __str__(self):
        killed = f", {self.kill} killed after {self.after:.3f} s" if self.kill else ""
        return f"--only {self.n}: {self.launcher}/{self.kind}/{self.profile} {self.what or '-'} {self.ms} ms{killed}"


# ---- processes, seen from outside ----


def children(pid):
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid):
    """Below pid, parents before children."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def trees(pids):
    """They and all below them."""
    return [pid for top in pids for pid in (top, *descendants(top))]


def signal_all(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def runs(pid):
    """Neither stopped nor dead yet (proc(5), state)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TtZX"
    return False


def of_group(pid, group):
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid) == group
    return False


@contextlib.contextmanager
def ending(pids):
    """Within, they are killed; at the end they are dead."""
    with contextlib.ExitStack() as stack:
        fds = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
                stack.callback(os.close, fds[-1])
        yield
        end = time.monotonic() + HANG_S
        for fd in fds:
            select.select([fd], [], [], max(0, end - time.monotonic()))


def comm(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def exe(pid):
    with contextlib.suppress(OSError):  # a kernel thread, or just ended
        return os.readlink(f"/proc/{pid}/exe")
    return ""


def leases_of(pid):
    """Runs whose leases that process has open: its own, or those that it sweeps."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.path.basename(os.readlink(fd.path))
                found |= {name.split(".")[0]} if ".lease" in name else set()
    return found


def removed(group):
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def sweeps(pid):
    """Is it one that a launcher made to sweep? It leads a session, as the keeper does, whose parent is the front."""
    with contextlib.suppress(OSError):
        _, parent, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
        keeper = comm(pid) == "nodewrap-keeper" and comm(int(parent)).startswith("nw-")
        return int(session) == pid and not keeper and bool(leases_of(pid))
    return False


def may_sweep(pid):
    """A launcher's process that is not a payload's: whoever is to sweep has been forked by it, and looks like it."""
    return comm(pid).startswith(("nw-", "nodewrap")) and not (is_role(pid, "payload") or is_role(pid, "init"))


def is_role(pid, role):
    name = comm(pid)
    if role == "sweeper":
        return sweeps(pid)
    return {"keeper": name == "nodewrap-keeper", "init": name == "nodewrap-init", "payload": name == PAYLOAD,
            "child": "python" in exe(pid), "any": True}[role]


# ---- the place where it all happens ----


class SoakNode(Node):
    """One of the two sites. pool: how many accounts."""

    def __init__(self, site, pool):
        self.pool = pool
        super().__init__(site)
        self.kinds = [kind for launcher, kind in KINDS if launcher == site.launcher]

    def open_guard(self, **more):
        accounts = sorted(self.uids())
        blocks = f"{FIRST_BLOCK}-{FIRST_BLOCK + BLOCKS * BLOCK - 1}"
        allow = [f"{mode} {' '.join(PROFILES)}" for mode in (("switch",) if self.privileged else ()) + ("map", "log-only")]
        ids = {"switch_uid": spans(accounts), "switch_gid": spans(accounts), "map_uid": blocks} if self.privileged else {}
        self.site.guard(**{"allow": allow, "deadline-ms": "60000", "max-wall-s": "120", "syslog": "no", **ids, **more})

    def policy_text(self, kinds=None, assurance="declared"):
        accounts = self.site.accounts
        identity = {
            "static": f'{{ mode = "switch", account = "{accounts["static"].name}", lease = "exclusive" }}',
            "pool": '{ mode = "switch", pool = "many", lease = "exclusive" }',
            "map": '{ mode = "map" }', "block": f'{{ mode = "map", inside_uid = 1000, inside_gid = 1000, size = {BLOCK} }}',
            "log-only": '{ mode = "log-only" }',
        }
        mine = [kind for launcher, kind in KINDS if launcher == self.site.launcher]
        names = ", ".join(f'"{accounts[role].name}"' for role in self.pool)
        pool = f"\n[pool.many]\naccounts = [{names}]\n" if self.privileged else ""
        rules = "".join(RULE.format(kind=kind, identity=identity[kind]) for kind in mine)
        return POLICY.format(pilot=accounts["pilot"].name, rules=pool + rules, assurance=assurance)

    def uids(self):
        return {self.site.accounts[role].uid for role in ("static", *self.pool)} if self.privileged else set()


def spans(numbers):
    """Sorted numbers as the ranges of a guard line."""
    found = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    assert len(found) <= 16, "more ranges than a line may have: other accounts lie between"
    return " ".join(f"{first}-{last}" for first, last in found)


class Disk:
    """A tmpfs of a size, filled to the last byte and freed."""

    def __init__(self, path, mib):
        self.path, self.file, kept = path, path / ".filler", path.with_name(path.name + ".kept")
        path.rename(kept) if path.exists() else kept.mkdir()
        path.mkdir()
        command("mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=755", "soak", path)
        command("cp", "-a", f"{kept}/.", path)
        shutil.rmtree(kept)

    def fill(self):
        """What is free now."""
        with contextlib.suppress(OSError), open(self.file, "ab") as file:
            space = os.statvfs(self.path)
            free = space.f_bavail * space.f_frsize
            if free > MIB:
                os.posix_fallocate(file.fileno(), file.tell(), free - MIB)
                file.seek(0, os.SEEK_END)
            while True:
                os.write(file.fileno(), bytes(4096))

    def free(self):
        self.file.unlink(missing_ok=True)


class Place:
    """A site with its judge; as judge.py wants a case: site, session, work, nonce, pilot, processes, owns, victim, in_tmp."""

    victim, in_tmp = "run", Case.in_tmp

    def __init__(self, soak, launcher, pool):
        self.session, self.site = soak.session, soak.session.site(launcher)
        self.disk = Disk(self.site.prefix / "var", VAR_MIB)
        self.node = SoakNode(self.site, pool)
        self.scratch = self.site.prefix / "crash-scratch"  # of the crash matrix; ours has none
        self.pilot, self.processes, self.owns = self.site.pilot, soak.processes, soak.owns
        self.program = self.site.prefix / f"libexec/nodewrap/nodewrap-{launcher}"
        self.sweeper = self.site.prefix / "libexec/nodewrap/nodewrap-sweep"
        self.judge, self.lock = Judge(self), threading.Lock()
        self.work, self.nonce = None, ""

    def work_problems(self, work, nonce):
        with self.lock:
            self.work, self.nonce = work, nonce
            return self.judge.work()

    def over_problems(self, status, err, killed):
        with self.lock:
            self.judge.over(SimpleNamespace(hangs=[], status=status, err=err, out=b""), killed)
            return self.judge.verdict()


class Soak:
    """A session of its own with both sites, and everything that goes on in it. Call ``close``."""

    def __init__(self, runs, seed, pace=1.0, say=print):
        self.slots, self.seed, self.pace, self.say, self.rng = runs, seed, pace, say, random.Random(f"{seed}:beside")
        self.session = Session(roles=())
        self.stop, self.numbers, self.lock = threading.Event(), itertools.count(), threading.Lock()
        self.counts, self.kills, self.refusals = collections.Counter(), collections.Counter(), collections.Counter()
        self.violations, self.pending, self.active = [], [], {}
        self.seen = Seen({}, set(), collections.defaultdict(list), [])
        self.full_since = {}
        self.cgroups = None
        self._make()

    # ---- before and after ----

    def _make(self):
        session, pool = self.session, [f"p{i:02}" for i in range(max(3, self.slots // 3))]
        session.next_id = FIRST_ACCOUNT
        for role in ("static", *pool):
            session.add_account(role)
        span = f"{FIRST_DELEGATED}-{FIRST_DELEGATED + DELEGATED_BLOCKS * BLOCK - 1}"
        account_command("usermod", "--add-subuids", span, "--add-subgids", span, session.accounts["pilot"].name)
        self.program = session.top / PAYLOAD
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", self.program, HERE / "soak.c", "-lrt"], check=True)
        self.uids = {account.uid for account in session.accounts.values()}
        self.places = {launcher: Place(self, launcher, pool) for launcher in ("setuid", "userns")}
        self.uids.add(Account(session.service).uid)
        self.works = Disk(session.top / "work", WORK_MIB)
        self.disks = [self.works, *(place.disk for place in self.places.values())]
        if (CGROUPS / "cgroup.kill").exists() or (CGROUPS / "cgroup.procs").exists():
            self.cgroups = CGROUPS / f"nwsoak-{os.getpid()}"
            self.cgroups.mkdir()
        self.queues = session.top / "mqueue"  # not where the userns launcher could find it
        self.queues.mkdir(mode=0o700)
        command("mount", "-t", "mqueue", "soak", self.queues)
        self.marks, self.marks_w = os.pipe()
        fcntl.fcntl(self.marks_w, fcntl.F_SETPIPE_SZ, MIB)
        self.reader = threading.Thread(target=self._read_marks, daemon=True)
        self.reader.start()

    def close(self):
        """Everything is taken back, whatever state it is in."""
        self.stop.set()
        while alive := self.processes():
            for pid in alive:
                self.end(pid)
            time.sleep(0.01)
        for kind, number in self.ipc(self.owns):
            command("ipcrm", f"-{kind}", number)
        for path in sorted(self.cgroups.rglob("*/") if self.cgroups else [], reverse=True):
            path.rmdir()
        if self.cgroups:
            self.cgroups.rmdir()
        for path in self.files():
            path.unlink()
        self.session.close()

    def owns(self, uid):
        blocks = ((FIRST_BLOCK, BLOCKS), (FIRST_DELEGATED, DELEGATED_BLOCKS))
        return uid in self.uids or any(first <= uid < first + count * BLOCK for first, count in blocks)

    def ours(self, pid):
        """Is it a process of this soak's? Its program lies below the session, or it has an id that only this session has."""
        with contextlib.suppress(OSError):
            return exe(pid).startswith(f"{self.session.top}/") or self.owns(os.stat(f"/proc/{pid}").st_uid)
        return False

    def processes(self):
        """{pid: what it is} of everything of ours that lives."""
        found = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                if self.ours(pid) and (stat := Path(f"/proc/{pid}/stat").read_text()).rpartition(")")[2].split()[0] != "Z":
                    group = Path(f"/proc/{pid}/cgroup").read_text().split("0::")[-1].strip()
                    found[pid] = f"{exe(pid)} {stat.split(')')[0].split('(')[-1]} {group}"
        return found

    def details(self, pid):
        """What a process that should not be there is about."""
        found = []
        for name in ("wchan", "syscall", "cmdline"):
            with contextlib.suppress(OSError):
                found.append(f"{name} {Path(f'/proc/{pid}/{name}').read_bytes()[:300]!r}")
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            found += [line for line in status if line.split(":")[0] in ("State", "PPid", "Uid", "NSpid")]
            found += [f"{fd.name} -> {os.readlink(fd.path)}" for fd in os.scandir(f"/proc/{pid}/fd")]
        return "; ".join(found).replace("\t", " ")

    def ipc(self, owned):
        """[(letter of ipcrm, id)] of System V objects of ids for which owned(uid)."""
        found = []
        for kind, name in (("m", "shm"), ("s", "sem"), ("q", "msg")):
            head, *lines = Path(f"/proc/sysvipc/{name}").read_text().splitlines()
            at = head.split().index("uid")
            found += [(kind, line.split()[1]) for line in lines if owned(int(line.split()[at]))]
        return found

    def files(self):
        """What payloads left in the host's temporary directories, and POSIX queues."""
        found = []
        for path in [path for top in ("/dev/shm", "/tmp", "/var/tmp", self.queues) for path in Path(top).iterdir()]:
            with contextlib.suppress(FileNotFoundError):  # others' come and go
                found += [path] * self.owns(path.lstat().st_uid)
        return found

    # ---- killing ----

    def end(self, pid):
        """KILL, when it is surely ours; it is over then. Whether it was."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if not self.ours(pid):  # looked at after the pidfd was opened: it is still that one, or the signal goes nowhere
                return False
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            select.select([fd], [], [], HANG_S)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    @contextlib.contextmanager
    def cut_short(self, pids):
        """What sweeps of these and their children end within: their leases are written down. Who may sweep is stopped until whoever is killed is
        dead (those below have got their PR_SET_PDEATHSIG by then), with all that it has forked meanwhile: on a busy machine it takes long enough
        for another lease, or for all records of this one."""
        stopped = set()
        try:
            while found := {pid for pid in trees(pids) if may_sweep(pid)} - stopped:
                stopped |= found
                signal_all(found, signal.SIGSTOP)
                end = time.monotonic() + 1
                while any(map(runs, found)) and time.monotonic() < end:  # one that is forking right now stops when it has
                    time.sleep(0.001)
            now = time.time()
            for run in set().union(*map(leases_of, trees(pids))):
                self.seen.cut[run].append(now)
            yield
        finally:
            signal_all(stopped, signal.SIGCONT)

    def kill(self, front, role, group, rng):
        """Kill that of the run of front -> whether it was there. Its leases are written down first, of those that sweep."""
        if role == "cgroup" and group is None:
            role = "group"
        if role not in ("group", "cgroup", "front", "pair"):
            found = [pid for pid in descendants(front.pid) if is_role(pid, role)]
            if not found:
                return False
            pid = rng.choice(found)
            with self.cut_short([pid]):
                return self.end(pid)
        with self.cut_short([front.pid]):
            keepers = [pid for pid in children(front.pid) if is_role(pid, "keeper")] if role == "pair" else []
            if role == "pair" and not keepers:
                return False
            if role == "group":
                with ending(pid for pid in trees([front.pid]) if of_group(pid, front.pid)):
                    os.killpg(front.pid, signal.SIGKILL)
                return True
            if role == "cgroup":
                with ending(map(int, (group / "cgroup.procs").read_text().split())):
                    (group / "cgroup.kill").write_text("1")
                return True
            return [self.end(pid) for pid in (*keepers, front.pid)][-1]

    # ---- one run ----

    def fresh(self, plan):
        """A work directory as a pilot prepares it; a full disk is waited for."""
        work, pilot = self.works.path / str(plan.n), self.session.accounts["pilot"]
        while True:
            with contextlib.suppress(OSError):
                given = work / "given"
                given.mkdir(parents=True)
                (given / "input").write_text(plan.nonce)
                shutil.copy(self.program, given / PAYLOAD)
                for path in (work, given, given / "input", given / PAYLOAD):
                    os.chown(path, pilot.uid, pilot.gid)
                return work
            shutil.rmtree(work, ignore_errors=True)
            time.sleep(0.05)

    def start(self, plan, work, group):
        place, pilot = self.places[plan.launcher], self.session.accounts["pilot"]
        who = ["--declare", f"vo={plan.kind}", "--declare", f"subject={SUBJECT}", "--profile", plan.profile, "--workdir", str(work)]
        payload = [str(work / "given" / PAYLOAD), plan.nonce, str(plan.ms), plan.what]
        ids = [str(pilot.uid), str(pilot.gid), ",".join(map(str, pilot.groups))]
        argv = [str(self.program), "-s", str(group or "-"), *ids, str(place.program), "run", *who, "--", *payload]
        return subprocess.Popen(
            argv, env=place.site.environment(pilot), cwd="/", stdin=subprocess.DEVNULL, stdout=self.marks_w, stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def attempt(self, plan):
        """One run as planned, from its directory to what can be judged of it at once."""
        work, group = self.fresh(plan), None
        if self.cgroups:
            group = self.cgroups / str(plan.n)
            group.mkdir()
        attempt = self.seen.attempts[plan.nonce] = Attempt(plan.nonce, str(plan), time.time())
        front = self.start(plan, work, group)
        self.counts["starts"] += 1
        self._kill_as_planned(plan, front, group, attempt)
        try:
            front.wait(HANG_S)
        except subprocess.TimeoutExpired:
            self.violation(plan, f"hangs: {[(pid, comm(pid)) for pid in (front.pid, *descendants(front.pid))]}")
            front.kill()
            front.wait()
        attempt.status, attempt.ended, attempt.err = front.returncode, time.time(), drained(os.dup(front.stderr.fileno()))
        front.stderr.close()
        attempt.full = self.was_full(attempt.began, attempt.ended)
        self._over(plan, attempt, work, group)

    def _kill_as_planned(self, plan, front, group, attempt):
        if not plan.kill:
            return
        rng, at = random.Random(plan.n), time.monotonic() + plan.after
        with contextlib.suppress(subprocess.TimeoutExpired):
            front.wait(plan.after)
        while front.poll() is None and time.monotonic() < at + 3:
            if self.kill(front, plan.kill, group, rng):
                attempt.kills.append(plan.kill)
                self.kills[plan.kill] += 1
                if plan.kill in ("cgroup", "pair") and rng.random() < 0.7:  # what nobody ends: a sweep for it, which is killed too
                    self.sweep(self.places[plan.launcher], rng, True)
                return
            time.sleep(0.002)
        self.counts["kills too late"] += 1

    def _over(self, plan, attempt, work, group):
        place, killed = self.places[plan.launcher], {"0" if kill in FRONTS else "other" for kill in attempt.kills}
        for line in place.over_problems(attempt.status, attempt.err, killed):
            self.violation(plan, line)
        if attempt.code():
            self.refusals[attempt.code()] += 1
        if attempt.status != PAYLOADS_CODE:  # what is not done yet is the keeper's, or the sweep's
            self.pending.append((plan, work, group))
            return
        self.finished(plan, work, group)

    def finished(self, plan, work, group):
        """All of it must be over: no process, the directory the pilot's."""
        # At once, unless a kill has left a helper that ends by itself: it holds the locks of what it still does.
        end = time.monotonic() + (HELPER_S if self.seen.attempts[plan.nonce].kills else 0)
        while (problems := self.unfinished(plan, work, group)) and time.monotonic() < end:
            time.sleep(0.05)
        for line in problems:
            self.violation(plan, line)
        subprocess.run(["rm", "-rf", "--", work], check=True)

    def unfinished(self, plan, work, group):
        """What is not as it must be at the end, as lines. The cgroup goes as soon as it is empty."""
        found = self.places[plan.launcher].work_problems(work, plan.nonce)
        if group and group.exists() and not removed(group):
            held = [(pid, comm(int(pid))) for path in group.rglob("cgroup.procs") for pid in path.read_text().split()]
            found.append(f"left in its cgroup: {held}, {[path.name for path in group.iterdir() if path.is_dir()]}")
        return found

    def tidy_on(self):
        """What died a while ago, and has been finished by somebody, need not wait for the end; what has not is judged then."""
        while not self.stop.wait(1):
            for entry in [entry for entry in self.pending if self.seen.attempts[entry[0].nonce].ended < time.time() - SETTLE_S]:
                if not self.unfinished(*entry):
                    self.pending.remove(entry)
                    subprocess.run(["rm", "-rf", "--", entry[1]], check=True)

    def violation(self, plan, line):
        text = f"VIOLATION seed {self.seed} {plan}: {line}"
        with self.lock:
            self.violations.append(text)
            if len(self.violations) <= 40:
                self.say(text)

    # ---- beside them ----

    def _read_marks(self):
        """Payloads say their nonces into one pipe."""
        rest = b""
        while chunk := os.read(self.marks, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            self.seen.executed.update(line.decode() for line in lines)

    def slot(self):
        while not self.stop.is_set():
            self.attempt(Plan(self.seed, next(self.numbers), self.pace))

    def sweep_on(self):
        """Sweeps at random, some of which are killed."""
        while not self.stop.wait(self.rng.uniform(0.1, 1.5)):
            self.sweep(self.places[self.rng.choice(list(self.places))], self.rng, self.rng.random() < 0.3)

    def sweep(self, place, rng, killed):
        """nodewrap-sweep as the site's administrator; killed: it, or one of its children, after some milliseconds."""
        who = {"env": place.site.environment(place.pilot), "cwd": "/", **place.site.owner()}
        process = subprocess.Popen([place.sweeper], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **who)
        self.counts["sweeps"] += 1
        if killed:
            time.sleep(10 ** rng.uniform(-3, -1.3))
            self.kill_sweeper(process, rng)
        out, err = process.communicate()
        if err or b'"state":"broken"' in out:
            self.violation("nodewrap-sweep", f"{err[-300:]!r} {out[-600:]!r}")

    def kill_sweeper(self, process, rng):
        with self.cut_short([process.pid]):
            victims = trees([process.pid])
            self.kills["nodewrap-sweep" if len(victims) == 1 else "nodewrap-sweep at work"] += self.end(rng.choice(victims))

    def fill_on(self):
        """A disk, or all of them, are full for a while, and kept so; then there is room again."""
        while not self.stop.wait(self.rng.uniform(3, 12) * self.pace):
            disks = self.disks if self.rng.random() < 0.2 else [self.rng.choice(self.disks)]
            end, began = time.monotonic() + self.rng.uniform(0.3, 3) * self.pace, time.time()
            self.full_since["now"] = began
            self.counts["disks filled"] += len(disks)
            while time.monotonic() < end and not self.stop.is_set():
                for disk in disks:
                    disk.fill()
                time.sleep(0.03)
            for disk in disks:
                disk.free()
            self.seen.full.append((began, time.time()))
            del self.full_since["now"]

    def was_full(self, began, ended):
        now = [(since, ended) for since in list(self.full_since.values())]
        return any(at <= ended and began <= to for at, to in [*self.seen.full, *now])

    def line(self, began):
        seconds = time.monotonic() - began
        kills, refused = sum(self.kills.values()), sum(self.refusals.values())
        starts = self.counts["starts"]
        return (f"{seconds:5.0f} s  starts {starts} ({starts / seconds:.1f}/s)  executed {len(self.seen.executed)}  kills {kills}  "
                f"sweeps {self.counts['sweeps']}  disks filled {self.counts['disks filled']}  refused {refused}  "
                f"violations {len(self.violations)}")

    # ---- the whole ----

    def run(self, seconds):
        """So long, then all is let end."""
        began = time.monotonic()
        beside = [self.sweep_on, self.fill_on, self.tidy_on]
        threads = [threading.Thread(target=self._guarded, args=(work,)) for work in [self.slot] * self.slots + beside]
        for thread in threads:
            thread.start()
        while (left := began + seconds - time.monotonic()) > 0 and not self.stop.wait(min(10, left)):
            self.say(self.line(began))
        self.stop.set()
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - began
        self.say(self.line(began) + "; no more starts")

    def _guarded(self, work):
        try:
            work()
        except BaseException as error:
            self.violation("the soak itself", repr(error))
            self.stop.set()
            raise

    def settle(self):
        """Keepers have their time. What is there afterwards is a sweep's."""
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end and any("/libexec/nodewrap/" in what for what in self.processes().values()):
            time.sleep(0.05)

    def sweep_all(self):
        """One sweep finishes everything; the next has nothing to do."""
        for place in self.places.values():
            code, reports, err = place.node.sweep()
            self.counts["swept at the end"] += len(reports)
            if code or err or any(report["state"] != "swept" for report in reports):
                self.violation(f"last sweep, {place.site.launcher}", f"exit {code}, {err!r}, {[r for r in reports if r['state'] != 'swept'][:5]}")
            if (again := place.node.sweep()) != (0, [], ""):
                self.violation(f"sweep after the last, {place.site.launcher}", f"{again}")

    def judge(self):
        """Everything that can be seen from outside."""
        mounts = [f" {path} " for path in (self.queues, *(disk.path for disk in self.disks))]
        for launcher, place in self.places.items():
            for line in place.judge.left():
                if not any(mount in line for mount in mounts):
                    self.violation(f"left, {launcher}", f"{line}; {self.details(line.split()[1])}" if line.startswith("process ") else line)
        for plan, work, group in self.pending:
            self.finished(plan, work, group)
        os.close(self.marks_w)
        self.reader.join(5)
        if self.reader.is_alive():
            self.violation("left", "somebody still has the payloads' stdout")
        pilot = self.session.accounts["pilot"].uid
        for kind, number in self.ipc(lambda uid: self.owns(uid) and uid != pilot):
            self.violation("left", f"IPC object -{kind} {number}")
        self.counts["IPC objects of the shared id left"] = len(self.ipc(lambda uid: uid == pilot))
        for path in self.files():
            owner = path.lstat().st_uid
            if path.parent == self.queues and owner >= FIRST_DELEGATED:  # docs/isolation.md: without privilege only where /dev/mqueue is mounted
                self.counts["queues of the userns launcher's blocks left"] += 1
            elif owner != pilot:
                self.violation("left", f"file {path} of {owner}")
        if self.cgroups:
            for path in self.cgroups.rglob("*/"):
                self.violation("left", f"cgroup {path}")
        self.all_free()
        self.judge_records()

    def all_free(self):
        """As many runs at once as there are accounts, and as there are blocks: each gets one."""
        pool = self.places["setuid"].node.pool
        for launcher, kind, count in (("setuid", "pool", len(pool)), ("setuid", "static", 1), ("setuid", "block", BLOCKS), ("setuid", "map", 1),
                                      ("setuid", "log-only", 1), ("userns", "block", DELEGATED_BLOCKS), ("userns", "log-only", 1)):
            node = self.places[launcher].node
            ready = ["/bin/sh", "-c", "read line; exit 7"]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            fronts = [node.site.start(node.argv(kind, ready), **streams) for _ in range(count)]
            deadline = time.monotonic() + HANG_S
            while self._started(fronts) < count and all(front.poll() is None for front in fronts) and time.monotonic() < deadline:
                time.sleep(0.02)
            ended = [front.communicate(b"\n", HANG_S)[1] for front in fronts]
            codes = collections.Counter(front.returncode for front in fronts)
            if codes != {7: count}:
                self.violation(f"{launcher}/{kind} free", f"of {count} runs at once: exit codes {dict(codes)}, {[err for err in ended if err][:1]}")

    def _started(self, fronts):
        return sum(any(comm(pid) == "sh" for pid in descendants(front.pid)) for front in fronts)

    def judge_records(self):
        for launcher, place in self.places.items():
            log = Log(place.site.audit.read_bytes())
            mine = {nonce: attempt for nonce, attempt in self.seen.attempts.items() if f" {launcher}/" in attempt.plan}
            seen = Seen(mine, self.seen.executed, self.seen.cut, self.seen.full)
            verdicts = Verdicts(log, seen, place.judge)
            for line in verdicts.all():
                self.violation(f"records, {launcher}", line)
            self.counts["records"] += len(log.records)
            self.counts["torn records, sealed by a gap"] += log.gaps
            self.counts["runs finished by a sweep"] += sum(any(map(swept, records)) for records in verdicts.runs.values())
            for reason, count in verdicts.why.items():
                self.counts[f"swept twice: {reason}"] += count
            last = log.records[-1]["event"]["sequence"] if log.records else 0
            counter = int(place.site.audit.with_name(place.site.audit.name + ".sequence").read_text())
            if counter != last:
                self.violation(f"records, {launcher}", f"the counter says {counter}, the last record {last}")

    def summary(self):
        counts = dict(self.counts)
        starts, own = counts.pop("starts"), sum(attempt.status == PAYLOADS_CODE for attempt in self.seen.attempts.values())
        lines = [
            f"{self.slots} at once, {self.seconds:.0f} s, seed {self.seed}: starts {starts} ({starts / self.seconds:.1f}/s), "
            f"executed {len(self.seen.executed)}, ended with the payload's own code {own}",
            "kills: " + ", ".join(f"{role} {n}" for role, n in sorted(self.kills.items())) + f"; {sum(self.kills.values())} in all",
            "refusals: " + ", ".join(f"{code} {n}" for code, n in sorted(self.refusals.items())),
            ", ".join(f"{what} {n}" for what, n in sorted(counts.items())),
            f"violations: {len(self.violations)}",
        ]
        return "\n".join(lines)


def soak(seconds, runs, seed, pace=1.0, say=print):
    """The whole of it -> Soak, judged; the caller closes it."""
    made = Soak(runs, seed, pace, say)
    try:
        made.run(seconds)
        made.settle()
        made.sweep_all()
        made.judge()
    except BaseException:
        made.close()
        raise
    return made


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests.crash.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--pace", type=float, default=1.0, help="lengths of payloads and of full disks, times this")
    parser.add_argument("--keep", action="store_true", help="leave everything after a violation; python -m tests.site sweep takes it back")
    asked = parser.parse_args(argv)
    if os.geteuid() != 0:
        sys.exit("the soak needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"seed {asked.seed}", flush=True)
    made = soak(asked.seconds, asked.runs, asked.seed, asked.pace, lambda text: print(text, flush=True))
    print(made.summary(), flush=True)
    if asked.keep and made.violations:
        made.session.keep()
        print(f"kept: {made.session.top}")
    else:
        made.close()
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
