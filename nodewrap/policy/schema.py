"""What a policy may say: every key, its kind, and how its value becomes the compiled one (seconds, bytes, numbers).

A kind is a function ``(value, path, report) -> compiled value``. It reports what is wrong and goes on, so that one check shows every problem.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from nodewrap import model
from nodewrap.policy.positions import Path

#: report(path, code, text)
Report = Callable[[Path, str, str], None]
Kind = Callable[[Any, Path, Report], Any]

_NAMES = {str: "a text", bool: "true or false", int: "a number", float: "a number with a point", list: "a list", dict: "a table"}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def suggest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def dotted(path: Path) -> str:
    """``rule.when.vo`` of ``("rule", 3, "when", "vo", 0)``."""
    return ".".join(part for part in path if isinstance(part, str))


def _wrong(value: Any, path: Path, report: Report, wanted: str) -> None:
    kind = _NAMES.get(type(value), "a date or time")
    shown = f" {value!r}" if isinstance(value, (str, int, float)) else ""
    report(path, "NW-POLICY-TYPE", f"{dotted(path)} is {kind}{shown}; next: write {wanted}")


# --- kinds -------------------------------------------------------------------------------------------------------------------------------


def text(value: Any, path: Path, report: Report) -> Any:
    """One line, at most 1,000 characters, no control characters: it ends in records and messages."""
    if not isinstance(value, str):
        return _wrong(value, path, report, "a text in quotes")
    if len(value) > 1000 or not value.isprintable():
        report(path, "NW-POLICY-VALUE", f"{dotted(path)} has control characters or more than 1000 characters; next: shorten it to one line")
    return value.strip()


def flag(value: Any, path: Path, report: Report) -> Any:
    """true or false."""
    return value if isinstance(value, bool) else _wrong(value, path, report, "true or false, without quotes")


def matching(pattern: str, wanted: str) -> Kind:
    """A text that matches ``pattern`` as a whole."""
    compiled = re.compile(pattern)

    def check(value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, str):
            return _wrong(value, path, report, wanted)
        if not compiled.fullmatch(value):
            report(path, "NW-POLICY-VALUE", f"{dotted(path)} is {value!r}; next: write {wanted}")
        return value

    return check


def choice(*known: str) -> Kind:
    """One of a few words."""

    def check(value: Any, path: Path, report: Report) -> Any:
        wanted = "one of " + ", ".join(f'"{word}"' for word in known)
        if not isinstance(value, str):
            return _wrong(value, path, report, wanted)
        if value not in known:
            report(path, "NW-POLICY-VALUE", f"{dotted(path)} is {value!r}{suggest(value, known)}; next: write {wanted}")
        return value

    return check


def integer(low: int, high: int) -> Kind:
    """A whole number within bounds."""

    def check(value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            return _wrong(value, path, report, f"a whole number from {low} to {high}")
        if not low <= value <= high:
            report(path, "NW-POLICY-VALUE", f"{dotted(path)} is {value}; next: write a number from {low} to {high}")
        return value

    return check


def _measure(units: dict[str, int], example: str, most: int) -> Kind:
    pattern = re.compile(r"(\d{1,12})\s?(" + "|".join(units) + ")")

    def check(value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, str):
            return _wrong(value, path, report, f"a number with a unit ({', '.join(units)}), such as {example}")
        found = pattern.fullmatch(value)
        if not found or int(found[1]) * units[found[2]] > most:
            text = f"{dotted(path)} is {value!r}; next: write a number with a unit ({', '.join(units)}), such as {example}"
            return report(path, "NW-POLICY-VALUE", text)
        return int(found[1]) * units[found[2]]

    return check


#: ``"72h"`` in seconds; at most ten years.
duration = _measure(_UNITS, '"72h"', 10 * 366 * 86400)
#: Between TERM and KILL; csrc/check.c takes at most ten minutes.
_grace = _measure(_UNITS, '"30s" (at most "10m")', 600)
#: Of each process; the kernel counts from one second on.
def _cpu_time(value: Any, path: Path, report: Report) -> Any:
    found = duration(value, path, report)
    if found == 0:
        report(path, "NW-POLICY-VALUE", f"{dotted(path)} is {value!r}; next: write at least \"1s\", or delete the key")
    return found


#: ``"4GiB"`` in bytes; below 2**62, so that C and the kernel read the same number.
size = _measure(_SIZES, '"4GiB"', (1 << 62) - 1)


def at_least(low: int, lowest: str) -> Kind:
    """A size that a payload can live with: below it, the policy's author has slipped by a unit."""

    def check(value: Any, path: Path, report: Report) -> Any:
        found = size(value, path, report)
        if isinstance(found, int) and found < low:
            report(path, "NW-POLICY-VALUE", f"{dotted(path)} is {value!r}; next: write at least {lowest}, or delete the key")
        return found

    return check


