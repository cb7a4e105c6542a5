"""Retrieval: what stood at some depth of a long text, asked for at its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from infformer.errors import DataError
from infformer.options import check_at_least, measuring
from infformer.results import MEMORY_OFF, RetrievalCell, RetrievalResults
from infformer.tasks.answering import answer
from infformer.tasks.questions import HELD_OUT_SEED, Floats, Integers, Questions, QuestionStream, random_of
from infformer.tasks.task import Evaluation, Material, TaskConfig, Validation

if TYPE_CHECKING:
    from infformer.evaluation.streaming import Evaluator


@dataclass
class RetrievalConfig(TaskConfig):
    """What every retrieval task asks: something that stood at some depth of a long text."""

    lengths: list[int] = measuring(lambda: [1024, 4096], "validation", "test")
    """How many tokens the texts to measure by have, questions and answers included; during training only the first."""
    depths: list[float] = measuring(lambda: [0.0, 0.25, 0.5, 0.75, 1.0], "validation", "test")
    """Where to look for the answer, as a part of the text: 0 is its beginning, 1 its end, just before the question."""
    training_lengths: list[int] = field(default_factory=lambda: [1024])
    """Tokens of the texts to learn from, the answers at any depth: each step draws one, with a probability ∝ 1/length,
    so that all lengths together are read equally much."""
    validation_questions: int = measuring(8, "validation")
    """How many texts are read during training at each depth."""
    test_questions: int = measuring(20, "test")
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
        check_at_least(1, "task.", self, "validation_questions", "test_questions")

    @abstractmethod
    def build_source(self, material: Material) -> RetrievalSource:
        """The questions of this task."""

    def build_stream(self, material: Material) -> QuestionStream:
        source = self.build_source(material)
        identity = {"task.training_lengths": list(self.training_lengths), **source.identity}
        return QuestionStream(source.draw_training, self.training_lengths, identity, material)

    def build_evaluation(self, material: Material) -> Retrieval:
        return Retrieval(self, self.build_source(material), material.evaluator, material.controls, material.tokenizer)


class DrawAtDepths(Protocol):
    """How the questions of a retrieval task are drawn."""

    def __call__(
        self, split: str, numbers: Sequence[int] | Integers, seed: int, length: int, depths: Floats
    ) -> Questions:
        """Draw questions of one length. They depend on the arguments alone, and no question depends on the others.

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


@dataclass(frozen=True)
class RetrievalSource:
    """The questions of one retrieval task."""

    name: str
    """The name of the task in results and above figures."""
    answers: int
    """How many answers each text ends with."""
    chance: float
    """How often a whole answer is right by chance."""
    identity: Mapping[str, object]
    """What decides on the questions beside the lengths to learn from, by the options that say it."""
    splits: Collection[str]
    """The splits of which there is anything to ask."""
    draw: DrawAtDepths

    def draw_training(self, numbers: Integers, seed: int, length: int) -> Questions:
        """The questions of these numbers, each from 0, their answers at depths drawn uniformly from [0, 1)."""
        depths = [random_of(seed, "train", length, number, stream=1).random(self.answers) for number in numbers]
        return self.draw("train", numbers, seed, length, np.array(depths).reshape(-1, self.answers))


class Retrieval(Evaluation[RetrievalResults]):
    """How well a model finds what it is asked for, by the length of the text and the depth of the answer.

    Args:
        config: which lengths and depths, and how many questions.
        source: of the questions.
        evaluator: how the texts are read, and by which model.
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
        controls: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        symbols = config.vocabulary_size
        if symbols is not None and evaluator.model.vocabulary_size < symbols:
            raise DataError(
                f"this task has {symbols} symbols, and the model knows {evaluator.model.vocabulary_size}: take "
                f"one that knows as many (a new one: model.architecture.vocab_size={symbols}), or choose fewer "
                "task.keys or task.values"
            )
        self._config = config
        self._source = source
        self._evaluator = evaluator
        # What the model sees without long-term memory: its short-term memory and a segment.
        self._window = evaluator.protocol.segment_length + evaluator.model.short_term_length
        self._controls = controls and evaluator.model.has_memory
        self._tokenizer = tokenizer
        self._ask_for_every_length()

    def validate(self) -> Validation | None:
        if "validation" not in self._source.splits:
            return None
        cells = self._measure("validation", self._config.lengths[0], self._config.validation_questions, "validation")
        loss, accuracy = _mean(cells, "nll", "tokens"), _mean(cells, "accuracy", "tokens")
        exact = _mean(cells, "exact_match", "answers")
        return Validation(
            loss,
            {"validation/loss": loss, "validation/accuracy": accuracy, "validation/exact_match": exact},
            f"validation accuracy {accuracy:.3f} (tokens, teacher forced), exact match {exact:.3f} (free running)",
        )

    def measure(self, checkpoint: str) -> RetrievalResults | None:
        if "test" not in self._source.splits:
            return None
        segment = self._evaluator.protocol.segment_length
        controls = {MEMORY_OFF: self._measure_lengths("memory off, ", segment)} if self._controls else {}
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

    def report(self, results: RetrievalResults, folder: Path) -> list[Path]:
        from infformer.plots.retrieval import plot_retrieval  # this loads for seconds

        super().report(results, folder)
        return plot_retrieval(folder / "results.json")

    def table(self, results: RetrievalResults) -> str:
        return format_accuracy(results)

    def headline(self, results: RetrievalResults) -> dict[str, float]:
        situations = {"test": results["cells"]}
        situations |= {f"test/{name}": cells for name, cells in results["controls"].items()}
        figures = {}
        for name, cells in situations.items():
            figures[f"{name}/exact_match"] = _mean(cells, "exact_match", "answers")
            figures[f"{name}/accuracy"] = _mean(cells, "accuracy", "tokens")
        return figures

    def sample(self, step: int, tokens: int) -> str | None:
        """The beginnings of true answers and of the model's own."""
        if "validation" not in self._source.splits:
            return None
        number, depth = step % self._config.validation_questions, self._config.depths[step % len(self._config.depths)]
        depths = np.full((1, self._source.answers), depth)
        questions = self._source.draw("validation", [number], HELD_OUT_SEED, self._config.lengths[0], depths)
        given = answer(self._evaluator.alone(), questions, "sample").free
        true = self._spell(questions.true_answers[:tokens])
        return f"text {number}, depth {depth}: {true}; the model: {self._spell(given[:tokens])}"

    def _measure_lengths(self, title: str, inputs: int | None) -> list[RetrievalCell]:
        texts = self._config.test_questions
        return [
            cell
            for length in dict.fromkeys(self._config.lengths)
            for cell in self._measure("test", length, texts, f"{title}{length:,} tokens", inputs)
        ]

    def _measure(
        self, split: str, length: int, texts: int, title: str, inputs: int | None = None
    ) -> list[RetrievalCell]:
        depths = list(dict.fromkeys(self._config.depths))
        return measure_cells(self._evaluator, self._source, split, length, depths, texts, title, inputs)

    def _ask_for_every_length(self) -> None:
        """Draw all questions once, so that one that cannot be asked is an error before any long work."""
        config, source = self._config, self._source
        for split, lengths, texts in (
            ("validation", config.lengths[:1], config.validation_questions),
            ("test", config.lengths, config.test_questions),
        ):
            for length in lengths if split in source.splits else ():
                for number in range(texts):  # one by one: together, long ones would fill the memory
                    source.draw(split, [number], HELD_OUT_SEED, length, np.zeros((1, source.answers)))

    def _spell(self, tokens: Integers) -> str:
        return " ".join(map(str, tokens)) if self._tokenizer is None else repr(self._tokenizer.decode(tokens))


