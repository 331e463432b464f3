"""Guard and profiles as the launcher reads them (docs/guard.md): the Python twin of ``csrc/guard.c``.

The twin exists to disagree: differential tests feed both the same bytes and compare what they accept and what they make of it. Commands that
look at a node (`doctor`, `audit show`) read the guard with it.
"""

from __future__ import annotations

import re
from _socket import AF_INET6, inet_ntop, inet_pton
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_LINES, MAX_BYTES, MAX_LINE, MAX_WORDS = 1000, 256 * 1024, 1023, 32
MAX_PATH, MAX_NAME, MAX_FILE_NAME = 255, 31, 63
MAX_RANGES, MAX_NAMES, MAX_OPS = 16, 16, 160
LOWEST_ACCOUNT = 1000  # below are system accounts (login.defs UID_MIN)
LOWEST_TRACKING = 201  # below are groups that distributions give out by number, such as disk and shadow
HIGHEST_ID = 4294967292  # -1 means "no change" to setresuid(2), -2 and -3 are kept free (nodewrap/deep/owner.py)
MAX_DEADLINE_MS, MAX_WALL_S = 120_000, 366 * 86400
DEFAULT_DEADLINE_MS, DEFAULT_WALL_S = 10_000, 7 * 86400
MIN_SIZE, MAX_SIZE = 4096, 1 << 50
MODES = ("switch", "map", "log-only")
NAMESPACES = ("pid", "ipc", "uts", "cgroup", "mount", "net")
LANDLOCK = ("abstract", "signals", "files", "tcp")
MAX_PORT = 65535

Words = list[str]


class GuardError(ValueError):
    """What is wrong with a guard or profiles file. line: from 1, 0 when it is the whole file. text: one line without the file's name."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}" if line else text)
        self.line = line
        self.text = text


class Range(NamedTuple):
    """Ids from first to last, both included."""

    first: int
    last: int


class Network(NamedTuple):
    """IPv4 addresses: the first one as a number, and how many leading bits all of them share."""

    address: int
    bits: int

    def __str__(self) -> str:
        return f"{dotted(self.address)}/{self.bits}"


class Network6(NamedTuple):
    """As Network, of IPv6. nat: outside the node's own address is seen; of the guard's range alone."""

    address: int
    bits: int
    nat: bool = False

    def __str__(self) -> str:
        return f"{colons(self.address)}/{self.bits}"

    def of(self, address: int) -> int:
        """The address in this range of who has that one of IPv4."""
        return self.address | address


def colons(address: int) -> str:
    """``fd00::1`` of the number."""
    return inet_ntop(AF_INET6, address.to_bytes(16, "big"))


def dotted(address: int) -> str:
    """``10.2.0.1`` of the number."""
    return ".".join(str(byte) for byte in address.to_bytes(4, "big"))


@dataclass
class Guard:
    """The admin's bounds; names and defaults as in ``struct nw_guard``. An absent path is "". allow: profiles by mode."""

    launcher: str = ""
    python: str = ""
    script: str = ""
    child: tuple[int, int] | None = None
    policyd: str = ""
    policy: str = ""
    state: str = ""
    audit: str = ""
    audit_on_failure: str = "deny"
    syslog: bool = False
    ca_dir: str = ""
    voms_dir: str = ""
    cgroup: str = ""
    tmp_dir: str = ""
    netd: str = ""
    network: Network | None = None
    network6: Network6 | None = None
    deadline_ms: int = DEFAULT_DEADLINE_MS
    max_wall_s: int = DEFAULT_WALL_S
    caller_uid: tuple[Range, ...] = ()
    switch_uid: tuple[Range, ...] = ()
    switch_gid: tuple[Range, ...] = ()
    map_uid: tuple[Range, ...] = ()
    tracking_gid: tuple[Range, ...] = ()
    allow: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Op(NamedTuple):
    """One step of a root being built. kind: as in OPS. path: for dev the node's name. arg: a link's target."""

    kind: str
    path: str = ""
    arg: str = ""
    writable: bool = False
    optional: bool = False
    mode: int = 0
    size: int = 0


@dataclass
class Profile:
    """What C makes of one profile; seccomp, network (names of files) and hostname are "" when absent. landlock: in the order of LANDLOCK, ``?``
    behind the optional.
    """

    name: str
    namespaces: tuple[str, ...] = ()
    seccomp: str = ""
    network: str = ""
    landlock: tuple[str, ...] = ()
    tcp_bind: tuple[int, ...] = ()
    tcp_connect: tuple[int, ...] = ()
    degrade: bool = False
    hostname: str = ""
    ops: list[Op] = field(default_factory=list)


