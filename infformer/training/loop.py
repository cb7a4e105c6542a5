"""The training loop: read, step, measure, save."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from infformer.config import RunConfig
from infformer.data.lanes import Segment
from infformer.errors import UserError
from infformer.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    DivergedError,
    TrainingState,
    newest_checkpoint,
)
from infformer.training.metrics import MetricsLog, StepMetrics, summarise
from infformer.training.optimization import learning_rates
from infformer.training.prefetch import Prefetch
from infformer.training.runtime import Accelerator, decided_by_main
from infformer.training.signals import StopRequested, StopSignals
from infformer.training.step import Microbatch, NonFiniteError, draw_noise, dropout_seed, train_step
from infformer.training.tracking import Tracker
from infformer.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

EXIT_CODE = 99
"""Of a run that was asked to stop and can be gone on with: what batch systems take for "put me in the queue again"."""


class TrainingStopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop, and can be gone on with.

    Args:
        number: the signal that asked.
        step: after which; its checkpoint holds everything.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} after step {step}; resume=auto goes on from there")
        self.number = number


class TrainingFailedError(UserError, RuntimeError):
    """The run cannot go on; the message says why, and what is left."""


@dataclass
class Loop:
    """One run's training.

    `state` is all that changes; everything else stays what it is.
    """

    config: RunConfig
    accelerator: Accelerator
    prepared: nn.Module
    """The model as the engine wraps it; `state.model` is the model itself."""
    optimizer: Optimizer
    """As the engine wraps it."""
    state: TrainingState
    rank_rows: range
    """The lanes of this process."""
    folder: Path
    """The run's."""
    tracker: Tracker
    prefetch: Prefetch
    writer: CheckpointWriter
    signals: StopSignals
    watchdog: Watchdog

    def run(self) -> None:
        """Train until `training.max_steps`; the last step is always measured and saved.

        Raises:
            TrainingStopped: a signal came; a checkpoint was written.
            TrainingFailedError: a loss or a weight that is not finite, or a last checkpoint that could not be written.
        """
        training, state = self.config.training, self.state
        with self._progress_bar() as bar:
            while state.step < training.max_steps or not state.measured:
                if state.measured:
                    state.unreported.append(self._timed_step())
                    bar.update()
                    if state.step == training.max_steps or _due(state.step, training.log_every):
                        self._report(bar)
                last, state.measured = state.step == training.max_steps, False
                with suppress(StopRequested):
                    self._tell("measures")
                    if last or _due(state.step, training.evaluate_every):
                        self._validate()
                    state.measured = True
                    if _due(state.step, training.sample_every):
                        self._sample()
                stop = self.signals.agreed()
                self._tell("saves")
                if last or stop or _due(state.step, training.checkpoint_every) or state.best_step == state.step:
                    self._save(must_succeed=last or stop is not None)
                else:
                    self._finish(wait=False)
                if stop:
                    raise TrainingStopped(stop, state.step)

    def _timed_step(self) -> StepMetrics:
        start = time.perf_counter()
        training, state = self.config.training, self.state
        self.prepared.train()
        self._tell("reads its next segments")
        segments, state.position = self.prefetch.take()
        microbatches = [self._microbatch(segments, number) for number in range(training.gradient_accumulation)]
        self._tell("computes")
        try:
            state.memories, result = train_step(
                self.accelerator, self.prepared, self.optimizer, microbatches, training.gradient_clipping
            )
        except NonFiniteError as error:
            self._finish(wait=True)  # what was good is kept, and what was not is told
            raise TrainingFailedError(self._explain(error, segments)) from error
        rates = learning_rates(state.schedule.optimizer)
        state.schedule.step()
        state.step += 1
        state.tokens += result.read_tokens
        return StepMetrics(**asdict(result), seconds=time.perf_counter() - start, learning_rates=rates)

    def _microbatch(self, segments: Sequence[Segment], number: int) -> Microbatch:
        rows = len(self.rank_rows) // self.config.training.gradient_accumulation
        own = [
            segment.rows(slice(number * rows, (number + 1) * rows)).to(self.accelerator.device, non_blocking=True)
            for segment in segments
        ]
        seed = dropout_seed(self.config.seed, self.state.step, self.rank_rows[number * rows])
        return Microbatch(own, self.state.memories[number], [self._noise(segment) for segment in own], seed)

    def _noise(self, segment: Segment) -> Tensor | None:
        samples = self.state.model.noise_size
        return draw_noise(segment, samples, self.config.seed) if samples else None

    def _tell(self, what: str) -> None:
        self.watchdog.tell(f"{what} (step {self.state.step})")

    def _report(self, bar: tqdm[None]) -> None:
        steps, self.state.unreported = self.state.unreported, []
        if not self.accelerator.is_main_process:
            return
        metrics = summarise(steps)
        self._record(metrics)
        line = f"loss {metrics['train/loss']:.4f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(line)
        if bar.disable:
            logger.info("step %d/%d  %s", self.state.step, self.config.training.max_steps, line)

    def _validate(self) -> None:
        validation = self.state.task.validate()
        if validation is None:
            return
        if not math.isfinite(validation.loss):
            logger.warning("step %d: the validation loss is %s: never the best", self.state.step, validation.loss)
        elif self.state.best_loss is None or validation.loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step = validation.loss, self.state.step
        if self.accelerator.is_main_process:
            self._record(validation.metrics)
            logger.info("step %d  %s", self.state.step, validation.text)

    def _sample(self) -> None:
        # On all processes: where the weights are cut up, they put each other's layers together.
        text = self.state.task.sample(self.state.step, self.config.training.sample_tokens)
        if text is None or not self.accelerator.is_main_process:
            return
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.state.step, "text": text}, ensure_ascii=False) + "\n")
        self.tracker.log_text("sample", text, self.state.step)

    def _record(self, metrics: dict[str, float]) -> None:
        MetricsLog(self.folder / "metrics.jsonl").write(self.state.step, self.state.tokens, **metrics)
        self.tracker.log({"tokens": self.state.tokens, **metrics}, self.state.step)

    def _save(self, must_succeed: bool) -> None:
        """Begin to save; to the end, if the training ends here. Later on, a failure is only a warning: the next one may
        succeed.
        """
        self._finish(wait=True, must_succeed=False)  # the one before
        self.writer.begin(self.state, self.rank_rows)
        self._finish(wait=must_succeed, must_succeed=must_succeed)

    def _finish(self, wait: bool, must_succeed: bool = False) -> None:
        try:
            self.writer.finish(wait)
        except DivergedError as error:
            raise TrainingFailedError(f"{error} {self._what_is_left()}") from error
        except CheckpointError as error:
            if must_succeed:
                raise TrainingFailedError(str(error)) from error
            logger.error("%s The run goes on.", error)

    def _explain(self, error: NonFiniteError, segments: Sequence[Segment]) -> str:
        lanes = [lane for segment in segments for lane in self.state.task.locate(segment)]
        return (
            f"step {self.state.step + 1}: {error}. This process was reading {'; '.join(lanes)}. {self._what_is_left()}"
        )

    def _what_is_left(self) -> str:
        newest = decided_by_main(self.accelerator, lambda: newest_checkpoint(self.folder / "checkpoints"))
        return (
            f"The last good checkpoint is {newest or 'none yet'}. A lower optimizer.learning_rate or "
            "memory_learning_rate, more schedule.warmup_steps, or training.precision=float32 may help."
        )

    def _progress_bar(self) -> tqdm[None]:
        return tqdm(
            total=self.config.training.max_steps,
            initial=self.state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
