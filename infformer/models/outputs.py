"""What a model with a memory returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from infformer.memory.long_term import Reading
from infformer.memory.state import MemoryState


class Intermediates(NamedTuple):
    """What happened in a layer that has a memory while it read a segment."""

    hidden: Tensor
    """What its attention saw of the segment, and what is written to memory, now or later; [batch, length, hidden]."""
    attended: Tensor
    """What self-attention returned, [batch, length, hidden]."""
    reading: Reading | None
    """What was read from the long-term memory, and where each head looked; None without one."""


@dataclass
class MemoryModelOutput(ModelOutput):
    """One type, whatever is switched on; what was not asked for is None.

    A mapping, as Hugging Face's Trainer and DeepSpeed want it. Beside `loss` and `logits` its names are none of
    transformers' own, which renames those of every `ModelOutput` together with its own.
    """

    loss: Tensor | None = None
    """Mean of `token_losses` over scored tokens, plus the auxiliary losses; a scalar. With labels only."""
    logits: Tensor | None = None
    """Scores of the next token, [batch, length, vocabulary]."""
    memory: MemoryState | None = None
    """The memory after this segment, to be handed to the next one."""
    token_losses: Tensor | None = None
    """Negative log-likelihood of each label in nats, [batch, length], float32; 0 where nothing is scored. With labels
    only."""
    auxiliary_losses: dict[str, Tensor] | None = None
    """Scalars by name, already weighted."""
    intermediates: tuple[Intermediates, ...] | None = None
    """What happened in each layer that has a memory, in their order. With `return_intermediates` only."""
    segment_cache: Any = None
    """What attention keeps of the segment so far, to go on within it: with `use_cache=True`, until the next segment."""
