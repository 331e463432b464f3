"""``nodewrap escape-test``: is my node safe?"""

from __future__ import annotations

import argparse
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nodewrap import _paths
from nodewrap.decide import delegated
from nodewrap.escape.model import Caller, Configuration, KeyUnknownError, Result, attacks
from nodewrap.escape.report import FORMATS, terminal
from nodewrap.escape.suite import Suite, SuiteError, not_played, read_guard
from nodewrap.guard import Guard, GuardError

INTERRUPTED = 130


def configure(parser: argparse.ArgumentParser) -> None:
    """Add escape-test's options to its parser."""
    parser.add_argument("--launcher", help="refuse to test another one than this (setuid, userns)")
    parser.add_argument("--mode", action="append", help="only this mode; may be repeated (default: all that the guard allows)")
    parser.add_argument("--profile", action="append", help="only this profile; may be repeated (default: all that the guard allows)")
    parser.add_argument("--only", action="append", metavar="ID|SURFACE", help="only this attack, or this surface's (a letter); may be repeated")
    parser.add_argument("--report", choices=sorted(FORMATS), help="also write a report in this format")
    parser.add_argument("--output", metavar="FILE", help="where to (default: standard output)")
    parser.add_argument("--caller", metavar="ACCOUNT", help="as root: the pilot account that calls (default: the first one that the guard names)")
    parser.add_argument("--home", metavar="DIR", help="where to work, shown by no profile (default: the caller's home; root: the state directory)")
    parser.add_argument("--declare", action="append", default=[], metavar="NAME=TEXT", help="who the payloads' user is, as for 'nodewrap run'")
    parser.add_argument("--credential", metavar="FILE", help="the payloads' proxy, as for 'nodewrap run'")
    parser.add_argument("--list", action="store_true", help="print the attacks and leave")


def main(arguments: argparse.Namespace) -> int:
    """0: all stopped, or documented. 1: something is open or left behind, or the suite failed. 201, 202: it could not be run. 130: interrupted."""
    try:
        chosen = attacks(tuple(arguments.only or ()))
        if arguments.list:
            sys.stdout.writelines(f"{one.id}  {one.row.tries}\n" for one in chosen)
            return 0
        guard = read_guard(_paths.GUARD)
        caller = _caller(arguments.caller, guard)
        wanted = _configurations(arguments, guard, caller)
    except KeyUnknownError as word:
        return _fail(201, f"NW-USAGE: --only {word}: no attack or surface of that name; next: nodewrap escape-test --list")
    except (OSError, GuardError) as wrong:
        why = getattr(wrong, "strerror", None) or wrong
        return _fail(202, f"NW-ESCAPE-SITE: {_paths.GUARD}: {why}: nodewrap is not, or half, installed here; next: nodewrap doctor")
    except SuiteError as why:
        return _fail(202, str(why))
    results: list[Result] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended either way, the node is clean
    status = 0
    try:
        home = Path(arguments.home or (caller.home if os.geteuid() else guard.state))
        with Suite(caller, home, _other(guard), tell=lambda one: terminal.progress(one, results)) as suite:
            ready = [at for at in wanted if _starts(at, caller)]
            if not ready:
                return _fail(202, "NW-ESCAPE-POLICY: the policy lets this caller start nothing, see above; next: --declare or --credential")
            suite.run(chosen, ready)
    except SuiteError as why:
        return _fail(202, str(why))
    except KeyboardInterrupt:
        sys.stderr.write("NW-ESCAPE-INTERRUPTED: what ran so far is below; the node is clean\n")
        status = INTERRUPTED
    every = [*results, *(one for one in not_played() if not arguments.only or one.attack in arguments.only or one.attack[0] in arguments.only)]
    sys.stdout.write(terminal.table(every))
    if arguments.report:
        text = FORMATS[arguments.report](every)
        if arguments.output:
            Path(arguments.output).write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
    return status or int(any(one.is_failure for one in results))


def _fail(status: int, text: str) -> int:
    sys.stderr.write(text + "\n")
    return status


def _caller(name: str | None, guard: Guard) -> Caller:
    """Raises SuiteError."""
    if os.geteuid() != 0:
        entry = pwd.getpwuid(os.geteuid())
    elif name:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise SuiteError(f"NW-ESCAPE-CALLER: there is no account {name}; next: name one that may call nodewrap") from None
    else:
        found = [one for one in pwd.getpwall() if any(r.first <= one.pw_uid <= r.last for r in guard.caller_uid)]
        if not found:
            raise SuiteError(f"NW-ESCAPE-CALLER: no account has a caller-uid of {_paths.GUARD}; next: --caller ACCOUNT, the pilots' account")
        entry = found[0]
    if entry.pw_uid == 0:
        raise SuiteError("NW-ESCAPE-CALLER: root is no pilot; next: --caller ACCOUNT")
    return Caller(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)), entry.pw_dir)


def _configurations(arguments: argparse.Namespace, guard: Guard, caller: Caller) -> list[Configuration]:
    """Raises SuiteError."""
    if arguments.launcher and arguments.launcher != guard.launcher:
        raise SuiteError(f"NW-ESCAPE-LAUNCHER: {_paths.GUARD} is of launcher {guard.launcher}; next: call the other installation's nodewrap")
    who = tuple(word for text in arguments.declare for word in ("--declare", text))
    who += ("--credential", arguments.credential) if arguments.credential else ()
    binary = str(Path(_paths.LIBEXEC).parents[1] / "bin/nodewrap")
    found = [
        Configuration(guard.launcher, mode, profile, binary, _paths.GUARD, who, delegated=delegated(caller.name, caller.uid) is not None)
        for mode, profiles in guard.allow.items() for profile in profiles
        if (not arguments.mode or mode in arguments.mode) and (not arguments.profile or profile in arguments.profile)
    ]
    if not found:
        raise SuiteError(f"NW-ESCAPE-CONFIGURATION: {_paths.GUARD} allows none of these modes and profiles; next: leave out --mode and --profile")
    return found


def _other(guard: Guard) -> tuple[int, int] | None:
    """An account that payloads may get, for controls that are another uid."""
    if os.geteuid() != 0:
        return None
    return next(((one.pw_uid, one.pw_gid) for one in pwd.getpwall() if any(r.first <= one.pw_uid <= r.last for r in guard.switch_uid)), None)


def _starts(at: Configuration, caller: Caller) -> bool:
    """The policy lets the caller start something there; else its own words are told."""
    ids: dict[str, Any] = {}
    if os.geteuid() == 0:  # in a session and with an environment of its own: until the launcher is executed, others of the caller's may trace it
        ids = {"user": caller.uid, "group": caller.gid, "extra_groups": caller.groups, "start_new_session": True, "env": {"PATH": os.defpath}}
    argv = [at.binary, "run", *at.who, "--mode", at.mode, "--profile", at.profile, "--", "/bin/true"]
    try:
        ran = subprocess.run(argv, cwd="/", capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL, **ids)
        why = ran.stderr.decode(errors="backslashreplace").strip() if ran.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as wrong:
        why = str(wrong)
    if why:
        sys.stderr.write(f"{at.name}: left out: {why}\n")
    return not why
