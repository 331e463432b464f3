"""What outlives its processes, and is gone or out of reach all the same when a run has ended.

System V and POSIX IPC, files where everybody may write, kernel keyrings, spools of cron and at, services that would start something later, abstract
sockets. Every profile but ``none`` has namespaces that take these with them; ``none`` is where the launcher cleans (csrc/ipc.c).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.need import need
from tests.node import KINDS, PROFILES, abandon, alive, has_pilots_id, kill, status_of, until
from tests.pki import Pki
from tests.site import ROOT, command

#: Leaves one of each by the name argv[1] with the mode argv[2], and says what it could not leave.
LEAVE = r"""
import ctypes, errno, json, os, socket, sys, time
libc, rt = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("librt.so.1", use_errno=True)
mark, mode = sys.argv[1], int(sys.argv[2], 8)
key, failed = int(mark[-7:], 16), {}
def tell(name, value):
    if value < 0:
        failed[name] = errno.errorcode[ctypes.get_errno()]
def write(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    except OSError as wrong:
        failed[path] = errno.errorcode[wrong.errno]
tell("shm", libc.shmget(key, 4096, 0o1000 | mode))
tell("sem", libc.semget(key, 3, 0o1000 | mode))
queue = libc.msgget(key, 0o1000 | mode)
tell("msg", queue)
if mode:
    tell("msgsnd", libc.msgsnd(queue, b"\1" + bytes(11), 4, 0))
    semaphore = libc.semget(key, 0, 0)
    tell("semop", libc.semctl(semaphore, 1, 16, 1))   # SETVAL
tell("mqueue", rt.mq_open(b"/" + mark.encode(), os.O_RDWR | os.O_CREAT, mode, None))
for path in (f"/dev/shm/{mark}", f"/dev/shm/sem.{mark}", f"/tmp/{mark}", f"/var/tmp/{mark}"):
    write(path)
os.makedirs(f"/tmp/{mark}.d/closed/deep")
os.mkfifo(f"/tmp/{mark}.d/closed/fifo")
os.chmod(f"/tmp/{mark}.d/closed", 0)
daemon = os.fork()
if daemon == 0:
    os.setsid()
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + mark)
    abstract.listen(5)
    for fd in (0, 1, 2):
        os.close(fd)
    time.sleep(60)
print(json.dumps({"failed": failed, "daemon": daemon}))
"""
IPC = ("shm", "sem", "msg", "posix shm", "posix semaphore", "mqueue")
FILES = ("/tmp", "/var/tmp", "/tmp tree")
LIBC, RT = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("librt.so.1", use_errno=True)
RMID = 0
#: keyctl(2) by number; rings: -5 the user session's, -4 the user's.
KEYCTL = r"""
import ctypes, errno, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def answer(value):
    return value if value >= 0 else errno.errorcode[ctypes.get_errno()]
def keyctl(*words):
    return answer(libc.syscall(250, *map(ctypes.c_long, words)))
def add(name, ring):
    return answer(libc.syscall(248, b"user", name, b"secret", 6, ring))
def find(name, ring):
    return answer(libc.syscall(250, 10, ring, b"user", name, 0))
def persistent():
    return keyctl(22, -1, -2)
"""


# ---- looking, from outside ----


def sysv(kind):
    """{key: line} of /proc/sysvipc."""
    lines = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
    return {int(line.split()[0]) & 0xFFFFFFFF: [int(word) for word in line.split()] for line in lines}


def queue_exists(mark):
    queue = RT.mq_open(b"/" + mark.encode(), os.O_RDONLY)
    if queue >= 0:
        os.close(queue)
    return queue >= 0 or ctypes.get_errno() == errno.EACCES


def listens(mark):
    """Somebody has that abstract socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex("\0" + mark) == 0


def end(daemon):
    os.kill(daemon, signal.SIGKILL)
    until(lambda: not alive(daemon), "it is dead, and its socket gone")


def there(mark):
    """What is left of LEAVE's, by name."""
    key = int(mark[-7:], 16)
    found = {kind for kind in ("shm", "sem", "msg") if key in sysv(kind)}
    places = {"posix shm": f"/dev/shm/{mark}", "posix semaphore": f"/dev/shm/sem.{mark}", "/tmp": f"/tmp/{mark}", "/var/tmp": f"/var/tmp/{mark}",
              "/tmp tree": f"/tmp/{mark}.d"}
    found |= {name for name, path in places.items() if os.path.lexists(path)}
    found |= {"mqueue"} if queue_exists(mark) else set()
    return found | ({"abstract socket"} if listens(mark) else set())


