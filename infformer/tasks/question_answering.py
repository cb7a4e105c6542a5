"""Learning to answer questions at the end of long texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from infformer.data.lanes import Segment
from infformer.tasks.question_stream import QuestionStream
from infformer.tasks.task import Examination, Validation


class QuestionAnswering:
    """The task of answering questions.

    Args:
        stream: of the questions to learn from.
        examination: how the model is measured.
        tokenizer: of the texts; None for sequences of symbols.
    """

    def __init__(
        self, stream: QuestionStream, examination: Examination, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._stream = stream
        self._examination = examination

    def next_step(self) -> list[Segment]:
        return self._stream.next_step()

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def measure_before(self) -> dict[str, Any]:
        """Nothing: what is to be had without training is chance, which stands beside the figures."""
        return {}

    def validate(self) -> Validation | None:
        return self._examination.validate()

    def measure(self, checkpoint: str) -> dict[str, Any]:
        return self._examination.measure(checkpoint)

    def report(self, results: dict[str, Any], folder: Path) -> list[Path]:
        return self._examination.report(results, folder)

    def inspect(self) -> dict[str, Any]:
        """Nothing: there is no long document."""
        return {}

    def sample(self, step: int, tokens: int) -> str | None:
        return self._examination.sample(step, tokens)

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(lambda number: f"sequence {number}")

    def describe(self) -> str:
        return self._stream.describe()
