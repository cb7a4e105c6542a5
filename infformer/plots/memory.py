"""What memories held and did along one document: `inspection.json` to figures beside it.

Up to eight layers each have a line or a panel of their own. More are rows of a heat map, and a few of them are lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from infformer.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    at_least,
    label,
    legend_below,
    new_figure,
    read_json,
    save,
    tick_logarithmic,
)
from infformer.results import DensityFigure, Inspection

# Of heads, in their order. Beyond the first five dashes tell them apart, not more colours.
HEAD_STYLES = [
    (colour, dashes) for dashes in ("-", "--", ":", "-.") for colour in (BLUE, ORANGE, GREEN, PURPLE, "black")
]
COLUMNS = 4
"""Panels beside each other in a figure with one for each layer."""
LINES = 8
"""Layers that are told apart as lines or panels; of more, a few are."""
FEW = 4
LEAST_COST, LEAST_RATIO = 0.01, 2.0
"""Nats per token, and times: an axis shows no less."""


def plot_inspection(inspection_json: Path) -> list[Path]:
    """Draw all that an inspection found.

    Returns:
        The figures written, beside the file.
    """
    inspection: Inspection = read_json(inspection_json)
    folder = Path(inspection_json).parent
    figures = {}
    if inspection["reconstruction"]:
        figures["reconstruction"] = _draw_reconstruction(inspection)
    figures["losses"] = _draw_losses(inspection)
    if inspection["reading"]["contribution"]:
        figures["contribution"] = _draw_contribution(inspection)
    if inspection["reading"]["centre"]:
        figures["density_centres"] = _draw_heads(
            inspection, "centre", "centre_spread", "Where the heads look", "place in the memory (1: newest)"
        )
        figures["density_tokens_back"] = _draw_heads(
            inspection, "tokens_back", None, "How far back the heads look", "tokens before the segment"
        )
        figures["density_widths"] = _draw_heads(
            inspection, "width", "width_spread", "How widely the heads look", "standard deviation (memory: 1)"
        )
    if inspection["writing"]:
        figures["sticky_samples"] = _draw_samples(inspection)
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _draw_reconstruction(inspection: Inspection) -> Figure:
    """R² by age after the last write, and over all of the past against how much had been written."""
    memory, measured = inspection["memory"], inspection["reconstruction"]
    layers, many = memory["layers"], len(memory["layers"]) > LINES
    figure = new_figure(14.6 if many else 10.4, 4.8)
    *heat, by_age, total = figure.subplots(1, 3 if many else 2, width_ratios=(1.3, 1, 1) if many else (1, 1))
    last = measured[-1]
    written = [each["segments"] * memory["segment_length"] for each in measured]
    for layer, (name, colour, marker) in _styles(layers):
        line = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
        by_age.plot(last["tokens_back"], _with_gaps(last["by_age"][layer]), **line, label=name)
        total.plot(written, _with_gaps([each["total"][layer] for each in measured]), **line, label=name)
        best = _with_gaps([each["best"][layer] for each in measured])
        total.plot(written, best, color=colour, linestyle="--", linewidth=1.2)
    for axes, ages in ((by_age, last["tokens_back"]), (total, written)):
        axes.set_xscale("log")
        axes.set_xlim(min(ages) / 1.3, max(ages) * 1.3)
        axes.axhline(0, color=GREY, linewidth=0.8)
        # What lies far below 0 is no memory at all; how far says nothing, and would hide the rest.
        axes.set_ylim(max(-0.6, axes.get_ylim()[0]), 1.02)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    label(by_age, f"What is left after {written[-1]:,} tokens", "age (tokens back)", "R² of a segment's hidden states")
    label(total, "What is left of all that was read", "tokens written", "R² of all hidden states")
    if many:
        length = memory["segment_length"]
        edges = [back - length / 2 for back in last["tokens_back"]] + [last["tokens_back"][-1] + length / 2]
        rows = [_with_gaps(ages) for ages in last["by_age"]]
        _draw_heat(heat[0], layers, edges, rows, "R² of a segment", Normalize(0, 1))
        label(heat[0], "What is left, in all layers", "age (tokens back)", "layer")
        heat[0].grid(visible=False)
        heat[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    lines, names = by_age.get_legend_handles_labels()
    best_line = Line2D([], [], color=GREY, linestyle="--", linewidth=1.2)
    legend_below(figure, [*lines, best_line], [*names, "best fit of as many coefficients"])
    return figure


def _draw_losses(inspection: Inspection) -> Figure:
    """What the document costs more without each layer's memory: in all, and segment by segment without any."""
    reading, layers, costs = inspection["reading"], inspection["memory"]["layers"], inspection["costs"]
    many = len(layers) > LINES
    figure = new_figure(12.4 if many else 10.4, 4.0)
    without, along = figure.subplots(1, 2, width_ratios=(1.4, 1) if many else (1, 1.4))
    ratios = [*costs["without_layer"], costs["without_memory"]]
    values = [math.nan if ratio["nats_per_token"] is None else ratio["nats_per_token"] for ratio in ratios]
    places = range(len(ratios))
    without.bar(places, values, color=[*[BLUE] * len(layers), ORANGE])
    _draw_intervals(without, places, [ratio["interval"] for ratio in ratios])
    for place, (value, ratio) in enumerate(zip(values, ratios, strict=True)):
        if not many and not math.isnan(value):
            above = max(0.0, value, *(ratio["interval"] or ()))
            without.annotate(
                f"{value:+.4f}", (place, above), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    step = math.ceil(len(layers) / 15)
    shown = [place for place in range(len(layers)) if place % step == 0 and place + step / 2 < len(layers)]
    without.set_xticks([*shown, len(layers)], [*(str(layers[place]) for place in shown), "all"])
    without.axhline(0, color="black", linewidth=0.8)
    without.margins(y=0.15)
    at_least(without, LEAST_COST)
    without.set_axisbelow(True)
    missing = sum(map(math.isnan, values))
    note = f" ({missing} without a bar: too few segments to have a turn)" if missing else ""
    label(without, "Loss without a memory", f"layer whose memory is empty{note}", "more nats per token")
    gains = [off - on for off, on in zip(reading["nats_without_memory"], reading["nats"], strict=True)]
    along.axhline(0, color="black", linewidth=0.8)
    along.plot(_tokens_read(inspection), gains, color=ORANGE, marker="o", markersize=3, linewidth=0.6, alpha=0.7)
    interval = costs["without_memory"]["interval"]
    if interval is not None:
        along.axhspan(*interval, color=ORANGE, alpha=0.15, linewidth=0)
    along.axhline(values[-1], color=ORANGE, linestyle="--", linewidth=1.5, label="mean")
    at_least(along, LEAST_COST)
    _label_along(along, "Without any, along the document", "more nats per token")
    lines, _ = along.get_legend_handles_labels()
    legend_below(figure, lines, ["mean; shaded, and thin lines: 95 % over segments"])
    return figure


def _draw_contribution(inspection: Inspection) -> Figure:
    layers, rows = inspection["memory"]["layers"], inspection["reading"]["contribution"]
    many = len(layers) > LINES
    figure = new_figure(11.6 if many else 7.2, 4.2)
    *heat, axes = figure.subplots(1, 2 if many else 1, squeeze=False)[0]
    for layer, (name, colour, marker) in _styles(layers):
        values = [row[layer] for row in rows]
        axes.plot(
            _tokens_read(inspection), values, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name
        )
    axes.set_ylim(bottom=0)
    _label_along(axes, "What the memory adds to self-attention", "‖memory‖ / ‖self-attention‖")
    if many:
        by_layer = [list(values) for values in zip(*rows, strict=True)]
        _draw_heat(heat[0], layers, _segment_edges(inspection), by_layer, "‖memory‖ / ‖self-attention‖", None)
        _label_along(heat[0], "In all layers", "layer")
        heat[0].grid(visible=False)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_heads(
    inspection: Inspection, name: DensityFigure, spread_name: DensityFigure | None, title: str, unit: str
) -> Figure:
    """A panel for each layer with a line for each head, and around it the spread over queries where it was measured.

    Of many layers a few have panels, and all are rows of a heat map: the mean over heads.
    """
    reading, tokens = inspection["reading"], _tokens_read(inspection)

    def lowest(value: float) -> float:
        """A logarithmic axis has no room for a spread down to zero."""
        return -math.inf if name == "centre" else value / 10

    def draw(axes: Axes, layer: int) -> None:
        heads = len(reading[name][0][layer])
        for head, (colour, dashes) in zip(range(heads), cycle(HEAD_STYLES), strict=False):
            middle = [layers[layer][head] for layers in reading[name]]
            axes.plot(
                tokens,
                middle,
                color=colour,
                linestyle=dashes,
                marker=".",
                markersize=3,
                linewidth=1.3,
                label=f"head {head}",
            )
            if spread_name is not None:
                spread = [layers[layer][head] for layers in reading[spread_name]]
                below = [max(centre - around, lowest(centre)) for centre, around in zip(middle, spread, strict=True)]
                above = [centre + around for centre, around in zip(middle, spread, strict=True)]
                axes.fill_between(tokens, below, above, color=colour, alpha=0.15, linewidth=0)
        if name == "centre":
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_yscale("log")
            at_least(axes, LEAST_RATIO)
            tick_logarithmic(axes.yaxis)

    means = [[sum(row[layer]) / len(row[layer]) for row in reading[name]] for layer in range(len(reading[name][0]))]
    norm = Normalize(0, 1) if name == "centre" else _logarithmic(means)
    return _draw_layers(inspection, draw, title, unit, means, norm)


def _draw_samples(inspection: Inspection) -> Figure:
    """A heat map for each layer: segment by place, how many times as many samples as if they were spread evenly."""
    writing, memory = inspection["writing"], inspection["memory"]
    shares = writing["sampled_places"]
    places = len(shares[0][0])
    edges = [segment * memory["segment_length"] for segment in writing["segment"]]
    edges.append(edges[-1] + memory["segment_length"])
    images = []

    def draw(axes: Axes, layer: int) -> None:
        density = [[places * row[layer][place] for row in shares] for place in range(places)]
        images.append(
            axes.pcolormesh(
                edges,
                [place / places for place in range(places + 1)],
                density,
                # From a quarter to four times as many as evenly; even is in the middle of the colours.
                norm=LogNorm(0.25, 4, clip=True),
                cmap="cividis",
                rasterized=True,
            )
        )
        axes.grid(visible=False)

    figure = _draw_layers(inspection, draw, "Where sticky memories sample the past", "place in the memory (1: newest)")
    bar = figure.colorbar(images[0], ax=figure.axes, label="samples, 1: as many as evenly", shrink=0.8, extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
    bar.minorticks_off()
    return figure


def _draw_layers(
    inspection: Inspection,
    draw: Callable[[Axes, int], None],
    title: str,
    unit: str,
    all_layers: Sequence[Sequence[float]] | None = None,
    norm: Normalize | None = None,
) -> Figure:
    """A figure with a panel for each layer, along the document; of many layers for a few, below a heat map of all.

    Args:
        all_layers: the rows of the heat map, with the colours of `norm`.
    """
    layers = inspection["memory"]["layers"]
    shown = _few(len(layers))
    columns = min(COLUMNS, len(shown))
    heat = len(layers) > LINES and all_layers is not None
    rows = math.ceil(len(shown) / columns) + heat
    figure = new_figure(1.2 + 3.4 * columns, 1.1 + 2.7 * rows)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(rows, columns)
    first = None
    for number, place in enumerate(shown):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(grid[row + heat, column], sharey=first)
        first = first or axes
        _label_along(axes, f"layer {layers[place]}", unit if column == 0 else "")
        draw(axes, place)
        axes.tick_params(labelleft=column == 0)
    lines, names = figure.axes[0].get_legend_handles_labels()
    if heat and all_layers is not None:
        axes = figure.add_subplot(grid[0, :])
        _draw_heat(axes, layers, _segment_edges(inspection), all_layers, unit, norm)
        _label_along(axes, "all layers, the mean over heads", "layer")
        axes.grid(visible=False)
    legend_below(figure, lines, names)
    return figure


def _draw_heat(
    axes: Axes,
    layers: Sequence[int],
    edges: Sequence[float],
    rows: Sequence[Sequence[float]],
    unit: str,
    norm: Normalize | None,
) -> None:
    """A row for each layer, the first at the bottom, and a bar that says what the colours mean."""
    image = axes.pcolormesh(
        edges, range(len(layers) + 1), rows, norm=norm or Normalize(0), cmap="cividis", rasterized=True
    )
    step = math.ceil(len(layers) / 10)
    shown = range(0, len(layers), step)
    axes.set_yticks([place + 0.5 for place in shown], [str(layers[place]) for place in shown])
    bar = axes.get_figure(root=True).colorbar(image, ax=axes, label=unit)  # type: ignore[union-attr]
    if isinstance(image.norm, LogNorm):
        tick_logarithmic(bar.ax.yaxis)


def _draw_intervals(axes: Axes, places: Sequence[int], intervals: Sequence[Sequence[float] | None]) -> None:
    known = [(place, *interval) for place, interval in zip(places, intervals, strict=True) if interval is not None]
    if known:
        axes.vlines(*zip(*known, strict=True), color="black", linewidth=1)


def _logarithmic(rows: Sequence[Sequence[float]]) -> LogNorm:
    """Colours between the lowest and the highest, and no less than a factor of two apart."""
    low, high = min(map(min, rows)), max(map(max, rows))
    missing = max(1.0, math.sqrt(LEAST_RATIO / (high / low)))
    return LogNorm(low / missing, high * missing)


def _label_along(axes: Axes, title: str, unit: str) -> None:
    label(axes, title, "tokens read", unit)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _few(layers: int) -> list[int]:
    """Which are lines or panels: all, or of many a few, evenly apart, with the first and the last."""
    if layers <= LINES:
        return list(range(layers))
    return [round(index * (layers - 1) / (FEW - 1)) for index in range(FEW)]


def _styles(layers: Sequence[int]) -> list[tuple[int, tuple[str, Any, str]]]:
    """Of each layer that is a line its place, name, colour and marker: from dark to light as they follow each other."""
    shown = _few(len(layers))
    shades = [index / max(1, len(shown) - 1) * 0.9 for index in range(len(shown))]
    return [
        (place, (f"layer {layers[place]}", colormaps["viridis"](shade), marker))
        for place, shade, marker in zip(shown, shades, cycle("osD^vP"), strict=False)
    ]


def _tokens_read(inspection: Inspection) -> list[int]:
    """Tokens of the document before each segment that found something in memory."""
    return [number * inspection["memory"]["segment_length"] for number in inspection["reading"]["segment"]]


def _segment_edges(inspection: Inspection) -> list[int]:
    read = _tokens_read(inspection)
    return [*read, read[-1] + inspection["memory"]["segment_length"]]


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
