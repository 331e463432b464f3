"""Reading an audit file: sound ones, torn ones, and ones that somebody wrote to hurt the reader."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nodewrap.audit import log, record
from nodewrap.commands import audit

RUN_A, RUN_B = "01934b2e-0000-7000-8000-00000000000a", "01934b2e-0000-7000-8000-00000000000b"


def line(sequence, action="start", run=RUN_A, **more):
    fields = {
        "event.sequence": sequence, "event.action": action, "event.outcome": "success", "@timestamp": f"2026-11-20T21:00:{sequence % 60:02}.000000Z",
        "user.id": "20001", "user.name": "atlusr01", "process.pid": 123, "process.args": ["sh", "-c", "echo hi"], "nodewrap.run.id": run,
        "nodewrap.mode": "switch", "nodewrap.profile": "strict", "nodewrap.pilot.uid": "1000", "nodewrap.subject.dn": "/DC=org/CN=Jane",
    }
    return record.render(sorted({**fields, **more}.items(), key=lambda field: field[0].split(".")))


def flaws(data):
    return [entry.flaw for entry in log.entries(log.lines(io.BytesIO(data))) if entry.flaw]


def show(tmp_path, data, *words):
    """(exit status, stdout, stderr) of `nodewrap audit show` on a file with that content."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(data)
    parser = argparse.ArgumentParser()
    audit.configure(parser)
    out, err = io.StringIO(), io.StringIO()
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        status = audit.main(parser.parse_args(["show", str(path), *words]))
    finally:
        sys.stdout, sys.stderr = old
    return status, out.getvalue(), err.getvalue()


def test_sound_file_has_no_flaw_wherever_its_numbers_start():
    assert flaws(line(41) + line(42) + line(43)) == []
    assert flaws(b"") == []


def test_torn_tail_is_told():
    assert flaws(line(1) + line(2)[:-1]) == ["torn"]
    assert flaws(line(1) + b'{"event":{"seq') == ["torn"]


def test_torn_line_that_a_gap_record_follows_is_sealed():
    assert flaws(line(1) + line(2)[:90] + b"\n" + line(2, "gap") + line(3)) == ["sealed"]


def test_seal_covers_only_the_line_before_it():
    assert flaws(line(1) + b"x\n" + b"y\n" + line(2, "gap")) == ["damaged", "sealed"]
    assert flaws(line(1) + b"x\n" + line(2) + line(3, "gap")) == ["damaged"]


@pytest.mark.parametrize("middle", [
    b"", b"\n", b"{}\n", b"null\n", b"[1]\n", b'{"event":{"sequence":true,"action":"x"}}\n', b'{"event":{"sequence":2}}\n', b"\xff\xfe\n",
    b'{"event":{"sequence":2,"action":"x","action":"y"}}\n', b'{"event":{"sequence":2,"action":"\\ud800"}}\n', b"\0" * 100 + b"\n",
    b'{"event":{"sequence":2,"action":"x"},"a":NaN}\n', b"[" * 50000 + b"\n",
    b'{"event":{"sequence":' + b"9" * 5000 + b"}}\n", b"x" * 300000 + b"\n",
])
def test_removed_or_damaged_record_is_told_and_reading_goes_on(middle):
    found = list(log.entries(log.lines(io.BytesIO(line(1) + middle + line(3)))))
    assert [entry.record["event"]["sequence"] for entry in found if entry.record] == [1, 3]
    assert "missing" in [entry.flaw for entry in found]
    assert ("damaged" in [entry.flaw for entry in found]) == (middle != b"") or b"x" * 1000 in middle


def test_repeated_and_replayed_numbers_are_told():
    assert flaws(line(5) + line(5)) == ["order"]
    assert flaws(line(5) + line(6) + line(2) + line(3)) == ["order"]


def test_every_byte_of_the_file_is_in_one_entry():
    data = line(1) + b"junk\n" + b"x" * 200000 + b"\n" + line(2) + b"tail"
    found = list(log.entries(log.lines(io.BytesIO(data))))
    assert [entry.offset for entry in found] == sorted(entry.offset for entry in found)
    rebuilt = b"".join(data[a.offset:b] for a, b in zip(found, [entry.offset for entry in found[1:]] + [len(data)]))
    assert rebuilt == data
    assert all(data[entry.offset:].startswith(entry.raw) for entry in found)


def test_records_of_a_run_stand_together_below_their_owner(tmp_path):
    data = line(1, "authorize") + line(2, "start", RUN_B) + line(3, "exit", **{"process.exit_code": 7})
    status, out, err = show(tmp_path, data)
    rows = out.splitlines()
    assert (status, err) == (0, "")
    assert rows[0] == f"run {RUN_A}  atlusr01(20001)  /DC=org/CN=Jane  switch/strict  pilot (1000)"
    assert rows[1] == "  2026-11-20T21:00:01.000000Z authorize success pid=123  $ sh -c 'echo hi'"
    assert "exit=7" in rows[2]
    assert rows[4].startswith(f"run {RUN_B}")


