"""Where one try of one attack takes place: what the pilot has to lose, the wrapper between, and the ways to start things."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nodewrap.audit.log import entries, lines
from nodewrap.escape.model import Caller, Seen
from nodewrap.escape.wrappers import PATH, PYTHON, Wrapper

#: {surface: code of its payloads}, read before anything is mounted: an attack may hide the place where this package is.
HOSTILE = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).with_name("hostile").glob("*.py")}


class NotRunError(Exception):
    """The wrapper did not start the payload, where that is no answer to the attack: policy, a broken installation, a full node."""


@dataclass(frozen=True)
class Ran:
    """A wrapped command that has ended. rc: exit status, -n for signal n, None when it had to be killed. started: the wrapper said that the payload
    started (always true for those that tell nothing). events: of --status-fd."""

    rc: int | None
    out: bytes
    err: bytes
    seconds: float
    started: bool
    events: tuple[dict[str, Any], ...] = ()

    @property
    def text(self) -> str:
        return self.out.decode("utf-8", "backslashreplace").strip()

    @property
    def line(self) -> str:
        """For Seen.what: what it said, short."""
        said = self.text or self.err.decode("utf-8", "backslashreplace").strip()
        return f"{' '.join(said.split())[:160]!r}, status {self.rc}"


class Live:
    """A wrapped command that runs. process: the wrapper's. started: as Ran has it, once that is known."""

    started: bool | None = None

    def __init__(self, process: subprocess.Popen[bytes], status: int, begun: Path | None = None) -> None:
        """begun: a file that the payload's start fills, for wrappers that tell nothing."""
        self.process, self._status, self._began, self._told, self._begun = process, status, time.monotonic(), b"", begun

    def pid(self, seconds: float = 10.0) -> int:
        """The payload's, seen from outside. For wrappers that tell none: their own. Raises NotRunError."""
        if self._status < 0:
            return self.process.pid
        os.set_blocking(self._status, False)
        end = time.monotonic() + seconds
        while b"\n" not in self._told and self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                self._told += os.read(self._status, 65536)
            time.sleep(0.002)
        first = [event for event in _events(self._told) if event.get("event") == "started"]
        self.started = bool(first)
        if not first:
            raise NotRunError("the payload did not start")
        return int(first[0]["pid"])

    def hear(self, seconds: float = 10.0) -> str:
        """The next line that the payload says, "" when none came in time."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline().decode("utf-8", "backslashreplace").strip() if ready else ""

    def end(self, stdin: bytes | None = None, seconds: float = 15.0) -> Ran:
        """Wait for its end; killed when it takes longer. Its output since the last hear()."""
        rc: int | None
        try:
            out, err = self.process.communicate(stdin, seconds)
            rc = self.process.returncode
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            rc = None
        told: list[dict[str, Any]] = []
        self.started = self._begun is None or not self._begun.exists() or self._begun.stat().st_size > 0
        if self._status >= 0:
            os.set_blocking(self._status, False)  # whatever outlives the wrapper is not waited for
            with contextlib.suppress(BlockingIOError):
                while more := os.read(self._status, 65536):
                    self._told += more
            os.close(self._status)
            told, self._status = _events(self._told), -1
            self.started = any(event.get("event") == "started" for event in told)
        return Ran(rc, out or b"", err or b"", time.monotonic() - self._began, self.started, tuple(told))

    def kill(self) -> None:
        """KILL for the wrapper and its session, as a batch system does."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


def _events(told: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in told.split(b"\n")[:-1]]


