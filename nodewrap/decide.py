"""From a request to a decision: parse, verify, evaluate, and say it in the launcher's words (docs/wire.md, DECISION). Hot path.

Nothing here is trusted by the launcher. Facts for the record are gathered as they become known, so that a denial says whom it hit.
"""

import os
import pwd

from nodewrap import digest, environment, glexec, model, request, usage, wire
from nodewrap.policy import evaluate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PERMIT = 1
VERDICTS = {203: 2, 201: 3, 202: 4}
KINDS = {"caller": 1, "ca": 2, "voms": 3, "image": 4}
CREDENTIAL_MAX = 1 << 20
ENOTDIR = 20
ERRNO = {
    2: "does not exist", 13: "cannot be read by the caller", 20: "leads through a file", 21: "is a directory", 22: "is not a regular file",
    27: "is larger than 1 MiB", 40: "is a symbolic link",
}


class Request:
    """The REQUEST frame: launcher, uid, gid, groups, pid, ppid, cwd, umask, argv, env, host, boot, now (s), run. argv, env, cwd are bytes."""

    __slots__ = ("argv", "boot", "cwd", "env", "gid", "groups", "host", "launcher", "now", "pid", "ppid", "run", "uid", "umask")

    def __init__(self, fields: "list[tuple[int, bytes]]") -> None:
        one: dict[int, bytes] = {}
        many: dict[int, list[bytes]] = {5: [], 10: [], 11: []}
        for tag, value in fields:
            if tag in many:
                many[tag].append(value)
            elif one.setdefault(tag, value) is not value:
                raise wire.WireError("a single field stands twice")
        if one.pop(1, b"") != (1).to_bytes(8, "little") or sorted(one) != [2, 3, 4, 6, 7, 8, 9, 12, 13, 14, 15]:
            raise wire.WireError("REQUEST has other fields than expected")
        self.uid, self.gid, self.pid, self.ppid, self.umask = (wire.integer(one[tag]) for tag in (3, 4, 6, 7, 9))
        self.launcher, self.host, self.boot, self.run = (one[tag].decode("utf-8", "replace") for tag in (2, 12, 13, 15))
        self.cwd, self.argv, self.env = one[8], many[10], many[11]
        self.now = wire.integer(one[14]) // 1000000
        self.groups = [wire.integer(value) for value in many[5]]


class Caller:
    """Looked up before the lock, while files can still be read: account name, group names (when policy asks for them), delegated ids.

    containers: why a container's runtime cannot work here, by program (nodewrap.apptainer.missing).
    """

    __slots__ = ("containers", "delegated", "gid", "groups", "name", "uid")

    def __init__(self, uid: int, gid: int, policy: "dict[str, Any]") -> None:
        self.uid, self.gid = uid, gid
        try:
            self.name = pwd.getpwuid(uid).pw_name
        except KeyError:
            self.name = ""
        self.groups = _group_names(self.name, gid) if _groups_matter(policy) else []
        self.delegated = delegated(self.name, uid) if os.geteuid() == uid else None
        self.containers: dict[str, str] = _containers(policy)


def _containers(policy: "dict[str, Any]") -> "dict[str, str]":
    """Sites without images pay nothing for the backend: its module is loaded here, or never."""
    if not any(rule.get("image") for rule in policy["rules"]):
        return {}
    from nodewrap import apptainer

    return apptainer.missing(policy)


def _groups_matter(policy: "dict[str, Any]") -> bool:
    conditional = [*policy["rules"], *policy["stances"]]
    return any(entry["group"] for entry in policy["callers"]) or any("group" in item["when"] for item in conditional)


