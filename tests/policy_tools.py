"""Policies and facts for the policy tests: real sources, real compiler; only accounts come from a table, because pools are not on every machine."""

from __future__ import annotations

from pathlib import Path

from nodewrap import model
from nodewrap.policy import accounts, source
from nodewrap.policy import compile as compiler

SHIPPED = source.read_file(str(Path(__file__).parents[1] / "policies" / "profiles.toml"))
NOW = 1795219200  # 2026-11-21T00:00Z

SITE = """\
[site]
name = "T"
multi_user = "yes"
modes = { switch = "allow", map = "allow", log-only = "allow" }
"""
CALLER = '[[caller]]\naccount = ["plt*"]\n'


def lookup(name):
    """Accounts usr00 to usr99 exist, uid 20000 and up."""
    if not (name.startswith("usr") and name[3:].isdigit()):
        raise accounts.AccountError(f"account {name!r} does not exist on this node; next: create it, or correct the name")
    number = 20000 + int(name[3:])
    return {"name": name, "uid": number, "gid": number, "groups": [number], "home": f"/home/{name}"}


def compiled(directory, text, drop_ins=None, find=lookup):
    """(policy or None, problems as ``file:line: …`` with bare file names) of these sources."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    (directory / "nodewrap.toml").write_text(text)
    for name, content in (drop_ins or {}).items():
        (directory / "policy.d").mkdir(mode=0o755, exist_ok=True)
        (directory / "policy.d" / name).write_text(content)
    sources = source.read(str(directory))
    policy = compiler.compile_policy(sources, SHIPPED, find)
    prefix = str(directory) + "/"
    return policy, [str(problem).replace(prefix, "") for problem in sorted(sources.problems)]


def good(directory, text, **more):
    """The policy; fails when the sources have an error."""
    policy, problems = compiled(directory, text, **more)
    assert policy is not None, problems
    return policy


def facts(caller="plt01", dn="/DC=org/DC=example/CN=Ann", vo="atlas", fqans=("/atlas/Role=NULL/Capability=NULL",), assurance="credential", **more):
    """Facts; keywords name attributes of Subject (issuer, sub) or Facts (mode, profile, host, launcher, now, groups, uid)."""
    subject = model.Subject(assurance, dn, vo)
    subject.fqans = list(fqans)
    subject.issuer, subject.sub = more.pop("issuer", ""), more.pop("sub", "")
    made = model.Facts(caller, more.pop("uid", 1500), 1500, subject, more.pop("launcher", "setuid"), more.pop("now", NOW))
    made.host = "wn01.example.org"
    for name, value in more.items():
        setattr(made, name, value)
    return made
