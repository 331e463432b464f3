"""A: invocation. What a caller hands over with execve(2), and what it does to the wrapper while that runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import termios
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nodewrap.doctor.node import ordinary_caller
from nodewrap.escape.arena import Arena, NotRunError, hostile
from nodewrap.escape.judge import record_flaws
from nodewrap.escape.model import SAME_ID_BARE, Configuration, Seen, attack
from nodewrap.escape.suite import read_guard
from nodewrap.escape.wrappers import PYTHON

HERE = "a_invocation"


def is_setuid(at: Configuration) -> bool:
    """The launcher has a privilege that its caller has not."""
    return at.launcher == "setuid"


def ends(at: Configuration) -> bool:
    """The most and the least of it."""
    return at.profile in ("strict", "none")


def code(function: str, *words: object) -> list[str]:
    return hostile(HERE, function, *words)


def launcher(arena: Arena) -> str:
    """The program that decides, behind the one on PATH."""
    at = arena.wrapper.configuration
    assert at is not None
    return str(Path(at.binary).parents[1] / f"libexec/nodewrap/nodewrap-{at.launcher}")


def argv(arena: Arena, *command: str, options: Sequence[str] = ()) -> list[str]:
    return arena.wrapper.argv(command, str(arena.work), options)


def caller_words(arena: Arena) -> list[str]:
    """uid, gid, groups: what ``become`` takes."""
    return [str(arena.caller.uid), str(arena.caller.gid), ",".join(map(str, arena.caller.groups))]


#: Popen options of what only root can prepare.
AS_ROOT: dict[str, Any] = {"user": 0, "group": 0, "extra_groups": []}


def actions(arena: Arena) -> list[str]:
    return [str(record["event"]["action"]) for record in arena.records()]


def roots_file(arena: Arena) -> Path:
    """A file of root's in the work directory, with the nonce, which nobody else may read."""
    path = arena.work / "roots"
    path.write_text(arena.nonce)
    path.chmod(0o600)
    return path


def library(arena: Arena, where: Path, text: str) -> Path:
    """A shared library of the pilot's with that text in C."""
    source = where.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(where), str(source)], check=True, capture_output=True)
    where.chmod(0o755)
    arena.own(where)
    return where


def program(where: Path, text: str) -> str:
    source = where.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["cc", "-w", "-o", str(where), str(source)], check=True, capture_output=True)
    where.chmod(0o755)
    return str(where)


