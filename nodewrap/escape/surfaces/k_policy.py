"""K: policy and configuration. Files that others can write, broken files, requests for less, versions, reloads. On a site of the pilot's own
(ownsite.py) with the same programs; the controls are careless ones."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from nodewrap import _core
from nodewrap.deep.files import file_system
from nodewrap.doctor.checks import DRIFTS
from nodewrap.escape.arena import Arena, NotRunError
from nodewrap.escape.gate import seen
from nodewrap.escape.model import Seen, attack, left_out
from nodewrap.escape.ownsite import Answer, OwnSite
from nodewrap.escape.pki import BASE
from nodewrap.guard import GuardError, parse_guard
from nodewrap.policy.images import LEASED

left_out(
    K10="scripts of an image are run by Apptainer, which is the payload: needs Apptainer and an image, see tests/integration/test_apptainer.py",
    K16="needs a distribution's switches of user namespaces (sysctl, AppArmor)",
)


def _ready(arena: Arena, allow: str = "log-only strict none") -> OwnSite:
    site = OwnSite(arena, allow=allow)
    if not (answer := site.run()).started:
        raise NotRunError(f"the good site does not start either: {answer.ran.line}")
    return site


def _believes(arena: Arena, path: Path) -> Seen:
    ran = arena.payload("k_policy", "careless_config", path)
    return Seen(ran.text == "in", f"a careless program: {ran.line}")


@attack("K01", "owner and mode of each directory on the way, by descriptor", once_in_all=True, peers=False)
def configuration_that_others_can_write(arena: Arena) -> Seen:
    """Guard, applied policy, state, log: writable for others, another's, or reached through such a directory."""
    if arena.control:
        config = arena.work / "config"
        config.write_text("allow=everybody\n")
        config.chmod(0o666)
        return _believes(arena, config)
    site = _ready(arena)
    now, found = site.directory / "policy/current", {}
    top = now.resolve()
    for path, mode in ((site.guard_file, 0o666), (site.guard_file, 0o664), (site.directory, 0o777), (now.parent, 0o777), (top, 0o777),
                       (top / "profiles", 0o666), (top / "policy.bin", 0o666), (top / "child-decide.bpf", 0o666), (site.audit, 0o666)):
        before = path.stat()
        path.chmod(mode)
        if arena.is_root:
            os.chown(path, -1, 65534)
        found[f"{path.name} {mode:o}"] = site.run()
        if arena.is_root:
            os.chown(path, -1, before.st_gid)
        path.chmod(before.st_mode & 0o7777)
    for path in (site.guard_file, top / "profiles", now.parent) if arena.is_root else ():
        os.chown(path, 65534, -1)
        found[f"{path.name} of nobody"] = site.run()
        os.chown(path, arena.caller.uid, -1)
    open_ = arena.mkdir(arena.home / "open", 0o777)
    open_.chmod(0o777)
    shutil.copy(site.guard_file, open_ / "guard")
    arena.own(open_ / "guard")
    site.guard_file.unlink()
    site.guard_file.symlink_to(open_ / "guard")
    found["link into an open directory"] = site.run()
    return seen(found)


