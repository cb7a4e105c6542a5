"""A segment on its way through a model: what goes in, what its layers make of it, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from infformer.memory.memory import MemoryOutput, SegmentContext
from infformer.memory.state import ModelState
from infformer.models.segment_cache import SegmentCache


class LayerRead(NamedTuple):
    """What happened in a layer that has a memory while it read a segment."""

    memory: MemoryOutput
    hidden: Tensor | None = None
    """What its attention saw of the tokens, and what is written to memory, now or later; [batch, length, hidden]. None
    where neither intermediates nor a cache were asked for."""
    attended: Tensor | None = None
    """What self-attention returned, [batch, length, hidden]; None likewise."""

    @staticmethod
    def of(memory: MemoryOutput, hidden: Tensor, attended: Tensor, inside: bool) -> LayerRead:
        """All of it, or without what is inside: what nobody wants need not be held until the pass is over."""
        if inside:
            return LayerRead(memory, hidden, attended)
        # Made by its class: what `_replace` makes cannot leave a compiled layer in every version of PyTorch.
        return LayerRead(
            MemoryOutput(memory.state, memory.context, memory.losses, memory.reading, pending=memory.pending)
        )


class SegmentToRead(NamedTuple):
    """A segment, or the next tokens of one, before it goes through the layers."""

    input_ids: Tensor
    """[batch, length]."""
    state: ModelState
    """What the memories hold before it."""
    context: SegmentContext
    """What all of them are told,"""
    shared: Any
    """and what the first of them prepared for all."""
    return_intermediates: bool
    """Keep what is inside each layer."""
    cache: SegmentCache | None
    """What is kept of the segment's earlier tokens; None where it begins."""
    use_cache: bool
    """Keep what attention sees of it."""

    def context_of(self, number: int) -> SegmentContext:
        """What one of the memories is told, by its place among them."""
        if self.cache is None:
            return self.context
        return self.context._replace(earlier=self.cache.memories[number])


class SegmentRead(NamedTuple):
    """What a model made of a segment, before its vocabulary."""

    hidden: Tensor
    """The last hidden states, [batch, length, hidden]."""
    layers: tuple[LayerRead, ...]
    """Of each layer that has a memory, in their order."""
    attention: Any
    """What attention sees of the segment so far; None if that was not asked for."""


@dataclass
class MemoryModelOutput(ModelOutput):
    """One type, whatever is switched on; what was not asked for is None.

    A mapping, as Hugging Face's Trainer and DeepSpeed want it. Beside `loss` and `logits` its names are none of
    transformers' own, which renames those of every `ModelOutput` together with its own.
    """

    loss: Tensor | None = None
    """Mean of `token_losses` over scored tokens, plus the auxiliary losses; a scalar. With labels or targets only."""
    logits: Tensor | None = None
    """Scores of the next token, [batch, length, vocabulary], or of the last positions alone."""
    state: ModelState | None = None
    """What the memories hold after this segment, to be handed to the next one."""
    token_losses: Tensor | None = None
    """Negative log-likelihood of each target in nats, [batch, length], float32; 0 where nothing is scored. With labels
    or targets only."""
    auxiliary_losses: dict[str, Tensor] | None = None
    """Scalars by name, already weighted; zero without labels or targets where nothing but a loss needs them."""
    intermediates: tuple[LayerRead, ...] | None = None
    """What happened in each layer that has a memory, in their order. With `return_intermediates` only."""
    hidden: Tensor | None = None
    """The last hidden states, of which the scores are made, [batch, length, hidden]. With `return_intermediates`
    only."""
    segment_cache: SegmentCache | None = None
    """What is kept of the segment so far, to go on within it: with `use_cache=True`, until the segment is complete."""
