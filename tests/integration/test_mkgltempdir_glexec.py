"""mkgltempdir with the real glexec, and the steps of the CMS probe: make a directory, copy a wrapper in, run it, read what it left, remove."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.need import need
from tests.pki import Pki

POLICY = """
[site]
name = "TEST"
multi_user = "yes"
modes = {{ switch = "allow" }}
minimum_assurance = "credential"

[[caller]]
account = ["{pilot}"]

[[rule]]
name = "alice"
when = {{ vo = "testvo" }}
identity = {{ mode = "switch", account = "{user}" }}
profile = ["compat", "batch"]
"""


@pytest.fixture
def probe(setuid_site, tmp_path):
    """probe(command, *words): glexec or mkgltempdir, by name, as the pilot with Alice's proxy -> Result."""
    need("voms-proxy-fake")
    site, user = setuid_site, setuid_site.accounts["user1"]
    pki = Pki(site.session.top / f"pki-{tmp_path.name}")
    proxy = site.pilot.home / f"payload-{tmp_path.name}.pem"
    proxy.write_bytes(pki.proxy().read_bytes())
    os.chown(proxy, site.pilot.uid, site.pilot.gid)
    proxy.chmod(0o600)
    site.guard(switch_uid=f"{user.uid}-{user.uid}", switch_gid=f"{user.gid}-{user.gid}", allow=["switch compat batch"], ca_dir=str(pki.ca_dir),
               voms_dir=str(pki.voms_dir))
    site.policy(POLICY.format(pilot=site.pilot.name, user=user.name))
    # As glexec's callers do (glideinWMS: chmod a+x on the whole path): the tests' homes are below /opt, which the profile shows.
    site.pilot.home.chmod(0o711)
    env = {"GLEXEC_CLIENT_CERT": str(proxy), "GLEXEC_LOCATION": None, "GLITE_LOCATION": None}
    yield lambda command, *words, **more: site.run([site.prefix / "bin" / command, *words], env={**env, **more.pop("env", {})}, **more)
    site.pilot.home.chmod(0o700)


def done(result):
    assert (result.rc, result.err) == (0, b""), result.err.decode()
    return result.text.rstrip("\n")


def test_steps_of_the_cms_probe_pass(probe, setuid_site):
    user, pilot = setuid_site.accounts["user1"], setuid_site.pilot
    env = {"GLEXEC_TARGET_PROXY": f"/tmp/x509up_u{pilot.uid}.glexec.4711"}
    assert done(probe("glexec", "-v", env=env)).startswith("glexec version")
    assert done(probe("glexec", "/usr/bin/id", "-u", env=env)) == str(user.uid)
    inner = Path(done(probe("mkgltempdir", env=env)))
    assert inner.parent.parent == pilot.home
    wrapper = inner.parent / "wrapper.sh"
    wrapper.write_text(f"#!/bin/sh\ncd {inner}\necho Hello world > payload.out\nid -u >> payload.out\nchmod a+rx .\nchmod a+r ./*\n")
    os.chown(wrapper, pilot.uid, pilot.gid)
    wrapper.chmod(0o755)
    done(probe("glexec", "/bin/cp", wrapper, inner, env=env))
    wrapper.unlink()
    done(probe("glexec", inner / "wrapper.sh", env=env))
    assert (inner / "payload.out").read_text() == f"Hello world\n{user.uid}\n"
    refused = probe("mkgltempdir", "-r", inner, env=env)
    assert (refused.rc, b"NW-GLTMP-NOTEMPTY" in refused.err) == (201, True)
    done(probe("mkgltempdir", "-r", "-f", inner, env=env))
    assert not inner.parent.exists()


def test_target_proxy_goes_into_the_temporary_directory(probe):
    inner = Path(done(probe("mkgltempdir", "-t", "777")))
    env = {"GLEXEC_TARGET_PROXY": str(inner / "user_proxy")}
    script = 'echo "$X509_USER_PROXY"; stat -c "%a" "$X509_USER_PROXY"'
    assert done(probe("glexec", "/bin/sh", "-c", script, env=env)) == f"{inner / 'user_proxy'}\n600"
    (inner / "user_proxy").unlink()
    assert done(probe("glexec", env=env)) == ""
    assert b"PRIVATE KEY" in (inner / "user_proxy").read_bytes()
    done(probe("mkgltempdir", "-rf", inner))


def test_pilot_without_a_proxy_gets_glexecs_own_refusal_and_no_directory(probe, setuid_site):
    result = probe("mkgltempdir", env={"GLEXEC_CLIENT_CERT": None})
    assert result.rc == 201
    assert b"NW-USAGE-PROXY" in result.err
    assert not [path for path in setuid_site.pilot.home.iterdir() if "gltmp" in path.name]
