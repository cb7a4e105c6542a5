"""What long-term memories held and did along one document: `inspection.json` to figures beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from infformer.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, label, new_figure, save
from infformer.results import DensityFigure, Inspection, Readings

# Of heads, in their order. Beyond the first five dashes tell them apart, not more colours.
HEAD_STYLES = [(colour, dashes) for dashes in ("-", "--", ":") for colour in (BLUE, ORANGE, GREEN, PURPLE, "black")]
COLUMNS = 4
"""Panels beside each other in a figure with one for each layer."""


def plot_inspection(inspection_json: Path) -> list[Path]:
    """Draw all that an inspection found.

    Returns:
        The figures written, beside the file.
    """
    inspection: Inspection = json.loads(Path(inspection_json).read_text(encoding="utf-8"))
    folder = Path(inspection_json).parent
    figures = {
        "reconstruction": _draw_reconstruction(inspection),
        "losses": _draw_losses(inspection),
        "contribution": _draw_contribution(inspection),
        "density_centres": _draw_heads(
            inspection, "centre", "centre_spread", "Where the heads look", "place in the memory (1: newest)"
        ),
        "density_tokens_back": _draw_heads(
            inspection, "tokens_back", None, "How far back the heads look", "tokens before the segment"
        ),
        "density_widths": _draw_heads(
            inspection, "width", "width_spread", "How widely the heads look", "standard deviation (memory: 1)"
        ),
    }
    if inspection["writing"]:
        figures["sticky_samples"] = _draw_samples(inspection)
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _draw_reconstruction(inspection: Inspection) -> Figure:
    """R² by age after the last write, and over all of the past against how much had been written."""
    memory, measured = inspection["memory"], inspection["reconstruction"]
    figure = new_figure(10.4, 4.4)
    by_age, total = figure.subplots(1, 2)
    last = measured[-1]
    written = [each["segments"] * memory["segment_length"] for each in measured]
    for layer, (name, colour, marker) in enumerate(_layer_styles(memory["layers"])):
        line = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4, "label": name}
        by_age.plot(last["tokens_back"], _with_gaps(last["by_age"][layer]), **line)
        total.plot(written, _with_gaps([each["total"][layer] for each in measured]), **line)
    dashes = {"color": "black", "linestyle": "--", "linewidth": 1.2}
    by_age.axhline(last["limit"], **dashes)
    total.plot(written, [each["limit"] for each in measured], **dashes, label="limit N / tokens written")
    for axes, ages in ((by_age, last["tokens_back"]), (total, written)):
        axes.set_xscale("log")
        axes.set_xlim(min(ages) / 1.3, max(ages) * 1.3)
        axes.axhline(0, color=GREY, linewidth=0.8)
        # What lies far below 0 is no memory at all; how far says nothing, and would hide the rest.
        axes.set_ylim(max(-0.6, axes.get_ylim()[0]), 1.02)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    label(by_age, f"What is left after {written[-1]:,} tokens", "age (tokens back)", "R² of a segment's hidden states")
    label(total, "What is left of all that was read", "tokens written", "R² of all hidden states")
    _legend_below(figure, total)
    return figure


def _draw_losses(inspection: Inspection) -> Figure:
    """What the document costs more without each layer's memory: in all, and segment by segment without any."""
    reading, layers = inspection["reading"], inspection["memory"]["layers"]
    figure = new_figure(10.4, 3.8)
    without, along = figure.subplots(1, 2, width_ratios=(1, 1.4))
    costs = [
        _mean_over_tokens([rows[index] for rows in reading["nats_without_layer"]], reading)
        for index in range(len(layers))
    ]
    costs.append(_mean_over_tokens(reading["nats_without_memory"], reading))
    names = [*map(str, layers), "all"]
    bars = without.bar(names, costs, color=[*[BLUE] * len(layers), ORANGE])
    without.bar_label(bars, fmt="%+.4f", fontsize=8, padding=2)
    without.axhline(0, color="black", linewidth=0.8)
    without.margins(y=0.15)
    without.set_axisbelow(True)
    label(without, "Loss without a memory", "layer whose memory is empty", "more nats per token")
    gains = [off - on for off, on in zip(reading["nats_without_memory"], reading["nats"], strict=True)]
    along.axhline(0, color="black", linewidth=0.8)
    along.plot(_tokens_read(inspection), gains, color=ORANGE, marker="o", markersize=3, linewidth=0.6, alpha=0.7)
    along.axhline(costs[-1], color=ORANGE, linestyle="--", linewidth=1.5, label="mean")
    along.legend(frameon=False)
    _label_along(along, "Without any, along the document", "more nats per token")
    return figure


def _draw_contribution(inspection: Inspection) -> Figure:
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    series = zip(*inspection["reading"]["contribution"], strict=True)
    for (name, colour, marker), values in zip(_layer_styles(inspection["memory"]["layers"]), series, strict=True):
        axes.plot(
            _tokens_read(inspection), values, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name
        )
    axes.set_ylim(bottom=0)
    _label_along(axes, "What the memory adds to self-attention", "‖memory‖ / ‖self-attention‖")
    _legend_below(figure, axes)
    return figure


def _draw_heads(
    inspection: Inspection, name: DensityFigure, spread_name: DensityFigure | None, title: str, unit: str
) -> Figure:
    """A panel for each layer with a line for each head, and around it the spread over queries where it was measured."""
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
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())

    return _draw_layers(inspection, draw, title, unit)


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


def _draw_layers(inspection: Inspection, draw: Callable[[Axes, int], None], title: str, unit: str) -> Figure:
    """A figure with a panel for each layer, along the document."""
    layers = inspection["memory"]["layers"]
    columns = min(COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = new_figure(1.2 + 3.4 * columns, 1.1 + 2.7 * rows)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    first = None
    for place, layer in enumerate(layers):
        axes = figure.add_subplot(rows, columns, place + 1, sharey=first)
        first = first or axes
        _label_along(axes, f"layer {layer}", unit if place % columns == 0 else "")
        draw(axes, place)
        axes.tick_params(labelleft=place % columns == 0)
    lines, names = figure.axes[0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside lower center", ncols=min(8, len(lines)), frameon=False)
    return figure


def _label_along(axes: Axes, title: str, unit: str) -> None:
    label(axes, title, "tokens read", unit)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend_below(figure: Figure, axes: Axes) -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(7, len(lines)), frameon=False)


def _layer_styles(layers: Sequence[int]) -> list[tuple[str, Any, str]]:
    """Name, colour and marker of each layer: from dark to light as they follow each other."""
    shades = [index / max(1, len(layers) - 1) * 0.9 for index in range(len(layers))]
    return [
        (f"layer {layer}", colormaps["viridis"](shade), marker)
        for layer, shade, marker in zip(layers, shades, cycle("osD^vP"), strict=False)
    ]


def _tokens_read(inspection: Inspection) -> list[int]:
    """Tokens of the document before each segment that found something in memory."""
    return [number * inspection["memory"]["segment_length"] for number in inspection["reading"]["segment"]]


def _mean_over_tokens(nats: Sequence[float], reading: Readings) -> float:
    """By how much a loss is above that with all memories, over all tokens."""
    rows = zip(nats, reading["nats"], reading["tokens"], strict=True)
    return sum((off - on) * tokens for off, on, tokens in rows) / sum(reading["tokens"])


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
