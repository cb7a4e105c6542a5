"""How well symbols were sorted: `results.json` of the sorting task to a figure beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from infformer.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, label, new_figure, save

MEASURES = {
    "accuracy_by_position": "teacher forced",
    "accuracy_free_running_by_position": "free running",
}
# Of the ideal counters, in the order of the results.
COUNTER_STYLES = [(ORANGE, "-"), (PURPLE, "-"), (GREEN, "--"), (GREEN, "-"), (GREY, ":")]


def plot_accuracy(results_json: Path) -> list[Path]:
    """Draw the accuracy at each place of the answer, and that of the ideal counters: a row of panels for each length.

    Returns:
        The figure written, in `plots/` beside the results file; none if nothing was measured.
    """
    results = json.loads(Path(results_json).read_text(encoding="utf-8"))
    lengths = results.get("lengths", [])
    if not lengths:
        return []
    figure = new_figure(4.6 * len(MEASURES), 0.5 + 3.3 * len(lengths))
    for row, figures in enumerate(lengths):
        for column, (key, name) in enumerate(MEASURES.items(), start=1):
            axes = figure.add_subplot(len(lengths), len(MEASURES), row * len(MEASURES) + column)
            _draw(axes, figures, key)
            label(axes, f"{figures['length']:,} symbols, {name}", "place in the answer", "accuracy")
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False)
    return [save(figure, Path(results_json).parent / "plots" / "accuracy_by_position.png")]


def _draw(axes: Axes, figures: dict[str, Any], key: str) -> None:
    places = range(1, len(figures[key]) + 1)
    for (counter, accuracies), (colour, dashes) in zip(figures["ideal_counters"].items(), COUNTER_STYLES, strict=True):
        name = counter.replace("_", " ")
        axes.plot(places, accuracies[key], color=colour, linestyle=dashes, linewidth=1.2, label=name)
    axes.plot(places, figures[key], color=BLUE, marker="o", markersize=4.5, linewidth=1.5, label="this model")
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
