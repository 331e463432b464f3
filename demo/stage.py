"""Where the story plays: the throw-away site, the grid, a pilot; and the judge, who looks from outside."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from demo import machine, policy, screen
from tests import pki, site

PREFIX = "nodewrap-demo-"
#: Not /opt: profile batch shows that, and a pilot's home below it would be in the payload's sight, only its mode in between.
BASE = Path("/var/lib") if site.ROOT else Path.home()
HERE = Path(__file__).parent
PRIMES = 348513  # below 5,000,000
PYTHON = "/usr/bin/python3"
KINDS = ("environment", "memory", "tmp", "shm", "loopback", "abstract")
PRODUCTION, ANALYSIS, TESTER = f"/{pki.VO}/production", f"/{pki.VO}/analysis", f"/{pki.VO}/Role=lcgadmin"
TRAIL = ["authorize", "start", "exit", "handover", "cleanup"]


class Played(NamedTuple):
    """What came of one run. held: the secrets of its pilot by kind. signals: how many reached the pilot. uids: the payload's, outside."""

    result: site.Result
    held: dict[str, str]
    signals: int
    uids: set[int]

    @property
    def actions(self) -> list[str]:
        return [record["event"]["action"] for record in self.result.records if record["event"]["action"] != "degrade"]

    @property
    def about(self) -> dict:
        """What the last record says under ``nodewrap``."""
        return self.result.records[-1]["nodewrap"]

    @property
    def inside(self) -> str:
        """The uid that the payload says it has."""
        return (self.result.text.partition("I am: uid ")[2].split() or ["-"])[0]


