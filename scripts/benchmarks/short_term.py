"""A training step of the decoder with short-term memory, against one without, beside what the multiplications say."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import Setting
from benchmarks.measuring import take_turns
from benchmarks.models import add_sizes
from benchmarks.report import Comparison, Ratio, paired, with_speeds
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM

SIZES = {
    "layers": 4, "hidden": 256, "heads": 4, "vocabulary": 4096, "segment": 128, "memory": 128, "batch": 8,
}  # fmt: skip


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`decoder`."""
    text = "the decoder with short-term memory, against the same without"
    parser = commands.add_parser("decoder", help=text, parents=parents)
    parser.add_argument("--positions", choices=("relative", "rotary"), default="relative")
    add_sizes(parser, **SIZES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Training steps with and without short-term memory, beside what the attention lengths let one expect."""
    lengths = {"without": 0, "with": options.memory}
    steps = {name: _training_step(options, length, setting) for name, length in lengths.items()}
    seconds = take_turns(steps, options.rounds, options.warmup, setting.clock)
    multiplications = {name: multiplications_per_token(options, length) for name, length in lengths.items()}
    results = with_speeds(seconds, options.batch * options.segment)
    for result in results:
        result.figures["multiplications_per_token"] = multiplications[result.name]
    attention = (options.memory + options.segment) / options.segment
    ratios = [
        paired("with / without, throughput", seconds["without"], seconds["with"]),
        Ratio("by the multiplications", [multiplications["without"] / multiplications["with"]]),
        Ratio("by the attention lengths alone", [1 / attention]),
    ]
    chosen = {name: getattr(options, name) for name in ("positions", *SIZES, "compile")}
    return Comparison("decoder", chosen, results, ratios)


def multiplications_per_token(options: argparse.Namespace, memory: int) -> float:
    """Of one token of a forward pass, all layers and the vocabulary; backward takes twice as many again.

    Queries, outputs and feed-forward are computed for the segment, keys and values for all that attention sees. Scores
    and sums take one multiplication each per entry and channel, scores by distance one more.
    """
    hidden, seen = options.hidden, memory + options.segment
    by_segment = 2 * hidden**2 + 8 * hidden**2
    by_context = 2 * hidden**2 * seen / options.segment
    attention = (3 if options.positions == "relative" else 2) * seen * hidden
    return options.layers * (by_segment + by_context + attention) + options.vocabulary * hidden


def _training_step(options: argparse.Namespace, memory: int, setting: Setting) -> Callable[[], None]:
    """Forward, backward and update, with a memory that is full."""
    config = DecoderConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        feed_forward_size=4 * options.hidden,
        positions=options.positions,
        memory=MemoryConfig(memory) if memory else None,
        segment_length=options.segment,
    )
    model = DecoderForCausalLM(config)
    model.to(setting.device)  # type: ignore[arg-type] # whose decorator hides its own self
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(options.vocabulary, (options.batch, options.segment), device=setting.device)
    full = None
    for _ in range(-(-memory // options.segment)):
        with torch.no_grad():
            full = model(tokens, state=full, return_logits=False).state
    if options.compile:
        model.compile()

    def step() -> None:
        with setting.autocast():
            loss = model(tokens, targets=tokens, state=full).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
