"""Sinkhorn's sorting, and its attention where the order is known."""

import torch

from infformer.attention import sinkhorn as module
from infformer.attention.patterns import local_attention
from infformer.attention.sinkhorn import sinkhorn, sinkhorn_attention


def test_rows_and_columns_of_the_sorting_matrix_sum_to_one():
    order = sinkhorn(torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 50)
    torch.testing.assert_close(order.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    torch.testing.assert_close(order.sum(-2), torch.ones(2, 3, 6, dtype=torch.float64))


def new_inputs(length=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, dtype=torch.float64, generator=generator) for _ in range(3)]


def test_a_block_that_is_sorted_to_itself_counts_twice_as_in_local_attention(monkeypatch):
    query, key, value = new_inputs()
    monkeypatch.setattr(
        module, "sinkhorn", lambda logits, iterations: torch.eye(3, dtype=logits.dtype).expand_as(logits)
    )
    torch.testing.assert_close(sinkhorn_attention(query, key, value, 8, 1, 1.0), local_attention(query, key, value, 8))


def test_a_permutation_brings_each_block_the_keys_of_another(monkeypatch):
    query, key, value = new_inputs()
    permutation = torch.eye(3, dtype=torch.float64)[[1, 2, 0]]
    monkeypatch.setattr(module, "sinkhorn", lambda logits, iterations: permutation.expand_as(logits))
    found = sinkhorn_attention(query, key, value, 8, 1, 1.0)
    for block, other in enumerate([1, 2, 0]):
        rows = [slice(8 * block, 8 * block + 8), slice(8 * other, 8 * other + 8)]
        keys, values = (torch.cat([tensor[:, :, row] for row in rows], dim=2) for tensor in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, rows[0]], keys, values)
        torch.testing.assert_close(found[:, :, rows[0]], expected)


def test_padding_is_not_seen():
    query, key, value = new_inputs(29)
    real = torch.arange(29) < torch.tensor([[29], [13]])
    shown = real[:, None, :, None]
    before = sinkhorn_attention(query, key, value, 8, 5, 0.7, real)
    after = sinkhorn_attention(*(tensor + 10 * ~shown for tensor in (query, key, value)), 8, 5, 0.7, real)
    torch.testing.assert_close(before * shown, after * shown)
