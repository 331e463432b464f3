"""``make escape-oracles``: what programs of others say about a node on which nodewrap ran hostile payloads, beside our own judge.

unhide      processes that somebody hides. Its control: one that we hide from it, by a mount over its directory of /proc.
stress-ng   its stressors as a payload whose front is killed in the middle; our judge says what stays. Its control: the same, bare.
debsums     the node's own files, before and after.
LTP, amicontained, CDK, ctrsploit   inside a payload of each profile, where an environment variable names the program (or LTP's directory of
            programs): NODEWRAP_LTP, NODEWRAP_AMICONTAINED, NODEWRAP_CDK, NODEWRAP_CTRSPLOIT. Left out when it is not set: no package has them.

Prints a table; exit status 1 when an oracle that could be asked found something, or its control did not.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from nodewrap.audit.log import run_of
from nodewrap.escape.attempt import adopt_orphans, end_children
from nodewrap.escape.judge import Ids, litter, snapshot
from nodewrap.escape.suite import read_guard
from tests.escape.suite import Place

STRESSORS = ("fork", "vm", "shm", "shm-sysv", "mq", "sem", "sem-sysv", "msg", "dir", "sock", "key", "fifo", "pipe")
STRESS = ["stress-ng", "--quiet", "--vm-bytes", "32M", "--timeout", "20s", *(word for name in STRESSORS for word in (f"--{name}", "1"))]
PACKAGES = ("coreutils", "util-linux", "passwd", "login", "libc6", "bash", "sudo", "mount")
#: Of LTP: what replays holes of kernels and of namespaces; its own words are PASS, FAIL, CONF (cannot be tried).
LTP = (
    "cve-2014-0196", "cve-2015-3290", "cve-2016-7117", "cve-2016-10044", "cve-2017-2618", "cve-2017-2671", "cve-2022-4378", "userns01", "userns08",
    "dirtyc0w", "dirtypipe", "keyctl05", "fsconfig03", "setsockopt11", "af_alg01", "af_alg08", "bpf_prog05", "io_uring02", "pidns01", "mqns_01",
    "shmnstest", "sysinfo03",
)
INSIDE = {
    "NODEWRAP_AMICONTAINED": [], "NODEWRAP_CDK": ["evaluate", "--full"], "NODEWRAP_CTRSPLOIT": ["checksec"],
}
BAD = re.compile(r"exploit|vulnerable|CAP_SYS_ADMIN|privileged: true", re.IGNORECASE)


def hidden_pids(prefix=()):
    """pids that unhide calls hidden."""
    said = subprocess.run([*prefix, "unhide", "-u", "quick"], capture_output=True, text=True, check=False, timeout=300).stdout
    return set(map(int, re.findall(r"Found HIDDEN PID: (\d+)", said)))


def unhide(place):
    victim = subprocess.Popen(["sleep", "300"])
    try:
        hide = f"mount -t tmpfs none /proc/{victim.pid} && exec \"$@\""
        control = hidden_pids(["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh"])
    finally:
        victim.kill()
        victim.wait()
    if victim.pid not in control:
        return "control failed", f"it did not see the process that we hid ({control})"
    before = hidden_pids()
    for node in place.nodes:
        node.sh("map", "(setsid sh -c 'exec -a \"[kworker/0:1]\" sleep 300' &) ; (setsid setsid sleep 300 &)", profile="none")
    found = hidden_pids() - before
    return ("found" if found else "nothing"), f"hidden after payloads with daemons: {sorted(found) or 'none'}; it sees one that is hidden"


def killed_in_the_middle(start):
    process = start()
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.wait()


def stress(place):
    node = place.nodes[0]
    ids = Ids(read_guard(str(node.site.sysconf / "guard")), place.caller.uid)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    before = snapshot(ids, str(node.site.state))
    killed_in_the_middle(lambda: node.site.start(STRESS, cwd=place.home / "bare", **quiet))
    end_children()
    control = snapshot(ids, str(node.site.state)).since(before)
    left = {}
    for kind in node.kinds:
        at, offset = snapshot(ids, str(node.site.state)), node.site.audit_size()
        killed_in_the_middle(lambda kind=kind: node.site.start(node.argv(kind, STRESS, "batch"), cwd="/", **quiet))
        time.sleep(2.5)  # the keeper's two seconds
        node.sweep()
        left[kind] = litter(at, ids, str(node.site.state), {run_of(record) for record in node.site.records(offset)})
    bad = {kind: lines for kind, lines in left.items() if lines}
    remove_ipc(control)
    if not control:
        return "control failed", "bare, killed in the middle, it left nothing"
    return ("found" if bad else "nothing"), f"left by payloads killed in the middle: {bad or 'nothing'}; bare it leaves {len(control)} things"


def remove_ipc(lines):
    """What the bare one left, of System V: "ipc: shm 5 key ..."; queues and files: their names."""
    options = {"shm": "-m", "msg": "-q", "sem": "-s"}
    for line in lines:
        kind, _, rest = line.partition(": ")
        if kind == "ipc":
            what, number = rest.split()[:2]
            subprocess.run(["ipcrm", options[what], number], check=False)
        elif kind == "file":
            Path(rest).unlink(missing_ok=True)


def changed_files():
    said = subprocess.run(["debsums", "--changed", "--all", *PACKAGES], capture_output=True, text=True, check=False, timeout=300)
    return set(said.stdout.split())


def inside(place, program, words):
    """Of each profile: which lines of that program's are bad news."""
    node, told = place.nodes[0], []
    at = Path(f"/opt/{Path(program).name}-{os.getpid()}")
    shutil.copy(program, at)
    at.chmod(0o755)
    try:
        for profile in ("strict", "batch"):
            ran = node.run("map", at, *words, profile=profile, timeout=120)
            told.append(f"{profile}: {len(BAD.findall(ran.text))} of {len(ran.text.splitlines())} lines name an opening")
    finally:
        at.unlink()
    return "told", "; ".join(told)


