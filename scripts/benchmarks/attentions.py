"""An encoder's layer with each mechanism of attention: seconds and memory by the length of the text, beside softmax.

Sizes are those of Long-Range Arena's two towers unless others are given.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import Setting
from benchmarks.measuring import peak_extra_bytes, profile_table, summarize, take_turns
from benchmarks.models import add_sizes
from benchmarks.report import Comparison, Ratio, Result, paired
from infformer.models.encoder import ClassifierConfig, TextClassifier
from infformer.models.mechanisms import mechanism_kinds
from infformer.results import BenchmarkFigures

BASELINES = ("softmax", "softmax written out")
"""As torch computes it, without ever having all weights at once, and with them in memory, as the published table has
it."""


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`attention`."""
    text = "an encoder's layer with each mechanism of attention, against softmax, by the length of the text"
    parser = commands.add_parser("attention", help=text, parents=parents)
    parser.add_argument("--attentions", nargs="*", default=sorted(mechanism_kinds()), choices=sorted(mechanism_kinds()))
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 3072, 4096])
    parser.add_argument("--alone", type=int, nargs="*", default=[], help="more lengths, without softmax")
    parser.add_argument("--forward", action="store_true", help="forward alone")
    add_sizes(parser, batch=1, hidden=128, heads=4)
    parser.add_argument("--feed-forward", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """All of one length take turns; memory is what one call takes beside weights and input."""
    results: list[Result] = []
    ratios: list[Ratio] = []
    profiles: dict[str, str] = {}
    names = list(dict.fromkeys([*BASELINES, *options.attentions]))
    medians: dict[str, dict[int, float]] = {name: {} for name in names}
    for length in sorted({*options.lengths, *options.alone}):
        here = names if length in options.lengths else names[len(BASELINES) :]
        passes = {name: new_pass(name, length, options, setting) for name in here}
        seconds = take_turns(passes, options.rounds, options.warmup, setting.clock)
        peaks = {name: peak_extra_bytes(each, setting.device) for name, each in passes.items()}
        for name in here:
            medians[name][length] = summarize(seconds[name]).median
            figures: BenchmarkFigures = {"text_tokens": length, "peak_extra_bytes": peaks[name]}
            results.append(Result(f"{name} {length}", seconds[name], figures=figures))
            for baseline in BASELINES:
                if baseline in here and name not in BASELINES:
                    ratios.append(paired(f"{baseline} / {name}, time at {length}", seconds[baseline], seconds[name]))
                    ratios.append(Ratio(f"{name} / {baseline}, memory at {length}", [peaks[name] / peaks[baseline]]))
            if options.profile:
                profiles[f"{name} {length}"] = profile_table(passes[name], setting.device)
    ratios += [Ratio(f"{name}, exponent of time", [growth_exponent(of)]) for name, of in medians.items() if len(of) > 1]
    chosen = {name: getattr(options, name) for name in ("batch", "hidden", "heads", "feed_forward", "forward")}
    return Comparison("attention", chosen, results, ratios, profiles)


def growth_exponent(seconds: dict[int, float]) -> float:
    """The slope of log seconds over log length, by least squares."""
    points = [(math.log(length), math.log(taken)) for length, taken in seconds.items()]
    middle = [sum(values) / len(points) for values in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return above / sum((x - middle[0]) ** 2 for x, _ in points)


def new_pass(name: str, length: int, options: argparse.Namespace, setting: Setting) -> Callable[[], Sequence[object]]:
    """A call that takes a text through a layer, and the gradients of all that goes in back."""
    torch.manual_seed(0)
    config = ClassifierConfig(
        hidden_size=options.hidden, num_hidden_layers=1, num_attention_heads=options.heads,
        feed_forward_size=options.feed_forward, attention=name.split()[0], longest=length, dropout=0.0,
    )  # fmt: skip
    model = TextClassifier(config)
    model.to(setting.device)  # type: ignore[arg-type] # whose decorator hides its own self
    layer = model.layers[0]
    hidden = torch.randn(
        options.batch, length, options.hidden, device=setting.device, requires_grad=not options.forward
    )
    upstream = torch.randn_like(hidden)
    real = torch.ones(options.batch, length, dtype=torch.bool, device=setting.device)
    call = torch.compile(layer) if options.compile else layer
    written_out = name == "softmax written out"

    def whole_pass() -> Sequence[object]:
        kernel = sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()
        with setting.autocast(), torch.set_grad_enabled(not options.forward), kernel:
            output = call(model.sizes.begin(hidden), real).hidden
        return (output,) if options.forward else torch.autograd.grad(output, [hidden, *layer.parameters()], upstream)

    return whole_pass
