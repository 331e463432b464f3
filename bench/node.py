"""The machine of a measurement: throw-away installations (tests/site.py), their policies and guards, resident policy children, a proxy of a user."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests import container
from tests.pki import VO, Pki
from tests.site import ROOT, Session, command

CHECKOUT = Path(__file__).parents[1]
#: The profile, and the VO, of payloads in containers.
CONTAINED = "contained"
BUILD = CHECKOUT / "build/bench"
#: Of documentation (RFC 5737): a node has no way there.
NETWORK = "203.0.113.0/24"
POLICY = """
[site]
name = "BENCH"
multi_user = "yes"
modes = {{ switch = "allow", map = "allow", log-only = "allow" }}
minimum_assurance = "declared"

[[caller]]
account = ["{pilot}"]
{pool}
[profile.net]
like = "strict"
network = {{ mode = "private", allow = ["any:443", "192.0.2.0/24"], deny = ["192.0.2.1"] }}

[[rule]]
name = "map"
when = {{ vo = ["map", "{vo}"] }}
identity = {{ mode = "map" }}
profile = ["batch", "strict", "net"]
{switch}
"""
POOL = """
[pool.bench]
accounts = ["{pool01}", "{pool02}", "{pool03}"]
"""
SWITCH = """
[[rule]]
name = "switch"
when = { vo = "switch" }
identity = { mode = "switch", pool = "bench" }
profile = ["batch", "strict"]
limits = { processes = 5100 }

[[rule]]
name = "bomb"
when = { vo = "bomb" }
identity = { mode = "switch", pool = "bench" }
profile = "batch"
limits = { processes = 2000 }
"""


def compiled(name: str) -> Path:
    """bench/NAME.c as a program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    command(os.environ.get("CC", "gcc"), "-O2", "-o", BUILD / name, CHECKOUT / f"bench/{name}.c")
    return BUILD / name


def apptainer() -> Path | None:
    own = container.OWN / "usr/bin/apptainer"
    found = own if own.exists() else shutil.which("apptainer")
    return Path(found) if found and shutil.which("busybox") else None


def contained(top: Path) -> str:
    """A rule for images in that directory, and a profile that shows the runtime; "" where there is none."""
    runtime = apptainer()
    if not runtime:
        return ""
    shown = f'add = {{ read_only = ["{container.OWN}"] }}' if runtime.is_relative_to(container.OWN) else ""
    rule = f'identity = {{ mode = "map" }}\nprofile = "{CONTAINED}"\nimage = "{top}/*"\napptainer = {{ program = "{runtime}" }}'
    return f'\n[[rule]]\nname = "{CONTAINED}"\nwhen = {{ vo = "{CONTAINED}" }}\n{rule}\n\n[profile.{CONTAINED}]\nlike = "batch"\n{shown}\n'


