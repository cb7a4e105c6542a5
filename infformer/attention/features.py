"""Attention by features, φ(Q)(φ(K)ᵀV) in place of softmax(QKᵀ)V: Linear Transformer and Performer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Positions that causal attention by features takes together."""


def feature_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None, causal: bool = False, least: float = 1e-6
) -> Tensor:
    """Σ_j s_j (φ(q)·φ(k_j)) v_j / Σ_j s_j φ(q)·φ(k_j), [batch, heads, length, size], in time linear in the length.

    Args:
        query: φ(Q), not negative, [batch, heads, length, features].
        key: φ(K), like the query.
        weight: s, of each key, [batch, 1 or heads, length]; 1 if not given, 0 for padding.
        causal: by sums over chunks, and within a chunk by all pairs of it.
        least: added to the denominator.
    """
    if type_of_products(value) == torch.float16:  # whose largest number is less than the sums of 1,024 positions
        with torch.autocast(value.device.type, enabled=False):
            whole = feature_attention(
                query.float(), key.float(), value.float(), None if weight is None else weight.float(), causal, least
            )
        return whole.to(value)
    value = F.pad(value, (0, 1), value=1.0)  # its last entry sums the weights
    value = value if weight is None else value * weight.unsqueeze(-1)
    if causal:
        length = query.shape[2]
        query, key, value = (
            F.pad(tensor, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK)) for tensor in (query, key, value)
        )
        # Summed without the chunk's own part: to take that away again leaves noise where it is much the larger.
        before = F.pad(key.mT @ value, (0, 0, 0, 0, 1, -1)).cumsum(dim=2)
        attended = (query @ before + (query @ key.mT).tril() @ value).flatten(2, 3)[:, :, :length]
    else:
        attended = query @ (key.mT @ value)
    return attended[..., :-1] / (attended[..., -1:] + least)


def type_of_products(tensor: Tensor) -> torch.dtype:
    """In which products with a tensor are computed: that of autocast where it is on, which leaves float64 as it is."""
    device = tensor.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
    if has_autocast and torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Linear Transformer (Katharopoulos et al., arXiv 2006.16236): φ(x) = elu(x) + 1."""
    weight = None if real is None else real.unsqueeze(1).to(value)
    return feature_attention(F.elu(query) + 1, F.elu(key) + 1, value, weight, causal)


def performer_attention(
    query: Tensor, key: Tensor, value: Tensor, directions: Tensor, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Performer (Choromanski et al., arXiv 2009.14794): positive random features of the softmax kernel.

    Features are φ(x) = exp(w·x' − ‖x'‖²/2) with x' = x/d^¼. What depends on a query alone cancels in the quotient; what
    depends on a key alone is its weight, so that no feature overflows.

    Args:
        directions: w, [features, size], of `orthogonal_directions`.
    """
    query, key = (tensor / tensor.shape[-1] ** 0.25 for tensor in (query, key))
    of_query, of_key = query @ directions.mT, key @ directions.mT
    highest_of_query, highest_of_key = (tensor.detach().amax(dim=-1, keepdim=True) for tensor in (of_query, of_key))
    log_weight = highest_of_key.squeeze(-1) - key.square().sum(dim=-1) / 2
    if real is not None:
        log_weight = log_weight.masked_fill(~real.unsqueeze(1), -math.inf)
    highest = log_weight.detach().amax(dim=-1, keepdim=True)
    weight = torch.exp(log_weight - highest.clamp(min=torch.finfo(highest.dtype).min))  # −∞ where all is padding
    # In place: new memory costs more than the arithmetic.
    of_query, of_key = of_query.sub_(highest_of_query).exp_(), of_key.sub_(highest_of_key).exp_()
    # Weights are parts of the largest of the whole text, so early ones, which causal attention sees alone, may be tiny.
    return feature_attention(of_query, of_key, value, weight, causal, least=1e-30)


def softmax_features(tensor: Tensor, directions: Tensor) -> Tensor:
    """φ(x) with E[φ(q)·φ(k)] = exp(q·k/√d), [..., features]: exp(w·x' − ‖x'‖²/2)/√m, x' = x/d^¼."""
    scaled = tensor / tensor.shape[-1] ** 0.25
    exponents = scaled @ directions.mT - scaled.square().sum(dim=-1, keepdim=True) / 2
    return torch.exp(exponents) / math.sqrt(len(directions))


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