def cpus(value: Any, path: Path, report: Report) -> Any:
    """Processors' worth of time, compiled into microseconds in each 100 ms. The kernel takes no less than one millisecond."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _wrong(value, path, report, "a number of processors, such as 4 or 1.5")
    if not 0.01 <= value <= 8192:  # nan too
        report(path, "NW-POLICY-VALUE", f"{dotted(path)} is {value}; next: write a number of processors from 0.01 to 8192")
        return None
    return int(value * 100_000)


def _moment(last: bool) -> Kind:
    """Seconds since 1970. A plain date is in force to its very end (last) or from its start, in UTC."""

    def check(value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, datetime.datetime):
            if value.tzinfo is None:
                return report(path, "NW-POLICY-VALUE", f"{dotted(path)} has no time zone; next: append Z, or write the date alone")
            return int(value.timestamp())
        if not isinstance(value, datetime.date):
            return _wrong(value, path, report, "a date without quotes, such as 2027-06-30")
        midnight = datetime.datetime.combine(value, datetime.time(), datetime.timezone.utc)
        return int(midnight.timestamp()) + (86400 if last else 0)

    return check


first_moment = _moment(last=False)
last_moment = _moment(last=True)


def day(value: Any, path: Path, report: Report) -> Any:
    """A date for the record, as text."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _wrong(value, path, report, "a date without quotes, such as 2026-11-20")


def many(item: Kind) -> Kind:
    """One value or a list of them; always a list when compiled. An empty list is an error: it reads as "any" and means "none"."""

    def check(value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, list):
            return [item(value, path, report)]
        if not value:
            report(path, "NW-POLICY-VALUE", f"{dotted(path)} is an empty list, which nothing matches; next: name something or delete the key")
        return [item(entry, (*path, number), report) for number, entry in enumerate(value)]

    return check


def listed(item: Kind) -> Kind:
    """A list, which may be empty."""

    def check(value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, list):
            return _wrong(value, path, report, "a list in square brackets")
        return [item(entry, (*path, number), report) for number, entry in enumerate(value)]

    return check


def table(keys: dict[str, Kind], required: tuple[str, ...] = ()) -> Kind:
    """A table of known keys."""

    def check(value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, dict):
            return _wrong(value, path, report, "a table")
        for name in required:
            if name not in value:
                report(path, "NW-POLICY-MISSING", f"{dotted(path)} has no {name!r}; next: add it")
        return {name: _known(keys, name, entry, path, report) for name, entry in value.items() if name in keys or _unknown(keys, name, path, report)}

    return check


def _known(keys: dict[str, Kind], name: str, value: Any, path: Path, report: Report) -> Any:
    return keys[name](value, (*path, name), report)


def _unknown(keys: dict[str, Kind], name: str, path: Path, report: Report) -> bool:
    where = f"[{dotted(path)}]" if path else "the policy"
    hint = suggest(name, keys) or f"; known are {', '.join(sorted(keys))}"
    report((*path, name), "NW-POLICY-KEY", f"unknown key {name!r} in {where}{hint}")
    return False


def named(item: Kind, name: Kind) -> Kind:
    """A table of tables by free names."""

    def check(value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, dict):
            return _wrong(value, path, report, "a table")
        return {name(key, (*path, key), report): item(entry, (*path, key), report) for key, entry in value.items()}

    return check


def as_is(value: Any, path: Path, report: Report) -> Any:
    """A table that another module checks (profiles)."""
    return value if isinstance(value, dict) else _wrong(value, path, report, "a table")


# --- the words of a policy ---------------------------------------------------------------------------------------------------------------

