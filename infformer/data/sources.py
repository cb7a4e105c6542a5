"""Hub datasets, local files and the bundled sample, all as one thing: an iterable of documents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import xxhash
from datasets.packaged_modules.cache.cache import Cache

from infformer.data.files import (
    Row,
    describe_content,
    find_files,
    in_utf8,
    is_text,
    name_files,
    read_lines,
    read_rows,
    valid_rows,
)
from infformer.data.options import SPLITS, DataConfig
from infformer.data.wikitext import articles
from infformer.errors import DataError
from infformer.hub import WITHOUT_A_NETWORK, problem_with_the_hub

Found = TypeVar("Found")

_LONGEST_WORD = 1000  # characters: what is longer is text without blanks, as Chinese is, and is cut anywhere
_SAMPLE = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Document:
    """One text to be read from its start to its end."""

    id: str
    text: str
    digest: str = ""
    """Alike for equal texts, also where other parts of them were cut off; empty: not known."""


def read_documents(config: DataConfig, split: str) -> Iterator[Document]:
    """The documents of one split, one at a time, in a fixed order.

    Args:
        config: where they are.
        split: `train`, `validation` or `test`.

    Raises:
        DataError: as soon as something is found amiss; the message names the option, or the file and the line.
    """
    seen: dict[str, str] = {}
    documents = partial(_documents, config, split)
    for place, document in _members(config, split, documents, lambda found: found[1].text):
        if document.id in seen:
            raise DataError(
                f"two documents are called {document.id!r}: {seen[document.id]} and {place}; give each an id of its "
                "own, or set data.id_field= to a field that tells them apart."
            )
        seen[document.id] = place
        text = _beginning(document.text, config.most_characters(split))
        in_utf8(document.id, place, "name")
        in_utf8(text, place)
        yield Document(document.id, text, _digest(document.text))


def check_sources(config: DataConfig, splits: Iterable[str]) -> None:
    """Make sure, before any work, that there is something to read for each of these splits.

    Files are looked for and opened; what is in them is not read. A dataset of the hub is not asked for.

    Raises:
        DataError: something is missing, of an unknown kind, empty or not to be read; the message names the option.
    """
    if config.held_out is not None and not config.drawn_splits:
        raise DataError(
            f"data.held_out={config.held_out}: there are held-out documents already, data.validation="
            f"{config.validation} and data.test={config.test}; set one of the three to null."
        )
    for split in splits:
        if config.source == "hub":
            check_repository(_hub_names(config, split)[0])
        else:
            _files(config, split)


def describe_source(config: DataConfig, split: str) -> list[Any]:
    """What the documents of a split are read from, as JSON: it changes whenever the files' content or the dataset does.

    Raises:
        DataError: there is nothing to read.
    """
    if config.source == "hub":
        source: list[Any] = ["hub", describe_split(*_hub_names(config, split))]
    else:
        source = [["file", name, describe_content(path)] for path, name in _files(config, split)]
    if split == "train" or split in config.drawn_splits:
        source += [[config.held_out, drawn] for drawn in config.drawn_splits]
    return source


def _members(
    config: DataConfig, split: str, read: Callable[[], Iterator[Found]], text: Callable[[Found], str]
) -> Iterator[Found]:
    """Of all that is read for a split what belongs to it: by the texts, where splits are drawn.

    Raises:
        DataError: there are too few texts for that.
    """
    drawn = config.drawn_splits
    found = islice(read(), config.max_documents)
    if config.held_out is None or split not in ("train", *drawn):
        return found
    # Their order is that of random numbers, and hardly changes when texts are added.
    digests = sorted({_digest(text(each)) for each in islice(read(), config.max_documents)})
    ranks = {"test": slice(config.held_out), "validation": slice(config.held_out, 2 * config.held_out)}
    held_out = {name: set(digests[ranks[name]]) for name in drawn}
    learned = set(digests).difference(*held_out.values())
    if not learned or any(len(own) < config.held_out for own in held_out.values()):
        raise DataError(
            f"data.held_out={config.held_out}: data.train={', '.join(config.places('train'))} has {len(digests)} "
            f"different texts, too few for so many to {' and '.join(drawn)} and others to learn from; name more, or "
            "hold out fewer."
        )
    members = held_out.get(split, learned)
    return (each for each in found if _digest(text(each)) in members)


def _digest(text: str) -> str:
    # Without the white space around the text, in which formats differ.
    return xxhash.xxh3_64_hexdigest(text.strip().encode(errors="surrogatepass"))


def _documents(config: DataConfig, split: str) -> Iterator[tuple[str, Document]]:
    """Each document, after the place where it was found."""
    if config.articles:
        source = f"data.{split}={', '.join(config.places(split))}"
        for title, text in articles(_lines(config, split), source):
            yield f"{source}, article {title!r}", Document(title, text)
    else:
        for row in _rows(config, split):
            yield row.place, Document(_id(row, config), _text(row, config))


def _lines(config: DataConfig, split: str) -> Iterator[str]:
    """All the lines of a split, one file after another: an article may begin in one file and end in the next."""
    if config.source == "hub":
        yield from (_text(row, config) for row in _hub_rows(config, split, _wanted(config)))
        return
    for path, name in _files(config, split):
        if is_text(path):
            yield from read_lines(path)
        else:
            yield from (_text(row, config) for row in read_rows(path, name, config.text_field))


def read_fields(config: DataConfig, split: str, wanted: Mapping[str, str]) -> Iterator[Row]:
    """The records of one split, in a fixed order, each with some fields.

    Args:
        wanted: the fields, by the options that name them.

    Raises:
        DataError: a record has not one of them, or the source cannot be read.
    """

    def text(row: Row) -> str:
        return repr([row.fields.get(field) for field in wanted.values()])

    for row in _members(config, split, partial(_rows, config, split, wanted), text):
        for option, field in wanted.items():
            if row.fields.get(field) is None:
                raise _no_field(row.place, option, field, row.fields)
        yield row


def _wanted(config: DataConfig) -> dict[str, str]:
    """The fields of a document, by the options that name them."""
    return {"data.text_field": config.text_field, "data.id_field": config.id_field or "id"}


def _rows(config: DataConfig, split: str, wanted: Mapping[str, str] | None = None) -> Iterator[Row]:
    if config.source == "hub":
        yield from _hub_rows(config, split, wanted or _wanted(config))
        return
    for path, name in _files(config, split):
        yield from read_rows(path, name, config.text_field)


def _hub_rows(config: DataConfig, split: str, fields: Mapping[str, str]) -> Iterator[Row]:
    repository, subset, place = _hub_names(config, split)
    dataset = load_split(repository, subset, place)
    source = f"{repository}, split {place}"
    for option, field in fields.items():
        may_be_missing = option == "data.id_field" and config.id_field is None
        if field not in dataset.column_names and not may_be_missing:
            raise _no_field(source, option, field, dataset.column_names)
    wanted = sorted({*fields.values()} & set(dataset.column_names))
    try:
        for number, found in enumerate(valid_rows(dataset.select_columns(wanted)), start=1):
            yield Row(f"{source}, row {number}", f"{place}:{number}", found)
    except (OSError, pa.ArrowInvalid) as error:
        files = ", ".join(sorted({str(Path(file["filename"]).parent) for file in dataset.cache_files}))
        raise DataError(f"{source}: damaged ({error}); remove {files}, from where it is then made anew.") from error


def _hub_names(config: DataConfig, split: str) -> tuple[str, str | None, str]:
    (place,) = config.places(split)
    assert config.repository is not None  # DataConfig has seen to it
    return config.repository, config.subset, place


def _files(config: DataConfig, split: str) -> list[tuple[Path, str]]:
    """The files of a split, each with the name its records are called after."""
    places = config.places(split)
    if config.source == "sample":
        paths = [_SAMPLE / f"{place}.jsonl.gz" for place in places]
        if not paths[0].exists():
            raise DataError(
                f"data.{split}={places[0]}: the sample has the splits {', '.join(SPLITS)}; choose one, or "
                f"for files of your own type data=text data.{split}={places[0]}"
            )
    else:
        paths = find_files(places, f"data.{split}")
    return list(zip(paths, name_files(paths), strict=True))


def _text(row: Row, config: DataConfig) -> str:
    if config.text_field not in row.fields:
        raise _no_field(row.place, "data.text_field", config.text_field, row.fields)
    text = row.fields[config.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{row.place}: {config.text_field!r} is a {type(text).__name__}, not text; mend or remove the record, or "
            "set data.text_field= to another field."
        )
    return text


def _id(row: Row, config: DataConfig) -> str:
    field = config.id_field or "id"
    if row.fields.get(field) is not None:
        return str(row.fields[field])
    if config.id_field is None:
        return row.name
    raise _no_field(row.place, "data.id_field", config.id_field, row.fields)


def _no_field(place: str, option: str, field: str, fields: Iterable[str]) -> DataError:
    return DataError(
        f"{place}: {option}={field}, and there is no such field (or nothing in it); there are "
        f"{', '.join(fields) or 'none'}; set {option}= to one of them."
    )


def _beginning(text: str, limit: int | None) -> str:
    """At most `limit` characters of a text, without half a word at the end (unless it is a very long one)."""
    if limit is None or len(text) <= limit:
        return text
    end, least = limit, max(0, limit - _LONGEST_WORD)
    while end > least and not text[end].isspace() and not text[end - 1].isspace():
        end -= 1
    return text[: end if end > least else limit]


def load_split(repository: str, subset: str | None, split: str) -> Any:
    """One split of a dataset as a memory-mapped `datasets.Dataset`.

    The hub is asked first, briefly: the libraries below would try again for minutes. When it cannot be reached, what
    was downloaded before is used.

    Raises:
        DataError: no such subset or split; or the hub cannot be reached and nothing was downloaded before.
        HubError: no such dataset.
    """
    asked = f"data.repository={repository} data.subset={subset or 'null'}"
    check_repository(repository)
    folder = Path(os.path.expanduser(repository))
    if folder.is_dir():
        # The library takes no notice when a file of the folder changes, so each state of it has a cache of its own.
        own = Path(datasets.config.HF_DATASETS_CACHE, "local_folders", _state(folder))
        return _load(str(folder), subset, split, asked, cache_dir=str(own))
    problem = problem_with_the_hub("dataset", repository, "data.repository")
    if problem is None:
        return _load(repository, subset, split, asked)
    try:
        return _cached(repository, subset).as_dataset(split=split)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{asked}: {problem}, and no earlier download of it is in {datasets.config.HF_DATASETS_CACHE} "
            f"({' '.join(str(error).split())}). To work without a network set data.repository= to a local folder laid "
            f"out like the dataset, {WITHOUT_A_NETWORK}"
        ) from error


def check_repository(repository: str) -> None:
    """Make sure that what can only be a local folder is one.

    Raises:
        DataError: it is not.
    """
    folder = Path(os.path.expanduser(repository))
    is_path = folder.is_absolute() or repository.startswith((".", "~")) or repository.count("/") > 1
    if is_path and not folder.is_dir():
        raise DataError(f"data.repository={repository}: there is no such folder (seen from {Path.cwd()}).")


def describe_split(repository: str, subset: str | None, split: str) -> str:
    """Names the content of a split: it changes with the revision on the hub, or with the files of a local folder.

    Raises:
        DataError: as `load_split`.
    """
    folder = Path(os.path.expanduser(repository))
    state = _state(folder) if folder.is_dir() else "hub"
    return f"{state} {load_split(repository, subset, split)._fingerprint}"


def _state(folder: Path) -> str:
    return hashlib.sha256(json.dumps(describe_content(folder)).encode()).hexdigest()[:16]


def _load(path: str, subset: str | None, split: str, asked: str, cache_dir: str | None = None) -> Any:
    try:
        return datasets.load_dataset(path, subset, split=split, cache_dir=cache_dir)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{asked}, split {split}: {error}") from error


def _cached(repository: str, subset: str | None) -> Any:
    """The newest download of a dataset; opening it needs no network, not even to find out that there is none."""
    return Cache(
        dataset_name=repository.split("/")[-1], repo_id=repository, config_name=subset, version="auto", hash="auto"
    )
