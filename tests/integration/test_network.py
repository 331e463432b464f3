"""Private networks under the real setuid launcher and the real netd, in a node and a world that are network namespaces of the tests' own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nodewrap import netbuild, netkernel, netleft, network
from nodewrap.guard import Network
from tests.conftest import installation
from tests.need import need
from tests.node import SUBJECT, Node, abandon, status_of, until
from tests.world import (
    CLOSED,
    METADATA,
    METADATA6,
    NAMES,
    NAT64,
    NODE,
    NODE6,
    OTHER,
    OTHER6,
    PROFILES,
    SIX,
    TRY,
    WORLD,
    WORLD6,
    World,
    forward,
    forward6,
    ip,
    listening,
    reachable,
)

RANGE = Network(0x0AD50000, 24)
#: nfnetlink_conntrack.h.
CTA_TUPLE_PROTO, CTA_PROTO_DST_PORT = 2, 3


def links():
    """Payloads' links on the node, by name."""
    return sorted(name for _, name in socket.if_nameindex() if name.startswith(network.LINK))


@pytest.fixture(scope="module")
def world(session):
    need("root", "nft", "ip")
    installation(session, "setuid")  # which may want the network that the test process leaves now
    made = World()
    yield made
    made.close()


class Netd:
    """A site with netd. process: its Popen, ready. asked: what a test has of it as a launcher; given back when the test ends, if not before."""

    def __init__(self, node, extra=()):
        self.node, self.site, self.asked = node, node.site, contextlib.ExitStack()
        self.path = self.site.prefix / "run/netd"
        self.profiles = " ".join((*NAMES, "strict", "batch"))
        self.guard()
        text = node.policy_text().replace('["none", "compat", "batch", "strict"]', '["batch", "strict", "' + '", "'.join(NAMES) + '"]')
        self.site.policy(text + PROFILES)
        self.process = self.start()

    def guard(self, **changes):
        allow = [f"{mode} {self.profiles}" for mode in ("switch", "map", "log-only")]
        self.node.open_guard(**{"allow": allow, "netd": str(self.path), "network": str(RANGE), **changes})

    def start(self, ready=True, front=()):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(b"\0nodewrap-test-" + os.urandom(8).hex().encode())
            notify.settimeout(20)
            env = {**self.site.environment(self.site.pilot), "NOTIFY_SOCKET": "@" + notify.getsockname()[1:].decode()}
            argv = [*front, self.site.binary, "netd", "--guard", self.site.sysconf / "guard"]
            process = subprocess.Popen(argv, env=env, cwd="/", stderr=subprocess.PIPE)
            if ready:
                try:
                    assert notify.recv(100) == b"READY=1"
                except TimeoutError:
                    process.kill()
                    raise AssertionError(process.communicate()) from None
        return process

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(20)
        said = self.process.stderr.read().decode()
        self.process.stderr.close()
        return said

    def tries(self, profile, *lines, kind="static", **more):
        """What a payload of that profile gets for each line, and the run."""
        ran = self.node.run(kind, "/usr/bin/python3", "-I", "-c", TRY, *lines, profile=profile, **more)
        assert (ran.rc, ran.err) == (0, b""), ran
        return ran.text.split("\n")[:-1], ran


@pytest.fixture
def netd(world, session):
    need("root")
    node = Node(installation(session, "setuid"))
    made = Netd(node)
    with made.asked:
        yield made
    node.close()
    if made.process.poll() is None:
        made.stop()
    left = node.settled()
    node.site.reset()
    assert not any(left.values()), left
    until(lambda: not links(), f"no link is left: {links()}")
    nft("flush ruleset")
    with netleft.netfilter() as sock:  # all of this node's: another test may get the address of one that netd did not see to its end
        netleft._send(sock, netleft.CT_DELETE, netleft.ACK, bytes(4))


@pytest.fixture
def listener():
    with listening() as port:
        yield port


def nft(line):
    return subprocess.run(["nft", line], check=True, capture_output=True, text=True).stdout


def start(netd, profile="net", kind="static", command=("/bin/sleep", "60")):
    """A payload that waits, and its address."""
    before = netd.site.audit_size()
    live = netd.node.start(kind, *command, profile=profile)
    (record,) = [record for record in netd.site.records(before) if record["event"]["action"] == "start"]
    return live, record["source"]["ip"]


