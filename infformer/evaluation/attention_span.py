"""How far away attention looks: the required attention span of Long-Range Arena (Tay et al., arXiv 2011.04006)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from infformer.data.examples import Examples
from infformer.models.encoder import EncoderLayer, TextClassifier
from infformer.models.mechanisms import Mechanism, Softmax
from infformer.results import AttentionSpan

ROWS_AT_ONCE = 256
"""Queries whose weights are in memory at a time."""
MOST_EXAMPLES = 64
"""That are measured, of which each takes a pass."""
MOST_WEIGHTS = 2**29
"""Of one head, in all of these: 33 texts of 4,000 tokens."""


def measure_attention_span(model: object, examples: Examples) -> AttentionSpan | None:
    """How far away a classifier looks in the first examples of a split, and what even attention would have there.

    Args:
        model: in evaluation mode.

    Returns:
        None for a model that is no classifier with softmax attention.
    """
    if not isinstance(model, TextClassifier) or not all(isinstance(found, Softmax) for found in _mechanisms(model)):
        return None
    lengths = torch.from_numpy(examples.lengths[:MOST_EXAMPLES]).double()
    weights = lengths.square().sum(1).cumsum(0)
    count = max(1, int((weights <= MOST_WEIGHTS).sum()))
    lengths = lengths[:count]
    batches = (torch.from_numpy(examples.batch([number])[0]) for number in range(count))
    even = (lengths.square() - 1).sum() / (3 * lengths.sum())  # of (L² − 1)/(3L), the mean over tokens
    return {"layers": attention_spans(model, batches), "even": even.item(), "examples": count}


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

    hooks = [found.register_forward_pre_hook(measure(layer)) for layer, found in enumerate(_mechanisms(model))]
    try:
        for batch in batches:
            model(batch.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / counts).tolist()


def _mechanisms(model: TextClassifier) -> list[Mechanism]:
    return [cast(EncoderLayer, layer).mechanism for layer in model.layers]


def spans_of(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """Σ_j A_ij |i − j| with A = softmax(QKᵀ/√d) over real positions, [batch, heads, length], some rows at a time."""
    places = torch.arange(key.shape[2], device=key.device)
    found = []
    for rows, asked in zip(query.split(ROWS_AT_ONCE, dim=2), places.split(ROWS_AT_ONCE), strict=True):
        scores = rows @ key.mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(dim=-1)
        found.append((weights * (asked.unsqueeze(-1) - places).abs()).sum(dim=-1))
    return torch.cat(found, dim=2)
