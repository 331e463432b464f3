"""A site on which everything is permitted by one policy, and programs run on it as payloads: what the tests of the launchers share.

A *kind* is a way to give the payload its identity; the pilot chooses it by the VO that it declares:

static    mode switch, one account (user1)       pool     mode switch, two accounts (pool01, pool02), leased exclusively
map       mode map, one id                       block    mode map, 65,536 ids
log-only  the pilot's own id
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

from nodewrap import lease
from tests.site import SLOWNESS

KINDS = {"setuid": ("static", "pool", "map", "block", "log-only"), "userns": ("map", "block", "log-only")}
MODES = {"static": "switch", "pool": "switch", "map": "map", "block": "map", "log-only": "log-only"}
PROFILES = ("strict", "batch", "compat", "none")
SUBJECT = "/DC=org/DC=example/CN=Ann Example"
MAP_BLOCKS, BLOCK = 3, 65536
#: Above the ids of accounts and of subordinate ranges, below 2^31; another place for each test session, as several may run at a time.
MAP_FIRST = 1600000000 + os.getpid() % 1000 * MAP_BLOCKS * BLOCK
DELEGATED = 1800000000 + os.getpid() % 1000 * BLOCK

#: Where cgroup v2 is.
V2 = Path(next((line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line), "/"))

POLICY = """
[site]
name = "TEST"
multi_user = "yes"
modes = {{ switch = "allow", map = "allow", log-only = "allow" }}
minimum_assurance = "{assurance}"

[limits]
grace = "1s"

[env]
set = {{ FROM_POLICY = "yes" }}

[[caller]]
account = ["{pilot}"]
{rules}
"""
RULE = """
[[rule]]
name = "{kind}"
when = {{ vo = "{kind}" }}
identity = {identity}
profile = ["none", "compat", "batch", "strict"]
"""
SWITCH = '\n[pool.two]\naccounts = ["{pool01}", "{pool02}"]\n'

#: In code that payloads run: "ok", or the name of the error.
CALL = r"""
import errno
def call(work, *args, **more):
    try:
        work(*args, **more)
    except OSError as wrong:
        return errno.errorcode[wrong.errno]
    return "ok"
"""


def delegated_ids(name):
    """The ids of /etc/subuid for that account: empty for the tests' own accounts, whose uids are above those that useradd gives a range."""
    lines = [line.split(":") for line in Path("/etc/subuid").read_text().splitlines()] if Path("/etc/subuid").exists() else []
    return {number for who, first, count in lines if who == name for number in range(int(first), int(first) + int(count))}


def has_pilots_id(node, kind):
    """The payload's id is the pilot's for the kernel: mode map of the userns launcher has another one only where the pilot has a range of them."""
    return kind == "log-only" or (not node.privileged and kind == "map" and not delegated_ids(node.pilot.name))


def alive(pid):
    """A process with that pid (an int) exists and has not ended; a zombie has, when it is one with all of its threads (pidfd_open(2))."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):  # EINVAL, until Linux 6.1 at least: gone, and its number still that of a session or group
            return False
        raise
    try:
        end = select.poll()
        end.register(fd, select.POLLIN)
        return not end.poll(0)
    finally:
        os.close(fd)


def status_of(pid):
    """/proc/PID/status as {name: [words]}."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def until(condition, what, seconds=10.0):
    """Wait for condition() to be true and return what it says; AssertionError with what when it stays false."""
    end = time.monotonic() + seconds * SLOWNESS
    while True:
        late = time.monotonic() >= end  # before the look: it may have become true while we were kept waiting
        if found := condition():
            return found
        assert not late, f"not in {seconds} s: {what}"
        time.sleep(0.005)


def promised():
    """Seconds in which all of a run has ended, and what a busy machine may make of them."""
    return 2 if os.getloadavg()[0] < 2 else 6


