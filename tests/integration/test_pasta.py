"""Private networks without privilege: the real userns launcher and the real pasta, in a node and a world of the tests' own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from nodewrap import netkernel, netrun
from tests.conftest import installation
from tests.files import CHECKOUT
from tests.need import need
from tests.node import BLOCK, DELEGATED, SUBJECT, Node, alive, status_of, until
from tests.world import CLOSED, METADATA, NAMES, NODE, OTHER, PROFILES, TRY, WORLD, World, listening, reachable

RANGE, GATEWAY = "10.214.0.0/24", "10.214.0.1"
TUN = "/dev/net/tun"


@pytest.fixture(scope="module")
def world(session):
    need("root", "userns", "nft", "ip", "pasta", "setfacl")
    installation(session, "userns")
    made = World()
    yield made
    made.close()


@contextlib.contextmanager
def tun_for(uid):
    """Distributions have mode 0666 there; where it is closed this one account gets it, as udev gives it to people."""
    if stat.S_IMODE(os.stat(TUN).st_mode) & 0o006 == 0o006:
        yield
        return
    subprocess.run(["setfacl", "-m", f"u:{uid}:rw", TUN], check=True)
    try:
        yield
    finally:
        subprocess.run(["setfacl", "-x", f"u:{uid}", TUN], check=True)


class Site:
    """A site with the launcher without privilege, whose guard has a network."""

    def __init__(self, node):
        self.node, self.site = node, node.site
        self.guard()
        text = node.policy_text().replace('["none", "compat", "batch", "strict"]', '["batch", "strict", "' + '", "'.join(NAMES) + '"]')
        self.site.policy(text + PROFILES)

    def guard(self, **changes):
        profiles = " ".join((*NAMES, "strict", "batch"))
        self.node.open_guard(**{"allow": [f"{mode} {profiles}" for mode in ("map", "log-only")], "network": RANGE, **changes})

    def tries(self, profile, *lines, kind="map", **more):
        """What a payload of that profile gets for each line, and the run."""
        ran = self.node.run(kind, "/usr/bin/python3", "-I", "-c", TRY, *lines, profile=profile, **more)
        assert (ran.rc, ran.err) == (0, b""), ran
        return ran.text.split("\n")[:-1], ran

    def makers(self):
        """pids of what makes networks here: (netrun, pasta), each with its parent's death signal. Those of other sessions have other uids."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                pasta = os.path.basename(words[0]).startswith(b"pasta") and GATEWAY.encode() in words
                if alive(int(pid)) and (pasta or (words[5:6] == [b"net"] and words[4].endswith(b"serve.py"))):
                    uid = int(status_of(pid)["Uid"][0])
                    found += [int(pid)] * (uid == self.node.pilot.uid or DELEGATED <= uid < DELEGATED + BLOCK)
        return sorted(found)


@pytest.fixture
def made(world, session):
    node = Node(installation(session, "userns"))
    with tun_for(node.pilot.uid):
        site = Site(node)
        yield site
        node.close()
        left = node.settled()
        node.site.reset()
    assert not any(left.values()), left
    until(lambda: not site.makers(), f"nothing runs on: {site.makers()}")


def start(made, profile="net", kind="map", command=("/bin/sleep", "60")):
    """A payload that waits, and its two makers."""
    live = made.node.start(kind, *command, profile=profile)
    return live, until(lambda: len(made.makers()) == 2 and made.makers(), "netrun and pasta run")


ENTER = """
import os, sys
from nodewrap import netkernel, netrun
user, net = (os.open(f"/proc/{sys.argv[1]}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net"))
netkernel.namespace("setns", user, (netrun.CLONE_NEWUSER,))
netkernel.namespace("setns", net, (netrun.CLONE_NEWNET,))
netrun._hold(netrun.CAP_NET_ADMIN)
os.execv(sys.argv[2], sys.argv[2:])
"""


