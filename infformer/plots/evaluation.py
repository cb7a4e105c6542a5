"""What an evaluation found: `results.json` to figures beside it."""

from __future__ import annotations

import math
from pathlib import Path

from infformer.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    at_least,
    label,
    legend_below,
    new_figure,
    read_json,
    save,
    shorten,
)
from infformer.results import (
    MEMORY_OF_ANOTHER_DOCUMENT,
    MEMORY_OFF,
    MEMORY_SHUFFLED_IN_TIME,
    RECENCY,
    Figures,
    Results,
)

# By the names of the controls: name, colour, marker.
CONTROLS = {
    MEMORY_OFF: ("memory off", GREY, "s"),
    MEMORY_OF_ANOTHER_DOCUMENT: ("memory of another document", ORANGE, "^"),
    MEMORY_SHUFFLED_IN_TIME: ("memory shuffled in time", GREEN, "v"),
}
HATCHES = {MEMORY_OFF: "", MEMORY_OF_ANOTHER_DOCUMENT: "///", MEMORY_SHUFFLED_IN_TIME: "..."}
"""Of bars: printed in grey, their colours are alike."""
# Up to so many documents are named along the axis; more would be illegible.
NAMED_DOCUMENTS = 40
LEAST_LOSS, LEAST_GAIN = 0.1, 0.01
"""Nats per token: an axis shows no less."""


def plot_results(results_json: Path) -> list[Path]:
    """Draw the results of an evaluation: loss by position in the document; with controls, what the memory gains, by
    where the token occurred last and by document.

    Returns:
        The figures written, in `plots/` beside the results file.
    """
    results: Results = read_json(results_json)
    directory = Path(results_json).parent / "plots"
    figures = []
    if results.get("by_position"):
        figures.append(_plot_positions(results, directory / "loss_by_position.png"))
    if results.get("controls") and results.get("by_recency"):
        figures.append(_plot_recency(results, directory / "gain_by_recency.png"))
    if results.get("controls") and results.get("per_document"):
        figures.append(_plot_documents(results, directory / "gain_by_document.png"))
    return figures


def _plot_positions(results: Results, path: Path) -> Path:
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    controls = results.get("controls", {})
    lines: list[tuple[Figures, str, str, str]] = [(results, "memory", BLUE, "o")]
    lines += [(controls[key], *style) for key, style in CONTROLS.items() if key in controls]
    for result, name, colour, marker in lines:
        bins = [entry for entry in result["by_position"] if entry["tokens"]]
        axes.plot(
            # The geometric middle of the interval, in tokens counted from 1, as the axis is logarithmic.
            [math.sqrt((entry["from"] + 1) * entry["to"]) for entry in bins],
            [entry["nll"] / entry["tokens"] for entry in bins],
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1.5,
            label=name,
        )
    axes.set_xscale("log")
    at_least(axes, LEAST_LOSS)
    legend_below(figure, *axes.get_legend_handles_labels())
    label(axes, "Loss by position", "distance from the document's start (tokens)", "nats per token")
    return save(figure, path)


def _plot_recency(results: Results, path: Path) -> Path:
    """By how much tokens get worse under each control, by where they occurred last.

    A long-term memory has to show in the second class.
    """
    own = {entry["previous_occurrence"]: entry for entry in results["by_recency"] if entry["tokens"]}
    classes = [name for name in RECENCY if name in own]
    tokens, nats = sum(own[name]["tokens"] for name in classes), sum(own[name]["nll"] for name in classes)
    controls = {key: style for key, style in CONTROLS.items() if key in results["controls"]}
    width = 0.8 / len(controls)
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    for number, (key, (name, colour, _)) in enumerate(controls.items()):
        losses = {entry["previous_occurrence"]: entry["nll"] for entry in results["controls"][key]["by_recency"]}
        places = [place + width * (number - (len(controls) - 1) / 2) for place in range(len(classes) + 1)]
        difference = results["controls"][key]["difference"]
        axes.bar(
            places,
            [
                *((losses[entry] - own[entry]["nll"]) / own[entry]["tokens"] for entry in classes),
                difference["nats_per_token"],
            ],
            width=0.9 * width,
            color=colour,
            hatch=HATCHES[key],
            edgecolor="white",
            label=name,
        )
        if difference["interval"] is not None:
            low, high = difference["interval"]
            axes.vlines(places[-1], low, high, color="black", linewidth=1)
    names = [
        f"{RECENCY[name]}\n{own[name]['tokens']:,} tokens\n{own[name]['nll'] / own[name]['tokens']:.2f} nats each"
        for name in classes
    ]
    names.append(f"all, with 95 % over documents\n{tokens:,} tokens\n{nats / tokens:.2f} nats each")
    axes.set_xticks(range(len(names)), names, fontsize=9)
    at_least(axes, LEAST_GAIN)
    legend_below(figure, *axes.get_legend_handles_labels())
    label(
        axes,
        "What the memory gains, by where the token occurred last",
        "",
        "rise under the control (nats per token)",
    )
    return save(figure, path)


def _plot_documents(results: Results, path: Path) -> Path:
    """By how much each document's perplexity rises when its own memory is taken away: above 0, that memory helped."""
    with_memory = _losses(results)
    gains = {
        key: {
            identifier: _percent(loss - with_memory[identifier])
            for identifier, loss in _losses(results["controls"][key]).items()
        }
        for key in CONTROLS
        if key in results["controls"]
    }
    # Sorted by the first control, so that a second one shows where it disagrees.
    first = next(iter(gains.values()))
    identifiers = sorted(first, key=lambda identifier: first[identifier])
    ranks = range(1, len(identifiers) + 1)
    named = len(identifiers) <= NAMED_DOCUMENTS

    figure = new_figure(7.2, max(3.2, 1.6 + 0.24 * len(identifiers)) if named else 6.0)
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    for key, gain in gains.items():
        name, colour, marker = CONTROLS[key]
        values = [gain.get(identifier, math.nan) for identifier in identifiers]
        size = 5.5 if named else 3
        axes.plot(values, ranks, linestyle="", marker=marker, markersize=size, color=colour, label=name)
    for rank, key in enumerate(gains):
        difference = results["controls"][key]["difference"]
        place, (_, colour, marker) = -0.6 * rank, CONTROLS[key]
        if difference["interval"] is not None:
            low, high = map(_percent, difference["interval"])
            axes.hlines(place, low, high, color=colour, linewidth=2)
        axes.plot([_percent(difference["nats_per_token"])], [place], color=colour, marker=marker)
    axes.axhline(0.5, color=GREY, linewidth=0.6)
    legend_below(figure, *axes.get_legend_handles_labels())
    label(
        axes,
        "What each document gains by its memory",
        "rise of perplexity under the control (%)",
        "" if named else "documents, in the order of their gain",
    )
    ticks = {-0.6 * (len(gains) - 1) / 2: "all, with 95 %"}
    if named:
        ticks |= {rank: shorten(str(identifier), 32) for rank, identifier in zip(ranks, identifiers, strict=True)}
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    return save(figure, path)


def _percent(nats: float) -> float:
    """By how much a perplexity rises with its nats."""
    return 100 * math.expm1(nats)


def _losses(result: Figures) -> dict[str, float]:
    """Nats per token of each document in which anything was scored."""
    return {entry["id"]: entry["nll"] / entry["tokens"] for entry in result["per_document"] if entry["tokens"]}
