"""How often a model finds what stood at some depth of a long text, by the length of the text and the depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infformer.evaluation.streaming import Evaluator
from infformer.tasks.answering import answer
from infformer.tasks.retrieval_questions import RetrievalSource


def measure_cells(
    evaluator: Evaluator,
    source: RetrievalSource,
    split: str,
    length: int,
    depths: Sequence[float],
    texts: int,
    seed: int,
    title: str,
    inputs: int | None = None,
) -> list[dict[str, Any]]:
    """Ask for what stood at each depth of texts of one length. The model is left in evaluation mode.

    All depths are of the same texts, with the same answers at other places. All processes together.

    Args:
        split, seed: of the source.
        texts: how many texts are read for each depth.
        title: of the progress bar.
        inputs: of each text read only so many of the last tokens; None: all.

    Returns:
        Of each depth `length`, `depth`, `answers` and `tokens` (counts), `exact_match` (answers that are right to the
        last token, free running), `accuracy_free_running`, `accuracy` (tokens, teacher forced) and `nll` (nats per
        token of the answers).
    """
    sums = np.zeros((6, len(depths)))
    for shift in range(len(depths)):
        # Where there are several answers to a text, their depths change places from one reading to the next.
        depth_of = (shift + np.arange(source.answers)) % len(depths)
        wanted = np.tile(np.asarray(depths, dtype=np.float64)[depth_of], (texts, 1))
        questions = source.draw(split, np.arange(texts), seed, length, wanted)
        given = answer(evaluator, questions if inputs is None else questions.last(inputs), title)
        right = given.free == questions.true_answers
        rows, places = np.nonzero(questions.asked)
        which = questions.answers[rows, places]
        wrong = np.bincount(rows * source.answers + which, ~right, texts * source.answers)
        # One answer of each text after the other.
        sums[:2] += _by_depth(np.tile(depth_of, texts), len(depths), np.ones_like(wrong), wrong == 0)
        sums[2:] += _by_depth(
            depth_of[which], len(depths), np.ones_like(right), right, given.forced.right, given.forced.nats
        )
    answers, exact, tokens, free, forced, nats = sums
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


def format_accuracy(results: dict[str, Any]) -> str:
    """A table of what `Retrieval.measure` found: a line for each depth, a column for each length."""
    situations = {"": results["cells"], "memory off": results["controls"].get("memory_off", [])}
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
