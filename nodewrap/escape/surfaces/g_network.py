"""G: network. Most are played in a network namespace that is the node's for the try, so that nothing of the node itself is touched."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from nodewrap.escape.arena import Arena
from nodewrap.escape.model import BARE_PROFILE, HOST_NETWORK, SAME_ID_BARE, Configuration, Seen, attack, left_out

NEWNS, NEWNET, MS_BIND, MS_REC, MS_SLAVE = 0x20000, 0x40000000, 4096, 16384, 1 << 19
METADATA, GROUP, GROUP6, BROADCAST = "169.254.169.254", "239.87.0.7", "ff02::8787", "10.87.0.255"
left_out(
    G08="needs an NFS export that trusts its clients", G12="needs the batch system's daemons; their sockets are E06's (by path), G01's (by port)",
)


def _is_one_identity(at: Configuration) -> bool:
    """The network is the profile's, whatever the identity."""
    return at.mode in ("log-only", "switch")


def _unshare(flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def _ip(*words: str) -> None:
    subprocess.run(["/sbin/ip", *words], check=True, capture_output=True)


def _own_network(*addresses: str) -> None:
    """From here on this try's network is one of its own, the node's for whoever is started here: loopback, and these addresses on it."""
    _unshare(NEWNET)
    _ip("link", "set", "lo", "up")
    for address in addresses:
        _ip("address", "add", address, "dev", "lo")


def _port() -> int:
    """One that nobody has at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ---- who answers ----


@attack("G01", "network namespace (strict)", accepted=(HOST_NETWORK,))
def loopback_services(arena: Arena) -> Seen:
    port, hosts = _port(), ["127.0.0.1"]
    with suppress(OSError), socket.create_server(("::1", port), family=socket.AF_INET6):
        hosts.append("::1")
    places = [f"{host}/{port}" for host in hosts]
    arena.accomplice("g_network", "serve", arena.nonce, *places)
    return arena.has_nonce(arena.payload("g_network", "ask", *places))


@attack("G17", "sockets are relayed: bytes alone go through", accepted=(BARE_PROFILE,))
def socket_as_stdin(arena: Arena) -> Seen:
    """A connection of the pilot's is the payload's stdin; the nonce is told by another service on the pilot's loopback."""
    port = _port()
    arena.accomplice("g_network", "serve", arena.nonce, f"127.0.0.1/{port}")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as mine:
        return arena.has_nonce(arena.begin_payload("g_network", "connect_anew", "127.0.0.1", port, stdin=mine).end())


@attack("G02", "network namespace (strict)", needs=("root", "ip"), accepted=(HOST_NETWORK,), only=_is_one_identity)
def cloud_metadata(arena: Arena) -> Seen:
    """A server at the address where clouds have theirs, in a network of this try's own."""
    _own_network(f"{METADATA}/32")
    arena.accomplice("g_network", "serve", arena.nonce, f"{METADATA}/80", user=0, group=0, extra_groups=[])
    return arena.has_nonce(arena.payload("g_network", "ask", f"{METADATA}/80"))


@attack("G04", "network namespace (strict)", accepted=(HOST_NETWORK,))
def port_of_a_dead_service(arena: Arena) -> Seen:
    """The payload listens where a service of the pilot's was; the nonce is its answer to the pilot's client."""
    port = _port()
    live = arena.begin_payload("g_network", "take_port", port, arena.nonce)
    live.hear()
    client = arena.accomplice("g_network", "ask_once", "127.0.0.1", port, wait=False).end()
    live.end(b"")
    return arena.has_nonce(client)


@attack("G16", "network namespace (strict); other uid (the kernel lets only one user's sockets share)", accepted=(HOST_NETWORK,))
def port_shared(arena: Arena) -> Seen:
    """The pilot's listener lets others of its own beside it; the payload's is one. The nonce is what clients get from the wrong one."""
    port = _port()
    arena.accomplice("g_network", "take_port", port, "right", 1)
    live = arena.begin_payload("g_network", "take_port", port, arena.nonce, 1)
    said, wrong = live.hear(), 0
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            wrong += client.recv(100) == arena.nonce.encode()
    live.end(b"")
    return Seen(wrong > 0, f"{wrong} of 20 connections were the payload's ({said})")


@attack("G05", "end of every process")
def listeners_left(arena: Arena) -> Seen:
    port = _port()
    ran = arena.payload("g_network", "leave_listener", port)
    rows = {name: Path(f"/proc/net/{name}").read_text().splitlines() for name in ("tcp", "udp")}
    left = [name for name, lines in rows.items() if any(line.split()[1] == f"0100007F:{port:04X}" for line in lines)]
    return Seen(bool(left), f"left: {', '.join(left) or 'none'} ({ran.line})")


# ---- namespaces ----


def _holders(name: str) -> list[int]:
    """pids in the network namespace of that name, "net:[NUMBER]"."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(path / "ns/net") == name:
                found.append(int(path.name))
    return found


@attack("G07", "end of every process; mounts end with their namespace", needs=("userns", "root"))
def network_namespace_pinned(arena: Arena) -> Seen:
    """By a daemon in it and a mount of it. Afterwards nobody may be in it, and the host may have no mount of it."""
    ran = arena.payload("g_network", "pin_network")
    name = ran.text.rpartition(" ")[2]
    is_own = name.startswith("net:[") and name != os.readlink("/proc/self/ns/net")
    left = _holders(name) if is_own else []
    pinned = is_own and any(name in line for line in _mounts())
    return Seen(bool(left) or pinned, f"in {name or 'none'} are {len(left)} processes, {int(pinned)} mounts of it on the host ({ran.line})")


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text(errors="backslashreplace").splitlines()


# ---- names and addresses ----


@attack("G09", "read-only; a root of its own", needs=("root",), accepted=(BARE_PROFILE,))
def names_changed(arena: Arena) -> Seen:
    """/etc/hosts and resolv.conf are files of this try's, in a mount namespace of its own, mode 0666: nothing but mounts is in the way."""
    top = arena.home.with_name(f"{arena.home.name}-etc")
    top.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    _unshare(NEWNS)
    libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None)
    paths = [os.path.realpath(path) for path in ("/etc/hosts", "/etc/resolv.conf") if os.path.exists(path)]
    copies = []
    for path in paths:
        copies.append(top / os.path.basename(path))
        copies[-1].write_bytes(Path(path).read_bytes())
        copies[-1].chmod(0o666)
        if libc.mount(os.fsencode(copies[-1]), os.fsencode(path), None, MS_BIND, None):
            raise OSError(ctypes.get_errno(), f"bind over {path}")
    before = [hashlib.sha256(copy.read_bytes()).digest() for copy in copies]
    ran = arena.payload("g_network", "change_names", arena.nonce, *paths)
    after = [hashlib.sha256(copy.read_bytes()).digest() for copy in copies]
    return Seen(before != after, f"the node's files are {'changed' if before != after else 'as they were'} ({ran.line})")


