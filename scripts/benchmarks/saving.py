"""What saving costs: training steps, a checkpoint written meanwhile, and the steps that it slows down."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.machine import Setting
from benchmarks.measuring import summarize
from benchmarks.models import model_sizes, new_model
from benchmarks.report import Comparison, Ratio, Result
from benchmarks.training_step import GPT2_SMALL, TrainingStep, add_model_options

EVERY = 100
"""Steps between two checkpoints."""


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`save`."""
    text = f"a checkpoint every {EVERY} steps, against none"
    parser = commands.add_parser("save", help=text, parents=parents)
    add_model_options(parser, **GPT2_SMALL)
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints")
    parser.add_argument(
        "--disk", type=Path, help="a folder on the disk to write to; the system's temporary one without"
    )
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Steps alone; then checkpoints, and steps while they are written.

    A save costs the time until its copy is taken, what the steps take longer than usual while it is written, and the
    time to give it its name. Wall time, whatever the clock.
    """
    # These need what trains: Hydra, and accelerate.
    from accelerate import Accelerator
    from transformers.utils.logging import disable_progress_bar

    from infformer.training.checkpoint import CheckpointWriter, Progress, TrainingState
    from infformer.training.shards import TorchShards

    disable_progress_bar()
    torch.manual_seed(0)
    sizes = model_sizes(options, "gpt2")
    step = TrainingStep(new_model(sizes, "gpt2", memory=True), sizes, setting)
    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda number: 1.0)
    shards = TorchShards(step.model, step.optimizer)
    memory = step.model.initial_state(sizes.batch)
    state = TrainingState(step.model, None, shards, schedule, [memory], Progress(task={}))
    alone = [_seconds(step) for _ in range(options.warmup + 5)][options.warmup :]
    usual = summarize(alone).median
    copies, slower, writing = [], [], []
    with TemporaryDirectory(dir=options.disk) as folder:
        writer = CheckpointWriter(Path(folder), Accelerator(cpu=setting.device.type == "cpu"), keep=1)
        for number in range(options.rounds):
            state.progress.step = number + 1
            start = time.perf_counter()
            writer.begin(state, range(sizes.batch))
            copies.append(time.perf_counter() - start)
            longer = 0.0
            while not (Path(folder) / f"step-{state.progress.step:08d}").exists():
                longer += _seconds(step) - usual
                longer += _seconds(lambda: writer.finish(wait=False))
            slower.append(longer)
            writing.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    costs = [copy + longer for copy, longer in zip(copies, slower, strict=True)]
    return Comparison(
        "save",
        vars(sizes) | {"every": EVERY},
        [
            Result("step", alone),
            Result("copy", copies, part=True),
            Result("steps made slower", slower, part=True),
            Result("until whole, steps included", writing, figures={"bytes": size}),
        ],
        [Ratio(f"a save / {EVERY} steps", [cost / (EVERY * usual) for cost in costs])],
    )


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