# ---- words ----


def _words(data: bytes) -> Iterator[tuple[int, Words]]:
    """(line number, words) of every line that has any; the format's own bounds."""
    if len(data) > MAX_BYTES:
        raise GuardError(0, f"longer than {MAX_BYTES} bytes")
    lines = data.split(b"\n")
    unended = lines.pop()
    for number, line in enumerate([*lines, *([unended] if unended else [])], 1):
        if number > MAX_LINES:
            raise GuardError(0, f"more than {MAX_LINES} lines")
        if number > len(lines):
            raise GuardError(number, "no newline at the end")
        words = _line(number, line)
        if words:
            yield number, words


def _line(number: int, line: bytes) -> Words:
    if len(line) > MAX_LINE:
        raise GuardError(number, f"longer than {MAX_LINE} bytes")
    if not re.fullmatch(rb"[\t\x20-\x7e]*", line):
        raise GuardError(number, "a byte that is not printable ASCII")
    words = line.decode("ascii").split()
    if not words or words[0].startswith("#"):
        return []
    if len(words) > MAX_WORDS:
        raise GuardError(number, f"more than {MAX_WORDS} words")
    return words


def _number(word: str, highest: int) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]*", word, re.A) or len(word) > 20 or int(word) > highest:
        raise ValueError(f"{word[:24]!r} is not a number from 0 to {highest} without sign or leading zero")
    return int(word)


def _path(word: str) -> str:
    if len(word) > MAX_PATH or not (word == "/" or re.fullmatch(r"(/(?!\.\.?(/|$))[^/]+)+", word)):
        raise ValueError(f"{word[:60]!r} is not an absolute path of at most {MAX_PATH} bytes without '.', '..' or empty parts")
    return word


def _below_root(word: str) -> str:
    if word == "/":
        raise ValueError("'/' itself cannot be a place in the root")
    return _path(word)


def _name(word: str, longest: int = MAX_NAME) -> str:
    if len(word) > longest or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", word):
        raise ValueError(f"{word[:60]!r} is not a name of letters, digits and ._- (no . or - first), at most {longest}")
    return word


def _file_name(word: str) -> str:
    return _name(word, MAX_FILE_NAME)


def _range(word: str, lowest: int) -> Range:
    first, dash, last = word.partition("-")
    found = Range(_number(first, HIGHEST_ID), _number(last, HIGHEST_ID)) if dash else Range(1, 0)
    if found.first > found.last:
        raise ValueError(f"{word[:60]!r} is not a range first-last")
    if found.first < lowest:
        raise ValueError(f"{word!r} begins below {lowest}")
    return found


def _only(words: Words) -> str:
    if len(words) != 1:
        raise ValueError(f"wants one word, has {len(words)}")
    return words[0]


def _choice(word: str, known: tuple[str, ...]) -> str:
    if word not in known:
        raise ValueError(f"{word[:60]!r} is not one of {', '.join(known)}")
    return word


def _between(word: str, lowest: int, highest: int) -> int:
    value = _number(word, highest)
    if value < lowest:
        raise ValueError(f"{value} is below {lowest}")
    return value


def _new(there: bool) -> None:
    if there:
        raise ValueError("stands twice")


# ---- guard ----


def _ranges(lowest: int) -> Callable[[Words], tuple[Range, ...]]:
    def parse(words: Words) -> tuple[Range, ...]:
        if not 1 <= len(words) <= MAX_RANGES:
            raise ValueError(f"wants 1 to {MAX_RANGES} ranges first-last")
        return tuple(_range(word, lowest) for word in words)

    return parse


def _child(words: Words) -> tuple[int, int]:
    if len(words) != 2:
        raise ValueError("wants a uid and a gid")
    return _between(words[0], 1, HIGHEST_ID), _between(words[1], 1, HIGHEST_ID)


def _network(words: Words) -> Network:
    address, _, bits = _only(words).partition("/")
    parts = [_number(part, 255) for part in address.split(".")]
    found = Network(int.from_bytes(bytes(parts), "big"), _between(bits, 8, 30))
    if len(parts) != 4 or found.address << found.bits & 0xFFFFFFFF:
        raise ValueError(f"{words[0][:60]!r} is not the address of a network, as 10.200.0.0/16 is")
    return found


