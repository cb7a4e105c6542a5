"""A model reads documents: the loss of every token, by a protocol, with its memory or where that cannot help.

All figures come from these losses. They do not depend on which documents are read side by side, nor on how many
processes share them out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infformer.data.segments import IGNORE_INDEX, Segment, read_once
from infformer.data.tokenization import TokenizedDocuments
from infformer.errors import UserError
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.streaming import TextSegment, reading, stream
from infformer.progress import Pace
from infformer.results import Protocol

TokenLosses = NDArray[np.float32]

Situation = Callable[[Iterable[Segment]], Iterator[Tensor]]
"""Which memory segments are read with: the segments to the losses of the tokens of each, [rows, length]."""


class EvaluationError(UserError, ValueError):
    """A measurement that cannot be made as asked."""


@dataclass(frozen=True)
class ReadingProtocol:
    """How text is read: what a figure depends on beside the model and the documents.

    Args:
        segment_length: tokens of a segment.
        stride: tokens from one window to the next, each `segment_length` long; None: as many, disjoint segments. With a
            smaller stride each token is predicted from more of what precedes it, at `segment_length / stride` times the
            cost. What is written to memory is the same: whole disjoint segments, as soon as they are read, which is
            before their tokens leave the window.
        precision: autocast type; float32 for none.
        warmup_documents: before each document, read so many of those before it into memory.
    """

    segment_length: int
    stride: int | None = None
    precision: torch.dtype = torch.float32
    warmup_documents: int = 0

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.segment_length if self.stride is None else self.stride

    @property
    def dtype(self) -> str:
        """The precision's name."""
        return str(self.precision).removeprefix("torch.")

    def as_json(self) -> Protocol:
        """What results say of it."""
        return {
            "segment": self.segment_length,
            "stride": self.step,
            "warmup_documents": self.warmup_documents,
            "reset": (
                f"each document begins with a memory of the {self.warmup_documents} documents before it"
                if self.warmup_documents
                else "each document begins with an empty memory"
            ),
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Processes:
    """Who reads: by default one process, alone.

    Args:
        rank: number of this process,
        world_size: of how many that divide the texts among them.
        reduce: adds up a tensor over processes.
        progress: say how far they are.
        after_segment: called whenever a segment has been read, on all processes equally often: to cut a reading short.
    """

    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    progress: bool = True
    after_segment: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A model, and how it reads texts.

    Args:
        model: with or without memory.
        protocol: how it reads.
        batch_size: texts read side by side, at most, all processes together; the figures do not depend on it.
        processes: that read together.

    Raises:
        EvaluationError: the model cannot read in this way.
    """

    model: MemoryModel
    protocol: ReadingProtocol
    batch_size: int = 8
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        segment_length, stride = self.protocol.segment_length, self.protocol.step
        if self.protocol.warmup_documents and not self.model.has_memory:
            raise EvaluationError(
                f"warmup_documents={self.protocol.warmup_documents}: this model has no memory to be warmed up; set it "
                "to 0"
            )
        if stride == segment_length:
            return
        if not 0 < stride < segment_length:
            raise EvaluationError(
                f"stride={stride}: between two windows of segment_length={segment_length} tokens there are "
                f"at least 1 and at most {segment_length} tokens, or some would not be read"
            )
        if self.model.short_term_length:
            raise EvaluationError(
                f"stride={stride}: a short-term memory is a sliding window already, and holds what precedes the "
                f"segment; instead of a stride choose a smaller segment_length and a longer short_term_length"
            )
        if self.model.has_memory and segment_length % stride:
            raise EvaluationError(
                f"stride={stride} does not divide segment_length={segment_length}: whole segments are "
                "written to memory, so choose a stride that does"
            )

    def alone(self) -> Evaluator:
        """The same without other processes, and silent: for a look in between."""
        return replace(self, processes=Processes(progress=False))

    def of_all_processes(self, own: NDArray[Any]) -> NDArray[np.float32]:
        """What all processes found, where each number is every process's zero but one's, so that their sum is exact."""
        found = torch.from_numpy(own.astype(np.float32)).to(self.model.device)
        summed: NDArray[np.float32] = self.processes.reduce(found).cpu().numpy()
        return summed

    def shares(self, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Of some texts those of this process, as many side by side as the batch allows.

        Every process gets the same number of batches: one that has no more texts reads the first of all once more, and
        it does not count.

        Returns:
            Which texts, and how many of them count.
        """
        rank, count = self.processes.rank, self.processes.world_size
        own, side_by_side = numbers[rank::count], -(-self.batch_size // count)
        for first in range(0, -(-len(numbers) // count), side_by_side):
            chosen = own[first : first + side_by_side]
            yield (chosen if len(chosen) else np.zeros(1, dtype=np.int64)), len(chosen)
            self.processes.after_segment()

    def read_a_token(self, **wanted: Any) -> Any:
        """What the model says of one token, to see of which sizes that is."""
        # Once only: a compiled model would compile anew for it.
        with torch.compiler.set_stance("force_eager"), reading(self.model, self.protocol.precision):
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
            return self.model(token, return_logits=False, **wanted)


def describe_protocol(protocol: Protocol) -> str:
    """A protocol in a few words, to stand beside every figure: `disjoint segments of 512, float32`."""
    segment, stride, warmup = protocol["segment"], protocol["stride"], protocol["warmup_documents"]
    windows = f"disjoint segments of {segment}" if stride == segment else f"windows of {segment}, stride {stride}"
    return f"{windows}{f', after {warmup} documents' if warmup else ''}, {protocol['dtype']}"


def read_documents(
    evaluator: Evaluator, documents: TokenizedDocuments, situation: Situation, title: str
) -> TokenLosses:
    """Read every document once. The model is left in evaluation mode.

    Args:
        situation: one of those below.

    Returns:
        The loss in nats of every token of every document but its first, one document after the other, float32
        [tokens]; the same on every process.
    """
    inputs = documents.token_counts - 1
    first = np.cumsum(inputs) - inputs
    token_losses = np.zeros(int(inputs.sum()), dtype=np.float32)
    segments, read = tee(_with_progress(evaluator, documents, title))
    with reading(evaluator.model, evaluator.protocol.precision):
        on_device = (segment.to(evaluator.model.device, non_blocking=True) for segment in read)
        for segment, losses in zip(segments, situation(on_device), strict=False):
            scored = segment.targets.numpy() != IGNORE_INDEX
            places = (first[segment.documents.numpy()] + segment.starts.numpy())[:, None] + np.arange(scored.shape[1])
            token_losses[places[scored]] = losses.float().cpu().numpy()[scored]
            evaluator.processes.after_segment()
    return evaluator.of_all_processes(token_losses)


def with_memory(evaluator: Evaluator) -> Situation:
    """Each segment is read with the document's memory."""
    length, disjoint = evaluator.protocol.segment_length, evaluator.protocol.step == evaluator.protocol.segment_length

    def carry(segment: Segment, before: ModelState | None, after: ModelState | None) -> ModelState | None:
        """Only the windows that are whole disjoint segments are written."""
        if disjoint or before is None or after is None:
            return after
        return before.replace_rows(segment.starts % length == 0, after)

    return lambda segments: (output.token_losses for _, output in stream(evaluator.model, segments, carry=carry))


def without_memory(evaluator: Evaluator) -> Situation:
    """Each segment is read with an empty memory."""

    def carry(segment: Segment, before: ModelState | None, after: ModelState | None) -> None:
        """Nothing is written."""

    return lambda segments: (output.token_losses for _, output in stream(evaluator.model, segments, carry=carry))


def with_shuffled_memory(evaluator: Evaluator) -> Situation:
    """Each segment is read with the document's memory, whose past is in another order: see `shuffle_time`."""
    model, length = evaluator.model, evaluator.protocol.segment_length
    shuffle = model.time_shuffle()

    def written(segment: Segment) -> TextSegment:
        lengths = torch.where(segment.starts % length == 0, segment.lengths, 0)
        return TextSegment(segment.input_ids, lengths=lengths, reset=segment.reset)

    def seen(memory: ModelState | None) -> ModelState | None:
        return None if memory is None else model.shuffle_time(memory, shuffle)

    return lambda segments: _read_beside(model, segments, written, seen)


def with_memory_of_another_document(evaluator: Evaluator, documents: TokenizedDocuments) -> Situation:
    """Each segment is read with the memory that another document had at the same distance from its beginning.

    As full as its own, and of text, but of the wrong one: see `partners`.
    """
    inputs = documents.token_counts - 1
    partner = partners(documents, evaluator.protocol.warmup_documents)

    def written(segment: Segment) -> TextSegment:
        neighbours = torch.zeros_like(segment.input_ids, device="cpu")
        lengths = torch.zeros_like(segment.lengths, device="cpu")
        for row, (document, start) in enumerate(zip(segment.documents.tolist(), segment.starts.tolist(), strict=True)):
            if document >= 0 and start % evaluator.protocol.segment_length == 0:
                neighbour = partner[document]
                stop = min(start + neighbours.shape[1], int(inputs[neighbour]))
                lengths[row] = max(stop - start, 0)  # a shorter neighbour's memory stays as it was at its end
                neighbours[row, : lengths[row]] = torch.from_numpy(documents.tokens(neighbour, min(start, stop), stop))
        device = segment.input_ids.device
        return TextSegment(neighbours.to(device), lengths=lengths.to(device), reset=segment.reset)

    return lambda segments: _read_beside(evaluator.model, segments, written, lambda memory: memory)


def partners(documents: TokenizedDocuments, warmup_documents: int = 0) -> list[int]:
    """For each document the other one whose memory it is read with; each is that of one other.

    It follows from the texts, whatever their order and names: the next by a hash of its tokens, the first after the
    last; so many further on, where texts are there several times, that none is read with its own. With warm-up
    documents, where the list's order decides on every figure, the first after it in the list whose own warm-up
    documents are all others.
    """
    count = len(documents)
    if warmup_documents:
        return [(document + 1 + warmup_documents) % count for document in range(count)]
    lengths = documents.token_counts.tolist()
    hashes = [hashlib.sha256(documents.tokens(i, 0, length).tobytes()).digest() for i, length in enumerate(lengths)]
    order = sorted(range(count), key=hashes.__getitem__)
    copies = max(Counter(hashes).values())
    step = copies if 2 * copies <= count else 1
    after = dict(zip(order, order[step:] + order[:step], strict=True))
    return [after[document] for document in range(count)]


def _read_beside(
    model: MemoryModel,
    segments: Iterable[Segment],
    written: Callable[[Segment], TextSegment],
    seen: Callable[[ModelState | None], ModelState | None],
) -> Iterator[Tensor]:
    """The losses of segments that are read with another memory than the one that goes on.

    Args:
        written: what is read into memory beside a segment; a row of length 0 leaves it as it was.
        seen: what of that memory the segment is read with.
    """
    scored, beside = tee(segments)
    memories = stream(model, map(written, beside), return_logits=False)
    for segment, (memory, _) in zip(scored, memories, strict=False):
        ((_, output),) = stream(model, [segment], seen(memory))
        yield output.token_losses


def _with_progress(evaluator: Evaluator, documents: TokenizedDocuments, title: str) -> Iterator[Segment]:
    total = int((documents.token_counts - 1).sum())
    protocol, processes = evaluator.protocol, evaluator.processes
    with Pace(title, total, "tokens", processes.progress) as pace:
        # An idle lane costs as much as a busy one, so there are no more lanes than documents, but equally many for each
        # process.
        each = -(-min(evaluator.batch_size, len(documents)) // processes.world_size)
        for segment in read_once(
            documents,
            each * processes.world_size,
            protocol.segment_length,
            rank_rows=range(processes.rank * each, (processes.rank + 1) * each),
            stride=protocol.stride,
            warmup_documents=protocol.warmup_documents,
        ):
            yield segment
            pace.advance(segment.global_tokens)