def from_inside(live, *lines):
    """As Netd.tries, by root in the payload's namespace."""
    enter = ["nsenter", "-t", str(live.pid), "-n", "/usr/bin/python3", "-c", TRY, *lines]
    return subprocess.run(enter, check=True, capture_output=True, text=True).stdout.split()


def refused(ran, *words):
    assert ran.rc == 202, ran
    for word in ("NW-NET", *words):
        assert word.encode() in ran.err, ran


@pytest.mark.parametrize("kind", ["static", "pool", "map", "block", "log-only"])
def test_payload_reaches_the_world_under_the_nodes_address_and_its_own_is_on_record(netd, kind):
    got, ran = netd.tries("net", f"tcp {WORLD} 80", f"udp {OTHER} 5002", f"tcp {WORLD} 80", kind=kind)
    assert got == [NODE] * 3
    begin, end = ran.record("start"), ran.record("exit")
    assert begin["source"]["ip"] == end["source"]["ip"]
    assert begin["source"]["ip"].startswith("10.213.0.")
    assert begin["nodewrap"]["isolation"]["network"] == "private"
    assert end["nodewrap"]["usage"]["connections"] == [f"tcp {WORLD}:80 x2", f"udp {OTHER}:5002 x1"]


def test_only_what_the_policy_allows_and_does_not_deny_is_open(netd):
    closed = [f"tcp {WORLD} 443", f"tcp {OTHER} 80", f"udp {OTHER} 5000", f"udp {WORLD} 5002", f"udp {WORLD} 53"]
    got, ran = netd.tries("lan", f"tcp {WORLD} 80", f"udp {WORLD} 5000", *closed)
    assert got[:2] == [NODE, NODE]
    assert set(got[2:]) <= CLOSED, got
    assert ran.record("exit")["nodewrap"]["usage"]["connections"] == [f"tcp {WORLD}:80 x1", f"udp {WORLD}:5000 x1"]


def test_payload_cannot_fill_the_nodes_table_of_connections(netd):
    code = f"""
import socket
s = socket.socket(type=socket.SOCK_DGRAM)
sent = 0
for port in range(10000, 16000):
    try:
        sent += s.sendto(b"x", ("{WORLD}", port))
    except OSError:
        pass
print(sent)
"""
    ran = netd.node.run("static", "/usr/bin/python3", "-I", "-c", code, profile="net")
    assert (ran.rc, int(ran.out)) == (0, network.CONNECTIONS), ran


def test_nodes_resolvers_answer_unless_the_policy_closes_them(netd):
    resolver = next(iter(netkernel.resolvers()[0]), None)
    if not resolver:
        pytest.skip("this machine names no IPv4 resolver")
    assert netd.tries("net", f"udp {resolver} 53")[0] == [NODE]
    assert set(netd.tries("lan", f"udp {resolver} 53", f"tcp {resolver} 443")[0]) <= CLOSED


def test_metadata_services_are_closed_until_an_entry_of_their_own_opens_one(netd):
    assert reachable(METADATA, 80), "the node itself reaches it"
    assert set(netd.tries("net", f"tcp {METADATA} 80", "tcp 100.100.100.200 80")[0]) <= CLOSED
    got = netd.tries("meta", f"tcp {METADATA} 80", f"tcp {METADATA} 443")[0]
    assert got[0] == NODE
    assert got[1] in CLOSED


def test_ports_of_the_node_are_closed_by_each_of_two_walls(netd, listener):
    tries = [f"tcp {host} {listener}" for host in (NODE, "127.0.0.1", "198.18.0.2")]
    assert reachable(NODE, listener)
    assert subprocess.run(["/usr/bin/python3", "-c", TRY, tries[0]], capture_output=True, text=True, check=True).stdout.split() == [NODE]
    assert set(netd.tries("net", *tries)[0]) <= CLOSED
    live, _ = start(netd)  # the wall of the namespace down: the node's stands
    inner = ["nsenter", "-t", str(live.pid), "-n"]
    subprocess.run([*inner, "nft", "flush", "ruleset"], check=True)
    got = from_inside(live, *tries[:2], f"tcp {WORLD} 80")
    assert set(got[:2]) <= CLOSED, got
    assert got[2] == NODE
    live, _ = start(netd, kind="map")
    netd.process.send_signal(signal.SIGSTOP)  # it would put it back
    nft("flush ruleset")  # the wall of the node down: the namespace's stands
    got = from_inside(live, *tries)
    netd.process.send_signal(signal.SIGCONT)
    assert set(got) <= CLOSED


