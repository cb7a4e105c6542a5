"""A whole run: from its configuration to its table of results."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from infformer.config import EngineConfig, GrowthConfig, RunConfig
from infformer.data.segments import Segment
from infformer.errors import UserError
from infformer.evaluation.report import write_results
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.expansion import expansions, size_of
from infformer.models.sizes import describe_sizes, flops_of_a_token, model_sizes, process_bytes
from infformer.models.streaming import reading, stream
from infformer.plots.memory import plot_inspection
from infformer.plots.page import write_page
from infformer.plots.run import plot_run
from infformer.progress import Pace
from infformer.training.before import check_run
from infformer.training.building import build_material, build_model, build_tokenizer
from infformer.training.card import write_cards
from infformer.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    DivergedError,
    Progress,
    TrainingState,
    best_checkpoint,
    load_checkpoint,
    load_weights,
    model_tensors,
    newest_checkpoint,
    step_of,
)
from infformer.training.folder import RunError, held, open_record
from infformer.training.forecast import (
    Forecast,
    checkpoints_to_keep,
    format_forecast,
    nowhere,
    peak_of,
    tokens_to_measure,
)
from infformer.training.growing import check_engine, grown
from infformer.training.metrics import DeviceMeter, MetricsLog, StepMetrics, matmul_flops, summarise
from infformer.training.optimization import learning_rates, make_optimizer, make_schedule
from infformer.training.recording import EAGER_PASSES, Recorder, check_recording
from infformer.training.resuming import find_checkpoint, forget_figures_of_other_texts
from infformer.training.runtime import (
    Accelerator,
    all_reduce_max,
    decided_by_main,
    init_distributed,
    is_compiled,
    is_zero,
    prepare,
    release,
    resolve_engine,
    rows_of_rank,
    shard,
    use_tf32,
)
from infformer.training.shards import Shards, TorchShards, ZeroShards
from infformer.training.step import (
    Microbatch,
    NonFiniteError,
    StepMeasurement,
    draw_noise,
    draw_without_memory,
    dropout_seed,
    make_pass,
    read_steps,
    train_step,
)
from infformer.training.supervision import StopRequested, StopSignals, Watchdog
from infformer.training.tracking import Tracker, open_tracker

logger = logging.getLogger(__name__)

EXIT_CODE = 99
"""The exit code of a run that was asked to stop and can go on: for batch systems, "put me in the queue again"."""


class TrainingStopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop, and can be gone on with.

    Args:
        step: after which; its checkpoint holds everything.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} after step {step}; resume=auto goes on from there")
        self.number = number


class TrainingFailedError(UserError, RuntimeError):
    """The run cannot go on; the message says why, and what is left."""


def train(config: RunConfig) -> Mapping[str, object] | None:
    """Train, measure on the test documents, and write everything to the run's folder.

    Returns:
        What `results.json` holds; None without test documents.

    Raises:
        TrainingStopped: a signal came; a checkpoint was written.
        TrainingFailedError: a loss or a weight that is not finite, or a last checkpoint that could not be written.
        UserError: the run cannot start as asked.
    """
    disable_progress_bar()
    training, engine = config.training, resolve_engine(config.engine)
    accelerator = init_distributed(
        engine, training.precision, training.gradient_accumulation, training.gradient_clipping
    )
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    check_engine(config.growth, engine)
    logger.info("%d process(es), engine %s, on %s", accelerator.num_processes, engine.name, accelerator.device.type)
    if use_tf32(accelerator, training.tf32):
        logger.info("operands of float32 products are rounded to TF32 in training: training.tf32=true")
    folder, microbatches = Path(config.output_dir), accelerator.num_processes * training.gradient_accumulation
    if training.batch_size % microbatches:
        raise RunError(
            f"training.batch_size={training.batch_size} cannot be divided among {accelerator.num_processes} processes "
            f"with training.gradient_accumulation={training.gradient_accumulation}: take a multiple of {microbatches}"
        )
    if config.dry_run:
        with nowhere(config, accelerator) as run:
            check_run(config, accelerator.num_processes, accelerator.is_main_process)
            begin = decided_by_main(accelerator, lambda: find_checkpoint(run, Path(run.output_dir)))
            forecast = Trainer(run, engine, accelerator, begin).forecast()
        if accelerator.is_main_process:
            print(format_forecast(forecast), flush=True)
        return None
    with held(accelerator, folder, lambda: find_checkpoint(config, folder)) as checkpoint:
        if all_reduce_max(accelerator, int(checkpoint is not None and not checkpoint.is_dir())):
            raise RunError(f"output_dir={folder}: not all machines see {checkpoint}; give them a folder that all share")
        check_run(config, accelerator.num_processes, accelerator.is_main_process)
        return Trainer(config, engine, accelerator, checkpoint).run()


class _Read(NamedTuple):
    """What this process's lanes read next, and what is drawn for it."""

    segment: Segment
    noise: Tensor | None
    without_memory: Tensor | None

    def map(self, function: Callable[[Any], Any]) -> _Read:
        drawn = (None if part is None else function(part) for part in self[1:])
        return _Read(function(self.segment), *drawn)

    def rows(self, lanes: slice) -> _Read:
        return _Read(self.segment.rows(lanes), *(None if part is None else part[lanes] for part in self[1:]))


