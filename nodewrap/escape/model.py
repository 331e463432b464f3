"""What the suite is about: attacks, what they ran against, and what came of it."""

from __future__ import annotations

import csv
import enum
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nodewrap.doctor.probe import landlock_abi

if TYPE_CHECKING:
    from nodewrap.escape.arena import Arena

SURFACES = {
    "A": "helper invocation", "B": "identity", "C": "processes", "D": "files and cleanup", "E": "IPC and terminals", "F": "kernel and namespaces",
    "G": "network", "H": "credentials", "I": "audit", "J": "resource exhaustion", "K": "policy and configuration",
}
MODULES = {
    "A": "a_invocation", "B": "b_identity", "C": "c_processes", "D": "d_files", "E": "e_ipc", "F": "f_kernel", "G": "g_network", "H": "h_credentials",
    "I": "i_audit", "J": "j_exhaustion", "K": "k_policy",
}


class Outcome(enum.Enum):
    """Of one attack in one configuration. BROKEN: the suite's own code failed, which proves nothing and counts as a failure."""

    BLOCKED = "blocked"
    LEAKED = "leaked"
    DIRTY = "dirty"
    NOT_EXERCISED = "not exercised"
    BROKEN = "broken"


class Caller(NamedTuple):
    """The account that calls the wrapper: the pilot. groups: supplementary gids."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True)
class Configuration:
    """One nodewrap to attack. binary: the command that pilots call. mode: switch, map or log-only. kind: how the report names it (the mode, or a
    variant of it such as "block"). who: options of ``nodewrap run`` that say who the payload's user is. guard: its guard file.
    delegated: with the userns launcher, mapped payloads are in the caller's range of subordinate ids."""

    launcher: str
    mode: str
    profile: str
    binary: str
    guard: str
    who: tuple[str, ...] = ()
    kind: str = ""
    delegated: bool = False

    @property
    def name(self) -> str:
        return f"{self.launcher}/{self.kind or self.mode}/{self.profile}"

    @property
    def is_pilots_id(self) -> bool:
        """The payload has the pilot's own uid for the kernel."""
        return self.mode == "log-only" or (self.launcher == "userns" and not self.delegated)


class Seen(NamedTuple):
    """What the outside judge saw. reached: the attack's aim was reached. what: one line of evidence. Control and attack say it alike."""

    reached: bool
    what: str


@dataclass(frozen=True)
class Accepted:
    """A documented opening: it stands in SECURITY.md under this key. applies: the configurations that have it."""

    key: str
    applies: Callable[[Configuration], bool]


#: What the documentation says is open; the keys are those of SECURITY.md, "Accepted risks".
BARE_PROFILE = Accepted("profile-none", lambda at: at.profile == "none")
HOST_NETWORK = Accepted("host-network", lambda at: at.profile in ("batch", "compat", "none"))
NESTED_NAMESPACES = Accepted("nested-namespaces", lambda at: at.profile in ("batch", "compat", "none"))
#: They need ABI 6 of Landlock there (docs/isolation.md).
ABSTRACT_SOCKETS = Accepted("abstract-sockets", lambda at: at.profile == "none" or (at.profile in ("batch", "compat") and landlock_abi() < 6))
#: Landlock's "files" closes it in strict, from ABI 2 on; it cannot be had with namespaces of the payload's own.
PASSED_DESCRIPTOR = Accepted("passed-descriptor", lambda at: at.profile in ("batch", "compat", "none") or landlock_abi() < 2)
#: The kernel counts for the owner of the user namespace too, and that is the pilot under the userns launcher.
SHARED_COUNTERS = Accepted("shared-counters", lambda at: at.is_pilots_id or at.launcher == "userns")
#: Without privilege queues have no names there (docs/isolation.md).
QUEUES_UNSEEN = Accepted("queues-unseen", lambda at: at.profile == "none" and at.launcher == "userns" and not os.path.ismount("/dev/mqueue"))
SAME_ID_BARE = Accepted("same-id-none", lambda at: at.profile == "none" and at.is_pilots_id)
SHARED_ID_BARE = Accepted("shared-id-none", lambda at: at.profile == "none" and (at.is_pilots_id or at.launcher == "userns"))
FILE_LOCKS = Accepted("file-locks", lambda at: True)
PILOTS_GROUP = Accepted("pilots-group", lambda at: at.profile in ("batch", "compat") and at.launcher == "userns" and at.is_pilots_id)
PILOTS_PROCESSES = Accepted("pilots-processes", lambda at: at.is_pilots_id or at.launcher == "userns")
OWN_LAUNCHER = Accepted("own-launcher", lambda at: at.launcher == "userns")
PILOTS_LOG = Accepted("pilots-own-log", lambda at: at.launcher == "userns" and at.is_pilots_id and at.profile != "strict")
PILOT_IN_MAP = Accepted("pilot-in-map", lambda at: at.launcher == "userns")
SUPPLEMENTARY_GROUPS = Accepted("supplementary-groups", lambda at: at.mode == "log-only" or at.launcher == "userns")
#: Which connections are the run's own cannot be told there; strict refuses the user namespace that it takes.
OWN_SERVER = Accepted("own-fuse-server", lambda at: at.is_pilots_id and at.profile != "strict")
#: A pipe as stdin is handed over: what was taken of it too early could not be given back to the pilot.
PIPE_FLAGS = Accepted("pipes-as-stdio", lambda at: True)
PIPE_OF_THE_SAME_ID = Accepted("pipes-as-stdio", lambda at: at.is_pilots_id)
WATCHED_DIRECTORIES = Accepted("watched-directories", lambda at: True)
MEMORY_FILES = Accepted("memory-files", lambda at: True)
BAN_AT_NEXT_START = Accepted("ban-at-next-start", lambda at: True)


