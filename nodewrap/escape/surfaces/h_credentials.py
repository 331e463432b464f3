"""H: credentials. Forged, stale, borrowed and stolen ones. Trust anchors are those of a site of the pilot's own (ownsite.py), programs the node's.

Control of the forged ones: a gatekeeper that believes what is written in the file. Against nodewrap the same request with a good proxy must be let in
first: so it is the flaw that is refused."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from cryptography import x509

from nodewrap.escape.arena import Arena, NotRunError
from nodewrap.escape.gate import Flaws, asked, let_in, pilots_file, seen
from nodewrap.escape.model import SAME_ID_BARE, SHARED_ID_BARE, Seen, attack, left_out
from nodewrap.escape.ownsite import OwnSite
from nodewrap.escape.pki import BASE, DAY, VO, Pki, basic, dn, usage
from nodewrap.live import comm

left_out(H11="nodewrap takes no tokens yet: --token is refused as an option that it does not know")


# ---- the file ----


@attack("H01", "opened once, as the caller; what was checked is what is delivered", once_in_all=True, peers=False)
def swapped_between_check_and_copy(arena: Arena) -> Seen:
    """Two users' proxies take turns under one name by rename(2). Reached: who was checked (on record) is not whose proxy the payload got."""
    pki = Pki(arena.home / "pki")
    bob = pki.user("Bob Tester")
    files = {"Alice": pki.good(), "Bob": pki.proxy(bob, acs=[pki.ac(bob)]).file(bob)}
    swap = arena.mkdir(arena.home / "swap")
    for name, pem in files.items():
        pilots_file(arena, pem, f"swap/{name}")
    arena.accomplice("h_credentials", "take_turns", swap / "proxy", *(swap / name for name in files))
    if arena.control:
        ran = arena.payload("h_credentials", "check_then_copy", swap / "proxy")
        return Seen(ran.text.startswith("other"), f"a wrapper that opens it twice: {ran.line}")
    site = OwnSite(arena, trust=pki.trust)
    site.apply(site.text(assurance="credential", when=f'vo = "{VO}"'))
    options, got = ["--credential", str(swap / "proxy")], []
    for _ in range(8):
        answer = site.run("/bin/sh", "-c", 'cat "$X509_USER_PROXY"', options=options)
        got += [name for name, pem in files.items() if answer.started and answer.ran.out == pem] or [answer.word]
    checked = [record["nodewrap"]["subject"]["dn"] for record in site.records() if record["event"]["action"] == "start"]
    differ = [pair for pair in itertools.zip_longest(checked, got) if f"CN={pair[1]} " not in f"{pair[0]} "]
    return Seen(bool(differ), f"{len(got)} runs, {len(set(got))} users, checked and delivered differ in {len(differ)} {differ[:1] or ''}")


@attack("H02", "O_NOFOLLOW; one link; owner", once_in_all=True, peers=False)
def link_to_anothers_proxy(arena: Arena) -> Seen:
    """A good proxy under the names that somebody else could have lent: a symbolic link, a hard link, a link to a link."""
    def lend(pem: bytes) -> dict[str, Path]:
        lent = arena.mkdir(arena.home / "lent")
        own = pilots_file(arena, pem, "lent/own")
        (lent / "symlink").symlink_to(own)
        os.link(own, lent / "hard")
        (lent / "chain").symlink_to("symlink")
        return {name: lent / name for name in ("symlink", "hard", "chain")}

    return _presented(arena, lend)


@attack("H04", "mode and owner of the file, read from the descriptor", once_in_all=True, peers=False)
def readable_by_others(arena: Arena) -> Seen:
    """And, with root as the judge, one that belongs to somebody else."""
    def lend(pem: bytes) -> dict[str, Path]:
        found = {f"{mode:o}": pilots_file(arena, pem, f"proxy-{mode:o}", mode) for mode in (0o644, 0o640, 0o620, 0o604, 0o660)}
        if arena.is_root:
            found["root's"] = pilots_file(arena, pem, "root", 0o644)
            os.chown(found["root's"], 0, 0)
        return found

    return _presented(arena, lend)