def test_neither_other_payloads_nor_the_node_reach_a_payload(netd):
    serve = "import socket\ns = socket.create_server(('0.0.0.0', 7000))\nwhile True: s.accept()[0].sendall(b'hello')"
    live, address = start(netd, command=("/usr/bin/python3", "-I", "-c", serve))
    until(lambda: from_inside(live, "tcp 127.0.0.1 7000") == ["hello"], "it serves")
    got, _ = netd.tries("net", f"tcp {address} 7000", kind="map")
    assert got[0] in CLOSED
    assert not reachable(address, 7000)
    other, _ = start(netd, kind="map")  # the walls of both namespaces down: the node's stands
    for payload in (live, other):
        subprocess.run(["nsenter", "-t", str(payload.pid), "-n", "nft", "flush", "ruleset"], check=True)
    assert from_inside(other, f"tcp {address} 7000")[0] in CLOSED
    assert not reachable(address, 7000)


def test_address_of_somebody_else_is_not_believed(netd, world):
    live, address = start(netd)
    inner = ["nsenter", "-t", str(live.pid), "-n"]
    others = "10.213.0.250" if address != "10.213.0.250" else "10.213.0.251"  # any of the range may be the run's own
    subprocess.run([*inner, "ip", "addr", "add", f"{others}/32", "dev", "eth0"], check=True)
    code = f"import socket, sys; s = socket.socket(type=2); s.bind((sys.argv[1], 0)); s.sendto(sys.argv[1].encode(), ('{WORLD}', 5999))"
    with world.inside():
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink:
        sink.bind((WORLD, 5999))
        sink.settimeout(5)
        for source in (others, address):
            subprocess.run([*inner, "/usr/bin/python3", "-c", code, source], check=True)
        assert sink.recv(99) == address.encode(), "the first that arrives is the one that was believed"


def test_root_of_a_nested_namespace_has_no_power_over_the_network(netd):
    got = netd.node.run("static", "/usr/bin/unshare", "-Ur", "/usr/sbin/ip", "link", "set", "eth0", "down", profile="meta")
    assert got.rc != 0
    assert b"not permitted" in got.err, got


def test_there_is_no_ipv6_but_loopback(netd):
    ran = netd.node.sh("static", "cat /proc/net/if_inet6", profile="net")
    assert [line.split()[-1] for line in ran.text.splitlines()] == ["lo"] * len(ran.text.splitlines())
    assert netd.tries("net", "tcp 2001:db8::1 80")[0][0] in CLOSED


# ---- IPv6 ----


@pytest.fixture(params=["nat", "routed"])
def six(request, netd):
    """netd with a range of IPv6; what follows it in the guard."""
    if not SIX:
        pytest.skip("this kernel has no IPv6")
    netd.stop()
    netd.guard(network6=f"fd12:3456:789a::/64 {request.param}")
    netd.process = netd.start()
    netd.how = request.param
    return netd


def own6(record):
    return record["nodewrap"]["isolation"]["ipv6"]


def test_payload_reaches_the_world_by_ipv6_and_its_own_address_is_on_record(six):
    got, ran = six.tries("net", f"tcp {WORLD6} 80", f"udp {OTHER6} 5002", f"tcp {WORLD} 80")
    mine = own6(ran.record("start"))
    assert got == [NODE6 if six.how == "nat" else mine] * 2 + [NODE]
    assert mine.startswith("fd12:3456:789a::ad5:")
    assert int.from_bytes(socket.inet_pton(socket.AF_INET6, mine)[12:], "big") == int.from_bytes(
        socket.inet_aton(ran.record("start")["source"]["ip"]), "big"), "the one tells the other"
    assert ran.record("exit")["nodewrap"]["usage"]["connections"] == [f"tcp [{WORLD6}]:80 x1", f"tcp {WORLD}:80 x1", f"udp [{OTHER6}]:5002 x1"]


def test_metadata_link_local_and_embedded_addresses_are_closed_by_ipv6_too(six, listener):
    closed = [f"tcp {METADATA6} 80", f"tcp {NAT64} 80", f"tcp {NODE6} {listener}", f"tcp fe80::1 {listener}", "udp ff02::1%eth0 53",
              f"tcp ::1 {listener}", f"udp fe80::2%eth0 {listener}", f"tcp ::ffff:{METADATA} 80"]
    for host in (METADATA6, NAT64):
        assert reachable(host, 80), "the node itself reaches it"
    assert reachable(NODE6, listener)
    got, ran = six.tries("net", *closed)
    assert set(got) <= CLOSED - {"timeout"} | {"EADDRNOTAVAIL", "EINVAL"}, got
    assert "connections" not in ran.record("exit")["nodewrap"]["usage"]
    live, _ = start(six)  # the wall of the namespace down: the node's stands
    subprocess.run(["nsenter", "-t", str(live.pid), "-n", "nft", "flush", "ruleset"], check=True)
    got = from_inside(live, f"tcp {NODE6} {listener}", f"tcp {WORLD6} 80")
    assert got[0] in CLOSED
    assert got[1] == (NODE6 if six.how == "nat" else own6(six.site.records()[-1])), got


