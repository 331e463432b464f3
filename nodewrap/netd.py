"""``nodewrap netd``: keeps network namespaces ready for payloads (docs/network.md), because making one takes 20 ms, which no run shall wait for.

Root's, behind a socket that only root may use. It is told numbers, never words (I1): the file of a profile's network, which ``policy apply`` wrote
and the launcher sends as it is behind its caller's uid. It answers with a namespace and the address in it; the connection stays as long as the
run. A namespace dies with its payload and takes link, address, route and rules along, whether netd lives or not. The node's own rules are one
table, the same for all runs. What a run leaves all the same netd takes away (netleft.py).
"""

from __future__ import annotations

import array
import contextlib
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import prctl

from nodewrap import netbuild, netkernel, netleft, network, policyd
from nodewrap.guard import Guard, Network, Network6, colons
from nodewrap.netbuild import ANSWER
from nodewrap.netkernel import NetError

#: Namespaces that wait, for each of so many networks of the policy; one not asked for lately gives its own up.
READY, NETWORKS = 3, 4
#: Seconds of quiet before the next is made: beside a run that is starting it would cost that run.
SOON = 0.02
#: Seconds for one to be made, nft and all.
BUILD = 10.0
#: Seconds after a run before a link that somebody still keeps is taken away; most are gone by then.
KEPT = 0.25
#: Seconds before a reserve is tried again that could not be made.
PAUSE = 10.0
#: Seconds that links of runs which have ended are awaited at the end.
ENDING = 1.0
#: Seconds between looks at what the node changed: forwarding, resolvers, our table flushed by a firewall's reload. At its routes. And at links
#: that an earlier netd gave; the first time that long after the start, when those who were just given one have it on lease.
LOOK, LOOK_ROUTES, LOOK_LINKS = 2.0, 30.0, 5.0
#: Seconds without listening when a connection could not be taken: it would be told of again and again.
DEAF = 0.2
#: Descriptors that are not for runs: what is ready, what is being made, those who are to be refused, and our own.
RESERVE, REFUSING = 64, 16
#: One caller gets another address while so many times as many as it has are free: alone three quarters of the range, two of them six sevenths.
SHARE = 3
CALLER = struct.Struct("=I")
REPLY = struct.Struct("=I4s248s")
LARGEST = network.HEAD.size + network.PIECE.size * network.MOST
BACKLOG = 256
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORWARD, FORWARD6 = "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"


class NetdError(Exception):
    """Why netd cannot run: one line that begins with its code."""


def wrong(text: str) -> NetdError:
    return NetdError(f"NW-NETD: {text}")


def run(guard_path: str) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. Raises NetdError."""
    guard = read_guard(guard_path)
    assert guard.network
    for wanted in (guard.network, guard.network6):
        taken = netbuild.overlap(wanted) if wanted else ""
        if taken:
            raise wrong(f"network {wanted} of {guard_path} collides with the route {taken}; next: choose a range that the node has no way to")
    with _as_netd(), policyd.only_one(guard.netd), policyd.listen(guard.netd, socket.SOCK_SEQPACKET, BACKLOG) as listening:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        if files < RESERVE + 2:
            raise wrong(f"RLIMIT_NOFILE is {files}, and a run takes two beside {RESERVE}; raise it (LimitNOFILE of the service)")
        _give_up()
        daemon = Netd(guard.network, listening, guard.state + "/leases", files, guard.network6)
        try:
            daemon.secure()
        except NetError as error:
            raise wrong(str(error)) from None
        for number in SIGNALS:
            signal.signal(number, daemon.stop)
        policyd.announce()
        try:
            daemon.serve()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(guard.netd)


def read_guard(path: str) -> Guard:
    """The guard, when it may be relied on and names what netd needs. Raises NetdError."""
    if os.geteuid():
        raise wrong("links and rules are root's to make; next: start it as root")
    with _as_netd():
        guard = policyd.trusted_guard(path)
    if not (guard.netd and guard.network):
        raise wrong(f"{path} has no lines 'netd SOCKET' and 'network A.B.C.D/BITS'; add them, then start again")
    return guard


@contextlib.contextmanager
def _as_netd() -> Iterator[None]:
    """What policyd says in its own name of a guard, a lock, a socket."""
    try:
        yield
    except policyd.PolicydError as error:
        raise wrong(str(error).partition(": ")[2].replace("policyd", "netd")) from None


def _give_up() -> None:
    """Rights to make links and enter namespaces are all that is left, here and in whatever is executed."""
    prctl.set_dumpable(0)
    prctl.set_name("nw-netd")
    prctl.set_no_new_privs(1)
    prctl.capbset.limit(prctl.CAP_NET_ADMIN, prctl.CAP_SYS_ADMIN)
    prctl.cap_inheritable.limit()
    prctl.cap_effective.limit(prctl.CAP_NET_ADMIN, prctl.CAP_SYS_ADMIN)
    prctl.cap_permitted.limit(prctl.CAP_NET_ADMIN, prctl.CAP_SYS_ADMIN)


def others(ours: set[int]) -> bool:
    """Whether there are links of payloads that are not ours alone."""
    return any(name.startswith(network.LINK) and link not in ours for link, name in socket.if_nameindex())


def say(text: str) -> None:
    """For the service's journal."""
    print(f"nodewrap: NW-NETD: {text}", file=sys.stderr, flush=True)


