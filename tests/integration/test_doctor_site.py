"""Doctor on real installations: it finds what really works there, and what was broken on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.node import status_of, until

CODE = """
import argparse, sys
from nodewrap.commands import doctor
parser = argparse.ArgumentParser()
doctor.configure(parser)
sys.exit(doctor.main(parser.parse_args(sys.argv[1:])))
"""
POLICY = """
[site]
name = "TEST"
multi_user = "yes"
modes = {{ log-only = "allow", map = "allow" }}
minimum_assurance = "declared"

[[caller]]
account = ["{pilot}"]

[[rule]]
name = "all"
identity = {{ mode = "log-only" }}
profile = {profiles}
"""


def doctor(site):
    """(exit status, what --json says), as the site's administrator."""
    pilots = os.geteuid() == 0 and site.launcher == "userns"
    owner = {"user": site.pilot.uid, "group": site.pilot.gid, "extra_groups": site.pilot.groups} if pilots else {}
    argv = [site.prefix / "lib/nodewrap/venv/bin/python3", "-I", "-c", CODE, "--json", "--workdir", "/var/tmp"]
    done = subprocess.run(argv, capture_output=True, text=True, env=site.environment(site.pilot), cwd="/", **owner)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def ready(site):
    """A site whose policy runs everybody log-only, strict or batch."""
    site.guard(allow=["log-only strict batch"])
    site.policy(POLICY.format(pilot=site.pilot.name, profiles='["batch", "strict"]'))
    return site


def test_a_working_installation_is_ready(ready):
    status, found = doctor(ready)
    assert (status, found["problems"]) == (0, [])
    assert found["launcher"] == ready.launcher
    assert found["profiles"] == "the applied policy"
    states = {(cell["launcher"], cell["mode"], cell["profile"]): cell["state"] for cell in found["matrix"]}
    for profile in ("strict", "batch"):  # degraded: before Landlock
        assert states[ready.launcher, "log-only", profile] in ("yes", "degraded")


def test_what_doctor_promises_is_what_a_run_gives(ready):
    _, found = doctor(ready)
    states = {cell["profile"]: cell["state"] for cell in found["matrix"] if (cell["launcher"], cell["mode"]) == (ready.launcher, "log-only")}
    for profile in ("strict", "batch"):
        ran = ready.nodewrap("run", "--profile", profile, "--declare", "subject=/CN=x", "--", "/bin/true")
        assert (ran.rc == 0) == (states[profile] != "no"), ran


def test_a_rule_that_the_guard_does_not_allow_is_found(ready):
    ready.guard(allow=["log-only batch"])
    status, found = doctor(ready)
    assert status == 1
    assert "the guard does not allow log-only with strict" in found["problems"][0]


def test_a_broken_guard_is_found(ready):
    ready.guard(deadline_ms="0")
    status, found = doctor(ready)
    assert status == 1
    assert "deadline-ms" in found["problems"][0]


def test_a_guard_that_others_can_write_is_found(ready):
    (ready.sysconf / "guard").chmod(0o666)
    status, found = doctor(ready)
    assert status == 1
    assert "writable by others" in found["problems"][0]


def test_a_lost_setuid_bit_is_found(setuid_site):
    launcher = setuid_site.prefix / "libexec/nodewrap/nodewrap-setuid"
    mode = launcher.stat().st_mode
    try:
        launcher.chmod(0o750)
        _, found = doctor(setuid_site)
        assert "is not setuid root" in found["checks"]["launcher.setuid"]["saw"]
        assert {cell["state"] for cell in found["matrix"] if cell["launcher"] == "setuid"} == {"no"}
    finally:
        launcher.chmod(mode)


def test_attempts_as_the_caller_have_nothing_of_roots_environment(setuid_site):
    """It is in the memory of the child that becomes the caller, and others of the caller's may read that."""
    seen = []
    environment = {"PATH": os.defpath, "NWT_SECRET": "of-root"}
    words = ["/bin/sh", "-c", 'kill -STOP $$; exec "$0" doctor', setuid_site.binary]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd="/", env=environment) as process:
        until(lambda: status_of(process.pid)["State"][0] == "T", "it has begun")
        seen.append(Path(f"/proc/{process.pid}/environ").read_bytes())
        process.send_signal(signal.SIGCONT)
        while process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it is ending
                seen.append(Path(f"/proc/{process.pid}/environ").read_bytes())
            time.sleep(0.005)
    assert [one for one in seen if b"NWT_SECRET" in one], "never seen with it: this test proves nothing"
    assert [one for one in seen if one and b"NWT_SECRET" not in one], "attempts were made with root's environment"
