"""Documents read once, whole, each from its beginning: for evaluation.

A document is read in windows of `segment_length` inputs. The first window scores all it holds, every later one begins
`stride` inputs after the one before and scores what is new in it; so every token but a document's first is scored
exactly once, and with `stride = segment_length` the windows are disjoint segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from infformer.data.errors import DataError
from infformer.data.lanes import Segment, Window, load_windows
from infformer.data.tokenization import TokenizedDocuments


def read_once(
    documents: TokenizedDocuments,
    lanes: int,
    segment_length: int,
    order: Sequence[int] | None = None,
    rank_rows: Sequence[int] | None = None,
    *,
    stride: int | None = None,
    warmup_documents: int = 0,
) -> Iterator[Segment]:
    """Read each document once.

    A lane for which no document is left is idle. Every process yields the same number of segments, until all lanes
    of the global batch are idle; so processes that evaluate together stay together.

    Args:
        documents: what to read.
        lanes: lanes of the global batch; there may be more of them than documents.
        segment_length: inputs of a window.
        order: documents in the order in which they are taken; None: the longest first, so that the lanes end together.
        rank_rows: the lanes for which to load tokens; None: all.
        stride: inputs from one window to the next; None: as many as a window has.
        warmup_documents: before each document, read as many of those that precede it in the list (the last ones before
            the first), in disjoint segments, without scoring them and without emptying the memory after them.

    Raises:
        DataError: the order names a document twice, or one that there is not; or there are not enough documents to
            warm up with.
    """
    inputs = documents.token_counts - 1
    queue = np.argsort(-inputs, kind="stable") if order is None else np.asarray(order, dtype=np.int64)
    if len(np.unique(queue)) != len(queue) or not np.isin(queue, np.arange(len(documents))).all():
        raise DataError(f"order: each of the documents 0 to {len(documents) - 1} at most once, not {queue.tolist()}.")
    if warmup_documents >= len(documents):
        raise DataError(
            f"warmup_documents={warmup_documents}: there are {len(documents)} documents, so at most "
            f"{len(documents) - 1} others can be read before each"
        )
    chosen = range(lanes) if rank_rows is None else rank_rows
    waiting = iter(queue.tolist())
    reading: list[Iterator[Window]] = [iter(()) for _ in range(lanes)]
    reads = np.zeros(lanes, dtype=np.int64)
    while True:
        windows: list[Window | None] = []
        for lane in range(lanes):
            window = next(reading[lane], None)
            if window is None and (document := next(waiting, None)) is not None:
                reading[lane] = _windows(inputs, document, segment_length, stride or segment_length, warmup_documents)
                window = next(reading[lane])
            windows.append(window)
        if not any(windows):
            return
        yield load_windows(documents, windows, segment_length, chosen, reads)
        reads += [window is not None for window in windows]


def _windows(
    inputs: NDArray[np.int64], document: int, segment_length: int, stride: int, warmup_documents: int
) -> Iterator[Window]:
    """A document's windows, after those of the documents before it."""
    for number in range(document - warmup_documents, document):
        other = number % len(inputs)
        for start in range(0, inputs[other], segment_length):
            stop = min(start + segment_length, int(inputs[other]))
            yield Window(other, start, stop, stop, number == document - warmup_documents and start == 0)
    start = scored = 0
    while scored < inputs[document]:
        stop = min(start + segment_length, int(inputs[document]))
        yield Window(document, start, stop, scored, warmup_documents == 0 and start == 0)
        scored, start = stop, start + stride
