"""What all figures have in common: a canvas without global state, colours, axes, and saving."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's palette, told apart under the common kinds of colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY = "#E69F00", "#56B4E9"
GREY = "#666666"


def read_json(path: Path) -> Any:
    """What a file of results holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Give a panel its title, its axes' names with units, and a grid."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, lines: Sequence[Any], names: Sequence[str]) -> None:
    """A legend under all panels, in as many columns as the figure is wide enough for."""
    if lines:
        columns = columns_of_legend(figure, names)
        figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def columns_of_legend(figure: Figure, names: Sequence[str]) -> int:
    """How many entries of a legend stand beside each other: all, or as many as the figure is wide enough for."""
    widths = [0.6 + 0.085 * len(name) for name in names]  # inches of an entry
    fits = sum(widths) <= figure.get_figwidth()
    return len(names) if fits else max(1, int(figure.get_figwidth() / max(widths)))


def mark(axes: Axes, places: Sequence[float], name: str) -> None:
    """Dotted lines across a panel, with one name for all of them in its legend."""
    for number, place in enumerate(places):
        axes.axvline(place, color="black", linestyle=":", label="_" if number else name)
    axes.legend(frameon=False, fontsize=9)


def at_least(axes: Axes, span: float) -> None:
    """A range of the vertical axis below which no variation is shown: what differs by less looks the same.

    Args:
        span: of a logarithmic axis the ratio of its ends.
    """
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        missing = (span / (high / low)) ** 0.5
        if missing > 1:
            axes.set_ylim(low / missing, high * missing)
    elif high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)


def tick_logarithmic(axis: Axis) -> None:
    """Numbers as they are along a logarithmic axis, also where that spans less than a decade."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def shorten(name: str, length: int) -> str:
    """A name that is too long without its middle: beginnings and ends tell names apart.

    Dollars in it are escaped, as between two of them matplotlib would read a formula, or fail to.
    """
    if len(name) > length:
        end = (length - 1) // 2
        name = f"{name[: length - 1 - end]}…{name[-end:]}"
    return name.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Save a figure as PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