def remove(mark):
    """Take back what LEAVE left; as root, or as who ran it."""
    key = int(mark[-7:], 16)
    ends = {"shm": lambda n: LIBC.shmctl(n, RMID, None), "sem": lambda n: LIBC.semctl(n, 0, RMID), "msg": lambda n: LIBC.msgctl(n, RMID, None)}
    for kind, end in ends.items():
        if key in sysv(kind):
            end(sysv(kind)[key][1])
    RT.mq_unlink(b"/" + mark.encode())
    for top in ("/dev/shm", "/tmp", "/var/tmp"):
        for path in Path(top).glob(f"*{mark}*"):
            if path.is_dir():
                subprocess.run(["chmod", "-R", "u+rwx", path], check=True)
                shutil.rmtree(path)
            else:
                path.unlink()


@pytest.fixture
def mark():
    """A new name for what a payload leaves; what is left of it is taken back."""
    names = []

    def new():
        names.append(f"nwipc{os.getpid():08x}{secrets.randbelow(1 << 27) + (1 << 27):07x}")
        return names[-1]

    yield new
    for name in names:
        remove(name)


@pytest.fixture(scope="module")
def queues():
    """POSIX queues can be listed, as on every node with systemd: without privilege the launcher sees them only there. Whether they can."""
    if os.geteuid() != 0:
        yield os.path.ismount("/dev/mqueue")
        return
    with open("/run/lock/nodewrap-test-mqueue", "w") as users:  # several sessions may run at a time
        fcntl.flock(users, fcntl.LOCK_SH)
        ours = not os.path.ismount("/dev/mqueue") or os.path.exists("/run/nodewrap-test-mqueue-mounted")
        if not os.path.ismount("/dev/mqueue"):
            Path("/run/nodewrap-test-mqueue-mounted").touch()
            os.makedirs("/dev/mqueue", exist_ok=True)
            command("mount", "-t", "mqueue", "mqueue", "/dev/mqueue")
        yield True
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if ours:
                command("umount", "/dev/mqueue")
                os.rmdir("/dev/mqueue")
                os.unlink("/run/nodewrap-test-mqueue-mounted")


def cases(profiles):
    return [pytest.param((launcher, kind, profile), id=f"{launcher}-{kind}-{profile}")
            for launcher, kinds in KINDS.items() for kind in kinds for profile in profiles]


def leave(node, kind, profile, mark, mode="600", code=LEAVE, words=()):
    """Result of LEAVE as that payload."""
    ran = node.run(kind, "/usr/bin/python3", "-I", "-c", code, mark, mode, *words, profile=profile)
    assert ran.rc == 0, ran
    assert json.loads(ran.out)["failed"] == {}
    return ran


def node_of(request, launcher, kind):
    if (launcher, kind) == ("userns", "block"):
        request.getfixturevalue("delegated")
    return request.getfixturevalue(f"{launcher}_node")


def own_queues(node, kind, profile, queues):
    """Skip what would leave a queue that neither the launcher nor this user could remove."""
    if not ROOT and not queues and profile == "none" and not has_pilots_id(node, kind):
        pytest.skip("an ordinary user, whose ids of a range make queues that only root sees here")


def cleanup(ran):
    return ran.record("cleanup")["nodewrap"]["cleanup"]


def as_pilot(node, code, *words):
    ran = node.site.run(["/usr/bin/python3", "-I", "-c", code, *words])
    assert ran.rc == 0, ran
    return ran.text


# ---- System V, POSIX, files, sockets ----


def test_all_of_it_is_left_by_a_program_that_nobody_cleans_up_after(userns_node, mark):
    """The control for what follows."""
    name = mark()
    said = json.loads(as_pilot(userns_node, LEAVE, name, "600"))
    try:
        assert said["failed"] == {}
        until(lambda: listens(name), "the socket")
        assert there(name) == {*IPC, *FILES, "abstract socket"}
    finally:
        os.kill(said["daemon"], signal.SIGKILL)


