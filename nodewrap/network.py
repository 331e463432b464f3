"""Private networks (docs/network.md): the words of a policy, the numbers that netd is given, and the rules of nftables made of them.

``nodewrap policy apply`` checks the words and writes the numbers beside the profiles; netd, which is root, never reads the words (I1).
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nodewrap.guard import Network, Network6

#: First 8 bytes of a file of numbers; the launcher sends the file as it is. A piece for each rule follows: address (of IPv4 in its last bytes),
#: bits, protocol, allow, family (4 or 6), first and last port.
MAGIC = b"NWNET\0\0\2"
HEAD = struct.Struct(">8sII")
PIECE = struct.Struct(">16sBBBBHH")
DNS, OPEN = 1, 2
MOST = 256
#: Connections of a payload at a time, those included that the kernel still remembers: its table of them is the whole node's (nf_conntrack_max).
CONNECTIONS = 4096
WIDTH = {4: 32, 6: 128}
PROTOCOLS = {"": 0, "tcp": 6, "udp": 17}
MODES = ("host", "none", "private")
KEYS = ("mode", "allow", "deny", "dns")
#: Metadata services of clouds give credentials to whoever asks from the node: all link-local addresses (AWS, GCP, Azure, OpenStack: 169.254.169.254),
#: Alibaba's, Azure's host, Oracle's classic. Multicast, broadcast and reserved addresses lead to neighbours.
CLOSED = (Network(0xA9FE0000, 16), Network(0x646464C8, 32), Network(0xA83F8110, 32), Network(0xC00000C0, 32), Network(0xE0000000, 3))
#: The same of IPv6: AWS's, Google's and Scaleway's metadata services; link-local, site-local and multicast addresses; and all that have one of IPv4
#: in them, which would lead past the rules of IPv4: ::/96, ::ffff:0:0/96, NAT64 (RFC 6052, 8215), 6to4 and Teredo.
CLOSED6 = tuple(Network6(int.from_bytes(socket.inet_pton(socket.AF_INET6, address), "big"), bits) for address, bits in (
    ("fd00:ec2::", 32), ("fd20:ce::254", 128), ("fd00:42::42", 128), ("fe80::", 10), ("fec0::", 10), ("ff00::", 8), ("::", 96), ("::ffff:0:0", 96),
    ("64:ff9b::", 96), ("64:ff9b:1::", 48), ("2002::", 16), ("2001::", 32)))
#: Links of payloads: this and eight hexadecimal digits of the address.
LINK = "nw-"
ENTRY = re.compile(r"(?:(tcp|udp) +)?(any|\d{1,3}(?:\.\d{1,3}){3}(?:/\d{1,2})?|\[[0-9A-Fa-f:.]+\](?:/\d{1,3})?)(?::(\d{1,5})(?:-(\d{1,5}))?)?")


class Rule(NamedTuple):
    """Where to. protocol: 0 any, 6 TCP, 17 UDP. first, last: ports, 0 for all; ports without a protocol are TCP's and UDP's.

    to: ``Network(0, 0)`` is everywhere, IPv6 included.
    """

    allow: bool
    to: Network | Network6
    protocol: int = 0
    first: int = 0
    last: int = 0


class Rules(NamedTuple):
    """rules: in order, the first that fits decides. dns: the node's resolvers are open. open: what no rule names is open too."""

    rules: tuple[Rule, ...] = ()
    dns: bool = True
    open: bool = True


# ---- words ----


