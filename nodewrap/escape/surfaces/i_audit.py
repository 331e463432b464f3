"""I: audit. Forging, splitting, losing, hiding records. Mostly on a site of the pilot's own (ownsite.py); controls are careless loggers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from nodewrap.escape.arena import Arena, Live, NotRunError
from nodewrap.escape.model import PILOTS_LOG, Seen, attack, left_out
from nodewrap.escape.ownsite import OwnSite

left_out(
    I07="needs systemd's journal; records go to a file of nodewrap's own, which has no rate limit",
    I10="needs to set the node's clock: tests/integration/test_slow_and_clock.py plays it with a launcher whose clock is stepped",
    I15="needs the node's /dev/log, which others use; records do not wait for it: it is written to without blocking",
    I18="there is no CSV export",
)
ENDS = ("exit", "cleanup")


def _forged(arena: Arena, text: str, bad: Sequence[bytes]) -> Seen:
    """text in argument, environment, subject and job id. Reached: a line that is no record, a record not of ours, or one of bad in the file."""
    if arena.control:
        log = arena.home / "log"
        arena.payload("i_audit", "careless_log", log, "run", text)
        raw = log.read_bytes()
        return Seen(bool(_flaws(raw) or [one for one in bad if one in raw]), f"a careless log: {raw[:120]!r}")
    site = OwnSite(arena)
    options = ["--declare", "vo=testvo", "--job-id", text, "--env", f"X={text}"]
    answers = [site.run("/bin/echo", text, options=options[:2]), site.run("/bin/true", options=options),
               site.run(options=["--declare", f"subject=/CN={text}", *options[:2]]), site.run(text), site.run("/bin/true", env={"Y": text})]
    raw = site.audit.read_bytes()
    found = _flaws(raw) + [f"{one!r} in the file" for one in bad if one in raw]
    shown = subprocess.run([_binary(arena), "audit", "show", str(site.audit)], capture_output=True, check=False)
    found += [f"{one!r} on the terminal" for one in bad if one != b"\n" and one in shown.stdout]
    if not answers[0].started:
        raise NotRunError(f"nothing was started: {answers[0].ran.line}")
    return Seen(bool(found), f"{raw.count(10)} lines; {[answer.word for answer in answers]}; {found or 'all of them records'}")


def _binary(arena: Arena) -> str:
    assert arena.wrapper.configuration is not None
    return arena.wrapper.configuration.binary


def _flaws(raw: bytes) -> list[str]:
    """Of strict JSON lines with the numbers 1, 2, 3, …: what is wrong."""
    found, number = [], 0
    for line in raw.split(b"\n")[:-1]:
        try:
            record = json.loads(line.decode("utf-8", "strict"))
            number += 1
            if record.get("event", {}).get("sequence", number) != number or str(record.get("action", "")) == "forged":
                found.append(f"record {number} is not ours")
        except (ValueError, AttributeError):
            found.append(f"no record: {line[:40]!r}")
    return found + ([] if raw.endswith(b"\n") else ["torn"])


@attack("I01", "JSON escapes of all controls; one write a record", once_in_all=True, peers=False)
def newlines(arena: Arena) -> Seen:
    forged = '"}\n{"event":{"sequence":99,"action":"forged"},"action":"forged"}\n{"x":"'
    return _forged(arena, forged, [])


@attack("I02", "controls, CSI and bidirectional overrides are escaped", once_in_all=True, peers=False)
def terminal_sequences(arena: Arena) -> Seen:
    text = "\x1b[2J\x1b]0;x\x07\u202egnp.exe\u2066\x9b31m\u2028\x7f"
    return _forged(arena, text, [b"\x1b", b"\x07", b"\xe2\x80\xae", b"\xe2\x81\xa6", b"\xc2\x9b", b"\xe2\x80\xa8", b"\x7f"])


@attack("I03", "strict UTF-8; other bytes as base64 beside", once_in_all=True, peers=False)
def quotes_and_broken_unicode(arena: Arena) -> Seen:
    """Quotes, backslashes, lone surrogates, overlong and cut sequences."""
    raw = b'"\\u0000\\" \xed\xa0\x80 \xc0\xaf \xff\xfe \xf4\x90\x80\x80 \xe2\x82 \\'
    return _forged(arena, raw.decode("utf-8", "surrogateescape"), [b"\xed\xa0\x80", b"\xc0\xaf", b"\xff\xfe"])


@attack("I05", "the log is root's, or not in the root", accepted=(PILOTS_LOG,), peers=False)
def log_changed_by_the_payload(arena: Arena) -> Seen:
    """An attribute is put on it, which needs the right to write to it. (With the userns launcher the log is the pilot's own.)"""
    if arena.control:
        arena.audit = str(arena.secret(arena.home / "audit.jsonl"))
    elif not arena.audit:
        raise NotRunError("the log of this node is not known")
    log = Path(arena.audit)
    ran = arena.payload("i_audit", "mark", log, arena.nonce)
    try:
        marked = "user.nodewrap-escape" in os.listxattr(log)
        if marked:
            os.removexattr(log, "user.nodewrap-escape")
    except PermissionError:  # not the judge's to read, so not the payload's to write
        marked = False
    return Seen(marked, ran.line)


@attack("I06", "room for the end is taken before the start; no record, no exec", needs=("root",), once_in_all=True, peers=False)
def disk_full(arena: Arena) -> Seen:
    """The log on a file system of 3 MiB that is filled in steps. Reached: a payload ran whose start, exit and cleanup are not all there."""
    top = arena.mkdir(arena.home / "small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=3m,uid={arena.caller.uid},gid={arena.caller.gid},mode=0755", "none", str(top)], check=True)
    arena.undo(lambda: subprocess.run(["umount", "-l", str(top)], check=True))
    filler = top / "filler"
    if arena.control:
        filler.write_bytes(bytes(3 << 20))
        ran = arena.payload("i_audit", "careless_try", top / "log", "x" * 100)
        return Seen(ran.text == "in" and not _size(top / "log"), f"a log that is full is left out: {ran.line}")
    site = OwnSite(arena, audit=str(top / "audit.jsonl"))
    said = []
    for free in (2500, 2100, 1100, 500, 8, 0):
        stat = os.statvfs(top)
        with open(filler, "ab") as file:
            file.write(bytes(max(0, stat.f_bavail * stat.f_frsize - free * 1024)))
        answer = site.run()
        said.append(f"{free} KiB free: {answer.word}")
        actions = [record["event"]["action"] for record in _records(top / "audit.jsonl")]
        if answer.started and (actions.count("start"), *map(actions.count, ENDS)) != (sum("started" in one for one in said),) * 3:
            return Seen(True, f"{said}, on record {actions}")
    if "started" not in said[0]:
        raise NotRunError(f"with room it does not start either: {said}")
    return Seen(False, ", ".join(said))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _records(path: Path) -> list[dict[str, dict[str, str]]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if not line.endswith(b"!")] if path.exists() else []


