"""How a run ends and what passes through it: exit codes, signals, time, the pilot's death, stdio to the byte (I14, I15)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.need import need
from tests.node import alive, kill, promised, status_of, until

WAIT = ("/bin/sh", "-c", "read x")
#: Every signal that ends a process by default. 32 and 33 are the C library's own.
DEADLY = [n for n in range(1, 65) if n not in (17, 18, 19, 20, 21, 22, 23, 28, 32, 33)]
CASES = [
    ("setuid", "static", "batch"), ("setuid", "map", "strict"), ("setuid", "log-only", "none"),
    ("userns", "map", "batch"), ("userns", "log-only", "none"),
]
PATTERN = bytes(range(256)) * 80 * 1024  # 20 MiB, every byte


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    """run(*command, **options): as the payload of that case; with .node, .kind, .profile."""
    launcher, kind, profile = request.param
    node = request.getfixturevalue(f"{launcher}_node")

    class Case:
        def run(self, *command, **more):
            return node.run(kind, *command, profile=profile, **more)

        def start(self, *command, **more):
            return node.start(kind, *command, profile=profile, **more)

    made = Case()
    made.node, made.kind, made.profile = node, kind, profile
    return made


def python(code, *words):
    return ("/usr/bin/python3", "-I", "-c", code, *words)


# ---- exit codes ----


def exit_codes(node, kind, codes):
    """{code: what nodewrap returned}, eight at a time: a start is mostly waiting."""
    got, waiting = {}, list(codes)
    while waiting:
        batch = [waiting.pop() for _ in range(min(8, len(waiting)))]
        started = [(code, node.site.start(node.argv(kind, ["/bin/sh", "-c", f"exit {code}"]), stderr=subprocess.PIPE)) for code in batch]
        for code, process in started:
            _, err = process.communicate(timeout=60)
            got[code] = (process.returncode, err)
    return got


@pytest.mark.parametrize(("launcher", "codes"), [("setuid", range(256)), ("userns", [0, 1, 42, 127, *range(199, 207), 255])])
def test_every_exit_code_arrives_unchanged_but_the_reserved_ones_as_204(request, launcher, codes):
    node = request.getfixturevalue(f"{launcher}_node")
    assert exit_codes(node, "map", codes) == {code: (204 if 201 <= code <= 204 else code, b"") for code in codes}


def test_every_deadly_signal_arrives_as_128_plus_its_number(setuid_node, userns_node):
    code = "import os, signal, sys\nos.kill(os.getpid(), int(sys.argv[1]))\nsignal.pause()"
    # Python itself ignores SIGPIPE and SIGXFSZ and catches SIGINT; the shell leaves them as they are.
    for node, kind in ((setuid_node, "map"), (userns_node, "map")):
        for number in DEADLY if node.privileged else (1, 9, 13, 15):
            command = ("/bin/sh", "-c", f"kill -{number} $$; sleep 5") if number in (2, 13, 25) else python(code, str(number))
            ran = node.run(kind, *command)
            assert (ran.rc, ran.err) == (128 + number, b""), (number, ran)
            assert ran.record("exit")["process"]["signal"] == number


def test_payload_can_signal_itself_by_raise_and_kill(case):
    """pid 1 of a namespace would ignore both (pid_namespaces(7))."""
    assert case.run(*python("import signal; signal.raise_signal(signal.SIGTERM); print('survived')")).rc == 143
    assert case.run("/bin/sh", "-c", "kill -9 $$; echo survived").rc == 137


ORPHAN = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(0.05)
        os._exit(99)
    os._exit(98)
os.wait()
time.sleep(0.15)
os._exit(7)
"""


def test_exit_code_of_an_orphan_is_never_the_payloads(case):
    ran = case.run(*python(ORPHAN))
    assert ran.rc == 7
    assert ran.record("exit")["process"]["exit_code"] == 7


def test_command_that_is_not_there_is_127_and_one_that_cannot_be_executed_126(case):
    for command, code in (("/nonexistent/command", 127), ("no-such-command-at-all", 127), ("/etc/passwd", 126), ("/usr", 126)):
        ran = case.run(command)
        assert ran.rc == code, (command, ran)
        assert ran.err.startswith(b"nodewrap: NW-EXEC: cannot execute " + command.encode()), ran
        assert ran.err.count(b"\n") == 1


