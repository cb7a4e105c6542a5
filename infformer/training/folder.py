"""The folder of a run or of an evaluation: who may write into it, and what it says of what was run.

One process at a time writes into a folder: the main process of a run, or of an evaluation, holds a lock on the file
`.lock` in it. The system gives the lock up when that process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from infformer.config import EvaluationRunConfig, RunConfig, options_of
from infformer.durable import rename, write_text
from infformer.errors import UserError
from infformer.training.checkpoint import point_to_best, remove_unfinished
from infformer.training.metrics import MetricsLog
from infformer.training.runtime import Accelerator, decided_by_main

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

LOCK = ".lock"
OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints")
RECORD = "evaluation.json"
"""The file that says which evaluation the results beside it are of."""
_PROBE = 2**16
"""Bytes that must find room in a folder before any work is begun."""

Decision = TypeVar("Decision")


class RunError(UserError, ValueError):
    """A run that cannot start as asked."""


@contextmanager
def held(accelerator: Accelerator, folder: Path, decide: Callable[[], Decision]) -> Iterator[Decision]:
    """Hold a folder: while the block lasts, nobody else writes into it. All processes together.

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
    """The error for a folder into which nothing can be written."""
    return RunError(
        f"output_dir={folder}: nothing can be written there ({error}); make room or get access, or set output_dir= to "
        "another place"
    )


def saved_options(path: Path) -> dict[str, object]:
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


def flatten(nested: object, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as a flat one, whose keys are the options as they are typed."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    flat: dict[str, object] = {}  # a group without options says nothing
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(
    then: Mapping[str, object], now: Mapping[str, object], config: DataclassInstance, *marks: str
) -> list[str]:
    """The options in which two flat configurations differ, in words, without those that have such a mark.

    An option that the version which wrote the first did not have was what it is by default.

    Args:
        config: of which the second are options.
    """
    then = {option: default for option, default in _defaults(config) if option in now} | dict(then.items())
    left_out = marked({**then, **now}, type(config), *marks)
    return [
        f"{option} was {then.get(option)}, is {now.get(option)}"
        for option in sorted(then.keys() | now.keys())
        if then.get(option) != now.get(option) and option not in left_out
    ]


def marked(options: Mapping[str, object], kind: type[Any], *marks: str) -> dict[str, object]:
    """Of a flat configuration of a kind the options that have one of these marks, or are in a group that has."""
    groups = [name for name, field in options_of(kind) if set(marks) & set(field.metadata.get("marks", ()))]
    return {
        option: value
        for option, value in options.items()
        if any(option == group or option.startswith(f"{group}.") for group in groups)
    }


def _defaults(config: DataclassInstance, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every option of a configuration, as it is typed, and what it is by default with this task and this memory."""
    for field in fields(config):
        option, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from _defaults(value, f"{option}.")
        else:
            yield option, field.default if field.default_factory is MISSING else field.default_factory()


def evaluation_folder(config: EvaluationRunConfig) -> Path:
    """`output_dir`, or if that is null a folder named after the checkpoint and what is asked of it."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    place = Path(_resolved(config.checkpoint))
    names = [name for name in place.parts if name not in (place.anchor, "outputs", "checkpoints", "model")]
    asked = config.data.subset or Path(config.data.repository or config.data.source).name
    if not config.task.is_language_modelling:
        asked = type(config.task).__name__.removesuffix("Config").lower()
    elif config.split != "test":
        asked = f"{asked}_{config.split}"
    return Path("outputs", "evaluation", "_".join([*names[-2:], asked]))


def check_that_it_may_be_written(config: EvaluationRunConfig, folder: Path) -> None:
    """Refuse to write over results, unless they are of the same evaluation or `overwrite` is set.

    Raises:
        RunError: the folder holds a training run, or the results of another evaluation.
    """
    if config.overwrite:
        return
    remedy = "choose another output_dir=, or set overwrite=true to write over them"
    if any((folder / name).exists() for name in OF_A_RUN):
        raise RunError(f"output_dir={folder} holds a training run, and the results there are its own: {remedy}")
    if not (folder / "results.json").exists():
        return
    try:
        then = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        changed = differences(then, _options(config), config, "free")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"output_dir={folder} holds results, and nothing says of what ({error}): {remedy}") from error
    if changed:
        raise RunError(f"output_dir={folder} holds the results of another evaluation ({'; '.join(changed)}): {remedy}")


def write_record(config: EvaluationRunConfig, folder: Path) -> None:
    """Write down which evaluation the results are of."""
    write_text(folder / RECORD, json.dumps(_options(config), indent=1))


def _options(config: EvaluationRunConfig) -> dict[str, object]:
    """The options as they are typed, with the checkpoint that is meant: `best` may be another one tomorrow."""
    return flatten(asdict(config) | {"checkpoint": _resolved(config.checkpoint)})


def _resolved(checkpoint: str) -> str:
    """The whole path of a checkpoint's folder; a name on the hub as it is."""
    place = Path(checkpoint).expanduser()
    return str(place.resolve()) if place.exists() else checkpoint


def open_record(config: RunConfig, folder: Path, step: int, best_step: int | None, size: int) -> None:
    """Write down what is run and by which versions; remove metrics and samples after this step, which come again.

    Results of a run that becomes longer get another name: this configuration has none yet.

    Args:
        best_step: that of the best checkpoint so far.
        size: of a checkpoint's weights and moments, in bytes.

    Raises:
        RunError: the folder cannot be written, or has no room for a checkpoint.
    """
    packages = ("infformer", "torch", "transformers", "accelerate", "datasets", "hydra-core")
    versions = {"python": platform.python_version(), "git_revision": _git_revision()}
    versions |= {package: _version(package) for package in packages}
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(
                errno.ENOSPC, f"a checkpoint takes {size / 1e6:,.0f} MB, and there is room for {free / 1e6:,.0f} MB"
            )
        results = folder / "results.json"
        if step < config.training.max_steps and results.exists():
            rename(results, folder / f"results-step-{step:08d}.json")
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        write_text(folder / "versions.json", json.dumps(versions, indent=1))
        remove_unfinished(folder / "checkpoints")
        if best_step is not None:
            point_to_best(folder / "checkpoints", best_step)
        MetricsLog(folder / "metrics.jsonl").truncate_after(step)
        MetricsLog(folder / "samples.jsonl").truncate_after(step)
    except OSError as error:
        raise nothing_can_be_written(folder, error) from error
    except ValueError as error:
        raise RunError(f"output_dir={folder}: {error}; mend that line, or remove it") from error


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
    """Write into a lock who holds it, and find out whether there is room."""
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


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _git_revision() -> str | None:
    """The git revision of the source, with a mark if it was changed; None outside a checkout. Asked once."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
