"""What mechanisms of attention are worth beside what they cost: the trade-off of Long-Range Arena, as a figure."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from infformer.plots.style import BLUE, label, new_figure, read_json, save, tick_logarithmic
from infformer.results import ArenaRun, BenchmarkLine

BASELINE = "softmax written out"


def plot_trade_off(accuracies: Path, speeds: Path) -> Path:
    """Draw each mechanism's mean accuracy against its speed, as a circle whose area is its memory.

    Speed and memory are those of a layer on the longest text of the benchmark that softmax took part in, beside softmax
    with all weights in memory, as the published figure has it. Numbers in the circles stand for the names beside them.

    Args:
        accuracies: `accuracy.json` of `scripts/reproduce_long_range_arena.py`.
        speeds: results of `scripts/benchmark.py attention`.

    Returns:
        The figure written, `trade_off.png` beside the accuracies.
    """
    rows: list[ArenaRun] = read_json(accuracies)
    lines: list[BenchmarkLine] = [json.loads(line) for line in Path(speeds).read_text(encoding="utf-8").splitlines()]
    by_name = {line["name"]: line for line in lines if line["kind"] == "contestant"}
    length = max(line["text_tokens"] for name, line in by_name.items() if name.startswith(BASELINE))
    baseline = by_name[f"{BASELINE} {length}"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(8, 5.5)
    axes = figure.add_subplot()
    points = []
    for attention in dict.fromkeys(row["attention"] for row in rows):
        line = by_name.get(f"{attention} {length}")
        if line is None:
            continue
        speed = baseline["median_seconds"] / line["median_seconds"]
        memory = line["peak_extra_bytes"] / baseline["peak_extra_bytes"]
        score = mean(
            mean(row["accuracy"] for row in rows if (row["task"], row["attention"]) == (task, attention))
            for task in tasks
        )
        points.append((speed, 100 * score, memory, attention))
    names = []
    for number, (speed, score, memory, attention) in enumerate(sorted(points), start=1):
        axes.scatter(speed, score, s=2500 * memory, color=BLUE, alpha=0.25, edgecolor="black", linewidth=0.8)
        axes.annotate(str(number), (speed, score), ha="center", va="center", fontsize=9)
        names.append(f"{number:2}  {attention}, {memory:.2f}")
    axes.text(1.02, 0.5, "\n".join(names), transform=axes.transAxes, va="center", fontsize=9)
    axes.set_xscale("log")
    axes.margins(0.15)
    tick_logarithmic(axes.xaxis)
    label(
        axes,
        f"Accuracy on {', '.join(tasks)}, against speed; areas: memory",
        f"times as fast as softmax with all weights in memory, a layer on {length:,} tokens",
        "mean accuracy, per cent",
    )
    return save(figure, Path(accuracies).with_name("trade_off.png"))
