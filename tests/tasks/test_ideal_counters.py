"""Counters give what a literal counting gives, and the accuracies that are known of them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from infformer.tasks.ideal_counters import ideal_counters
from infformer.tasks.sorting_sequences import SortingConfig, draw_sequences

SYMBOLS = 4


def distinct(parts: list[slice], length: int = 24) -> NDArray[np.int64]:
    """Sequences in whose parts no two symbols are equally frequent, so that nothing is left to chance."""
    config = SortingConfig(length=length, symbols=SYMBOLS)
    sequences = draw_sequences(config, "test", range(3000), 1)
    chosen = [
        row
        for row in sequences
        if all(len({list(row[:length][part]).count(symbol) for symbol in range(SYMBOLS)}) == SYMBOLS for part in parts)
    ]
    assert len(chosen) > 20
    return np.stack(chosen)


def literally(sequences: NDArray[np.int64], part: slice, length: int = 24) -> dict[str, list[float]]:
    """Accuracy by position of who counts a part of each sequence."""
    forced, free = np.zeros(SYMBOLS), np.zeros(SYMBOLS)
    for row in sequences.tolist():
        counts = [row[:length][part].count(symbol) for symbol in range(SYMBOLS)]
        answer = row[length + 1 :]
        for position, true in enumerate(answer):
            free[position] += sorted(range(SYMBOLS), key=lambda symbol: -counts[symbol])[position] == true
            left = [symbol for symbol in range(SYMBOLS) if symbol not in answer[:position]]
            forced[position] += max(left, key=lambda symbol: counts[symbol]) == true
    return {
        "accuracy_by_position": (forced / len(sequences)).tolist(),
        "accuracy_free_running_by_position": (free / len(sequences)).tolist(),
    }


def test_what_is_counted_literally() -> None:
    last, half = slice(24 - 9, 24), slice(12, 24)
    sequences = distinct([last, half])
    counters = ideal_counters(sequences, SYMBOLS, 9, 0)
    for name, part in (("last_9", last), ("last_half", half)):
        for key, expected in literally(sequences, part).items():
            assert counters[name][key] == pytest.approx(expected)
            assert counters[name][key.removesuffix("_by_position")] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("window", [24, 30, 1000])
def test_who_counts_everything_is_right(window: int) -> None:
    counter = ideal_counters(distinct([slice(None)]), SYMBOLS, window, 0)[f"last_{window}"]
    assert counter == {
        "accuracy": 1.0,
        "accuracy_by_position": [1.0] * SYMBOLS,
        "accuracy_free_running": 1.0,
        "accuracy_free_running_by_position": [1.0] * SYMBOLS,
    }


# Measured once with another implementation, of 200 sequences each: a standard error of 0.01.
@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (512, {"last_128": 0.11, "last_half": 0.17, "noise_3_percent": 0.66, "noise_1_percent": 0.78}),
        (1024, {"last_128": 0.09, "last_half": 0.19, "noise_3_percent": 0.67, "noise_1_percent": 0.84}),
    ],
)
def test_known_accuracies(length: int, expected: dict[str, float]) -> None:
    sequences = draw_sequences(SortingConfig(length=length), "test", range(200), 0)
    counters = ideal_counters(sequences, 20, 128, 0)
    free = {name: counters[name]["accuracy_free_running"] for name in expected}
    assert free == pytest.approx(expected, abs=0.035)


def test_chance() -> None:
    """Free running each place is one of 20; teacher forced one of those that are left: H_20 / 20 in the mean."""
    sequences = draw_sequences(SortingConfig(length=50), "test", range(2000), 0)
    chance = ideal_counters(sequences, 20, 10, 0)["chance"]
    left = [1 / (20 - position) for position in range(20)]
    error = 4 * np.sqrt(0.25 / 2000)
    assert chance["accuracy_by_position"] == pytest.approx(left, abs=error)
    assert chance["accuracy"] == pytest.approx(np.mean(left), abs=error / 4)
    assert chance["accuracy_free_running_by_position"] == pytest.approx([0.05] * 20, abs=error / 2)
    assert chance["accuracy_free_running"] == pytest.approx(0.05, abs=error / 4)


def test_the_same_seed_is_the_same_noise() -> None:
    sequences = draw_sequences(SortingConfig(length=50), "test", range(20), 0)
    one = ideal_counters(sequences, 20, 10, 4)
    assert ideal_counters(sequences, 20, 10, 4) == one
    assert ideal_counters(sequences, 20, 10, 5) != one
