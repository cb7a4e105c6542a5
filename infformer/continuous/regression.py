"""Ridge regression of samples onto a basis.

The coefficients that fit samples X [P, d] at positions t [P] are B = Gᵀ X with an operator G [P, N] that depends on the
positions alone. Beside the data, zeros can be fitted at as many positions again outside [0, 1], as in the published
code: they hold the signal down at its two ends, a little more at every write. Only the rows of G that belong to data
are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis, negligible


def ridge_operator(design: Tensor, ridge: float, weights: Tensor | None = None) -> Tensor:
    """G = WΨ (ΨᵀWΨ + ridge·I)⁻¹ for a design matrix Ψ_ij = ψ_j(t_i) and weights W = diag(w_i).

    Args:
        design: Ψ, shape [..., P, N]; float64 keeps the normal equations accurate.
        ridge: λ > 0.
        weights: w, how many samples each sample counts for, shape [..., P]; 1 if not given.

    Returns:
        G, shape [..., P, N].
    """
    identity = torch.eye(design.shape[-1], dtype=design.dtype, device=design.device)
    weighted = design if weights is None else weights.unsqueeze(-1) * design
    factor = torch.linalg.cholesky(weighted.mT @ design + ridge * identity)
    return torch.cholesky_solve(weighted.mT, factor).mT


def first_operator(basis: GaussianBasis, length: int, ridge: float, zeros: bool = True) -> Tensor:
    """Operator [length, N] for a first segment, its tokens in the middle of `length` equal parts of [0, 1].

    Args:
        zeros: fit zeros outside [0, 1] too, as published.
    """
    positions = (torch.arange(2 * length).to(basis.centres) - length // 2 + 0.5) / length
    if not zeros:
        positions = positions[_inside(positions)]
    return ridge_operator(basis.evaluate(positions), ridge)[_inside(positions)]


def next_operators(
    basis: GaussianBasis,
    length: int,
    past: Tensor,
    contraction: Tensor,
    ridge: float,
    past_weight: Tensor | None = None,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """Operators for a later segment, fitted together with samples of the contracted past.

    A sample of the past that belongs at t is placed at τt; token i = 1…length of the new segment stands at
    τ + (1 − τ)·i/length.

    Args:
        past: t, where the samples of the past belong before it is contracted, in [0, 1], shape [M]. They have to be
            taken there, or the past moves a little at every write: see `even_steps` and `even_middles`.
        contraction: τ in (0, 1), shape [...]: the part of [0, 1] that the past keeps.
        past_weight: how many tokens each sample of the past counts for, shape [...]; 1 if not given, as published.
        zeros: fit zeros outside [0, 1] too, as published.

    Returns:
        The operator of the past [..., M, N] and that of the new segment [..., length, N].
    """
    contraction = contraction.to(basis.centres).unsqueeze(-1)
    samples, past = len(past), past.to(basis.centres)
    new = even_steps(length).to(basis.centres)
    padding = _even_positions(2 * (samples + length) if zeros else 0, 1 / (2 * length + samples), basis)
    padding = padding[~_inside(padding)]
    positions = torch.cat(
        [
            contraction * past,
            contraction + (1 - contraction) * new,
            padding.expand(*contraction.shape[:-1], -1),
        ],
        dim=-1,
    )
    weights = None
    if past_weight is not None:
        weights = torch.ones_like(positions)
        weights[..., :samples] = past_weight.to(positions).unsqueeze(-1)
    operator = ridge_operator(basis.evaluate(positions), ridge, weights)
    return operator[..., :samples, :], operator[..., samples : samples + length, :]


def rounded(operator: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator in a shorter type; there, what is negligible beside the largest of its entries is zero."""
    largest = operator.abs().amax(dim=(-2, -1), keepdim=True)
    return operator.masked_fill(operator.abs() < negligible(dtype) * largest, 0).to(dtype)


def even_steps(count: int) -> Tensor:
    """m/count for m = 1…count, float64: the ends of equal parts of [0, 1]."""
    return torch.arange(1, count + 1, dtype=torch.float64) / count


def even_middles(count: int) -> Tensor:
    """(m − ½)/count for m = 1…count, float64: the middles of equal parts of [0, 1]."""
    return (torch.arange(1, count + 1, dtype=torch.float64) - 0.5) / count


def even_points(count: int) -> Tensor:
    """(m − 1)/(count − 1) for m = 1…count, float64: evenly over [0, 1], ends included."""
    return torch.linspace(0, 1, count, dtype=torch.float64)


def _even_positions(count: int, margin: float, basis: GaussianBasis) -> Tensor:
    """`count` positions spread evenly over [−½, 3/2], `margin` away from its ends."""
    centres = basis.centres
    return torch.linspace(-0.5 + margin, 1.5 - margin, count, dtype=centres.dtype, device=centres.device)


def _inside(positions: Tensor) -> Tensor:
    return (positions >= 0) & (positions <= 1)
