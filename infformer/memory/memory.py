"""The contract of every memory: a module beside the attention of one layer, and what it holds, which is a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.memory.state import MemoryState

ContentAttention = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Attention of the current segment on entries [batch, length, hidden] by their content alone, through which gradients
reach nothing but the entries: what is read [batch, queries, width], and the weights [batch, heads, queries, length]."""


class KeyValues(NamedTuple):
    """Keys, before any rotation by places, and values."""

    keys: Tensor
    """[batch, heads, length, head]."""
    values: Tensor
    """[batch, heads, length, head]."""


class LayerHeads(NamedTuple):
    """What a layer's own attention asks, and where its answers go, for a memory that keeps keys and values."""

    queries: Tensor
    """Of the tokens that are read now, before any rotation by places, scaled so that a score is qᵀk/√head; shape
    [batch, heads, length, head]."""
    output: Callable[[Tensor], Tensor]
    """The output projection without its bias, from heads [batch, heads, length, head] to [batch, length, hidden]."""
    attended: Callable[[], tuple[Tensor, Tensor]]
    """What attention reads of the segment, the shape of the queries, and the logarithm of the sum of its scores'
    exponentials, [batch, heads, length]."""
    project: Callable[[Tensor], KeyValues] | None = None
    """From hidden states to their keys and values; None where `SegmentContext.key_values` are known."""


class Earlier(NamedTuple):
    """What a layer keeps of the earlier tokens of an unfinished segment."""

    hidden: tuple[Tensor, ...]
    """They, as the layer's attention saw them, in pieces [batch, length, hidden]."""
    projected: Any
    """What its memory made of its state in order to read it, tensors [batch, …]: it stays as long as the state does."""


class SegmentContext(NamedTuple):
    """What the memories of all layers are told about the segment that is read."""

    complete: Tensor | None
    """Rows whose segment is complete and is written, bool [batch]; None where no row's can be."""
    noise: Tensor | None = None
    """Random numbers in [0, 1), [batch, noise_size]; None: the memory is deterministic."""
    attend: ContentAttention | None = None
    """The layer's attention by content alone; None where the memory stands beside somebody else's attention."""
    key_values: KeyValues | None = None
    """Those of the whole segment in this layer, where it is written; None in the own decoder, which sees hidden states.
    """
    heads: LayerHeads | None = None
    """The layer's own attention; None where no memory of the model asks for it."""
    leaving: Tensor | None = None
    """What leaves the short-term memory and is written instead of the segment, [batch, length, hidden]; None without
    one. For a memory of keys and values beside a pretrained model it is these, side by side."""
    without_memory: Tensor | None = None
    """Rows that read the segment as if their memory were empty, and write it as always, bool [batch]; None: no row."""

    earlier: Earlier | None = None
    """What the layer keeps of the segment's earlier tokens; None where a segment begins."""
    scored: bool = True
    """Whether tokens are scored, so that auxiliary losses are asked for as well."""

    def visible(self, real: Tensor) -> Tensor:
        """What is seen of a memory's entries, of which these are real, bool [batch, length]."""
        return real if self.without_memory is None else real & ~self.without_memory.unsqueeze(-1)

    def added(self, attended: Tensor, context: Tensor, reads_segment: bool = False) -> Tensor:
        """What attention returned, and what the memory adds to it; all [batch, length, hidden]."""
        if self.without_memory is not None and not reads_segment:
            context = context.masked_fill(self.without_memory.view(-1, 1, 1), 0)
        return attended + context.to(attended.dtype)

    def whole(self, hidden: Tensor) -> Tensor:
        """The segment from its beginning, [batch, length, hidden], of which some tokens are read now."""
        return hidden if self.earlier is None else torch.cat([*self.earlier.hidden, hidden], dim=1)

    def written(self, hidden: Tensor) -> Tensor:
        """What is written when the segment is complete: what leaves the short-term memory, or without one all of it."""
        return self.whole(hidden) if self.leaving is None else self.leaving


class Entries(NamedTuple):
    """What attention sees before the segment."""

    hidden: Tensor
    """[batch, length, hidden]."""
    real: Tensor
    """Which of them are real, bool [batch, length]."""


