"""Continuous attention against its equations, one text and one query at a time."""

import math

import torch

from infformer.continuous.attention import continuous_attention
from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Gaussian
from infformer.continuous.regression import even_middles, ridge_operator

WIDTHS = (0.02, 0.1)


def test_each_query_reads_the_signal_of_its_own_text_with_the_moments_of_its_softmax_to_the_last_digits():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 30, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    lengths = (30, 17)
    real = torch.arange(30) < torch.tensor(lengths).unsqueeze(-1)
    found = continuous_attention(query, key, value, 8, WIDTHS, 0.1, real)
    basis = GaussianBasis.even_grid(8, WIDTHS)
    for row, length in enumerate(lengths):
        fit = ridge_operator(basis.evaluate(even_middles(length)), 0.1)
        for head in range(2):
            keys, values = fit.mT @ key[row, head, :length], fit.mT @ value[row, head, :length]
            for place in (0, length - 1):
                weights = torch.softmax(keys @ query[row, head, place] / math.sqrt(4), dim=-1)
                mean = weights @ basis.centres
                variance = weights @ (basis.widths.square() + (basis.centres - mean).square())
                expected = Gaussian(mean, variance).expectation(basis) @ values
                torch.testing.assert_close(found[row, head, place], expected)


def test_padding_is_not_seen():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 30, 4, generator=generator) for _ in range(3))
    real = (torch.arange(30) < 21).unsqueeze(0)
    padded = continuous_attention(query, key, value, 8, WIDTHS, 0.1, real)[:, :, :21]
    alone = continuous_attention(*(tensor[:, :, :21] for tensor in (query, key, value)), 8, WIDTHS, 0.1)
    torch.testing.assert_close(padded, alone)


def test_autocast_rounds_what_is_read_and_not_where_a_query_looks():
    """In bfloat16 a place in the newest part of a text would have two digits, and be off by a function's width."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 2, 32, 16, generator=generator).repeat_interleave(16, dim=2)  # neighbours are alike
    query, key, value = (text + torch.randn(text.shape, generator=generator) for _ in range(3))
    expected = continuous_attention(query, key, value, 128, (0.01, 0.05), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = continuous_attention(*(tensor.bfloat16() for tensor in (query, key, value)), 128, (0.01, 0.05), 0.5)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.006 * expected.norm()


def test_a_text_of_padding_alone_is_no_error():
    query, key, value = (torch.randn(2, 2, 9, 4) for _ in range(3))
    real = torch.tensor([[True], [False]]).expand(2, 9)
    assert continuous_attention(query, key, value, 8, WIDTHS, 0.1, real).isfinite().all()
