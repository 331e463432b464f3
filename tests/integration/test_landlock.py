"""Landlock as a second wall: what a payload may still do, and what it may not even where the built root would let it."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from nodewrap.doctor.probe import landlock_abi
from tests.node import CALL

OWN = """
[profile.strict]
landlock = {walls}
tcp_bind = {bind}
tcp_connect = {connect}

[profile.batch]
landlock = ["abstract?", "tcp"]
tcp_bind = [0]
tcp_connect = [{port}]
"""
#: Everything that payloads do with files, in every place that is theirs.
WORK = CALL + r"""
import errno, json, mmap, os, socket, subprocess, tempfile
def everything(top):
    os.makedirs(f"{top}/a/b"), os.makedirs(f"{top}/c")
    open(f"{top}/a/b/f", "w").write("x")
    os.rename(f"{top}/a/b/f", f"{top}/c/f"), os.link(f"{top}/c/f", f"{top}/a/g"), os.symlink("c/f", f"{top}/l"), os.mkfifo(f"{top}/p")
    os.truncate(f"{top}/c/f", 0), open(f"{top}/l").close()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{top}/s")
    with open(f"{top}/run", "w") as file:
        file.write("#!/bin/sh\nexit 3\n")
    os.chmod(f"{top}/run", 0o700)
    assert subprocess.call([f"{top}/run"]) == 3
    with tempfile.TemporaryFile(dir=top) as file:
        file.truncate(4096), mmap.mmap(file.fileno(), 4096)
    subprocess.check_call(["rm", "-rf", f"{top}/a", f"{top}/c"])
def dev():
    for name in ("null", "zero", "full"):
        open(f"/dev/{name}", "r+b").close()
    open("/dev/null", "w").close()
    master, slave = os.openpty()
    os.write(slave, b"x"), os.ttyname(slave), os.close(os.open(os.ttyname(slave), os.O_RDWR))
places = ["/tmp", "/var/tmp", "/dev/shm"] + ([os.environ["WORK"]] if "WORK" in os.environ else [])
found = {place: call(everything, place) for place in places}
found["dev"] = call(dev)
found["proc"] = [call(lambda: open("/proc/self/comm", "w").write("me")), call(lambda: open("/proc/self/oom_score_adj", "w").write("500"))]
found["read only"] = [call(open, path, "w") for path in ("/usr/x", "/etc/passwd", "/x", "/dev/x")]
script = "echo out >/dev/stdout; echo err >/dev/stderr; cat /dev/stdin; ls / /usr >/dev/null"
found["shell"] = subprocess.run(script, shell=True, capture_output=True, input=b"in").stdout.decode()
found["ptrace"] = subprocess.run(["/bin/sh", "-c", "sleep 5 & cat /proc/$!/environ >/dev/null && kill $!"], capture_output=True).returncode
print(json.dumps(found))
"""
#: A descriptor of a directory outside, which the built root alone would not contain: it comes in over a socket that was left in the work directory.
RECEIVE = CALL + r"""
import array, errno, json, os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(os.environ["WORK"] + "/meet")
message = sock.recvmsg(1, socket.CMSG_SPACE(4))
fd = array.array("i", message[1][0][2])[0]
print(json.dumps([call(os.open, "secret", os.O_RDONLY, dir_fd=fd), call(os.open, "new", os.O_WRONLY | os.O_CREAT, dir_fd=fd)]))
"""
PORTS = CALL + r"""
import ctypes, errno, json, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def connect(port, kind=0):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, kind) as sock:
        sock.connect(("127.0.0.1", port))
def fast_open(port):
    with socket.socket() as sock:
        sock.sendto(b"x", 0x20000000, ("127.0.0.1", port))
def bind(port):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port)), sock.listen()
allowed, closed, free = map(int, sys.argv[1:])
print(json.dumps({
    "allowed": call(connect, allowed), "closed": call(connect, closed), "mptcp": call(connect, closed, 262), "fast open": call(fast_open, closed),
    "bind any": call(bind, 0), "bind": call(bind, free), "udp": call(socket.socket(type=socket.SOCK_DGRAM).connect, ("127.0.0.1", closed)),
}))
"""
needs_landlock = pytest.mark.skipif(landlock_abi() < 6, reason=f"needs Landlock ABI 6, this kernel has {landlock_abi()}")


@pytest.fixture
def work(node, home):
    path = home / "walled"
    path.mkdir()
    os.chown(path, node.pilot.uid, node.pilot.gid)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


def apply(node, walls='["files", "signals"]', bind="[]", connect="[]", port=1):
    node.site.policy(node.policy_text() + OWN.format(walls=walls, bind=bind, connect=connect, port=port))


@pytest.fixture
def walled(node):
    yield node
    node.open_policy()


@needs_landlock
@pytest.mark.parametrize("kind", ["map", "log-only"])
def test_payloads_work_as_before_in_all_places_that_are_theirs(node, work, kind):
    """Of the shipped profile, which has "files?"."""
    found = node.python(kind, WORK, profile="strict", options=["--workdir", work, "--env", f"WORK={work}"])
    places = ["/tmp", "/var/tmp", "/dev/shm", str(work), "dev"]
    assert {place: found[place] for place in places} == dict.fromkeys(places, "ok")
    assert found["proc"] == ["ok", "ok"]
    assert set(found["read only"]) <= {"EROFS", "EACCES", "EISDIR"}
    assert found["shell"] == "out\nin"
    assert found["ptrace"] == 0


@needs_landlock
def test_what_was_given_as_stdio_can_be_opened_again_by_its_name_in_dev(node, work):
    """Files come through pipes; /dev/null and named pipes are the pilot's own."""
    os.mkfifo(work / "pipe")
    os.chmod(work / "pipe", 0o666)
    script = "cat /dev/stdin && echo x >/dev/stdout && echo said >/dev/stderr"
    end = os.open(work / "pipe", os.O_RDWR)
    with open(os.devnull, "r+") as null, open(work / "pipe", "w") as stderr:
        process = node.site.start(node.argv("log-only", ["/bin/sh", "-c", script], "strict"), stdin=null, stdout=null, stderr=stderr)
        assert process.wait(30) == 0
    assert os.read(end, 100) == b"said\n"
    os.close(end)


