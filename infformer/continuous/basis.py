"""Gaussian radial basis functions on [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GaussianBasis(NamedTuple):
    """N functions ψ_j(t) = 𝒩(t; c_j, w_j²), each of integral one over the real line."""

    centres: Tensor
    """c_j, shape [N]."""
    widths: Tensor
    """w_j, shape [N], in the unit of the centres (the whole signal is one unit long)."""

    @classmethod
    def even_grid(cls, count: int, widths: Sequence[float], dtype: torch.dtype = torch.float64) -> GaussianBasis:
        """Every centre of an even grid on [0, 1], ends included, with each of the widths.

        The functions of one centre are neighbours: (c_1, w_1), (c_1, w_2), (c_2, w_1), …

        Raises:
            ValueError: if `count` is not a multiple of the number of widths.
        """
        if not widths or count % len(widths) != 0:
            raise ValueError(
                f"{count} basis functions cannot be shared evenly by {len(widths)} widths {list(widths)}: "
                "take a multiple of the number of widths"
            )
        centres = torch.linspace(0, 1, count // len(widths), dtype=dtype)
        return GaussianGrid(centres, torch.tensor(list(widths), dtype=dtype)).basis

    @property
    def peaks(self) -> Tensor:
        """ψ_j(c_j), the height of each function, shape [N]."""
        return 1 / (math.sqrt(2 * math.pi) * self.widths)

    def evaluate(self, positions: Tensor) -> Tensor:
        """ψ_j at positions of any shape [...]: shape [..., N]."""
        return gaussian(positions.unsqueeze(-1), self.centres, self.widths.square())


class GaussianGrid(NamedTuple):
    """A basis that has a function of each of W widths at each of K centres."""

    centres: Tensor
    """Shape [K]."""
    widths: Tensor
    """Shape [W]."""

    @property
    def basis(self) -> GaussianBasis:
        """The K·W functions one by one; those of one centre are neighbours."""
        return GaussianBasis(self.centres.repeat_interleave(len(self.widths)), self.widths.repeat(len(self.centres)))


def gaussian(positions: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """𝒩(positions; mean, variance), the arguments broadcast against each other; nowhere less than negligible."""
    exponent = -0.5 * (positions - mean).square() / variance
    exponent = exponent.clamp(min=math.log(negligible(exponent.dtype)))
    return torch.exp(exponent) * torch.rsqrt(2 * math.pi * variance)


def negligible(dtype: torch.dtype) -> float:
    """A part of the largest summand that no sum notices: eps², 10⁻¹⁴ in float32, far below the rounding.

    Tails end here. A little further their values, or products of them, would be too small for normal numbers, and
    processors multiply such numbers twenty times more slowly.
    """
    return torch.finfo(dtype).eps ** 2


def standard_normal_cumulative(z: Tensor) -> Tensor:
    """Φ(z), the cumulative distribution function of 𝒩(0, 1)."""
    return (z * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)  # in place: new memory costs more than the arithmetic
