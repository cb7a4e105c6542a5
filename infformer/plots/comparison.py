"""What a comparison of two models found: `comparison.json` to a figure beside it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from infformer.plots.style import BLUE, GREY, ORANGE, at_least, label, new_figure, read_json, save, shorten
from infformer.results import PARTS, RECENCY, Comparison, Difference, PositionRatio, RecencyRatio

LEAST_DIFFERENCE = 0.005
"""Nats per token: an axis shows no less."""
OCCURRED = dict(
    zip(RECENCY, ("occurred within the window", "occurred before the window", "did not occur before"), strict=True)
)


def plot_comparison(path: Path) -> list[Path]:
    """Draw by how much the second model is better or worse: by class of tokens, and on each document.

    Returns:
        The figure written, `comparison.png` beside the file.
    """
    comparison: Comparison = read_json(path)
    figure = new_figure(10.5, 4.8)
    _draw_classes(figure.add_subplot(1, 2, 1), comparison)
    _draw_documents(figure.add_subplot(1, 2, 2), comparison)
    models = [
        f"{name}: {shorten(run['checkpoint'], 150)}" for name, run in (("A", comparison["a"]), ("B", comparison["b"]))
    ]
    figure.suptitle("\n".join([*models, comparison["protocol"]]), fontsize=8)
    return [save(figure, Path(path).parent / "comparison.png")]


def _draw_classes(axes: Axes, comparison: Comparison) -> None:
    """The difference and its interval: of all tokens, by position, by where the token occurred last."""
    rows: list[tuple[str, Difference | PositionRatio | RecencyRatio]] = [("all tokens", comparison["difference"])]
    parts = comparison["parts"]
    if parts is not None:
        rows += [(name, parts[part]) for part, name in PARTS.items()]
    rows += [(f"tokens {place['from']:,} – {place['to']:,}", place) for place in comparison["by_position"]]
    rows += [(OCCURRED[place["previous_occurrence"]], place) for place in comparison["by_recency"]]
    values = [(name, row["nats_per_token"], row["interval"]) for name, row in rows]
    drawn = [(name, value, interval) for name, value, interval in values if value is not None]
    for place, (_, value, interval) in enumerate(drawn):
        if interval is not None:
            axes.plot(interval, [place, place], color=BLUE, linewidth=2)
        axes.plot([value], [place], color=BLUE, marker="o", markersize=5.5, linestyle="")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(drawn)), [name for name, _, _ in drawn], fontsize=8)
    axes.invert_yaxis()
    label(axes, "By kind of token, with 95 % intervals", "nats per token, B less A (below 0: B is better)", "")


def _draw_documents(axes: Axes, comparison: Comparison) -> None:
    """The difference on each document, in the order of the differences."""
    differences = sorted(document["nats_per_token"] for document in comparison["per_document"])
    places = range(1, len(differences) + 1)
    colours = [BLUE if difference < 0 else ORANGE for difference in differences]
    axes.vlines(places, 0, differences, color=GREY, linewidth=0.8)
    axes.scatter(places, differences, color=colours, s=18, zorder=3)
    axes.axhline(0, color="black", linewidth=0.8)
    at_least(axes, LEAST_DIFFERENCE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    better = sum(difference < 0 for difference in differences)
    title = f"By document: B is better on {better} of {len(differences)}"
    label(axes, title, "documents, in the order of the difference", "nats per token, B less A")
