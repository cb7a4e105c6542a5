"""What the training asks of a task. Each task is one class, in a file of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from infformer.data.lanes import Segment


@dataclass
class TaskConfig:
    """What a model is to learn: the options that language modelling has. Every other task adds its own."""

    @property
    def is_language_modelling(self) -> bool:
        """Every token of documents, from the tokens before it."""
        return type(self) is TaskConfig

    @property
    def vocabulary_size(self) -> int | None:
        """How many tokens there are, for a task of symbols; None for a task of text, which a tokenizer cuts up."""
        return None


@dataclass(frozen=True)
class Validation:
    """What was measured in the middle of a run; the same on every process."""

    loss: float
    """Nats per scored token. The checkpoint of the lowest is the best."""
    metrics: dict[str, float]
    """As they are recorded: `validation/loss`, and what else the task knows, such as `validation/perplexity`."""
    text: str
    """The same in a few words, for the log."""


class Examination(Protocol):
    """How a model is measured, as it is at the moment of the call; it may be left in evaluation mode.

    What all processes call together is marked so: they may wait there for each other, and all get the same answer.
    """

    def validate(self) -> Validation | None:
        """Measure in the middle of a run; None if there is nothing to measure by. All processes together."""

    def measure(self, checkpoint: str) -> dict[str, Any]:
        """The final test figures, as JSON; empty if there is nothing to measure by. All processes together.

        Args:
            checkpoint: where the model's weights come from, for the record.
        """

    def report(self, results: dict[str, Any], folder: Path) -> list[Path]:
        """Write `results.json`, print a table, draw figures; on the main process only.

        Args:
            results: what `measure` returned, with what `measure_before` returned under `before`, None if nothing.
            folder: the run's.

        Returns:
            The figures, as PNG files.
        """

    def sample(self, step: int, tokens: int) -> str | None:
        """What the model writes, to be looked at; None if there is nothing to show. All processes
        together.

        Its random numbers are its own: the training goes on as without.

        Args:
            step: of the run; decides what is drawn.
            tokens: how many to write, at most.
        """


class Task(Examination, Protocol):
    """What a model is to learn, and how it is measured.

    Every process has a task of its own, for its lanes.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Saved beside the model in every checkpoint; None for a task without text."""

    def next_step(self) -> list[Segment]:
        """What the lanes of this process read in the next optimiser step, one segment after the other.

        Every process gets as many segments, with the same `global_tokens`: what is scored in each, in all lanes of the
        global batch together. Some may score nothing: they are read into memory, and nothing flows back through them.
        At least one scores something.
        """

    def state_dict(self) -> dict[str, Any]:
        """Where the task stands, as JSON; it is the same on every process, and fits any number of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the state was taken.

        Raises:
            UserError: the state was taken with other material or options.
        """

    def measure_before(self) -> dict[str, Any]:
        """The test figures before the first step, as JSON; empty if they are not wanted. All processes together."""

    def inspect(self) -> dict[str, Any]:
        """What the memory holds in the end, as JSON that `plots.memory` draws; empty if there is nothing to look at.

        All processes together.
        """

    def locate(self, segment: Segment) -> list[str]:
        """Where each lane of a segment is, in words: `lane 3: 'a book' at token 512`."""

    def describe(self) -> str:
        """What there is to learn from, in words: `17 documents, 5,042,123 tokens to learn from`."""