@attack("K02", "no policy, no permit", once_in_all=True, peers=False)
def policy_missing_or_broken(arena: Arena) -> Seen:
    if arena.control:
        return _believes(arena, arena.home / "nothing")
    site = _ready(arena)
    top, found = (site.directory / "policy/current").resolve(), {}
    for name in ("policy.bin", "profiles", "child-decide.bpf", "child-load.bpf"):
        good = (top / name).read_bytes()
        for what, text in (("missing", None), ("empty", b""), ("cut", good[: len(good) // 2]), ("other", b"\0" * len(good))):
            (top / name).unlink()
            if text is not None:
                site.write(top / name, text, 0o644)
            found[f"{name} {what}"] = site.run()
            site.write(top / name, good, 0o644)
    (site.directory / "policy/current").unlink()
    found["no policy"] = site.run()
    return seen(found)


@attack("K03", "unknown and repeated keys are errors, in policy and guard", once_in_all=True, peers=False)
def typing_mistakes(arena: Arena) -> Seen:
    """Each would, read kindly, drop a ban or a bound."""
    if arena.control:
        config = arena.home / "config"
        config.write_text("dney=everybody\n")
        config.chmod(0o644)
        return _believes(arena, config)
    site = _ready(arena)
    ban = f'[[ban]]\ndn = "{BASE}/CN=x"\nreason = "r"\n'
    texts = {
        "bann": ban.replace("ban]", "bann]"), "dnn": ban.replace("dn =", "dnn ="), "capital": ban.replace("dn =", "DN ="),
        "twice": ban + 'reason = "s"\n',
        "number": ban.replace(f'"{BASE}/CN=x"', "7"), "empty ban": '[[ban]]\nreason = "r"\n', "open string": ban.replace('x"', "x"),
        "no table": 'minimum_asurance = "signed"\n', "expires": ban + 'expires = "soon"\n',
    }
    taken = [name for name, text in texts.items() if not site.apply(site.text(text))]
    if problems := site.apply(site.text(ban)):
        raise NotRunError(f"the good policy is refused too: {problems[0]}")
    found: dict[str, Answer] = {}
    for name, changes in {
        "unknown line": {"alow": "log-only none"}, "bad mode": {"allow": "logonly none"}, "number": {"deadline_ms": "+5"},
        "range": {"caller_uid": "0-0"},
        "twice": {"audit": f"{site.audit}\naudit {site.audit}"}, "relative": {"state": "state"}, "NUL": {"audit": f"{site.audit}\0"},
    }.items():
        site.guard(**changes)
        found[f"guard: {name}"] = site.run()
    return Seen(bool(taken) or seen(found).reached, f"policies taken: {taken or 'none'}; {seen(found).what}")


@attack("K04", "C parser and Python twin, held to each other by tests and fuzzers", once_in_all=True, peers=False)
def read_differently(arena: Arena) -> Seen:
    """Four hundred changed guards. Reached: one parser takes what the other refuses. Control: the twin and a parser that skips unknown lines."""
    good = (
        b"nodewrap-guard 1\nlauncher userns\npython /usr/bin/python3\nscript /a/b\npolicy /p\nstate /s\naudit /a\ncaller-uid 1000-2000\n"
        b"switch-uid 1000-2000\nmap-uid 70000-80000\nallow map strict\nmax-wall-s 7\nsyslog yes\n"
    )
    chance, other = random.Random(arena.nonce), _kind if arena.control else _in_c
    differ = [text for text in (_changed(good, chance) for _ in range(400)) if _in_python(text) != other(text)]
    if not _in_python(good) or not other(good):
        raise NotRunError("the good guard is refused")
    return Seen(bool(differ), f"400 guards, read differently: {len(differ)} {differ[:1] or ''}")


def _changed(text: bytes, chance: random.Random) -> bytes:
    lines = bytearray(text)
    for _ in range(chance.randrange(1, 3)):
        place = chance.randrange(len(lines))
        what = chance.randrange(4)
        if what == 0:
            lines[place] = chance.choice(b"\0\n\t #-0/=9az\xff")
        elif what == 1:
            lines[place:place] = bytes([chance.choice(b" \n\t#\r0-\x80")])
        elif what == 2:
            del lines[place : place + chance.randrange(1, 12)]
        else:
            lines += chance.choice((b"unknown x\n", b"syslog no\n", b"allow map none\n", b"audit /b", b"\n\n", b"# x\n"))
    return bytes(lines)


def _in_python(text: bytes) -> bool:
    try:
        parse_guard(text)
    except GuardError:
        return False
    return True


def _in_c(text: bytes) -> bool:
    ffi, lib = _core.ffi, _core.lib
    return int(lib.nw_guard_parse(ffi.new("char[]", text + b"\0"), len(text), ffi.new("struct nw_guard *"), ffi.new("struct nw_err *"))) == 0


def _kind(text: bytes) -> bool:
    return b"launcher" in text


@attack("K06", "what is asked for can turn a permit into a denial, and never widens it", once_in_all=True, peers=False)
def less_asked_for(arena: Arena) -> Seen:
    """A rule gives mode map and profile strict; the pilot asks for less, by option and by environment."""
    env = dict.fromkeys(("MODE", "NODEWRAP_MODE", "NODEWRAP_PROFILE", "GLEXEC_MODE", "NODEWRAP_OPTIONS"), "none")
    if arena.control:
        ran = arena.payload("k_policy", "careless_mode", env=env)
        return Seen(ran.text == "none", f"a careless wrapper runs it in mode {ran.line}")
    site = _ready(arena, allow="log-only strict none\nallow map strict none")
    strict = site.text().replace('{ mode = "log-only" }', '[{ mode = "map" }, { mode = "log-only" }]').replace('["none", "strict"]', '"strict"')
    if problems := site.apply(strict):
        raise NotRunError(problems[0])
    asked = [("--mode", "log-only"), ("--profile", "none"), ("--mode", "log-only", "--profile", "none"), ("--mode=none",)]
    found = {" ".join(options): site.run(options=list(options)) for options in asked}
    before = len(site.records())
    plain = site.run(env=env)
    got = [(one["nodewrap"]["mode"], one["nodewrap"]["profile"]) for one in site.records()[before:] if one["event"]["action"] == "start"]
    if not plain.started:
        raise NotRunError(f"it does not start at all: {plain.ran.line}")
    return Seen(seen(found).reached or got != [("map", "strict")], f"{seen(found).what}; with the environment: {got}")


@attack("K07", "the launcher refuses without its privilege", only=lambda at: at.launcher == "setuid", once=True, peers=False)
def setuid_bit_lost(arena: Arena) -> Seen:
    """A copy of the launcher without the bit, and the launcher itself under no_new_privs. Reached: something ran, as the pilot then."""
    if arena.control:
        ran = arena.payload("k_policy", "fall_back", 65534)
        return Seen(ran.text == f"ran as {arena.caller.uid}", f"a wrapper that goes on: {ran.line}")
    at = arena.wrapper.configuration
    assert at is not None
    installed = Path(at.binary).parents[1] / "libexec/nodewrap/nodewrap-setuid"
    copy = arena.home / "nodewrap-setuid"
    shutil.copyfile(installed, copy)
    copy.chmod(0o755)
    words = arena.wrapper.argv(["/bin/echo", "in"], str(arena.work), ())[1:]
    no_new_privs = ["/usr/bin/setpriv", "--no-new-privs"]
    said = {name: arena.run(*argv, *words, as_is=True) for name, argv in (
        ("copy", [str(copy)]), ("no_new_privs", [*no_new_privs, str(installed)]), ("front", [*no_new_privs, at.binary]))}
    return Seen(any(ran.out for ran in said.values()), ", ".join(f"{name}: {ran.line}" for name, ran in said.items()))


@attack("K08", "versions in HELLO, REQUEST, DECISION and policy.bin", once_in_all=True, peers=False)
def parts_of_different_versions(arena: Arena) -> Seen:
    """A policy child of another version, which says permit; and a policy of another format."""
    if arena.control:
        ran = arena.payload("k_policy", "careless_version", 2)
        return Seen(ran.text == "in", f"a launcher that takes any answer: {ran.line}")
    site = _ready(arena)
    script = Path(site.lines["script"]).read_text()
    patches = {
        "child of version 2": "from nodewrap import serve; serve.VERSION = 2",
        "decision of version 2": "from nodewrap import decide; p = decide._permit; decide._permit = lambda *a: [(1, 2), *p(*a)[1:]]",
        "decision with an unknown field": "from nodewrap import decide; p = decide._permit; decide._permit = lambda *a: [*p(*a), (99, 1)]",
        "permit twice": "from nodewrap import decide; p = decide._permit; decide._permit = lambda *a: [*p(*a), (2, 1)]",
    }
    found = {}
    for name, patch in {"unchanged": "pass", **patches}.items():
        first, path, rest = script.partition("sys.path.insert")
        line, _, rest = rest.partition("\n")
        own = site.write(site.directory / "serve.py", f"{first}{path}{line}\n{patch}\n{rest}", 0o644)
        site.guard(script=str(own))
        found[name] = site.run()
    if not (good := found.pop("unchanged")).started:
        raise NotRunError(f"the unchanged script does not start either: {good.ran.line}")
    site.guard()
    compiled = (site.directory / "policy/current/policy.bin").resolve()
    import marshal
    policy = marshal.loads(compiled.read_bytes())
    site.write(compiled, marshal.dumps({**policy, "format": 2}), 0o644)
    found["policy of format 2"] = site.run()
    return seen(found)


@attack("K09", "variables that order a container's runtime about never pass", once=True, peers=False)
def orders_to_the_containers_runtime(arena: Arena) -> Seen:
    """The payload's own Apptainer, or nodewrap's, would obey them."""
    names = ("APPTAINER_BIND", "SINGULARITY_BIND", "APPTAINERENV_LD_PRELOAD", "SINGULARITYENV_PATH", "APPTAINER_WRITABLE", "APPTAINER_CONFIGDIR")
    ran = arena.payload("k_policy", "variables", *names, env=dict.fromkeys(names, arena.nonce))
    return arena.has_nonce(ran)


@attack("K12", "patterns have no backtracking; a deadline for the child", once_in_all=True, peers=False)
def runaway_pattern(arena: Arena) -> Seen:
    """A ban that a regular expression would need hours for. Reached: the answer took longer than two seconds more than without."""
    if arena.control:
        ran = arena.payload("k_policy", "runaway", "(a*a*a*a*a*a*a*)*b$", "a" * 24, seconds=2.5, refusal=True)
        return Seen(ran.rc is None or float(ran.text or "9") > 2, f"a regular expression: {ran.line} after {ran.seconds:.1f} s")
    site = _ready(arena)
    usual = site.declared(f"{BASE}/CN=x").ran.seconds
    stars = "*".join("a" * 60)
    if problems := site.apply(site.text(f'[[ban]]\ndn_glob = "{BASE}/CN={stars}*b"\nreason = "r"\n')):
        raise NotRunError(problems[0])
    answer = site.declared(f"{BASE}/CN={'a' * 150}")
    longer = answer.ran.seconds - usual
    return Seen(longer > 6 or not answer.started, f"{answer.word}, {longer:.2f} s longer than without the ban")


def _at_once(arena: Arena, change: Callable[[OwnSite, bool], object]) -> Seen:
    """change(site, True) takes the right away, False gives it back. Reached: a start after it was taken away, or a record of another policy."""
    if arena.control:
        listed = arena.home / "list"
        listed.write_text("everybody")
        listed.chmod(0o644)
        live = arena.begin_payload("k_policy", "cached", listed)
        live.hear()
        listed.write_text("nobody")
        return Seen(live.end(b"\n").text == "in", "a gatekeeper that has read its list once lets in who was struck off")
    site = _ready(arena)
    found: dict[str, Answer] = {}
    for number in range(3):
        change(site, True)
        found[f"taken away {number}"] = site.run()
        change(site, False)
        if not (answer := site.run()).started:
            raise NotRunError(f"given back it does not start: {answer.ran.line}")
    digests = {record.get("nodewrap", {}).get("policy", {}).get("digest") for record in site.records()}
    return Seen(seen(found).reached, f"{seen(found).what}; {len(digests)} policies on record")


@attack("K13", "the link to the policy is read at each start, the digest is on record", once_in_all=True, peers=False)
def reload_race(arena: Arena) -> Seen:
    def change(site: OwnSite, away: bool) -> None:
        site.apply(site.text(f'[[ban]]\ncaller = "{arena.caller.name}"\nreason = "r"\n' if away else ""))

    return _at_once(arena, change)


@attack("K14", "callers are looked up at each call, in guard and policy", once_in_all=True, peers=False)
def callers_list_changes(arena: Arena) -> Seen:
    """Struck off in the guard; in the policy, where a group is named that the pilot is not in."""
    def change(site: OwnSite, away: bool) -> None:
        if arena.nonce[0] in "01234567":
            site.guard(caller_uid=f"{arena.caller.uid + 1}-{arena.caller.uid + 1}" if away else site.lines["caller-uid"])
        else:
            group = f'group = "{"nogroup" if os.path.exists("/etc/debian_version") else "nobody"}"'
            site.apply(site.text().replace(f'uid = "{arena.caller.uid}"', group) if away else site.text())

    return _at_once(arena, change)


@attack("K15", "ranges of payloads begin at 1000; a range with the pilot in it is refused", once_in_all=True, peers=False)
def ranges_that_overlap_system_ids(arena: Arena) -> Seen:
    if arena.control:
        config = arena.home / "config"
        config.write_text("map-uid=0-70000\n")
        config.chmod(0o644)
        return _believes(arena, config)
    site = _ready(arena)
    found = {}
    for key, text in (
        ("map_uid", "999-70000"), ("map_uid", "0-65535"), ("switch_uid", "1-2000"), ("switch_gid", "100-2000"), ("tracking_gid", "4-300"),
        ("map_uid", "4294900000-4294967295"), ("map_uid", "2000-1000"), ("child", "0 0"),
    ):
        site.guard(**{key: text})
        found[f"{key} {text}"] = site.run()
    return seen(found)


@attack("K17", "no descriptor of the judge's reaches a payload; who judges is outside", peers=False)
def verdict_forged_by_the_payload(arena: Arena) -> Seen:
    """It writes a verdict to every descriptor that it may have; one of the judge's was left open by the pilot."""
    reader, writer = os.pipe()
    live = arena.begin_payload("k_policy", "forge", arena.nonce, fds=[writer])
    os.close(writer)
    ran = live.end(b"")
    os.set_blocking(reader, False)
    try:
        heard = os.read(reader, 65536)
    except BlockingIOError:
        heard = b""
    os.close(reader)
    if not ran.started:
        raise NotRunError(f"it did not start: {ran.line}")
    forged = arena.nonce.encode() in heard or arena.nonce in json.dumps(ran.events)
    return Seen(forged, f"a verdict of the payload's {'arrived' if forged else 'did not arrive'} ({ran.line})")


def _weak() -> list[str]:
    return [drift.path for drift in DRIFTS if Path(drift.path).exists() and Path(drift.path).read_text().strip() not in drift.good]


@attack("K19", "nodewrap doctor names each setting that weakens the node", once_in_all=True, peers=False, seconds=60)
def drift_of_the_node(arena: Arena) -> Seen:
    """Reached: a setting is weak, and doctor does not say so, whatever the caller's environment wants it to say."""
    weak = _weak()
    if arena.control:
        said = [arena.payload("k_policy", "by_hand", path).text for path in weak]
        return Seen(bool(weak), f"weak here: {dict(zip(weak, said))}")
    at = arena.wrapper.configuration
    assert at is not None
    own = str(arena.home)
    env = {"PYTHONPATH": own, "NODEWRAP_PREFIX": own, "PATH": f"{own}:/usr/bin:/bin", "PYTHONSTARTUP": f"{own}/json.py"}
    (arena.home / "json.py").write_text("raise SystemExit('hijacked')\n")
    ran = arena.run(at.binary, "doctor", "--json", as_is=True, env=env, seconds=50)
    if ran.rc is None:
        raise NotRunError("doctor does not come to an end")
    node = json.loads(ran.out)["node"]
    silent = [path for path in weak if node[os.path.basename(path)]["yes"] is not False]
    return Seen(bool(silent), f"{len(weak)} weak settings, not named: {silent or 'none'}")


@attack("K20", "apply takes no image that is open for writing; it is refused until it is applied again", once_in_all=True, peers=False)
def image_changed_without_a_trace(arena: Arena) -> Seen:
    """Its pages are mapped and dirty: what is written then is no fault, and sets no time. The control is a check that goes by the file's times."""
    image = arena.home / "held.sif"
    image.write_bytes(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + bytes(1 << 20))
    arena.own(image)
    site = None if arena.control else _ready(arena, allow="log-only batch none strict")
    named = f'"batch"\nimage = ["{image}"]'
    text = site.text('[apptainer]\nprogram = "/bin/true"').replace('["none", "strict"]', named) if site else ""
    with image.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        if (kind := file_system(file.fileno())) not in LEASED:
            raise NotRunError(f"the caller's files are on {kind}, where nobody can tell (docs/apptainer.md)")
        memory[-1] = 0
        if site and (problems := site.apply(text)):
            raise NotRunError(problems[0])
        applied, before = hashlib.sha256(memory).digest(), image.stat()
        memory[-1] = 1
        after = image.stat()
        if site is None:
            unseen = (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
            return Seen(unseen and hashlib.sha256(memory).digest() != applied, f"its content changed, its times {'did not' if unseen else 'too'}")
        answer = site.run(options=["--image", str(image)])
    if site.apply(text) or not (good := site.run(options=["--image", str(image)])).started:
        raise NotRunError(f"it is refused too when nobody has it open: {good.word}")
    return Seen(answer.started, f"the changed image: {answer.word}")
