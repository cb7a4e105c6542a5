"""∞-former's continuous attention in place of softmax: a text becomes N functions, whatever its length."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from infformer.continuous.basis import GaussianBasis, GaussianGrid
from infformer.continuous.density import Gaussian, match_moments
from infformer.continuous.regression import first_operator, rounded


def continuous_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    functions: int,
    widths: tuple[float, ...],
    ridge: float,
    real: Tensor | None = None,
) -> Tensor:
    """Attention to K̄(t) = (GᵀK)ᵀψ(t) and V̄(t), [batch, heads, length, size], in time that is linear in the length.

    Each query's softmax over the N functions has a mean and a variance; the normal density with these reads V̄ (Martins
    et al., arXiv 2109.00301, by moments).

    Args:
        query, key, value: [batch, heads, length, size].
        functions: N.
        widths: of the functions, as parts of the whole text.
        ridge: λ of the regression G.
        real: which positions are not padding, which stands behind the text, bool [batch, length].
    """
    own = torch.promote_types(key.dtype, torch.float32)  # as in the memory: a place in a long text wants its digits
    grid = GaussianGrid(
        torch.linspace(0, 1, functions // len(widths), dtype=own).to(key.device),
        torch.tensor(widths, dtype=own, device=key.device),
    )
    # Of a text of padding alone one position is read: nothing can be fitted to none.
    lengths = [key.shape[2]] if real is None else real.sum(dim=1).clamp(min=1).tolist()
    operators = [_operator(length, functions, widths, ridge, own) for length in lengths]
    # Padding has rows of zeros: each text alone is fitted to all of [0, 1].
    padded = torch.stack([F.pad(operator, (0, 0, 0, key.shape[2] - len(operator))) for operator in operators])
    with torch.autocast(key.device.type, enabled=False):
        fit = padded.to(key.device).mT.unsqueeze(1)
        scores = query.to(own) @ (fit @ key.to(own)).mT / math.sqrt(query.shape[-1])
        mean, variance = match_moments(torch.softmax(scores, dim=-1), grid.basis)
        return Gaussian(mean, variance).read(grid, (fit @ value.to(own)).to(value))


@lru_cache(maxsize=256)
def _operator(length: int, functions: int, widths: tuple[float, ...], ridge: float, dtype: torch.dtype) -> Tensor:
    """G, from the positions of a text to coefficients, [length, N]."""
    basis = GaussianBasis.even_grid(functions, widths)
    return rounded(first_operator(basis, length, ridge, zeros=False), dtype)
