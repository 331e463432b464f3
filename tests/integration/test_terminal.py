"""A pilot with a terminal: the payload gets one of its own, and the pilot's is as it was, whoever dies (csrc/terminal.c, I10, I14)."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.node import alive, has_pilots_id, until
from tests.terminal import Terminal

CASES = [
    ("setuid", "static", "batch"), ("setuid", "map", "strict"), ("setuid", "log-only", "none"),
    ("userns", "map", "batch"), ("userns", "log-only", "none"),
]
#: What the payload sees of terminals, and what it can do to its own: one JSON document in a line.
LOOK = """
import errno, fcntl, json, os, struct, sys, termios
def call(way, *args):
    try:
        way(*args)
    except OSError as wrong:
        return errno.errorcode[wrong.errno]
    return "ok"
seen = {"tty": [os.isatty(fd) for fd in (0, 1, 2)], "rdev": [os.fstat(fd).st_rdev for fd in (0, 1, 2)]}
seen["controlling"] = struct.unpack('i', fcntl.ioctl(0, 0x5429, bytes(4)))[0] == os.getsid(0) == os.getpid()
seen["foreground"] = os.tcgetpgrp(0) == os.getpgrp()
seen["size"] = list(os.get_terminal_size(0))
seen["again"] = [call(os.open, name, os.O_RDWR) for name in ("/dev/tty", "/dev/stdin", "/dev/stdout")]
seen["typed"] = call(fcntl.ioctl, 0, termios.TIOCSTI, b"x")
print("<" + json.dumps(seen) + ">", flush=True)
"""
WAIT = ("/bin/sh", "-c", "echo ready; sleep 60")


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    launcher, kind, profile = request.param
    return request.getfixturevalue(f"{launcher}_node"), kind, profile


@pytest.fixture(params=[CASES[0], CASES[3]], ids="-".join)
def batch(request):
    launcher, kind, profile = request.param
    return request.getfixturevalue(f"{launcher}_node"), kind, profile


@pytest.fixture
def opened():
    """opened((node, kind, profile), command, **more): a Terminal with that payload as the job on it, in raw mode when it is in the foreground."""
    made = []

    def start(case, command, options=(), **more):
        node, kind, profile = case
        made.append(Terminal(node, node.argv(kind, command, profile, options), **more))
        return made[-1]

    yield start
    for terminal in made:
        terminal.close()


def python(code, *words):
    return ("/usr/bin/python3", "-I", "-c", code, *words)


def launcher_of(terminal):
    """pid of the job on it."""
    (pid,) = Path(f"/proc/{terminal.process.pid}/task/{terminal.process.pid}/children").read_text().split()
    return int(pid)


def exit_of(terminal):
    word = terminal.event()
    assert word.startswith("exit "), (word, terminal.text[-2000:])
    return int(word.split()[1])


def test_payload_has_a_terminal_of_its_own_and_never_the_pilots(case, opened):
    terminal = opened(case, python(LOOK), size=(33, 77))
    pilots = os.fstat(terminal.slave).st_rdev
    assert exit_of(terminal) == 0, terminal.text
    seen = json.loads(terminal.shown(b">").partition(b"<")[2][:-1])
    assert seen["tty"] == [True] * 3
    assert pilots not in seen["rdev"]
    assert (seen["controlling"], seen["foreground"], seen["size"]) == (True, True, [77, 33])
    # Without privilege the terminal stays the pilot's: an id of its range holds it, and cannot open it once more.
    assert seen["again"] == (["ok"] * 3 if case[0].privileged or has_pilots_id(*case[:2]) else ["ok", "EACCES", "EACCES"])
    if case[2] != "none":
        assert seen["typed"] == "EPERM"


def test_record_and_status_say_that_it_has_one(setuid_node, opened):
    before = setuid_node.site.audit_size()
    terminal = opened((setuid_node, "map", "batch"), ["/bin/true"])
    assert exit_of(terminal) == 0
    assert [record["nodewrap"]["isolation"]["own_terminal"] for record in setuid_node.site.records(before) if "isolation" in record["nodewrap"]]
    ran = setuid_node.run("map", "/bin/true")
    assert "own_terminal" not in ran.record("start")["nodewrap"]["isolation"]


def test_keys_lines_and_output_pass_and_the_modes_come_back(case, opened):
    terminal = opened(case, ["/bin/sh", "-c", "echo ready; read a; echo got:$a; stty raw -echo; echo raw; head -c 4 | od -An -tx1; exit 5"])
    terminal.shown(b"ready\r\n")
    until(terminal.is_raw, "keys go through as they are")
    terminal.type(b"hell\x7flo\r")
    terminal.shown(b"got:hello\r\n")
    terminal.shown(b"raw")
    terminal.type(b"\x03\x1a\x00\xff")
    terminal.shown(b"03 1a 00 ff")
    assert exit_of(terminal) == 5
    assert terminal.modes() == terminal.before


def test_much_output_arrives_whole(batch, opened):
    lines = 20000
    terminal = opened(batch, ["/bin/sh", "-c", f"seq {lines}"])
    assert exit_of(terminal) == 0
    assert terminal.text == b"".join(b"%d\r\n" % number for number in range(1, lines + 1))


def test_interrupt_key_reaches_the_payloads_job_and_not_the_pilots(batch, opened):
    terminal = opened(batch, ["/bin/sh", "-c", "trap 'echo caught; exit 7' INT; echo ready; sleep 60 & wait"])
    terminal.shown(b"ready")
    until(terminal.is_raw, "its keys are the payload's")
    terminal.type(b"\x03")
    terminal.shown(b"caught")
    assert exit_of(terminal) == 7


def test_stop_key_stops_the_run_gives_the_terminal_back_and_fg_goes_on(case, opened):
    node = case[0]
    terminal = opened(case, ["/bin/sh", "-c", "echo ready; read a; echo got:$a"])
    terminal.shown(b"ready")
    until(terminal.is_raw, "its keys are the payload's")
    terminal.type(b"\x1a")
    assert terminal.event() == "stopped"
    assert terminal.modes()[3] & termios.ICANON
    terminal.order("fg")
    until(terminal.is_raw, "taken again")
    terminal.type(b"on\r")
    terminal.shown(b"got:on")
    assert exit_of(terminal) == 0
    assert node.is_clean()


def test_payload_cannot_make_another_key_the_one_that_stops_the_pilots_job(batch, opened):
    terminal = opened(batch, ["/bin/sh", "-c", "stty susp x; echo ready; read a; echo got:$a"])
    terminal.shown(b"ready")
    until(terminal.is_raw, "its keys are the payload's")
    terminal.type(b"x")
    time.sleep(0.3)
    terminal.type(b"on\r")
    terminal.shown(b"got:on")
    assert exit_of(terminal) == 0, "and it was never stopped"


def test_stop_key_stops_no_run_that_nobody_could_continue(batch):
    """The launcher is its terminal's first process, as under `ssh -t`: it was stopped for good."""
    node, kind, profile = batch
    master, slave = pty.openpty()
    os.fchown(slave, node.pilot.uid, node.pilot.gid)
    code = "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nos.execv(sys.argv[1], sys.argv[1:])"
    argv = node.argv(kind, ["/bin/sh", "-c", "echo ready; read a; echo got:$a"], profile)
    process = node.site.start([*python(code), *argv], stdin=slave, stdout=slave, stderr=slave)
    try:
        shown = shown_on(master, b"ready")
        until(lambda: not termios.tcgetattr(slave)[3] & termios.ICANON, "its keys are the payload's")
        os.write(master, b"\x1a")
        time.sleep(0.3)
        os.write(master, b"on\r")
        assert b"got:on" in shown + shown_on(master, b"got:on")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def shown_on(master, text):
    """What comes until text has come, or for ten seconds."""
    shown = b""
    while text not in shown and select.select([master], [], [], 10)[0]:
        shown += os.read(master, 4096)
    return shown