def enter(made, live, *command):
    """By the caller, who has every capability in the payload's user namespace."""
    argv = [made.site.prefix / "lib/nodewrap/venv/bin/python3", "-I", "-c", ENTER, str(live.pid), *command]
    return subprocess.run(argv, capture_output=True, text=True, check=True, **made.site.owner()).stdout


def refused(ran, *words):
    assert ran.rc == 202, ran
    for word in ("NW-NET", *words):
        assert word.encode() in ran.err, ran


@pytest.mark.parametrize("kind", ["map", "log-only"])
def test_payload_reaches_the_world_under_the_nodes_address_and_the_record_says_how(made, kind):
    got, ran = made.tries("net", f"tcp {WORLD} 80", f"udp {OTHER} 5002", f"tcp {WORLD} 80", kind=kind)
    assert got == [NODE] * 3
    begin, end = ran.record("start"), ran.record("exit")
    assert begin["source"]["ip"] == end["source"]["ip"]
    assert begin["source"]["ip"].startswith("10.214.0.")
    assert begin["nodewrap"]["isolation"]["network"] == "pasta"
    assert end["nodewrap"]["usage"]["connections"] == [f"tcp {WORLD}:80 x2", f"udp {OTHER}:5002 x1"]


def test_payload_with_a_range_of_ids_reaches_it_too(made, delegated):
    assert delegated[0] == DELEGATED
    assert made.tries("net", f"tcp {WORLD} 80", kind="block")[0] == [NODE]


def test_only_what_the_policy_allows_and_does_not_deny_is_open(made):
    closed = [f"tcp {WORLD} 443", f"tcp {OTHER} 80", f"udp {OTHER} 5000", f"udp {WORLD} 5002", f"udp {WORLD} 53"]
    got, ran = made.tries("lan", f"tcp {WORLD} 80", f"udp {WORLD} 5000", *closed)
    assert got[:2] == [NODE, NODE]
    assert set(got[2:]) <= CLOSED, got
    assert ran.record("exit")["nodewrap"]["usage"]["connections"] == [f"tcp {WORLD}:80 x1", f"udp {WORLD}:5000 x1"]


def test_nodes_resolvers_answer_unless_the_policy_closes_them(made):
    resolver = next(iter(netkernel.resolvers()[0]), None)
    if not resolver:
        pytest.skip("this machine names no IPv4 resolver")
    assert made.tries("net", f"udp {resolver} 53")[0] == [NODE]
    assert set(made.tries("lan", f"udp {resolver} 53", f"tcp {resolver} 443")[0]) <= CLOSED


def test_metadata_services_are_closed_until_an_entry_of_their_own_opens_one(made):
    assert reachable(METADATA, 80), "the node itself reaches it"
    assert set(made.tries("net", f"tcp {METADATA} 80", "tcp 100.100.100.200 80")[0]) <= CLOSED
    got = made.tries("meta", f"tcp {METADATA} 80", f"tcp {METADATA} 443")[0]
    assert got[0] == NODE
    assert got[1] in CLOSED


def test_ports_of_the_pilot_are_closed_on_every_address_and_its_loopback_even_without_the_rules(made):
    with listening() as port:
        tries = [f"tcp {host} {port}" for host in (NODE, "127.0.0.1", "127.0.0.2", GATEWAY, "0.0.0.0", "198.18.0.2", "10.0.2.2")]
        assert reachable(NODE, port)
        assert reachable("127.0.0.1", port)
        assert set(made.tries("net", *tries)[0]) <= CLOSED
        live, _ = start(made)
        enter(made, live, "/usr/sbin/nft", "flush", "ruleset")
        got = enter(made, live, "/usr/bin/python3", "-c", TRY, *tries[:5]).split()
        live.process.send_signal(signal.SIGTERM)
        live.end()
    assert got[0] not in CLOSED, "the rules were all that kept the node's own addresses closed"
    assert set(got[1:]) <= CLOSED, "what pasta was told keeps loopback closed"