def test_rules_of_ipv6_open_and_close(six):
    wanted = [f"tcp {WORLD6} 80", f"tcp {METADATA6} 80", f"tcp {WORLD6} 443"]
    got, _ = six.tries("six", *wanted, f"tcp {OTHER6} 80", f"tcp {METADATA6} 443", f"udp {WORLD6} 5000")
    assert not {got[0], got[1], got[2]} & CLOSED, got
    assert set(got[3:]) <= CLOSED, got


def test_neither_other_payloads_nor_the_node_reach_a_payload_by_ipv6(six):
    serve = "import socket\ns = socket.create_server(('::', 7000), family=socket.AF_INET6)\nwhile True: s.accept()[0].sendall(b'hello')"
    before = six.site.audit_size()
    live, _ = start(six, command=("/usr/bin/python3", "-I", "-c", serve))
    mine = own6(six.site.records(before)[-1])
    until(lambda: from_inside(live, "tcp ::1 7000") == ["hello"], "it serves")
    assert six.tries("net", f"tcp {mine} 7000", kind="map")[0][0] in CLOSED
    assert not reachable(mine, 7000)
    other, _ = start(six, kind="map")  # the walls of both namespaces down: the node's stands
    for payload in (live, other):
        subprocess.run(["nsenter", "-t", str(payload.pid), "-n", "nft", "flush", "ruleset"], check=True)
    assert from_inside(other, f"tcp {mine} 7000")[0] in CLOSED
    assert not reachable(mine, 7000)


def test_connections_by_ipv6_do_not_outlive_their_run_in_the_nodes_table(six):
    before = six.site.audit_size()
    live, address = start(six)
    mine = own6(six.site.records(before)[-1])
    assert not set(from_inside(live, f"tcp {WORLD6} 80", f"tcp {WORLD} 80")) & CLOSED
    assert (connections(mine), connections(address)) == (1, 1)
    live.process.send_signal(signal.SIGTERM)
    live.end()
    until(lambda: (connections(mine), connections(address)) == (0, 0), "they are forgotten")


def test_node_that_passes_no_ipv6_on_is_told(six):
    forward6("0")
    try:
        until(lambda: six.node.run("static", "/bin/true", profile="net").rc == 202, "netd sees it", 10)
        refused(six.node.run("static", "/bin/true", profile="net"), "sysctl -w net.ipv6.conf.all.forwarding=1")
    finally:
        forward6("1")


@pytest.mark.parametrize("range6", [None, "fd12:3456:789a::/64 nat"])
def test_no_neighbour_is_looked_for_and_nothing_is_sent_to_many(netd, range6):
    """Whether there is IPv6 or not: no frame of it leaves a payload's link but to an address that the rules opened."""
    if not SIX:
        pytest.skip("this kernel has no IPv6")
    netd.stop()
    netd.guard(network6=range6)
    netd.process = netd.start()
    code = f"""
import os, socket
for host in ("ff02::1%eth0", "ff02::2%eth0", "fe80::1%eth0", "ff0e::1", "{WORLD6}"):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        try:
            s.sendto(b"x", socket.getaddrinfo(host, 5000, type=socket.SOCK_DGRAM)[0][4])
        except OSError:
            pass
print(sorted(line.split()[0] for line in open("/proc/net/if_inet6") if line.split()[-1] != "lo"))
"""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x86DD)) as wire:
        ran = netd.node.run("map", "/usr/bin/python3", "-I", "-c", code, profile="net")
        wire.settimeout(0.2)
        frames = []
        with contextlib.suppress(TimeoutError):
            while True:
                data, place = wire.recvfrom(2000)
                frames += [socket.inet_ntop(socket.AF_INET6, data[24:40])] * place[0].startswith("nw-")
    assert ran.rc == 0, ran
    mine = own6(ran.record("start")) if range6 else None
    assert len(ran.text.split()) == bool(range6) or ran.text == "[]\n", ran.text
    assert set(frames) - {mine} == ({WORLD6} if range6 else set())


