"""Where a run starts: anew, or from a checkpoint of a run like it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from infformer.config import RunConfig
from infformer.training.checkpoint import (
    Progress,
    newest_checkpoint,
    put_back_replaced,
    step_of,
    validate_checkpoint,
)
from infformer.training.folder import (
    OF_A_RUN,
    RunError,
    differences,
    flatten,
    marked,
    saved_options,
    what_lies_in,
)
from infformer.training.metrics import read_metrics
from infformer.training.optimization import ENDING_SCHEDULES

logger = logging.getLogger(__name__)


def find_checkpoint(config: RunConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run; to be asked by the process that holds the folder.

    Raises:
        RunError: the folder holds another run, or something else that a new one would write over; no checkpoint can be
            gone on from, or not by a run like this.
    """
    checkpoints = folder / "checkpoints"
    if config.resume is None:
        _refuse_what_is_there(folder)
        return None
    put_back_replaced(checkpoints)
    newest = newest_checkpoint(checkpoints)
    if config.resume == "auto":
        if newest is None:
            _check_that_it_may_begin(config, folder)
            logger.info("resume=auto: no checkpoint in %s, the run begins", folder)
            return None
        checkpoint = newest
    else:
        checkpoint = Path(config.resume).expanduser().resolve()
        if not checkpoint.is_dir():
            raise RunError(
                f"resume={config.resume}: there is no such folder (seen from {Path.cwd()}); type resume=auto to go on "
                f"with the newest checkpoint in output_dir={folder}, or name a checkpoint"
            )
        if (own := newest_checkpoint(checkpoint) or newest_checkpoint(checkpoint / "checkpoints")) is not None:
            raise RunError(
                f"resume={config.resume}: this is the folder of a run; name one of its checkpoints, of which the "
                f"newest is {own}, or go on with it by output_dir= and resume=auto"
            )
        problem = validate_checkpoint(checkpoint)
        if problem is not None:
            raise RunError(f"resume={config.resume}: this checkpoint cannot be gone on from: {problem}")
        if newest is None:
            _check_that_it_may_begin(config, folder)
        elif newest.resolve() != checkpoint:
            raise RunError(
                f"resume={config.resume}: output_dir={folder} holds another checkpoint already, {newest.name}: go on "
                "with that by resume=auto, or choose another name= or output_dir="
            )
    try:
        then = saved_options(checkpoint.parent.parent / "config.yaml")
    except RunError as error:
        raise RunError(
            f"resume={config.resume}: {error}; go on from a checkpoint where it lies, in checkpoints/ of the folder of "
            "its run"
        ) from error
    _check_that_it_is_the_same(config, then, f"the run of {checkpoint}")
    _check_that_it_has_grown_so(config, then, checkpoint)
    _tell_of_another_end(config, then, checkpoint)
    return checkpoint


def forget_figures_of_other_texts(config: RunConfig, fingerprints: Mapping[str, str], progress: Progress) -> list[str]:
    """Forget what was measured by other texts than those that are held out now; what and why, in sentences.

    Args:
        fingerprints: the checksums of the texts, by split; other texts may stand where these stood.
    """
    now = marked(flatten(asdict(config)), RunConfig, "validation", "test")
    then, progress.held_out = progress.held_out or now, now
    before, progress.fingerprints = progress.fingerprints, fingerprints
    changed = {}
    for split in ("validation", "test"):
        said = differences(marked(then, RunConfig, split), marked(now, RunConfig, split), config)
        if not said and before.get(split, fingerprints.get(split)) != fingerprints.get(split):
            said = [f"data.{split}={getattr(config.data, split)} holds another text than it did"]
        changed[split] = "; ".join(said)
    validation, test = changed["validation"], changed["test"]
    forgotten = []
    if validation and progress.best_loss is not None:
        progress.best_loss = progress.best_step = None
        forgotten.append(f"{validation}: the best checkpoint is chosen anew, as its loss is of other texts")
    if test and progress.results_before is not None:
        progress.results_before = None
        forgotten.append(f"{test}: the figures from before training are left out, as they are of other texts")
    return forgotten


