"""After import, ``verify`` lives inside the policy child's lock: no open, no exec, no socket, no thread, no executable memory."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.need import need
from tests.pki import Pki

ROOT = Path(__file__).parents[2]

#: What ``verify`` may call: memory, randomness, locks, and what the C library asks about itself.
ALLOWED = {"brk", "mmap", "munmap", "mremap", "madvise", "futex", "getpid", "gettid", "getrandom", "clock_gettime", "rt_sigaction", "rt_sigprocmask"}

#: Reads everything before the marks, so that what lies between is ``verify`` alone.
SCRIPT = """
import os, sys, pathlib
sys.path.insert(0, sys.argv[1])
from nodewrap import credentials
from nodewrap.credentials import Options, Refusal, Trust, verify
directory, now = pathlib.Path(sys.argv[2]), int(sys.argv[3])
files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
class Memory(Trust):
    def ca(self, name):
        return files.get(f"certificates/{name}")
    def voms(self, name):
        return files.get(f"vomsdir/{name}")
asked = [data for name, data in sorted(files.items()) if name.startswith("asked-")]
trust, verdicts = Memory(), []
os.write(2, b"MARK BEGIN\\n")
for data in asked:
    try:
        verify(data, trust, now)
        verdicts.append("ok")
    except Refusal as refusal:
        verdicts.append(refusal.code)
os.write(2, b"MARK END\\n")
print(" ".join(verdicts))
"""


@pytest.fixture
def pki(tmp_path):
    made = Pki(tmp_path / "pki")
    files = {
        "rfc": made.forge_proxy(made.alice, acs=[made.forge_ac()]).file(made.alice),
        "legacy": made.forge_proxy(made.alice, "legacy", acs=[made.forge_ac()]).file(made.alice),
        "expired": made.forge_proxy(made.alice, start=-9000, end=-8000).file(made.alice),
        "holder": made.forge_proxy(made.alice, acs=[made.forge_ac(made.pilot)]).file(made.alice),
        "junk": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "key": made.forge_proxy(made.alice).pem + b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "nokey": made.alice.pem,
    }
    for name, data in files.items():
        (made.directory / f"asked-{name}.pem").write_bytes(data)
    return made


EXPECTED = "NW-PROXY-EXPIRED NW-VOMS-HOLDER NW-X509-PARSE NW-KEY-READ ok NW-KEY-MISSING ok"


def test_verify_after_import_opens_nothing_and_starts_nothing(pki, tmp_path):
    need("strace")
    log = tmp_path / "strace"
    argv = ["strace", "-f", "-o", log, sys.executable, "-I", "-B", "-c", SCRIPT, ROOT, pki.directory, str(int(time.time()))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(EXPECTED.split())
    between = log.read_text().split("MARK BEGIN")[1].split("MARK END")[0].splitlines()[1:-1]
    calls = {re.sub(r"^\d+ +", "", line).split("(")[0] for line in between}
    assert calls <= ALLOWED, calls - ALLOWED
    assert not [line for line in between if "PROT_EXEC" in line]


LOCKED = """
import errno, pyseccomp
def lock():
    made = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    for name in {allowed!r} + ["write", "exit_group", "rt_sigreturn"]:
        if name != "mmap":
            made.add_rule(pyseccomp.ALLOW, name)
    made.add_rule(pyseccomp.ALLOW, "mmap", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, 4, 0))
    made.load()
"""


def test_verify_works_under_a_filter_that_allows_only_these_calls(pki):
    """The same, enforced: any other call kills the process. os._exit: the interpreter's own end needs more than ``verify`` does."""
    script = LOCKED.format(allowed=sorted(ALLOWED)) + SCRIPT.replace('os.write(2, b"MARK BEGIN\\n")', "lock()")
    script = script.replace('print(" ".join(verdicts))', 'os.write(1, " ".join(verdicts).encode())\nos._exit(0)')
    argv = [sys.executable, "-I", "-B", "-c", script, ROOT, pki.directory, str(int(time.time()))]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, sorted(done.stdout.split())) == (0, sorted(EXPECTED.split())), done.stderr
