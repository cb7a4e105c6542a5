"""Draw how documents are read when they are measured: docs/images/protocols.png.

python scripts/draw_protocols.py
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from infformer.plots.style import BLUE, GREEN, ORANGE, new_figure, save

SEGMENT, TOKENS = 8, 20
COLOURS = {
    "scored in this window": BLUE,
    "seen by attention, scored before": "#9AD0F0",
    "in memory": GREEN,
    "another document, being read": ORANGE,
}


def main() -> None:
    """Three panels, one below the other: a row is a window, a unit of the axis a token."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figure = new_figure(9.5, 6.8)
    panels = figure.subplots(3, 1, height_ratios=[3, 7, 5], sharex=True)
    _draw(panels[0], SEGMENT, 0, "Disjoint segments (the default)")
    _draw(panels[1], SEGMENT // 4, 0, "Sliding window, stride = a quarter of the segment")
    _draw(panels[2], SEGMENT, 2 * SEGMENT, "After a warm-up document")
    panels[2].set_xlabel(f"token of the document, in segments of {SEGMENT}")
    handles = [Patch(facecolor=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    print(f"drawn: {save(figure, Path(__file__).parents[1] / 'docs' / 'images' / 'protocols.png')}")


def _draw(axes: Axes, stride: int, warmup: int, title: str) -> None:
    scored, seen, memory, other = COLOURS.values()
    names: list[str] = []
    for start in range(-warmup, 0, SEGMENT):
        _fill(axes, len(names), (-warmup, start, memory), (start, start + SEGMENT, other))
        names.append("warm-up")
    start = new = 0
    while new < TOKENS:
        stop = min(start + SEGMENT, TOKENS)
        written = -(-start // SEGMENT) * SEGMENT  # whole segments, which hold all that is before the window
        _fill(axes, len(names), (-warmup, written, memory), (start, new, seen), (new, stop, scored))
        names.append(f"window {len(names) + 1 - warmup // SEGMENT}")
        start, new = start + stride, stop
    axes.set_xlim(-2 * SEGMENT - 0.5, TOKENS + 0.5)
    axes.set_xticks(range(-2 * SEGMENT, TOKENS + 1, SEGMENT // 2))
    axes.set_ylim(len(names), -0.2)
    axes.set_yticks([row + 0.4 for row in range(len(names))], names, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def _fill(axes: Axes, row: int, memory: tuple[int, int, str], *window: tuple[int, int, str]) -> None:
    """A row: what is in memory as a thin bar below the window, as both may hold the same tokens."""
    axes.broken_barh([(memory[0], memory[1] - memory[0])], (row + 0.6, 0.25), facecolor=memory[2])
    for start, stop, colour in window:
        axes.broken_barh([(start, stop - start)], (row, 0.55), facecolor=colour, edgecolor="white", linewidth=0.5)


if __name__ == "__main__":
    command.run(main)
