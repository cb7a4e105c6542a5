"""The folder of an evaluation: what it is called, and whose results lie in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infformer.config import EvaluationRunConfig
from infformer.durable import write_text
from infformer.training.folder import RunError, as_dictionary, differences, flatten

RECORD = "evaluation.json"
"""Which evaluation the results beside it are of."""
FREE_TO_CHANGE = ("output_dir", "overwrite", "batch_size", "engine", "data.cache_dir", "data.workers")
"""Options (or groups of them) that do not change the figures."""
_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints")


def evaluation_folder(config: EvaluationRunConfig) -> Path:
    """`output_dir`, or where it is null a place of its own for this checkpoint and what it is asked."""
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
    """Results are written over by the same evaluation alone, unless told so.

    Raises:
        RunError: the folder holds a training run, or the results of another evaluation.
    """
    if config.overwrite:
        return
    remedy = "choose another output_dir=, or set overwrite=true to write over them"
    if any((folder / name).exists() for name in _OF_A_RUN):
        raise RunError(f"output_dir={folder} holds a training run, and the results there are its own: {remedy}")
    if not (folder / "results.json").exists():
        return
    try:
        then = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        changed = differences(then, _options(config), FREE_TO_CHANGE)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"output_dir={folder} holds results, and nothing says of what ({error}): {remedy}") from error
    if changed:
        raise RunError(f"output_dir={folder} holds the results of another evaluation ({'; '.join(changed)}): {remedy}")


def write_record(config: EvaluationRunConfig, folder: Path) -> None:
    """Say which evaluation the results are of."""
    write_text(folder / RECORD, json.dumps(_options(config), indent=1))


def _options(config: EvaluationRunConfig) -> dict[str, Any]:
    """As they are typed, with the checkpoint that is meant: `best` may be another one tomorrow."""
    return flatten(as_dictionary(config) | {"checkpoint": _resolved(config.checkpoint)})


def _resolved(checkpoint: str) -> str:
    """A folder by its whole path; a name on the hub as it is."""
    place = Path(checkpoint).expanduser()
    return str(place.resolve()) if place.exists() else checkpoint
