"""Tokens per second after a long prompt: with memory, without, with a longer window of attention, and after a book.

Each round generates as many tokens as a segment has, so that the segment is written to memory once; with `--turn 1`
one token, for the price of a token on a machine whose speed changes. What the prompt costs is not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch

from benchmarks.machine import Setting
from benchmarks.measuring import peak_extra_bytes, take_turns
from benchmarks.models import BACKBONES, check_windows, model_sizes, new_model, new_window_model
from benchmarks.report import Comparison, Ratio, paired, with_speeds
from benchmarks.streaming import SMALL
from benchmarks.training_step import add_model_options
from infformer.models.base import MemoryModel
from infformer.models.generation import read_text, sample_tokens
from infformer.models.pretrained import InfformerForCausalLM

MEASURED = 8
"""Tokens whose peak of memory is taken, at the same place of a segment."""


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`generate`."""
    text = "tokens per second after a long prompt"
    parser = commands.add_parser("generate", help=text, parents=parents)
    parser.add_argument("--backbone", choices=BACKBONES, default="rotary", help="gpt2 has no longer windows")
    add_model_options(parser, **SMALL)
    parser.add_argument("--turn", type=int, help="tokens that one writes before the next does; a segment if not given")
    parser.add_argument("--prompt", type=int, default=16, help="in segments")
    parser.add_argument("--late", type=int, default=200, help="in segments: a prompt as long as a book")
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 4, 8], help="in segments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """All read the same prompt, one a much longer one, then they write in turns.

    Raises:
        SystemExit: more than one row is asked for, and text is written row by row; or a window that nobody has.
    """
    if options.batch != 1:
        raise SystemExit(f"error: --batch {options.batch}: text is generated one row at a time; leave it at 1")
    check_windows(options)
    torch.manual_seed(0)
    sizes = model_sizes(options, options.backbone)
    book = torch.randint(sizes.vocabulary, (max(options.late, options.prompt) * sizes.segment,))
    prompt = book[: options.prompt * sizes.segment]
    with_memory = new_model(sizes, options.backbone, memory=True)
    writers = {
        name: _writer(model, text, sizes.segment, setting, options.compile)
        for name, model, text in (
            ("with memory", with_memory, prompt),
            ("without", new_model(sizes, options.backbone, memory=False), prompt),
            ("with memory, late", with_memory, book[: options.late * sizes.segment]),
        )
    }
    for window in options.windows:
        network = InfformerForCausalLM.from_backbone(new_window_model(sizes, window * sizes.segment))
        # One segment of all its positions: its key-value cache is what the window covers.
        whole = network.choose_segment_length(None)
        writers[f"window of {window} segments"] = _writer(network, prompt, whole, setting, options.compile)
    turn = options.turn or sizes.segment
    contestants = {name: partial(write, turn) for name, write in writers.items()}
    seconds = take_turns(contestants, options.rounds, options.warmup, setting.clock)
    peaks = {name: peak_extra_bytes(partial(write, MEASURED), setting.device) for name, write in writers.items()}
    results = with_speeds(seconds, turn)
    for result in results:
        result.figures["peak_extra_bytes"] = peaks[result.name]
    ratios = [
        paired(f"{name} / with memory, tokens per second", seconds["with memory"], values)
        for name, values in seconds.items()
        if name != "with memory"
    ]
    ratios.append(Ratio("late / soon, peak extra memory", [peaks["with memory, late"] / peaks["with memory"]]))
    names = ("backbone", *SMALL, "turn", "prompt", "late", "windows", "compile")
    chosen = {name: getattr(options, name) for name in names}
    return Comparison("generate", chosen, results, ratios)


def _writer(
    model: MemoryModel, prompt: torch.Tensor, segment_length: int, setting: Setting, compiled: bool
) -> Callable[[int], list[int]]:
    """A function that writes so many more tokens; the prompt is read now."""
    model.eval().to(setting.device)
    if compiled:
        model.compile()
    tokens = sample_tokens(model, read_text(model, prompt, segment_length), segment_length)

    def write(count: int) -> list[int]:
        with setting.autocast():
            return list(islice(tokens, count))

    write(1)
    return write
