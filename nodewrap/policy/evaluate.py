"""The decision: a pure function of the compiled policy and the facts (docs/policy.md, "Evaluation"). On the hot path.

Order: site stance, bans, caller, assurance, first matching rule, default deny. What the pilot asks for only picks among what rule and site
allow, and never less than they would give unasked (K06). Every step taken is appended to ``Verdict.steps``; ``Verdict.text`` is what the pilot
reads, and says nothing of other users, accounts or rules (B28).
"""

from nodewrap import model
from nodewrap.policy import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Weakest separation first.
MODES = ("log-only", "map", "switch")
CREDENTIAL = 2
#: What a launcher can give at all; one that is not named here can give every mode.
_LAUNCHER_MODES = {"userns": ("log-only", "map")}

_TEXT = {
    "NW-SITE-CLOSED": "this site takes no payloads of other users (set in its [site] or [[stance]])",
    "NW-BANNED": "a party to this request is banned here (set in a [[ban]])",
    "NW-CALLER": "this account may not call for this subject (set in [[caller]])",
    "NW-ASSURANCE": "too little vouches for the subject (set by minimum_assurance or a rule)",
    "NW-NO-RULE": "no rule permits this request (set by the [[rule]]s)",
    "NW-EXPIRED": "the permission for this request is not in force at this date (set in a [[rule]])",
    "NW-CONDITION": "the permission for this request waits for an assertion (set by needs in a [[rule]])",
    "NW-MODE": "this mode of identity is not given here (set by modes and identity)",
    "NW-PROFILE": "this profile is not given here (set by profile in a [[rule]])",
    "NW-BYPASS": "this site does not run payloads past an internal error (set by on_internal_error)",
}


class _View:
    """The facts, each name made canonical once. stance: the effective site table."""

    __slots__ = ("assurance", "dn", "facts", "fqans", "groups", "host", "issuer", "policy", "short", "stance", "sub", "verdict", "vo")

    def __init__(self, policy: "dict[str, Any]", facts: model.Facts) -> None:
        subject = facts.subject
        self.policy = policy
        self.facts = facts
        self.verdict = model.Verdict()
        self.stance: dict[str, Any] = policy["site"]
        self.assurance = model.ASSURANCE.index(subject.assurance) if subject.assurance in model.ASSURANCE else 0
        self.dn = names.components(subject.dn)
        self.fqans = [names.fqan_parts(fqan) for fqan in subject.fqans]
        self.groups = facts.groups
        self.host = facts.host.lower()
        self.short = self.host.partition(".")[0]
        self.issuer = names.issuer(subject.issuer)
        self.sub = subject.sub
        self.vo = subject.vo.lower() or _callers_vo(policy, facts, self.assurance)

    def step(self, text: str) -> None:
        self.verdict.steps.append(text)

    def deny(self, code: str, step: str, hint: str = "") -> bool:
        """Settles the verdict; always True."""
        verdict = self.verdict
        contact = self.policy["site"]["contact"]
        verdict.code = code
        verdict.text = _TEXT[code] + (": " + hint if hint else "") + "; next: ask " + (contact or "the site") + ", the record of this run says why"
        verdict.steps.append("deny " + code + ": " + step)
        return True


def evaluate(policy: "dict[str, Any]", facts: model.Facts) -> model.Verdict:
    """Verdict on one request. Pure, total, deterministic; denies with exit 203. policy: from `store.load`."""
    view = _view(policy, facts)
    _ = _closed(view) or _banned(view) or _caller(view) or _assurance(view) or _rules(view)
    return view.verdict


def on_internal_error(policy: "dict[str, Any]", facts: model.Facts) -> model.Verdict:
    """May the caller's uid run the payload although a part of nodewrap failed? Site, bans and caller come first (I11); always an alarm."""
    view = _view(policy, facts)
    view.verdict.alarm = True
    _ = _closed(view) or _banned(view) or _caller(view) or _bypass(view)
    return view.verdict


def banned(policy: "dict[str, Any]", facts: model.Facts) -> str:
    """Name and reason of the ban that covers these facts, or "": for payloads that run already (I12)."""
    view = _view(policy, facts)
    return view.verdict.rule + ": " + view.verdict.steps[-1] if _banned(view) else ""


def _view(policy: "dict[str, Any]", facts: model.Facts) -> _View:
    view = _View(policy, facts)
    view.stance = _stance(view)
    return view


# --- site stance -------------------------------------------------------------------------------------------------------------------------


