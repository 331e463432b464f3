"""``nodewrap policy``: check, apply, rollback, show, explain (docs/policy.md)."""

from __future__ import annotations

import argparse
import datetime
import grp
import json
import os
import pwd
import sys
import time
from typing import Any

from nodewrap import _paths, describe, model, network
from nodewrap.guard import Guard, GuardError, parse_guard
from nodewrap.policy import accounts, bounds, evaluate, install, source, store
from nodewrap.policy import compile as compiler
from nodewrap.profiles import ProfileError

Table = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options to the parser of ``nodewrap policy``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="report every problem, change nothing", allow_abbrev=False)
    apply = actions.add_parser("apply", help="check, compile, and put in force on this node", allow_abbrev=False)
    rollback = actions.add_parser("rollback", help="put an earlier policy back in force", allow_abbrev=False)
    show = actions.add_parser("show", help="the policy in force", allow_abbrev=False)
    explain = actions.add_parser("explain", help="every step of one decision", allow_abbrev=False)
    config = f"directory of nodewrap.toml, policy.d and guard (default {_paths.SYSCONFDIR})"
    for action in (check, apply, rollback, show, explain):
        action.add_argument("--config", default="", metavar="DIR", help=config)
    for action in (apply, rollback, show, explain):
        action.add_argument("--policy-dir", default="", metavar="DIR", help="where applied policies are kept (default: as the guard says)")
    check.add_argument("--no-accounts", action="store_true", help="do not look accounts up: this is not the node")
    rollback.add_argument("number", nargs="?", type=int, default=0, help="generation (default: the one before)")
    show.add_argument("--json", action="store_true", help="all of it, canonical")
    _configure_explain(explain)


