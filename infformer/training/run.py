"""A whole run: from its configuration to its table of results."""

from __future__ import annotations

import errno
import json
import logging
import platform
import shutil
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from infformer.config import EngineConfig, RunConfig
from infformer.durable import write_text
from infformer.evaluation.report import write_results
from infformer.memory.state import ModelState
from infformer.plots.memory import plot_inspection
from infformer.plots.run import plot_run
from infformer.training.before import check_run
from infformer.training.building import build_model, build_task, build_tokenizer
from infformer.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    best_checkpoint,
    load_checkpoint,
    load_weights,
    model_tensors,
    point_to_best,
    remove_unfinished,
)
from infformer.training.folder import RunError, as_dictionary, held, nothing_can_be_written
from infformer.training.loop import Loop, TrainingStopped
from infformer.training.metrics import MetricsLog
from infformer.training.optimization import make_optimizer, make_schedule
from infformer.training.prefetch import Prefetch
from infformer.training.resuming import find_checkpoint
from infformer.training.runtime import (
    Accelerator,
    all_reduce_max,
    decided_by_main,
    init_distributed,
    is_zero,
    prepare,
    resolve_engine,
    rows_of_rank,
    seed_everything,
    shard,
)
from infformer.training.shards import Shards, TorchShards, ZeroShards
from infformer.training.signals import StopRequested, StopSignals
from infformer.training.tracking import NoTracker, Tracker, open_tracker
from infformer.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> dict[str, Any]:
    """Train, measure on the test documents, and write everything to the run's folder.

    Returns:
        What `results.json` holds; empty without test documents.
    """
    disable_progress_bar()
    training, engine = config.training, resolve_engine(config.engine)
    accelerator = init_distributed(
        engine, training.precision, training.gradient_accumulation, training.gradient_clipping
    )
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    logger.info("%d process(es), engine %s, on %s", accelerator.num_processes, engine.name, accelerator.device.type)
    folder = Path(config.output_dir)
    rank_rows = _rank_rows(config, accelerator)
    with held(accelerator, folder, lambda: find_checkpoint(config, folder)) as checkpoint:
        if all_reduce_max(accelerator, int(checkpoint is not None and not checkpoint.is_dir())):
            raise RunError(f"output_dir={folder}: not all machines see {checkpoint}; give them a folder that all share")
        return _run(config, engine, accelerator, folder, checkpoint, rank_rows)


