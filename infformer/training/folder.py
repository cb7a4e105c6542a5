"""The folder of a run: who may write into it, and what it says of the run in it.

One process at a time writes into a folder: the main process of a run, or of an evaluation, holds a lock on the file
`.lock` in it. The system gives the lock up when that process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from infformer.errors import UserError
from infformer.training.runtime import Accelerator, decided_by_main

logger = logging.getLogger(__name__)

LOCK = ".lock"
_PROBE = 2**16
"""Bytes that must find room in a folder before any work is begun."""

Decision = TypeVar("Decision")


class RunError(UserError, ValueError):
    """A run that cannot start as asked."""


@contextmanager
def held(accelerator: Accelerator, folder: Path, decide: Callable[[], Decision]) -> Iterator[Decision]:
    """While the block lasts, nobody else writes into the folder. All processes together.

    Args:
        decide: what the main process is asked when it has the folder for itself, such as where the run starts; all
            processes get the answer. If nothing is written, and the folder was not there, it is not there afterwards.

    Raises:
        RunError: on all processes: another process holds it, or nothing can be written there.
    """
    with ExitStack() as stack:

        def take_and_decide() -> Decision:
            stack.enter_context(_locked(folder))
            return decide()

        yield decided_by_main(accelerator, take_and_decide)


def what_lies_in(folder: Path) -> list[str]:
    """The names in a folder, in order, but for the lock's; none if there is no such folder."""
    return sorted({path.name for path in folder.iterdir()} - {LOCK}) if folder.is_dir() else []


def nothing_can_be_written(folder: Path, error: OSError) -> RunError:
    """What to say of it."""
    return RunError(
        f"output_dir={folder}: nothing can be written there ({error}); make room or get access, or set output_dir= to "
        "another place"
    )


def saved_options(path: Path) -> dict[str, Any]:
    """A configuration that a run has written, as one flat dictionary.

    Raises:
        RunError: it cannot be read.
    """
    try:
        options = flatten(OmegaConf.to_container(OmegaConf.load(path)))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RunError(f"the configuration {path} cannot be read ({' '.join(str(error).split())})") from error
    if not options or "" in options:
        raise RunError(f"the configuration {path} holds no options")
    return options


def as_dictionary(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by the options as they are typed."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    flat: dict[str, Any] = {}  # a group without options says nothing
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(then: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """The options, but for these and groups of these, that differ between two flat configurations, in words."""
    return [
        f"{option} was {then.get(option)}, is {now.get(option)}"
        for option in sorted(then.keys() | now.keys())
        if then.get(option) != now.get(option)
        and not any(option == group or option.startswith(f"{group}.") for group in free)
    ]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(folder / LOCK, folder)
        _sign(file)
    except OSError as error:
        _remove_if_unused(folder, missing)
        raise nothing_can_be_written(folder, error) from error
    with file:
        try:
            yield
        finally:
            _remove_if_unused(folder, missing)


def _open_locked(path: Path, folder: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            # Of the process: a child that outlives it does not hold it, and network file systems know it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(
                    "output_dir=%s: this file system has no locks (%s); see to it yourself that no two runs write into "
                    "it at once", folder, error,
                )  # fmt: skip
                return file
            file.seek(0)
            holder = file.readline().strip()
            file.close()
            raise RunError(
                f"output_dir={folder} is in use by a living run ({holder or 'of another process'}): two would mix what "
                "they write; wait for it or end it, or choose another name= or output_dir="
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # who held it before has just removed it


def _sign(file: TextIO) -> None:
    """Say who holds it; find out whether there is room."""
    holder = f"process {os.getpid()} on {socket.gethostname()}\n"
    file.truncate(0)
    file.write(holder + " " * _PROBE)
    file.flush()
    os.fsync(file.fileno())
    file.truncate(len(holder))


def _remove_if_unused(folder: Path, made: Sequence[Path]) -> None:
    with suppress(OSError):
        if not what_lies_in(folder):
            (folder / LOCK).unlink(missing_ok=True)
        for place in made:  # the inner ones first
            place.rmdir()