@dataclass
class Arena:
    """wrapper: what stands between; control: it is one that protects nothing. caller: the pilot. home: an empty directory of the pilot's, 0755, that
    no profile shows. work: the work directory, below it, the pilot's. nonce: fresh, 32 hex digits; success is that it was read, or that something of
    root's changed. other: uid and gid of an account of payloads, None where the suite has none. audit: the node's log, "" where there is none.
    refusal: as Attack.refusal."""

    wrapper: Wrapper
    control: bool
    caller: Caller
    home: Path
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    other: tuple[int, int] | None = None
    audit: str = ""
    refusal: bool = False
    _undo: list[Callable[[], object]] = field(default_factory=list)
    _lives: list[Live] = field(default_factory=list)
    _offset: int = 0

    def __post_init__(self) -> None:
        self.work = self.home / "work"
        self.mkdir(self.work, 0o755)
        if self.wrapper.work:
            os.chown(self.work, *self.wrapper.work, follow_symlinks=False)
        self._offset = self._size()

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0

    def like(self, wrapper: Wrapper | None = None, work: Path | None = None) -> Arena:
        """The same arena with another wrapper or work directory; what is undone for one is undone for both."""
        other = copy.copy(self)
        other.wrapper, other.work = wrapper or self.wrapper, work or self.work
        return other

    # ---- what the pilot has ----

    def own(self, path: Path | str) -> None:
        """Give it to the pilot."""
        if self.is_root:
            os.chown(path, self.caller.uid, self.caller.gid, follow_symlinks=False)

    def mkdir(self, path: Path, mode: int = 0o700) -> Path:
        with self.as_caller():
            path.mkdir()
            path.chmod(mode)
        return path

    @contextlib.contextmanager
    def as_caller(self) -> Iterator[None]:
        """With the pilot's rights to files: what is made below a directory of the pilot's can then be nobody else's."""
        if not self.is_root:
            yield
            return
        os.setegid(self.caller.gid)
        os.seteuid(self.caller.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)

    def secret(self, path: Path | None = None, mode: int = 0o600) -> Path:
        """A file of the pilot's with the nonce in it."""
        path = path or self.home / "secret"
        with self.as_caller():
            path.write_text(self.nonce)
            path.chmod(mode)
        self.undo(lambda: path.unlink(missing_ok=True))
        return path

    def has_nonce(self, ran: Ran) -> Seen:
        """Reached: the nonce is in what the payload said."""
        at = ran.out.find(self.nonce.encode())
        near = replace(ran, out=ran.out[max(at - 60, 0):at + 80]) if at >= 0 else ran
        return Seen(at >= 0, near.line.replace(self.nonce, "(the nonce)"))

    # ---- starting things ----

    def begin(
        self, *command: str, env: Mapping[str, str] | None = None, options: Sequence[str] = (), fds: Sequence[int] = (), as_is: bool = False,
        before: Sequence[str] = (), **popen: Any,
    ) -> Live:
        """Start a command through the wrapper, as the caller. options: of ``nodewrap run`` (other wrappers take none). as_is: command is the whole
        argv, nothing is put before it. before: what executes that argv, its last words, in the caller's place. popen: of subprocess.Popen."""
        reader = writer = -1
        if self.wrapper.status and not as_is:
            reader, writer = os.pipe()
            options = ["--status-fd", str(writer), *options]
        begun = None
        if self.wrapper.protects and not self.wrapper.status and not as_is:
            begun = self.work / f".begun-{secrets.token_hex(4)}"
            with contextlib.nullcontext() if self.wrapper.work else self.as_caller():
                begun.touch()
                begun.chmod(0o666)
            command = ("/bin/sh", "-c", 'echo begun >"$0" && exec "$@"', str(begun), *command)
        argv = list(command) if as_is else self.wrapper.argv(command, str(self.work), options)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        more = {**pipes, "bufsize": 0, "cwd": str(self.work), "start_new_session": True, **self._ids(), **popen}
        passed = [fd for fd in (*fds, writer) if fd >= 0]
        try:
            process = subprocess.Popen([*before, *argv], env=self.environment(env), pass_fds=passed, **more)
        finally:
            if writer >= 0:
                os.close(writer)
        live = Live(process, reader, begun)
        self._lives.append(live)
        self.undo(live.kill)
        return live

    def run(self, *command: str, stdin: bytes = b"", seconds: float = 15.0, refusal: bool | None = None, **more: Any) -> Ran:
        """begin() and its end. refusal: it is an answer that the payload did not start (default: as for the attack); else that raises NotRunError."""
        ran = self.begin(*command, **more).end(stdin, seconds)
        if not ran.started and not (self.refusal if refusal is None else refusal):
            raise NotRunError(f"the payload did not start: {ran.line}")
        return ran

    def exercised(self, seen: Seen) -> Seen:
        """What was seen. Raises NotRunError where nothing was reached because none of the try's payloads started, and that is no answer."""
        if not seen.reached and not self.refusal and self._lives and all(live.started is False for live in self._lives):
            raise NotRunError(f"no payload started: {seen.what}")
        return seen

    def payload(self, surface: str, function: str, *words: object, **more: Any) -> Ran:
        """Run a function of hostile/SURFACE.py in a payload: run() of it."""
        return self.run(*hostile(surface, function, *words), **more)

    def begin_payload(self, surface: str, function: str, *words: object, **more: Any) -> Live:
        return self.begin(*hostile(surface, function, *words), **more)

    def accomplice(self, surface: str, function: str, *words: object, wait: bool = True, **popen: Any) -> Live:
        """A process of the pilot's outside of any wrapper, to the end of the try. It says one line when it is ready, which is awaited."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        more = {**pipes, "bufsize": 0, "cwd": str(self.home), "env": self.environment(None), "start_new_session": True, **self._ids(bare=True)}
        live = Live(subprocess.Popen(hostile(surface, function, *words), **{**more, **popen}), -1)
        self.undo(live.kill)
        if wait and (said := live.hear()) != "ready":
            raise RuntimeError(f"{function}: {said or live.end(seconds=1)}")
        return live

    def environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {"PATH": PATH, "HOME": self.caller.home, "USER": self.caller.name, "LC_ALL": "C.UTF-8", **(more or {})}

    def _ids(self, bare: bool = False) -> dict[str, Any]:
        if not self.is_root:
            return {}
        if bare or self.wrapper.uid is None:
            return {"user": self.caller.uid, "group": self.caller.gid, "extra_groups": list(self.caller.groups)}
        return {"user": self.wrapper.uid, "group": self.wrapper.gid, "extra_groups": []}

    # ---- evidence ----

    def records(self) -> list[dict[str, Any]]:
        """The audit records written since this try began, in order; [] where the log may not be read."""
        if not self.audit or not os.access(self.audit, os.R_OK):
            return []
        with open(self.audit, "rb") as file:
            file.seek(self._offset)
            return [entry.record for entry in entries(lines(file)) if entry.record]

    def _size(self) -> int:
        return os.path.getsize(self.audit) if self.audit and os.access(self.audit, os.R_OK) else 0

    def until(self, condition: Callable[[], object], seconds: float = 5.0) -> bool:
        """Wait for it to become true; whether it did."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    # ---- taking it back ----

    def undo(self, work: Callable[[], object]) -> None:
        """Do this when the try is over, last first."""
        self._undo.append(work)

    @contextlib.contextmanager
    def open_(self) -> Iterator[Arena]:
        """The try; afterwards everything is taken back."""
        try:
            yield self
        finally:
            while self._undo:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    self._undo.pop()()


def hostile(surface: str, function: str, *words: object) -> list[str]:
    """argv that runs that function, wherever it is executed. Words are passed as text."""
    source = "\n".join(HOSTILE[name] for name in ("common", surface))
    source = re.sub(r"^from nodewrap\.escape\.hostile\.common import .*\n", "", source, flags=re.MULTILINE)  # it stands above
    return [PYTHON, "-I", "-c", f"{source}\nrun_main()\n", function, *map(str, words)]


def remove(top: Path) -> None:
    """A tree that hostile code had in hand: its directories may be closed, its names odd, its depth any; rm(1) copes with all of it."""
    subprocess.run(["/bin/rm", "-rf", "--", str(top)], check=False, stderr=subprocess.DEVNULL)
    if top.exists():
        subprocess.run(["/bin/chmod", "-R", "u+rwx", "--", str(top)], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(top, ignore_errors=True)
