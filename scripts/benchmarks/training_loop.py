"""What train.py adds to a training step: its own step, with everything around it, against the bare one.

After every report of a real run (documents, lanes, offsets, schedule, metrics) as many bare steps of a second model of
the same kind are taken: they take turns by way of the run's tracker, which is called at each report. Where asked for, a
second run has no memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

import infformer
from benchmarks.arithmetic import Sizes, Work
from benchmarks.machine import Setting
from benchmarks.measuring import Clock
from benchmarks.models import BACKBONES, architecture, compile_layers, memory_config, model_sizes
from benchmarks.report import Comparison, paired, with_speeds
from benchmarks.training_step import GPT2_SMALL, TrainingStep, add_model_options, work_of_steps
from infformer.models.loading import load_tokenizer

if TYPE_CHECKING:
    from infformer.config import RunConfig

TOKENIZER = str(Path(infformer.__file__).parent / "checkpoints" / "tiny")


class _EnoughError(Exception):
    """All rounds were measured; the run need not go on to its end, where it would be measured and saved."""


class TurnTaker:
    """A tracker that takes as many bare steps after every report of the loop as it reports.

    Args:
        bare_step: None: the loop alone is measured.
        every: steps of a report.
    """

    def __init__(self, bare_step: TrainingStep | None, every: int, rounds: int, warmup: int, clock: Clock) -> None:
        self.seconds: dict[str, list[float]] = {"train.py": [], "bare step": []}
        self._bare_step, self._every = bare_step, every
        self._turns = rounds + warmup
        self._clock = clock
        self._start = clock.now()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The loop has taken some steps, and has recorded them."""
        if "train/loss" not in metrics:
            return
        for name in self.seconds:
            if name == "bare step" and self._bare_step is not None:
                for _ in range(self._every):
                    self._bare_step()
            now = self._clock.now()
            self.seconds[name].append((now - self._start) / self._every)
            self._start = now
        if step == self._turns * self._every:
            raise _EnoughError

    def log_text(self, name: str, text: str, step: int) -> None:
        pass

    def log_figure(self, name: str, path: Path, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`loop`."""
    text = "a training step of train.py, against the bare forward, backward and update of the same model"
    parser = commands.add_parser("loop", help=text, parents=parents)
    add_model_options(parser, **GPT2_SMALL)
    parser.add_argument("--backbone", choices=BACKBONES, default="gpt2")
    parser.add_argument("--graphs", action="store_true", help="also replay CUDA graphs, where there is a GPU")
    parser.add_argument("--every", type=int, default=1, help="steps of a report, after which turns are taken")
    parser.add_argument("--control", action="store_true", help="then a run without memory too")
    parser.add_argument("--rounds", type=int, default=20)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Train on the sample's novels until all rounds were measured.

    Raises:
        SystemExit: what train.py needs beside torch and transformers is not installed.
    """
    try:
        from infformer.training import building, trainer
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: train.py cannot be measured here: {error.name} is not installed") from error

    sizes = model_sizes(options, options.backbone)
    # A run compiles at its first steps, and its first reports are of a setting that is still cold.
    warmup = max(options.warmup, 2, -(-5 // options.every) if options.graphs else 0)

    def measure(memory: bool, beside: bool) -> tuple[dict[str, list[float]], Work]:
        """The seconds of the loop, and of the bare steps where they are taken beside it; and the work of a step."""
        # The sample's tokens are fewer than those of the vocabulary that is measured.
        with TemporaryDirectory() as folder, mock.patch.object(building, "check_vocabulary"):
            config = _run_config(sizes, options, setting, memory, Path(folder))
            bare = TrainingStep(building.build_model(config, load_tokenizer(TOKENIZER)), sizes, setting, options.graphs)
            work = work_of_steps(sizes, [], bare.model)["with memory" if memory else "without"]
            if options.compile and beside:
                compile_layers(bare.model)
            tracker = TurnTaker(bare if beside else None, options.every, options.rounds, warmup, setting.clock)
            with mock.patch.object(trainer, "open_tracker", return_value=tracker), suppress(_EnoughError):
                trainer.train(config)
        return {name: values[warmup:] for name, values in tracker.seconds.items()}, work

    seconds, work = measure(memory=True, beside=True)
    works, ratios = dict.fromkeys(seconds, work), [paired("train.py / bare step", *seconds.values())]
    if options.control:
        alone, works["train.py without memory"] = measure(memory=False, beside=False)
        seconds["train.py without memory"] = alone["train.py"]
        ratios.append(paired("train.py with memory / without", seconds["train.py"], alone["train.py"]))
    results = with_speeds(seconds, sizes.tokens)
    for result in results:
        result.work = works[result.name]
    names = ("backbone", "batch", *GPT2_SMALL, "compile", "graphs", "every")
    return Comparison("loop", {name: getattr(options, name) for name in names}, results, ratios)


def _run_config(sizes: Sizes, options: argparse.Namespace, setting: Setting, memory: bool, folder: Path) -> RunConfig:
    """A run on as many novels as there are lanes, which measures nothing but its training."""
    from infformer.config import EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
    from infformer.data.options import DataConfig

    return RunConfig(
        model=ModelConfig(
            architecture=architecture(sizes, options.backbone),
            tokenizer=TOKENIZER,
            memory=memory_config(sizes) if memory else None,
        ),
        data=DataConfig(
            source="sample",
            max_documents=sizes.batch,
            validation=None,
            test=None,
            segments_per_visit=16,
            cache_dir=str(folder / "tokens"),
        ),
        training=TrainingConfig(
            max_steps=10**9,
            batch_size=sizes.batch,
            segment_length=sizes.segment,
            precision=setting.precision,
            compile="graphs" if options.graphs and setting.device.type == "cuda" else options.compile,
            log_every=options.every,
            evaluate_every=None,
            checkpoint_every=None,
        ),
        evaluation=EvaluationConfig(before=False, inspected_segments=0),
        output_dir=str(folder / "run"),
    )