def ltp(place, top):
    node, counts = place.nodes[0], {}
    for name in LTP:
        if not os.access(f"{top}/{name}", os.X_OK):
            continue
        shown = [] if top.startswith(("/opt", "/usr")) else ["--expose", top]
        ran = node.run("map", f"{top}/{name}", profile="strict", options=shown, timeout=120)
        for word in ("PASS", "FAIL", "CONF", "BROK"):
            counts[word] = counts.get(word, 0) + len(re.findall(rf"\bT{word}\b", ran.text))
    return ("found" if counts.get("FAIL") else "nothing"), f"its own words inside strict: {counts}"


def main():
    adopt_orphans()
    rows, place = [], Place(("setuid", "userns"))
    try:
        (place.home / "bare").mkdir()
        os.chown(place.home / "bare", place.caller.uid, place.caller.gid)
        before = changed_files() if shutil.which("debsums") else None
        for tool, ask in (("unhide", unhide), ("stress-ng", stress)):
            rows.append((tool, *(ask(place) if shutil.which(tool) else ("left out", "not installed"))))
        if before is None:
            rows.append(("debsums", "left out", "not installed"))
        else:
            changed = changed_files() - before
            rows.append(("debsums", "found" if changed else "nothing", f"files of packages changed meanwhile: {sorted(changed) or 'none'}"))
        for variable, words in INSIDE.items():
            program = os.environ.get(variable)
            rows.append((variable, *(inside(place, program, words) if program else ("left out", "the variable is not set"))))
        top = os.environ.get("NODEWRAP_LTP")
        rows.append(("NODEWRAP_LTP", *(ltp(place, top) if top else ("left out", "the variable is not set"))))
    finally:
        end_children()
        place.close()
    for tool, verdict, what in rows:
        print(f"{tool:22} {verdict:15} {what}")
    return int(any(verdict in ("found", "control failed") for _, verdict, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
