"""The Apptainer backend: which image, may it be used, and the words in front of the payload's command (docs/apptainer.md).

Hot path, loaded where the policy has images only. The launcher opens the image as the caller, once, and shows what was opened at ``PLACE`` in the
payload's view; here it is looked at by the same descriptor, so what is judged, recorded and run is one file.
"""

import os

from nodewrap import digest, environment, model, usage
from nodewrap.policy import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Where the payload's view has the image (NW_IMAGE in csrc/run.h).
PLACE = "/.image"
#: What the runtime executes there in place of the command, by the descriptor that it inherits (NW_INSIDE + 2 in csrc/run.h).
INSIDE = "/proc/self/fd/22"
#: What the runtime takes as orders, whoever says them.
PREFIXES = ("APPTAINER", "SINGULARITY")
#: A file up to this size is digested as a whole at every start (1.5 ms at 700 MB/s); of a larger one that the policy does not name, the head.
WHOLE, HEAD = 1 << 20, 32768
#: A named file up to this size is digested again when nothing but its file system's number has changed (0.4 s).
AGAIN = 256 << 20
#: SIF: a start line of 32 bytes, then this (sif 2.x, pkg/sif: hdrMagicStr). squashfs: its superblock begins so.
SIF, SQUASHFS = b"SIF_MAGIC", b"hsqs"
#: In a value of --bind and --home these have a meaning of their own.
SEPARATORS = (":", ",", '"', "\\")
ERRNO = {
    2: "does not exist", 13: "cannot be read by the caller", 20: "leads through a file", 22: "is neither a file nor a directory",
    6: "is neither a file nor a directory", 40: "goes in a circle of links",
}


class Image:
    """What was opened. path: where it really is; kind: sif, squashfs, directory; digest; file: the facts by which it is known again."""

    __slots__ = ("digest", "file", "kind", "mode", "owner", "path")

    def __init__(self, path: str, kind: str, digest: str, file: str, info: os.stat_result, owner: int) -> None:
        self.path, self.kind, self.digest, self.file, self.mode, self.owner = path, kind, digest, file, info.st_mode, owner


def chosen(ask: model.Ask, rule: "dict[str, Any]") -> str:
    """The image that this run uses: the one asked for, else the rule's own; "" when it uses none. Raises model.Refusal."""
    if ask.image or not rule["required"]:
        return ask.image
    if not rule["default"]:
        raise model.Refusal(201, "NW-IMAGE", "this run is to be in a container, and none is named; add --image")
    return str(rule["default"])


def ready(node: "dict[str, str]", rule: "dict[str, Any]", profile: "dict[str, Any]", name: str) -> None:
    """Can there be a container at all? node: what ``missing`` found. Raises model.Refusal."""
    spaces = profile.get("namespaces", ())
    if "mount" not in spaces or "pid" not in spaces or not profile.get("nested_userns"):
        text = f"profile {name} lets no container be made: it takes pid and mount namespaces and nested_userns; ask for batch, or ask the site"
        raise model.Refusal(203, "NW-IMAGE-PROFILE", text)
    why = node.get(rule["program"], "")
    if why:
        raise model.Refusal(202, "NW-APPTAINER", why + "; see nodewrap doctor")


def missing(policy: "dict[str, Any]") -> "dict[str, str]":
    """Why the runtime cannot work here, by program. Before the lock, while files can still be looked at."""
    programs = {rule["image"]["program"] for rule in policy["rules"] if rule.get("image")}
    return {program: why for program in programs if (why := _program(program) or userns())}


def _program(path: str) -> str:
    if os.access(path, os.X_OK) and os.path.isfile(path):
        return ""
    return f"{path} {'cannot be executed' if os.path.lexists(path) else 'is not there'} (set by apptainer.program); install Apptainer"


def userns() -> str:
    """Which switch of this node forbids the user namespace that an unprivileged container needs, or ""."""
    for path, off in (("user/max_user_namespaces", b"0"), ("kernel/unprivileged_userns_clone", b"0")):
        try:
            fd = os.open("/proc/sys/" + path, os.O_RDONLY)
        except OSError:
            continue  # a kernel without that switch
        value = os.read(fd, 16).strip()
        os.close(fd)
        if value == off:
            return f"Apptainer needs user namespaces, and {path.replace('/', '.')} is 0 here"
    return ""


def examine(fd: int, asked: str, path: str, owner: int, rule: "dict[str, Any]") -> Image:
    """The opened image, if this rule allows it. path: where it really is; owner: its uid. Closes fd. Raises model.Refusal."""
    try:
        info = os.fstat(fd)
        if not path.startswith("/") or not allowed(rule, asked, path):
            text = f"{usage.shown(path)} is none of the images that are allowed here (set by image in a [[rule]]); ask the site"
            raise model.Refusal(203, "NW-IMAGE-DENIED", text)
        file = f"dev={info.st_dev} ino={info.st_ino} size={info.st_size} mtime={info.st_mtime_ns} ctime={info.st_ctime_ns} uid={owner}"
        known = rule["pinned"].get(asked) or rule["pinned"].get(path)
        if info.st_mode & 0o170000 == 0o040000:
            if known:  # it was a file
                raise _changed(path, known)
            return Image(path, "directory", "", file, info, owner)
        return Image(path, _kind(fd, path), _digest(fd, known, path, info), file, info, owner)
    finally:
        os.close(fd)


