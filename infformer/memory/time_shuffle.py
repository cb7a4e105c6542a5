"""The past in another order: a control that shows whether the order of what is remembered matters.

The past is cut into 16 blocks of equal length, and block i of the result is block (5i + 3) mod 16 of the old past: none
stays where it was, and no two that follow each other do so afterwards. The order is fixed, so that no figure depends on
the batch or on the number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = 16


def shuffled_positions(positions: Tensor) -> Tensor:
    """Where in the old past each position of the result is taken from; both in [0, 1], of any shape."""
    blocks = (BLOCKS * positions).floor().clamp(max=BLOCKS - 1)
    return positions + (_source(blocks) - blocks) / BLOCKS


def shuffled_bins(values: Tensor) -> Tensor:
    """The same for values of equal bins of [0, 1], [batch, bins]."""
    bins = values.shape[-1]
    middles = (torch.arange(bins, device=values.device, dtype=torch.float64) + 0.5) / bins
    return values[:, (shuffled_positions(middles) * bins).long().clamp(max=bins - 1)]


def shuffled_entries(filled: Tensor, length: int) -> Tensor:
    """The same for queues: which old entry each place of the result is taken from.

    Entry k of n real ones, the oldest first, belongs to the block of (k + ½)/n. Where 16 does not divide n, blocks
    differ in length by an entry.

    Args:
        filled: real entries of each row, which stand at the end; int64, shape [batch].
        length: places of each row.

    Returns:
        A permutation for each row, int64, shape [batch, length]; places that are not real keep to themselves.
    """
    places = torch.arange(length, device=filled.device)
    entries = places - (length - filled).unsqueeze(-1)
    blocks = BLOCKS * (2 * entries + 1) // (2 * filled.clamp(min=1).unsqueeze(-1))
    destinations = _source(torch.arange(BLOCKS, device=filled.device)).argsort()[blocks.clamp(min=0)]
    return torch.where(entries < 0, entries, destinations * length + entries).argsort(dim=-1)


def _source(blocks: Tensor) -> Tensor:
    return (5 * blocks + 3) % BLOCKS