def _stance(view: _View) -> "dict[str, Any]":
    """The [site] table with every matching [[stance]] laid over it, in order."""
    site: dict[str, Any] = dict(view.policy["site"])
    view.step("site " + (site["name"] or "(unnamed)"))
    for stance in view.policy["stances"]:
        miss = _miss(stance, view)
        view.step("stance " + stance["name"] + (": no, " + miss[1] if miss else ": applies"))
        if not miss:
            modes = dict(site["modes"], **stance["set"].get("modes", {}))
            site.update(stance["set"], modes=modes)
    return site


def _closed(view: _View) -> bool:
    site = view.stance
    if site["closed"]:
        return view.deny("NW-SITE-CLOSED", "closed = " + site["closed"])
    if not site["multi_user"]:
        return view.deny("NW-SITE-CLOSED", 'multi_user = "no"')
    if site["unmet"]:
        return view.deny("NW-SITE-CLOSED", "site needs " + ", ".join(site["unmet"]))
    return False


def _assurance(view: _View) -> bool:
    least = view.stance["minimum_assurance"]
    if view.assurance >= least:
        view.step("assurance " + model.ASSURANCE[view.assurance] + ": enough, site asks for " + model.ASSURANCE[least])
        return False
    return view.deny("NW-ASSURANCE", "site asks for " + model.ASSURANCE[least], _has(view, least))


def _has(view: _View, least: int) -> str:
    return "needs " + model.ASSURANCE[least] + ", has " + model.ASSURANCE[view.assurance]


# --- bans --------------------------------------------------------------------------------------------------------------------------------


def _banned(view: _View) -> bool:
    for number, why in _hits(view):
        ban = view.policy["bans"][number]
        over = _over(ban, view)
        if over:
            view.step("ban " + ban["name"] + ": " + over)
        else:
            view.verdict.rule = ban["name"]
            return view.deny("NW-BANNED", "ban " + ban["name"] + " by " + why + (", " + ban["reason"] if ban["reason"] else ""))
    view.step("bans: none applies")
    return False


def _over(item: "dict[str, Any]", view: _View) -> str:
    """Why its dates keep a ban from being in force now, or ""."""
    if item["expires"] and item["expires"] <= view.facts.now:
        return "expired"
    return "not yet in force" if item["not_before"] > view.facts.now else ""


def _hits(view: _View) -> "list[tuple[int, str]]":
    """Every ban that names a party to the request, as (index, by what)."""
    index = view.policy["ban_index"]
    subject = view.facts.subject
    looked = [("dn", key) for key in names.subject_keys(subject.dn)] if subject.dn else []
    looked += [("issuer", names.fold(view.issuer)), ("subject", names.fold(view.issuer) + "\n" + view.sub), ("vo", view.vo)]
    looked += [("caller", view.facts.caller)]
    hits = [(number, kind) for kind, key in looked for number in index[kind].get(key, ())]
    hits += [(number, "caller") for glob, number in index["caller_glob"] if names.glob(glob, view.facts.caller)]
    if subject.dn and index["dn_glob"]:
        keys = names.subject_keys(subject.dn)
        hits += [(number, "dn_glob") for glob, number in index["dn_glob"] if any(names.glob(glob, key) for key in keys)]
    return hits + _fqan_hits(view, index) + _unproven(view, index)


def _fqan_hits(view: _View, index: "dict[str, Any]") -> "list[tuple[int, str]]":
    if not index["fqan"]:
        return []
    folded = [names.fqan_folded(fqan) for fqan in view.facts.subject.fqans]
    return [(number, "fqan") for pattern, number in index["fqan"] if any(names.tree_match(pattern, parts) for parts in folded)]


def _unproven(view: _View, index: "dict[str, Any]") -> "list[tuple[int, str]]":
    """Who shows no VO, FQAN or account name where one of those is banned cannot be told from the banned (B26: the stripped AC)."""
    hits = []
    if not view.vo:
        hits += [(number, "vo: the subject shows none") for key in index["vo"] for number in index["vo"][key]]
    shown = [names.fqan_folded(fqan)[:1] for fqan in view.facts.subject.fqans] if index["fqan_vo"] else []
    for vo in index["fqan_vo"]:
        if view.vo in ("", vo) and [vo] not in shown:
            hits += [(number, "fqan: the subject shows none of " + vo) for number in index["fqan_vo"][vo]]
    if not view.facts.caller:
        hits += [(n, "caller: the account has no name") for key in index["caller"] for n in index["caller"][key]]
        hits += [(number, "caller: the account has no name") for _, number in index["caller_glob"]]
    return hits


# --- caller ------------------------------------------------------------------------------------------------------------------------------


