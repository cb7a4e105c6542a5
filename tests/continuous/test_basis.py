import math

import pytest
import scipy
import torch

from infformer.continuous import naive
from infformer.continuous.basis import GaussianBasis, GaussianGrid, gaussian, negligible, standard_normal_cumulative


def test_a_basis_has_every_centre_with_every_width():
    basis = GaussianBasis.even_grid(6, [0.1, 0.02])
    assert basis.centres.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert basis.widths.tolist() == [0.1, 0.02] * 3


@pytest.mark.parametrize(("count", "widths"), [(8, [0.1]), (512, [0.005, 0.01]), (9, [0.1, 0.2, 0.3])])
def test_the_grid_is_even_and_holds_its_ends(count, widths):
    centres = GaussianBasis.even_grid(count, widths).centres[:: len(widths)]
    assert len(centres) == count // len(widths)
    assert centres[0] == 0
    assert centres[-1] == 1
    torch.testing.assert_close(centres.diff(), torch.full((len(centres) - 1,), 1 / (len(centres) - 1)).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_has_the_type_that_is_asked_for(dtype):
    basis = GaussianBasis.even_grid(4, [0.1], dtype)
    assert basis.centres.dtype == basis.widths.dtype == basis.evaluate(torch.zeros(2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("count", "widths"), [(7, [0.1, 0.2]), (4, []), (4, [0.1, 0.2, 0.3])])
def test_widths_that_cannot_be_shared_evenly_are_refused(count, widths):
    with pytest.raises(ValueError, match=f"{count} basis functions .* {len(widths)} widths"):
        GaussianBasis.even_grid(count, widths)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5)])
def test_values_are_those_of_the_normal_density(shape):
    basis = GaussianBasis.even_grid(6, [0.1, 0.02])
    positions = torch.linspace(-0.3, 1.2, math.prod(shape), dtype=torch.float64).view(shape)
    values = basis.evaluate(positions)
    expected = scipy.stats.norm.pdf(positions.unsqueeze(-1), basis.centres, basis.widths)
    torch.testing.assert_close(values, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values, naive.evaluate(positions, basis), rtol=1e-12, atol=1e-12)


def test_gaussian_broadcasts():
    positions, mean, variance = torch.rand(4, 1, 1).double(), torch.rand(3, 1).double(), torch.rand(2).double() + 0.1
    expected = scipy.stats.norm.pdf(positions, mean, variance.sqrt())
    torch.testing.assert_close(gaussian(positions, mean, variance), torch.as_tensor(expected), rtol=1e-12, atol=0)


def test_the_cumulative_function_is_that_of_scipy():
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(
        standard_normal_cumulative(z), torch.as_tensor(scipy.special.ndtr(z.numpy())), rtol=0, atol=1e-15
    )


def test_a_grid_is_the_basis_of_its_centres_and_widths():
    basis = GaussianBasis.even_grid(9, [0.1, 0.02, 0.3])
    grid = GaussianGrid(basis.centres[::3], basis.widths[:3])
    for actual, expected in zip(grid.basis, basis, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_end_before_numbers_that_are_not_normal(dtype):
    """Literally they would be such numbers, and products with them twenty times slower."""
    positions = torch.linspace(0, 1, 997, dtype=dtype)
    basis = GaussianBasis.even_grid(64, [0.001, 0.005, 0.01, 0.02], dtype)
    heights = basis.evaluate(positions)
    literal = naive.evaluate(positions, basis)
    tiny = torch.finfo(dtype).tiny
    assert (literal < tiny).any()
    assert (heights * negligible(dtype) > tiny).all()
    peaks = 1 / (math.sqrt(2 * math.pi) * basis.widths)
    assert ((heights - literal).abs() <= 2e-5 * literal + 2 * negligible(dtype) * peaks).all()
