"""The kernels on a GPU, or without one on the processor in Triton's interpreter."""

import itertools
import math
import os
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from infformer.continuous import naive
from infformer.continuous.basis import GaussianBasis, negligible

if find_spec("triton") is None:
    pytest.skip(
        "triton comes with PyTorch's CUDA builds; `pip install triton` beside the CPU build", allow_module_level=True
    )

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
where_kernels_run = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_kernels_in_the_interpreter.py"
)


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    from infformer.continuous import gaussian_read_triton

    if DEVICE == "cpu":
        multiply_bfloat16_as_floats(monkeypatch)
    return gaussian_read_triton


def multiply_bfloat16_as_floats(monkeypatch) -> None:
    """Triton's interpreter keeps bfloat16 as integers of the same bits, and would multiply those."""
    from triton.runtime import interpreter

    def floats(operand):
        if operand.dtype != interpreter.tl.bfloat16:
            return operand
        numbers = (operand.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(numbers, interpreter.tl.float32)

    def create_dot(self, one, other, *rest):
        return multiply(self, floats(one), floats(other), *rest)

    multiply = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def compare(
    kernels: ModuleType,
    mean: torch.Tensor,
    variance: torch.Tensor,
    basis: GaussianBasis,
    widths: int,
    size: int = 5,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 5e-6,
) -> None:
    """Values and gradients against the literal form in float64, each query's densities apart."""
    generator = torch.Generator().manual_seed(1)
    shape = (*mean.shape[:2], len(basis.centres), size)
    values = torch.randn(shape, generator=generator).to(dtype)
    upstream = torch.randn(*mean.shape, size, generator=generator).to(dtype)
    inputs = [tensor.double().requires_grad_() for tensor in (mean, variance, values)]
    exact_basis = (basis.centres.double(), basis.widths.double())
    expected = naive.gaussian_expectation(inputs[0], inputs[1], exact_basis) @ inputs[2]
    arguments = (mean, variance, basis.centres[::widths], basis.widths[:widths], values)
    arguments = tuple(tensor.to(DEVICE) for tensor in arguments)
    of_densities, of_values = kernels.read_backward(upstream.to(DEVICE), *arguments)
    actual = [kernels.read(*arguments), *of_densities, of_values]
    wanted = [expected, *torch.autograd.grad(expected, inputs, upstream.double())]
    for one, other, type_ in zip(actual, wanted, (dtype, torch.float32, torch.float32, dtype), strict=True):
        assert one.dtype == type_
        assert one.shape == other.shape
        assert (one.cpu() - other).norm() <= tolerance * other.norm()


SIZES = [
    (2, 1, 7, 33, [0.005, 0.01], 5),
    (1, 3, 65, 6, [0.05], 16),
    (1, 1, 1, 2, [0.02, 0.05, 0.2], 3),
    (1, 1, 130, 70, [0.02, 0.2], 64),
    (1, 1, 128, 64, [0.01], 128),
    (1, 1, 9, 40, [0.01, 0.02], 80),
]


SHORTER = ((torch.bfloat16, 1e-2), (torch.float16, 1e-3))
READ = [
    *((*sizes, torch.float32, 5e-6) for sizes in SIZES),
    *((*SIZES[0], *shorter) for shorter in SHORTER),
    *(pytest.param(*sizes, *shorter, marks=pytest.mark.slow) for sizes in SIZES[1:] for shorter in SHORTER),
]


@where_kernels_run
@pytest.mark.parametrize(("batch", "heads", "queries", "centres", "widths", "size", "dtype", "tolerance"), READ)
def test_values_and_gradients_are_those_of_the_literal_form(
    kernels, batch, heads, queries, centres, widths, size, dtype, tolerance
):
    """The first queries are at both ends of the line, the narrowest and very wide."""
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(2, batch, heads, queries, generator=generator)
    variance = 1e-3 + variance
    for query, (place, spread) in enumerate(itertools.islice(itertools.product([0.0, 1.0], [1e-4, 10.0]), queries)):
        mean[..., query], variance[..., query] = place, spread
    basis = GaussianBasis.even_grid(centres * len(widths), widths, dtype=torch.float32)
    compare(kernels, mean, variance, basis, len(widths), size, dtype, tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter knows of no TF32")
@pytest.mark.parametrize(("batch", "heads", "queries", "centres", "widths", "size"), SIZES)
def test_tf32_is_near_the_literal_form(kernels, batch, heads, queries, centres, widths, size, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    mean, variance = torch.rand(2, batch, heads, queries, generator=torch.Generator().manual_seed(0))
    basis = GaussianBasis.even_grid(centres * len(widths), widths, dtype=torch.float32)
    compare(kernels, mean, 1e-3 + variance, basis, len(widths), size, tolerance=1e-3)


@where_kernels_run
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("variance", "start"), [(1e-4, 0.0), (1e-2, 0.7)])
def test_tiles_without_density_are_left_out_and_nothing_is_missing(kernels, variance, start, dtype):
    """Blocks of queries in two places: most of 128 centres lie beyond the reach of the narrow ones."""
    basis = GaussianBasis.even_grid(256, [0.005, 0.01], dtype=torch.float32)
    mean = torch.cat([torch.linspace(start, start + 0.05, 70), torch.linspace(1 - start, 0.95 - start, 90)])
    mean = mean.view(1, 1, -1)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    compare(kernels, mean, torch.full_like(mean, variance), basis, 2, dtype=dtype, tolerance=tolerance)


@where_kernels_run
def test_what_is_left_out_is_negligible(kernels, monkeypatch):
    """All of the signal's value lies where no tile is computed, just beyond the limit of a narrow density."""
    basis = GaussianBasis.even_grid(512, [0.005, 0.01], dtype=torch.float32)
    mean, variance = torch.full((1, 1, 1), 0.0), torch.full((1, 1, 1), 1e-4)
    values = torch.zeros(1, 1, 512, 1)
    forward, backward = kernels.tiles(values)
    values[:, :, 2 * forward.centres :] = 1  # the first block of centres is within reach, and has no value
    arguments = tuple(x.to(DEVICE) for x in (mean, variance, basis.centres[::2], basis.widths[:2], values))
    height = 1 / math.sqrt(2 * math.pi * 1e-4)
    expected = (naive.gaussian_expectation(mean, variance, basis) @ values).item()
    assert abs(kernels.read(*arguments).item() - expected) < 512 * negligible(torch.float32) * height
    monkeypatch.setattr(kernels, "negligible", lambda dtype: 0.5)  # a limit that would be noticed
    assert kernels.read(*arguments).item() == 0
    _, of_values = kernels.read_backward(torch.ones(1, 1, 1, 1, device=DEVICE), *arguments)
    assert of_values[:, :, : 2 * backward.centres].any()
    assert not of_values[:, :, 2 * backward.centres :].any()
    assert expected > 0


@where_kernels_run
def test_a_nan_stays_in_its_query(kernels):
    """Also where no other query of its block reaches anything: that a loss has become NaN is not hidden here."""
    basis = GaussianBasis.even_grid(64, [0.01], dtype=torch.float32)
    for field in range(2):
        density = [torch.full((1, 1, 5), -9.0), torch.full((1, 1, 5), 1e-4)]
        density[field][..., 2] = math.nan
        arguments = [x.to(DEVICE) for x in (*density, basis.centres, basis.widths[:1], torch.ones(1, 1, 64, 3))]
        read = kernels.read(*arguments)
        of_densities, _ = kernels.read_backward(torch.ones_like(read), *arguments)
        assert read[..., 2, :].isnan().all()
        assert of_densities[..., 2].isnan().all()
        assert (read[..., [0, 1, 3, 4], :] == 0).all()
        assert (of_densities[..., [0, 1, 3, 4]] == 0).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter does one thing after the other")
def test_the_same_inputs_give_the_same_bits(kernels):
    generator = torch.Generator().manual_seed(0)
    basis = GaussianBasis.even_grid(192, [0.01, 0.03], dtype=torch.float32)
    mean, variance = torch.rand(2, 1, 2, 70, generator=generator)
    values, upstream = (torch.randn(1, 2, rows, 16, generator=generator) for rows in (192, 70))
    arguments = [x.to(DEVICE) for x in (mean, 1e-3 + variance, basis.centres[::2], basis.widths[:2], values)]
    first, *others = (
        (kernels.read(*arguments), *kernels.read_backward(upstream.to(DEVICE), *arguments)) for _ in range(4)
    )
    for again in others:
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


@where_kernels_run
def test_nothing_is_read_of_nothing(kernels):
    basis = GaussianBasis.even_grid(8, [0.1], dtype=torch.float32)
    for batch, queries in ((2, 4), (0, 4), (2, 0)):
        places, values = torch.full((batch, 3, queries), 0.5), torch.zeros(batch, 3, 8, 5)
        arguments = tuple(x.to(DEVICE) for x in (places, places, basis.centres, basis.widths[:1], values))
        upstream = torch.zeros(batch, 3, queries, 5, device=DEVICE)
        assert torch.equal(kernels.read(*arguments), upstream)
        of_densities, of_values = kernels.read_backward(upstream, *arguments)
        assert torch.equal(of_densities, torch.zeros(2, batch, 3, queries, device=DEVICE))
        assert torch.equal(of_values, torch.zeros_like(arguments[-1]))
