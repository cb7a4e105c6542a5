"""`gaussian_read` on CUDA, in the way of flash attention: a tile of E_p[ψ] is made where it is multiplied.

Nothing of the size queries × functions is ever in memory. Expectations and distances are float32; the products run on
tensor cores, with operands of the values' type (expectations are rounded to it) and float32 sums: bfloat16, float16, or
float32 as `torch.set_float32_matmul_precision` says, TF32 or not.

Tiles are left out in which no density of a block of queries reaches any of a block of centres: where
exp(−gap²/(2(variance + width²))) is negligible for the widest of the densities and the shortest gap. So what is left
out is less than `negligible` of the height of its density, 10⁻¹⁴ in float32.

The same inputs give the same bits, in every run on the same kind of card: no sum depends on who comes first, and tiles
are chosen by the sizes alone. To choose them by timing (`triton.autotune`) would be another order of sums whenever the
timing comes out differently, and a run that goes on after a stop would no longer be the run that was never stopped.

Needs Triton, which comes with PyTorch's CUDA builds. Triton's interpreter (TRITON_INTERPRET=1) runs it on a processor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infformer.continuous.basis import negligible


class Tile(NamedTuple):
    """How a kernel cuts up its work."""

    queries: int
    centres: int
    warps: int
    stages: int
    """How many tiles are on their way from memory at once."""


LARGEST_VALUE = 512
"""Bytes of a value; tiles of larger ones do not fit beside each other into the memory of a multiprocessor."""


def tiles(values: Tensor) -> tuple[Tile, Tile]:
    """Those of the forward and of the backward pass: as large as registers hold without spilling (sm_90).

    For values of 64 numbers of two bytes they are the quickest of seven and of eight that an H200 was tried with.
    """
    size = _padded(values.shape[-1])
    if size > 128:
        return Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)
    if values.dtype == torch.float32:
        return Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)
    if size > 64:
        return Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)
    return Tile(64, 64, 4, 3), Tile(64, 64, 4, 1)


def read(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor) -> Tensor:
    """Σ_j r_j v_j, as `gaussian_read` says, of float32 densities and values of any type that tensor cores multiply."""
    mean, variance, centres, widths, values = (
        tensor.contiguous() for tensor in (mean, variance, centres, widths, values)
    )
    context = values.new_empty(*mean.shape, values.shape[-1])
    if context.numel() > 0:
        tile, _ = tiles(values)
        queries = mean.shape[2]
        blocks = triton.cdiv(len(centres), tile.centres)
        _read[mean.shape[0] * mean.shape[1], triton.cdiv(queries, tile.queries)](
            mean,
            variance,
            centres,
            widths,
            values,
            context,
            queries,
            len(centres),
            BLOCKS=triton.next_power_of_2(blocks),
            RAGGED=len(centres) % tile.centres != 0,
            **_constants(widths, values, tile),
        )
    return context


def read_backward(
    upstream: Tensor, mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """∂L/∂ mean and variance [2, batch, heads, queries], and ∂L/∂ values, from ∂L/∂ context."""
    upstream, mean, variance, centres, widths, values = (
        tensor.contiguous() for tensor in (upstream, mean, variance, centres, widths, values)
    )
    if upstream.numel() == 0:
        return mean.new_zeros(2, *mean.shape), torch.zeros_like(values)
    _, tile = tiles(values)
    queries, blocks = mean.shape[2], triton.cdiv(len(centres), tile.centres)
    of_values = torch.empty_like(values)
    # What each block of centres and each width adds to the gradients of a density; atomic sums would not be exact.
    of_densities = mean.new_empty(2, len(widths) * blocks, *mean.shape)
    _read_backward[mean.shape[0] * mean.shape[1], blocks, len(widths)](
        upstream,
        mean,
        variance,
        centres,
        widths,
        values,
        of_densities,
        of_values,
        queries,
        len(centres),
        BLOCKS=min(16, triton.next_power_of_2(triton.cdiv(queries, tile.queries))),
        RAGGED=queries % tile.queries != 0,
        **_constants(widths, values, tile),
    )
    return of_densities.sum(1), of_values


def _constants(widths: Tensor, values: Tensor, tile: Tile) -> dict[str, int | float | str]:
    return {
        "WIDTHS": len(widths),
        "SIZE": values.shape[-1],
        "PADDED_SIZE": _padded(values.shape[-1]),
        "QUERIES": tile.queries,
        "CENTRES": tile.centres,
        "LIMIT": -math.log(negligible(values.dtype)),
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _padded(size: int) -> int:
    """As many columns as a product has to have."""
    return max(16, triton.next_power_of_2(size))


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
    BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    CENTRES: tl.constexpr,
    RAGGED: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, block of queries); BLOCKS of centres at most."""
    row = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    mean, variance = _densities(mean_pointer + row * queries, variance_pointer + row * queries, query, queries, True)
    lowest, highest, widest = _bounds(mean, variance, query < queries, 0)
    mean = mean[:, None] + _zeros_of_a_product(QUERIES, CENTRES)
    # The first and the last centre of every block: ascending, so those within reach are neighbours.
    block = tl.arange(0, BLOCKS) * CENTRES
    left = tl.load(centres_pointer + block, mask=block < centres, other=float("inf"))
    right = tl.load(centres_pointer + tl.minimum(block + CENTRES, centres) - 1)
    values_pointer += row * centres * (WIDTHS * SIZE)
    context = tl.zeros((QUERIES, PADDED_SIZE), tl.float32)
    for kind in range(WIDTHS):
        squared_width = _squared(widths_pointer + kind)
        reach = tl.sqrt(2 * LIMIT * (widest + squared_width))
        start = tl.sum((right < lowest - reach).to(tl.int32), axis=0) * CENTRES
        stop = tl.minimum(tl.sum((left <= highest + reach).to(tl.int32), axis=0) * CENTRES, centres)
        rate, height = _shape(variance + squared_width)
        height = tl.log2(height)
        for first in range(start, stop, CENTRES):
            place = _places(centres_pointer, first, centres, CENTRES, RAGGED)
            value = _rows(
                values_pointer + kind * SIZE, first, centres, CENTRES, WIDTHS * SIZE, SIZE, PADDED_SIZE, RAGGED
            )
            offset = mean - place[None, :]
            expectation = tl.exp2(offset * offset * rate[:, None] + height[:, None])
            context = tl.dot(expectation.to(value.dtype), value, context, input_precision=PRECISION)
    column = tl.arange(0, PADDED_SIZE)
    entries = query[:, None] * SIZE + column[None, :]
    mask = (query < queries)[:, None] & (column < SIZE)[None, :]
    tl.store(context_pointer + row * queries * SIZE + entries, context, mask=mask)


