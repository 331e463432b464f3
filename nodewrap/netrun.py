"""The private network of one run under the launcher without privilege (docs/network.md): rules in the run's own namespace, and pasta at it.

The launcher starts this before the payload, with nothing of the pilot's: descriptor 3 leads to it, 4 is the run's user namespace, 5 the network
namespace. It is told and asked the same as netd. There is no privilege in it: the caller owns the run's user namespace, and who owns one has
every capability in it (user_namespaces(7)). Each process here dies with the one that started it, and so with the launcher.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from typing import NoReturn

from nodewrap import netkernel, network
from nodewrap.guard import GuardError, Network, dotted, parse_guard
from nodewrap.netkernel import NetError

PASTA = "/usr/bin/pasta"
LAUNCHER, USER, NET = 3, 4, 5
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 1, 38, 47, 2
CAPABILITY_VERSION_3 = 0x20080522
#: Seconds for rules, and for pasta.
PATIENCE = 10.0
#: As netd's: error or 0, the address, why there is none.
REPLY = struct.Struct("=I4s248s")
#: What the launcher sends: its caller's id in so many bytes, then the file of numbers.
CALLER, LARGEST = 4, 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        raise NetError(f"{name}: {os.strerror(ctypes.get_errno())}")


def _hold(*capabilities: int) -> None:
    """These alone, in the user namespace that we have just entered, and through exec too (capabilities(7), ambient set); not more either, for root of
    the namespace: with more the kernel forgets whom it dies with."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    bits = sum(1 << number for number in capabilities)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    _call("capset", header, struct.pack("=6I", *[bits & 0xFFFFFFFF] * 3, *[bits >> 32] * 3))
    for number in capabilities:
        _call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)


def _die_with(parent: int) -> None:
    """Last of all: the kernel forgets it when ids or capabilities change (prctl(2))."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _child(work: Callable[[], None]) -> int:
    """A child that does this and ends; it says on its standard error why it could not. Its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # pasta does not start when its signals are ignored
        work()
        os._exit(0)
    except BaseException as wrong:  # noqa: BLE001  nothing may leave a child that way
        os.write(2, f"{wrong}\n".encode("utf-8", "replace"))
    finally:
        os._exit(1)


def _said(reading: int, pid: int) -> tuple[str, bool]:
    """What a child wrote, until it ended or wrote a line with a number alone; whether it goes on."""
    text = b""
    while select.select([reading], [], [], PATIENCE)[0]:
        more = os.read(reading, 4096)
        text += more
        if not more:
            return text.decode("utf-8", "replace"), os.waitpid(pid, 0)[1] == 0
        if any(line.isdigit() for line in text.split(b"\n")[:-1]):
            return text.decode("utf-8", "replace"), True
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"no answer within {PATIENCE:.0f} s", False


# ---- rules ----


def load_rules(user: int, net: int, rules: str, localnet: bool) -> int:
    """Into the namespace net, owned by user. localnet: addresses of loopback are led out. A netfilter socket in it. Raises NetError."""
    us, them = socket.socketpair()
    reading, writing = os.pipe()
    parent = os.getpid()

    def work() -> None:
        os.dup2(writing, 2)
        netkernel.namespace("setns", user, (CLONE_NEWUSER,))
        netkernel.namespace("setns", net, (CLONE_NEWNET,))
        _hold(CAP_NET_ADMIN)
        _die_with(parent)
        _set("net/ipv6/conf/all/disable_ipv6")
        _set("net/ipv6/conf/default/disable_ipv6")
        if localnet:
            _set("net/ipv4/conf/default/route_localnet")
        netkernel.nft(rules)
        them.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [netkernel.netfilter()]))])

    pid = _child(work)
    os.close(writing)
    them.close()
    with us:
        text, good = _said(reading, pid)
        os.close(reading)
        descriptors = socket.recv_fds(us, 1, 1)[1] if good else []
    if not descriptors:
        raise NetError(text.strip() or "the rules were not loaded")
    return descriptors[0]


def _set(name: str) -> None:
    """To 1, in the namespace that we are in. In a container it may be read-only, and a kernel may lack it: the rules close IPv6 all the same."""
    with contextlib.suppress(OSError), open(f"/proc/sys/{name}", "w", encoding="ascii") as file:
        file.write("1")


