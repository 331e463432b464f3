"""The story: a site, a grid, a pilot, its users' payloads; then a table of what was found from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

from demo import machine, policy, screen
from demo.stage import ANALYSIS, BASE, HERE, PREFIX, PRODUCTION, TESTER, TRAIL, Played, Stage
from tests import pki, site

#: What a profile leaves reachable on purpose (docs/isolation.md): with the host's network comes its loopback.
OPEN = {"strict": set(), "batch": {"loopback"}, "compat": {"loopback"}}
HEAD = ("user", "asked", "uid", "inside", "exit", "proxy", "secrets", "daemons", "files", "records", "")
GLEXEC = """echo "I am: uid $(id -u) in $(pwd); proxy $X509_USER_PROXY $(stat -c 'of %u, mode %a' "$X509_USER_PROXY")"; \
cat "$1"; env; awk 'BEGIN { for (i = 1; i <= 60000; i++) s += i; printf "computed: %d\\n", s }'"""


class Rows(list):
    """The rows of the closing table."""

    def put(self, user: str, asked: str, played: Played, stolen: set[str], daemons: int, files: int, checks: dict[str, bool]) -> None:
        """checks: what must hold, by name. Those that do not are printed at once."""
        wrong = [name for name, good in checks.items() if not good]
        if wrong:
            screen.block("NOT as it should be", "\n".join(wrong) + f"\n{played.result!r}")
        others = sorted(stolen - {"proxy"})
        uids = ",".join(map(str, sorted(played.uids))) or "-"
        taken = ",".join(others) if len(others) < 2 else f"{len(others)} kinds"
        counts = (str(daemons), str(files), str(len(played.result.records)))
        proxy = "READ" if "proxy" in stolen else "safe"
        self.append((user, asked, uids, played.inside, str(played.result.rc), proxy, taken or "safe", *counts, "FAILED" if wrong else "OK"))


def set_up(stage: Stage) -> None:
    screen.section("1. A site: make install, guard, policy")
    screen.say(f"Installing with the {stage.launcher} launcher below {stage.session.top}, from here on DEMO; it is removed at the end.")
    stage.build_site()
    stage.block("the guard, which no decision can leave (etc/nodewrap/guard)", (stage.site.sysconf / "guard").read_text())
    text = policy.toml(stage.pilot, stage.pool)
    stage.block("the policy (etc/nodewrap/nodewrap.toml)", text)
    stage.command(["nodewrap", "policy", "apply"], "root" if site.ROOT else stage.pilot.name)
    stage.block("it says", stage.site.policy(text))
    screen.section("2. A grid: CA, VOMS host, proxies")
    how = "by voms-proxy-fake" if shutil.which("voms-proxy-fake") else "by tests/pki.py, as voms-proxy-fake (package voms-clients) is missing"
    screen.say(f"CA {stage.grid.ca.name}; VOMS host {pki.HOST} of VO {pki.VO}; proxies with VOMS attributes made {how}:")
    stage.pilot_proxy = stage.proxy("Pilot Robot", pki.PILOT)


def control(stage: Stage, rows: Rows) -> None:
    """The same payload without nodewrap: unless it succeeds here, its failure later would prove nothing."""
    screen.section("3. Without nodewrap: what the payload does when the pilot simply starts it")
    job, payload = stage.job("bare")
    stage.command(payload, stage.pilot.name)
    played = stage.play(["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(job), *payload], payload, job)
    stage.block("the payload says", played.result.text + played.result.err.decode())
    stolen, daemons, litter, traps = stage.stolen(played, job), stage.end_daemons(), stage.litter(), stage.traps(job)
    stage.stop()
    stage.block("seen from outside", f"the pilot's secrets taken: {', '.join(sorted(stolen))}; signals to the pilot: {played.signals}\n"
                f"daemons that outlived the job: {len(daemons)}; files left outside: {len(litter)}; traps among the outputs: {len(traps)}")
    checks = {"the attacks work when nothing stops them": {"proxy", "environment", "tmp", "shm", "loopback", "abstract"} <= stolen,
              "three daemons outlive it": len(daemons) == 3, "it leaves files and traps": bool(litter and traps)}
    rows.put("(anybody)", "bare: the control", played, stolen, len(daemons), len(litter + traps), checks)


def explain(stage: Stage, name: str, fqan: str, options: list[str]) -> None:
    argv = ["policy", "explain", "--caller", stage.pilot.name, "--dn", f"{pki.BASE}/O=Users/CN={name}", "--vo", pki.VO, "--fqan", fqan]
    argv += ["--assurance", "credential", *options]
    done = subprocess.run([stage.site.binary, *argv], capture_output=True, text=True, env=stage.site.environment(stage.pilot), cwd="/")
    stage.block("what is decided, by which rule (nodewrap policy explain)", done.stdout + done.stderr)


def tell(stage: Stage, played: Played) -> None:
    if played.result.out:
        stage.block("what the payload saw", played.result.text)
    if played.result.err:
        stage.block("on stderr", played.result.err.decode())
    for record in played.result.records[-1:]:
        cleanup = record["nodewrap"].get("cleanup")
        stage.block("what cleanup found", json.dumps(cleanup) if cleanup else "nothing ran")
        name = record["nodewrap"]["run"]["id"]
        text = stage.site.admin("audit", "show", stage.site.audit, "--run", name)
        stage.block(f"on record (nodewrap audit show --run {name[:18]})", text, wrap=False)


def allowed(profile: str, played: Played) -> set[str]:
    """What may be reachable: by design of the profile, or because this kernel lacks something and the record says so."""
    degraded = any("landlock" in what for record in played.result.records for what in record["nodewrap"].get("degrade", []))
    return OPEN[profile] | ({"abstract"} if degraded else set())


def run(stage: Stage, rows: Rows, name: str, fqan: str, mode: str, profile: str, *options: str) -> None:
    """One payload through `nodewrap run`, shown and judged."""
    job, payload = stage.job(f"{name.split()[0].lower()}-{mode}-{profile}")
    proxy = stage.proxy(name, fqan)
    argv = ["nodewrap", "run", *options, "--credential", str(proxy), "--workdir", str(job), "--", *payload]
    stage.command(argv, stage.pilot.name)
    explain(stage, name, fqan, list(options))
    played = stage.play([str(stage.site.binary), *argv[1:]], payload, job)
    tell(stage, played)
    stolen, daemons, traps, litter = stage.stolen(played, job), stage.end_daemons(), stage.traps(job), stage.litter()
    cleanup = played.about.get("cleanup", {}) if played.result.records else {}
    checks = {
        "exit status 0": played.result.rc == 0, "the result is right": stage.computed(job),
        "the uid outside is the mode's": stage.uid_is_right(mode, played.uids),
        "the pilot's secrets are safe": stolen <= allowed(profile, played), "no signal reaches the pilot": played.signals == 0,
        "no daemon is left": not daemons, "no file is left outside": not litter, "no trap is in the work directory": not traps,
        "the record is whole": played.actions == TRAIL and cleanup.get("left") == 0 and cleanup.get("killed") == 3,
        "the record names mode, profile, DN": played.actions == TRAIL and (played.about["mode"], played.about["profile"]) == (mode, profile)
        and played.about["subject"]["dn"] == f"{pki.BASE}/O=Users/CN={name}",
    }
    rows.put(name.split()[0], f"{mode} {profile}", played, stolen, len(daemons), len(traps + litter), checks)


def banned(stage: Stage, rows: Rows) -> None:
    job, payload = stage.job("mallory")
    argv = ["nodewrap", "run", "--credential", str(stage.proxy("Mallory Intruder", ANALYSIS)), "--workdir", str(job), "--", *payload]
    stage.command(argv, stage.pilot.name)
    explain(stage, "Mallory Intruder", ANALYSIS, [])
    played = stage.play([str(stage.site.binary), *argv[1:]], payload, job)
    tell(stage, played)
    checks = {"exit status 203": played.result.rc == 203, "nothing ran": not (job / "loot").exists() and not played.uids and not stage.end_daemons(),
              "the denial is on record": played.actions == ["deny"]}
    rows.put("Mallory", "any, but is banned", played, set(), 0, len(stage.traps(job)), checks)


def glexec(stage: Stage, rows: Rows) -> None:
    job, payload = stage.directory("job-glexec"), ["/bin/sh", "-c", GLEXEC, "sh", str(stage.pilot_proxy)]
    env = {"GLEXEC_CLIENT_CERT": str(stage.proxy("Alice Tester", PRODUCTION))}
    stage.command(["glexec", *payload], stage.pilot.name, env)
    played = stage.play([str(stage.site.prefix / "bin/glexec"), *payload], payload, job, env)
    shown = "\n".join(line for line in played.result.text.splitlines() if line.startswith(("I am", "computed")))
    tell(stage, played._replace(result=site.Result(played.result.rc, shown.encode(), played.result.err, played.result.records, 0)))
    stolen, mode = stage.stolen(played, job), "switch" if site.ROOT else "map"
    checks = {"exit status 0": played.result.rc == 0, "the result is right": "computed: 1800030000\n" in played.result.text,
              "the uid outside is the mode's": stage.uid_is_right(mode, played.uids), "the pilot's secrets are safe": not stolen,
              "the payload's own proxy is there": f"of {played.inside}, mode 600" in played.result.text,
              "the record is whole": played.actions == [action for action in TRAIL if action != "handover"]}
    rows.put("Alice", f"glexec: {mode} compat", played, stolen, len(stage.end_daemons()), len(stage.litter()), checks)


def story(stage: Stage, rows: Rows) -> None:
    set_up(stage)
    control(stage, rows)
    if site.ROOT:
        screen.section("4. Alice: to an account of a pool, hers for this run alone; she asks for strict")
        run(stage, rows, "Alice Tester", PRODUCTION, "switch", "strict", "--profile", "strict")
    else:
        screen.section("4. Alice: without an account, in a user namespace; she asks for strict")
        run(stage, rows, "Alice Tester", PRODUCTION, "map", "strict", "--profile", "strict")
    screen.section("5. Bob: without an account, with the host's network")
    run(stage, rows, "Bob Builder", ANALYSIS, "map", "batch")
    screen.section("6. Mallory: banned")
    banned(stage, rows)
    screen.section("7. Bob again, as his VO's tester: log-only, under the pilot's own uid")
    run(stage, rows, "Bob Builder", TESTER, "log-only", "strict")
    screen.section("8. Alice again, for a pilot that only speaks glexec")
    glexec(stage, rows)


def result(rows: Rows) -> bool:
    screen.section("Result, as seen from outside")
    screen.table(HEAD, rows)
    screen.say("uid: outside, seen in /proc while it ran. proxy, secrets: the pilot's, found in what the payload wrote. daemons, files: still "
               "there when run returned, traps in the work directory included. The first row is the control: the same payload without nodewrap. "
               "Where the host's network is open (batch, compat) so are the services on its loopback: SECURITY.md.")
    if not site.ROOT:
        screen.say("Left out, as this is not root: the setuid launcher, mode switch, leased ids, an audit log that the pilot cannot write.")
    return bool(rows) and all(row[-1] == "OK" for row in rows)


def go_on(stage: Stage) -> None:
    screen.section("KEEP=1: everything stays")
    prefix, name = stage.site.prefix, stage.pilot.name
    as_pilot = f"setpriv --reuid {name} --regid {name} --init-groups " if site.ROOT else ""
    proxy = next(stage.directory("proxies").glob("bob-*"))
    print(f"go on:   {as_pilot}{prefix}/bin/nodewrap run --credential {proxy} -- /usr/bin/id\n"
          f"         {prefix}/bin/nodewrap audit show; {prefix}/bin/nodewrap doctor; {prefix}/bin/nodewrap policy show\nremove:  {HERE}/run remove")


def compare(before: dict[str, set[str]], stage: Stage, runs: set[str]) -> bool:
    """The machine is as it was, and says so. runs: ids of what was run."""
    changes = machine.difference(before, machine.snapshot(), stage.session.tag)
    changes += [f"process {pid}" for pid in machine.processes_with(stage.mark)] + machine.cgroups(runs)
    if changes:
        screen.block("this machine is NOT as it was before", "\n".join(changes))
        return False
    screen.say(f"This machine is as it was before; compared: {', '.join(before)}, processes, cgroups.")
    return True


def remove_kept() -> int:
    for top in BASE.glob(f"{PREFIX}*"):
        if (top / "keep").exists():
            print(f"removing {top}")
            site.remove(top)
    return 0


def interrupted(number: int, _: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def on_signals(handler: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def main() -> int:
    if sys.argv[1:] == ["remove"]:
        return remove_kept()
    if sys.argv[1:]:
        sys.exit("usage: demo/run [remove]   (KEEP=1 demo/run leaves everything in place)")
    site.sweep_dead(PREFIX, BASE)
    before = machine.snapshot()
    on_signals(interrupted)
    stage, rows, keep = Stage(), Rows(), os.environ.get("KEEP", "") not in ("", "0")
    good = False
    try:
        story(stage, rows)
        good = result(rows)
    except KeyboardInterrupt as signalled:
        print(f"\n{signalled}: cleaning up", file=sys.stderr)
        keep = False
    finally:
        on_signals(signal.SIG_IGN)  # the clean-up is short
        stage.stop()
        if keep:
            stage.session.keep()
            go_on(stage)
        else:
            runs = stage.runs()
            stage.session.close()
            good &= compare(before, stage, runs)
    return 0 if good else 1


sys.exit(main())