_name = matching(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", "a name of letters, digits and . _ : - (at most 64)")
_profile = matching(r"[a-z][a-z0-9-]{0,31}", "a profile's name: lower-case letters, digits, hyphens (at most 32)")
_vo = matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", "a VO's name, without slashes or wildcards")
_dn = matching(r".*[A-Za-z0-9. -]=.+", "a DN such as /DC=org/DC=example/CN=Some One")
_fqan = matching(r"/[^*/][^*]*", "an FQAN such as /atlas/Role=production")
_fqan_glob = matching(r"/[^*/]+(/[^/]+)*", "an FQAN pattern such as /atlas/* (the group and all below); a VO's name takes no wildcard")
_dn_glob = matching(r"/.*[A-Za-z0-9. -]=.+", "a DN pattern such as /DC=org/DC=example/* (all names below), in the form with slashes")
_account = matching(r"[A-Za-z_*][A-Za-z0-9_.*-]{0,63}", 'an account name, or a pattern such as "atlasplt*"')
_target = matching(r"[A-Za-z_][A-Za-z0-9_.-]*(\[\d+-\d+\][A-Za-z0-9_.-]*)?", 'an account name, or a range such as "atlusr[01-50]"')
_group = matching(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", "a group's name")
_host = matching(r"[A-Za-z0-9.*-]*(\[\d+-\d+\])?[A-Za-z0-9.*-]*", 'a host name, a pattern such as "wn*.example.org" or a range such as "wn[001-200]"')
_hosts = matching(r"@?[A-Za-z0-9.*_-]*(\[\d+-\d+\])?[A-Za-z0-9.*-]*", '"@GROUP" of [hosts], a host name, a pattern or a range')
_env = matching(r"[A-Za-z0-9_*]{1,128}", "a variable's name, or a pattern such as OMP_*")
_variable = matching(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "a variable's name")
_image = matching(r"(/(?!\.\.?(/|$))[^/\x00-\x1f]+)+", "an absolute path without '..', or a pattern such as /cvmfs/images.example.org/*")
_bind = matching(r"(/[!#-+\--9;-\[\]-~]*)(:/[!#-+\--9;-\[\]-~]*)?(:ro|:rw)?", "SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, absolute paths")
_uids = matching(r"[1-9][0-9]{0,9}(-[1-9][0-9]{0,9})?", 'a uid or a range, in quotes: "1000" or "2000-2999"')
_mode = choice("switch", "map", "log-only")
_stance = choice("no", "allow", "require", "undecided")
_assurance = choice(*model.ASSURANCE)

_STANCE: dict[str, Kind] = {
    "closed": text,
    "multi_user": choice("yes", "no", "undecided"),
    "modes": table({"switch": _stance, "map": _stance, "log-only": _stance}),
    "on_internal_error": choice("deny", "log-only", "undecided"),
    "internal_error_profile": _profile,
    "minimum_assurance": _assurance,
    "needs": many(_name),
}
_WHEN = table({
    "vo": many(_vo), "fqan": many(_fqan_glob), "dn": many(_dn_glob), "issuer": many(text), "sub": many(text), "assurance": _assurance,
    "caller": many(_account), "group": many(_group), "host": many(_hosts), "launcher": many(choice("setuid", "socket", "userns")),
})
_ID = integer(1, 2**31 - 1)
_IDENTITY = table(
    {
        "mode": _mode, "pool": _name, "account": _target, "lease": choice("exclusive", "shared"),
        "inside_uid": _ID, "inside_gid": _ID, "size": integer(1, 65536),
    },
    required=("mode",),
)
_LIMITS = table({
    "wall": duration, "grace": _grace, "cpu": _cpu_time, "memory": at_least(16 << 20, '"16MiB"'), "swap": size, "file_size": at_least(4096, '"4KiB"'),
    "core": size, "scratch": at_least(1 << 20, '"1MiB"'), "processes": integer(1, 4_000_000), "files": integer(16, 1_048_576),
    "cpus": cpus, "cpu_weight": integer(1, 10_000), "io_weight": integer(1, 10_000),
    "io_read": at_least(64 << 10, '"64KiB"'), "io_write": at_least(64 << 10, '"64KiB"'),
    "io_read_ops": integer(10, 1_000_000_000), "io_write_ops": integer(10, 1_000_000_000), "on_missing": choice("refuse", "degrade"),
})
_ENV = table({"keep": listed(_env), "strip": listed(_env), "set": named(text, _variable)})
_APPTAINER = table({
    "program": matching(r"(/(?!\.\.?(/|$))[!-.0-~]+)+", "an absolute path without blanks"), "bind": listed(_bind),
    "options": listed(choice(
        "nv", "rocm", "writable-tmpfs", "fakeroot", "unsquash", "underlay", "no-init", "no-umask", "cleanenv", "pid", "ipc", "userns", "no-privs",
    )),
})
_LIABILITY = table({"by": text, "on": day, "reference": text}, required=("by", "on", "reference"))

POLICY = table({
    "site": table({"name": text, "contact": text, "liability_for": many(_mode), **_STANCE}, required=("name", "multi_user", "modes")),
    "stance": listed(table({"name": _name, "when": _WHEN, "not_before": first_moment, "expires": last_moment, **_STANCE}, required=("name",))),
    "caller": listed(table({"account": many(_account), "group": many(_group), "uid": many(_uids), "vo": many(_vo)})),
    "rule": listed(table(
        {
            "name": _name, "when": _WHEN, "identity": many(_IDENTITY), "profile": many(_profile), "limits": _LIMITS, "env": _ENV,
            "needs": many(_name), "liability": _LIABILITY, "not_before": first_moment, "expires": last_moment, "comment": text,
            "image": many(_image), "backend": choice("apptainer"), "apptainer": _APPTAINER,
        },
        required=("name", "identity", "profile"),
    )),
    "ban": listed(table({
        "name": _name, "dn": many(_dn), "dn_glob": many(_dn_glob), "fqan": many(_fqan_glob), "vo": many(_vo), "issuer": text, "sub": many(text),
        "caller": many(_account), "reason": text, "not_before": first_moment, "expires": last_moment,
    })),
    "pool": named(table({"accounts": many(_target), "prefix": _group, "comment": text}), _name),
    "hosts": named(many(_host), _name),
    "assertion": named(table({"text": text, "by": text, "on": day, "reference": text, "expires": last_moment}, required=("text",)), _name),
    "env": _ENV,
    "limits": _LIMITS,
    "profile": named(as_is, _profile),
    "apptainer": _APPTAINER,
    "glexec": table({"profile": _profile, "preserve_env": listed(_env)}),
    "credentials": table({
        "allow_limited": flag, "allow_plain": flag, "allow_without_voms": flag, "clock_skew": duration, "max_proxy_lifetime": duration,
        "crl": choice("require", "if-present"), "signing_policy": choice("require", "if-present"),
    }),
})