def forwarding(six: Network6 | None = None) -> str:
    """Why the node passes nobody's packets on, or "". Raises OSError."""
    for name in (FORWARD, FORWARD6)[:1 + bool(six)]:
        with open("/proc/sys/" + name.replace(".", "/"), encoding="ascii") as file:
            if file.read().strip() == "0":
                return f"{name} is 0; sysctl -w {name}=1, and keep it in /etc/sysctl.d"
    return ""


class Ready:
    """A namespace that waits. numbers: the network that it has the rules of."""

    __slots__ = ("address", "link", "namespace", "netfilter", "numbers")

    def __init__(self, numbers: bytes, address: int, link: int, descriptors: list[int]) -> None:
        self.numbers, self.address, self.link = numbers, address, link
        self.namespace, self.netfilter = descriptors

    def close(self) -> None:
        """Let go; unless it was given away, it ends now."""
        for descriptor in (self.namespace, self.netfilter):
            if descriptor >= 0:
                os.close(descriptor)
        self.namespace = self.netfilter = -1


class Peer:
    """A launcher. caller: uid of the pilot; wants: the numbers that it sent, until it has got something; ready: what it got.

    quiet: its payload has ended, and left no connection.
    """

    __slots__ = ("caller", "quiet", "ready", "sock", "wants")

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.wants, self.caller, self.quiet = sock, b"", -1, False
        self.ready: Ready | None = None


class Builder:
    """The child that makes the next namespace; one at a time."""

    __slots__ = ("late", "numbers", "pid", "sock")

    def __init__(self, numbers: bytes, sock: socket.socket, pid: int) -> None:
        self.numbers, self.sock, self.pid = numbers, sock, pid
        self.late = time.monotonic() + BUILD


