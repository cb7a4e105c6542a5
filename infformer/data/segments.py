"""Documents as segments: lanes to learn from, epoch after epoch, and documents read once, to be measured.

The global batch is a fixed set of lanes, each one contiguous stream of tokens and one row of the batch. A lane reads
one *visit* after another, segment by segment: a document, or a stretch of one. Where every lane stands is known to
every process, as a handful of integers; tokens are loaded only for the lanes a process has itself (its `rank_rows`). So
what is read, and in which order, does not depend on the number of processes.

A document of n tokens has n - 1 inputs (all but its last token), and the target of each is the token that follows it,
also where that is the first one of the next segment: no target is lost.

To be measured, a document is read in windows of `segment_length` inputs. The first window scores all it holds, every
later one begins `stride` inputs after the one before and scores what is new in it; so every token but a document's
first is scored exactly once, and with `stride = segment_length` the windows are disjoint segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infformer.data.tokenization import TokenizedDocuments
from infformer.errors import DataError

IGNORE_INDEX = -100
"""The label of a place where there is no token to predict."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """The next stretch of every lane of this process."""

    input_ids: Tensor
    """int64 [lanes, segment_length]; 0 after the last token."""

    targets: Tensor
    """int64 [lanes, segment_length]; the token that follows each input, -100 after the last."""

    lengths: Tensor
    """int64 [lanes]; how many inputs there are; 0: the lane is idle."""

    reset: Tensor
    """bool [lanes]; a visit begins here: the memory must be empty."""

    documents: Tensor
    """int64 [lanes]; which of the documents; -1: the lane is idle."""

    starts: Tensor
    """int64 [lanes]; where in its document the first input is."""

    reads: Tensor
    """int64 [lanes]; how many segments the lane has read before this one, ever."""

    lanes: Tensor
    """int64 [lanes]; the share: the numbers of these lanes in the global batch."""

    global_tokens: int
    """How many tokens are predicted in this segment of all lanes, also those of other processes."""

    is_learned: bool = False
    """Gradients flow back through it also where nothing in it is predicted."""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same segment with `function` applied to every tensor."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        changed: dict[str, Any] = {name: function(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same segment on another device."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, rows: slice) -> Self:
        """Some of the lanes."""
        return self.map_tensors(lambda tensor: tensor[rows])

    def places(self, name: Callable[[int], str]) -> list[str]:
        """Where each lane is, in words: `lane 3: 'a book' at token 512`; `name` names one of the documents."""
        return [
            f"lane {lane}: {name(document)} at token {start}"
            for lane, document, start in zip(
                self.lanes.tolist(), self.documents.tolist(), self.starts.tolist(), strict=True
            )
        ]

    def pin_memory(self) -> Self:
        """The same segment in memory from which a GPU can fetch it while other work goes on."""
        return self.map_tensors(Tensor.pin_memory)


class Window(NamedTuple):
    """A stretch of a document that is read at once."""

    document: int
    start: int
    """Its first input."""
    stop: int
    """The input after its last."""
    scored: int
    """Inputs from this one on are scored; at `stop` none is."""
    reset: bool
    """The memory must be empty."""


class LanesState(TypedDict):
    """Where the reading of documents stands, as JSON."""

    identity: dict[str, object]
    """What decides on the reading, by the options that say it."""
    epoch: int
    queue_position: int
    lanes: dict[str, list[int]]
    """Where each lane stands."""


class Lanes(Iterator[Segment]):
    """The segments of training, without end.

    The visits of an epoch are put in a queue, in a seeded order; a lane that has come to the end of its visit takes the
    next one, and when the queue is empty the next epoch's is begun, without a gap. Several lanes that end together take
    in the order of their numbers. Each epoch predicts every token of every document (but its first) exactly once.

    With `segments_per_visit`, a document is cut into visits of that many segments. Where the first cut is, is drawn
    anew for each document and epoch; it makes the first visit shorter.

    Args:
        documents: what to read.
        lanes: lanes of the global batch.
        segment_length: inputs of a segment.
        seed: decides on the order and the cuts.
        shuffle: False: the documents in their order, cut from their start, each epoch alike.
        segments_per_visit: segments after which a lane leaves a document; None: it stays to the end.
        rank_rows: the lanes for which to load tokens; None: all.

    Raises:
        DataError: there are fewer visits than lanes.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        lanes: int,
        segment_length: int,
        seed: int,
        shuffle: bool = True,
        segments_per_visit: int | None = None,
        rank_rows: Sequence[int] | None = None,
    ) -> None:
        self._documents = documents
        self._visits = _Visits(
            documents.token_counts - 1, seed, shuffle, segments_per_visit and segments_per_visit * segment_length
        )
        if self._visits.at_least < lanes:
            raise DataError(
                f"training.batch_size={lanes}: each of these lanes needs a stretch of text of its own, and the "
                f"{len(documents)} documents make only {self._visits.at_least} with data.segments_per_visit="
                f"{_spell(segments_per_visit)}; use a smaller batch, a smaller data.segments_per_visit (or one at all) "
                "or more documents."
            )
        self._lanes = _Places(lanes)
        self._rank_rows = range(lanes) if rank_rows is None else rank_rows
        self._segment_length = segment_length
        # What a saved state must agree with, by the option that says it.
        self._identity: dict[str, object] = {
            "training.batch_size": lanes,
            "training.segment_length": segment_length,
            "seed": seed,
            "data.shuffle": shuffle,
            "data.segments_per_visit": segments_per_visit,
            "the documents (data.*, tokenizer)": documents.fingerprint,
        }

    def __next__(self) -> Segment:
        self._lanes.refill(self._visits.take(self._lanes.finished.size))
        windows = self._lanes.windows(self._segment_length)
        segment = load_windows(self._documents, windows, self._segment_length, self._rank_rows, self._lanes.reads)
        self._lanes.advance(self._segment_length)
        return segment

    def state_dict(self) -> LanesState:
        """Where the reading stands, as JSON; it is the same on every process, and fits any number of them."""
        return {
            "identity": dict(self._identity),
            "epoch": self._visits.epoch,
            "queue_position": self._visits.position,
            "lanes": self._lanes.to_lists(),
        }

    def load_state_dict(self, state: LanesState) -> None:
        """Go on exactly where the state was taken.

        Raises:
            DataError: the state was taken with other documents or options.
        """
        check_identity(state["identity"], self._identity, "documents")
        self._visits.go_to(state["epoch"], state["queue_position"])
        self._lanes = _Places.from_lists(state["lanes"])


