import pytest
import torch
from torch import Tensor

from infformer.continuous import naive
from infformer.continuous.basis import GaussianBasis, negligible
from infformer.continuous.regression import (
    even_middles,
    even_steps,
    first_operator,
    next_operators,
    ridge_operator,
    rounded,
)

BASIS = GaussianBasis.even_grid(8, [0.05, 0.1])
RIDGES = [1e-3, 0.5, 20.0]


def samples(count: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def least_squares(positions: Tensor, values: Tensor, ridge: float) -> Tensor:
    """argmin ‖ΨB − X‖² + λ‖B‖², as the plain least squares of [Ψ; √λ·I] B = [X; 0]."""
    size = len(BASIS.centres)
    design = torch.cat([BASIS.evaluate(positions), ridge**0.5 * torch.eye(size, dtype=torch.float64)])
    target = torch.cat([values, values.new_zeros(size, values.shape[1])])
    return torch.linalg.lstsq(design, target, driver="gelsd").solution


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_an_operator_solves_the_ridge_problem(ridge, count):
    positions, values = samples(count, 1)[:, 0].sigmoid(), samples(count)
    operator = ridge_operator(BASIS.evaluate(positions), ridge)
    assert operator.shape == (count, 8)
    assert_close(operator.T @ values, least_squares(positions, values, ridge))


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("length", [1, 2, 5, 12, 33])
def test_a_first_segment_is_fitted_beside_zeros(ridge, length):
    """Tokens in the middles of equal parts of [0, 1], zeros in as many middles of the same parts outside."""
    values = samples(length)
    middles = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    before = middles[length - length // 2 :] - 1
    after = middles[: length - length // 2] + 1
    expected = least_squares(
        torch.cat([before, middles, after]),
        torch.cat([torch.zeros(len(before), 3), values, torch.zeros(len(after), 3)]),
        ridge,
    )
    operator = first_operator(BASIS, length, ridge)
    assert operator.shape == (length, 8)
    assert_close(operator.T @ values, expected)


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("contraction", [0.5, 0.9])
@pytest.mark.parametrize(("length", "count"), [(12, 20), (7, 9), (1, 1)])
def test_a_next_segment_is_fitted_beside_its_past_and_zeros(ridge, contraction, length, count):
    past, new = samples(count), samples(length)
    margin = 1 / (2 * length + count)
    padding = torch.linspace(-0.5 + margin, 1.5 - margin, 2 * (count + length), dtype=torch.float64)
    padding = padding[(padding < 0) | (padding > 1)]
    positions = torch.cat(
        [
            contraction * torch.arange(1, count + 1, dtype=torch.float64) / count,
            contraction + (1 - contraction) * torch.arange(1, length + 1, dtype=torch.float64) / length,
            padding,
        ]
    )
    expected = least_squares(positions, torch.cat([past, new, torch.zeros(len(padding), 3)]), ridge)
    tau = torch.tensor(contraction, dtype=torch.float64)
    operators = next_operators(BASIS, length, even_steps(count), tau, ridge)
    assert [operator.shape for operator in operators] == [(count, 8), (length, 8)]
    assert_close(operators[0].T @ past + operators[1].T @ new, expected)


@pytest.mark.parametrize("length", [*range(1, 20), 63, 64, 65, 511])
def test_operators_of_every_length_are_the_literal_ones(length):
    """Odd ones too, whose parts are not the same seen from 0 and from the middle."""
    assert_close(first_operator(BASIS, length, 0.5), naive.first_operator(length, BASIS, 0.5))
    tau = torch.tensor(0.6, dtype=torch.float64)
    literal = naive.next_operator(length, 20, 0.6, BASIS, 0.5)
    assert_close(torch.cat(next_operators(BASIS, length, even_steps(20), tau, 0.5)), literal)
    middles = naive.next_operator(length, 20, 0.6, BASIS, 0.5, before=0.5)
    assert_close(torch.cat(next_operators(BASIS, length, even_middles(20), tau, 0.5)), middles)


@pytest.mark.parametrize("length", [1, 7, 64])
def test_without_zeros_the_data_alone_are_fitted(length):
    past, new = samples(20), samples(length)
    middles = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    first = first_operator(BASIS, length, 0.5, zeros=False)
    assert_close(first.T @ new, least_squares(middles, new, 0.5))
    assert_close(first, naive.first_operator(length, BASIS, 0.5, zeros=False))
    positions = torch.cat([0.6 * even_middles(20), 0.6 + 0.4 * even_steps(length)])
    tau = torch.tensor(0.6, dtype=torch.float64)
    operators = next_operators(BASIS, length, even_middles(20), tau, 0.5, zeros=False)
    expected = least_squares(positions, torch.cat([past, new]), 0.5)
    assert_close(operators[0].T @ past + operators[1].T @ new, expected)
    assert_close(torch.cat(operators), naive.next_operator(length, 20, 0.6, BASIS, 0.5, before=0.5, zeros=False))


@pytest.mark.parametrize("weight", [1, 2, 5])
def test_a_weight_counts_as_so_many_samples(weight):
    """The past fitted with a weight is the past fitted over and over."""
    past, new, contraction = samples(20), samples(12), 0.6
    margin = 1 / (2 * 12 + 20)
    padding = torch.linspace(-0.5 + margin, 1.5 - margin, 2 * 32, dtype=torch.float64)
    padding = padding[(padding < 0) | (padding > 1)]
    positions = torch.cat([(contraction * even_steps(20)).repeat(weight), contraction + 0.4 * even_steps(12), padding])
    expected = least_squares(positions, torch.cat([past.repeat(weight, 1), new, torch.zeros(len(padding), 3)]), 0.5)
    tau, past_weight = torch.tensor([contraction, weight], dtype=torch.float64)
    operators = next_operators(BASIS, 12, even_steps(20), tau, 0.5, past_weight)
    assert_close(operators[0].T @ past + operators[1].T @ new, expected)
    assert_close(torch.cat(operators), naive.next_operator(12, 20, contraction, BASIS, 0.5, weight))


def test_contractions_at_once_are_each_on_its_own():
    contractions = torch.tensor([[0.5, 2 / 3, 0.75], [0.8, 0.1, 0.5]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.1, 1.0]], dtype=torch.float64)
    steps = even_steps(20)
    past, new = next_operators(BASIS, 12, steps, contractions, 0.5, weights)
    assert past.shape == (2, 3, 20, 8)
    assert new.shape == (2, 3, 12, 8)
    for row in range(2):
        for column in range(3):
            one_past, one_new = next_operators(BASIS, 12, steps, contractions[row, column], 0.5, weights[row, column])
            assert_close(past[row, column], one_past)
            assert_close(new[row, column], one_new)


def test_steps_and_middles_are_even():
    assert even_steps(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert even_middles(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert even_steps(4).dtype == even_middles(4).dtype == torch.float64


def test_rounded_operators_hold_normal_numbers_or_zero():
    """The published sizes: far from its sample an operator decays to numbers that float32 hardly has."""
    basis = GaussianBasis.even_grid(512, [0.005, 0.01])
    for operator in next_operators(basis, 512, even_steps(512), torch.tensor(0.5, dtype=torch.float64), 0.5):
        assert (operator.float().abs() < torch.finfo(torch.float32).tiny).any()
        short = rounded(operator, torch.float32)
        largest = operator.abs().max()
        assert short.dtype == torch.float32
        assert short[short != 0].abs().min() >= 0.99 * negligible(torch.float32) * largest
        assert (short - operator).abs().max() <= 1e-7 * largest
        assert ((short - operator).abs() <= 1e-7 * operator.abs())[operator.abs() > 1e-13 * largest].all()


def test_operators_of_several_contractions_are_rounded_apart():
    operators = torch.tensor([1.0, 1e-20], dtype=torch.float64).view(2, 1, 1) * torch.eye(3, dtype=torch.float64)
    assert torch.equal(rounded(operators, torch.float32), operators.float())
    assert torch.equal(rounded(operators, torch.float64), operators)
