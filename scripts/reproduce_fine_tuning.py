"""ULMFiT's ablation: what each part of fine-tuning in three stages is worth, against a classifier from scratch.

python scripts/reproduce_fine_tuning.py --train train.jsonl --validation held_out.jsonl --test test.jsonl

The model that comes with the package is the first stage. The second learns the texts without their labels, once. The
last tells the classes apart, once for each row and seed; the row from scratch reads as many tokens as both stages.
The same command goes on where it was stopped. Writes fine_tuning.md. Options of train.py may follow after --.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import math
import time
from typing import Any

from grid import format_mean, new_parser, run_all

from infformer.durable import write_text
from infformer.models.folders import SHIPPED

GENERAL = f"{SHIPPED}tiny"
ALL_AT_ONCE = ["optimizer.layer_decay=1", "schedule=constant", "schedule.unfreeze_every=null"]
SCRATCH = "from scratch, as many tokens"
ROWS = {
    "three stages": [],
    SCRATCH: [*ALL_AT_ONCE, "model=tiny_scratch", "model.pretrained=null"],
    "without the second stage": [f"model.pretrained={GENERAL}"],
    "without gradual unfreezing": ["schedule.unfreeze_every=null"],
    "nor the slanted triangle": ["schedule=constant", "schedule.unfreeze_every=null"],
    "full, none of the three": ALL_AT_ONCE,
    "the head alone": [*ALL_AT_ONCE, "schedule.unfreeze_layers=0"],
}
"""The options of each row beside those of experiment=ulmfit_classifier."""


def main() -> None:
    """Read the options, make the runs that are still to be made, write what came out."""
    parser = new_parser(__doc__, "outputs/fine_tuning")
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}", required=True, metavar="FILE", help="texts with their labels")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, at most; default: 128")
    parser.add_argument("--batch", type=int, default=25, help="texts of a step; default: 25")
    parser.add_argument("--steps", type=int, default=60, help="of a classifier; default: 60")
    parser.add_argument("--task-steps", type=int, default=60, help="of the second stage; default: 60")
    parser.add_argument("--every", type=int, default=10, help="steps between two layers that join; default: 10")
    parser.add_argument("--memory", default="none", help="of the second stage and from scratch; default: none")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many; default: go on")
    chosen = parser.parse_args()
    until = time.monotonic() + 60 * chosen.minutes

    places = [f"data.{split}={getattr(chosen, split)}" for split in ("train", "validation", "test")]
    # A lane of the second stage reads as many tokens in a step as a text has.
    segments = max(1, chosen.length // 64)
    task = [
        "experiment=ulmfit_task", "data=text", *places[:2], "data.test=null", f"model.pretrained={GENERAL}",
        f"model/memory={chosen.memory}", f"training.max_steps={chosen.task_steps}",
        f"training.batch_size={chosen.batch}", f"training.bptt_segments={segments}",
        "training.evaluate_every=null", "training.checkpoint_every=null", "data.max_document_characters=1200",
        *chosen.options,
    ]  # fmt: skip
    shared = [
        "experiment=ulmfit_classifier", *places, f"task.length={chosen.length}", f"training.batch_size={chosen.batch}",
        f"training.bptt_segments={segments}", "training.evaluate_every=null", "training.checkpoint_every=null",
    ]  # fmt: skip
    steps = [f"training.max_steps={chosen.steps}", f"schedule.unfreeze_every={chosen.every}"]
    # Named by what no option of a classifier says: upon another second stage none of them is whole.
    second = f"task_{chosen.memory}_{chosen.task_steps}"
    pretrained = f"model.pretrained={chosen.folder / second}"
    whole = run_all({second: task}, chosen.folder, until)
    # Of what is typed twice the last holds.
    rows = {name: _last_of_each([*shared, *steps, pretrained, *options]) for name, options in ROWS.items()}
    longer = [f"training.max_steps={chosen.steps + chosen.task_steps}", f"model/memory={chosen.memory}"]
    rows[SCRATCH] = _last_of_each([*rows[SCRATCH], *longer])
    found: dict[str, list[Any]] = {name: [] for name in rows}
    for seed in chosen.seeds if whole else ():
        for name, options in rows.items():
            run = f"{name.replace(',', '').replace(' ', '_')}_seed{seed}"
            results = run_all({run: [*options, *chosen.options, f"seed={seed}"]}, chosen.folder, until)
            found[name] += results.values()
            write_text(chosen.folder / "fine_tuning.md", format_table(found))
    print(format_table(found))


def _last_of_each(options: list[str]) -> list[str]:
    """Of options that are typed twice the last."""
    return list({option.split("=", 1)[0]: option for option in options}.values())


def format_table(found: dict[str, list[Any]]) -> str:
    """A line for each row: the mean over seeds ± half the range."""
    lines = ["| fine-tuning | seeds | error on the test, % | nats |", "|---|---|---|---|"]
    for name, results in found.items():
        errors = [100 * (1 - result["accuracy"]) for result in results]
        nats = [result["nll"] for result in results]
        lines.append(f"| {name} | {len(results)} | {format_mean(errors, 1)} | {format_mean(nats, 3)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main)
