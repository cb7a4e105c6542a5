"""Folders that are made once and found again as they were made, or made anew.

A folder of the cache holds a checksum of each of its files, which is compared before anything in it is used: files that
are memory-mapped would end the process if they were cut. Who makes a folder does so in a hidden one beside it, and
holds a lock in there that ends with its process; a hidden folder whose lock is free was left behind.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from infformer.errors import DataError

_CHECKSUMS = "checksums.json"
_LOCK = "lock"
_WAIT = 600.0  # seconds for the lock of the whole cache, which nobody holds for longer than moments
_MADE = re.compile(r"\.(train|validation|test|words)-[0-9a-f]{32}\..+")  # hidden folders, also of earlier versions
_PROBE = 2**20  # bytes: a disk that does not take these is full

log = logging.getLogger(__name__)


def find_or_make(folder: Path, make: Callable[[Path], Path]) -> None:
    """Make sure that a folder of the cache is there and is as it was made.

    Several processes may call this at the same time: the folder appears whole or not at all, and where two have made
    it, the first one's stays.

    Args:
        folder: its place; what is beside it belongs to the cache as well.
        make: puts what is to be kept into a folder in the one that it is given, and returns it.

    Raises:
        DataError: it cannot be kept there.
    """
    try:
        damage = _damage(folder)
        if damage is None:
            return
        if os.path.lexists(folder):
            log.warning("%s in the cache is damaged (%s); it is made anew", folder, damage)
        _make(folder, make)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={folder.parent}: the tokens cannot be kept there ({error}); make room or get access, or "
            "name another folder."
        ) from error


def key_of(parts: object) -> str:
    """Names what is made of these parts, as JSON: other parts have another name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checksum(path: Path) -> str:
    """A checksum of a file's content; it finds accidents, not attacks, and is as fast as the file can be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder of the cache, in words; None if it is as it was made."""
    try:
        expected = json.loads(_plain_file(folder / _CHECKSUMS).read_bytes())
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {_CHECKSUMS}
        for name in sorted(names | set(expected)):
            if expected.get(name) != checksum(_plain_file(folder / name)):
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"{_CHECKSUMS} is not what was written"
    return None


def _plain_file(path: Path) -> Path:
    """The path, if opening it waits for nobody."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a file")
    return path


def _make(folder: Path, make: Callable[[Path], Path]) -> None:
    """Make a folder under a temporary name; let it take the final one when it is whole."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(cache / ".lock", _WAIT):
            _remove_left_behind(cache)
            temporary = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache, ignore_cleanup_errors=True)
                )
            )
            stack.enter_context(_locked(temporary / _LOCK, 0))
        _check_room(temporary / "probe")
        whole = make(temporary)
        checksums = {path.name: checksum(path) for path in whole.iterdir()}
        (whole / _CHECKSUMS).write_text(json.dumps(checksums))
        with _locked(cache / ".lock", _WAIT):
            if _damage(folder) is None:
                return  # another process was faster
            if os.path.lexists(folder):
                folder.rename(temporary / "damaged")
            whole.rename(folder)


def _check_room(probe: Path) -> None:
    with probe.open("wb") as file:
        file.write(bytes(_PROBE))
        os.fsync(file.fileno())
    probe.unlink()


def _remove_left_behind(cache: Path) -> None:
    """Remove the hidden folders that nobody is filling any more, because their maker was killed."""
    for folder in cache.iterdir():
        if _MADE.fullmatch(folder.name):
            with suppress(OSError), _locked(folder / _LOCK, 0) as known:
                if known:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path, wait: float) -> Iterator[bool]:
    """Hold a lock that ends with this process; yields False, without it, where the file system has none.

    Raises:
        Timeout: another one holds it for longer than `wait` seconds.
    """
    lock = FileLock(path, mode=0o666)  # a cache may belong to a group
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise
    except (OSError, NotImplementedError):
        pass
    try:
        yield lock.is_locked
    finally:
        lock.release()