def test_record_that_a_sweep_wrote_is_shown_as_such(tmp_path):
    data = line(1, "exit", **{"process.ended_by": "swept", "event.outcome": "unknown", "nodewrap.swept": True}) + line(2, "cleanup")
    status, out, _ = show(tmp_path, data)
    rows = out.splitlines()
    assert status == 0
    assert "exit      unknown" in rows[1]
    assert "by=swept swept" in rows[1]
    assert "swept" not in rows[2]


@pytest.mark.parametrize(("words", "sequences"), [
    ((), [1, 2, 3, 4]), (("--run", RUN_B), [2]), (("--run", "01934b2e"), [1, 2, 3, 4]), (("--run", "zz"), []), (("--user", "20001"), [1, 2, 3]),
    (("--user", "other"), [4]), (("--user", "1000"), [1, 2, 3, 4]), (("--dn", "Jane"), [1, 2, 3]), (("--dn", "jane"), []), (("--dn", "Bob"), [4]),
    (("--action", "exit"), [3]), (("--action", "exit", "--action", "deny"), [3, 4]), (("--since", "2026-11-20T21:00:03"), [3, 4]),
    (("--since", "2026-11-20T23:00:03+02:00"), [3, 4]), (("--since", "2999-01-01"), []), (("--dn", "Jane", "--action", "exit"), [3]),
])
def test_filters_choose_records(tmp_path, words, sequences):
    bob = {"user.id": "20002", "user.name": "other", "nodewrap.subject.dn": "", "nodewrap.declared.subject": "/CN=Bob"}
    data = line(1) + line(2, run=RUN_B) + line(3, "exit") + line(4, "deny", **bob)
    status, out, err = show(tmp_path, data, "--json", *words)
    assert (status, err) == (0, "")
    assert sorted(json.loads(row)["event"]["sequence"] for row in out.splitlines()) == sequences


def test_age_counts_back_from_now():
    now = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 7200))
    assert audit.since("2h")[:16] in (now, time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 7200)))


@pytest.mark.parametrize("text", ["", "h", "yesterday", "-5m", "999999d", "2026-13-01", "0001-01-01", "٥m"])
def test_time_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        audit.since(text)


def test_filter_does_not_hide_that_records_are_missing(tmp_path):
    status, out, _ = show(tmp_path, line(1) + line(9), "--action", "nothing")
    assert (status, out) == (1, f"! missing: sequence 2 to 8 missing before byte {len(line(1))}\n")


def test_flaws_of_a_json_listing_go_to_stderr_and_are_bounded(tmp_path):
    status, out, err = show(tmp_path, b"x\n" * 1000 + line(1), "--json")
    assert status == 1
    assert len(out.splitlines()) == 1
    assert err.splitlines()[-1] == "! and 950 flaws more"


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path):
    evil = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\r\n\u200b"
    inner = {"run": {"id": evil}, "degrade": [evil], "subject": {"dn": evil}}
    record = {"event": {"sequence": 2, "action": evil, "reason": evil}, "@timestamp": evil, "user": {"id": evil}, "nodewrap": inner}
    own = line(1, **{"event.action": evil, "nodewrap.declared.job_id": evil, "process.args": [evil, evil], "nodewrap.run.id": evil})
    data = own + json.dumps(record, ensure_ascii=False).encode() + b"\n"
    for words in ((), ("--json",)):
        _, out, err = show(tmp_path, data + evil.encode() * 3, *words)
        assert all(row.isprintable() for row in (out + err).split("\n"))
        assert "pwned" in out


def test_json_listing_keeps_the_values_exactly(tmp_path):
    foreign = json.dumps({"event": {"sequence": 1, "action": "x"}, "a": "\u200b\u0085é😀\U000e0001"}, ensure_ascii=False)
    out = show(tmp_path, foreign.encode() + b"\n", "--json")[1]
    assert json.loads(out) == json.loads(foreign)


def test_unreadable_file_is_one_line_and_status_2(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    audit.configure(parser)
    assert audit.main(parser.parse_args(["show", str(tmp_path / "no\x1bfile")])) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert "NW-AUDIT-READ" in err


def test_follow_shows_records_as_they_are_finished(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(line(1))
    script = "import argparse; from nodewrap.commands import audit; p = argparse.ArgumentParser(); audit.configure(p); audit.main(p.parse_args())"
    env = {**os.environ, "PYTHONPATH": str(Path(audit.__file__).parents[2])}
    reader = subprocess.Popen([sys.executable, "-c", script, "show", str(path), "--follow", "--json"], stdout=subprocess.PIPE, env=env)
    try:
        assert json.loads(reader.stdout.readline())["event"]["sequence"] == 1
        with path.open("ab", buffering=0) as file:
            file.write(line(2)[:50])
            time.sleep(0.5)
            file.write(line(2)[50:])
        assert json.loads(reader.stdout.readline())["event"]["sequence"] == 2
    finally:
        reader.terminate()
        reader.wait()
        reader.stdout.close()