class Row(NamedTuple):
    """One line of the catalogue."""

    id: str
    tries: str
    needs: str
    replays: str
    where: str


@functools.cache
def catalogue() -> dict[str, Row]:
    """{id: row} of every attack that is known, tried here or not."""
    with open(Path(__file__).with_name("catalogue.tsv"), newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {row[0]: Row(*row) for row in rows[1:]}


@dataclass(frozen=True)
class Attack:
    """run: the function, called with an Arena. stopped_by: the mechanism that shall stop it, for the report. control: the name of the wrapper that
    protects nothing (wrappers.controls). needs: "root" (the suite's judge is root), "other" (so, and there is an account of payloads), or a key of
    needs.CHECKS. accepted: documented openings. refusal: a wrapper that does not start the payload has stopped it. peers: it makes sense under other
    tools. seconds: the bound of one try. only: configurations that it concerns. once: mode and profile make no difference.
    once_in_all: nor does the launcher."""

    id: str
    run: Callable[[Arena], Seen]
    stopped_by: str
    control: str = "bare"
    needs: tuple[str, ...] = ()
    accepted: tuple[Accepted, ...] = ()
    refusal: bool = False
    peers: bool = True
    seconds: float = 30.0
    only: Callable[[Configuration], bool] = lambda at: True
    once: bool = False
    once_in_all: bool = False

    @property
    def surface(self) -> str:
        return self.id[0]

    @property
    def row(self) -> Row:
        return catalogue()[self.id]

    def opening(self, at: Configuration) -> str:
        """The key of the documented opening that it may use there, "" for none."""
        return next((one.key for one in self.accepted if one.applies(at)), "")


def printable(text: str) -> str:
    """What hostile code said, for terminals and files: nothing that a terminal obeys, that turns text around, or that UTF-8 cannot carry."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode("ascii") for letter in text)


@dataclass
class Result:
    """One cell of the report. control: what the control saw. seen: what was seen under the wrapper. litter: what the run left. accepted: key of the
    documented opening. seconds: how long the try took."""

    attack: str
    configuration: str
    outcome: Outcome
    seen: str = ""
    control: str = ""
    litter: list[str] = field(default_factory=list)
    accepted: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.seen, self.control, self.litter = printable(self.seen), printable(self.control), [printable(line) for line in self.litter]

    @property
    def is_failure(self) -> bool:
        return self.outcome is Outcome.BROKEN or (self.outcome in (Outcome.LEAKED, Outcome.DIRTY) and not self.accepted)


class KeyUnknownError(Exception):
    """A word that names no attack and no surface."""


REGISTRY: dict[str, Attack] = {}
#: Attacks of the catalogue that are not played, and why: {id: reason}.
LEFT_OUT: dict[str, str] = {}


def attack(key: str, stopped_by: str, **more: Any) -> Callable[[Callable[[Arena], Seen]], Callable[[Arena], Seen]]:
    """Decorator: the function below is that attack of the catalogue; more: fields of Attack."""

    def register(run: Callable[[Arena], Seen]) -> Callable[[Arena], Seen]:
        assert key in catalogue(), key
        assert key not in REGISTRY, key
        REGISTRY[key] = Attack(key, run, stopped_by, **more)
        return run

    return register


def left_out(**reasons: str) -> None:
    """Say why attacks of the catalogue are not played: ``left_out(F24="needs ...")``."""
    for key, why in reasons.items():
        assert key in catalogue(), key
        assert key not in REGISTRY, key
        LEFT_OUT[key] = why


def attacks(only: tuple[str, ...] = ()) -> list[Attack]:
    """Those with these ids or surfaces (all for none), in the catalogue's order. Raises KeyUnknownError with a word that names none."""
    for letter, module in MODULES.items():
        if not only or any(word[:1] == letter for word in only):
            import_module(f"nodewrap.escape.surfaces.{module}")
    for word in only:
        if word not in SURFACES and word not in REGISTRY and word not in LEFT_OUT:
            raise KeyUnknownError(word)
    return [REGISTRY[key] for key in catalogue() if key in REGISTRY and (not only or key in only or key[0] in only)]
