"""What scripts/benchmark.py measured: JSON lines to figures beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from infformer.plots.style import BLUE, GREY, ORANGE, label, new_figure, save
from infformer.results import BenchmarkLine

MEBIBYTE = 2**20


def plot_context(path: Path) -> Path:
    """Draw time and memory of reading a segment against how much of the document is in reach.

    Args:
        path: results of `stream`. The stream with memory is a line through all that it has read, each time beside an
            early segment's; the longer windows of attention are points, each a model of its own.

    Returns:
        The figure written, beside the file and under its name.
    """
    lines = [line for line in _read(path) if line["kind"] == "contestant"]
    late = next(line for line in lines if "times_early_by_segment" in line)
    early = next(line for line in lines if line["name"].endswith("early"))
    others = [line for line in lines if not line["name"].startswith("with memory")]
    segment = late["options"]["segment"]
    track = [(early["reach_tokens"], early["median_seconds"])]
    track += [(number * segment, early["median_seconds"] * times) for number, times in late["times_early_by_segment"]]
    track += [(late["reach_tokens"], late["median_seconds"])]

    figure = new_figure(10.5, 4.2)
    axes = figure.add_subplot(1, 2, 1)
    axes.plot(*zip(*((reach, 1e3 * seconds) for reach, seconds in track), strict=True), color=BLUE, label="with memory")
    _draw_windows(axes, others, lambda line: 1e3 * line["median_seconds"])
    _label(axes, "Time", f"milliseconds for a segment of {segment} tokens")
    axes = figure.add_subplot(1, 2, 2)
    both = [early, late]
    axes.plot([line["reach_tokens"] for line in both], [_held(line) for line in both], color=BLUE, label="with memory")
    _draw_windows(axes, others, _held)
    _label(axes, "Memory beside the weights", "MiB: remembered, and held at the peak")
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(_machine(late), fontsize=8)
    return save(figure, Path(path).with_suffix(".png"))


def plot_parts(path: Path) -> Path:
    """Draw what the parts of a training step take, beside their floors.

    Args:
        path: results of `step --parts`.

    Returns:
        The figure written, beside the file and under its name.
    """
    lines = _read(path)
    parts = [line for line in lines if line["kind"] == "part"]
    whole = next(line for line in lines if line["kind"] == "contestant")
    rows = [*parts, whole]
    figure = new_figure(8.5, 3.6)
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [line["median_seconds"] for line in rows], color=BLUE, height=0.6, label="measured")
    spread = [
        [line["median_seconds"] - line["quartiles_seconds"][0] for line in rows],
        [line["quartiles_seconds"][1] - line["median_seconds"] for line in rows],
    ]
    medians = [line["median_seconds"] for line in rows]
    axes.errorbar(medians, places, xerr=spread, color="black", linestyle="", capsize=3, linewidth=1)
    axes.barh(places, [line["floor_seconds"] for line in rows], color=ORANGE, height=0.25, label="floor")
    axes.set_yticks(places, [line["name"] for line in parts] + ["whole step"])
    axes.invert_yaxis()
    label(axes, "A training step with memory, and its parts", "seconds; bars between the quartiles", "")
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(_machine(whole), fontsize=8)
    return save(figure, Path(path).with_suffix(".png"))


def plot_attentions(path: Path) -> Path:
    """Draw time and memory of each mechanism of attention against the length of the text.

    Args:
        path: results of `attention`.

    Returns:
        The figure written, beside the file and under its name.
    """
    lines = [line for line in _read(path) if line["kind"] == "contestant"]
    tracks: dict[str, list[BenchmarkLine]] = {}
    for line in lines:
        tracks.setdefault(line["name"].rsplit(" ", 1)[0], []).append(line)
    figure = new_figure(11, 5)
    panels = {
        "Time": ("milliseconds, log scale", lambda line: 1e3 * line["median_seconds"]),
        "Memory beside the weights": ("MiB at the peak, log scale", lambda line: line["peak_extra_bytes"] / MEBIBYTE),
    }
    for number, (title, (unit, value)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 2, number)
        for place, (name, track) in enumerate(tracks.items()):
            is_baseline = name.startswith("softmax")
            axes.plot(
                [line["text_tokens"] for line in track],
                [value(line) for line in track],
                color="black" if is_baseline else f"C{place % 10}",
                linestyle="--" if name == "softmax written out" else "-",
                marker="osv^D<>ph*Xd"[place % 12],
                markersize=4,
                linewidth=1.2,
                label=name,
            )
        label(axes, title, "tokens of a text", unit)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({line["text_tokens"] for line in lines})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(_machine(lines[0]), fontsize=8)
    return save(figure, Path(path).with_suffix(".png"))


def _draw_windows(axes: Axes, lines: list[BenchmarkLine], value: Callable[[BenchmarkLine], float]) -> None:
    """Models without memory: a point for each."""
    points = [(line["reach_tokens"], value(line)) for line in lines]
    axes.plot(*zip(*points, strict=True), color=ORANGE, marker="o", linewidth=1, linestyle="--", label="window alone")


def _label(axes: Axes, title: str, unit: str) -> None:
    label(axes, title, "tokens of the document in reach", unit)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.axhline(0, color=GREY, linewidth=0.6)


def _held(line: BenchmarkLine) -> float:
    return (line["memory_bytes"] + line["peak_extra_bytes"]) / MEBIBYTE


def _machine(line: BenchmarkLine) -> str:
    machine = line["machine"]
    device = machine["name"]
    if machine["device"] == "cpu":
        device += f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{device}, torch {machine['torch']}, {machine['precision']}"


def _read(path: Path) -> list[BenchmarkLine]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
