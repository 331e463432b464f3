"""``mkgltempdir``: a directory that belongs to the payload's account, inside one of the pilot's, made through glexec. docs/glexec.md, "mkgltempdir".

It runs with the pilot's rights and has no others: what it cannot do itself it asks glexec for.
"""

from __future__ import annotations

import argparse
import errno
import os
import secrets
import shutil
import stat
import subprocess
import sys
from typing import NoReturn

from nodewrap import _paths, glexec, model

#: Name of the payload's directory inside ``gltmp.<random>``.
TARGET = "target"
SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"


class Parser(argparse.ArgumentParser):
    """Its errors are the caller's mistakes, in nodewrap's words."""

    def error(self, message: str) -> NoReturn:
        raise model.Refusal(201, "NW-GLTMP-USAGE", f"{message}; see mkgltempdir -h")


def main(argv: list[str]) -> int:
    """argv without the program's name. Prints the path made. Returns 0, 201 (caller's mistake), 202 (system error), or what glexec ended with."""
    try:
        asked = _parser().parse_args(argv)
        if asked.remove:
            remove(_given(asked), asked.force)
        else:
            print(make(asked.directory or ".", mode("-t", asked.target_mode), mode("-m", asked.parent_mode)))
    except model.Refusal as refusal:
        print(f"mkgltempdir: {refusal.code}: {refusal.text}", file=sys.stderr)
        return refusal.exit
    except OSError as error:
        print(f"mkgltempdir: NW-GLTMP-SYSTEM: {error.filename!r}: {error.strerror}; check its owner, mode and free space", file=sys.stderr)
        return 202
    return 0


def _parser() -> Parser:
    parser = Parser(prog="mkgltempdir", description="Make, or remove, a directory owned by the payload's account.")
    parser.add_argument("-t", dest="target_mode", default="0700", metavar="MODE", help="octal mode of the payload's directory (0700)")
    parser.add_argument("-m", dest="parent_mode", default="0755", metavar="MODE", help="octal mode of your directory around it (0755)")
    parser.add_argument("-r", dest="remove", action="store_true", help="remove a directory that mkgltempdir made and printed")
    parser.add_argument("-f", dest="force", action="store_true", help="with -r: and what is in it")
    parser.add_argument("directory", nargs="?", default="", help="where to make it (the current directory)")
    return parser


def _given(asked: argparse.Namespace) -> str:
    if not asked.directory:
        raise model.Refusal(201, "NW-GLTMP-USAGE", "-r needs the directory that mkgltempdir printed; see mkgltempdir -h")
    return str(asked.directory)


def mode(where: str, text: str) -> int:
    """Octal mode of three or four digits without setuid and setgid bits."""
    if not (len(text) in (3, 4) and set(text) <= set("01234567") and int(text, 8) & 0o6000 == 0):
        raise model.Refusal(201, "NW-GLTMP-MODE", f"{where}: {text!r} is no mode; give octal digits without setuid and setgid, as in 0755")
    return int(text, 8)


def make(base: str, target_mode: int, parent_mode: int) -> str:
    """Make ``base/gltmp.<random>/target``: the outer directory the caller's, the inner one the payload's; returns its path.

    While the payload needs write access to the outer one, it stands in a hidden directory that shows no names (0711): without knowing the 64
    random bits of its name nobody else gets to it, to put something there first. Then it is closed and renamed into base.
    """
    base = os.path.realpath(base)
    hidden, name = f"{base}/.gltmp-{secrets.token_hex(8)}", f"{glexec.TEMP_PREFIX}{secrets.token_hex(8)}"
    if glexec.temp_directories([f"{hidden}/{name}"]) != [f"{hidden}/{name}"]:
        raise model.Refusal(201, "NW-GLTMP-PATH", f"{base!r} has characters that end a word in a shell; use a directory without blanks and quotes")
    os.mkdir(hidden, 0o700)
    try:
        _make_inside(f"{hidden}/{name}", target_mode)
        os.rename(f"{hidden}/{name}", f"{base}/{name}")
        os.chmod(f"{base}/{name}", parent_mode)  # last: rename(2) wants the owner's write permission
    finally:
        _discard(hidden, name)
    return f"{base}/{name}/{TARGET}"