class MemoryOutput(NamedTuple):
    """What a memory returns for a segment."""

    state: MemoryState
    """What it holds after the segment."""
    context: Tensor | None = None
    """What is added to the output of self-attention, [batch, length, hidden]; None: nothing."""
    losses: dict[str, Tensor] = {}  # noqa: RUF012, nobody changes it
    """Auxiliary losses of each token by name, [batch, length]: zero in rows that do not count, and not yet weighted.
    One that is left out is zero."""
    reading: Any = None
    """How the memory was read, in the kind's own terms, for its instruments."""
    projected: Any = None
    """What it made of its state in order to read it: the next tokens of the segment get it back in `Earlier`."""
    pending: Any = None
    """What `write_by_losses` writes, tensors [batch, …]; None where `state` is what the memory holds after the segment.
    """


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """[batch, length, width] to [batch, heads, length, head]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def apply_linear(linear: nn.Linear, tensor: Tensor) -> Tensor:
    """The linear map in the type of the tensor, not in that of the weights."""
    return F.linear(tensor, linear.weight.to(tensor))


class DerivedBuffers(nn.Module):
    """Buffers that follow from options: no checkpoint stores them, and a loader leaves arbitrary numbers there."""

    def reset_parameters(self) -> None:
        """Compute them anew, where they are."""
        raise NotImplementedError


class Memory(nn.Module):
    """The learned part of one layer's memory.

    Nothing that carries over between segments lives here: `forward` takes the state before a segment and returns the
    one after it. An empty memory adds exactly nothing, and a new one adds nothing until it is trained. A row whose
    segment is not complete leaves its state as it was. A segment may come in pieces: with the one that completes it, it
    is written from its beginning.
    """

    noise_size: int = 0
    """Random numbers that a row takes for each segment in training."""
    loss_weights: dict[str, float] = {}  # noqa: RUF012, nobody changes it
    """Weights of the auxiliary losses, by their names."""
    learns_by_writing: bool = False
    """Whether its own parameters learn from what later segments read: then gradients also flow through segments without
    targets. Where it keeps keys and values they also do, as long as the attention that makes them learns."""
    reads_segment: bool = False
    """Whether it reads the segment as well, so that rows without memory are its own to read without a past."""
    needs_losses: bool = False
    """Whether it is told the losses of the tokens that it writes, by `write_by_losses`."""
    keeps_key_values: bool = False
    """Whether it keeps keys and values and is told of `SegmentContext.heads`, instead of hidden states."""
    is_signal: bool = False
    """Whether the past is a continuous signal that is read by densities: then more can be shown of it."""

    def initial_state(self, batch: int) -> MemoryState:
        """An empty memory for `batch` rows, on any device."""
        raise NotImplementedError

    def prepare(self, state: Any, context: SegmentContext) -> Any:
        """What the memories of all layers need for this segment and compute alike, from the state of the first."""
        return None

    def entries(self, state: Any) -> Entries | None:
        """What attention sees before the segment; None for a memory that only adds to what attention returns."""
        return None

    def key_values(self, state: Any) -> tuple[KeyValues, Tensor] | None:
        """What somebody else's attention sees before the segment, and which is real, bool [batch, length]."""
        return None

    def forward(self, hidden: Tensor, state: Any, context: SegmentContext, shared: Any) -> MemoryOutput:
        """Read the memory for a segment, and write the segment.

        One call for both: engines that cut up weights put a module's together for the time of its call.

        Args:
            hidden: the segment, or its next tokens, as the layer's attention sees it, [batch, length, hidden], any
                floating type.
            state: before it.
            shared: what `prepare` returned.
        """
        raise NotImplementedError

    def write_by_losses(self, state: Any, pending: Any, losses: Tensor) -> MemoryState:
        """Write a segment once the losses of its tokens are known, which is when all layers have read it.

        No weight may be used here, as an engine may have cut them up again: what depends on them stands in `pending`.

        Args:
            state: what `forward` returned.
            pending: likewise.
            losses: of each token that is written, as the tokens before it in its segment predicted it, in nats,
                [batch, length], without a graph. The first of a segment, which none predicted, has the mean of the
                others.
        """
        raise NotImplementedError

    def without_past(self, state: Any) -> MemoryState:
        """The state with which this memory adds nothing; what its instruments compare it with."""
        empty: MemoryState = state.map_tensors(torch.zeros_like)
        return empty

    def innermost(self, state: Any) -> tuple[Memory, Any]:
        """This memory and its state, or those of the last one that stands behind it."""
        return self, state

    def time_shuffle(self) -> Any:
        """What `shuffle_time` needs, for whoever shuffles many states."""
        return None

    def shuffle_time(self, state: Any, shuffle: Any) -> MemoryState:
        """The same past in another order, as a control: see `memory.time_shuffle`.

        Args:
            shuffle: what `time_shuffle` returned.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Begin anew beside a pretrained model: what a memory that was never trained has there."""

    def reset_numbers(self) -> None:
        """Begin anew with what is no linear map, such as gates and offsets: it begins alike in every model."""
