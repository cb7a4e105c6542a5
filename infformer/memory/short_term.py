"""Transformer-XL's short-term memory (arXiv 1901.02860): the last hidden states of a layer, as they were."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from infformer.memory.memory import Entries, KeyValues, Memory, MemoryOutput, SegmentContext
from infformer.memory.state import MemoryState
from infformer.memory.time_shuffle import shuffled_entries


@dataclass(frozen=True)
class Queue(MemoryState):
    """The last entries of each row, the newest at the end: first in, first out."""

    entries: Tensor
    """[batch, length, hidden]; the last `filled` of them are real, those before are zero."""
    filled: Tensor
    """int64 [batch]."""

    @classmethod
    def empty(cls, batch: int, length: int, hidden_size: int) -> Self:
        """A queue of `length` places in which nothing is."""
        return cls(torch.zeros(batch, length, hidden_size), torch.zeros(batch, dtype=torch.int64))

    @property
    def length(self) -> int:
        """How many entries there is room for."""
        return self.entries.shape[1]

    @property
    def real(self) -> Tensor:
        """Which entries are real, bool [batch, length]."""
        places = torch.arange(self.length, 0, -1, device=self.filled.device)
        return places <= self.filled.unsqueeze(-1)

    def without_places(self) -> Self:
        """One of no length: all layers share a mask, by which attention would look at empty places as well."""
        return replace(self, entries=self.entries[:, :0], filled=torch.zeros_like(self.filled))

    def shuffle_time(self) -> Self:
        """The same entries in another order; see `time_shuffle`."""
        order = shuffled_entries(self.filled, self.length)
        return replace(self, entries=torch.take_along_dim(self.entries, order.unsqueeze(-1), dim=1))

    def push(self, new: Tensor, rows: Tensor) -> tuple[Self, Tensor]:
        """Append new entries to some rows; as many leave at the front.

        Args:
            new: [batch, count, hidden].
            rows: which rows are written, bool [batch]; the others stay as they are.

        Returns:
            The queue after, without the graph that made the entries, and what leaves, [batch, count, hidden]: real
            where the queue was full, and only meant for rows that are written.
        """
        count = new.shape[1]
        joined = torch.cat([self.entries.to(new.dtype), new], dim=1)
        kept = joined[:, count:].detach().to(self.entries.dtype)
        filled = (self.filled + count).clamp(max=self.length)
        after = replace(
            self,
            entries=torch.where(rows.view(-1, 1, 1), kept, self.entries),
            filled=torch.where(rows, filled, self.filled),
        )
        return after, joined[:, :count]


@dataclass(frozen=True)
class ShortTermState(MemoryState):
    """What a layer with a short-term memory holds between two segments."""

    short_term: Queue
    behind: Any
    """The state of the memory behind it; None without one."""
    losses: Queue | None
    """Of the tokens of these hidden states, in nats; None where the memory behind does not ask for them."""


class PendingWrite(NamedTuple):
    """What waits for the losses of a segment's tokens."""

    complete: Tensor
    """Rows whose segment is complete, bool [batch]."""
    behind: Any
    """What the memory behind will write."""


class ShortTermMemory(Memory):
    """The last hidden states of a layer, to which its attention looks back, and perhaps a memory behind them.

    Args:
        length: how many hidden states; with a memory behind them a multiple of the segment's.
        hidden_size: width of the model.
        behind: what leaves the short-term memory is written to it. None: what leaves is forgotten.
    """

    def __init__(self, length: int, hidden_size: int, behind: Memory | None = None) -> None:
        super().__init__()
        self.length = length
        self.numbers = hidden_size
        self.behind = behind
        if behind is not None:
            self.noise_size, self.loss_weights = behind.noise_size, behind.loss_weights
            self.needs_losses, self.learns_by_writing = behind.needs_losses, behind.learns_by_writing
            self.keeps_key_values = behind.keeps_key_values

    def initial_state(self, batch: int) -> ShortTermState:
        queue = Queue.empty(batch, self.length, self.numbers)
        behind = None if self.behind is None else self.behind.initial_state(batch)
        return ShortTermState(queue, behind, Queue.empty(batch, self.length, 1) if self.needs_losses else None)

    def prepare(self, state: ShortTermState, context: SegmentContext) -> Any:
        return None if self.behind is None else self.behind.prepare(state.behind, context)

    def entries(self, state: ShortTermState) -> Entries | None:
        """Those of the memory behind it, and then its own."""
        older = None if self.behind is None else self.behind.entries(state.behind)
        own = Entries(state.short_term.entries, state.short_term.real)
        return own if older is None else Entries(*(torch.cat(pair, dim=1) for pair in zip(older, own, strict=True)))

    def kept(self, hidden: Tensor, context: SegmentContext) -> Tensor:
        """What is kept of each token, [batch, length, numbers]; its hidden state first, if a memory behind wants it."""
        return hidden

    def handed_on(self, leaving: Tensor, hidden_size: int) -> Tensor:
        """What the memory behind is given of what leaves, [batch, length, numbers]."""
        return leaving

    def forward(self, hidden: Tensor, state: ShortTermState, context: SegmentContext, shared: Any) -> MemoryOutput:
        queue, complete, leaving = state.short_term, context.complete, None
        if complete is not None:
            queue, leaving = queue.push(self.kept(context.whole(hidden), context), complete)
            leaving = self.handed_on(leaving, hidden.shape[-1])
            # All of a segment leaves, or nothing: the length is a multiple of the segment's.
            complete = complete & (state.short_term.filled == self.length)
        if self.behind is None:
            return MemoryOutput(replace(state, short_term=queue))
        behind = self.behind(hidden, state.behind, context._replace(complete=complete, leaving=leaving), shared)
        after = replace(state, short_term=queue, behind=behind.state)
        if self.needs_losses and context.complete is not None:
            return behind._replace(state=after, pending=PendingWrite(context.complete, behind.pending))
        return behind._replace(state=after)

    def write_by_losses(self, state: ShortTermState, pending: PendingWrite, losses: Tensor) -> ShortTermState:
        """What leaves was read earlier, and so were its losses."""
        assert self.behind is not None
        assert state.losses is not None
        queue, leaving = state.losses.push(losses.unsqueeze(-1), pending.complete)
        behind = self.behind.write_by_losses(state.behind, pending.behind, leaving.squeeze(-1))
        return replace(state, behind=behind, losses=queue)

    def without_past(self, state: ShortTermState) -> ShortTermState:
        """What stands behind it is taken away; this memory only if nothing does."""
        if self.behind is None:
            return replace(state, short_term=state.short_term.without_places())
        return replace(state, behind=self.behind.without_past(state.behind))

    def innermost(self, state: ShortTermState) -> tuple[Memory, Any]:
        return (self, state) if self.behind is None else self.behind.innermost(state.behind)

    def time_shuffle(self) -> Any:
        return None if self.behind is None else self.behind.time_shuffle()

    def shuffle_time(self, state: ShortTermState, shuffle: Any) -> ShortTermState:
        """That of each memory apart."""
        behind = None if self.behind is None else self.behind.shuffle_time(state.behind, shuffle)
        losses = None if state.losses is None else state.losses.shuffle_time()
        return replace(state, short_term=state.short_term.shuffle_time(), behind=behind, losses=losses)


