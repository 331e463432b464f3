"""``nodewrap policyd``: the policy child kept resident, for sites where the interpreter's start per run matters (`policyd` in the guard).

Three kinds of process. The *parent* binds and listens, so that SO_PEERCRED shows the launcher root's own uid (unix(7): the credentials of listen(2)),
then has no rights left and only waits, to remove the socket in the end. The *pool*, under the policy child's uid and a filter, holds everything
imported and the policy, and forks *workers* ahead of need. A worker serves one request (two callers never meet in one process) by the code of a
spawned child, nodewrap/serve.py, and is ended by the pool when requests pause. Neither parent nor pool reads a byte of a request.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import grp
import os
import pwd
import resource
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import prctl

from nodewrap import apptainer as _warm  # noqa: F401  loaded here, not in each worker
from nodewrap import credentials, serve, wire
from nodewrap.doctor.node import distrust
from nodewrap.guard import Guard, GuardError, parse_guard

#: What serve.serve wants to be given: policy, second filter, credentials package.
Loaded = tuple[dict[str, Any], bytes, object]
WORKERS = 4
#: Workers at most, idle and busy: a pilot that stops its launchers in the middle of an exchange holds as many until their deadline.
MOST = 128
BACKLOG = 1024
#: Seconds before a worker that died on its own is replaced.
PAUSE = 0.05
#: Beside a run that is just starting a fork and a rehearsal cost it 0.7 ms on two processors, and the end of a worker 0.2: both wait for so many
#: ms without a request while workers are left.
SOON_MS = 20
#: What a worker tells.
TAKEN, DONE = b"t", b"d"
#: As become_child() in csrc/child.c.
LIMITS = ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, 1 << 30))
WORKER_FILES = 64
#: CPython specialises code that ran some times (PEP 659), once for all workers.
REHEARSALS = 30
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


class PolicydError(Exception):
    """Why policyd cannot run: one line that begins with its code."""


def wrong(text: str) -> PolicydError:
    return PolicydError(f"NW-POLICYD: {text}")


# ---- the parent ----


def run(guard_path: str, workers: int = WORKERS) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. Raises PolicydError when it cannot begin, or when the pool dies."""
    guard = read_guard(guard_path)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with only_one(guard.policyd) as lock, listen(guard.policyd) as listening:
        hold = start_pool(guard, workers, listening, lock)
        listening.close()
        give_up_capabilities()
        announce()
        try:
            got = signal.sigwait(SIGNALS)
        finally:
            with contextlib.suppress(FileNotFoundError):  # removed by hand: as wanted
                os.unlink(guard.policyd)
        if got == signal.SIGCHLD:
            raise wrong("its pool died; see the messages before this one, and the kernel's log for SIGSYS")
        os.close(hold)  # the pool finishes what it has; if it does not, our end is its end (PR_SET_PDEATHSIG)
        signal.sigtimedwait({signal.SIGCHLD}, guard.deadline_ms / 1000 + 2)


def trusted_guard(path: str) -> Guard:
    """The guard, when a service may rely on it. Raises PolicydError."""
    why = distrust(path, os.geteuid())
    if why:
        raise wrong(f"{why}; correct it, or name the guard with --guard")
    try:
        with open(path, "rb") as file:
            return parse_guard(file.read())
    except (OSError, GuardError) as error:
        raise wrong(f"{path}: {error}") from None


def read_guard(path: str) -> Guard:
    """The guard, when it names what policyd needs. Raises PolicydError."""
    guard = trusted_guard(path)
    if not guard.policyd:
        raise wrong(f"{path} has no line 'policyd SOCKET'; add it, then start again")
    if (os.geteuid() == 0) != (guard.launcher != "userns"):
        raise wrong(f"{path} names the {guard.launcher} launcher: run policyd as {'its user' if guard.launcher == 'userns' else 'root'}")
    return guard