def test_nothing_is_left_when_the_keeper_is_killed_and_the_record_has_the_address(netd):
    live, address = start(netd)
    before = netd.site.audit_size()
    front = live.process.pid
    (keeper,) = [int(pid) for pid in Path(f"/proc/{front}/task/{front}/children").read_text().split()]
    os.kill(keeper, signal.SIGKILL)
    live.end()
    netd.node.sweep()
    (end,) = [record for record in netd.site.records(before) if record["event"]["action"] == "exit"]
    assert (end["nodewrap"]["swept"], end["source"]["ip"]) == (True, address)
    name = f"nw-{int.from_bytes(socket.inet_aton(address), 'big'):08x}"
    until(lambda: name not in links(), "its link is gone")
    assert address not in subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout


def link_of(address):
    return f"nw-{int.from_bytes(socket.inet_aton(address), 'big'):08x}"


@contextlib.contextmanager
def handed_out(netd):
    """(a payload that waits, a socket of its network that it gave to the pilot)"""
    work = netd.site.pilot.home / "handed"
    work.mkdir(exist_ok=True)
    os.chown(work, netd.site.pilot.uid, netd.site.pilot.gid)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(work / "out"))
        os.chmod(work / "out", 0o777)
        server.listen()
        code = (f"import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('{WORLD}', 5000));"
                "u = socket.socket(socket.AF_UNIX); u.connect('out'); socket.send_fds(u, [b'x'], [s.fileno()]); time.sleep(60)")
        live = netd.node.start("log-only", "/usr/bin/python3", "-I", "-c", code, profile="net", options=["--workdir", str(work)])
        with server.accept()[0] as got:
            descriptor = socket.recv_fds(got, 1, 1)[1][0]
    (work / "out").unlink()
    with socket.socket(fileno=descriptor) as kept:
        kept.settimeout(3)
        yield live, kept


def cut_off(kept):
    with pytest.raises(OSError, match=r"unreachable|timed out"):
        kept.recv(kept.send(b"x"))


def test_socket_that_the_pilot_was_handed_is_cut_off_with_the_run(netd):
    with handed_out(netd) as (live, kept):
        kept.send(b"x")
        assert kept.recv(99) == NODE.encode()
        live.process.send_signal(signal.SIGTERM)
        live.end()
        name = link_of(kept.getsockname()[0])
        until(lambda: name not in links(), "the link is gone though a socket lives")
        cut_off(kept)


def test_socket_that_the_pilot_was_handed_is_cut_off_when_netd_has_been_started_anew_and_other_runs_go_on(netd):
    other, address = start(netd)
    with handed_out(netd) as (live, kept):
        netd.stop(signal.SIGKILL)
        live.process.send_signal(signal.SIGTERM)
        live.end()
        name = link_of(kept.getsockname()[0])
        assert name in links(), "nobody took it away"
        netd.process = netd.start()
        until(lambda: name not in links(), "the link is gone though a socket lives", 20)
        cut_off(kept)
    assert link_of(address) in links()
    assert from_inside(other, f"tcp {WORLD} 80") == [NODE]


def ports(address):
    """Where the connections go that the node's table has from there."""
    with netleft.netfilter() as sock:
        found = netleft._connections(sock, socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address))
        began = [dict(netkernel._nested(dict(connection)[netleft.NESTED | netleft.CTA_TUPLE_ORIG])) for connection in found]
    return [int.from_bytes(dict(netkernel._nested(one[CTA_TUPLE_PROTO]))[CTA_PROTO_DST_PORT], "big") for one in began]


def connections(address):
    """How many the node's table has from there."""
    return len(ports(address))


@pytest.mark.parametrize("killed", [False, True])
def test_connections_of_a_run_do_not_outlive_it_in_the_nodes_table(netd, killed):
    live, address = start(netd)
    other, stays = start(netd, kind="map")
    for payload in (live, other):
        assert from_inside(payload, f"tcp {WORLD} 80", f"udp {OTHER} 5002") == [NODE] * 2
    assert (connections(address), connections(stays)) == (2, 2)
    if killed:
        abandon(netd.node, live)
    live.process.send_signal(signal.SIGTERM)
    live.end()
    netd.node.sweep()
    until(lambda: connections(address) == 0, "they are forgotten")
    assert connections(stays) == 2


