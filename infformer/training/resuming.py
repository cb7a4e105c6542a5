"""Where a run starts: anew, or from a checkpoint of a run like it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from infformer.config import RunConfig
from infformer.errors import UserError
from infformer.training.checkpoint import newest_checkpoint, what_is_wrong

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    "name", "output_dir", "resume", "tracker", "engine", "evaluation", "data.cache_dir", "data.workers",
    "data.validation", "data.test", "training.max_steps", "training.log_every", "training.evaluate_every",
    "training.checkpoint_every", "training.keep_checkpoints", "training.sample_every", "training.sample_tokens",
    "training.compile", "training.gradient_checkpointing", "training.gradient_accumulation", "model.attention",
    "task.validation_sequences", "task.test_sequences", "task.evaluation_lengths", "task.lengths", "task.depths",
    "task.validation_questions", "task.test_questions",
)  # fmt: skip
"""Options (or groups of them) that a resumed run may have otherwise than before: they do not change what is learned."""


class RunError(UserError, ValueError):
    """A run that cannot start as asked."""


def where_to_start(config: RunConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        RunError: the folder holds another run, or the checkpoint is not one of a run like this.
    """
    newest = newest_checkpoint(folder / "checkpoints")
    if config.resume is None:
        if (folder / "metrics.jsonl").exists() or newest is not None:
            raise RunError(
                f"output_dir={folder} already holds a run: go on with it by resume=auto, choose another name= or "
                "output_dir=, or remove the folder"
            )
        return None
    if config.resume == "auto":
        checkpoint = newest
        if checkpoint is None:
            logger.info("resume=auto: no checkpoint in %s, the run begins", folder)
            return None
    else:
        checkpoint = Path(config.resume).resolve()
        problem = what_is_wrong(checkpoint)
        if problem is not None:
            raise RunError(f"resume={config.resume}: this checkpoint cannot be gone on from: {problem}")
        if newest is not None and newest.resolve() != checkpoint:
            raise RunError(
                f"resume={config.resume}: output_dir={folder} holds another checkpoint already, {newest.name}: go on "
                "with that by resume=auto, or choose another name= or output_dir="
            )
    try:
        then = _flatten(saved_config(checkpoint.parents[1]))
    except OSError as error:
        raise RunError(
            f"resume={config.resume}: the configuration of its run cannot be read ({error}); go on from a checkpoint "
            "where it lies, in checkpoints/ of the folder of its run"
        ) from error
    now = _flatten(as_dictionary(config))
    changed = [
        f"{option} was {then.get(option)}, is {now.get(option)}"
        for option in sorted(then.keys() | now.keys())
        if then.get(option) != now.get(option)
        and not any(option == free or option.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]
    if changed:
        raise RunError(
            f"resume={config.resume}: the run of {checkpoint} was configured otherwise: {'; '.join(changed)}. Set "
            "these back, or begin a new run under another name="
        )
    return checkpoint


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration in a run's folder, as nested dictionaries."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))


def as_dictionary(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def _flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    flat: dict[str, Any] = {}  # a group without options says nothing
    for name, value in nested.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
