"""The figures of the sorting task: of one model by the place of the answer, of several by length."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from infformer.plots.sorting import plot_accuracy, plot_accuracy_by_length

COUNTERS = ("last_2048", "last_half", "noise_3_percent", "noise_1_percent", "chance")


def accuracies(level: float, symbols: int) -> dict:
    return {
        "accuracy": level,
        "accuracy_by_position": [level] * symbols,
        "accuracy_free_running": level / 2,
        "accuracy_free_running_by_position": [level / 2 / (place + 1) for place in range(symbols)],
    }


def test_nothing_measured_is_no_figure(drawn):
    assert drawn(plot_accuracy, {"lengths": []}) == drawn(plot_accuracy_by_length, []) == {}


def test_no_two_lines_of_one_model_are_told_apart_by_their_colour_alone(drawn):
    figure = drawn(plot_accuracy, {"lengths": [row("", 0, 100, 0.5)]}, "results.json")["accuracy_by_position"]
    for axes in figure.axes:
        styles = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in axes.lines}
        assert len(styles) == len(axes.lines) == 1 + len(COUNTERS)


def row(memory: str, seed: int, length: int, level: float) -> dict:
    counters = {name: accuracies(0.1 * n + 10 / length, 3) for n, name in enumerate(COUNTERS)}
    return {"memory": memory, "seed": seed, "length": length, **accuracies(level, 3), "ideal_counters": counters}


ROWS = [
    row("short_term", 0, 1000, 0.3),
    row("short_term", 1, 1000, 0.5),
    row("short_term", 0, 100, 0.6),
    row("short_term", 1, 100, 0.8),
    row("sticky", 0, 100, 0.9),
    row("sticky", 0, 1000, 0.7),
    row("sticky", 0, 10000, 0.4),
]


@pytest.fixture(scope="module")
def panels(drawn) -> list[Axes]:
    """Those of the figure of these rows."""
    return drawn(plot_accuracy_by_length, ROWS)["accuracy_by_length"].axes


def test_accuracy_by_length_is_drawn_beside_its_rows(tmp_path):
    for count in (1, len(ROWS)):
        (tmp_path / "accuracy.json").write_text(json.dumps(ROWS[:count]))
        (path,) = plot_accuracy_by_length(tmp_path / "accuracy.json")
        assert path == tmp_path / "accuracy_by_length.png"
        assert imread(path).std() > 0.05


def test_a_line_is_the_mean_over_the_seeds_with_bars_to_the_lowest_and_highest(panels):
    for axes, part in zip(panels, (1, 0.5), strict=True):
        bars = {container.get_label(): container for container in axes.containers}
        assert bars.keys() == {"short term", "sticky"}
        means, _, (spread,) = bars["short term"]
        assert means.get_xydata() == pytest.approx(np.array([[100, 0.7 * part], [1000, 0.4 * part]]))
        ends = np.array([segment[:, 1] for segment in spread.get_segments()])
        assert ends == pytest.approx(part * np.array([[0.6, 0.8], [0.3, 0.5]]))
        means, _, (spread,) = bars["sticky"]
        assert means.get_ydata().tolist() == pytest.approx([0.9 * part, 0.7 * part, 0.4 * part])
        assert all(low == high for (_, low), (_, high) in spread.get_segments())


def test_ideal_counters_are_dashed_and_reach_from_edge_to_edge(panels):
    for axes, part in zip(panels, (1, 0.5), strict=True):
        counters = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "--"}
        assert list(counters) == [name.replace("_", " ") for name in COUNTERS]
        lengths, values = counters["last half"].get_data()
        assert tuple(lengths[[0, -1]]) == pytest.approx(axes.get_xlim())
        assert lengths[1:-1].tolist() == [100, 1000, 10000]
        assert values.tolist() == pytest.approx([part * (0.1 + 10 / n) for n in (100, 100, 1000, 10000, 10000)])


def test_lengths_stand_on_a_logarithmic_axis(panels):
    for axes in panels:
        assert axes.get_xscale() == "log"
        assert axes.get_xticks().tolist() == [100, 1000, 10000]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "1,000", "10,000"]
