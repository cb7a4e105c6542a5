"""Attention by weights of low rank or of no query: Linformer and Synthesizer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from infformer.attention.softmax import causal_mask, weigh_part


def linformer_attention(
    query: Tensor, key: Tensor, value: Tensor, of_keys: Tensor, of_values: Tensor, real: Tensor | None = None
) -> Tensor:
    """Linformer (Wang et al., arXiv 2006.04768): softmax(Q(EK)ᵀ/√d)(FV).

    Args:
        of_keys: E, [rank, longest]; a shorter text takes its first columns.
        of_values: F, like E.
        real: padding counts as zeros.
    """
    length = key.shape[2]
    if real is not None:
        key, value = (tensor * real[:, None, :, None] for tensor in (key, value))
    return F.scaled_dot_product_attention(query, of_keys[:, :length] @ key, of_values[:, :length] @ value)


def synthesizer_attention(scores: Tensor, value: Tensor, real: Tensor | None = None, causal: bool = False) -> Tensor:
    """Synthesizer (Tay et al., arXiv 2005.00743): softmax of scores that no product of query and key made.

    Args:
        scores: learned, or made of each position alone, [batch or 1, heads, length, length].
    """
    length = value.shape[2]
    allowed = causal_mask(length, value.device) if causal else None
    if real is not None:
        seen = real[:, None, None, :]
        allowed = seen if allowed is None else seen & allowed
    return weigh_part(scores, value, allowed).attended
