"""The losses of a head that is one product, on a GPU: logits stay in the type of products, in rows of a whole number of
tiles, and are read and written once each way; backward makes them again, chunk by chunk, as `chunked_loss` does.

A vocabulary such as GPT-2's 50,257 tokens is no multiple of what the fast products of matrices take; padded rows are.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infformer.attention.features import type_of_products
from infformer.models.chunked_loss import IGNORE_INDEX

ALIGNMENT = 64
"""Rows of weights are padded to a multiple of this."""


def can_fuse(hidden: Tensor) -> bool:
    """Whether the kernels of this loss run where the hidden states are."""
    return hidden.is_cuda and importlib.util.find_spec("triton") is not None


def linear_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 4096) -> Tensor:
    """Negative log-likelihood of each label under the logits `hidden @ weight.mT`.

    Args:
        hidden: last hidden states, [batch, length, hidden].
        weight: [vocabulary, hidden].
        targets: [batch, length]; -100 where nothing is scored.
        chunk_tokens: whose logits exist at a time.

    Returns:
        Nats, float32, [batch, length]; 0 where nothing is scored.
    """
    dtype = type_of_products(weight)
    losses: Tensor = _LinearLosses.apply(hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens, dtype)
    return losses.view(targets.shape)


class _LinearLosses(torch.autograd.Function):
    """Of hidden states [tokens, hidden], differentiable by them and by the weight, once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, dtype: torch.dtype
    ) -> Tensor:
        rows, vocabulary = hidden.to(dtype), len(weight)
        padded = F.pad(weight.to(dtype), (0, 0, 0, -vocabulary % ALIGNMENT))
        losses, normalisers = (torch.empty_like(targets, dtype=torch.float32) for _ in range(2))
        for part in _chunks(targets, chunk_tokens):
            losses[part], normalisers[part] = _losses(rows[part] @ padded.mT, targets[part], vocabulary)
        ctx.save_for_backward(rows, padded, targets, normalisers)
        ctx.chunk_tokens, ctx.vocabulary, ctx.types = chunk_tokens, vocabulary, (hidden.dtype, weight.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        rows, padded, targets, normalisers = ctx.saved_tensors
        of_hidden, of_weight = torch.empty_like(rows), None
        for part in _chunks(targets, ctx.chunk_tokens):
            logits = rows[part] @ padded.mT
            gradient = _differentiate(logits, targets[part], normalisers[part], upstream[part], ctx.vocabulary)
            of_hidden[part] = gradient @ padded
            if ctx.needs_input_grad[1]:
                own = gradient.mT @ rows[part]
                of_weight = own.float() if of_weight is None else of_weight.add_(own)
        if of_weight is not None:
            of_weight = of_weight[: ctx.vocabulary].to(ctx.types[1])
        return of_hidden.to(ctx.types[0]), of_weight, None, None, None


def _chunks(targets: Tensor, chunk_tokens: int) -> list[slice]:
    return [slice(first, first + chunk_tokens) for first in range(0, len(targets), chunk_tokens)]


def _losses(logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Nats of each row, and the logarithm of what its probabilities are divided by; columns after the vocabulary are
    no tokens."""
    if can_fuse(logits):
        from infformer.models import linear_loss_triton

        return linear_loss_triton.losses(logits, targets, vocabulary)
    scores = logits[:, :vocabulary].float()
    normaliser = scores.logsumexp(-1)
    scored = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (normaliser - scored).masked_fill(targets == IGNORE_INDEX, 0), normaliser


def _differentiate(logits: Tensor, targets: Tensor, normaliser: Tensor, upstream: Tensor, vocabulary: int) -> Tensor:
    """∂L/∂ logits from ∂L/∂ nats, in their place; 0 in the columns after the vocabulary."""
    if can_fuse(logits):
        from infformer.models import linear_loss_triton

        return linear_loss_triton.differentiate(logits, targets, normaliser, upstream, vocabulary)
    gradient = (logits.float() - normaliser.unsqueeze(-1)).exp()
    gradient[:, vocabulary:] = 0
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return logits.copy_(gradient * upstream.masked_fill(targets == IGNORE_INDEX, 0).unsqueeze(-1))
