"""Private networks: a policy's words, the numbers made of them, and the order of the rules made of those."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewrap import netd, netkernel, network, profiles
from nodewrap.guard import Guard, Network, Network6
from nodewrap.network import Rule, Rules
from nodewrap.policy import bounds
from tests.files import CHECKOUT

networks = st.integers(0, 32).flatmap(lambda bits: st.integers(0, (1 << bits) - 1).map(lambda high: Network(high << (32 - bits), bits)))
networks |= st.integers(0, 128).flatmap(lambda bits: st.integers(0, (1 << bits) - 1).map(lambda high: Network6(high << (128 - bits), bits)))
ports = st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda pair: tuple(sorted(pair)))
rules = st.builds(lambda allow, to, protocol, pair: Rule(allow, to, protocol, *pair), st.booleans(), networks, st.sampled_from([0, 6, 17]), ports)


@pytest.mark.parametrize(("text", "means"), [
    ("192.0.2.0/24", Rule(True, Network(0xC0000200, 24))), ("192.0.2.7", Rule(True, Network(0xC0000207, 32))),
    ("any:443", Rule(True, Network(0, 0), 0, 443, 443)), ("udp any", Rule(True, Network(0, 0), 17)), ("0.0.0.0/0", Rule(True, Network(0, 0))),
    ("tcp 192.0.2.7:1094-1097", Rule(True, Network(0xC0000207, 32), 6, 1094, 1097)),
    ("[2001:db8::]/32", Rule(True, Network6(0x20010DB8 << 96, 32))),
    ("udp [2001:DB8::7]:53", Rule(True, Network6((0x20010DB8 << 96) + 7, 128), 17, 53, 53)),
    ("[::]/0:443", Rule(True, Network6(0, 0), 0, 443, 443)), ("[::ffff:192.0.2.7]", Rule(True, Network6(0xFFFFC0000207, 128))),
])
def test_an_entry_means_what_it_says(text, means):
    table = {"network": {"mode": "private", "allow": [text]}}
    assert list(network.check(table["network"])) == []
    assert network.rules(table).rules == (means,)


@pytest.mark.parametrize(("value", "said"), [
    ("privat", "one of host, none, private"), (7, "7 is not one of"), ({}, "nor a table with mode"),
    ({"mode": "private", "alow": []}, "unknown key 'alow'"),
    ({"mode": "none", "allow": []}, "takes no rules"), ({"mode": "private", "dns": "no"}, "not true or false"),
    ({"mode": "private", "allow": "any"}, "is not a list"), ({"mode": "private", "allow": ["any"] * 257}, "more than 256"),
    ({"mode": "private", "allow": [5]}, "is not an address such as"),
    *(({"mode": "private", "deny": [bad]}, said) for bad, said in (
        ("192.0.2.1/24", "an address inside of 192.0.2.0/24"), ("2001:db8::/32", "looks like IPv6; next: write '[2001:db8::]/32'"),
        ("[2001:db8::1]/32", "an address inside of 2001:db8::/32"), ("[2001:db8::]/129", "not an IPv6 network"),
        ("[2001:::]", "not an address of IPv6"),
        ("[192.0.2.1]", "not an address of IPv6"), ("[fe80::1%eth0]", "is not an address such as"), ("[]", "is not an address such as"),
        ("192.0.2.256", "not an IPv4 network"),
        ("192.0.2.0/33", "not an IPv4 network"), ("any:0", "from 1 to 65535"), ("any:9-8", "from 1 to 65535"), ("any:65536", "from 1 to 65535"),
        ("icmp any", "is not an address such as"), ("example.org", "is not an address such as"), ("192.0.2.1 ; accept", "is not an address"),
        ("any\n", "is not an address such as"), ("", "is not an address such as"), ("tcp 192.0.2.0:", "is not an address such as"),
    )),
])
def test_a_mistake_is_told_with_what_is_meant(value, said):
    found = list(network.check(value))
    assert any(said in line for line in found), found
    assert profiles.check("x", {"network": value})


@given(st.lists(rules, max_size=8), st.booleans(), st.booleans())
def test_numbers_are_read_back_as_they_were_written(many, dns, rest):
    made = Rules(tuple(many), dns, rest)
    data = network.encode(made)
    assert len(data) % 8 == 0, "which is what the launcher looks at"
    assert network.decode(data) == made


ONE = network.encode(Rules((Rule(True, Network(0xC0000200, 24), 6, 80, 80),)))
changed = st.builds(lambda at, byte: ONE[:at] + bytes([byte]) + ONE[at + 1:], st.integers(0, len(ONE) - 1), st.integers(0, 255))


@given(st.binary(max_size=80) | changed)
def test_other_bytes_are_refused_or_mean_something(data):
    try:
        made = network.decode(data)
    except ValueError:
        return
    assert network.encode(made) == data
    assert network.namespace_ruleset(made, [], [])


def steps(made, resolvers=(), node=(), six=False):
    return list(network._steps(made, list(resolvers), list(node), six))


def test_denied_comes_before_allowed_and_closed_before_all_but_entries_inside():
    table = {"network": {"mode": "private", "allow": ["any:80", "169.254.169.254:80", "100.100.0.0/16"], "deny": ["192.0.2.1"]}}
    found = steps(network.rules(table), ["198.51.100.1"], ["192.0.2.2"])
    order = [next(at for at, line in enumerate(found) if part in line) for part in (
        "meta nfproto ipv6 goto closed", "198.51.100.1 }", "ip daddr { 192.0.2.2 } goto closed", "ip daddr 192.0.2.1/32 goto closed",
        "169.254.169.254/32",
        "169.254.0.0/16", "ip daddr 100.100.0.0/16 goto opened", "dport 80 goto opened\n".strip())]
    assert order[:-1] == sorted(order[:-1])
    assert found[-1] == "goto closed", "what nobody allowed"
    wide = next(at for at, line in enumerate(found) if line.startswith("meta l4proto { tcp, udp } th dport 80"))
    assert wide > order[5], "any:80 does not open the metadata services"


def test_ipv6_is_closed_in_the_same_order_and_any_opens_none_of_it():
    table = {"network": {"mode": "private", "allow": ["any:80", "[fd00:ec2::254]:80", "[2001:db8::]/32"], "deny": ["[2001:db8::1]"]}}
    found = steps(network.rules(table), ["2001:db8::53", "192.0.2.53"], ["192.0.2.2", "2001:db8::2", "fe80::2"], six=True)
    order = [next(at for at, line in enumerate(found) if part in line) for part in (
        "ip6 daddr { 2001:db8::53 } meta", "ip6 daddr { 2001:db8::2, fe80::2 } goto closed", "ip6 daddr 2001:db8::1/128 goto closed",
        "ip6 daddr fd00:ec2::254/128", "fe80::/10", "ip6 daddr 2001:db8::/32 goto opened")]
    assert order == sorted(order)
    wide = next(at for at, line in enumerate(found) if line.startswith("meta l4proto { tcp, udp } th dport 80"))
    assert wide > order[4], "any:80 does not open the metadata services"
    assert not any("nfproto ipv6 goto closed" in line for line in found)
    assert any("nfproto ipv6 goto closed" in line for line in steps(network.rules(table)))


@given(st.integers(0, 2**32 - 1))
def test_no_address_of_ipv4_is_reached_by_one_of_ipv6_that_has_it_inside(four):
    inside = [four, 0xFFFF << 32 | four, 0x64FF9B << 96 | four, 0x2002 << 112 | four << 80, 0x20010000 << 96 | four]
    for address in inside:
        rule = Rule(True, Network6(address, 128))
        assert any(network._inside(rule, closed) for closed in network.CLOSED6), network.Network6(address, 128)


def test_without_allow_all_is_open_that_is_not_closed():
    assert steps(network.rules({"network": "private"}))[-1] == "goto opened"
    assert steps(network.rules({"network": {"mode": "private", "allow": []}}))[-1] == "goto closed"


def test_network_decides_about_the_namespace():
    shipped = {"base": {"namespaces": ["pid", "net"]}, "shared": {"namespaces": ["pid"]}}
    site = {"a": {"like": "base", "network": "host"}, "b": {"like": "shared", "network": "private"}, "c": {"like": "shared", "network": "none"}}
    merged = profiles.merge(shipped, site)
    assert {name: "net" in merged[name]["namespaces"] for name in merged} == {"base": True, "shared": False, "a": False, "b": True, "c": True}
    assert any("landlock" in line for line in profiles.check("a", merged["a"])), "abstract sockets of the pilot would be open"
    assert profiles.networks(merged) == {"network.b": network.encode(Rules())}
    assert "network network.b" in profiles.render({"b": merged["b"]})


def test_shipped_examples_of_the_documentation_hold():
    text = (CHECKOUT / "docs/network.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("network = {"))
    from nodewrap.policy.positions import toml

    assert list(network.check(toml.loads(line)["network"])) == []


@pytest.fixture
def daemon():
    made = netd.Netd(Network(0x0A090000, 24), None)
    yield made
    made.select.close()


def test_next_network_is_made_at_once_when_none_is_ready_else_in_the_first_quiet_moment(daemon):
    daemon.pool = {b"x": []}
    assert daemon._urgent()
    daemon.pool = {b"x": ["ready"]}
    assert not daemon._urgent()
    daemon.doomed = [(0.0, 7, 0)]  # a run has just ended
    assert daemon._patience() == netd.SOON
    daemon.pool = {b"x": ["ready"] * netd.READY}
    assert daemon._short() is None
    assert daemon._patience() == netd.KEPT


def test_small_range_is_not_kept_in_reserve(daemon):
    daemon.wanted = Network(0x0A090000, 30)
    daemon.pool = {b"x": []}
    assert daemon._short() is None


def test_guard_that_gives_no_private_network_is_told_when_the_policy_is_checked():
    told = []
    rule = {"name": "r", "profiles": ["p"], "identities": [], "limits": {"wall_s": 1}}
    policy = {"rules": [rule], "profiles": {"p": {"network": "private"}}}
    sources = SimpleNamespace(report=lambda path, code, text, warning: told.append((code, text)))
    full = Guard(launcher="setuid", netd="/n", network=Network(0x0A090000, 24))
    free = replace(full, launcher="userns", netd="")
    for guard in (full, replace(full, netd=""), replace(full, network=None), free, replace(free, network=None)):
        bounds.compare(sources, policy, guard, "G")
    assert [code for code, _ in told] == ["NW-POLICY-GUARD"] * 3
    assert "no lines netd and network" in told[0][1]
    assert "no line network;" in told[2][1]


def test_nft_that_is_missing_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(netkernel, "NFT", str(tmp_path / "nft"))
    with pytest.raises(netkernel.NetError, match=r"is missing; install the package nftables"):
        netkernel.nft("")


def test_change_of_what_systemd_resolved_asks_is_seen_though_resolv_conf_stays(daemon, monkeypatch, tmp_path):
    for name, text in (("RESOLV_CONF", "nameserver 127.0.0.53\n"), ("UPSTREAM", "nameserver 192.0.2.1\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(netkernel, name, str(tmp_path / name))
    before = daemon._stamp()
    assert daemon._stamp() == before
    (tmp_path / "new").write_text("nameserver 192.0.2.2\n")
    (tmp_path / "new").rename(tmp_path / "UPSTREAM")
    assert daemon._stamp() != before
    assert netkernel.resolvers() == (["192.0.2.2"], {"127.0.0.53": "192.0.2.2"})


def test_resolvers_are_addresses_and_nothing_else(monkeypatch, tmp_path):
    odd = "nameserver 192.0.2.1 ; drop\nnameserver ::1\nnameserver 1.2.3.4}\n#nameserver 192.0.2.9\nnameserver\nsearch x\n"
    for name, text in (("RESOLV_CONF", odd), ("UPSTREAM", "")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(netkernel, name, str(tmp_path / name))
    assert netkernel.resolvers() == (["192.0.2.1"], {})
    (tmp_path / "RESOLV_CONF").write_text("nameserver 127.0.0.1\n")
    assert netkernel.resolvers() == ([], {}), "nothing is known to be behind it"
