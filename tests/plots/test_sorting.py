"""The figure of the sorting task: a row of panels for each length, whatever was measured."""

import json

import pytest
from matplotlib.image import imread

from infformer.plots.sorting import plot_accuracy

COUNTERS = ("last_2048", "last_half", "noise_3_percent", "noise_1_percent", "chance")


def accuracies(level: float, symbols: int) -> dict:
    return {
        "accuracy": level,
        "accuracy_by_position": [level] * symbols,
        "accuracy_free_running": level / 2,
        "accuracy_free_running_by_position": [level / 2 / (place + 1) for place in range(symbols)],
    }


def write_results(directory, lengths, symbols=20):
    results = {
        "lengths": [
            {
                "length": length,
                **accuracies(0.7, symbols),
                "ideal_counters": {name: accuracies(0.15 * n, symbols) for n, name in enumerate(COUNTERS, start=1)},
            }
            for length in lengths
        ],
        "before": None,
    }
    path = directory / "results.json"
    path.write_text(json.dumps(results))
    return path


@pytest.mark.parametrize("symbols", [2, 20])
def test_accuracy_is_drawn_beside_the_results(tmp_path, symbols):
    (path,) = plot_accuracy(write_results(tmp_path, [4000], symbols))
    assert path == tmp_path / "plots" / "accuracy_by_position.png"
    assert imread(path).std() > 0.05


def test_every_length_has_a_row(tmp_path):
    heights = []
    for count in (1, 3):
        (path,) = plot_accuracy(write_results(tmp_path, [1000 * (n + 1) for n in range(count)]))
        heights.append(imread(path).shape[0])
    assert heights[1] > 2 * heights[0]


def test_nothing_measured_is_no_figure(tmp_path):
    assert plot_accuracy(write_results(tmp_path, [])) == []
