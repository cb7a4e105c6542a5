"""The tour in CONTRIBUTING is of the house as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "infformer"
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^\d+\. (.*?)(?=\n\d+\. |\n\n)", TEXT, re.DOTALL | re.MULTILINE)
"""The steps of a token to the loss, and of an option to where it acts."""


def files_of(text: str) -> list[Path]:
    """What is named by its path from the root or inside the package, or by its name alone."""
    found = []
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml))`", text):
        places = [ROOT / name, PACKAGE / name, *PACKAGE.rglob(name)]
        found.append(next((place for place in places if place.exists()), ROOT / name))
    return found


def test_the_tour_names_every_file_of_the_package_and_no_other():
    tree = TEXT.split("\ninfformer/\n")[1].split("\nscripts/")[0]
    named, room = set(), PACKAGE
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 2:
            folder = re.match(r" +(\w+)/ ", line)
            room = PACKAGE / folder[1] if folder else PACKAGE
        named |= {room / name for name in re.findall(r"\w+\.py\b", line)}
    assert named == {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def test_every_file_that_is_named_is_there():
    assert [str(file) for file in files_of(TEXT) if not file.exists()] == []
    folders = re.findall(r"`((?:\.?\w+/)+)`", TEXT)
    assert [folder for folder in folders if not any((base / folder).is_dir() for base in (ROOT, PACKAGE))] == []


@pytest.mark.parametrize("step", WALKS)
def test_every_step_of_a_walk_is_in_the_files_that_it_names(step):
    code = "".join(file.read_text(encoding="utf-8") for file in files_of(step))
    names = re.findall(r"`(\w+)`", step)
    assert names
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_both_walks_are_taken():
    assert len(WALKS) == 11 + 5
