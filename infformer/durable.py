"""Files that are there whole or not at all, also after a full disk, a kill or a power failure.

What is written gets a temporary name beside its place, is handed to the disk, and only then takes its own name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from infformer.errors import UserError


class PlaceError(UserError, OSError):
    """A folder in which nothing can be written."""


def check_place(option: str, folder: Path) -> None:
    """Make sure, before any work, that a folder can be made and written to; it is not made.

    Args:
        option: where it was given, for the message.

    Raises:
        PlaceError: it cannot, or the disk is full.
    """
    there = next((place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place)), folder)
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise PlaceError(
            f"{option}={folder}: nothing can be written there ({error}); make room or get access, or set {option}= to "
            "another place"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8) to be written, which takes the place of `path` when the block ends without an error.

    One process at a time may write to a path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_new_folder(option: str, folder: Path) -> None:
    """Make sure, before any work, that a new folder can be made there.

    Raises:
        UserError: there is something in it, or nothing can be written there.
    """
    check_place(option, folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{option}={folder} is not empty: name a new folder, or remove what is in it")


@contextmanager
def new_folder(option: str, folder: Path) -> Iterator[Path]:
    """A folder to be made and filled, which takes the name of one that is not there, or empty, when the block ends.

    Raises:
        UserError: it could not be written; nothing of it is left.
    """
    temporary = folder.with_name(folder.name + ".partial")
    try:
        if temporary.exists():  # of a call that was killed
            shutil.rmtree(temporary)
        yield temporary
        synchronise(temporary)
        rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{option}={folder}: it could not be written ({error}); make room, or name another") from error


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all; where there was one, it stays until the new one is on the disk."""
    with replacing(path) as file:
        file.write(text)


def synchronise(path: Path) -> None:
    """Return when a file, or a folder with all that lies in it, is on the disk: to be called before a `rename`."""
    if path.is_dir():
        for inner in path.iterdir():
            synchronise(inner)
        _synchronise_names(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(temporary: Path, path: Path) -> None:
    """Give a file or a folder that is on the disk its name, and return when that is on the disk too.

    Raises:
        OSError: also where `path` is a folder that holds something.
    """
    os.replace(temporary, path)
    _synchronise_names(path.parent)


def _synchronise_names(folder: Path) -> None:
    """The names in a folder; not every file system can, and none has lost its files by that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
