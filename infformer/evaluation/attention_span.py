"""How far away attention looks: the required attention span of Long-Range Arena (Tay et al., arXiv 2011.04006)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from infformer.models.encoder import EncoderLayer, TextClassifier

ROWS_AT_ONCE = 256
"""Queries whose weights are in memory at a time."""


@torch.no_grad()
def attention_spans(model: TextClassifier, batches: Iterable[Tensor]) -> list[float]:
    """The mean of Σ_j A_ij |i − j| over texts, heads and positions i, for each layer of a classifier with softmax.

    Even attention on a text of L tokens has (L² − 1)/(3L), about a third of its length: name it beside the figure.

    Args:
        model: in evaluation mode.
        batches: texts, [batch, length] each.
    """
    sums = torch.zeros(len(model.layers), dtype=torch.float64)
    counts = torch.zeros_like(sums)

    def measure(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            _, query, key, _, real = arguments
            spans = spans_of(query, key, real)
            asked = real.unsqueeze(1).expand_as(spans)
            sums[layer] += spans[asked].double().sum().cpu()
            counts[layer] += asked.sum().cpu()

        return hook

    mechanisms = [cast(EncoderLayer, layer).mechanism for layer in model.layers]
    hooks = [mechanism.register_forward_pre_hook(measure(layer)) for layer, mechanism in enumerate(mechanisms)]
    try:
        for batch in batches:
            model(batch.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / counts).tolist()


def spans_of(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """Σ_j A_ij |i − j| with A = softmax(QKᵀ/√d) over real positions, [batch, heads, length], some rows at a time."""
    places = torch.arange(key.shape[2], device=key.device)
    found = []
    for rows, asked in zip(query.split(ROWS_AT_ONCE, dim=2), places.split(ROWS_AT_ONCE), strict=True):
        scores = rows @ key.mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(dim=-1)
        found.append((weights * (asked.unsqueeze(-1) - places).abs()).sum(dim=-1))
    return torch.cat(found, dim=2)
