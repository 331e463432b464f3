"""The C code: analysers find nothing, and it stays small enough to review in a day."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.need import need

#: The aim is 3,500; the keeper, which outlives the front process, came on top.
LINES = 6725
FUNCTION = 120

DEFINES = [
    '-DNW_VERSION="0"',
    '-DNW_GUARD="/etc/nodewrap/guard"',
    '-DNW_LIBEXEC="/usr/libexec/nodewrap"',
    '-DNW_PYTHON_CLI="/usr/lib/nodewrap/venv/bin/python3"',
]

# bugprone, cert and the static analyser, without: easily-swappable-parameters (every syscall wrapper is one), reserved-identifier (_GNU_SOURCE),
# the _s functions of Annex K (glibc has none), narrowing and assignment-in-if (both are idiom here, and -Wconversion's and -Wparentheses' business),
# cert-err33-c (asks for a check of every snprintf and close), cert-err34-c (sscanf and atoi read only what the kernel wrote), branch-clone,
# suspicious-string-compare (asks for `strcmp() != 0`), multi-level-implicit-pointer (free of a char **).
TIDY = ",".join(
    [
        "-*",
        "bugprone-*",
        "cert-*",
        "clang-analyzer-*",
        "-bugprone-easily-swappable-parameters",
        "-bugprone-reserved-identifier",
        "-cert-dcl37-c",
        "-cert-dcl51-cpp",
        "-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling,-clang-analyzer-optin.performance.Padding",
        "-bugprone-narrowing-conversions",
        "-bugprone-assignment-in-if-condition",
        "-cert-err33-c",
        "-cert-err34-c",
        "-bugprone-suspicious-string-compare",
        "-bugprone-branch-clone",
        "-bugprone-multi-level-implicit-pointer-conversion",
    ]
)


@pytest.fixture(scope="module")
def sources(tracked):
    files = tracked("csrc/*.c")
    assert files
    return files


def each(sources, check):
    """Both cores at work; the first failure is the test's."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, sources))


def test_gcc_analyzer_finds_nothing(clean, sources, tmp_path):
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes", "-Wformat=2", "-fanalyzer", *DEFINES]
    each(sources, lambda file: clean("gcc", *flags, "-c", "-o", tmp_path / f"{file.stem}.o", file))


def test_cppcheck_finds_nothing(clean, sources):
    clean(
        "cppcheck",
        "--suppress=invalidFunctionArgBool",  # _exit(failed) is 0 or 1, as C defines it
        "--suppress=readdirCalled",  # one thread; readdir_r(3) is deprecated
        "--suppress=ctuuninitvar",  # cppcheck does not see that recvmsg() writes through its iovec
        "--std=c11",
        "--enable=warning,performance,portability",
        "--inline-suppr",
        "--error-exitcode=1",
        "--quiet",
        "--suppress=missingIncludeSystem",
        "--library=gnu",
        "--library=posix",
        *DEFINES,
        *sources,
    )


def test_clang_tidy_finds_nothing(clean, sources):
    each(
        sources,
        lambda file: clean("clang-tidy", "--quiet", f"--checks={TIDY}", "--warnings-as-errors=*", file, "--", "-std=gnu11", "-Icsrc", *DEFINES),
    )


def test_c_code_stays_below_its_size(tracked):
    """Lines that a reviewer has to understand: without blank ones and comments, which are there to help."""
    texts = [re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.S) for file in tracked("csrc/*.c", "csrc/*.h")]
    lines = sum(1 for text in texts for line in text.splitlines() if line.strip())
    assert 0 < lines < LINES


def test_c_functions_are_short(sources):
    """A function starts with a line in column 0 that ends with its brace, and ends with a brace in column 0 (.clang-format)."""
    long = []
    for file in sources:
        start = 0
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            start = number if re.match(r"[a-z].*\) \{$", line) else start
            if line == "}" and start and number - start - 1 > FUNCTION:
                long.append(f"{file}:{start} {number - start - 1} lines")
    assert long == []


def test_pure_core_neither_exits_nor_prints_nor_changes_ids(root):
    """csrc/core.list is shared with Python and fuzzers: a call to one of these would end, or disturb, the process that loaded it."""
    forbidden = re.compile(r"\b(_?exit|abort|v?f?printf|puts|perror|f?open|set(e|re|res)?[ug]id|setgroups|fork|exec[vl]\w*|kill|prctl|getenv)\s*\(")
    names = [name for name in (root / "csrc/core.list").read_text(encoding="utf-8").split() if name.endswith(".c")]
    names.remove("lock.c")  # its one purpose is to lock the process that calls it
    lines = [(name, line) for name in names for line in (root / "csrc" / name).read_text(encoding="utf-8").splitlines()]
    assert names
    assert [(name, line) for name, line in lines if forbidden.search(line.split("/*")[0])] == []


def test_fuzz_harnesses_build_and_find_nothing_at_once(clean, root):
    """Two seconds each: that they build, run and accept the seeds. Hours are `make fuzz FUZZ_SECONDS=…`."""
    need("clang")
    clean(root / "packaging/fuzz.sh", 2)
