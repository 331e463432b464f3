"""B: identity. Who somebody is taken for, and which ids a payload gets.

Names and bans are tried on a site of the pilot's own (ownsite.py): the control is a gatekeeper that compares carelessly."""

from __future__ import annotations

import os
import pwd
import time
from pathlib import Path

from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from nodewrap.escape.arena import Arena, Live, NotRunError, hostile
from nodewrap.escape.gate import Flaws, let_in, named, seen
from nodewrap.escape.model import (
    BAN_AT_NEXT_START,
    PILOT_IN_MAP,
    SAME_ID_BARE,
    SHARED_ID_BARE,
    SUPPLEMENTARY_GROUPS,
    Configuration,
    Seen,
    attack,
    left_out,
)
from nodewrap.escape.ownsite import OwnSite
from nodewrap.escape.pki import BASE, VO, Pair, Pki

left_out(
    B15="accounts are leased for a run, not for a person: how many runs one person has at once is the pilot's, and the batch system's, to bound",
    B20="replay of a kernel bug (CVE-2018-18955) that kernels from 4.19.2 on do not have: needs an old kernel",
    B30="needs a kernel with CONFIG_AUDIT, to see the login uid",
)
ANN = f"{BASE}/CN=Ann Example"


def only_dn(listed: str) -> str:
    return f'dn = "{listed}"'


def banned(text: str, more: str = "") -> str:
    return f'{more}\n[[ban]]\n{text}\nreason = "escape-test"\n'


# ---- names ----


@attack("B01", "letters' case counts in rules and not in bans", once_in_all=True, peers=False)
def case_of_letters(arena: Arena) -> Seen:
    others = {"capitals": ANN.replace("Ann", "ANN"), "small": ANN.replace("Ann Ex", "ann ex"), "components": ANN.replace("example", "EXAMPLE")}
    return named(arena, lambda site: site.text(when=only_dn(ANN)), ANN, others, ANN, "lower")


@attack("B02", "a value with /TYPE= in it is refused", once_in_all=True, peers=False)
def slash_inside_a_name(arena: Arena) -> Seen:
    """The CN is "Ann Example/CN=admin": in one line it reads like another user's two."""
    def make(pki: Pki) -> Flaws:
        return {text: _proxy_of(pki, text) for text in ("Alice Tester/CN=admin", "Alice Tester+UID=admin", "Alice Tester\\/CN=admin")}

    return let_in(arena, make)


@attack("B03", "attribute types, their case and OIDs are one spelling", once_in_all=True, peers=False)
def spelling_of_attribute_types(arena: Arena) -> Seen:
    plain = f"{BASE}/UID=ann/CN=Ann/emailAddress=ann@example.org"
    others = {name: plain.replace(old, new) for name, old, new in (
        ("Email", "emailAddress", "Email"), ("E", "emailAddress", "E"), ("OID", "emailAddress", "1.2.840.113549.1.9.1"),
        ("USERID", "UID=", "USERID="),
        ("OID of UID", "UID=", "0.9.2342.19200300.100.1.1="), ("small", "emailAddress", "emailaddress"), ("blanks", "CN=Ann", "CN= Ann "),
    )}
    return named(arena, lambda site: site.text(banned(f'dn = "{plain}"')), ANN, others, plain, "exact")