def _is_caller(entry: "dict[str, Any]", facts: model.Facts) -> bool:
    if any(low <= facts.uid <= high for low, high in entry["uid"]):
        return True
    return any(group in entry["group"] for group in facts.groups) or any(names.glob(glob, facts.caller) for glob in entry["account"])


def _callers_vo(policy: "dict[str, Any]", facts: model.Facts, assurance: int) -> str:
    """The caller's VO stands in for a subject without one, unless a credential was shown: that could have proved its VO, and did not."""
    if assurance >= CREDENTIAL:
        return ""
    found: list[str] = [entry["vo"][0] for entry in policy["callers"] if len(entry["vo"]) == 1 and _is_caller(entry, facts)]
    return found[0] if found and found.count(found[0]) == len(found) else ""


def _caller(view: _View) -> bool:
    known = [entry for entry in view.policy["callers"] if _is_caller(entry, view.facts)]
    name = view.facts.caller or "uid " + str(view.facts.uid)
    if not known:
        return view.deny("NW-CALLER", name + " is in no [[caller]]")
    if any(not entry["vo"] or view.vo in entry["vo"] for entry in known):
        view.step("caller " + name + ": known" + (", vo " + view.vo if view.vo else ""))
        return False
    return view.deny("NW-CALLER", name + " is bound to a vo that is not the subject's (" + (view.vo or "none shown") + ")")


# --- rules -------------------------------------------------------------------------------------------------------------------------------


def _in_vo(view: _View, value: "list[str]") -> bool:
    return view.vo in value


def _in_fqan(view: _View, value: "list[list[object]]") -> bool:
    return any(names.tree_match(pattern, parts) for parts in view.fqans for pattern in value)


def _in_dn(view: _View, value: "list[list[object]]") -> bool:
    return any(names.tree_match(pattern, view.dn) for pattern in value)


def _in_issuer(view: _View, value: "list[str]") -> bool:
    return view.issuer in value


def _in_sub(view: _View, value: "list[str]") -> bool:
    return view.sub in value


def _in_caller(view: _View, value: "list[list[str]]") -> bool:
    return any(names.glob(glob, view.facts.caller) for glob in value)


def _in_group(view: _View, value: "list[str]") -> bool:
    return any(group in value for group in view.groups)


def _in_host(view: _View, value: "dict[str, Any]") -> bool:
    if view.host in value["names"] or view.short in value["names"]:
        return True
    return any(names.glob(glob, view.host) or names.glob(glob, view.short) for glob in value["globs"])


def _in_launcher(view: _View, value: "list[str]") -> bool:
    return view.facts.launcher in value


def _in_assurance(view: _View, value: int) -> bool:
    return view.assurance >= value


#: In the order tested: what a site knows of itself first, so that the closest miss is the rule meant for this request; assurance last.
CONDITIONS: "dict[str, Callable[[_View, Any], bool]]" = {
    "host": _in_host, "launcher": _in_launcher, "vo": _in_vo, "caller": _in_caller, "group": _in_group,
    "issuer": _in_issuer, "sub": _in_sub, "dn": _in_dn, "fqan": _in_fqan, "assurance": _in_assurance,
}
_NAMES = tuple(CONDITIONS)
_DATES = len(CONDITIONS)
_NEEDS = _DATES + 1


def _miss(item: "dict[str, Any]", view: _View) -> "tuple[int, str] | None":
    """How far ``item`` (a rule or a stance) got before it failed to match, and on what; None when it matches."""
    when = item["when"]
    for rank, name in enumerate(_NAMES):
        if name in when and not CONDITIONS[name](view, when[name]):
            return rank, name
    if item["not_before"] > view.facts.now:
        return _DATES, "not yet in force"
    if item["expires"] and item["expires"] <= view.facts.now:
        return _DATES, "expired"
    return (_NEEDS, "needs " + ", ".join(item["unmet"])) if item["unmet"] else None


def _rules(view: _View) -> bool:
    best: tuple[int, str] = (-1, "there are no rules")
    closest: dict[str, Any] = {}
    for rule in view.policy["rules"]:
        miss = _miss(rule, view)
        if miss is None:
            view.step("rule " + rule["name"] + ": matches")
            return _permit(view, rule)
        view.step("rule " + rule["name"] + ": no, " + miss[1])
        if miss[0] > best[0]:
            best, closest = miss, rule
    return _no_rule(view, best, closest)


def _no_rule(view: _View, miss: "tuple[int, str]", closest: "dict[str, Any]") -> bool:
    step = "closest is rule " + closest["name"] + ", which fails on: " + miss[1] if closest else miss[1]
    if miss[1] == "assurance":
        return view.deny("NW-ASSURANCE", step, _has(view, closest["when"]["assurance"]))
    if miss[0] == _DATES:
        return view.deny("NW-EXPIRED", step)
    if miss[0] == _NEEDS:
        return view.deny("NW-CONDITION", step)
    return view.deny("NW-NO-RULE", step, "the closest fails on " + miss[1] if closest else "")