def ask(netd, uid):
    """As a launcher of that caller: (the connection, a socket per descriptor that it got, what netd says of it)."""
    sock = netd.asked.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    sock.settimeout(15)
    sock.connect(str(netd.path))
    sock.send(struct.pack("=I", uid) + network.encode(network.Rules()))
    body, descriptors, *_ = socket.recv_fds(sock, 256, 1)
    files = [netd.asked.enter_context(os.fdopen(descriptor, "rb", buffering=0)) for descriptor in descriptors]
    return sock, files, body[8:].rstrip(b"\0").decode()


def let_go(*asked):
    for sock, files, _ in asked:
        for held in (sock, *files):
            held.close()


def say(world, asked, port=5000):
    """Send a datagram from that namespace; the address it came from, once the node's table has it: a softirq's work, late on a busy node, which may
    also lose it."""
    netkernel.namespace("setns", asked[1][0].fileno(), (netbuild.CLONE_NEWNET,))
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    finally:
        netkernel.namespace("setns", world.node, (netbuild.CLONE_NEWNET,))
    with sock:
        sock.connect((WORLD, port))
        address = sock.getsockname()[0]
        until(lambda: sock.send(b"x") and port in ports(address), f"{port} is in the table")
    return address


def test_one_caller_cannot_take_what_others_need(netd):
    netd.stop()
    netd.guard(network="10.213.7.0/29")
    netd.process = netd.start()
    asked = [ask(netd, 7001) for _ in range(6)]
    assert [text == "" for *_, text in asked] == [True] * 5 + [False]
    assert "uid 7001 has 5 of the 6 addresses of 10.213.7.0/29" in asked[-1][2]
    asked.append(ask(netd, 7002))
    assert asked[-1][2] == ""
    let_go(asked[0], asked[1], asked[2])
    asked[:3] = [ask(netd, 7001)]
    assert asked[0][2] == "", "what it gives back it may have again"
    let_go(*asked)


def test_connections_of_the_next_run_under_an_address_stay_when_those_of_the_last_one_go(netd, world):
    netd.stop()
    netd.guard(network="10.213.7.0/30")
    netd.process = netd.start()
    other, first = ask(netd, 7001), ask(netd, 7002)  # there is no third address
    address = say(world, first, 5001)
    let_go(first)
    following = ask(netd, 7003)
    assert following[2] == ""
    assert say(world, following, 5002) == address
    time.sleep(0.6)  # the first one's are looked for after a quarter of a second
    assert 5002 in ports(address)
    let_go(following, other)
    until(lambda: connections(address) == 0, "then all are forgotten")


def test_connections_that_begin_while_those_of_the_last_run_are_looked_for_stay(netd, world, monkeypatch):
    """An address is free as soon as its link is gone, and the next run's may come at any moment: here just when nothing has been deleted yet."""
    asked = ask(netd, 7001)
    address = say(world, asked, 5001)

    def there(wanted):
        say(world, asked, 5002)
        return {}

    monkeypatch.setattr(netleft, "links", there)
    netleft.end([(0, int.from_bytes(socket.inet_aton(address), "big"))], RANGE)
    assert ports(address) == [5002]


def asleep(pid, samples=40):
    """Of so many looks, how often it waits. Who spins never does, however little of a busy processor it gets."""
    found = 0
    for _ in range(samples):
        found += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
        time.sleep(0.02)
    return found / samples


def test_netd_without_descriptors_refuses_and_neither_spins_nor_dies(netd):
    netd.stop()
    netd.process = netd.start(front=("prlimit", "--nofile=80"))
    asked = [ask(netd, 7000 + at) for at in range(8)]
    assert [text for *_, text in asked] == [""] * 8
    _, _, text = more = ask(netd, 7999)
    assert "keeps 8 networks, by its RLIMIT_NOFILE" in text
    with contextlib.ExitStack() as stack:
        for _ in range(90):
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(str(netd.path))
        assert asleep(netd.process.pid) > 0.5
        let_go(asked.pop())
    asked.append(ask(netd, 7999))
    assert asked[-1][2] == ""
    let_go(more, *asked)
    assert netd.tries("net", f"tcp {WORLD} 80")[0] == [NODE]


