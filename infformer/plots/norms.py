"""What norms do to gradients and to training: `norms.json` to a figure beside it."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, NullLocator

from infformer.plots.style import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, label, new_figure, read_json, save
from infformer.results import InitialGradients, NormResults, NormTraining

PLACEMENTS = {"post": "Norms after the sum", "pre": "Norms before the parts", "dual": "Both (ResiDual)"}
NORMS = {"layer": "LayerNorm", "rms": "RMSNorm"}
STYLES = [
    (BLUE, "-", "o"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    ("black", "-", "v"),
    (AMBER, "--", "P"),
    (SKY, "-.", "*"),
]
"""Of lines, in the order of their depths or their ways of training: colour, dashes and marker."""
STRETCH = 8
"""Steps whose mean is a point."""


def plot_norms(path: Path) -> list[Path]:
    """Draw the gradient of each layer at initialisation, a line for each depth, and the losses of what was trained.

    Args:
        path: `norms.json` of `scripts/reproduce_norms.py`.

    Returns:
        The figure written, `norms.png` beside the file.
    """
    found: NormResults = read_json(path)
    depths = sorted({row["depth"] for row in found["training"]})
    figure = new_figure(11, 0.6 + 3.1 * (len(NORMS) + len(depths)))
    parts = figure.subfigures(len(NORMS) + len(depths), 1, squeeze=False)[:, 0]
    for part, norm in zip(parts, NORMS, strict=False):
        _draw_gradients(part, norm, [row for row in found["initialisation"] if row["normalization"] == norm])
    for part, depth in zip(parts[len(NORMS) :], depths, strict=True):
        rows = [row for row in found["training"] if row["depth"] == depth]
        _draw_losses(part, depth, rows, found["byte_frequencies"])
    return [save(figure, Path(path).with_name("norms.png"))]


def _draw_gradients(figure: SubFigure, norm: str, rows: list[InitialGradients]) -> None:
    panels = figure.subplots(1, 3, sharey=True)
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    for axes, (placement, name) in zip(panels, PLACEMENTS.items(), strict=True):
        for depth, (colour, dashes, marker) in zip(depths, cycle(STYLES), strict=False):
            (gradients,) = (row["gradients"] for row in rows if (row["placement"], row["depth"]) == (placement, depth))
            axes.plot(
                range(1, depth + 1), gradients, color=colour, linestyle=dashes, marker=marker, markersize=4,
                markevery=[0, depth // 2, depth - 1], linewidth=1.3, label=f"{depth} layers",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([1, 3, *depths]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        label(axes, f"{name}, {NORMS[norm]}", "layer", "norm of the gradient" if axes is panels[0] else "")
    panels[0].set_ylim(bottom=0)
    _legend(figure, panels[0])


def _draw_losses(figure: SubFigure, depth: int, rows: list[NormTraining], frequencies: float) -> None:
    panels = figure.subplots(1, 3, sharey=True)
    ways = list(dict.fromkeys((row["normalization"], row["warmup"]) for row in rows))
    for axes, placement in zip(panels, PLACEMENTS, strict=True):
        for way, (colour, dashes, marker) in zip(ways, cycle(STYLES), strict=False):
            norm, warmup = way
            chosen = [
                row for row in rows if (row["placement"], row["normalization"], row["warmup"]) == (placement, *way)
            ]
            losses = np.array([row["losses"] for row in chosen], dtype=float).mean(0)
            stretches = losses[: len(losses) // STRETCH * STRETCH].reshape(-1, STRETCH).mean(1)
            steps = STRETCH * (np.arange(len(stretches)) + 0.5)
            name = f"{NORMS[norm]}, " + (f"{warmup} steps of warm-up" if warmup else "no warm-up")
            axes.plot(
                steps, stretches, color=colour, linestyle=dashes, marker=marker, markersize=4, markevery=3,
                linewidth=1.3, label=name,
            )  # fmt: skip
        axes.axhline(frequencies, color=GREY, linewidth=0.8)
        label(axes, f"{PLACEMENTS[placement]}, {depth} layers", "step", "nats per byte" if axes is panels[0] else "")
    panels[0].set_ylim(bottom=min(panels[0].get_ylim()[0], 0.85 * frequencies))
    panels[0].annotate(
        "how often each byte occurs", (0.02, frequencies), xycoords=("axes fraction", "data"), xytext=(0, -3),
        textcoords="offset points", va="top", fontsize=8, color=GREY,
    )  # fmt: skip
    _legend(figure, panels[0])


def _legend(figure: SubFigure, axes: Axes) -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
