"""Sorting: the symbols of a long sequence by how often they occurred, as a model's memory knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infformer.data.errors import DataError
from infformer.evaluation.report import write_results
from infformer.evaluation.streaming import Evaluator
from infformer.plots.sorting import plot_accuracy
from infformer.tasks.answering import alone, answer
from infformer.tasks.sorting_accuracy import evaluate_teacher_forced, format_accuracy, measure_accuracy
from infformer.tasks.sorting_sequences import SortingConfig, as_questions, draw_sequences
from infformer.tasks.task import Validation

HELD_OUT_SEED = 0
"""All runs are measured on the same sequences, whatever their own seed; no sequence of training is among them."""


class Sorting:
    """How well a model answers a sequence with its symbols by descending frequency.

    Args:
        config: which sequences.
        evaluator: how held-out sequences are read, and by which model.
        window: how many of the last symbols the model sees without long-term memory: those of its short-term memory
            and of a segment. What counting these would give stands beside its figures.

    Raises:
        DataError: the model does not know as many tokens.
    """

    def __init__(self, config: SortingConfig, evaluator: Evaluator, window: int) -> None:
        if evaluator.model.vocabulary_size < config.vocabulary_size:
            raise DataError(
                f"task.symbols={config.symbols}: with the separator these are {config.vocabulary_size} tokens, and the "
                f"model knows {evaluator.model.vocabulary_size}: set model.architecture.vocab_size="
                f"{config.vocabulary_size}, or sort fewer symbols"
            )
        self._config = config
        self._evaluator = evaluator
        self._window = window

    def validate(self) -> Validation:
        sequences = self._held_out("validation", self._config.validation_sequences)
        figures = evaluate_teacher_forced(self._evaluator, sequences, self._config.symbols, "validation")
        loss, accuracy = figures["nll"], figures["accuracy"]
        return Validation(
            loss,
            {"validation/loss": loss, "validation/accuracy": accuracy},
            f"validation accuracy {accuracy:.3f} (teacher forced)",
        )

    def measure(self, checkpoint: str) -> dict[str, Any]:
        """Both accuracies at every length, beside those of the ideal counters: `lengths`, and the `protocol`."""
        lengths = dict.fromkeys([self._config.length, *self._config.evaluation_lengths])
        return {
            "lengths": [
                measure_accuracy(
                    self._evaluator,
                    self._held_out("test", self._config.test_sequences, length),
                    self._config.symbols,
                    self._window,
                    HELD_OUT_SEED,
                )
                for length in lengths
            ],
            "protocol": {
                "segment": self._evaluator.protocol.segment_length,
                "reset": "each sequence begins with an empty memory",
                "dtype": self._evaluator.protocol.dtype,
                "checkpoint": checkpoint,
            },
        }

    def report(self, results: dict[str, Any], folder: Path) -> list[Path]:
        write_results(folder / "results.json", results)
        print(format_accuracy(results), flush=True)
        return plot_accuracy(folder / "results.json")

    def sample(self, step: int, tokens: int) -> str:
        """The beginnings of a true answer and of the model's own."""
        number = step % self._config.validation_sequences
        sequence = draw_sequences(self._config, "validation", [number], HELD_OUT_SEED)
        questions = as_questions(sequence, self._config.symbols)
        given = answer(alone(self._evaluator), questions, "sample").free
        return f"sequence {number}: {_spell(questions.true_answers[:tokens])}; the model: {_spell(given[:tokens])}"

    def _held_out(self, split: str, count: int, length: int | None = None) -> NDArray[np.int64]:
        return draw_sequences(self._config, split, np.arange(count), HELD_OUT_SEED, length)


def _spell(tokens: NDArray[np.int64]) -> str:
    return " ".join(map(str, tokens.tolist()))
