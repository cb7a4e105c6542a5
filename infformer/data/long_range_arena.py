"""Where the examples of the tasks of Long-Range Arena, and of a user's own, come from: drawn here, files or the hub.

What is in a folder unpacked from the released archive is read as it lies there. Splits, lengths and labels are those of
the benchmark (https://arxiv.org/abs/2011.04006); docs/long_range_arena.md says what differs.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerBase

from infformer.data.cache import checksum, key_of
from infformer.data.examples import BYTES, Example, Examples, bytes_of, keep_examples
from infformer.data.files import Row, in_utf8, read_lines
from infformer.data.list_operations import SYMBOLS, draw_trees
from infformer.data.options import DATA, SPLITS, DataConfig
from infformer.data.pathfinder import draw_images
from infformer.data.sources import check_sources, describe_source, read_fields
from infformer.data.tokenization import Encoder, describe_tokenizer, vocabulary_size
from infformer.errors import DataError
from infformer.progress import Pace

Kind = Literal["text", "bytes", "pairs", "pixels", "listops", "pathfinder", "path_x"]
KINDS: tuple[Kind, ...] = ("text", "bytes", "pairs", "pixels", "listops", "pathfinder", "path_x")
ARCHIVE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"

_LAYOUT = 1  # of what is cached; raised when an older one can no longer be used
_SIDES = {"pathfinder": 32, "path_x": 128}
_SHORTEST = {"listops": 8, **{kind: side**2 for kind, side in _SIDES.items()}}
"""Tokens. So few lists are shorter that their drawing would not end."""
_LIST_OPERATIONS = {"test": 2000, "validation": 2000, "train": 96_000}  # in the order in which they are drawn
_PATHS = {"train": 160_000, "validation": 20_000, "test": 20_000}
_IMAGES_AT_A_TIME = 200  # drawn, and kept, together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExampleSource:
    """Which examples, whatever they are read from."""

    kind: Kind
    length: int
    """Tokens of a text, at most, of a pair of each; images have no more pixels."""
    label_field: str = "label"
    seed: int = 0
    """Of examples that are drawn."""

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are, padding among them; of texts, where no tokenizer cuts them up."""
        return len(SYMBOLS) + 1 if self.kind == "listops" else BYTES

    @property
    def classes(self) -> list[str] | None:
        """What an example may be; None: what the examples to learn from are."""
        if self.kind == "listops":
            return [str(digit) for digit in range(10)]
        return ["0", "1"] if self.kind in _SIDES else None

    def splits(self, data: DataConfig) -> list[str]:
        """The splits that there are examples for, to learn from first."""
        return self.own(data).splits

    def is_drawn(self, data: DataConfig) -> bool:
        """Whether they are drawn here, and not read."""
        of_the_sample = data.source == "sample" and data.path is None and not any(_named(data).values())
        return self.kind in _SHORTEST and of_the_sample

    def check(self, data: DataConfig, splits: Sequence[str]) -> None:
        """Make sure, before any work, that there is something to read for these splits.

        Raises:
            DataError: there is not; the message says what to get, and where to put it.
        """
        if data.held_out is not None and (data.path is not None or self.is_drawn(data)):
            raise DataError(
                f"data.held_out={data.held_out}: these examples have splits of their own; set it to null, or take "
                "fewer of them by task.validation_examples= and task.test_examples=."
            )
        for option, usual in (("shuffle", True), ("articles", False), ("skip_short_documents", False)):
            if getattr(data, option) != usual:
                raise DataError(
                    f"data.{option}={str(not usual).lower()}: this is for documents; examples are read as they are, in "
                    "an order of its own each epoch; leave it out."
                )
        if self.is_drawn(data) and self.length < _SHORTEST[self.kind]:
            raise DataError(
                f"task.length={self.length}: what is drawn for task.kind={self.kind} takes {_SHORTEST[self.kind]:,} "
                "tokens at least: choose that or more."
            )
        if data.path is not None:
            for split in splits:
                self._archived(data.path, split)
        elif not self.is_drawn(data):
            check_sources(self.own(data), splits)

    def read(
        self,
        data: DataConfig,
        splits: Sequence[str],
        most: Callable[[str], int | None] = lambda split: None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        main_process_first: AbstractContextManager[Any] | None = None,
    ) -> dict[str, Examples]:
        """The examples of these splits, from the cache or made now.

        Those to learn from are there too where they had to be read, as they say which classes there are.

        Args:
            most: how many of a split; None for all.
            tokenizer: cuts texts up; None: they are bytes.
            main_process_first: held during the work, so that one process does it and the others find it done.

        Raises:
            DataError: they cannot be read.
        """
        self.check(data, splits)
        found: dict[str, Examples] = {}
        # The classes are those that are learned, also where only other examples are measured.
        learned = self.classes is None and data.path is None and "train" in self.splits(data)
        with main_process_first or nullcontext():
            for split in dict.fromkeys(["train", *splits] if learned else splits):
                classes = found["train"].classes if "train" in found else self.classes
                drawn = most(split) if self.is_drawn(data) else None
                size = self.vocabulary_size if tokenizer is None else vocabulary_size(tokenizer)
                key: list[Any] = [_LAYOUT, self.kind, self.length, self.label_field, size, drawn, classes]
                key += [self._describe(data, split), None if tokenizer is None else describe_tokenizer(tokenizer)]
                folder = data.cache_folder / f"{split}-{key_of(key)}"
                examples = self._examples(data, split, tokenizer, drawn)
                source = f"data.{split}={getattr(data, split)}"
                found[split] = keep_examples(folder, examples, size, classes, source)
        return {split: examples.some(most(split)) for split, examples in found.items()}

    def own(self, data: DataConfig) -> DataConfig:
        """The options of files of one's own; the sample has no labels, so what is named is meant as a file.

        Raises:
            DataError: none is named to learn from.
        """
        if data.source != "sample" or data.path is not None or self.is_drawn(data):
            return data
        named = _named(data)
        if not any(named.values()):
            raise DataError(f"data.train={data.train}: {self._where_to_get()}")
        if data.max_held_out_characters == DATA["sample"].max_held_out_characters:
            named["max_held_out_characters"] = None  # the novels are cut by it
        return replace(data, source="files", **named)

    def _where_to_get(self) -> str:
        match self.kind:
            case "bytes":
                return (
                    "choose data=imdb for the reviews of Long-Range Arena, from the hub, or data=text "
                    "data.train=mine.csv for texts of your own, with columns text and label."
                )
            case "pixels":
                return "choose data=cifar10 for the images of Long-Range Arena, from the hub, or data=hub of your own."
            case "pairs":
                return (
                    f"the papers of Long-Range Arena are on no hub: download {ARCHIVE} (7.7 GB), unpack it, and set "
                    "data.path= to its folder lra_release, in which there is "
                    "tsv_data/new_aan_pairs.train.tsv; or give pairs of your own by data.train=mine.csv, with columns "
                    "text1, text2 and label."
                )
            case _:
                return (
                    "name files of texts with their labels, such as data.train=mine.csv data.test=held_out.csv, with "
                    "columns text and label."
                )

    def _describe(self, data: DataConfig, split: str) -> list[Any]:
        """What a split is made of, as JSON: it changes with that."""
        if data.path is not None:
            files = self._archived(data.path, split)
            return ["archive", [[str(file), checksum(file)] for file in files], split]
        if self.is_drawn(data):
            return ["drawn", self.seed]
        own = self.own(data)
        return [describe_source(own, split), own.text_field, own.max_documents, own.most_characters(split)]

    def _examples(
        self, data: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase | None, most: int | None
    ) -> Iterator[Example]:
        if data.path is not None:
            files = self._archived(data.path, split)
            match self.kind:
                case "listops":
                    yield from _listops_table(files[0])
                case "pairs":
                    yield from self._pairs_table(files[0])
                case _:
                    yield from _archived_images(files, split)
        elif not self.is_drawn(data):
            own, encode = self.own(data), None if tokenizer is None else Encoder(tokenizer)
            for row in read_fields(own, split, self._fields(own)):
                yield self._example(row, own, split, encode)
        elif self.kind == "listops":
            # The splits are pieces of one sequence of trees, those to learn from the last, so that there may be fewer.
            first = 0 if split == "test" else _LIST_OPERATIONS["test"]
            first += _LIST_OPERATIONS["validation"] if split == "train" else 0
            trees = draw_trees(self.length // 4, self.length, self.seed)
            for tokens, value in islice(trees, first, first + min(_LIST_OPERATIONS[split], most or 10**9)):
                yield Example("a drawn list", (tokens.astype(np.int64) + 1,), str(value))
        else:
            yield from self._drawn_images(data, split, min(_PATHS[split], most or _PATHS[split]))

    def _fields(self, data: DataConfig) -> dict[str, str]:
        if self.kind == "pairs":
            return {"text1": "text1", "text2": "text2", "task.label_field": self.label_field}
        if self.kind == "listops" and (data.text_field, self.label_field) == ("text", "label"):
            return {"data.text_field": "Source", "task.label_field": "Target"}  # as in the archive
        return {"data.text_field": data.text_field, "task.label_field": self.label_field}

    def _example(self, row: Row, data: DataConfig, split: str, encode: Encoder | None) -> Example:
        *texts, label = (row.fields[field] for field in self._fields(data).values())
        if self.kind == "pixels" or self.kind in _SIDES:
            return Example(row.place, (self._pixels(texts[0], row.place),), str(label))
        for text in texts:
            if not isinstance(text, str):
                raise DataError(
                    f"{row.place}: the text is a {type(text).__name__}, not text; set data.text_field= "
                    "to another field."
                )
        if self.kind == "listops":
            return Example(row.place, (_listops(str(texts[0]), row.place),), str(label))
        cut = [str(text)[: data.most_characters(split)] for text in texts]
        if encode is None:
            return Example(row.place, tuple(bytes_of(text, self.length, row.place) for text in cut), str(label))
        for text in cut:
            in_utf8(text, row.place)
        encoded = encode([row.place] * len(cut), cut)
        return Example(row.place, tuple(np.array(own[: self.length], dtype=np.int64) for own in encoded), str(label))

    def _pixels(self, image: Any, place: str) -> NDArray[np.integer]:
        content = image.get("bytes") if isinstance(image, dict) else None
        if content is None:
            raise DataError(f"{place}: this is no image; set data.text_field= to the field that holds images.")
        try:
            pixels = _pixels_of(io.BytesIO(content))
        except _BROKEN as error:
            raise DataError(f"{place}: this is no whole image ({error}); mend or remove the example.") from error
        if pixels.size > self.length:
            raise DataError(
                f"{place}: the image has {pixels.size:,} pixels, task.length={self.length}: set it to that, and "
                "training.segment_length too."
            )
        return pixels

    def _archived(self, path: str, split: str) -> list[Path]:
        """The files of a split in the unpacked archive.

        Raises:
            DataError: they are not there.
        """
        folder = Path(os.path.expanduser(path))
        short = {"train": "train", "validation": "val", "test": "test"}[split]
        match self.kind:
            case "listops":
                files = [folder / "listops-1000" / f"basic_{short}.tsv"]
            case "pairs":
                files = [folder / "tsv_data" / f"new_aan_pairs.{short.replace('val', 'eval')}.tsv"]
            case "pathfinder" | "path_x":
                images = folder / f"pathfinder{_SIDES[self.kind]}" / "curv_contour_length_14"
                files = sorted((images / "metadata").glob("*.npy"), key=lambda file: (len(file.name), file.name))
                if not files:
                    files = [images / "metadata" / "0.npy"]
            case _:
                raise DataError(f"data.path={folder}: the archive has nothing for this task; {self._where_to_get()}")
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise DataError(
                f"data.path={folder}: there is no {missing[0].relative_to(folder)} in it; download {ARCHIVE} (7.7 GB), "
                "unpack it, and set data.path= to its folder lra_release"
                + ("." if self.kind == "pairs" else ", or leave data.path= out: then the examples are drawn here.")
            )
        return files

    def _pairs_table(self, file: Path) -> Iterator[Example]:
        """Lines of five columns: label, two names, two texts; without names of columns and without quotes."""
        for place, columns in _columns(file):
            if len(columns) != 5 or columns[0] not in ("0", "1", "0.0", "1.0"):
                raise DataError(
                    f"{place}: not the five columns label (0 or 1), id1, id2, text1, text2; get the file anew."
                )
            texts = tuple(bytes_of(text, self.length, place) for text in columns[3:])
            yield Example(place, texts, columns[0][0])

    def _drawn_images(self, data: DataConfig, split: str, count: int) -> Iterator[Example]:
        """Images drawn by as many processes as `data.workers` says, and kept: who is stopped goes on there."""
        side = _SIDES[self.kind]
        folder = data.cache_folder / f"{self.kind}-{side}-{self.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        draw = partial(_draw_shard, folder, side, self.seed, split)
        shards = [range(first, first + _IMAGES_AT_A_TIME) for first in range(0, count, _IMAGES_AT_A_TIME)]
        with Pace(f"drawing images ({split})", count, "images") as pace:
            workers = min(data.workers, len(shards))
            pool = _drawing_processes(workers) if workers > 1 else None
            with pool or nullcontext():
                for numbers, file in zip(shards, (pool.map if pool else map)(draw, shards), strict=True):
                    with np.load(file) as shard:
                        pixels, labels = shard["pixels"][: count - numbers.start], shard["labels"]
                    for image, label in zip(pixels, labels, strict=False):
                        yield Example("a drawn image", (image.astype(np.uint16) + 1,), str(label))
                    pace.advance(len(pixels))


def _drawing_processes(count: int) -> ProcessPoolExecutor:
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # which takes seconds: once, not in every process
    return ProcessPoolExecutor(count, mp_context=context)


def _named(data: DataConfig) -> dict[str, Any]:
    """What is named for each split, if that is not the sample's."""
    return {split: None if getattr(data, split) == split else getattr(data, split) for split in SPLITS}


_BROKEN = (OSError, Image.DecompressionBombWarning, Image.DecompressionBombError, SyntaxError)
"""What becomes of an image that is none."""


def _pixels_of(file: Path | io.BytesIO) -> NDArray[np.integer]:
    """An image as tokens, row after row; raises one of `_BROKEN`."""
    with warnings.catch_warnings(), Image.open(file) as image:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return grey(image).ravel().astype(np.uint16) + 1


def grey(image: Image.Image) -> NDArray[np.uint8]:
    """An image in levels of grey, by the weights of Rec. 601, rounded down."""
    if image.mode == "L":
        return np.asarray(image)
    colours = np.asarray(image.convert("RGB"), dtype=np.float64)
    return (colours @ [0.2989, 0.5870, 0.1140]).astype(np.uint8)


def _draw_shard(folder: Path, side: int, seed: int, split: str, numbers: range) -> Path:
    """Draw some images and keep them, if they are not kept yet; where they are."""
    file = folder / f"{split}-{numbers.start:06d}-{numbers.stop:06d}.npz"
    try:
        with np.load(file) as shard:
            shard["labels"]
        return file
    except (OSError, ValueError, KeyError, EOFError):  # not there, or cut short
        pixels, labels = draw_images(side, numbers, seed, SPLITS.index(split))
        own = file.with_name(f".{file.name}.{os.getpid()}")
        with own.open("wb") as written:
            np.savez_compressed(written, pixels=pixels, labels=labels)
        own.replace(file)
        return file


def _listops(text: str, place: str) -> NDArray[np.integer]:
    """The tokens of an expression, without its round parentheses."""
    try:
        return np.array([_NUMBER[symbol] for symbol in text.replace("(", "").replace(")", "").split()], dtype=np.int64)
    except KeyError as error:
        raise DataError(f"{place}: {error.args[0]!r} is none of {' '.join(SYMBOLS)}; get the file anew.") from error


_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS, start=1)}