class Live:
    """A payload that runs: process (the launcher), events (lines of --status-fd read so far), pid (the payload's, seen from outside)."""

    def __init__(self, process, status):
        self.process, self.status, self.events = process, status, []
        first = self.next()
        if first.get("event") != "started":
            said = process.communicate(timeout=10)
            self.close()
            raise AssertionError(f"not started: {first} {said}")
        self.pid = first["pid"]

    def next(self):
        """The next event, {} at the end."""
        line = self.status.readline()
        event = json.loads(line) if line else {}
        self.events.append(event)
        return event

    def end(self, stdin=None, timeout=30):
        """(exit status, stdout, stderr) once it has ended."""
        out, err = self.process.communicate(stdin, timeout * SLOWNESS)
        self.next()
        self.status.close()
        return self.process.returncode, out, err

    def close(self):
        kill(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr, self.status):
            if stream:
                stream.close()


class Node:
    """One site, open to the pilot in every mode and profile. kinds: what this launcher gives."""

    def __init__(self, site):
        self.site, self.kinds, self.pilot, self.lives = site, KINDS[site.launcher], site.pilot, []
        self.open_guard()
        self.open_policy()

    def open_guard(self, **more):
        """The guard as wide as the tests need; more: as Site.guard."""
        ids = [self.site.accounts[name].uid for name in ("user1", "user2", "pool01", "pool02", "pool03")] if self.privileged else []
        accounts = f"{min(ids)}-{max(ids)}" if ids else None
        blocks = f"{MAP_FIRST}-{MAP_FIRST + MAP_BLOCKS * BLOCK - 1}"
        allow = [f"{mode} {' '.join(PROFILES)}" for mode in (("switch",) if self.privileged else ()) + ("map", "log-only")]
        only_setuid = {"switch_uid": accounts, "switch_gid": accounts, "map_uid": blocks} if self.privileged else {}
        self.site.guard(**{"allow": allow, **only_setuid, **more})

    def policy_text(self, kinds=None, assurance="declared"):
        names = {role: account.name for role, account in self.site.accounts.items()}
        identity = {
            "static": f'{{ mode = "switch", account = "{names.get("user1")}", lease = "exclusive" }}',
            "pool": '{ mode = "switch", pool = "two", lease = "exclusive" }',
            "map": '{ mode = "map" }', "block": f'{{ mode = "map", inside_uid = 1000, inside_gid = 1000, size = {BLOCK} }}',
            "log-only": '{ mode = "log-only" }',
        }
        rules = "".join(RULE.format(kind=kind, identity=identity[kind]) for kind in kinds or self.kinds)
        pool = SWITCH.format(**names) if self.privileged else ""
        return POLICY.format(pilot=names["pilot"], rules=pool + rules, assurance=assurance)

    def open_policy(self):
        """Applied once for each site: it takes 0.3 s."""
        text, source = self.policy_text(), self.site.sysconf / "nodewrap.toml"
        if not (self.site.state / "policy/current").exists() or source.read_text() != text:
            self.site.policy(text)

    @property
    def privileged(self):
        return self.site.launcher == "setuid"

    # ---- running ----

    def argv(self, kind, command, profile="batch", options=(), launcher=None):
        who = ["--declare", f"vo={kind}", "--declare", f"subject={SUBJECT}", "--profile", profile]
        return [launcher or self.site.binary, "run", *who, *options, "--", *command]

    def run(self, kind, *command, profile="batch", options=(), **more):
        """Run command as a payload of that kind -> Result."""
        return self.site.run(self.argv(kind, command, profile, options), **more)

    def sh(self, kind, script, *words, **more):
        return self.run(kind, "/bin/sh", "-c", script, "sh", *words, **more)

    def python(self, kind, code, *words, **more):
        """Run code in the payload; it prints one JSON document, which is returned."""
        ran = self.run(kind, "/usr/bin/python3", "-I", "-c", code, *words, **more)
        assert (ran.rc, ran.err) == (0, b""), ran
        return json.loads(ran.out)

    def start(self, kind, *command, profile="batch", options=(), more_fds=(), **more):
        """Start command as a payload of that kind -> Live, once it runs."""
        reader, writer = os.pipe()
        options = ["--status-fd", str(writer), *options]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.site.start(self.argv(kind, command, profile, options), fds=(writer, *more_fds), **{**streams, **more})
        os.close(writer)
        self.lives.append(Live(process, os.fdopen(reader)))
        return self.lives[-1]

    def sweep(self, *options):
        """nodewrap-sweep as the site's administrator -> (exit status, [report], stderr)."""
        argv = [self.site.prefix / "libexec/nodewrap/nodewrap-sweep", *options]
        who = {"env": self.site.environment(self.pilot), "cwd": "/", **self.site.owner()}
        ran = subprocess.run(argv, capture_output=True, check=False, timeout=60 * SLOWNESS, **who)
        return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr.decode()

    def close(self):
        """End what a test that failed left running."""
        for live in self.lives:
            live.close()

    # ---- what a run may have left ----

    def uids(self):
        """Ids that only payloads have here."""
        roles = ("user1", "user2", "pool01", "pool02", "pool03") if self.privileged else ()
        return {self.site.accounts[role].uid for role in roles}

    def payload_processes(self):
        """pids of the living under accounts or blocks of payloads: orphans that have ended are the init's, which may take seconds to reap them."""
        ours, found = self.uids(), []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                uid = os.stat(f"/proc/{pid}").st_uid
            except FileNotFoundError:
                continue
            if (uid in ours or MAP_FIRST <= uid < MAP_FIRST + MAP_BLOCKS * BLOCK) and alive(int(pid)):
                found.append(int(pid))
        return found

    def launchers(self):
        """pids of this site's launchers and inits."""
        prefix, found = str(self.site.prefix / "libexec/nodewrap/nodewrap-"), []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                found += [int(pid)] * os.readlink(f"/proc/{pid}/exe").startswith(prefix)
            except OSError:
                continue
        return found

    def actions(self, start=0):
        """What the audit says from that byte on until now, in order: event.action of each record."""
        return [record["event"]["action"] for record in self.site.records(start, growing=True)]

    def leftovers(self):
        """Everything that a run that has ended may not leave, by kind; empty lists when all is well."""
        return {
            "leases": self.site.leases(), "ids": [path.name for path in (self.site.state / "ids").glob("*") if path.stat().st_size],
            "processes": self.payload_processes(), "launchers": self.launchers(),
            "mounts": [line for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines() if f" {self.site.prefix}" in line],
        }

    def forget(self):
        """Take away leases and groups of runs whose launcher was killed: the work of the sweep, which the tests of the launchers do not try."""
        for name in self.site.leases():
            (self.site.state / "leases" / name).unlink()
        for path in (self.site.state / "ids").glob("*"):
            os.truncate(path, 0)
        log = self.site.audit.read_bytes() if self.site.audit.exists() else b""
        for group in V2.glob("nodewrap-*"):
            if group.name.removeprefix("nodewrap-").encode() in log:
                with contextlib.suppress(FileNotFoundError):  # its keeper was about to
                    group.rmdir()

    def settled(self):
        """What is left once the keepers of launchers that a test killed have had their time, and the killed have ended."""
        end = time.monotonic() + 5
        while any((left := self.leftovers()).values()) and time.monotonic() < end:
            time.sleep(0.01)
        return left

    def is_clean(self):
        return not any(self.leftovers().values())


def unlocked(path):
    """Nobody holds that lease, or it is gone."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return not lease.alive(file.fileno())
    return True


def abandon(node, live):
    """Kill front and keeper at once, so that neither does anything more: what is left is the lease's, which nobody holds. The run's id."""
    front, run = live.process.pid, live.events[0]["run"]
    children = Path(f"/proc/{front}/task/{front}/children").read_text().split() if node.privileged else []
    pids = [*map(int, children), front]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    live.process.wait()
    path = node.site.state / "leases" / f"{run}.lease"
    until(lambda: not any(map(alive, pids)) and unlocked(path), "they are dead, and hold no lock")
    return run


def kill(process):
    """End a process that a test started."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
