"""A launcher, a kind and a profile, ready to be run again and again under nth, each time from the same beginning."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.points import Listing, Point
from tests.node import BLOCK, DELEGATED, MAP_BLOCKS, MAP_FIRST, RULE, Node
from tests.pki import Pki
from tests.site import account_command

HERE = Path(__file__).parent
PROFILES = ("batch", "strict", "none")
PAYLOAD = "nw-crash"
DAEMONS = 2
#: A call that fails may make the launcher wait for something that does not come: 30 s (isolate.c, news).
HANG_S = 45
#: With a payload that does not end by itself: a point that is not reached takes as long.
STAY_S = 15
#: launcher/kind/profile[/victim]. Kinds are those of tests/node.py and: subuid (block, userns with a range of subordinate ids), bare (log-only
#: without a cgroup), disk (map, with /tmp on disk), credential (a proxy that is copied for the payload: a file on the host, where the payload's view
#: is the host's). victim: what is killed, when it is not the run itself: the sweep of a dead run, or the next run, which sweeps too.
CASES = (
    *(f"setuid/{kind}/{profile}" for kind in ("static", "pool", "map", "block", "log-only") for profile in PROFILES),
    "setuid/bare/batch", "setuid/bare/none", "setuid/credential/none", "setuid/disk/batch",
    *(f"userns/{kind}/{profile}" for kind in ("map", "log-only", "subuid") for profile in PROFILES),
    "userns/credential/none", "userns/disk/batch",
    *(f"setuid/{kind}/sweep" for kind in ("static/batch", "static/none", "block/none", "log-only/batch", "bare/none", "credential/none")),
    "setuid/disk/batch/sweep",
    *(f"userns/{kind}/sweep" for kind in ("map/batch", "log-only/none", "subuid/batch", "credential/none")),
    "setuid/static/none/next", "userns/log-only/none/next",
)
#: Of which ``--all`` tries every point: every kind of every launcher in one profile, one kind in the other two, and what is special. The rest is in
#: the samples: a profile changes what init builds, not who dies when.
WHOLE = (
    *(f"setuid/{kind}/batch" for kind in ("static", "pool", "map", "block", "log-only", "bare")), "setuid/static/strict", "setuid/static/none",
    "setuid/log-only/none", "setuid/credential/none", "setuid/disk/batch", "userns/disk/batch",
    *(f"userns/{kind}/batch" for kind in ("map", "log-only", "subuid")), "userns/map/strict",
    "userns/log-only/none", "userns/credential/none", *(case for case in CASES if case.count("/") > 2),
)
KINDS = {"subuid": "block", "disk": "map", "bare": "log-only", "credential": "testvo"}


DISK = """
[profile.batch]
tmpfs = { "/dev/shm" = "64MiB", "/var/tmp" = "64MiB" }
disk = ["/tmp"]
"""


class Tools:
    """nth and the payload, compiled below top; a proxy of the pilot's."""

    def __init__(self, top):
        self.nth, self.payload = top / "nth", top / PAYLOAD
        for source, program in (("nth.c", self.nth), ("payload.c", self.payload)):
            subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, HERE / source], check=True)
        self.pki = Pki(top / "pki")

    def proxy(self, pilot):
        """The file, made once: a proxy with an attribute certificate."""
        path = self.pki.directory / "proxy.pem"
        if not path.exists():
            alice = self.pki.alice
            path.write_bytes(self.pki.forge_proxy(alice, acs=[self.pki.forge_ac()]).file(alice))
            path.chmod(0o600)
            os.chown(path, pilot.uid, pilot.gid)
        return path


class CrashNode(Node):
    """Every kind of tests/node.py, and one more for those with a proxy of testvo. disk: profile batch has /tmp on disk."""

    def __init__(self, site, disk):
        self.disk = disk
        super().__init__(site)

    def policy_text(self, kinds=None, assurance="declared"):
        account = self.site.accounts.get("user1")
        identity = f'{{ mode = "switch", account = "{account.name}", lease = "exclusive" }}' if self.privileged else '{ mode = "log-only" }'
        return super().policy_text(kinds, assurance) + RULE.format(kind="testvo", identity=identity) + DISK * self.disk


@dataclass
class Outcome:
    """One run under nth. status: exit code of the command, -n for signal n. out, err: bytes. events: lines of --status-fd. hits: [(place, n,
    call number)] of the points that were reached. hangs: what hung. free_ms: from the command's end to that of its last process. lines: all words
    of nth."""

    status: int
    out: bytes
    err: bytes
    events: list
    hits: list
    hangs: list
    free_ms: int
    seconds: float
    lines: list = field(repr=False)


