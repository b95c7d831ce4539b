"""What pyproject.toml needs at the oldest version that it allows, one requirement a line, as pip reads it.

python tests/support/floors.py      for ``make floors``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A tool of one test; transformers before 5.13 cannot be imported beside it.
LEFT_OUT = {"kernels"}
ROOT = Path(__file__).resolve().parents[2]


def requirements() -> Iterator[Requirement]:
    """Of the build, the package and every extra, the package's own names and what is left out aside."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    lists = [table["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if requirement.name not in {project["name"], *LEFT_OUT}:
            yield requirement


def floor(requirement: Requirement) -> str:
    """Its lowest version, or ValueError where there is none or more than one."""
    lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(lowest) != 1:
        raise ValueError(f"{requirement} in pyproject.toml must have one lower bound '>=', it has {len(lowest)}")
    return lowest[0]


if __name__ == "__main__":
    for each in requirements():
        print(f"{each.name}=={floor(each)}")