def _group_names(name: str, gid: int) -> "list[str]":
    import grp

    found = []
    for number in os.getgrouplist(name, gid) if name else [gid]:
        try:
            found.append(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return found


def delegated(name: str, uid: int) -> "tuple[int, int] | None":
    """First range of /etc/subuid that /etc/subgid has too (subuid(5)); None when there is none: the ids must map alike. In a container those files
    may be the host's, and the ids not there: newuidmap could give none that this user namespace does not have (user_namespaces(7))."""
    ranges = []
    for path, ids in (("/etc/subuid", "/proc/self/uid_map"), ("/etc/subgid", "/proc/self/gid_map")):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                parts = [line.strip().split(":") for line in file]
            with open(ids, encoding="ascii") as file:
                here = [(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]
        except OSError:
            return None
        mine = [(int(p[1]), int(p[2])) for p in parts if len(p) == 3 and p[0] in (name, str(uid)) and p[1].isdigit() and p[2].isdigit()]
        ranges.append([(first, count) for first, count in mine if any(low <= first and first + count <= end for low, end in here)])
    return next((range_ for range_ in ranges[0] if range_ in ranges[1]), None)


class Files:
    """Files through the launcher's open-as-caller service. Also the Trust that nodewrap.credentials asks (its three methods by duck type)."""

    def __init__(self, sock: object) -> None:
        self._sock = sock

    def ca(self, name: str) -> "bytes | None":
        return self._anchor("ca", name)

    def voms(self, name: str) -> "bytes | None":
        return self._anchor("voms", name)

    def _anchor(self, kind: str, name: str) -> "bytes | None":
        error, _, data = self._open(kind, name)
        if error in (0, 2):
            return data if error == 0 else None
        why = "its directory is missing, or is not root's alone" if error == ENOTDIR else os.strerror(error)
        raise model.Refusal(202, "NW-TRUST", f"trust anchor {name}: {why}; see {kind}-dir in the guard")

    def credential(self, path: str, uid: int) -> bytes:
        """The caller's own credential file, once. Refuses what is not a plain file of the caller's that nobody else can read (H02, H04)."""
        error, stat, data = self._open("caller", path)
        if error:
            raise model.Refusal(201, "NW-CREDENTIAL", f"{path} {ERRNO.get(error, os.strerror(error))}; name the payload's proxy file")
        if not data:
            raise model.Refusal(201, "NW-CREDENTIAL", f"{path} is empty; name the payload's proxy file")
        owner, mode, links = stat
        if owner != uid or mode & 0o7077 or links > 1:  # 0: replaced since, as renewers do by rename(2)
            why = f"belongs to uid {owner}" if owner != uid else f"has mode {mode & 0o7777:04o}" if mode & 0o7077 else "has other names (hard links)"
            raise model.Refusal(201, "NW-CREDENTIAL-MODE", f"{path} {why}; it must be the caller's alone (chmod 600)")
        return data

    def peek(self, path: str) -> bytes:
        """A file of the caller's, or b"" when it cannot be had."""
        return self._open("caller", path)[2]

    def image(self, path: str) -> "tuple[int, int, str, int]":
        """A file or directory that the launcher keeps for the payload to see: (errno, descriptor, where it really is, uid of its owner)."""
        fields, fd = self._ask("image", path)
        error, uid = wire.integer(fields[0][1]), wire.integer(fields[1][1])
        return error, fd, "" if error else fields[5][1].decode("utf-8", "surrogateescape"), uid

    def _ask(self, kind: str, path: str) -> "tuple[list[tuple[int, bytes]], int]":
        wire.send(self._sock, wire.OPEN, [(1, KINDS[kind]), (2, path)])
        return wire.receive(self._sock, wire.OPENED)

    def _open(self, kind: str, path: str) -> "tuple[int, tuple[int, int, int], bytes]":
        fields, fd = self._ask(kind, path)
        error, uid, mode, _, links = (wire.integer(value) for _, value in fields)
        if error:
            return error, (0, 0, 0), b""
        try:
            return 0, (uid, mode, links), _read(fd)
        finally:
            os.close(fd)


def _read(fd: int) -> bytes:
    parts: list[bytes] = []
    while True:
        part = os.read(fd, 1 << 16)
        if not part or sum(map(len, parts)) > CREDENTIAL_MAX:
            return b"".join(parts)
        parts.append(part)


def decide(req: Request, caller: Caller, policy: "dict[str, Any]", credentials: "Any", sock: object) -> "list[tuple[int, object]]":
    """The DECISION's fields. Raises model.Say; every Refusal becomes a decision with what is known for the record."""
    record: list[tuple[str, str]] = [("policy.digest", str(policy["digest"])), ("caller.name", caller.name)]
    try:
        ask = request.parse(req.argv, req.env, req.cwd)
    except model.Refusal as no:
        return refusal(no, record)
    record += _declared(ask)
    ask.subject = _claimed(ask)
    if ask.credential:
        ask.subject.assurance = "none"  # until it is verified: a name that a bad credential was shown for is nobody's
    try:
        return _decide(ask, req, caller, policy, credentials, Files(sock), record)
    except model.Refusal as no:
        return refusal(no, record, ask.status_fd) if no.exit != 202 else _bypass(no, ask, req, caller, policy, record)


def _bypass(
    no: model.Refusal, ask: model.Ask, req: Request, caller: Caller, policy: "dict[str, Any]", record: "list[tuple[str, str]]",
) -> "list[tuple[int, object]]":
    """An internal error is never a permit by itself: only where the site says so, after its bans, log-only, and always with an alarm (I11)."""
    if ask.image or no.code == "NW-APPTAINER":
        return refusal(no, record, ask.status_fd)  # without its container it would be another run than the one that is permitted
    verdict = evaluate.on_internal_error(policy, _facts(ask, req, caller, ask.subject))
    if not verdict.permit:
        return refusal(no, record, ask.status_fd)
    record += [("rule.name", verdict.rule), ("note", _cut(f"bypass of {no.code}: {no.text}"))]
    ask.mode = ask.profile = ""
    return [*_permit(ask, req, caller, policy, verdict, b"", record), (26, 1)]


def _decide(
    ask: model.Ask, req: Request, caller: Caller, policy: "dict[str, Any]", credentials: "Any", files: Files, record: "list[tuple[str, str]]",
) -> "list[tuple[int, object]]":
    pem = files.credential(ask.credential, req.uid) if ask.credential else b""
    subject = ask.subject = _subject(ask, pem, policy, credentials, files, req)
    record += _subject_facts(subject)
    verdict = _evaluate(ask, policy, _facts(ask, req, caller, subject))
    record += [("rule.name", verdict.rule), ("reason", _cut(verdict.steps[-1]))]
    if not verdict.permit:
        raise model.Refusal(verdict.exit, verdict.code, verdict.text, verdict.alarm)
    if pem and credentials is not None:
        _not_the_pilots(subject, req, files, credentials)
    front, more = _container(ask, req, caller, policy, verdict, files, record)
    _no_secret_inside(ask, req)
    source = pem if ask.source_proxy == ask.credential else files.credential(ask.source_proxy, req.uid) if ask.source_proxy else b""
    return _permit(ask, req, caller, policy, verdict, source, record, more) + front


def _container(
    ask: model.Ask, req: Request, caller: Caller, policy: "dict[str, Any]", verdict: model.Verdict, files: Files, record: "list[tuple[str, str]]",
) -> "tuple[list[tuple[int, object]], list[str]]":
    """What a container adds to the decision, and to the environment. Empty for a run in none."""
    if not (ask.image or verdict.image) or ask.argv_from == len(req.argv):
        return [], []
    if not verdict.image:
        raise model.Refusal(203, "NW-IMAGE-DENIED", "no image is allowed here (set by image in a [[rule]]); leave --image out, or ask the site")
    from nodewrap import apptainer

    asked, rule, profile = ask.image, verdict.image, policy["profiles"].get(verdict.profile, {})
    ask.image = apptainer.chosen(ask, rule)
    if not ask.image:
        return [], []
    apptainer.ready(caller.containers, rule, profile, verdict.profile)
    error, fd, path, owner = files.image(ask.image)
    if error:
        why = apptainer.ERRNO.get(error, os.strerror(error))
        raise model.Refusal(201, "NW-IMAGE", f"{usage.shown(ask.image)} {why}; name a SIF file or the directory of an image")
    image = apptainer.examine(fd, ask.image, path, owner, rule)
    record += apptainer.facts(image)
    apptainer.readable(image, req.uid, req.launcher, verdict.identity, bool(caller.delegated))
    if any(apptainer.orders(entry) for entry in ask.env_set):
        raise model.Refusal(201, "NW-IMAGE", "--env: a variable of the container's runtime is the site's to set; leave it out")
    before = apptainer.words(rule, ask)
    ask.image, ask.search = image.path, False
    return [(28, word) for word in before] + [(29, 1)], apptainer.settings(image, asked)


def _evaluate(ask: model.Ask, policy: "dict[str, Any]", facts: model.Facts) -> model.Verdict:
    """Old pilots cannot name a profile: theirs is [glexec] profile where the rule gives it, else the rule's own."""
    if ask.style == "glexec":
        facts.profile = policy["glexec"]["profile"]
        verdict = evaluate.evaluate(policy, facts)
        if verdict.code != "NW-PROFILE":
            return verdict
        facts.profile = ""
    return evaluate.evaluate(policy, facts)


def _cut(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def _declared(ask: model.Ask) -> "list[tuple[str, str]]":
    found = [("declared." + name, value) for name in ("subject", "vo", "fqan") for value in ask.declared.get(name, [])]
    found += [("declared.image", ask.image)] * bool(ask.image)
    return found + [("declared.job_id", ask.job_id)] * bool(ask.job_id) + [("declared.id", ask.declared_id)] * bool(ask.declared_id)


def _subject(ask: model.Ask, pem: bytes, policy: "dict[str, Any]", credentials: "Any", files: Files, req: Request) -> model.Subject:
    if not pem:
        return _claimed(ask)
    if credentials is None:
        raise model.Refusal(202, "NW-CHILD-HINT", "the launcher did not announce a credential; launcher and policy layer do not match")
    options = credentials.Options()
    for name, value in policy["credentials"].items():
        setattr(options, name, value)
    options.target_host = req.host
    subject: model.Subject = credentials.verify(pem, files, req.now, options=options)
    for name in ("subject", "vo"):
        wanted = ask.declared.get(name, [])
        if wanted and wanted != [subject.dn if name == "subject" else subject.vo]:
            raise model.Refusal(203, "NW-DECLARED-OTHER", f"--declare {name} is not what the credential proves; leave it out")
    return subject


def _claimed(ask: model.Ask) -> model.Subject:
    said = ask.declared
    claimed = model.Subject("declared" if said.get("subject") else "none", *said.get("subject", [""]), *said.get("vo", [""]))
    claimed.fqans, claimed.kind = said.get("fqan", []), "declared"
    return claimed


def _subject_facts(subject: model.Subject) -> "list[tuple[str, str]]":
    found = [("subject." + name, getattr(subject, name)) for name in ("dn", "issuer", "sub", "vo", "assurance", "serial") if getattr(subject, name)]
    found += [("subject.fqan", fqan) for fqan in subject.fqans[:64]] + [("note", _cut(note)) for note in subject.notes[:16]]
    if subject.expires:
        found.append(("subject.expires", str(subject.expires)))
    return found + [("subject.credential", subject.kind)] * bool(subject.kind)


def _facts(ask: model.Ask, req: Request, caller: Caller, subject: model.Subject) -> model.Facts:
    facts = model.Facts(caller.name, req.uid, req.gid, subject, req.launcher, req.now)
    facts.groups, facts.host, facts.mode, facts.profile = caller.groups, req.host, ask.mode, ask.profile
    return facts


def _pilot_secrets(req: Request) -> "list[str]":
    """Paths of what the pilot holds for itself, by its own environment."""
    names = (b"X509_USER_PROXY=", b"X509_USER_KEY=", b"BEARER_TOKEN_FILE=", b"_CONDOR_CREDS=")
    return [entry[len(name):].decode("utf-8", "surrogateescape") for name in names for entry in req.env if entry.startswith(name)]


def _not_the_pilots(subject: model.Subject, req: Request, files: Files, credentials: "Any") -> None:
    """A payload that gets the pilot's own credential could act as the pilot for every user (I10; PanDA falls back to just that)."""
    for path in _pilot_secrets(req)[:1]:
        if path.startswith("/") and _fingerprint(files.peek(path), credentials) == subject.fingerprint:
            raise model.Refusal(203, "NW-PILOT-CREDENTIAL", f"the payload's credential is the pilot's own ({path}); fetch the user's", alarm=True)


def _fingerprint(pem: bytes, credentials: "Any") -> str:
    """Of the leaf certificate in pem; "" when there is none, which is then nobody's credential."""
    try:
        ders, _ = credentials.split(pem)
        return str(credentials.read_certificate(ders[0], "the pilot's proxy").fingerprint())
    except model.Refusal:
        return ""


def _no_secret_inside(ask: model.Ask, req: Request) -> None:
    for top in [ask.workdir, ask.image, *ask.expose]:
        for path in _pilot_secrets(req):
            if top and path != ask.credential and (path + "/").startswith(top + "/"):
                raise model.Refusal(201, "NW-WORKDIR-SECRET", f"{path} is the pilot's and lies in {top}, which the payload gets; keep it elsewhere")


def _permit(
    ask: model.Ask, req: Request, caller: Caller, policy: "dict[str, Any]", verdict: model.Verdict, source: bytes, record: "list[tuple[str, str]]",
    container: "list[str] | None" = None,
) -> "list[tuple[int, object]]":
    identity = verdict.identity
    target = _target(ask, req, identity) if source else ""
    keep, new = _environment(ask, req, caller, policy, verdict, target)
    if container:
        from nodewrap import apptainer

        keep = [index for index in keep if not apptainer.orders(usage.decode(req.env[index]))]
        new = [entry for entry in new if not apptainer.orders(entry)] + container
    fields: list[tuple[int, object]] = [(1, 1), (2, PERMIT), (6, verdict.mode), (7, verdict.profile), (14, ask.argv_from), (15, int(ask.search))]
    fields += [(24, 0o077 if ask.style == "run" else 0o022)]
    fields += [(8, account) for account in _accounts(ask, identity, new)] + [(9, int(bool(identity.get("exclusive"))))]
    fields += _map(identity, req, caller) if verdict.mode == "map" else []
    fields += [(11, ask.workdir)] * bool(ask.workdir) + [(13, path) for path in ask.expose]
    fields += [(16, index) for index in keep] + [(17, entry) for entry in new]
    fields += _limits(ask, verdict.limits) + [(21, ask.status_fd)] * (ask.status_fd >= 0)
    fields += [(22, [(1, target), (2, source), (3, 0o600), (4, int(not ask.target_proxy))])] * bool(target)
    fields += [(27, _syslog(ask, req, caller, identity))] if ask.style == "glexec" else []
    return fields + _record(record, req, ask)


def _environment(
    ask: model.Ask, req: Request, caller: Caller, policy: "dict[str, Any]", verdict: model.Verdict, target: str,
) -> "tuple[list[int], list[str]]":
    """Indices to keep and entries to set for whichever account it will be; an account's own names come with the account."""
    env = verdict.env
    if ask.style == "glexec":
        env = dict(env, keep=[*env.get("keep", []), *policy["glexec"]["preserve_env"]])
    name = {"map": "payload", "log-only": caller.name}.get(verdict.mode, "")
    keep, new = environment.environment(env, ask, req.env, ask.workdir or environment.TMP, name, target)
    if verdict.identity.get("accounts") and not ask.workdir:
        new = [entry for entry in new if not entry.startswith("HOME=")]
    return keep, new


def _target(ask: model.Ask, req: Request, identity: "dict[str, Any]") -> str:
    """Where the payload's proxy is written. Of a pool the account is not known yet: the run's name serves instead of a uid."""
    accounts = identity.get("accounts") or [{"uid": identity.get("inside_uid", req.uid), "gid": identity.get("inside_gid", req.gid)}]
    if ask.style == "glexec":
        glexec.verify(ask, accounts[0]["uid"], accounts[0]["gid"])
    if len(accounts) > 1 and not ask.target_proxy:
        return f"{environment.TMP}/x509up_{req.run}"
    if ask.style == "run":
        return f"{environment.TMP}/x509up_u{accounts[0]['uid']}"
    return glexec.target_proxy(ask, accounts[0]["uid"], req.pid)


def _accounts(ask: model.Ask, identity: "dict[str, Any]", new: "list[str]") -> "list[list[tuple[int, object]]]":
    taken = {entry.partition("=")[0] for entry in new} - {"HOME"}
    fields = []
    for account in identity.get("accounts", []):
        own = {"USER": account["name"], "LOGNAME": account["name"]}
        if not ask.workdir:
            own["HOME"] = account["home"] or environment.TMP
        groups: list[tuple[int, object]] = [(3, gid) for gid in account["groups"]]
        known: list[tuple[int, object]] = [(1, account["uid"]), (2, account["gid"]), *groups, (4, account["name"])]
        known += [(5, account["home"])] * account["home"].startswith("/")
        fields.append(known + [(6, f"{name}={value}") for name, value in own.items() if name not in taken])
    return fields


def _map(identity: "dict[str, Any]", req: Request, caller: Caller) -> "list[tuple[int, object]]":
    fields: list[tuple[int, object]] = [(1, identity["inside_uid"]), (2, identity["inside_gid"]), (3, identity["size"])]
    if req.launcher == "userns":
        size = identity["size"]
        if caller.delegated and caller.delegated[1] >= size:
            fields += [(4, caller.delegated[0]), (5, caller.delegated[1])]
        elif size != 1:
            why = f"{caller.name or req.uid} has no range of {size} ids that /etc/subuid, /etc/subgid and this user namespace have; delegate one"
            raise model.Refusal(202, "NW-SUBUID", why)
    return [(10, fields)]


def _limits(ask: model.Ask, limits: "dict[str, Any]") -> "list[tuple[int, object]]":
    wall: int = limits["wall_s"]
    wall = min(wall or ask.wall_s, ask.wall_s or wall)
    fields: list[tuple[int, object]] = [(18, wall * 1000), (19, limits["grace_s"] * 1000)]
    fields += [(20, [(1, number), (2, value)]) for number, value in limits["rlimits"].items()]
    return fields + [(20, [(1, number), (2, value), (3, int(limits["must"]))]) for number, value in limits["run"].items()]


def _syslog(ask: model.Ask, req: Request, caller: Caller, identity: "dict[str, Any]") -> str:
    accounts = identity.get("accounts") or [{"name": caller.name, "gid": req.gid}]
    command = [word.decode("utf-8", "replace") for word in req.argv[ask.argv_from:]]
    account = accounts[0] if len(accounts) == 1 else {"name": identity.get("pool", ""), "gid": ""}
    return glexec.line(caller.name, str(req.gid), str(account["name"]), str(account["gid"]), req.cwd.decode("utf-8", "replace"), command)


def _record(record: "list[tuple[str, str]]", req: "Request | None" = None, ask: "model.Ask | None" = None) -> "list[tuple[int, object]]":
    if req is not None and ask is not None:
        record = [*record, ("args.sha256", digest.args_sha256(req.argv[ask.argv_from:]))]
    return [(23, [(1, key), (2, value)]) for key, value in record if value]


def refusal(no: model.Refusal, record: "list[tuple[str, str]] | None" = None, status_fd: int = -1) -> "list[tuple[int, object]]":
    """A Refusal as a DECISION; status_fd is where the pilot wants to read of it, -1: nowhere."""
    fields: list[tuple[int, object]] = [(1, 1), (2, VERDICTS[no.exit]), (4, no.code), (5, no.text)]
    known = [fact for fact in record or [] if not fact[1].startswith("permit: ")]
    return fields + [(26, 1)] * no.alarm + [(21, status_fd)] * (status_fd >= 0) + _record(known)
