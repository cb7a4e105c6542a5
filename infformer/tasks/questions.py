"""Texts that end in questions with their answers, and the stream of them that a model learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from infformer.data.options import SPLITS
from infformer.data.segments import IGNORE_INDEX, Segment
from infformer.errors import DataError
from infformer.tasks.task import Material, TextStream, cut_texts, numbers_of_step

HELD_OUT_SEED = 0
"""All runs are measured on the same questions, whatever their own seed; no question of training is among them."""
NOT_ASKED = -1
"""In place of the number of an answer: the token is read, and not asked for."""

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
        """The same questions with their last `inputs` inputs alone, or as many as it takes to ask for all answers."""
        return replace(self, tokens=self.tokens[:, -max(inputs, self.answers.shape[1]) - 1 :])


Draw = Callable[[Integers, int, int], Questions]
"""Draws questions by their numbers, each from 0, a seed and a length; no question depends on the others."""


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


class QuestionStream(TextStream):
    """Questions without end: in one step every lane reads a new one, from an empty memory.

    Lane l of step s reads the question number s · lanes + l of the stream, on whichever process. The questions of a
    step are equally long; of several lengths each step draws one, with a probability ∝ 1/length, so that as much is
    read of each.

    Args:
        draw: the questions to learn from.
        lengths: how long they are, by the task's own measure.
        identity: what decides on them beside seed, length and number, as JSON, by the options that say it.
        material: the lanes, the segment and the seed.
        sequences: how many there are of each length, read epoch after epoch; None: without end.

    Raises:
        DataError: there are no questions of one of the lengths.
    """

    def __init__(
        self,
        draw: Draw,
        lengths: Sequence[int],
        identity: Mapping[str, object],
        material: Material,
        sequences: int | None = None,
    ) -> None:
        super().__init__(material, identity)
        self._draw = draw
        self._lengths = list(lengths)
        self._sequences = sequences
        for length in self._lengths:
            draw(np.arange(64), material.seed, length)  # what cannot be asked is said at once

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(lambda number: f"sequence {number}")

    def describe(self) -> str:
        """What there is to learn from, in words."""
        size = "ever new" if self._sequences is None else f"{self._sequences:,}"
        return f"{size} sequences of length {', '.join(f'{length:,}' for length in self._lengths)} to learn from"

    def _segments(self, step: int, reads: int) -> list[Segment]:
        numbers = self._numbers(step)
        # Of all lanes, as every process must know how many tokens are asked for in all of them.
        questions = self._draw(numbers, self._material.seed, self._length(step))
        tokens = torch.from_numpy(questions.tokens)
        end = questions.answers.shape[1]
        labels = tokens[:, -end:].masked_fill(~torch.from_numpy(questions.asked), IGNORE_INDEX)
        labels = F.pad(labels, (tokens.shape[1] - 1 - end, 0), value=IGNORE_INDEX)
        return cut_texts(tokens[:, :-1], labels, numbers, self._material, reads)

    def _length(self, step: int) -> int:
        """The length of a step's questions."""
        lengths = np.array(self._lengths, dtype=np.float64)
        often = (1 / lengths) / (1 / lengths).sum()
        return int(np.random.default_rng([self._material.seed, step]).choice(lengths, p=often))

    def _numbers(self, step: int) -> Integers:
        """The numbers of the questions that the lanes of the global batch read in a step."""
        size, lanes = self._sequences, self._material.lanes
        if size is None:
            return np.arange(step * lanes, (step + 1) * lanes)
        return numbers_of_step(step, lanes, size, self._material.seed)
