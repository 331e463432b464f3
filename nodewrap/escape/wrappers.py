"""How a command is started: by nodewrap, by nothing at all (the controls), or by another tool (the peers)."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nodewrap.escape.model import Caller, Configuration

#: What payloads of any uid can run.
PYTHON = "/usr/bin/python3"
PATH = "/usr/local/bin:/usr/bin:/bin"
Words = Sequence[str]


@dataclass(frozen=True)
class Wrapper:
    """name: in the report. argv(command, work directory, options of ``nodewrap run``): what is executed. uid, gid: as whom (None: the caller).
    work: whom the site gives the work directory first (None: it stays the pilot's). status: it takes ``--status-fd`` and tells there whether the
    payload started. protects: it is no control."""

    name: str
    argv: Callable[[Words, str, Words], list[str]]
    uid: int | None = None
    gid: int | None = None
    status: bool = False
    protects: bool = True
    configuration: Configuration | None = None
    work: tuple[int, int] | None = None


def nodewrap(at: Configuration) -> Wrapper:
    """The thing itself."""

    def argv(command: Words, workdir: str, options: Words) -> list[str]:
        how = ["--mode", at.mode, "--profile", at.profile, "--workdir", workdir]
        return [at.binary, "run", *at.who, *how, *options, "--", *command]

    return Wrapper(at.name, argv, status=True, configuration=at)


def _plain(command: Words, workdir: str, options: Words) -> list[str]:
    return list(command)


def _rootless(command: Words, workdir: str, options: Words) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--", *command]


def controls(caller: Caller, other: tuple[int, int] | None) -> dict[str, Wrapper]:
    """Wrappers that protect nothing. bare: a process of the pilot's. root: one of root's. rootless: root of a user namespace, as "R" of the catalogue
    has it. switched: only the uid is another one, as glexec did (other: that uid and gid, None where there is none)."""
    found = {
        "bare": Wrapper("bare", _plain, protects=False), "rootless": Wrapper("rootless", _rootless, protects=False),
        "root": Wrapper("root", _plain, 0, 0, protects=False),
    }
    if other:
        found["switched"] = Wrapper("switched", _plain, *other, protects=False, work=other)
    return found


def _source_in_a_file(command: Words, workdir: str) -> list[str]:
    """Python code behind -c, as a file of the work directory."""
    words = list(command)
    if "-I" in words[:-1] and words[words.index("-I") + 1] == "-c":
        at = words.index("-I") + 1
        path = f"{workdir}/.source-{secrets.token_hex(8)}.py"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "w", encoding="utf-8") as file:
            file.write(words[at + 1])
        words[at:at + 2] = [path]
    return words


def peers(other: tuple[int, int] | None, image: str = "") -> list[Wrapper]:
    """The tools that this node has, set up as their documentation recommends for untrusted work. image: a directory or SIF file for Apptainer."""

    def bwrap(command: Words, workdir: str, options: Words) -> list[str]:
        walls = ["--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc", "--proc", "/proc"]
        links = [word for name in ("bin", "lib", "lib64", "sbin") for word in ("--symlink", f"usr/{name}", f"/{name}")]
        tmp = ["--tmpfs", "/tmp"]  # noqa: S108  it is the new one's place
        return ["bwrap", *walls, *links, "--dev", "/dev", *tmp, "--bind", workdir, workdir, "--chdir", workdir, "--", *command]

    def firejail(command: Words, workdir: str, options: Words) -> list[str]:
        walls = ["--allusers", "--private-tmp", "--private-dev", "--net=none", "--seccomp", "--caps.drop=all", "--nonewprivs"]
        command = _source_in_a_file(command, workdir)  # it takes no words longer than 4 KiB; --allusers: the work directory is not below HOME
        return ["firejail", "--quiet", "--noprofile", *walls, "--", *command]

    def apptainer(command: Words, workdir: str, options: Words) -> list[str]:
        return [str(shutil.which("apptainer")), "-q", "exec", "-C", "--bind", f"{workdir}:{workdir}", "--pwd", workdir, image, *command]

    def sudo(command: Words, workdir: str, options: Words) -> list[str]:
        assert other is not None
        return ["sudo", "-n", "-u", f"#{other[0]}", "-g", f"#{other[1]}", "--", *command]

    found = [Wrapper("plain switch", _plain, *other, work=other)] if other else []
    if other and shutil.which("sudo") and os.geteuid() == 0:
        found.append(Wrapper("sudo -u", sudo, 0, 0, work=other))
    found += [Wrapper("bwrap", bwrap)] if shutil.which("bwrap") else []
    found += [Wrapper("firejail", firejail)] if shutil.which("firejail") else []
    return found + ([Wrapper("apptainer -C", apptainer)] if image and shutil.which("apptainer") else [])
