"""Local files, one by one: what is in them, whatever their format and compression."""

import csv
import glob
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet

from infformer.data.cache import checksum
from infformer.errors import DataError

TEXT = (".txt", ".text", ".md", ".tokens", ".raw")
JSON_LINES = (".jsonl", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
"""What stands between the columns; the first line names them."""
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst")

_ROWS_AT_A_TIME = 16  # of a table: a row may be a whole book


@dataclass(frozen=True)
class Row:
    """One record as it was found, before anything is asked of its fields."""

    place: str
    """Where it is, in words for an error: the file, and the line or row in it."""

    name: str
    """What to call it when no field does: `<file>:<row>`, or `<file>` where a file is one record."""

    fields: Mapping[str, object]


def find_files(patterns: Sequence[str], option: str) -> list[Path]:
    """The files and saved datasets that paths and globs name, in sorted order, each once though links lead to it too.

    Args:
        patterns: paths and globs; `~` is the home folder, `**` any folders.
        option: the option they were given by, such as `data.train`, for the errors.

    Raises:
        DataError: a pattern names nothing, something of a kind that is not known, or something that cannot be read.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        whole = os.path.expanduser(pattern)
        paths = [whole] if os.path.exists(whole) else glob.glob(whole, recursive=True)
        # A glob meets folders on its way; only a saved dataset is one to be read.
        matches = [
            Path(path).absolute() for path in paths if path == whole or not os.path.isdir(path) or _is_saved(Path(path))
        ]
        if not matches:
            raise DataError(f"{option}={pattern}: no such file; give a path or a glob (seen from {os.getcwd()}).")
        for match in matches:
            _check_kind(match, option)
            _check_readable(match, option)
        for match in sorted(matches, key=lambda path: (len(path.parts), path)):
            found.setdefault(os.path.realpath(match), match)
    return sorted(found.values())


def name_files(paths: Sequence[Path]) -> list[str]:
    """Short names that tell files apart: their paths from the folder they share, without endings if that is enough."""
    shared = os.path.commonpath([path.parent for path in paths])
    short = [path if path.is_dir() else _plain(path).with_suffix("") for path in paths]
    times = Counter(short)
    names = [path if times[name] > 1 else name for path, name in zip(paths, short, strict=True)]
    return [name.relative_to(shared).as_posix() for name in names]


def describe_content(path: Path) -> list[tuple[str, str]]:
    """The name and a checksum of the content of a file, or of each file in a folder but the hidden ones.

    Everything is read for it, at about a gigabyte a second: sizes and time stamps can stay while a text changes.

    Raises:
        DataError: something cannot be read, or is neither a file nor a folder.
    """
    members = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = []
    for member in members:
        is_hidden = any(part.startswith(".") for part in member.relative_to(path).parts)
        if is_hidden or member.is_dir():
            continue
        if member.exists() and not member.is_file():
            raise DataError(f"{member} is a pipe or a device and not a file; remove it from the folder.")
        try:
            found.append((member.relative_to(path.parent).as_posix(), checksum(member)))
        except OSError as error:
            raise DataError(f"{member}: cannot be read ({error.strerror}); get access to it, or remove it.") from error
    return found


def in_utf8(text: str, place: str, what: str = "text") -> bytes:
    """The bytes of a text.

    Args:
        place: where it was found, in words for the error.
        what: it is.

    Raises:
        DataError: it holds half a character, as JSON can.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the {what} holds half a character at {error.start}; write it as UTF-8.") from error


def is_text(path: Path) -> bool:
    """Whether a file is plain text, which has lines but no fields."""
    return _kind(path) in TEXT


def holds_records(path: Path) -> bool:
    """Whether a file is one of many records with fields."""
    return _kind(path) in (*JSON_LINES, *TABLES, *PARQUET)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, maybe compressed, with their ends as they are; a byte order mark is left out.

    Raises:
        DataError: the file is empty, is cut short, does not decompress, or is not UTF-8.
    """
    offset, blank = 0, True
    try:
        with pa.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as lines:
            for line in lines:
                text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
                offset += len(line)
                blank = blank and not text.strip()
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason}); save the file as UTF-8, for example "
            "with iconv -f <its encoding> -t utf-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); get or compress the file anew.") from error
    if blank:
        raise _empty(path)


def read_rows(path: Path, name: str, text_field: str) -> Iterator[Row]:
    """The records of one file or saved dataset, in its order.

    A plain text file is one record, whose only field is `text_field`.

    Args:
        path: the file, or the folder that `Dataset.save_to_disk` wrote.
        name: what its records are called after.
        text_field: the field for the text of a plain text file.

    Raises:
        DataError: the file is empty, is damaged, or has a line that is no JSON object.
    """
    if is_text(path):
        yield Row(str(path), name, {text_field: "".join(read_lines(path))})
    elif _kind(path) in JSON_LINES:
        yield from _json_rows(path, name)
    elif _kind(path) in TABLES:
        yield from _table_rows(path, name)
    else:
        number = 0
        for number, fields in enumerate(_saved_rows(path) if path.is_dir() else _parquet_rows(path), start=1):
            yield Row(f"{path}, row {number}", f"{name}:{number}", fields)
        if number == 0:
            raise _empty(path)


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        remedy = 'each line must be one whole JSON object, such as {"id": "...", "text": "..."}'
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}); {remedy}.") from error
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets in brackets
            raise DataError(f"{place}: JSON that cannot be read ({error}); {remedy}.") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: JSON, but a {type(fields).__name__} and not an object; {remedy}.")
        yield Row(place, f"{name}:{number}", fields)


def _table_rows(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a field may be a whole book
    reader = csv.DictReader(read_lines(path), delimiter=TABLES[_kind(path)], strict=True)
    number = 0
    try:
        for number, fields in enumerate(reader, start=1):
            place = f"{path}, line {reader.line_num}"
            if None in fields or None in fields.values():
                raise DataError(
                    f"{place}: this row has not the {len(reader.fieldnames or ())} columns that the first line names; "
                    "put quotes around text that holds separators."
                )
            yield Row(place, f"{name}:{number}", fields)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({error}); save the file anew.") from error
    if number == 0:
        raise DataError(f"{path}: the file names columns and has no rows; fill it, or leave it out.")


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME):
                batch.validate(full=True)
                yield from batch.to_pylist()
    except (OSError, ValueError, ArithmeticError) as error:  # also for dates that Python does not have
        raise DataError(f"{path}: not a whole Parquet file ({error}); get or write the file anew.") from error


def _saved_rows(path: Path) -> Iterator[dict[str, object]]:
    try:
        # The library cannot open what it saves of a dataset without rows.
        if json.loads((path / "state.json").read_text())["_data_files"]:
            yield from valid_rows(datasets.load_from_disk(str(path)))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise DataError(f"{path}: not a whole saved dataset ({error}); save it anew with save_to_disk.") from error


def valid_rows(dataset: Any) -> Iterator[dict[str, object]]:
    """The rows of a `datasets.Dataset`, each looked at first: a damaged one would end the process.

    Raises:
        pyarrow.ArrowInvalid: a row is damaged.
    """
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
        table.validate(full=True)
        yield from table.to_pylist()


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty; remove it, or leave it out of the option that names it.")


def _check_kind(path: Path, option: str) -> None:
    if not path.is_dir():
        if _kind(path) not in (*TEXT, *JSON_LINES, *TABLES, *PARQUET):
            known = " ".join([*TEXT, *JSON_LINES, *TABLES])
            raise DataError(
                f"{option}: {path} is of no kind that can be read; known are {known} (each also with "
                f"{' or '.join(COMPRESSED)}), {' '.join(PARQUET)} and folders written by save_to_disk; rename or "
                "convert it."
            )
    elif os.path.exists(path / "dataset_dict.json"):
        raise DataError(f"{option}: {path} holds several splits; name one of them, such as {option}={path}/train.")
    elif not _is_saved(path):
        raise DataError(f"{option}: {path} is a folder; name the files in it, such as '{option}={path}/**/*.txt'.")


def _check_readable(path: Path, option: str) -> None:
    """Look at a file without waiting for anything: a pipe without a writer would never open."""
    if path.is_dir():
        return
    if path.is_symlink() and not path.exists():
        raise DataError(f"{option}: {path} is a link to {os.readlink(path)}, which does not exist; mend or remove it.")
    if not path.is_file():
        raise DataError(f"{option}: {path} is a pipe or a device and not a file; write what comes out of it to a file.")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{option}: {path} cannot be read ({error.strerror}); get access, or name another.") from error
    if empty:
        raise _empty(path)


def _is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return os.path.exists(path / "state.json") and os.path.exists(path / "dataset_info.json")


def _plain(path: Path) -> Path:
    """The path without the ending of its compression."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _kind(path: Path) -> str:
    return "" if path.is_dir() else _plain(path).suffix
