"""The kernels of `linear_loss`: one program for a row of logits, which it reads once, and for the gradient overwrites.

Deterministic: a row's sum is added up in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Of a row at a time."""


def losses(logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """See `linear_loss._losses`."""
    nats, normaliser = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _losses[len(logits),](logits, targets, nats, normaliser, logits.stride(0), vocabulary, COLUMNS=COLUMNS, num_warps=8)
    return nats, normaliser


def differentiate(logits: Tensor, targets: Tensor, normaliser: Tensor, upstream: Tensor, vocabulary: int) -> Tensor:
    """See `linear_loss._differentiate`."""
    rows, columns = logits.shape
    _differentiate[rows, triton.cdiv(columns, COLUMNS)](
        logits, targets, normaliser, upstream.contiguous(), logits.stride(0), columns, vocabulary,
        COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    return logits


@triton.jit
def _losses(logits, targets, nats, normaliser, stride, vocabulary, COLUMNS: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, vocabulary, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        scores = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(scores - higher), axis=0)
        highest = higher
    logarithm = highest + tl.log(total)
    target = tl.load(targets + row)
    scored = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(normaliser + row, logarithm)
    tl.store(nats + row, tl.where(target < 0, 0.0, logarithm - scored))


@triton.jit
def _differentiate(logits, targets, normaliser, upstream, stride, size, vocabulary, COLUMNS: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(targets + row)
    factor = tl.where(target < 0, 0.0, tl.load(upstream + row))
    place = logits + row * stride + columns
    scores = tl.load(place, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    gradient = (tl.exp(scores - tl.load(normaliser + row)) - tl.where(columns == target, 1.0, 0.0)) * factor
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=columns < size)
