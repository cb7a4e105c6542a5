"""How well a long-term memory still holds each stretch of what was written to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infformer.continuous.density import Density
from infformer.memory.long_term import LongTermMemory, LongTermState


class WrittenPast:
    """What one layer has written of one document: every token's hidden state, and where in the memory it lies now.

    The hidden states are kept in float16 in the main memory: 2 · width bytes for each token.

    Args:
        memory: the layer's.
    """

    def __init__(self, memory: LongTermMemory) -> None:
        self.memory = memory
        self._hidden: list[Tensor] = []
        self.places = torch.zeros(0, dtype=torch.float64)
        """In [0, 1], in the order of the text; float64, shape [tokens]."""

    def write(self, hidden: Tensor, attention: Density) -> None:
        """Follow a write.

        Args:
            hidden: what was written, before the input gate, [1, T, hidden].
            attention: where the segment looked that was read at that moment.
        """
        self.places = self.memory.moved_places(self.places, len(self._hidden), attention)
        self._hidden.append(self.memory.gated(hidden.float())[0].half().cpu())

    def tokens_back(self, places: Tensor) -> Tensor:
        """How many tokens before the end of what was written lies what is at these places, of any shape.

        Between two tokens it is linear; a place outside [0, 1] counts as the nearest end.
        """
        tokens = len(self.places)
        after = torch.searchsorted(self.places, places.to(self.places)).clamp(1, tokens - 1)
        left, right = self.places[after - 1], self.places[after]
        share = ((places.to(left) - left) / (right - left).clamp(min=torch.finfo(left.dtype).tiny)).clamp(0, 1)
        return tokens - (after - 1 + share)

    def reconstruct(self, state: LongTermState) -> dict[str, Any]:
        """How much of the past the signal still tells: R² = 1 − Σ‖x − X̄(p)‖² / Σ‖x − x̄‖².

        x is a hidden state as it was written, p its place now, X̄ the signal, x̄ the mean over all that was written. 1 is
        all of it, 0 no more than the mean; below 0 the mean would have been a better guess.

        Args:
            state: the layer's memory after the last write, one row.

        Returns:
            `total`, R² over all tokens; `by_age`, that of each segment, the newest first; None where a segment does not
            differ from the mean.
        """
        coefficients, basis = state.coefficients[0], self.memory.signal.basis
        mean = sum(hidden.to(coefficients).sum(0) for hidden in self._hidden) / len(self.places)
        errors, scatters = [], []
        for hidden, places in zip(self._hidden, self.places.chunk(len(self._hidden)), strict=True):
            written = hidden.to(coefficients)
            signal = basis.evaluate(places.to(coefficients)) @ coefficients
            errors.append(float((written - signal).square().sum()))
            scatters.append(float((written - mean).square().sum()))
        by_age = [_explained(error, scatter) for error, scatter in zip(errors, scatters, strict=True)]
        return {"total": _explained(sum(errors), sum(scatters)), "by_age": by_age[::-1]}


def _explained(error: float, scatter: float) -> float | None:
    return 1 - error / scatter if scatter > 0 else None
