"""How well symbols were sorted: results of the sorting task to figures beside them."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from infformer.plots.style import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    columns_of_legend,
    label,
    new_figure,
    read_json,
    save,
)
from infformer.results import SortingFigures, SortingResults, SortingRun

Measure = Literal["accuracy", "accuracy_free_running"]
MEASURES: dict[Measure, str] = {"accuracy": "teacher forced", "accuracy_free_running": "free running"}
MeasureByPosition = Literal["accuracy_by_position", "accuracy_free_running_by_position"]
MEASURES_BY_POSITION: dict[MeasureByPosition, str] = {
    "accuracy_by_position": MEASURES["accuracy"],
    "accuracy_free_running_by_position": MEASURES["accuracy_free_running"],
}
# Of the ideal counters, in the order of the results: colours beside one model, as several have colours themselves.
COUNTER_COLOURS = [ORANGE, PURPLE, GREEN, GREEN, GREY]
COUNTER_DASHES = [(6, 2), (6, 2, 1, 2), (3, 2), (3, 2, 1, 2), (1, 2)]
# Of the models, in the order of the results: colour and marker.
MODEL_STYLES = [
    (BLUE, "o"),
    (ORANGE, "s"),
    (GREEN, "^"),
    (PURPLE, "D"),
    ("black", "v"),
    (GREY, "P"),
    (AMBER, "X"),
    (SKY, "*"),
]

Values = dict[str, dict[int, list[float]]]
"""Of every seed, by what was measured and the length."""


def plot_accuracy(results_json: Path) -> list[Path]:
    """Draw the accuracy at each place of the answer, and that of the ideal counters: a row of panels for each length.

    Returns:
        The figure written, in `plots/` beside the results file; none if nothing was measured.
    """
    results: SortingResults = read_json(results_json)
    lengths = results.get("lengths", [])
    if not lengths:
        return []
    columns = len(MEASURES_BY_POSITION)
    figure = new_figure(4.6 * columns, 0.5 + 3.3 * len(lengths))
    for row, figures in enumerate(lengths):
        for column, (measure, name) in enumerate(MEASURES_BY_POSITION.items(), start=1):
            axes = figure.add_subplot(len(lengths), columns, row * columns + column)
            _draw_places(axes, figures, measure)
            label(axes, f"{figures['length']:,} symbols, {name}", "place in the answer", "accuracy")
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False)
    return [save(figure, Path(results_json).parent / "plots" / "accuracy_by_position.png")]


def plot_accuracy_by_length(path: Path) -> list[Path]:
    """Draw the accuracy of several memories against the length of the sequences, and that of the ideal counters.

    A line is the mean over the seeds of a memory; its bars reach from the lowest to the highest.

    Args:
        path: `accuracy.json`, a list of runs.

    Returns:
        The figure written, `accuracy_by_length.png` beside the file; none if it has no rows.
    """
    rows: list[SortingRun] = read_json(path)
    if not rows:
        return []
    lengths = sorted({row["length"] for row in rows})
    figure = new_figure(4.6 * len(MEASURES), 4.6)
    for column, (measure, name) in enumerate(MEASURES.items(), start=1):
        axes = figure.add_subplot(1, len(MEASURES), column)
        axes.set_xscale("log")
        axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
        models, counters = _draw_models(axes, rows, measure), _draw_counters(axes, rows, measure)
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:,.0f}")
        label(axes, f"Sorting, {name}", "symbols of a sequence", "accuracy")
    columns = columns_of_legend(figure, [str(line.get_label()) for line in models])
    figure.legend(handles=models, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    figure.legend(
        handles=counters, loc="outside lower center", ncols=len(counters), title="ideal counters", frameon=False
    )
    return [save(figure, Path(path).parent / "accuracy_by_length.png")]


def _draw_places(axes: Axes, figures: SortingFigures, measure: MeasureByPosition) -> None:
    places = range(1, len(figures[measure]) + 1)
    for (counter, accuracies), colour, dashes in zip(
        figures["ideal_counters"].items(), COUNTER_COLOURS, COUNTER_DASHES, strict=True
    ):
        axes.plot(
            places,
            accuracies[measure],
            color=colour,
            linestyle=(0, dashes),
            linewidth=1.2,
            label=_in_words(counter),
        )
    axes.plot(places, figures[measure], color=BLUE, marker="o", markersize=4.5, linewidth=1.5, label="this model")
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_models(axes: Axes, rows: list[SortingRun], measure: Measure) -> list[ErrorbarContainer]:
    """A line for each memory, with bars where its seeds differ."""
    values: Values = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["memory"]][row["length"]].append(row[measure])
    lines = []
    for (memory, by_length), (colour, marker) in zip(values.items(), cycle(MODEL_STYLES), strict=False):
        lengths, seeds = zip(*sorted(by_length.items()), strict=True)
        means = [mean(each) for each in seeds]
        below = [middle - min(each) for middle, each in zip(means, seeds, strict=True)]
        above = [max(each) - middle for middle, each in zip(means, seeds, strict=True)]
        lines.append(
            axes.errorbar(
                lengths,
                means,
                [below, above],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.5,
                capsize=3,
                label=_in_words(memory),
            )
        )
    return lines


def _draw_counters(axes: Axes, rows: list[SortingRun], measure: Measure) -> list[Line2D]:
    """A thin dashed line for each ideal counter, which no seed changes, from edge to edge of the panel."""
    left, right = axes.get_xlim()
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        for counter, figures in row["ideal_counters"].items():
            values[counter][row["length"]] = figures[measure]
    lines = []
    for (counter, by_length), dashes in zip(values.items(), cycle(COUNTER_DASHES), strict=False):
        lengths, accuracies = zip(*sorted(by_length.items()), strict=True)
        lines += axes.plot(
            [left, *lengths, right],
            [accuracies[0], *accuracies, accuracies[-1]],
            color=GREY,
            linestyle=(0, dashes),
            linewidth=1,
            label=_in_words(counter),
        )
    return lines


def _in_words(name: str) -> str:
    return name.replace("_", " ")