def test_payload_has_no_power_over_its_network(made):
    lines = ["ip link set eth0 down", "nft flush ruleset", "unshare -Ur nft flush ruleset", "unshare -Ur ip route del default"]
    script = "; ".join(f"{line} 2>/dev/null && echo done" for line in lines)
    ran = made.node.run("map", "/bin/sh", "-c", f"PATH=/usr/sbin:/sbin:$PATH; {script}; grep CapEff /proc/self/status", profile="meta")
    assert ran.text.split("\n") == [f"CapEff:\t{0:016x}", ""]


def test_there_is_no_ipv6_but_loopback(made):
    ran = made.node.sh("map", "cat /proc/net/if_inet6", profile="net")
    assert [line.split()[-1] for line in ran.text.splitlines()] == ["lo"] * len(ran.text.splitlines())
    assert made.tries("net", "tcp 2001:db8::1 80")[0][0] in {*CLOSED, "EADDRNOTAVAIL"}


def test_what_makes_the_network_holds_nothing_of_the_pilots_and_is_not_seen_by_the_payload(made, tmp_path):
    secret = tmp_path / "proxy"
    secret.write_text("secret")
    with open(secret) as file:
        live = made.node.start("map", "/bin/sh", "-c", "ls /proc | grep -c '^[0-9]'; sleep 60", profile="net", more_fds=(file.fileno(),))
    seen = int(live.process.stdout.readline())
    pids = until(lambda: len(made.makers()) == 2 and made.makers(), "both run")
    for pid in pids:
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert str(secret) not in held
        assert os.readlink(f"/proc/{live.process.pid}/fd/1") not in held
        assert b"HOME" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.getsid(pid) != os.getsid(live.process.pid)
    live.process.send_signal(signal.SIGTERM)
    live.end()
    assert seen <= 5, "init, the payload, and what counts"


def confined(pid):
    """By AppArmor: then the kernel has forgotten whom it dies with, and the end of the run ends it (docs/network.md)."""
    try:
        return not Path(f"/proc/{pid}/attr/apparmor/current").read_text().startswith("unconfined")
    except OSError:
        return False


@pytest.mark.parametrize("victim", ["launcher", "netrun", "pasta"])
def test_whoever_is_killed_nothing_runs_on_when_the_run_has_ended(made, victim):
    live, (one, two) = start(made)
    pasta = one if b"pasta" in Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")[0] else two
    netrun_pid = two if pasta == one else one
    os.kill({"launcher": live.process.pid, "netrun": netrun_pid, "pasta": pasta}[victim], signal.SIGKILL)
    if victim == "launcher":
        live.end()
        until(lambda: not made.makers(), "both died with the launcher")
        made.node.sweep()
        return
    if victim == "pasta" or not confined(pasta):
        until(lambda: pasta not in made.makers(), "pasta is gone")
    assert alive(live.pid), "the payload goes on, without a network"
    live.process.send_signal(signal.SIGTERM)
    assert live.end()[0] == 128 + signal.SIGTERM


def test_nothing_outlives_the_launcher_where_it_runs_as_root_of_the_namespace(made, delegated):
    """Who becomes root by exec could gain capabilities, and the kernel would forget whom it dies with (prctl(2))."""
    assert delegated[0] == DELEGATED
    live, _ = start(made, kind="block")
    live.process.kill()
    live.end()
    until(lambda: not made.makers(), "both died with the launcher")
    made.node.sweep()


