import pytest
import torch
from torch import Tensor

from infformer.memory.long_term import LongTermState

OPTIONS = {
    "constant": {},
    "sticky": {"sticky": True},
    "uniform": {"contraction": "uniform"},
    "parabola-sticky": {"density": "truncated_parabola", "sticky": True},
    "moments-gate": {"read": "moments", "input_gate": True},
    "slots-sticky": {"read": "slots", "sticky": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_segment_is_one_graph_whatever_the_rows_have_read(build_memory, options):
    """Read and write, compiled once: for empty rows, used ones, a reset one and one whose segment is not whole."""
    memory = build_memory(torch.float32, **options)

    def step(hidden: Tensor, coefficients: Tensor, segments: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = LongTermState(coefficients, segments)
        reading = memory.read(hidden, state)
        operators = memory.signal.operators(segments)
        after = memory.write(hidden, state, operators, reading.attention, complete=whole)
        return reading.context, after.coefficients, memory.divergence(reading.attention)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for segments, whole in (([0, 0], [1, 1]), ([1, 1], [1, 1]), ([2, 0], [1, 1]), ([3, 1], [1, 0])):
            written = torch.tensor(segments)
            hidden = torch.randn(2, 12, 6, generator=generator)
            coefficients = torch.randn(2, 16, 6, generator=generator) * (written > 0).view(-1, 1, 1)
            results = []
            for run in (compiled, step):
                inputs = [hidden.clone().requires_grad_(), coefficients.clone().requires_grad_()]
                outputs = run(*inputs, written, torch.tensor(whole, dtype=torch.bool))
                loss = sum(output.square().sum() for output in outputs)
                results.append([*outputs, *torch.autograd.grad(loss, [*inputs, *memory.parameters()])])
            for actual, expected in zip(*results, strict=True):
                scale = float(expected.detach().abs().max())
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))
