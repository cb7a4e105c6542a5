"""A whole run: from its configuration to its table of results."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from infformer.config import RunConfig
from infformer.data.lanes import Lanes
from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.data.word_vocabulary import word_tokenizer
from infformer.errors import UserError
from infformer.evaluation.reading import Reader
from infformer.evaluation.report import write_results
from infformer.memory.state import MemoryState
from infformer.models.loading import check_fit, load_pretrained, load_tokenizer, new_decoder, new_model, vocabulary_of
from infformer.models.memory_model import MemoryModel
from infformer.plots.memory import plot_inspection
from infformer.plots.run import plot_run
from infformer.tasks.associative_recall import AssociativeRecall, AssociativeRecallConfig
from infformer.tasks.language_modelling import LanguageModelling
from infformer.tasks.needle import NeedleConfig, NeedleInABook
from infformer.tasks.passkey import Passkey, PasskeyConfig
from infformer.tasks.question_answering import QuestionAnswering
from infformer.tasks.question_stream import QuestionStream
from infformer.tasks.questions import QuestionSource
from infformer.tasks.retrieval import Retrieval
from infformer.tasks.retrieval_questions import RetrievalSource
from infformer.tasks.sorting import Sorting
from infformer.tasks.sorting_sequences import SortingConfig, SortingQuestions
from infformer.tasks.task import Examination, Task, TaskConfig
from infformer.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    best_checkpoint,
    load_checkpoint,
    load_weights,
    model_tensors,
    newest_checkpoint,
    remove_unfinished,
    what_is_wrong,
)
from infformer.training.loop import Loop, TrainingStopped
from infformer.training.metrics import MetricsLog
from infformer.training.optimization import make_optimizer, make_schedule
from infformer.training.prefetch import Prefetch
from infformer.training.runtime import (
    Accelerator,
    highest,
    is_zero,
    prepare,
    seed_everything,
    settle_engine,
    shard,
    share_of_lanes,
    start_processes,
)
from infformer.training.shards import Shards, TorchShards, ZeroShards
from infformer.training.signals import StopRequested, StopSignals
from infformer.training.tracking import NoTracker, Tracker, open_tracker
from infformer.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    "name", "output_dir", "resume", "tracker", "engine", "evaluation", "data.cache_dir", "data.workers",
    "data.validation", "data.test", "training.max_steps", "training.log_every", "training.evaluate_every",
    "training.checkpoint_every", "training.keep_checkpoints", "training.sample_every", "training.sample_tokens",
    "training.compile", "training.gradient_checkpointing", "training.gradient_accumulation", "model.attention",
    "task.validation_sequences",
    "task.test_sequences", "task.evaluation_lengths", "task.lengths", "task.depths", "task.validation_questions",
    "task.test_questions",
)  # fmt: skip
"""Options (or groups of them) that a resumed run may have otherwise than before: they do not change what is learned."""


class RunError(UserError, ValueError):
    """A run that cannot start as asked."""


def run(config: RunConfig) -> dict[str, Any]:
    """Train, measure on the test documents, and write everything to the run's folder.

    Returns:
        What `results.json` holds; empty without test documents.
    """
    disable_progress_bar()
    training, engine = config.training, settle_engine(config.engine)
    accelerator = start_processes(
        engine, training.precision, training.gradient_accumulation, training.gradient_clipping
    )
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    logger.info("%d process(es), engine %s, on %s", accelerator.num_processes, engine.name, accelerator.device.type)
    seed_everything(config.seed)  # the new weights are the same on all processes
    folder = Path(config.output_dir)
    checkpoint = _where_to_start(config, folder)
    share = _share(config, accelerator)
    signals = StopSignals(partial(highest, accelerator))
    watchdog = Watchdog(accelerator.process_index, accelerator.num_processes, engine.patience)

    def after_segment() -> None:
        watchdog.tell("measures")
        signals.raise_if_agreed()

    tokenizer = _load_tokenizer(config, accelerator)
    model = build_model(config, tokenizer)
    if checkpoint is not None:
        load_weights(checkpoint, model)
    task = _build_task(config, tokenizer, model, accelerator, share, after_segment)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    in_memory = sum(parameter.numel() for parameter in model.memory_parameters())
    shard(engine, accelerator, model)
    optimizer = make_optimizer(model, config.optimizer)
    schedule = make_schedule(optimizer, config.schedule, training.max_steps)
    if training.compile:
        model.compile()
    prepared, wrapped = prepare(accelerator, model, optimizer)
    shards: Shards = ZeroShards(model, prepared.optimizer) if is_zero(accelerator) else TorchShards(model, optimizer)
    memory: MemoryState = model.initial_memory(len(share)).to(accelerator.device)
    memories = memory.split(training.gradient_accumulation)
    state = TrainingState(model, shards, schedule, task, task.state_dict(), memories)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, accelerator, share)
        logger.info("going on from %s: step %d, %s tokens", checkpoint, state.step, f"{state.tokens:,}")
    tracker: Tracker = NoTracker()
    if accelerator.is_main_process:
        _open_record(config, folder, state.step)
        logger.info(
            "%s: %s; %s parameters trained, %s of them the memory's",
            config.name, task.describe(), f"{trained:,}", f"{in_memory:,}",
        )  # fmt: skip
        tracker = open_tracker(config.tracker, config.name, folder, _as_dictionary(config))
    try:
        with signals, watchdog:
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
                share,
                folder,
                tracker,
                prefetch,
                writer,
                signals,
                watchdog,
            ).run()
            results = _measure_best(state, folder)
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


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> MemoryModel:
    """The model that a run trains.

    Args:
        tokenizer: None for a task without text.

    Raises:
        ModelError, ValueError: it cannot be loaded or does not fit the tokenizer or the segment.
    """
    chosen, segment_length = config.model, config.training.segment_length
    model: MemoryModel
    if chosen.pretrained is not None:
        kernel = {} if chosen.attention is None else {"attn_implementation": chosen.attention}
        model = load_pretrained(chosen.pretrained, chosen.memory, chosen.memory_layers, **kernel)
    else:
        if tokenizer is not None:
            vocabulary = vocabulary_of(tokenizer)
        else:
            vocabulary = {"vocab_size": config.task.vocabulary_size}
        architecture = {**vocabulary, **chosen.architecture}
        if chosen.is_decoder:
            model = new_decoder(architecture, chosen.decoder_memory(segment_length))
        else:
            model = new_model(architecture, chosen.memory, chosen.memory_layers, chosen.attention)
    if tokenizer is not None:
        check_fit(model, tokenizer)
    model.check_segment_length(segment_length)
    if config.training.freeze_backbone:
        model.backbone.requires_grad_(False)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_reader(
    accelerator: Accelerator,
    model: MemoryModel,
    segment_length: int,
    precision: str,
    documents: int,
    stride: int | None = None,
    warmup_documents: int = 0,
    after_segment: Callable[[], None] = lambda: None,
) -> Reader:
    """A reader of that many documents side by side, shared out among the processes."""
    return Reader(
        model,
        segment_length,
        documents,
        getattr(torch, precision),
        accelerator.process_index,
        accelerator.num_processes,
        lambda sums: accelerator.reduce(sums, reduction="sum"),
        accelerator.is_main_process,
        stride,
        warmup_documents,
        after_segment,
    )


def ask(
    task: TaskConfig,
    reader: Reader,
    controls: bool,
    data: DataConfig,
    documents: Mapping[str, TokenizedDocuments],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[QuestionSource, Examination]:
    """The questions of a task other than language modelling, and how a model is measured by them.

    Args:
        reader: of the texts.
        controls: measure also what the model knows without its memory.
        data, documents: those in which something is hidden, by split; `test` are those to measure by.
        tokenizer: of the documents; None for a task of symbols.

    Raises:
        DataError: the model, the documents or the tokenizer do not do for this task.
    """
    window = reader.segment_length + reader.model.short_term_length
    if isinstance(task, SortingConfig):
        return SortingQuestions(task), Sorting(task, reader, window)
    source: RetrievalSource
    if isinstance(task, AssociativeRecallConfig):
        source = AssociativeRecall(task)
    else:
        assert tokenizer is not None
        if isinstance(task, PasskeyConfig):
            source = Passkey(task, documents, tokenizer, data.beginning_of_document)
        else:
            assert isinstance(task, NeedleConfig)
            source = NeedleInABook(task, documents, tokenizer, data.beginning_of_document)
    return source, Retrieval(task, source, reader, window, controls, tokenizer)


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration in a run's folder, as nested dictionaries."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))


def _where_to_start(config: RunConfig, folder: Path) -> Path | None:
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
    now = _flatten(_as_dictionary(config))
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


def _share(config: RunConfig, accelerator: Accelerator) -> range:
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
    return share_of_lanes(accelerator, lanes)


def _load_tokenizer(config: RunConfig, accelerator: Accelerator) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the documents; None for a task without text."""
    if config.task.vocabulary_size is not None:
        return None
    if config.model.tokenizer == "words":
        return word_tokenizer(config.data, accelerator.main_process_first())
    option = "model.pretrained" if config.model.tokenizer is None else "model.tokenizer"
    return load_tokenizer(config.model.tokenizer or str(config.model.pretrained), option)


