"""Attention by softmax: whole, or in parts that are joined again exactly.

Everywhere in this package query, key and value are [batch, heads, length, size], `real` says which positions are not
padding, bool [batch, length], and `causal` hides what comes after a query. What padded queries return is arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(QKᵀ/√d) V, [batch, heads, length, size]; the cost grows with the square of the length."""
    if real is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    allowed = real[:, None, None, :]
    if causal:
        allowed = allowed & causal_mask(query.shape[2], query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Which position each may see, bool [length, length]: itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Part(NamedTuple):
    """Attention to some of the keys, with what is needed to join it with attention to others."""

    attended: Tensor
    """[..., queries, size]."""
    log_mass: Tensor
    """log Σ exp(score) over these keys, [..., queries]; hugely negative where none is allowed."""


def attend_part(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Part:
    """Attention of queries [..., queries, size] to keys [..., keys, size], of which each sees the allowed ones.

    Args:
        allowed: bool, broadcast to [..., queries, keys]; None: all.
    """
    return weigh_part(query @ key.mT / math.sqrt(query.shape[-1]), value, allowed)


def weigh_part(scores: Tensor, value: Tensor, allowed: Tensor | None = None) -> Part:
    """The same from scores [..., queries, keys]."""
    if allowed is not None:
        # Not −∞: a query that sees none of these keys has gradients, and no weight when parts are joined.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min / 4)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - highest)
    mass = weights.sum(dim=-1, keepdim=True)
    return Part((weights @ value) / mass, (highest + mass.log()).squeeze(-1))


def join_parts(parts: Sequence[Part]) -> Tensor:
    """Attention to the keys of all parts under one softmax, [..., queries, size]. A key in two parts counts twice."""
    weights = torch.softmax(torch.stack([part.log_mass for part in parts]), dim=0).unsqueeze(-1)
    return sum(
        (weight * part.attended for weight, part in zip(weights, parts, strict=True)), start=weights.new_zeros(())
    )