def check(value: Any) -> Iterator[str]:
    """What is wrong with the key ``network`` of a profile."""
    table = {"mode": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or "mode" not in table:
        yield f"{value!r} is not one of {', '.join(MODES)}, nor a table with mode, allow, deny and dns"
        return
    if table["mode"] not in MODES:
        yield f"mode {table['mode']!r} is not one of {', '.join(MODES)}"
    for key in table:
        if key not in KEYS:
            yield f"unknown key {key!r}; known are {', '.join(KEYS)}"
    if table["mode"] != "private" and len(table) > 1:
        yield f"mode {table['mode']!r} takes no rules; next: write mode = \"private\", or delete them"
    if not isinstance(table.get("dns", True), bool):
        yield f"dns: {table['dns']!r} is not true or false"
    yield from _check_entries(table)


def _check_entries(table: dict[str, Any]) -> Iterator[str]:
    number = 0
    for key in ("allow", "deny"):
        entries = table.get(key, [])
        if not isinstance(entries, list):
            yield f"{key}: {entries!r} is not a list"
            continue
        number += len(entries)
        for entry in entries:
            try:
                _entry(entry, key == "allow")
            except ValueError as wrong:
                yield f"{key}: {wrong}"
    if number > MOST:
        yield f"{number} entries are more than {MOST}; next: join neighbouring networks"


def _entry(text: Any, allow: bool) -> Rule:
    """One entry of ``allow`` or ``deny``. Raises ValueError."""
    match = ENTRY.fullmatch(text) if isinstance(text, str) else None
    if isinstance(text, str) and text.count(":") > 1 and "[" not in text:
        raise ValueError(f"{text!r} looks like IPv6; next: write '[2001:db8::]/32' or '[2001:db8::1]:443'")
    if not match:
        raise ValueError(f"{text!r} is not an address such as '192.0.2.0/24', 'any:443', '[2001:db8::]/32' or 'udp 192.0.2.7:1094-1095'")
    protocol, where, first, last = match.groups()
    low = int(first or 0)
    high = int(last or low)
    if first and not 1 <= low <= high <= 65535:
        raise ValueError(f"{text!r}: ports are FIRST or FIRST-LAST, from 1 to 65535")
    return Rule(allow, _network(where, str(text)), PROTOCOLS[protocol or ""], low, high)


def _network(word: str, text: str) -> Network | Network6:
    if word == "any":
        return Network(0, 0)
    address, _, bits = word.partition("/")
    if word.startswith("["):
        return _network6(address[1:-1], int(bits or 128), text)
    parts = [int(part) for part in address.split(".")]
    if max(parts) > 255 or int(bits or 32) > 32:
        raise ValueError(f"{text!r}: {word} is not an IPv4 network")
    found = Network(int.from_bytes(bytes(parts), "big"), int(bits or 32))
    if found.address << found.bits & 0xFFFFFFFF:
        base = Network(found.address & ~(0xFFFFFFFF >> found.bits), found.bits)
        raise ValueError(f"{text!r}: {word} is an address inside of {base}; next: write one of the two")
    return found


def _network6(address: str, bits: int, text: str) -> Network6:
    try:
        found = int.from_bytes(socket.inet_pton(socket.AF_INET6, address), "big")
    except OSError:
        raise ValueError(f"{text!r}: {address} is not an address of IPv6") from None
    if bits > 128:
        raise ValueError(f"{text!r}: {address}/{bits} is not an IPv6 network")
    base = Network6(found >> (128 - bits) << (128 - bits), bits)
    if base.address != found:
        raise ValueError(f"{text!r}: {address}/{bits} is an address inside of {base}; next: write one of the two")
    return base


def mode(table: dict[str, Any]) -> str:
    """The mode that a profile's ``network`` asks for, "" without one."""
    value = table.get("network", "")
    return str(value["mode"] if isinstance(value, dict) else value)


def rules(table: dict[str, Any]) -> Rules:
    """Of a profile whose network is private, and in which ``check`` found nothing. What is denied comes first."""
    value = table["network"] if isinstance(table["network"], dict) else {}
    entries = [_entry(text, key == "allow") for key in ("deny", "allow") for text in value.get(key, [])]
    return Rules(tuple(entries), value.get("dns", True), "allow" not in value)


# ---- numbers ----


def encode(made: Rules) -> bytes:
    """The file of numbers: HEAD, and a PIECE for each rule."""
    head = HEAD.pack(MAGIC, DNS * made.dns | OPEN * made.open, len(made.rules))
    return head + b"".join(map(_piece, made.rules))


def _piece(rule: Rule) -> bytes:
    return PIECE.pack(rule.to.address.to_bytes(16, "big"), rule.to.bits, rule.protocol, rule.allow, _family(rule.to), rule.first, rule.last)


def _family(network: Network | Network6) -> int:
    return 6 if isinstance(network, Network6) else 4


def decode(data: bytes) -> Rules:
    """The rules in these bytes. Raises ValueError for what ``encode`` does not write."""
    if len(data) < HEAD.size or (len(data) - HEAD.size) % PIECE.size:
        raise ValueError("no numbers of a network")
    magic, flags, count = HEAD.unpack_from(data)
    made = Rules(tuple(map(_rule, PIECE.iter_unpack(data[HEAD.size:]))), bool(flags & DNS), bool(flags & OPEN))
    sane = all(rule.protocol in PROTOCOLS.values() and rule.first <= rule.last and rule.to.bits <= WIDTH[_family(rule.to)]
               and rule.to.address >> WIDTH[_family(rule.to)] == 0 for rule in made.rules)
    if magic != MAGIC or count > MOST or not sane or encode(made) != data:
        raise ValueError("other numbers than this version writes")
    return made


def _rule(numbers: tuple[Any, ...]) -> Rule:
    address, bits, protocol, allow, family, first, last = numbers
    to = (Network6 if family == 6 else Network)(int.from_bytes(address, "big"), bits)
    return Rule(bool(allow), to, protocol, first, last)


# ---- rules of nftables ----


def _match(rule: Rule) -> str:
    words = [f"{WORD[_family(rule.to)]} daddr {rule.to}"] if rule.to.bits else ["meta nfproto ipv6"] * isinstance(rule.to, Network6)
    names = [name for name, number in PROTOCOLS.items() if name and rule.protocol in (0, number)]
    if rule.first or rule.protocol:
        words.append(f"meta l4proto {{ {', '.join(names)} }}")
    if rule.first:
        words.append(f"th dport {rule.first}-{rule.last}" if rule.last > rule.first else f"th dport {rule.first}")
    return " ".join(words)


def _inside(rule: Rule, closed: Network | Network6) -> bool:
    family = _family(closed)
    return _family(rule.to) == family and rule.to.bits >= closed.bits and (rule.to.address ^ closed.address) >> (WIDTH[family] - closed.bits) == 0


WORD = {4: "ip", 6: "ip6"}
NO = "goto closed"


def _to(addresses: Iterable[object], rest: str) -> Iterator[str]:
    """One rule for each family that has such addresses."""
    split: dict[str, list[str]] = {"ip": [], "ip6": []}
    for address in map(str, addresses):
        split["ip6" if ":" in address else "ip"].append(address)
    yield from (f"{word} daddr {{ {', '.join(many)} }} {rest}" for word, many in split.items() if many)


def _steps(made: Rules, resolvers: list[str], node: list[str], six: bool) -> Iterator[str]:
    """What happens to a packet that leaves, in order. Something closed is opened only by an entry that lies in it, and the node by none."""
    yield 'oif "lo" accept'
    yield "ct state established,related accept"
    if not six:
        yield f"meta nfproto ipv6 {NO}"
    yield f"ct count over {CONNECTIONS} {NO}"
    if made.dns:
        yield from _to(resolvers, "meta l4proto { tcp, udp } th dport 53 goto opened")
    yield from _to(node, NO)
    inside = [rule for rule in made.rules if rule.allow and any(_inside(rule, closed) for closed in CLOSED + CLOSED6)]
    denied = [rule for rule in made.rules if not rule.allow]
    yield from (f"{_match(rule)} {NO}" for rule in denied)
    yield from (f"{_match(rule)} goto opened" for rule in inside)
    yield from _to(CLOSED + CLOSED6, NO)
    yield from (f"{_match(rule)} goto opened" for rule in made.rules if rule.allow and rule not in inside)
    yield "goto opened" if made.open else NO


def namespace_ruleset(made: Rules, resolvers: list[str], node: list[str], local: dict[str, str] | None = None, six: bool = False) -> str:
    """For the payload's namespace. resolvers: addresses of the node's. node: addresses of the node's own. six: it has an address of IPv6.

    closed: a socket that is just connecting takes no notice of an error by ICMPv6 (net/ipv6/tcp_ipv6.c, tcp_v6_err) and tries for a second.
    local: addresses on loopback that the node's resolv.conf names, and the resolver that answers for each.
    """
    steps = "\n".join(f"\t\t{step}" for step in _steps(made, resolvers, node, six))
    to = ", ".join(f"{here} : {there}" for here, there in (local or {}).items())
    nat = f"""
	chain resolver {{
		type nat hook output priority -100; policy accept;
		meta l4proto {{ tcp, udp }} th dport 53 dnat ip to ip daddr map {{ {to} }}
	}}
	chain from {{
		type nat hook postrouting priority 100; policy accept;
		oifname "eth0" ip saddr 127.0.0.0/8 masquerade
	}}""" if to and made.dns else ""
    sets = "".join(f"""
	set {name} {{
		type {kind} . inet_proto . inet_service
		size 256
		flags dynamic
	}}""" for name, kind in SEEN.values())
    seen = "".join(f"""
		meta protocol {word} meta l4proto {{ tcp, udp }} ct state new update @{name} {{ {word} daddr . meta l4proto . th dport counter }}"""
                   for word, (name, _) in SEEN.items())
    return f"""table inet nodewrap {{{sets}
	chain opened {{{seen}
		accept
	}}
	chain closed {{
		meta protocol ip6 meta l4proto tcp reject with tcp reset
		reject with icmpx type admin-prohibited
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
{steps}
	}}
	chain input {{
		type filter hook input priority filter; policy drop;
		iif "lo" accept
		ct state established,related accept
	}}{nat}
}}
"""


#: The sets of where connections went, by nftables' word for the family.
SEEN = {"ip": ("seen", "ipv4_addr"), "ip6": ("seen6", "ipv6_addr")}


def table(network: Network) -> str:
    """The name of the node's table for this range: two installations on one node do not take each other's away."""
    return f"nodewrap_{network.address:08x}_{network.bits}"


def no_ruleset(network: Network) -> str:
    """Takes the node's rules away, if they are there."""
    name = table(network)
    return "".join(f"table {family} {name}\ndelete table {family} {name}\n" for family in ("ip", "ip6"))


def node_ruleset(network: Network, network6: Network6 | None, resolvers: list[str]) -> str:
    """For the node: nothing of it changes with a run. It replaces its own table in one step.

    ``fib saddr . iif oif``: an address is believed only on the link that its route leads to. In prerouting, before a site's own redirections.
    """
    name = table(network)
    lines = list(_to(resolvers, "meta l4proto { tcp, udp } th dport 53 accept"))
    asked = {word: next((line for line in lines if line.startswith(word + " ")), "") for word in SEEN}
    four = _node_table("ip", name, str(network), True, "broadcast, multicast, anycast", asked["ip"])
    if network6:
        range6 = str(Network6(network6.of(network.address), 96 + network.bits))
        return no_ruleset(network) + four + _node_table("ip6", name, range6, network6.nat, "multicast, anycast", asked["ip6"])
    return f"""{no_ruleset(network)}{four}table ip6 {name} {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{LINK}*" drop
	}}
}}
"""


def _node_table(word: str, name: str, addresses: str, nat: bool, many: str, resolvers: str) -> str:
    """One family. addresses: the payloads'. nat: they are not seen outside. many: kinds of addresses that lead to more than one host."""
    no = f"reject with {'icmpv6' if word == 'ip6' else 'icmp'} type admin-prohibited"
    outside = f"""
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		{word} saddr {addresses} oifname != "{LINK}*" masquerade
	}}""" if nat else ""
    return f"""table {word} {name} {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifname != "{LINK}*" accept
		fib saddr . iif oif missing drop
		fib daddr type {{ {many} }} drop
		{resolvers}
		fib daddr type local {no}
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "{LINK}*" oifname "{LINK}*" {no}
		oifname "{LINK}*" ct state != {{ established, related }} drop
	}}
	chain output {{
		type filter hook output priority filter; policy accept;
		oifname "{LINK}*" ct state != {{ established, related }} drop
	}}{outside}
}}
"""
