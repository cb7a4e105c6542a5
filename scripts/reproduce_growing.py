"""Grow a decoder from 2 to 4 to 8 layers and from width 128 to 256, and train the largest from scratch at equal FLOPs.

python scripts/reproduce_growing.py
python scripts/reproduce_growing.py --steps 2000 --seeds 0 1 2 --folder outputs/growing_long

A quarter of the FLOPs goes to each of the two smaller models, half to the largest. Stop it whenever you like: the same
command goes on. Writes growing.md, growing.json and growing.png. Options of train.py may follow after --.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

from pathlib import Path
from typing import Any

import torch
from grid import check_measured, format_perplexity, new_parser, run_all, write_report
from torch.utils.flop_counter import FlopCounterMode

from infformer.config import CONF, RunConfig
from infformer.models.loading import new_decoder
from infformer.plots.growing import plot_growing
from infformer.training.command_line import compose
from infformer.training.metrics import read_metrics

STAGES: tuple[dict[str, int], ...] = (
    {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "feed_forward_size": 512},
    {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "feed_forward_size": 512},
    {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "feed_forward_size": 1024},
)
SHARES = (0.25, 0.25, 0.5)
"""Of the FLOPs of a run that grows."""
GROWN, SCRATCH = "grown", "from_scratch"
SHARED = [
    "model=decoder", "+model.architecture.normalization=rms", "+model.architecture.head_size=32",
    "training.batch_size=8", "training.segment_length=64", "data.max_held_out_characters=10000",
    "evaluation.controls=false", "evaluation.inspected_segments=0", "training.checkpoint_every=null",
]  # fmt: skip


def main() -> None:
    """Read the options, make the runs that are still to be made, write what came out."""
    parser = new_parser(__doc__, "outputs/growing")
    parser.add_argument("--steps", type=int, default=100, help="of the largest from scratch; default: 100")
    arguments = parser.parse_args()
    check_measured(arguments.options)

    shared = [*SHARED, *arguments.options]
    flops = [flops_of_a_step(compose("train", RunConfig, CONF, [*shared, *_sizes(stage)])) for stage in STAGES]
    steps = [max(1, round(arguments.steps * part * flops[-1] / each)) for part, each in zip(SHARES, flops, strict=True)]
    plans = {
        GROWN: ([*_sizes(STAGES[0]), f"growth=[{_growth(1, steps)}, {_growth(2, steps)}]"], steps, flops),
        SCRATCH: (_sizes(STAGES[-1]), [arguments.steps], flops[-1:]),
    }
    runs, rows = {}, {}
    for seed in arguments.seeds:
        for kind, (options, made, each) in plans.items():
            last, name = sum(made), f"{kind}_seed{seed}"
            often = [f"training.max_steps={last}", f"schedule.warmup_steps={last // 10}", "training.log_every=1"]
            runs[name] = [*shared, *options, *often, f"training.evaluate_every={max(1, last // 6)}", f"seed={seed}"]
            rows[name] = {"kind": kind, "seed": seed, "steps": made, "flops_of_a_step": each}
    results = run_all(runs, arguments.folder)
    for name, result in results.items():
        rows[name] |= {"perplexity": result["perplexity"]["token"], **curve_of(arguments.folder / name, rows[name])}
    found = list(rows.values())
    write_report(arguments.folder, "growing", {"rows": found}, format_table(found), plot_growing)


def flops_of_a_step(config: RunConfig) -> int:
    """What torch counts, forward and backward, of one step of a run."""
    training = config.training
    tokens = torch.zeros(training.batch_size, training.segment_length, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = new_decoder({**config.model.architecture, "vocab_size": 4096}, config.model.memory, tokens.shape[1])
    with FlopCounterMode(display=False) as counter:
        model.train()(tokens, targets=tokens).loss.backward()
    return training.bptt_segments * int(counter.get_total_flops())


def curve_of(folder: Path, row: dict[str, Any]) -> dict[str, list[list[float]]]:
    """The losses of a run against the FLOPs spent until then, and where it has grown."""
    curves: dict[str, list[list[float]]] = {"training": [], "validation": [], "growths": []}
    for line in read_metrics(folder / "metrics.jsonl"):
        left, spent = int(line["step"]), 0.0
        for made, each in zip(row["steps"], row["flops_of_a_step"], strict=True):
            spent += min(made, left) * each
            left -= min(made, left)
        for name, key in (
            ("training", "train/loss"),
            ("validation", "validation/loss"),
            ("growths", "growth/parameters"),
        ):
            if key in line:
                curves[name].append([spent, line[key]])
    return curves


def format_table(rows: list[dict[str, Any]]) -> str:
    """A line for each way to train, in Markdown."""
    lines = ["| trained | steps | FLOPs | perplexity | of each seed |", "|---|---|---|---|---|"]
    for kind in (GROWN, SCRATCH):
        own = [row for row in rows if row["kind"] == kind]
        spent = sum(made * each for made, each in zip(own[0]["steps"], own[0]["flops_of_a_step"], strict=True))
        found = [row["perplexity"] for row in own]
        lines.append(
            f"| {kind.replace('_', ' ')} | {' + '.join(map(str, own[0]['steps']))} | {spent:.3g} | "
            f"{format_perplexity(found)} | {', '.join(f'{each:.2f}' for each in found)} |"
        )
    return "\n".join(lines) + "\n"


def _sizes(stage: dict[str, int]) -> list[str]:
    return [f"model.architecture.{name}={size}" for name, size in stage.items()]


def _growth(stage: int, steps: list[int]) -> str:
    """The growth that makes a stage of the one before it, as it is typed."""
    larger = {name: size for name, size in STAGES[stage].items() if size != STAGES[stage - 1][name]}
    return f"{{step: {sum(steps[:stage])}, {', '.join(f'{name}: {size}' for name, size in larger.items())}}}"


if __name__ == "__main__":
    command.run(main)