@dataclass(frozen=True)
class KeyValueState(ShortTermState):
    """What a layer of a pretrained model with a short-term memory holds between two segments."""

    sinks: Tensor
    """The first tokens of the document, [batch, sinks, numbers]."""
    written: Tensor
    """How many tokens have been written, int64 [batch]."""


class KeyValueMemory(ShortTermMemory):
    """Keys and values of the last tokens, which the attention of a pretrained model sees before its segment.

    They are kept without their rotation by places, so that they do not say how long ago they were read. The first
    tokens of a document stay in sight when they have left (attention sinks, Xiao et al., arXiv 2309.17453): pretrained
    attention puts there what it does not need elsewhere.

    Args:
        length: how many tokens; with a memory behind them a multiple of the segment's.
        sinks: how many first tokens stay; at most a segment's.
        shape: heads of keys and values, and numbers of each head.
        hidden_size: width of the model.
        behind: what leaves the short-term memory is written to it. None: what leaves is forgotten.
    """

    def __init__(
        self, length: int, sinks: int, shape: tuple[int, int], hidden_size: int, behind: Memory | None = None
    ) -> None:
        super().__init__(length, hidden_size, behind)
        self.sinks = sinks
        self.shape = shape
        self.wants_hidden = behind is not None and not behind.keeps_key_values
        self.numbers = 2 * shape[0] * shape[1] + (hidden_size if self.wants_hidden else 0)

    def initial_state(self, batch: int) -> KeyValueState:
        empty = super().initial_state(batch)
        sinks, written = torch.zeros(batch, self.sinks, self.numbers), torch.zeros(batch, dtype=torch.int64)
        return KeyValueState(empty.short_term, empty.behind, empty.losses, sinks, written)

    def kept(self, hidden: Tensor, context: SegmentContext) -> Tensor:
        assert context.key_values is not None
        pair = [part.transpose(1, 2).flatten(2) for part in context.key_values]
        return torch.cat([hidden.to(pair[0].dtype), *pair] if self.wants_hidden else pair, dim=-1)

    def handed_on(self, leaving: Tensor, hidden_size: int) -> Tensor:
        return leaving[..., :hidden_size] if self.wants_hidden else leaving

    def entries(self, state: ShortTermState) -> None:
        """None: attention sees keys and values, not hidden states."""

    def without_past(self, state: Any) -> Any:
        without = cast(KeyValueState, super().without_past(state))
        return without if self.behind is not None else replace(without, sinks=without.sinks[:, :0])

    def key_values(self, state: Any) -> tuple[KeyValues, Tensor]:
        width = self.shape[0] * self.shape[1]
        entries = torch.cat([state.sinks, state.short_term.entries], dim=1)
        keys, values = entries[..., -2 * width :].split(width, dim=-1)
        pair = (part.unflatten(-1, self.shape).transpose(1, 2) for part in (keys, values))
        places = torch.arange(state.sinks.shape[1], device=entries.device)
        left = places < (state.written - self.length).unsqueeze(-1)  # the others are still in the queue
        return KeyValues(*pair), torch.cat([left, state.short_term.real], dim=1)

    def forward(self, hidden: Tensor, state: Any, context: SegmentContext, shared: Any) -> MemoryOutput:
        output = super().forward(hidden, state, context, shared)
        if context.complete is not None:
            sinks, written = state.sinks, state.written
            assert context.key_values is not None
            count, whole = sinks.shape[1], context.whole(hidden)
            pair = KeyValues(*(part[:, :, :count] for part in context.key_values))
            first = self.kept(whole[:, :count], context._replace(key_values=pair)).detach().to(sinks.dtype)
            begins = (context.complete & (written == 0)).view(-1, 1, 1)
            sinks = torch.where(begins, first, sinks)
            written = written + whole.shape[1] * context.complete
            after = cast(KeyValueState, output.state)
            return output._replace(state=replace(after, sinks=sinks, written=written))
        return output