class Case:
    """name: as in CASES. work: the work directory of its runs. nonce: what the payload of the run says. victim: "run", "sweep", "next"."""

    def __init__(self, session, tools, name):
        self.name, self.session, self.tools = name, session, tools
        self.launcher, self.kind, self.profile, self.victim = (*name.split("/"), "run")[:4]
        self.site = session.site(self.launcher)
        self.node = CrashNode(self.site, self.kind == "disk")
        self.pilot = self.site.pilot
        self.work = session.top / "work"
        self.libexec = self.site.prefix / "libexec/nodewrap"
        self.uids = self.node.uids() | {self.pilot.uid}
        self.scratch = self.site.prefix / "crash-scratch"
        if self.kind == "disk" and not self.scratch.exists():
            self.scratch.mkdir(mode=0o711)
            if self.launcher == "userns":
                os.chown(self.scratch, self.pilot.uid, self.pilot.gid)
        disk = str(self.scratch) if self.kind == "disk" else None
        self.node.open_guard(ca_dir=str(tools.pki.ca_dir), voms_dir=str(tools.pki.voms_dir), tmp_dir=disk)
        if self.kind == "bare":
            self.site.guard(cgroup=None)
        elif "cgroup" in self.site.first_guard:
            self.site.guard(cgroup=self.site.first_guard["cgroup"])
        self._subuid(self.kind == "subuid")
        self.death = ()
        self.fresh()

    def _subuid(self, wanted):
        """The pilot's range of subordinate ids comes and goes with the cases that need it: with it, userns/map is another thing."""
        has = any(line.startswith(f"{self.pilot.name}:") for line in Path("/etc/subuid").read_text().splitlines())
        if has != wanted:
            span, word = f"{DELEGATED}-{DELEGATED + BLOCK - 1}", "add" if wanted else "del"
            account_command("usermod", f"--{word}-subuids", span, f"--{word}-subgids", span, self.pilot.name)

    def owns(self, uid):
        """Is it an id that only the processes of this session have?"""
        return uid in self.uids or MAP_FIRST <= uid < MAP_FIRST + MAP_BLOCKS * BLOCK or DELEGATED <= uid < DELEGATED + BLOCK

    def fresh(self):
        """A new nonce, and a work directory as a pilot prepares it."""
        self.nonce = secrets.token_hex(8)
        self.forget_ipc()
        if self.work.is_symlink() or self.work.exists():
            shutil.rmtree(self.work)
        given = self.work / "given"
        given.mkdir(parents=True)
        (given / "input").write_text(self.nonce)
        shutil.copy(self.tools.payload, given / PAYLOAD)  # profile strict shows nothing else of ours
        for path in (self.work, given, given / "input", given / PAYLOAD):
            os.chown(path, self.pilot.uid, self.pilot.gid)

    # ---- commands ----

    def argv(self, status_fd, stay):
        """The run."""
        command = [str(self.work / "given" / PAYLOAD), self.nonce, str(DAEMONS), "files", *["stay"] * stay]
        options = ["--workdir", str(self.work), "--status-fd", str(status_fd)]
        return self._run(command, options)

    def next_argv(self):
        """Another run, of which nothing is left."""
        return self._run(["/bin/true"], [])

    def _run(self, command, options):
        if self.kind == "credential":
            options = [*options, "--credential", str(self.tools.proxy(self.pilot)), "--profile", self.profile]
            return [self.libexec / f"nodewrap-{self.launcher}", "run", *options, "--", *command]
        kind = KINDS.get(self.kind, self.kind)
        return self.node.argv(kind, command, self.profile, options, launcher=self.libexec / f"nodewrap-{self.launcher}")

    def run(self, *options, victim="run", stay=False):
        """The command under nth with these options -> Outcome. stay: its payload does not end by itself."""
        began, pipes = time.monotonic(), [os.pipe() for _ in range(3)]
        (lines, lines_w), (out, out_w), (status, status_w) = pipes
        root = victim == "sweep" and self.launcher == "setuid"
        ids = [] if root else ["-u", self.pilot.uid, "-g", self.pilot.gid, "-G", ",".join(map(str, self.pilot.groups))]
        argv = {"run": self.argv(status_w, stay), "sweep": [self.libexec / "nodewrap-sweep"], "next": self.next_argv()}[victim]
        limit, payload = STAY_S if stay else HANG_S, PAYLOAD if victim == "run" else "true"
        words = [self.tools.nth, "-o", lines_w, "-t", limit, "-p", payload, *ids, *options, "--", *argv]
        with open(self.session.top / "stderr", "w+b") as err:  # a file: it is carried over, which a pipe is not
            # The pipe of the lines is read at once: the daemons have none of it, and it ends with nth.
            process = subprocess.Popen(
                [str(word) for word in words], env=self.site.environment(self.pilot), cwd="/", pass_fds=(lines_w, status_w), stdin=subprocess.DEVNULL,
                stdout=out_w, stderr=err, start_new_session=True,
            )
            for fd in (lines_w, out_w, status_w):
                os.close(fd)
            with os.fdopen(lines) as stream:
                told = [line.split() for line in stream]
            process.wait()
            err.seek(0)
            said = err.read()
            if process.returncode != 0:
                raise RuntimeError(f"nth: {process.returncode}: {said[-300:]!r}")
        return self._outcome(told, drained(out), said, drained(status), time.monotonic() - began)

    def _outcome(self, told, out, err, events, seconds):
        status = os.waitstatus_to_exitcode(next(int(words[1]) for words in told if words[0] == "end"))
        hits = [(words[1], int(words[2]), int(words[3])) for words in told if words[0] == "hit"]
        free = next(int(words[1]) for words in told if words[0] == "free")
        hangs = [" ".join(words[1:]) for words in told if words[0] == "hang"]
        return Outcome(status, out, err, [json.loads(line) for line in events.splitlines()], hits, hangs, free, seconds, told)

    def die(self):
        """A dead run: all its processes are killed at once when its payload has left everything and ended, and nobody has swept yet -> Outcome."""
        if not self.death:
            listing = Listing(self.run("-l").lines)
            parent = next(process for process in listing.processes.values() if process.role == "init").parent
            first = listing.phase("run")[0]
            n = next(n for n, (order, _, _) in enumerate(listing.processes[parent].calls, 1) if order >= first)
            self.death = Point("A", parent, n, 50).option()
            self.fresh()
        return self.run(*self.death)

    def sweep(self):
        """nodewrap-sweep, as who owns the leases. Its exit status and what it said."""
        owner = {} if self.launcher == "setuid" else {"user": self.pilot.uid, "group": self.pilot.gid, "extra_groups": self.pilot.groups}
        env = self.site.environment(self.pilot)
        done = subprocess.run([self.libexec / "nodewrap-sweep"], env=env, cwd="/", capture_output=True, timeout=HANG_S, check=False, **owner)
        return done.returncode, done.stdout + done.stderr

    def next_run(self):
        """A plain next run: it sweeps too. Its exit status and what it said."""
        ran = self.site.run(self.next_argv(), cwd="/", timeout=HANG_S)
        return ran.rc, ran.out + ran.err

    # ---- what is there ----

    def processes(self):
        """{pid: what it is} of everything of this session's that runs: its programs, wherever they are shown, and its ids."""
        found, top = {}, f"{self.session.top}/"
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                exe = ""
                with contextlib.suppress(OSError):  # a kernel thread, or just ended
                    exe = os.readlink(f"/proc/{pid}/exe")
                if exe.startswith(top) or PAYLOAD in exe or self.owns(os.stat(f"/proc/{pid}").st_uid):
                    stat = Path(f"/proc/{pid}/stat").read_text()
                    if stat.rpartition(")")[2].split()[0] != "Z":
                        found[int(pid)] = f"{exe} {stat.split(')')[0].split('(')[-1]}"
        return found

    def reset(self):
        """After a violation: the next point begins where every other did."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.processes():
            time.sleep(0.01)
        self.node.forget()
        self.forget_ipc()

    def in_tmp(self, pattern, owns):
        """Files in /tmp whose owner is so. Other workers' come and go."""
        found = []
        for path in Path("/tmp").glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found += [path] * owns(path.lstat().st_uid)
        return found

    def forget_ipc(self):
        """What payloads under the pilot's own id left in the kernel and in /tmp, or any after a violation."""
        for path in self.in_tmp("nw-crash-*", self.owns):
            path.unlink()
        for kind, option, uid in (("shm", "-m", 9), ("sem", "-s", 6), ("msg", "-q", 9)):
            for line in Path("/proc/sysvipc", kind).read_text().splitlines()[1:]:
                if self.owns(int(line.split()[uid])):
                    subprocess.run(["ipcrm", option, line.split()[1]], check=False)


def drained(fd):
    """What a pipe holds; whoever still has its other end is not waited for."""
    os.set_blocking(fd, False)
    found = b""
    with os.fdopen(fd, "rb", buffering=0) as stream:
        while chunk := stream.read(1 << 16):
            found += chunk
    return found
