"""Cross-entropy over a large vocabulary, without the logits of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NOT_SCORED = -100
"""The label of a position that is not scored, as everywhere in torch and transformers."""


def chunked_token_losses(
    hidden: Tensor, head: Callable[[Tensor], Tensor], shift_labels: Tensor, chunk_tokens: int = 1024
) -> Tensor:
    """Negative log-likelihood of each label.

    The logits of `chunk_tokens` tokens exist at a time; backward makes them again, chunk by chunk.

    Args:
        hidden: last hidden states, [batch, length, hidden].
        head: hidden states to logits.
        shift_labels: the token that follows each position, [batch, length]; -100 where nothing is scored.

    Returns:
        Nats, float32, [batch, length]; 0 where nothing is scored.
    """

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, ignore_index=NOT_SCORED, reduction="none")

    chunks = zip(hidden.flatten(0, 1).split(chunk_tokens), shift_labels.flatten().split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks]).view(shift_labels.shape)
