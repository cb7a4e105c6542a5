"""The honest opponent of every memory: the last tokens as they were, in as many floats, which attention itself sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from infformer.memory.memory import Memory
from infformer.memory.options import MemoryConfig
from infformer.memory.short_term import KeyValueMemory, ShortTermMemory
from infformer.options import check_at_least


@dataclass
class CacheConfig(MemoryConfig):
    """First in, first out: what a short-term memory is, but in some layers longer than in others."""

    kind: ClassVar[str] = "cache"

    length: int = 512
    """So many more of the last tokens does attention see in the layers of `model.memory_layers`: those before the
    tokens of the short-term memory, which stands in all layers and is none unless it is asked for."""
    match_floats: int | None = None
    """Instead of `length`: as many tokens as make all layers together hold so many floats of a text, or just fewer.
    What another memory holds is in the first lines of its run. Null: `length` says how many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, "model.memory.", self, "length", "match_floats")

    def with_short_term_length(self, default: int) -> Self:
        return super().with_short_term_length(0)

    def matched(self, layers: int, depth: int, floats: int) -> Self:
        if self.match_floats is None:
            return self
        sinks, short_term = self.sink_tokens or 0, self.short_term_length or 0
        others = (depth - layers) * (short_term + sinks) if short_term else 0
        length = (self.match_floats // floats - others) // layers - short_term - sinks
        if length < 1:
            least = floats * (others + layers * (short_term + sinks + 1))
            raise ValueError(
                f"model.memory.match_floats={self.match_floats}: one token in the {layers} layers that have a cache, "
                f"with the short-term memory and {sinks} first tokens, is {least} floats already; give at least as many"
            )
        return replace(self, length=length, match_floats=None)

    def build(
        self,
        hidden_size: int,
        heads: int,
        layers: int,
        segment_length: int,
        key_values: tuple[int, int] | None = None,
    ) -> list[Memory]:
        return [ShortTermMemory(self.entries, hidden_size) for _ in range(layers)]

    def build_beside(
        self,
        layers: Sequence[int],
        segment_length: int,
        *,
        hidden_size: int,
        heads: int,
        key_values: tuple[int, int],
        depth: int,
    ) -> dict[int, Memory]:
        lengths = {layer: self.entries if layer in layers else self.short_term_length or 0 for layer in range(depth)}
        return {
            layer: KeyValueMemory(length, self.sink_tokens or 0, key_values, hidden_size)
            for layer, length in lengths.items()
            if length
        }

    @property
    def stands_alone(self) -> bool:
        return True

    @property
    def entries(self) -> int:
        return super().entries + self.length

    def numbers(self, hidden_size: int, layers: int, rows: int, rows_at_once: int, segment_length: int) -> int:
        """Those of one layer, two for each token: how wide keys are, and how many layers have some, is not known."""
        return rows * (self.match_floats or 2 * self.entries)
