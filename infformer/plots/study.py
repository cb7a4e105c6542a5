"""What memories gain, and what that costs: `study.json` to a figure beside it."""

from __future__ import annotations

from pathlib import Path

from infformer.plots.style import BLUE, GREEN, GREY, ORANGE, label, legend_below, new_figure, read_json, save
from infformer.results import Study

OPPONENTS = {
    "against_none": ("against none", BLUE, "o"),
    "against_cache": ("against a cache of as many floats", ORANGE, "s"),
    "on_short_term": ("on top of a short-term memory", GREEN, "^"),
}
LINEAR = 0.01
"""Nats per token: differences below are drawn to scale, larger ones by their logarithm."""


def plot_study(path: Path) -> list[Path]:
    """Draw by how much each row differs from its opponents, with intervals, beside its time and its floats.

    Returns:
        The figure written, `study.png` beside the file; none where there is nothing to compare with.
    """
    study: Study = read_json(path)
    rows = [row for row in study["rows"] if row["against_none"] is not None]
    if not rows:
        return []
    figure = new_figure(12.5, 1.9 + 0.42 * len(rows))
    gain, time, size = figure.subplots(1, 3, sharey=True, width_ratios=(3, 1, 1))
    gain.axvline(0, color="black", linewidth=0.8)
    for number, (opponent, (name, colour, marker)) in enumerate(OPPONENTS.items()):
        for place, row in enumerate(rows):
            compared = row[opponent]  # type: ignore[literal-required]
            if compared is None:
                continue
            difference, height = compared["difference"], place + 0.22 * (number - 1)
            if difference["interval"] is not None:
                gain.plot(difference["interval"], [height, height], color=colour, linewidth=1.2)
            gain.plot([difference["nats_per_token"]], [height], color=colour, marker=marker, markersize=5)
        gain.plot([], [], color=colour, marker=marker, linewidth=1.2, label=name)
    gain.set_xscale("symlog", linthresh=LINEAR)
    legend_below(figure, *gain.get_legend_handles_labels())
    places = list(range(len(rows)))
    time.barh(places, [1000 * (row["seconds_per_token"] or 0) for row in rows], color=GREY, height=0.6)
    size.barh(places, [row["floats"] for row in rows], color=GREY, height=0.6)
    size.set_xscale("log")
    gain.set_yticks(places, [row["name"].replace("_", " ") for row in rows], fontsize=9)
    gain.set_ylim(len(rows) - 0.4, -0.6)
    label(gain, "What it gains, with 95 % over documents", "nats per token; below 0 is better", "")
    label(time, "Time of reading", "ms a token", "")
    label(size, "Held of a text", "floats", "")
    return [save(figure, Path(path).parent / "study.png")]