@triton.jit
def _read_backward(
    upstream_pointer,
    mean_pointer,
    variance_pointer,
    centres_pointer,
    widths_pointer,
    values_pointer,
    of_densities_pointer,
    of_values_pointer,
    queries,
    centres,
    BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    CENTRES: tl.constexpr,
    RAGGED: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, block of centres, width): all gradients by it, in one pass over the queries, BLOCKS at a time.

    With δ = mean − c, s = variance + w² and m_i = Σ_c r ∂L/∂r δⁱ: ∂L/∂mean = −m₁/s, ∂L/∂variance = (m₂/s − m₀)/(2s),
    to be summed over blocks and widths, and ∂L/∂values = rᵀ ∂L/∂context.
    """
    row = tl.program_id(0).to(tl.int64)
    first_centre = tl.program_id(1) * CENTRES
    kind = tl.program_id(2)
    squared_width = _squared(widths_pointer + kind)
    left = tl.load(centres_pointer + first_centre)
    right = tl.load(centres_pointer + tl.minimum(first_centre + CENTRES, centres) - 1)
    place = _places(centres_pointer, first_centre, centres, CENTRES, True)[None, :]
    place += _zeros_of_a_product(QUERIES, CENTRES)
    values_pointer += row * centres * (WIDTHS * SIZE) + kind * SIZE
    value = tl.trans(_rows(values_pointer, first_centre, centres, CENTRES, WIDTHS * SIZE, SIZE, PADDED_SIZE, True))
    mean_pointer += row * queries
    variance_pointer += row * queries
    upstream_pointer += row * queries * SIZE
    part = (tl.program_id(1) * WIDTHS + kind) * tl.num_programs(0).to(tl.int64) + row
    of_mean_pointer = of_densities_pointer + part * queries
    of_variance_pointer = of_mean_pointer + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * WIDTHS * queries
    of_values = tl.zeros((PADDED_SIZE, CENTRES), tl.float32)
    for begin in range(0, queries, BLOCKS * QUERIES):
        block = tl.arange(0, BLOCKS)
        each = begin + block[:, None] * QUERIES + tl.arange(0, QUERIES)[None, :]
        each_mean, each_variance = _densities(mean_pointer, variance_pointer, each, queries, True)
        lowest, highest, widest = _bounds(each_mean, each_variance, each < queries, 1)
        gap = tl.maximum(tl.maximum(left - highest, lowest - right), 0.0)
        reached = gap * gap <= 2 * LIMIT * (widest + squared_width)
        start = tl.min(tl.where(reached, block, BLOCKS), axis=0)
        stop = tl.max(tl.where(reached, block + 1, 0), axis=0)
        left_out = ((block < start) | (block >= stop))[:, None] & (each < queries)
        tl.store(of_mean_pointer + each, tl.zeros_like(each_mean), mask=left_out)
        tl.store(of_variance_pointer + each, tl.zeros_like(each_mean), mask=left_out)
        for first in range(begin + start * QUERIES, begin + stop * QUERIES, QUERIES):
            query = first + tl.arange(0, QUERIES)
            mean, variance = _densities(mean_pointer, variance_pointer, query, queries, RAGGED)
            upstream = _rows(upstream_pointer, first, queries, QUERIES, SIZE, SIZE, PADDED_SIZE, RAGGED)
            spread = variance + squared_width
            rate, height = _shape(spread)
            offset = mean[:, None] - place
            square = offset * offset
            expectation = tl.exp2(square * rate[:, None]) * height[:, None]
            moment = expectation * tl.dot(upstream, value, input_precision=PRECISION)
            inverse = 1 / spread
            of_mean = -tl.sum(moment * offset, axis=1) * inverse
            of_variance = (tl.sum(moment * square, axis=1) * inverse - tl.sum(moment, axis=1)) * (0.5 * inverse)
            if RAGGED:
                tl.store(of_mean_pointer + query, of_mean, mask=query < queries)
                tl.store(of_variance_pointer + query, of_variance, mask=query < queries)
            else:
                tl.store(of_mean_pointer + query, of_mean)
                tl.store(of_variance_pointer + query, of_variance)
            expectation = expectation.to(upstream.dtype)
            of_values = tl.dot(tl.trans(upstream), expectation, of_values, input_precision=PRECISION)
    centre = first_centre + tl.arange(0, CENTRES)
    column = tl.arange(0, PADDED_SIZE)
    entries = centre[:, None] * (WIDTHS * SIZE) + column[None, :]
    mask = (centre < centres)[:, None] & (column < SIZE)[None, :]
    of_values_pointer += row * centres * (WIDTHS * SIZE) + kind * SIZE
    tl.store(of_values_pointer + entries, tl.trans(of_values), mask=mask)


@triton.jit
def _densities(mean_pointer, variance_pointer, query, queries, RAGGED: tl.constexpr):
    """Mean and variance of some queries."""
    if RAGGED:
        mean = tl.load(mean_pointer + query, mask=query < queries, other=0.0)
        variance = tl.load(variance_pointer + query, mask=query < queries, other=1.0)
    else:
        mean = tl.load(mean_pointer + query)
        variance = tl.load(variance_pointer + query)
    return mean, variance


@triton.jit
def _places(centres_pointer, first, centres, CENTRES: tl.constexpr, RAGGED: tl.constexpr):
    """Where the centres of a block lie, [CENTRES]."""
    centre = first + tl.arange(0, CENTRES)
    if RAGGED:
        return tl.load(centres_pointer + centre, mask=centre < centres, other=0.0)
    return tl.load(centres_pointer + centre)


@triton.jit
def _rows(
    pointer,
    first,
    count,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows first … first + ROWS − 1 of `count` rows of a matrix, [ROWS, PADDED_SIZE]; zeros outside of it."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_SIZE)
    entries = pointer + row[:, None] * STRIDE + column[None, :]
    if RAGGED:
        return tl.load(entries, mask=(row < count)[:, None] & (column < SIZE)[None, :], other=0.0)
    return tl.load(entries, mask=(column < SIZE)[None, :], other=0.0)


@triton.jit
def _bounds(mean, variance, real, axis: tl.constexpr):
    """The lowest and the highest mean and the largest variance along an axis; what is no number reaches everything."""
    variance = tl.where((mean == mean) & (variance == variance), variance, float("inf"))
    mean = tl.where(mean == mean, mean, 0.0)
    lowest = tl.min(tl.where(real, mean, float("inf")), axis=axis)
    highest = tl.max(tl.where(real, mean, float("-inf")), axis=axis)
    return lowest, highest, tl.max(tl.where(real, variance, 0.0), axis=axis)


@triton.jit
def _zeros_of_a_product(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros that lie in registers as a product does: what is computed from them is multiplied where it is."""
    return tl.dot(tl.zeros((ROWS, 16), tl.float16), tl.zeros((16, COLUMNS), tl.float16)) * 0.0


@triton.jit
def _shape(spread):
    """𝒩(δ; 0, spread) is 2 to the power of δ² times the first, times the second."""
    return -0.7213475204444817 / spread, tl.rsqrt(6.283185307179586 * spread)


@triton.jit
def _squared(pointer):
    width = tl.load(pointer)
    return width * width