def readable(image: Image, uid: int, launcher: str, identity: "dict[str, Any]", ranged: bool) -> None:
    """Can the payload read what the caller could? uid: the caller's; ranged: it has delegated ids. Raises model.Refusal.

    What is the caller's own goes to another id by an idmapped mount, which takes privilege (csrc/workdir.c); else the bits for others decide.
    """
    same = identity["mode"] == "log-only" or (launcher == "userns" and not ranged)
    mapped = image.owner == uid and launcher != "userns"
    wanted = 0o5 if image.kind == "directory" else 0o4
    if not same and not mapped and image.mode & wanted != wanted:
        text = f"{usage.shown(image.path)} cannot be read by the payload's user: mode {image.mode & 0o7777:04o}; chmod a+rX it, or use another mode"
        raise model.Refusal(201, "NW-IMAGE", text)


def allowed(rule: "dict[str, Any]", asked: str, path: str) -> bool:
    """Is this one of the rule's images? A name in the policy may be a link, which its owner keeps; a pattern is for what links lead to (path)."""
    named = "*" not in asked and asked in rule["names"]
    return named or any(names.tree_match(pattern, path[1:].split("/")) for pattern in rule["patterns"])


def key(fd: int, info: os.stat_result) -> "list[int]":
    """By which a file is known again: its file system and the file. Nobody but the kernel sets ctime, and every write changes it.

    The file system by its own number (statfs(2), f_fsid), which stays the same when it is mounted again; FUSE and NFS have none, and there the
    device number serves, which may not.
    """
    return [os.fstatvfs(fd).f_fsid or info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _kind(fd: int, path: str) -> str:
    head = os.read(fd, 64)
    os.lseek(fd, 0, 0)
    if head[32:32 + len(SIF)] == SIF:
        return "sif"
    if head.startswith(SQUASHFS):
        return "squashfs"
    raise model.Refusal(201, "NW-IMAGE", f"{usage.shown(path)} is not an image: neither SIF nor squashfs, nor a directory; build one with Apptainer")


def _digest(fd: int, known: "dict[str, Any] | None", path: str, info: os.stat_result) -> str:
    """Of a file that the policy names: as computed when it was applied, for the same file only. Else of the whole, or of the head."""
    if known:
        now = key(fd, info)
        same = now == known["key"] or (now[1:] == known["key"][1:] and info.st_size <= AGAIN and _sha256(fd, AGAIN + 1) == known["sha256"])
        if not same:
            raise _changed(path, known)
        return "sha256:" + str(known["sha256"])
    whole = info.st_size <= WHOLE
    return ("sha256:" if whole else f"sha256-first-{HEAD}:") + _sha256(fd, WHOLE + 1 if whole else HEAD)


def _changed(path: str, known: "dict[str, Any]") -> model.Refusal:
    why = "is not the file any more that it was when the policy was applied" if known["key"] else "was being written when the policy was applied"
    return model.Refusal(203, "NW-IMAGE-CHANGED", f"{usage.shown(path)} {why}; run nodewrap policy apply", alarm=True)


def _sha256(fd: int, most: int) -> str:
    """Of so many bytes at most."""
    state = digest.sha256()
    while most and (part := os.read(fd, min(most, 1 << 16))):
        state.update(part)
        most -= len(part)
    return str(state.hexdigest())


def words(rule: "dict[str, Any]", ask: model.Ask) -> "list[str]":
    """What stands in front of the payload's command: ``apptainer … exec … IMAGE INSIDE``."""
    home = ask.workdir or environment.TMP
    shown = [ask.workdir] * bool(ask.workdir) + ask.expose
    for path in shown:
        if any(mark in path for mark in SEPARATORS):
            raise model.Refusal(201, "NW-IMAGE", f"{usage.shown(path)}: Apptainer takes no {' '.join(SEPARATORS)} in a path; use another directory")
    binds = [environment.TMP, "/var/tmp", *ask.expose, *rule["bind"]]  # noqa: S108  the payload's own, private, in its view
    option = [word for bind in binds if bind != home for word in ("--bind", bind)]
    return [rule["program"], "--quiet", "--nocolor", "exec", "--contain", *rule["options"], "--home", home, "--pwd", home, *option, PLACE, INSIDE]


def orders(name: str) -> bool:
    """True for a variable that the runtime would obey."""
    return name.startswith(PREFIXES)


def settings(image: Image, asked: str) -> "list[str]":
    """Variables that go with ``words``: its files stay out of the work directory, and the payload can tell what it runs in."""
    return ["APPTAINER_CONFIGDIR=/tmp/.apptainer", f"NODEWRAP_IMAGE={asked or image.path}"]


def facts(image: Image) -> "list[tuple[str, str]]":
    """For the record."""
    found = [("image.path", image.path), ("image.kind", image.kind), ("image.digest", image.digest), ("image.file", image.file)]
    return [*found, ("image.runtime", "apptainer")]
