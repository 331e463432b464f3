"""The Python code is what CONTRIBUTING.md promises."""

from __future__ import annotations

import ast
import re
import statistics


def test_ruff_finds_nothing(clean):
    clean("ruff", "check", "--no-cache", ".")


def test_mypy_strict_finds_nothing(clean, tmp_path):
    clean("mypy", "--cache-dir", tmp_path)


def functions(files):
    """(lines, where) of every function in the files."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.end_lineno - node.lineno + 1, f"{file}:{node.lineno} {node.name}"


def test_python_functions_are_short(tracked):
    found = sorted(functions(tracked("nodewrap/*.py", "nodewrap/*/*.py")))
    sizes = [size for size, _ in found]
    assert not [where for where in found if where[0] > 50]
    assert statistics.median(sizes) <= 10
    assert sizes[len(sizes) * 9 // 10] <= 30, found[len(sizes) * 9 // 10 :]


def test_every_directory_of_modules_is_a_package(tracked):
    """What is not one is left out of the wheel (pyproject.toml, namespaces = false)."""
    files = tracked("nodewrap/*.py")
    assert {file.parent for file in files} == {file.parent for file in files if file.name == "__init__.py"}


def test_every_ignored_lint_has_its_reason_beside_it(tracked):
    """`# noqa: X  why` and `# type: ignore[x]  # why`; a library without types (import-untyped, misc for its subclasses) says so itself."""
    bare = re.compile(r"#\s*noqa(?!: [A-Z]+\d+(, [A-Z]+\d+)*\s+\S)|#\s*type: ignore(?!\[(import-untyped|misc)\]|\[[\w-]+(, ?[\w-]+)*\]\s+#?\s*\S)")
    files = tracked("nodewrap/*.py", "nodewrap/*/*.py", "packaging/*.py", "setup.py")
    lines = [(file, number, line) for file in files for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)]
    assert lines
    assert [f"{file}:{number}: {line.strip()}" for file, number, line in lines if bare.search(line)] == []


def test_every_test_checks_something(tracked):
    """A test function without assert, raises, fail or a helper that checks passes without the code it is named after."""
    checks = re.compile(r"Assert\(|raises|fail|check|refused|clean|must|same|denied|refuses|until")
    idle = [
        f"{file}:{node.lineno} {node.name}"
        for file in tracked("tests/test_*.py", "tests/*/test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not checks.search(ast.dump(node).replace(repr(node.name), ""))
    ]
    assert idle == []
