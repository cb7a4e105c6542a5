"""What it takes to ask for what is hidden in texts, beside reading the same texts once."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.machine import PRECISIONS, Setting
from benchmarks.measuring import take_turns
from benchmarks.models import add_sizes, new_reader
from benchmarks.report import Comparison, Result, paired
from infformer.models.streaming import TextSegment, reading, remember

SIZES = {"layers": 4, "hidden": 192, "heads": 4, "vocabulary": 4096, "segment": 64}


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`answers`, by default of a model as the one that comes with the package."""
    text = "answers to task=needle, against reading its texts once"
    parser = commands.add_parser("answers", help=text, parents=parents)
    add_sizes(parser, **SIZES)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--texts", dest="batch", type=int, default=4, help="read side by side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Teacher forced and running free, by a memory that does something, with what is hidden in the middle.

    Raises:
        SystemExit: the texts cannot be read without the library that reads them.
    """
    try:
        from infformer.data.options import DataConfig
        from infformer.data.tokenization import tokenize_documents
        from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
        from infformer.tasks.answering import answer
        from infformer.tasks.haystack import NeedleConfig
        from infformer.tasks.task import Material
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: answers cannot be measured here: {error.name} is not installed") from error

    sizes, model, tokenizer = new_reader(options, setting)
    precision = PRECISIONS[setting.precision]
    evaluator = Evaluator(
        model=model,
        protocol=ReadingProtocol(sizes.segment, precision=precision),
        batch_size=sizes.batch,
        processes=Processes(progress=False),
    )
    novels = {"test": tokenize_documents(DataConfig(source="sample"), "test", tokenizer)}
    source = NeedleConfig().build_source(Material(evaluator, tokenizer, novels))
    questions = source.draw("test", range(sizes.batch), 0, options.length, np.full((sizes.batch, 1), 0.5))
    segments = torch.from_numpy(questions.tokens[:, :-1]).to(setting.device).split(sizes.segment, dim=1)

    def read() -> None:
        with reading(model, precision):
            remember(model, map(TextSegment, segments))

    contestants = {"reading": read, "answers": lambda: answer(evaluator, questions, "answers")}
    seconds = take_turns(contestants, options.rounds, options.warmup, setting.clock)
    chosen = {name: getattr(options, name) for name in (*SIZES, "length", "compile")} | {"texts": sizes.batch}
    results = [Result(name, values) for name, values in seconds.items()]
    return Comparison("answers", chosen, results, [paired("answers / reading", seconds["answers"], seconds["reading"])])
