"""What `docs/extending.md` shows is what the tests run."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"From `([\w/]+\.py)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
"""Each block of code, after the file that it is cut from."""


def stands_in(code: str, text: str) -> bool:
    """Whether these lines follow each other in a text, all indented by as much."""
    wanted, lines = code.splitlines(), text.splitlines()
    starts = range(len(lines) - len(wanted) + 1)
    return any(textwrap.dedent("\n".join(lines[start : start + len(wanted)])) == "\n".join(wanted) for start in starts)


def test_every_block_of_the_page_names_its_file():
    assert len(BLOCKS) == PAGE.count("```") / 2
    assert {Path(file).parts[0] for file, _ in BLOCKS} == {"tests", "infformer"}


def test_every_name_on_the_page_is_one_of_the_code():
    files = {ROOT / file for file in re.findall(r"`([\w/]+\.py)`", PAGE)}
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    names = re.findall(r"`(_?[A-Za-z]\w*)`", PAGE)
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize(("file", "code"), BLOCKS)
def test_every_block_of_the_page_stands_in_its_file(file, code):
    assert stands_in(code, (ROOT / file).read_text(encoding="utf-8"))


def test_a_line_that_differs_is_noticed():
    text = "def f():\n    a = 1\n\n    return a\n"
    assert stands_in("a = 1\n\nreturn a\n", text)
    assert not stands_in("a = 2\n\nreturn a\n", text)
    assert not stands_in("a = 1\nreturn a\n", text)
    assert not stands_in("a = 1\n\n  return a\n", text)
