"""Print the requirements of pyproject.toml that this Python does not have, one a line.

Usage: missing.py GROUP..., a group being ``build`` (build-system requires), ``run`` (dependencies) or an extra's name.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # pip carries a copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

PYPROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())


def listed(group: str) -> list[str]:
    if group == "build":
        return list(PYPROJECT["build-system"]["requires"])
    if group == "run":
        return list(PYPROJECT["project"]["dependencies"])
    return list(PYPROJECT["project"]["optional-dependencies"][group])


def requirements(group: str) -> Iterator[Requirement]:
    """A group's requirements; an extra that names other extras (``memkern[plot]``) is followed."""
    for line in listed(group):
        requirement = Requirement(line)
        if requirement.name == "memkern":
            for extra in sorted(requirement.extras):
                yield from requirements(extra)
        elif requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def satisfied(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


for line in dict.fromkeys(str(r) for group in sys.argv[1:] for r in requirements(group) if not satisfied(r)):
    print(line)