def _refuse_what_is_there(folder: Path) -> None:
    found = what_lies_in(folder)
    if any(name in found for name in OF_A_RUN):
        raise RunError(
            f"output_dir={folder} already holds a run: go on with it by resume=auto, choose another name= or "
            "output_dir=, or remove the folder"
        )
    if found:
        raise RunError(
            f"output_dir={folder} holds {_some(found)}, which no run has written: choose another name= or output_dir=, "
            "or remove what is there"
        )


def _check_that_it_may_begin(config: RunConfig, folder: Path) -> None:
    """Refuse to begin a run in a folder without a usable checkpoint, unless nothing of value would be lost."""
    found = what_lies_in(folder)
    if not found:
        return
    otherwise = "choose another name= or output_dir=, or remove the folder to begin again"
    broken = [
        f"{path.name}: {validate_checkpoint(path)}" for path in sorted((folder / "checkpoints").glob("step-????????"))
    ]
    if broken:
        raise RunError(
            f"resume={config.resume}: output_dir={folder} holds checkpoints, and none can be gone on from ("
            f"{'; '.join(broken)}): put back what is missing, {otherwise}"
        )
    if "config.yaml" not in found:
        raise RunError(
            f"resume={config.resume}: output_dir={folder} holds {_some(found)}, and no run to go on with: {otherwise}"
        )
    try:
        then = saved_options(folder / "config.yaml")
    except RunError as error:
        raise RunError(f"resume={config.resume}: {error}, and there is no checkpoint: {otherwise}") from error
    _check_that_it_is_the_same(config, then, f"the run in output_dir={folder}, which has no checkpoint,")
    if "results.json" in found:
        raise RunError(
            f"resume={config.resume}: output_dir={folder} holds the results of a whole run and none of its "
            f"checkpoints: {otherwise}"
        )
    try:
        lines = read_metrics(folder / "metrics.jsonl") if "metrics.jsonl" in found else []
    except ValueError as error:
        raise RunError(f"resume={config.resume}: {error}, and there is no checkpoint: {otherwise}") from error
    # The first checkpoint has its name at the latest when the second begins to be written.
    every = then.get("training.checkpoint_every")
    latest = 2 * (every if isinstance(every, int) else config.training.max_steps)
    if lines and lines[-1]["step"] > latest:
        raise RunError(
            f"resume={config.resume}: output_dir={folder} holds metrics up to step {lines[-1]['step']:.0f} and no "
            f"checkpoint: they were removed, or could not be written; put one back, {otherwise}"
        )
    logger.warning("%s holds a run that was stopped before its first checkpoint; it begins again", folder)


def _check_that_it_is_the_same(config: RunConfig, then: Mapping[str, object], run: str) -> None:
    changed = differences(then, flatten(asdict(config)), config, "free", "to come", "measuring")
    if changed:
        raise RunError(
            f"resume={config.resume}: {run} was configured otherwise: {'; '.join(changed)}. Set these back, or begin a "
            "new run under another name="
        )


def _check_that_it_has_grown_so(config: RunConfig, then: Mapping[str, object], checkpoint: Path) -> None:
    """Refuse other growths than those after which a checkpoint was taken; what is still to come may change."""
    step, now = step_of(checkpoint), asdict(config)["growth"]
    past = [
        [growth for growth in cast(list[dict[str, int]], growths) if growth["step"] <= step]
        for growths in (then.get("growth", []), now)
    ]
    if past[0] != past[1]:
        raise RunError(
            f"resume={config.resume}: growth={now}, and until {checkpoint} the model has grown otherwise: {past[0]}. "
            "Set these back, or begin a new run under another name="
        )


def _tell_of_another_end(config: RunConfig, then: Mapping[str, object], checkpoint: Path) -> None:
    """Refuse a `training.max_steps` that is past, and warn of another one, by which some schedules are made."""
    step, before, now = step_of(checkpoint), then.get("training.max_steps"), config.training.max_steps
    if step > now:
        raise RunError(
            f"resume={config.resume}: training.max_steps={now}, and {checkpoint} has made {step} already: set it to "
            f"{step} to measure that checkpoint, or to more to go on"
        )
    if before != now and step < now and config.schedule.name in ENDING_SCHEDULES:
        logger.warning(
            "training.max_steps was %s, is %d: schedule=%s ends at max_steps, so from step %d on the learning rates are"
            " those of a run of %d steps, while those until then were of a run of %s. Their curve has a jump there: "
            "such a run is neither of the two",
            before, now, config.schedule.name, step + 2, now, before,
        )  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