def test_stop_key_goes_to_the_job_of_a_shell_inside(batch, opened):
    """It has a parent in its session there, so the kernel stops it, and the shell notices; the run goes on."""
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGTTOU, signal.SIG_IGN)\npid = os.fork()\nif pid == 0:\n    os.setpgid(0, 0)\n"
        "    os.tcsetpgrp(0, os.getpgrp())\n    print('ready', flush=True)\n    signal.pause()\n"
        "_, status = os.waitpid(pid, os.WUNTRACED)\nprint('stopped', os.WIFSTOPPED(status), flush=True)\nos.kill(pid, 9)"
    )
    terminal = opened(batch, python(code))
    terminal.shown(b"ready")
    until(terminal.is_raw, "its keys are the payload's")
    terminal.type(b"\x1a")
    terminal.shown(b"stopped True")
    assert exit_of(terminal) == 0


def test_background_pilot_leaves_the_terminal_to_its_shell(case, opened):
    """Neither its modes nor what is typed: all signals are blocked in the launcher, so the kernel would not have kept it from either."""
    terminal = opened(case, ["/bin/sh", "-c", "echo ready; read a; echo got:$a"], background=True)
    terminal.shown(b"ready")
    terminal.type(b"for the shell\n")
    time.sleep(0.3)
    assert terminal.modes() == terminal.before
    assert os.read(terminal.slave, 100) == b"for the shell\n"
    terminal.order("fg")
    until(terminal.is_raw, "in the foreground its keys are the payload's")
    terminal.type(b"mine\r")
    terminal.shown(b"got:mine")
    assert exit_of(terminal) == 0