# ---- pasta ----


def arguments(wanted: Network, address: int) -> list[str]:
    """No port of either side leads to the other's loopback, and no address stands for the node: what is open is the rules' to say."""
    closed = ["--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none"]
    silent = ["--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"]
    place = ["-a", dotted(address), "-n", str(wanted.bits), "-g", dotted(wanted.address + 1), "-I", "eth0"]
    life = ["--foreground", "--quiet", "--pid", "/proc/self/fd/1", "--no-netns-quit", "--netns-only", "--netns", "/proc/self/fd/0"]
    return ["pasta", "--config-net", "--ipv4-only", *closed, *silent, *place, *life]


def start_pasta(user: int, net: int, words: list[str]) -> int:
    """pasta at that namespace: its pid, as soon as link and address are there. It ends with us. Raises NetError.

    It is executed within the user namespace, for what it enters later would make the kernel forget that it dies with us; and the namespace is its
    standard input, because it closes what it does not know.
    """
    reading, writing = os.pipe()
    parent = os.getpid()

    def work() -> None:
        for number, descriptor in ((0, net), (1, writing), (2, writing)):
            os.dup2(descriptor, number)
        netkernel.namespace("setns", user, (CLONE_NEWUSER,))
        _hold(CAP_NET_ADMIN, CAP_SYS_ADMIN)
        _die_with(parent)
        os.execve(PASTA, words, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})  # noqa: S606  no shell is meant

    pid = _child(work)
    os.close(writing)
    text, good = _said(reading, pid)
    os.close(reading)
    if not good:
        told = [line for line in text.splitlines() if line and "syslog" not in line]
        raise NetError(f"{PASTA}: {told[-1] if told else 'it ended at once'}"[:200])
    return pid


def take_along(pid: int) -> None:
    """When we are to die with the launcher, pasta is killed first: where AppArmor confines it (Debian's package), the kernel has forgotten whom it
    dies with (security/apparmor/domain.c, apparmor_bprm_committing_creds)."""

    def end(*_: object) -> NoReturn:
        os.kill(pid, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def missing() -> str:
    """What a node lacks for it, as its caller sees it; "" for nothing."""
    for path, package in ((PASTA, "passt"), (netkernel.NFT, "nftables")):
        if not os.access(path, os.X_OK):
            return f"{path} is missing; install the package {package}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened by the caller; modprobe tun, and mode 0666 for it"
    return ""


def attach(user: int, net: int, wanted: Network, made: network.Rules) -> tuple[int, int, int]:
    """(address, netfilter socket, pid of pasta) of a namespace that is now a private network. Raises NetError."""
    lacks = missing()
    if lacks:
        raise NetError(lacks)
    address = wanted.address + 2 + os.getpid() % ((1 << (32 - wanted.bits)) - 3)
    remote, local = netkernel.resolvers()
    rules = network.namespace_ruleset(made, remote, netkernel.node_addresses(), local)
    netfilter = load_rules(user, net, rules, bool(local))
    return address, netfilter, start_pasta(user, net, arguments(wanted, address))


# ---- one run ----


def main(guard_path: str) -> NoReturn:
    """The script that the launcher starts. Ends when the launcher asks where the payload connected to, or has ended."""
    launcher = socket.socket(fileno=LAUNCHER)
    for descriptor in (LAUNCHER, USER, NET):
        os.set_inheritable(descriptor, False)
    try:
        made = network.decode(launcher.recv(LARGEST)[CALLER:])
        with open(guard_path, "rb") as file:
            wanted = parse_guard(file.read()).network
        if not wanted:
            raise NetError(f"{guard_path} has no line 'network A.B.C.D/BITS'")
        address, netfilter, pid = attach(USER, NET, wanted, made)
        take_along(pid)
    except (NetError, GuardError, OSError, ValueError) as error:
        launcher.send(REPLY.pack(1, b"", str(error).encode("utf-8", "replace")[:247]))
        os._exit(1)
    launcher.send(REPLY.pack(0, address.to_bytes(4, "big"), b""))
    if launcher.recv(1):
        launcher.send(netkernel.tell(netfilter))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os._exit(0)