def _network6(words: Words) -> Network6:
    prefix, _, bits = words[0].partition("/") if len(words) == 2 else ("", "", "")
    try:
        found = Network6(int.from_bytes(inet_pton(AF_INET6, prefix), "big"), _between(bits, 16, 96), _choice(words[-1], ("routed", "nat")) == "nat")
    except OSError:
        raise ValueError(f"{prefix[:60]!r} is not an address of IPv6") from None
    top = found.address >> 120
    if found.address & ((1 << 128 - found.bits) - 1) or not (top & 0xE0 == 0x20 or top & 0xFE == 0xFC):
        raise ValueError(f"{words[0][:60]!r} is not a prefix of global or of unique local addresses, as fd12:3456:789a::/64 is")
    return found


def _one_path(words: Words) -> str:
    return _path(_only(words))


GUARD_LINES: dict[str, Callable[[Words], Any]] = {
    **dict.fromkeys(("python", "script", "policyd", "policy", "state", "audit", "ca-dir", "voms-dir", "cgroup", "tmp-dir", "netd"), _one_path),
    "launcher": lambda words: _choice(_only(words), ("setuid", "socket", "userns")),
    "child": _child,
    "network": _network,
    "network6": _network6,
    "audit-on-failure": lambda words: _choice(_only(words), ("deny", "run-and-flag", "run")),
    "syslog": lambda words: _choice(_only(words), ("no", "yes")) == "yes",
    "deadline-ms": lambda words: _between(_only(words), 1, MAX_DEADLINE_MS),
    "max-wall-s": lambda words: _between(_only(words), 1, MAX_WALL_S),
    "caller-uid": _ranges(1),
    **dict.fromkeys(("switch-uid", "switch-gid", "map-uid"), _ranges(LOWEST_ACCOUNT)),
    "tracking-gid": _ranges(LOWEST_TRACKING),
}
NEEDED = ("launcher", "python", "script", "policy", "state", "audit", "caller-uid")


def _header(lines: Iterator[tuple[int, Words]], word: str) -> None:
    if next(lines, (0, []))[1] != [word, "1"]:
        raise GuardError(0, f"the first line is not {word + ' 1'!r}")


def parse_guard(data: bytes) -> Guard:
    """The guard in these bytes. Raises GuardError."""
    lines = _words(data)
    _header(lines, "nodewrap-guard")
    guard, seen = Guard(), set[str]()
    for number, words in lines:
        try:
            _guard_line(guard, seen, words[0], words[1:])
        except ValueError as wrong:
            raise GuardError(number, f"{words[0][:60]}: {wrong}") from None
    missing = [key for key in NEEDED if key not in seen]
    if "child" not in seen and guard.launcher != "userns":
        missing.append("child")
    if missing:
        raise GuardError(0, f"no line {missing[0]!r}")
    return guard


def _guard_line(guard: Guard, seen: set[str], key: str, words: Words) -> None:
    if key == "allow":
        if len(words) < 2 or len(words) > MAX_NAMES + 1:
            raise ValueError(f"wants a mode and 1 to {MAX_NAMES} profiles")
        _new(_choice(words[0], MODES) in guard.allow)
        guard.allow[words[0]] = tuple(_name(word) for word in words[1:])
        return
    if key not in GUARD_LINES:
        raise ValueError("unknown word")
    _new(key in seen)
    seen.add(key)
    setattr(guard, key.replace("-", "_"), GUARD_LINES[key](words))


# ---- profiles ----


def _bind(kind: str) -> Callable[[Words], list[Op]]:
    def parse(words: Words) -> list[Op]:
        if len(words) != 2:
            raise ValueError("wants a mode and a path")
        mode = _choice(words[0], ("ro", "rw", "ro?", "rw?"))
        return [Op(kind, _below_root(words[1]), writable=mode.startswith("rw"), optional=mode.endswith("?"))]

    return parse


def _link(words: Words) -> list[Op]:
    if len(words) != 2 or len(words[1]) > MAX_PATH:
        raise ValueError("wants a path and what it points to")
    return [Op("link", _below_root(words[0]), words[1])]


def _place(kind: str) -> Callable[[Words], list[Op]]:
    def parse(words: Words) -> list[Op]:
        if len(words) != 1:
            raise ValueError("wants a path")
        return [Op(kind, _below_root(words[0]))]

    return parse


def _tmpfs(words: Words) -> list[Op]:
    if len(words) != 3 or not re.fullmatch(r"[0-7]{1,4}", words[1]) or int(words[1], 8) > 0o1777:
        raise ValueError("wants a path, an octal mode up to 1777 and a size in bytes")
    return [Op("tmpfs", _below_root(words[0]), mode=int(words[1], 8), size=_between(words[2], MIN_SIZE, MAX_SIZE))]


def _dev(words: Words) -> list[Op]:
    if not words:
        raise ValueError("wants names")
    return [Op("dev", _device(word)) for word in words]