def test_run_goes_on_without_netd_and_the_next_is_refused_or_degraded(netd):
    code = f"import sys, socket; sys.stdin.read(); print(socket.create_connection(('{WORLD}', 80)).recv(99))"
    live, _ = start(netd, command=("/usr/bin/python3", "-I", "-c", code))
    netd.stop(signal.SIGKILL)
    code, out, _ = live.end(b"")
    assert (code, out) == (0, f"b'{NODE}'\n".encode())
    refused(netd.node.run("static", "/bin/true", profile="net"), "netd", "nodewrap netd", "doctor")
    got, ran = netd.tries("maybe", f"tcp {WORLD} 80")
    assert got == ["ENETUNREACH"]
    assert ran.record("start")["nodewrap"]["isolation"]["network"] == "none"
    assert "private-network" in ran.record("degrade")["nodewrap"]["degrade"]
    assert "source" not in ran.record("start")
    netd.process = netd.start()
    assert netd.tries("net", f"tcp {WORLD} 80")[0] == [NODE]


def test_netd_has_two_capabilities_and_a_socket_for_root_alone(netd):
    assert netd.tries("net", f"tcp {WORLD} 80")[0] == [NODE], "with nothing more it works"
    status = status_of(netd.process.pid)
    assert {status[name][0] for name in ("CapEff", "CapPrm", "CapBnd")} == {f"{1 << 12 | 1 << 21:016x}"}
    assert status["CapInh"][0] == f"{0:016x}"
    assert status["NoNewPrivs"] == ["1"]
    assert os.stat(netd.path).st_mode & 0o777 == 0o600
    ran = netd.site.run(["/usr/bin/python3", "-c", f"import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('{netd.path}')"])
    assert b"PermissionError" in ran.err


def test_netd_that_hangs_is_waited_for_no_longer_than_the_guard_says(netd):
    netd.guard(deadline_ms="1200")
    netd.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    ran = netd.node.run("static", "/bin/true", profile="net")
    took = time.monotonic() - began
    netd.process.send_signal(signal.SIGCONT)
    refused(ran, "does not answer")
    assert 1 < took < 8


GOOD = bytes(4) + socket.inet_aton("10.213.0.5") + bytes(248)
OUTSIDE = bytes(4) + socket.inet_aton(NODE) + bytes(248)


SIX_WORDS = GOOD[:8] + b"fd12:3456:789a::ad5:5" + bytes(227)


@pytest.mark.parametrize("body", [b"", b"x", bytes(256), b"\1" + bytes(255), GOOD, OUTSIDE, SIX_WORDS, b"\xff" * 256, bytes(300)])
def test_nonsense_from_netd_is_refused(netd, body):
    netd.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(netd.path))
        server.listen()
        ran = []
        thread = threading.Thread(target=lambda: ran.append(netd.node.run("static", "/bin/true", profile="net")))
        thread.start()
        with server.accept()[0] as got:
            got.recv(9999)
            with open("/proc/self/ns/net") as namespace:
                socket.send_fds(got, [body], [namespace.fileno()] if body in (OUTSIDE, SIX_WORDS) else [])
            thread.join(20)
    os.unlink(netd.path)
    refused(ran[0])


def test_addresses_that_are_used_up_are_told_and_come_back(netd):
    netd.stop()
    netd.guard(network="10.213.7.0/30")
    ip("link add nw-0ad50701 type veth peer other0")  # somebody else's, under a name of ours
    try:
        netd.process = netd.start()
        live, address = start(netd)
        assert address == "10.213.7.2"
        refused(netd.node.run("map", "/bin/true", profile="net"), "every address of 10.213.7.0/30 is taken")
        live.process.send_signal(signal.SIGTERM)
        live.end()
        assert netd.node.run("map", "/bin/true", profile="net").rc == 0
    finally:
        ip("link del nw-0ad50701")


def test_range_that_the_node_has_a_way_to_is_refused(netd):
    netd.stop()
    for taken in ("198.18.0.0/16", "198.18.0.128/25"):
        netd.guard(network=taken)
        netd.process = netd.start(ready=False)
        assert netd.process.wait(20) == 202
        said = netd.stop()
        assert "NW-NETD: network " + taken in said, said
        assert "collides with the route 198.18.0.0/24 on up0" in said
    netd.guard()
    netd.process = netd.start()
    netd.guard(network="10.214.0.0/24")  # netd has still the other one
    refused(netd.node.run("static", "/bin/true", profile="net"), "outside of the guard")


def test_node_that_passes_nothing_on_is_told_and_mended_at_once(netd):
    forward("0")
    try:
        until(lambda: netd.node.run("static", "/bin/true", profile="net").rc == 202, "netd sees it", 10)
        refused(netd.node.run("static", "/bin/true", profile="net"), "sysctl -w net.ipv4.ip_forward=1")
    finally:
        forward("1")
    assert netd.tries("net", f"tcp {WORLD} 80")[0] == [NODE]


