"""Attention by patterns against softmax attention under the pattern's mask, which costs all pairs."""

import pytest
import torch
import torch.nn.functional as F

from infformer.attention import patterns
from infformer.attention.softmax import attend_part, join_parts, softmax_attention

LENGTHS = (1, 5, 16, 37, 100)
BLOCK = 8


def random_order(longest=100):
    side = -(-longest // BLOCK)
    return torch.rand(side, side, generator=torch.Generator().manual_seed(3))


def chosen(*lengths, count=2, longest=100):
    """Of texts of so many positions, [texts, blocks, count]."""
    blocks = [-(-length // BLOCK) for length in lengths]
    return patterns.choose_blocks(random_order(longest)[: max(blocks), : max(blocks)], torch.tensor(blocks), count)


PATTERNS = {
    "local": (
        lambda q, k, v, real, causal: patterns.local_attention(q, k, v, BLOCK, real, causal),
        lambda length, causal: patterns.local_mask(length, BLOCK, causal),
    ),
    "strided": (
        lambda q, k, v, real, causal: patterns.strided_attention(q, k, v, BLOCK, real, causal),
        lambda length, causal: patterns.strided_mask(length, BLOCK, causal),
    ),
    "fixed": (
        lambda q, k, v, real, causal: patterns.fixed_attention(q, k, v, BLOCK, 2, real, causal),
        lambda length, causal: patterns.fixed_mask(length, BLOCK, 2, causal),
    ),
    "window": (
        lambda q, k, v, real, causal: patterns.window_attention(q, k, v, 5, 0, real, causal),
        lambda length, causal: patterns.window_mask(length, 5, 0, causal),
    ),
    "window_seen_by_all": (
        lambda q, k, v, real, causal: patterns.window_attention(q, k, v, 5, 3, real, causal),
        lambda length, causal: patterns.window_mask(length, 5, 3, causal),
    ),
    "big_bird": (
        lambda q, k, v, real, causal: patterns.big_bird_attention(q, k, v, BLOCK, random_order(), 2, real),
        lambda length, causal: patterns.big_bird_mask(length, BLOCK, chosen(length)[0]),
    ),
}
CASES = [(name, causal) for name in PATTERNS for causal in (False, True) if not (causal and name == "big_bird")]


def new_inputs(length, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, 8, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "causal"), CASES)
def test_a_pattern_equals_softmax_under_its_mask_forward_and_backward(name, causal, length, dtype, tolerance):
    attend, mask_of = PATTERNS[name]
    inputs = new_inputs(length, dtype)
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, max(1, length - 7) :] = False
    # BigBird's last block is a text's own.
    masks = [F.pad(mask_of(count, causal), (0, length - count) * 2) for count in real.sum(-1).tolist()]
    allowed = torch.stack(masks).unsqueeze(1)
    fast = attend(*inputs, real, causal)
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=allowed)
    weight = torch.randn_like(fast) * (real[:, None, :, None] & allowed.any(-1, keepdim=True))
    assert ((fast - dense) * (weight != 0)).abs().max() < tolerance
    for ours, theirs in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((dense * weight).sum(), inputs),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 10 * tolerance


@pytest.mark.parametrize("name", PATTERNS)
def test_without_padding_a_pattern_needs_no_mask_of_what_is_real(name):
    attend, _ = PATTERNS[name]
    inputs = new_inputs(37, torch.float64)
    real = torch.ones(2, 37, dtype=torch.bool)
    torch.testing.assert_close(attend(*inputs, None, False), attend(*inputs, real, False))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 30])
def test_random_blocks_are_neither_near_nor_outer_nor_twice_the_same(blocks):
    (found,) = chosen(blocks * BLOCK, count=3, longest=30 * BLOCK)
    assert found.shape == (blocks, 3)
    for block, others in enumerate(found.tolist()):
        real = [other for other in others if other >= 0]
        assert len(set(real)) == len(real) == min(3, sum(abs(o - block) > 1 for o in range(1, blocks - 1)))
        assert all(abs(other - block) > 1 and 0 < other < blocks - 1 for other in real)


def test_big_bird_blocks_see_their_neighbours_the_outer_and_the_random_ones():
    mask = patterns.big_bird_mask(30 * BLOCK, BLOCK, chosen(30 * BLOCK, count=3, longest=30 * BLOCK)[0])
    assert (mask.sum(-1)[2 * BLOCK : -2 * BLOCK] == (3 + 2 + 3) * BLOCK).all()
    assert mask[:BLOCK].all()
    assert mask[-BLOCK:].all()


def test_parts_join_to_attention_on_all_keys():
    query, key, value = new_inputs(20, torch.float64)
    parts = [
        attend_part(query, key[:, :, first:last], value[:, :, first:last])
        for first, last in ((0, 3), (3, 15), (15, 20))
    ]
    torch.testing.assert_close(join_parts(parts), softmax_attention(query, key, value))


def test_a_part_of_which_nothing_is_seen_has_no_weight_and_no_gradient():
    query, key, value = new_inputs(6, torch.float32)
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    joined = join_parts([attend_part(query, key, value), attend_part(query, 1e3 * key, 1e3 * value, hidden)])
    alone = softmax_attention(query, key, value)
    torch.testing.assert_close(joined, alone)
    for ours, theirs in zip(
        torch.autograd.grad(joined.square().sum(), (query, key, value)),
        torch.autograd.grad(alone.square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
