"""`constraints.txt` pins what `pyproject.toml` asks for, and what that needs in turn."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]
LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]


def pins(python: str) -> dict[str, str]:
    """The version of each package that is pinned for that Python on Linux."""
    environment = {"python_full_version": f"{python}.0", "python_version": python, "sys_platform": "linux"}
    found = [Requirement(line) for line in LINES]
    return {
        package.name: str(package.specifier).removeprefix("==")
        for package in found
        if package.marker is None or package.marker.evaluate({**environment, "platform_machine": "x86_64"})
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_is_asked_for_is_pinned_within_its_range(python: str) -> None:
    pinned = pins(python)
    for package in ASKED:
        assert package.specifier.contains(pinned[canonicalize_name(package.name)]), package


def test_nothing_is_pinned_to_one_build_or_taken_from_one_place() -> None:
    """A machine with a GPU gets the CUDA build of torch; each asks the registry that it is set up for."""
    assert not [line for line in LINES if not re.match(r"[a-z0-9-]+==[\w.]+( ; [^@]+)?$", line)]


def test_what_a_pinned_package_needs_is_pinned() -> None:
    """As far as it is installed here, in the version that is pinned."""
    pinned, seen = pins(f"3.{sys.version_info.minor}"), set[str]()
    waiting = [canonicalize_name(package.name) for package in ASKED]
    while waiting:
        name = waiting.pop()
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name in seen or installed.version.split("+")[0] != pinned[name]:
            continue
        seen.add(name)
        for text in installed.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in pinned, f"{name} needs {needed}"
                waiting.append(canonicalize_name(needed.name))
