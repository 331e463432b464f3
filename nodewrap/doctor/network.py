"""Whether this node can give private networks (docs/network.md): made once for real, and netd asked for."""

from __future__ import annotations

import os
import signal
import socket

from nodewrap import netkernel, netrun, network
from nodewrap.doctor import probe
from nodewrap.guard import Guard, Network

NEXT = "docs/network.md, \"Turning it on\""


def problem(guard: Guard) -> tuple[str, str]:
    """What is missing, and the next step; empty when nothing is. As root."""
    from nodewrap import netbuild, netd  # they load pyroute2, which no other check needs

    assert guard.network
    for wanted in (guard.network, guard.network6):
        taken = netbuild.overlap(wanted) if wanted else ""
        if taken:
            return f"network {wanted} collides with the route {taken}", "name a range in the guard that the node has no way to"
    closed = netd.forwarding(guard.network6).partition("; ")
    if closed[0]:
        return closed[0], closed[2]
    failed = probe.attempt(lambda: _build(guard))
    if failed:
        return failed, "what it names is missing, or the kernel's veth or nftables; root in a container may not"
    failed = probe.attempt(lambda: _reach(guard.netd))
    return (f"{guard.netd}: {failed}", "start nodewrap netd (nodewrap-netd.service)") if failed else ("", "")


def _build(guard: Guard) -> None:
    """One network, with all kinds of rules; it ends with this child."""
    from nodewrap import netbuild

    assert guard.network
    try:
        netbuild.build(guard.network, guard.network6, -1, network.encode(RULES))
    except netkernel.NetError as error:
        raise OSError(str(error)) from None


#: With all kinds of rules.
RULES = network.rules({"network": {"allow": ["any:443", "udp any"], "deny": ["192.0.2.1"]}})


def lacks() -> None:
    """As a caller. Raises OSError with what pasta needs and is not there."""
    if netrun.missing():
        raise OSError(netrun.missing())


def without_privilege(wanted: Network) -> None:
    """One network of the userns launcher's, which ends here. As a caller. Raises OSError."""
    asleep, pasta = probe.holder("net"), 0
    try:
        probe.write_maps(asleep)
        with open(f"/proc/{asleep}/ns/user", "rb") as user, open(f"/proc/{asleep}/ns/net", "rb") as net:
            pasta = netrun.attach(user.fileno(), net.fileno(), wanted, RULES)[2]
    except netkernel.NetError as error:
        raise OSError(str(error)) from None
    finally:
        for pid in (asleep, pasta) if pasta else (asleep,):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _reach(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(2)
        sock.connect(path)


def forgets() -> str:
    """What stays of connections when a run ends; "" when nothing does."""
    from nodewrap import netleft

    def look() -> None:
        with netleft.netfilter() as sock:
            netleft.entries(sock)

    failed = probe.attempt(look)
    return f"; connections of ended runs stay in the node's table for their time: load nf_conntrack_netlink ({failed})" if failed else ""


def resolvers() -> str:
    """What payloads with a private network ask for names."""
    remote, local = netkernel.resolvers()
    if local:
        return f"DNS by {local[min(local)]} in place of {', '.join(local)}"
    return f"DNS by {', '.join(remote)}" if remote else "no DNS: resolv.conf names no IPv4 resolver but on loopback"
