"""Text from a model with a memory: it reads a text of any length, and goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infformer.errors import ModelError
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.streaming import TextSegment, remember
from infformer.progress import follow


class ReadText(NamedTuple):
    """What is known of a text that was read: its whole segments are in memory."""

    state: ModelState | None
    """After them; None if there was none."""
    unfinished: Tensor
    """The tokens after them, [length], from 1 to those of a segment."""


@torch.no_grad()
def read_text(
    model: MemoryModel, tokens: Tensor, segment_length: int, before: ReadText | None = None, progress: bool = False
) -> ReadText:
    """Read a text of any length into memory. It does not matter in how many pieces it comes.

    Args:
        tokens: token ids, [length], at least one.
        segment_length: the memory's, or for a model without one the context.
        before: what was read before it.
        progress: say how far it is.

    Raises:
        ModelError: the memory's segments have another length, or there is no text.
    """
    model.check_segment_length(segment_length)
    if tokens.dim() != 1 or len(tokens) == 0:
        raise ModelError(
            f"prompt= has the shape {list(tokens.shape)}: give the token ids of one text, [length], at least one token"
        )
    tokens = tokens.to(model.device)
    unread = tokens if before is None else torch.cat([before.unfinished.to(model.device), tokens])
    *whole, unfinished = unread.split(segment_length)
    followed = follow(whole, "reading", "segments", len(whole), progress)
    state = remember(model, (TextSegment(segment.unsqueeze(0)) for segment in followed), before and before.state)
    return ReadText(state, unfinished)


def continue_text(
    model: MemoryModel,
    prompt: Tensor,
    tokens: int,
    segment_length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample so many tokens after a prompt, [tokens]; the arguments are those of `read_text` and `sample_tokens`."""
    read = read_text(model, prompt, segment_length)
    sampled = sample_tokens(model, read, segment_length, temperature, generator=generator)
    return torch.tensor(list(islice(sampled, tokens)), dtype=torch.long)


@torch.no_grad()
def sample_tokens(
    model: MemoryModel,
    read: ReadText,
    segment_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Sample what comes after a text, token by token, without end.

    Within an unfinished segment the key-value cache serves. When a segment is whole, it is read once more, to be
    written to memory. Nothing is computed ahead of the token that is asked for.

    Args:
        read: the text.
        segment_length: as it was read.
        temperature: 0 takes the most likely token every time.
        top_k: sample among so many most likely tokens; 0: among all.
        top_p: sample among the most likely tokens that together have this probability.
        generator: of the random choices, on the CPU.
    """
    warp = LogitsProcessorList()
    if temperature not in (0, 1):
        warp.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warp.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warp.append(TopPLogitsWarper(top_p))
    state, segment = read.state, read.unfinished.to(model.device).unsqueeze(0)
    unread, cache = segment, None
    while True:
        output = model(unread, state=state, segment_cache=cache, use_cache=True)
        cache = output.segment_cache
        logits = output.logits[:, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            probabilities = torch.softmax(warp(None, logits), dim=-1)  # type: ignore[arg-type] # none looks at the text
            token = torch.multinomial(probabilities, 1, generator=generator)[0]
        yield int(token)
        unread = token.to(model.device).unsqueeze(0)
        if segment.shape[1] == segment_length:
            state = remember(model, [TextSegment(segment)], state)
            segment, cache = unread, None
        else:
            segment = torch.cat([segment, unread], dim=1)
