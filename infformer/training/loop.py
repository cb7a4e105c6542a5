"""The training loop: read, step, measure, save."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infformer.config import RunConfig
from infformer.data.lanes import Segment
from infformer.errors import UserError
from infformer.training.checkpoint import (
    CheckpointError,
    TrainingState,
    newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from infformer.training.metrics import MetricsLog
from infformer.training.optimization import learning_rates
from infformer.training.runtime import Accelerator
from infformer.training.signals import StopRequested, StopSignals
from infformer.training.step import NonFiniteError, StepResult, draw_sticky_offsets, train_step
from infformer.training.tracking import Tracker

logger = logging.getLogger(__name__)


class TrainingStopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop, and can be gone on with.

    Args:
        number: the signal that asked.
        checkpoint: from where.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {number}; {checkpoint} holds everything, resume=auto goes on from it")
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
    state: TrainingState
    share: range
    """The lanes of this process."""
    folder: Path
    """The run's."""
    tracker: Tracker

    def run(self) -> None:
        """Train until `training.max_steps`; the last step is always measured and saved.

        Raises:
            TrainingStopped: a signal came; a checkpoint was written.
            TrainingFailedError: a loss that is not finite, or a last checkpoint that could not be written.
        """
        training, state = self.config.training, self.state
        with StopSignals() as signals, self._progress_bar() as bar:
            window = _Window()
            while state.step < training.max_steps or not state.measured:
                if state.measured:
                    window.add(*self._timed_step())
                    bar.update()
                    if state.step == training.max_steps or _due(state.step, training.log_every):
                        self._report(window, bar)
                        window = _Window()
                last, state.measured = state.step == training.max_steps, False
                # Several processes have to leave an evaluation together, so they finish it.
                with suppress(StopRequested), signals.interruptible(self.accelerator.num_processes == 1):
                    if last or _due(state.step, training.evaluate_every):
                        self._validate()
                    state.measured = True
                    if _due(state.step, training.sample_every):
                        self._sample()
                stop = self._agreed_signal(signals)
                if last or stop or _due(state.step, training.checkpoint_every) or state.best_step == state.step:
                    saved = self._save(must_succeed=last or stop is not None)
                if stop:
                    raise TrainingStopped(stop, saved)

    def _timed_step(self) -> tuple[StepResult, dict[str, float], float]:
        start = time.perf_counter()
        training, state = self.config.training, self.state
        self.prepared.train()
        segments = state.task.next_step()
        rows = len(self.share) // training.gradient_accumulation
        device = self.accelerator.device
        parts = [
            [segment.rows(slice(first, first + rows)).to(device, non_blocking=True) for segment in segments]
            for first in range(0, len(self.share), rows)
        ]
        try:
            state.memories, result = train_step(
                self.accelerator,
                self.prepared,
                state.optimizer,
                parts,
                state.memories,
                training.gradient_clipping,
                [[self._sticky_offsets(segment) for segment in part] for part in parts],
            )
        except NonFiniteError as error:
            raise TrainingFailedError(self._explain(error, segments)) from error
        rates = learning_rates(state.optimizer)
        state.schedule.step()
        state.step += 1
        state.tokens += result.read_tokens
        return result, rates, time.perf_counter() - start

    def _sticky_offsets(self, segment: Segment) -> Tensor | None:
        samples = self.state.model.sticky_samples
        return draw_sticky_offsets(segment, samples, self.config.seed) if samples else None

    def _report(self, window: _Window, bar: tqdm[None]) -> None:
        if not self.accelerator.is_main_process:
            return
        metrics = window.metrics()
        self._record(metrics)
        line = f"loss {metrics['train/loss']:.4f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(line)
        if bar.disable:
            logger.info("step %d/%d  %s", self.state.step, self.config.training.max_steps, line)

    def _validate(self) -> None:
        validation = self.state.task.validate()
        if validation is None:
            return
        if self.state.best_loss is None or validation.loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step = validation.loss, self.state.step
        if self.accelerator.is_main_process:
            self._record(validation.metrics)
            logger.info("step %d  %s", self.state.step, validation.text)

    def _sample(self) -> None:
        if not self.accelerator.is_main_process:
            return
        text = self.state.task.sample(self.state.step, self.config.training.sample_tokens)
        if text is None:
            return
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.state.step, "text": text}, ensure_ascii=False) + "\n")
        self.tracker.log_text("sample", text, self.state.step)

    def _record(self, metrics: dict[str, float]) -> None:
        MetricsLog(self.folder / "metrics.jsonl").write(self.state.step, self.state.tokens, **metrics)
        self.tracker.log({"tokens": self.state.tokens, **metrics}, self.state.step)

    def _save(self, must_succeed: bool) -> Path:
        """Save and remove old checkpoints. In the middle of a run a failure is a warning: a later one may succeed."""
        root = self.folder / "checkpoints"
        try:
            saved = save_checkpoint(root, self.state, self.accelerator, self.share)
        except CheckpointError as error:
            if must_succeed:
                raise TrainingFailedError(str(error)) from error
            logger.error("%s The run goes on.", error)
            return root
        if self.accelerator.is_main_process:
            remove_old_checkpoints(root, self.config.training.keep_checkpoints)
        return saved

    def _agreed_signal(self, signals: StopSignals) -> int | None:
        """The signal that any process was sent; all stop after the same step."""
        number = torch.tensor(float(signals.requested or 0), device=self.accelerator.device)
        total = int(self.accelerator.reduce(number, reduction="sum").item())
        if not total:
            return None
        return signals.requested or signal.SIGTERM

    def _explain(self, error: NonFiniteError, segments: Sequence[Segment]) -> str:
        lanes = [lane for segment in segments for lane in self.state.task.locate(segment)]
        newest = newest_checkpoint(self.folder / "checkpoints")
        return (
            f"step {self.state.step + 1}: {error}. The weights are as they were before it. This process was reading "
            f"{'; '.join(lanes)}. The last good checkpoint is {newest or 'none yet'}. A lower optimizer.learning_rate "
            "or memory_learning_rate, more schedule.warmup_steps, or training.precision=float32 may help."
        )

    def _progress_bar(self) -> tqdm[None]:
        return tqdm(
            total=self.config.training.max_steps,
            initial=self.state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        )


@dataclass
class _Window:
    """The steps since the last report."""

    results: list[StepResult] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, result: StepResult, rates: dict[str, float], seconds: float) -> None:
        self.results.append(result)
        self.rates = rates
        self.seconds += seconds

    def metrics(self) -> dict[str, float]:
        """Means over scored tokens; the gradient's norm and the learning rates of the last step."""
        scored = [result.scored_tokens for result in self.results]
        loss = fmean([result.loss for result in self.results], scored)
        auxiliary = {
            f"train/{name}": fmean([result.auxiliary_losses[name] for result in self.results], scored)
            for name in self.results[0].auxiliary_losses
        }
        return {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700)),
            **auxiliary,
            "train/gradient_norm": self.results[-1].gradient_norm,
            **self.rates,
            "train/tokens_per_second": sum(result.read_tokens for result in self.results) / self.seconds,
        }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
