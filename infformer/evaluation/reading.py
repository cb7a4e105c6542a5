"""A model reads documents: the nats of every token, by a protocol, with its memory or where that cannot help.

All figures come from these nats. They do not depend on which documents are read side by side, nor on how many processes
share them out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from infformer.data.lanes import IGNORE_INDEX, Segment
from infformer.data.reading import read_once
from infformer.data.tokenization import TokenizedDocuments
from infformer.errors import UserError
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel

TokenLosses = NDArray[np.float32]

Read = Callable[[Segment, "ModelState | None"], "tuple[Tensor, ModelState | None]"]
"""How one segment is read: the segment and the memory so far to the token losses and the memory after."""


class EvaluationError(UserError, ValueError):
    """A measurement that cannot be made as asked."""


@dataclass(frozen=True)
class Evaluator:
    """A model, and how it reads documents.

    Args:
        model: with or without memory.
        segment_length: tokens of a segment.
        batch_size: documents read side by side, at most, all processes together; the figures do not depend on it.
        precision: autocast type; float32 for none.
        rank: number of this process,
        world_size: of how many that divide the documents among them.
        reduce: adds up a tensor over processes.
        progress: show a progress bar.
        stride: tokens from one window to the next, each `segment_length` long; None: as many, disjoint segments. With a
            smaller stride each token is predicted from more of what precedes it, at `segment_length / stride` times the
            cost. What is written to memory is the same: whole disjoint segments, as soon as they are read, which is
            before their tokens leave the window.
        warmup_documents: before each document, read so many of those before it into memory.
        after_segment: called whenever a segment has been read, on all processes equally often: to cut a reading short.

    Raises:
        EvaluationError: the model cannot read in this way.
    """

    model: MemoryModel
    segment_length: int
    batch_size: int = 8
    precision: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    progress: bool = True
    stride: int | None = None
    warmup_documents: int = 0
    after_segment: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        if self.warmup_documents and not self.model.has_memory:
            raise EvaluationError(
                f"warmup_documents={self.warmup_documents}: this model has no memory to be warmed up; set it to 0"
            )
        if self.stride is None or self.stride == self.segment_length:
            return
        if not 0 < self.stride < self.segment_length:
            raise EvaluationError(
                f"stride={self.stride}: between two windows of segment_length={self.segment_length} tokens there are "
                f"at least 1 and at most {self.segment_length} tokens, or some would not be read"
            )
        if self.model.short_term_length:
            raise EvaluationError(
                f"stride={self.stride}: a short-term memory is a sliding window already, and holds what precedes the "
                f"segment; instead of a stride choose a smaller segment_length and a longer short_term_length"
            )
        if self.model.has_memory and self.segment_length % self.stride:
            raise EvaluationError(
                f"stride={self.stride} does not divide segment_length={self.segment_length}: whole segments are "
                "written to memory, so choose a stride that does"
            )

    @property
    def protocol(self) -> dict[str, Any]:
        """What a figure depends on beside the model and the documents, as JSON."""
        return {
            "segment": self.segment_length,
            "stride": self.stride or self.segment_length,
            "warmup_documents": self.warmup_documents,
            "reset": (
                f"each document begins with a memory of the {self.warmup_documents} documents before it"
                if self.warmup_documents
                else "each document begins with an empty memory"
            ),
            "dtype": str(self.precision).removeprefix("torch."),
        }


def describe_protocol(protocol: dict[str, Any]) -> str:
    """A protocol in a few words, to stand beside every figure: `disjoint segments of 512, float32`."""
    segment, stride, warmup = protocol["segment"], protocol["stride"], protocol["warmup_documents"]
    reading = f"disjoint segments of {segment}" if stride == segment else f"windows of {segment}, stride {stride}"
    return f"{reading}{f', after {warmup} documents' if warmup else ''}, {protocol['dtype']}"


@torch.no_grad()  # no inference_mode: engines that cut up weights keep what they put together here for training
def read_documents(evaluator: Evaluator, documents: TokenizedDocuments, read: Read, title: str) -> TokenLosses:
    """Read every document once. The model is left in evaluation mode.

    Args:
        read: one of the situations below.
        title: of the progress bar.

    Returns:
        The loss in nats of every token of every document but its first, one document after the other, float32
        [tokens]; the same on every process.
    """
    model, device = evaluator.model, evaluator.model.device
    model.eval()
    inputs = documents.token_counts - 1
    first = np.cumsum(inputs) - inputs
    nats = np.zeros(int(inputs.sum()), dtype=np.float32)
    memory: ModelState | None = None
    with torch.autocast(device.type, evaluator.precision, enabled=evaluator.precision != torch.float32):
        for segment in _with_progress(evaluator, documents, title):
            losses, memory = read(segment.to(device, non_blocking=True), memory)
            scored = segment.targets.numpy() != IGNORE_INDEX
            places = (first[segment.documents.numpy()] + segment.starts.numpy())[:, None] + np.arange(scored.shape[1])
            nats[places[scored]] = losses.float().cpu().numpy()[scored]
            evaluator.after_segment()
    # Each token is another process's zero but in one of them, so the sum is exact.
    summed: TokenLosses = evaluator.reduce(torch.from_numpy(nats).to(device)).cpu().numpy()
    return summed


def with_memory(evaluator: Evaluator) -> Read:
    """Each segment is read with the document's memory."""

    def read(segment: Segment, memory: ModelState | None) -> tuple[Tensor, ModelState | None]:
        output = _score(evaluator, segment, memory)
        return output.token_losses, _carry(evaluator, segment, memory, output.state)

    return read