def _make_inside(outer: str, target_mode: int) -> None:
    os.chmod(os.path.dirname(outer), 0o711)  # noqa: S103  to be passed through, by who knows the name
    os.mkdir(outer, 0o700)
    os.chmod(outer, 0o1777)  # noqa: S103  reached by nobody else, see make
    run_glexec("mkdir", "-m", f"{target_mode:04o}", "--", f"{outer}/{TARGET}")
    os.chmod(outer, 0o700)


def _discard(hidden: str, name: str) -> None:
    """Remove what stands of the hidden directory: itself after success, after a failure the empty ones inside too."""
    for path in (f"{hidden}/{name}/{TARGET}", f"{hidden}/{name}"):
        if os.path.isdir(path):
            os.rmdir(path)
    os.rmdir(hidden)


def remove(target: str, force: bool) -> None:
    """Remove a directory that ``make`` printed, and the outer one. Not empty: refused, unless force, which empties it through glexec."""
    target = os.path.abspath(target)
    outer = os.path.dirname(target)
    _check_ours(outer, target)
    os.chmod(outer, os.lstat(outer).st_mode & 0o777 | 0o700)  # -m may have taken the caller's own right to write
    if not _removed(target, force):
        run_glexec("find", target, "-mindepth", "1", "-delete")
        os.rmdir(target)
    if not _removed(outer, force):
        shutil.rmtree(outer)  # the caller's own files beside the target; rmtree follows no links


def _check_ours(outer: str, target: str) -> None:
    named = os.path.basename(outer).startswith(glexec.TEMP_PREFIX) and os.path.basename(target) == TARGET
    if not named or not stat.S_ISDIR(os.lstat(target).st_mode):
        raise model.Refusal(201, "NW-GLTMP-PATH", f"{target!r} was not made by mkgltempdir; give the path that it printed")
    found = os.lstat(outer)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise model.Refusal(201, "NW-GLTMP-PATH", f"{outer!r} is no directory of yours; remove it as the account that made it")


def _removed(path: str, force: bool) -> bool:
    """Try to remove the directory; False when it is not empty and force allows to go on.

    The caller needs no rights in the payload's directory for this, only in the one around it, which is its own.
    """
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not force:
            raise model.Refusal(201, "NW-GLTMP-NOTEMPTY", f"{path!r} is not empty; empty it, or use mkgltempdir -r -f") from None
        return False
    return True


def run_glexec(program: str, *words: str) -> None:
    """Run a system program as the payload. Raises model.Refusal with glexec's own exit status; glexec itself has said why on stderr."""
    found = shutil.which(program, path=SYSTEM_PATH)
    if not found:
        raise model.Refusal(202, "NW-GLTMP-SYSTEM", f"{program} is not in {SYSTEM_PATH}; install it")
    # No copy of the proxy for a mkdir, and none of the caller's other wishes.
    env = dict(os.environ, GLEXEC_TARGET_PROXY=glexec.NO_COPY, GLEXEC_MODE="lcmaps_get_account")
    command = [glexec_program(), os.path.realpath(found), *words]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        status = done.returncode if done.returncode > 0 else 128 - done.returncode
        raise model.Refusal(status, "NW-GLTMP-GLEXEC", f"{' '.join(command[:2])} ended with status {status}; its own message tells why")


def glexec_program() -> str:
    """The first of the places where pilots look for glexec (reference: CMS probe, glideinWMS), this installation's own before PATH's."""
    env = os.environ
    places = [env.get("OSG_GLEXEC_LOCATION", "")]
    places += [env[name] + "/sbin/glexec" for name in ("GLEXEC_LOCATION", "GLITE_LOCATION") if env.get(name)]
    places += [os.path.normpath(_paths.LIBEXEC + "/../../bin/glexec"), shutil.which("glexec") or "", "/usr/sbin/glexec"]
    for place in places:
        if place and os.path.isfile(place) and os.access(place, os.X_OK):
            return place
    raise model.Refusal(202, "NW-GLTMP-GLEXEC", "no glexec here; make install puts one beside mkgltempdir, or set GLEXEC_LOCATION")