@pytest.mark.parametrize("case", cases(PROFILES))
def test_nothing_of_it_is_left_by_a_payload(request, case, mark, queues):
    """Of files that could be the pilot's own (its id) those in the temporary directories stay, and are counted."""
    launcher, kind, profile = case
    node, name = node_of(request, launcher, kind), mark()
    own_queues(node, kind, profile, queues)
    ran = leave(node, kind, profile, name)
    shared = profile == "none" and has_pilots_id(node, kind)
    blind = profile == "none" and launcher == "userns" and not queues
    assert there(name) == (set(FILES) if shared else set()) | ({"mqueue"} if blind else set())
    counted = cleanup(ran)
    assert counted["left"] == 0
    assert counted["ipc"] == (len(IPC) - blind if profile == "none" else 0)
    assert counted.get("by_lease_time", False) == shared
    assert counted["shared"] >= (3 if shared else 0)
    assert counted["removed"] == (6 if profile == "none" and not shared else 0)


@pytest.mark.parametrize("kind", ["static", "map", "block"])
def test_what_is_closed_to_its_owner_or_given_away_goes_as_well(setuid_node, kind, mark):
    """Mode 0; and System V objects whose owner the payload made the pilot: their creator may remove them (ipc/util.c)."""
    name = mark()
    give = """
import struct
key = int(mark[-7:], 16)
for get, control, size, at in ((lambda: libc.shmget(key, 0, 0), libc.shmctl, 112, 4), (lambda: libc.msgget(key, 0), libc.msgctl, 120, 4)):
    buffer = ctypes.create_string_buffer(size)
    tell("stat", control(get(), 2, buffer))
    struct.pack_into("I", buffer, at, int(sys.argv[3]))
    tell("set", control(get(), 1, buffer))
assert not failed, failed
"""
    assert cleanup(leave(setuid_node, kind, "none", name, mode="000"))["ipc"] == len(IPC)
    assert there(name) == set()
    name, pilot = mark(), setuid_node.pilot.uid
    taker = pilot if kind == "static" else 0  # a user namespace can name only its own ids: for a map the owner stays in it
    ran = leave(setuid_node, kind, "none", name, code=LEAVE + give, words=[str(taker if kind == "static" else 1000)])
    assert (cleanup(ran)["ipc"], there(name)) == (len(IPC), set())


@pytest.mark.parametrize("kind", ["static", "map", "log-only"])
def test_things_of_others_stay(setuid_node, kind, mark):
    """Made during the run, by another account."""
    name = mark()
    live = setuid_node.start(kind, "/bin/sh", "-c", "read x", profile="none")
    made = setuid_node.site.run(["/usr/bin/python3", "-I", "-c", LEAVE, name, "666"], user=setuid_node.site.accounts["user2"])
    end(json.loads(made.out)["daemon"])
    live.end(b"\n")
    assert there(name) == {*IPC, *FILES}


def test_account_that_runs_share_is_cleaned_of_what_can_be_told_to_be_theirs(setuid_node, mark):
    """Mode switch with lease = "shared": by time, like an id of the pilot's."""
    node, name = setuid_node, mark()
    node.site.policy(node.policy_text(kinds=["static"]).replace('lease = "exclusive"', 'lease = "shared"'))
    try:
        counted = cleanup(leave(node, "static", "none", name))
    finally:
        node.open_policy()
    assert (counted["ipc"], counted["by_lease_time"], there(name)) == (len(IPC), True, set(FILES))


def test_work_directory_in_tmp_that_could_not_be_taken_back_is_not_taken_for_the_payloads(setuid_node, mark):
    """Who walks it is killed, twice, so that it is still the payload's when what the payload left is removed. The pilot's results are in it."""
    node, top, uid = setuid_node, Path(f"/tmp/{mark()}"), setuid_node.site.accounts["user1"].uid
    top.mkdir()
    os.chown(top, node.pilot.uid, node.pilot.gid)
    script = "seq 20000 | xargs touch; mkdir d; echo result >d/file; read x"
    live = node.start("static", "/bin/sh", "-c", script, profile="none", options=["--workdir", str(top)])
    until((top / "d/file").exists, "the result", 60)
    keeper = int(status_of(live.pid)["PPid"][0])
    keeper = int(status_of(keeper)["PPid"][0])
    try:
        live.process.stdin.write(b"\n")
        live.process.stdin.flush()
        killed = set()
        until(lambda: len(killed) == 2 or killed.update(kill_walker(keeper, uid, top)), "two walkers", 60)
        live.end()
        assert (top / "d/file").read_text() == "result\n"
    finally:
        node.forget()
        shutil.rmtree(top)