def _run(
    config: RunConfig,
    engine: EngineConfig,
    accelerator: Accelerator,
    folder: Path,
    checkpoint: Path | None,
    rank_rows: range,
) -> dict[str, Any]:
    """All of it, in a folder that is held."""
    check_run(config, accelerator.num_processes, accelerator.is_main_process)
    seed_everything(config.seed)  # the new weights are the same on all processes
    training = config.training
    signals = StopSignals(partial(all_reduce_max, accelerator), shows=accelerator.is_main_process)
    watchdog = Watchdog(accelerator.process_index, accelerator.num_processes, engine.patience)

    def after_segment() -> None:
        watchdog.tell("measures")
        signals.raise_if_agreed()

    tokenizer = build_tokenizer(config, accelerator)
    model = build_model(config, tokenizer)
    if checkpoint is not None:
        load_weights(checkpoint, model)
    task = build_task(config, tokenizer, model, accelerator, rank_rows, after_segment)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    in_memory = sum(parameter.numel() for parameter in model.memory_parameters())
    shard(engine, accelerator, model)
    optimizer = make_optimizer(model, config.optimizer)
    schedule = make_schedule(optimizer, config.schedule, training.max_steps)
    if training.compile:
        model.compile()
    prepared, wrapped = prepare(accelerator, model, optimizer)
    shards: Shards = ZeroShards(model, prepared.optimizer) if is_zero(accelerator) else TorchShards(model, optimizer)
    memory: ModelState = model.initial_state(len(rank_rows)).to(accelerator.device)
    memories = memory.split(training.gradient_accumulation)
    state = TrainingState(model, shards, schedule, task, task.state_dict(), memories)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, accelerator, rank_rows)
        logger.info("going on from %s: step %d, %s tokens", checkpoint, state.step, f"{state.tokens:,}")
    tracker: Tracker = NoTracker()
    decided_by_main(accelerator, lambda: _open_record(config, folder, state, 4 * numbers + 8 * trained))
    if accelerator.is_main_process:
        logger.info(
            "%s: %s; %s parameters trained, %s of them the memory's",
            config.name, task.describe(), f"{trained:,}", f"{in_memory:,}",
        )  # fmt: skip
        tracker = open_tracker(config.tracker, config.name, folder, as_dictionary(config))
    with signals, watchdog:  # to the last: who asks for an end may ask again
        try:
            if state.step == 0:
                state.results_before = task.measure_before()
            writer = CheckpointWriter(folder / "checkpoints", accelerator, training.keep_checkpoints)
            prefetch = Prefetch(task, accelerator.device.type == "cuda")
            Loop(
                config,
                accelerator,
                prepared,
                wrapped,
                state,
                rank_rows,
                folder,
                tracker,
                prefetch,
                writer,
                signals,
                watchdog,
            ).run()
            results = _measure_best(state, folder, accelerator)
            inspection = task.inspect()
            if accelerator.is_main_process:
                figures = plot_run(folder) + (task.report(results, folder) if results else [])
                if inspection:
                    write_results(folder / "inspection" / "inspection.json", inspection)
                    figures += plot_inspection(folder / "inspection" / "inspection.json")
                for figure in figures:
                    tracker.log_figure(figure.stem, figure, state.step)
        except StopRequested as stop:
            raise TrainingStopped(stop.number, state.step) from stop
        finally:
            tracker.finish()
    return results


def _rank_rows(config: RunConfig, accelerator: Accelerator) -> range:
    """The lanes of this process.

    Raises:
        RunError: the lanes cannot be divided.
    """
    lanes, processes = config.training.batch_size, accelerator.num_processes
    parts = processes * config.training.gradient_accumulation
    if lanes % parts:
        raise RunError(
            f"training.batch_size={lanes} cannot be divided among {processes} processes with "
            f"training.gradient_accumulation={config.training.gradient_accumulation}: take a multiple of {parts}"
        )
    return rows_of_rank(accelerator, lanes)


def _measure_best(state: TrainingState, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """The final figures, of the checkpoint with the lowest validation loss; empty if the task measures none."""
    best = decided_by_main(accelerator, lambda: best_checkpoint(folder / "checkpoints"))
    if best is None and state.best_step not in (None, state.step) and accelerator.is_main_process:
        logger.warning(
            "the best checkpoint, of step %d, is not in %s: the last weights are measured", state.best_step, folder
        )
    if best is not None and state.best_step != state.step:
        state.shards.put_weights(model_tensors(best, state.model))
    results = state.task.measure(str(best or folder / "checkpoints" / f"step-{state.step:08d}"))
    return {**results, "before": state.results_before or None} if results else {}


def _open_record(config: RunConfig, folder: Path, state: TrainingState, size: int) -> None:
    """Write down what is run, by which versions; forget what a run that was stopped did after this step.

    Args:
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
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_text(folder / "versions.json", json.dumps(versions, indent=1))
        remove_unfinished(folder / "checkpoints")
        if state.best_step is not None:
            point_to_best(folder / "checkpoints", state.best_step)
        MetricsLog(folder / "metrics.jsonl").truncate_after(state.step)
        MetricsLog(folder / "samples.jsonl").truncate_after(state.step)
    except OSError as error:
        raise nothing_can_be_written(folder, error) from error
    except ValueError as error:
        raise RunError(f"output_dir={folder}: {error}; mend that line, or remove it") from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the source, with a mark if it was changed; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
