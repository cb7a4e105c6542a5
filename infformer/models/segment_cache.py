"""What a model keeps of an unfinished segment, to go on within it: a value, as its state is between two segments."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Self, TypeVar, cast

from torch import LongTensor, Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from infformer.memory.memory import Earlier


class SegmentCache(NamedTuple):
    """What a model keeps of the tokens of a segment that have been read."""

    attention: Any
    """What attention sees of them: a stock model's key-value cache, or hidden states of each layer of a decoder."""
    memories: tuple[Earlier, ...]
    """What each layer keeps that has a memory, in their order."""
    length: int
    """How many tokens these are."""
    scored: tuple[tuple[Tensor, Tensor], ...] = ()
    """Last hidden states and tokens, in pieces, where a memory asks for losses when the segment is complete."""

    def select_rows(self, index: Tensor) -> Self:
        """The rows that `index` (int64, [k], with repetitions if wished) names, in its order."""
        attention = self.attention
        if isinstance(attention, Cache):
            attention = copy_cache(attention)
            attention.reorder_cache(cast(LongTensor, index))
        else:
            attention = tuple(tensor.index_select(0, index) for tensor in attention)
        memories, scored = tree_map_only(
            Tensor, lambda tensor: tensor.index_select(0, index), (self.memories, self.scored)
        )
        return self._replace(attention=attention, memories=memories, scored=scored)


CacheT = TypeVar("CacheT", bound=Cache)


def copy_cache(cache: CacheT) -> CacheT:
    """A key-value cache with the same tensors: what is added to it is not added to the other."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own
