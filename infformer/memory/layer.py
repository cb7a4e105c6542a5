"""What one layer of a model from scratch remembers: short-term, compressed and long-term memory, or some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infformer.memory.compressive import Compression, CompressiveMemoryConfig, ContentAttention
from infformer.memory.long_term import (
    ContinuousSignal,
    LongTermMemory,
    LongTermMemoryConfig,
    LongTermState,
    Reading,
    WriteOperators,
)
from infformer.memory.short_term import Queue
from infformer.memory.state import MemoryState


@dataclass
class MemoryConfig:
    """Which memories a layer has. What leaves one is written to the next."""

    segment_length: int = 512
    """Tokens of a segment. Only whole segments are written."""
    short_term_length: int = 0
    """Transformer-XL: the last hidden states that attention sees beside the segment. 0: none. It may be longer when a
    model is measured than it was in training."""
    compressive: CompressiveMemoryConfig | None = None
    """Compressive Transformer: what leaves the short-term memory, compressed. Null: none."""
    long_term: LongTermMemoryConfig | None = None
    """∞-former: what leaves the short-term memory (without one: the segment itself), as a continuous signal. Null:
    none."""

    def __post_init__(self) -> None:
        if self.segment_length < 1:
            raise ValueError(f"training.segment_length={self.segment_length}: must be at least 1")
        if self.short_term_length < 0:
            raise ValueError(f"model.short_term_length={self.short_term_length}: must not be negative")
        if self.compressive is not None and self.long_term is not None:
            raise ValueError("model.compressive and model.memory exclude each other: set one of them to null")
        if self.compressive is not None and self.short_term_length == 0:
            raise ValueError(
                "model.short_term_length=0: a compressed memory keeps what leaves the short-term memory; set it to a "
                f"multiple of the segment, such as {self.segment_length}"
            )
        beyond = self.compressive is not None or self.long_term is not None
        if beyond and self.short_term_length % self.segment_length:
            raise ValueError(
                f"model.short_term_length={self.short_term_length}: what leaves it is written segment by segment; make "
                f"it a multiple of training.segment_length={self.segment_length}"
            )
        if self.compressive is not None and self.segment_length % self.compressive.rate:
            raise ValueError(
                f"model.compressive.rate={self.compressive.rate} does not divide "
                f"training.segment_length={self.segment_length}: choose a rate that does"
            )
        if self.long_term is not None and self.long_term.segment_length != self.segment_length:
            raise ValueError(
                f"model.memory.segment_length={self.long_term.segment_length} is not "
                f"training.segment_length={self.segment_length}: set the latter, the former follows it"
            )


@dataclass(frozen=True)
class LayerState(MemoryState):
    """What a layer remembers between two segments."""

    short_term: Queue
    compressed: Queue
    long_term: LongTermState | None

    def shuffle_time(self, shuffle: Tensor | None) -> LayerState:
        """The same past in another order, that of each memory apart.

        Args:
            shuffle: `signal.time_shuffle()` of the long-term memory; None without one.
        """
        short_term, compressed = self.short_term.shuffle_time(), self.compressed.shuffle_time()
        long_term = self.long_term
        if long_term is not None:
            assert shuffle is not None
            long_term = long_term.shuffle_time(shuffle)
        return LayerState(short_term, compressed, long_term)


class Written(NamedTuple):
    """A layer's memory after a segment, and what writing it cost."""

    state: LayerState
    reconstruction: Tensor | None
    """Error of the compression for each query, [batch, queries], 0 for rows in which nothing was compressed; None
    without a compressed memory."""


class LayerMemory(nn.Module):
    """The learned part of one layer's memories.

    Args:
        config: which there are.
        hidden_size: width of the model.
        heads: attention heads.
        signal: basis and operators of the long-term memories, shared between layers; None if there are none.
    """

    def __init__(self, config: MemoryConfig, hidden_size: int, heads: int, signal: ContinuousSignal | None) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.compression = None if config.compressive is None else Compression(config.compressive, hidden_size)
        self.long_term: LongTermMemory | None = None
        if config.long_term is not None:
            assert signal is not None
            self.long_term = LongTermMemory(config.long_term, hidden_size, heads, signal)

    def initial_state(self, batch: int, device: torch.device) -> LayerState:
        """Empty memories for `batch` rows."""
        compressed = 0 if self.config.compressive is None else self.config.compressive.length
        return LayerState(
            Queue.empty(batch, self.config.short_term_length, self.hidden_size, device),
            Queue.empty(batch, compressed, self.hidden_size, device),
            None if self.long_term is None else self.long_term.initial_state(batch),
        )

    def read(self, hidden: Tensor, state: LayerState) -> Reading | None:
        """What every token of a segment sees of the long-term memory; None without one.

        Args:
            hidden: [batch, queries, hidden].
        """
        if self.long_term is None or state.long_term is None:
            return None
        return self.long_term.read(hidden, state.long_term)

    def write(
        self,
        hidden: Tensor,
        state: LayerState,
        whole: Tensor,
        reading: Reading | None,
        operators: WriteOperators | None,
        offsets: Tensor | None,
        attend: ContentAttention,
    ) -> Written:
        """The memories after a segment.

        Args:
            hidden: the segment as the layer's attention saw it, [batch, segment_length, hidden].
            whole: rows whose segment is whole, bool [batch]; the others stay as they are.
            reading: what the segment read.
            operators: of the long-term memory, the same for all layers.
            offsets: of sticky samples, [batch, past_samples]; deterministic if not given.
            attend: the layer's attention by content alone.
        """
        short_term, leaving = state.short_term.push(hidden, whole)
        # All of a segment leaves, or nothing: the length of the short-term memory is a multiple of the segment's.
        leaves = whole & (state.short_term.filled == state.short_term.length)
        compressed, reconstruction = state.compressed, None
        if self.compression is not None:
            entries, error = self.compression(leaving, attend)
            compressed, _ = compressed.push(entries, leaves)
            reconstruction = error * leaves.unsqueeze(-1)
        long_term = state.long_term
        if self.long_term is not None:
            assert long_term is not None
            assert reading is not None
            assert operators is not None
            long_term = self.long_term.write(leaving, long_term, operators, reading.attention, offsets, leaves)
        return Written(LayerState(short_term, compressed, long_term), reconstruction)