@attack("G14", "network namespace (strict)", accepted=(HOST_NETWORK,))
def who_talks_to_whom(arena: Arena) -> Seen:
    """The port on which the pilot listens is what is to be found out."""
    port = _port()
    arena.accomplice("g_network", "serve", arena.nonce, f"127.0.0.1/{port}")
    ran = arena.payload("g_network", "who_talks")
    found = f"0100007F:{port:04X}".encode() in ran.out
    return Seen(found, f"port {port} is {'among' if found else 'not among'} {len(ran.out.split())} words of /proc/net")


# ---- neighbours ----


@attack("G10", "network namespace (strict)", needs=("root", "ip"), accepted=(HOST_NETWORK,), only=_is_one_identity)
def shouting_at_neighbours(arena: Arena) -> Seen:
    """A neighbour listens to a group, an IPv6 group and the broadcast address, on a link of this try's own network."""
    _own_network()
    with suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")  # an address of its own at once
    _ip("link", "add", "nw0", "type", "veth", "peer", "name", "nw1")
    _ip("address", "add", "10.87.0.1/24", "broadcast", BROADCAST, "dev", "nw0")
    for name in ("nw0", "nw1"):
        _ip("link", "set", name, "up")
    index, port = socket.if_nametoindex("nw0"), _port()
    neighbour = arena.accomplice("g_network", "listen_to_groups", index, port, GROUP, GROUP6)
    arena.until(lambda: "tentative" not in subprocess.run(["/sbin/ip", "-6", "address"], capture_output=True, text=True, check=True).stdout, 3.0)
    ran = arena.payload("g_network", "shout", arena.nonce, port, GROUP, GROUP6, BROADCAST, index)
    heard = []
    while said := neighbour.hear(0.3):
        heard.append(said)
    return Seen(any(arena.nonce in said for said in heard), f"the neighbour heard {len(heard)} ({ran.line})")


@attack("G15", "no capability in the network's user namespace; filter", control="root", needs=("root", "ip"), only=_is_one_identity)
def packets_of_others(arena: Arena) -> Seen:
    """The judge sends the nonce to itself over the loopback of this try's own network, while the payload listens."""
    _own_network()
    live = arena.begin_payload("g_network", "sniff", 1, arena.nonce)
    said = live.hear()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        end = time.monotonic() + (1.5 if "listens" in said else 0.1)
        while live.process.poll() is None and time.monotonic() < end:
            sock.sendto(arena.nonce.encode(), ("127.0.0.1", 9))
            time.sleep(0.05)
    ran = live.end()
    return Seen(arena.nonce.encode().hex().encode() in ran.out, f"the payload heard {len(ran.out) // 2} bytes ({said})")


@attack("G11", "network namespace (strict)", needs=("root", "ip"), accepted=(HOST_NETWORK,), only=_is_one_identity)
def ports_used_up(arena: Arena) -> Seen:
    """In a network of this try's own with few ports: the payload takes all, then the pilot wants to connect."""
    _own_network()
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40049")
    arena.accomplice("g_network", "serve", arena.nonce, "127.0.0.1/4000")
    live = arena.begin_payload("g_network", "take_ports", "127.0.0.1", 4000)
    said = live.hear()
    pilot = arena.accomplice("g_network", "ask_once", "127.0.0.1", 4000, wait=False).end()
    live.end(b"")
    return Seen(arena.nonce not in pilot.text, f"the pilot: {pilot.text.replace(arena.nonce, '(the nonce)')} (the payload: {said})")


# ---- the pilot's children ----


@attack("G13", "pid namespace; other uid or not the same user namespace", needs=("root",), accepted=(SAME_ID_BARE,))
def proxy_rewritten(arena: Arena) -> Seen:
    """The variable is in the memory of a process of the pilot's, which will start others with it."""
    good = "https://good.example.org:3128/as-long-as-a-nonce"
    pilot = arena.accomplice("g_network", "keep_environment", env={**arena.environment(None), "https_proxy": good})
    ran = arena.payload("g_network", "change_environment", pilot.process.pid, arena.nonce)
    now = Path(f"/proc/{pilot.process.pid}/environ").read_bytes()
    return Seen(good.encode() not in now, f"the pilot's proxy is {'another' if good.encode() not in now else 'as it was'} ({ran.line})")
