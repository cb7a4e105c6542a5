"""What a run will take, said before it is begun: by `dry_run=true`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from infformer.config import RunConfig, TrackerConfig
from infformer.data.tokenization import TokenizedDocuments
from infformer.models.sizes import in_bytes, most_held, peak_on_cuda
from infformer.progress import in_words
from infformer.results import Sizes
from infformer.training.folder import nothing_can_be_written
from infformer.training.runtime import Accelerator, decided_by_main


@dataclass(frozen=True)
class Forecast:
    """What a run will take: sizes by formula, memory and speed as a few of its steps had them."""

    sizes: Sizes
    """In the end, as all that follows but for the time of training."""
    growths: int
    """How often the model is to become larger."""
    lanes: int
    """How many lanes one process reads; memory is that of one process too."""
    processes: int
    peak_bytes: int
    """Activations and gradients at the peak of a step."""
    process_bytes: int
    """The most that the process had at once: on CUDA what was allocated there, else all that was in memory."""
    on_cuda: bool
    steps: int
    """How many are to be made."""
    training_seconds: float
    """For all of them."""
    tokens_per_second: float
    measuring_seconds: float | None
    """For all readings of held-out documents; None where nobody knows."""
    checkpoints: int
    """How many will be kept, at most."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of one: weights, moments, and what all lanes remember."""
        sizes = self.sizes
        states = self.lanes * self.processes * sizes["state_bytes"]
        return sizes["weight_bytes"] + sizes["optimizer_bytes"] + states

    @property
    def training_bytes(self) -> int:
        """Of all that a step holds at its peak, as if the engine cut nothing up."""
        sizes = self.sizes
        return sizes["weight_bytes"] + sizes["optimizer_bytes"] + self.peak_bytes + self.lanes * sizes["state_bytes"]


def format_forecast(forecast: Forecast) -> str:
    """A forecast as a table."""
    sizes = forecast.sizes
    floats, seconds = sizes["state_floats"], forecast.training_seconds / max(1, forecast.steps)
    grown = f"after {forecast.growths} growths" if forecast.growths else ""
    unknown = forecast.measuring_seconds is None
    rows = [
        ("parameters of the backbone", f"{sizes['backbone_parameters']:,}", grown),
        ("parameters of the memory", f"{sizes['memory_parameters']:,}", ""),
        ("parameters that are trained", f"{sizes['trained_parameters']:,}", ""),
        ("weights", in_bytes(sizes["weight_bytes"]), ""),
        ("optimiser", in_bytes(sizes["optimizer_bytes"]), "two moments of each parameter that is trained"),
        ("activations and gradients", in_bytes(forecast.peak_bytes), "measured, at the peak of a step"),
        (
            "states", in_bytes(forecast.lanes * sizes["state_bytes"]),
            f"{forecast.lanes} lanes, each {sum(floats):,} floats, {in_bytes(sizes['state_bytes'])}"
            f" ({', '.join(f'{count:,}' for count in dict.fromkeys(floats))} floats a layer)" if floats else "",
        ),
        ("all of these", in_bytes(forecast.training_bytes), "of one process, if the engine does not cut them up"),
        (
            "the process", in_bytes(forecast.process_bytes),
            "measured, the most that was allocated on the device" if forecast.on_cuda
            else "measured, with Python and its libraries; a checkpoint is copied beside it",
        ),
        ("tokens a second", f"{forecast.tokens_per_second:,.0f}", "of all processes"),
        ("training", in_words(forecast.training_seconds), f"{forecast.steps:,} steps of {seconds:.3g} s"),
        (
            "measuring", "?" if unknown else in_words(forecast.measuring_seconds or 0.0),
            "unknown for this task" if unknown else "held-out documents, from a segment that was read",
        ),
        (
            "checkpoints", in_bytes(forecast.checkpoints * forecast.checkpoint_bytes),
            f"at most {forecast.checkpoints} kept, each {in_bytes(forecast.checkpoint_bytes)}",
        ),
    ]  # fmt: skip
    return "\n".join(f"{name:<28} {value:>14}  {said}".rstrip() for name, value, said in rows)


@contextmanager
def nowhere(config: RunConfig, accelerator: Accelerator) -> Iterator[RunConfig]:
    """The same run in a temporary folder beside its own, without a tracker: nothing is left of it afterwards."""
    folder = Path(config.output_dir)
    there = next(place for place in (*folder.absolute().parents,) if place.is_dir())
    with ExitStack() as stack:

        def make() -> str:
            try:
                made = tempfile.TemporaryDirectory(prefix=".dry-run-", dir=there, ignore_cleanup_errors=True)
            except OSError as error:
                raise nothing_can_be_written(folder, error) from error
            return stack.enter_context(made)

        temporary = decided_by_main(accelerator, make)
        yield replace(config, output_dir=temporary, tracker=TrackerConfig())


def peak_of(step: Callable[[], object], optimizer: Optimizer, device: torch.device) -> int:
    """How much more memory a step holds at one moment than lay there before it.

    On CUDA by the allocator's own count. On the CPU by `most_held`, until the weights are changed: a first step makes
    the moments then, which stay.
    """
    if device.type == "cuda":
        return peak_on_cuda(step, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would say on stderr that it begins and ends
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    running = ExitStack()
    running.callback(profiler.stop)
    hook = optimizer.register_step_pre_hook(lambda *_: running.close())
    profiler.start()
    with running:
        step()
    hook.remove()
    return most_held(profiler)


def tokens_to_measure(
    config: RunConfig, documents: Mapping[str, TokenizedDocuments], has_memory: bool, done: int
) -> int | None:
    """How many tokens of held-out documents the run reads after so many steps; None for a task that has others.

    A control reads each document once more, and once again what it remembers, unless that is nothing.
    """
    if not config.task.is_language_modelling:
        return None
    training, evaluation = config.training, config.evaluation
    held_out = {split: int((found.token_counts - 1).sum()) for split, found in documents.items() if split != "train"}
    validation, test = held_out.get("validation", 0), held_out.get("test", 0)
    if evaluation.max_validation_tokens is not None:
        validation = min(validation, evaluation.max_validation_tokens)
    readings = 1 + (evaluation.before and done == 0)
    if evaluation.controls and has_memory:
        readings += 5 if test and len(documents["test"]) > 1 else 3
    return _times(training.max_steps, training.evaluate_every, done) * validation + readings * test


def checkpoints_to_keep(config: RunConfig, documents: Mapping[str, TokenizedDocuments], done: int) -> int:
    """How many checkpoints a run leaves behind at most: its last ones, and the best, which a validation may find."""
    training = config.training
    saved = _times(training.max_steps, training.checkpoint_every, done)
    if "validation" not in documents and config.task.is_language_modelling:
        return min(saved, training.keep_checkpoints)
    validated = _times(training.max_steps, training.evaluate_every, done)
    return min(saved + validated - 1, training.keep_checkpoints + 1)  # the last step is saved once


def _times(steps: int, every: int | None, done: int) -> int:
    """How often something is due after so many steps, which is also done after the last."""
    due = 0 if every is None else steps // every - done // every
    return due + (every is None or steps % every != 0)
