"""J: exhaustion. What one payload takes from the others, from its pilot and from the node; all of it in small."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

from nodewrap.audit.log import run_of
from nodewrap.escape.arena import Arena, Live, NotRunError, hostile
from nodewrap.escape.evidence import descriptors
from nodewrap.escape.model import BARE_PROFILE, MEMORY_FILES, OWN_LAUNCHER, PILOTS_PROCESSES, SAME_ID_BARE, SHARED_ID_BARE, Seen, attack, left_out
from nodewrap.escape.ownsite import OwnSite
from nodewrap.live import comm

HERE = "j_exhaustion"
PLACES = ("/tmp", "/var/tmp", "/dev/shm")
LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWIPC = 0x00020000, 0x08000000
MIB = 1 << 20

left_out(
    J02="needs memory limits of a group (cgroup v2 with its memory controller): distribution-kernel lane",
    J09="kernel memory is counted by the memory controller of cgroup v2 alone: distribution-kernel lane",
    J11="a share of the disk is held by the io controller of cgroup v2 alone: distribution-kernel lane",
    J19="needs a GPU",
)


def code(function: str, *words: object) -> list[str]:
    return hostile(HERE, function, *words)


def apart(flags: int) -> None:
    """The try's own process, and so all that it starts, into new namespaces. Raises OSError."""
    if LIBC.unshare(flags) or (flags & NEWNS and LIBC.mount(b"none", b"/", None, 0x44000, None)):  # MS_REC | MS_PRIVATE
        raise OSError(ctypes.get_errno(), "unshare")


def finish(live: Live) -> None:
    live.end(b"", seconds=10)


@attack("J01", "another kernel id, whose processes are counted apart", accepted=(PILOTS_PROCESSES,), peers=False)
def processes(arena: Arena) -> Seen:
    """The neighbour is the pilot's and has as many processes for its id as it has now, and a hundred; the payload makes 150."""
    def own() -> int:
        found = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                found += len(os.listdir(f"/proc/{pid}/task")) * (os.stat(f"/proc/{pid}").st_uid == arena.caller.uid)
        return found

    neighbour = arena.accomplice(HERE, "neighbour", own() + 100)
    live = arena.begin_payload(HERE, "forks", 150)
    made = live.hear()
    assert neighbour.process.stdin
    neighbour.process.stdin.write(b"\n")
    neighbour.process.stdin.flush()
    said = neighbour.hear(5)
    finish(live)
    return Seen(said != "forked", f"{made} processes; the neighbour: {said}")


@attack("J03", "memory file systems and IPC namespace end with the run; in none removed as the id", accepted=(SAME_ID_BARE, SHARED_ID_BARE))
def memory_kept(arena: Arena) -> Seen:
    key = secrets.randbelow(1 << 30) + 1
    for place in PLACES:
        arena.undo(lambda place=place: os.unlink(f"{place}/{arena.nonce}"))  # type: ignore[misc]
    arena.undo(lambda: LIBC.shmctl(LIBC.shmget(key, 0, 0), 0, None))
    ran = arena.payload(HERE, "keep_memory", arena.nonce, key, 16)
    left = [place for place in PLACES if os.path.exists(f"{place}/{arena.nonce}")]
    left += ["System V"] * any(line.split()[0] == str(key) for line in Path("/proc/sysvipc/shm").read_text().splitlines())
    return Seen(bool(left), f"16 MiB each left in: {', '.join(left) or 'nothing'}; {ran.line}")


@attack("J04", "private directories in memory with a size; nothing shared in the payload's root", needs=("root",), accepted=(BARE_PROFILE,))
def full_disk(arena: Arena) -> Seen:
    """A file system of 4 MiB in which everybody may write, as /tmp of a node; a neighbour writes there."""
    shared = arena.home / "shared"
    shared.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=1777", "none", str(shared)], check=True)
    arena.undo(lambda: subprocess.run(["umount", "-l", str(shared)], check=True))
    live = arena.begin_payload(HERE, "fill", 6, *PLACES, shared)
    said = live.hear()
    try:
        (shared / "neighbour").write_bytes(b"x" * 65536)
        full = False
    except OSError:
        full = True
    finish(live)
    return Seen(full, f"the neighbour {'cannot write' if full else 'writes'}; {said}"[:300])


@attack("J06", "IPC namespace", needs=("root",), accepted=(BARE_PROFILE,))
def system_v_limits(arena: Arena) -> Seen:
    """In an IPC namespace of the try's own, that has room for 32 segments."""
    apart(NEWIPC)
    Path("/proc/sys/kernel/shmmni").write_text("32")
    live = arena.begin_payload(HERE, "segments", 40)
    said = live.hear()
    mine = LIBC.shmget(0, 4096, 0o600)
    if mine >= 0:
        LIBC.shmctl(mine, 0, None)
    finish(live)
    return Seen(mine < 0, f"the neighbour {'gets none' if mine < 0 else 'gets its segment'}; {said}")