def check_identity(saved: Mapping[str, object], own: Mapping[str, object], material: str) -> None:
    """Make sure that a place in a stream was saved in the same stream.

    Args:
        saved, own: what decides on a stream, by the options that say it: then, and now.
        material: what the place is in, for the error.

    Raises:
        DataError: they differ.
    """
    for option, now in own.items():
        then = saved.get(option)
        if then != now:
            raise DataError(
                f"{option}: the run to be resumed had {_spell(then)}, this one has {_spell(now)}; its place in the "
                f"{material} means nothing here. Set it back, or begin a new run."
            )


def load_windows(
    documents: TokenizedDocuments,
    windows: Sequence[Window | None],
    segment_length: int,
    rank_rows: Sequence[int],
    reads: Integers,
) -> Segment:
    """The segment that the lanes of this process read.

    Args:
        windows: of every lane of the global batch its window, or None if it is idle.
        reads: how many windows each lane has read before, [lanes].
    """
    input_ids = np.zeros((len(rank_rows), segment_length), dtype=np.int64)
    labels = np.full((len(rank_rows), segment_length), IGNORE_INDEX, dtype=np.int64)
    idle = Window(-1, 0, 0, 0, False)
    rows = [windows[lane] or idle for lane in rank_rows]
    for row, (document, start, stop, scored, _) in enumerate(rows):
        if stop > start:
            tokens = documents.tokens(document, start, stop + 1)
            input_ids[row, : stop - start] = tokens[:-1]
            labels[row, scored - start : stop - start] = tokens[scored - start + 1 :]
    return Segment(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(labels),
        lengths=torch.tensor([row.stop - row.start for row in rows]),
        reset=torch.tensor([row.reset for row in rows]),
        documents=torch.tensor([row.document for row in rows]),
        starts=torch.tensor([row.start for row in rows]),
        reads=torch.from_numpy(reads[list(rank_rows)]),
        lanes=torch.tensor(list(rank_rows)),
        global_tokens=sum(window.stop - window.scored for window in windows if window is not None),
    )


