"""What was found at which depth of texts of which length: results of a retrieval task to a heat map beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from infformer.plots.style import ORANGE, new_figure, read_json, save
from infformer.results import RetrievalCell, RetrievalResults

Measure = Literal["exact_match", "accuracy"]
MEASURES: dict[Measure, str] = {"exact_match": "whole answers, free running", "accuracy": "tokens, teacher forced"}
# Perceptually uniform, and the same to those who do not tell red from green.
COLOURS = "cividis"


def plot_retrieval(results_json: Path) -> list[Path]:
    """Draw accuracy by length and depth: a row of panels for each measure, a column for the model and each control.

    A line parts what stood within the model's window, below it, from what it can only know by its memory.

    Returns:
        The figure written, in `plots/` beside the results file; none if nothing was measured.
    """
    results: RetrievalResults = read_json(results_json)
    if not results.get("cells"):
        return []
    situations = {"this model": results["cells"]}
    situations |= {name.replace("_", " "): cells for name, cells in results["controls"].items()}
    lengths = sorted({cell["length"] for cell in results["cells"]})
    depths = sorted({cell["depth"] for cell in results["cells"]})
    figure = new_figure(
        1.6 + len(situations) * max(3.4, 1.2 + 0.75 * len(lengths)), 1.2 + len(MEASURES) * (1.2 + 0.4 * len(depths))
    )
    panels = figure.subplots(len(MEASURES), len(situations), squeeze=False)
    for row, (measure, description) in zip(panels, MEASURES.items(), strict=True):
        for axes, (situation, cells) in zip(row, situations.items(), strict=True):
            image = _draw_cells(axes, _grid(cells, measure, lengths, depths), lengths, depths)
            border = _draw_window(axes, lengths, depths, results["protocol"]["window"])
            axes.set_title(f"{situation}: {description}", loc="left", fontsize=10, fontweight="bold")
    figure.colorbar(image, ax=panels, label="part that is right", shrink=0.8)
    figure.suptitle(f"{results['protocol']['task']}, chance {results['chance']:.2g}")
    figure.legend(handles=[border], loc="outside lower center", frameon=False)
    return [save(figure, Path(results_json).parent / "plots" / "accuracy_by_length_and_depth.png")]


def _grid(cells: list[RetrievalCell], measure: Measure, lengths: list[int], depths: list[float]) -> NDArray[np.float64]:
    """One measure of every cell, [depths, lengths]."""
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell[measure]
    return grid


def _draw_cells(axes: Axes, grid: NDArray[np.float64], lengths: list[int], depths: list[float]) -> AxesImage:
    image = axes.imshow(grid, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        # The colours are dark below the middle and light above.
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.5 else "black")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("depth (0: beginning, 1: end)")
    return image


def _draw_window(axes: Axes, lengths: list[int], depths: list[float], window: int) -> Line2D:
    """The border between the depths that are farther from the end than the window is long, and the others."""
    edges = np.arange(len(lengths) + 1) - 0.5
    outside = np.array([sum((1 - depth) * length > window for depth in depths) for length in lengths])
    heights = np.clip(outside - 0.5, -0.5, len(depths) - 0.5)
    (line,) = axes.plot(
        np.repeat(edges, 2)[1:-1],
        np.repeat(heights, 2),
        color=ORANGE,
        linewidth=3,
        linestyle=(0, (3, 1)),
        clip_on=False,
        label=f"below: within the last {window:,} tokens, the most that is seen without long-term memory",
    )
    return line
