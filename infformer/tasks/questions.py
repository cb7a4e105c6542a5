"""Texts that end in questions with their answers: what every task asks that is no language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from infformer.data.errors import DataError
from infformer.data.options import SPLITS

NOT_ASKED = -1
"""The answer to which a token belongs that is read and not asked for."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Questions:
    """Token sequences of one length. A model reads all but the last token, and is asked for some of the last ones."""

    tokens: Integers
    """[questions, length]; with the answers."""
    answers: Integers
    """[questions, end]; to which answer of its question each of the last tokens belongs, from 0; -1: to none."""

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Which of the last tokens are asked for, [questions, end]."""
        return self.answers != NOT_ASKED

    @property
    def true_answers(self) -> Integers:
        """The tokens asked for, one question after the other, [asked]."""
        return self.tokens[:, self.tokens.shape[1] - self.answers.shape[1] :][self.asked]

    def last(self, inputs: int) -> Self:
        """What is left of them if only so many inputs are read, or as many as it takes to ask for all answers."""
        return replace(self, tokens=self.tokens[:, -max(inputs, self.answers.shape[1]) - 1 :])


class QuestionSource(Protocol):
    """What a model learns to answer questions from."""

    @property
    def training_lengths(self) -> Sequence[int]:
        """How long the texts to learn from are, by the task's own measure; of several, each step draws one."""

    @property
    def training_sequences(self) -> int | None:
        """How many there are to learn from; None: without end."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides on the questions beside their seed, length and number, as JSON, by the options that say it."""

    def draw_training(self, numbers: Integers, seed: int, length: int) -> Questions:
        """The questions of these numbers, each from 0. A question depends on seed, number and length alone."""


def random_of(seed: int, split: str, length: int, number: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one sequence: counter-based, so that every sequence begins at a place of its own.

    Args:
        seed, split, length, number: which sequence.
        stream: another one gives other numbers, for another purpose.

    Raises:
        DataError: there is no such split.
    """
    if split not in SPLITS:
        raise DataError(f"split={split}: choose one of {', '.join(SPLITS)}")
    return np.random.Generator(np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, stream, length, number]))