def _build_task(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: MemoryModel,
    accelerator: Accelerator,
    share: range,
    after_segment: Callable[[], None],
) -> Task:
    """What the model is to learn; every process reads its share of the lanes."""
    training, evaluation = config.training, config.evaluation
    reader = make_reader(
        accelerator,
        model,
        training.segment_length,
        training.precision,
        evaluation.batch_size,
        after_segment=after_segment,
    )
    documents: dict[str, TokenizedDocuments] = {}
    if tokenizer is not None:
        documents = {
            split: _tokenize(config, split, tokenizer, model, accelerator)
            for split in ("train", "validation", "test")
            if split == "train" or getattr(config.data, split) is not None
        }
    if not config.task.is_language_modelling:
        source, examination = ask(config.task, reader, evaluation.controls, config.data, documents, tokenizer)
        stream = QuestionStream(source, training.batch_size, training.segment_length, config.seed, share)
        return QuestionAnswering(stream, examination, tokenizer)
    assert tokenizer is not None
    lanes = Lanes(
        documents["train"],
        training.batch_size,
        training.segment_length,
        config.seed,
        shuffle=config.data.shuffle,
        segments_per_visit=config.data.segments_per_visit,
        share=share,
    )
    return LanguageModelling(
        tokenizer,
        documents,
        lanes,
        reader,
        bptt_segments=training.bptt_segments,
        before=evaluation.before,
        controls=evaluation.controls,
        inspected_segments=evaluation.inspected_segments,
        max_validation_tokens=evaluation.max_validation_tokens,
    )


