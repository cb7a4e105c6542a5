"""Sorting: the symbols of a long sequence by how often they occurred, as a model's memory knows them.

A sequence of n symbols is followed by a separator and by its answer: all symbols, the most frequent first (∞-former,
https://arxiv.org/abs/2109.00301, the experiment on sorting). What is frequent drifts from the beginning to the end, so
a model that remembers only a part sorts another sequence. Symbols are the tokens 0 to `symbols` - 1, the separator is
the token `symbols`.

A model reads all but the last token, and is scored at the separator and after it, where it predicts the answer.

A model is compared with ideal counters, which count only a part of the sequence, or count all of it inexactly. A
counter gives every symbol a score, at random where it knows no difference, and answers by descending score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from infformer.errors import DataError
from infformer.options import check_at_least, measuring
from infformer.results import Accuracies, SortingFigures, SortingResults, TeacherForced
from infformer.tasks.answering import Forced, answer, answer_forced
from infformer.tasks.questions import HELD_OUT_SEED, Floats, Integers, Questions, QuestionStream, random_of
from infformer.tasks.task import Evaluation, Material, TaskConfig, Validation

if TYPE_CHECKING:
    from infformer.evaluation.streaming import Evaluator


@dataclass
class SortingConfig(TaskConfig):
    """The task of sorting symbols by their frequency in a long sequence."""

    length: int = 1024
    """Symbols of a sequence."""
    training_lengths: list[int] = field(default_factory=list)
    """Learn from sequences of these lengths instead: each step draws one, with a probability ∝ 1/length, so that all
    lengths together are read equally much; one that stands there twice is drawn twice as often. What is learned on
    short ones, sooner, is at hand for long ones."""
    symbols: int = 20
    """How many different symbols there are."""
    training_sequences: int | None = None
    """How many sequences to learn from, epoch after epoch, each in an order of its own; published: 8000. Null: never
    the same one twice."""
    validation_sequences: int = measuring(64, "validation")
    """How many are measured during training."""
    test_sequences: int = measuring(200, "test")
    """How many are measured at the end, of each length."""
    evaluation_lengths: list[int] = measuring(list, "test")
    """Further lengths to measure at the end."""

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise ValueError(f"task.symbols={self.symbols}: must be at least 2, or there is nothing to sort")
        check_at_least(1, "task.", self, "length", "training_sequences", "validation_sequences", "test_sequences")
        for name in ("training_lengths", "evaluation_lengths"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"task.{name}={list(getattr(self, name))}: each must be at least 1")

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are: the symbols and the separator."""
        return self.symbols + 1

    def build_stream(self, material: Material) -> QuestionStream:
        def draw(numbers: Integers, seed: int, length: int) -> Questions:
            return as_questions(draw_sequences(self, "train", numbers, seed, length), self.symbols)

        identity = {
            "task.length": self.length,
            "task.training_lengths": list(self.training_lengths),
            "task.symbols": self.symbols,
            "task.training_sequences": self.training_sequences,
        }
        return QuestionStream(draw, self.training_lengths or [self.length], identity, material, self.training_sequences)

    def build_evaluation(self, material: Material) -> Sorting:
        return Sorting(self, material.evaluator)


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
    """Sequences with their answers, [sequences, length + 1 + symbols], as questions, each with one answer."""
    return Questions(sequences, np.zeros((len(sequences), symbols), dtype=np.int64))


