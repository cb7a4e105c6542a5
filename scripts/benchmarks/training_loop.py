"""What train.py adds to a training step: its own step, with everything around it, against the bare one.

After every step of a real run (documents, lanes, offsets, schedule, metrics written at each step) the bare step of a
second model of the same kind is taken: they take turns by way of the run's tracker, which is called between two steps.
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
from benchmarks.arithmetic import Sizes
from benchmarks.machine import Setting
from benchmarks.measuring import Clock, summarize
from benchmarks.models import memory_config, model_sizes
from benchmarks.report import Comparison, Result, paired
from benchmarks.training_step import GPT2_SMALL, TrainingStep, add_model_options, work_of_steps
from infformer.models.loading import load_tokenizer

if TYPE_CHECKING:
    from infformer.config import RunConfig

TOKENIZER = str(Path(infformer.__file__).parent / "checkpoints" / "tiny")


class _EnoughError(Exception):
    """All rounds were measured; the run need not go on to its end, where it would be measured and saved."""


class TurnTaker:
    """A tracker that takes a bare step after every step of the loop."""

    def __init__(self, bare_step: TrainingStep, rounds: int, warmup: int, clock: Clock) -> None:
        self.seconds: dict[str, list[float]] = {"train.py": [], "bare step": []}
        self._bare_step = bare_step
        self._turns = rounds + warmup
        self._clock = clock
        self._start = clock.now()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The loop has taken a step, and has recorded it."""
        if "train/loss" not in metrics:
            return
        for name in self.seconds:
            if name == "bare step":
                self._bare_step()
            now = self._clock.now()
            self.seconds[name].append(now - self._start)
            self._start = now
        if step == self._turns:
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
    parser.add_argument("--rounds", type=int, default=20)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Train on the sample's novels until all rounds were measured.

    Raises:
        SystemExit: what train.py needs beside torch and transformers is not installed.
    """
    try:
        from infformer.training import trainer
        from infformer.training.building import build_model
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: train.py cannot be measured here: {error.name} is not installed") from error

    sizes = model_sizes(options, "gpt2")
    with TemporaryDirectory() as folder:
        config = _run_config(sizes, setting, options.compile, Path(folder))
        bare = TrainingStep(build_model(config, load_tokenizer(TOKENIZER)), sizes, setting)
        if options.compile:
            bare.model.compile()
        work = work_of_steps(sizes, [], bare.model)["with memory"]
        # A run compiles at its first steps, and its first report is of a setting that is still cold.
        warmup = max(options.warmup, 2)
        tracker = TurnTaker(bare, options.rounds, warmup, setting.clock)
        with mock.patch.object(trainer, "open_tracker", return_value=tracker), suppress(_EnoughError):
            trainer.train(config)
    seconds = {name: values[warmup:] for name, values in tracker.seconds.items()}
    results = [
        Result(name, values, work, figures={"tokens_per_second": sizes.tokens / summarize(values).median})
        for name, values in seconds.items()
    ]
    chosen = {name: getattr(options, name) for name in ("batch", *GPT2_SMALL, "compile")}
    return Comparison(
        "loop", chosen, results, [paired("train.py / bare step", seconds["train.py"], seconds["bare step"])]
    )


def _run_config(sizes: Sizes, setting: Setting, compiled: bool, folder: Path) -> RunConfig:
    """A run on as many novels as there are lanes, which reports every step and measures nothing else."""
    from infformer.config import EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
    from infformer.data.options import DataConfig

    return RunConfig(
        model=ModelConfig(
            architecture={
                "model_type": "gpt2",
                "vocab_size": sizes.vocabulary,
                "n_positions": sizes.segment,
                "n_embd": sizes.hidden,
                "n_layer": sizes.layers,
                "n_head": sizes.heads,
            },
            tokenizer=TOKENIZER,
            memory=memory_config(sizes),
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
            compile=compiled,
            log_every=1,
            evaluate_every=None,
            checkpoint_every=None,
        ),
        evaluation=EvaluationConfig(before=False, inspected_segments=0),
        output_dir=str(folder / "run"),
    )
