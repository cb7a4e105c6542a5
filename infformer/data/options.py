"""What a run says about its documents."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infformer.errors import DataError
from infformer.options import free, measuring

SOURCES = ("sample", "hub", "files")
SPLITS = ("train", "validation", "test")

_LARGEST = 10**12  # more than any text has; what it is multiplied by must fit 64 bits
_MOST_WORKERS = 256


@dataclass
class DataConfig:
    """Where the documents come from and how they are cut up; every option is typed as `data.<field>=<value>`.

    Raises:
        DataError: a value that no run can use. The message names the option as it is typed.
    """

    source: str = "sample"
    """`sample`: the few novels that come with the package; `hub`: a dataset of the Hugging Face hub; `files`: your
    own."""

    repository: str | None = None
    """For `source=hub`: the dataset's name on the hub, or a local folder laid out like one (it needs no network)."""

    path: str | None = None
    """For tasks of Long-Range Arena: the folder `lra_release` of its archive, as it was unpacked. Null: their examples
    are drawn here, or come from the hub or from files."""

    subset: str | None = None
    """For `source=hub`: the dataset's configuration, such as `wikitext-103-raw-v1`; null where there is but one."""

    train: Any = "train"
    """Documents to learn from. `hub`: a split, such as `train` or `train[:10%]`; `files`: a path, a glob (`**` goes
    into folders) or a list of them; null: none."""

    validation: Any = measuring("validation", "validation")
    """Documents held out, to be measured during training. Written like `train`."""

    test: Any = measuring("test", "test")
    """Documents held out for the final figures. Written like `train`."""

    held_out: int | None = None
    """Draw the documents of `validation` and `test`, where these are null, from those that `train` names: so many for
    each, which are not learned from. Which ones their texts decide: those of every run are the same, and equal texts
    stay together. Null: none."""

    text_field: str = "text"
    """The field of a JSON object, or the column of a table, that holds the text."""

    id_field: str | None = None
    """The field that names a document. Null: `id` where there is one, else the file's name and the row."""

    articles: bool = False
    """The text is WikiText's: join its lines and cut them into articles at their headings."""

    shuffle: bool = True
    """Train on the documents in a seeded order, another one each epoch. False: in their own order, each from its
    start."""

    max_documents: int | None = None
    """Keep only this many documents of each split, the first ones. Null: all."""

    max_document_characters: int | None = None
    """Keep only the beginning of each document: at most this many characters, cut between two words so that the
    counts of words and bytes stay exact (but within one of more than 1,000). Null: all of it."""

    max_held_out_characters: int | None = measuring(None, "validation", "test")
    """The same for validation and test documents alone, if they are to be cut shorter. Null: as for training."""

    beginning_of_document: bool = True
    """Begin each document with the tokenizer's beginning-of-sequence token (or, if it has none, its end-of-sequence
    token), so that the first word is predicted too."""

    skip_short_documents: bool = False
    """Leave out documents of fewer than 2 tokens, in which there is nothing to predict. False: they are an error."""

    segments_per_visit: int | None = None
    """Training only: leave a document after this many segments, for another place of the documents with an empty
    memory; what is left is read in the same epoch, at another time. Null: read every document from its start to its
    end."""

    cache_dir: str | None = free(None)
    """Where tokenised documents are kept. Null: `$INFFORMER_CACHE`, else `~/.cache/infformer`."""

    workers: int = free(1)
    """Processes that tokenise. A fast tokenizer uses every core in one process; more help a slow tokenizer."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DataError(f"data.source={self.source}: there is no such source; choose one of {', '.join(SOURCES)}.")
        if self.source == "hub" and not (self.repository or "").strip():
            raise DataError(
                f"data.repository={'null' if self.repository is None else self.repository}: data.source=hub needs the "
                "dataset's name on the hub, such as data.repository=Salesforce/wikitext, or a local folder laid out "
                "like one."
            )
        if not self.text_field.strip():
            raise DataError("data.text_field=: name the field that holds the text, such as data.text_field=text.")
        for option, without in (
            ("id_field", "null for `id` or the row"),
            ("path", "null for no archive"),
            ("subset", "null where there is but one"),
            ("cache_dir", "null for the usual place"),
        ):
            value = getattr(self, option)
            if value is not None and not value.strip():
                raise DataError(f"data.{option}={value}: this is empty; give a name, or {without}.")
        limits = ("max_documents", "max_document_characters", "max_held_out_characters", "segments_per_visit")
        for option in ("held_out", *limits):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, int) and 1 <= value <= _LARGEST):
                null = "none" if option == "held_out" else "no limit"
                raise DataError(f"data.{option}={value}: give a whole number from 1 to 10^12, or null for {null}.")
        if not (isinstance(self.workers, int) and 1 <= self.workers <= _MOST_WORKERS):
            raise DataError(
                f"data.workers={self.workers}: give a whole number of processes from 1 to {_MOST_WORKERS}; more than "
                "the machine has cores gain nothing."
            )

    @property
    def drawn_splits(self) -> list[str]:
        """The splits whose documents are drawn from those that `train` names."""
        return [] if self.held_out is None else [split for split in SPLITS[1:] if getattr(self, split) is None]

    @property
    def splits(self) -> list[str]:
        """The splits that there are documents of, to learn from first."""
        drawn = self.drawn_splits
        return [split for split in SPLITS if split == "train" or split in drawn or getattr(self, split) is not None]

    def places(self, split: str) -> list[str]:
        """What the option of a split names: the splits of a hub dataset (one), the paths and globs of files.

        Of a split that is drawn, what `train` names.

        Raises:
            DataError: the split is null, is empty or is something other than text or a list of text.
            ValueError: `split` is not one of train, validation and test.
        """
        if split not in SPLITS:
            raise ValueError(f"{split!r} is no split; there are {', '.join(SPLITS)}.")
        split = "train" if split in self.drawn_splits else split
        value = getattr(self, split)
        remedy = f"set data.{split}= to " + ("a path or a glob" if self.source == "files" else "the name of a split")
        if value is None or value == "":
            given = "null" if value is None else ""
            raise DataError(f"data.{split}={given}: this run needs {split} documents and has none; {remedy}.")
        places = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
        if not places or not all(isinstance(place, str) and place.strip() for place in places):
            raise DataError(f"data.{split}={value}: this names no documents; {remedy}.")
        if self.source != "files" and len(places) > 1:
            raise DataError(f"data.{split}={value}: only data.source=files takes a list; {remedy} (a+b joins two).")
        return places

    def most_characters(self, split: str) -> int | None:
        """How much of each document of a split is kept; None for all of it."""
        held_out = None if split == "train" else self.max_held_out_characters
        return self.max_document_characters if held_out is None else held_out

    @property
    def cache_folder(self) -> Path:
        """Where tokenised documents are kept, as an absolute path that need not exist yet."""
        chosen = self.cache_dir or os.environ.get("INFFORMER_CACHE") or "~/.cache/infformer"
        return Path(os.path.expanduser(chosen)).absolute()


_VISIT = 32
"""Segments. A lane that stays in one book for hundreds of steps lets the weights learn the book through its memory: the
training loss falls, and that of other books rises. So a lane goes to another place every so often, with an empty
memory. An article is a few segments long: it is read from its start to its end."""

DATA = {
    "sample": DataConfig(segments_per_visit=_VISIT, max_held_out_characters=60_000),
    "text": DataConfig("files", train=None, validation=None, test=None, segments_per_visit=_VISIT),
    **{
        name: DataConfig("hub", "Salesforce/wikitext", subset, articles=True)
        for name, subset in (("wikitext2", "wikitext-2-raw-v1"), ("wikitext103", "wikitext-103-raw-v1"))
    },
    # The reviews lie there by class, of which a tenth is held out; the benchmark held the test out twice.
    "imdb": DataConfig(
        "hub",
        "stanfordnlp/imdb",
        train="train[:45%]+train[50%:95%]",
        validation="train[45%:50%]+train[95%:]",
    ),
    "cifar10": DataConfig("hub", "uoft-cs/cifar10", train="train[:90%]", validation="train[90%:]", text_field="img"),
    # Two books may have one title; none have one address.
    "pg19": DataConfig("hub", "emozilla/pg19", id_field="url", segments_per_visit=_VISIT),
}
"""What `data=` chooses. `sample`: the novels that come with the package; of those held out, which are measured several
times over, only the first 60,000 characters. `text`: your own documents, .txt (a document each), .jsonl (a document a
line), .csv, .tsv, all these also as .gz or .zst, .parquet, or folders written by save_to_disk, for example

    data=text 'data.train=books/train/*.txt' 'data.validation=[books/held_out.jsonl,more.parquet]'

`wikitext2`, `wikitext103`: 600 and about 28,500 articles to learn from, and the same 60 + 60 to measure on. `pg19`:
28,602 books published before 1919, and 50 + 100 to measure on, some 11 GB; a copy as tables, which `datasets` reads.
`imdb`, `cifar10`: reviews and images with their classes, for task=lra_text and lra_image."""
