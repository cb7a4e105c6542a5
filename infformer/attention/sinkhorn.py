"""Sinkhorn Transformer's attention (Tay et al., arXiv 2002.11296): a block sees itself and a block sorted to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from infformer.attention.softmax import attend_part


def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    iterations: int,
    temperature: float,
    real: Tensor | None = None,
) -> Tensor:
    """softmax over the keys of a position's block and those of the sorted block, [batch, heads, length, size].

    The block that is sorted to block u is Σ_v S_uv K_v, with S of `sinkhorn` from products of the blocks' mean queries
    and mean keys.
    """
    length = query.shape[2]
    shown = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if real is None else real
    shown = F.pad(shown, (0, -length % block), value=False).unflatten(1, (-1, block)).unsqueeze(1)
    query, key, value = (
        F.pad(tensor, (0, 0, 0, -length % block)).unflatten(2, (-1, block)) for tensor in (query, key, value)
    )
    weight = shown.unsqueeze(-1).to(key)
    key, value = key * weight, value * weight
    count = weight.sum(dim=3).clamp(min=1)
    mean_query, mean_key = (query * weight).sum(dim=3) / count, key.sum(dim=3) / count
    logits = mean_query @ mean_key.mT / (math.sqrt(query.shape[-1]) * temperature)
    has_real = shown.any(dim=3)  # the others are sorted among themselves
    logits = logits.masked_fill(has_real.unsqueeze(-1) != has_real.unsqueeze(-2), torch.finfo(logits.dtype).min / 4)
    order = sinkhorn(logits, iterations)
    sorted_key, sorted_value = (torch.einsum("bhuv,bhvtd->bhutd", order, tensor) for tensor in (key, value))
    # Of a sorted block a position is real where a block with a real position may have come.
    sorted_shown = shown.any(dim=2, keepdim=True).expand_as(shown)
    allowed = torch.cat([shown, sorted_shown], dim=3).unsqueeze(-2)
    attended = attend_part(
        query, torch.cat([key, sorted_key], dim=3), torch.cat([value, sorted_value], dim=3), allowed
    ).attended
    return attended.flatten(2, 3)[:, :, :length]


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """A matrix [..., n, n] whose rows and columns sum to one, near exp(logits), by scaling them in turns."""
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
    return logits.exp()
