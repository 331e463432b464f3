"""Isolation profiles: the schema of ``[profile.NAME]`` tables, a site's changes on top of the shipped ones, and the file that C reads.

Used by ``nodewrap policy check|apply``. A profile is a plain dict as TOML gives it (``policies/profiles.toml`` explains the keys); a rendered
profile is text in the line format of docs/guard.md, resolved on this node.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any

from nodewrap import network
from nodewrap.guard import LANDLOCK, MAX_PATH, MAX_PORT, MAX_SIZE, MAX_WORDS, MIN_SIZE, NAMESPACES, GuardError, parse_profiles

Table = dict[str, Any]

#: What ``allow MODE PROFILE…`` and the audit's fields carry as a name.
NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
#: One word of the line format below ``/``: no blanks, no ``..``, nothing to normalise, so that C and Python see the same place.
PATH = re.compile(r"(/(?!\.\.?(/|$))[!-.0-~]+)+")
SIZE = re.compile(r"([1-9][0-9]{0,11})(KiB|MiB|GiB|TiB)?")
#: A node of /dev, perhaps in a directory there; a star at the end: all whose names begin so.
DEVICE = re.compile(r"(?=[A-Za-z0-9])([A-Za-z0-9][A-Za-z0-9_.-]{0,30}/)?([A-Za-z0-9][A-Za-z0-9_.-]{0,30}\*?|(?<=/)\*)")
MEMORY = ("mem", "kmem", "port")
#: Nodes that no pattern may catch: rights over the node, its disks, its buses, its input, other people's terminals. #: a number; *: whatever follows.
BY_NAME_ONLY = (
    *MEMORY, "kmsg", "kvm", "nvram", "mcelog", "snapshot", "userfaultfd", "cpu/*", "cpu_dma_latency", "vhost-*", "vsock", "vfio/*", "uio#", "xen/*",
    "mapper/*", "loop-control", "btrfs-control", "zfs", "autofs", "uinput", "uhid", "hidraw#", "input/*", "bus/*", "usbmon#", "bsg/*", "sg#", "sch#",
    "nvme*", "ng#n#", "st#*", "nst#*", "dax#*", "mtd*", "i2c-#", "spidev*", "gpiochip#", "sev*", "watchdog*", "rtc*", "ipmi*", "tpm*", "console",
    "tty#", "ttyS#", "vcs*", "fb#", "vga_arbiter", "net/*", "iommu", "ptp#", "mei*", "mpt*", "megaraid_sas_ioctl*",
)
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class ProfileError(ValueError):
    """A profile that cannot be rendered; the text is one line and starts with the key's place."""


# ---- the schema: one function per kind of value; each yields what is wrong, or nothing ----


def _flag(value: Any) -> Iterator[str]:
    if not isinstance(value, bool):
        yield f"{value!r} is not true or false"


