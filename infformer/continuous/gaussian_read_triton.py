"""`gaussian_read` on CUDA, in the way of flash attention: a tile of E_p[ψ] is made where it is multiplied.

Nothing of the size queries × functions is ever in memory, and tiles are left out in which no density of a block of
queries reaches any of a block of centres: where exp(−gap²/(2(variance + width²))) is negligible for the widest of the
densities and the shortest gap. So what is left out is less than `negligible`, 10⁻¹⁴ of the height of its density.

Needs Triton, which comes with PyTorch's CUDA builds. Triton's interpreter (TRITON_INTERPRET=1) runs it on a processor.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from infformer.continuous.basis import negligible

QUERIES = 64
"""Queries of a tile."""
CENTRES = 32
"""Centres of a tile."""


def read(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor) -> Tensor:
    """Σ_j r_j v_j, as `gaussian_read` says, in float32; `torch.set_float32_matmul_precision` holds for its products."""
    mean, variance, centres, widths, values = (
        tensor.contiguous() for tensor in (mean, variance, centres, widths, values)
    )
    context = values.new_empty(*mean.shape, values.shape[-1])
    if context.numel() > 0:
        rows, queries = mean.shape[0] * mean.shape[1], mean.shape[2]
        _read[rows, triton.cdiv(queries, QUERIES)](
            mean, variance, centres, widths, values, context, queries, len(centres), **_constants(widths, values)
        )
    return context


def read_backward(
    upstream: Tensor, mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂ mean, variance and values from ∂L/∂ context."""
    upstream, mean, variance, centres, widths, values = (
        tensor.contiguous() for tensor in (upstream, mean, variance, centres, widths, values)
    )
    of_mean, of_variance, of_values = torch.empty_like(mean), torch.empty_like(variance), torch.zeros_like(values)
    if upstream.numel() > 0:
        rows, queries = mean.shape[0] * mean.shape[1], mean.shape[2]
        inputs, sizes = (upstream, mean, variance, centres, widths, values), (queries, len(centres))
        constants = _constants(widths, values)
        _read_backward_queries[rows, triton.cdiv(queries, QUERIES)](*inputs, of_mean, of_variance, *sizes, **constants)
        _read_backward_values[rows, triton.cdiv(len(centres), CENTRES), len(widths)](
            *inputs[:-1], of_values, *sizes, **constants
        )
    return of_mean, of_variance, of_values


def _constants(widths: Tensor, values: Tensor) -> dict[str, int | float | str]:
    size = values.shape[-1]
    return {
        "WIDTHS": len(widths),
        "SIZE": size,
        "PADDED_SIZE": max(16, triton.next_power_of_2(size)),
        "QUERIES": QUERIES,
        "CENTRES": CENTRES,
        "LIMIT": -math.log(negligible(values.dtype)),
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "num_warps": 8,
    }


@triton.jit
def _read(
    mean_pointer,
    variance_pointer,
    centres_pointer,
    widths_pointer,
    values_pointer,
    context_pointer,
    queries,
    centres,
    WIDTHS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    CENTRES: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, block of queries)."""
    row = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, PADDED_SIZE)
    mean, variance, lowest, highest, widest = _queries(mean_pointer, variance_pointer, row, query, queries)
    context = tl.zeros((QUERIES, PADDED_SIZE), tl.float32)
    for first in range(0, centres, CENTRES):
        centre = first + tl.arange(0, CENTRES)
        place, gap = _centres(centres_pointer, centre, centres, lowest, highest)
        for kind in tl.static_range(WIDTHS):
            squared_width = _squared(widths_pointer + kind)
            if gap * gap <= 2 * LIMIT * (widest + squared_width):
                expectation, _, _ = _expect(mean, variance, place, squared_width)
                value = _values(values_pointer, row, centre, centres, kind, column, WIDTHS, SIZE)
                context += tl.dot(expectation, value, input_precision=PRECISION)
    entries = (row * queries + query[:, None]) * SIZE + column[None, :]
    tl.store(context_pointer + entries, context, mask=(query < queries)[:, None] & (column < SIZE)[None, :])


@triton.jit
def _read_backward_queries(
    upstream_pointer,
    mean_pointer,
    variance_pointer,
    centres_pointer,
    widths_pointer,
    values_pointer,
    of_mean_pointer,
    of_variance_pointer,
    queries,
    centres,
    WIDTHS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    CENTRES: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, block of queries): with δ = mean − c, s = variance + w² and r ∂L/∂r, summed over all functions,
    ∂r/∂mean = −r δ/s and ∂r/∂variance = r (δ²/s − 1)/(2s)."""
    row = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, PADDED_SIZE)
    mean, variance, lowest, highest, widest = _queries(mean_pointer, variance_pointer, row, query, queries)
    upstream = _upstream(upstream_pointer, row, query, queries, column, SIZE)
    of_mean = tl.zeros((QUERIES,), tl.float32)
    of_variance = tl.zeros((QUERIES,), tl.float32)
    for first in range(0, centres, CENTRES):
        centre = first + tl.arange(0, CENTRES)
        place, gap = _centres(centres_pointer, centre, centres, lowest, highest)
        for kind in tl.static_range(WIDTHS):
            squared_width = _squared(widths_pointer + kind)
            if gap * gap <= 2 * LIMIT * (widest + squared_width):
                expectation, offset, spread = _expect(mean, variance, place, squared_width)
                value = _values(values_pointer, row, centre, centres, kind, column, WIDTHS, SIZE)
                moment = expectation * tl.dot(upstream, tl.trans(value), input_precision=PRECISION)
                of_mean -= tl.sum(moment * offset, axis=1) / spread
                of_variance += tl.sum(moment * (offset * offset / spread[:, None] - 1), axis=1) / (2 * spread)
    tl.store(of_mean_pointer + row * queries + query, of_mean, mask=query < queries)
    tl.store(of_variance_pointer + row * queries + query, of_variance, mask=query < queries)


