"""A model that grew beside one that was trained from scratch: `growing.json` to a figure beside it."""

from __future__ import annotations

from pathlib import Path

from infformer.plots.style import BLUE, ORANGE, label, mark, new_figure, read_json, save

STYLES = {"grown": (BLUE, "-", "o"), "from_scratch": (ORANGE, "--", "s")}


def plot_growing(path: Path) -> list[Path]:
    """Draw the validation loss of each run against its FLOPs, with a dotted line wherever it grew.

    Returns:
        The figure written, `growing.png` beside the file.
    """
    rows = read_json(path)["rows"]
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        colour, dashes, marker = STYLES[row["kind"]]
        flops, losses = zip(*row["validation"], strict=True)
        first = row["kind"] not in [earlier["kind"] for earlier in rows[:number]]
        name = row["kind"].replace("_", " ") if first else "_"
        axes.plot(flops, losses, color=colour, linestyle=dashes, marker=marker, linewidth=1.4, label=name)
    label(axes, "Validation loss, a line a seed", "floating-point operations", "nats per token")
    mark(axes, sorted({spent for row in rows for spent, _ in row["growths"]}), "the model grows")
    return [save(figure, Path(path).parent / "growing.png")]