def test_new_size_reaches_the_payload(batch, opened):
    code = (
        "import os, signal\nsignal.signal(signal.SIGWINCH, lambda *_: os.write(1, b'size %d %d' % os.get_terminal_size(0)))\n"
        "os.write(1, b'ready')\nwhile True:\n    signal.pause()"
    )
    terminal = opened(batch, python(code))
    terminal.shown(b"ready")
    until(terminal.is_raw, "taken")
    terminal.resize(50, 132)
    terminal.shown(b"size 132 50")
    terminal.type(b"\x03")
    exit_of(terminal)


@pytest.mark.parametrize("victim", ["front", "keeper", "payload"])
def test_modes_come_back_whoever_is_killed(case, opened, victim):
    node = case[0]
    if victim == "keeper" and not node.privileged:
        pytest.skip("the userns launcher has no keeper")
    terminal = opened(case, WAIT)
    terminal.shown(b"ready")
    until(terminal.is_raw, "taken")
    front = launcher_of(terminal)
    if victim == "payload":
        terminal.type(b"\x1c")  # SIGQUIT
    elif victim == "keeper":
        children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
        (keeper,) = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "nodewrap-keeper\n"]
        os.kill(keeper, signal.SIGKILL)
    else:
        os.kill(front, signal.SIGKILL)
    assert exit_of(terminal) == {"front": -signal.SIGKILL, "keeper": 202, "payload": 128 + signal.SIGQUIT}[victim]
    until(lambda: terminal.modes() == terminal.before, "the terminal is as it was", 5)
    if victim == "front" and not node.privileged:
        assert node.sweep()[0] == 0
    until(node.is_clean, "nothing is left", 5)


def test_terminal_that_goes_away_hangs_up_the_payload(batch, opened):
    node = batch[0]
    terminal = opened(batch, ["/bin/sh", "-c", "trap '' HUP; echo ready; while read a; do :; done; exit 0"])
    terminal.shown(b"ready")
    until(terminal.is_raw, "taken")
    front = launcher_of(terminal)
    os.close(terminal.slave)
    os.close(terminal.master)
    until(lambda: not alive(front), "it has ended", 10)
    terminal.master, terminal.slave = os.pipe()
    until(node.is_clean, "nothing is left", 5)


