import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Density, Gaussian, Gibbs, Slots, TruncatedParabola
from infformer.memory.sticky import attention_histogram, places_after_warp, warped_positions

BASIS = GaussianBasis.even_grid(6, [0.05, 0.2])


def densities(kind: str) -> Density:
    """[2 rows, 2 heads, 3 queries], some of their mass outside [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    if kind == "slots":
        return Slots(torch.randn(2, 2, 3, 6, generator=generator, dtype=torch.float64).mul(2).softmax(-1))
    if kind == "gibbs":
        return Gibbs.of_scores(torch.randn(2, 2, 3, 9, generator=generator, dtype=torch.float64).mul(2))
    mean = torch.rand(2, 2, 3, generator=generator, dtype=torch.float64)
    variance = 10 ** (-4 + 4 * torch.rand(2, 2, 3, generator=generator, dtype=torch.float64))
    return Gaussian(mean, variance) if kind == "gaussian" else TruncatedParabola(mean, variance)


def literal_density(attention: Density, place: tuple[int, int, int], t: float) -> float:
    if isinstance(attention, Slots):
        heights = torch.exp(-((t - BASIS.centres) ** 2) / (2 * BASIS.widths**2)) / BASIS.widths / math.sqrt(2 * math.pi)
        return float(attention.weights[place] @ heights)
    if isinstance(attention, Gibbs):  # a straight line between two of 9 points, at which half of the ends' mass stands
        heights = attention.weights[place] * 8
        heights[[0, -1]] *= 2
        return float(np.interp(t, np.linspace(0, 1, 9), heights))
    mean, variance = float(attention.mean[place]), float(attention.variance[place])
    if isinstance(attention, Gaussian):
        return math.exp(-((t - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    threshold = -0.5 * (3 / (2 * math.sqrt(variance))) ** (2 / 3)
    return max(0.0, -threshold - (t - mean) ** 2 / (2 * variance))


every_density = pytest.mark.parametrize("kind", ["gaussian", "truncated_parabola", "slots", "gibbs"])


class TestHistogram:
    @every_density
    @pytest.mark.parametrize("bins", [1, 5, 128])
    def test_a_histogram_sums_to_one(self, kind, bins):
        histogram = attention_histogram(densities(kind), BASIS, bins)
        assert histogram.shape == (2, bins)
        assert (histogram >= 0).all()
        torch.testing.assert_close(histogram.sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)

    @every_density
    def test_a_histogram_is_the_integral_of_the_densities(self, kind):
        bins, attention = 5, densities(kind)
        mass = torch.zeros(2, bins, dtype=torch.float64)
        for row, head, query, place in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, bins))).tolist():
            index = (row, head, query)
            edges = [place / bins, (place + 1) / bins]
            if kind == "slots":
                inner = BASIS.centres.tolist()
            elif kind == "gibbs":
                inner = [point / 8 for point in range(9)]
            else:  # where a narrow one is, and where a parabola ends
                mean, reach = float(attention.mean[index]), float((1.5 * attention.variance[index]) ** (1 / 3))
                inner = [mean, mean - reach, mean + reach]
            breaks = sorted({t for t in inner if edges[0] < t < edges[1]})
            mass[row, place] += integrate.quad(
                lambda t, index=index: literal_density(attention, index, t), *edges, points=breaks or None, epsabs=1e-11
            )[0]
        expected = mass / mass.sum(1, keepdim=True)
        torch.testing.assert_close(attention_histogram(attention, BASIS, bins), expected, rtol=0, atol=1e-9)

    def test_every_head_and_query_counts_the_same(self):
        mean = torch.tensor([[[0.1, 0.1, 0.9], [0.1, 0.9, 0.9]]], dtype=torch.float64)
        histogram = attention_histogram(Gaussian(mean, torch.full_like(mean, 1e-6)), BASIS, 2)
        torch.testing.assert_close(histogram, torch.tensor([[0.5, 0.5]], dtype=torch.float64))


def random_histogram(bins: int = 16, seed: int = 0) -> Tensor:
    """Two rows, with heavy and with empty bins, also the first and the last."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, bins, generator=generator, dtype=torch.float64) ** 3
    mass[0, [0, 5, 6, bins - 1]] = 0
    mass[1, bins // 2 :] = 0
    return mass / mass.sum(1, keepdim=True)


def cumulative_function(histogram: Tensor, positions: Tensor) -> Tensor:
    """The piecewise linear cdf of one row's histogram at positions [P]."""
    bins = len(histogram)
    filled = (positions.unsqueeze(-1) * bins - torch.arange(bins)).clamp(0, 1)
    return filled @ histogram


class TestWarp:
    @pytest.mark.parametrize("samples", [1, 7, 64])
    def test_a_uniform_histogram_gives_the_even_grid(self, samples):
        histogram = torch.full((2, 10), 0.1, dtype=torch.float64)
        expected = (torch.arange(1, samples + 1, dtype=torch.float64) - 0.5) / samples
        torch.testing.assert_close(warped_positions(histogram, samples), expected.expand(2, -1), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("offsets", [None, torch.rand(2, 200, generator=torch.Generator().manual_seed(1)).double()])
    def test_a_warp_inverts_the_cumulative_function(self, offsets):
        """So its samples, one from each of as many parts of equal mass, have together the law of the histogram."""
        histogram = random_histogram()
        positions = warped_positions(histogram, 200, offsets)
        masses = (torch.arange(1, 201, dtype=torch.float64) - (0.5 if offsets is None else offsets)) / 200
        for row, expected in enumerate(masses.expand(2, -1)):
            found = cumulative_function(histogram[row], positions[row])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_positions_ascend_inside_the_unit_interval(self, dtype):
        histogram = torch.cat([random_histogram(seed=seed) for seed in range(5)]).to(dtype)
        offsets = torch.rand(10, 300, generator=torch.Generator().manual_seed(0), dtype=dtype)
        positions = warped_positions(histogram, 300, offsets)
        assert (positions.diff(dim=1) >= 0).all()
        assert positions.min() >= 0
        assert positions.max() <= 1

    def test_a_warp_is_deterministic_without_offsets(self):
        assert torch.equal(warped_positions(random_histogram(), 50), warped_positions(random_histogram(), 50))
        half = torch.full((2, 50), 0.5)
        assert torch.equal(warped_positions(random_histogram(), 50), warped_positions(random_histogram(), 50, half))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("place", [0, 3, 127])
    def test_all_of_the_mass_in_one_bin_is_sampled_evenly_there(self, dtype, place):
        histogram = torch.zeros(1, 128, dtype=dtype)
        histogram[0, place] = 1
        positions = warped_positions(histogram, 64)[0]
        expected = (place + (torch.arange(1, 65, dtype=dtype) - 0.5) / 64) / 128
        torch.testing.assert_close(positions, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-24])
    def test_empty_bins_are_not_sampled(self, dtype, offset):
        """Not at the ends of the interval of offsets either, where rounding leaves the sum of the masses below one."""
        mass = torch.rand(20, 128, generator=torch.Generator().manual_seed(0), dtype=dtype)
        mass[:, :7] = mass[:, 40:60] = mass[:, 100:] = 0
        mass /= mass.sum(1, keepdim=True)
        positions = warped_positions(mass, 512, torch.full((20, 512), offset, dtype=dtype))
        edge = 1e-5
        for start, end in ((0, 7 / 128), (40 / 128, 60 / 128), (100 / 128, 1)):
            assert not ((positions > start + edge) & (positions < end - edge)).any()
        assert positions.min() >= 7 / 128 - edge
        assert positions.max() <= 100 / 128 + edge


def test_places_after_warp_undo_the_warp():
    """What is sampled at position m stands at (m − ½)/samples."""
    generator = torch.Generator().manual_seed(0)
    histogram = torch.rand(3, 7, generator=generator, dtype=torch.float64)
    histogram[0, 2] = 0  # nothing is sampled there
    histogram /= histogram.sum(-1, keepdim=True)
    places = places_after_warp(histogram, warped_positions(histogram, 40))
    expected = (torch.arange(1, 41, dtype=torch.float64) - 0.5) / 40
    torch.testing.assert_close(places, expected.expand(3, -1))


def test_both_ends_stay_where_they_are_after_an_even_warp():
    histogram = torch.full((1, 4), 0.25)
    assert places_after_warp(histogram, torch.tensor([[0.0, 1.0]])).tolist() == [[0.0, 1.0]]