def test_node_that_lacks_something_refuses_or_degrades_and_doctor_knew(made):
    def finding():
        who = {**made.site.owner(), "env": made.site.environment(made.site.pilot), "cwd": "/"}
        ran = subprocess.run([made.site.binary, "doctor", "--json"], capture_output=True, text=True, **who)
        found = json.loads(ran.stdout)
        cells = {cell["state"] for cell in found["matrix"] if (cell["launcher"], cell["mode"], cell["profile"]) == ("userns", "log-only", "net")}
        return found["checks"]["pasta"]["yes"], found["checks"]["pasta"]["saw"], found["checks"]["pasta"]["next"], cells

    yes, saw, _, cells = finding()
    assert yes, saw
    assert cells <= {"yes", "degraded"}, "degraded: before Landlock's newer parts"
    made.guard(network=None)
    refused(made.node.run("map", "/bin/true", profile="net"), 'no line "network"', "doctor")
    assert finding()[0] is False
    made.guard()
    closed = stat.S_IMODE(os.stat(TUN).st_mode) & 0o006 != 0o006
    if not closed:
        return
    subprocess.run(["setfacl", "-x", f"u:{made.site.pilot.uid}", TUN], check=True)
    try:
        refused(made.node.run("map", "/bin/true", profile="net"), "/dev/net/tun", "mode 0666")
        yes, saw, step, cells = finding()
        assert (yes, cells) == (False, {"no"})
        assert "/dev/net/tun" in saw
        assert "0666" in step
        got, ran = made.tries("maybe", f"tcp {WORLD} 80")
        assert got == ["ENETUNREACH"]
        assert ran.record("start")["nodewrap"]["isolation"]["network"] == "none"
        assert "private-network" in ran.record("degrade")["nodewrap"]["degrade"]
        assert "source" not in ran.record("start")
    finally:
        subprocess.run(["setfacl", "-m", f"u:{made.site.pilot.uid}:rw", TUN], check=True)


def test_pasta_that_hangs_is_waited_for_no_longer_than_the_guard_says(made):
    made.guard(deadline_ms="1500")
    script = made.site.prefix / "libexec/nodewrap/serve.py"
    text = script.read_text()
    try:
        hang = "import nodewrap.netrun, time; nodewrap.netrun.start_pasta = lambda *a: time.sleep(99)"
        made.site.write(script, text.replace("    main(sys.argv[2])", f"    {hang}\n    main(sys.argv[2])"))
        began = time.monotonic()
        ran = made.node.run("map", "/bin/true", profile="net")
        refused(ran, "netrun does not answer")
        assert 1 < time.monotonic() - began < 8
        assert not made.makers()
    finally:
        made.site.write(script, text)


def test_explain_says_the_same_as_with_netd(made):
    who = ["--caller", made.site.pilot.name, "--dn", SUBJECT, "--vo", "map", "--assurance", "declared", "--profile", "lan"]
    lan = "network private; deny 203.0.113.20; allow 203.0.113.0/24:80, udp any:5000-5001; no dns"
    assert made.site.admin("policy", "explain", *who).splitlines()[-1] == lan


def test_namespace_that_cannot_be_entered_is_told():
    with open("/proc/self/ns/user") as user, open("/proc/self/ns/net") as net, pytest.raises(netrun.NetError, match="setns"):
        netrun.start_pasta(user.fileno(), net.fileno(), ["pasta"])


#: As netrun: a child that forgets whom it dies with, which is taken along when the parent dies.
TAKEN = """
import ctypes, os, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from nodewrap import netrun
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    forgetful = subprocess.Popen(["/bin/sleep", "60"])
    if sys.argv[2] == "taken":
        netrun.take_along(forgetful.pid)
    print(forgetful.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["taken", "left"])
def test_who_has_forgotten_its_parent_is_taken_along_when_that_is_to_die(how):
    """As pasta in its AppArmor profile (tests/kernel: on a distribution it is the real one)."""
    words = ["/usr/bin/python3", "-I", "-c", TAKEN, str(CHECKOUT), how]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as launcher:
        forgetful = int(launcher.stdout.readline())
        launcher.kill()
    try:
        if how == "taken":
            until(lambda: not alive(forgetful), "it has gone too")
        time.sleep(0.2)
        assert alive(forgetful) == (how == "left"), "the control lives on"
    finally:
        if alive(forgetful):
            os.kill(forgetful, signal.SIGKILL)
