"""The continuous memory's equations written literally, as the published code computes them.

The oracle of the tests and the baseline of the benchmark. Neither may share formulas with the code that it is held
against, so nothing is imported from there. The scores of every query against every basis function exist, the normal
equations are inverted, and heads and bins are gone through one by one.

Sizes: batch b, heads H, queries L, basis functions N, model width d, segment length T, samples of the past M.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Basis = tuple[Tensor, Tensor]
"""Centres c and widths w of the functions ψ_j(t) = 𝒩(t; c_j, w_j²), each [N]."""

Expectation = Callable[[Tensor, Tensor, Basis], Tensor]
"""Mean and variance [...] of a density to the weights r_j = E_p[ψ_j] [..., N]."""

Cumulative = Callable[[float], Tensor]
"""A position to the mass of every density on its left, [b, H, L]."""


class Weights(NamedTuple):
    """Projections of one memory, each [d, d] and applied as x Wᵀ."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


# Write


def normal_density(positions: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """𝒩(t; m, v) = exp(−(t − m)²/(2v)) / √(2πv), the arguments broadcast."""
    return torch.exp(-((positions - mean) ** 2) / (2 * variance)) / torch.sqrt(2 * math.pi * variance)


def evaluate(positions: Tensor, basis: Basis) -> Tensor:
    """Ψ_ij = ψ_j(t_i): positions [..., P] to [..., P, N]."""
    centres, widths = basis
    return normal_density(positions[..., None], centres, widths**2)


def first_operator(length: int, basis: Basis, ridge: float, zeros: bool = True) -> Tensor:
    """G for a first segment, [T, N]: t_i = (i − ½)/T, zeros at T more places of that kind before 0 and after 1."""
    places = [(i - 0.5) / length for i in range(1 - length // 2, 2 * length - length // 2 + 1)]
    inside = [place for place in places if 0 < place < 1]
    outside = [place for place in places if not 0 < place < 1]
    return _operator(inside, torch.tensor(outside if zeros else [], dtype=torch.float64), basis, ridge)


def next_operator(
    length: int,
    samples: int,
    contraction: float,
    basis: Basis,
    ridge: float,
    past_weight: float = 1.0,
    before: float = 0.0,
    zeros: bool = True,
) -> Tensor:
    """G for a later one behind its past, [M + T, N]: τ·(m − h)/M for m = 1…M, τ + (1 − τ)·i/T for i = 1…T, and zeros.

    Args:
        past_weight: for how many samples each of the M counts.
        before: h, how far before the end of its part a sample of the past stands: 0, or ½ for the middle.
        zeros: whether there are zeros outside [0, 1].
    """
    past = [contraction * (m - before) / samples for m in range(1, samples + 1)]
    new = [contraction + (1 - contraction) * i / length for i in range(1, length + 1)]
    margin = 1 / (2 * length + samples)
    outside = torch.linspace(-0.5 + margin, 1.5 - margin, 2 * (samples + length), dtype=torch.float64)
    outside = outside[((outside < 0) | (outside > 1)) & zeros]
    weights = torch.tensor([past_weight] * samples + [1.0] * (length + len(outside)), dtype=torch.float64)
    return _operator(past + new, outside, basis, ridge, weights)


def write(
    coefficients: Tensor | None, hidden: Tensor, operator: Tensor, basis: Basis, positions: Tensor | None = None
) -> Tensor:
    """B' = Gᵀ [X̄(t_1) … X̄(t_M), x_1 … x_T] with the old signal X̄(t) = Bᵀψ(t): coefficients [b, N, d] after a segment.

    Args:
        coefficients: B, [b, N, d]; None where nothing has been written.
        hidden: X, [b, T, d].
        operator: `first_operator` where nothing has been written, else `next_operator`.
        positions: t_m, [M] or [b, M]; m/M if not given, which goes with the operator of samples at the ends.
    """
    if coefficients is None:
        return operator.T @ hidden
    if positions is None:
        samples = len(operator) - hidden.shape[1]
        positions = hidden.new_tensor([m / samples for m in range(1, samples + 1)])
    past = evaluate(positions, basis) @ coefficients
    return operator.T @ torch.cat([past, hidden], dim=1)


def dyadic_slots(tokens: Tensor, slots: int, levels: int) -> Tensor:
    """All that was written, [b, total, d], in levels of equally many slots, the oldest first: [b, slots, d].

    Slot i of level k, from the newest, is the mean of the 2ᵏ tokens from age (slots/levels)(2ᵏ − 1) + i·2ᵏ on; what is
    before the beginning counts as zero.
    """
    found = []
    for level in range(levels):
        for slot in range(slots // levels):
            first = slots // levels * (2**level - 1) + slot * 2**level
            ages = [age for age in range(first, first + 2**level) if age < tokens.shape[1]]
            total = sum((tokens[:, tokens.shape[1] - 1 - age] for age in ages), torch.zeros_like(tokens[:, 0]))
            found.append(total / 2**level)
    return torch.stack(found[::-1], dim=1)


def gate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X ⊙ sigmoid(Conv1d(X)) over the tokens: hidden [b, T, d], weight [d, d, 3], bias [d]."""
    padded = F.pad(hidden, (0, 0, 1, 1))
    length = hidden.shape[1]
    mask = bias + sum(padded[:, tap : tap + length] @ weight[:, :, tap].T for tap in range(3))
    return hidden * torch.sigmoid(mask)


# Read


def scores(hidden: Tensor, coefficients: Tensor, query: Tensor, key: Tensor, heads: int) -> Tensor:
    """s = K_h q_h / √(d/H) with K = B W_K and q = x W_Q: hidden [b, L, d], coefficients [b, N, d] to [b, H, L, N]."""
    queries = split_heads(hidden @ query.T, heads)
    keys = split_heads(coefficients @ key.T, heads)
    return queries @ keys.transpose(-1, -2) / math.sqrt(hidden.shape[-1] // heads)


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """[b, length, d] to [b, H, length, d/H]."""
    batch, length, width = tensor.shape
    return tensor.view(batch, length, heads, width // heads).transpose(1, 2)


def gaussian_expectation(mean: Tensor, variance: Tensor, basis: Basis) -> Tensor:
    """r_j = 𝒩(μ; c_j, σ² + w_j²): the integral of a product of two normal densities; [..., N]."""
    centres, widths = basis
    return normal_density(mean[..., None], centres, variance[..., None] + widths**2)


def truncated_parabola_expectation(mean: Tensor, variance: Tensor, basis: Basis) -> Tensor:
    """r_j = ∫ [−λ − s²/(2σ²)]₊ 𝒩(s; δ_j, w_j²) ds with s = t − μ, δ_j = c_j − μ; [..., N].

    λ = −½(3/(2σ))^{2/3}, support |s| ≤ a = √(−2λσ²). The moments over it are m₀ = [Φ((s − δ)/w)] and
    m₂ = (δ² + w²)·m₀ − w²·[(s + δ)·𝒩(s; δ, w²)], brackets taken from −a to a, and r = −λ·m₀ − m₂/(2σ²).
    """
    centres, widths = basis
    variance = variance[..., None]
    threshold = -0.5 * (3 / (2 * torch.sqrt(variance))) ** (2 / 3)
    end = torch.sqrt(-2 * threshold * variance)
    offset = centres - mean[..., None]

    def boundary(position: Tensor) -> Tensor:
        return (position + offset) * normal_density(position, offset, widths**2)

    mass = normal_cumulative((end - offset) / widths) - normal_cumulative((-end - offset) / widths)
    second = (offset**2 + widths**2) * mass - widths**2 * (boundary(end) - boundary(-end))
    return -threshold * mass - second / (2 * variance)


def affine_read(
    hidden: Tensor,
    coefficients: Tensor,
    weights: Weights,
    mean_weight: Tensor,
    variance_weight: Tensor,
    heads: int,
    basis: Basis,
    expectation: Expectation = gaussian_expectation,
) -> tuple[Tensor, Tensor, Tensor]:
    """μ = sigmoid(w_μ·s), σ² = max(softplus(w_σ·s), 10⁻⁴): context [b, L, d], mean and variance [b, H, L].

    Args:
        hidden: x, [b, L, d].
        coefficients: B, [b, N, d].
        mean_weight: w_μ, [N].
        variance_weight: w_σ, [N].
    """
    score = scores(hidden, coefficients, weights.query, weights.key, heads)
    mean = torch.sigmoid(score @ mean_weight)
    variance = F.softplus(score @ variance_weight).clamp(min=1e-4)
    return context(expectation(mean, variance, basis), coefficients, weights), mean, variance


def moments_read(
    hidden: Tensor,
    coefficients: Tensor,
    weights: Weights,
    heads: int,
    basis: Basis,
    expectation: Expectation = gaussian_expectation,
    sharpness: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """α = softmax(βs), μ = Σ α_j c_j, σ² = Σ α_j (c_j² + w_j²) − μ²: context [b, L, d], mean and variance [b, H, L]."""
    centres, widths = basis
    alpha = torch.softmax(sharpness * scores(hidden, coefficients, weights.query, weights.key, heads), dim=-1)
    mean = (alpha * centres).sum(-1)
    variance = (alpha * (centres**2 + widths**2)).sum(-1) - mean**2
    return context(expectation(mean, variance, basis), coefficients, weights), mean, variance


def slots_read(
    hidden: Tensor, coefficients: Tensor, weights: Weights, heads: int, basis: Basis, sharpness: float = 1.0
) -> tuple[Tensor, Tensor]:
    """α = softmax(βs), r_j = α_j ψ_j(c_j): context [b, L, d] and α [b, H, L, N]."""
    centres, widths = basis
    alpha = torch.softmax(sharpness * scores(hidden, coefficients, weights.query, weights.key, heads), dim=-1)
    return context(alpha * normal_density(centres, centres, widths**2), coefficients, weights), alpha


def gibbs_read(
    hidden: Tensor,
    coefficients: Tensor,
    weights: Weights,
    heads: int,
    basis: Basis,
    points: Tensor,
    sharpness: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """p(t) = exp(βs(t)) / ∫ exp(βs(t)) dt with s(t) = qᵀK(t)/√(d/H), z = ∫ p(t) V(t) dt, both by the trapezoid rule.

    Args:
        points: t, [P], ascending.

    Returns:
        Context [b, L, d] and p at the points [b, H, L, P].
    """
    signal = evaluate(points, basis) @ coefficients
    height = torch.exp(sharpness * scores(hidden, signal, weights.query, weights.key, heads))
    density = height / torch.trapezoid(height, points)[..., None]
    values = split_heads(signal @ weights.value.T, heads)[:, :, None]
    read = torch.trapezoid(density[..., None] * values, points, dim=-2)
    return torch.cat([read[:, head] for head in range(heads)], dim=-1) @ weights.output.T, density


def context(expected: Tensor, coefficients: Tensor, weights: Weights) -> Tensor:
    """z_h = rᵀ B W_V^h and [z_1 … z_H] W_O: r [b, H, L, N], coefficients [b, N, d] to [b, L, d]."""
    heads = expected.shape[1]
    read = expected @ split_heads(coefficients @ weights.value.T, heads)
    return torch.cat([read[:, head] for head in range(heads)], dim=-1) @ weights.output.T


def variance_divergence(variance: Tensor, prior_standard_deviation: float) -> Tensor:
    """½(σ²/σ₀² − ln(σ²/σ₀²) − 1), the shape of the variance."""
    prior = prior_standard_deviation**2
    return 0.5 * (variance / prior - torch.log(variance) + math.log(prior) - 1)


# Sticky memories


def normal_cumulative(z: Tensor) -> Tensor:
    """Φ(z)."""
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def gaussian_cumulative(mean: Tensor, variance: Tensor) -> Cumulative:
    """Φ((t − μ)/σ). The published code takes this one for either density."""
    return lambda position: normal_cumulative((position - mean) / torch.sqrt(variance))


def truncated_parabola_cumulative(mean: Tensor, variance: Tensor) -> Cumulative:
    """∫ [a² − s²]₊/(2σ²) ds up to t − μ: (a²s − s³/3 + ⅔a³)/(2σ²) at s = t − μ cut off at ±a."""

    def cumulative(position: float) -> Tensor:
        end = (1.5 * variance) ** (1 / 3)
        s = torch.minimum(torch.maximum(position - mean, -end), end)
        return (end**2 * s - s**3 / 3 + 2 / 3 * end**3) / (2 * variance)

    return cumulative


def slots_cumulative(alpha: Tensor, basis: Basis) -> Cumulative:
    """Σ_j α_j Φ((t − c_j)/w_j)."""
    centres, widths = basis
    return lambda position: (alpha * normal_cumulative((position - centres) / widths)).sum(-1)


def gibbs_cumulative(density: Tensor, points: Tensor) -> Cumulative:
    """Panel by panel the integral of a density [..., P] that is linear between points."""

    def cumulative(position: float) -> Tensor:
        mass = torch.zeros_like(density[..., 0])
        for place in range(len(points) - 1):
            left, right = points[place], points[place + 1]
            share = ((position - left) / (right - left)).clamp(0, 1)
            here = density[..., place] + share * (density[..., place + 1] - density[..., place])
            mass = mass + share * (right - left) * (density[..., place] + here) / 2
        return mass

    return cumulative


def histogram(cumulative: Cumulative, bins: int) -> Tensor:
    """Attention mass in each of equal bins of [0, 1], summed over heads and queries and normalised: [b, bins]."""
    masses = [cumulative((bin_ + 1) / bins) - cumulative(bin_ / bins) for bin_ in range(bins)]
    mass = torch.stack([mass.sum((1, 2)) for mass in masses], dim=1)
    return mass / mass.sum(1, keepdim=True)


def resample(mass: Tensor, samples: int, offsets: Tensor | None = None) -> Tensor:
    """t_m = cdf⁻¹((m − v_m)/M), m = 1…M, for the piecewise linear cdf of a histogram [b, bins]: [b, M].

    Args:
        offsets: v in [0, 1), [b, M]; ½ if not given.
    """
    rows, bins = mass.shape
    offsets = mass.new_full((rows, samples), 0.5) if offsets is None else offsets.to(mass)
    targets = (torch.arange(1, samples + 1).to(mass) - offsets) / samples
    positions = torch.empty_like(targets)
    for row in range(rows):
        before = 0.0
        for place, height in enumerate(mass[row].tolist()):
            if height > 0:
                here = targets[row] > before  # a later bin overrules this one
                positions[row, here] = (place + ((targets[row, here] - before) / height).clamp(max=1)) / bins
                before += height
    return positions


def _operator(data: list[float], zeros: Tensor, basis: Basis, ridge: float, weights: Tensor | None = None) -> Tensor:
    """The rows of G = WΨ (ΨᵀWΨ + λI)⁻¹ that belong to data, in the type of the basis; W = I if not given."""
    design = evaluate(torch.cat([torch.tensor(data, dtype=torch.float64), zeros]).to(basis[0]), basis)
    weighted = design if weights is None else torch.diag(weights.to(design)) @ design
    inverse: Tensor = torch.linalg.inv(design.T @ weighted + ridge * torch.eye(design.shape[1]).to(design))
    return (weighted @ inverse)[: len(data)]
