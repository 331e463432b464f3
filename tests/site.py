"""Throw-away installations for the tests that run the real thing.

A ``Session`` is one directory with a home directory for each account that it made, and below it an installation for each launcher, made by really
running ``make install``. As root that directory is in /opt: the launcher refuses a path with a world-writable parent, so /tmp will not do. As another
user it is in the home directory, and the only launcher is ``userns``.

Everything made is written down (``<top>/made``) before it is made, and ``<top>`` carries the pid: a session that was killed is swept by the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import pwd
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.files import CHECKOUT

#: By how much a machine is slower than those that times were chosen on: an emulated one (tests/kernel/distribution.py).
SLOWNESS = float(os.environ.get("NODEWRAP_TEST_SLOWNESS", "1"))

PREFIX = "nodewrap-test-"
ROLES = ("outsider", "user1", "user2", "pool01", "pool02", "pool03")
#: Above what distributions and systemd's dynamic users hand out, below the usual subordinate ranges.
FIRST_ID, LAST_ID = 70000, 79999
BLOCK = 20
ROOT = os.geteuid() == 0


def base_directory():
    return Path("/opt") if ROOT else Path.home()


class Account:
    """name, uid, gid, groups (supplementary gids), home."""

    def __init__(self, name):
        entry = pwd.getpwnam(name)
        self.name, self.uid, self.gid, self.home = name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir)
        self.groups = sorted(set(os.getgrouplist(name, self.gid)))


class Result:
    """rc: exit status, -n for signal n. out, err: bytes. records: the audit records written meanwhile, parsed. seconds: how long it took."""

    def __init__(self, rc, out, err, records, seconds):
        self.rc, self.out, self.err, self.records, self.seconds = rc, out, err, records, seconds

    @property
    def text(self):
        return self.out.decode("utf-8", "replace")

    def record(self, action):
        """The one record of that action."""
        found = [record for record in self.records if record["event"]["action"] == action]
        assert len(found) == 1, f"{len(found)} {action} records in {self}"
        return found[0]

    def __repr__(self):
        actions = [record["event"]["action"] for record in self.records]
        return f"<rc={self.rc} out={self.out[-2000:]!r} err={self.err[-2000:]!r} records={actions}>"


def command(*argv, patient=False, **options):
    """Run an administrator's command; its output is in the error when it fails. Interrupted, it ends with its children; a patient one is awaited."""
    pipe = subprocess.PIPE
    with subprocess.Popen([str(word) for word in argv], stdout=pipe, stderr=pipe, text=True, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            if not patient:
                end_group(process.pid)
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit {process.returncode}\n{out[-6000:]}{err[-6000:]}")
    return out


def end_group(leader):
    """End a process group of ours, and see it gone: what it was writing must not come back behind a removal. leader: our child."""
    with contextlib.suppress(ProcessLookupError):  # none is left
        while True:
            os.killpg(leader, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # the leader is reaped, the others are init's
                os.waitpid(leader, os.WNOHANG)
            time.sleep(0.01)


def account_command(*argv):
    """useradd and its family take a lock and give up at once (exit 1 or 10) when somebody else holds it."""
    for _ in range(50):
        try:
            return command(*argv, patient=True)  # killed halfway it would leave the account files locked
        except RuntimeError as error:
            if "lock" not in str(error):
                raise
            time.sleep(0.2)
    raise RuntimeError(f"{argv[0]}: the account files stayed locked for 10 s")


def exists(database, key):
    return subprocess.run(["getent", database, str(key)], capture_output=True).returncode == 0


def start_time(pid):
    """Clock ticks since boot at which the process started, "" when there is none: together with the pid it names one process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Session:
    """The accounts and installations of one test session. Call ``close`` (also at exit) to take everything back."""

    def __init__(self, prefix=PREFIX, roles=ROLES, base=None):
        base = base or base_directory()
        sweep_dead(prefix, base)
        self.tag = secrets.token_hex(2)
        self.roles = roles
        self.top = base / f"{prefix}{os.getpid()}-{start_time(os.getpid())}-{self.tag}"
        self.top.mkdir(mode=0o755)
        atexit.register(self.close)
        self.made = self.top / "made"
        self.sites = {}
        self.next_id = FIRST_ID + BLOCK * (os.getpid() % ((LAST_ID - FIRST_ID) // BLOCK))
        self.callers = f"nwt{self.tag}-callers" if ROOT else ""
        self.service = f"nwt{self.tag}-child" if ROOT else ""
        self.accounts = {}
        self._make_accounts()

    def _make_accounts(self):
        if not ROOT:
            self.accounts["pilot"] = Account(pwd.getpwuid(os.getuid()).pw_name)
            return
        (self.top / "home").mkdir()
        self._note("group", self.callers)
        account_command("groupadd", "-g", self._free_id(), self.callers)
        self.add_account("pilot", groups=[self.callers])
        for name in self.roles:
            self.add_account(name)

    def _free_id(self):
        while True:
            self.next_id += 1
            if not exists("passwd", self.next_id) and not exists("group", self.next_id):
                return self.next_id

    def _note(self, kind, name):
        with open(self.made, "a") as made:
            made.write(f"{kind} {name}\n")

    def add_account(self, name, groups=()):
        """An account with that role: its real name has the session's tag. Own group of the same id, home below the session, mode 0700."""
        full, number = f"nwt{self.tag}-{name}", self._free_id()
        self._note("user", full)
        account_command("groupadd", "-g", number, full)
        home = self.top / "home" / name
        account_command("useradd", "-u", number, "-g", number, "-G", ",".join(groups), "-d", home, "-m", "-k", "/var/empty", "-s", "/bin/sh", full)
        home.chmod(0o700)
        self.accounts[name] = Account(full)
        return self.accounts[name]

    def site(self, launcher):
        """The installation with that launcher, made at first use."""
        if launcher not in self.sites:
            self.sites[launcher] = Site(self, launcher)
        return self.sites[launcher]

    def close(self):
        atexit.unregister(self.close)
        remove(self.top)

    def keep(self):
        """Leave everything in place at the end, until somebody calls ``remove``."""
        atexit.unregister(self.close)
        (self.top / "keep").touch()


def sweep_dead(prefix=PREFIX, base=None):
    """Take back what sessions left that were killed; one sweeper at a time."""
    base = base or base_directory()
    lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for top in base.glob(f"{prefix}*"):
            pid, started = top.name[len(prefix) :].split("-")[:2]
            if start_time(pid) != started and not (top / "keep").exists():
                remove(top)
    finally:
        os.close(lock)


def remove(top):
    """Take back what the session at top made: its processes, mounts, accounts, files."""
    made = (top / "made").read_text().split("\n") if (top / "made").exists() else []
    entries = [line.split() for line in made if line]
    for kind, name in entries:
        if kind == "user":
            remove_user(name)
    for kind, name in entries:
        if kind == "group":
            remove_group(name)
    for line in reversed(Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()):
        if line.split()[4].startswith(f"{top}/"):
            command("umount", "-l", line.split()[4])
    command("rm", "-rf", "--", top)  # shutil.rmtree recurses, and payloads make trees that are deeper than Python can


def remove_user(name):
    assert name.startswith("nwt")
    if exists("passwd", name):
        kill_all(Account(name).uid)
        account_command("userdel", "-f", name)
    remove_group(name)


def remove_group(name):
    if exists("group", name):
        account_command("groupdel", name)


def kill_all(uid):
    """End what runs under an id of ours: as that id, so that no other process can be hit."""
    assert uid > 0
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            assert os.getresuid() == (uid,) * 3
            os.kill(-1, signal.SIGKILL)  # all that this id may signal; the sender survives or not, nothing depends on it
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


class Site:
    """One installation. launcher: ``setuid`` or ``userns``. prefix, sysconf, state, audit: its paths. pilot: who calls it by default."""

    def __init__(self, session, launcher):
        self.session, self.launcher = session, launcher
        self.accounts = session.accounts
        self.pilot = session.accounts["pilot"]
        self.prefix = session.top / launcher
        self.sysconf = self.prefix / "etc/nodewrap"
        self.state = self.prefix / "var/lib/nodewrap"
        self.audit = self.prefix / "var/log/nodewrap/audit.jsonl"
        self.binary = self.prefix / "bin/nodewrap"
        self.install()
        self.first_guard = self.read_guard()

    def make(self, target, **variables):
        settings = {"PREFIX": self.prefix, "LAUNCHER": self.launcher, "OBJDIR": self.prefix / "obj", **variables}
        words = [f"{key}={value}" for key, value in settings.items()]
        if ROOT:
            words += [f"CALLERS={self.session.callers}", f"SERVICE_USER={self.session.service}"]
            self.session._note("user", self.session.service)
        return command("make", "-C", CHECKOUT, target, *words)

    def install(self):
        self.prefix.mkdir(exist_ok=True)
        self.make("install")
        if ROOT and self.launcher == "userns":
            # What the pilot would have had from its own `make install`: this launcher has no privilege, so all it uses is the caller's.
            command("chown", "-R", "-h", f"{self.pilot.uid}:{self.pilot.gid}", self.prefix)

    # ---- guard and policy ----

    def read_guard(self):
        """{key: [rest of each line with that key]} in file order."""
        lines = {}
        for line in (self.sysconf / "guard").read_text().splitlines():
            key, _, rest = line.partition(" ")
            if key and not key.startswith("#"):
                lines.setdefault(key, []).append(rest)
        return lines

    def guard(self, **changes):
        """Change lines of the guard: ``guard(allow=["map strict"], switch_uid="70001-70005", policyd=None)``. None removes the key."""
        lines = self.read_guard()
        for key, value in changes.items():
            lines[key.replace("_", "-")] = [] if value is None else [value] if isinstance(value, str) else list(value)
        text = "".join(f"{key} {rest}".rstrip() + "\n" for key, values in lines.items() for rest in values)
        self.write(self.sysconf / "guard", text)

    def reset(self):
        """The guard as installed."""
        self.write(self.sysconf / "guard", "".join(f"{key} {rest}".rstrip() + "\n" for key, values in self.first_guard.items() for rest in values))

    def policy(self, toml):
        """Install toml as the whole policy of this site and apply it, as its administrator."""
        self.write(self.sysconf / "nodewrap.toml", toml)
        return self.admin("policy", "apply")

    def write(self, path, text, mode=0o644):
        """A file of the administrator's, replaced in one step."""
        new = path.with_name(path.name + ".new")
        new.write_text(text)
        new.chmod(mode)
        if ROOT and self.launcher == "userns":
            os.chown(new, self.pilot.uid, self.pilot.gid)
        new.rename(path)

    # ---- running ----

    def admin(self, *argv):
        """nodewrap as the site's administrator: root, and for userns the pilot. stdout; RuntimeError when it fails."""
        return command(self.binary, *argv, env=self.environment(self.pilot), cwd="/", **self.owner())

    def owner(self):
        """Popen options for the site's administrator, whose the leases are."""
        userns = ROOT and self.launcher == "userns"
        return {"user": self.pilot.uid, "group": self.pilot.gid, "extra_groups": self.pilot.groups} if userns else {}

    def environment(self, account):
        return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(account.home), "LC_ALL": "C.UTF-8", "USER": account.name}

    def start(self, argv, user=None, env=None, cwd=None, fds=(), **options):
        """Popen of argv as that account (default: the pilot). env is added to a small environment; a dict with None as a value removes."""
        account = user or self.pilot
        merged = {key: value for key, value in {**self.environment(account), **(env or {})}.items() if value is not None}
        ids = {"user": account.uid, "group": account.gid, "extra_groups": account.groups} if ROOT else {}
        argv = [os.fspath(word) for word in argv]
        return subprocess.Popen(argv, env=merged, cwd=cwd or account.home, pass_fds=fds, start_new_session=True, **ids, **options)

    def run(self, argv, user=None, env=None, stdin=b"", fds=(), cwd=None, timeout=120):
        """Run argv to its end as the pilot (or user) -> Result with the audit records that were written meanwhile."""
        before, began = self.audit_size(), time.monotonic()
        process = self.start(argv, user, env, cwd, fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(stdin, timeout * SLOWNESS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{argv} did not end in {timeout} s; out={out!r} err={err!r}") from None
        return Result(process.returncode, out, err, self.records(before), time.monotonic() - began)

    def nodewrap(self, *argv, **options):
        """``nodewrap run …`` and its other commands as the pilot -> Result."""
        return self.run([self.binary, *argv], **options)

    # ---- evidence ----

    def audit_size(self):
        return self.audit.stat().st_size if self.audit.exists() else 0

    def records(self, start=0, growing=False):
        """Audit records from that byte on. A line that is not JSON is an error of the site's. growing: but for one that is being written, as the
        kernel lets others read what of a write it has done (one that goes over a page's end is done in two)."""
        if not self.audit.exists():
            return []
        with open(self.audit, "rb") as log:
            log.seek(start)
            lines = log.read().splitlines(keepends=True)
        return [json.loads(line) for line in lines if not growing or line.endswith(b"\n")]

    def leases(self):
        """Names of the leases that are left."""
        return sorted(path.name for path in (self.state / "leases").rglob("*") if path.is_file())

    def processes(self, account):
        """pids that run under the account's uid now."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{pid}").st_uid == account.uid:
                    found.append(int(pid))
            except FileNotFoundError:
                continue  # ended between the two looks
        return found


if __name__ == "__main__":
    # `python -m tests.site sweep` takes back what dead sessions left.
    if sys.argv[1:] != ["sweep"]:
        sys.exit("usage: python -m tests.site sweep")
    sweep_dead()
