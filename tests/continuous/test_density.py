import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import integrate
from torch import Tensor

from infformer.continuous import naive
from infformer.continuous.basis import GaussianBasis, GaussianGrid
from infformer.continuous.density import (
    Gaussian,
    Gibbs,
    Slots,
    TruncatedParabola,
    match_moments,
    variance_divergence,
)

MEANS = [-0.2, 0.0, 0.31, 0.5, 1.0]
VARIANCES = [1e-4, 2e-3, 0.05, 0.7, 3.0]
BASIS = GaussianBasis(
    *torch.tensor(list(itertools.product([0.0, 0.29, 0.5, 1.0], [0.005, 0.05, 0.3])), dtype=torch.float64).unbind(1)
)
"""Every centre with every width."""
PLACES = list(itertools.product(MEANS, VARIANCES))
FAMILIES = {"gaussian": Gaussian, "truncated_parabola": TruncatedParabola}
every_family = pytest.mark.parametrize("family", FAMILIES)


def all_places() -> tuple[Tensor, Tensor]:
    """Every mean with every variance, each [25]."""
    return torch.tensor(PLACES, dtype=torch.float64).unbind(1)


def height(family: str, t: float, mean: float, variance: float) -> float:
    """The definition of the density."""
    if family == "gaussian":
        return math.exp(-((t - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    threshold = -0.5 * (3 / (2 * math.sqrt(variance))) ** (2 / 3)
    return max(0.0, -threshold - (t - mean) ** 2 / (2 * variance))


def support(family: str, mean: float, variance: float) -> tuple[float, float]:
    reach = 12 * math.sqrt(variance) if family == "gaussian" else (1.5 * variance) ** (1 / 3)
    return mean - reach, mean + reach


def integral(function: Callable[[float], float], start: float, end: float, *breaks: float) -> float:
    if start >= end:
        return 0.0
    inner = sorted({t for t in breaks if start < t < end})
    return integrate.quad(function, start, end, points=inner or None, epsabs=1e-11, epsrel=1e-11, limit=200)[0]


@every_family
def test_expectation_is_the_integral(family):
    expected = torch.zeros(len(PLACES), len(BASIS.centres), dtype=torch.float64)
    for (i, (mean, variance)), (j, (centre, width)) in itertools.product(
        enumerate(PLACES), enumerate(zip(*(field.tolist() for field in BASIS), strict=True))
    ):
        start, end = support(family, mean, variance)
        start, end = max(start, centre - 12 * width), min(end, centre + 12 * width)
        if family == "gaussian":  # where the product of the two peaks
            breaks = [(mean * width**2 + centre * variance) / (variance + width**2)]
        else:
            breaks = [centre]
        expected[i, j] = integral(
            lambda t, mean=mean, variance=variance, centre=centre, width=width: (
                height(family, t, mean, variance) * height("gaussian", t, centre, width**2)
            ),
            start,
            end,
            *breaks,
        )
    actual = FAMILIES[family](*all_places()).expectation(BASIS)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    literal = {"gaussian": naive.gaussian_expectation, "truncated_parabola": naive.truncated_parabola_expectation}
    torch.testing.assert_close(literal[family](*all_places(), BASIS), expected, rtol=1e-8, atol=1e-8)


@every_family
@pytest.mark.parametrize("width", [0.12, 0.5, 3.0, 1000.0])
def test_expectations_of_wide_functions_keep_their_digits_in_float32(family, width):
    centres = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    basis = GaussianBasis(centres, torch.full((3,), width, dtype=torch.float64))
    mean, variance = torch.tensor([0.3], dtype=torch.float64), torch.tensor([1e-4], dtype=torch.float64)
    t = torch.linspace(*support(family, 0.3, 1e-4), 4001, dtype=torch.float64)
    heights = torch.tensor([height(family, place, 0.3, 1e-4) for place in t.tolist()], dtype=torch.float64)
    expected = torch.trapezoid(heights * basis.evaluate(t).mT, t)
    found = FAMILIES[family](mean.float(), variance.float()).expectation(
        GaussianBasis(*(part.float() for part in basis))
    )
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=3e-6 * float(expected.max()))


@every_family
def test_cumulative_is_the_integral(family):
    positions = torch.linspace(-0.5, 1.5, 9, dtype=torch.float64)
    expected = torch.zeros(len(PLACES), len(positions), dtype=torch.float64)
    for (i, (mean, variance)), (j, position) in itertools.product(enumerate(PLACES), enumerate(positions.tolist())):
        start, end = support(family, mean, variance)
        expected[i, j] = integral(
            lambda t, mean=mean, variance=variance: height(family, t, mean, variance), start, min(end, position), mean
        )
    actual = FAMILIES[family](*all_places()).cumulative(positions, BASIS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


@every_family
def test_all_of_the_mass_is_one(family):
    far = torch.tensor([-40.0, 40.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(len(PLACES), 2)
    torch.testing.assert_close(FAMILIES[family](*all_places()).cumulative(far, BASIS), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", [*FAMILIES, "slots"])
def test_read_is_the_expectation_times_the_values(family):
    """The same for every density, with its gradients."""
    grid = GaussianGrid(torch.linspace(0, 1, 5, dtype=torch.float64), torch.tensor([0.03, 0.2], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 10, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    if family == "slots":
        scores = torch.randn(2, 3, 7, 10, generator=generator, dtype=torch.float64)
        density = Slots(scores.softmax(-1).requires_grad_())
    else:
        places = torch.rand(2, 2, 3, 7, generator=generator, dtype=torch.float64) + 0.01
        density = FAMILIES[family](*(place.requires_grad_() for place in places.unbind(0)))
    actual, expected = density.read(grid, values), density.expectation(grid.basis) @ values
    upstream = torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        *(torch.autograd.grad(result, (*density, values), upstream) for result in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_radius_is_the_end_of_the_parabola():
    density = TruncatedParabola(*all_places())
    for radius, (mean, variance) in zip(density.radius.tolist(), PLACES, strict=True):
        assert height("truncated_parabola", mean + 0.999 * radius, mean, variance) > 0
        assert height("truncated_parabola", mean + 1.001 * radius, mean, variance) == 0


@pytest.fixture
def weights() -> Tensor:
    """α of 2 rows and 3 queries over the basis, from even to concentrated."""
    scores = torch.randn(2, 3, len(BASIS.centres), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (scores * torch.tensor([0.0, 1.0, 6.0]).view(3, 1)).softmax(-1)


def mixture(weights: Tensor) -> Callable[[float], float]:
    """Σ_j α_j 𝒩(c_j, w_j²) for weights [N]."""
    parts = list(zip(weights.tolist(), *(field.tolist() for field in BASIS), strict=True))
    return lambda t: sum(weight * height("gaussian", t, centre, width**2) for weight, centre, width in parts)


def whole_integral(function: Callable[[float], float]) -> float:
    """Over all places where a mixture has some mass, its narrow parts found."""
    breaks = {float(c + reach * w) for c, w in zip(*BASIS, strict=True) for reach in (-12, 0, 12)}
    return sum(integral(function, start, end) for start, end in itertools.pairwise(sorted(breaks)))


def test_slots_lie_where_their_mixture_does(weights):
    positions = torch.linspace(-0.2, 1.2, 8, dtype=torch.float64)
    mass = Slots(weights).cumulative(positions, BASIS).diff(dim=-1)
    assert mass.shape == (2, 3, 7)
    for place in itertools.product(range(2), range(3)):
        function = mixture(weights[place])
        for k, (start, end) in enumerate(itertools.pairwise(positions.tolist())):
            expected = integral(function, start, end, *BASIS.centres.tolist())
            assert float(mass[place][k]) == pytest.approx(expected, abs=1e-8)
    far = torch.tensor([-9.0, 9.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(2, 3, 2)
    torch.testing.assert_close(Slots(weights).cumulative(far, BASIS), expected, rtol=0, atol=1e-12)


def test_slots_read_a_coefficient_at_the_height_of_its_function(weights):
    heights = BASIS.evaluate(BASIS.centres).diagonal()
    torch.testing.assert_close(Slots(weights).expectation(BASIS), weights * heights, rtol=1e-12, atol=0)


def test_moments_are_those_of_the_mixture(weights):
    means, variances = match_moments(weights, BASIS)
    for place in itertools.product(range(2), range(3)):
        function, mean, variance = mixture(weights[place]), float(means[place]), float(variances[place])
        assert mean == pytest.approx(whole_integral(lambda t, f=function: t * f(t)), abs=1e-8)
        spread = whole_integral(lambda t, f=function, mean=mean: (t - mean) ** 2 * f(t))
        assert variance == pytest.approx(spread, abs=1e-8)


@pytest.mark.parametrize("slot", [0, 3, 8, 11])
def test_moments_keep_their_digits_in_float32(slot):
    """All weight on one function, far from 0: its own centre and width², where Σ α (c² + w²) − μ² would be noise."""
    basis = GaussianBasis(BASIS.centres.float(), torch.full((len(BASIS.centres),), 1e-4))
    mean, variance = match_moments(torch.eye(len(basis.centres))[slot], basis)
    assert float(mean) == float(basis.centres[slot])
    assert float(variance) == pytest.approx(1e-8, rel=1e-5)


@pytest.mark.parametrize("variance", [1e-4, 2e-3, 0.0025, 0.05, 3.0])
@pytest.mark.parametrize("prior", [0.0025, 0.3])
def test_divergence_is_the_integral(variance, prior):
    def integrand(t: float) -> float:
        logarithm = 0.5 * math.log(prior / variance) - t * t / (2 * variance) + t * t / (2 * prior)
        return height("gaussian", t, 0, variance) * logarithm

    expected = integral(integrand, -12 * math.sqrt(variance), 12 * math.sqrt(variance), 0)
    actual = variance_divergence(torch.tensor(variance, dtype=torch.float64), prior)
    assert float(actual) == pytest.approx(expected, abs=1e-8, rel=1e-8)
    literal = naive.variance_divergence(torch.tensor(variance, dtype=torch.float64), math.sqrt(prior))
    assert float(literal) == pytest.approx(expected, abs=1e-8, rel=1e-8)


class TestGradients:
    @pytest.fixture
    def basis(self) -> GaussianBasis:
        return GaussianBasis.even_grid(6, [0.05, 0.2])

    @pytest.fixture
    def place(self) -> tuple[Tensor, Tensor]:
        mean = torch.tensor([-0.1, 0.2, 0.53, 0.8], dtype=torch.float64, requires_grad=True)
        variance = torch.tensor([0.003, 0.02, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
        return mean, variance

    @every_family
    def test_gradients_of_expectations_are_numerically_right(self, family, place, basis):
        def expectation(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
            return FAMILIES[family](mean, variance).expectation(GaussianBasis(centres, widths))

        inputs = (*place, *(field.clone().requires_grad_() for field in basis))
        assert torch.autograd.gradcheck(expectation, inputs)

    @every_family
    def test_gradients_of_cumulative_functions_are_numerically_right(self, family, place, basis):
        positions = torch.tensor([0.05, 0.4, 0.77], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda mean, variance, positions: FAMILIES[family](mean, variance).cumulative(positions, basis),
            (*place, positions),
        )

    @pytest.mark.parametrize("method", ["expectation", "cumulative", "moments"])
    def test_gradients_by_slots_weights_are_numerically_right(self, method, basis):
        positions = torch.tensor([0.05, 0.4, 0.77], dtype=torch.float64)
        functions = {
            "expectation": lambda weights: Slots(weights).expectation(basis),
            "cumulative": lambda weights: Slots(weights).cumulative(positions, basis),
            "moments": lambda weights: match_moments(weights, basis),
        }
        scores = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.autograd.gradcheck(functions[method], scores.softmax(-1).requires_grad_())

    def test_gradients_of_the_divergence_are_numerically_right(self, place):
        assert torch.autograd.gradcheck(lambda variance: variance_divergence(variance, 0.0025), place[1])


def two_peaked_score(t: Tensor | float) -> Tensor:
    t = torch.as_tensor(t, dtype=torch.float64)
    return 3 * torch.cos(13 * t) + t


class TestGibbs:
    def test_what_is_read_is_the_integral_over_a_density_of_two_peaks(self):
        """Of exp(score)/∫exp(score): to 1e-4 with 400 points, as the trapezoid rule's error is of their distance²."""
        points = torch.linspace(0, 1, 401, dtype=torch.float64)
        attention = Gibbs.of_scores(two_peaked_score(points)[None, None, None])
        values = torch.stack([torch.sin(9 * points), points.square()], dim=-1)[None, None]
        total = integrate.quad(lambda t: float(two_peaked_score(t).exp()), 0, 1, limit=200)[0]

        def mean_of(function: Callable[[float], float]) -> float:
            return integrate.quad(lambda t: float(two_peaked_score(t).exp()) * function(t) / total, 0, 1, limit=200)[0]

        read = attention.read(GaussianGrid(points, points), values).flatten().tolist()
        assert read == pytest.approx([mean_of(lambda t: math.sin(9 * t)), mean_of(lambda t: t * t)], abs=1e-4)
        centre, variance = (float(moment) for moment in attention.moments())
        assert centre == pytest.approx(mean_of(lambda t: t), abs=1e-4)
        assert variance == pytest.approx(mean_of(lambda t: (t - centre) ** 2), abs=1e-4)
        expected = [mean_of(lambda t, j=j: float(BASIS.evaluate(torch.tensor(t).double())[j])) for j in (5, 8)]
        assert attention.expectation(BASIS).flatten()[[5, 8]].tolist() == pytest.approx(expected, abs=1e-3)

    def test_each_of_two_equal_places_is_read_at_once(self):
        """Which no single normal density can: it would read what lies between them."""
        scores = torch.full((1, 1, 1, 33), -50.0, dtype=torch.float64)
        scores[..., [4, 28]] = 50.0
        values = torch.randn(1, 1, 33, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        read = Gibbs.of_scores(scores).read(GaussianGrid(scores[0, 0, 0], scores[0, 0, 0]), values)
        torch.testing.assert_close(read[0, 0, 0], (values[0, 0, 4] + values[0, 0, 28]) / 2)

    def test_one_point_has_all_the_mass(self):
        assert Gibbs.of_scores(torch.randn(2, 3, 4, 1)).weights.tolist() == torch.ones(2, 3, 4, 1).tolist()

    @pytest.mark.parametrize("method", ["expectation", "cumulative"])
    def test_gradients_by_scores_are_numerically_right(self, method):
        positions = torch.tensor([-0.1, 0.0, 0.2, 0.77, 1.0], dtype=torch.float64)
        scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

        def function(scores: Tensor) -> Tensor:
            attention = Gibbs.of_scores(scores)
            return attention.expectation(BASIS) if method == "expectation" else attention.cumulative(positions, BASIS)

        assert torch.autograd.gradcheck(function, scores)
