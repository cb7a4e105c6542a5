"""Documents that are drawn from those to learn from, to be measured on (`data.held_out`)."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from infformer.config import EvaluationRunConfig
from infformer.data.long_range_arena import ExampleSource
from infformer.data.options import SPLITS, DataConfig
from infformer.data.sources import check_sources, describe_source, read_documents, read_fields
from infformer.errors import DataError

BOOKS = {f"book {number}": f"It was night number {number}." for number in range(12)}


def write(folder: Path, books: Mapping[str, str], name: str = "books.jsonl") -> str:
    file = folder / name
    lines = [json.dumps({"id": title, "text": text}) + "\n" for title, text in books.items()]
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def held_out(train: str, number: int | None, **options: object) -> dict[str, set[str]]:
    """The titles in each split."""
    config = DataConfig("files", **{"train": train, "validation": None, "test": None, "held_out": number, **options})
    return {split: {document.id for document in read_documents(config, split)} for split in config.splits}


def test_every_document_is_in_one_split_and_so_many_are_held_out(tmp_path):
    splits = held_out(write(tmp_path, BOOKS), 3)
    assert list(splits) == list(SPLITS)
    assert [len(splits[split]) for split in SPLITS] == [6, 3, 3]
    assert set.union(*splits.values()) == set(BOOKS)


def test_texts_alone_decide_which_are_held_out(tmp_path):
    in_one_file = held_out(write(tmp_path, BOOKS), 3)
    for title, text in BOOKS.items():
        (tmp_path / f"{title}.txt").write_text(f"\n{text}\n")
    assert held_out(str(tmp_path / "*.txt"), 3) == in_one_file
    assert held_out(write(tmp_path, dict(reversed(BOOKS.items()))), 3) == in_one_file


def test_a_book_that_is_added_moves_one_at_most_out_of_each_split(tmp_path):
    before = held_out(write(tmp_path, BOOKS), 3)
    moved = 0
    for number in range(12, 24):
        after = held_out(write(tmp_path, BOOKS | {"new": f"It was night number {number}."}), 3)
        for split in ("validation", "test"):
            assert len(before[split] - after[split]) <= 1
        moved += before != {split: titles - {"new"} for split, titles in after.items()}
    assert 0 < moved < 12


def test_equal_texts_stay_together(tmp_path):
    copies = {f"{title} again": text for title, text in BOOKS.items()}
    for titles in held_out(write(tmp_path, BOOKS | copies), 3).values():
        assert {title.removesuffix(" again") for title in titles} == titles & set(BOOKS)


@pytest.mark.parametrize("named", ["validation", "test"])
def test_a_split_that_is_named_is_not_drawn_and_the_other_stays_what_it_was(tmp_path, named):
    own = write(tmp_path, {"own": "Mine."}, "own.jsonl")
    both = held_out(write(tmp_path, BOOKS), 3)
    one = held_out(write(tmp_path, BOOKS), 3, **{named: own})
    other = next(split for split in ("validation", "test") if split != named)
    assert one == {named: {"own"}, other: both[other], "train": set(BOOKS) - both[other]}


def test_without_it_nothing_is_drawn(tmp_path):
    assert held_out(write(tmp_path, BOOKS), None) == {"train": set(BOOKS)}


def test_only_the_documents_that_are_kept_are_drawn_from(tmp_path):
    splits = held_out(write(tmp_path, BOOKS), 2, max_documents=7)
    assert set.union(*splits.values()) == set(list(BOOKS)[:7])


@pytest.mark.parametrize("options", [{}, {"validation": "own"}])
def test_too_few_texts_are_refused(tmp_path, options):
    few = write(tmp_path, dict(list(BOOKS.items())[: 6 if not options else 3]))
    with pytest.raises(DataError, match=r"data.held_out=3: data.train=.* different texts, too few for so many to "):
        held_out(few, 3, **options)


def test_documents_that_are_named_already_are_not_drawn_as_well(tmp_path):
    """By default the novels that come with the package have held-out ones."""
    with pytest.raises(DataError, match=r"data.held_out=3: there are .* data.validation=validation and data.test=test"):
        check_sources(DataConfig(held_out=3), ["train"])
    reviews = write(tmp_path, BOOKS)
    own = ExampleSource("bytes", 100).own(DataConfig(train=reviews, held_out=3))
    assert own.drawn_splits == ["validation", "test"]  # a task that has labels takes nothing of the novels
    check_sources(own, ["train", "validation", "test"])


@pytest.mark.parametrize("number", [0, -1, "some"])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(DataError, match=f"data.held_out={number}: give a whole number from 1 .* or null for none"):
        DataConfig("files", held_out=number)


def test_rows_with_labels_are_drawn_too(tmp_path):
    table = tmp_path / "reviews.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([text, number] for number, text in enumerate(BOOKS.values()))])
    config = DataConfig("files", train=str(table), validation=None, test=None, held_out=3)
    source = ExampleSource("bytes", 100)
    fields = {"data.text_field": "text", "task.label_field": "label"}
    rows = {split: [*read_fields(config, split, fields)] for split in source.splits(config)}
    assert {split: len(found) for split, found in rows.items()} == {"train": 6, "validation": 3, "test": 3}
    assert {row.fields["text"] for found in rows.values() for row in found} == set(BOOKS.values())


def test_what_is_kept_in_the_cache_is_of_so_many_held_out_and_of_these_splits(tmp_path):
    books = write(tmp_path, BOOKS)
    options = [
        {"held_out": None},
        {"held_out": 2},
        {"held_out": 3},
        {"held_out": 3, "test": books},
        {"held_out": 3, "validation": books},
    ]
    chosen = [DataConfig("files", **{"train": books, "validation": None, "test": None, **own}) for own in options]
    described = [json.dumps(describe_source(config, "train")) for config in chosen]
    assert len(set(described)) == len(options)


def test_examples_that_come_in_splits_refuse_it(tmp_path):
    source = ExampleSource("listops", 2000)
    for config in (DataConfig(held_out=3), DataConfig(held_out=3, path=str(tmp_path))):
        with pytest.raises(DataError, match=r"data.held_out=3: these examples have splits of their own"):
            source.check(config, ["train"])


def test_baselines_are_chosen_on_documents_that_are_drawn():
    drawn = DataConfig("files", train="books.jsonl", validation=None, test=None, held_out=3)
    assert EvaluationRunConfig(checkpoint="any", baselines=True, data=drawn).baselines
    with pytest.raises(ValueError, match=r"baselines=true with data\.validation=null"):
        EvaluationRunConfig(checkpoint="any", baselines=True, data=DataConfig("files", train="a", validation=None))
