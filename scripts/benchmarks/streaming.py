"""Reading one endless document, segment by segment, as an evaluation does: does it become slower, or larger?

Two streams with memory take turns: one is a thousand and more segments into its document, the other begins anew again
and again and is timed around its eighth segment. So a setting that becomes slower or faster does not pass for a memory
that does.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import arithmetic
from benchmarks.arithmetic import Sizes, Work
from benchmarks.machine import Setting
from benchmarks.measuring import Clock, peak_extra_bytes, summarize, take_turns
from benchmarks.models import (
    BACKBONES,
    WindowReader,
    check_windows,
    model_sizes,
    new_model,
    new_window_model,
    random_tokens,
    tensor_bytes,
)
from benchmarks.report import Comparison, Ratio, Result, paired
from benchmarks.training_step import add_model_options
from infformer.models.sizes import process_bytes
from infformer.results import BenchmarkFigures

EARLY_NAME, LATE_NAME = "with memory, early", "with memory, late"
EARLY = range(5, 12)
"""The segments of a document, from 1, that count as around its eighth."""

SMALL = {
    "layers": 4, "hidden": 256, "heads": 4, "vocabulary": 4096, "segment": 128, "functions": 128, "samples": 128,
}  # fmt: skip


class Stream:
    """A model in one document of random tokens."""

    def __init__(self, model: Any, sizes: Sizes, setting: Setting, compiled: bool = False) -> None:
        self.segments = 0
        """How many it has read."""
        self._model = model.to(setting.device).eval()
        if compiled:
            model.compile()
        self._sizes = sizes
        self._setting = setting
        self._memory: Any = None

    @torch.inference_mode()
    def read(self) -> None:
        """Read and score one more segment."""
        tokens = random_tokens(self._sizes, self._setting.device)
        with self._setting.autocast():
            output = self._model(tokens[:, :-1], targets=tokens[:, 1:], state=self._memory, return_logits=False)
        self._memory = output.state
        self.segments += 1

    def read_up_to(self, segment: int) -> None:
        """Read on until so many segments were read."""
        while self.segments < segment:
            self.read()

    def begin_again(self) -> None:
        """Another document, read up to where its early segments are timed."""
        self._memory, self.segments = None, 0
        self.read_up_to(EARLY.start - 1)

    def stay_early(self) -> None:
        """Begin again where the next segment is no early one."""
        if self.segments + 1 not in EARLY:
            self.begin_again()

    @property
    def remembered_bytes(self) -> int:
        """Of what goes from one segment to the next."""
        return tensor_bytes(self._memory)


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`stream`."""
    text = "one endless document: late segments against early ones, and against longer windows of attention"
    parser = commands.add_parser("stream", help=text, parents=parents)
    parser.add_argument("--backbone", choices=BACKBONES, default="rotary")
    add_model_options(parser, **SMALL)
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 4, 8], help="in segments (rotary backbone)")
    parser.add_argument("--segments", type=int, default=2000, help="the late ones are around this one")
    parser.add_argument("--rounds", type=int, default=100, help="as many late segments are timed")
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Bring one stream far into its document; then all contestants read in turns.

    Raises:
        SystemExit: windows for a backbone that has no positions for them; or too few segments.
    """
    check_windows(options)
    first = options.segments - options.rounds // 2
    if first - options.warmup <= EARLY.stop:
        raise SystemExit(
            f"error: --segments {options.segments} with --rounds {options.rounds}: the late segments would begin at "
            f"the {first}th, among the early ones; take more segments or fewer rounds"
        )
    torch.manual_seed(0)
    sizes = model_sizes(options, options.backbone)
    model = new_model(sizes, options.backbone, memory=True)
    early, late = Stream(model, sizes, setting, options.compile), Stream(model, sizes, setting)
    # Before anybody else has taken memory: the peak of the process, soon and in the end.
    early.begin_again()
    late.read_up_to(EARLY.stop)
    process_early = process_bytes(setting.device)
    track = _follow(late, early, first - 1 - options.warmup, setting.clock)
    process_late = process_bytes(setting.device)

    streams = {EARLY_NAME: early, LATE_NAME: late}
    others: dict[str, Any] = {"without": new_model(sizes, options.backbone, memory=False)}
    others |= {
        f"window of {k} segments": WindowReader(new_window_model(sizes, k * sizes.segment)) for k in options.windows
    }
    for name, other in others.items():
        streams[name] = Stream(other, sizes, setting, options.compile)
        streams[name].read_up_to(1 + max(options.windows, default=0))  # the windows are full then
    contestants = {name: stream.read for name, stream in streams.items()}
    prepare = {EARLY_NAME: early.stay_early}
    seconds = take_turns(contestants, options.rounds, options.warmup, setting.clock, prepare)

    reach = {EARLY_NAME: 8, LATE_NAME: options.segments, "without": 1}
    reach |= {f"window of {window} segments": window for window in options.windows}
    work = _work(sizes, options.windows)
    results = []
    for name, stream in streams.items():
        figures: BenchmarkFigures = {
            "reach_tokens": reach[name] * sizes.segment,
            "tokens_per_second": sizes.tokens / summarize(seconds[name]).median,
            "memory_bytes": stream.remembered_bytes,
            "peak_extra_bytes": peak_extra_bytes(stream.read, setting.device),
        }
        results.append(Result(name, seconds[name], work[name], figures=figures))
    results[0].figures["peak_process_bytes"] = process_early
    results[1].figures |= {"peak_process_bytes": process_late, "times_early_by_segment": track}
    extra = [result.figures["memory_bytes"] + result.figures["peak_extra_bytes"] for result in results[:2]]
    ratios = [
        paired("late / early, time", seconds[LATE_NAME], seconds[EARLY_NAME]),
        Ratio("late / early, memory and peak extra memory", [extra[1] / extra[0]]),
        Ratio("late / early, peak memory of the process", [process_late / process_early]),
    ]
    ratios += [paired(f"with memory / {name}, time", seconds[LATE_NAME], seconds[name]) for name in others]
    chosen = {name: getattr(options, name) for name in ("backbone", "batch", *SMALL, "windows", "segments", "compile")}
    return Comparison("stream", chosen, results, ratios)


def _follow(late: Stream, early: Stream, segment: int, clock: Clock) -> list[tuple[int, float]]:
    """Read on up to this segment; every fifth is timed, and one of the early stream beside it.

    Returns:
        For every 50 segments the number of the last, and the median of what one took by what an early one took.
    """
    contestants = {"late": late.read, "early": early.read}
    track, ratios = [], []
    while late.segments < segment:
        if late.segments % 5:
            late.read()
            continue
        seconds = take_turns(contestants, rounds=1, warmup=0, clock=clock, prepare={"early": early.stay_early})
        ratios.append(seconds["late"][0] / seconds["early"][0])
        if len(ratios) == 10:
            track.append((late.segments, summarize(ratios).median))
            ratios = []
    return track


def _work(sizes: Sizes, windows: list[int]) -> dict[str, Work]:
    """Of reading a segment, by contestant."""
    head = arithmetic.head(sizes, backward=False)
    memory = arithmetic.read(sizes, backward=False) + arithmetic.write(sizes, backward=False)
    without = arithmetic.backbone(sizes, backward=False) + head
    work = {EARLY_NAME: without + memory * sizes.layers, LATE_NAME: without + memory * sizes.layers, "without": without}
    for window in windows:
        attention = arithmetic.backbone(sizes, backward=False, window=window * sizes.segment)
        work[f"window of {window} segments"] = attention + head
    return work
