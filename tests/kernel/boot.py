"""Tests on a distribution's kernel with all of cgroup v2: ``make test-kernel TESTS=tests/integration/test_limits.py``.

Boots Debian's stock kernel in QEMU (emulated, which works everywhere and is slow; ``--kvm`` where that works) with this machine's file system,
read-only, below a layer in memory: nothing that the tests do there is seen here. The kernel is taken from the distribution's package, unpacked below
build/ and never installed.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.site import Session

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / "build/kernel"
#: What it takes to see the host's files; all else is loaded when the kernel asks for it.
MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
TOOLS = ("qemu-system-x86_64", "apt-get", "dpkg-deb")

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc && $b mount -t sysfs sys /sys && $b mount -t devtmpfs dev /dev
for module in {modules}; do $b insmod "/modules/$module" || echo "insmod $module failed"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /lower || $b poweroff -f
$b mount -t tmpfs -o size=80% rw /rw && $b mkdir /rw/up /rw/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work root /root || $b poweroff -f
for dir in proc sys dev; do $b mount --move /$dir /root/$dir; done
export CHECKOUT={checkout} MODULES={tree} CGROUP={cgroup}
exec $b switch_root /root /bin/sh {script} {command}
"""


def missing() -> str:
    """Why it cannot be done here, or ""."""
    tools = [tool for tool in TOOLS if not shutil.which(tool)]
    if os.uname().machine != "x86_64":
        return "the lane knows x86-64 alone"
    if os.geteuid():
        return "only root reads all of this machine's files"
    if not Path("/bin/busybox").exists() or subprocess.run(["ldd", "/bin/busybox"], capture_output=True).returncode == 0:  # 0: a dynamic executable
        tools.append("a static busybox")
    return f"missing: {', '.join(tools)}; next: apt-get install qemu-system-x86 busybox-static" if tools else ""


def kernel() -> Path:
    """The unpacked kernel package, fetched once. The directory that holds boot/ and lib/."""
    root = CACHE / "root"
    if not root.exists():
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        shows = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=True).stdout
        name = next(line.split()[-1] for line in shows.splitlines() if "Depends: linux-image" in line)
        subprocess.run(["apt-get", "download", "-q", name], cwd=CACHE, check=True)
        (package,) = CACHE.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, CACHE / "new"], check=True)
        package.unlink()
        (release,) = (path.name for path in (CACHE / "new/lib/modules").iterdir())
        subprocess.run(["/bin/busybox", "depmod", "-b", CACHE / "new", release], check=True)
        (CACHE / "new").rename(root)
    return root


def in_order(tree: Path) -> list[Path]:
    """The files of MODULES and of what they need, needed ones first."""
    needs: dict[str, list[str]] = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        file, _, rest = line.partition(":")
        needs[file] = rest.split()
    names = {Path(file).name.partition(".")[0].replace("-", "_"): file for file in needs}
    order: list[str] = []
    for module in MODULES:
        if module in names:  # else built in
            order += [file for file in [*reversed(needs[names[module]]), names[module]] if file not in order]
    return [tree / file for file in order]


def cgroup_mount() -> str:
    """Where this machine has cgroup v2."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line]
    return mounts[0] if mounts else "/sys/fs/cgroup"


def initramfs(into: Path, tree: Path, command: list[str]) -> Path:
    """A cpio archive: busybox, the modules, and the script that makes the host's files the root."""
    top = into / "top"
    for name in ("bin", "proc", "sys", "dev", "lower", "rw", "root", "modules"):
        (top / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", top / "bin/busybox")
    files = in_order(tree)
    for file in files:
        shutil.copy(file, top / "modules")
    text = INIT.format(
        modules=" ".join(file.name for file in files), checkout=CHECKOUT, tree=tree, cgroup=cgroup_mount(), command=shlex.join(command),
        script=Path(__file__).with_name("inside.sh"),
    )
    (top / "init").write_text(text)
    (top / "init").chmod(0o755)
    listing = "\n".join(str(path.relative_to(top)) for path in sorted(top.rglob("*"))).encode()
    with open(into / "initramfs", "wb") as out:
        words = ["/bin/busybox", "cpio", "-o", "-H", "newc"]
        subprocess.run(words, cwd=top, input=listing, stdout=out, stderr=subprocess.DEVNULL, check=True)
    return into / "initramfs"


def boot(command: list[str], seconds: int, kvm: bool) -> int:
    """Run command there as root, its output on ours. Its exit status; 125 when the machine ended without telling one, 124 when time ran out."""
    root = kernel()
    (tree,) = (root / "lib/modules").iterdir()
    (image,) = (root / "boot").glob("vmlinuz-*")
    with tempfile.TemporaryDirectory(prefix="nw-kernel-") as made:
        ramdisk, result = initramfs(Path(made), tree, command), Path(made) / "result"
        argv = [
            "qemu-system-x86_64", "-accel", "kvm" if kvm else "tcg", "-cpu", "max", "-m", "3G", "-smp", "2", "-nodefaults", "-display", "none",
            "-no-reboot", "-kernel", image, "-initrd", ramdisk,
            "-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio", "-serial", f"file:{result}",
            "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ]
        return ended_with(argv, result, seconds)


def ended_with(argv: list[str | Path], result: Path, seconds: int) -> int:
    """Runs that virtual machine; the exit status that it wrote to result by its second serial port, 124, or 125 (see boot)."""
    try:
        subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"the virtual machine was not done in {seconds} s", file=sys.stderr)
        return 124
    said = result.read_text().strip() if result.exists() else ""
    return int(said) if said.isdigit() else 125


def tests(words: list[str], seconds: int, kvm: bool, escape: bool) -> int:
    """pytest, or the escape suite, with these words, on installations that were made here, where that takes seconds and not minutes."""
    session = Session()
    try:
        for launcher in ("setuid", "userns"):
            session.site(launcher)
        ready = session.top / "session"
        ready.write_bytes(pickle.dumps(session))
        suite = ["tests.escape.suite", "--session", str(ready)]
        command = [sys.executable, "-m", *(suite if escape else ["pytest", "-p", "no:cacheprovider"]), *words]
        return boot(["env", f"NODEWRAP_TEST_SESSION={ready}", *command], seconds, kvm)
    finally:
        session.close()


def left_out(lane: str, why: str) -> int:
    """Says so; the exit status: a failure where everything must work."""
    print(f"{lane}: left out: {why}", file=sys.stderr)
    return 1 if os.environ.get("NODEWRAP_MUST_WORK", "0") not in ("", "0") else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel.boot", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=1200)
    parser.add_argument("--kvm", action="store_true", help="not emulated: many times faster, where /dev/kvm works")
    parser.add_argument("--escape", action="store_true", help="the words are the escape suite's (tests/escape/suite.py), and not pytest's")
    parser.add_argument("--run", action="store_true", help="the words are a command, and not pytest's")
    parser.add_argument("words", nargs="+", help="what pytest gets: files, options (after --)")
    arguments = parser.parse_args()
    why = missing()
    if why:
        return left_out("test-kernel", why)
    if arguments.run:
        return boot(arguments.words, arguments.seconds, arguments.kvm)
    return tests(arguments.words, arguments.seconds, arguments.kvm, arguments.escape)


if __name__ == "__main__":
    sys.exit(main())
