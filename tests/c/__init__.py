"""Small C programs around single files of csrc/, for what a whole run cannot show."""

from __future__ import annotations

import subprocess

from tests.files import CHECKOUT

FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover", "-I", str(CHECKOUT / "csrc")]
#: What csrc/audit.c needs beside itself.
AUDIT = ("audit", "json", "path", "sys", "err", "guard", "line", "decision", "wire")


def build(program, sources, to, flags=()):
    """Compile tests/c/PROGRAM.c with csrc/SOURCE.c… -> path of the program below the directory to."""
    files = [CHECKOUT / f"tests/c/{program}.c", *(CHECKOUT / f"csrc/{name}.c" for name in sources)]
    subprocess.run(["gcc", *FLAGS, *flags, "-o", to / program, *files], check=True)
    return to / program