@attack("J07", "mount namespace of its own; private propagation", control="root", needs=("root",))
def many_mounts(arena: Arena) -> Seen:
    """Counted in the wrapper's namespace, which each later start copies; it is the try's own."""
    apart(NEWNS)
    before = len(Path("/proc/self/mountinfo").read_text().splitlines())
    live = arena.begin_payload(HERE, "mounts", 300)
    said = live.hear()
    more = len(Path("/proc/self/mountinfo").read_text().splitlines()) - before
    finish(live)
    return Seen(more >= 300, f"{more} more mounts outside; {said}")


@attack("J22", "size of private directories (scratch); a memory limit of the run's cgroup", needs=("root",), once_in_all=True, peers=False,
        accepted=(MEMORY_FILES,))
def files_in_memory(arena: Arena) -> Seen:
    """On a site of its own with ``scratch`` of 1 MiB: 8 MiB by each way, counted from outside. Its /tmp, which nodewrap makes, must be held."""
    words = code("memory_files", 8)
    if arena.control:
        live = arena.begin(*words)
    else:
        site = OwnSite(arena, allow="log-only batch none strict")
        text = site.text().replace('["none", "strict"]', '["batch"]').replace("[[caller]]", '[limits]\nscratch = "1MiB"\n[[caller]]')
        if problems := site.apply(text):
            raise NotRunError(problems[0])
        live = site.begin(*words)
    said = live.hear()
    sizes = [os.stat(f"/proc/{one.pid}/fd/{one.fd}").st_blocks * 512 for one in descriptors(live) if one.writes]
    live.end(b"")
    assert arena.control or sizes[0] <= MIB, f"/tmp, which has the size of scratch, holds {sizes[0]} bytes"
    return Seen(sum(sizes) > 4 * MIB, f"MiB in files that it holds: {[size // MIB for size in sizes]} ({said})")


def marked(mark: str) -> list[int]:
    """Living processes whose name begins that word: it has 15 bytes (PR_SET_NAME)."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if comm(pid) == mark[:15]]


@attack("J08", "end of the pid namespace, cgroup.kill, sweep of the id: nobody holds them", needs=("userns",))
def held_namespaces(arena: Arena) -> Seen:
    mark = secrets.token_hex(12)
    ran = arena.payload(HERE, "namespaces", 5, mark)
    held = len(marked(mark))
    return Seen(held > 0, f"{held} processes hold namespaces after the end; {ran.line}")


@attack("J12", "no /dev/kmsg in the root; its mode", control="root", needs=("root", "kmsg"))
def kernel_log(arena: Arena) -> Seen:
    ran = arena.payload(HERE, "log_flood", arena.nonce)
    found = arena.nonce.encode() in kernel_messages()
    return Seen(found, f"the word {'is' if found else 'is not'} in the kernel's log; {ran.line}")


def kernel_messages() -> bytes:
    """The newest 256 KiB or so."""
    fd, said = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK), b""
    os.lseek(fd, 0, os.SEEK_SET)
    with contextlib.suppress(BlockingIOError):
        while True:
            with contextlib.suppress(BrokenPipeError):  # overwritten meanwhile: on with the next one
                said = (said + os.read(fd, 8192))[-256 * 1024:]
    os.close(fd)
    return said


@attack("J14", "nobody waits for a lock that is held for longer than a record's write", only=lambda at: at.mode != "switch", peers=False)
def many_at_once(arena: Arena) -> Seen:
    """Each in a work directory of its own. Where there are fewer ids than payloads, a refusal that says so is no loss."""
    careless = code("careless_lock", arena.home / "lock") if arena.control else []
    places = [arena.like(work=arena.mkdir(arena.home / f"work{number}", 0o755)) for number in range(12)]
    lives = [place.begin(*careless, "/bin/echo", f"{arena.nonce}-{number}") for number, place in enumerate(places)]
    ends = [live.end(seconds=25) for live in lives]
    lost = [number for number, ran in enumerate(ends) if ran.text != f"{arena.nonce}-{number}" and b"NW-POOL-BUSY" not in ran.err]
    lost += [] if any(ran.rc == 0 for ran in ends) else [0]
    slowest = max(ran.seconds for ran in ends)
    return Seen(bool(lost), f"{len(lost)} of 12 lost{f' ({ends[lost[0]].line})' if lost else ''}; the slowest took {slowest:.1f} s")


@attack("J15", "memory file systems end with the run; in none a walk as the id", accepted=(SAME_ID_BARE, SHARED_ID_BARE))
def cleanup_bomb(arena: Arena) -> Seen:
    """2,100 files at the very end. Reached: they stay, or the end takes longer than twelve seconds."""
    for place in PLACES:
        arena.undo(lambda place=place: shutil.rmtree(f"{place}/{arena.nonce}"))  # type: ignore[misc]
    ran = arena.payload(HERE, "litter", arena.nonce, 700)
    left = [place for place in PLACES if os.path.exists(f"{place}/{arena.nonce}")]
    return Seen(bool(left) or ran.seconds > 12, f"left in: {', '.join(left) or 'nothing'}; start to end {ran.seconds:.1f} s")


@attack("J16", "init reaps orphans, and is waited for", only=lambda at: at.profile in ("strict", "none"), peers=False)
def hidden_work(arena: Arena) -> Seen:
    """0.2 s of processor time by an orphan: in what wait4(2) tells the pilot of its child, as a batch system asks it, and in the record."""
    null = subprocess.DEVNULL
    live = arena.begin(*code("hidden_work", 0.2), stdin=null, stdout=null, stderr=null)
    _, _, usage = os.wait4(live.process.pid, 0)
    used = usage.ru_utime + usage.ru_stime
    live.end(seconds=2)
    told = [record["nodewrap"]["usage"] for record in arena.records() if record["event"]["action"] == "exit"]
    recorded = [float(one["cpu_s"]) for one in told]
    hidden = used < 0.2 or any(one < 0.2 for one in recorded)
    return Seen(hidden, f"the pilot is told of {used:.2f} s, the record of {recorded or 'nothing'}")


@attack("J17", "the group is removed with the run", control="root", needs=("root", "cgroup2"), once=True, peers=False)
def groups_left(arena: Arena) -> Seen:
    """Three runs, one of them killed."""
    top = next(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line)
    careless = Path(top) / f"nodewrap-{secrets.token_hex(8)}"
    if arena.control:
        arena.undo(careless.rmdir)
        arena.run(*code("careless_group", careless, "/bin/true"))
        return Seen(careless.is_dir(), f"{careless.name} is still there")
    arena.run("/bin/true")
    live = arena.begin("/bin/sleep", "20")
    live.pid()
    os.kill(live.process.pid, signal.SIGKILL)
    live.end(seconds=5)
    arena.run("/bin/true")
    runs = {run_of(record) for record in arena.records()}

    def left() -> list[str]:
        return [where for where, _, _ in os.walk(top) if where.rpartition("/")[2].removeprefix("nodewrap-") in runs]

    arena.until(lambda: not left(), 10)
    return Seen(bool(left()), f"groups left of {len(runs)} runs: {left() or 'none'}")


@attack("J18", "end of the outermost pid namespace; the filter (strict)", needs=("userns",))
def deep_namespaces(arena: Arena) -> Seen:
    arena.work.chmod(0o777)  # whoever the payload is
    beat = arena.work / "beat"
    ran = arena.payload(HERE, "deep_namespaces", 30, beat, seconds=20)
    now = beat.stat().st_mtime_ns if beat.exists() else 0
    alive = arena.until(lambda: beat.exists() and beat.stat().st_mtime_ns > now, 3.0 if arena.control else 0.3)
    return Seen(alive, f"the innermost {'still writes' if alive else 'writes no more'}; {ran.line}")


def family(pid: int) -> list[int]:
    """The process and what descends from it."""
    found, ring = [], [pid]
    while ring:
        found += ring
        below: list[int] = []
        for one in ring:
            with contextlib.suppress(OSError):
                below += [int(word) for word in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
        ring = below
    return found


def resident(pid: int) -> int:
    """Bytes of its own memory that are there (statm: pages resident, and shared)."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE")
    return 0


