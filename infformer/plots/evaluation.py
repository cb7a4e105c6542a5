"""What an evaluation found: `results.json` to figures beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from infformer.plots.style import BLUE, GREEN, GREY, ORANGE, label, new_figure, save
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
# Up to so many documents are named along the axis; more would be illegible.
NAMED_DOCUMENTS = 40


def plot_results(results_json: Path) -> list[Path]:
    """Draw the results of an evaluation: loss by position in the document; with controls, what the memory gains, by
    where the token occurred last and by document.

    Returns:
        The figures written, in `plots/` beside the results file.
    """
    results: Results = json.loads(Path(results_json).read_text(encoding="utf-8"))
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
    axes.legend(frameon=False)
    label(axes, "Loss by position", "distance from the document's start (tokens)", "nats per token")
    return save(figure, path)


def _plot_recency(results: Results, path: Path) -> Path:
    """By how much tokens get worse under each control, by where they occurred last.

    A long-term memory has to show in the second class.
    """
    own = {entry["previous_occurrence"]: entry for entry in results["by_recency"] if entry["tokens"]}
    classes = [name for name in RECENCY if name in own]
    controls = {key: style for key, style in CONTROLS.items() if key in results["controls"]}
    width = 0.8 / len(controls)
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    for number, (key, (name, colour, _)) in enumerate(controls.items()):
        losses = {entry["previous_occurrence"]: entry["nll"] for entry in results["controls"][key]["by_recency"]}
        axes.bar(
            [place + width * (number - (len(controls) - 1) / 2) for place in range(len(classes))],
            [(losses[entry] - own[entry]["nll"]) / own[entry]["tokens"] for entry in classes],
            width=0.9 * width,
            color=colour,
            label=name,
        )
    names = [
        f"{RECENCY[name]}\n{own[name]['tokens']:,} tokens\n{own[name]['nll'] / own[name]['tokens']:.2f} nats each"
        for name in classes
    ]
    axes.set_xticks(range(len(classes)), names)
    figure.legend(loc="outside lower center", ncols=len(controls), frameon=False)
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
            identifier: 100 * math.expm1(loss - with_memory[identifier])
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
    figure.legend(loc="outside lower center", ncols=len(gains), frameon=False)
    label(
        axes,
        "What each document gains by its memory",
        "rise of perplexity under the control (%)",
        "" if named else "documents, in the order of their gain",
    )
    if named:
        axes.set_yticks(ranks, [_shorten(str(identifier)) for identifier in identifiers], fontsize=8)
    return save(figure, path)


def _losses(result: Figures) -> dict[str, float]:
    """Nats per token of each document in which anything was scored."""
    return {entry["id"]: entry["nll"] / entry["tokens"] for entry in result["per_document"] if entry["tokens"]}


def _shorten(name: str, length: int = 32) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