def kill_walker(keeper, uid, top):
    """Kill the child of the keeper's that uses files as the payload and has opened top once more than the keeper -> {its pid}, when there is one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()):
            held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            if int(status_of(pid)["Uid"][3]) == uid and held.count(str(top)) > 1:
                os.kill(pid, signal.SIGKILL)
                return {pid}
    return set()


def watched(node, kind, top):
    """(live, uid of the payload, pid of who removes its files): so many that it can be watched."""
    code = """
import os, sys
os.mkdir(sys.argv[1])
for n in range(40000):
    os.mknod(f'{sys.argv[1]}/{n}')
print('made', flush=True)
sys.stdin.read()
"""
    if kind == "log-only":  # nothing of a temporary directory is removed
        code = code.replace("os.mkdir(sys.argv[1])\n", "sys.argv[1] = '/dev/shm'\n").replace("{n}", f"{top.name}{{n}}")
    live = node.start(kind, "/usr/bin/python3", "-I", "-c", code, top, profile="none")
    assert live.process.stdout.readline() == b"made\n"
    uid, where = os.stat(f"/proc/{live.pid}").st_uid, "/dev/shm" if kind == "log-only" else str(top)
    known = set(node.launchers())
    live.process.stdin.close()

    def cleaner():
        for pid in set(node.launchers()) - known:
            with contextlib.suppress(OSError):
                if where in [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]:
                    os.kill(pid, signal.SIGSTOP)
                    return pid
        return None

    return live, uid, until(cleaner, "who cleans")


@pytest.mark.parametrize("case", [("setuid", "static"), ("setuid", "map"), ("setuid", "log-only"), ("userns", "block")], ids="-".join)
def test_who_removes_has_the_payloads_rights_and_no_capability(request, case, mark):
    """I8."""
    need("root")
    node, top = node_of(request, *case), Path(f"/tmp/{mark()}")
    live, uid, pid = watched(node, case[1], top)
    status = status_of(pid)
    os.kill(pid, signal.SIGCONT)
    ids = ["0", str(uid)] * 2 if case == ("setuid", "log-only") else [str(uid)] * 4  # the pilot, whose id it is too, may not signal it
    assert (status["Uid"], status["Gid"], int(status["CapPrm"][0], 16)) == (ids, ids, 0)
    assert live.process.wait(30) == 0
    assert not top.exists()


def test_who_removes_dies_with_its_launcher_and_a_sweep_goes_on(userns_node, delegated, mark):
    """It would outlive the lease, and remove what the next tenant of the ids has."""
    top = Path(f"/tmp/{mark()}")
    live, _, pid = watched(userns_node, "block", top)
    kill(live.process)
    until(lambda: not alive(pid), "its end, though it was stopped")
    assert len(os.listdir(top)) > 0
    code, reports, _ = userns_node.sweep()
    assert (code, [report["state"] for report in reports]) == (0, ["swept"])
    assert not top.exists()


SWEPT = [("setuid", "static"), ("setuid", "map"), ("setuid", "block"), ("userns", "block"), ("setuid", "log-only"), ("userns", "map")]


@pytest.mark.parametrize("case", SWEPT, ids="-".join)
@pytest.mark.parametrize("profile", ["batch", "none"])
def test_sweep_removes_what_a_dead_run_left_and_nothing_of_a_shared_id(request, case, profile, mark, queues):
    """With the id leased it knows whose all of it is. When the run died it does not know, so of a shared id nothing can be told to be the run's."""
    node, name = node_of(request, *case), mark()
    own_queues(node, case[1], profile, queues)
    live = node.start(case[1], "/usr/bin/python3", "-I", "-c", f"{LEAVE}\nsys.stdout.flush()\ntime.sleep(60)", name, "600", profile=profile)
    assert json.loads(live.process.stdout.readline())["failed"] == {}
    abandon(node, live)
    if profile == "none":
        assert there(name) - {"abstract socket"} == {*IPC, *FILES}
    before = node.site.audit_size()
    code, reports, _ = node.sweep()
    assert (code, [report["state"] for report in reports]) == (0, ["swept"])
    shared = has_pilots_id(node, case[1])
    assert there(name) == ({*IPC, *FILES} if shared and profile == "none" else set())
    counted = next(record for record in node.site.records(before) if record["event"]["action"] == "cleanup")["nodewrap"]["cleanup"]
    assert (counted["left"], counted["ipc"]) == (0, len(IPC) if profile == "none" and not shared else 0)
    assert (counted["shared"], "by_lease_time" in counted) == (0, False), "not even counted: it may be anybody's"