def _text(value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{value!r} is not a text"


def _name(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and NAME.fullmatch(value)):
        yield f"{value!r} is not a profile name (lower-case letters, digits, hyphen, at most 31)"


def _hostname(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}", value)):
        yield f"{value!r} is not a host name of at most 63 letters, digits, dots and hyphens"


def _choice(*known: str) -> Callable[[Any], Iterator[str]]:
    def one_of(value: Any) -> Iterator[str]:
        if value not in known:
            yield f"{value!r} is not one of {', '.join(known)}{_suggest(value, known)}"

    return one_of


def _each(item: Callable[[Any], Iterator[str]]) -> Callable[[Any], Iterator[str]]:
    def check_list(value: Any) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{value!r} is not a list"
            return
        for entry in value:
            yield from item(entry)
        for twice in sorted({str(entry) for entry in value if value.count(entry) > 1}):
            yield f"{twice!r} stands there twice"

    return check_list


def _path(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and PATH.fullmatch(value.rstrip("?")) and value.count("?") <= 1 and len(value) <= MAX_PATH):
        yield f"{value!r} is not an absolute path without blanks, '..' or a trailing '/' (a trailing '?' means: if there)"


def _device(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and DEVICE.fullmatch(value.removesuffix("?"))):
        yield f"{value!r} is not a node of /dev: NAME or DIR/NAME, with a * at the end or without"
        return
    bare = value.removesuffix("?")
    if bare in MEMORY:
        yield f"{value!r} is the node's memory; no payload gets it"
    if bare.endswith("*"):
        caught = next((family for family in BY_NAME_ONLY if _begins(family, bare[:-1])), "")
        if caught:
            yield f"{value!r} would also give {caught.replace('#', '0')!r}, which is given by its full name only"


def _begins(family: str, prefix: str) -> bool:
    """Whether a name of this family begins so."""
    if not prefix or not family:
        return not prefix
    if family[0] == "#":
        return prefix[0].isdigit() and (_begins(family[1:], prefix[1:]) or _begins(family, prefix[1:]))
    return family[0] == "*" or (family[0] == prefix[0] and _begins(family[1:], prefix[1:]))


def _tmpfs(value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{value!r} is not a table PATH = SIZE"
        return
    for path, size in value.items():
        yield from _path(path)
        if path.endswith("?"):
            yield f"{path!r}: a tmpfs is always there, leave the '?' out"
        if not (isinstance(size, str) and SIZE.fullmatch(size) and MIN_SIZE <= size_bytes(size) <= MAX_SIZE):
            yield f"{path}: {size!r} is not a size such as '512MiB' or '4GiB', from 4KiB to 1024TiB"


def _landlock(value: Any) -> Iterator[str]:
    yield from _choice(*LANDLOCK)(value.removesuffix("?") if isinstance(value, str) else value)


def _port(value: Any) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PORT:
        yield f"{value!r} is not a port from 0 to {MAX_PORT}"


def _disk(value: Any) -> Iterator[str]:
    yield from _path(value)
    if str(value).endswith("?"):
        yield f"{value!r}: a private directory is always there, leave the '?' out"


def _add(value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{value!r} is not a table of lists to append to"
        return
    for key, more in value.items():
        if key in ADDABLE:
            yield from (f"{key}: {text}" for text in KEYS[key](more))
        else:
            yield f"{key!r} cannot be added to; lists and tables can: {', '.join(ADDABLE)}{_suggest(key, ADDABLE)}"


_paths = _each(_path)
KEYS: dict[str, Callable[[Any], Iterator[str]]] = {
    "description": _text, "like": _name, "add": _add,
    "namespaces": _each(_choice(*NAMESPACES)), "nested_userns": _flag, "seccomp": _flag, "landlock": _each(_landlock),
    "tcp_bind": _each(_port), "tcp_connect": _each(_port),
    "on_missing": _choice("refuse", "degrade"), "hostname": _hostname, "network": network.check,
    "system": _paths, "read_only": _paths, "writable": _paths, "follow": _paths, "follow_writable": _paths,
    "tmpfs": _tmpfs, "disk": _each(_disk), "devices": _each(_device), "proc": _flag, "mqueue": _flag, "home": _flag, "accounts": _flag,
}
ADDABLE = ("read_only", "writable", "follow", "follow_writable", "tmpfs", "disk", "devices", "system", "tcp_bind", "tcp_connect")
#: Keys that need a mount namespace to mean anything.
ROOT_KEYS = ("system", "read_only", "writable", "follow", "follow_writable", "tmpfs", "disk", "devices", "proc", "mqueue", "home", "accounts")


def _suggest(word: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check(name: str, table: Table) -> list[str]:
    """What is wrong with one profile, one line each, empty when nothing is.

    Call it on a site's table (spelling and types), and again on what ``merge`` returns (keys that depend on each other).
    """
    where = f"profile.{name}"
    found = [f"{where}: {text}" for text in _name(name)]
    if not isinstance(table, dict):
        return [*found, f"{where}: {table!r} is not a table"]
    for key, value in table.items():
        rule = KEYS.get(key)
        if rule is None:
            found.append(f"{where}.{key}: unknown key{_suggest(key, KEYS)}")
        else:
            found += [f"{where}.{key}: {text}" for text in rule(value)]
    return found or [f"{where}.{text}" for text in _together(name, table)]


def _together(name: str, table: Table) -> Iterator[str]:
    """What the keys say against each other. Only keys that are there count, so a site's partial table passes."""
    if table.get("seccomp") is False and name != "none":
        yield "seccomp: only the profile 'none' goes without the kernel-surface filter"
    walls = [kind.rstrip("?") for kind in table.get("landlock", ())]
    if len(set(walls)) < len(walls):
        yield "landlock: the same kind stands there with and without '?'"
    for key in ("tcp_bind", "tcp_connect"):
        if len(table.get(key, ())) > MAX_WORDS - 1:
            yield f"{key}: more than {MAX_WORDS - 1} ports"
    if "namespaces" not in table:
        return
    spaces = table["namespaces"]
    if "mount" not in spaces:
        for key in ROOT_KEYS:
            if table.get(key):
                yield f"{key}: needs the mount namespace; add 'mount' to namespaces or leave {key} out"
    elif not table.get("system") or not table.get("devices"):
        yield "system, devices: with a mount namespace the root is built from nothing; name at least /usr and null here"
    if table.get("proc") and "pid" not in spaces:
        yield "proc: a fresh /proc shows a pid namespace; add 'pid' to namespaces"
    if table.get("mqueue") and "ipc" not in spaces:
        yield "mqueue: message queues belong to the ipc namespace; add 'ipc' to namespaces"
    if table.get("hostname") and "uts" not in spaces:
        yield "hostname: would rename the node; add 'uts' to namespaces"
    if network.mode(table) == "host" and name != "none" and "abstract" not in walls:
        yield "network: abstract sockets belong to the network namespace: with the host's, add landlock = [\"abstract\"]"
    if table.get("nested_userns") is True and "mount" in spaces and not table.get("proc"):
        yield "proc: nested containers need a /proc they can mount again; set proc = true or nested_userns = false"
    yield from _walls(table)
    yield from _twice(table)


def _walls(table: Table) -> Iterator[str]:
    kinds = {kind.rstrip("?") for kind in table.get("landlock", ())}
    if "files" in kinds and "mount" not in table["namespaces"]:
        yield "landlock: 'files' is what the built root shows; add 'mount' to namespaces or leave 'files' out"
    if "files" in kinds and table.get("nested_userns") is not False:
        yield "landlock: under 'files' nobody may mount (landlock(7)), which nested containers need; set nested_userns = false or leave 'files' out"
    for key in ("tcp_bind", "tcp_connect"):
        if table.get(key) and "tcp" not in kinds:
            yield f"{key}: ports are open to all without 'tcp' in landlock; add it"


def _twice(table: Table) -> Iterator[str]:
    seen: dict[str, str] = {}
    for key in ("system", "read_only", "writable", "follow", "follow_writable", "tmpfs", "disk"):
        for path in table.get(key, ()):
            bare = path.rstrip("?")
            if bare in seen:
                yield f"{key}: {bare!r} is also in {seen[bare]}; one place can be mounted only once"
            seen[bare] = key
    for path in ("/etc/passwd", "/etc/group"):
        if table.get("accounts") and path in seen:
            yield f"{seen[path]}: {path!r} is made by accounts = true; leave one of them out"


# ---- a site's changes ----


def merge(shipped: dict[str, Table], site: dict[str, Table]) -> dict[str, Table]:
    """The profiles of this site: ``like`` and ``add`` are gone, every table stands for itself.

    Both arguments are tables that ``check`` found nothing in, by name. Raises ProfileError when ``like`` names nothing or goes in a circle.
    """
    tables = {name: _onto(shipped.get(name, {}), table) for name, table in site.items()}
    tables = {**shipped, **tables}
    return {name: _with_network(_expand(tables, name, ())) for name in tables}


def _with_network(table: Table) -> Table:
    """``network`` decides about the namespace."""
    wanted, spaces = network.mode(table), table.get("namespaces", [])
    if wanted == "host":
        return {**table, "namespaces": [kind for kind in spaces if kind != "net"]}
    return {**table, "namespaces": [*spaces, "net"]} if wanted and "net" not in spaces else table


def _onto(base: Table, change: Table) -> Table:
    """One table on top of another of the same name: keys replace; what both add is added together."""
    merged = {**base, **change}
    if "add" in base and "add" in change:
        merged["add"] = {key: _joined(base["add"].get(key), change["add"].get(key)) for key in {**base["add"], **change["add"]}}
    return merged


def _expand(tables: dict[str, Table], name: str, path: tuple[str, ...]) -> Table:
    if name not in tables:
        raise ProfileError(f"profile.{path[-1]}.like: there is no profile {name!r}{_suggest(name, tables)}")
    if name in path:
        raise ProfileError(f"profile.{name}.like: goes in a circle: {' -> '.join([*path, name])}")
    own = dict(tables[name])
    add, like = own.pop("add", {}), own.pop("like", None)
    whole = {**(_expand(tables, like, (*path, name)) if like else {}), **own}
    for key, more in add.items():
        whole[key] = _joined(whole.get(key), more)
    return whole


def _joined(old: Any, new: Any) -> Any:
    if old is None or new is None:
        return new if old is None else old
    if isinstance(old, dict):
        return {**old, **new}
    return [*old, *(entry for entry in new if entry not in old)]


# ---- the file that C reads ----


def render(profiles: dict[str, Table], root: str = "/") -> str:
    """The ``profiles`` file (docs/guard.md) of merged and checked profiles, as this node is now: links of a merged /usr, devices that exist.

    root: directory to look at instead of ``/``, for tests. Raises ProfileError when the node cannot have what a profile names, or when the
    text is not what ``guard.parse_profiles`` reads.
    """
    lines = ["nodewrap-profiles 1"]
    for name, table in profiles.items():
        lines += ["", *_profile(name, table, root)]
    text = "\n".join(lines) + "\n"
    try:
        parse_profiles(text.encode("ascii"))
    except GuardError as wrong:
        raise ProfileError(f"the profiles are more than the launcher reads: {wrong}: {lines[wrong.line - 1][:80]}") from None
    return text


def _profile(name: str, table: Table, root: str) -> Iterator[str]:
    yield f"profile {name}"
    if table.get("namespaces"):
        yield "namespace " + " ".join(table["namespaces"])
    if table.get("seccomp"):
        yield f"seccomp seccomp.{name}.bpf"
    if network.mode(table) == "private":
        yield f"network {network_file(name)}"
    if table.get("landlock"):
        yield "landlock " + " ".join(table["landlock"])
        yield from (f"{key.replace('_', '-')} {' '.join(map(str, table[key]))}" for key in ("tcp_bind", "tcp_connect") if table.get(key))
    yield f"on-missing {table.get('on_missing', 'refuse')}"
    # Parents before what lies in them: C makes everything in the order written, so a nested place is made inside the outer one.
    places = sorted(_places(name, table, root), key=lambda place: place[0].split("/"))
    yield from (line for _, line in places)
    if table.get("home"):
        yield "home"
    if table.get("hostname"):
        yield f"hostname {table['hostname']}"


def network_file(name: str) -> str:
    """The file of numbers beside the profiles, for netd."""
    return f"network.{name}"


def networks(profiles: dict[str, Table]) -> dict[str, bytes]:
    """The files of numbers of all private networks, by name."""
    return {network_file(name): network.encode(network.rules(table)) for name, table in profiles.items() if network.mode(table) == "private"}


def _places(name: str, table: Table, root: str) -> Iterator[tuple[str, str]]:
    for path in table.get("system", ()):
        yield from _system(path.rstrip("?"), root)
    for key, verb, mode in (("read_only", "bind", "ro"), ("writable", "bind", "rw"), ("follow", "slave", "ro"), ("follow_writable", "slave", "rw")):
        for path in table.get(key, ()):
            bare = path.rstrip("?")
            yield bare, f"{verb} {mode}{'?' if path != bare else ''} {bare}"
    for path, size in table.get("tmpfs", {}).items():
        yield path, f"tmpfs {path} 1777 {size_bytes(size)}"
    yield from ((path, f"disk {path}") for path in table.get("disk", ()))
    devices = [device.rstrip("?") for device in table.get("devices", ()) if _is_device(name, device, root)]
    for at in range(0, len(devices), MAX_WORDS - 1):
        yield "/dev", " ".join(["dev", *devices[at:at + MAX_WORDS - 1]])
    if table.get("proc"):
        yield "/proc", "proc"
    if table.get("accounts"):
        yield "/etc/passwd", "accounts"
    if table.get("mqueue"):
        yield "/dev/mqueue", "mqueue"


def _system(path: str, root: str) -> Iterator[tuple[str, str]]:
    """A directory of the operating system as this node has it: a link stays a link, so that /bin and /usr/bin are one place inside too."""
    place = root.rstrip("/") + path
    if os.path.islink(place):
        target = os.readlink(place)
        if not PATH.fullmatch("/" + target.lstrip("/")):
            raise ProfileError(f"{path}: is a link to {target!r}, which the profiles file cannot hold; bind its target by name")
        yield path, f"link {path} {target}"
    elif os.path.isdir(place):
        yield path, f"bind ro {path}"


def _is_device(name: str, device: str, root: str) -> bool:
    bare = device.rstrip("?")
    if bare.endswith("*"):
        if device == bare and not glob.glob(f"{glob.escape(root.rstrip('/'))}/dev/{bare}"):
            raise ProfileError(f"profile.{name}.devices: this node has no /dev/{bare}; write '{bare}?' if there may be none")
        return True
    try:
        mode = os.stat(f"{root.rstrip('/')}/dev/{bare}").st_mode
    except FileNotFoundError:
        if device != bare:
            return False
        raise ProfileError(f"profile.{name}.devices: this node has no /dev/{bare}; write '{bare}?' if it may be missing") from None
    if not stat.S_ISCHR(mode):
        raise ProfileError(f"profile.{name}.devices: /dev/{bare} is not a character device; raw disks are never given to a payload")
    return True


def size_bytes(text: str) -> int:
    """``4GiB`` in bytes. Raises ProfileError for anything that SIZE does not match."""
    match = SIZE.fullmatch(text)
    if not match:
        raise ProfileError(f"{text!r} is not a size such as '512MiB' or '4GiB'")
    return int(match.group(1)) * UNITS[match.group(2) or ""]
