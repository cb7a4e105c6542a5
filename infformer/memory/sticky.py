"""Sticky memories: the past that was attended to is given more room when it is resampled."""

from __future__ import annotations

import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Density


def attention_histogram(attention: Density, basis: GaussianBasis, bins: int) -> Tensor:
    """How the attention of one segment is spread over [0, 1].

    Args:
        attention: densities of shape [batch, heads, queries].

    Returns:
        Mass per equal bin, averaged over heads and queries and normalised on [0, 1]: shape [batch, bins].
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=basis.centres.device).to(basis.centres)
    mass = attention.cumulative(edges, basis).mean(dim=(1, 2)).diff(dim=-1)
    return mass / mass.sum(-1, keepdim=True)


def warped_positions(histogram: Tensor, samples: int, offsets: Tensor | None = None) -> Tensor:
    """Where to sample the past: the inverse of the histogram's cumulative function on a stratified grid.

    Sample m = 1…samples is taken at cdf⁻¹((m − v_m)/samples): one draw from each of `samples` parts of equal mass. It
    has the law of independent draws from the histogram with far less noise; with v_m = ½ it is the deterministic time
    warp.

    Args:
        histogram: mass per bin, shape [batch, bins], sum one.
        offsets: v in [0, 1), shape [batch, samples]; ½ everywhere if not given.

    Returns:
        Ascending positions in [0, 1], shape [batch, samples].
    """
    rows, bins = histogram.shape
    strata = torch.arange(1, samples + 1, device=histogram.device, dtype=histogram.dtype).expand(rows, -1)
    targets = (strata - (0.5 if offsets is None else offsets.to(histogram))) / samples
    cumulative = histogram.cumsum(-1)
    # The sum may be rounded below one. And where a loss has become NaN, that is to be said there, not by a bad index.
    index = torch.searchsorted(cumulative, targets.minimum(cumulative[:, -1:])).clamp(max=bins - 1)
    mass = histogram.gather(-1, index)
    before = cumulative.gather(-1, index) - mass
    within = ((targets - before) / mass.clamp(min=torch.finfo(mass.dtype).tiny)).clamp(0, 1)
    return (index + within) / bins


def moved_losses(losses: Tensor, positions: Tensor, contraction: Tensor) -> Tensor:
    """What the losses of the past are in each bin after it has been resampled and contracted.

    Args:
        losses: mean nats of the tokens in each equal bin of [0, 1], shape [batch, bins].
        positions: where the past is sampled, ascending, shape [batch, samples].
        contraction: τ, shape [batch].

    Returns:
        Shape [batch, bins]; bins behind τ have no meaning.
    """
    bins, samples = losses.shape[-1], positions.shape[-1]
    before = (_middles(losses) / contraction.unsqueeze(-1)).clamp(max=1)  # also of a row without a past
    taken = positions.gather(-1, (before * samples).long().clamp(max=samples - 1))
    return losses.gather(-1, (taken * bins).long().clamp(max=bins - 1))


def with_new_losses(losses: Tensor, new: Tensor, contraction: Tensor) -> Tensor:
    """Losses by bin, of which those behind τ are the means of a new segment's.

    Args:
        losses: shape [batch, bins].
        new: of the segment's tokens, which divide [τ, 1] among them, shape [batch, T].
        contraction: τ, shape [batch]; 0 for a row's first segment.
    """
    bins, length = losses.shape[-1], new.shape[-1]
    edges = torch.arange(bins + 1, device=losses.device).to(losses) / bins
    first = contraction.unsqueeze(-1)
    tokens = ((edges - first) / (1 - first)).clamp(0, 1) * length  # how many stand to the left of each edge
    whole = tokens.long().clamp(max=length - 1)
    sums = torch.cat([torch.zeros_like(new[:, :1]), new.cumsum(-1)], dim=-1)
    left = sums.gather(-1, whole) + (tokens - whole) * new.gather(-1, whole)
    means = left.diff(dim=-1) / tokens.diff(dim=-1).clamp(min=torch.finfo(left.dtype).tiny)
    return torch.where(_middles(losses) > first, means, losses)


def _middles(losses: Tensor) -> Tensor:
    """Of the bins, [bins]."""
    bins = losses.shape[-1]
    return (torch.arange(bins, device=losses.device).to(losses) + 0.5) / bins


def places_after_warp(histogram: Tensor, positions: Tensor) -> Tensor:
    """Where positions of the past lie once it has been resampled: what was at t comes to cdf(t).

    The inverse of `warped_positions`: sample m, taken at cdf⁻¹((m − ½)/samples), then stands at (m − ½)/samples.

    Args:
        histogram: mass per bin, shape [batch, bins], sum one.
        positions: t in [0, 1], shape [batch, P].

    Returns:
        Places in [0, 1], shape [batch, P].
    """
    bins = histogram.shape[-1]
    scaled = (positions * bins).clamp(0, bins)
    index = scaled.long().clamp(max=bins - 1)
    mass = histogram.gather(-1, index)
    before = histogram.cumsum(-1).gather(-1, index) - mass
    return (before + mass * (scaled - index)).clamp(max=1)
