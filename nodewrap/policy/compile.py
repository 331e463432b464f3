"""From sources to the compiled policy (docs/policy.md). Root's slow path: every name looked up, every pattern cut, every ban filed under its keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from nodewrap import environment, model, profiles
from nodewrap.policy import accounts, defaults, images, lint, names, schema
from nodewrap.policy.positions import Path
from nodewrap.policy.source import Sources
from nodewrap.policy.store import FORMAT

Table = dict[str, Any]
Lookup = Callable[[str], Table]
#: RLIMIT_* numbers of Linux (asm-generic/resource.h). Memory is RLIMIT_DATA: since Linux 4.7 it counts private writable pages of all kinds, and
#: unlike RLIMIT_AS not the address space that Java and Go only reserve.
_RLIMITS = {"cpu": 0, "file_size": 1, "memory": 2, "core": 4, "processes": 6, "files": 7}
#: enum nw_limit_kind (csrc/decision.h): limits of the run as a whole, by its cgroup; scratch by its file systems.
_RUN_LIMITS = {
    "memory": 32, "swap": 33, "processes": 34, "cpus": 35, "cpu_weight": 36, "io_weight": 37, "scratch": 38,
    "io_read": 39, "io_write": 40, "io_read_ops": 41, "io_write_ops": 42,
}
_IDENTITY = {"switch": {"mode", "pool", "account", "lease"}, "map": {"mode", "inside_uid", "inside_gid", "size"}, "log-only": {"mode"}}
#: What a [[stance]] may say otherwise than [site].
_OVERRIDES = ("closed", "multi_user", "modes", "on_internal_error", "internal_error_profile", "minimum_assurance")


def compile_policy(sources: Sources, shipped: Sources, lookup: Lookup = accounts.lookup) -> Table | None:
    """The compiled policy, or None when ``sources`` holds errors afterwards. shipped: profiles.toml. Every problem is in ``sources.problems``.

    lookup: gives the account of a name or raises AccountError; `accounts.lookup` asks this node.
    """
    sources.problems += shipped.problems
    document = schema.POLICY(sources.document, (), sources.report)
    merged = {} if sources.errors() else _profiles(sources, shipped)
    if sources.errors():
        return None
    policy = _Compiler(sources, document, merged, lookup).policy()
    if not sources.errors():
        lint.lint(sources, document, policy)
    return None if sources.errors() else policy


def canonical(policy: Table) -> str:
    """One text for one policy: sorted keys, no blanks, ASCII. Its SHA-256, without ``digest``, is the digest."""
    return json.dumps({key: value for key, value in policy.items() if key != "digest"}, sort_keys=True, separators=(",", ":"))


def _profiles(sources: Sources, shipped: Sources) -> Table:
    """The merged profiles; what is wrong with them is reported at the key that the message names."""
    site: Table = sources.document.get("profile", {})
    for name, table in site.items():
        for line in profiles.check(name, table):
            _report_profile(sources, line)
    if sources.errors():
        return {}
    try:
        merged = profiles.merge(shipped.document.get("profile", {}), site)
    except profiles.ProfileError as error:
        _report_profile(sources, str(error))
        return {}
    for name, table in merged.items():
        for line in profiles.check(name, table):
            _report_profile(sources, line)
    return merged


def _report_profile(sources: Sources, line: str) -> None:
    key = line.partition(":")[0]
    sources.report(tuple(key.split(".")), "NW-POLICY-PROFILE", line)


class _Compiler:
    """One compilation. document: as the schema normalised it."""

    def __init__(self, sources: Sources, document: Table, merged: Table, lookup: Lookup) -> None:
        self.sources = sources
        self.document = document
        self.profiles = merged
        self.lookup = lookup
        self.env = _laid(document.get("env", {}), {"keep": defaults.KEEP, "strip": defaults.STRIP, "set": {}})
        self.limits = {**defaults.LIMITS, **document.get("limits", {})}
        self.asked = document.get("limits", {})
        self.base_limits = _limits(self.limits, self.asked)
        self.owner: dict[str, Path] = {}

    def policy(self) -> Table:
        document = self.document
        self._env_names(("env",), document.get("env", {}))
        pools = {name: self._pool(name, table) for name, table in document.get("pool", {}).items()}
        bans, index = self._bans()
        policy = {
            "format": FORMAT, "site": self._site(), "stances": [self._stance(n, table) for n, table in enumerate(document.get("stance", []))],
            "callers": [self._caller(n, table) for n, table in enumerate(document.get("caller", []))], "bans": bans, "ban_index": index,
            "rules": [self._rule(n, table, pools) for n, table in enumerate(document.get("rule", []))], "profiles": self.profiles,
            "env": self.env, "limits": self.base_limits, "credentials": self._credentials(), "glexec": self._glexec(),
        }
        self._unique("rule")
        self._unique("stance")
        policy["digest"] = hashlib.sha256(canonical(policy).encode()).hexdigest()
        return policy

    def report(self, path: Path, code: str, text: str, warning: bool = False) -> None:
        self.sources.report(path, code, text, warning)

    # --- site, stances, callers ---

    def _site(self) -> Table:
        path: Path = ("site",)
        table = {**defaults.SITE, **self.document.get("site", {})}
        if "site" not in self.document:
            self.report(path, "NW-POLICY-MISSING", "there is no [site]; next: add one with name, multi_user and modes")
        modes = dict.fromkeys(("log-only", "map", "switch"), "no")
        site = {**self._overrides(path, table), **self._terms(path, table), "name": table["name"], "contact": table["contact"]}
        site["modes"] = {**modes, **site["modes"]}
        return site

    def _overrides(self, path: Path, table: Table) -> Table:
        """The keys that [site] and [[stance]] share, as evaluation reads them. Undecided means no, and is said."""
        found: Table = {key: table[key] for key in _OVERRIDES if key in table}
        for key in ("multi_user", "on_internal_error"):
            if found.get(key) == "undecided":
                self._undecided((*path, key))
                found[key] = "no" if key == "multi_user" else "deny"
        if "modes" in found:
            found["modes"] = {mode: self._mode((*path, "modes", mode), stance) for mode, stance in found["modes"].items()}
        if "multi_user" in found:
            found["multi_user"] = found["multi_user"] == "yes"
        if "minimum_assurance" in found:
            found["minimum_assurance"] = model.ASSURANCE.index(found["minimum_assurance"])
        if "internal_error_profile" in found:
            self._known_profile((*path, "internal_error_profile"), found["internal_error_profile"])
        return found

    def _mode(self, path: Path, stance: str) -> str:
        if stance == "undecided":
            self._undecided(path)
        return "no" if stance == "undecided" else stance

    def _undecided(self, path: Path) -> None:
        self.report(path, "NW-POLICY-UNDECIDED", f"{schema.dotted(path)} is undecided, which refuses like no; next: decide", True)

    def _stance(self, number: int, table: Table) -> Table:
        path: Path = ("stance", number)
        changes = self._overrides(path, table)
        if not changes:
            self.report(path, "NW-POLICY-VALUE", f"stance {table['name']!r} changes nothing; next: set one of modes, multi_user, closed, …")
        return {"name": table["name"], "when": self._when(path, table.get("when", {})), "set": changes, **self._terms(path, table)}

    def _caller(self, number: int, table: Table) -> Table:
        path: Path = ("caller", number)
        if not any(key in table for key in ("account", "group", "uid")):
            self.report(path, "NW-POLICY-MISSING", "this [[caller]] names nobody; next: add account, group or uid")
        return {
            "account": [glob.split("*") for glob in table.get("account", [])], "group": table.get("group", []),
            "uid": [self._uids((*path, "uid"), text) for text in table.get("uid", [])], "vo": [vo.lower() for vo in table.get("vo", [])],
        }

    def _uids(self, path: Path, text: str) -> list[int]:
        first, _, last = text.partition("-")
        bounds = [int(first), int(last or first)]
        if not bounds[0] <= bounds[1] <= accounts.LAST_ID:
            self.report(path, "NW-POLICY-VALUE", f"caller.uid {text!r} is no range of uids; next: write FIRST-LAST, at most {accounts.LAST_ID}")
        return bounds

    # --- what rules and stances share ---

    def _terms(self, path: Path, table: Table) -> Table:
        """Dates and assertions. An assertion that nobody made yet is unmet; one that expires takes what needs it along."""
        terms: Table = {"not_before": table.get("not_before", 0), "expires": table.get("expires", 0), "unmet": [], "needs": []}
        for name in table.get("needs", []):
            self._need((*path, "needs"), name, terms)
        if "liability" in table:
            terms["needs"].append("liability: {by} on {on} ({reference})".format(**table["liability"]))
        return terms

    def _need(self, path: Path, name: str, terms: Table) -> None:
        known = self.document.get("assertion", {})
        if name not in known:
            self.report(path, "NW-POLICY-REFERENCE", f"there is no [assertion.{name}]{schema.suggest(name, known)}; next: add it")
            return
        assertion = known[name]
        if not all(key in assertion for key in ("by", "on", "reference")):
            terms["unmet"].append(name)
            return
        terms["needs"].append("{}: {by} on {on} ({reference})".format(name, **assertion))
        if assertion.get("expires"):
            terms["expires"] = min(terms["expires"] or assertion["expires"], assertion["expires"])

    def _when(self, path: Path, when: Table) -> Table:
        make: dict[str, Callable[[Any], Any]] = {
            "vo": lambda value: [vo.lower() for vo in value], "issuer": lambda value: [names.issuer(one) for one in value],
            "fqan": lambda value: [names.tree_pattern(names.fqan_parts(one)) for one in value],
            "dn": lambda value: [names.dn_pattern(one) for one in value],
            "caller": lambda value: [one.split("*") for one in value], "assurance": model.ASSURANCE.index,
            "host": lambda value: self._hosts((*path, "when", "host"), value),
        }
        return {key: make[key](value) if key in make else value for key, value in when.items()}

    def _hosts(self, path: Path, patterns: list[str]) -> Table:
        found: Table = {"names": {}, "globs": []}
        for pattern in self._host_patterns(path, patterns):
            for name in self._expanded(path, pattern):
                if "*" in name:
                    found["globs"].append(name.lower().split("*"))
                else:
                    found["names"][name.lower()] = True
        return found

    def _host_patterns(self, path: Path, patterns: list[str]) -> Iterator[str]:
        groups = self.document.get("hosts", {})
        for pattern in patterns:
            if not pattern.startswith("@"):
                yield pattern
            elif pattern[1:] in groups:
                yield from groups[pattern[1:]]
            else:
                hint = schema.suggest(pattern[1:], groups)
                self.report(path, "NW-POLICY-REFERENCE", f"there is no host group {pattern[1:]!r} in [hosts]{hint}; next: add it")

    def _expanded(self, path: Path, pattern: str) -> list[str]:
        try:
            return accounts.expand(pattern)
        except ValueError as error:
            self.report(path, "NW-POLICY-VALUE", str(error))
            return []

    def _unique(self, kind: str) -> None:
        seen: dict[str, Path] = {}
        for number, table in enumerate(self.document.get(kind, [])):
            path: Path = (kind, number, "name")
            if table["name"] in seen:
                other = "{}:{}".format(*self.sources.place(seen[table["name"]]))
                self.report(path, "NW-POLICY-DUPLICATE", f"{kind} {table['name']!r} is already in {other}; next: rename one, or delete it")
            seen.setdefault(table["name"], path)

    # --- rules ---

    def _rule(self, number: int, table: Table, pools: Table) -> Table:
        path: Path = ("rule", number)
        for name in table["profile"]:
            self._known_profile((*path, "profile"), name)
        self._env_names((*path, "env"), table.get("env", {}))
        return {
            "name": table["name"], "when": self._when(path, table.get("when", {})), **self._terms(path, table), "profiles": table["profile"],
            "identities": [self._identity(self._place_of(path, n), one, pools) for n, one in enumerate(table["identity"])],
            "limits": _limits({**self.limits, **table["limits"]}, {**self.asked, **table["limits"]}) if "limits" in table else self.base_limits,
            "env": _added(self.env, table.get("env", {})), "image": self._image(path, table),
        }

    def _image(self, path: Path, table: Table) -> Table:
        """What ``nodewrap.apptainer`` works with, {} for a rule without images. The site's and the rule's binds and options add up."""
        site, own, listed = {**defaults.APPTAINER, **self.document.get("apptainer", {})}, table.get("apptainer", {}), table.get("image", [])
        if not listed:
            for key in ("backend", "apptainer"):
                if key in table:
                    self.report((*path, key), "NW-POLICY-MISSING", f"{key} without images allows nothing; next: add image = [PATH or pattern, …]")
            return {}
        if not any(images.suits(self.profiles.get(name, {})) for name in table["profile"]):
            text = f"no container can be made in {', '.join(table['profile'])}: it takes pid and mount namespaces and nested_userns; next: add batch"
            self.report((*path, "profile"), "NW-POLICY-CONTRADICTION", text)
        plain = [one for one in listed if "*" not in one]
        return {
            "names": listed, "patterns": [names.tree_pattern(one[1:].split("/")) for one in listed], "required": "backend" in table,
            "default": plain[0] if plain else "", "pinned": self._pinned((*path, "image"), plain), "program": own.get("program", site["program"]),
            "bind": [*site["bind"], *own.get("bind", [])],
            "options": ["--" + one for one in dict.fromkeys([*site["options"], *own.get("options", [])])],
        }

    def _pinned(self, path: Path, plain: list[str]) -> Table:
        """Files that are named one by one: digested now, since a start cannot wait for it, and held to what they were."""
        found: Table = {}
        for one in plain if self.lookup is accounts.lookup else ():
            try:
                real, known, doubt = images.pin(one)
            except OSError as error:
                self.report(path, "NW-POLICY-IMAGE", f"{one}: {error.strerror}; next: correct it, or apply again when it is there", True)
                continue
            if known is images.WRITTEN:
                text = f"{one}: somebody has it open for writing, so runs with it are refused; next: end that (fuser -v {one}), and apply again"
                self.report(path, "NW-POLICY-IMAGE-OPEN", text, True)
            if doubt:
                text = f"{one}: whether it is changed unseen cannot be told, for {doubt}; next: keep it on ext4, XFS or Btrfs, as a file of root's"
                self.report(path, "NW-POLICY-IMAGE-UNSURE", text, True)
            if known:
                found[one] = found[real] = known
        return found

    def _place_of(self, rule: Path, number: int) -> Path:
        """Where identity ``number`` of a rule is written: it may be one table, or a list of them."""
        listed = (*rule, "identity", number)
        return listed if listed in self.sources.where else (*rule, "identity")

    def _identity(self, path: Path, table: Table, pools: Table) -> Table:
        for key in sorted(set(table) - _IDENTITY[table["mode"]]):
            self.report((*path, key), "NW-POLICY-VALUE", f"mode {table['mode']!r} takes no {key!r}; next: delete it, or change the mode")
        if table["mode"] == "switch":
            return self._switch(path, table, pools)
        if table["mode"] == "map":
            return self._map(path, table)
        return {"mode": "log-only"}

    def _map(self, path: Path, table: Table) -> Table:
        uid, size = table.get("inside_uid", 1000), table.get("size", 1)
        gid = table.get("inside_gid", uid)
        if 1 < size <= max(uid, gid):  # csrc/check.c: a block of one id may be any, a larger one is 0 to size - 1
            text = f"ids 0 to {size - 1} do not hold {max(uid, gid)}; next: write a larger size, or a smaller id"
            self.report((*path, "size"), "NW-POLICY-VALUE", text)
        return {"mode": "map", "inside_uid": uid, "inside_gid": gid, "size": size}

    def _switch(self, path: Path, table: Table, pools: Table) -> Table:
        exclusive = table.get("lease", "exclusive") == "exclusive"
        if ("pool" in table) == ("account" in table):
            self.report(path, "NW-POLICY-VALUE", "mode 'switch' takes either a pool or an account; next: write one of them")
            return {"mode": "switch", "exclusive": exclusive, "accounts": [], "pool": ""}
        if "account" in table:
            return {"mode": "switch", "exclusive": exclusive, "accounts": self._accounts((*path, "account"), [table["account"]]), "pool": ""}
        if table["pool"] not in pools:
            hint = schema.suggest(table["pool"], pools)
            self.report((*path, "pool"), "NW-POLICY-REFERENCE", f"there is no [pool.{table['pool']}]{hint}; next: add it")
        if not exclusive:
            self.report((*path, "lease"), "NW-POLICY-VALUE", "a pool's accounts are leased to one run each; next: delete lease, or name one account")
        return {"mode": "switch", "exclusive": True, "accounts": pools.get(table["pool"], []), "pool": table["pool"]}

    def _known_profile(self, path: Path, name: str) -> None:
        if name not in self.profiles:
            hint = schema.suggest(name, self.profiles)
            self.report(path, "NW-POLICY-REFERENCE", f"there is no profile {name!r}{hint}; next: add [profile.{name}], or use another")

    # --- accounts ---

    def _pool(self, name: str, table: Table) -> list[Table]:
        path: Path = ("pool", name)
        if ("accounts" in table) == ("prefix" in table):
            self.report(path, "NW-POLICY-VALUE", f"pool {name!r} takes either accounts or a prefix; next: write one of them")
            return []
        if "accounts" in table:
            found = [(("pool", name, "accounts"), one) for pattern in table["accounts"] for one in self._expanded((*path, "accounts"), pattern)]
        else:
            found = [(("pool", name, "prefix"), one) for one in accounts.with_prefix(table["prefix"])]
        if not found:
            self.report(path, "NW-POLICY-ACCOUNT", f"pool {name!r} has no account on this node; next: create them, or correct the names")
        if len(found) > accounts.MOST:
            text = f"pool {name!r} has {len(found)} accounts, the launcher takes {accounts.MOST}"
            self.report(path, "NW-POLICY-ACCOUNT", text + "; next: a node needs one for each job slot, name fewer")
        for place, one in found:
            self._one_pool(place, one)
        return self._accounts(path, [one for _, one in found])

    def _one_pool(self, path: Path, name: str) -> None:
        if name in self.owner:
            other = "{}:{}".format(*self.sources.place(self.owner[name]))
            self.report(path, "NW-POLICY-ACCOUNT", f"account {name!r} is already in a pool ({other}), and a lease is for one run; next: keep one")
        self.owner[name] = path

    def _accounts(self, path: Path, wanted: list[str]) -> list[Table]:
        found = []
        for name in wanted:
            if path[0] == "rule" and name in self.owner:
                self.report(path, "NW-POLICY-ACCOUNT", f"account {name!r} is in a pool; next: use the pool, or another account")
            known: Table = {"uid": -1, "groups": []}
            try:
                known = self.lookup(name)
                found.append(known)
            except accounts.AccountError as error:
                self.report(path, "NW-POLICY-ACCOUNT", str(error))
            if self._is_caller(name, known):
                self.report(path, "NW-POLICY-ACCOUNT", f"account {name!r} is a [[caller]], and a payload must not call; next: use another account")
        return found

    def _is_caller(self, name: str, known: Table) -> bool:
        """By its name, its uid or a group of its own."""
        groups = [accounts.group_name(gid) for gid in known["groups"]]
        return any(
            any(names.glob(glob.split("*"), name) for glob in table.get("account", [])) or any(group in groups for group in table.get("group", []))
            or any(int(first) <= known["uid"] <= int(last or first) for first, _, last in (text.partition("-") for text in table.get("uid", [])))
            for table in self.document.get("caller", [])
        )

    # --- bans ---

    def _bans(self) -> tuple[list[Table], Table]:
        bans = []
        index: Table = {"dn": {}, "issuer": {}, "subject": {}, "vo": {}, "caller": {}, "fqan": [], "fqan_vo": {}, "dn_glob": [], "caller_glob": []}
        for number, table in enumerate(self.document.get("ban", [])):
            self._check_ban(("ban", number), table)
            name = table.get("name", f"ban-{number + 1}")
            terms = {"not_before": table.get("not_before", 0), "expires": table.get("expires", 0)}
            bans.append({"name": name, "reason": table.get("reason", ""), **terms})
            _file_names(index, number, table)
            _file_groups(index, number, table)
        return bans, index

    def _check_ban(self, path: Path, table: Table) -> None:
        if not any(key in table for key in ("dn", "dn_glob", "fqan", "vo", "issuer", "caller")):
            self.report(path, "NW-POLICY-MISSING", "this [[ban]] names nobody; next: add dn, fqan, vo, issuer (and sub) or caller")
        for fqan in table.get("fqan", []):
            if not names.fqan_folded(fqan):
                self.report((*path, "fqan"), "NW-POLICY-VALUE", f"ban.fqan {fqan!r} names no group; next: write /VO, /VO/group or /VO/Role=…")
        if "sub" in table and "issuer" not in table:
            self.report((*path, "sub"), "NW-POLICY-MISSING", "a token's sub means something only with its issuer; next: add issuer")

    # --- the rest ---

    def _env_names(self, path: Path, env: Table) -> None:
        for key in ("keep", "set"):
            for name in env.get(key, []):
                if "*" not in name and environment.never(name):
                    text = f"{name!r} never reaches a payload: it runs code, or is the pilot's credential; next: delete it"
                    self.report((*path, key), "NW-POLICY-ENV", text)

    def _credentials(self) -> Table:
        table = {**defaults.CREDENTIALS, **self.document.get("credentials", {})}
        return {key + "_s" if key in ("clock_skew", "max_proxy_lifetime") else key: value for key, value in table.items()}

    def _glexec(self) -> Table:
        table = {**defaults.GLEXEC, **self.document.get("glexec", {})}
        if "glexec" in self.document:
            self._known_profile(("glexec", "profile"), table["profile"])
        return table


def _laid(table: Table, base: Table) -> Table:
    """[env]: its lists replace the defaults."""
    return {key: table.get(key, value) for key, value in base.items()}


def _added(base: Table, table: Table) -> Table:
    """A rule's env: its lists are added, its values win. Without one it shares the site's object, which marshal writes and reads once."""
    return base if not table else {
        "keep": base["keep"] + table.get("keep", []), "strip": base["strip"] + table.get("strip", []), "set": {**base["set"], **table.get("set", {})},
    }


def _limits(table: Table, asked: Table) -> Table:
    """asked: what the policy says itself. A default is no reason to make a run differ from node to node by what its cgroup can hold."""
    rlimits = {_RLIMITS[key]: value for key, value in table.items() if key in _RLIMITS}
    if "memory" in asked:
        asked = {"swap": 0, **asked}  # else a run with 4 GiB of memory has those and all of the node's swap
    run = {number: asked[key] for key, number in _RUN_LIMITS.items() if key in asked}
    return {"wall_s": table["wall"], "grace_s": table["grace"], "rlimits": rlimits, "run": run, "must": table["on_missing"] == "refuse"}


def _file(index: Table, kind: str, key: str, number: int) -> None:
    index[kind].setdefault(key, []).append(number)


def _file_names(index: Table, number: int, table: Table) -> None:
    """People and callers, under every key by which evaluation looks them up."""
    for dn in table.get("dn", []):
        for key in dict.fromkeys(names.ban_keys(dn)):
            _file(index, "dn", key, number)
    for glob in table.get("dn_glob", []):
        key = "".join("/" + names.fold(part) for part in names.components(glob))
        index["dn_glob"].append([key.split("*"), number])
    issuer = names.fold(names.issuer(table.get("issuer", "")))
    for sub in table.get("sub", []):
        _file(index, "subject", issuer + "\n" + sub, number)
    if issuer and "sub" not in table:
        _file(index, "issuer", issuer, number)
    for caller in table.get("caller", []):
        if "*" in caller:
            index["caller_glob"].append([caller.split("*"), number])
        else:
            _file(index, "caller", caller, number)


def _file_groups(index: Table, number: int, table: Table) -> None:
    for vo in table.get("vo", []):
        _file(index, "vo", vo.lower(), number)
    for fqan in table.get("fqan", []):
        parts = names.fqan_folded(fqan)
        index["fqan"].append([names.tree_pattern(parts), number])
        for vo in parts[:1]:
            _file(index, "fqan_vo", vo, number)
