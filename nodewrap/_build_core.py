"""Describe the C core to cffi: ``nodewrap._core`` is built from the very files that the launcher is built from.

``csrc/core.list`` names them, one a line, in an order in which each header needs only those before it. What Python sees is cut out of the
headers between ``/* cffi: begin */`` and ``/* cffi: end */``: there is no second copy of a declaration that could drift.
"""

from __future__ import annotations

import os
import re

from cffi import FFI

CSRC = "csrc"
SHOWN = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.S)
ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)(?=\s*[;{}]|\s+\w)", re.S)


def core_files() -> list[str]:
    with open(os.path.join(CSRC, "core.list"), encoding="utf-8") as names:
        return [name for name in (line.split("#")[0].strip() for line in names) if name]


def headers() -> list[str]:
    """The header beside each core file, and those that core.list names itself, in its order."""
    names = [re.sub(r"\.c$", ".h", name) for name in core_files()]
    return [name for name in dict.fromkeys(names) if os.path.exists(os.path.join(CSRC, name))]


def declarations(header: str) -> str:
    with open(os.path.join(CSRC, header), encoding="utf-8") as text:
        return ATTRIBUTE.sub("", "\n".join(SHOWN.findall(text.read())))


ffi = FFI()
for _header in headers():
    ffi.cdef(declarations(_header))
ffi.set_source(
    "nodewrap._core",
    "".join(f'#include "{header}"\n' for header in headers()),
    sources=[os.path.join(CSRC, name) for name in core_files() if name.endswith(".c")],
    include_dirs=[CSRC],
    extra_compile_args=["-std=gnu11"],
)