class _Visits:
    """The queue of training: visits [3, n] of (document, first input, end), epoch after epoch."""

    def __init__(self, inputs: Integers, seed: int, shuffle: bool, longest: int | None) -> None:
        self._inputs = inputs
        self._seed = seed
        self._shuffle = shuffle
        self._longest = longest
        # However the cuts fall, there are never fewer visits than with cuts from the start.
        self.at_least = len(inputs) if longest is None else int((-(-inputs // longest)).sum())
        self.go_to(0, 0)

    def go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._queue = self._visits_of(epoch)

    def take(self, count: int) -> Integers:
        parts = []
        while count > 0:
            if self.position == self._queue.shape[1]:
                self.go_to(self.epoch + 1, 0)
            parts.append(self._queue[:, self.position : self.position + count])
            self.position += parts[-1].shape[1]
            count -= parts[-1].shape[1]
        return np.concatenate(parts, axis=1) if parts else np.empty((3, 0), dtype=np.int64)

    def _visits_of(self, epoch: int) -> Integers:
        random = np.random.default_rng(np.random.SeedSequence([self._seed, epoch]))
        if self._longest is None:
            visits = np.stack([np.arange(len(self._inputs)), np.zeros_like(self._inputs), self._inputs])
        else:
            whole = np.full_like(self._inputs, self._longest)
            first_cuts = random.integers(1, self._longest, size=len(whole), endpoint=True) if self._shuffle else whole
            visits = _cut(self._inputs, first_cuts, self._longest)
        return visits[:, random.permutation(visits.shape[1])] if self._shuffle else visits


def _cut(inputs: Integers, first_cuts: Integers, longest: int) -> Integers:
    """Cut documents into visits: after `first_cuts` inputs, then every `longest`."""
    counts = 1 + np.maximum(0, -(-(inputs - first_cuts) // longest))
    documents = np.repeat(np.arange(len(inputs)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = first_cuts[documents] + number * longest
    return np.stack([documents, np.maximum(0, ends - longest), np.minimum(ends, inputs[documents])])


class _Places:
    """Where every lane of the global batch stands; a lane that has read its visit to the end is finished."""

    def __init__(self, lanes: int) -> None:
        self.documents = np.full(lanes, -1, dtype=np.int64)
        self.positions = np.zeros(lanes, dtype=np.int64)  # the next input
        self.ends = np.zeros(lanes, dtype=np.int64)  # of the visits, in inputs
        self.reads = np.zeros(lanes, dtype=np.int64)
        self.reset = np.zeros(lanes, dtype=np.bool_)

    @property
    def finished(self) -> Integers:
        return np.flatnonzero(self.positions == self.ends)

    def refill(self, visits: Integers) -> None:
        """Give the finished lanes a visit each, [3, finished]."""
        finished = self.finished
        self.documents[finished], self.positions[finished], self.ends[finished] = visits
        self.reset[:] = False
        self.reset[finished] = True

    def windows(self, segment_length: int) -> list[Window]:
        """What each lane reads next; all of it is scored."""
        stops = np.minimum(self.positions + segment_length, self.ends)
        lanes = zip(*(each.tolist() for each in (self.documents, self.positions, stops, self.reset)), strict=True)
        return [Window(document, start, stop, start, reset) for document, start, stop, reset in lanes]

    def advance(self, segment_length: int) -> None:
        self.positions = np.minimum(self.positions + segment_length, self.ends)
        self.reads += 1

    def to_lists(self) -> dict[str, list[int]]:
        return {name: getattr(self, name).tolist() for name in ("documents", "positions", "ends", "reads")}

    @classmethod
    def from_lists(cls, lists: dict[str, list[int]]) -> Self:
        places = cls(len(lists["documents"]))
        for name, values in lists.items():
            setattr(places, name, np.array(values, dtype=np.int64))
        return places


def _spell(value: object) -> str:
    return "null" if value is None else str(value)


def read_once(
    documents: TokenizedDocuments,
    lanes: int,
    segment_length: int,
    rank_rows: Sequence[int] | None = None,
    *,
    stride: int | None = None,
    warmup_documents: int = 0,
) -> Iterator[Segment]:
    """Read each document once, the longest first, so that the lanes end together.

    A lane for which no document is left is idle. Every process yields the same number of segments, until all lanes
    of the global batch are idle; so processes that evaluate together stay together.

    Args:
        documents: what to read.
        lanes: lanes of the global batch; there may be more of them than documents.
        segment_length: inputs of a window.
        rank_rows: the lanes for which to load tokens; None: all.
        stride: inputs from one window to the next; None: as many as a window has.
        warmup_documents: before each document, read as many of those that precede it in the list (the last ones before
            the first), in disjoint segments, without scoring them and without emptying the memory after them.

    Raises:
        DataError: there are not enough documents to warm up with.
    """
    inputs = documents.token_counts - 1
    if warmup_documents >= len(documents):
        raise DataError(
            f"warmup_documents={warmup_documents}: there are {len(documents)} documents, so at most "
            f"{len(documents) - 1} others can be read before each"
        )
    chosen = range(lanes) if rank_rows is None else rank_rows
    waiting = iter(np.argsort(-inputs, kind="stable").tolist())
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
