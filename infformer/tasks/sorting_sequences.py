"""Sequences to be sorted by how often their symbols occur.

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

from infformer.data.errors import DataError
from infformer.errors import measuring
from infformer.tasks.questions import Integers, Questions, random_of
from infformer.tasks.task import TaskConfig


@dataclass
class SortingConfig(TaskConfig):
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
    validation_sequences: int = measuring(64)
    """How many are measured during training."""
    test_sequences: int = measuring(200)
    """How many are measured at the end, of each length."""
    evaluation_lengths: list[int] = measuring(list)
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
    length = config.length if length is None else length
    if length < 1:
        raise DataError(f"length={length}: a sequence has at least 1 symbol")
    progress = np.arange(1, length + 1) / length
    drawn = np.empty((len(numbers), length + 1 + config.symbols), dtype=np.int64)
    for row, number in zip(drawn, numbers, strict=True):
        random = random_of(seed, split, length, number)
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


def as_questions(sequences: Integers, symbols: int) -> Questions:
    """What is asked at the end of these sequences, [sequences, length + 1 + symbols]: their answers, each as one."""
    return Questions(sequences, np.zeros((len(sequences), symbols), dtype=np.int64))


class SortingQuestions:
    """The sequences to learn from, with the question how to sort their symbols."""

    def __init__(self, config: SortingConfig) -> None:
        self._config = config

    @property
    def training_lengths(self) -> list[int]:
        """Symbols of the sequences."""
        return list(self._config.training_lengths) or [self._config.length]

    @property
    def training_sequences(self) -> int | None:
        """How many there are; None: without end."""
        return self._config.training_sequences

    @property
    def identity(self) -> dict[str, Any]:
        """What decides on the sequences, by the options that say it."""
        return {
            "task.length": self._config.length,
            "task.training_lengths": list(self._config.training_lengths),
            "task.symbols": self._config.symbols,
            "task.training_sequences": self._config.training_sequences,
        }

    def draw_training(self, numbers: Integers, seed: int, length: int) -> Questions:
        """The sequences of these numbers, each from 0."""
        return as_questions(draw_sequences(self._config, "train", numbers, seed, length), self._config.symbols)
