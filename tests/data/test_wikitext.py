import gzip
from pathlib import Path

import pytest
from datasets import Dataset

from infformer.data.options import DataConfig
from infformer.data.sources import read_documents
from infformer.data.wikitext import articles
from infformer.errors import DataError

FILE = (
    " \n = First = \n \n A sentence with k \n = 1 henry and C = \n 1 farad . \n \n = = Section = = \n \n Text . \n"
    " = No heading = \n \n = Nor this = \n Text . \n \n"
    " = Second = \n \n Note \n \n = not one either \n \n = First = \n \n Again . \n"
)


def read(folder: Path, name: str, **options: object) -> list[tuple[str, str]]:
    config = DataConfig(source="files", train=str(folder / name), articles=True, **options)
    return [(document.id, document.text) for document in read_documents(config, "train")]


def test_articles_begin_at_headings_between_blank_lines(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(FILE)
    found = read(tmp_path, "wiki.train.tokens")
    assert [title for title, _ in found] == ["First", "Second", "First (2)"]
    assert "".join(text for _, text in found) == FILE
    assert found[1][1] == " = Second = \n \n Note \n \n = not one either \n \n"


def test_the_hub_and_the_file_give_the_same_articles(tmp_path):
    (tmp_path / "wiki.txt").write_text(FILE)
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = ["" if line == " " else line + "\n" for line in FILE.splitlines()]
    Dataset.from_dict({"text": rows}).to_parquet(folder / "train.parquet")
    config = DataConfig(source="hub", repository=str(folder), articles=True)
    hub = [(document.id, document.text) for document in read_documents(config, "train")]
    assert hub == read(tmp_path, "wiki.txt")
    assert read(folder, "train.parquet") == hub


def test_windows_line_ends_make_no_difference():
    lines = FILE.splitlines(keepends=True)
    assert list(articles([line.replace("\n", "\r\n") for line in lines], "here")) == list(articles(lines, "here"))


def test_titles_stay_unique():
    titles = ["A", "A (2)", "A", "A"]
    found = articles([line for title in titles for line in ("", f" = {title} = ", "", "x")], "here")
    assert [title for title, _ in found] == ["A", "A (2)", "A (3)", "A (4)"]


def test_text_before_the_first_heading_is_kept(tmp_path):
    (tmp_path / "cut.txt").write_text(" the end of an article . \n" + FILE)
    found = read(tmp_path, "cut.txt")
    assert found[0] == ("(before the first heading)", " the end of an article . \n \n")
    assert len(found) == 4


def test_an_article_may_go_on_in_the_next_file(tmp_path):
    half = FILE.index(" = = Section")
    (tmp_path / "a.txt").write_text(FILE[:half])
    (tmp_path / "b.txt").write_text(FILE[half:])
    (tmp_path / "whole.md").write_text(FILE)
    assert read(tmp_path, "*.txt") == read(tmp_path, "whole.md")


def test_text_that_is_not_wikitext_is_refused(tmp_path):
    (tmp_path / "novel.txt").write_text("It was night.\n = Not a heading = \nIt was day.\n")
    with pytest.raises(DataError, match=r"data.train=.*novel.txt: data.articles=true, but no line .*articles=false"):
        read(tmp_path, "novel.txt")


def test_limits_count_articles(tmp_path):
    (tmp_path / "wiki.txt").write_text(FILE)
    assert len(read(tmp_path, "wiki.txt", max_documents=2)) == 2
    assert read(tmp_path, "wiki.txt", max_document_characters=14)[1][1] == " = Second = \n "


@pytest.mark.parametrize(
    ("name", "count", "title"),
    [
        ("wikitext-2/wiki.valid.tokens", 60, "Homarus gammarus"),
        ("wikitext-2/wiki.test.tokens", 60, "Robert <unk>"),
        ("wikitext-2-raw/wiki.test.raw", 60, "Robert Boulter"),
        ("wikitext-103/wiki.valid.tokens", 60, "Homarus gammarus"),
        ("wikitext-103/wiki.test.tokens", 60, "Robert Boulter"),
        ("wikitext-2/wiki.train.tokens.gz", 600, "2013 – 14 York City F.C. season"),
    ],
)
def test_the_official_files_are_read_whole(shared, name, count, title):
    found = read(shared / "wikitext", name)
    assert len(found) == count
    assert found[0][0] == title
    raw = (shared / "wikitext" / name).read_bytes()
    whole = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
    assert "".join(text for _, text in found) == whole


def test_a_copy_without_blank_lines_is_refused(shared):
    with pytest.raises(DataError, match="kept its blank lines"):
        read(shared / "wikitext", "wikitext-2-raw/wiki.train.head1MB.raw")
