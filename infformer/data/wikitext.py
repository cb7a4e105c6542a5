"""WikiText is one long list of lines; this finds the articles in it."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

from infformer.errors import DataError

# ` = Title = `, but not ` = = Section = = `. Tables leave lines such as ` = 1 henry and capacitance C = ` in the middle
# of a sentence: only a line that stands between two blank ones is a heading.
_TITLE = re.compile(r"= (?P<title>[^=](?:.*[^=])?) =")


def articles(lines: Iterable[str], place: str) -> Iterator[tuple[str, str]]:
    """Cut the lines of WikiText into its articles.

    Every line ends up in exactly one article, so that all the texts together are the original file, to the byte. The
    hub writes a blank line as "", the original files as " ": both become " ".

    Args:
        lines: the lines in their order, with or without their line ends; one item may hold several.
        place: what is being read, for the error.

    Yields:
        The title, made unique by ` (2)`, ` (3)`, ... where it comes again, and the text, which begins with the heading.

    Raises:
        DataError: there is text, and no heading at all.
    """
    times: dict[str, int] = {}
    title: str | None = None
    article: list[str] = []
    for heading, line in _marked(lines):
        if heading is not None:
            # Blank lines before the very first heading belong to it.
            if title is not None or any(kept.strip() for kept in article):
                yield _unique(title or "(before the first heading)", times), "".join(article)
                article = []
            title = heading
        article.append(line)
    if title is None and any(kept.strip() for kept in article):
        raise DataError(
            f"{place}: data.articles=true, but no line ` = Title = ` stands between two blank lines here; "
            "set data.articles=false if this is not WikiText, or use a copy that has kept its blank lines."
        )
    if title is not None:
        yield _unique(title, times), "".join(article)


def _marked(lines: Iterable[str]) -> Iterator[tuple[str | None, str]]:
    """Each line with the title it announces, if any; a line is known only when the next one has been seen."""
    whole = (line.removesuffix("\r") for item in lines for line in item.removesuffix("\n").split("\n"))
    blank_before = True
    for line, following in pairwise(chain(whole, [""])):
        match = _TITLE.fullmatch(line.strip()) if blank_before and not following.strip() else None
        blank_before = not line.strip()
        yield match and match["title"], f"{' ' if blank_before else line}\n"


def _unique(title: str, times: dict[str, int]) -> str:
    """The title, or `title (2)` the second time it comes, and so on; never a name given before."""
    name = title
    while name in times:
        times[title] += 1
        name = f"{title} ({times[title]})"
    times[name] = 1
    return name
