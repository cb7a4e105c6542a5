"""What a model with a memory returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from infformer.memory.state import MemoryState


@dataclass
class MemoryModelOutput(ModelOutput):
    """One type, whatever is switched on; what was not asked for is None."""

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
    past_key_values: Any = None
    """The backbone's key-value cache within the segment, with `use_cache=True`."""
