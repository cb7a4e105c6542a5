"""Text from a model with a memory."""

from __future__ import annotations

import torch
from torch import Tensor

from infformer.memory.state import MemoryState
from infformer.models.memory_model import MemoryModel


@torch.no_grad()
def continue_text(
    model: MemoryModel,
    prompt: Tensor,
    tokens: int,
    segment_length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample what comes after a prompt of any length.

    The prompt's whole segments are read into memory; within the last, unfinished segment the backbone's key-value cache
    serves. When that segment is whole, it is read once more, to be written to memory.

    Args:
        prompt: token ids, [length], at least one.
        tokens: how many to sample.
        segment_length: the memory's, or for a model without one the context.
        temperature: 0 takes the most likely token every time.
        generator: of the random choices, on the CPU.

    Returns:
        The sampled tokens, [tokens].
    """
    memory: MemoryState | None = None
    segment = prompt.to(model.device).unsqueeze(0)
    while segment.shape[1] > segment_length:
        memory = model(segment[:, :segment_length], memory=memory, return_logits=False).memory
        segment = segment[:, segment_length:]

    sampled: list[Tensor] = []
    unread, cache = segment, None
    while len(sampled) < tokens:
        output = model(unread, memory=memory, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[0, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        sampled.append(token)
        unread = token.to(model.device).unsqueeze(0)
        if segment.shape[1] == segment_length:
            memory = model(segment, memory=memory, return_logits=False).memory
            segment, cache = unread, None
        else:
            segment = torch.cat([segment, unread], dim=1)
    return torch.cat(sampled)