@attack("B05", "control bytes, NUL and odd string types are refused", once_in_all=True, peers=False)
def string_types_and_nul(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        found: dict[str, bytes] = {"NUL": _proxy_of(pki, "Alice Tester\0.evil.example"), "newline": _proxy_of(pki, "Alice Tester\n/CN=x")}
        for kind in ("BMPString", "UniversalString"):
            found[kind] = _proxy_of(pki, "Alice Tester", getattr(_ASN1Type, kind))
        return found

    return let_in(arena, make)


def _proxy_of(pki: Pki, cn: str, kind: _ASN1Type = _ASN1Type.UTF8String) -> bytes:
    """A proxy of a user whose CN is that, in the CA's own words."""
    names = [(NameOID.DOMAIN_COMPONENT, "org", _ASN1Type.IA5String), (NameOID.DOMAIN_COMPONENT, "example", _ASN1Type.IA5String)]
    names += [(NameOID.ORGANIZATION_NAME, "Users", _ASN1Type.UTF8String), (NameOID.COMMON_NAME, cn, kind)]
    user: Pair = pki.user("odd", subject=x509.Name([x509.NameAttribute(oid, text, form) for oid, text, form in names]))
    return pki.proxy(user, acs=[pki.ac(user)]).file(user)


@attack("B06", "rules compare bytes; bans as RFC 4518 does", once_in_all=True, peers=False)
def lookalikes(arena: Arena) -> Seen:
    """In a rule none of them may be the other one; of a ban, all that Unicode calls equal or invisible must be hit."""
    zoe = f"{BASE}/CN=Zo\u00e9 Example"
    others = {
        "homoglyph": zoe.replace("Example", "Ex\u0430mple"), "zero width": zoe.replace("Zo", "Z\u200bo"), "bidi": zoe.replace("Zo", "\u202aZo"),
        "wide": zoe.replace("E", "\uff25"),
    }
    found = named(arena, lambda site: site.text(when=only_dn(zoe)), zoe, others, zoe, "look")
    if arena.control or found.reached:
        return found
    others["decomposed"] = zoe.replace("\u00e9", "e\u0301")  # in rules too it is one name (NFC)
    others.pop("homoglyph")  # Unicode calls it another letter
    site = OwnSite(arena, directory="bans")
    site.apply(site.text(banned(f'dn = "{zoe}"')))
    bans = seen({name: site.declared(text) for name, text in others.items()})
    return Seen(bans.reached, f"{found.what}; banned: {bans.what}")


@attack("B08", "names are literal but for * in the site's own patterns", once_in_all=True, peers=False)
def patterns_in_a_name(arena: Arena) -> Seen:
    doe = f"{BASE}/CN=R.J. Doe"
    others = {
        "dots": doe.replace(".", "x"), "star": f"{BASE}/CN=*", "regex": f"{BASE}/CN=.*", "class": f"{BASE}/CN=[R].J. Doe", "quote": f'{doe}"',
        "backslash": f"{doe}\\",
    }
    return named(arena, lambda site: site.text(when=only_dn(doe)), doe, others, doe, "lenient")


@attack("B09", "FQANs compare by components; Role=NULL says nothing", once_in_all=True, peers=False)
def prefix_of_a_group(arena: Arena) -> Seen:
    others = {"group": f"/{VO}evil", "role": f"/{VO}evil/Role=pilot", "deeper": f"/{VO}-x/sub", "NULL": f"/{VO}evil/Role=NULL/Capability=NULL"}
    good, listed = f"/{VO}/sub/Role=pilot/Capability=NULL", f"/{VO}/*"
    return named(arena, lambda site: site.text(when=f'fqan = "{listed}"'), good, others, listed, "prefix", flags=True)


# ---- bans ----


@attack("B25", "bans do not ask who issued the name", once_in_all=True, peers=False)
def same_person_by_another_authority(arena: Arena) -> Seen:
    name = f"{BASE}/O=Users/CN=Alice Tester"
    if arena.control:
        ran = arena.payload("b_identity", "gate", "exact", f"{BASE}/CN=Test CA {name}", f"{BASE}/CN=Other CA {name}")
        return Seen(ran.text == "in", f"a ban list of issuer and subject: {ran.line}")

    def make(pki: Pki) -> Flaws:
        other = pki.authority(f"{BASE}/CN=Other CA")
        pki.trust_ca(other)
        alice = pki.user("Alice Tester", other)
        return {"first CA": pki.good(), "other CA": pki.proxy(alice, acs=[pki.ac(alice)]).file(alice)}

    return let_in(arena, make, more=banned(f'dn = "{name}"'), good=_bobs)


def _bobs(pki: Pki) -> bytes:
    bob = pki.user("Bob Tester")
    return pki.proxy(bob, acs=[pki.ac(bob)]).file(bob)


@attack("B26", "who shows no FQAN where one is banned counts as banned", once_in_all=True, peers=False)
def no_attributes_to_ban(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        return {
            "stripped": pki.proxy(acs=[]).file(pki.alice), "expired": pki.proxy(acs=[pki.ac(start=-86400 * 2, end=-400)]).file(pki.alice),
            "shown": pki.proxy(acs=[pki.ac(fqans=[f"/{VO}/Role=bad"])]).file(pki.alice),
            "behind another": pki.proxy(acs=[pki.ac(fqans=[f"/{VO}", f"/{VO}/Role=bad/Capability=NULL"])]).file(pki.alice),
        }

    return let_in(arena, make, more=banned(f'fqan = "/{VO}/Role=bad"', "[credentials]\nallow_without_voms = true"))


@attack("B27", "running payloads of a banned user are ended", once_in_all=True, peers=False, accepted=(BAN_AT_NEXT_START,))
def banned_while_running(arena: Arena) -> Seen:
    """Half a second after the policy with the ban is in force. The next start is refused in any case, else the try counts as broken."""
    if arena.control:
        live = arena.begin_payload("b_identity", "hold")
    else:
        site = OwnSite(arena)
        options = ["--declare", f"subject={ANN}", "--declare", f"vo={VO}"]
        live = site.begin("/bin/sh", "-c", "echo ready; read x", options=options)
    if live.hear() != "ready":
        raise NotRunError(f"it did not start: {live.end(b'').line}")
    if not arena.control:
        site.apply(site.text(banned(f'dn = "{ANN}"')))
        assert site.declared(ANN).code == "NW-BANNED"
    time.sleep(0.5)
    runs = live.process.poll() is None
    live.end(b"\n")
    return Seen(runs, "it still runs" if runs else "it was ended")


@attack("B28", "one uniform line for the pilot, reasons for the record", refusal=True, once_in_all=True, peers=False)
def oracle(arena: Arena) -> Seen:
    """Reached: an answer tells the name of a rule, ban or account that is not the asker's."""
    if arena.control:
        return arena.has_nonce(arena.payload("b_identity", "telling_gate", ANN, f"user-{arena.nonce}"))
    site, secret = OwnSite(arena), arena.nonce
    ban = f'name = "{secret}"\ndn = "{BASE}/CN=Mallory"\nreason = "{secret}"'
    rule = f'[[rule]]\nname = "{secret}"\nwhen = {{ dn = "{BASE}/CN={secret}" }}\nidentity = {{ mode = "map" }}\nprofile = "strict"\n'
    if problems := site.apply(site.text(f'[[ban]]\n{ban}\n{rule}', when=only_dn(ANN))):
        raise NotRunError(problems[0])
    answers = [site.declared(dn) for dn in (f"{BASE}/CN=Mallory", f"{BASE}/CN=Nobody")] + [site.declared(ANN, VO, options=["--mode", "map"])]
    told = [answer.word for answer in answers if secret.encode() in answer.ran.out + answer.ran.err + str(answer.ran.events).encode()]
    return Seen(bool(told), f"answers {[answer.word for answer in answers]}, names told in {told or 'none'}")


@attack("B29", "a subject is what a credential proves", once_in_all=True, peers=False)
def claimed_by_environment(arena: Arena) -> Seen:
    env = {"SSL_CLIENT_S_DN": ANN, "REMOTE_USER": ANN, "NODEWRAP_SUBJECT": ANN, "NODEWRAP_DECLARE": f"subject={ANN}", "GLEXEC_SOURCE_PROXY": ANN}
    if arena.control:
        ran = arena.payload("b_identity", "gate_by_environment", "SSL_CLIENT_S_DN", env=env)
        return Seen(ran.text == "in", f"a gatekeeper that believes its environment: {ran.line}")
    pki = Pki(arena.home / "pki")
    site = OwnSite(arena, trust=pki.trust)
    site.apply(site.text(assurance="credential", when=only_dn(f"{BASE}/O=Users/CN=Alice Tester")))
    good = site.credential(pki.good())
    if not good.started:
        raise NotRunError(f"the good proxy is refused too: {good.ran.line}")
    proxy = str(site.directory / "proxy-1.pem")
    everything = {**env, "X509_USER_PROXY": proxy, "GLEXEC_CLIENT_CERT": proxy}
    options = ["--declare", f"subject={BASE}/O=Users/CN=Alice Tester", "--declare", f"vo={VO}"]
    return seen({"environment": site.run(env=everything), "and claim": site.run(env=everything, options=options)})


# ---- accounts and ids ----


@attack("B10", "targets are checked at apply; numbers in the guard", control="root", needs=("root", "other"), refusal=True, once_in_all=True,
        peers=False)
def map_entry_says_root(arena: Arena) -> Seen:
    secret = arena.home / "roots"
    secret.write_text(arena.nonce)
    secret.chmod(0o600)
    if arena.control:
        return arena.has_nonce(arena.payload("b_identity", "become", 0, secret))
    assert arena.other is not None
    site = OwnSite(arena)

    def switch(name: str) -> list[str]:
        identity = f'{{ mode = "switch", account = "{name}" }}'
        text = site.text().replace('{ mode = "log-only" }', identity).replace("modes = { map", 'modes = { switch = "allow", map')
        return site.apply(text)

    if problems := switch(pwd.getpwuid(arena.other[0]).pw_name):
        raise NotRunError(problems[0])
    names = ["root", "daemon", "nobody", "no-such-account", arena.caller.name]
    taken = [name for name in names if not switch(name)]
    lines = [("switch_uid", "0-0"), ("switch_uid", "999-2000"), ("switch_gid", "0-5"), ("map_uid", "0-70000")]
    guards = {f"{key} {text}": _guard_refuses(site, key, text) for key, text in lines}
    bad = taken + [name for name, refused in guards.items() if not refused]
    return Seen(bool(bad), f"of {', '.join(names)} and {', '.join(guards)} accepted: {bad or 'none'}")


def _guard_refuses(site: OwnSite, key: str, text: str) -> bool:
    site.guard(**{key: text})
    answer = site.run()
    site.guard()
    return answer.code == "NW-GUARD-SYNTAX"


@attack("B11", "supplementary groups are the target's", needs=("root",), accepted=(SUPPLEMENTARY_GROUPS,))
def supplementary_groups(arena: Arena) -> Seen:
    groups = [gid for gid in arena.caller.groups if gid != arena.caller.gid]
    if not groups:
        raise NotRunError("the pilot has no supplementary group")
    return arena.has_nonce(arena.payload("b_identity", "show", _roots(arena, 0o640, groups[0])))


def _roots(arena: Arena, mode: int, gid: int = 0, uid: int = 0) -> Path:
    """A file of root's in the work directory, so that every profile shows it."""
    path = arena.work / "roots"
    path.write_text(arena.nonce)
    path.chmod(mode)
    os.chown(path, uid, gid)
    return path


@attack("B13", "ids are numbers of the applied policy: no look-up can fail", control="root", needs=("root", "other"))
def names_are_gone(arena: Arena) -> Seen:
    """With empty account files in a mount namespace of the caller's. Reached: what only group 0 may read was read."""
    assert arena.other is not None
    path = _roots(arena, 0o640)
    return _with_names(arena, "", ("careless_switch", arena.other[0], path), path)


@attack("B14", "ids are numbers of the applied policy: looked up once", control="root", needs=("root", "other"), only=lambda at: at.mode == "switch")
def names_change_between(arena: Arena) -> Seen:
    """Every account of payloads is root, by account files that changed after the policy was applied."""
    assert arena.other is not None
    name = pwd.getpwuid(arena.other[0]).pw_name
    lines = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    changed = "".join(":".join([*line[:2], *("0", "0"), *line[4:]] if line[0] != arena.caller.name else line) + "\n" for line in lines)
    path = _roots(arena, 0o600)
    return _with_names(arena, changed, ("careless_lookup", name, path), path)


def _with_names(arena: Arena, passwd: str, careless: tuple[object, ...], path: Path) -> Seen:
    """Run where these are the account files: the careless program, or the wrapper with a payload that reads path."""
    files = [arena.home / "passwd", arena.home / "group"]
    for file, text in zip(files, (passwd, "")):
        file.write_text(text)
    command = hostile("b_identity", *map(str, careless))
    ids = ["0", "0", ""]
    if not arena.control:
        command = arena.wrapper.argv(hostile("b_identity", "show", path), str(arena.work), ())
        ids = [str(arena.caller.uid), str(arena.caller.gid), ",".join(map(str, arena.caller.groups))]
    argv = hostile("b_identity", "other_names", *files, *ids, *command)
    for _ in range(4 if arena.control else 1):  # whoever replaces the host's files meanwhile takes ours off their names
        found = arena.has_nonce(arena.run(*argv, as_is=True, user=0, group=0, extra_groups=[]))
        if found.reached:
            break
    return found


def _gives_each_its_own(at: Configuration) -> bool:
    return at.launcher == "setuid" and at.mode != "log-only" and at.profile in ("strict", "none")


@attack("B16", "locks of the ids, taken by the kernel", only=_gives_each_its_own, refusal=True, peers=False)
def many_at_once(arena: Arena) -> Seen:
    """Ten starts at once. Reached: two that live have one uid, seen from outside. Those that find nothing free are refused."""
    lives = [arena.like(work=arena.mkdir(arena.home / f"work{number}", 0o755)).begin_payload("b_identity", "hold") for number in range(10)]
    uids = [os.stat(f"/proc/{pid}").st_uid for pid in map(_pid, lives) if pid]
    for live in lives:
        live.end(b"\n")
    if not uids:
        raise NotRunError("none of them started")
    return Seen(len(set(uids)) < len(uids), f"{len(uids)} of {len(lives)} run, with {len(set(uids))} uids")


def _pid(live: Live) -> int:
    """0: it was refused."""
    try:
        return live.pid() if live.hear() == "ready" else 0
    except NotRunError:
        return 0


@attack("B17", "what is the id's is removed at the end; an empty home", accepted=(SAME_ID_BARE, SHARED_ID_BARE))
def left_for_the_next_tenant(arena: Arena) -> Seen:
    """Files in shared directories and the home, System V memory, a key. The next payload (of a pool of two: the next two) looks for them."""
    name = f"left-{arena.nonce[:6]}{int(arena.nonce[:6], 16) | 1:06x}"[:18]
    for top in ("/tmp", "/var/tmp", "/dev/shm", arena.caller.home):
        arena.undo(lambda top=top: Path(top, name).unlink(missing_ok=True))  # type: ignore[misc]
    if arena.control or (arena.wrapper.configuration and arena.wrapper.configuration.profile == "none"):
        arena.undo(lambda: arena.accomplice("b_identity", "forget", name, wait=False).end())
    arena.payload("b_identity", "bequeath", name, arena.nonce)
    later = arena.like(work=arena.mkdir(arena.home / "later", 0o755))  # what is in a work directory is the pilot's to hand on
    found = [arena.has_nonce(later.payload("b_identity", "inherit", name)) for _ in range(2)]
    return next((one for one in found if one.reached), found[0])


@attack("B18", "state directories are the owner's alone, and no links in them are followed", once_in_all=True, peers=False)
def lease_directory_of_others(arena: Arena) -> Seen:
    """Writable for others. Reached: a payload ran with it. Control: a link where a careless wrapper makes its lock."""
    victim = arena.secret()
    if arena.control:
        (arena.work / "lease").symlink_to(victim)
        ran = arena.payload("b_identity", "careless_lease", arena.work / "lease")
        return Seen(victim.read_text() != arena.nonce, f"a lock file by its name: {ran.line}")
    site = OwnSite(arena)
    if not site.run().started:
        raise NotRunError("with a good directory it does not start either")
    leases, found = site.directory / "state/leases", {}
    for path, mode in ((leases, 0o777), (leases, 0o1777), (leases.parent, 0o777), (leases.parent, 0o770)):
        path.chmod(mode)
        os.chown(path, -1, 65534) if arena.is_root else None
        found[f"{path.name} {mode:o}"] = site.run()
        path.chmod(0o700)
    return Seen(seen(found).reached or victim.read_text() != arena.nonce, seen(found).what)


def _maps_others(at: Configuration) -> bool:
    return at.mode == "map" and not at.is_pilots_id and at.profile == "batch"  # maps do not depend on the profile


@attack("B19", "blocks are leased whole", only=_maps_others, refusal=True, peers=False)
def overlapping_ranges(arena: Arena) -> Seen:
    """Reached: the uid maps of two payloads at once have a host id in common. That of the pilot is B21's."""
    pilot = (arena.caller.uid, arena.caller.uid + 1)
    lives = [arena.like(work=arena.mkdir(arena.home / f"work{number}", 0o755)).begin_payload("b_identity", "hold") for number in range(3)]
    maps = [_spans(pid) for pid in map(_pid, lives) if pid]
    for live in lives:
        live.end(b"\n")
    if not maps:
        raise NotRunError("none of them started")
    spans = sorted(span for one in maps for span in one if arena.control or span != pilot)
    overlap = any(one[1] > two[0] for one, two in zip(spans, spans[1:]))
    return Seen(overlap, f"{len(maps)} of {len(lives)} run, host ids {spans}")


def _spans(pid: int) -> list[tuple[int, int]]:
    """Each first host uid of its map, and the one behind the last; of a process without a map of its own, its uid alone."""
    lines = [list(map(int, line.split())) for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
    uid = os.stat(f"/proc/{pid}").st_uid
    return [(uid, uid + 1)] if lines[0][2] == 4294967295 and uid else [(first, first + count) for _, first, count in lines]


@attack("B21", "maps are checked against guard and caller", control="rootless", only=_maps_others, peers=False, accepted=(PILOT_IN_MAP,))
def root_or_pilot_in_the_map(arena: Arena) -> Seen:
    """Seen from outside: the host ids that the payload's namespace can name."""
    live = arena.begin_payload("b_identity", "hold")
    if live.hear() != "ready":
        raise NotRunError(f"it did not start: {live.end(b'').line}")
    spans = _spans(live.pid())
    live.end(b"\n")
    has = [uid for uid in (0, arena.caller.uid) if any(first <= uid < behind for first, behind in spans)]
    return Seen(bool(has), f"host ids {spans}; of root and pilot it has {has or 'none'}")


@attack("B23", "no payload gets the overflow id, and its files are not readable as that", control="root", needs=("root",))
def file_of_nobody(arena: Arena) -> Seen:
    """A file of uid 65534's, closed to others: what all ids that a namespace lacks look like inside."""
    path = _roots(arena, 0o600, 65534, 65534)
    return arena.has_nonce(arena.payload("b_identity", "become", 65534, path) if arena.control else arena.payload("b_identity", "show", path))


@attack("B24", "pid namespace; ids differ where they are leased", accepted=(SHARED_ID_BARE,), refusal=True)
def another_payload_of_the_same_uid(arena: Arena) -> Seen:
    """Its environment, wherever /proc shows one."""
    beside = arena.like(work=arena.mkdir(arena.home / "other", 0o755))
    options = () if arena.control else ("--env", f"TOKEN={arena.nonce}")
    first = beside.begin_payload("b_identity", "hold", options=options, env={"TOKEN": arena.nonce})
    if first.hear() != "ready":
        raise NotRunError(f"the first one did not start: {first.end(b'').line}")
    ran = arena.payload("b_identity", "of_the_other", first.pid())
    first.end(b"\n")
    return arena.has_nonce(ran)


