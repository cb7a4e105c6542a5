"""How many places of the answer a model gets right, when it sorts symbols by their frequency."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from infformer.evaluation.streaming import Evaluator
from infformer.tasks.answering import Forced, answer, answer_forced
from infformer.tasks.ideal_counters import ideal_counters
from infformer.tasks.sorting_sequences import as_questions


def measure_accuracy(
    evaluator: Evaluator, sequences: NDArray[np.int64], symbols: int, window: int, seed: int
) -> dict[str, Any]:
    """All that is measured on sequences of one length. The model is left in evaluation mode.

    Args:
        sequences: with their answers, [sequences, length + 1 + symbols]; all processes together.
        symbols: how many there are.
        window: how many of the last symbols a model without long-term memory would see.
        seed: of the ideal counters.

    Returns:
        `length`, `sequences`, what `evaluate_teacher_forced` returns, `accuracy_free_running` (by position too), where
        each place of the answer is predicted from the model's own answers before it, and the accuracies of the
        `ideal_counters`.
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
        "ideal_counters": ideal_counters(sequences, symbols, window, seed),
    }


def evaluate_teacher_forced(
    evaluator: Evaluator, sequences: NDArray[np.int64], symbols: int, title: str = "teacher forced"
) -> dict[str, Any]:
    """Accuracy where each place of the answer is predicted from the true places before it, as published.

    Returns:
        `nll` (nats per symbol of the answer), `accuracy`, `accuracy_by_position` [symbols].
    """
    return _teacher_forced(answer_forced(evaluator, as_questions(sequences, symbols), title), symbols)


def _teacher_forced(answers: Forced, symbols: int) -> dict[str, Any]:
    accuracy = answers.right.reshape(-1, symbols).mean(axis=0)
    return {
        "nll": float(answers.nats.mean(dtype=np.float64)),
        "accuracy": float(accuracy.mean()),
        "accuracy_by_position": accuracy.tolist(),
    }


def format_accuracy(results: dict[str, Any]) -> str:
    """A table of what `Sorting.measure` found: a line for each length, a column for the model and for each counter."""
    lengths, protocol = results["lengths"], results["protocol"]
    names = ["this model", *(name.replace("_", " ") for name in lengths[0]["ideal_counters"])]
    lines = [f"{'length':<8}" + "".join(f"{name:>17}" for name in names)]
    for figures in lengths:
        columns = [figures, *figures["ideal_counters"].values()]
        cells = [f"{column['accuracy']:.3f} / {column['accuracy_free_running']:.3f}" for column in columns]
        lines.append(f"{figures['length']:<8,}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append(
        f"accuracy teacher forced / free running, on {lengths[0]['sequences']} sequences of each length; segments of "
        f"{protocol['segment']} tokens, {protocol['reset']}, {protocol['dtype']}"
    )
    return "\n".join(lines)