class Sorting(Evaluation[SortingResults]):
    """How well a model answers a sequence with its symbols by descending frequency.

    Args:
        config: which sequences.
        evaluator: how held-out sequences are read, and by which model.

    Raises:
        DataError: the model does not know as many tokens.
    """

    def __init__(self, config: SortingConfig, evaluator: Evaluator) -> None:
        if evaluator.model.vocabulary_size < config.vocabulary_size:
            raise DataError(
                f"task.symbols={config.symbols}: with the separator these are {config.vocabulary_size} tokens, and the "
                f"model knows {evaluator.model.vocabulary_size}: take one that knows as many "
                f"(a new one: model.architecture.vocab_size={config.vocabulary_size}), or sort fewer symbols"
            )
        self._config = config
        self._evaluator = evaluator
        # What the model sees without long-term memory: counting that is one of the marks beside its figures.
        self._window = evaluator.protocol.segment_length + evaluator.model.short_term_length

    def validate(self) -> Validation:
        sequences = self._held_out("validation", self._config.validation_sequences)
        figures = evaluate_teacher_forced(self._evaluator, sequences, self._config.symbols, "validation")
        loss, accuracy = figures["nll"], figures["accuracy"]
        return Validation(
            loss,
            {"validation/loss": loss, "validation/accuracy": accuracy},
            f"validation accuracy {accuracy:.3f} (teacher forced)",
        )

    def measure(self, checkpoint: str) -> SortingResults:
        lengths = dict.fromkeys([self._config.length, *self._config.evaluation_lengths])
        return {
            "lengths": [
                measure_accuracy(
                    self._evaluator,
                    self._held_out("test", self._config.test_sequences, length),
                    self._config.symbols,
                    self._window,
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

    def report(self, results: SortingResults, folder: Path) -> list[Path]:
        from infformer.plots.sorting import plot_accuracy  # this loads for seconds

        super().report(results, folder)
        return plot_accuracy(folder / "results.json")

    def table(self, results: SortingResults) -> str:
        return format_accuracy(results)

    def headline(self, results: SortingResults) -> dict[str, float]:
        return {f"test/accuracy_of_{figures['length']}": figures["accuracy"] for figures in results["lengths"]}

    def sample(self, step: int, tokens: int) -> str:
        """The beginnings of a true answer and of the model's own."""
        number = step % self._config.validation_sequences
        sequence = draw_sequences(self._config, "validation", [number], HELD_OUT_SEED)
        questions = as_questions(sequence, self._config.symbols)
        given = answer(self._evaluator.alone(), questions, "sample").free
        return f"sequence {number}: {_spell(questions.true_answers[:tokens])}; the model: {_spell(given[:tokens])}"

    def _held_out(self, split: str, count: int, length: int | None = None) -> Integers:
        return draw_sequences(self._config, split, np.arange(count), HELD_OUT_SEED, length)


def _spell(tokens: Integers) -> str:
    return " ".join(map(str, tokens.tolist()))


def measure_accuracy(evaluator: Evaluator, sequences: Integers, symbols: int, window: int) -> SortingFigures:
    """Measure a model on sequences of one length; it is left in evaluation mode.

    Args:
        sequences: with their answers, [sequences, length + 1 + symbols]; all processes together.
        symbols: how many there are.
        window: how many of the last symbols a model without long-term memory would see.
    """
    length = sequences.shape[1] - symbols - 1
    questions = as_questions(sequences, symbols)
    answers = answer(evaluator, questions, f"{length:,} symbols")
    free_running = (answers.free == questions.true_answers).reshape(-1, symbols).mean(axis=0)
    return {
        "length": length,
        "sequences": len(sequences),
        **_teacher_forced(answers.forced, symbols),
        "accuracy_free_running": float(free_running.mean()),
        "accuracy_free_running_by_position": free_running.tolist(),
        "ideal_counters": ideal_counters(sequences, symbols, window, HELD_OUT_SEED),
    }


def evaluate_teacher_forced(
    evaluator: Evaluator, sequences: Integers, symbols: int, title: str = "teacher forced"
) -> TeacherForced:
    """Accuracy where each place of the answer is predicted from the true places before it, as published."""
    return _teacher_forced(answer_forced(evaluator, as_questions(sequences, symbols), title), symbols)


def _teacher_forced(answers: Forced, symbols: int) -> TeacherForced:
    accuracy = answers.right.reshape(-1, symbols).mean(axis=0)
    return {
        "nll": float(answers.nats.mean(dtype=np.float64)),
        "accuracy": float(accuracy.mean()),
        "accuracy_by_position": accuracy.tolist(),
    }


def format_accuracy(results: SortingResults) -> str:
    """A table of what `Sorting.measure` found: a line for each length, a column for the model and for each counter."""
    lengths, protocol = results["lengths"], results["protocol"]
    names = ["this model", *(name.replace("_", " ") for name in lengths[0]["ideal_counters"])]
    lines = [f"{'length':<8}" + "".join(f"{name:>17}" for name in names)]
    for figures in lengths:
        columns: list[Accuracies] = [figures, *figures["ideal_counters"].values()]
        cells = [f"{column['accuracy']:.3f} / {column['accuracy_free_running']:.3f}" for column in columns]
        lines.append(f"{figures['length']:<8,}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append(
        f"accuracy teacher forced / free running, on {lengths[0]['sequences']} sequences of each length; segments of "
        f"{protocol['segment']} tokens, {protocol['reset']}, {protocol['dtype']}"
    )
    return "\n".join(lines)


def ideal_counters(sequences: Integers, symbols: int, window: int, seed: int) -> dict[str, Accuracies]:
    """The accuracy of each counter on these sequences.

    `last_<window>` counts the last `window` symbols, what a model without long-term memory sees; `last_half` the last
    half. `noise_3_percent` and `noise_1_percent` count everything, and err on each count by a normal deviate of so much
    of the mean count. `chance` knows nothing.

    Args:
        sequences: with their answers, [sequences, length + 1 + symbols].
        symbols: how many there are.
        window: symbols.
        seed: of ties and noise.
    """
    random = np.random.default_rng(seed)
    length = sequences.shape[1] - symbols - 1
    numbers, answers = sequences[:, :length], sequences[:, length + 1 :]
    everything = _counts(numbers, symbols)
    noise = random.normal(scale=length / symbols, size=everything.shape)
    ties = random.random(everything.shape)  # less than any difference between two counts
    scores = {
        f"last_{window}": _counts(numbers[:, max(length - window, 0) :], symbols) + ties,
        "last_half": _counts(numbers[:, length - length // 2 :], symbols) + ties,
        "noise_3_percent": everything + 0.03 * noise,
        "noise_1_percent": everything + 0.01 * noise,
        "chance": ties,
    }
    return {name: _accuracy(counter, answers) for name, counter in scores.items()}


def _counts(numbers: Integers, symbols: int) -> Integers:
    """How often each symbol occurs in each row, [sequences, symbols]."""
    rows = symbols * np.arange(len(numbers))[:, np.newaxis]
    return np.bincount((rows + numbers).ravel(), minlength=symbols * len(numbers)).reshape(-1, symbols)


def _accuracy(scores: Floats, answers: Integers) -> Accuracies:
    """The accuracy of answering by descending scores; scores and true answers are [sequences, symbols]."""
    in_true_order = np.take_along_axis(scores, answers, axis=1)
    # Teacher forced, right is whoever gives the true symbol the best score of those that are left.
    best_left = np.maximum.accumulate(in_true_order[:, ::-1], axis=1)[:, ::-1]
    forced = (in_true_order == best_left).mean(axis=0)
    free = (np.argsort(-scores, axis=1) == answers).mean(axis=0)
    return {
        "accuracy": float(forced.mean()),
        "accuracy_by_position": forced.tolist(),
        "accuracy_free_running": float(free.mean()),
        "accuracy_free_running_by_position": free.tolist(),
    }