def _configure_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("--sources", action="store_true", help="use the sources as they stand, not the policy in force")
    for name, text in (("caller", "account that calls"), ("dn", "subject's DN"), ("vo", "subject's VO"), ("issuer", "CA or token issuer")):
        explain.add_argument("--" + name, default="", help=text)
    explain.add_argument("--sub", default="", help="sub of the subject's token")
    explain.add_argument("--fqan", action="append", default=[], help="group or role of the subject (may be repeated)")
    explain.add_argument("--assurance", choices=model.ASSURANCE, default="none", help="who vouches for the subject (default none)")
    explain.add_argument("--mode", choices=evaluate.MODES, default="", help="mode asked for")
    explain.add_argument("--profile", default="", help="profile asked for")
    explain.add_argument("--host", default=os.uname().nodename, help="node (default: this one)")
    explain.add_argument("--launcher", choices=("setuid", "socket", "userns"), default="", help="default: as the guard says")
    explain.add_argument("--at", default="", metavar="DATE", help="2027-01-31 or 2027-01-31T12:00 (UTC); default now")
    explain.add_argument("--internal-error", action="store_true", help="what happens when a part of nodewrap fails")
    explain.add_argument("--surface", action="store_true", help="also what filter and Landlock close under the profile of a permit, and why")
    explain.add_argument("--json", action="store_true", help="the verdict as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Run what ``configure`` parsed. 0: done; 1: the policy has errors, or explain denies; 202: this node cannot do it."""
    actions = {"check": _check, "apply": _apply, "rollback": _rollback, "show": _show, "explain": _explain}
    try:
        return actions[arguments.action](arguments)
    except (install.InstallError, ValueError) as error:
        return _fail(str(error))
    except OSError as error:
        where = f"{error.filename or 'file'}: {error.strerror or error}"
        step = "run 'nodewrap policy apply'" if isinstance(error, FileNotFoundError) else "run as the owner of this installation, or fix the mode"
        return _fail(f"NW-POLICY-FILE: {where}; next: {step}")


def _fail(text: str) -> int:
    print(text if text.startswith("NW-") else "NW-POLICY: " + text, file=sys.stderr)
    return 202


# --- check and apply ---------------------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    _, policy = _compiled(arguments, _unchecked if arguments.no_accounts else accounts.lookup)
    return 1 if policy is None else 0


def _apply(arguments: argparse.Namespace) -> int:
    _, policy = _compiled(arguments, accounts.lookup)
    if policy is None:
        print("NW-POLICY-REFUSED: not applied, the policy in force stays; next: correct what is named above", file=sys.stderr)
        return 1
    directory = _policy_dir(arguments)
    try:
        number = install.install(directory, policy)
    except ProfileError as error:
        raise install.InstallError(f"NW-POLICY-PROFILE: {error}; the policy in force stays") from None
    print(f"policy {number} in force: {len(policy['rules'])} rules, {len(policy['bans'])} bans, digest {policy['digest']}, in {directory}")
    return 0


def _compiled(arguments: argparse.Namespace, lookup: compiler.Lookup) -> tuple[source.Sources, Table | None]:
    """Reads and compiles; prints every problem, sorted by place. None: there were errors."""
    config = arguments.config or _paths.SYSCONFDIR
    sources = source.read(config)
    policy = compiler.compile_policy(sources, source.read_file(_shipped(config)), lookup)
    guard = _guard(config)
    if policy is not None and guard is not None:
        bounds.compare(sources, policy, guard, os.path.join(config, "guard"))
    for problem in sorted(set(sources.problems)):
        print(problem)
    return sources, policy


def _unchecked(name: str) -> Table:
    """Stands for an account of another node; such a policy is never applied."""
    return {"name": name, "uid": accounts.FIRST_ID, "gid": accounts.FIRST_ID, "groups": [accounts.FIRST_ID], "home": "/"}


def _shipped(config: str) -> str:
    """profiles.toml: beside the policy, as installed, or in a checkout."""
    places = [os.path.join(directory, "profiles.toml") for directory in (config, _paths.SYSCONFDIR, os.path.join(_paths.SITE, "policies"))]
    return next((place for place in places if os.path.exists(place)), places[0])


def _guard(config: str) -> Guard | None:
    """The guard beside the policy, None when there is none yet. Raises ValueError for a bad one."""
    path = os.path.join(config, "guard")
    try:
        with open(path, "rb") as file:
            return parse_guard(file.read())
    except FileNotFoundError:
        return None
    except GuardError as error:
        raise ValueError(f"NW-GUARD: {path}:{error.line}: {error.text}; next: correct the guard") from None


def _policy_dir(arguments: argparse.Namespace) -> str:
    """Where the generations are. The guard names what the launcher reads: the directory itself, or its link ``current``."""
    if arguments.policy_dir:
        return str(os.path.abspath(arguments.policy_dir))
    guard = _guard(arguments.config or _paths.SYSCONFDIR)
    named = guard.policy if guard else ""
    head, tail = os.path.split(named)
    return (head if tail == install.CURRENT else named) or _paths.STATEDIR + "/policy"


# --- rollback and show -------------------------------------------------------------------------------------------------------------------


def _rollback(arguments: argparse.Namespace) -> int:
    directory = _policy_dir(arguments)
    number = install.rollback(directory, arguments.number)
    print(f"policy {number} in force, in {directory}; the sources are as they were: the next apply brings them back")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    directory = _policy_dir(arguments)
    policy = _applied(directory)
    if arguments.json:
        print(json.dumps(policy, sort_keys=True, indent=1))
        return 0
    kept = " ".join(map(str, install.generations(directory)))
    print(f"policy {install.current(directory)} in {directory} (kept: {kept})\ndigest {policy['digest']}\n{_site_line(policy['site'])}")
    for kind in ("stances", "rules", "bans"):
        for item in policy[kind]:
            print(f"{kind[:-1]} {item['name']}{_rule_line(item) if kind == 'rules' else ''}{_until(item)}")
    return 0


def _site_line(site: Table) -> str:
    modes = " ".join(f"{mode}={stance}" for mode, stance in sorted(site["modes"].items()))
    state = f"closed: {site['closed']}" if site["closed"] else "open" if site["multi_user"] else "multi_user = no"
    least = model.ASSURANCE[site["minimum_assurance"]]
    return f"site {site['name']}: {state}; {modes}; assurance {least}; on internal error {site['on_internal_error']}"


def _rule_line(rule: Table) -> str:
    given = [identity["mode"] + (f" ({len(identity['accounts'])} accounts)" if "accounts" in identity else "") for identity in rule["identities"]]
    return f": {', '.join(given)}; profile {', '.join(rule['profiles'])}"


def _until(item: Table) -> str:
    if not item["expires"]:
        return ""
    return "; until " + datetime.datetime.fromtimestamp(item["expires"], datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def _applied(directory: str) -> Table:
    return store.load(os.path.join(directory, install.CURRENT, "policy.bin"))


# --- explain -----------------------------------------------------------------------------------------------------------------------------


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.sources:
        policy = _compiled(arguments, accounts.lookup)[1]
        if policy is None:
            return 1
    else:
        policy = _applied(_policy_dir(arguments))
    facts = _facts(arguments)
    verdict = evaluate.on_internal_error(policy, facts) if arguments.internal_error else evaluate.evaluate(policy, facts)
    if arguments.json:
        print(json.dumps({name: getattr(verdict, name) for name in sorted(verdict.__slots__)}, sort_keys=True, indent=1))
    else:
        told = [] if verdict.permit else [f"told to the pilot: {verdict.code}: {verdict.text}"]
        profile = policy["profiles"][verdict.profile] if verdict.permit else {}
        given = [network_line(profile)] if verdict.permit and (arguments.surface or "network" in profile) else []
        walls = describe.walls(policy["profiles"][verdict.profile]) if arguments.surface and verdict.permit else []
        print("\n".join([f"policy {policy['digest'][:16]}", *verdict.steps, *given, *told, *walls]))
    return 0 if verdict.permit else 1


def network_line(profile: Table) -> str:
    """What the profile gives of the network."""
    wanted = network.mode(profile) or ("none" if "net" in profile.get("namespaces", ()) else "host")
    if wanted != "private":
        return f"network {wanted}"
    table = profile["network"] if isinstance(profile["network"], dict) else {}
    lists = [f"{key} {', '.join(table[key]) or 'nothing'}" for key in ("deny", "allow") if key in table]
    return "; ".join(["network private", *lists, *["no dns"] * (not table.get("dns", True))])


def _facts(arguments: argparse.Namespace) -> model.Facts:
    subject = model.Subject(arguments.assurance, arguments.dn, arguments.vo)
    subject.issuer, subject.sub, subject.fqans = arguments.issuer, arguments.sub, arguments.fqan
    uid, gid, groups = _caller(arguments.caller)
    guard = _guard(arguments.config or _paths.SYSCONFDIR)
    launcher = arguments.launcher or (guard.launcher if guard else "setuid")
    facts = model.Facts(arguments.caller, uid, gid, subject, launcher, _moment(arguments.at))
    facts.groups, facts.host, facts.mode, facts.profile = groups, arguments.host, arguments.mode, arguments.profile
    return facts


def _caller(name: str) -> tuple[int, int, list[str]]:
    """Ids and groups of an account; of one that this node lacks, nobody's."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return 65534, 65534, []
    ids = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return entry.pw_uid, entry.pw_gid, [group.gr_name for group in grp.getgrall() if group.gr_gid in ids]


def _moment(text: str) -> int:
    if not text:
        return int(time.time())
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"NW-USAGE: --at {text!r} is no date; next: write 2027-01-31 or 2027-01-31T12:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp())
