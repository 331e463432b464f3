"""Fuzz ``nodewrap.credentials.verify``: ``python tests/fuzz_credentials.py SECONDS [SEED]``.

Takes real and forged credentials apart, changes bytes, lengths, blocks and order, and demands: never anything but a Subject or a Refusal; a Subject
only with the name, VO and FQANs of the original; and a Refusal for unreadable input only where a library, not our own code, gave up.
"""

from __future__ import annotations

import base64
import random
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from asn1crypto import parser
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from nodewrap.credentials import DirectoryTrust, Refusal, Subject, verify
from tests.pki import PILOT, PLAIN, VO, Pki, key, tlv

BLOCK = re.compile(rb"(-----BEGIN [A-Z ]+-----\n)([^-]*)(-----END [A-Z ]+-----\n)")

#: Raised on purpose by us, or by Rust code, whose innermost Python frame is ours too: not a bug.
WANTED = ValueError


ANY_OF_VO = "any"


class Bug(Exception):
    """What must not happen; the text says what did."""


def corpus(pki: Pki) -> dict[str, bytes]:
    """Good credentials by name: all kinds, one and two levels."""
    made = {kind: pki.forge_proxy(pki.alice, kind, acs=[pki.forge_ac(fqans=[PILOT, PLAIN])]).file(pki.alice) for kind in ("rfc", "gt3", "legacy")}
    first = pki.forge_proxy(pki.alice, acs=[pki.forge_ac(), pki.forge_ac()], private=key("first"))
    made["two levels"] = pki.forge_proxy(first, limited=True).file(first, pki.alice)
    made["real"] = pki.proxy().read_bytes()
    return made


def facts(subject: Subject) -> tuple[object, ...]:
    return subject.dn, subject.issuer, subject.vo, tuple(subject.fqans), subject.serial, subject.assurance


def flip(der: bytearray, rng: random.Random) -> None:
    der[rng.randrange(len(der))] ^= 1 << rng.randrange(8)


def overwrite(der: bytearray, rng: random.Random) -> None:
    der[rng.randrange(len(der))] = rng.choice((0x00, 0x7F, 0x80, 0x81, 0x84, 0xFF, 0x30, 0x31, 0x05, 0x0C, 0x1E))


def cut(der: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(der))
    del der[start : start + rng.randrange(1, 40)]


def grow(der: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(der))
    der[start:start] = rng.choice((bytes(rng.randrange(1, 9)), der[start : start + 30], rng.randbytes(5), b"\x30\x80" * 20))


CHANGES = (flip, flip, flip, overwrite, overwrite, cut, grow)


def mutate(pem: bytes, rng: random.Random) -> bytes:
    """``pem`` with a few changes inside one block, or with whole blocks moved, doubled or lost, or with the text itself changed."""
    blocks = [match[0] for match in BLOCK.finditer(pem)]
    what = rng.random()
    if what < 0.75:
        number = rng.randrange(len(blocks))
        head, body, tail = BLOCK.fullmatch(blocks[number]).groups()
        der = bytearray(base64.b64decode(body))
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            rng.choice(CHANGES)(der, rng)
        blocks[number] = head + base64.encodebytes(bytes(der)) + tail
    elif what < 0.9:
        blocks = rng.choices(blocks, k=rng.randrange(1, 6))
    else:
        text = bytearray(pem)
        rng.choice(CHANGES)(text, rng)
        return bytes(text)
    return b"".join(blocks)


def damage(der: bytes, rng: random.Random) -> bytes:
    changed = bytearray(der)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(CHANGES)(changed, rng)
    return bytes(changed)


def resigned_leaf(pki: Pki, rng: random.Random) -> bytes:
    """A proxy damaged and then really signed by its user: what a hostile user can do, past every signature check but the VO's."""
    leaf = pki.forge_proxy(pki.alice, rng.choice(("rfc", "gt3", "legacy")), acs=[pki.forge_ac(fqans=[PILOT, PLAIN])])
    return armored(resign(leaf.der, pki.alice.key, rng)) + leaf.key_pem + pki.alice.pem


