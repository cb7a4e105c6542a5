"""Text from a model with a memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from infformer.errors import ModelError
from infformer.models.base import MemoryModel
from infformer.models.streaming import TextSegment, remember


def continue_text(
    model: MemoryModel,
    prompt: Tensor,
    tokens: int,
    segment_length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample so many tokens after a prompt; the arguments are those of `sample_tokens`.

    Returns:
        The sampled tokens, [tokens].
    """
    sampled = sample_tokens(model, prompt, segment_length, temperature, generator)
    return torch.tensor(list(islice(sampled, tokens)), dtype=torch.long)


@torch.no_grad()
def sample_tokens(
    model: MemoryModel,
    prompt: Tensor,
    segment_length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Sample what comes after a prompt of any length, token by token, without end.

    The prompt's whole segments are read into memory; within the last, unfinished segment the backbone's key-value cache
    serves. When that segment is whole, it is read once more, to be written to memory. Nothing is computed ahead of the
    token that is asked for.

    Args:
        prompt: token ids, [length], at least one.
        segment_length: the memory's, or for a model without one the context.
        temperature: 0 takes the most likely token every time.
        generator: of the random choices, on the CPU.

    Raises:
        ModelError: the memory's segments have another length, or there is no prompt.
    """
    model.check_segment_length(segment_length)
    if prompt.dim() != 1 or len(prompt) == 0:
        raise ModelError(
            f"prompt= has the shape {list(prompt.shape)}: give the token ids of one text, [length], at least one token"
        )
    *whole, segment = prompt.to(model.device).unsqueeze(0).split(segment_length, dim=1)
    memory = remember(model, map(TextSegment, whole))
    unread, cache = segment, None
    while True:
        output = model(unread, state=memory, segment_cache=cache, use_cache=True)
        cache = output.segment_cache
        logits = output.logits[0, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        yield int(token)
        unread = token.to(model.device).unsqueeze(0)
        if segment.shape[1] == segment_length:
            memory = remember(model, [TextSegment(segment)], memory)
            segment, cache = unread, None
        else:
            segment = torch.cat([segment, unread], dim=1)
