"""The kernels on a GPU, or without one on the processor in Triton's interpreter."""

import math
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from infformer.continuous import naive
from infformer.continuous.basis import GaussianBasis, negligible

pytest.importorskip("triton", reason="comes with PyTorch's CUDA builds; `pip install triton` beside the CPU build")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
where_kernels_run = pytest.mark.skipif(not CAN_RUN, reason="run by test_the_kernels_hold_in_the_interpreter")


@pytest.mark.skipif(CAN_RUN, reason="the kernels run here")
def test_the_kernels_hold_in_the_interpreter():
    """In a process of its own: what Triton brings along is compiled or interpreted from its import on."""
    options = ["-q", "-n", "0", "--dist", "no", "-p", "no:cacheprovider", "--noconftest"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.fixture
def kernels() -> ModuleType:
    from infformer.continuous import gaussian_read_triton

    return gaussian_read_triton


def compare(kernels: ModuleType, mean: torch.Tensor, variance: torch.Tensor, basis: GaussianBasis, widths: int, size=5):
    """Values and gradients against the literal form in float64."""
    generator = torch.Generator().manual_seed(1)
    shape = (*mean.shape[:2], len(basis.centres), size)
    values = torch.randn(shape, generator=generator)
    upstream = torch.randn(*mean.shape, size, generator=generator)
    inputs = [tensor.double().requires_grad_() for tensor in (mean, variance, values)]
    exact_basis = (basis.centres.double(), basis.widths.double())
    expected = naive.gaussian_expectation(inputs[0], inputs[1], exact_basis) @ inputs[2]
    arguments = (mean, variance, basis.centres[::widths], basis.widths[:widths], values)
    arguments = tuple(tensor.to(DEVICE) for tensor in arguments)
    actual = [kernels.read(*arguments), *kernels.read_backward(upstream.to(DEVICE), *arguments)]
    wanted = [expected, *torch.autograd.grad(expected, inputs, upstream.double())]
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert (one.cpu() - other).norm() <= 5e-6 * other.norm()


@where_kernels_run
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "centres", "widths", "size"),
    [(2, 1, 7, 33, [0.005, 0.01], 5), (1, 3, 65, 6, [0.05], 16), (1, 1, 1, 2, [0.02, 0.05, 0.2], 3)],
)
def test_values_and_gradients_are_those_of_the_literal_form(kernels, batch, heads, queries, centres, widths, size):
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(2, batch, heads, queries, generator=generator)
    basis = GaussianBasis.even_grid(centres * len(widths), widths, dtype=torch.float32)
    compare(kernels, mean, 1e-3 + variance, basis, len(widths), size)


@where_kernels_run
@pytest.mark.parametrize(("variance", "start"), [(1e-4, 0.0), (1e-2, 0.7)])
def test_tiles_without_density_are_left_out_and_nothing_is_missing(kernels, variance, start):
    """A block of queries in one place: most of 256 centres lie beyond the reach of the narrow ones."""
    basis = GaussianBasis.even_grid(512, [0.005, 0.01], dtype=torch.float32)
    mean = torch.linspace(start, start + 0.05, 9).view(1, 1, -1)
    compare(kernels, mean, torch.full_like(mean, variance), basis, 2)


@where_kernels_run
def test_what_is_left_out_is_negligible(kernels, monkeypatch):
    """All of the signal's value lies where no tile is computed, just beyond the limit of a narrow density."""
    basis = GaussianBasis.even_grid(512, [0.005, 0.01], dtype=torch.float32)
    mean, variance = torch.full((1, 1, 1), 0.0), torch.full((1, 1, 1), 1e-4)
    values = torch.zeros(1, 1, 512, 1)
    values[:, :, 2 * kernels.CENTRES :] = 1  # the first block of centres is within reach, and has no value
    arguments = tuple(x.to(DEVICE) for x in (mean, variance, basis.centres[::2], basis.widths[:2], values))
    height = 1 / math.sqrt(2 * math.pi * 1e-4)
    expected = (naive.gaussian_expectation(mean, variance, basis) @ values).item()
    assert abs(kernels.read(*arguments).item() - expected) < 512 * negligible(torch.float32) * height
    monkeypatch.setattr(kernels, "negligible", lambda dtype: 0.5)  # a limit that would be noticed
    assert kernels.read(*arguments).item() == 0
    assert expected > 0


@where_kernels_run
def test_nothing_is_read_of_nothing(kernels):
    basis = GaussianBasis.even_grid(8, [0.1], dtype=torch.float32)
    for batch, queries in ((2, 4), (0, 4), (2, 0)):
        places, values = torch.full((batch, 3, queries), 0.5), torch.zeros(batch, 3, 8, 5)
        arguments = tuple(x.to(DEVICE) for x in (places, places, basis.centres, basis.widths[:1], values))
        upstream = torch.zeros(batch, 3, queries, 5, device=DEVICE)
        assert torch.equal(kernels.read(*arguments), upstream)
        for gradient in kernels.read_backward(upstream, *arguments):
            assert torch.equal(gradient, torch.zeros_like(gradient))
