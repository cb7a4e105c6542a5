"""What eval.py does, with its documents, bookkeeping and figures, against the forward passes alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.machine import PRECISIONS, Setting
from benchmarks.measuring import take_turns
from benchmarks.models import add_sizes, new_reader
from benchmarks.report import Comparison, paired, with_speeds

SIZES = {"layers": 12, "hidden": 768, "heads": 12, "vocabulary": 50257, "segment": 512}


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`evaluation`."""
    text = "perplexity with all its figures, against forward passes alone"
    parser = commands.add_parser("evaluation", help=text, parents=parents)
    add_sizes(parser, **SIZES)
    parser.add_argument("--documents", dest="batch", type=int, default=2, help="read side by side; up to 4")
    parser.add_argument("--segments", type=int, default=4, help="of each document")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Without controls, beside the same segments read by the model alone.

    Raises:
        SystemExit: the documents cannot be read without the library that reads them.
    """
    try:
        from infformer.data.options import DataConfig
        from infformer.data.segments import read_once
        from infformer.data.tokenization import tokenize_documents
        from infformer.evaluation.perplexity import evaluate
        from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: eval.py cannot be measured here: {error.name} is not installed") from error

    sizes, model, tokenizer = new_reader(options, setting)
    novels = tokenize_documents(DataConfig(source="sample", max_documents=sizes.batch), "test", tokenizer)
    documents = novels.beginnings(len(novels) * (options.segments * sizes.segment + 1))
    evaluator = Evaluator(
        model=model,
        protocol=ReadingProtocol(sizes.segment, precision=PRECISIONS[setting.precision]),
        batch_size=len(documents),
        processes=Processes(progress=False),
    )
    segments = [read.to(setting.device) for read in read_once(documents, len(documents), sizes.segment)]

    @torch.inference_mode()
    def forward_alone() -> None:
        state = None
        for read in segments:
            told = {"reset": read.reset, "targets": read.targets, "lengths": read.lengths}
            with setting.autocast():
                state = model(read.input_ids, state=state, **told).state

    contestants = {"forward alone": forward_alone, "evaluation": lambda: evaluate(evaluator, documents)}
    seconds = take_turns(contestants, options.rounds, options.warmup, setting.clock)
    tokens = int((documents.token_counts - 1).sum())
    chosen = {name: getattr(options, name) for name in (*SIZES, "segments", "compile")} | {"documents": len(documents)}
    ratio = paired("evaluation / forward alone", seconds["evaluation"], seconds["forward alone"])
    return Comparison("evaluation", chosen, with_speeds(seconds, tokens), [ratio])
