"""The innermost product alone: values read with normal densities, against the expectations as a whole times the values.

The second is the formula in torch's own operators, which keeps several numbers for every query and every function. On
CUDA the first is a kernel of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import arithmetic
from benchmarks.arithmetic import Sizes, Work
from benchmarks.machine import PRECISIONS, Setting
from benchmarks.measuring import peak_extra_bytes, take_turns
from benchmarks.models import add_sizes, memory_config, model_sizes
from benchmarks.report import Comparison, Ratio, Result, paired
from infformer.continuous.density import Gaussian
from infformer.memory.signal import ContinuousSignal


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`density`."""
    text = "the read's innermost product, forward and backward, against the formula in torch's own operators"
    parser = commands.add_parser("density", help=text, parents=parents)
    add_sizes(parser, batch=1, segment=512, functions=512, hidden=768, heads=12)
    parser.add_argument("--deviation", type=float, default=0.05, help="of the densities, as a part of the memory")
    parser.add_argument("--rounds", type=int, default=20)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Both with the same densities, whose means lie anywhere, and values of the type that autocast would give them."""
    sizes = model_sizes(options, "gpt2")
    passes = new_passes(sizes, options.deviation, setting)
    seconds = take_turns(passes, options.rounds, options.warmup, setting.clock)
    peaks = {name: peak_extra_bytes(each, setting.device) for name, each in passes.items()}
    work = arithmetic.density_read(sizes, backward=True)
    work = Work(work.flops, work.bytes * PRECISIONS[setting.precision].itemsize / arithmetic.FLOAT)
    results = [Result(name, seconds[name], work, figures={"peak_extra_bytes": peaks[name]}) for name in passes]
    ratios = [
        paired("eager / ours, time", seconds["eager"], seconds["ours"]),
        Ratio("ours / eager, peak extra memory", [peaks["ours"] / peaks["eager"]]),
    ]
    chosen = {
        name: getattr(options, name) for name in ("batch", "segment", "functions", "hidden", "heads", "deviation")
    }
    return Comparison("density", chosen, results, ratios)


def new_passes(sizes: Sizes, deviation: float, setting: Setting) -> dict[str, Callable[[], list[Tensor]]]:
    """`ours` and `eager`: calls that return what is read, and the gradients of means, variances and values."""
    torch.manual_seed(0)
    signal = ContinuousSignal(memory_config(sizes), sizes.segment).to(setting.device)
    shape = (sizes.batch, sizes.heads, sizes.segment)
    size = sizes.hidden // sizes.heads
    mean = torch.rand(shape, device=setting.device, requires_grad=True)
    variance = torch.full(shape, deviation**2, device=setting.device, requires_grad=True)
    values, upstream = (
        torch.randn(*shape[:2], rows, size, device=setting.device).to(PRECISIONS[setting.precision])
        for rows in (sizes.basis_functions, sizes.segment)
    )
    values.requires_grad_()

    def ours() -> Tensor:
        return Gaussian(mean, variance).read(signal.grid, values)

    def eager() -> Tensor:
        return Gaussian(mean, variance).expectation(signal.basis).to(values) @ values

    def whole_pass(forward: Callable[[], Tensor]) -> list[Tensor]:
        read = forward()
        return [read, *torch.autograd.grad(read, [mean, variance, values], upstream)]

    return {"ours": lambda: whole_pass(ours), "eager": lambda: whole_pass(eager)}