class Stage:
    """Everything that is made is below ``session.top``, and is written down there before it is made (tests/site.py)."""

    def __init__(self) -> None:
        self.session = site.Session(PREFIX, roles=("pool01", "pool02"), base=BASE)
        self.launcher = "setuid" if site.ROOT else "userns"
        self.mark = f"nwdemo-{self.session.tag}-{secrets.token_hex(8)}"
        self.pilot = self.session.accounts["pilot"]
        self.pool = [self.session.accounts[role] for role in ("pool01", "pool02")] if site.ROOT else []
        self.leased = policy.map_uids(self.session.tag)
        self.process: subprocess.Popen[bytes] | None = None

    # ---- printing: the long name of the place is DEMO ----

    def command(self, argv: list[str], who: str, env: dict[str, str] | None = None) -> None:
        screen.command([self.brief(str(word)) for word in argv], who, {name: self.brief(value) for name, value in (env or {}).items()})

    def block(self, title: str, text: str, wrap: bool = True) -> None:
        screen.block(self.brief(title), self.brief(text), wrap)

    def brief(self, text: str) -> str:
        return text.replace(str(self.session.top), "DEMO")

    # ---- what there is ----

    def build_site(self) -> None:
        self.site = self.session.site(self.launcher)
        self.grid = pki.Pki(self.session.top / "grid")
        self.site.guard(**policy.guard(self.grid, self.pilot, self.pool, self.leased))

    def proxy(self, name: str, fqan: str) -> Path:
        """A proxy file in the pilot's hands, as a pilot fetches it; readable by the pilot alone."""
        if name != "Pilot Robot" and not self.grid.cert_file(name).exists():
            self.grid.user(name)
        path = self.directory("proxies") / f"{name.split()[0].lower()}-{secrets.token_hex(2)}.pem"
        self.give(path, self.grid.proxy(name, [fqan]).read_bytes() if shutil.which("voms-proxy-fake") else self.forged(name, fqan), 0o600)
        print(f"  {path.name:<18} {pki.BASE}/O=Users/CN={name:<17} {fqan}")
        return path

    def forged(self, name: str, fqan: str) -> bytes:
        user = self.grid.user(name)
        return self.grid.forge_proxy(user, acs=[self.grid.forge_ac(user, fqans=[fqan])]).file(user)

    def give(self, path: Path, content: bytes, mode: int = 0o644) -> None:
        path.write_bytes(content)
        path.chmod(mode)
        os.chown(path, self.pilot.uid, self.pilot.gid)

    def directory(self, name: str) -> Path:
        """A directory of the pilot's: in its home as root, below the session's own directory else."""
        path = (self.pilot.home if site.ROOT else self.session.top) / name
        if not path.exists():
            path.mkdir(mode=0o700)
            os.chown(path, self.pilot.uid, self.pilot.gid)
        return path

    def job(self, name: str) -> tuple[Path, list[str]]:
        """(a work directory of the pilot's with the payload staged in, the payload's command line)."""
        path = self.directory(f"job-{name}")
        self.give(path / "payload.py", (HERE / "payload.py").read_bytes())
        return path, [PYTHON, "-I", "payload.py", self.mark]

    # ---- a run ----

    def play(self, argv: list[str], payload: list[str], job: Path, env: dict[str, str] | None = None) -> Played:
        """Let a pilot run argv, of which payload is the user's command."""
        held = {kind: f"DEMO-SECRET-{kind}-{secrets.token_hex(16)}" for kind in KINDS}
        home = self.directory("pilot")
        self.give(home / "pilot.py", (HERE / "pilot.py").read_bytes())
        names = {"tmp": f"/tmp/{self.mark}-pilot", "shm": f"/dev/shm/{self.mark}-pilot", "abstract": f"{self.mark}-{secrets.token_hex(4)}"}
        setup = {"secrets": held, "targets": str(job / "targets.json"), "report": str(home / "report.json"), **names}
        self.give(home / "setup.json", json.dumps(setup).encode())
        env = {"X509_USER_PROXY": str(self.pilot_proxy), "DEMO_PILOT_TOKEN": held["environment"], **(env or {})}
        watch = machine.Watch(payload)
        result = self.run_pilot([PYTHON, "-I", home / "pilot.py", home / "setup.json", *argv], env)
        return Played(result, held, len(json.loads((home / "report.json").read_text())["signals"]), watch.result())

    def run_pilot(self, argv: list[object], env: dict[str, str]) -> site.Result:
        before, pipe = self.site.audit_size(), subprocess.PIPE
        self.process = self.site.start(argv, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
        out, err = self.process.communicate(timeout=120)
        code, self.process = self.process.returncode, None
        return site.Result(code, out, err, self.site.records(before), 0)

    # ---- the judge: nothing that the payload says counts ----

    def stolen(self, played: Played, job: Path) -> set[str]:
        """Which of the pilot's secrets stand in anything that the payload wrote."""
        files = [path.read_bytes() for path in job.rglob("*") if path.is_file() and not path.is_symlink()]
        wrote = played.result.out + played.result.err + b"".join(files)
        key = self.pilot_proxy.read_bytes().split(b"PRIVATE KEY-----")[1][1:65]
        return {kind for kind, text in played.held.items() if text.encode() in wrote} | ({"proxy"} if key in wrote else set())

    def traps(self, job: Path) -> list[str]:
        """What stands in the work directory that the pilot could fall into: links, FIFOs, foreign owners, set-id bits."""
        found = []
        for path in job.rglob("*"):
            info = path.lstat()
            if info.st_uid != self.pilot.uid or info.st_mode & 0o6000 or path.is_symlink() or not (path.is_dir() or path.is_file()):
                found.append(str(path))
        return found

    def litter(self) -> list[str]:
        """Files with our mark in the places where every account may write, and in the homes."""
        places = [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path.home(), self.session.top, *(self.session.top / "home").glob("*")]
        return [str(path) for place in places for path in place.glob(f"{self.mark}*")]

    def end_daemons(self) -> list[int]:
        """The daemons of this demonstration that are still alive, by their mark; ended now."""
        found = machine.processes_with(self.mark)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return found

    def uid_is_right(self, mode: str, uids: set[int]) -> bool:
        """The payload's uid outside, as seen in /proc, is what its mode promises. Unprivileged map: from the caller's delegated range, or its own."""
        if mode == "log-only" or (mode == "map" and not site.ROOT):
            return len(uids) == 1 and (mode == "map" or uids == {self.pilot.uid})
        allowed = {account.uid for account in self.pool} if mode == "switch" else self.leased
        return len(uids) == 1 and uids <= set(allowed)

    def computed(self, job: Path) -> bool:
        path = job / "result.json"
        return path.exists() and json.loads(path.read_text()) == {"primes_below_5000000": PRIMES}

    def runs(self) -> set[str]:
        """Ids of all runs so far, by the records."""
        return {record["nodewrap"]["run"]["id"] for record in self.site.records()} if self.launcher in self.session.sites else set()

    def stop(self) -> None:
        """End a pilot that still runs (Ctrl-C): it passes the signal on, and nodewrap cleans up behind its payload."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.end_daemons()
        for path in self.litter():
            Path(path).unlink(missing_ok=True)
