"""Sorting: the symbols of a long sequence by how often they occurred, as a model's memory knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infformer.data.errors import DataError
from infformer.data.lanes import Segment
from infformer.evaluation.perplexity import Reader
from infformer.evaluation.report import write_results
from infformer.plots.sorting import plot_accuracy
from infformer.tasks.sorting_accuracy import answer_freely, evaluate_teacher_forced, format_accuracy, measure_accuracy
from infformer.tasks.sorting_sequences import SortingConfig, SortingStream, draw_sequences
from infformer.tasks.task import Validation

HELD_OUT_SEED = 0
"""All runs are measured on the same sequences, whatever their own seed; no sequence of training is among them."""


class Sorting:
    """The task of answering a sequence with its symbols by descending frequency.

    Args:
        config: which sequences.
        stream: those of training.
        reader: how held-out sequences are read, and by which model.
        window: how many of the last symbols the model sees without long-term memory: those of its short-term memory
            and of a segment. What counting these would give stands beside its figures.

    Raises:
        DataError: the model does not know as many tokens.
    """

    tokenizer = None

    def __init__(self, config: SortingConfig, stream: SortingStream, reader: Reader, window: int) -> None:
        if reader.model.vocabulary_size < config.vocabulary_size:
            raise DataError(
                f"task.symbols={config.symbols}: with the separator these are {config.vocabulary_size} tokens, and the "
                f"model knows {reader.model.vocabulary_size}: set model.architecture.vocab_size="
                f"{config.vocabulary_size}, or sort fewer symbols"
            )
        self._config = config
        self._stream = stream
        self._reader = reader
        self._window = window

    def next_step(self) -> list[Segment]:
        return self._stream.next_step()

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def measure_before(self) -> dict[str, Any]:
        """Nothing: what is to be had without training is the ideal counters' `chance`."""
        return {}

    def validate(self) -> Validation:
        sequences = self._held_out("validation", self._config.validation_sequences)
        figures = evaluate_teacher_forced(self._reader, sequences, self._config.symbols, "validation")
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
                    self._reader,
                    self._held_out("test", self._config.test_sequences, length),
                    self._config.symbols,
                    self._window,
                    HELD_OUT_SEED,
                )
                for length in lengths
            ],
            "protocol": {
                "segment": self._reader.segment_length,
                "reset": "each sequence begins with an empty memory",
                "dtype": str(self._reader.precision).removeprefix("torch."),
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
        (sequence,) = draw_sequences(self._config, "validation", [number], HELD_OUT_SEED)
        read = torch.from_numpy(sequence).unsqueeze(0).to(self._reader.model.device)
        (answer,) = answer_freely(self._reader, read, self._config.symbols).tolist()
        true = sequence[-self._config.symbols :].tolist()
        return f"sequence {number}: {_spell(true[:tokens])}; the model: {_spell(answer[:tokens])}"

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(lambda number: f"sequence {number}")

    def describe(self) -> str:
        sequences = self._config.training_sequences
        lengths = self._config.training_lengths or [self._config.length]
        return (
            f"{'ever new' if sequences is None else f'{sequences:,}'} sequences of "
            f"{', '.join(f'{length:,}' for length in lengths)} symbols to learn from"
        )

    def _held_out(self, split: str, count: int, length: int | None = None) -> NDArray[np.int64]:
        return draw_sequences(self._config, split, np.arange(count), HELD_OUT_SEED, length)


def _spell(answer: list[int]) -> str:
    return " ".join(map(str, answer))