def _device(word: str) -> str:
    top, slash, name = word.rpartition("/")
    if slash:
        _name(top)
    if not (slash and name == "*"):
        _name(name.removesuffix("*"))
    return word


def _alone(kind: str) -> Callable[[Words], list[Op]]:
    def parse(words: Words) -> list[Op]:
        if words:
            raise ValueError("stands alone")
        return [Op(kind)]

    return parse


def _namespaces(words: Words) -> tuple[str, ...]:
    if not words or len(set(words)) != len(words):
        raise ValueError("wants kinds, each once")
    return tuple(_choice(word, NAMESPACES) for word in words)


def _walls(words: Words) -> tuple[str, ...]:
    kinds = [_choice(word[:-1] if word.endswith("?") else word, LANDLOCK) for word in words]
    if not words or len(set(kinds)) != len(kinds):
        raise ValueError("wants kinds, each once")
    return tuple(sorted(words, key=lambda word: LANDLOCK.index(word.rstrip("?"))))


def _ports(words: Words) -> tuple[int, ...]:
    if not words:
        raise ValueError("wants ports")
    return tuple(_number(word, MAX_PORT) for word in words)


OPS: dict[str, Callable[[Words], list[Op]]] = {
    "bind": _bind("bind"), "slave": _bind("slave"), "link": _link, "tmpfs": _tmpfs, "dev": _dev, "disk": _place("disk"),
    "proc": _alone("proc"), "mqueue": _alone("mqueue"), "home": _alone("home"), "accounts": _alone("accounts"),
}
#: Lines that stand once in a profile: where their value goes, and how it is read.
SETTINGS: dict[str, tuple[str, Callable[[Words], Any]]] = {
    "namespace": ("namespaces", _namespaces),
    "seccomp": ("seccomp", lambda words: _file_name(_only(words))),
    "network": ("network", lambda words: _file_name(_only(words))),
    "hostname": ("hostname", lambda words: _file_name(_only(words))),
    "landlock": ("landlock", _walls),
    "tcp-bind": ("tcp_bind", _ports),
    "tcp-connect": ("tcp_connect", _ports),
    "on-missing": ("degrade", lambda words: _choice(_only(words), ("refuse", "degrade")) == "degrade"),
}


def parse_profiles(data: bytes) -> dict[str, Profile]:
    """Every profile in these bytes, by name. Raises GuardError."""
    lines = _words(data)
    _header(lines, "nodewrap-profiles")
    profiles: dict[str, Profile] = {}
    seen: set[str] = set()
    for number, words in lines:
        try:
            if words[0] == "profile":
                seen = _begin(profiles, words[1:])
            else:
                _profile_line(profiles, seen, words[0], words[1:])
        except ValueError as wrong:
            raise GuardError(number, f"{words[0][:60]}: {wrong}") from None
    return profiles


def _begin(profiles: dict[str, Profile], words: Words) -> set[str]:
    name = _name(_only(words))
    _new(name in profiles)
    if len(profiles) == MAX_NAMES:
        raise ValueError(f"more than {MAX_NAMES} profiles")
    profiles[name] = Profile(name)
    return set()


def _profile_line(profiles: dict[str, Profile], seen: set[str], key: str, words: Words) -> None:
    if not profiles:
        raise ValueError("stands before the first profile")
    now = profiles[next(reversed(profiles))]
    if key not in OPS and key not in SETTINGS:
        raise ValueError("unknown word")
    if key in SETTINGS or key in ("proc", "mqueue", "home", "accounts"):
        _new(key in seen)
        seen.add(key)
    if key in OPS:
        now.ops += OPS[key](words)
        if len(now.ops) > MAX_OPS:
            raise ValueError(f"more than {MAX_OPS} places in one profile")
    else:
        name, read = SETTINGS[key]
        setattr(now, name, read(words))


# ---- and back to text ----


def render_guard(guard: Guard, notes: Iterable[str] = ()) -> str:
    """The guard as text that ``parse_guard`` reads back to the same; notes become comments under the first line."""
    lines = ["nodewrap-guard 1", *(f"# {note}" for note in notes)]
    for key in ("launcher", "python", "script", "child", *GUARD_LINES):
        value = getattr(guard, key.replace("-", "_"))
        line = f"{key} {_rendered(value)}"
        if value not in ("", (), None) and line not in lines:
            lines.append(line)
    lines += [f"allow {mode} {' '.join(profiles)}" for mode, profiles in guard.allow.items()]
    return "\n".join(lines) + "\n"


def _rendered(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple) and not isinstance(value, Network):
        return " ".join(f"{part.first}-{part.last}" if isinstance(part, Range) else str(part) for part in value)
    return str(value)
