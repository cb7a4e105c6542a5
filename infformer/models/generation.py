"""Text from a model with a memory: it reads a text of any length, and goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from infformer.errors import ModelError
from infformer.memory.state import ModelState
from infformer.models.segment_cache import SegmentCache
from infformer.models.streaming import TextSegment, remember
from infformer.progress import follow

if TYPE_CHECKING:
    from infformer.models.base import MemoryModel


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


class Place(NamedTuple):
    """Where rows of one length stand that read side by side."""

    state: ModelState | None = None
    """After their whole segments; None at the beginning."""
    cache: SegmentCache | None = None
    """What is kept of the segment that is not whole; None where it begins."""

    def select_rows(self, index: Tensor) -> Place:
        """Some of the rows, each as often as it is asked for."""
        state = None if self.state is None else self.state.select_rows(index)
        return Place(state, None if self.cache is None else self.cache.select_rows(index))


@torch.no_grad()
def read_on(
    model: MemoryModel, tokens: Tensor, segment_length: int, place: Place, scored: int = 1, progress: bool = False
) -> tuple[Tensor, Place]:
    """Read the next tokens of some rows. It does not matter in how many pieces they come.

    A segment that becomes whole is written to memory, and costs nothing beyond its tokens.

    Args:
        tokens: [batch, length], at least one.
        segment_length: the memory's, or for a model without one the context, which then begins anew.
        place: where the rows stand.
        scored: after how many of the last tokens it is asked what comes next.
        progress: show a progress bar.

    Returns:
        The scores of what comes next after each of these, [batch, scored, vocabulary], and where the rows stand then.
    """
    state, cache = place
    room = segment_length - (0 if cache is None else cache.length)
    pieces = [tokens[:, :room], *tokens[:, room:].split(segment_length, dim=1)]
    pieces = [piece for piece in pieces if piece.shape[1]]
    # One token alone is nothing to follow, and is what is read most often.
    followed = follow(pieces, "reading", "segments", len(pieces)) if progress and len(pieces) > 1 else pieces
    scores, unread = [], tokens.shape[1]
    for piece in followed:
        unread -= piece.shape[1]
        wanted = min(max(scored - unread, 0), piece.shape[1])
        is_whole = (0 if cache is None else cache.length) + piece.shape[1] == segment_length
        output = model(
            piece, state=state, segment_cache=cache, use_cache=not is_whole,
            return_logits=wanted > 0, logits_to_keep=wanted,
        )  # fmt: skip
        state, cache = output.state, output.segment_cache
        if wanted:
            scores.append(output.logits)
    return torch.cat(scores, dim=1), Place(state, cache)


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

    Nothing is computed ahead of the token that is asked for.

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
    unread, place = read.unfinished.to(model.device), Place(read.state)
    while True:
        scores, place = read_on(model, unread.unsqueeze(0), segment_length, place)
        logits = scores[:, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            probabilities = torch.softmax(warp(None, logits), dim=-1)  # type: ignore[arg-type] # none looks at the text
            token = torch.multinomial(probabilities, 1, generator=generator)[0]
        yield int(token)
        unread = token.to(model.device)


class _Rows(NamedTuple):
    """Those rows of a batch whose prompts have one length."""

    numbers: Tensor
    """In the batch, [rows]."""
    place: Place


@dataclass
class _NextScores(ModelOutput):
    """What transformers' loops take from a model; what they call `state` they hand back."""

    logits: Tensor | None = None
    """[batch, 1, vocabulary]."""
    state: Any = None
    """Where each row stands."""


class Writer(nn.Module, GenerationMixin):
    """A model as transformers' `generate` wants it: its cache is the memory and what is kept of a segment.

    Rows of one length are read side by side, equal ones once; those of other lengths come to the ends of their segments
    at other tokens and are read apart.

    Args:
        model: that reads and writes.
        segment_length: the memory's, or for a model without one the context.
        read: a text that stands before every prompt.
        progress: show a progress bar while prompts are read.
    """

    def __init__(self, model: MemoryModel, segment_length: int, read: ReadText | None, progress: bool) -> None:
        super().__init__()
        self.model = model
        self.segment_length, self.read, self.progress = segment_length, read, progress

    def __getattr__(self, name: str) -> Any:
        """What transformers' loops ask a model besides: that of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All of the prompts at first, and then what was written since; transformers names the arguments."""
        if (state := kwargs.get("state")) is None:
            return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}
        return {"input_ids": input_ids[:, -(kwargs.get("next_sequence_length") or 1) :], "state": state}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        """Not every version of transformers hands on what it finds under this name."""
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **options)
        return {**kept, "state": outputs["state"]}

    def _reorder_cache(self, state: list[_Rows], beams: Tensor) -> list[_Rows]:
        """Choose rows, as beam search does, each among those of its own prompt."""
        return [
            _Rows(numbers, place.select_rows(torch.searchsorted(numbers, beams[numbers]))) for numbers, place in state
        ]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: list[_Rows] | None = None,
        use_cache: bool = False,
        **ignored: Any,
    ) -> _NextScores:
        if use_cache:  # of a logits processor that reads another text; transformers' loops do not say it
            raise ModelError(
                "guidance_scale=: transformers reads what was written without its prompt by a cache of keys and "
                "values, which a memory is not; leave guidance_scale out, or set use_cache=False too"
            )
        input_ids = input_ids.to(self.model.device)
        rows = self._begin(input_ids, attention_mask) if state is None else []
        for numbers, place in state or ():
            scores, place = read_on(self.model, input_ids[numbers], self.segment_length, place)
            rows.append((_Rows(numbers, place), scores))
        scores = torch.cat([found for _, found in rows])
        order = torch.cat([group.numbers for group, _ in rows]).argsort()
        return _NextScores(scores[order], [group for group, _ in rows])

    def _begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[_Rows, Tensor]]:
        """Read the prompts, those of one length side by side."""
        length = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        lengths = _lengths_at_the_right(real)
        before = Place() if self.read is None else Place(self.read.state)
        found = []
        for count in lengths.unique().tolist():
            numbers = (lengths == count).nonzero().squeeze(1)
            prompts, rows = input_ids[numbers, length - count :].unique(dim=0, return_inverse=True)
            first = torch.zeros(len(prompts), dtype=torch.int64, device=input_ids.device)
            if self.read is not None:
                unfinished = self.read.unfinished.to(prompts).expand(len(prompts), -1)
                prompts = torch.cat([unfinished, prompts], dim=1)
            scores, place = read_on(
                self.model, prompts, self.segment_length, before.select_rows(first), progress=self.progress
            )
            found.append((_Rows(numbers, place.select_rows(rows)), scores[rows]))
        return found


def _lengths_at_the_right(real: Tensor) -> Tensor:
    """How many tokens each row of a mask [batch, length] has, which stand at the right."""
    lengths = (real != 0).sum(dim=1)
    places = torch.arange(real.shape[1], device=real.device)
    if (lengths == 0).any() or not torch.equal(real != 0, places >= (real.shape[1] - lengths).unsqueeze(-1)):
        raise ModelError(
            "attention_mask= has ones before zeros, or a row without any: what is written goes on where a prompt ends, "
            "so padding stands before it; set tokenizer.padding_side='left', and give each row at least one token"
        )
    return lengths
