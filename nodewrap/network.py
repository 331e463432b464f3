"""Private networks (docs/network.md): the words of a policy, the numbers that netd is given, and the rules of nftables made of them.

``nodewrap policy apply`` checks the words and writes the numbers beside the profiles; netd, which is root, never reads the words (I1).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from nodewrap.guard import Network

#: First 8 bytes of a file of numbers; the launcher sends the file as it is. Pieces of 16 bytes follow.
MAGIC = b"NWNET\0\0\1"
HEAD = struct.Struct(">8sII")
PIECE = struct.Struct(">IBBBxHHI")
DNS, OPEN = 1, 2
MOST = 256
#: Connections of a payload at a time, those included that the kernel still remembers: its table of them is the whole node's (nf_conntrack_max).
CONNECTIONS = 4096
PROTOCOLS = {"": 0, "tcp": 6, "udp": 17}
MODES = ("host", "none", "private")
KEYS = ("mode", "allow", "deny", "dns")
#: Metadata services of clouds give credentials to whoever asks from the node: all link-local addresses (AWS, GCP, Azure, OpenStack: 169.254.169.254),
#: Alibaba's, Azure's host, Oracle's classic. Multicast, broadcast and reserved addresses lead to neighbours. Of IPv6 there is nothing.
CLOSED = (Network(0xA9FE0000, 16), Network(0x646464C8, 32), Network(0xA83F8110, 32), Network(0xC00000C0, 32), Network(0xE0000000, 3))
#: Links of payloads: this and eight hexadecimal digits of the address.
LINK = "nw-"
ENTRY = re.compile(r"(?:(tcp|udp) +)?(any|\d{1,3}(?:\.\d{1,3}){3}(?:/\d{1,2})?)(?::(\d{1,5})(?:-(\d{1,5}))?)?")


class Rule(NamedTuple):
    """Where to. protocol: 0 any, 6 TCP, 17 UDP. first, last: ports, 0 for all; ports without a protocol are TCP's and UDP's."""

    allow: bool
    to: Network
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
    if isinstance(text, str) and text.count(":") > 1:
        raise ValueError(f"{text!r} looks like IPv6, which private networks have none of: all of it is closed")
    if not match:
        raise ValueError(f"{text!r} is not an address such as '192.0.2.0/24', 'any:443', '192.0.2.7:1094-1095' or 'udp 192.0.2.7:53'")
    protocol, where, first, last = match.groups()
    low = int(first or 0)
    high = int(last or low)
    if first and not 1 <= low <= high <= 65535:
        raise ValueError(f"{text!r}: ports are FIRST or FIRST-LAST, from 1 to 65535")
    return Rule(allow, _network(where, str(text)), PROTOCOLS[protocol or ""], low, high)


def _network(word: str, text: str) -> Network:
    if word == "any":
        return Network(0, 0)
    address, _, bits = word.partition("/")
    parts = [int(part) for part in address.split(".")]
    if max(parts) > 255 or int(bits or 32) > 32:
        raise ValueError(f"{text!r}: {word} is not an IPv4 network")
    found = Network(int.from_bytes(bytes(parts), "big"), int(bits or 32))
    if found.address << found.bits & 0xFFFFFFFF:
        base = Network(found.address & ~(0xFFFFFFFF >> found.bits), found.bits)
        raise ValueError(f"{text!r}: {word} is an address inside of {base}; next: write one of the two")
    return found


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
    """The file of numbers: 16 bytes for each rule, and as many before them."""
    head = HEAD.pack(MAGIC, DNS * made.dns | OPEN * made.open, len(made.rules))
    return head + b"".join(PIECE.pack(rule.to.address, rule.to.bits, rule.protocol, rule.allow, rule.first, rule.last, 0) for rule in made.rules)


def decode(data: bytes) -> Rules:
    """The rules in these bytes. Raises ValueError for what ``encode`` does not write."""
    if len(data) < HEAD.size or len(data) % PIECE.size:
        raise ValueError("no numbers of a network")
    magic, flags, count = HEAD.unpack_from(data)
    pieces = list(PIECE.iter_unpack(data[HEAD.size:]))
    made = Rules(tuple(Rule(bool(allow), Network(to, bits), protocol, first, last) for to, bits, protocol, allow, first, last, _ in pieces),
                 bool(flags & DNS), bool(flags & OPEN))
    sane = all(rule.to.bits <= 32 and rule.protocol in PROTOCOLS.values() and rule.first <= rule.last for rule in made.rules)
    if magic != MAGIC or count > MOST or not sane or encode(made) != data:
        raise ValueError("other numbers than this version writes")
    return made


# ---- rules of nftables ----


def _match(rule: Rule) -> str:
    words = [f"ip daddr {rule.to}"] if rule.to.bits else []
    names = [name for name, number in PROTOCOLS.items() if name and rule.protocol in (0, number)]
    if rule.first or rule.protocol:
        words.append(f"meta l4proto {{ {', '.join(names)} }}")
    if rule.first:
        words.append(f"th dport {rule.first}-{rule.last}" if rule.last > rule.first else f"th dport {rule.first}")
    return " ".join(words)


def _inside(rule: Rule, closed: Network) -> bool:
    return rule.to.bits >= closed.bits and (rule.to.address ^ closed.address) >> (32 - closed.bits) == 0


def _steps(made: Rules, resolvers: list[str], node: list[str]) -> Iterator[str]:
    """What happens to a packet that leaves, in order. Something closed is opened only by an entry that lies in it, and the node by none."""
    no = "reject with icmpx type admin-prohibited"
    yield 'oif "lo" accept'
    yield "ct state established,related accept"
    yield f"meta nfproto ipv6 {no}"
    yield f"ct count over {CONNECTIONS} {no}"
    if made.dns and resolvers:
        yield f"ip daddr {{ {', '.join(resolvers)} }} meta l4proto {{ tcp, udp }} th dport 53 goto opened"
    if node:
        yield f"ip daddr {{ {', '.join(node)} }} {no}"
    inside = [rule for rule in made.rules if rule.allow and any(_inside(rule, closed) for closed in CLOSED)]
    denied = [rule for rule in made.rules if not rule.allow]
    yield from (f"{_match(rule)} {no}" for rule in denied)
    yield from (f"{_match(rule)} goto opened" for rule in inside)
    yield f"ip daddr {{ {', '.join(map(str, CLOSED))} }} {no}"
    yield from (f"{_match(rule)} goto opened" for rule in made.rules if rule.allow and rule not in inside)
    yield "goto opened" if made.open else no


def namespace_ruleset(made: Rules, resolvers: list[str], node: list[str], local: dict[str, str] | None = None) -> str:
    """For the payload's namespace. resolvers: addresses of the node's. node: addresses of the node's own.

    local: addresses on loopback that the node's resolv.conf names, and the resolver that answers for each.
    """
    steps = "\n".join(f"\t\t{step}" for step in _steps(made, resolvers, node))
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
    return f"""table inet nodewrap {{
	set seen {{
		type ipv4_addr . inet_proto . inet_service
		size 256
		flags dynamic
	}}
	chain opened {{
		meta l4proto {{ tcp, udp }} ct state new update @seen {{ ip daddr . meta l4proto . th dport counter }}
		accept
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


def table(network: Network) -> str:
    """The name of the node's table for this range: two installations on one node do not take each other's away."""
    return f"nodewrap_{network.address:08x}_{network.bits}"


def no_ruleset(network: Network) -> str:
    """Takes the node's rules away, if they are there."""
    name = table(network)
    return "".join(f"table {family} {name}\ndelete table {family} {name}\n" for family in ("ip", "ip6"))


def node_ruleset(network: Network, resolvers: list[str]) -> str:
    """For the node: nothing of it changes with a run. It replaces its own table in one step.

    ``fib saddr . iif oif``: an address is believed only on the link that its route leads to. In prerouting, before a site's own redirections.
    """
    own = f"""ip daddr {{ {', '.join(resolvers)} }} meta l4proto {{ tcp, udp }} th dport 53 accept""" if resolvers else ""
    name = table(network)
    return f"""{no_ruleset(network)}table ip {name} {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifname != "{LINK}*" accept
		fib saddr . iif oif missing drop
		fib daddr type {{ broadcast, multicast, anycast }} drop
		{own}
		fib daddr type local reject with icmp type admin-prohibited
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "{LINK}*" oifname "{LINK}*" reject with icmp type admin-prohibited
		oifname "{LINK}*" ct state != {{ established, related }} drop
	}}
	chain output {{
		type filter hook output priority filter; policy accept;
		oifname "{LINK}*" ct state != {{ established, related }} drop
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {network} oifname != "{LINK}*" masquerade
	}}
}}
table ip6 {name} {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{LINK}*" drop
	}}
}}
"""
