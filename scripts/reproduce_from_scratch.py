"""Train decoders that differ in their memory on the same text, several seeds each; write a table of their perplexities.

python scripts/reproduce_from_scratch.py                            # the four small experiments, two seeds
python scripts/reproduce_from_scratch.py --folder outputs/wt103 --experiments wt103_transformer_xl wt103_infformer
python scripts/reproduce_from_scratch.py --seeds 0 -- data.repository=FOLDER

Stop it whenever you like: the same command goes on. Options of train.py may follow after --.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

from pathlib import Path
from typing import Any

from grid import check_measured, format_perplexity, new_parser, run_all, write_report
from omegaconf import OmegaConf

from infformer.results import Results

EXPERIMENTS = tuple(f"wt103_{row}_small" for row in ("transformer_xl", "compressive", "infformer", "infformer_sticky"))
COLUMNS = ("per_token", "per_word", "memory_off", "memory_of_another_document")


def main() -> None:
    """Read the options, run the grid, write what came out."""
    parser = new_parser(__doc__, "outputs/from_scratch")
    parser.add_argument(
        "--experiments", nargs="+", default=EXPERIMENTS, metavar="EXPERIMENT", help="of conf/experiment"
    )
    arguments = parser.parse_args()
    check_measured(arguments.options)

    runs, cells = {}, {}
    for seed in arguments.seeds:
        for experiment in arguments.experiments:
            name = f"{experiment}_seed{seed}"
            runs[name] = [f"experiment={experiment}", f"seed={seed}", *arguments.options]
            cells[name] = {"experiment": experiment, "seed": seed}
    results = run_all(runs, arguments.folder)
    rows = [{**cells[name], **describe(arguments.folder / name, result)} for name, result in results.items()]
    write_report(arguments.folder, "perplexity", rows, format_table(rows))


def describe(folder: Path, results: Results) -> dict[str, Any]:
    """How large the model of a run is, how much it remembers, and its perplexities."""
    memory = OmegaConf.load(folder / "config.yaml").model.memory or {}  # null of a model that remembers nothing
    return {
        "parameters": results["sizes"]["backbone_parameters"] + results["sizes"]["memory_parameters"],
        "vectors": sum(memory.get(name, 0) for name in ("short_term_length", "length", "basis_functions")),
        "per_token": results["perplexity"]["token"],
        "per_word": results["perplexity"]["word"],
        **{name: control["perplexity"]["token"] for name, control in results["controls"].items()},
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """A line for each experiment, in Markdown."""
    lines = [
        "| experiment | parameters | vectors | per token | per word | memory off | another document's memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        seeds = [row for row in rows if row["experiment"] == experiment]
        sizes = f"{seeds[0]['parameters']:,} | {seeds[0]['vectors']}"
        figures = (format_perplexity([row[column] for row in seeds if column in row]) for column in COLUMNS)
        lines.append(f"| {experiment} | {sizes} | {' | '.join(figures)} |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"Perplexity on the test documents, by default per token, the geometric mean over seeds "
        f"{', '.join(map(str, seeds))} ± half the range. Vectors: those that a layer remembers, in all its memories.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main)
