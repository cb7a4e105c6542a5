"""Perplexity of documents, each read from its beginning to its end with its memory.

Every token of a document but the first is scored exactly once, in disjoint segments; the target of a segment's last
token is the first token of the next one. Words (runs of non-blanks) and bytes (UTF-8) are counted on the original text,
so figures per word and per byte can be compared between tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from infformer.data.lanes import Segment, read_once
from infformer.data.tokenization import TokenizedDocuments
from infformer.memory.state import MemoryState
from infformer.models.memory_model import MemoryModel

Read = Callable[[Segment, "MemoryState | None"], "tuple[Tensor, MemoryState]"]
"""How one segment is read: the segment and the memory so far to the token losses and the memory after."""


@dataclass(frozen=True)
class Reader:
    """A model, and how it reads documents.

    Args:
        model: with or without memory.
        segment_length: tokens of a segment.
        batch_size: documents read side by side, at most, all processes together; the figures do not depend on it.
        precision: autocast type; float32 for none.
        process: the number of this process,
        processes: of how many that share the documents out.
        reduce: adds up a tensor over processes.
        progress: show a progress bar.
    """

    model: MemoryModel
    segment_length: int
    batch_size: int = 8
    precision: torch.dtype = torch.float32
    process: int = 0
    processes: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    progress: bool = True


def measure(reader: Reader, documents: TokenizedDocuments, controls: bool, checkpoint: str) -> dict[str, Any]:
    """All that `results.json` says of a model: the figures, those of the controls if wished, and the protocol.

    Args:
        checkpoint: where the model comes from, for the record.
    """
    return {
        **evaluate(reader, documents, "test"),
        "controls": evaluate_controls(reader, documents) if controls else {},
        "protocol": {
            "segment": reader.segment_length,
            "stride": reader.segment_length,
            "reset": "each document begins with an empty memory",
            "memory": getattr(reader.model.config, "memory", None),
            "dtype": str(reader.precision).removeprefix("torch."),
            "checkpoint": checkpoint,
        },
    }


def evaluate(reader: Reader, documents: TokenizedDocuments, title: str = "reading") -> dict[str, Any]:
    """Perplexity of the documents. The model is left in evaluation mode.

    Returns:
        `tokens`, `words`, `bytes`, `documents`, `nll` (nats, total), `perplexity` (`token`, `word`), `bits_per_byte`,
        `by_position` (counts and nats by distance from the document's beginning), `per_document`.
    """
    return _measure(reader, documents, _read_with_memory(reader), title)


def evaluate_controls(reader: Reader, documents: TokenizedDocuments) -> dict[str, Any]:
    """The same figures of the same model in two situations in which its memory cannot help.

    `memory_off`: every segment is read with an empty memory. `memory_of_another_document`: each document is read with
    the memory that the next document of the list (after the last, the first) had at the same distance from its
    beginning: as full, and of text, but of the wrong one. That control needs two documents; with one it is left out.
    """
    if not reader.model.has_memory:
        return {}
    controls = {"memory_off": _measure(reader, documents, _read_without_memory(reader), "memory off")}
    if len(documents) > 1:
        read = _read_with_memory_of_next(reader, documents)
        controls["memory_of_another_document"] = _measure(reader, documents, read, "another's memory")
    return controls


def _read_with_memory(reader: Reader) -> Read:
    def read(segment: Segment, memory: MemoryState | None) -> tuple[Tensor, MemoryState]:
        output = reader.model(
            segment.input_ids,
            memory=memory,
            reset=segment.reset,
            shift_labels=segment.shift_labels,
            lengths=segment.lengths,
        )
        return output.token_losses, output.memory

    return read


def _read_without_memory(reader: Reader) -> Read:
    def read(segment: Segment, memory: MemoryState | None) -> tuple[Tensor, MemoryState]:
        empty = reader.model.initial_memory(len(segment.lengths))
        output = reader.model(
            segment.input_ids, memory=empty, shift_labels=segment.shift_labels, lengths=segment.lengths
        )
        return output.token_losses, empty

    return read


def _read_with_memory_of_next(reader: Reader, documents: TokenizedDocuments) -> Read:
    """Beside each document its neighbour is read; only that is written to memory."""
    inputs = documents.token_counts - 1
    read_document = _read_with_memory(reader)

    def read(segment: Segment, memory: MemoryState | None) -> tuple[Tensor, MemoryState]:
        losses, _ = read_document(segment, memory)
        neighbours = torch.zeros_like(segment.input_ids, device="cpu")
        lengths = torch.zeros_like(segment.lengths, device="cpu")
        for row, (document, start) in enumerate(zip(segment.documents.tolist(), segment.starts.tolist(), strict=True)):
            if document >= 0:
                neighbour = (document + 1) % len(documents)
                stop = min(start + neighbours.shape[1], int(inputs[neighbour]))
                lengths[row] = max(stop - start, 0)  # a shorter neighbour's memory stays as it was at its end
                neighbours[row, : lengths[row]] = torch.from_numpy(documents.tokens(neighbour, min(start, stop), stop))
        written = reader.model(
            neighbours.to(segment.input_ids.device),
            memory=memory,
            reset=segment.reset,
            lengths=lengths.to(segment.input_ids.device),
            return_logits=False,
        )
        return losses, written.memory

    return read


@torch.inference_mode()
def _measure(reader: Reader, documents: TokenizedDocuments, read: Read, title: str) -> dict[str, Any]:
    """Read every document once and add up the losses, by document and by position."""
    model, device = reader.model, reader.model.device
    edges = position_edges(int(documents.token_counts.max()) - 1)
    sums = _Sums(len(documents), edges)
    model.eval()
    memory: MemoryState | None = None
    with torch.autocast(device.type, reader.precision, enabled=reader.precision != torch.float32):
        for segment in _with_progress(reader, documents, title):
            losses, memory = read(segment.to(device, non_blocking=True), memory)
            sums.add(segment, losses)
    totals = reader.reduce(torch.from_numpy(sums.flat()).to(device)).cpu().numpy()
    return _figures(documents, edges, *np.split(totals, [len(documents), len(documents) + len(edges) - 1]))


class _Sums:
    """Nats by document and by position, and tokens by position, in float64."""

    def __init__(self, documents: int, edges: NDArray[np.int64]) -> None:
        self._edges = edges
        self._by_document = np.zeros(documents)
        self._by_position = np.zeros(len(edges) - 1)
        self._tokens_by_position = np.zeros(len(edges) - 1)

    def add(self, segment: Segment, losses: Tensor) -> None:
        length = segment.input_ids.shape[1]
        # On the CPU before it becomes float64, which not every accelerator has.
        nats = losses.float().cpu().double().numpy()
        real = np.arange(length) < segment.lengths.numpy()[:, None]
        rows = np.broadcast_to(segment.documents.numpy()[:, None], real.shape)[real]
        positions = (segment.starts.numpy()[:, None] + np.arange(length))[real]
        bins = np.searchsorted(self._edges, positions, side="right") - 1
        self._by_document += np.bincount(rows, nats[real], len(self._by_document))
        self._by_position += np.bincount(bins, nats[real], len(self._by_position))
        self._tokens_by_position += np.bincount(bins, minlength=len(self._by_position))

    def flat(self) -> NDArray[np.float64]:
        return np.concatenate([self._by_document, self._by_position, self._tokens_by_position])


def position_edges(longest: int) -> NDArray[np.int64]:
    """Edges of the bins of distance from a document's beginning: 0, 64, 128, 256, … up to the longest document."""
    edges = [0, 64]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return np.array(edges, dtype=np.int64)


def _figures(
    documents: TokenizedDocuments,
    edges: NDArray[np.int64],
    by_document: NDArray[np.float64],
    by_position: NDArray[np.float64],
    tokens_by_position: NDArray[np.float64],
) -> dict[str, Any]:
    tokens = documents.token_counts - 1
    nll = float(by_document.sum())
    words, bytes_ = int(documents.word_counts.sum()), int(documents.byte_counts.sum())
    return {
        "tokens": int(tokens.sum()),
        "words": words,
        "bytes": bytes_,
        "documents": len(documents),
        "nll": nll,
        "perplexity": {"token": _exp(nll / tokens.sum()), "word": _exp(nll / max(words, 1))},
        "bits_per_byte": nll / (math.log(2) * max(bytes_, 1)),
        "by_position": [
            {"from": int(first), "to": int(last), "tokens": int(count), "nll": float(nats)}
            for first, last, count, nats in zip(edges[:-1], edges[1:], tokens_by_position, by_position, strict=True)
            if count
        ],
        "per_document": [
            {"id": name, "tokens": int(count), "words": int(words), "bytes": int(bytes_), "nll": float(nats)}
            for name, count, words, bytes_, nats in zip(
                documents.ids, tokens, documents.word_counts, documents.byte_counts, by_document, strict=True
            )
        ],
    }


def _exp(nats: float) -> float:
    """e to the power of the nats, infinite where that is more than a number can hold."""
    return math.exp(nats) if nats < 700 else math.inf


def _with_progress(reader: Reader, documents: TokenizedDocuments, title: str) -> Iterator[Segment]:
    total = int((documents.token_counts - 1).sum())
    with tqdm(total=total, desc=title, unit="tok", unit_scale=True, disable=None if reader.progress else True) as bar:
        # An idle lane costs as much as a busy one, so there are no more lanes than documents, but equally many for each
        # process.
        each = -(-min(reader.batch_size, len(documents)) // reader.processes)
        share = range(reader.process * each, (reader.process + 1) * each)
        for segment in read_once(documents, each * reader.processes, reader.segment_length, share=share):
            yield segment
            bar.update(segment.global_tokens)
