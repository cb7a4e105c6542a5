"""Reformer's attention against all pairs of a bucket, and against Hugging Face's module."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from infformer.attention.reformer import ALONE, hash_buckets, reformer_attention


def new_inputs(length=24, heads=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator) for _ in range(2)]


def new_rotations(rounds, buckets, heads=3):
    return torch.randn(heads, rounds, 8, buckets // 2, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("rounds", [1, 3])
def test_with_one_chunk_a_pair_counts_as_often_as_it_shares_a_bucket(rounds):
    query, value = new_inputs()
    rotations = new_rotations(rounds, buckets=4)
    real = torch.arange(24) < torch.tensor([[24], [17]])
    buckets = hash_buckets(query, rotations)
    shared = (buckets.unsqueeze(-1) == buckets.unsqueeze(-2)).sum(2) * real[:, None, None, :]
    scores = (query @ F.normalize(query, dim=-1).mT).masked_fill(torch.eye(24, dtype=torch.bool), ALONE)
    scores = scores.masked_fill(shared == 0, -1e30)
    expected = torch.softmax(scores + shared.clamp(min=1).log(), dim=-1) @ value
    found = reformer_attention(query, value, rotations, chunk=24, real=real)
    torch.testing.assert_close(found * real[:, None, :, None], expected * real[:, None, :, None])


@pytest.mark.parametrize("length", [1, 7, 64, 101])
def test_padding_is_not_seen(length):
    query, value = new_inputs(length)
    rotations = new_rotations(2, buckets=8)
    real = torch.arange(length).expand(2, -1) < max(1, length - 5)
    before = reformer_attention(query, value, rotations, chunk=8, real=real)
    other = value + 100 * (~real)[:, None, :, None]
    after = reformer_attention(query + (~real)[:, None, :, None], other, rotations, chunk=8, real=real)
    shown = real[:, None, :, None]
    torch.testing.assert_close(before * shown, after * shown)


def test_in_one_bucket_it_equals_the_module_of_transformers():
    # That module lets a position see its chunk whatever the buckets are, so the two agree where there is one of both.
    config = ReformerConfig(
        hidden_size=24, num_attention_heads=3, attention_head_size=8, num_hashes=1, num_buckets=2, is_decoder=False,
        lsh_attn_chunk_length=32, lsh_num_chunks_before=1, lsh_num_chunks_after=0, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = LSHSelfAttention(config).eval()
    hidden = torch.randn(2, 32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(hidden, attention_mask=torch.ones(2, 32)).hidden_states
        query, value = (
            projection(hidden).unflatten(-1, (3, 8)).transpose(1, 2) for projection in (module.query_key, module.value)
        )
        found = reformer_attention(query, value, torch.zeros(3, 1, 8, 1), chunk=32)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), expected, atol=1e-5, rtol=1e-4)
