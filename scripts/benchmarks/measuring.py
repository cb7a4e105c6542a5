"""Seconds and bytes: contestants in turns, and the memory that one call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from infformer.models.sizes import most_held, peak_on_cuda
from infformer.progress import follow


class Summary(NamedTuple):
    """The middle of some values, and between which of them the middle half lies."""

    median: float
    lower: float
    upper: float


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper)


class Clock(NamedTuple):
    """How seconds are taken."""

    device: torch.device
    kind: str = "wall"
    """`wall`, or `process`: the seconds that this process had a processor, all threads together. On a machine that does
    other work as well, with one thread, this is nearer to what a call takes."""

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() if self.kind == "wall" else time.process_time()


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    clock: Clock,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """The seconds of every contestant in every round.

    All run once, in their order, then all again: a machine that becomes slower for a while does so for all of them.

    Args:
        warmup: rounds before those that count.
        prepare: what is called before each turn of some of them, and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in follow(range(warmup + rounds), "measuring", "rounds", warmup + rounds):
        for name, contestant in contestants.items():
            if prepare is not None and name in prepare:
                prepare[name]()
            start = clock.now()
            contestant()
            seconds[name].append(clock.now() - start)
    return {name: values[warmup:] for name, values in seconds.items()}


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """How much more memory torch holds at one moment of a call than before it.

    On CUDA by the allocator's own count, on the CPU by `most_held`. Both are the same at every repetition.
    """
    if device.type == "cuda":
        return peak_on_cuda(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return most_held(profiler)


def profile_table(call: Callable[[], object], device: torch.device) -> str:
    """The operators of a call that take the most time, as torch's profiler prints them."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=45)
