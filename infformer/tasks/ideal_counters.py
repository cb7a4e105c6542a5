"""What is to be had at sorting by whoever counts, but not all, or not exactly: the marks that a model is compared with.

A counter gives every symbol a score, at random where it knows no difference, and answers by descending score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def ideal_counters(sequences: NDArray[np.int64], symbols: int, window: int, seed: int) -> dict[str, dict[str, Any]]:
    """The accuracy of each counter on these sequences.

    `last_<window>` counts the last `window` symbols, what a model without long-term memory sees; `last_half` the last
    half. `noise_3_percent` and `noise_1_percent` count everything, and err on each count by a normal deviate of so much
    of the mean count. `chance` knows nothing.

    Args:
        sequences: with their answers, [sequences, length + 1 + symbols].
        symbols: how many there are.
        window: symbols.
        seed: of ties and noise.

    Returns:
        Of each counter what is measured of a model: `accuracy` and `accuracy_by_position` [symbols], teacher forced,
        and `accuracy_free_running` and `accuracy_free_running_by_position`.
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


def _counts(numbers: NDArray[np.int64], symbols: int) -> NDArray[np.int64]:
    """How often each symbol occurs in each row, [sequences, symbols]."""
    rows = symbols * np.arange(len(numbers))[:, np.newaxis]
    return np.bincount((rows + numbers).ravel(), minlength=symbols * len(numbers)).reshape(-1, symbols)


def _accuracy(scores: NDArray[np.float64], answers: NDArray[np.int64]) -> dict[str, Any]:
    """Of answers by scores, both [sequences, symbols]."""
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