@needs_landlock
@pytest.mark.parametrize(("walls", "answer"), [('["files"]', ["EACCES", "EACCES"]), ("[]", ["ok", "ok"])])
def test_a_directory_that_came_in_by_descriptor_is_closed_by_the_second_wall(walled, work, home, walls, answer):
    apply(walled, walls)
    outside = home / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("x")
    os.chmod(outside, 0o777)
    os.chmod(outside / "secret", 0o666)
    fd = os.open(outside, os.O_RDONLY | os.O_DIRECTORY)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(work / "meet"))
    os.chmod(work / "meet", 0o777)
    os.chown(work / "meet", walled.pilot.uid, walled.pilot.gid)
    server.listen()
    try:
        options = ["--workdir", work, "--env", f"WORK={work}"]
        live = walled.start("log-only", "/usr/bin/python3", "-I", "-c", RECEIVE, profile="strict", options=options)
        server.settimeout(20)
        peer, _ = server.accept()
        socket.send_fds(peer, [b"x"], [fd])
        code, out, err = live.end()
        assert (code, err) == (0, b"")
        assert out.decode().strip() == str(answer).replace("'", '"')
        peer.close()
    finally:
        server.close()
        os.close(fd)
        subprocess.run(["rm", "-rf", outside], check=True)


@needs_landlock
def test_tcp_ports_are_those_of_the_list_by_every_way_to_connect(walled):
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = [server.getsockname()[1] for server in (allowed, closed)]
        with socket.create_server(("127.0.0.1", 0)) as other:
            free = other.getsockname()[1]
        apply(walled, port=ports[0])
        found = walled.python("log-only", PORTS, *map(str, (*ports, free)), profile="batch")
        closed.settimeout(0.2)
        with pytest.raises(TimeoutError):
            closed.accept()
    assert found == {"allowed": "ok", "closed": "EACCES", "mptcp": "EPROTONOSUPPORT", "fast open": "ENOTSUP", "bind any": "ok", "bind": "EACCES",
                     "udp": "ok"}


@needs_landlock
def test_ports_leave_nested_containers_alone(walled):
    apply(walled)
    ran = walled.run("log-only", "unshare", "-Urpf", "--mount-proc", "/bin/sh", "-c", "mount -t tmpfs none /tmp && echo $$", profile="batch")
    assert (ran.rc, ran.out) == (0, b"1\n")


def test_files_with_nested_containers_are_refused_at_apply_with_the_reason(walled):
    with pytest.raises(RuntimeError, match="nested containers need"):
        walled.site.policy(walled.policy_text() + '[profile.batch]\nlandlock = ["files"]\n')


#: The kernel's answers without Landlock, or with an older one: the launcher's first question is answered by a filter of the pilot's around it.
OLDER = """
import ctypes, os, struct, sys
sys.path.insert(0, sys.argv[1])
from nodewrap.doctor.probe import load_filter
import pyseccomp as sc, tempfile
bpf = sc.SyscallFilter(sc.ALLOW)
bpf.add_rule(sc.ERRNO(38), 444)
with tempfile.TemporaryFile() as file:
    bpf.export_bpf(file); file.seek(0); load_filter(file.read())
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize(("walls", "code", "degraded"), [
    ('["files?", "signals?"]', 0, ["landlock-files", "landlock-signals"]), ('["files"]', 202, []), ('["abstract"]', 0, []),
])
def test_a_kernel_without_it_is_refused_or_recorded_as_the_profile_says(userns_node, walls, code, degraded):
    node = userns_node
    apply(node, walls)
    try:
        argv = node.argv("log-only", ["/bin/true"], "strict")
        checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        ran = node.site.run([node.site.prefix / "lib/nodewrap/venv/bin/python3", "-c", OLDER, checkout, *argv])
    finally:
        node.open_policy()
    assert (ran.rc, b"NW-MISSING" in ran.err) == (code, code != 0), ran
    found = [what for record in ran.records for what in record.get("nodewrap", {}).get("degrade", []) if "landlock" in what]
    assert sorted(set(found)) == degraded