def measure_cells(
    evaluator: Evaluator,
    source: RetrievalSource,
    split: str,
    length: int,
    depths: Sequence[float],
    texts: int,
    title: str,
    inputs: int | None = None,
) -> list[RetrievalCell]:
    """Ask for what stood at each depth of texts of one length. The model is left in evaluation mode.

    Every depth is tried on the same texts, with the same answers at other places. All processes together.

    Args:
        split: of the source.
        texts: how many texts are read for each depth.
        title: of the progress bar.
        inputs: how many of the last tokens of each text are read; None: all.
    """
    # Each text is read once for each depth; where it has several answers, their depths change places in between.
    depth_of = (np.arange(len(depths))[:, np.newaxis] + np.arange(source.answers)) % len(depths)
    depth_of = depth_of.repeat(texts, axis=0)
    numbers = np.tile(np.arange(texts), len(depths))
    questions = source.draw(split, numbers, HELD_OUT_SEED, length, np.asarray(depths, dtype=np.float64)[depth_of])
    given = answer(evaluator, questions if inputs is None else questions.last(inputs), title)
    right = given.free == questions.true_answers
    rows, places = np.nonzero(questions.asked)
    which = questions.answers[rows, places]
    wrong = np.bincount(rows * source.answers + which, ~right, depth_of.size)
    answers, exact = _by_depth(depth_of.ravel(), len(depths), np.ones_like(wrong), wrong == 0)
    tokens, free, forced, nats = _by_depth(
        depth_of[rows, which], len(depths), np.ones_like(right), right, given.forced.right, given.forced.nats
    )
    return [
        {
            "length": length,
            "depth": depth,
            "answers": int(answers[column]),
            "tokens": int(tokens[column]),
            "exact_match": exact[column] / answers[column],
            "accuracy_free_running": free[column] / tokens[column],
            "accuracy": forced[column] / tokens[column],
            "nll": nats[column] / tokens[column],
        }
        for column, depth in enumerate(depths)
    ]


def _by_depth(depth_of: Any, depths: int, *values: Any) -> Any:
    """The sums of some values by their depth, [values, depths]."""
    return np.stack([np.bincount(depth_of, value.astype(np.float64), depths) for value in values])


def _mean(
    cells: Sequence[RetrievalCell],
    figure: Literal["exact_match", "accuracy", "nll"],
    of_each: Literal["answers", "tokens"],
) -> float:
    """A figure of each answer, or of each token of the answers, over all cells."""
    return float(np.average([cell[figure] for cell in cells], weights=[cell[of_each] for cell in cells]))


def format_accuracy(results: RetrievalResults) -> str:
    """A table of what `Retrieval.measure` found: a line for each depth, a column for each length."""
    situations = {"": results["cells"], "memory off": results["controls"].get(MEMORY_OFF, [])}
    protocol = results["protocol"]
    lengths = list(dict.fromkeys(cell["length"] for cell in results["cells"]))
    lines = [f"{'depth':<24}" + "".join(f"{f'{length:,}':>17}" for length in lengths)]
    for name, cells in situations.items():
        for depth in dict.fromkeys(cell["depth"] for cell in cells):
            row = [f"{cell['exact_match']:.3f} / {cell['accuracy']:.3f}" for cell in cells if cell["depth"] == depth]
            lines.append(f"{depth:<8.2f}{name:<16}" + "".join(f"{cell:>17}" for cell in row))
    lines.append(
        f"{protocol['task']} by depth (0: beginning) and length (tokens): whole answers free running / tokens teacher "
        f"forced; {results['cells'][0]['answers']} answers each, chance {results['chance']:.2g}; segments of "
        f"{protocol['segment']} tokens, {protocol['reset']}, {protocol['dtype']}"
    )
    return "\n".join(lines)
