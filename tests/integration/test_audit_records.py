"""What stands on record of a run: complete, in order, one line each, not to be forged, and before anything is executed (I6, I13)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.need import need
from tests.node import SUBJECT
from tests.site import command


def actions(records):
    return [record["event"]["action"] for record in records]


def sequences(records):
    return [record["event"]["sequence"] for record in records]


@pytest.fixture
def canary(node, home):
    """Options that give the payload a work directory, and a command that leaves a file there; the file."""
    top = home / "canary"
    top.mkdir()
    os.chown(top, node.pilot.uid, node.pilot.gid)
    yield ["--workdir", str(top)], top / "sang"
    shutil.rmtree(top)


# ---- what there is ----


def test_a_run_has_its_records_in_order_and_without_gaps(node, canary):
    ran = node.run("map", "/bin/true", options=canary[0])
    steps = [name for name in actions(ran.records) if name != "degrade"]
    assert steps == ["authorize", "start", "exit", "handover", "cleanup"]
    first = sequences(ran.records)[0]
    assert sequences(ran.records) == list(range(first, first + len(ran.records)))
    assert len({record["nodewrap"]["run"]["id"] for record in ran.records}) == 1


def test_records_say_where_when_who_and_what(node):
    ran = node.run("map", "/bin/sh", "-c", "exit 3", options=["--job-id", "job 7"])
    for record in ran.records:
        assert record["host"]["name"] == socket.gethostname()
        assert record["host"]["boot"]["id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record["@timestamp"])
        assert record["nodewrap"]["subject"] == {"dn": SUBJECT, "vo": "map", "assurance": "declared", "credential": "declared"}
        assert record["nodewrap"]["declared"] == {"subject": SUBJECT, "vo": "map", "job_id": "job 7"}
        assert record["nodewrap"]["pilot"]["name"] == node.pilot.name
        assert record["rule"]["name"] == "map"
        assert record["process"]["args"] == ["/bin/sh", "-c", "exit 3"]
        assert re.fullmatch(r"[0-9a-f]{64}", record["nodewrap"]["policy"]["digest"])
    end = ran.record("exit")
    assert (end["process"]["exit_code"], end["event"]["outcome"]) == (3, "failure")


def test_denial_is_on_record_with_its_code_and_the_subject(node):
    ran = node.site.nodewrap("run", "--declare", "vo=nobodys", "--declare", f"subject={SUBJECT}", "--", "/bin/true")
    (record,) = ran.records
    assert (ran.rc, record["event"]["action"], record["event"]["code"]) == (203, "deny", "NW-NO-RULE")
    assert record["nodewrap"]["subject"]["dn"] == SUBJECT
    assert "user" not in record
    assert ran.err.startswith(b"nodewrap: NW-NO-RULE: ")


def test_callers_mistake_is_on_record(node):
    ran = node.site.nodewrap("run", "--no-such-option", "--", "/bin/true")
    (record,) = ran.records
    assert (ran.rc, record["event"]["action"], record["event"]["code"]) == (201, "error", "NW-USAGE-OPTION")


def test_command_that_cannot_be_executed_ends_in_an_error_record(node):
    ran = node.run("map", "/nonexistent")
    assert (ran.rc, actions(ran.records)[-1]) == (127, "error")
    assert ran.records[-1]["event"]["code"] == "NW-EXEC"


def test_error_record_does_not_guess_what_a_payload_that_gave_up_had(node):
    """It cannot enter its directory: that it had no login id and no keyring of its own was on record, which was not so."""
    closed = node.site.pilot.home / "closed"
    closed.mkdir(mode=0)
    os.chown(closed, node.pilot.uid, node.pilot.gid)
    ran = node.run("map", "/bin/true", options=["--workdir", closed])
    closed.rmdir()
    assert [record["event"]["code"] for record in ran.records if record["event"]["action"] == "error"] == ["NW-CWD"], ran
    assert {"loginuid", "keyring"} & set(ran.records[-1]["nodewrap"]["isolation"]) == set()


def test_what_the_profile_could_not_get_is_recorded_as_degrade(userns_node):
    """The unprivileged launcher cannot make a cgroup; profile batch says degrade."""
    userns_node.open_guard(cgroup="/sys/fs/cgroup")
    ran = userns_node.run("map", "/bin/true")
    assert "cgroup" in ran.record("degrade")["nodewrap"]["degrade"]
    refused = userns_node.run("map", "/bin/true", profile="strict")
    assert (refused.rc, refused.record("error")["event"]["code"]) == (202, "NW-MISSING")


# ---- written by a sweep, for a run that died (I9) ----


@pytest.fixture
def write(audit_probe, private):
    """Records of runs that are made up: words of tests/c/audit_probe.c -> all records so far."""

    def write(*words):
        log = private / "log"
        done = subprocess.run([audit_probe, log, *words], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == {"ok"}, done
        return [json.loads(line) for line in log.read_text().splitlines()]

    return write


def test_swept_record_says_so_and_leaves_out_what_a_lease_does_not_hold(write):
    *_, end, cleanup = write("set", "swept=1", "set", "started=7", "set", f"fact=subject.dn={SUBJECT}", "exit", "cleanup")
    assert end["nodewrap"]["swept"] is True
    assert cleanup["nodewrap"]["swept"] is True
    assert end["event"]["outcome"] == "unknown"
    assert cleanup["event"]["outcome"] == "success"
    assert end["process"] == {"entity_id": end["nodewrap"]["run"]["id"], "ended_by": "swept"}
    assert not {"isolation", "usage", "profile"} & set(end["nodewrap"])
    assert end["nodewrap"]["subject"]["dn"] == SUBJECT
    assert cleanup["nodewrap"]["cleanup"]["processes_left"] == 0


def test_swept_record_of_a_run_whose_processes_do_not_end_is_a_failure(write):
    *_, end = write("set", "swept=1", "set", "left=1", "exit")
    assert end["event"]["outcome"] == "failure"


def test_end_that_nobody_saw_is_no_success(write):
    """Init killed from outside: there is no exit code to tell."""
    *_, unseen, seen = write("set", "argc=2", "set", "started=7", "exit", "set", "ended=1", "exit")
    assert (unseen["event"]["outcome"], seen["event"]["outcome"]) == ("unknown", "success")
    assert not {"exit_code", "ended_by"} & set(unseen["process"])
    assert (seen["process"]["exit_code"], seen["process"]["ended_by"]) == (0, "exit")
    assert "swept" not in unseen["nodewrap"]


# ---- not to be forged (I13) ----

HOSTILE = ["a\nb", '"},"user":{"id":"0"}}\n{"event":{"sequence":1', "\x1b[2J\x1b]0;x\x07", "\u202e\u2028", "\\", "\x7f\x9b", "x\r\ny"]


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_no_argument_can_forge_split_or_lose_a_record(node, text):
    before = node.site.audit_size()
    ran = node.run("map", "/bin/echo", text)
    assert (ran.rc, ran.out) == (0, f"{text}\n".encode())
    written = node.site.audit.read_bytes()[before:]
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", written)
    assert written.count(b"\n") == len(ran.records)
    assert {tuple(record["process"]["args"]) for record in ran.records} == {("/bin/echo", text)}
    assert len({record["user"]["id"] for record in ran.records if "user" in record}) == 1
    assert ran.record("start")["user"]["id"] != "0"


@pytest.mark.parametrize("option", [["--declare", "subject=/CN=a\n/CN=b"], ["--job-id", "a\x1b[2J"], ["--declare", "vo=a\nb"]], ids=repr)
def test_claims_that_are_not_printable_are_refused(node, option):
    ran = node.site.nodewrap("run", *option, "--", "/bin/true")
    assert ran.rc == 201
    assert ran.err.count(b"\n") == 1
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", ran.err)
    assert len(ran.records) == 1


def test_claims_stand_under_declared_and_touch_nothing_else(node):
    """A subject that claims everything at once is one string."""
    claim = '/CN=x","nodewrap":{"subject":{"assurance":"bound"},"mode":"none"},"user":{"id":"0"'
    ran = node.site.nodewrap("run", "--declare", "vo=map", "--declare", f"subject={claim}", "--profile", "batch", "--", "/bin/true")
    start = ran.record("start")
    assert start["nodewrap"]["declared"]["subject"] == claim
    assert start["nodewrap"]["subject"]["assurance"] == "declared"
    assert start["nodewrap"]["mode"] == "map"
    assert start["user"]["id"] != "0"


def test_bytes_that_are_no_text_are_kept_beside(node):
    ran = node.run("map", "/bin/echo", b"\xff\xfe")
    process = ran.record("start")["process"]
    assert process["args"] == ["/bin/echo", "\ufffd\ufffd"]
    assert [base64.b64decode(word) for word in process["args_b64"]] == [b"/bin/echo", b"\xff\xfe"]


def test_long_command_is_cut_and_can_still_be_compared(node):
    words = [f"{n:05d}" * 20 for n in range(2000)]
    ran = node.run("map", "/bin/true", *words)
    assert ran.rc == 0, ran
    assert all(len(line) < 4096 for line in node.site.audit.read_bytes().splitlines())
    process = ran.record("start")["process"]
    assert process["args_cut"] == 2001
    digest = hashlib.sha256(b"".join(word.encode() + b"\0" for word in ["/bin/true", *words])).hexdigest()
    assert process["args_sha256"] == digest


# ---- many writers ----


def test_30_runs_at_a_time_write_every_number_once_and_in_order(node):
    before = node.site.audit_size()
    started = [node.site.start(node.argv("log-only", ["/bin/true"])) for _ in range(30)]
    assert [process.wait(120) for process in started] == [0] * 30
    records = node.site.records(before)
    assert len({record["nodewrap"]["run"]["id"] for record in records}) == 30
    first = sequences(records)[0]
    assert sequences(records) == list(range(first, first + len(records)))


def test_numbers_go_on_after_the_log_was_rotated(node):
    last = sequences(node.run("log-only", "/bin/true").records)[-1]
    kept = node.site.audit.with_name("rotated")
    node.site.audit.rename(kept)
    records = node.run("log-only", "/bin/true").records
    assert sequences(records)[0] == last + 1
    node.site.audit.write_bytes(kept.read_bytes() + node.site.audit.read_bytes())
    kept.unlink()


@pytest.mark.parametrize("tail", [b'{"event":{"sequence":99', b"\0\0\0", b"{"], ids=repr)
def test_torn_record_is_sealed_by_a_gap_and_the_log_reads_as_sound(node, tail):
    last = sequences(node.run("log-only", "/bin/true").records)[-1]
    with open(node.site.audit, "ab") as log:
        log.write(tail)
    before = node.site.audit_size()
    assert node.site.start(node.argv("log-only", ["/bin/true"])).wait(20) == 0
    with open(node.site.audit, "rb") as log:
        log.seek(before)
        records = [json.loads(line) for line in log.read().splitlines()[1:]]
    assert actions(records)[0] == "gap"
    assert sequences(records) == list(range(last + 1, last + 1 + len(records)))
    assert records[0]["event"]["code"] == "NW-AUDIT-TORN"
    shown = node.site.admin("audit", "show", "--action", "gap")
    assert "sealed" in shown
    whole = node.site.audit.read_bytes()
    node.site.audit.write_bytes(whole.replace(tail + b"!\n{", b"{", 1))  # for the tests that read the whole log


# ---- before anything is executed (I6) ----


@contextmanager
def aside(path):
    kept = path.with_name(path.name + ".aside")
    path.rename(kept)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        kept.rename(path)


def refuses(node, canary, code=b"NW-AUDIT", words=()):
    process = node.site.start(node.argv("map", ["/bin/touch", canary[1], *words], options=canary[0]), stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 202
    assert err.startswith(b"nodewrap: " + code), err
    assert err.count(b"\n") == 1
    assert not canary[1].exists(), "the payload ran without a record"
    return err


def test_missing_audit_directory_means_that_nothing_runs(node, canary):
    with aside(node.site.audit.parent):
        refuses(node, canary, b"NW-")


def test_audit_log_that_is_a_link_or_a_fifo_or_a_directory_means_that_nothing_runs(node, canary):
    for make in (lambda path: path.symlink_to("/dev/null"), os.mkfifo, Path.mkdir):
        with aside(node.site.audit):
            make(node.site.audit)
            if os.geteuid() == 0:
                os.chown(node.site.audit, *(2 * [0] if node.privileged else (node.pilot.uid, node.pilot.gid)), follow_symlinks=False)
            refuses(node, canary)


def test_audit_directory_that_others_may_write_means_that_nothing_runs(node, canary):
    node.site.audit.parent.chmod(0o777)
    try:
        refuses(node, canary, b"NW-PATH-WRITABLE")
    finally:
        node.site.audit.parent.chmod(0o750)


def test_read_only_audit_directory_means_that_nothing_runs(setuid_node, home):
    need("root")
    top = home / "full"
    top.mkdir()
    os.chown(top, setuid_node.pilot.uid, setuid_node.pilot.gid)
    place = setuid_node.site.audit.parent
    command("mount", "--bind", place, place)
    try:
        command("mount", "-o", "remount,bind,ro", place)
        said = refuses(setuid_node, (["--workdir", str(top)], top / "sang"))
        assert b"Read-only file system" in said
    finally:
        command("umount", place)
        shutil.rmtree(top)


def test_missing_state_directory_means_that_nothing_runs(node, canary):
    with aside(node.site.state / "leases"), aside(node.site.state / "ids"):
        (node.site.state / "leases").symlink_to("/tmp")
        refuses(node, canary, b"NW-")


def test_site_may_let_runs_go_on_without_records_and_later_ones_say_so(setuid_node):
    setuid_node.open_guard(audit_on_failure="run-and-flag")
    place = setuid_node.site.audit.parent
    kept = place.with_name("kept")
    place.rename(kept)
    live = setuid_node.start("map", "/bin/sh", "-c", "read x; exit 4")
    kept.rename(place)
    before = setuid_node.site.audit_size()
    assert live.end(b"\n") == (4, b"", b"")
    records = setuid_node.site.records(before)
    assert actions(records) == ["exit", "cleanup"]
    assert all(record["nodewrap"]["records_lost"] is True for record in records)


def test_start_record_is_on_disk_before_the_payload_is_executed(setuid_node, tmp_path):
    """strace shows fdatasync(2) of the log between the record's write and the payload's execve."""
    need("root", "strace")
    trace = tmp_path / "trace"
    argv = [os.fspath(word) for word in setuid_node.argv("static", ["/bin/true"])]
    words = ["strace", "-f", "-u", setuid_node.pilot.name, "-s", "400", "-e", "trace=write,fdatasync,execve", "-o", str(trace), *argv]
    # The session's policy is that of the pilot, who is strace's child here: the pilot process is strace.
    done = subprocess.run(words, capture_output=True, env=setuid_node.site.environment(setuid_node.pilot), cwd="/")
    assert done.returncode == 0, done
    lines = trace.read_text().splitlines()
    started = next(n for n, line in enumerate(lines) if '\\"action\\":\\"start\\"' in line)
    synced = next(n for n, line in enumerate(lines) if n > started and "fdatasync(" in line)
    executed = next(n for n, line in enumerate(lines) if 'execve("/bin/true"' in line)
    assert started < synced < executed


def test_lease_is_on_disk_while_the_payload_runs_and_names_what_must_be_undone(setuid_node):
    live = setuid_node.start("static", "/bin/sh", "-c", "read x")
    (name,) = setuid_node.site.leases()
    lease = dict(line.partition(" ")[::2] for line in (setuid_node.site.state / "leases" / name).read_text().splitlines())
    assert lease["id"] == "{0.uid} {0.gid}".format(setuid_node.site.accounts["user1"])
    assert lease["run"] == name.partition(".")[0]
    assert lease["mode"] == "switch batch"
    assert live.end(b"\n")[0] == 0


# ---- who may read it ----


def test_payload_cannot_read_or_write_the_log(setuid_node):
    info = setuid_node.site.audit.stat()
    assert (info.st_uid, stat.S_IMODE(info.st_mode) & 0o007) == (0, 0)
    for profile in ("batch", "none"):
        assert setuid_node.run("static", "/bin/cat", setuid_node.site.audit, profile=profile).rc == 1
        assert setuid_node.sh("static", f"echo x >>{setuid_node.site.audit}", profile=profile).rc != 0


def test_every_record_is_copied_to_syslog(setuid_node, syslog):
    ran = setuid_node.run("static", "/bin/true")
    lines = [line for line in syslog.lines() if ran.record("start")["nodewrap"]["run"]["id"].encode() in line]
    assert [json.loads(line.partition(b": ")[2]) for line in lines] == ran.records
    assert all(re.match(rb"<8[0-7]>nodewrap\[\d+\]: ", line) for line in lines)  # authpriv


def test_audit_show_tells_a_run_as_a_story(node):
    ran = node.run("map", "/bin/sh", "-c", "exit 9")
    run = ran.records[0]["nodewrap"]["run"]["id"]
    shown = node.site.admin("audit", "show", "--run", run)
    for word in ("authorize", "start", "exit", "cleanup", SUBJECT):
        assert word in shown
