import itertools
import math

import pytest
import torch
from torch import Tensor

from infformer.continuous import gaussian_read as module
from infformer.continuous import naive
from infformer.continuous.basis import GaussianGrid
from infformer.continuous.gaussian_read import gaussian_read

WIDTHS = {1: [0.04], 2: [0.005, 0.01], 3: [0.02, 0.05, 0.2]}
Inputs = tuple[Tensor, Tensor, Tensor]


def grid_of(centres: int, widths: int, dtype: torch.dtype = torch.float64) -> GaussianGrid:
    return GaussianGrid(torch.linspace(0, 1, centres, dtype=dtype), torch.tensor(WIDTHS[widths], dtype=dtype))


def inputs_of(grid: GaussianGrid, batch: int, heads: int, queries: int, size: int = 5) -> Inputs:
    """Mean, variance and values; the first queries are at both ends of the line, the narrowest and very wide."""
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(2, batch, heads, queries, generator=generator, dtype=torch.float64)
    variance = 1e-3 + 0.3 * variance.square()
    extremes = itertools.islice(itertools.product([0.0, 1.0], [1e-4, 10.0]), queries)
    for query, (place, spread) in enumerate(extremes):
        mean[..., query], variance[..., query] = place, spread
    functions = len(grid.centres) * len(grid.widths)
    values = torch.randn(batch, heads, functions, size, generator=generator, dtype=torch.float64)
    mean, variance, values = (tensor.to(grid.centres).requires_grad_() for tensor in (mean, variance, values))
    return mean, variance, values


def literal(inputs: Inputs, grid: GaussianGrid) -> Tensor:
    mean, variance, values = inputs
    centres = torch.tensor([centre for centre in grid.centres.tolist() for _ in grid.widths], dtype=mean.dtype)
    widths = torch.tensor(grid.widths.tolist() * len(grid.centres), dtype=mean.dtype)
    return naive.gaussian_expectation(mean, variance, (centres, widths)) @ values


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def gradients(result: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(result, inputs, upstream.to(result))


def difference(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).detach().norm() / expected.detach().norm()).nan_to_num(0.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "centres", "widths"),
    [(2, 3, 7, 65, 2), (1, 1, 1, 2, 3), (3, 1, 513, 6, 1), (1, 3, 6, 43, 3), (2, 2, 40, 130, 1), (1, 2, 5, 3, 2)],
)
def test_values_and_gradients_are_those_of_the_literal_form(batch, heads, queries, centres, widths, dtype, tolerance):
    grid = grid_of(centres, widths, dtype)
    inputs = inputs_of(grid, batch, heads, queries)
    result = gaussian_read(inputs[0], inputs[1], *grid, inputs[2])
    exact_inputs = tuple(exact(tensor) for tensor in inputs)
    expected = literal(exact_inputs, GaussianGrid(*(field.double() for field in grid)))
    assert result.dtype == dtype
    assert difference(result, expected) < tolerance
    for actual, wanted in zip(gradients(result, inputs), gradients(expected, exact_inputs), strict=True):
        assert actual.shape == wanted.shape
        assert difference(actual, wanted) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_a_shorter_type_are_read_and_have_gradients_of_it(dtype):
    grid = grid_of(43, 2, torch.float32)
    mean, variance, values = inputs_of(grid, 2, 3, 7)
    inputs = (mean, variance, values.detach().to(dtype).requires_grad_())
    exact_inputs = tuple(exact(tensor) for tensor in inputs)
    result = gaussian_read(mean, variance, *grid, inputs[2])
    expected = literal(exact_inputs, GaussianGrid(*(field.double() for field in grid)))
    assert result.dtype == dtype
    assert difference(result, expected) < 1e-2
    for actual, wanted in zip(gradients(result, inputs), gradients(expected, exact_inputs), strict=True):
        assert difference(actual, wanted) < 1e-2


@pytest.mark.parametrize("variance", [1e-4, 1e-2, 10.0])
def test_gradients_keep_their_digits_where_densities_are_narrow_or_wide(variance):
    """Each query apart: in a norm over all of them the narrow ones would hide the wide ones."""
    grid = grid_of(256, 2, torch.float32)
    _, _, values = inputs_of(grid, 1, 1, 1)
    mean = torch.linspace(0, 1, 33).view(1, 1, -1).requires_grad_()
    inputs = (mean, torch.full_like(mean, variance).requires_grad_(), values)
    exact_inputs = tuple(exact(tensor) for tensor in inputs)
    expected = literal(exact_inputs, GaussianGrid(*(field.double() for field in grid)))
    result = gaussian_read(inputs[0], inputs[1], *grid, values)
    for actual, wanted in zip(gradients(result, inputs), gradients(expected, exact_inputs), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("at_once", [1, 12, 100, 399, 10**6])
def test_tiles_change_nothing(at_once, monkeypatch):
    """From a single query of a single row at a time to everything at once."""
    grid = grid_of(6, 2)
    inputs = inputs_of(grid, 2, 3, 11)
    expected = gaussian_read(inputs[0], inputs[1], *grid, inputs[2])
    of_expected = gradients(expected, inputs)
    monkeypatch.setattr(module, "CACHED_EXPECTATIONS", at_once)
    result = gaussian_read(inputs[0], inputs[1], *grid, inputs[2])
    for actual, wanted in zip((result, *gradients(result, inputs)), (expected, *of_expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-13, atol=1e-13)


def test_any_layout_in_memory_gives_the_same():
    """As a layer hands them over: heads and tokens in another order, an upstream gradient that is one number."""
    grid = grid_of(9, 2)
    inputs = inputs_of(grid, 2, 3, 4)
    turned = tuple(tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs)
    for one, other in zip(
        torch.autograd.grad(gaussian_read(turned[0], turned[1], *grid, turned[2]).sum(), turned),
        torch.autograd.grad(literal(inputs, grid).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_is_read_of_nothing():
    grid = grid_of(5, 2, torch.float32)
    mean, variance, values = inputs_of(grid, 2, 2, 4)
    assert torch.equal(gaussian_read(mean, variance, *grid, torch.zeros_like(values)), torch.zeros(2, 2, 4, 5))


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_no_rows_and_no_queries_give_nothing(batch, queries):
    grid = grid_of(5, 2, torch.float32)
    inputs = inputs_of(grid, batch, 3, queries)
    result = gaussian_read(inputs[0], inputs[1], *grid, inputs[2])
    assert result.shape == (batch, 3, queries, 5)
    for gradient, tensor in zip(gradients(result, inputs), inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_a_nan_stays_in_its_query():
    """Where a loss has become NaN, that is to be said there, and not hidden here."""
    grid = grid_of(5, 2)
    mean, variance, values = (tensor.detach() for tensor in inputs_of(grid, 1, 1, 4))
    mean[..., 2] = math.nan
    result = gaussian_read(mean, variance, *grid, values)
    assert result[..., 2, :].isnan().all()
    assert result[..., [0, 1, 3], :].isfinite().all()


def test_the_operators_keep_their_promises_to_the_compiler():
    """Their shapes, layouts and gradients are what tracing is told they are."""
    grid = grid_of(6, 2)
    mean, variance, values = inputs_of(grid, 2, 3, 4)
    torch.library.opcheck(torch.ops.infformer.gaussian_read, (mean, variance, *grid, values))
    detached = [tensor.detach() for tensor in (mean, variance, *grid, values)]
    upstream = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.infformer.gaussian_read_backward, (upstream, *detached))