class Netd:
    """wanted, six: the guard's ranges. leases: the directory of the launcher's. files: descriptors that we may have.

    pool: what is ready, by numbers, the network asked for last at the end. doomed: (when, link, address) of runs that have ended.
    """

    def __init__(self, wanted: Network, listening: socket.socket, leases: str = "", files: int = 1024, six: Network6 | None = None) -> None:
        self.wanted, self.six, self.listening, self.leases = wanted, six, listening, leases
        self.most = (files - RESERVE) // 2
        self.pool: dict[bytes, list[Ready]] = {}
        self.waiting: list[Peer] = []
        self.peers: set[Peer] = set()
        self.builder: Builder | None = None
        self.doomed: list[tuple[float, int, int]] = []
        self.next = int.from_bytes(os.urandom(4), "little")
        self.look = self.look_routes = self.deaf = 0.0
        self.look_links = time.monotonic() + LOOK_LINKS
        self.forgets = True
        self.stamp: object = None
        self.trouble = self.collides = ""
        self.pause = 0.0
        self.select = selectors.DefaultSelector()
        self.stopping = False

    def stop(self, *_: object) -> None:
        self.stopping = True

    def serve(self) -> None:
        """Until told to end. Runs go on with what they have."""
        self._look()
        self._can_forget()
        woken, wake = socket.socketpair()  # select(2) is gone back to after a signal (PEP 475): this one ends it
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        self.select.register(woken, selectors.EVENT_READ, lambda: None)
        self.listening.setblocking(False)
        self.select.register(self.listening, selectors.EVENT_READ, self._accept)
        while not self.stopping:
            heard = self.select.select(self._patience())
            for key, _ in heard:
                key.data()
            if not heard or self._urgent():
                self._build()
            self._overdue()
        self._close()

    def _patience(self) -> float:
        if self.waiting or self.builder:
            return 0.1
        if self._short() is not None and time.monotonic() >= self.pause:
            return SOON
        if self.deaf:
            return DEAF
        return KEPT if self.doomed else LOOK

    # ---- the node ----

    def secure(self) -> None:
        """The node's table as it must be now. Raises NetError."""
        netkernel.nft(network.node_ruleset(self.wanted, self.six, netkernel.resolvers(self.six is not None)[0]))
        self.stamp = self._stamp()

    def _stamp(self) -> object:
        """Which files name the resolvers: what systemd-resolved asks changes without resolv.conf, which names itself."""
        found = []
        for path in (netkernel.RESOLV_CONF, netkernel.UPSTREAM):
            with contextlib.suppress(OSError):
                info = os.stat(path)
                found.append((path, info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size))
        return found

    def _look(self) -> None:
        """What is wrong with the node goes into ``trouble``, which callers are told until it is mended, and once to stderr."""
        if time.monotonic() < self.look:
            return
        before = self.trouble
        self._examine()
        if self.trouble != before:
            say(self.trouble or "the node passes packets on again")

    def _examine(self) -> None:
        self.look = time.monotonic() + LOOK
        try:
            changed = self._stamp() != self.stamp
            if changed or not netkernel.has_table(network.table(self.wanted)):
                self.secure()
            if changed:
                self._drop(self.pool)
            self.trouble = self._routes() or forwarding(self.six)
        except (NetError, OSError) as error:
            self.trouble = str(error)

    def _routes(self) -> str:
        """A collision, looked for seldom: it takes 10 ms."""
        if time.monotonic() > self.look_routes:
            self.look_routes = time.monotonic() + LOOK_ROUTES
            self.collides = netbuild.overlap(self.wanted) or (netbuild.overlap(self.six) if self.six else "")
        return f"the range of payloads collides with the route {self.collides}; change one of them" if self.collides else ""

    # ---- launchers ----

    def _accept(self) -> None:
        """Whoever cannot be taken now waits in the queue; their launchers, no longer than their deadline."""
        try:
            if len(self.peers) >= self.most + REFUSING:
                raise OSError("so many are being refused")
            sock, _ = self.listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            self.select.unregister(self.listening)
            self.deaf = time.monotonic() + DEAF
            return
        uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid:
            sock.close()
            return
        sock.setblocking(False)
        peer = Peer(sock)
        self.peers.add(peer)
        self.select.register(sock, selectors.EVENT_READ, lambda: self._hear(peer))

    def _hear(self, peer: Peer) -> None:
        try:
            said = peer.sock.recv(CALLER.size + LARGEST + 1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._leave(peer)
        elif peer.ready:
            told = b"\0"
            with contextlib.suppress(OSError):
                told = netkernel.tell(peer.ready.netfilter)
            peer.quiet = told == b"\0" and self._is_quiet(peer.ready)
            self._tell(peer, told)
        elif not peer.wants:
            self._ask(peer, said)

    def _ask(self, peer: Peer, said: bytes) -> None:
        peer.wants = numbers = said[CALLER.size:]
        try:
            network.decode(numbers)
            (peer.caller,) = CALLER.unpack(said[:CALLER.size])
        except ValueError as error:
            self._refuse(peer, f"netd was sent {error}; install launcher and netd from one version, then run nodewrap policy apply")
            return
        if self.trouble:  # perhaps it has just been mended
            self.look = self.look_routes = 0
            self._look()
        why = self.trouble or self._too_many(peer.caller)
        if why:
            self._refuse(peer, why)
            return
        self.pool[numbers] = self.pool.pop(numbers, [])  # asked for last
        for old in list(self.pool)[:-NETWORKS]:
            self._drop({old: self.pool.pop(old)})
        while self.pool[numbers] and not peer.ready:
            self._give(peer, self.pool[numbers].pop(0))
        if not peer.ready:
            self.waiting.append(peer)

    def _too_many(self, caller: int) -> str:
        """Why there is nothing more for this caller, or "". So that none takes what others need, and there is one for a caller who has none."""
        size = (1 << (32 - self.wanted.bits)) - 2
        asked = [peer.caller for peer in self.peers if peer.wants]
        have = asked.count(caller) - 1
        if len(asked) > self.most:
            return f"netd keeps {self.most} networks, by its RLIMIT_NOFILE; raise LimitNOFILE of its service"
        if have and have >= SHARE * (size - len(asked) + 1):
            return f"uid {caller} has {have} of the {size} addresses of {self.wanted}, the rest is for others; widen network in the guard, or wait"
        return ""

    def _give(self, peer: Peer, ready: Ready) -> None:
        """The namespace, of which no descriptor stays here: it must end with the payload."""
        body = REPLY.pack(0, ready.address.to_bytes(4, "big"), colons(self.six.of(ready.address)).encode() if self.six else b"")
        try:
            peer.sock.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ready.namespace]))])
        except OSError:
            ready.close()
            self._leave(peer)
            return
        os.close(ready.namespace)
        ready.namespace = -1
        peer.ready = ready

    def _refuse(self, peer: Peer, why: str) -> None:
        self._tell(peer, REPLY.pack(1, b"", why.encode("utf-8", "replace")[:247]))
        self._leave(peer)

    def _tell(self, peer: Peer, body: bytes) -> None:
        with contextlib.suppress(OSError):
            peer.sock.send(body)

    def _leave(self, peer: Peer) -> None:
        """The run has ended, or its launcher died."""
        if peer not in self.peers:
            return
        self.peers.discard(peer)
        if peer in self.waiting:
            self.waiting.remove(peer)
        self.select.unregister(peer.sock)
        peer.sock.close()
        if peer.ready:
            self.doomed.append((time.monotonic() + KEPT, peer.ready.link, 0 if peer.quiet else peer.ready.address))
            peer.ready.close()

    # ---- namespaces ----

    def _urgent(self) -> bool:
        """Somebody waits, or the next one would."""
        last = next(reversed(self.pool), None)
        return bool(self.waiting) or (last is not None and not self.pool[last])

    def _short(self) -> bytes | None:
        """Of which network the next one is to be made."""
        for peer in self.waiting:
            return peer.wants
        size = (1 << (32 - self.wanted.bits)) - 2
        most = min(READY, size // 4)
        return next((numbers for numbers, ready in reversed(self.pool.items()) if len(ready) < most), None)

    def _build(self) -> None:
        numbers = self._short()
        if self.builder or numbers is None or (not self.waiting and time.monotonic() < self.pause):
            return
        pair: tuple[socket.socket, ...] = ()
        try:
            us, them = pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
        except OSError as error:
            for sock in pair:
                sock.close()
            self._failed(numbers, f"netd cannot start the process that makes it: {error.strerror}")
            return
        if pid == 0:
            us.close()
            _be_builder(them, self.wanted, self.six, self.next, numbers)
        them.close()
        self.next += 1
        self.builder = Builder(numbers, us, pid)
        self.select.register(us, selectors.EVENT_READ, self._built)

    def _built(self) -> None:
        assert self.builder
        body, descriptors = b"", list[int]()
        with contextlib.suppress(OSError):
            body, descriptors = socket.recv_fds(self.builder.sock, ANSWER.size, 2)[:2]
        numbers = self._end_builder()
        address, link, text = ANSWER.unpack(body) if len(body) == ANSWER.size else (0, 0, b"the process that makes networks died")
        if len(descriptors) != 2:
            for descriptor in descriptors:
                os.close(descriptor)
            self._failed(numbers, text.rstrip(b"\0").decode("utf-8", "replace") or "no namespace")
            return
        ready = Ready(numbers, address, link, descriptors)
        for peer in [peer for peer in self.waiting if peer.wants == numbers]:
            self.waiting.remove(peer)
            self._give(peer, ready)
            if peer.ready:
                return
        self.pool.setdefault(numbers, []).append(ready)

    def _end_builder(self) -> bytes:
        assert self.builder
        ended, self.builder = self.builder, None
        self.select.unregister(ended.sock)
        ended.sock.close()
        os.kill(ended.pid, signal.SIGKILL)
        os.waitpid(ended.pid, 0)
        return ended.numbers

    def _failed(self, numbers: bytes, why: str) -> None:
        """Those who wait for it are told; and it is not tried again at once for the pool's sake. Others' spare addresses are for who needs one."""
        self.pause = time.monotonic() + PAUSE
        spare = {other: ready for other, ready in self.pool.items() if other != numbers and ready}
        if spare:
            self._drop(spare)
            return
        say(f"no network made: {why}")
        for peer in [peer for peer in self.waiting if peer.wants == numbers]:
            self._refuse(peer, why)

    def _drop(self, pool: dict[bytes, list[Ready]]) -> None:
        for ready in [one for many in pool.values() for one in many]:
            ready.close()
        for many in pool.values():
            many.clear()

    def _overdue(self) -> None:
        now = time.monotonic()
        if self.builder and now > self.builder.late:
            self._failed(self._end_builder(), f"a network was not made in {BUILD:.0f} s")
        if self.deaf and now > self.deaf:
            self.deaf = 0.0
            self.select.register(self.listening, selectors.EVENT_READ, self._accept)
        due = [one for one in self.doomed if one[0] < now]
        if due:
            self.doomed = self.doomed[len(due):]
            self._end([(link, address) for _, link, address in due])
        if now > self.look_links:
            self.look_links = now + LOOK_LINKS
            self._end_unknown()
        if now > self.look and not self.waiting:
            self._look()
        with contextlib.suppress(ChildProcessError):
            while not self.builder and os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _close(self) -> None:
        """The node's rules stay while a run has need of them."""
        ours = {ready.link for many in self.pool.values() for ready in many} | {link for _, link, _ in self.doomed}
        self._drop(self.pool)
        if self.builder:
            self._end_builder()
        end = time.monotonic() + (0 if any(peer.ready for peer in self.peers) else ENDING)
        while (runs := others(ours)) and time.monotonic() < end:
            time.sleep(0.02)
        if not runs:
            netkernel.nft(network.no_ruleset(self.wanted))


    # ---- what runs leave ----

    def _can_forget(self) -> None:
        try:
            with netleft.netfilter() as sock:
                netleft.entries(sock)
        except OSError as error:
            self.forgets = False
            say(f"connections of runs that have ended stay in the node's table for their time: nf_conntrack_netlink: {error}; load that module")

    def _is_quiet(self, ready: Ready) -> bool:
        """Nothing of the payload's is in the table, which takes 10 ms to look through. Only when its processes are gone."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(ready.netfilter)) as sock:
            sock.settimeout(1)
            return netleft.entries(sock) == 0
        return False

    def _end(self, ended: list[tuple[int, int]]) -> None:
        """By a child: taking a link away waits for every processor (synchronize_net)."""
        try:
            there = netleft.links(self.wanted)
            left = [(link if link in there else 0, address * self.forgets) for link, address in ended]
            left = [one for one in left if any(one)]
            if not left or os.fork():
                return
        except OSError:  # later, then
            self.doomed += [(time.monotonic() + DEAF, link, address) for link, address in ended]
            return
        try:
            prctl.set_pdeathsig(signal.SIGKILL)  # it has netd's lock, which the next one wants
            netleft.end(left, self.wanted, self.six)
        except OSError as error:
            say(f"connections of a run that has ended stay: {error}")
        finally:
            os._exit(0)

    def _end_unknown(self) -> None:
        """Links that an earlier netd gave, whose runs have ended: somebody keeps their namespaces, by a socket that the payload gave away."""
        ours = {ready.link for many in self.pool.values() for ready in many} | {link for _, link, _ in self.doomed}
        ours |= {peer.ready.link for peer in self.peers if peer.ready}
        if self.builder:  # whose link we do not know yet
            return
        try:
            unknown = {link: address for link, address in netleft.links(self.wanted).items() if link not in ours}
            runs = netleft.leased(self.leases) if unknown else set()
        except OSError as error:
            say(f"links of runs that have ended cannot be told: {error}")
            return
        self._end([(link, address) for link, address in unknown.items() if address not in runs])


def _be_builder(to: socket.socket, wanted: Network, six: Network6 | None, start: int, numbers: bytes) -> NoReturn:
    try:
        prctl.set_pdeathsig(signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        netbuild.main(to, wanted, six, start, numbers)
    finally:
        os._exit(0)
