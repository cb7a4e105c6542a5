"""Attention by features against the weights it stands for."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from infformer.attention.features import (
    linear_attention,
    orthogonal_directions,
    performer_attention,
    softmax_features,
)
from infformer.attention.softmax import softmax_attention


def new_inputs(length=300, size=8, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(2, 3, length, size, dtype=dtype, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_equals_its_weights_written_out(causal):
    query, key, value = new_inputs()
    real = torch.arange(300) < torch.tensor([[300], [211]])
    weights = ((F.elu(query) + 1) @ (F.elu(key) + 1).mT) * real[:, None, None, :]
    weights = weights.tril() if causal else weights
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(linear_attention(query, key, value, real, causal), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_performer_equals_its_features_written_out(causal):
    query, key, value = new_inputs(scale=0.5)
    directions = orthogonal_directions(64, 8, torch.Generator().manual_seed(1)).double()
    real = torch.arange(300) < torch.tensor([[300], [211]])
    weights = softmax_features(query, directions) @ softmax_features(key, directions).mT * real[:, None, None, :]
    weights = weights.tril() if causal else weights
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(
        performer_attention(query, key, value, directions, real, causal), expected, rtol=1e-5, atol=1e-6
    )


def test_the_estimate_of_the_softmax_kernel_has_no_bias_and_a_variance_that_falls_with_the_features():
    query, key = torch.full((16,), 0.8).double(), torch.linspace(-1, 1, 16).double()
    exact = math.exp(float(query @ key) / 4)
    deviations = {}
    for features in (256, 1024):
        estimates = torch.stack(
            [
                softmax_features(query, directions) @ softmax_features(key, directions)
                for seed in range(400)
                for directions in [orthogonal_directions(features, 16, torch.Generator().manual_seed(seed)).double()]
            ]
        )
        deviations[features] = estimates.std()
        assert abs(estimates.mean() - exact) < 3 * estimates.std() / math.sqrt(400)
    assert 1.6 < deviations[256] / deviations[1024] < 2.5


def test_directions_are_orthogonal_in_groups_and_as_long_as_normal_vectors():
    directions = orthogonal_directions(4 * 16, 16, torch.Generator().manual_seed(0)).double()
    group = F.normalize(directions, dim=-1)[:16]
    torch.testing.assert_close(group @ group.mT, torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)
    many = orthogonal_directions(4096, 16, torch.Generator().manual_seed(0))
    assert abs(many.square().sum(-1).mean() - 16) < 0.5


def test_performer_comes_nearer_to_softmax_with_more_features():
    inputs = new_inputs(length=64, scale=0.7)
    exact = softmax_attention(*inputs)
    errors = []
    for features in (32, 512, 8192):
        drawn = [orthogonal_directions(features, 8, torch.Generator().manual_seed(seed)).double() for seed in range(8)]
        errors.append(sum((performer_attention(*inputs, one) - exact).square().mean() for one in drawn) / len(drawn))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_causal_performer_reads_a_beginning_as_the_beginning_alone_however_little_its_keys_weigh():
    query, key, value = new_inputs(size=32, dtype=torch.float32)
    key[:, :, :190] *= 4  # longer keys weigh less
    directions = orthogonal_directions(128, 32, torch.Generator().manual_seed(1))
    whole = performer_attention(query, key, value, directions, causal=True)
    for length in (1, 40, 150, 190, 220):
        beginning = [tensor[:, :, :length].double() for tensor in (query, key, value)]
        last = performer_attention(*beginning, directions.double())[:, :, -1]
        torch.testing.assert_close(whole[:, :, length - 1].double(), last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["linear", "performer"])
def test_long_texts_are_read_in_float16_as_in_float32(attention):
    """The sums over 2,048 positions are beyond its largest number."""
    query, key, value = new_inputs(2048, 64, dtype=torch.float32)
    directions = orthogonal_directions(128, 64, torch.Generator().manual_seed(1))
    read = linear_attention if attention == "linear" else partial(performer_attention, directions=directions)
    expected = read(query, key, value)
    with torch.autocast("cpu", torch.float16):
        found = read(query.half(), key.half(), value.half())
    assert found.dtype == torch.float16
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_text_of_padding_alone_leaves_no_nan():
    inputs = [tensor.requires_grad_() for tensor in new_inputs(length=9)]
    real = torch.tensor([[True], [False]]).expand(2, 9)
    directions = orthogonal_directions(16, 8, torch.Generator().manual_seed(1)).double()
    for attended in (linear_attention(*inputs, real), performer_attention(*inputs, directions, real)):
        assert attended.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(attended.sum(), inputs))


def test_large_scores_stay_finite():
    inputs = new_inputs(scale=30.0, dtype=torch.float32)
    for tensor in inputs:
        tensor.requires_grad_()
    attended = performer_attention(*inputs, orthogonal_directions(64, 8, torch.Generator().manual_seed(2)))
    assert attended.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(attended.sum(), inputs))
