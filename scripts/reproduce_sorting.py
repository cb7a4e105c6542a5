"""Train every memory on the sorting task, several seeds each; write a table and a figure of accuracy against length.

python scripts/reproduce_sorting.py                                 # sorting_small, four memories, two seeds
python scripts/reproduce_sorting.py --experiment sorting_4k --folder outputs/sorting_4k
python scripts/reproduce_sorting.py --lengths 512 1024 -- training.max_steps=500

Stop it whenever you like: the same command goes on. Lengths given here are runs of their own, each trained on that length;
without them the experiment says what is trained and what is measured. Options of train.py may follow after --.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from grid import run_all

from infformer.plots.sorting import plot_accuracy_by_length

MEMORIES = ("short_term", "compressive", "long_term", "sticky")


def main() -> None:
    """Read the options, run the grid, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="sorting_small")
    parser.add_argument("--memories", nargs="+", default=MEMORIES, metavar="MEMORY", help=", ".join(MEMORIES))
    parser.add_argument("--lengths", nargs="+", type=int, help="train a model for each, instead of the experiment's")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--folder", type=Path, default=Path("outputs/sorting"))
    parser.add_argument("options", nargs="*", help="of train.py, for all runs")
    arguments = parser.parse_args()

    cells = [
        (memory, seed, length)
        for seed in arguments.seeds
        for length in arguments.lengths or [None]
        for memory in arguments.memories
    ]
    runs = {}
    for memory, seed, length in cells:
        options = [f"experiment={arguments.experiment}", f"model/memory={memory}", f"seed={seed}"]
        if length is not None:
            options += [f"task.length={length}", "task.training_lengths=[]", "task.evaluation_lengths=[]"]
        name = "_".join(map(str, [memory, f"seed{seed}", *([] if length is None else [length])]))
        runs[name] = options + arguments.options
    results = run_all(runs, arguments.folder)
    rows = [
        {"memory": memory, "seed": seed, **figures}
        for (memory, seed, _), result in zip(cells, results.values(), strict=True)
        for figures in result["lengths"]
    ]
    (arguments.folder / "accuracy.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table = format_table(rows)
    (arguments.folder / "accuracy.md").write_text(table, encoding="utf-8")
    print(table)
    for figure in plot_accuracy_by_length(arguments.folder / "accuracy.json"):
        print(f"drawn: {figure}")


def format_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy by memory and length, teacher forced / free running: the mean over seeds, and the spread if several."""
    lengths = sorted({row["length"] for row in rows})
    cells: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["memory"]][row["length"]].append(row)
        for counter, figures in row["ideal_counters"].items():
            cells[f"*{counter.replace('_', ' ')}*"][row["length"]].append(figures)
    lines = ["| | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    ordered = sorted(cells, key=lambda name: name.startswith("*"))
    for name in ordered:
        entries = [_cell(cells[name][length], "accuracy") for length in lengths]
        free = [_cell(cells[name][length], "accuracy_free_running") for length in lengths]
        both = [f"{forced} / {alone}" for forced, alone in zip(entries, free, strict=True)]
        lines.append(f"| {name} | " + " | ".join(both) + " |")
    return "\n".join(lines) + "\n"


def _cell(figures: list[dict[str, Any]], key: str) -> str:
    values = [each[key] for each in figures]
    if not values:
        return "–"
    spread = max(values) - min(values)
    return f"{mean(values):.2f}" + (f" ± {spread / 2:.2f}" if spread >= 0.005 else "")


if __name__ == "__main__":
    main()