def _mode_ok(view: _View, mode: str) -> bool:
    """``require`` on a mode makes it the least: weaker ones are refused even where they are allowed."""
    modes = view.stance["modes"]
    least = max([MODES.index(name) for name in MODES if modes[name] == "require"], default=0)
    return modes[mode] != "no" and MODES.index(mode) >= least and mode in _LAUNCHER_MODES.get(view.facts.launcher, MODES)


def _identity(view: _View, rule: "dict[str, Any]") -> "dict[str, Any] | None":
    """The first identity of the rule that site and launcher give, or the one asked for if it separates at least as well."""
    given = [identity for identity in rule["identities"] if _mode_ok(view, identity["mode"])]
    if not given or not view.facts.mode:
        return given[0] if given else None
    least = MODES.index(given[0]["mode"])
    asked = [identity for identity in given if identity["mode"] == view.facts.mode and MODES.index(identity["mode"]) >= least]
    return asked[0] if asked else None


def _permit(view: _View, rule: "dict[str, Any]") -> bool:
    verdict = view.verdict
    verdict.rule = rule["name"]
    identity = _identity(view, rule)
    if identity is None:
        return view.deny("NW-MODE", _mode_step(view, rule), "asked for " + view.facts.mode if view.facts.mode else "")
    profile = view.facts.profile or rule["profiles"][0]
    if profile not in rule["profiles"]:
        return view.deny("NW-PROFILE", "rule gives " + ", ".join(rule["profiles"]), "asked for " + profile)
    for need in rule["needs"]:
        view.step("needs " + need)
    _grant(verdict, identity, profile, rule["limits"], rule["env"])
    verdict.image = rule.get("image", {})
    if verdict.image:
        view.step("image: one of " + ", ".join(verdict.image["names"]))
    return True


def _mode_step(view: _View, rule: "dict[str, Any]") -> str:
    modes = view.stance["modes"]
    site = ", ".join(name + "=" + modes[name] for name in MODES)
    return "rule gives " + ", ".join(i["mode"] for i in rule["identities"]) + "; site " + site + "; launcher " + view.facts.launcher


def _grant(verdict: model.Verdict, identity: "dict[str, Any]", profile: str, limits: "dict[str, Any]", env: "dict[str, Any]") -> None:
    verdict.permit = True
    verdict.exit = 0
    verdict.identity = identity
    verdict.mode = identity["mode"]
    verdict.profile = profile
    verdict.limits = limits
    verdict.env = env
    verdict.steps.append("permit: mode " + verdict.mode + ", profile " + profile)


def _unasked(view: _View) -> str:
    """A ban in force that only a subject's name, VO or FQAN can tell, when nothing vouches for those; or ""."""
    index = view.policy["ban_index"]
    known = view.assurance >= max(1, view.stance["minimum_assurance"]) and (view.facts.subject.dn or view.facts.subject.sub)
    listed = [number for kind in ("dn", "issuer", "subject", "vo") for many in index[kind].values() for number in many]
    listed += [number for kind in ("fqan", "dn_glob") for _, number in index[kind]]
    return next((ban["name"] for ban in map(view.policy["bans"].__getitem__, listed) if not known and not _over(ban, view)), "")


#: What is known of a request whatever failed.
_ALWAYS = ("host", "launcher", "caller", "group")


def _contained(view: _View) -> str:
    """A rule that may be meant for this caller and runs payloads in a container alone, or ""."""
    for rule in view.policy["rules"]:
        known = {name: value for name, value in rule["when"].items() if name in _ALWAYS}
        if rule.get("image", {}).get("required") and not _miss(dict(rule, when=known), view):
            return str(rule["name"])
    return ""


def _bypass(view: _View) -> bool:
    if view.stance["on_internal_error"] != "log-only":
        return view.deny("NW-BYPASS", 'on_internal_error = "deny"')
    ban, rule = _unasked(view), _contained(view)
    if ban:
        return view.deny("NW-BYPASS", "ban " + ban + " cannot be asked: nothing vouches for the subject's name")
    if rule:
        return view.deny("NW-BYPASS", "rule " + rule + " wants a container, which a bypass has none of")
    view.verdict.rule = "on_internal_error"
    _grant(view.verdict, {"mode": "log-only"}, view.stance["internal_error_profile"], view.policy["limits"], view.policy["env"])
    return True