def _columns(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Each line of a table, after the place where it stands."""
    for number, line in enumerate(read_lines(file), start=1):
        yield f"{file}, line {number}", line.rstrip("\r\n").split("\t")


def _listops_table(file: Path) -> Iterator[Example]:
    for number, (place, columns) in enumerate(_columns(file)):
        if number == 0 and columns == ["Source", "Target"]:
            continue
        if len(columns) != 2:
            raise DataError(f"{place}: not the two columns Source and Target; get the file anew.")
        yield Example(place, (_listops(columns[0], place),), columns[1])


def _archived_images(metadata: Sequence[Path], split: str) -> Iterator[Example]:
    """The images of a split: the first 80 % of all, the next 10 %, the last 10 %. A broken one is left out."""
    listed = [row for file in metadata for row in _listed(file)]
    cuts = {name: len(listed) * percent // 100 for name, percent in (("validation", 80), ("test", 90))}
    cut = {
        "train": slice(0, cuts["validation"]),
        "validation": slice(cuts["validation"], cuts["test"]),
        "test": slice(cuts["test"], None),
    }
    for folder, name, label in listed[cut[split]]:
        file = metadata[0].parents[1] / folder / name
        try:
            pixels = _pixels_of(file)
        except _BROKEN as error:
            log.warning("%s is left out: it is no whole image (%s)", file, error)
            continue
        yield Example(str(file), (pixels,), label)


def _listed(file: Path) -> list[tuple[str, str, str]]:
    """Folder, name and label of the images that a file of metadata lists: lines of text, or an array."""
    content = file.read_bytes()
    try:
        if content.startswith(b"\x93NUMPY"):
            rows = np.load(io.BytesIO(content), allow_pickle=False).astype(str).tolist()
        else:
            rows = [line.split() for line in content.decode().splitlines() if line.strip()]
        return [(row[0], row[1], str(int(float(row[3])))) for row in rows]
    except (ValueError, IndexError) as error:
        raise DataError(f"{file}: not the metadata of images ({error}); get the archive anew.") from error
