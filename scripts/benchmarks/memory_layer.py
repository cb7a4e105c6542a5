"""One layer's memory, alone: ours against the literal equations; reading, writing, or both."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import arithmetic
from benchmarks.arithmetic import NO_WORK, Sizes
from benchmarks.machine import Setting
from benchmarks.measuring import peak_extra_bytes, profile_table, take_turns
from benchmarks.models import add_sizes, memory_config, model_sizes
from benchmarks.report import Comparison, Ratio, Result, paired
from infformer.continuous import naive
from infformer.continuous.density import Density, Gaussian
from infformer.memory.long_term import LongTermMemory, LongTermState, Projected, Reading
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.signal import ContinuousSignal, WriteOperators

SIZES = {"batch": 1, "segment": 512, "functions": 512, "samples": 512, "hidden": 768, "heads": 12}
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}
"""By how much the two may differ, as a part of the largest entry, before a comparison means nothing."""


class LiteralMemory(LongTermMemory):
    """The same weights, read and written by the literal equations.

    The basis and the operator of a later segment are made once, as in the published code; it has no first segments.
    """

    literal_centres: Tensor
    literal_widths: Tensor
    operator: Tensor

    def __init__(self, config: LongTermMemoryConfig, hidden_size: int, heads: int, signal: ContinuousSignal) -> None:
        super().__init__(config, hidden_size, heads, signal)
        grid = torch.linspace(0, 1, config.basis_functions // len(config.widths), dtype=torch.float64)
        basis = torch.tensor([(centre, width) for centre in grid for width in config.widths], dtype=torch.float64)
        centres, widths = basis.unbind(dim=1)
        operator = naive.next_operator(
            signal.segment_length,
            config.past_samples,
            config.contraction_rate,
            (centres, widths),
            config.ridge,
            before=0.0 if config.sticky_placement == "published" else 0.5,
        )
        for name, tensor in {"literal_centres": centres, "literal_widths": widths, "operator": operator}.items():
            self.register_buffer(name, tensor.float(), persistent=False)

    @property
    def literal_basis(self) -> naive.Basis:
        return self.literal_centres, self.literal_widths

    def read(self, hidden: Tensor, state: LongTermState, projected: Projected | None = None) -> Reading:
        with torch.autocast(hidden.device.type, enabled=False):
            weights = naive.Weights(self.query.weight, self.key.weight, self.value.weight, self.output.weight)
            to_mean, to_variance = self.placement.weight
            context, mean, variance = naive.affine_read(
                hidden.float(), state.coefficients, weights, to_mean, to_variance, self.heads, self.literal_basis
            )
        return Reading(context, Gaussian(mean, variance))

    def write(
        self,
        hidden: Tensor,
        state: LongTermState,
        operators: WriteOperators | None,
        attention: Density,
        noise: Tensor | None = None,
        complete: Tensor | None = None,
    ) -> LongTermState:
        assert isinstance(attention, Gaussian)
        with torch.autocast(hidden.device.type, enabled=False):
            with torch.no_grad():
                mass = naive.histogram(naive.gaussian_cumulative(*attention), self.config.sticky_bins)
                positions = naive.resample(mass, self.config.past_samples, noise)
            written = naive.write(state.coefficients, hidden.float(), self.operator, self.literal_basis, positions)
        return LongTermState(written, state.segments + 1)


def add_commands(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`read`, `write` and `layer`."""
    helps = {
        "read": "one layer's read of the memory, forward and backward, against the literal equations",
        "write": "one layer's write, forward and backward, against the literal equations",
        "layer": "one layer's read and write, forward and backward, against the literal equations",
    }
    for name, text in helps.items():
        parser = commands.add_parser(name, help=text, parents=parents)
        add_sizes(parser, **SIZES)
        parser.add_argument("--rounds", type=int, default=20)
        parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Time and memory of both, after they were found to compute the same.

    Raises:
        ArithmeticError: they do not.
    """
    sizes = model_sizes(options, "gpt2")
    passes = new_passes(sizes, options.command, setting, options.compile)
    _check_agreement(passes, setting.precision)
    seconds = take_turns(passes, options.rounds, options.warmup, setting.clock)
    work = NO_WORK
    if options.command != "write":
        work += arithmetic.read(sizes, backward=True)
    if options.command != "read":
        work += arithmetic.write(sizes, backward=True)
    peaks = {name: peak_extra_bytes(each, setting.device) for name, each in passes.items()}
    results = [Result(name, seconds[name], work, figures={"peak_extra_bytes": peaks[name]}) for name in passes]
    own = [name for name in passes if name != "naive"]
    ratios = [paired(f"naive / {name}, time", seconds["naive"], seconds[name]) for name in own]
    ratios += [Ratio(f"{name} / naive, peak extra memory", [peaks[name] / peaks["naive"]]) for name in own]
    profiles = {name: profile_table(each, setting.device) for name, each in passes.items()} if options.profile else {}
    chosen = {name: getattr(options, name) for name in (*SIZES, "compile")}
    return Comparison(options.command, chosen, results, ratios, profiles)


def new_passes(sizes: Sizes, command: str, setting: Setting, compiled: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """`ours` and `naive`: calls that return what is computed, and the gradients of all that goes in.

    The segment and the old signal go in, and where something is read the memory's weights; so does the gradient of what
    comes out. Before, two segments were written. Where asked for, `ours, compiled` stands between the two.
    """
    torch.manual_seed(0)
    config = memory_config(sizes)
    signal = ContinuousSignal(config, sizes.segment)
    ours = LongTermMemory(config, sizes.hidden, sizes.heads, signal)
    nn.init.normal_(ours.output.weight, std=0.02)
    literal = LiteralMemory(config, sizes.hidden, sizes.heads, signal)
    literal.load_state_dict(ours.state_dict())
    ours.to(setting.device)
    literal.to(setting.device)

    shape = (sizes.batch, sizes.segment, sizes.hidden)
    segments = [torch.randn(shape, device=setting.device) for _ in range(3)]
    state = ours.initial_state(sizes.batch)
    with torch.no_grad():
        for earlier in segments[:2]:
            attention = ours.read(earlier, state).attention
            state = ours.write(earlier, state, signal.operators(state.segments), attention)
    upstream = [torch.randn(shape, device=setting.device), torch.randn_like(state.coefficients)]
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    for name, memory in {"ours": ours, "naive": literal}.items():
        with torch.no_grad():
            attention = memory.read(segments[2], state).attention
        calls[name] = _new_pass(memory, command, setting, segments[2], state, attention, upstream)
        if compiled and memory is ours:
            calls["ours, compiled"] = _new_pass(
                memory, command, setting, segments[2], state, attention, upstream, torch.compile
            )
    return calls


def _new_pass(
    memory: LongTermMemory,
    command: str,
    setting: Setting,
    segment: Tensor,
    state: LongTermState,
    looked: Density,
    upstream: list[Tensor],
    transform: Callable[[Any], Any] = lambda function: function,
) -> Callable[[], list[Tensor]]:
    """One forward and backward pass.

    Args:
        looked: where the segment looked, for a write alone.
        upstream: gradients of the context and of the coefficients.
        transform: of the forward pass, such as `torch.compile`.
    """
    hidden = segment.clone().requires_grad_()
    coefficients = state.coefficients.clone().requires_grad_()
    before = LongTermState(coefficients, state.segments)
    operators = memory.signal.operators(state.segments)
    inputs = [hidden, coefficients, *(() if command == "write" else memory.parameters())]
    gradients = {"read": upstream[:1], "write": upstream[1:], "layer": upstream}[command]

    @transform
    def forward(hidden: Tensor, before: LongTermState) -> list[Tensor]:
        outputs, attention = [], looked
        if command != "write":
            reading = memory.read(hidden, before)
            outputs.append(reading.context)
            attention = reading.attention
        if command != "read":
            outputs.append(memory.write(hidden, before, operators, attention).coefficients)
        return outputs

    def whole_pass() -> list[Tensor]:
        with setting.autocast():
            outputs = forward(hidden, before)
        return [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]

    return whole_pass


def _check_agreement(passes: dict[str, Callable[[], list[Tensor]]], precision: str) -> None:
    expected = passes["naive"]()
    for name, computed in passes.items():
        for one, other in zip(computed(), expected, strict=True):
            difference = ((one - other).abs().max() / other.abs().max()).item()
            if not difference <= AGREEMENT[precision]:
                raise ArithmeticError(
                    f"{name} and the literal equations differ by {difference:.1e} of the largest entry, and may by "
                    f"{AGREEMENT[precision]:.0e}: a comparison of their speed would mean nothing"
                )
