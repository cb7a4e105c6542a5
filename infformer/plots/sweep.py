"""Runs that differ in a few options: `summary.json` to a figure beside it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from infformer.plots.style import BLUE, GREY, label, new_figure, read_json, save, shorten
from infformer.results import Interval, Sweep


def plot_sweep(path: Path) -> list[Path]:
    """Draw each row with its interval, the best on top, and what each of its seeds found.

    Returns:
        The figure written, `summary.png` beside the file.
    """
    sweep: Sweep = read_json(path)
    rows = sweep["rows"]
    compared = any(row["behind"] is not None for row in rows)
    figure = new_figure(11.5 if compared else 9.0, 1.8 + 0.34 * len(rows))
    axes, *behind = figure.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)[0]
    for place, row in enumerate(rows):
        axes.plot(row["by_seed"], [place] * len(row["by_seed"]), color=GREY, marker="|", linestyle="", markersize=11)
        _draw_point(axes, place, row["value"], row["interval"])
        if row["behind"] is not None:
            _draw_point(behind[0], place, row["behind"]["nats_per_token"], row["behind"]["interval"])
    axes.set_yticks(range(len(rows)), [shorten(row["name"], 60) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    unit = "perplexity per token" if sweep["measure"] == "perplexity" else sweep["measure"]
    label(axes, "The best first", f"{unit}; strokes: each seed", "")
    for panel in behind:
        panel.axvline(0, color="black", linewidth=0.8)
        label(panel, "Behind the best, on the same documents", "nats per token", "")
    return [save(figure, Path(path).parent / "summary.png")]


def _draw_point(axes: Axes, place: int, value: float, interval: Interval | None) -> None:
    if interval is not None:
        axes.plot(interval, [place, place], color=BLUE, linewidth=2)
    axes.plot([value], [place], color=BLUE, marker="o", markersize=5.5)
