"""Attention by features, φ(Q)(φ(K)ᵀV) in place of softmax(QKᵀ)V: Linear Transformer and Performer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Positions that causal attention by features takes together."""


def feature_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, smallest: float = 1e-6
) -> Tensor:
    """Σ_j (φ(q)·φ(k_j)) v_j / Σ_j φ(q)·φ(k_j), [batch, heads, length, size], in time that is linear in the length.

    Args:
        query: φ(Q), not negative, [batch, heads, length, features].
        key: φ(K); zero where padding is.
        causal: by sums over chunks, and within a chunk by all pairs of it.
        smallest: added to the denominator.
    """
    value = F.pad(value, (0, 1), value=1.0)  # its last entry sums the weights
    if causal:
        length = query.shape[2]
        query, key, value = (
            F.pad(tensor, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK)) for tensor in (query, key, value)
        )
        sums = key.mT @ value
        before = sums.cumsum(dim=2) - sums
        attended = (query @ before + (query @ key.mT).tril() @ value).flatten(2, 3)[:, :, :length]
    else:
        attended = query @ (key.mT @ value)
    return attended[..., :-1] / (attended[..., -1:] + smallest)


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Linear Transformer (Katharopoulos et al., arXiv 2006.16236): φ(x) = elu(x) + 1."""
    return feature_attention(F.elu(query) + 1, _hide(F.elu(key) + 1, real), value, causal)


def performer_attention(
    query: Tensor, key: Tensor, value: Tensor, directions: Tensor, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Performer (Choromanski et al., arXiv 2009.14794): positive random features of the softmax kernel.

    Args:
        directions: [features, size], of `orthogonal_directions`.
    """
    of_queries, of_keys = _exponents(query, directions), _exponents(key, directions)
    # What is subtracted cancels in the quotient: per query, and per head over all keys.
    of_queries = of_queries - of_queries.detach().amax(dim=-1, keepdim=True)
    of_keys = of_keys - of_keys.detach().amax(dim=(2, 3), keepdim=True)
    return feature_attention(of_queries.exp(), _hide(of_keys.exp(), real), value, causal, smallest=1e-9)


def softmax_features(tensor: Tensor, directions: Tensor) -> Tensor:
    """φ(x) with E[φ(q)·φ(k)] = exp(q·k/√d), [..., features]: exp(w·x' − ‖x'‖²/2)/√m, x' = x/d^¼."""
    return torch.exp(_exponents(tensor, directions)) / math.sqrt(len(directions))


def _exponents(tensor: Tensor, directions: Tensor) -> Tensor:
    scaled = tensor / tensor.shape[-1] ** 0.25
    return scaled @ directions.mT - scaled.square().sum(dim=-1, keepdim=True) / 2


def orthogonal_directions(features: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions w, each normal, orthogonal to each other in groups of `size`, [features, size].

    The orthogonal factor of a Gaussian matrix is uniform only with the signs that make the other factor's diagonal
    positive; without them the features are biased by some per cent.
    """
    groups = -(-features // size)
    orthogonal, triangular = torch.linalg.qr(torch.randn(groups, size, size, generator=generator))
    signs = triangular.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions = (orthogonal * signs).mT.flatten(0, 1)[:features]
    lengths = torch.randn(features, size, generator=generator).norm(dim=1, keepdim=True)
    return directions * lengths


def _hide(features: Tensor, real: Tensor | None) -> Tensor:
    return features if real is None else features * real[:, None, :, None]
