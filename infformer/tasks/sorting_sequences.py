"""Sequences to be sorted by how often their symbols occur, and the stream of them that a model learns from.

A sequence of n symbols is followed by a separator and by its answer: all symbols, the most frequent first (∞-former,
https://arxiv.org/abs/2109.00301, the experiment on sorting). What is frequent drifts from the beginning to the end, so
who remembers only a part sorts another sequence. Symbols are the tokens 0 to `symbols` - 1, the separator is the token
`symbols`.

A model reads all but the last token, and is scored at the separator and after it, where it predicts the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from infformer.data.errors import DataError
from infformer.data.lanes import IGNORED, Segment, check_identity

SPLITS = ("train", "validation", "test")

Integers = NDArray[np.int64]


@dataclass
class SortingConfig:
    """Sorting symbols by their frequency in a long sequence."""

    length: int = 1024
    """Symbols of a sequence."""
    training_lengths: list[int] = field(default_factory=list)
    """Learn from sequences of these lengths instead: each step draws one, with a probability ∝ 1/length, so that all
    lengths together are read equally much. What is learned on short ones, sooner, is at hand for long ones."""
    symbols: int = 20
    """How many different symbols there are."""
    training_sequences: int | None = None
    """How many sequences to learn from, epoch after epoch, each in an order of its own; published: 8000. Null: never
    the same one twice."""
    validation_sequences: int = 64
    """How many are measured during training."""
    test_sequences: int = 200
    """How many are measured at the end, of each length."""
    evaluation_lengths: list[int] = field(default_factory=list)
    """Further lengths to measure at the end."""

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise ValueError(f"task.symbols={self.symbols}: must be at least 2, or there is nothing to sort")
        for name in ("length", "training_sequences", "validation_sequences", "test_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task.{name}={value}: must be at least 1")
        for name in ("training_lengths", "evaluation_lengths"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"task.{name}={list(getattr(self, name))}: each must be at least 1")

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are: the symbols and the separator."""
        return self.symbols + 1


def draw_sequences(
    config: SortingConfig, split: str, numbers: Sequence[int] | Integers, seed: int, length: int | None = None
) -> Integers:
    """Sequences with their answers, [sequences, length + 1 + symbols].

    For each sequence two distributions are drawn, each of independent uniform integers from 1 to 9, divided by their
    sum. Symbol j of n (from 1) is drawn from (1 - j/n) p_initial + (j/n) p_final. In the answer, what is equally
    frequent stands in the order of first appearance; what never appeared comes last, in the order of the numbers.

    A sequence depends on the seed, the split, its number and its length, on nothing that is drawn with it.

    Args:
        split: `train`, `validation` or `test`.
        numbers: which sequences of the split, each from 0.
        length: symbols of a sequence; None: as configured.

    Raises:
        DataError: there is no such split, or no such length.
    """
    if split not in SPLITS:
        raise DataError(f"split={split}: choose one of {', '.join(SPLITS)}")
    length = config.length if length is None else length
    if length < 1:
        raise DataError(f"length={length}: a sequence has at least 1 symbol")
    key = [seed, SPLITS.index(split)]
    progress = np.arange(1, length + 1) / length
    drawn = np.empty((len(numbers), length + 1 + config.symbols), dtype=np.int64)
    for row, number in zip(drawn, numbers, strict=True):
        # A counter-based generator: every sequence begins at a place of its own.
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, length, number]))
        weights = random.integers(1, 9, size=(2, config.symbols), endpoint=True)
        initial, final = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
        uniform = random.random(length)
        # The inverse of the cumulative distribution, whose steps move linearly as well.
        row[:length] = 0
        for step in range(config.symbols - 1):
            row[:length] += uniform >= initial[step] + progress * (final[step] - initial[step])
        row[length] = config.symbols
        row[length + 1 :] = _answer(row[:length], config.symbols)
    return drawn


