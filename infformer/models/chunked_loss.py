"""Losses over a large vocabulary, without the logits of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""The label of a position that is not scored, as everywhere in torch and transformers."""


def chunked_token_losses(
    hidden: Tensor,
    token_losses: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Negative log-likelihood of each label.

    What `token_losses` computes on the way exists for `chunk_tokens` tokens at a time; backward makes it again, chunk
    by chunk.

    Args:
        hidden: last hidden states, [batch, length, hidden].
        token_losses: hidden states [tokens, hidden] and labels [tokens] to nats [tokens], 0 where the label is -100;
            such as `cross_entropy(head)`.
        targets: the token that follows each position, [batch, length]; -100 where nothing is scored.

    Returns:
        Nats, float32, [batch, length]; 0 where nothing is scored.
    """
    chunks = zip(hidden.flatten(0, 1).split(chunk_tokens), targets.flatten().split(chunk_tokens), strict=True)
    # Nothing random happens in a head, so that the state of no generator is kept.
    again = partial(checkpoint, token_losses, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*chunk) for chunk in chunks]).view(targets.shape)


def cross_entropy(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The token losses of a head that maps hidden states to logits."""

    def token_losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORE_INDEX, reduction="none")

    return token_losses