def _killed(arena: Arena, site: OwnSite | None, log: Path) -> Live:
    """A run that is killed in its middle, wrapper, session and all."""
    live = arena.begin_payload("i_audit", "careless_run", log) if site is None else site.begin("/bin/sh", "-c", "echo ready; read x")
    if live.hear() != "ready":
        raise NotRunError(f"it did not start: {live.end(b'').line}")
    live.kill()
    live.end()
    return live


def _reconciled(arena: Arena, reboot: bool) -> Seen:
    if arena.control:
        log = arena.home / "log"
        _killed(arena, None, log)
        said = log.read_text()
        return Seen("start" in said and "exit" not in said, f"a careless log: {said!r}")
    site = OwnSite(arena)
    _killed(arena, site, site.audit)
    leases = list((site.directory / "state/leases").glob("*-*"))
    for lease in leases if reboot else ():
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        site.write(lease, lease.read_text().replace(boot, "00000000-0000-4000-8000-000000000000"))
    next_one = site.run()
    runs: dict[str, list[str]] = {}
    for record in site.records():
        runs.setdefault(record["process"]["entity_id"], []).append(record["event"]["action"])
    open_ones = [run for run, actions in runs.items() if "start" in actions and not all(end in actions for end in ENDS)]
    return Seen(bool(open_ones), f"{len(leases)} lease(s), next run {next_one.word}; begun and not ended on record: {open_ones or 'none'}")


@attack("I08", "the lease; whoever comes next writes the missing records", once_in_all=True, peers=False)
def killed_between_begin_and_end(arena: Arena) -> Seen:
    return _reconciled(arena, reboot=False)


@attack("I19", "leases survive a reboot; a lease of another boot is finished", once_in_all=True, peers=False)
def machine_crash(arena: Arena) -> Seen:
    """The lease says another boot, as after a crash; its processes are gone."""
    return _reconciled(arena, reboot=True)


@attack("I09", "the log is opened for each record and looked at under its locks; no link is followed", once_in_all=True, peers=False)
def rotated_and_linked(arena: Arena) -> Seen:
    """Renamed while runs come and go: reached when a number is missing. A link in its place: reached when another file is written to."""
    victim = arena.secret(arena.home / "victim")
    if arena.control:
        (arena.home / "log").symlink_to(victim)
        ran = arena.payload("i_audit", "careless_try", arena.home / "log", "x")
        return Seen(victim.read_text() != arena.nonce, f"a log opened by its name: {ran.line}")
    site = OwnSite(arena)
    for number in range(3):
        lives = [site.begin("/bin/true") for _ in range(3)]
        while any(live.process.poll() is None for live in lives):
            if site.audit.exists():
                site.audit.rename(site.directory / f"rotated-{number}-{time.monotonic_ns()}")
            time.sleep(0.003)
        for live in lives:
            live.end()
    numbers = [int(record["event"]["sequence"]) for path in [site.audit, *site.directory.glob("rotated-*")] for record in _records(path)]
    lost = sorted(set(range(1, max(numbers) + 1)) - set(numbers))
    site.audit.unlink(missing_ok=True)
    site.audit.symlink_to(victim)
    answer = site.run()
    changed = victim.read_text() != arena.nonce
    return Seen(bool(lost) or changed or answer.started,
                f"{len(numbers)} records, lost {lost or 'none'}; with a link: {answer.word}, {'written to' if changed else 'not followed'}")