def test_target_proxy_that_glexec_was_asked_to_leave_stays(setuid_node, home, session, mark):
    """GLEXEC_TARGET_PROXY: for the next call. What lies beside it goes."""
    need("root", "voms-proxy-fake")
    node, name, pki = setuid_node, mark(), Pki(session.top / f"pki-ipc-{secrets.token_hex(3)}")
    proxy = home / "proxy.pem"
    proxy.write_bytes(pki.proxy().read_bytes())
    proxy.chmod(0o600)
    os.chown(proxy, node.pilot.uid, node.pilot.gid)
    node.open_guard(ca_dir=str(pki.ca_dir), voms_dir=str(pki.voms_dir))
    text = node.policy_text(kinds=["static"], assurance="credential").replace('vo = "static"', 'vo = "testvo"')
    node.site.policy(text.replace('["none", "compat", "batch", "strict"]', '["none"]'))
    target = Path(f"/tmp/{name}.d/proxy")
    script = f"cat $X509_USER_PROXY; touch /tmp/{name} /tmp/{name}.d/x"
    try:
        target.parent.mkdir()
        os.chown(target.parent, *2 * [node.site.accounts["user1"].uid])
        env = {"GLEXEC_CLIENT_CERT": str(proxy), "GLEXEC_TARGET_PROXY": str(target)}
        ran = node.site.run([node.site.prefix / "bin/glexec", "/bin/sh", "-c", script], env=env)
        assert (ran.rc, ran.out, ran.record("start")["nodewrap"]["profile"]) == (0, proxy.read_bytes(), "none"), ran
        assert [path.name for path in target.parent.iterdir()] == ["proxy"]
        assert target.read_bytes() == proxy.read_bytes()
        assert not os.path.exists(f"/tmp/{name}")
        assert (cleanup(ran)["removed"], cleanup(ran)["left"]) == (2, 0)
    finally:
        node.open_policy()


# ---- an id that the run shares with its pilot: told by time (log-only, map of one id without privilege) ----

SHARED = [("setuid", "log-only"), ("userns", "log-only"), ("userns", "map")]


@pytest.fixture(params=SHARED, ids="-".join)
def shared(request):
    """(node, kind) of a payload with its pilot's id."""
    node, kind = node_of(request, *request.param), request.param[1]
    if not has_pilots_id(node, kind):
        pytest.skip("the pilot has a range of ids in /etc/subuid, so mode map has one of these")
    return node, kind


def test_what_the_pilot_made_before_the_run_stays(shared, mark):
    """Even in the same second, by a program that has ended since, used by nobody."""
    node, kind = shared
    name = mark()
    made = json.loads(as_pilot(node, LEAVE, name, "600"))
    end(made["daemon"])
    ran = node.run(kind, "/bin/true", profile="none")
    assert there(name) == {*IPC, *FILES}
    assert cleanup(ran)["ipc"] == 0


def test_queue_that_the_pilot_made_just_before_the_run_stays(shared, mark):
    """Queues tell whole seconds. Nothing else of that second is there."""
    node, kind = shared
    name = mark()
    as_pilot(node, "import ctypes, sys\nassert ctypes.CDLL('librt.so.1').mq_open(b'/' + sys.argv[1].encode(), 0o102, 0o600, None) >= 0", name)
    node.run(kind, "/bin/true", profile="none")
    assert there(name) == {"mqueue"}


