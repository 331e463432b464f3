"""What the policy child loads: the cost of every start, and all that its seccomp filter must let it read (docs/architecture.md, hot path)."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOT = ("model", "wire", "digest", "usage", "request", "glexec", "environment", "policy.names", "policy.evaluate", "policy.store", "decide", "serve")
HOT += ("apptainer",)  # where the policy has images

#: What a bare ``python3 -I -S -B -c pass`` has loaded anyway is not counted. Beyond it, each written in C: the wire's struct, descriptors over
#: sockets, compiled policy, comparison of names, digests, account names, and the C core's loader.
ALLOWED = {"_struct", "_socket", "unicodedata", "_sha256", "_sha2", "pwd", "_cffi_backend"}
#: `os` is 1.6 ms of every start; `posix` has what is needed of it. What `os` brings along:
ALLOWED |= {"os", "stat", "_stat", "_collections_abc", "posixpath", "genericpath"}


def python(code):
    """stdout and the module names that ``-X importtime`` reports."""
    prelude = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {sysconfig.get_path('platlib')!r}]; "
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-X", "importtime", "-c", prelude + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"\|\s+([\w.]+)\s*$", done.stderr, re.M)


BARE = set(python("pass")[1]) | set(python("print(*sys.modules)")[0].split())


def present():
    return [name for name in HOT if (ROOT / "nodewrap" / (name.replace(".", "/") + ".py")).exists()]


@pytest.mark.parametrize("name", present())
def test_hot_module_loads_nothing_beyond_the_list(name):
    loaded = set(python(f"import nodewrap.{name}")[1]) - BARE
    own = {module for module in loaded if module.split(".")[0] == "nodewrap"}
    assert f"nodewrap.{name}" in own
    assert loaded - own - ALLOWED == set()
    assert not [module for module in own if module.startswith(("nodewrap.commands", "nodewrap.audit", "nodewrap.credentials"))]


def test_check_sees_a_module_that_is_not_allowed():
    assert "json" in set(python("import nodewrap.audit.log")[1]) - BARE
