"""Transformer-XL's short-term memory (arXiv 1901.02860): the last hidden states of a layer, as they were."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from infformer.memory.state import MemoryState
from infformer.memory.time_shuffle import shuffled_entries


@dataclass(frozen=True)
class Queue(MemoryState):
    """The last entries of each row, the newest at the end: first in, first out."""

    entries: Tensor
    """[batch, length, hidden]; the last `filled` of them are real, those before are zero."""
    filled: Tensor
    """int64 [batch]."""

    @classmethod
    def empty(cls, batch: int, length: int, hidden_size: int, device: torch.device) -> Self:
        """A queue of `length` places in which nothing is."""
        return cls(
            torch.zeros(batch, length, hidden_size, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def length(self) -> int:
        """How many entries there is room for."""
        return self.entries.shape[1]

    @property
    def real(self) -> Tensor:
        """Which entries are real, bool [batch, length]."""
        places = torch.arange(self.length, 0, -1, device=self.filled.device)
        return places <= self.filled.unsqueeze(-1)

    def shuffle_time(self) -> Self:
        """The same entries in another order; see `time_shuffle`."""
        order = shuffled_entries(self.filled, self.length)
        return replace(self, entries=torch.take_along_dim(self.entries, order.unsqueeze(-1), dim=1))

    def push(self, new: Tensor, rows: Tensor) -> tuple[Self, Tensor]:
        """Append new entries to some rows; as many leave at the front.

        Args:
            new: [batch, count, hidden].
            rows: which rows are written, bool [batch]; the others stay as they are.

        Returns:
            The queue after, without the graph that made the entries, and what leaves, [batch, count, hidden]: real
            where the queue was full, and only meant for rows that are written.
        """
        count = new.shape[1]
        joined = torch.cat([self.entries.to(new.dtype), new], dim=1)
        kept = joined[:, count:].detach().to(self.entries.dtype)
        filled = (self.filled + count).clamp(max=self.length)
        after = replace(
            self,
            entries=torch.where(rows.view(-1, 1, 1), kept, self.entries),
            filled=torch.where(rows, filled, self.filled),
        )
        return after, joined[:, :count]