def test_what_the_pilot_goes_on_using_stays_and_is_counted(shared, mark, queues):
    """Made during the run: attached, open, or last used by a living process."""
    node, kind = shared
    name = mark()
    holder = LEAVE.split("daemon = ")[0] + """
assert not failed, failed
libc.shmat.restype = ctypes.c_void_p
libc.shmat(libc.shmget(key, 0, 0), None, 0)
held = [open(f"/dev/shm/{name}") for name in (mark, f"sem.{mark}")]
print("holds", flush=True)
sys.stdin.read()
"""
    live = node.start(kind, "/bin/sh", "-c", "read x", profile="none")
    process = node.site.start(["/usr/bin/python3", "-I", "-c", holder, name, "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"holds\n"
        before = node.site.audit_size()
        live.end(b"\n")
        assert there(name) == {*IPC, *FILES}
        counted = next(record for record in node.site.records(before) if record["event"]["action"] == "cleanup")["nodewrap"]["cleanup"]
        assert (counted["ipc"], counted["by_lease_time"]) == (0, True)
        assert counted["shared"] >= len(IPC) + len(FILES) - (not queues and not node.privileged)
    finally:
        kill(process)
        process.stdin.close()
        process.stdout.close()


def test_what_another_run_of_the_same_id_may_need_stays_until_the_last_has_ended(shared, mark, queues):
    node, kind = shared
    names = [mark(), mark()]
    first = node.start(kind, "/bin/sh", "-c", "read x", profile="none")
    assert cleanup(leave(node, kind, "none", names[0]))["ipc"] == 0
    second = node.start(kind, "/bin/sh", "-c", "read x", profile="none")
    first.end(b"\n")
    assert cleanup(leave(node, kind, "none", names[1]))["ipc"] == 0
    assert [there(name) for name in names] == [{*IPC, *FILES}] * 2
    second.end(b"\n")
    assert [there(name) - ({"mqueue"} if not queues else set()) for name in names] == [set(FILES)] * 2


# ---- keyrings ----

ADD_KEYS = KEYCTL + """
ring = persistent()
assert all(isinstance(add(b"nwkey", one), int) for one in (-5, -4, ring)), ring
"""
FIND_KEYS = KEYCTL + """
ring = persistent()
print(json.dumps([find(b"nwkey", one) for one in (-5, -4, ring)] + [add(b"nwmine", -4), find(b"nwmine", -5)]))
"""


def python(node, kind, code):
    ran = node.run(kind, "/usr/bin/python3", "-I", "-c", code, profile="none")
    assert (ran.rc, ran.err) == (0, b""), ran
    return ran


@pytest.mark.parametrize("kind", ["static", "map", "block"])
def test_next_tenant_of_an_id_finds_no_key(setuid_node, kind):
    """In the user's, the user session's and the persistent keyring; and it can use them. (A user namespace has its own, which end with it.)"""
    left = python(setuid_node, kind, ADD_KEYS)
    found = python(setuid_node, kind, FIND_KEYS)
    assert left.record("start")["user"]["id"] == found.record("start")["user"]["id"], "this test is about the same id"
    *keys, added, linked = json.loads(found.out)
    assert keys == ["ENOKEY"] * 3
    assert isinstance(added, int), added
    assert linked == added, "the session's keyring leads to the user's, as the kernel makes it"
    assert cleanup(left)["keyrings"] == (3 if kind == "static" else 0)
    assert cleanup(left)["left"] == 0


def test_keys_of_an_account_outlive_a_program_that_nobody_cleans_up_after(setuid_node):
    """The control. Afterwards a run under that account takes them away: what is the id's is the run's."""
    user = setuid_node.site.accounts["user1"]
    for code in (ADD_KEYS, FIND_KEYS):
        bare = setuid_node.site.run(["/usr/bin/python3", "-I", "-c", code], user=user)
        assert bare.rc == 0, bare
    assert all(isinstance(key, int) for key in json.loads(bare.out)[:3])
    setuid_node.run("static", "/bin/true", profile="none")
    assert json.loads(setuid_node.site.run(["/usr/bin/python3", "-I", "-c", FIND_KEYS], user=user).out)[:3] == ["ENOKEY"] * 3


def test_keyring_that_the_payload_closed_to_writing_is_made_anew(setuid_node):
    """Without write and setattr it can be neither cleared nor opened again; with search it can be invalidated."""
    closed = KEYCTL + "assert isinstance(add(b'nwkey', -4), int)\nassert keyctl(5, -4, 0x1b1b0000) == 0"
    assert cleanup(python(setuid_node, "static", closed))["left"] == 0

    def found():
        *keys, added, _ = json.loads(python(setuid_node, "static", FIND_KEYS).out)
        assert keys[1] == "ENOKEY"
        return isinstance(added, int)

    until(found, "a new keyring", 30)


@pytest.mark.parametrize("kind", ["log-only"])
def test_pilots_keys_stay_when_the_payload_has_its_id(node, kind):
    add = KEYCTL + "assert isinstance(add(sys.argv[1].encode(), -4), int)"
    find = KEYCTL + "ring = keyctl(0, -4, 0)\nkey = find(sys.argv[1].encode(), -4)\nprint(key, keyctl(9, key, ring) if isinstance(key, int) else '')"
    name = f"nwpilot{secrets.token_hex(4)}"
    as_pilot(node, add, name)
    python(node, kind, "pass")
    assert as_pilot(node, find, name).split()[0].isdigit()


# ---- what would start something later: cron, at, services ----

SPOOLER = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
/* Stands for crontab(1) and at(1): setgid, and writes into a spool that only its group may write to. */
int main(int argc, char **argv) {
	printf("%d %d\n", (int)getegid(), open(argv[argc - 1], O_CREAT | O_EXCL | O_WRONLY, 0600) >= 0);
	return 0;
}
"""


@pytest.fixture
def spool(session, tmp_path):
    """(program, its spool, its group) as distributions install crontab."""
    need("root", "gcc")
    top, group = session.top / f"spool-{secrets.token_hex(3)}", session.accounts["user2"].gid
    top.mkdir(mode=0o755)
    (tmp_path / "spooler.c").write_text(SPOOLER)
    command("gcc", "-o", top / "spooler", tmp_path / "spooler.c")
    (top / "crontabs").mkdir()
    for path, mode in ((top / "spooler", 0o2755), (top / "crontabs", 0o1730)):
        os.chown(path, 0, group)
        path.chmod(mode)
    return top / "spooler", top / "crontabs", group


@pytest.mark.parametrize("case", cases(("batch", "compat", "none")))  # strict does not show /opt, where the tests' programs are
def test_payload_cannot_write_into_a_spool_of_cron(request, case, spool):
    """no_new_privs: a set-id program gives nothing."""
    launcher, kind, profile = case
    program, crontabs, group = spool
    node = node_of(request, launcher, kind)
    ran = node.run(kind, program, crontabs / kind, profile=profile)
    egid, wrote = ran.text.split()
    assert (int(egid) == group, wrote) == (False, "0"), ran
    assert list(crontabs.iterdir()) == []


def test_anybody_else_can(userns_node, spool):
    """The control."""
    program, crontabs, group = spool
    ran = userns_node.site.run([program, crontabs / "pilot"])
    assert ran.text.split() == [str(group), "1"]
    assert [path.name for path in crontabs.iterdir()] == ["pilot"]


@pytest.mark.parametrize("case", [case for case in cases(PROFILES) if case.values[0][1] in ("static", "log-only")])
def test_system_bus_can_be_reached_in_profile_none_only(request, case):
    """By it logind would be asked to let a user's services linger, and systemd to start some (SECURITY.md)."""
    need("root")
    launcher, kind, profile = case
    node = node_of(request, launcher, kind)
    path = Path(f"/run/dbus/nw-{secrets.token_hex(4)}")
    path.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(str(path))
        path.chmod(0o666)
        bus.listen()
        code = "import socket, sys\nprint(socket.socket(socket.AF_UNIX).connect_ex(sys.argv[1]))"
        try:
            ran = node.run(kind, "/usr/bin/python3", "-I", "-c", code, path, profile=profile)
        finally:
            path.unlink()
    assert ran.text.split() == ["0" if profile == "none" else str(errno.ENOENT)], ran


# ---- what the cleaning relies on ----


@pytest.mark.parametrize("launcher", ["setuid", "userns"])
def test_payload_has_no_other_id_of_its_block(request, launcher):
    """So its own id is all there is to look for: no capability in its user namespace, and a namespace of its own maps itself alone."""
    code = r"""
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *words):
    return errno.errorcode[ctypes.get_errno()] if function(*words) < 0 else "ok"
def write(path, text):
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as wrong:
        return errno.errorcode[wrong.errno]
    return "ok"
uid, tries = os.getuid(), [call(libc.setuid, 0), call(libc.setresuid, 1001, 1001, 1001), call(libc.setfsuid, 1001) and libc.setfsuid(-1)]
child = libc.unshare(0x10000000)
tries += [child, write("/proc/self/uid_map", "0 0 65536"), write("/proc/self/uid_map", f"0 {uid} 2"), write("/proc/self/uid_map", "0 1001 1")]
print(json.dumps(tries))
"""
    node = node_of(request, launcher, "block")
    assert node.python("block", code, profile="none") == ["EPERM", "EPERM", 1000, 0, "EPERM", "EPERM", "EPERM"]
