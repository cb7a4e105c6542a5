"""Reading a signal with normal densities, E_p[ψ]ᵀ V, without the expectations of all queries at once.

The expectations are computed tile by tile, in tiles that fit into the processor's cache, and once more in the backward
pass: nothing of the size queries × functions is kept. To `torch.compile` each pass is one operator. On CUDA, where
densities are float32 and Triton is installed, `gaussian_read_triton` does the work.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infformer.continuous.basis import negligible

CACHED_EXPECTATIONS = 2**18
"""How many a thread of a processor computes at once: 1 MB in float32."""
ACCELERATED_EXPECTATIONS = 2**27
"""The same on an accelerator, which is to be kept busy."""


def gaussian_read(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor) -> Tensor:
    """Σ_j r_j v_j with r_j = E_p[ψ_j] = 𝒩(mean; c_j, variance + w_j²), for each query's p = 𝒩(mean, variance).

    Differentiable once, by mean, variance and values. Values may have a shorter type than densities: the operands of
    the products then have that of the values, and their sums that of the densities.

    Args:
        mean: [batch, heads, queries].
        variance: like the mean.
        centres: [K], ascending; every centre has a function of every width.
        widths: [W].
        values: v, [batch, heads, K·W, size]; the functions of one centre are neighbours.

    Returns:
        [batch, heads, queries, size], of the values' type.
    """
    # What makes an operator of it costs a call three times as much of the processor as the function alone.
    read: Any = _operator
    if not torch.compiler.is_compiling():
        read = _Read.apply if torch.is_grad_enabled() else _read
    context: Tensor = read(mean, variance, centres, widths, values)
    return context


class _Read(torch.autograd.Function):
    """The passes as they are, where nothing is traced."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _read(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (of_mean, of_variance), of_values = _read_backward(upstream, *ctx.saved_tensors)
        return of_mean, of_variance, None, None, of_values


def _read(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor) -> Tensor:
    if _can_use_triton(mean, values):
        from infformer.continuous import gaussian_read_triton

        return gaussian_read_triton.read(mean, variance, centres, widths, values)
    if mean.shape[-1] < values.shape[-1]:  # expectations of few queries are moved in less time than the values
        expectation = _expect(mean, variance, centres, widths).expectation.mT.flatten(-2)
        return (expectation @ values.to(mean)).to(values)
    grouped = _by_width(values.to(mean), len(widths))
    context = _read_shape(mean, variance, centres, widths, values)
    rows, mean_rows, variance_rows = context.flatten(0, 1), mean.flatten(0, 1), variance.flatten(0, 1)
    for tile in _tiles(mean_rows, values.shape[2]):
        expectation = _expect(mean_rows[tile], variance_rows[tile], centres, widths).expectation
        rows[tile] = (expectation.flatten(-2) @ grouped[tile[0]]).to(values)
    return context


def _read_backward(
    upstream: Tensor, mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """∂L/∂ mean and variance, [2, batch, heads, queries], and ∂L/∂ values, from ∂L/∂ context.

    With δ = mean − c, s = variance + w² and m_i = Σ_c r ∂L/∂r δⁱ for each width: ∂L/∂mean = −Σ_w m₁/s and
    ∂L/∂variance = Σ_w (m₂/s − m₀)/(2s).
    """
    if _can_use_triton(mean, values):
        from infformer.continuous import gaussian_read_triton

        return gaussian_read_triton.read_backward(upstream, mean, variance, centres, widths, values)
    grouped, upstream = _by_width(values.to(mean), len(widths)), upstream.to(mean).flatten(0, 1)
    mean_rows, variance_rows = mean.flatten(0, 1), variance.flatten(0, 1)
    of_mean, of_variance = of_densities = mean.new_empty(2, *mean_rows.shape)
    of_values = torch.zeros_like(grouped)
    for tile in _tiles(mean_rows, values.shape[2]):
        expectation, offset, spread = _expect(mean_rows[tile], variance_rows[tile], centres, widths)
        of_values[tile[0]].baddbmm_(expectation.flatten(-2).mT, upstream[tile])
        # A product with 1, c and c² would be one pass, but where densities are narrow its moments cancel to noise.
        moment = torch.bmm(upstream[tile], grouped[tile[0]].mT).view_as(expectation).mul_(expectation)
        zeroth = moment.sum(-1)
        first = moment.mul_(offset).sum(-1)
        second = moment.mul_(offset).sum(-1)
        of_mean[tile] = -(first / spread).sum(-1)
        of_variance[tile] = ((second / spread - zeroth) / (2 * spread)).sum(-1)
    return of_densities.view(2, *mean.shape), _by_centre(of_values, values.shape, len(widths)).to(values)


def _can_use_triton(mean: Tensor, values: Tensor) -> bool:
    if not mean.is_cuda or mean.dtype != torch.float32 or importlib.util.find_spec("triton") is None:
        return False
    from infformer.continuous import gaussian_read_triton

    fits = values.shape[-1] * values.dtype.itemsize <= gaussian_read_triton.LARGEST_VALUE
    return values.dtype != torch.float64 and fits


class _Expectation(NamedTuple):
    expectation: Tensor
    """r, [rows, queries, W, K]."""
    offset: Tensor
    """δ, [rows, queries, 1, K]."""
    spread: Tensor
    """s, [rows, queries, W]."""


def _expect(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor) -> _Expectation:
    """The distances are one table for all widths; each width has two factors for a query."""
    offset = (mean.unsqueeze(-1) - centres).unsqueeze(-2)
    spread = variance.unsqueeze(-1) + widths.square()
    exponent = offset.square() * (-0.5 / spread).unsqueeze(-1)
    exponent.clamp_(min=math.log(negligible(exponent.dtype)))
    return _Expectation(exponent.exp_().mul_((2 * math.pi * spread).rsqrt().unsqueeze(-1)), offset, spread)


def _tiles(mean: Tensor, functions: int) -> Iterator[tuple[slice, slice]]:
    """All of mean [rows, queries], several whole rows or a part of one row at a time."""
    rows, queries = mean.shape
    at_once = CACHED_EXPECTATIONS * torch.get_num_threads() if mean.is_cpu else ACCELERATED_EXPECTATIONS
    row_step = max(1, at_once // max(1, queries * functions))
    query_step = max(1, at_once // (row_step * functions))
    for row in range(0, rows, row_step):
        for query in range(0, queries, query_step):
            yield slice(row, row + row_step), slice(query, query + query_step)


def _by_width(values: Tensor, widths: int) -> Tensor:
    """[batch, heads, K·W, size] to [batch · heads, W·K, size]: functions of one width become neighbours."""
    return values.unflatten(2, (-1, widths)).transpose(2, 3).reshape(-1, *values.shape[2:])


def _by_centre(grouped: Tensor, shape: torch.Size, widths: int) -> Tensor:
    """The way back."""
    return grouped.unflatten(1, (widths, -1)).transpose(1, 2).reshape(shape)


_operator = torch.library.custom_op("infformer::gaussian_read", _read, mutates_args=())
_operator_backward = torch.library.custom_op("infformer::gaussian_read_backward", _read_backward, mutates_args=())


@_operator.register_fake
def _read_shape(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(*mean.shape, values.shape[-1])


@_operator_backward.register_fake
def _read_backward_shape(
    upstream: Tensor, mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    return mean.new_empty(2, *mean.shape), values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
    (of_mean, of_variance), of_values = _operator_backward(upstream, *ctx.saved_tensors)
    return of_mean, of_variance, None, None, of_values


_operator.register_autograd(_differentiate, setup_context=_save)