class Place:
    """One installation with its variants of the guard: resident or not, records and leases on disk or in memory."""

    def __init__(self, session: Any, launcher: str, memory: Path | None, pki: Pki | None) -> None:
        self.site = session.site(launcher)
        self.session, self.memory, self.pki = session, memory, pki
        self.running: list[subprocess.Popen[bytes]] = []
        self.guards: dict[tuple[bool, bool], Path] = {}
        self.site.policy(self._policy())
        for resident in (False, True):
            for in_memory in (False, True) if memory else (False,):
                self.guards[resident, in_memory] = self._guard(resident, in_memory)
        self.running.append(self._resident("policyd"))
        #: Private networks: where packets may pass and rules can be made. Nothing that is measured sends any.
        self.networks = launcher == "setuid" and bool(shutil.which("nft")) and Path("/proc/sys/net/ipv4/ip_forward").read_text() != "0\n"
        if self.networks:
            self.running.append(self._resident("netd"))
        self.default = self.guards[False, False]
        self.point(self.default)

    def _policy(self) -> str:
        names = {role: account.name for role, account in self.session.accounts.items()}
        setuid = self.site.launcher == "setuid"
        text = POLICY.format(pilot=names["pilot"], vo=VO, pool=POOL.format(**names) if setuid else "", switch=SWITCH if setuid else "")
        return text + contained(self.session.top)

    def _guard(self, resident: bool, in_memory: bool) -> Path:
        allow = [f"map batch strict net {CONTAINED}", "log-only batch"]
        changes: dict[str, Any] = {"allow": allow, "policyd": str(self.socket) if resident else None}
        if self.site.launcher == "setuid":
            ids = sorted(account.uid for account in self.session.accounts.values())
            changes.update(switch_uid=f"{ids[0]}-{ids[-1]}", switch_gid=f"{ids[0]}-{ids[-1]}", map_uid="1900000000-1900000999")
            changes["allow"].append("switch batch strict")
            changes.update(netd=str(self.socket.with_name("netd")), network=NETWORK)
        if self.pki:
            changes["ca_dir"], changes["voms_dir"] = str(self.pki.ca_dir), str(self.pki.voms_dir)
        if in_memory:
            changes["state"], changes["audit"] = str(self._own_directory()), str(self._own_directory() / "audit.jsonl")
        self.site.guard(**changes)
        path = self.site.sysconf / f"guard-{'resident' if resident else 'spawned'}-{'memory' if in_memory else 'disk'}"
        self.site.write(path, (self.site.sysconf / "guard").read_text())
        self.site.reset()
        return path

    def _own_directory(self) -> Path:
        assert self.memory
        path = self.memory / self.site.launcher
        path.mkdir(mode=0o755, exist_ok=True)
        if ROOT and self.site.launcher == "userns":
            os.chown(path, self.site.pilot.uid, self.site.pilot.gid)
        return path

    @property
    def socket(self) -> Path:
        return Path(self.site.prefix / "run/policyd")

    def _resident(self, verb: str) -> subprocess.Popen[bytes]:
        """Popen of policyd or netd, when it takes connections."""
        owner = {}
        if ROOT and self.site.launcher == "userns":
            owner = {"user": self.site.pilot.uid, "group": self.site.pilot.gid, "extra_groups": self.site.pilot.groups}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(b"\0nodewrap-bench-" + os.urandom(8).hex().encode())
            notify.settimeout(20)
            env = {**self.site.environment(self.site.pilot), "NOTIFY_SOCKET": "@" + notify.getsockname()[1:].decode()}
            argv = [str(self.site.binary), verb, "--guard", str(self.guards[True, False])]
            process = subprocess.Popen(argv, env=env, cwd="/", **owner)
            notify.recv(100)
        return process

    def point(self, guard: Path) -> None:
        """Put that guard in force for who has no NODEWRAP_GUARD."""
        new = self.site.sysconf / "guard.link"
        new.symlink_to(guard)
        new.rename(self.site.sysconf / "guard")

    def close(self) -> None:
        for process in self.running:
            process.terminate()
            process.wait(20)


class Node:
    """What everything is measured on. places: by launcher. proxy: a user's, readable for the pilot; None without voms-proxy-fake."""

    def __init__(self) -> None:
        self.session = Session()
        self.places: dict[str, Place] = {}
        self.pilot = self.session.accounts["pilot"]
        self.memory = self._tmpfs() if ROOT else None
        self.pki, self.proxy = self._credential()
        self._one_id_only()
        for launcher in ("setuid", "userns") if ROOT else ("userns",):
            self.places[launcher] = Place(self.session, launcher, self.memory, self.pki)

    def _tmpfs(self) -> Path:
        path: Path = self.session.top / "memory"
        path.mkdir()
        command("mount", "-t", "tmpfs", "-o", "mode=0755", "nodewrap-bench", path)
        return path

    def _credential(self) -> tuple[Pki | None, Path | None]:
        if not (ROOT and shutil.which("voms-proxy-fake")):
            return None, None
        pki = Pki(self.session.top / "pki")
        proxy = Path(shutil.copy(pki.proxy(), self.pilot.home / "proxy"))
        os.chown(proxy, self.pilot.uid, self.pilot.gid)
        proxy.chmod(0o600)
        return pki, proxy

    def _one_id_only(self) -> None:
        """As bwrap: the caller's one id. With a range of /etc/subuid each start runs newuidmap and newgidmap, two more programs."""
        for option, file in (("--del-subuids", "/etc/subuid"), ("--del-subgids", "/etc/subgid")):
            for line in Path(file).read_text().splitlines() if ROOT and Path(file).exists() else ():
                name, first, size = line.split(":")
                if name == self.pilot.name:
                    command("usermod", option, f"{first}-{int(first) + int(size) - 1}", name)

    def close(self) -> None:
        for place in self.places.values():
            place.close()
        self.session.close()
