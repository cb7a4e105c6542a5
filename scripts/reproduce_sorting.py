"""Train every memory on the sorting task, several seeds each; write a table and a figure of accuracy against length.

python scripts/reproduce_sorting.py                                 # sorting_small, four memories, two seeds
python scripts/reproduce_sorting.py --experiment sorting_4k --folder outputs/sorting_4k
python scripts/reproduce_sorting.py --lengths 512 1024 -- training.max_steps=500

Stop it whenever you like: the same command goes on. Lengths given here are runs of their own, each trained on that
length; without them the experiment says what is trained and what is measured. Options of train.py may follow after --.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

from collections import defaultdict

from grid import add_memories, chosen_memories, format_mean, new_parser, run_all, write_report

from infformer.plots.sorting import plot_accuracy_by_length
from infformer.results import Accuracies, SortingResults, SortingRun

MEMORIES = {
    "short_term": ["model/memory=short_term"],
    "compressive": ["model/memory=compressive"],
    "long_term": ["model/memory=long_term"],
    "sticky": ["model/memory=sticky"],
    "gibbs": ["model/memory=long_term", "model.memory.read=gibbs"],
    "dyadic": [
        "model/memory=long_term",
        "model.memory.contraction=dyadic",
        "model.memory.levels=8",
        "model.memory.read=slots",
        "model.memory.widths=[]",
    ],
    "fast_weight": ["model/memory=fast_weight"],
    "fast_weight_sum": ["model/memory=fast_weight", "model.memory.rule=sum"],
}
"""The options of each row."""


def main() -> None:
    """Read the options, run the grid, write what came out."""
    parser = new_parser(__doc__, "outputs/sorting")
    add_memories(parser, MEMORIES, list(MEMORIES)[:4])
    parser.add_argument("--experiment", default="sorting_small")
    parser.add_argument("--lengths", nargs="+", type=int, help="train a model for each, instead of the experiment's")
    arguments = parser.parse_args()

    rows = chosen_memories(arguments, MEMORIES)
    runs, trained = {}, {}
    for seed in arguments.seeds:
        for length in arguments.lengths or [None]:
            for memory, chosen in rows.items():
                name = f"{memory}_seed{seed}" + ("" if length is None else f"_length{length}")
                options = [f"experiment={arguments.experiment}", *chosen, f"seed={seed}"]
                if length is not None:
                    options += [f"task.length={length}", "task.training_lengths=[]", "task.evaluation_lengths=[]"]
                runs[name] = options + arguments.options
                trained[name] = (memory, seed)
    results: dict[str, SortingResults] = run_all(runs, arguments.folder)
    measured: list[SortingRun] = [
        {"memory": memory, "seed": seed, **figures}
        for name, (memory, seed) in trained.items()
        for figures in results[name]["lengths"]
    ]
    write_report(arguments.folder, "accuracy", measured, format_table(measured), plot_accuracy_by_length)


def format_table(rows: list[SortingRun]) -> str:
    """Accuracy by memory and length, and below that of the ideal counters, as a table in Markdown."""
    lengths = sorted({row["length"] for row in rows})
    models: dict[str, dict[int, list[Accuracies]]] = defaultdict(lambda: defaultdict(list))
    counters: dict[str, dict[int, list[Accuracies]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        models[row["memory"]][row["length"]].append(row)
        for counter, figures in row["ideal_counters"].items():
            counters[f"*{counter.replace('_', ' ')}*"][row["length"]].append(figures)
    lines = ["| memory | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, by_length in {**models, **counters}.items():
        lines.append(f"| {name} | " + " | ".join(_cell(by_length[length]) for length in lengths) + " |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"Accuracy teacher forced / free running on {rows[0]['sequences']} sequences of each length, the mean over "
        f"seeds {', '.join(map(str, seeds))} ± half the range. In italics: ideal counters.",
    ]
    return "\n".join(lines) + "\n"


def _cell(figures: list[Accuracies]) -> str:
    forced = format_mean([each["accuracy"] for each in figures])
    free = format_mean([each["accuracy_free_running"] for each in figures])
    return f"{forced} / {free}"


if __name__ == "__main__":
    command.run(main)