@contextlib.contextmanager
def only_one(path: str) -> Iterator[int]:
    """Hold the lock beside the socket; its directory is made when only that is missing. Raises PolicydError."""
    directory = os.path.dirname(path)
    try:
        if not os.path.isdir(directory):
            os.mkdir(directory, 0o755)
        why = distrust(directory, os.geteuid())
        if why:
            raise wrong(f"{why}; whoever may write there could answer in our place")
        lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise wrong(f"{path} is served by another policyd; stop that one first") from None
    except OSError as error:
        raise wrong(f"{error.filename or path}: {error.strerror}; correct policyd in the guard") from None
    try:
        yield lock
    finally:
        os.close(lock)


def listen(path: str, kind: int = socket.SOCK_STREAM, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket under ``path``, mode 0600. It is renamed there when it listens: a dead one's place is taken in one step."""
    new = path + ".new"
    made = socket.socket(socket.AF_UNIX, kind)
    try:
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise wrong(f"{path} is there and is no socket; correct policyd in the guard")
        if os.path.lexists(new):
            os.unlink(new)
        mask = os.umask(0o177)
        made.bind(new)
        os.umask(mask)
        made.listen(backlog)
        os.rename(new, path)
    except OSError as error:
        raise wrong(f"{path}: {error}; correct policyd in the guard") from None
    return made


def start_pool(guard: Guard, workers: int, listening: socket.socket, lock: int) -> int:
    """Fork the pool. Returns a descriptor whose closing ends it."""
    policy = Policy(guard.policy)
    try:
        policy.refresh()
        with open(guard.policy + "/policyd.bpf", "rb") as file:
            program = file.read()
    except (OSError, ValueError) as error:
        raise wrong(f"{guard.policy}: {error}; run 'nodewrap policy apply'") from None
    held, hold = os.pipe()
    if os.fork() == 0:
        os.close(lock)
        os.close(hold)
        be_pool(Pool(guard, workers, listening, held, policy), program)
    os.close(held)
    return hold


def give_up_capabilities() -> None:
    """Root without capabilities may still unlink in its own directory, which is all that is left to do."""
    prctl.set_dumpable(0)
    prctl.set_name("nw-policyd")
    if os.geteuid() == 0:
        prctl.capbset.limit()
        prctl.cap_inheritable.limit()
        prctl.cap_effective.limit()
        prctl.cap_permitted.limit()


def announce() -> None:
    """Tell systemd that connections are taken (sd_notify(3), Type=notify)."""
    where = os.environ.pop("NOTIFY_SOCKET", "")
    if where:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(b"READY=1", "\0" + where[1:] if where[0] == "@" else where)


# ---- the pool ----


class Policy:
    """The applied policy as last read. directory: the guard's; stamp: which file it was."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.stamp: tuple[int, ...] = ()
        self.read: tuple[dict[str, Any], bytes] = ({}, b"")

    def refresh(self) -> None:
        """Read it again if another one is in force. Raises OSError, ValueError, and is then empty."""
        info = os.stat(self.directory + "/policy.bin")
        stamp = (info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size)
        if stamp != self.stamp:
            self.stamp = ()
            self.read = serve.read_policy(self.directory)
            self.stamp = stamp

    def lenient(self, hello: serve.Hello) -> Loaded:
        """For a rehearsal: the policy with everybody let in, so that it goes all the way to a permit. The other rules stay, for what they load."""
        policy: dict[str, Any] = self.read[0]
        site = {**policy["site"], "closed": "", "multi_user": True, "unmet": [], "minimum_assurance": 0}
        callers = [{**entry, "uid": [[0, 1 << 32]], "vo": []} for entry in policy["callers"][:1]]
        plain = {"when": {}, "unmet": [], "not_before": 0, "expires": 0, "image": {}}  # nobody is there to open an image
        rules = [{**rule, **plain} for rule in policy["rules"][:1]] + policy["rules"]
        self.load(hello)
        return {**policy, "site": site, "callers": callers, "rules": rules, "stances": []}, self.read[1], None

    def load(self, hello: serve.Hello) -> Loaded:
        """What serve.load_policy gives: the policy that is in force now, in the directory that the guard names now."""
        if hello.policy != self.directory:
            return serve.load_policy(hello)
        self.refresh()
        return (*self.read, credentials if hello.credentials else None)


class Pool:
    """Workers by the descriptor on which they tell: a byte when they took a request, another one when they have answered, its end when they ended."""

    def __init__(self, guard: Guard, want: int, listening: socket.socket, held: int, policy: Policy) -> None:
        self.guard, self.want, self.listening, self.held, self.policy = guard, want, listening, held, policy
        self.peers = {0, os.geteuid()}
        self.deadline = guard.deadline_ms / 1000
        self.pids: dict[int, int] = {}
        self.taken: dict[int, float] = {}
        self.done: set[int] = set()
        self.poll = select.poll()

    def serve(self) -> None:
        """Until told to end and nobody waits any more."""
        self.poll.register(self.held, select.POLLIN)
        while self.want or self.pids:
            heard = self.poll.poll(SOON_MS if self._short() > 0 or self.done else 1000)
            for told, _ in heard:
                if told == self.held:
                    self._end()
                else:
                    self._hear(told)
            if not heard or self._short() > self.want // 2:
                self._end_done()
                self._fill()
            self._kill_overdue()

    def _short(self) -> int:
        """How many workers are missing."""
        return min(self.want - (len(self.pids) - len(self.taken)), MOST - (len(self.pids) - len(self.done)))

    def _fill(self) -> None:
        while self._short() > 0:
            if not self._fork():
                time.sleep(PAUSE)
                return

    def _fork(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # no policy: the worker will tell the caller so, by the same check
            self.policy.refresh()
        told, tell = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(told)
            pid = -1
        if pid == 0:
            be_worker(self, tell)
        os.close(tell)
        if pid > 0:
            self.pids[told] = pid
            self.poll.register(told, select.POLLIN)
        return pid > 0

    def _hear(self, told: int) -> None:
        """Whoever tells something else, or twice, is ended: it was taken over by what it read, and would keep the pool busy, or its own place."""
        said = os.read(told, 1)
        if said == TAKEN and told not in self.taken:
            self.taken[told] = time.monotonic()
        elif said == DONE and told in self.taken and told not in self.done:
            self.done.add(told)
        elif self._forget(told) is None:
            self._died_idle()

    def _forget(self, told: int) -> float | None:
        """A worker that has ended, took its end of the pipe away, or has no more to do; when it took its request."""
        self.poll.unregister(told)
        os.close(told)
        pid = self.pids.pop(told)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.done.discard(told)
        return self.taken.pop(told, None)

    def _end_done(self) -> None:
        for told in list(self.done):
            self._forget(told)

    def _died_idle(self) -> None:
        """While ending: it found nobody waiting. Else it was killed, and perhaps the next one will be: not in a tight loop."""
        if self.held < 0:
            self.want = 0
        else:
            time.sleep(PAUSE)

    def _end(self) -> None:
        """No new connections; idle workers take what is queued, and when the queue is empty their accept() fails (EINVAL)."""
        self.poll.unregister(self.held)
        self.held = -1
        self.listening.shutdown(socket.SHUT_RDWR)

    def _kill_overdue(self) -> None:
        """The launcher has given up on it by then (deadline-ms)."""
        late = time.monotonic() - self.deadline
        for told, since in self.taken.items():
            if since < late:
                os.kill(self.pids[told], signal.SIGKILL)


def be_pool(pool: Pool, program: bytes) -> NoReturn:
    """The pool's process: rights given away for good, then the loop. Ends 0 after a clean end."""
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        drop(pool.guard.child)
        for which, most in LIMITS:
            resource.setrlimit(which, (most, most))
        warm()
        null = os.open(os.devnull, os.O_RDWR)
        serve.lock(program)
        for _ in range(REHEARSALS):
            rehearse(pool)
        quiet(null)
        gc.freeze()  # workers share these pages: a collection would copy them all
        gc.disable()
        pool.serve()
        os._exit(0)
    except Exception as error:  # noqa: BLE001  it must end here, and not in a copy of the parent
        os.write(2, f"nodewrap: NW-POLICYD: the pool: {error!r}\n".encode())
    finally:
        os._exit(1)


def drop(ids: tuple[int, int] | None) -> None:
    """Become the policy child's account for good, proved (I5); then nothing executed could give anything back."""
    if ids and os.geteuid() == 0:
        prctl.capbset.limit()
        os.setgroups([])
        os.setresgid(ids[1], ids[1], ids[1])
        os.setresuid(ids[0], ids[0], ids[0])
        with contextlib.suppress(PermissionError):
            os.setuid(0)
            os.abort()
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)
    prctl.set_name("nw-pool")
    die_with_parent()


