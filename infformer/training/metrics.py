"""What a run measures while it trains, and its own record of it: `metrics.jsonl`, one JSON object a line.

Every line holds `step`, `tokens` (read so far) and flat keys such as `train/loss`. The file is strict JSON, which has
no NaN and no infinity: both are written as `null`, and `null` is read back as NaN. So any JSON reader opens the file of
a run that diverged, and a plot of it breaks the line there.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

import torch

from infformer.durable import replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step measured; the same on every process."""

    loss: float
    """Nats per token, mean over the scored tokens of the global batch, without auxiliary losses."""
    auxiliary_losses: dict[str, float]
    """Auxiliary losses by name, already weighted."""
    gradient_norm: float
    """The norm of the gradient before it is clipped."""
    scored_tokens: int
    """Tokens predicted by the global batch."""
    read_tokens: int
    """Tokens read by the global batch; they are more where a task scores only a part of what is read."""


@dataclass(frozen=True)
class StepMetrics(StepResult):
    """What one optimiser step measured, with what is recorded beside it."""

    seconds: float
    """How long the step took on this process."""
    learning_rates: dict[str, float]
    """Learning rates by the names under which they are recorded."""


def summarise(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """One line of metrics: means over scored tokens; the gradient's norm and the learning rates of the last step."""
    scored = [step.scored_tokens for step in steps]
    loss = fmean([step.loss for step in steps], scored)
    auxiliary = {
        f"train/{name}": fmean([step.auxiliary_losses[name] for step in steps], scored)
        for name in steps[0].auxiliary_losses
    }
    return {
        "train/loss": loss,
        "train/perplexity": math.exp(min(loss, 700)),
        **auxiliary,
        "train/gradient_norm": steps[-1].gradient_norm,
        **steps[-1].learning_rates,
        "train/tokens_per_second": sum(step.read_tokens for step in steps) / sum(step.seconds for step in steps),
    }


@dataclass(frozen=True)
class DeviceMeter:
    """How much of a CUDA device a run uses; on other devices nobody asks."""

    device: torch.device
    flops_of_a_token: float
    """Of a token that is learned from, an estimate: `models.sizes.flops_of_a_token`."""
    peak_flops: float
    """Operations a second that all devices reach together."""

    def line(self, tokens_per_second: float) -> dict[str, float]:
        """What is added to a line of metrics: most bytes allocated since the last line, and speed over the peak's."""
        allocated = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {
            "train/device_bytes": allocated,
            "train/flops_of_peak": self.flops_of_a_token * tokens_per_second / self.peak_flops,
        }


def matmul_flops(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second of a large product of matrices, the best of a few.

    It is what the card reaches in this precision, as it is set and cooled, where its maker's table says what it could.
    """
    size = 4096 if precision == torch.float32 else 8192
    drawn = torch.Generator(device).manual_seed(0)  # its own: what the run draws is as it was
    matrix = torch.randn(size, size, device=device, dtype=precision, generator=drawn)
    product, seconds = torch.empty_like(matrix), []
    for _ in range(8):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    del matrix, product
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / min(seconds)


class MetricsLog:
    """Appends to a metrics file. A line is handed to the system before `write` returns: a killed run keeps it.

    A line that cannot be written, as where the disk is full, is lost; the first one is told of.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._has_lost = False

    def write(self, step: int, tokens: int, **values: float) -> None:
        """Append one line; names with a slash are passed as `**{"train/loss": loss}`."""
        record = {"step": step, "tokens": tokens, **{name: _strict(value) for name, value in values.items()}}
        self.append(record)

    def append(self, record: Mapping[str, object]) -> None:
        """Append one line of anything that has a step."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                _remove_half_line(file)
                file.write(line.encode())
        except OSError as error:
            if not self._has_lost:
                logger.warning("%s cannot be written (%s); the run goes on without these lines", self.path, error)
            self._has_lost = True

    def truncate_after(self, step: int) -> None:
        """Remove the lines after `step`, and a half-written last one.

        For a run resumed from its checkpoint at `step`: it does the later steps again, and writes their lines again.
        The old file is replaced at once or not at all.
        """
        if not self.path.exists():
            return
        with replacing(self.path) as file:
            for line, line_step, _ in _whole_lines(self.path):
                if line_step <= step:
                    file.write(line)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All records of a metrics file, in order, without a half-written last line. `null` becomes NaN."""
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, _, record in _whole_lines(Path(path))
    ]


def _remove_half_line(file: BinaryIO) -> None:
    """Cut off what a disk that was full has taken of the line before: the next one would be spoilt by it."""
    if file.seek(0, SEEK_END):
        file.seek(-1, SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _strict(value: float) -> float | None:
    if isinstance(value, int):
        return value
    number = float(value)  # a tensor or a NumPy scalar becomes what JSON can hold
    return number if math.isfinite(number) else None


def _whole_lines(path: Path) -> Iterator[tuple[str, int, dict[str, float | None]]]:
    """Lines with their step and all that they hold. The newline is written last: a line without one was cut off."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            step = record.get("step") if isinstance(record, dict) else None
            if not isinstance(step, int):
                raise ValueError(f"{path}, line {number}, is no record of a step")
            yield line, step, record