def _tokenize(
    config: RunConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    model: MemoryModel,
    accelerator: Accelerator,
) -> TokenizedDocuments:
    documents = tokenize_documents(config.data, split, tokenizer, accelerator.main_process_first())
    documents.check_vocabulary(model.vocabulary_size)
    return documents


def _measure_best(state: TrainingState, folder: Path) -> dict[str, Any]:
    """The final figures, of the checkpoint with the lowest validation loss; empty if the task measures none."""
    best = best_checkpoint(folder / "checkpoints")
    if best is not None and state.best_step != state.step:
        state.shards.put_weights(model_tensors(best, state.model))
    results = state.task.measure(str(best or folder / "checkpoints" / f"step-{state.step:08d}"))
    return {**results, "before": state.results_before or None} if results else {}


def _open_record(config: RunConfig, folder: Path, step: int) -> None:
    """Write down what is run, by which versions; forget what a run that was stopped did after this step.

    Raises:
        RunError: the folder cannot be written.
    """
    packages = ("infformer", "torch", "transformers", "accelerate", "datasets", "hydra-core")
    versions = {"python": platform.python_version(), "git_revision": _git_revision()}
    versions |= {package: _version(package) for package in packages}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        (folder / "versions.json").write_text(json.dumps(versions, indent=1))
        remove_unfinished(folder / "checkpoints")
        MetricsLog(folder / "metrics.jsonl").truncate_after(step)
        MetricsLog(folder / "samples.jsonl").truncate_after(step)
    except OSError as error:
        raise RunError(
            f"output_dir={folder}: nothing can be written there ({error}); make room or get access, or set output_dir= "
            "to another place"
        ) from error


def _as_dictionary(config: RunConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def _flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    flat: dict[str, Any] = {}  # a group without options says nothing
    for name, value in nested.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


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