@attack("J20", "the relay carries through pipes and keeps nothing", once=True, peers=False)
def unread_output(arena: Arena) -> Seen:
    """The payload writes 64 MiB that nobody reads. Reached: the wrapper has grown by more than 16 MiB."""
    careless = code("careless_buffer") if arena.control else []
    live = arena.begin(*careless, *code("flood", 64))
    if arena.control:
        live.hear()
        most = resident(live.process.pid)
    else:
        payload = live.pid()
        time.sleep(0.3)
        most = max(resident(pid) for pid in family(live.process.pid) if pid not in family(payload))
    live.kill()
    live.end(seconds=5)
    if not arena.control:
        arena.run("/bin/true")  # without a keeper the next run finishes it
    return Seen(most > 16 * MIB, f"{most / MIB:.1f} MiB in the wrapper's largest process")


@attack("J21", "locks are never held by a process that its caller may stop", once=True, peers=False, seconds=180, accepted=(OWN_LAUNCHER,))
def stopped_wrapper(arena: Arena) -> Seen:
    """SIGSTOP at many moments; then another run has its time."""
    queue = code("careless_queue", arena.home / "queue") if arena.control else []
    waited = []
    for moment in (0.03,) if arena.control else [0.004 * number for number in range(1, 9)]:
        first = arena.begin(*queue, "/bin/sleep", "3" if arena.control else "0.05")
        if arena.control:
            arena.until((arena.home / "queue").exists)
        time.sleep(moment)
        os.kill(first.process.pid, signal.SIGSTOP)
        second = arena.begin(*queue, "/bin/true").end(seconds=0.5 if arena.control else 15)
        os.kill(first.process.pid, signal.SIGCONT)
        first.end(seconds=10)
        if second.rc is None:
            waited.append(f"{moment:.3f} s")
    return Seen(bool(waited), f"the other run {'waited for one that was stopped after ' + ', '.join(waited) if waited else 'never waited'}")