def test_run_gets_a_network_that_is_ready_and_the_next_is_made_meanwhile(netd):
    """Also while other runs come and go: their ends keep netd awake."""
    assert netd.node.run("map", "/bin/true", profile="net").rc == 0
    for _ in range(3):
        ready = until(lambda: len(links()) >= 3 and links(), "three are ready")
        _, ran = netd.tries("net", f"tcp {WORLD} 80", kind="map")
        assert f"nw-{int.from_bytes(socket.inet_aton(ran.record('start')['source']['ip']), 'big'):08x}" in ready


def test_nodes_rules_go_with_netd_unless_a_run_needs_them(netd):
    live, _ = start(netd)
    netd.stop()
    assert network.table(RANGE) in nft("list tables")
    netd.process = netd.start()
    live.process.send_signal(signal.SIGTERM)
    live.end()
    until(lambda: not links(), "its link is gone")
    netd.stop()
    assert network.table(RANGE) not in nft("list tables")


def test_rules_come_back_when_the_nodes_firewall_is_loaded_again(netd):
    nft("flush ruleset")
    until(lambda: network.table(RANGE) in nft("list tables"), "netd puts them back")
    assert netd.tries("net", f"tcp {WORLD} 80")[0] == [NODE]


def test_resolver_on_the_nodes_loopback_is_answered_for_by_the_one_behind_it(world, tmp_path, monkeypatch):
    for name, text in (("RESOLV_CONF", "nameserver 127.0.0.53\noptions edns0\n"), ("UPSTREAM", f"nameserver {OTHER}\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(netkernel, name, str(tmp_path / name))
    assert netkernel.resolvers() == ([OTHER], {"127.0.0.53": OTHER})
    netkernel.nft(network.node_ruleset(RANGE, None, []))
    built, descriptors = netbuild.build(RANGE, None, 9, network.encode(network.Rules()))
    try:
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{descriptors[0]}", "/usr/bin/python3", "-c", TRY, "udp 127.0.0.53 53"]
        assert subprocess.run(enter, capture_output=True, text=True, check=True).stdout.split() == [NODE]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        netbuild.remove(built.link)


def test_explain_says_what_a_profile_gives_of_the_network(netd):
    lan = "network private; deny 203.0.113.20; allow 203.0.113.0/24:80, udp any:5000-5001; no dns"
    for profile, said in (("lan", lan), ("net", "network private"), ("wide", "network host")):
        who = ["--caller", netd.site.pilot.name, "--dn", SUBJECT, "--vo", "static", "--assurance", "declared", "--profile", profile]
        assert netd.site.admin("policy", "explain", *who).splitlines()[-1] == said
    assert "\nnetwork none\n" in netd.site.admin("policy", "explain", *who[:-1], "strict", "--surface")


def test_doctor_tells_what_keeps_a_node_from_giving_private_networks(netd):
    def finding():
        ran = subprocess.run([netd.site.binary, "doctor", "--json"], capture_output=True, text=True, env=netd.site.environment(netd.site.pilot))
        found = json.loads(ran.stdout)["checks"]["netd"]
        return found["yes"], found["saw"], found["next"]

    assert finding()[0] is True
    netd.stop()
    assert "start nodewrap netd" in finding()[2]
    forward("0")
    assert finding()[2].startswith("sysctl -w net.ipv4.ip_forward=1")
    forward("1")
    netd.guard(network="198.18.0.0/16")
    assert "collides with the route 198.18.0.0/24" in finding()[1]
    netd.guard(network=None)
    assert finding()[:2] == (False, "the guard has no lines 'netd' and 'network'")


def test_launcher_without_privilege_gives_loopback_or_refuses_when_the_guard_has_no_range(userns_node):
    node = userns_node
    node.open_guard(allow=["map net maybe", "log-only net maybe"])
    node.site.policy(node.policy_text().replace('["none", "compat", "batch", "strict"]', '["net", "maybe"]') + PROFILES)
    ran = node.run("map", "/bin/true", profile="net")
    refused(ran, 'no line "network"')
    ran = node.run("map", "/bin/cat", "/proc/net/dev", profile="maybe")
    assert ran.rc == 0, ran
    assert [line.split(":")[0].strip() for line in ran.text.splitlines()[2:]] == ["lo"]