@attack("I11", "numbers without gaps, kept beside the log", once_in_all=True, peers=False)
def older_log_copied_back(arena: Arena) -> Seen:
    """By the pilot, whose log it is. Reached: after the next run ``nodewrap audit show`` finds it sound."""
    log = arena.home / "log"
    if arena.control:
        arena.payload("i_audit", "careless_log", log, "one")
        arena.payload("i_audit", "careless_log", shutil.copyfile(log, arena.home / "copy") and log, "two")
        shutil.copyfile(arena.home / "copy", log)
        arena.payload("i_audit", "careless_log", log, "three")
        return Seen(not _flaws(log.read_bytes()), f"a log without numbers: {log.read_text()!r}")
    site = OwnSite(arena)
    site.run()
    old = site.audit.read_bytes()
    site.run()
    site.write(site.audit, old)
    site.run()
    shown = subprocess.run([_binary(arena), "audit", "show", str(site.audit)], capture_output=True, text=True, check=False)
    said = [line for line in (shown.stdout + shown.stderr).splitlines() if "missing" in line or "order" in line]
    return Seen(shown.returncode == 0, f"audit show: status {shown.returncode}, {said[:1]}")


@attack("I12", "--env and the environment are not recorded; the log is root's", accepted=(PILOTS_LOG,), peers=False)
def secrets_on_record(arena: Arena) -> Seen:
    """A secret in a variable must not be in the log at all; one in the command's arguments is, so the next payload must not be able to read it."""
    if arena.control:
        log = arena.home / "log"
        arena.payload("i_audit", "careless_log", log, "run", arena.nonce)
        return arena.has_nonce(arena.payload("i_audit", "find", log))
    arena.run("/bin/true", arena.nonce, options=["--env", f"TOKEN={arena.nonce[::-1]}"], env={"PASSWORD": arena.nonce[::-1]})
    if arena.nonce[::-1] in json.dumps(arena.records()):
        return Seen(True, "the value of a variable is on record")
    return arena.has_nonce(arena.payload("i_audit", "find", arena.audit or "/nonexistent"))


@attack("I14", "one write under locks", once_in_all=True, peers=False)
def writers_at_once(arena: Arena) -> Seen:
    """Twenty runs at once with arguments that fill a record (4 KiB)."""
    log = arena.home / "log"
    if arena.control:
        lives = [arena.begin_payload("i_audit", "careless_pieces", log, letter, 40000) for letter in "abcdef"]
        for live in lives:
            live.end()
        mixed = [line for line in log.read_bytes().split(b"\n")[:-1] if len(set(line)) > 1 or len(line) != 40000]
        return Seen(bool(mixed), f"records in pieces: {len(mixed)} mixed up")
    site = OwnSite(arena)
    runs = [site.begin("/bin/true", "x" * 5000, letter * 5000) for letter in "abcdefghijklmnopqrst"]
    words = {live.end().rc for live in runs}
    raw = site.audit.read_bytes()
    return Seen(bool(_flaws(raw)) or words != {0}, f"status {words}, {raw.count(10)} records, flaws {_flaws(raw) or 'none'}")


@attack("I17", "what could not be removed is counted and named", needs=("root",), once_in_all=True, peers=False)
def clean_end_that_was_not(arena: Arena) -> Seen:
    """Root mounts a file system in the work directory, where the payload leaves a link that leads out. Reached: it is there, but no record."""
    inside = arena.mkdir(arena.work / "mounted")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,uid={arena.caller.uid},mode=0755", "none", str(inside)], check=True)
    arena.undo(lambda: subprocess.run(["umount", "-l", str(inside)], check=True))
    if arena.control:
        log = arena.home / "log"
        arena.payload("i_audit", "keep_something", inside / "kept")
        arena.payload("i_audit", "careless_end", log)
        return Seen(os.path.lexists(inside / "kept-link") and '"left": 0' in log.read_text(), f"a careless log: {log.read_text()!r}")
    site = OwnSite(arena)
    script = f"echo kept >{inside}/kept; ln -s /etc/passwd {inside}/kept-link"
    answer = site.run("/bin/sh", "-c", script, options=["--workdir", str(arena.work)])
    if not answer.started:
        raise NotRunError(f"it did not start: {answer.ran.line}")
    there = os.path.lexists(inside / "kept-link")
    said = [record["nodewrap"]["cleanup"] for record in site.records() if "cleanup" in record.get("nodewrap", {})]
    told = any(one.get("left") or one.get("left_paths") for one in said)
    return Seen(there and not told, f"the link is {'there' if there else 'gone'}, on record: {json.dumps(said)[:150]}")