def script(arena: Arena, path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    arena.own(path)
    return path


def marks(arena: Arena) -> Path:
    """A directory in the work directory where whatever runs may leave a mark."""
    path = arena.mkdir(arena.work / "marks")
    path.chmod(0o777)
    return path


# ---- what execve(2) hands over: words and descriptors ----

#: Takes the word behind "run" without a look at argc: with an empty argv that is the first string of the environment, which lies behind.
CARELESS_ARGC = """
#include <unistd.h>
int main(int argc, char **argv) { execl("/bin/sh", "sh", "-c", argv[2], NULL); return 1; }
"""


@attack("A01", "argc is looked at; policy child parses words with their number", needs=("gcc",), once=True, peers=False)
def nameless(arena: Arena) -> Seen:
    """An entry of the environment is a command that leaves a mark."""
    mark = arena.home / "mark"
    target = program(arena.home / "careless", CARELESS_ARGC) if arena.control else launcher(arena)
    ran = arena.run(*code("nameless", target, f"echo {arena.nonce} >{mark}", "run", "--", f"/bin/touch {mark}"), as_is=True)
    told = ran.rc in (201, 202, 203) or arena.control
    return Seen(mark.exists() or not told, f"{'the mark is there' if mark.exists() else 'no mark'}: {ran.line}")


@attack("A02", "descriptors 0-2 are filled before anything is opened", control="root", needs=("root",), once=True, peers=False)
def closed_stdio(arena: Arena) -> Seen:
    log = arena.home / "log" if arena.control else Path(arena.audit)
    before = log.stat().st_size if log.exists() else 0
    words = code("write_word", arena.nonce[:16], arena.nonce[16:])
    careless = code("careless_log", log) if arena.control else []
    for which in ("1", "0,1,2"):
        arena.run(*careless, *words, before=code("close_std", which), stdin=b"")
    text = log.read_bytes()[before:]
    found = arena.nonce.encode() in text
    return Seen(found, f"the payload's word is {'in the log' if found else 'not in the log'}, which grew by {len(text)} bytes")


@attack("A03", "close_range(2) before the policy is asked, and again before exec")
def inherited_descriptors(arena: Arena) -> Seen:
    private = arena.mkdir(arena.home / "private")
    arena.secret(private / "secret")
    return arena.has_nonce(arena.payload(HERE, "descriptors", before=code("many_fds", private)))


@attack("A05", "the working directory is taken by path, in the payload's view, with its rights", refusal=True)
def directory_by_descriptor(arena: Arena) -> Seen:
    """Started in a directory that only the pilot may enter, which is also named as work directory by its descriptor."""
    private = arena.mkdir(arena.home / "private")
    arena.secret(private / "secret")
    at = os.open(private, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ran = arena.payload(HERE, "where", cwd=str(private))
        again = arena.payload(HERE, "where", cwd=str(private), fds=(at,), options=["--expose", f"/proc/self/fd/{at}"])
    finally:
        os.close(at)
    first = arena.has_nonce(ran)
    return first if first.reached else arena.has_nonce(again)


@attack("A07", "signal mask and dispositions are made anew, for the wrapper and for the payload")
def deafness(arena: Arena) -> Seen:
    ran = arena.run("/bin/grep", "-E", "^Sig(Blk|Ign):", "/proc/self/status", before=code("deaf"))
    # 32 and 33 are the C library's own, which lets nobody set them (nptl(7)): what started us may have them ignored.
    masks = [int(word, 16) & ~(3 << 31) for word in re.findall(r"\t([0-9a-f]+)", ran.text)]
    live = arena.begin("/bin/sleep", "20", before=code("deaf"))
    live.pid()
    time.sleep(0.02)
    live.process.terminate()
    deaf = not arena.until(lambda: live.process.poll() is not None, 3.0 if arena.control else 12.0)
    live.kill()
    live.end(seconds=5)
    return Seen(any(masks) or deaf, f"{' '.join(ran.text.split())}; SIGTERM {'does not end' if deaf else 'ends'} it")


@attack("A08", "limits that would cut the record are refused or raised; no start without its record", control="root", needs=("root",), once=True,
        refusal=True, peers=False)
def no_room_for_the_record(arena: Arena) -> Seen:
    log = arena.home / "log"
    careless = code("careless_log", log) if arena.control else []
    seen = []
    for size in (0, 1, 100):
        before = len(actions(arena))
        ran = arena.run(*careless, *code("words", arena.nonce), before=code("limited", "RLIMIT_FSIZE", size))
        recorded = "start" in log.read_text() if arena.control else "start" in actions(arena)[before:]
        seen.append((arena.nonce.encode() in ran.out, recorded))
    return Seen((True, False) in seen, f"(ran, on record) for 0, 1 and 100 bytes: {seen}")


@attack("A09", "limits that would break the wrapper half-way are refused or raised before anything is done", control="root", needs=("root",),
        once=True, refusal=True, peers=False)
def starved_wrapper(arena: Arena) -> Seen:
    """Judged by what is left: a lease, a start without its end. The control dies between its lease and its log."""
    lease = arena.home / "lease"
    careless = code("careless_lease", lease) if arena.control else []
    said, held = [], 0
    for name, value in (("NOFILE", 4), ("NOFILE", 12), ("AS", 48 << 20), ("STACK", 128 << 10), ("DATA", 16 << 20), ("CPU", 1)):
        ran = arena.run(*careless, "/bin/true", before=code("limited", f"RLIMIT_{name}", value))
        said.append(f"{name} {value}: {ran.rc}")
        held += lease.exists()
    done = actions(arena)
    open_ended = bool(record_flaws(arena.records()))
    return Seen(bool(held) or open_ended, f"{', '.join(said)}; {f'leases left: {held}' if held else f'records: {sorted(set(done))}'}")


@attack("A10", "what setresuid(2) did is read back, and getting anything back is tried, before exec", control="root", needs=("root", "other"),
        only=lambda at: is_setuid(at) and at.mode == "switch" and ends(at), refusal=True, peers=False)
def identity_that_does_not_change(arena: Arena) -> Seen:
    """A filter of root's makes the change to the payload's id fail, or pretend to have worked; RLIMIT_NPROC is reached as well. Reached too: a
    cleaner that is still root kills what is not the run's. All of it in a pid namespace of its own."""
    secret = roots_file(arena)
    at = arena.wrapper.configuration
    assert arena.other is not None
    ids = (read_guard(at.guard).switch_uid if at.mode == "switch" else read_guard(at.guard).map_uid) if at else ()
    first, last = (min(one.first for one in ids), max(one.last for one in ids)) if ids else (arena.other[0], arena.other[0])
    if first <= arena.caller.uid <= last:
        first = arena.caller.uid + 1
    apart = ["/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    careless = code("careless_switch", *arena.other) if arena.control else []
    caller = ["0", "0", ""] if arena.control else caller_words(arena)
    said = []
    for answer in (11, 0):
        ran = arena.run(*careless, *code("who", secret), before=[*apart, *code("failing_switch", first, last, answer, *caller)], **AS_ROOT)
        said.append(ran.text)
    reached = any(arena.nonce in text or "was killed" in text or "lives" not in text for text in said)
    return Seen(reached, "; ".join(" ".join(text.replace(arena.nonce, "(the nonce)").split()) for text in said))


# ---- the environment ----

#: Leaves a mark: who it is loaded by, and with which rights.
MARK_C = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void mark(void) {
	char exe[256] = "", line[300];
	if (readlink("/proc/self/exe", exe, sizeof exe - 1) < 0) exe[0] = 0;
	int fd = open("%s", O_WRONLY | O_APPEND | O_CREAT, 0666), n = snprintf(line, sizeof line, "%%d %%s\\n", (int)geteuid(), exe);
	if (write(fd, line, n) < 0) _exit(1);
	close(fd);
}
"""


@attack("A11", "static launcher; environment from an allow-list; helpers are executed with none", control="root", needs=("root", "gcc"))
def preloaded_library(arena: Arena) -> Seen:
    """Reached: it is loaded by the payload, or with another effective id than the caller's."""
    where = marks(arena) / "mark"
    where.touch()
    where.chmod(0o666)
    so = library(arena, arena.work / "libmark.so", MARK_C % where)
    env = {"LD_PRELOAD": str(so), "LD_AUDIT": str(so), "LD_LIBRARY_PATH": str(arena.work), "LD_DEBUG": "all", "LD_ORIGIN_PATH": str(arena.work)}
    ran = arena.run("/bin/true", env=env)
    lines = [line.split() for line in where.read_text().splitlines()]
    loaded = [line for line in lines if int(line[0]) != arena.caller.uid or "nodewrap" not in line[-1]]
    return Seen(bool(loaded), f"loaded by (effective uid, program): {loaded[:3] or 'nobody'}; {ran.line}")


@attack("A12", "environment from an allow-list; the kernel's AT_SECURE for a setuid program", once=True, peers=False)
def tunables(arena: Arena) -> Seen:
    """Strings that overran the loader's parser, and one that would arrive. Reached: a crash, or the variable with the payload."""
    monsters = ["glibc.malloc.mxfast=glibc.malloc.mxfast=A", "glibc.malloc.mxfast=" + "A" * 4000, "glibc.cpu.hwcaps=-" + "X" * 100000]
    monsters.append("=:=::=" * 1000)
    said = []
    for text in monsters:
        ran = arena.payload(HERE, "environment", "GLIBC_TUNABLES", env={"GLIBC_TUNABLES": text})
        said.append((ran.rc, "GLIBC_TUNABLES" in ran.text))
    reached = any(rc is None or rc < 0 or arrived for rc, arrived in said)
    return Seen(reached, f"(status, arrived): {said}")


#: A module of that name: leaves a mark and ends the interpreter, so that even an import by a jailed process is seen by its failure.
MODULE = "import os\ntry:\n    open({mark!r}, 'w').close()\nfinally:\n    os._exit(77)\n"
MODULES = ("json", "hashlib", "socket", "struct", "sitecustomize", "usercustomize", "ctypes", "nodewrap", "site", "encodings")


def planted_modules(arena: Arena, where: Path, mark: Path) -> Path:
    for name in MODULES:
        script(arena, where / f"{name}.py", MODULE.format(mark=str(mark)))
    return where


def python_is_misled(arena: Arena, mark: Path, env: dict[str, str] | None, cwd: Path) -> Seen:
    """Reached: a planted module was run by the wrapper. The control is an interpreter without -I."""
    command = ["/bin/true"] if not arena.control else [PYTHON, "-c", "import json"]
    ran = arena.run(*command, env=env, cwd=str(cwd), refusal=True)
    found = mark.exists() or ran.rc != 0
    return Seen(found, f"a planted module {'was' if found else 'was not'} imported: {ran.line}")


@attack("A14", "policy child: -I -S -B and an environment from nothing", once=True, peers=False)
def python_variables(arena: Arena) -> Seen:
    mark, lib = marks(arena) / "mark", arena.mkdir(arena.home / "lib", 0o755)
    planted_modules(arena, lib, mark)
    base = {
        "PYTHONPATH": str(lib), "PYTHONSTARTUP": str(lib / "json.py"), "PYTHONWARNINGS": "error::json.W", "PYTHONBREAKPOINT": "json.x",
        "PYTHONPYCACHEPREFIX": str(lib), "PYTHONUSERBASE": str(lib), "PYTHONINSPECT": "1", "HOME": str(lib),
    }
    seen = python_is_misled(arena, mark, base, arena.work)
    return seen if seen.reached else python_is_misled(arena, mark, {**base, "PYTHONHOME": str(lib), "PYTHONPLATLIBDIR": str(lib)}, arena.work)


@attack("A15", "policy child: -I, started in /", once=True, peers=False)
def modules_in_the_directory(arena: Arena) -> Seen:
    mark = marks(arena) / "mark"
    return python_is_misled(arena, mark, None, planted_modules(arena, arena.mkdir(arena.home / "lib", 0o755), mark))


@attack("A16", "policy child: an environment from nothing; trust anchors are the guard's", needs=("gcc", "openssl"), once=True, peers=False)
def openssl_configuration(arena: Arena) -> Seen:
    """An engine and a provider of the pilot's, by the variables that name OpenSSL's configuration and trust."""
    mark = marks(arena) / "mark"
    so = library(arena, arena.work / "canary.so", MARK_C % mark)
    sections = f"[i]\nengines=e\nproviders=p\n[e]\ncanary=c\n[c]\ndynamic_path={so}\ninit=1\n[p]\ncanary=m\n[m]\nmodule={so}\nactivate=1\n"
    config = script(arena, arena.home / "openssl.cnf", f"openssl_conf=i\n{sections}")
    env = {
        "OPENSSL_CONF": str(config), "OPENSSL_ENGINES": str(arena.work), "OPENSSL_MODULES": str(arena.work), "SSL_CERT_FILE": str(config),
        "SSL_CERT_DIR": str(arena.work), "X509_CERT_DIR": str(arena.work), "X509_VOMS_DIR": str(arena.work),
    }
    if arena.control:
        ran = arena.run(shutil.which("openssl") or "openssl", "dgst", "/dev/null", env=env)
    else:
        proxy = script(arena, arena.home / "proxy", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        proxy.chmod(0o600)
        arena.run("/bin/true", env=env, options=["--credential", str(proxy)], refusal=True)
        ran = arena.run("/bin/true", env=env)
    return Seen(mark.exists(), f"the canary {'was' if mark.exists() else 'was not'} loaded: {ran.line}")


@attack("A17", "helpers are executed by absolute, root-owned paths", peers=False)
def fake_programs(arena: Arena) -> Seen:
    mark, bin_ = marks(arena) / "mark", arena.mkdir(arena.home / "bin", 0o755)
    for name in ("newuidmap", "newgidmap", "mount", "umount", "apptainer", "singularity", "sh", "python3", "ip", "nft", "fusermount3", "nodewrap"):
        script(arena, bin_ / name, f"#!/bin/sh\necho {name} >>{mark}\nexit 0\n")
    command = ["/usr/bin/env", "newuidmap"] if arena.control else ["/bin/true"]
    ran = arena.run(*command, env={"PATH": f"{bin_}:/usr/bin:/bin"})
    return Seen(mark.exists(), f"ran: {mark.read_text().split() if mark.exists() else 'none of the fakes'}: {ran.line}")


@attack("A18", "environment from an allow-list, without what makes a shell run code", once=True, peers=False)
def shell_start_up(arena: Arena) -> Seen:
    mark = marks(arena) / "mark"
    canary = script(arena, arena.work / "canary.sh", f"echo ran >>{mark}\n")
    env = {
        "BASH_ENV": str(canary), "ENV": str(canary), "SHELLOPTS": "xtrace", "PS4": f"$(echo traced >>{mark})", "IFS": "/",
        "BASH_FUNC_true%%": f"() {{ echo function >>{mark}; }}", "BASH_FUNC_ls()": f"() {{ :; }}; echo 6271 >>{mark}",
        "PROMPT_COMMAND": f". {canary}",
    }
    ran = arena.run("/bin/bash", "-c", "true", env=env)
    return Seen(mark.exists(), f"{sorted(set(mark.read_text().split())) if mark.exists() else 'no canary ran'}: {ran.line}")


@attack("A19", "one bounded message; what is too long is refused", once=True, peers=False)
def large_arguments(arena: Arena) -> Seen:
    """Arrives as sent, or is refused; the record says how many there were. The control makes one string of them for a shell."""
    import hashlib

    many = [f"{n:x}" * 60 for n in range(4000)]
    long = "y" * (128 * 1024 - 1)
    odd = [os.fsdecode(b"\xff\xfe\x80"), "", " ", "a b", "'; echo x", "\n", "-" * 3000]
    wrong = []
    for sent in (many, [long[:-1]], odd):
        careless = code("careless_shell") if arena.control else []
        ran = arena.run(*careless, *code("many_words", *sent), refusal=True, env={"OMP_X": long[:100000], "OMP_ODD": os.fsdecode(b"\xff")})
        digest = hashlib.sha256(b"".join(os.fsencode(word) + b"\0" for word in sent)).hexdigest()
        if ran.started and digest not in ran.text:
            wrong.append(f"{len(sent)} words: {ran.line}")
    starts = [record for record in arena.records() if record["event"]["action"] == "start"]
    unsaid = [one for one in starts if "args_sha256" not in one["process"]]
    return Seen(bool(wrong or unsaid), wrong[0] if wrong else f"all as sent; {len(starts)} starts on record, each with its digest")


@attack("A21", "umask 077 for the wrapper's own files; the caller's for the payload's", control="root", needs=("root",), peers=False)
def odd_umask(arena: Arena) -> Seen:
    """Modes of what the wrapper writes, while a payload runs, by the caller's umask."""
    at = arena.wrapper.configuration
    state = Path(read_guard(at.guard).state) if at else arena.home / "state"
    if arena.control:
        state.mkdir()
    found = {}
    for umask in ("022", "000", "777"):
        careless = code("careless_log", state / f"lease-{umask}") if arena.control else []
        live = arena.begin(*careless, "/bin/cat", before=code("masked", umask))
        live.pid()
        arena.until(lambda: any(state.iterdir()))
        time.sleep(0.1 if arena.control else 0)
        found[umask] = sorted(modes(state, arena.audit))
        live.end(b"")
        for old in state.glob("lease-*"):
            old.unlink()
    return Seen(len({str(one) for one in found.values()}) > 1, "; ".join(f"umask {umask}: {', '.join(one)}" for umask, one in found.items())[:300])


def modes(state: Path, audit: str) -> set[str]:
    """Directory and mode of files below state, and of the log."""
    found = {f"log {Path(audit).stat().st_mode & 0o777:o}"} if audit else set()
    for top, _, names in os.walk(state):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.add(f"{Path(top).name} {os.lstat(Path(top) / name).st_mode & 0o777:o}")
    return found


# ---- the program itself ----

GUARD = "nodewrap-guard 1\nlauncher {launcher}\naudit {audit}\nstate {state}\n"


def own_site(arena: Arena) -> tuple[Path, Path]:
    """A copy of the wrapper with a configuration of the pilot's beside it; and the mark that shows that it was believed."""
    top, mark = arena.mkdir(arena.home / "site", 0o755), marks(arena) / "audit.jsonl"
    for name in ("bin", "libexec", "libexec/nodewrap", "etc", "etc/nodewrap"):
        arena.mkdir(top / name, 0o755)
    text = GUARD.format(launcher="setuid", audit=mark, state=top)
    at = arena.wrapper.configuration
    if at:
        text = re.sub(r"(?m)^audit .*$", f"audit {mark}", Path(at.guard).read_text())
    script(arena, top / "etc/nodewrap/guard", text)
    return top, mark


#: Finds its configuration by its own name, and writes the log that it names.
CARELESS_PLACE = """#!/bin/sh
read_log=$(sed -n 's/^audit //p' "$(dirname "$0")/../../etc/nodewrap/guard")
echo start >"$read_log"
"""


@attack("A22", "fixed configuration path; a copy has no setuid bit; fs.protected_hardlinks", needs=("root",), only=is_setuid, once=True,
        refusal=True, peers=False)
def wrapper_elsewhere(arena: Arena) -> Seen:
    """A copy and a hard link (made by root, as where links are not protected) below the pilot's own tree, which has its own guard."""
    top, mark = own_site(arena)
    copy, link = top / "libexec/nodewrap/nodewrap-setuid", top / "libexec/nodewrap/link"
    if arena.control:
        script(arena, copy, CARELESS_PLACE)
    else:
        shutil.copyfile(launcher(arena), copy)
        copy.chmod(0o755)
        arena.own(copy)
        with contextlib.suppress(OSError):  # another file system
            os.link(launcher(arena), link)
            arena.undo(link.unlink)
    said = []
    for path in filter(Path.exists, (copy, link)):
        words = argv(arena, *code("who"))[1:]
        said.append(arena.run(str(path), *words, as_is=True, refusal=True).line)
    return Seen(mark.exists(), f"{'its own' if mark.exists() else 'not its own'} configuration was used: {'; '.join(said)}")


@attack("A23", "no name selects a mode; a copy in memory is without privilege", needs=("root",), only=is_setuid, once=True, refusal=True, peers=False)
def odd_names(arena: Arena) -> Seen:
    """By descriptor, from memory, by a link, under names of other programs. The secret is the pilot's, outside of what the profile shows."""
    secret = arena.secret()
    link = arena.home / "sudoedit"
    target = PYTHON if arena.control else launcher(arena)
    link.symlink_to(target)
    words = [target, *argv(arena, *code("who", secret))[1:]]
    ways = [code(name) + words for name in ("by_descriptor", "from_memory")] + [[str(link), *words[1:]]]
    ways += [[*code("named", target, name), *words] for name in ("sudoedit", "-nodewrap", "", "/", "nodewrap-userns", "x" * 5000)]
    seen = [arena.has_nonce(arena.run(*way, as_is=True, refusal=True)) for way in ways]
    hits = [one.what for one in seen if one.reached]
    return Seen(bool(hits), hits[0] if hits else f"{len(seen)} ways, none read it; last: {seen[-1].what}")


@attack("A24", "pid namespace; not dumpable; the file is root's and read-only", needs=("root",), only=ends, accepted=(SAME_ID_BARE,), peers=False)
def overwritten_program(arena: Arena) -> Seen:
    """Judged by the times of the wrapper and of a program of the pilot's that runs beside."""
    tool = arena.home / "tool"
    shutil.copyfile("/bin/sleep", tool)
    tool.chmod(0o755)
    arena.own(tool)
    at = arena.wrapper.configuration
    victims = [tool, Path(launcher(arena)), Path(read_guard(at.guard).python)] if at else [tool]
    before = [path.stat().st_mtime_ns for path in victims]
    live = arena.begin_payload(HERE, "overwrite", 0.4)
    live.hear()
    arena.run(str(tool), "0.1", as_is=True)
    ran = live.end()
    changed = [path.name for path, then in zip(victims, before) if path.stat().st_mtime_ns != then]
    return Seen(bool(changed), f"{'written to: ' + ', '.join(changed) if changed else 'nothing was written to'}: {ran.line}")


@attack("A25", "only callers may execute the launcher; it is no interpreter, and without privilege in the payload", needs=("root",),
        refusal=True, peers=False)
def interpreter_is_the_wrapper(arena: Arena) -> Seen:
    """The payload's script names /proc/self/exe as its interpreter: whatever executes it runs it. Then the launcher's file must not have changed."""
    secret = roots_file(arena)
    secret.chmod(0o644)
    text = f"#!/proc/self/exe\nprint(open({str(secret)!r}).read())\n"
    image = script(arena, arena.work / "image.py", text)
    before = 0 if arena.control else os.stat(launcher(arena)).st_mtime_ns
    seen = arena.has_nonce(arena.run(str(image), refusal=True, before=code("executed")))
    changed = not arena.control and os.stat(launcher(arena)).st_mtime_ns != before
    return Seen(seen.reached or changed, seen.what)


# ---- beside it ----


@attack("A26", "real root's ids and not dumpable: ptrace(2) asks for both", needs=("root",),
        only=is_setuid, seconds=60, peers=False)
def traced_wrapper(arena: Arena) -> Seen:
    """A process of the pilot's tries to trace, and to open the memory of, the front, the keeper, the policy child, init and the payload, over and
    over from the fork to the end. What has the pilot's ids and was not executed yet, or is the log-only payload, is its own."""
    seconds = 0.25 if arena.control else 3
    words = argv(arena, "/bin/sleep", "0.2")
    ran = arena.run(*code("trace", seconds, *(words if arena.control else [launcher(arena), *words[1:]])), as_is=True)
    own = "" if arena.control else f"sleep:{'/'.join([str(arena.caller.uid)] * 4)}"
    hits = [one for one in re.findall(r"'([^']*)'", ran.text) if one != own]
    return Seen(bool(hits), f"traced or read (name:uids): {hits or 'none'}, {ran.line}")


def beats(arena: Arena, seconds: float = 0.25) -> bool:
    path = arena.work / "beat"
    now = path.stat().st_mtime_ns if path.exists() else 0
    return arena.until(lambda: path.exists() and path.stat().st_mtime_ns > now, seconds)


def finishes(arena: Arena) -> bool:
    """Another run, which finishes what is left and not held any more: whether everything is on record then."""
    arena.run("/bin/true", refusal=True)
    return not record_flaws(arena.records())


@attack("A27", "keeper, or sweep from the lease; the payload dies with its namespace", once=True, seconds=60, peers=False)
def killed_wrapper(arena: Arena) -> Seen:
    """SIGKILL for the front at many moments of its life; tests/crash does it at each system call. Then one more run, which finishes what is left."""
    beat = arena.work / "beat"
    if arena.control:
        live = arena.begin(*code("careless_lease", arena.home / "lease"), *code("beat", beat))
        arena.until(lambda: beats(arena))
        live.process.kill()
        time.sleep(0.05)
        alive = beats(arena, 3.0)
        live.end(seconds=0.1)
        return Seen(alive, f"the payload {'lives on' if alive else 'died with it'}")
    for n in range(10):
        live = arena.begin(*code("beat", beat))
        time.sleep(0.01 + 0.012 * n)
        os.kill(live.process.pid, signal.SIGKILL)
        live.end(seconds=5)
    alive = not arena.until(lambda: not beats(arena), 10)
    finished = arena.until(lambda: finishes(arena), 10)
    said = f"10 kills, {dict(Counter(actions(arena)))}: a payload {'lives on' if alive else 'is nowhere'}"
    return Seen(alive or not finished, f"{said}; records {'complete' if finished else 'open'}")


@attack("A29", "the caller is held by a pidfd taken first; getppid(2) is asked again behind it", once=True, peers=False, seconds=60)
def dying_parent(arena: Arena) -> Seen:
    """The caller dies within 20 ms of the wrapper's own first child, 25 times."""
    path = arena.work / "beat"
    often, patience = (5, 0.2) if arena.control else (25, 5)  # the control's has none; an emulated machine takes tenths of a second
    ran = arena.run(*code("by_a_dying_parent", often, 0.02, patience, *argv(arena, *code("beat", path))), as_is=True, seconds=25)
    left = not arena.until(lambda: not beats(arena), 3.0 if arena.control else 15.0)  # of 25 at once the last may not have begun yet
    return Seen(left, f"a payload {'still writes' if left else 'writes no more'} after its caller's death: {ran.line}")


@attack("A30", "the caller is held as a process, not as the thread that forked", once=True, peers=False)
def starting_thread_ends(arena: Arena) -> Seen:
    """Reached: the payload is killed though its caller lives."""
    careless = code("careless_thread_tie") if arena.control else []
    words = [*careless, "/bin/sh", "-c", f"sleep 0.5; echo {arena.nonce}"]
    live = arena.begin(*code("by_a_thread", *argv(arena, *words)), as_is=True)
    ran = live.end(seconds=12)
    done = arena.nonce in ran.text
    return Seen(not done, f"the payload {'ended by itself' if done else 'was killed'}: {ran.line}")


@attack("A31", "parent-death signal set behind the change of ids; keeper; end of the namespace", control="root", needs=("root", "other"))
def forgotten_tie(arena: Arena) -> Seen:
    """What was started is killed, and the payload, now another uid, must die with it."""
    arena.work.chmod(0o777)
    assert arena.other is not None
    path = arena.work / "beat"
    careless = [*code("careless_lease", arena.home / "lease"), *code("careless_tie", *arena.other)] if arena.control else []
    live = arena.begin(*careless, *code("beat", path))
    arena.until(lambda: path.exists() and path.stat().st_size)
    os.kill(live.process.pid, signal.SIGKILL)
    time.sleep(0.05)
    alive = beats(arena, 3.0) if arena.control else not arena.until(lambda: not beats(arena), 10.0)
    live.end(seconds=0.1 if arena.control else 3)
    if not arena.control:
        arena.run("/bin/true")  # without a keeper the next run finishes it
    return Seen(alive, f"the payload {'lives on' if alive else 'died with it'}")


@attack("A32", "output that could not be carried is 202 (NW-STDIO); what is held up is dropped at a signal", once=True, peers=False, seconds=120)
def odd_stdout(arena: Arena) -> Seen:
    """A payload writes its result and ends with 0. Reached: the result is lost and the status is 0; or the wrapper does not end. A pipe or socket
    without a reader loses nothing that anybody wanted."""
    closed, peer = socket.socketpair()
    peer.close()
    reader, broken = os.pipe()
    os.close(reader)
    outputs = {"a socket": closed.detach(), "a pipe": broken}
    outputs.update({"/dev/full": os.open("/dev/full", os.O_WRONLY), "a directory": os.open(arena.work, os.O_RDONLY)})
    said = {name: arena.run(*code("mute", 0), stdout=fd, refusal=True, seconds=15).rc for name, fd in outputs.items()}
    for fd in outputs.values():
        os.close(fd)
    reader, writer = os.pipe()
    live = arena.begin(*code("talkative"), stdout=writer)
    os.close(writer)
    live.pid()
    time.sleep(0.1)
    live.process.terminate()
    said["a full pipe, at SIGTERM"] = live.end(seconds=15).rc
    os.close(reader)
    reached = None in said.values() or 0 in (said["/dev/full"], said["a directory"])
    return Seen(reached, f"status by stdout (None: it hung): {said}")


# ---- words ----


@attack("A34", "options are whole words, and end at the first word that is none", once=True, peers=False)
def odd_words(arena: Arena) -> Seen:
    """Commands and arguments that look like options; beginnings of options."""
    file = script(arena, arena.work / "file", "--profile\nnone\n")
    sent = ["--profile", "none", "--", "-x", f"@{file}", "--prof=none", "", "-"]
    careless = code("careless_words") if arena.control else []
    ran = arena.run(*careless, *code("words", *sent))
    wrong = [] if repr(tuple(sent)) in ran.text else [ran.line]
    for name in ("-x", "--", "@file", "--help"):
        path = script(arena, arena.work / name, f"#!/bin/sh\necho {arena.nonce}\n")
        if arena.nonce not in arena.run(str(path), refusal=True).text:
            wrong.append(f"{name}: not started")
    for word in ("--prof=none", "--prof", "-p", "--mod=log-only"):
        short = [] if arena.control else [arena.run("/bin/true", options=[word, "none"], refusal=True)]
        wrong += [f"{word} was taken" for one in short if one.started]
    return Seen(bool(wrong), wrong[0] if wrong else f"all as sent: {ran.line}")


UIDS = ("-1", "4294967295", " 0", "+0", "0x0", "2147483648", "4294967296", "00", "1e3", "", "0 ", "\u0661")


@attack("A35", "numbers are digits alone, in a range", refusal=True, once=True, peers=False)
def odd_numbers(arena: Arena) -> Seen:
    """Ids in the guard, read by the launcher's own parser; and where the command line takes numbers. The control is strtoul(3) as most use it."""
    import ctypes

    if arena.control:
        libc = ctypes.CDLL(None)
        taken = [text for text in UIDS if libc.atoi(text.encode()) in (0, -1)]
        return Seen(bool(taken), f"taken for 0 or -1: {taken}")
    from nodewrap._core import ffi, lib

    guard, error = ffi.new("struct nw_guard *"), ffi.new("struct nw_err *")
    taken = []
    for text in UIDS:
        for key in ("switch-uid", "map-uid"):
            line = f"nodewrap-guard 1\n{key} {text}\n".encode()
            if lib.nw_guard_parse(line, len(line), guard, error) == 0 or b"line 2" not in ffi.string(error.text):
                taken.append(f"{key} {text!r}: {ffi.string(error.text).decode()}")
    for word in ("--wall", "--status-fd"):
        taken += [f"{word} {text!r}" for text in UIDS if text != "2147483648" and arena.run("/bin/true", options=[word, text], refusal=True).started]
    return Seen(bool(taken), f"taken: {taken}" if taken else f"{len(UIDS)} spellings refused in the guard and on the command line")


@attack("A36", "a launcher that is not root refuses; nothing is done instead", only=is_setuid,
        refusal=True, peers=False)
def no_new_privs(arena: Arena) -> Seen:
    """Reached: the payload runs all the same, with the pilot's id."""
    ran = arena.run(*code("who"), before=code("no_new_privs"))
    started = f"({arena.caller.uid}," in ran.text
    return Seen(started, f"{'ran as the pilot' if started else 'did not run'}: {ran.line}")


@attack("A37", "the launcher refuses outside of the first user namespace", needs=("userns",), only=is_setuid, once=True, refusal=True, peers=False)
def own_root(arena: Arena) -> Seen:
    """Root of an own user namespace, with a guard of the pilot's mounted over the site's."""
    top, mark = own_site(arena)
    real = arena.home / "real"
    if arena.control:
        real.write_text("program /bin/false\n")
        evil = script(arena, arena.home / "evil", f"#!/bin/sh\necho believed >{mark}\n")
        ours = script(arena, arena.home / "ours", f"program {evil}\n")
        ran = arena.run(*code("fake_root", ours, real, *code("careless_config", real)), as_is=True)
    else:
        assert arena.wrapper.configuration
        ours = top / "etc/nodewrap/guard"
        words = [launcher(arena), *argv(arena, *code("who"))[1:]]
        ran = arena.run(*code("fake_root", ours, arena.wrapper.configuration.guard, *words), as_is=True)
    found = mark.exists() or (not arena.control and ran.rc == 0)
    return Seen(found, f"the fake configuration {'was' if found else 'was not'} believed: {ran.line}")


@attack("A38", "static launcher: no name service, no library, before or in the image", control="root", needs=("root", "gcc"), once=True,
        refusal=True, peers=False)
def name_service_of_the_image(arena: Arena) -> Seen:
    image = arena.work / "image"
    for name in ("etc", "lib", "lib64", "usr", "usr/lib", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        (image / name).mkdir(parents=True, exist_ok=True)
    (image / "etc/nsswitch.conf").write_text("passwd: canary\ngroup: canary\nhosts: canary\n")
    so = library(arena, image / "lib/libnss_canary.so.2", MARK_C % "/mark")
    for name in ("lib64", "usr/lib", "lib/x86_64-linux-gnu"):
        shutil.copy(so, image / name)
    for where, _, _ in os.walk(image):
        os.chmod(where, 0o777)
    if arena.control:
        for name in ("lib/x86_64-linux-gnu/libc.so.6", "lib64/ld-linux-x86-64.so.2"):
            shutil.copy(Path("/") / name, image / name)
        ran = arena.run(*code("careless_lookup", image))
        return Seen((image / "mark").exists(), f"the canary {'was' if (image / 'mark').exists() else 'was not'} loaded: {ran.line}")
    arena.run("/bin/true", options=["--image", str(image)])
    live = arena.begin("/bin/cat", cwd=str(image))
    live.pid()
    maps = Path(f"/proc/{live.process.pid}/maps").read_text()
    live.end(b"")
    loaded = sorted(set(re.findall(r"\S+\.so\S*", maps)))
    return Seen((image / "mark").exists() or bool(loaded), f"libraries in the launcher: {loaded or 'none'}")


@attack("A39", "RLIMIT_CORE 0 and not dumpable", needs=("core",), once=True, peers=False)
def core_dump(arena: Arena) -> Seen:
    """The nonce is in the wrapper's environment; it is made to crash, by signals that its caller may send, at several moments."""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    place = arena.mkdir(arena.home / "place")
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGQUIT, signal.SIGSEGV):
        live = arena.begin("/bin/sleep", "2", env={"CANARY": arena.nonce}, cwd=str(place))
        began = time.monotonic()  # before it has a child it has done nothing but execute: what dies then holds what its caller gave it
        arena.until(lambda: len(family(live.process.pid)) > 1 or (arena.control and time.monotonic() > began + 0.1), 1.0)  # noqa: B023
        time.sleep(0.01 if number == signal.SIGABRT else 0.06)
        with contextlib.suppress(ProcessLookupError):
            os.kill(live.process.pid, number)
        time.sleep(0.02)
        live.process.terminate()
        live.end(seconds=5)
    cores = [path for path in arena.home.rglob("core*") if path.is_file()]
    found = [path.name for path in cores if arena.nonce.encode() in path.read_bytes()]
    return Seen(bool(found), f"core dumps with the secret: {found or 'none'} of {len(cores)}")


# ---- standing that is inherited ----


@attack("A41", "init dies with its parent; the lease outlives all of them", control="root", needs=("root",), once=True, peers=False)
def first_to_be_killed(arena: Arena) -> Seen:
    """Least priority, oom_score_adj 1000; then what the kernel would kill for want of memory first is killed: front and keeper, the outside judge
    picks them. Reached: the payload goes on, or the run stays open behind the next one."""
    careless = code("careless_lease", arena.home / "lease") if arena.control else []
    live = arena.begin(*careless, "/bin/sleep", "20", before=code("lowly"))
    if arena.control:
        arena.until(lambda: len(family(live.process.pid)) > 1)
    payload = family(live.process.pid)[1] if arena.control else live.pid()
    victims = [one for one in family(live.process.pid) if one not in family(payload)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    alive = not arena.until(lambda: not is_alive(payload), 2.0 if arena.control else 10.0)
    live.end(seconds=0.1 if arena.control else 3)
    open_ended = not arena.control and not arena.until(lambda: finishes(arena), 10)
    return Seen(alive or open_ended, f"{len(victims)} killed; payload {'alive' if alive else 'gone'}; run {'open' if open_ended else 'finished'}")


def is_alive(pid: int) -> bool:
    """There, and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def family(pid: int) -> list[int]:
    """The process and what descends from it, by the kernel's own lists."""
    found, ring = [], [pid]
    while ring:
        found += ring
        below: list[int] = []
        for one in ring:
            with contextlib.suppress(OSError):
                below += [int(word) for word in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
        ring = below
    return found


@attack("A42", "capabilities dropped from all five sets, securebits and ambient set cleared", control="root", needs=("root",))
def inherited_capabilities(arena: Arena) -> Seen:
    """The caller has CAP_DAC_READ_SEARCH inheritable and ambient. The file is root's alone."""
    secret = roots_file(arena)
    return arena.has_nonce(arena.run(*code("who", secret), before=code("with_capabilities", *caller_words(arena)), **AS_ROOT))


@attack("A43", "the kernel clears it at a setuid exec; the launcher without privilege does itself")
def odd_personality(arena: Arena) -> Seen:
    ran = arena.run("/bin/cat", "/proc/self/personality", before=code("odd_personality"))
    return Seen(int(ran.text, 16) & 0x0440000 != 0, f"the payload's personality is {ran.text}")


@attack("A44", "what root executes lies on paths that are root's from / on, opened once", control="root", needs=("root",), only=is_setuid,
        once=True, peers=False)
def swapped_program(arena: Arena) -> Seen:
    """The pilot exchanges what will be executed for its own, between check and exec. For the control the moment is known; of the wrapper the
    interpreter, its script, the launcher and every directory above them are tried, and then a run is made."""
    mark = marks(arena) / "mark"
    evil = script(arena, arena.home / "evil", f"#!/bin/sh\necho ran >{mark}\n")
    if arena.control:
        tool = arena.home / "tool"
        shutil.copyfile("/bin/true", tool)
        tool.chmod(0o755)
        live = arena.begin(*code("careless_check", tool))
        live.hear()
        arena.run("/bin/mv", str(evil), str(tool), as_is=True, user=arena.caller.uid, group=arena.caller.gid)
        ran = live.end(b"\n")
        return Seen(mark.exists(), f"the exchanged program ran as root: {ran.line}")
    assert arena.wrapper.configuration
    guard = read_guard(arena.wrapper.configuration.guard)
    paths = {guard.python, guard.script, launcher(arena), arena.wrapper.configuration.binary, arena.wrapper.configuration.guard, guard.policy}
    every = sorted({str(above) for path in paths for above in (Path(path), *Path(path).parents)} - {"/"})
    exchange = 'evil=$1; shift; for x; do mv -T "$x" "$x.nw-moved" && cp "$evil" "$x" && echo "moved $x"; done 2>/dev/null'
    ran = arena.run("/bin/sh", "-c", exchange, "sh", str(evil), *every, as_is=True)
    arena.run("/bin/true")
    return Seen(mark.exists() or bool(ran.out), f"{len(every)} paths tried: {ran.text or 'none could be moved'}")


@attack("A45", "state below root-owned directories; names with 80 random bits; O_NOFOLLOW", control="root", needs=("root",), peers=False)
def predicted_path(arena: Arena) -> Seen:
    """Links to a file of root's under the names that one would guess, in the work directory and where everybody writes."""
    victim = arena.home / "victim"
    victim.write_text("root's")
    victim.chmod(0o600)
    names = ["nodewrap", ".nodewrap", "nodewrap.lock", f"nodewrap-{arena.caller.uid}", "audit.jsonl", "lease", "core"]
    planted = [arena.work / name for name in names] + [Path(top) / f"nodewrap-{os.getpid()}" for top in ("/tmp", "/dev/shm")]
    for path in planted:
        path.symlink_to(victim)
        arena.own(path)
        arena.undo(path.unlink)
    if arena.control:
        arena.run(*code("careless_temporary", planted[2]))
    else:
        arena.run("/bin/true")
    changed = victim.read_text() != "root's"
    return Seen(changed, f"root's file is {'changed' if changed else 'as it was'}")


#: A setuid-root helper that does what it is told.
CARELESS_SETUID = """
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv) { setuid(0); char text[64] = ""; FILE *f = fopen(argv[1], "r"); if (f) fgets(text, 64, f); puts(text); return 0; }
"""


@attack("A46", "no_new_privs; the launcher refuses without root, and outside of the first user namespace", needs=("root", "gcc"))
def nested_call(arena: Arena) -> Seen:
    """The payload calls the wrapper to become somebody else, and a setuid-root helper of the node that reads any file."""
    secret = roots_file(arena)
    helper = program(arena.work / "helper", CARELESS_SETUID)
    os.chown(helper, 0, 0)
    os.chmod(helper, 0o4755)
    commands = [f"{helper}\t{secret}"]
    at = arena.wrapper.configuration
    if at and is_setuid(at):
        shown = "\t".join([*at.who, "--mode", at.mode, "--profile", at.profile])
        commands += [f"{path}\trun\t{shown}\t--\t/bin/echo\t{arena.nonce}" for path in (at.binary, launcher(arena))]
    seen = arena.has_nonce(arena.payload(HERE, "call_helpers", *commands))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(helper)
    return seen


@attack("A47", "status lines are written with the caller's ids", control="root", needs=("root",), only=is_setuid, peers=False)
def status_by_root(arena: Arena) -> Seen:
    """The socket is the caller's, and tells the ids of whoever wrote (unix(7), SO_PASSCRED). Of a run that starts, and of one that cannot."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    fd, uids = theirs.fileno(), []
    for command in ("/bin/true", "/no/such/command")[:1 if arena.control else 2]:
        words = code("careless_status", fd, command) if arena.control else argv(arena, command, options=["--status-fd", str(fd)])
        arena.begin(*words, as_is=True, fds=[fd]).end()
    theirs.close()
    while (told := ours.recvmsg(65536, 1024))[0]:
        uids += [struct.unpack("iII", body)[1] for level, kind, body in told[1] if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)]
    if not uids:
        raise NotRunError("it told nothing")
    return Seen(0 in uids, f"{len(uids)} lines, of uids {sorted(set(uids))}")


@attack("A48", "what doctor does in a caller's name has nothing of root's", control="root", needs=("root",), once_in_all=True, peers=False,
        seconds=60)
def doctor_in_roots_terminal(arena: Arena) -> Seen:
    """root calls ``nodewrap doctor`` in a terminal. Reached: a process of the uid in whose name it tries things has that terminal, or root's
    environment: whoever has that uid is there and looks."""
    at = arena.wrapper.configuration
    uid, gid = ordinary_caller(read_guard(at.guard)) if at else arena.caller[1:3]
    words = [at.binary, "doctor"] if at else code("careless_doctor", uid, gid)
    watch = arena.accomplice(HERE, "watch_for_terminals", user=uid, group=gid, extra_groups=[])
    master, slave = pty.openpty()
    quiet: dict[str, Any] = {"stdin": slave, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    own_terminal = partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 1)  # from us, should it be ours by now
    ran = arena.begin(*words, as_is=True, env={"NW_ROOTS_OWN": "1"}, preexec_fn=own_terminal, **AS_ROOT, **quiet).end(seconds=25)
    os.close(slave)
    os.close(master)
    said = watch.hear(0.5)
    if ran.rc is None:
        raise NotRunError("doctor does not come to an end")
    return Seen(bool(said), f"uid {uid} {said or 'sees no process of its own with anything of roots'} ({ran.line})")
