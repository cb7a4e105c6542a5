"""Tokens per second after a long prompt: with memory, without, and with a longer window of attention.

Each round generates as many tokens as a segment has, so that the segment is written to memory once. What the prompt
costs is not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from benchmarks.machine import Setting
from benchmarks.measuring import Contestant, summarize, take_turns
from benchmarks.models import model_sizes, new_model, new_window_model
from benchmarks.report import Comparison, Result, paired
from benchmarks.streaming import SMALL
from benchmarks.training_step import add_model_options
from infformer.models.base import MemoryModel
from infformer.models.generation import read_text, sample_tokens
from infformer.models.pretrained import InfformerForCausalLM


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`generate`."""
    text = "tokens per second after a long prompt"
    parser = commands.add_parser("generate", help=text, parents=parents)
    add_model_options(parser, **SMALL)
    parser.add_argument("--prompt", type=int, default=16, help="in segments")
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 4, 8], help="in segments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """All read the same prompt, then write in turns.

    Raises:
        SystemExit: more than one row is asked for, and text is written row by row.
    """
    if options.batch != 1:
        raise SystemExit(f"error: --batch {options.batch}: text is generated one row at a time; leave it at 1")
    torch.manual_seed(0)
    sizes = model_sizes(options, "rotary")
    prompt = torch.randint(sizes.vocabulary, (options.prompt * sizes.segment,))
    writers = {
        name: _writer(new_model(sizes, "rotary", memory=memory), prompt, sizes.segment, setting, options.compile)
        for name, memory in (("with memory", True), ("without", False))
    }
    for window in options.windows:
        network = InfformerForCausalLM.from_backbone(new_window_model(sizes, window * sizes.segment))
        # One segment of all its positions: its key-value cache is what the window covers.
        whole = network.choose_segment_length(None)
        writers[f"window of {window} segments"] = _writer(network, prompt, whole, setting, options.compile)
    contestants = {name: Contestant(lambda write=write: write(sizes.segment)) for name, write in writers.items()}
    seconds = take_turns(contestants, options.rounds, options.warmup, setting.clock)
    results = [
        Result(name, values, figures={"tokens_per_second": sizes.segment / summarize(values).median})
        for name, values in seconds.items()
    ]
    ratios = [
        paired(f"{name} / with memory, tokens per second", seconds["with memory"], values)
        for name, values in seconds.items()
        if name != "with memory"
    ]
    chosen = {name: getattr(options, name) for name in (*SMALL, "prompt", "windows", "compile")}
    return Comparison("generate", chosen, results, ratios)


def _writer(
    model: MemoryModel, prompt: torch.Tensor, segment_length: int, setting: Setting, compiled: bool
) -> Callable[[int], list[int]]:
    """A function that writes so many more tokens; the prompt is read now."""
    model.to(setting.device).eval()
    if compiled:
        model.compile()
    tokens = sample_tokens(model, read_text(model, prompt, segment_length), segment_length)

    def write(count: int) -> list[int]:
        with setting.autocast():
            return list(islice(tokens, count))

    write(1)
    return write
