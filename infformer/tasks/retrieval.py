"""Retrieval: what stood at some depth of a long text, asked for at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from infformer.data.errors import DataError
from infformer.evaluation.report import write_results
from infformer.evaluation.streaming import Evaluator
from infformer.plots.retrieval import plot_retrieval
from infformer.tasks.answering import alone, answer
from infformer.tasks.questions import Integers
from infformer.tasks.retrieval_accuracy import format_accuracy, measure_cells
from infformer.tasks.retrieval_questions import RetrievalConfig, RetrievalSource
from infformer.tasks.task import Validation

HELD_OUT_SEED = 0
"""All runs are measured on the same questions, whatever their own seed; no question of training is among them."""


class Retrieval:
    """How well a model finds what it is asked for, by the length of the text and the depth of the answer.

    Args:
        config: which lengths and depths, and how many questions.
        source: of the questions.
        evaluator: how the texts are read, and by which model.
        window: how many of the last tokens the model sees without long-term memory: those of its short-term memory
            and of a segment.
        controls: measure the model also without its memory: reading the last segment alone.
        tokenizer: of the texts; None for sequences of symbols.

    Raises:
        DataError: the model does not know as many tokens, or one of the lengths cannot be asked for.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        source: RetrievalSource,
        evaluator: Evaluator,
        window: int,
        controls: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        symbols = config.vocabulary_size
        if symbols is not None and evaluator.model.vocabulary_size < symbols:
            raise DataError(
                f"this task has {symbols} symbols, and the model knows {evaluator.model.vocabulary_size}: set "
                f"model.architecture.vocab_size={symbols}, or choose fewer task.keys or task.values"
            )
        self._config = config
        self._source = source
        self._evaluator = evaluator
        self._window = window
        self._controls = controls and evaluator.model.has_memory
        self._tokenizer = tokenizer
        self._ask_one_of_each_length()

    def validate(self) -> Validation | None:
        if not self._source.has("validation"):
            return None
        cells = self._measure("validation", self._config.lengths[0], self._config.validation_questions, "validation")
        tokens = sum(cell["tokens"] for cell in cells)
        loss = sum(cell["nll"] * cell["tokens"] for cell in cells) / tokens
        accuracy = sum(cell["accuracy"] * cell["tokens"] for cell in cells) / tokens
        exact = sum(cell["exact_match"] for cell in cells) / len(cells)
        return Validation(
            loss,
            {"validation/loss": loss, "validation/accuracy": accuracy, "validation/exact_match": exact},
            f"validation accuracy {accuracy:.3f} (tokens, teacher forced), exact match {exact:.3f} (free running)",
        )

    def measure(self, checkpoint: str) -> dict[str, Any]:
        """The `cells` of all lengths and depths, those of the `controls`, the `chance` of an answer, the `protocol`."""
        if not self._source.has("test"):
            return {}
        segment = self._evaluator.protocol.segment_length
        controls = {"memory_off": self._measure_lengths("memory off, ", segment)} if self._controls else {}
        return {
            "cells": self._measure_lengths("", None),
            "controls": controls,
            "chance": self._source.chance,
            "protocol": {
                "task": self._source.name,
                "segment": segment,
                "window": self._window,
                "reset": "each text begins with an empty memory; memory off: its last segment alone",
                "dtype": self._evaluator.protocol.dtype,
                "checkpoint": checkpoint,
            },
        }

    def report(self, results: dict[str, Any], folder: Path) -> list[Path]:
        write_results(folder / "results.json", results)
        print(format_accuracy(results), flush=True)
        return plot_retrieval(folder / "results.json")

    def sample(self, step: int, tokens: int) -> str | None:
        """The beginnings of true answers and of the model's own."""
        if not self._source.has("validation"):
            return None
        number, depth = step % self._config.validation_questions, self._config.depths[step % len(self._config.depths)]
        depths = np.full((1, self._source.answers), depth)
        questions = self._source.draw("validation", [number], HELD_OUT_SEED, self._config.lengths[0], depths)
        given = answer(alone(self._evaluator), questions, "sample").free
        true = self._spell(questions.true_answers[:tokens])
        return f"text {number}, depth {depth}: {true}; the model: {self._spell(given[:tokens])}"

    def _measure_lengths(self, title: str, inputs: int | None) -> list[dict[str, Any]]:
        texts = self._config.test_questions
        return [
            cell
            for length in dict.fromkeys(self._config.lengths)
            for cell in self._measure("test", length, texts, f"{title}{length:,} tokens", inputs)
        ]

    def _measure(
        self, split: str, length: int, texts: int, title: str, inputs: int | None = None
    ) -> list[dict[str, Any]]:
        depths = list(dict.fromkeys(self._config.depths))
        return measure_cells(self._evaluator, self._source, split, length, depths, texts, HELD_OUT_SEED, title, inputs)

    def _ask_one_of_each_length(self) -> None:
        """What cannot be asked is said before any long work."""
        lengths = {"validation": self._config.lengths[:1], "test": self._config.lengths}
        for split, chosen in lengths.items():
            if self._source.has(split):
                for length in chosen:
                    self._source.draw(split, [0], HELD_OUT_SEED, length, np.zeros((1, self._source.answers)))

    def _spell(self, tokens: Integers) -> str:
        return " ".join(map(str, tokens)) if self._tokenizer is None else repr(self._tokenizer.decode(tokens))
