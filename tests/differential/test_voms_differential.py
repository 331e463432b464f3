"""Attribute certificates: our verdict and FQANs against libvomsapi's (the library behind LCMAPS), and against ``voms-proxy-info``."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys

import pytest
from asn1crypto import core

from nodewrap.credentials import Refusal, short_fqan
from tests.need import need
from tests.pki import BASE, DAY, HOST, NO_REVOCATION, PILOT, PLAIN, TARGETS, VO, Pki, key, targets

#: Asks libvomsapi in a process of its own: it may crash (bookworm and trixie do on some targets). Prints its error number, then the FQANs.
#: The structures are those of voms_apic.h; RECURSE_CHAIN is 0.
ORACLE = """
import ctypes, sys
crypto, voms = ctypes.CDLL(sys.argv[4]), ctypes.CDLL(sys.argv[5])
P = ctypes.c_void_p
for function in (crypto.BIO_new_file, crypto.PEM_read_bio_X509, crypto.OPENSSL_sk_new_null, voms.VOMS_Init):
    function.restype = P
class Voms(ctypes.Structure):
    _fields_ = [("siglen", ctypes.c_int), ("texts", P * 9), ("type", ctypes.c_int), ("std", P), ("custom", P), ("datalen", ctypes.c_int),
                ("version", ctypes.c_int), ("fqan", ctypes.POINTER(ctypes.c_char_p))]
class Data(ctypes.Structure):
    _fields_ = [("cdir", P), ("vdir", P), ("data", ctypes.POINTER(ctypes.POINTER(Voms)))]
bio = P(crypto.BIO_new_file(sys.argv[1].encode(), b"r"))
read = lambda: crypto.PEM_read_bio_X509(bio, None, None, None)
leaf, stack = P(read()), P(crypto.OPENSSL_sk_new_null())
while (above := read()):
    crypto.OPENSSL_sk_push(stack, P(above))
data, error = P(voms.VOMS_Init(sys.argv[3].encode(), sys.argv[2].encode())), ctypes.c_int(0)
done = voms.VOMS_Retrieve(leaf, stack, 0, data, ctypes.byref(error))
print(error.value if not done else 0)
found, number = ctypes.cast(data, ctypes.POINTER(Data)).contents.data, 0
while done and found and found[number]:
    fqan, place = found[number].contents.fqan, 0
    while fqan[place]:
        print(fqan[place].decode())
        place += 1
    number += 1
"""

NO_REV = (NO_REVOCATION, False, core.Null().dump())


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def libvoms(pki, data):
    """(error number, FQANs) of libvomsapi; error 0 means accepted, a negative number the signal that it died of."""
    library = "libvomsapi.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        need("libvomsapi.so.1")
    file = pki.directory / "asked.pem"
    file.write_bytes(data)
    argv = [sys.executable, "-c", ORACLE, file, pki.ca_dir, pki.voms_dir, ctypes.util.find_library("crypto") or "libcrypto.so.3", library]
    done = subprocess.run(argv, capture_output=True, text=True)
    lines = done.stdout.split()
    return (int(lines[0]), lines[1:]) if done.returncode == 0 else (-abs(done.returncode), [])


def ours(pki, data):
    """FQANs, or None when the attribute certificate is refused."""
    try:
        return pki.verify(data).fqans
    except Refusal as refusal:
        if not refusal.code.startswith("NW-VOMS-"):
            raise
        return None


def credential(pki, **change):
    return pki.forge_proxy(pki.alice, acs=[pki.forge_ac(**change)]).file(pki.alice)


@pytest.mark.parametrize("args", [("-rfc",), ("-rfc", "-limited"), ("-proxyver", "2"), ("-proxyver", "3")])
@pytest.mark.parametrize("fqans", [(PILOT,), (PILOT, PLAIN), (PLAIN, PILOT, f"/{VO}/group/sub/Role=NULL/Capability=NULL")])
def test_fqans_of_real_proxies_are_those_that_the_tools_show(pki, args, fqans):
    need("voms-proxy-fake", "voms-proxy-info")
    file = pki.proxy(fqans=fqans, args=args)
    env = {"PATH": os.defpath, "HOME": str(pki.directory), "X509_VOMS_DIR": str(pki.voms_dir), "X509_CERT_DIR": str(pki.ca_dir)}
    shown = subprocess.run(["voms-proxy-info", "-all", "-file", file], capture_output=True, text=True, env=env).stdout
    attributes = [line.split(" : ")[1] for line in shown.splitlines() if line.startswith("attribute : ")]
    identity = [line.split(" : ")[1] for line in shown.splitlines() if line.startswith("identity")]
    error, retrieved = libvoms(pki, file.read_bytes())
    subject = pki.verify(file.read_bytes())
    assert [short_fqan(fqan) for fqan in attributes] == [short_fqan(fqan) for fqan in retrieved] == subject.fqans
    assert identity == [subject.dn]
    assert (error, len(retrieved)) == (0, len(fqans))


def rogue(pki):
    return {"server": pki.host(HOST, issuer=pki.make_ca(f"{BASE}/CN=Rogue CA"))}


#: name: (change of a good attribute certificate, whether both accept it)
SAME = {
    "good": ({}, True),
    "good, two FQANs": ({"fqans": [PILOT, PLAIN]}, True),
    "good, for any host": ({"extensions": [NO_REV]}, True),
    "expired": ({"start": -2 * DAY, "end": -DAY}, False),
    "not yet valid": ({"start": DAY, "end": 2 * DAY}, False),
    "other key signed": (lambda pki: {"signer": key("mallory")}, False),
    "other holder": (lambda pki: {"holder": pki.pilot}, False),
    "other serial": ({"serial": 1}, False),
    "signed by the user": (lambda pki: {"server": pki.alice}, False),
    "server of an unknown CA": (rogue, False),
    "unknown VO": ({"authority": f"othervo://{HOST}:15000", "fqans": ["/othervo"]}, False),
    "unknown host": ({"authority": f"{VO}://voms2.example.org:15000"}, False),
    "unknown critical": ({"extensions": [NO_REV, ("1.2.3.4", True, b"\x05\x00")]}, False),
    "other VO's FQAN": ({"fqans": [PILOT, "/othervo"]}, False),
    "no server certificate": ({"certificates": []}, False),
}


@pytest.mark.parametrize("name", SAME)
def test_verdict_is_that_of_libvomsapi(pki, name):
    change, accepted = SAME[name]
    data = credential(pki, **(change(pki) if callable(change) else change))
    error, _ = libvoms(pki, data)
    assert (error == 0, ours(pki, data) is not None) == (accepted, accepted)


def test_target_that_crashes_or_stops_libvomsapi_is_an_ordinary_refusal(pki):
    data = credential(pki, extensions=[NO_REV, (TARGETS, True, targets())])
    error, _ = libvoms(pki, data)
    assert error != 0
    assert ours(pki, data) is None
