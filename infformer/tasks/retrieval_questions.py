"""What all retrieval tasks have in common: their options, and questions whose answers stand at chosen depths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infformer.errors import measuring
from infformer.tasks.questions import Floats, Integers, Questions, random_of
from infformer.tasks.task import TaskConfig


@dataclass
class RetrievalConfig(TaskConfig):
    """What every retrieval task asks: something that stood at some depth of a long text."""

    lengths: list[int] = measuring(lambda: [1024, 4096])
    """Tokens of the texts to measure by, question and answer included; during training, by the first of them."""
    depths: list[float] = measuring(lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where to look for the answer, as a part of the text: 0 is its beginning, 1 its end, just before the question."""
    training_lengths: list[int] = field(default_factory=lambda: [1024])
    """Tokens of the texts to learn from, the answers at any depth: each step draws one, with a probability ∝ 1/length,
    so that all lengths together are read equally much."""
    validation_questions: int = measuring(8)
    """How many texts are read during training at each depth."""
    test_questions: int = measuring(20)
    """How many texts are read at the end at each length and depth."""

    def __post_init__(self) -> None:
        for name in ("lengths", "training_lengths"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(
                    f"task.{name}={list(getattr(self, name))}: name one at least, each of at least 1 token"
                )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(
                f"task.depths={list(self.depths)}: name one at least, each from 0, the beginning of the text, to 1, "
                "its end"
            )
        for name in ("validation_questions", "test_questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name}={getattr(self, name)}: must be at least 1")


class RetrievalSource(ABC):
    """The questions of one retrieval task.

    Args:
        config: of the task.
        answers: how many each text ends with.
        chance: how often a whole answer is right by chance.
        identity: what decides on the questions beside the lengths to learn from, by the options that say it.
    """

    name: str
    """As it stands in results and above figures."""
    training_sequences = None

    def __init__(self, config: RetrievalConfig, answers: int, chance: float, identity: dict[str, Any]) -> None:
        self.training_lengths = list(config.training_lengths)
        self.identity = {"task.training_lengths": self.training_lengths, **identity}
        self.answers = answers
        self.chance = chance

    @abstractmethod
    def has(self, split: str) -> bool:
        """Whether there is anything to ask of this split: `train`, `validation` or `test`."""

    @abstractmethod
    def draw(self, split: str, numbers: Sequence[int] | Integers, seed: int, length: int, depths: Floats) -> Questions:
        """Questions of this length, which depend on the arguments alone, each on nothing of the others.

        With other depths the same number is the same text and the same answers, at other places.

        Args:
            split: `train`, `validation` or `test`.
            numbers: which questions of the split, each from 0.
            seed: of all of them.
            length: tokens, answers included.
            depths: where to look for each answer, [numbers, answers].

        Raises:
            DataError: there is no such split, or no question of this length.
        """

    def draw_training(self, numbers: Integers, seed: int, length: int) -> Questions:
        """The questions of these numbers, each from 0, their answers at depths drawn uniformly from [0, 1)."""
        depths = [random_of(seed, "train", length, number, stream=1).random(self.answers) for number in numbers]
        return self.draw("train", numbers, seed, length, np.array(depths).reshape(-1, self.answers))
