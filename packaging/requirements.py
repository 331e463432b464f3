"""Print the requirements that pyproject.toml lists, one a line; with the name of an extra, that one's too.

pip cannot install a project's dependencies without building the project, and the make rules want them before there is anything to build.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python < 3.11; pip carries its own copy for the same reason
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]  # the other branch of the same name


def requirements(extras: list[str]) -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