def _presented(arena: Arena, lend: Callable[[bytes], dict[str, Path]]) -> Seen:
    """The good proxy, in files whose outside is wrong."""
    pki = Pki(arena.home / "pki")
    if arena.control:
        said = {name: arena.payload("h_credentials", "believe", path).text for name, path in lend(pki.good()).items()}
        return Seen(all(word == "in" for word in said.values()), f"a gatekeeper that only reads: {said}")
    site = OwnSite(arena, trust=pki.trust)
    site.apply(site.text(assurance="credential"))
    if not site.credential(pki.good()).started:
        raise NotRunError("the good proxy is refused too")
    return seen({name: site.run(options=["--credential", str(path)]) for name, path in lend(pki.good()).items()})


# ---- the chain ----


@attack("H05", "every link's validity, 300 s of skew", once_in_all=True, peers=False)
def out_of_time(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        old = pki.user("Old Tester", start=-9 * DAY, end=-DAY)
        return {
            "expired": pki.proxy(start=-2 * DAY, end=-400).file(pki.alice), "not yet": pki.proxy(start=400).file(pki.alice),
            "expired user": pki.proxy(old, acs=[pki.ac(old)]).file(old),
        }

    return let_in(arena, make)


@attack("H06", "RFC 3820 and RFC 5280 path checks", once_in_all=True, peers=False)
def broken_chain(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        alice, mallory = pki.alice, pki.user("Mallory Tester")
        ca_like = pki.user("Ca Tester", extensions=[basic(True), usage("digital_signature", "key_cert_sign")])
        first, limited = pki.proxy(length=0), pki.proxy(limited=True)
        forged = pki.user("Alice Tester", mallory)
        return {
            "user as a CA": pki.proxy(forged, acs=[]).file(forged, mallory), "CA as a user": pki.proxy(ca_like, acs=[pki.ac(ca_like)]).file(ca_like),
            "path length 0": pki.proxy(first, label="two").file(first, alice),
            "full below limited": pki.proxy(limited, label="two").file(limited, alice),
            "legacy below RFC": pki.proxy(pki.proxy(), legacy=True, label="two").file(pki.proxy(), alice),
            "another's signature": pki.proxy(signer=mallory.key).file(alice),
            "another's name": pki.proxy(mallory, subject=dn(f"{alice.name}/CN=1")).file(mallory),
            "policy of its own": pki.proxy(language="1.3.6.1.4.1.3536.1.1.1.8").file(alice),
            "another's key": pki.proxy().pem + mallory.key_pem + alice.pem, "no key": pki.proxy().pem + alice.pem, "no proxy": alice.file(),
        }

    return let_in(arena, make)


@attack("H07", "all attribute certificates must be good; LSC file", once_in_all=True, peers=False)
def bad_attribute_certificate(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        bob, alice = pki.user("Bob Tester"), pki.alice
        acs = {
            "expired": pki.ac(start=-2 * DAY, end=-400), "not yet": pki.ac(start=400), "forged": pki.ac(signer=bob.key),
            "user as server": pki.ac(server=bob), "another holder": pki.ac(bob), "other vo": pki.ac(vo="othervo", fqans=["/othervo"]),
            "group of another vo": pki.ac(fqans=["/othervo/Role=pilot"]),
        }
        both = {"one good, one forged": pki.proxy(acs=[pki.ac(), acs["forged"]]).file(alice)}
        return {**{name: pki.proxy(acs=[ac]).file(alice) for name, ac in acs.items()}, **both}

    return let_in(arena, make)


@attack("H08", 'crl = "require": current, signed, or refused', once_in_all=True, peers=False)
def revocation(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        def remove() -> None:
            for path in pki.ca_dir.glob("*.r0"):
                path.unlink()

        return {
            "revoked": (lambda: pki.write_crl([pki.alice]), pki.good()),
            "stale, but revoked": (lambda: pki.write_crl([pki.alice], -2 * DAY, -DAY), pki.good()),
            "stale": (lambda: pki.write_crl(start=-2 * DAY, end=-DAY), pki.good()),
            "of another key": (lambda: pki.write_crl(signer=pki.alice.key), pki.good()),
            "missing": (remove, pki.good()),
        }

    return let_in(arena, make, more='[credentials]\ncrl = "require"\n')


@attack("H09", "trust anchors are the guard's, the environment is not asked", once_in_all=True, peers=False)
def own_authority_with_a_real_name(arena: Arena) -> Seen:
    """A CA with the same name and another key, by environment and by the file itself."""
    own = arena.home / "own"
    names = ("X509_CERT_DIR", "SSL_CERT_DIR", "X509_CADIR")

    def make(pki: Pki) -> Flaws:
        evil = Pki(own, salt="evil ")
        half = evil.proxy(pki.alice, signer=evil.alice.key).file(pki.alice)
        return {"same names": evil.good(), "with its CA": evil.proxy().file(evil.alice, evil.ca), "half": half}

    def env() -> dict[str, str]:
        return {**dict.fromkeys(names, str(own / "certificates")), "X509_VOMS_DIR": str(own / "vomsdir"), "SSL_CERT_FILE": str(own / "none")}

    return let_in(arena, make, env=env)


@attack("H10", "signing policy of every CA; name constraints are refused", once_in_all=True, peers=False)
def outside_of_the_authoritys_names(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        other = pki.authority("/DC=org/DC=other/CN=Other CA")
        pki.trust_ca(other, ["/DC=org/DC=other/*"])
        constraint = x509.NameConstraints([x509.DirectoryName(dn("/DC=org/DC=other"))], None)
        below = pki.authority(f"{BASE}/CN=Sub CA", pki.ca, extensions=[basic(True), usage("key_cert_sign"), (constraint, True)])
        last = pki.authority(f"{BASE}/CN=Short CA", pki.ca, 0)
        beyond = pki.authority(f"{BASE}/CN=Beyond CA", last)
        users = {"signing policy": ([other], pki.user("Alice Tester", other)), "name constraint": ([below], pki.user("Alice Tester", below)),
                 "path length of a CA": ([beyond, last], pki.user("Alice Tester", beyond))}
        return {name: pki.proxy(user, acs=[pki.ac(user)]).file(user, *above) for name, (above, user) in users.items()}

    return let_in(arena, make)


# ---- parsers ----


@attack("H17", "two strict parsers in a jailed child; never in the launcher", refusal=True, once_in_all=True, peers=False)
def malformed_bytes(arena: Arena) -> Seen:
    """Sixteen files with changed, cut and grown DER. Reached: something crashed (which is 202 then), or somebody other than Alice was let in."""
    pki, chance = Pki(arena.home / "pki"), random.Random(arena.nonce)
    files = [_mutated(pki.good(), chance) for _ in range(16)]
    if arena.control:
        ends = [arena.payload("h_credentials", "trusting_parser", pilots_file(arena, pem)) for pem in files[:12]]
        dead = sum(ran.rc != 0 for ran in ends)
        return Seen(dead > 0, f"a parser that trusts lengths dies of {dead} of {len(ends)} files")
    site = OwnSite(arena, trust=pki.trust)
    site.apply(site.text(assurance="credential"))
    answers = list(asked(site, {f"{number}": pem for number, pem in enumerate(files)}, {}).values())
    dns = {record["nodewrap"]["subject"]["dn"] for record in site.records() if record["event"]["action"] == "start"}
    bad = [answer.word for answer in answers if answer.ran.rc not in (0, 201, 203)]
    words = sorted({answer.word for answer in answers})
    return Seen(bool(bad or dns - {pki.alice.name}), f"{len(files)} files: {words}; 202: {bad}; let in: {sorted(dns)}")


def _mutated(pem: bytes, chance: random.Random) -> bytes:
    blocks = re.findall(rb"-----BEGIN ([A-Z ]+)-----([^-]*)-----END", pem)
    at, out = chance.randrange(len(blocks)), b""
    for number, (kind, text) in enumerate(blocks):
        der = bytearray(base64.b64decode(text))
        for _ in range(chance.randrange(1, 4) if number == at else 0):
            place = chance.randrange(len(der) if chance.random() < 0.5 else min(60, len(der)))
            what = chance.randrange(4)
            if what == 0:
                der[place] ^= 1 << chance.randrange(8)
            elif what == 1:
                der[place] = chance.choice((0, 0x7F, 0x80, 0x84, 0xFF, 0x30, 5))
            elif what == 2:
                del der[place : place + chance.randrange(1, 40)]
            else:
                der[place:place] = b"\x30\x80" * chance.randrange(1, 2000)
        out += b"-----BEGIN " + kind + b"-----\n" + base64.encodebytes(bytes(der)) + b"-----END " + kind + b"-----\n"
    return out


@attack("H18", "times are compared in UTC; the child's environment is empty", once_in_all=True, peers=False)
def time_zone_and_locale(arena: Arena) -> Seen:
    """A proxy that is over for two hours, where the caller's clock is twelve hours behind."""
    env = {"TZ": "WEST+12", "LC_ALL": "th_TH.UTF-8", "LANG": "fa_IR", "FAKETIME": "-12h", "SOURCE_DATE_EPOCH": "0"}
    if arena.control:
        over = time.strftime("%Y%m%d%H%M%S", time.gmtime(time.time() - 7200))
        ran = arena.payload("h_credentials", "local_time", over, env=env)
        return Seen(ran.text == "in", f"a check in local time: {ran.line}")
    return let_in(arena, lambda pki: {"expired": pki.proxy(start=-DAY, end=-7200).file(pki.alice)}, env=lambda: env)


@attack("H20", "the ban is on the user's name, proxy CNs are cut off", once_in_all=True, peers=False)
def banned_users_proxy_delegated(arena: Arena) -> Seen:
    def make(pki: Pki) -> Flaws:
        two = pki.proxy(pki.proxy(), label="two")
        return {
            "one level": pki.good(), "two levels": two.file(pki.proxy(), pki.alice), "limited": pki.proxy(limited=True).file(pki.alice),
            "legacy": pki.proxy(legacy=True).file(pki.alice), "without AC": pki.proxy(acs=[]).file(pki.alice),
        }

    def bobs(pki: Pki) -> bytes:
        bob = pki.user("Bob Tester")
        return pki.proxy(bob, acs=[pki.ac(bob)]).file(bob)

    name = f"{BASE}/O=Users/CN=Alice Tester"
    if arena.control:
        pki = Pki(arena.home / "pki")
        ran = arena.payload("h_credentials", "ban_of_leaf", name, pki.proxy().name)
        return Seen(ran.text == "in", f"a ban list asked for the leaf's name {pki.proxy().name}: {ran.line}")
    return let_in(arena, make, more=f'[credentials]\nallow_without_voms = true\n[[ban]]\ndn = "{name}"\nreason = "escape-test"\n', good=bobs)


# ---- what the pilot and other payloads hold ----


@attack("H12", "built root; other uid; environment from an allow-list", accepted=(SAME_ID_BARE,))
def proxy_and_token_of_the_pilot(arena: Arena) -> Seen:
    """In the places where they are kept, named by the variables that name them."""
    places = [arena.home / "x509up", Path(f"/tmp/x509up_u{arena.caller.uid}.{arena.nonce[:8]}"), arena.home / "token"]
    for path in places:
        arena.secret(path)
    env = {"X509_USER_PROXY": str(places[0]), "BEARER_TOKEN_FILE": str(places[2]), "BEARER_TOKEN": arena.nonce}
    return arena.has_nonce(arena.payload("h_credentials", "find_credentials", *places, env=env))


@attack("H14", "private /tmp; the profile none: what is the id's is removed", accepted=(SAME_ID_BARE,))
def proxy_left_behind(arena: Arena) -> Seen:
    """Copies in the usual places. Reached: one is there for the next one after the end."""
    name = f"x509up_u_{arena.nonce}"
    places = [Path(top) / name for top in ("/tmp", "/var/tmp", "/dev/shm")]
    for path in places:
        arena.undo(lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
    ran = arena.payload("h_credentials", "leave", arena.nonce, *places)
    left = [str(path.parent) for path in places if path.exists()]
    return Seen(bool(left), f"left in {', '.join(left) or 'none of them'} ({ran.line})")


@attack("H16", "private /tmp; leased ids differ", accepted=(SHARED_ID_BARE,), refusal=True)
def proxy_of_another_payload(arena: Arena) -> Seen:
    """One payload has its proxy in /tmp and waits; the next, whoever the node makes it, looks there."""
    path = f"/tmp/x509up_u_{arena.nonce[:8]}"
    arena.undo(lambda: Path(path).unlink(missing_ok=True))
    first = arena.like(work=arena.mkdir(arena.home / "other", 0o755)).begin_payload("h_credentials", "hold", arena.nonce, path)
    if first.hear() != "ready":
        raise NotRunError("the first payload did not start")
    found = arena.has_nonce(second := arena.payload("h_credentials", "find_credentials", path))
    first.end(b"\n")
    return found if second.started else Seen(False, f"no second payload beside the first: {second.line}")


@attack("H19", "a session keyring of its own; keyctl answered ENOSYS", accepted=(SAME_ID_BARE,))
def token_in_a_keyring(arena: Arena) -> Seen:
    """As Kerberos and AFS keep theirs: in the session's keyring and in the user's. The pilot's own process has put them there."""
    name = f"krb5cc-{arena.nonce[:8]}"
    arena.accomplice("h_credentials", "hold_key", name, arena.nonce)
    return arena.has_nonce(arena.payload("h_credentials", "find_key", name))


@attack("H21", "what held the proxy is gone, or cannot be read by anybody but root", needs=("root",), once_in_all=True, peers=False)
def key_in_memory(arena: Arena) -> Seen:
    """While the payload runs, root searches the memory of all other processes of the wrapper for the private key."""
    pki = Pki(arena.home / "pki")
    needle = max(pki.proxy().key_pem.split(b"\n"), key=len)
    if arena.control:
        live = arena.begin_payload("h_credentials", "remember", pilots_file(arena, pki.good()))
    else:
        site = OwnSite(arena, trust=pki.trust)
        site.apply(site.text(assurance="credential"))
        path = site.write(site.directory / "proxy.pem", pki.good())
        live = site.begin("/bin/sh", "-c", "echo ready; read x", options=["--credential", str(path)])
    if live.hear() != "ready":
        raise NotRunError(f"it did not start: {live.end(b'').line}")
    ours = [live.process.pid, *(one.pid for one in psutil.Process(live.process.pid).children(recursive=True))]
    holders = [pid for pid in ours if _has(pid, needle)]
    said = ", ".join(f"{comm(pid)} {pid}" for pid in holders)
    live.end(b"\n")
    return Seen(bool(holders), f"{len(ours)} processes, the key is in {said or 'none'}")


def _has(pid: int, needle: bytes) -> bool:
    """In its memory, all that can be read of it; one that has ended has none."""
    with contextlib.ExitStack() as files:
        try:
            maps = files.enter_context(open(f"/proc/{pid}/maps"))
            memory = files.enter_context(open(f"/proc/{pid}/mem", "rb", 0))
            lines = maps.readlines()
        except (FileNotFoundError, ProcessLookupError):
            return False
        for line in lines:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            try:
                memory.seek(first)
                if needle in memory.read(min(last - first, 64 << 20)):
                    return True
            except (OSError, ValueError, OverflowError):
                continue
    return False
