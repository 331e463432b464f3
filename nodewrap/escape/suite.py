"""The suite: each attack bare first, then against each configuration, judged, and the node looked at after every run."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nodewrap.audit.log import entries, lines, run_of
from nodewrap.doctor.node import distrust
from nodewrap.escape import needs
from nodewrap.escape.arena import Arena, remove
from nodewrap.escape.attempt import Try, adopt_orphans, attempt
from nodewrap.escape.judge import DIRECTORY, Ids, litter, record_flaws, snapshot
from nodewrap.escape.model import LEFT_OUT, Attack, Caller, Configuration, Outcome, Result, catalogue
from nodewrap.escape.wrappers import Wrapper, controls, nodewrap
from nodewrap.guard import Guard, Range, parse_guard


class SuiteError(Exception):
    """Why the suite cannot run: one line with its NW- code and the next step."""


@dataclass
class Suite:
    """caller: the pilot. home: a directory to work in; root's all the way when we are root. other: uid and gid of a payload account.
    delegated: subordinate ids of the pilot's. tell: called with each result as it comes."""

    caller: Caller
    home: Path
    other: tuple[int, int] | None = None
    delegated: tuple[Range, ...] = ()
    tell: Callable[[Result], None] = lambda result: None
    _controls: dict[str, Try] = field(default_factory=dict)
    _tried: set[str] = field(default_factory=set)
    _top: Path | None = None
    _lock: int = -1
    _number: int = 0

    # ---- the directory of this run ----

    def __enter__(self) -> Suite:
        """One suite at a time for each caller: the lock is on the directory that both would work in. Raises SuiteError."""
        adopt_orphans()
        why = distrust(str(self.home), 0) if os.geteuid() == 0 else ""
        if why:  # root removes trees below it: nobody else may put a link in the way
            raise SuiteError(f"NW-ESCAPE-HOME: {why}; next: --home DIR, a directory that is root's all the way, as the default is")
        self._lock = os.open(self.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise SuiteError(f"NW-ESCAPE-BUSY: another escape-test runs in {self.home}; next: wait for it, or give another --home") from None
        for old in self.home.glob(f"{DIRECTORY}*"):  # a suite that was killed
            remove(old)
        self._top = self.home / f"{DIRECTORY}{secrets.token_hex(6)}"
        self._top.mkdir()
        self._top.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        if self._top:
            remove(self._top)
        os.close(self._lock)

    # ---- running ----

    def run(self, chosen: Iterable[Attack], configurations: list[Configuration]) -> list[Result]:
        """Every attack against every configuration, attack by attack. Raises KeyboardInterrupt as it comes, with the node clean."""
        results = []
        for attack in chosen:
            tried = attack.once_in_all and attack.id in self._tried
            for at in configurations:
                if not attack.only(at) or (tried and (attack.once or attack.once_in_all)):
                    continue
                tried = True
                self._tried.add(attack.id)
                results.append(self.one(attack, nodewrap(at)))
                self.tell(results[-1])
        return results

    def against(self, chosen: Iterable[Attack], wrappers: list[Wrapper]) -> list[Result]:
        """The same against peers."""
        results = []
        for attack in chosen:
            for wrapper in wrappers if attack.peers else ():
                results.append(self.one(attack, wrapper))
                self.tell(results[-1])
        return results

    def one(self, attack: Attack, wrapper: Wrapper) -> Result:
        """The control (once for the whole suite), then the attack."""
        result = Result(attack.id, wrapper.name, Outcome.NOT_EXERCISED)
        why = needs.missing(attack, self.other is not None)
        if why:
            result.seen = why
            return result
        control = self._control(attack)
        result.control = control.error or (control.seen.what if control.seen else "")
        if control.seen is None or not control.seen.reached:
            result.outcome = Outcome.BROKEN if control.error.startswith("broken") else Outcome.NOT_EXERCISED
            result.seen = f"its control did not succeed: {result.control}"
            return result
        return self._judged(attack, wrapper, result)

    def _control(self, attack: Attack) -> Try:
        if attack.id not in self._controls:
            wrapper = controls(self.caller, self.other)[attack.control]
            for _ in range(2):  # one that was late proves nothing
                tried = self._controls[attack.id] = attempt(attack, self._arena(attack, wrapper, ""), settle=False)
                self._tidy()
                if tried.seen and tried.seen.reached:
                    break
        return self._controls[attack.id]

    def _judged(self, attack: Attack, wrapper: Wrapper, result: Result) -> Result:
        at = wrapper.configuration
        guard = read_guard(at.guard) if at else Guard()
        ids = Ids(guard, self.caller.uid, (*self.delegated, *([Range(self.other[0], self.other[0])] if self.other else [])))
        before, offset = snapshot(ids, guard.state), _size(guard.audit)
        tried = attempt(attack, self._arena(attack, wrapper, guard.audit), settle=True)
        self._tidy()
        result.seconds = tried.seconds
        records = _records(guard.audit, offset)
        runs = {run_of(one) for one in records} if os.geteuid() == 0 or os.access(guard.audit, os.R_OK) else None
        result.litter = tried.left + litter(before, ids, guard.state, runs) + record_flaws(records)
        result.accepted = attack.opening(at) if at else ""
        if tried.seen is None:
            result.seen = tried.error
            result.outcome = Outcome.BROKEN if tried.error.startswith("broken") else Outcome.NOT_EXERCISED
            return result
        result.seen = tried.seen.what
        result.outcome = Outcome.LEAKED if tried.seen.reached else Outcome.DIRTY if result.litter else Outcome.BLOCKED
        return result

    def _arena(self, attack: Attack, wrapper: Wrapper, audit: str) -> Callable[[], Arena]:
        """Made in the try's own process."""
        assert self._top is not None
        self._number += 1
        home = self._top / f"{self._number}"

        def make() -> Arena:
            home.mkdir()
            home.chmod(0o755)
            if os.geteuid() == 0:
                os.chown(home, self.caller.uid, self.caller.gid)
            return Arena(wrapper, not wrapper.protects, self.caller, home, other=self.other, audit=audit, refusal=attack.refusal)

        return make

    def _tidy(self) -> None:
        """What tries left in our own directory: their arenas. Nothing else is removed: litter is evidence."""
        assert self._top is not None
        for old in self._top.iterdir():
            remove(old)


def read_guard(path: str) -> Guard:
    """Raises OSError, GuardError."""
    return parse_guard(Path(path).read_bytes())


def _size(path: str) -> int:
    return os.path.getsize(path) if path and os.access(path, os.R_OK) else 0


def _records(path: str, offset: int) -> list[dict[str, object]]:
    if not path or not os.access(path, os.R_OK):
        return []
    with open(path, "rb") as file:
        file.seek(offset)
        return [entry.record for entry in entries(lines(file)) if entry.record]


def not_played() -> Iterator[Result]:
    """The catalogue's other attacks, with the reason."""
    for key in catalogue():
        if key in LEFT_OUT:
            yield Result(key, "-", Outcome.NOT_EXERCISED, LEFT_OUT[key])