def resigned_ac(pki: Pki, rng: random.Random) -> bytes:
    """The same by a hostile VOMS server: it may say what it likes of its own VO, and nothing of others."""
    ac = resign(pki.forge_ac(fqans=[PILOT, PLAIN]), pki.voms.key, rng)
    return pki.forge_proxy(pki.alice, acs=[ac]).file(pki.alice)


def resign(der: bytes, private: rsa.RSAPrivateKey, rng: random.Random) -> bytes:
    """``SEQUENCE { body, algorithm, signature }`` with a damaged body and a good signature of it."""
    body, algorithm, _ = parts(parser.parse(der)[4])
    body = damage(body, rng)
    return tlv(0x30, body, algorithm, tlv(0x03, b"\0", private.sign(body, padding.PKCS1v15(), hashes.SHA256())))


def parts(contents: bytes) -> list[bytes]:
    found = []
    while contents:
        size = parser.peek(contents)
        found.append(contents[:size])
        contents = contents[size:]
    return found


def armored(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def check(data: bytes, trust: DirectoryTrust, now: int, allowed: set[tuple[object, ...]]) -> str:
    """"ok" or the code of the Refusal; Bug for anything that must not happen."""
    try:
        subject = verify(data, trust, now)
    except Refusal as refusal:
        check_refusal(refusal)
        return refusal.code
    except Exception as error:
        raise Bug(traceback.format_exc()) from error
    if not any(same(facts(subject), one) for one in allowed):
        raise Bug(f"another subject: {facts(subject)}")
    return "ok"


def same(found: tuple[object, ...], wanted: tuple[object, ...]) -> bool:
    """Equal facts; a wanted list of FQANs that is ANY_OF_VO stands for any in the VO."""
    if wanted[3] != ANY_OF_VO:
        return found == wanted
    return found[:3] + found[4:] == wanted[:3] + wanted[4:] and all((fqan + "/").startswith(f"/{VO}/") for fqan in found[3])


def check_refusal(refusal: Refusal) -> None:
    """One printable line; and a parser's failure must come out of a parser: TypeError and the like raised in a line of ours is a bug of ours."""
    if refusal.exit not in (201, 203) or not refusal.text.isprintable() or not refusal.text.isascii():
        raise Bug(f"bad refusal: {refusal.exit} {refusal.code} {refusal.text!r}")
    cause = refusal.__cause__
    if cause is None or isinstance(cause, WANTED):
        return
    innermost = traceback.extract_tb(cause.__traceback__)[-1].filename
    if "/nodewrap/" in innermost and type(cause).__module__ == "builtins":
        raise Bug("".join(traceback.format_exception(type(cause), cause, cause.__traceback__)))


def one_input(pki: Pki, good: dict[str, bytes], allowed: set[tuple[object, ...]], rng: random.Random) -> tuple[bytes, set[tuple[object, ...]]]:
    """(credential file, facts that it may prove)"""
    way = rng.randrange(3)
    if way == 0:
        return mutate(rng.choice(list(good.values())), rng), allowed
    if way == 1:
        return resigned_leaf(pki, rng), allowed
    return resigned_ac(pki, rng), {(*one[:3], ANY_OF_VO, *one[4:]) for one in allowed}


def main() -> int:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    rng, seen = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as directory:
        pki = Pki(Path(directory) / "pki")
        good, now = corpus(pki), int(time.time())
        allowed = {facts(verify(data, pki.trust(), now)) for data in good.values()}
        end, runs = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            data, wanted = one_input(pki, good, allowed, rng)
            try:
                code = check(data, pki.trust(), now, wanted)
            except Bug:
                Path("fuzz-credentials-crash.pem").write_bytes(data)
                print(f"seed {seed}, run {runs}: input is in fuzz-credentials-crash.pem", file=sys.stderr)
                raise
            runs, seen[code] = runs + 1, seen.get(code, 0) + 1
    print(f"seed {seed}: {runs} runs, {len(seen)} outcomes")
    print("\n".join(f"{number:8} {code}" for code, number in sorted(seen.items(), key=lambda pair: -pair[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
