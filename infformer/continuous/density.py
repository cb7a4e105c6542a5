"""Where a query looks: densities on the line, and what they see of a basis.

Each class answers the same three questions: `expectation(basis)`, the weights r_j = E_p[ψ_j] [..., N] with which a
query reads the N coefficients; `read(grid, values)`, what it reads with them, rᵀV, of values [batch, heads, N, size] by
densities [batch, heads, queries], as a product of the values' type; and `cumulative(positions, basis)`, the mass to the
left of P positions [..., P]. What `Gibbs` reads are values of the signal, at its points.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis, GaussianGrid, gaussian, standard_normal_cumulative
from infformer.continuous.gaussian_read import gaussian_read
from infformer.continuous.regression import even_points


class Gaussian(NamedTuple):
    """Continuous softmax: p(t) = 𝒩(t; mean, variance)."""

    mean: Tensor
    variance: Tensor

    def expectation(self, basis: GaussianBasis) -> Tensor:
        """E_p[ψ_j] = 𝒩(mean; c_j, variance + w_j²), shape [..., N]."""
        return gaussian(self.mean.unsqueeze(-1), basis.centres, self.variance.unsqueeze(-1) + basis.widths.square())

    def read(self, grid: GaussianGrid, values: Tensor) -> Tensor:
        """E_p[ψ]ᵀ V, shape [batch, heads, queries, size], without the expectations of all queries at once."""
        return gaussian_read(self.mean, self.variance, grid.centres, grid.widths, values)

    def cumulative(self, positions: Tensor, basis: GaussianBasis) -> Tensor:
        """Mass to the left of positions [P], shape [..., P]."""
        return standard_normal_cumulative(
            (positions - self.mean.unsqueeze(-1)).mul_(self.variance.rsqrt().unsqueeze(-1))
        )


class TruncatedParabola(NamedTuple):
    """Continuous sparsemax: p(t) = [a² − (t − mean)²]₊ / (2 variance), support radius a = (3 variance / 2)^{1/3}.

    `variance` is the parameter σ² of the quadratic score −(t − μ)²/(2σ²), not the second moment of the density
    (Martins et al., Sparse and Continuous Attention Mechanisms, NeurIPS 2020).
    """

    mean: Tensor
    variance: Tensor

    @property
    def radius(self) -> Tensor:
        """Half the length of the support, the shape of the mean."""
        return (1.5 * self.variance).pow(1 / 3)

    def expectation(self, basis: GaussianBasis) -> Tensor:
        """E_p[ψ_j], shape [..., N].

        With z = (t − c)/w, δ = c − μ and z₁, z₂ the ends of the support, the integral of (a² − (δ + wz)²) φ(z) is
        (a² − δ² − w²)[Φ]₁² − 2δw(φ(z₁) − φ(z₂)) − w²(z₁φ(z₁) − z₂φ(z₂)), from ∫zφ = −φ and ∫z²φ = Φ − zφ.

        Of a wide function, where h = a/w is small, that cancels, and its Taylor series at the mean is summed instead:
        with z = δ/w and E[(t − μ)²ᵏ] = 3a²ᵏ/((2k + 1)(2k + 3)), r = φ(z)/w · Σ_k E[(t − μ)²ᵏ] He₂ₖ(z) / ((2k)! w²ᵏ).
        """
        centres, widths = basis
        radius = self.radius.unsqueeze(-1)
        offset = centres - self.mean.unsqueeze(-1)
        left, right = (-radius - offset) / widths, (radius - offset) / widths
        left_height, right_height = _standard_normal(left), _standard_normal(right)
        mass = standard_normal_cumulative(right) - standard_normal_cumulative(left)
        integral = (
            (radius.square() - offset.square() - widths.square()) * mass
            - 2 * offset * widths * (left_height - right_height)
            - widths.square() * (left * left_height - right * right_height)
        )
        # Up to here the rounding of the one, eps/h², is more than what the other leaves out, 10⁻⁴h⁸.
        wide = radius / widths < (1e4 * torch.finfo(radius.dtype).eps) ** 0.1
        z, h = (torch.where(wide, length / widths, 0).square() for length in (offset, radius))
        series = 1 + h * (
            (z - 1) / 10 + h * ((z.square() - 6 * z + 3) / 280 + h * (z * (z * (z - 15) + 45) - 15) / 15120)
        )
        in_series = series * torch.exp(-0.5 * z) / (math.sqrt(2 * math.pi) * widths)
        return torch.where(wide, in_series, integral / (2 * self.variance.unsqueeze(-1)))

    def read(self, grid: GaussianGrid, values: Tensor) -> Tensor:
        """E_p[ψ]ᵀ V, shape [batch, heads, queries, size]."""
        return self.expectation(grid.basis).to(values) @ values

    def cumulative(self, positions: Tensor, basis: GaussianBasis) -> Tensor:
        """Mass to the left of positions [P], shape [..., P]: ½ + (3x − x³)/4 at x = (t − μ)/a in [−1, 1]."""
        x = ((positions - self.mean.unsqueeze(-1)) / self.radius.unsqueeze(-1)).clamp(-1, 1)
        return 0.5 + (3 * x - x.pow(3)) / 4


class Slots(NamedTuple):
    """Attention over the basis functions themselves: the mixture Σ_j α_j 𝒩(c_j, w_j²).

    The coefficients are read with the weights α as they are; the mixture says where on [0, 1] that is.
    """

    weights: Tensor
    """α, shape [..., N], non-negative, of sum one."""

    def expectation(self, basis: GaussianBasis) -> Tensor:
        """α_j times the height of ψ_j, shape [..., N].

        A coefficient times the height of its function is what it adds to the signal at its own centre: of the size of
        the signal, where a coefficient alone is smaller by a factor of the width.
        """
        return self.weights * basis.peaks

    def read(self, grid: GaussianGrid, values: Tensor) -> Tensor:
        """E_p[ψ]ᵀ V, shape [batch, heads, queries, size]; the heights go with the values, of which there are fewer."""
        return self.weights.to(values) @ (grid.basis.peaks.unsqueeze(-1).to(values) * values)

    def cumulative(self, positions: Tensor, basis: GaussianBasis) -> Tensor:
        """Mass to the left of positions [P], shape [..., P]."""
        z = (positions.unsqueeze(-2) - basis.centres.unsqueeze(-1)) / basis.widths.unsqueeze(-1)
        return self.weights @ standard_normal_cumulative(z)


class Gibbs(NamedTuple):
    """Softmax attention on a signal: p(t) ∝ exp(score(t)), with as many points of attention as the scores have peaks.

    The scores are known at even points of [0, 1], ends included. Between two of them p is linear, so that integrals by
    the trapezoid rule are those of p.
    """

    weights: Tensor
    """The mass α of each point, its height times its part of the trapezoid rule, shape [..., points], of sum one."""

    @classmethod
    def of_scores(cls, scores: Tensor) -> Gibbs:
        """Normalised by the trapezoid rule, in which both ends count half."""
        parts = scores.new_zeros(scores.shape[-1])
        parts[0] = parts[-1] = -math.log(2)
        return cls(torch.softmax(parts + scores, dim=-1))

    @property
    def points(self) -> Tensor:
        """Where the scores were known, shape [points]."""
        return even_points(self.weights.shape[-1]).to(self.weights)

    def expectation(self, basis: GaussianBasis) -> Tensor:
        """E_p[ψ_j] by the trapezoid rule, shape [..., N]."""
        return self.weights @ basis.evaluate(self.points)

    def read(self, grid: GaussianGrid, values: Tensor) -> Tensor:
        """E_p[V], shape [batch, heads, queries, size], of values at the points, [batch, heads, points, size]."""
        return self.weights.to(values) @ values

    def cumulative(self, positions: Tensor, basis: GaussianBasis) -> Tensor:
        """Mass to the left of positions [P], shape [..., P].

        A point's mass is spread over a triangle as wide as both its neighbours are apart; that of an end over half of
        one.
        """
        last = self.weights.shape[-1] - 1
        x = positions.clamp(0, 1) * last - torch.arange(last + 1, device=positions.device).unsqueeze(-1)
        rising, falling = (1 + x.clamp(-1, 0)).square() / 2, (1 - x.clamp(0, 1)).square() / 2
        left = torch.where(x < 0, rising, 1 - falling)  # of a whole triangle
        left = torch.cat([2 * left[:1] - 1, left[1:-1], 2 * left[-1:]])
        return self.weights @ left.to(self.weights)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [...] by the trapezoid rule."""
        mean = self.weights @ self.points
        return mean, (self.weights * (self.points - mean.unsqueeze(-1)).square()).sum(-1)


Density = Gaussian | TruncatedParabola | Slots | Gibbs


def match_moments(weights: Tensor, basis: GaussianBasis) -> tuple[Tensor, Tensor]:
    """Mean and variance [...] of the mixture Σ_j α_j 𝒩(c_j, w_j²) with weights α [..., N]."""
    mean = weights @ basis.centres
    # Centred at the mean: Σ α (c² + w²) − μ² loses its digits, and its sign, in float32.
    spread = (basis.centres - mean.unsqueeze(-1)).square() + basis.widths.square()
    return mean, (weights * spread).sum(-1)


def variance_divergence(variance: Tensor, prior_variance: float) -> Tensor:
    """KL(𝒩(m, variance) ‖ 𝒩(m, prior_variance)) = ½(ρ − ln ρ − 1), ρ = variance / prior_variance; same shape."""
    ratio = variance / prior_variance
    return 0.5 * (ratio - torch.log(ratio) - 1)


def _standard_normal(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