@dataclass
class _TakenStep:
    """A step that the device was told to make, and may be making still."""

    measured: StepMeasurement
    seconds: float
    """Until it was told; of the last of several steps, until all were made."""
    learning_rates: dict[str, float]
    segments: Sequence[Segment]
    """What was read."""


class Trainer:
    """One run on one process, built, trained and measured.

    Args:
        engine: resolved, that of the accelerator.
        checkpoint: to go on from; None to begin.
    """

    def __init__(
        self, config: RunConfig, engine: EngineConfig, accelerator: Accelerator, checkpoint: Path | None
    ) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, Path(config.output_dir)
        self._engine = engine
        self.signals = StopSignals(partial(all_reduce_max, accelerator), shows=accelerator.is_main_process)
        self.watchdog = Watchdog(accelerator.process_index, accelerator.num_processes, engine.patience)
        self.rank_rows = rows_of_rank(accelerator, config.training.batch_size)
        set_seed(config.seed)  # the new weights are the same on all processes
        tokenizer = build_tokenizer(config, accelerator)
        examples = config.task.read_examples(config.data, tokenizer, accelerator.main_process_first())
        self._build_model = partial(build_model, config, tokenizer, examples)
        model = self._build_model(0 if checkpoint is None else step_of(checkpoint))
        if checkpoint is not None:
            load_weights(checkpoint, model)
        self.material = build_material(
            config, tokenizer, model, accelerator, self.rank_rows, self._after_segment, examples
        )
        self.evaluation = config.task.build_evaluation(self.material)
        self.stream = config.task.build_stream(self.material)
        shards, schedule = self._take_over(model)
        memory: ModelState = model.initial_state(len(self.rank_rows)).to(accelerator.device)
        memories = memory.split(config.training.gradient_accumulation)
        progress = Progress(task=self.stream.state_dict())
        self.state = TrainingState(model, tokenizer, shards, schedule, memories, progress)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.state, accelerator, self.rank_rows)
            progress = self.state.progress
            self.stream.load_state_dict(progress.task)
            logger.info("going on from %s: step %d, %s tokens", checkpoint, progress.step, f"{progress.tokens:,}")
        self.progress = progress
        for forgotten in forget_figures_of_other_texts(config, self.material.fingerprints, progress):
            if accelerator.is_main_process:
                logger.warning(forgotten)
        size = self.sizes["weight_bytes"] + self.sizes["optimizer_bytes"]
        decided_by_main(accelerator, lambda: open_record(config, self.folder, progress.step, progress.best_step, size))
        self._metrics, self._samples = (MetricsLog(self.folder / f"{name}.jsonl") for name in ("metrics", "samples"))
        self.tracker = Tracker()
        if accelerator.is_main_process:
            logger.info("%s: %s", config.name, self.stream.describe())
            self._log_sizes()
            self.tracker = open_tracker(config.tracker, config.name, self.folder, asdict(config), progress.step)
        self.writer = CheckpointWriter(self.folder / "checkpoints", accelerator, config.training.keep_checkpoints)
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._prefetched: Future[tuple[list[_Read], Mapping[str, object]]] | None = None
        self._taken: list[_TakenStep] = []
        self._meter: DeviceMeter | None = None
        if accelerator.device.type == "cuda" and accelerator.is_main_process:
            peak = matmul_flops(accelerator.device, getattr(torch, config.training.precision))
            self._meter = DeviceMeter(accelerator.device, self._of_a_token, accelerator.num_processes * peak)

    def _take_over(self, model: MemoryModel, step: int = 0) -> tuple[Shards, LRScheduler]:
        """Let the engine have a model, with an optimiser of its own, after so many steps."""
        config, engine, accelerator = self.config, self._engine, self.accelerator
        self.sizes = model_sizes(model)
        self._of_a_token = flops_of_a_token(model, config.training.segment_length)
        shard(engine, accelerator, model)
        by_layer = (config.schedule.unfreeze_every, config.schedule.unfreeze_layers) != (None, None)
        optimizer = make_optimizer(model, config.optimizer, by_layer)
        schedule = make_schedule(optimizer, config.schedule, config.training.max_steps, step)
        if is_compiled(config.training.compile, engine, accelerator):
            logger.info("the layers are compiled in the next step (training.compile=false: they are not)")
            model.compile_layers()
        self.prepared, self.optimizer = prepare(accelerator, model, optimizer)
        self._recorder = None
        if config.training.compile == "graphs":
            check_recording(accelerator, self.prepared, self.optimizer, config.training.gradient_checkpointing)
            self._recorder = Recorder(self.prepared, make_pass(accelerator, self.prepared))
        if is_zero(accelerator):
            return ZeroShards(model, self.prepared.optimizer), schedule
        return TorchShards(model, optimizer), schedule

    def _log_sizes(self) -> None:
        for line in describe_sizes(self.sizes, self.config.training.batch_size):
            logger.info(line)

    def _measure_by(self, model: MemoryModel) -> None:
        """Measure this model from now on, in the place of one of other sizes."""
        self.material = replace(self.material, evaluator=replace(self.material.evaluator, model=model))
        self.evaluation = self.config.task.build_evaluation(self.material)
        self.state.model = model

    def run(self) -> Mapping[str, object] | None:
        """Train to the last step and measure; the figures of the test documents, if there are any."""
        with self.signals, self.watchdog:  # to the last: who asks for an end may ask again
            try:
                if self.progress.step == 0:
                    self.progress.results_before = self.evaluation.measure_before()
                self.train()
                return self._finish_run()
            except StopRequested as stop:
                raise TrainingStopped(stop.number, self.progress.step) from stop
            finally:
                self.tracker.finish()

    def forecast(self) -> Forecast:
        """Make three steps, of which the first only warms up, and see what they take; and again whenever it grows."""
        config, device = self.config, self.accelerator.device

        def step() -> None:
            self._taken.append(self._timed_step())
            self._collect()

        def two_steps() -> None:
            step()
            step()

        with self.watchdog:
            done, on_cuda, last = self.progress.step, device.type == "cuda", config.training.max_steps
            growths = [growth for growth in config.growth if growth.step > done]
            begin, training_seconds = done, 0.0
            for growth in (*growths, None):
                for _ in range(EAGER_PASSES if self._recorder is not None else 0):  # before a pass is recorded
                    step()
                if on_cuda:
                    step()
                    peak = peak_of(two_steps, self.state.schedule.optimizer, device)
                else:  # where it slows a step down that its memory is watched
                    peak = peak_of(step, self.state.schedule.optimizer, device)
                    two_steps()
                timed = self.progress.unreported[-2:]
                end = last if growth is None else growth.step
                training_seconds += (end - begin) * fmean(step.seconds for step in timed)
                begin = end
                if growth is not None:
                    self._grow(growth)
            tokens = tokens_to_measure(config, self.material.documents, self.state.model.has_memory, done)
            return Forecast(
                sizes=self.sizes,
                growths=len(growths),
                lanes=len(self.rank_rows),
                processes=self.accelerator.num_processes,
                peak_bytes=peak,
                process_bytes=process_bytes(device),
                on_cuda=on_cuda,
                steps=last - done,
                training_seconds=training_seconds,
                tokens_per_second=summarise(timed)["train/tokens_per_second"],
                measuring_seconds=None if tokens is None else tokens * self._seconds_to_read(),
                checkpoints=checkpoints_to_keep(config, self.material.documents, done),
            )

    def _seconds_to_read(self) -> float:
        """How long all processes together take for a token of held-out documents, by those that come next here."""
        model, training = self.state.model, self.config.training
        assert self._prefetched is not None
        documents = max((len(found) for split, found in self.material.documents.items() if split != "train"), default=1)
        rows = slice(0, min(self.config.evaluation.batch_size, documents))
        segments = [segment.rows(rows) for segment in self._microbatch(self._prefetched.result()[0], 0).segments]
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            with reading(model, getattr(torch, training.precision)):
                losses = [output.token_losses.sum() for _, output in stream(model, segments)]
            float(sum(losses))  # the device has read
            seconds.append(time.perf_counter() - start)
        read = sum(int(segment.lengths.sum()) for segment in segments)
        return median(seconds[1:]) / (read * self.accelerator.num_processes)

    def train(self) -> None:
        """Train until `training.max_steps`; the last step is always measured and saved."""
        training, progress = self.config.training, self.progress
        with Pace("training", training.max_steps, "steps", self.accelerator.is_main_process, progress.step) as bar:
            while progress.step < training.max_steps or not progress.measured:
                if progress.measured:
                    self._taken.append(self._timed_step())
                    bar.advance()
                    if progress.step == training.max_steps or _due(progress.step, training.log_every):
                        self._report(bar)
                    for growth in self.config.growth:
                        if growth.step == progress.step:
                            self._grow(growth)
                last, progress.measured = progress.step == training.max_steps, False
                with suppress(StopRequested):
                    self._tell("measures")
                    if last or _due(progress.step, training.evaluate_every):
                        self._validate()
                    progress.measured = True
                    if _due(progress.step, training.sample_every):
                        self._sample()
                stop = self.signals.agreed()
                self._tell("saves")
                due = _due(progress.step, training.checkpoint_every) or progress.best_step == progress.step
                if last or stop or due:
                    self._save(must_succeed=last or stop is not None)
                else:
                    self._finish_save(wait=False)
                if stop:
                    raise TrainingStopped(stop, progress.step)

    def _timed_step(self) -> _TakenStep:
        start = time.perf_counter()
        training, state, progress = self.config.training, self.state, self.progress
        self.prepared.train()
        self._tell("reads its next segments")
        read, progress.task = (self._prefetched or self._prefetcher.submit(self._prefetch)).result()
        self._prefetched = self._prefetcher.submit(self._prefetch)  # made ready while the model computes
        microbatches = [self._microbatch(read, number) for number in range(training.gradient_accumulation)]
        self._tell("computes")
        segments = [own.segment for own in read]
        try:
            state.memories, measured = train_step(
                self.accelerator,
                self.prepared,
                self.optimizer,
                microbatches,
                training.gradient_clipping,
                self._recorder,
            )
        except NonFiniteError as error:
            self._collect()
            raise self._failure(error, progress.step + 1, segments) from error
        rates = learning_rates(state.schedule.optimizer)
        state.schedule.step()
        progress.step += 1
        return _TakenStep(measured, time.perf_counter() - start, rates, segments)

    def _collect(self) -> None:
        """Read what was measured since the last time; the only place in which training waits for its device."""
        taken, self._taken = self._taken, []
        if not taken:
            return
        start, progress = time.perf_counter(), self.progress
        try:
            results = read_steps([step.measured for step in taken])
        except NonFiniteError as error:
            number = progress.step - len(taken) + error.index + 1
            raise self._failure(error, number, taken[error.index].segments) from error
        taken[-1].seconds += time.perf_counter() - start
        for step, result in zip(taken, results, strict=True):
            progress.tokens += result.read_tokens
            progress.unreported.append(
                StepMetrics(**asdict(result), seconds=step.seconds, learning_rates=step.learning_rates)
            )

    def _failure(self, error: NonFiniteError, step: int, segments: Sequence[Segment]) -> TrainingFailedError:
        self._finish_save(wait=True)  # what was good is kept, and what was not is told
        lanes = "; ".join(lane for segment in segments for lane in self.stream.locate(segment))
        return TrainingFailedError(f"step {step}: {error}. This process was reading {lanes}. {self._what_is_left()}")

    def _grow(self, growth: GrowthConfig) -> None:
        """Put a larger model that computes the same in the place of this one, with its moments and what it remembers.

        It belongs to the step that was just made: a checkpoint of it has the larger model.
        """
        self._tell("grows")
        self._collect()
        self._finish_save(wait=True)  # what is written asks the model how
        state, before = self.state, self.sizes
        smaller, moments = state.model, dict(state.shards.moments())
        for expansion in expansions(smaller.config, **growth.sizes):
            moments = expansion.moments(moments)
            state.memories = [expansion.state(memory) for memory in state.memories]
        release(self.accelerator)
        self._measure_by(grown(smaller, growth, self.config))
        state.shards, state.schedule = self._take_over(state.model, self.progress.step)
        state.shards.put_moments(moments)
        if self._meter is not None:
            self._meter = replace(self._meter, flops_of_a_token=self._of_a_token)
        if not self.accelerator.is_main_process:
            return
        parameters = [sizes["backbone_parameters"] + sizes["memory_parameters"] for sizes in (before, self.sizes)]
        logger.info(
            "after step %d the model grows: %s; %s parameters",
            self.progress.step,
            ", ".join(f"{name} {size_of(smaller.config, name):,} → {new:,}" for name, new in growth.sizes.items()),
            f"{parameters[0]:,} → {parameters[1]:,}",
        )
        self._log_sizes()
        self._record({f"growth/{name}": size for name, size in {"parameters": parameters[1], **growth.sizes}.items()})

    def _prefetch(self) -> tuple[list[_Read], Mapping[str, object]]:
        """What the next step reads, where a GPU can fetch it while it computes, and the stream's state after it."""
        seed, samples, share = self.config.seed, self.state.model.noise_size, self.config.training.memory_dropout
        read = [
            _Read(
                segment,
                draw_noise(segment, samples, seed) if samples else None,
                draw_without_memory(segment, share, seed) if share else None,
            )
            for segment in self.stream.next_step()
        ]
        on_gpu = self.accelerator.device.type == "cuda"
        return [own.map(lambda part: part.pin_memory()) for own in read] if on_gpu else read, self.stream.state_dict()

    def _microbatch(self, read: Sequence[_Read], number: int) -> Microbatch:
        rows = len(self.rank_rows) // self.config.training.gradient_accumulation
        lanes = slice(number * rows, (number + 1) * rows)
        own = [one.rows(lanes).map(lambda part: part.to(self.accelerator.device, non_blocking=True)) for one in read]
        dropout = dropout_seed(self.config.seed, self.progress.step, self.rank_rows[number * rows])
        return Microbatch(
            [one.segment for one in own],
            self.state.memories[number],
            [one.noise for one in own],
            [one.without_memory for one in own],
            dropout,
        )

    def _report(self, bar: Pace) -> None:
        self._collect()
        steps, self.progress.unreported = self.progress.unreported, []
        if not self.accelerator.is_main_process:
            return
        metrics = summarise(steps)
        if self._meter is not None:
            metrics |= self._meter.line(metrics["train/tokens_per_second"])
        self._record(metrics)
        line = f"loss {metrics['train/loss']:.4f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"
        bar.remark(line)
        if not bar.on_terminal:
            logger.info("step %d/%d  %s", self.progress.step, self.config.training.max_steps, line)

    def _validate(self) -> None:
        self._collect()
        validation, progress = self.evaluation.validate(), self.progress
        if validation is None:
            return
        if not math.isfinite(validation.loss):
            logger.warning("step %d: the validation loss is %s: never the best", progress.step, validation.loss)
        elif progress.best_loss is None or validation.loss < progress.best_loss:
            progress.best_loss, progress.best_step = validation.loss, progress.step
        if self.accelerator.is_main_process:
            self._record(validation.metrics)
            logger.info("step %d  %s", progress.step, validation.text)

    def _sample(self) -> None:
        # On all processes: where the weights are cut up, they put each other's layers together.
        step = self.progress.step
        text = self.evaluation.sample(step, self.config.training.sample_tokens)
        if text is None or not self.accelerator.is_main_process:
            return
        self._samples.append({"step": step, "text": text})
        self.tracker.log_text("sample", text, step)
        logger.info("step %d  sample: %s", step, text)

    def _record(self, metrics: dict[str, float]) -> None:
        self._metrics.write(self.progress.step, self.progress.tokens, **metrics)
        self.tracker.log({"tokens": self.progress.tokens, **metrics}, self.progress.step)

    def _save(self, must_succeed: bool) -> None:
        """Begin to save a checkpoint, and wait for it if it must succeed, because the training ends here.

        Any other failure is only a warning: the next checkpoint may succeed.
        """
        self._collect()
        self._finish_save(wait=True, must_succeed=False)  # the one before
        self.writer.begin(self.state, self.rank_rows)
        self._finish_save(wait=must_succeed, must_succeed=must_succeed)

    def _finish_save(self, wait: bool, must_succeed: bool = False) -> None:
        try:
            self.writer.finish(wait)
        except DivergedError as error:
            raise TrainingFailedError(f"{error} {self._what_is_left()}") from error
        except CheckpointError as error:
            if must_succeed:
                raise TrainingFailedError(str(error)) from error
            logger.error("%s The run goes on.", error)

    def _what_is_left(self) -> str:
        newest = decided_by_main(self.accelerator, lambda: newest_checkpoint(self.folder / "checkpoints"))
        return (
            f"The last good checkpoint is {newest or 'none yet'}. A lower optimizer.learning_rate or "
            "memory_learning_rate, more schedule.warmup_steps, or training.precision=float32 may help."
        )

    def _finish_run(self) -> Mapping[str, object] | None:
        """Measure the best weights, and draw; the figures, None if the task measures none."""
        measured, results = self._measure_best()
        figures: list[Path] = []
        if self.accelerator.is_main_process:  # before the inspection: whatever becomes of that, the results are there
            if results is not None:
                figures += self.evaluation.report(results, self.folder)
                self.tracker.summarise(self.evaluation.headline(results), self.progress.step)
            figures += plot_run(self.folder)
            table = "" if results is None else self.evaluation.table(results)
            write_cards(self.state.model, self.config, self.progress.step, self.progress.tokens, measured, table)
        self._tell("inspects")
        inspection = self.evaluation.inspect()
        if self.accelerator.is_main_process:
            if inspection is not None:
                write_results(self.folder / "inspection" / "inspection.json", inspection)
                drawn = plot_inspection(self.folder / "inspection" / "inspection.json")
                write_page(self.folder / "inspection" / "inspection.json", drawn)
                figures += drawn
            for figure in figures:
                self.tracker.log_figure(figure.stem, figure, self.progress.step)
            print(self._where_everything_lies(), flush=True)
        return results

    def _where_everything_lies(self) -> str:
        lies = {
            "results.json": "the figures",
            "plots": "what they look like",
            "inspection/index.html": "what the memory holds",
            "checkpoints/best": "the best weights",
            "metrics.jsonl": "all that was measured on the way",
        }
        there = [f"  {name}: {what}" for name, what in lies.items() if (self.folder / name).exists()]
        return "\n".join([f"everything lies in {self.folder}", *there])

    def _measure_best(self) -> tuple[Path, Mapping[str, object] | None]:
        """The checkpoint with the lowest validation loss, and its final figures."""
        root, progress = self.folder / "checkpoints", self.progress
        best = decided_by_main(self.accelerator, lambda: best_checkpoint(root))
        if best is None and progress.best_step not in (None, progress.step) and self.accelerator.is_main_process:
            logger.warning(
                "the best checkpoint, of step %d, is not in %s: the last weights are measured",
                progress.best_step, self.folder,
            )  # fmt: skip
        if best is not None and progress.best_step != progress.step:
            if any(step_of(best) < growth.step <= progress.step for growth in self.config.growth):
                self._measure_by(self._build_model(step_of(best)).to(self.accelerator.device))
                self.sizes = model_sizes(self.state.model)
                load_weights(best, self.state.model)
            else:
                self.state.shards.put_weights(model_tensors(best, self.state.model))
        measured = best or root / f"step-{progress.step:08d}"
        results = self.evaluation.measure(str(measured))
        if results is None:
            return measured, None
        return measured, {**results, "sizes": self.sizes, "before": progress.results_before or None}

    def _tell(self, what: str) -> None:
        self.watchdog.tell(f"{what} (step {self.progress.step})")

    def _after_segment(self) -> None:
        self.watchdog.tell("measures")
        self.signals.raise_if_agreed()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