def test_output_that_nobody_reads_does_not_keep_the_launcher_from_its_signals(batch, opened):
    """The terminal of a lost connection: whoever writes to it without O_NONBLOCK waits."""
    terminal = opened(batch, ["/usr/bin/yes"])
    until(terminal.is_raw, "taken")
    time.sleep(0.5)
    os.kill(launcher_of(terminal), signal.SIGTERM)
    end = time.monotonic() + 10
    while not select.select([terminal.events], [], [], 0.1)[0]:
        assert time.monotonic() < end, "it hangs in a write"
    assert terminal.events.readline().startswith("exit ")


def test_stdout_in_a_file_stays_a_pipe_when_stdin_is_a_terminal(batch, opened, tmp_path):
    target = batch[0].pilot.home / "out"
    command = ["/bin/sh", "-c", "test -t 0 && test -t 2 && ! test -t 1 && echo ready >&2 && read a && echo got:$a"]
    terminal = opened(batch, command, files={"1": str(target)})
    terminal.shown(b"ready")
    until(terminal.is_raw, "taken")
    terminal.type(b"x\r")
    assert exit_of(terminal) == 0
    assert target.read_text() == "got:x\n"
    assert terminal.text == b"\r\nx\r\n", "the echo, once"
    target.unlink()


def test_terminal_as_stdout_alone_leaves_the_keyboard_to_the_pilot(batch, opened):
    terminal = opened(batch, ["/bin/sh", "-c", "test -t 1 && ! test -t 0 && echo ready; exec sleep 60"], files={"0": "/dev/null"})
    assert terminal.shown(b"ready\r\n") == b"ready\r\n", "line ends are made once"
    assert not terminal.is_raw()
    terminal.type(b"\x03")
    assert exit_of(terminal) == 128 + signal.SIGINT


@pytest.mark.parametrize("profile", ["batch", "none"])
def test_terminal_as_stderr_alone_is_a_pipe_for_the_payload(setuid_node, opened, profile):
    files = {"0": "/dev/null", "1": "/dev/null"}
    terminal = opened((setuid_node, "log-only", profile), ["/bin/sh", "-c", "test -t 2 || echo pipe >&2; : </dev/tty || true"], files=files)
    terminal.shown(b"pipe")
    assert exit_of(terminal) != 0, "no controlling terminal"


def test_without_a_terminal_there_is_none(case):
    node, kind, profile = case
    code = "import os\nprint([os.isatty(fd) for fd in (0, 1, 2)])\ntry:\n    open('/dev/tty')\nexcept OSError as wrong:\n    print(wrong.errno)"
    ran = node.run(kind, *python(code), profile=profile)
    assert ran.out == b"[False, False, False]\n6\n"


def test_no_terminal_to_be_had_is_refused_or_degraded_as_the_profile_says(setuid_node, opened):
    """A node without /dev/ptmx, in a mount namespace of the test's."""
    pilot = setuid_node.pilot
    become = f"setpriv --reuid {pilot.uid} --regid {pilot.gid} --groups {','.join(map(str, pilot.groups))}"
    for profile, code in (("strict", 202), ("batch", 0)):
        argv = setuid_node.argv("map", ["/bin/sh", "-c", "test -t 1 || echo pipe"], profile)
        words = ["/usr/bin/unshare", "-m", "/bin/sh", "-c", f'mount --bind /dev/null /dev/ptmx && exec {become} "$@"', "sh", *map(str, argv)]
        master, slave = pty.openpty()
        environment = setuid_node.site.environment(pilot)
        process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment, cwd="/")
        os.close(slave)
        assert process.wait(20) == code
        shown = os.read(master, 4096)
        os.close(master)
        assert (b"NW-MISSING" in shown and b"terminal" in shown) if code else shown == b"pipe\r\n"