def _answer(sequence: Integers, symbols: int) -> Integers:
    """All symbols, the most frequent in the sequence first."""
    first = np.zeros(symbols, dtype=np.int64)
    first[sequence[::-1]] = np.arange(len(sequence))[::-1]  # of several places the last that is assigned stays
    return np.lexsort([first, -np.bincount(sequence, minlength=symbols)])


class SortingStream:
    """The sequences of training, without end: in one step every lane reads a new one, from an empty memory.

    Lane l of step s reads the sequence number s · lanes + l of the stream, whatever the share. The sequences of a
    step are equally long.

    Args:
        config: which sequences.
        lanes: lanes of the global batch.
        segment_length: inputs of a segment.
        seed: decides on the sequences and their order.
        share: the lanes for which to draw sequences; None: all.
    """

    def __init__(
        self,
        config: SortingConfig,
        lanes: int,
        segment_length: int,
        seed: int,
        share: Sequence[int] | None = None,
    ) -> None:
        self._config = config
        self._lanes = lanes
        self._segment_length = segment_length
        self._seed = seed
        self._share = np.arange(lanes) if share is None else np.array(share, dtype=np.int64)
        self._step = 0
        self._reads = 0
        # What a saved state must agree with, by the option that says it.
        self._identity: dict[str, Any] = {
            "training.batch_size": lanes,
            "training.segment_length": segment_length,
            "seed": seed,
            "task.length": config.length,
            "task.training_lengths": list(config.training_lengths),
            "task.symbols": config.symbols,
            "task.training_sequences": config.training_sequences,
        }

    def next_step(self) -> list[Segment]:
        """The next sequence of every lane of the share, in segments, of which the last may be shorter."""
        numbers = self._numbers()[self._share]
        length = self._length()
        tokens = torch.from_numpy(draw_sequences(self._config, "train", numbers, self._seed, length))
        labels = F.pad(tokens[:, length + 1 :], (length, 0), value=IGNORED)
        segments = []
        for index, (segment_inputs, segment_labels) in enumerate(
            zip(
                tokens[:, :-1].split(self._segment_length, dim=1),
                labels.split(self._segment_length, dim=1),
                strict=True,
            )
        ):
            segments.append(
                Segment(
                    input_ids=segment_inputs,
                    shift_labels=segment_labels,
                    lengths=torch.full((len(numbers),), segment_inputs.shape[1]),
                    reset=torch.full((len(numbers),), index == 0),
                    documents=torch.from_numpy(numbers),
                    starts=torch.full((len(numbers),), index * self._segment_length),
                    reads=torch.full((len(numbers),), self._reads + index),
                    lanes=torch.from_numpy(self._share.copy()),
                    global_tokens=self._lanes * int((segment_labels[0] != IGNORED).sum()),
                )
            )
        self._step += 1
        self._reads += len(segments)
        return segments

    def state_dict(self) -> dict[str, Any]:
        """Where the reading stands, as JSON; it is the same whatever the share, and fits every share."""
        return {"identity": dict(self._identity), "step": self._step, "reads": self._reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the state was taken.

        Raises:
            DataError: the state was taken with other options.
        """
        check_identity(state["identity"], self._identity, "stream")
        self._step, self._reads = state["step"], state["reads"]

    def _length(self) -> int:
        """Symbols of this step's sequences."""
        lengths = np.array(self._config.training_lengths or [self._config.length], dtype=np.float64)
        often = (1 / lengths) / (1 / lengths).sum()
        return int(np.random.default_rng([self._seed, self._step]).choice(lengths, p=often))

    def _numbers(self) -> Integers:
        """Of the sequences that the lanes of the global batch read in this step."""
        places = np.arange(self._step * self._lanes, (self._step + 1) * self._lanes)
        size = self._config.training_sequences
        if size is None:
            return places
        epochs, places = np.divmod(places, size)
        first, last = epochs[0], epochs[-1]
        orders = [np.random.default_rng([self._seed, epoch]).permutation(size) for epoch in range(first, last + 1)]
        return np.stack(orders)[epochs - first, places]