def die_with_parent() -> None:
    """After a change of ids, which clears it (prctl(2)). A parent that died before is seen by the end of its pipe, or here."""
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


def warm() -> None:
    """Account look-ups load their modules at first use (nsswitch.conf(5))."""
    pwd.getpwuid(0)
    grp.getgrgid(0)
    os.getgrouplist("root", 0)


def rehearse(pool: Pool) -> None:
    """Answer a made-up request. After a fork a first answer takes 1.4 ms, most of it for the pages that it copies, a second one 0.4."""
    us, launcher = socket.socketpair()
    with us, launcher:
        who: list[tuple[int, object]] = [(2, os.getuid()), (3, os.getgid())]
        wire.send(launcher, wire.HELLO, [(1, serve.VERSION), *who, (4, 0), (5, pool.policy.directory)])
        argv = [(10, word) for word in ("nodewrap", "run", "--declare", "subject=/CN=x", "--declare", "vo=x", "--", "/bin/true")]
        env = [(11, entry) for entry in ("PATH=/usr/bin:/bin", "HOME=/", "LC_ALL=C.UTF-8", "USER=x", "PWD=/")]
        text: list[tuple[int, object]] = [(8, "/"), (9, 0o22), *argv, *env, (12, "x"), (13, "x"), (14, time.time_ns() // 1000), (15, "x")]
        wire.send(launcher, wire.REQUEST, [(1, 1), (2, pool.guard.launcher), *((tag + 1, value) for tag, value in who), (6, 1), (7, 1), *text])
        if peer_uid(us) == os.getuid():  # the same steps as in be_worker()
            serve.serve(us, pool.policy.lenient, lock_nothing)
        wire.receive(launcher, wire.DECISION)


def lock_nothing(program: bytes) -> None:
    """The way to the lock, for a rehearsal: of no program the kernel says EINVAL (seccomp(2)), and everything stays as it is."""
    with contextlib.suppress(OSError):
        serve.lock(b"")


def quiet(null: int) -> None:
    for number in range(3):
        os.dup2(null, number)
    os.close(null)


# ---- a worker ----


def be_worker(pool: Pool, tell: int) -> NoReturn:
    """One request, then the end. EINVAL of accept(): the pool is ending."""
    try:
        die_with_parent()
        prctl.set_name("nw-worker")
        for other in pool.pids:
            os.close(other)
        resource.setrlimit(resource.RLIMIT_NOFILE, (WORKER_FILES, WORKER_FILES))
        seconds = int(pool.deadline) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        rehearse(pool)
        credentials.warm()  # 1.8 ms of a verification's 10
        sock, _ = pool.listening.accept()
        os.write(tell, TAKEN)
        pool.listening.close()
        if peer_uid(sock) in pool.peers:
            serve.serve(sock, pool.policy.load)
            os.write(tell, DONE)
            select.poll().poll(int(pool.deadline * 1000))  # until the pool ends it; time.sleep() is select(2) before Python 3.11, which is locked
            os._exit(0)
    except (wire.WireError, OSError):
        pass  # the launcher hung up, or we are ending: nothing to tell, and nobody to tell it to
    finally:
        os._exit(1)


def peer_uid(sock: socket.socket) -> int:
    """Effective uid of who connected (unix(7), SO_PEERCRED: struct ucred is pid, uid, gid)."""
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
