"""How a training run went: `metrics.jsonl` to `plots/training.png`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from infformer.plots.style import BLUE, GREEN, ORANGE, label, mark, new_figure, save

Records = list[dict[str, float | None]]


@dataclass(frozen=True)
class Curve:
    """One metric of a panel. One measured rarely is drawn with its points."""

    key: str
    name: str
    colour: str = BLUE
    points: bool = False
    dashes: str = "-"


@dataclass(frozen=True)
class Panel:
    """One question about a run."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False


PANELS = (
    Panel(
        "Loss",
        "nats per token",
        (Curve("train/loss", "training"), Curve("validation/loss", "validation", ORANGE, points=True)),
    ),
    Panel("Validation perplexity", "per token", (Curve("validation/perplexity", "validation", ORANGE, points=True),)),
    Panel(
        "Validation accuracy",
        "share of the answers",
        (Curve("validation/accuracy", "validation", ORANGE, points=True),),
    ),
    Panel(
        "Learning rate",
        "step size",
        (Curve("train/learning_rate", "backbone"), Curve("train/memory_learning_rate", "memory", GREEN, dashes="--")),
    ),
    Panel("Gradient norm", "before clipping", (Curve("train/gradient_norm", "all parameters"),), logarithmic=True),
    Panel("Divergence of the densities", "nats, times its weight", (Curve("train/divergence", "all layers"),)),
    Panel("Speed", "tokens per second", (Curve("train/tokens_per_second", "all processes"),)),
)


def plot_run(run_directory: Path) -> list[Path]:
    """Draw a run's metrics against the tokens it has read; panels without data are left out.

    Returns:
        The figures written; none if the run has no metrics yet.
    """
    lines = (Path(run_directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    # The run may still be writing: a line without its newline is not whole yet.
    records: Records = [json.loads(line) for line in lines if line[-1] == "\n"]
    panels = [panel for panel in PANELS if any(_points(records, curve.key) for curve in panel.curves)]
    if not panels:
        return []
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows)
    for number, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, number), panel, records)
    growths = _points(records, "growth/parameters")
    if growths:
        mark(figure.axes[0], [tokens for tokens, _ in growths], "the model grows")
    return [save(figure, Path(run_directory) / "plots" / "training.png")]


def _draw(axes: Axes, panel: Panel, records: Records) -> None:
    for curve in panel.curves:
        points = _points(records, curve.key)
        if points:
            tokens, values = zip(*points, strict=True)
            marker = "o" if curve.points or len(points) == 1 else ""
            axes.plot(tokens, values, curve.dashes, color=curve.colour, label=curve.name, linewidth=1.4, marker=marker)
    label(axes, panel.title, "tokens read", panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=9)


def _points(records: Records, key: str) -> list[tuple[float, float]]:
    """Tokens and values of one metric. A value that was not finite (null) is NaN: a gap in the curve."""
    return [
        (record["tokens"] or 0.0, math.nan if (value := record[key]) is None else value)
        for record in records
        if key in record
    ]
