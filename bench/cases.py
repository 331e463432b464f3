"""What is started: a bare exec, the launchers each way, and peers that isolate or switch, all by the pilot's account."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from bench.node import Node, Place
from tests.site import ROOT

#: Milliseconds over a bare exec that the project promised itself; records in memory, since what the disk takes is counted apart.
RESIDENT, SPAWNED, MANY_MOUNTS, NETWORK = 3.0, 20.0, 4.0, 6.0
TRUE = "/bin/true"
BARE = "bare exec"
NAMES = {"strict": "strict", "net": "strict with private network"}
SYSTEM = ("/bin", "/lib", "/lib64", "/sbin")


class Case(NamedTuple):
    """argv: the command. lines: more of timer's lines for it ("link A B", "fd9 A", "env A=b"). target: ms over the bare exec, 0 for none."""

    name: str
    argv: tuple[str, ...]
    lines: tuple[str, ...] = ()
    target: float = 0.0


def nodewrap(place: Place, name: str, ask: tuple[str, ...], resident: bool, in_memory: bool, target: float = 0.0) -> Case:
    guard = place.guards[resident, in_memory]
    line = f"link {place.site.sysconf / 'guard'} {guard}" if place.site.launcher == "setuid" else f"env NODEWRAP_GUARD={guard}"
    how = "resident" if resident else "spawned"
    where = "" if in_memory or not place.memory else ", records on disk"
    program = place.site.prefix / f"libexec/nodewrap/nodewrap-{place.site.launcher}"
    return Case(f"{place.site.launcher}, {name}, {how}{where}", (str(program), "run", *ask, "--", TRUE), (line,), target)


def by_name(place: Place) -> Case:
    """``nodewrap`` on PATH: the same launcher by way of one more exec."""
    case = nodewrap(place, "map", declared("map"), True, place.memory is not None)
    return case._replace(name=case.name + ", by nodewrap on PATH", argv=(str(place.site.binary), *case.argv[1:]))


def declared(vo: str) -> tuple[str, ...]:
    return ("--declare", "subject=/CN=bench", "--declare", f"vo={vo}")


def of_place(place: Place, proxy: Path | None) -> list[Case]:
    """The launcher of one installation. Without a file system in memory all records are on disk."""
    memory = place.memory is not None
    found = [nodewrap(place, "map", declared("map"), True, memory, RESIDENT)]
    if place.site.launcher == "setuid":
        found.append(nodewrap(place, "switch", declared("switch"), True, memory, RESIDENT))
        for profile, target in (("strict", 0.0), ("net", NETWORK)) if place.networks else ():
            found.append(nodewrap(place, f"map, {NAMES[profile]}", (*declared("map"), "--profile", profile), True, memory, target))
    found.append(by_name(place))
    if memory:
        found.append(nodewrap(place, "map", declared("map"), True, False))
    found.append(nodewrap(place, "map", declared("map"), False, memory, SPAWNED))
    if proxy:
        ask = ("--credential", str(proxy))
        found += [nodewrap(place, "map, X.509", ask, resident, memory) for resident in (True, False)]
    return found


def bare() -> Case:
    return Case(BARE, (TRUE,))


def start_cases(node: Node, others: list[Case]) -> list[Case]:
    return [bare(), *(case for place in node.places.values() for case in of_place(place, node.proxy)), *others]


def mount_cases(node: Node, others: list[Case]) -> list[Case]:
    """With many mounts on the host; the child resident, so that the mounts are what differs."""
    ours = [nodewrap(place, "map", declared("map"), True, place.memory is not None, MANY_MOUNTS) for place in node.places.values()]
    return [bare(), *ours, *(case for case in others if case.name == "bwrap")]


def peers(node: Node) -> list[Case]:
    """Those that are installed; sudo needs a rule, which only root can make."""
    known = {"bwrap": bwrap, "sudo": sudo, "firejail": firejail, "crun": crun}
    return [known[name](node) for name in known if shutil.which(name) and (ROOT or name != "sudo")]


def missing() -> list[str]:
    return [name for name in ("bwrap", "sudo", "firejail", "crun") if not shutil.which(name)]


def bwrap(node: Node) -> Case:
    """As profile batch: user, pid, ipc, uts, cgroup and mount namespaces, its own init, our filter."""
    place = next(iter(node.places.values()))
    mounts = [word for path in SYSTEM for word in (("--symlink", os.readlink(path), path) if os.path.islink(path) else ("--ro-bind-try", path, path))]
    mounts += ["--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/var/tmp"]
    names = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session"]
    seccomp = place.site.state / "policy/current/seccomp.batch.bpf"
    return Case("bwrap", ("bwrap", *names, *mounts, "--seccomp", "9", TRUE), (f"fd9 {seccomp}",))


def sudo(node: Node) -> Case:
    """To another account by a rule without password: identity alone, no isolation."""
    user = node.session.accounts["user1"].name
    return Case("sudo", ("sudo", "-n", "-u", user, TRUE))


def firejail(node: Node) -> Case:
    """Namespaces and filter without its default profile of over-mounts."""
    return Case("firejail", ("firejail", "--quiet", "--noprofile", "--seccomp", "--ipc-namespace", "--private-tmp", "--private-dev", TRUE))


def crun(node: Node) -> Case:
    """Rootless, without a cgroup manager; the root is the host's /usr and /etc."""
    bundle = node.session.top / "crun"
    (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
    (bundle / "state").mkdir(exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(_bundle(node)))
    for path in (bundle, bundle / "rootfs", bundle / "state", bundle / "config.json"):
        os.chown(path, node.pilot.uid, node.pilot.gid)
    argv = ("crun", f"--root={bundle}/state", "--cgroup-manager=disabled", "run", f"--bundle={bundle}", "nodewrap-bench")
    return Case("crun", argv, (f"env XDG_RUNTIME_DIR={bundle}",))


def _bundle(node: Node) -> dict[str, object]:
    binds = [path for path in ("/usr", "/etc", *SYSTEM) if os.path.exists(path)]
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}]
    mounts += [{"destination": path, "source": os.path.realpath(path), "options": ["rbind", "ro"]} for path in binds]  # type: ignore[dict-item]
    spaces = [{"type": kind} for kind in ("user", "pid", "mount", "ipc", "uts", "cgroup")]
    own = {"containerID": 0, "size": 1}
    ids = {"uidMappings": [{**own, "hostID": node.pilot.uid}], "gidMappings": [{**own, "hostID": node.pilot.gid}]}
    process = {"terminal": False, "user": {"uid": 0, "gid": 0}, "args": [TRUE], "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "noNewPrivileges": True}
    refuse = {"names": ["io_uring_setup", "bpf", "keyctl", "add_key"], "action": "SCMP_ACT_ERRNO"}
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"], "syscalls": [refuse]}
    linux = {"namespaces": spaces, **ids, "seccomp": seccomp}
    return {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs"}, "mounts": mounts, "linux": linux}