def without_memory(evaluator: Evaluator) -> Read:
    """Each segment is read with an empty memory."""

    def read(segment: Segment, memory: ModelState | None) -> tuple[Tensor, ModelState | None]:
        return _score(evaluator, segment, None).token_losses, None

    return read


def with_shuffled_memory(evaluator: Evaluator) -> Read:
    """Each segment is read with the document's memory, whose past is in another order: see `shuffle_time`."""

    shuffle = evaluator.model.time_shuffle()

    def read(segment: Segment, memory: ModelState | None) -> tuple[Tensor, ModelState | None]:
        if memory is None:
            memory = evaluator.model.initial_state(len(segment.lengths))
        memory = memory.reset_rows(segment.reset)
        losses = _score(evaluator, segment, evaluator.model.shuffle_time(memory, shuffle)).token_losses
        written = evaluator.model(segment.input_ids, state=memory, lengths=segment.lengths, return_logits=False)
        return losses, _carry(evaluator, segment, memory, written.state)

    return read


def with_memory_of_another_document(evaluator: Evaluator, documents: TokenizedDocuments) -> Read:
    """Each segment is read with the memory that another document had at the same distance from its beginning.

    As full as its own, and of text, but of the wrong one: see `partners`.
    """
    inputs, partner = documents.token_counts - 1, partners(documents, evaluator.warmup_documents)

    def read(segment: Segment, memory: ModelState | None) -> tuple[Tensor, ModelState | None]:
        losses = _score(evaluator, segment, memory).token_losses
        # Beside each document its neighbour is read, and only that is written to memory.
        neighbours = torch.zeros_like(segment.input_ids, device="cpu")
        lengths = torch.zeros_like(segment.lengths, device="cpu")
        for row, (document, start) in enumerate(zip(segment.documents.tolist(), segment.starts.tolist(), strict=True)):
            if document >= 0 and start % evaluator.segment_length == 0:
                neighbour = partner[document]
                stop = min(start + neighbours.shape[1], int(inputs[neighbour]))
                lengths[row] = max(stop - start, 0)  # a shorter neighbour's memory stays as it was at its end
                neighbours[row, : lengths[row]] = torch.from_numpy(documents.tokens(neighbour, min(start, stop), stop))
        written = evaluator.model(
            neighbours.to(segment.input_ids.device),
            state=memory,
            reset=segment.reset,
            lengths=lengths.to(segment.input_ids.device),
            return_logits=False,
        )
        return losses, written.state

    return read


def partners(documents: TokenizedDocuments, warmup_documents: int = 0) -> list[int]:
    """For each document the other one whose memory it is read with; each is that of one other.

    It follows from the texts, whatever their order and names: the next by a hash of its tokens, the first after the
    last. With warm-up documents, where the list's order decides on every figure, the first after it in the list whose
    own warm-up documents are all others.
    """
    count = len(documents)
    if warmup_documents:
        return [(document + 1 + warmup_documents) % count for document in range(count)]
    lengths = documents.token_counts.tolist()
    hashes = [hashlib.sha256(documents.tokens(i, 0, length).tobytes()).digest() for i, length in enumerate(lengths)]
    order = sorted(range(count), key=hashes.__getitem__)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[document] for document in range(count)]


def _score(evaluator: Evaluator, segment: Segment, memory: ModelState | None) -> Any:
    return evaluator.model(
        segment.input_ids,
        state=memory,
        reset=segment.reset,
        targets=segment.targets,
        lengths=segment.lengths,
    )


def _carry(
    evaluator: Evaluator, segment: Segment, before: ModelState | None, after: ModelState | None
) -> ModelState | None:
    """The memory for the next window: only the windows that are whole disjoint segments are written."""
    if before is None or after is None or evaluator.stride in (None, evaluator.segment_length):
        return after
    return before.replace_rows(segment.starts % evaluator.segment_length == 0, after)


def _with_progress(evaluator: Evaluator, documents: TokenizedDocuments, title: str) -> Iterator[Segment]:
    total = int((documents.token_counts - 1).sum())
    with tqdm(
        total=total, desc=title, unit="tok", unit_scale=True, disable=None if evaluator.progress else True
    ) as bar:
        # An idle lane costs as much as a busy one, so there are no more lanes than documents, but equally many for each
        # process.
        each = -(-min(evaluator.batch_size, len(documents)) // evaluator.world_size)
        for segment in read_once(
            documents,
            each * evaluator.world_size,
            evaluator.segment_length,
            rank_rows=range(evaluator.rank * each, (evaluator.rank + 1) * each),
            stride=evaluator.stride,
            warmup_documents=evaluator.warmup_documents,
        ):
            yield segment
            bar.update(segment.global_tokens)
