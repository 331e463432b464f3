"""A whole distribution as a node: ``make test-distribution DISTRIBUTION_ARGS="-- --mode switch --profile strict"``.

Debian, made from its packages alone: systemd, cgroup v2 with every controller, AppArmor, Yama. nodewrap is installed into it as a site would
(``make install``, units, guard, policy: node.sh), it is booted in QEMU, and ``nodewrap escape-test`` is run there by the site's own policy; with
``--tests``, pytest on throw-away installations. Nothing of this machine is seen there, and nothing done there is kept.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernel.boot import CHECKOUT, ended_with, left_out

CACHE = CHECKOUT / "build/distribution"
HERE = Path(__file__).resolve().parent
SUITE = "bookworm"
#: The node's, nodewrap's own (packaging/deps.sh), and those that tests call.
PACKAGES = (
    "systemd-sysv", "dbus", "libpam-systemd", "apparmor", "linux-image-amd64", "kmod", "udev", "iproute2", "nftables", "sudo", "procps", "psmisc",
    "gcc", "make", "libc6-dev", "python3", "python3-venv", "libffi8", "libseccomp2", "libcap2-bin", "uidmap", "passt",
    "voms-clients", "openssl", "acl", "attr", "bubblewrap", "busybox-static", "e2fsprogs", "squashfs-tools", "squashfuse",
)
TOOLS = ("qemu-system-x86_64", "mmdebstrap", "mkfs.ext4", "unshare", "tar")
SIZE = "4G"
BOOT_S = 120  # to come up; what is run there ends before the machine is taken away, and tells its status


def missing() -> str:
    """Why it cannot be done here, or ""."""
    if os.uname().machine != "x86_64":
        return "the lane knows x86-64 alone"
    if os.geteuid():
        return "only root makes accounts and devices in a tree"
    tools = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"missing: {', '.join(tools)}; next: apt-get install qemu-system-x86 mmdebstrap" if tools else ""


def sources() -> list[Path]:
    """Where this machine's apt gets its packages; the distribution is made from the same."""
    found = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    return [path for path in found if path.exists() and path.stat().st_size]


def system() -> Path:
    """The distribution without nodewrap, as an archive; made once, and again when PACKAGES change."""
    archive, names = CACHE / "system.tar", CACHE / "packages"
    wanted = ",".join(PACKAGES)
    if not (archive.exists() and names.exists() and names.read_text() == wanted):
        CACHE.mkdir(parents=True, exist_ok=True)
        options = [f"--aptopt={path}" for path in sorted(Path("/etc/apt/apt.conf.d").glob("*")) if "Acquire::" in path.read_text()]
        subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={wanted}", *options, SUITE, archive, *sources()], check=True)
        names.write_text(wanted)
    return archive


def disk(into: Path, seconds: int, words: list[str]) -> tuple[Path, Path, Path]:
    """The node: (disk, kernel, initial ramdisk). words: what it runs when it is up (run.sh)."""
    tree = into / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-C", tree, "-xf", system()], check=True)
    copy_checkout(tree)
    # A mount namespace of its own, so that what is mounted for the installation is gone with it, however it ends.
    subprocess.run(["unshare", "--mount", "--propagation", "private", HERE / "node.sh", tree, CHECKOUT], check=True)
    (tree / "etc/nodewrap-lane").write_text(f"SECONDS_AT_MOST={seconds}\nCHECKOUT={CHECKOUT}\nWORDS={shlex.quote(shlex.join(words))}\n")
    image = into / "disk"
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, image, SIZE], check=True)
    (kernel,), (ramdisk,) = (tree / "boot").glob("vmlinuz-*"), (tree / "boot").glob("initrd.img-*")
    return image, kernel.rename(into / "kernel"), ramdisk.rename(into / "ramdisk")


def copy_checkout(tree: Path) -> None:
    """What is under version control, as it stands, and what was built of it."""
    top = tree / CHECKOUT.relative_to("/")
    top.mkdir(parents=True)
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, check=True)
    names = [name for name in listed.stdout.split(b"\0") if name and (CHECKOUT / os.fsdecode(name)).exists()]
    names += [b"build/c", b"build/venv", b"build/wheels", b"build/python"]
    names += [os.fsencode(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("nodewrap/_core*")]
    words = ["tar", "-C", CHECKOUT, "--null", "-cf", "-", "-T", "-"]
    packed = subprocess.run(words, input=b"\0".join(names), stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-C", top, "-xf", "-"], input=packed.stdout, check=True)


def boot(words: list[str], seconds: int, kvm: bool) -> int:
    """As tests/kernel/boot.py's."""
    with tempfile.TemporaryDirectory(prefix="nw-distribution-", dir=CACHE.parent) as made:
        into = Path(made)
        image, kernel, ramdisk = disk(into, seconds - BOOT_S, words)
        argv = [
            "qemu-system-x86_64", "-accel", "kvm" if kvm else "tcg", "-cpu", "max", "-m", "4G", "-smp", "2", "-nodefaults", "-display", "none",
            "-no-reboot", "-kernel", kernel, "-initrd", ramdisk,
            "-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 apparmor=1 security=apparmor",
            "-serial", "stdio", "-serial", f"file:{into / 'result'}",
            "-drive", f"file={image},if=virtio,format=raw,cache=unsafe", "-device", "virtio-rng-pci",
        ]
        return ended_with(argv, into / "result", seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel.distribution", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=5400)
    parser.add_argument("--kvm", action="store_true", help="not emulated: many times faster, where /dev/kvm works")
    parser.add_argument("--tests", action="store_true", help="the words are pytest's, and not those of nodewrap escape-test")
    parser.add_argument("--run", action="store_true", help="the words are a command")
    parser.add_argument("words", nargs="*", help="after --")
    arguments = parser.parse_args()
    why = missing()
    if why:
        return left_out("test-distribution", why)
    CACHE.mkdir(parents=True, exist_ok=True)
    how = "command" if arguments.run else "tests" if arguments.tests else "escape"
    return boot([how, *arguments.words], arguments.seconds, arguments.kvm)


if __name__ == "__main__":
    sys.exit(main())
