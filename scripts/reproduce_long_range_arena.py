"""Train every mechanism of attention on tasks of Long-Range Arena; write their accuracies beside the published ones.

python scripts/reproduce_long_range_arena.py --tasks listops --attentions softmax linear local
python scripts/reproduce_long_range_arena.py --set lra_release --seeds 0 1 2 --folder outputs/lra_release
python scripts/reproduce_long_range_arena.py --tasks listops -- training.max_steps=2000 training.batch_size=8
python scripts/reproduce_long_range_arena.py --speed outputs/benchmark/attention.jsonl   # and the trade-off, drawn

Stop it whenever you like: the same command goes on. Options of train.py may follow after --.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

from pathlib import Path
from statistics import mean

from grid import check_measured, format_mean, new_parser, run_all, write_report

from infformer.models.mechanisms import mechanism_kinds
from infformer.plots.long_range_arena import plot_trade_off
from infformer.results import ArenaRun, ClassificationResults

PUBLISHED = {
    "softmax": (36.37, 64.27, 57.46, 42.44, 71.40),
    "local": (15.82, 52.98, 53.39, 41.46, 66.63),
    "sparse": (17.07, 63.58, 59.59, 44.24, 71.71),
    "longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
    "reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
    "sinkhorn": (33.67, 61.20, 53.83, 41.23, 67.45),
    "synthesizer": (36.99, 61.68, 54.67, 41.61, 69.45),
    "bigbird": (36.05, 64.02, 59.29, 40.83, 74.87),
    "linear": (16.13, 65.90, 53.09, 42.34, 75.30),
    "performer": (18.01, 65.40, 53.82, 42.77, 77.05),
}
"""Per cent, of table 1 of arXiv 2011.04006; its code and its text name other sizes, so no run can be held to them."""
TASKS = ("listops", "text", "retrieval", "image", "pathfinder")


def main() -> None:
    """Read the options, run the grid, write what came out."""
    parser = new_parser(__doc__, "outputs/long_range_arena", (0,))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--attentions", nargs="+", default=sorted(mechanism_kinds()), choices=sorted(mechanism_kinds()))
    parser.add_argument("--set", default="lra_small", help="of sizes: lra_small, lra_release, lra_paper")
    parser.add_argument("--speed", type=Path, help="results of scripts/benchmark.py attention, for the trade-off")
    arguments = parser.parse_args()
    check_measured(arguments.options)
    if arguments.speed is not None and not arguments.speed.is_file():  # not to be found out after all runs
        parser.error(f"--speed {arguments.speed}: there is no such file; make it by scripts/benchmark.py attention")

    runs, trained = {}, {}
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for attention in arguments.attentions:
                name = f"{task}_{attention}_seed{seed}"
                chosen = [f"experiment=lra_{task}", f"model={arguments.set}", f"seed={seed}"]
                runs[name] = [*chosen, f"model.architecture.attention={attention}", *arguments.options]
                trained[name] = (task, attention, seed)
    results: dict[str, ClassificationResults] = run_all(runs, arguments.folder)
    rows: list[ArenaRun] = []
    for name, (task, attention, seed) in trained.items():
        found = results[name]
        row: ArenaRun = {
            "task": task,
            "attention": attention,
            "seed": seed,
            "accuracy": found["accuracy"],
            "examples": found["examples"],
            "baselines": found["baselines"],
        }
        if "attention_span" in found:
            row["attention_span"] = found["attention_span"]
        rows.append(row)
    write_report(arguments.folder, "accuracy", rows, format_table(rows))
    if arguments.speed is not None:
        print(f"drawn: {plot_trade_off(arguments.folder / 'accuracy.json', arguments.speed)}")


def format_table(rows: list[ArenaRun]) -> str:
    """Accuracy in per cent by mechanism and task, the published one in brackets, as a table in Markdown."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    lines = ["| attention | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for attention in dict.fromkeys(row["attention"] for row in rows):
        found = {
            task: [100 * row["accuracy"] for row in rows if (row["task"], row["attention"]) == (task, attention)]
            for task in tasks
        }
        published = dict(zip(TASKS, PUBLISHED.get(attention, ()), strict=False))
        cells = [
            format_mean(values, 1) + (f" ({published[task]:.1f})" if task in published else "")
            for task, values in found.items()
        ]
        lines.append(f"| {attention} | {' | '.join(cells)} | {mean(mean(values) for values in found.values()):.1f} |")
    of_task = {task: next(row["baselines"] for row in rows if row["task"] == task) for task in tasks}
    for name in dict.fromkeys(name for baselines in of_task.values() for name in baselines):
        cells = [f"{100 * of_task[task][name]:.1f}" if name in of_task[task] else "–" for task in tasks]
        lines.append(f"| *{name.replace('_', ' ')}* | {' | '.join(cells)} | |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"Accuracy in per cent, the mean over seeds {', '.join(map(str, seeds))} ± half the range; in brackets the "
        "published one. In italics: what is right without reading.",
    ]
    return "\n".join(lines) + "\n" + _format_spans(rows)


def _format_spans(rows: list[ArenaRun]) -> str:
    """How far away attention looks, for each run of softmax; nothing without one."""
    lines = ["", "| how far attention looks, in tokens | layer by layer | if alike on all tokens |", "|---|---|---|"]
    for row in rows:
        if (span := row.get("attention_span")) is not None:
            layers = ", ".join(f"{layer:.0f}" for layer in span["layers"])
            lines.append(f"| {row['task']}, seed {row['seed']} | {layers} | {span['even']:.0f} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


if __name__ == "__main__":
    command.run(main)
