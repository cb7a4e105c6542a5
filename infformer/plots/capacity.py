"""How many associations memories hold: `capacity.json` to a figure beside it."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from statistics import mean

from infformer.plots.style import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    label,
    legend_below,
    new_figure,
    read_json,
    save,
)
from infformer.results import CapacityRun

EXPERIMENTS = {"different": "Every key once", "repeated": "Keys with replacement, each about twice"}
STYLES = [
    (BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (AMBER, "v"), (SKY, "P"), ("#7A4E00", "*"),
]  # fmt: skip
"""Of mechanisms, in the order of the results: colour and marker."""
DASHES = {"softmax": ":", "sum": "--", "delta": "-"}


def plot_capacity(path: Path) -> list[Path]:
    """Draw the loss of each mechanism against the number of associations, a panel for each experiment.

    Args:
        path: `capacity.json` of `scripts/reproduce_capacity.py`.

    Returns:
        The figure written, `capacity.png` beside the file.
    """
    rows: list[CapacityRun] = read_json(path)["rows"]
    experiments = list(dict.fromkeys(row["keys"] for row in rows))
    figure = new_figure(1 + 4.8 * len(experiments), 4.6)
    panels = figure.subplots(1, len(experiments), sharey=True, squeeze=False)[0]
    for axes, experiment in zip(panels, experiments, strict=True):
        mechanisms = list(dict.fromkeys(row["mechanism"] for row in rows))
        for mechanism, (colour, marker) in zip(mechanisms, cycle(STYLES), strict=False):
            losses: dict[int, list[float]] = {}
            for row in rows:
                if (row["keys"], row["mechanism"]) == (experiment, mechanism):
                    losses.setdefault(row["associations"], []).append(row["loss"])
            axes.plot(
                list(losses), [mean(each) for each in losses.values()], color=colour, marker=marker, markersize=5,
                linewidth=1.4, linestyle=DASHES[mechanism.split("_")[0]], label=mechanism.replace("_", ", "),
            )  # fmt: skip
        axes.axhline(0.5, color=GREY, linewidth=0.8)
        axes.annotate("no answer", (0.01, 0.5), xycoords=("axes fraction", "data"), xytext=(0, 2),
                      textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
        label(axes, EXPERIMENTS[experiment], "associations", "½‖answer − value‖²" if axes is panels[0] else "")
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return [save(figure, Path(path).with_name("capacity.png"))]
