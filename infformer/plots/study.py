"""What memories gain, and what that costs: `study.json` to a figure beside it."""

from __future__ import annotations

import json
from pathlib import Path

from infformer.plots.style import BLUE, GREY, label, new_figure, save, tick_logarithmic
from infformer.results import Study


def plot_study(path: Path) -> list[Path]:
    """Draw what each row gains over none, with its interval, beside the time of a token and the floats of a text.

    Args:
        path: `study.json`.

    Returns:
        The figure written, `study.png` beside the file; none where there is nothing to compare with.
    """
    study: Study = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = [(row, row["against_none"]["difference"]) for row in study["rows"] if row["against_none"] is not None]
    if not rows:
        return []
    figure = new_figure(11.5, 5.2)
    time, size = figure.subplots(1, 2, sharey=True)
    for axes, cost_of in (
        (time, lambda row: row["seconds_per_token"] and 1000 * row["seconds_per_token"]),
        (size, lambda row: row["floats"]),
    ):
        axes.axhline(0, color="black", linewidth=0.8)
        for row, difference in rows:
            cost = cost_of(row)
            if cost is None:
                continue
            if difference["interval"] is not None:
                axes.vlines(cost, *difference["interval"], color=GREY, linewidth=1)
            axes.plot([cost], [difference["nats_per_token"]], color=BLUE, marker="o", markersize=5)
            axes.annotate(
                row["name"], (cost, difference["nats_per_token"]), (4, 3), textcoords="offset points", fontsize=8
            )
    size.set_xscale("log")
    tick_logarithmic(size.xaxis)
    label(time, "By the time of a token", "ms a token", "nats per token less none's; below 0 is better")
    label(size, "By what is held of a text", "floats", "")
    return [save(figure, Path(path).parent / "study.png")]