# ---- signals ----


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM", "SIGWINCH", "SIGRTMIN"])
def test_signals_to_the_launcher_reach_the_payload(case, name):
    number = getattr(signal, name)
    code = (
        f"import os, signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\nprint('ready', flush=True)\n"
        f"print(int(signal.sigwait([{int(number)}])), flush=True)"
    )
    live = case.start(*python(code))
    assert live.process.stdout.readline() == b"ready\n"
    # As the pilot itself: it may signal the launcher, whose real uid is its own (kill(2)).
    pilot = case.node.pilot
    ids = {"user": pilot.uid, "group": pilot.gid, "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run(["/usr/bin/python3", "-c", f"import os; os.kill({live.process.pid}, {int(number)})"], check=True, **ids)
    rc, out, err = live.end()
    assert (rc, out, err) == (0, f"{int(number)}\n".encode(), b"")


def test_payload_that_dies_of_a_forwarded_signal_is_told_as_such(case):
    live = case.start(*WAIT)
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(10) == 143  # before its stdin is closed, which would end it too
    live.end()
    assert live.events[-1]["event"] == "exited"


def test_callers_blocked_and_ignored_signals_do_not_reach_the_payload(case):
    # /bin/grep: Python ignores SIGPIPE and SIGXFSZ by itself.
    command = ("/bin/grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    argv = [os.fspath(word) for word in case.node.argv(case.kind, command, case.profile)]
    wrapper = (
        "import os, signal\nfor n in range(1, 65):\n    if n not in (9, 19, 32, 33):\n        signal.signal(n, signal.SIG_IGN)\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nos.execv({argv[0]!r}, {argv!r})"
    )
    ran = case.node.site.run(python(wrapper))
    assert ran.rc == 0, ran
    # 32 and 33 too, which glibc keeps for itself: its posix_spawn(3), which GNU make uses, starts everything with them ignored.
    assert [int(line.split()[1], 16) for line in ran.text.splitlines()] == [0, 0], ran


def test_blocked_signals_of_the_caller_do_not_make_the_launcher_deaf(case):
    argv = [os.fspath(word) for word in case.node.argv(case.kind, WAIT, case.profile)]
    wrapper = f"import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nos.execv({argv[0]!r}, {argv!r})"
    process = case.node.site.start(python(wrapper), stdin=subprocess.PIPE)
    until(lambda: case.node.site.leases(), "the run begins")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    process.stdin.close()


# ---- death ----

DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(60)
"""


ENDS = [("setuid", "static", "batch"), ("setuid", "log-only", "none"), ("userns", "map", "batch")]


@pytest.mark.parametrize(("launcher", "kind", "profile"), ENDS)
def test_pilots_death_by_kill_ends_the_payload_within_two_seconds(request, launcher, kind, profile):
    node = request.getfixturevalue(f"{launcher}_node")
    mark = f"nwdeath{os.getpid()}"
    argv = [os.fspath(word) for word in node.argv(kind, ["/bin/sh", "-c", f": {mark}; sleep 60 & sleep 60"], profile)]
    pilot = node.site.start(python(f"import subprocess, time\nsubprocess.Popen({argv!r})\ntime.sleep(60)"))
    before = node.site.audit_size()
    pid = until(lambda: processes_with(f": {mark};", "sh"), "the payload runs")[0]
    pilot.kill()
    pilot.wait()
    until(lambda: not alive(pid) and node.is_clean(), "payload and launcher end with the pilot", promised())
    (end,) = [record for record in node.site.records(before) if record["event"]["action"] == "exit"]
    assert end["process"]["ended_by"] == "pilot"


@pytest.mark.parametrize(("launcher", "kind", "profile"), ENDS)
def test_launchers_death_by_kill_ends_the_payload_and_its_daemons(request, launcher, kind, profile):
    node = request.getfixturevalue(f"{launcher}_node")
    live = node.start(kind, *python(DAEMON), profile=profile)
    assert live.process.stdout.readline() == b"ready\n"
    tree = node.launchers() + node.payload_processes() + [live.pid]
    live.process.kill()
    live.process.wait()
    until(lambda: not any(map(alive, tree)) and not node.payload_processes(), "the namespace dies with its launcher", promised())
    if node.privileged:
        until(node.is_clean, "the keeper has finished", 5)
    node.forget()


def processes_with(text, name):
    """pids whose command line has text and whose program is called name."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = file.read()
            with open(f"/proc/{pid}/comm") as file:
                comm = file.read().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [int(pid)] * (text.encode() in line and comm == name)
    return found


# ---- time ----


def test_wall_limit_sends_term_then_kill_after_the_grace(case):
    """The policy's grace is 1 s."""
    code = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print('term', flush=True))\nwhile True:\n    time.sleep(1)"
    ran = case.run(*python(code), options=["--wall", "3"])
    assert ran.rc == 137
    assert ran.out == b"term\n"
    assert 3.9 < ran.seconds < 12
    assert ran.record("exit")["process"]["ended_by"] == "wall"


def test_payload_that_heeds_term_at_the_wall_limit_has_its_own_exit_code(case):
    ran = case.run("/bin/sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.05; done", options=["--wall", "3"])
    assert ran.rc == 5
    assert ran.record("exit")["process"]["ended_by"] == "wall"


def test_pilot_cannot_ask_for_more_time_than_the_guard_gives(setuid_node):
    setuid_node.open_guard(max_wall_s="1")
    ran = setuid_node.sh("map", "sleep 60", options=["--wall", "1h"])
    assert ran.rc == 143
    assert ran.seconds < 5


# ---- children ----


ZOMBIES = """
import os, time
for _ in range(50):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
def zombies():
    stats = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stats.append(open(f"/proc/{pid}/stat").read())
        except (FileNotFoundError, ProcessLookupError):
            continue  # reaped meanwhile, which is what this waits for
    return [stat for stat in stats if stat.rpartition(")")[2].split()[0] == "Z"]
end = time.time() + 5
while time.time() < end and zombies():
    time.sleep(0.01)
print(len(zombies()))
"""
BURN = """
import os, time
reader, writer = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        while time.process_time() < 0.3:
            pass
        os._exit(0)
    os._exit(0)
os.close(writer)
os.wait()
os.read(reader, 1)
time.sleep(0.3)  # its files are closed before it can be reaped
"""


def test_zombies_of_orphans_are_reaped(setuid_node, userns_node):
    for node in (setuid_node, userns_node):
        assert node.run("map", *python(ZOMBIES)).out == b"0\n"


def test_processor_time_of_orphans_is_counted(case):
    usage = case.run(*python(BURN)).record("exit")["nodewrap"]["usage"]
    assert float(usage["cpu_s"]) >= 0.3
    assert float(usage["wall_s"]) >= 0.3
    assert usage["rss_kb"] > 1000


# ---- --status-fd ----


def test_status_lines_tell_start_and_end(case):
    live = case.start(*python("import sys; sys.stdin.read(); sys.exit(3)"))
    assert live.end(b"")[0] == 3
    started, exited = live.events
    assert (started["event"], exited["event"], exited["exit"]) == ("started", "exited", 3)
    assert started["run"] == exited["run"]
    assert (started["profile"], exited["by"]) == (case.profile, "exit")
    assert exited["nodewrap"]["cleanup"]["processes_left"] == 0


def test_status_line_tells_a_refusal(node):
    reader, writer = os.pipe()
    argv = [node.site.binary, "run", "--declare", "vo=unknown", "--status-fd", str(writer), "--", "/bin/true"]
    ran = node.site.run(argv, fds=(writer,))
    os.close(writer)
    with os.fdopen(reader) as lines:
        (line,) = [json.loads(text) for text in lines]
    assert (ran.rc, line["event"], line["exit"]) == (203, "refused", 203)
    assert line["code"].startswith("NW-")
    assert line["code"].encode() in ran.err


def test_status_descriptor_that_is_not_open_is_the_callers_mistake(node):
    ran = node.run("map", "/bin/touch", "/tmp/x", options=["--status-fd", "77"])
    assert ran.rc == 201
    assert ran.err.startswith(b"nodewrap: NW-STATUS-FD: ")


def test_closed_reader_of_the_status_does_not_end_the_payload(case):
    reader, writer = os.pipe()
    os.close(reader)
    ran = case.run("/bin/sh", "-c", "echo done", options=["--status-fd", str(writer)], fds=(writer,))
    os.close(writer)
    assert (ran.rc, ran.out) == (0, b"done\n")


def test_payload_has_no_status_descriptor(case):
    reader, writer = os.pipe()
    ran = case.run("/bin/ls", "/proc/self/fd", options=["--status-fd", str(writer)], fds=(writer,))
    os.close(writer)
    os.close(reader)
    assert ran.out.split() == [b"0", b"1", b"2", b"3"]  # 3 is ls's own


# ---- stdio ----


def test_20_mib_of_every_byte_pass_both_ways_unchanged(case):
    ran = case.run("/bin/cat", stdin=PATTERN)
    assert (ran.rc, ran.err) == (0, b"")
    assert hashlib.sha256(ran.out).digest() == hashlib.sha256(PATTERN).digest()


def test_files_as_stdin_and_stdout_pass_unchanged(case, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(PATTERN)
    with open(source, "rb") as stdin, open(target, "wb") as stdout:
        process = case.node.site.start(case.node.argv(case.kind, ["/bin/cat"], case.profile), stdin=stdin, stdout=stdout)
        assert process.wait(60) == 0
    assert target.read_bytes() == PATTERN


def test_stdout_and_stderr_on_one_file_keep_their_order(case, tmp_path):
    target = tmp_path / "log"
    script = "for i in $(seq 200); do echo out $i; echo err $i >&2; done"
    with open(target, "wb") as log:
        argv = case.node.argv(case.kind, ["/bin/sh", "-c", script], case.profile)
        process = case.node.site.start(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        assert process.wait(60) == 0
    assert target.read_text().splitlines() == [f"{name} {i}" for i in range(1, 201) for name in ("out", "err")]


@pytest.mark.parametrize("kind", ["map", "log-only"])
def test_appending_log_of_the_pilot_is_appended_to_and_cannot_be_read_or_cut(node, kind, tmp_path):
    """A descriptor of a file could be opened again through /proc/self/fd, for reading or with O_TRUNC; a pipe gives nothing more."""
    target = tmp_path / "log"
    target.write_text("pilot's own line\n")
    script = "cat /proc/self/fd/1 </dev/null & sleep 0.1; kill $!; wait; : >/proc/self/fd/1; echo payload"
    with open(target, "ab") as log:
        process = node.site.start(node.argv(kind, ["/bin/sh", "-c", script]), stdin=subprocess.DEVNULL, stdout=log)
        assert process.wait(60) == 0
    assert target.read_text() == "pilot's own line\npayload\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_standard_descriptors_become_something_harmless(case, closed):
    """Else the first file that the launcher opens would be the payload's. (/dev/full: glibc's own choice for stdin of a setuid program.)"""
    show = 'for fd in 0 1 2; do case $(readlink /proc/$$/fd/$fd) in /dev/null|/dev/full|pipe:*) ;; *) exit 9;; esac; done; ! read -r x 2>/dev/null'
    argv = [os.fspath(word) for word in case.node.argv(case.kind, ["/bin/sh", "-c", show], case.profile)]
    wrapper = f"import os\nfor fd in {closed!r}:\n    os.close(fd)\nos.execv({argv[0]!r}, {argv!r})"
    ran = case.node.site.run(python(wrapper))
    assert (ran.rc, ran.out, ran.err) == (0, b"", b"")


def test_payload_that_reads_half_of_stdin_leaves_the_launcher_well(case):
    ran = case.run(*python("import os, sys; n = 0\nwhile n < 10 << 20:\n    n += len(os.read(0, 65536))\nprint(n >= 10 << 20)"), stdin=PATTERN)
    assert (ran.rc, ran.out, ran.err) == (0, b"True\n", b"")


def test_closed_reader_of_stdout_gives_the_payload_its_sigpipe(case):
    """As without nodewrap: yes | head ends."""
    process = case.node.site.start(case.node.argv(case.kind, ["/usr/bin/yes"], case.profile), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(10) == 128 + signal.SIGPIPE


def test_stdin_from_a_file_is_not_read_further_than_the_payload_needs_time_for(case, tmp_path):
    """A payload that never reads does not make the launcher swallow the file into memory, and ends at once."""
    source = tmp_path / "big"
    with open(source, "wb") as file:
        file.truncate(1 << 30)
    began = time.monotonic()
    with open(source, "rb") as stdin:
        process = case.node.site.start(case.node.argv(case.kind, ["/bin/true"], case.profile), stdin=stdin)
        assert process.wait(10) == 0
    assert time.monotonic() - began < 5


def test_empty_start_environment_works_and_success_says_nothing(case):
    binary = case.node.site.prefix / f"libexec/nodewrap/nodewrap-{case.node.site.launcher}"
    argv = case.node.argv(case.kind, ["/usr/bin/env"], case.profile, launcher=binary)
    empty = dict.fromkeys(case.node.site.environment(case.node.pilot))
    if case.node.site.launcher == "userns":
        empty["NODEWRAP_GUARD"] = str(case.node.site.sysconf / "guard")
    ran = case.node.site.run(argv, env=empty)
    assert (ran.rc, ran.err) == (0, b""), ran
    names = {line.partition("=")[0] for line in ran.text.splitlines()}
    assert {"PATH", "HOME", "TMPDIR", "FROM_POLICY"} <= names
    assert "NODEWRAP_GUARD" not in names


def test_limits_of_the_caller_hold_for_the_payload(case):
    lower = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))  # noqa: E731
    argv = case.node.argv(case.kind, ["/bin/sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c"], case.profile)
    process = case.node.site.start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=lower)
    out, _ = process.communicate(timeout=20)
    assert out.split() == [b"300", b"400", b"0"]


def test_front_process_keeps_the_pilots_real_uid_group_session_and_is_the_waiting_parent(setuid_node):
    live = setuid_node.start("static", *WAIT)
    status = status_of(live.process.pid)
    assert status["Uid"][0] == str(setuid_node.pilot.uid)
    assert int(status["PPid"][0]) == os.getpid()
    assert os.getsid(live.process.pid) == live.process.pid  # Popen made the session; the launcher made none of its own
    assert live.end(b"\n")[0] == 0


def test_pilot_may_kill_the_launcher(setuid_node):
    live = setuid_node.start("map", *WAIT)
    pilot = setuid_node.pilot
    subprocess.run(["kill", "-9", str(live.process.pid)], check=True, user=pilot.uid, group=pilot.gid, extra_groups=[])
    live.process.wait()
    until(lambda: not alive(live.pid), "the payload dies with its launcher", promised())
    until(setuid_node.is_clean, "the keeper has finished", 5)
    assert setuid_node.run("map", "/bin/true").rc == 0


# ---- a payload that has its word and does not execute ----

def ready_payload(node):
    """pid of a payload that has told that it is ready, as it waits for the word (read(2)): all its rights are given away."""
    for pid in node.launchers():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if status_of(pid)["NoNewPrivs"] == ["1"] and Path(f"/proc/{pid}/syscall").read_text().split()[0] == "0":
                return pid
    return None


@contextlib.contextmanager
def stopped_before_exec(node, command, profile, options=()):
    """By its pilot, whose id it has: (process, payload's pid) once its start is on record. Killed at the end."""
    assert node.run("log-only", "/bin/true", profile=profile).rc == 0  # the log is there
    before = node.site.audit_size()
    with open(f"{node.site.audit}.sequence", "rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        process = node.site.start(node.argv("log-only", command, profile, options), stderr=subprocess.PIPE)
        payload = until(lambda: ready_payload(node), "the payload is ready")
        assert node.site.run(["kill", "-STOP", str(payload)]).rc == 0
        until(lambda: status_of(payload)["State"][0] == "T", "it is stopped")
        fcntl.flock(log, fcntl.LOCK_UN)
    until(lambda: "start" in node.actions(before), "its start is on record")
    try:
        yield process, payload
    finally:
        if alive(payload):
            os.kill(payload, signal.SIGCONT)
        kill(process)
        process.stderr.close()


@pytest.mark.parametrize("profile", ["none", "batch"])
def test_a_payload_stopped_before_its_exec_is_held_to_its_time(node, profile):
    """The launcher waited for its exec, for ever: no limit, no signal, no end of the front was seen to."""
    with stopped_before_exec(node, ["/bin/true"], profile, ["--wall", "1s"]) as (process, payload):
        assert process.wait(30) == 128 + signal.SIGTERM
        assert not alive(payload)


@pytest.mark.parametrize("profile", ["none", "batch"])
def test_a_payload_stopped_before_its_exec_ends_with_the_front(setuid_node, profile):
    with stopped_before_exec(setuid_node, ["/bin/true"], profile) as (process, payload):
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not setuid_node.launchers(), "nobody is left")
        assert not alive(payload)


def test_why_a_payload_that_was_stopped_could_not_be_executed_is_told_late(node):
    with stopped_before_exec(node, ["/nonono"], "batch") as (process, payload):
        time.sleep(6)  # it counts as begun by then
        os.kill(payload, signal.SIGCONT)
        assert (process.wait(30), process.stderr.read().split(b": ")[1]) == (127, b"NW-EXEC")


@pytest.fixture
def silent(tmp_path):
    """A program on a file system whose server answers for its name and not for its content."""
    need("root", "fuse", "squashfuse", "mksquashfs")
    place = Path(f"/opt/nodewrap-test-silent-{os.getpid()}")
    place.mkdir()
    shutil.copy("/bin/true", tmp_path)
    subprocess.run(["mksquashfs", tmp_path / "true", tmp_path / "packed", "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    server = subprocess.Popen(["squashfuse", "-f", "-o", "allow_other", tmp_path / "packed", place])
    try:
        until(lambda: place.is_mount() and (place / "true").stat(), "it is mounted, and its name known")
        server.send_signal(signal.SIGSTOP)
        yield place / "true"
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", place], check=True)
        server.wait(10)
        place.rmdir()


def test_a_payload_whose_file_is_not_served_is_held_to_its_time(node, silent):
    process = node.site.start(node.argv("log-only", [silent], "none", ["--wall", "1s"]))
    assert process.wait(30) == 128 + signal.SIGTERM