@triton.jit
def _read_backward_values(
    upstream_pointer,
    mean_pointer,
    variance_pointer,
    centres_pointer,
    widths_pointer,
    of_values_pointer,
    queries,
    centres,
    WIDTHS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    CENTRES: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, block of centres, width): rᵀ ∂L/∂ context."""
    row = tl.program_id(0).to(tl.int64)
    centre = tl.program_id(1) * CENTRES + tl.arange(0, CENTRES)
    kind = tl.program_id(2)
    column = tl.arange(0, PADDED_SIZE)
    squared_width = _squared(widths_pointer + kind)
    of_values = tl.zeros((CENTRES, PADDED_SIZE), tl.float32)
    for first in range(0, queries, QUERIES):
        query = first + tl.arange(0, QUERIES)
        mean, variance, lowest, highest, widest = _queries(mean_pointer, variance_pointer, row, query, queries)
        place, gap = _centres(centres_pointer, centre, centres, lowest, highest)
        if gap * gap <= 2 * LIMIT * (widest + squared_width):
            expectation, _, _ = _expect(mean, variance, place, squared_width)
            upstream = _upstream(upstream_pointer, row, query, queries, column, SIZE)
            of_values += tl.dot(tl.trans(expectation), upstream, input_precision=PRECISION)
    entries = ((row * centres + centre[:, None]) * WIDTHS + kind) * SIZE + column[None, :]
    tl.store(of_values_pointer + entries, of_values, mask=(centre < centres)[:, None] & (column < SIZE)[None, :])


@triton.jit
def _queries(mean_pointer, variance_pointer, row, query, queries):
    """Mean and variance of a block, [QUERIES], the lowest and the highest mean, and the largest variance."""
    real = query < queries
    mean = tl.load(mean_pointer + row * queries + query, mask=real, other=0.0)
    variance = tl.load(variance_pointer + row * queries + query, mask=real, other=1.0)
    lowest = tl.min(tl.where(real, mean, float("inf")), axis=0)
    highest = tl.max(tl.where(real, mean, float("-inf")), axis=0)
    return mean, variance, lowest, highest, tl.max(tl.where(real, variance, 0.0), axis=0)


@triton.jit
def _centres(centres_pointer, centre, centres, lowest, highest):
    """Where the centres of a block lie, [CENTRES], and the gap between them and the means of a block of queries."""
    real = centre < centres
    place = tl.load(centres_pointer + centre, mask=real, other=0.0)
    left = tl.min(tl.where(real, place, float("inf")), axis=0)
    right = tl.max(tl.where(real, place, float("-inf")), axis=0)
    return place, tl.maximum(tl.maximum(left - highest, lowest - right), 0.0)


@triton.jit
def _expect(mean, variance, place, squared_width):
    """r and δ, [QUERIES, CENTRES], and s, [QUERIES], for one width."""
    offset = mean[:, None] - place[None, :]
    spread = variance + squared_width
    height = tl.rsqrt(6.283185307179586 * spread)
    return tl.exp(offset * offset * (-0.5 / spread)[:, None]) * height[:, None], offset, spread


@triton.jit
def _values(values_pointer, row, centre, centres, kind, column, WIDTHS: tl.constexpr, SIZE: tl.constexpr):
    """The values of one width at a block of centres, [CENTRES, PADDED_SIZE]."""
    entries = ((row * centres + centre[:, None]) * WIDTHS + kind) * SIZE + column[None, :]
    return tl.load(values_pointer + entries, mask=(centre < centres)[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _upstream(upstream_pointer, row, query, queries, column, SIZE: tl.constexpr):
    """∂L/∂ context of a block of queries, [QUERIES, PADDED_SIZE]."""
    entries = (row * queries + query[:, None]) * SIZE + column[None, :]
    return tl.load(upstream_pointer + entries, mask=(query < queries)[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _squared(pointer):
    width = tl.load(pointer)
    return width * width
