"""How many associations fast weights hold, by their rule and their features, beside softmax; a table and a figure.

python scripts/reproduce_capacity.py
python scripts/reproduce_capacity.py --mechanisms softmax sum_dpfp3 delta_dpfp3 --associations 100 600

The two experiments of arXiv 2102.11174, section 6.1: so many pairs of a key and a value are written, then every key is
asked for its last value. Keys are either all different, or drawn with replacement, each about twice. What keys and
queries are is learned for each length. Stop it whenever you like: the same command goes on.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import math
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from grid import format_mean, make_rows, write_report
from torch import Tensor

from infformer.errors import UserError
from infformer.memory.fast_weights import FastWeightMemoryConfig, Writes, advance, feature_size, features_of
from infformer.plots.capacity import EXPERIMENTS, plot_capacity
from infformer.results import CapacityRun

MECHANISMS = ("softmax", "sum_elu", "sum_dpfp1", "delta_elu", "delta_dpfp1")
WIDTH = 64
"""Numbers of a key before they become features."""
PUBLISHED = {
    ("different", "softmax"): {20: 0.001, 100: 0.000, 200: 0.000, 400: 0.000, 600: 0.054},
    ("different", "sum_elu"): {20: 0.001, 100: 0.172, 200: 0.343, 400: 0.422, 600: 0.452},
    ("different", "sum_dpfp1"): {20: 0.001, 100: 0.000, 200: 0.175, 400: 0.346, 600: 0.418},
    ("different", "sum_dpfp2"): {20: 0.000, 100: 0.001, 200: 0.000, 400: 0.166, 600: 0.326},
    ("different", "sum_dpfp3"): {20: 0.000, 100: 0.000, 200: 0.001, 400: 0.036, 600: 0.201},
    ("repeated", "sum_dpfp1"): {40: 0.105, 200: 0.117, 400: 0.239},
    ("repeated", "delta_elu"): {40: 0.001, 200: 0.161, 400: 0.342},
    ("repeated", "delta_dpfp1"): {40: 0.001, 200: 0.000, 400: 0.185},
    ("repeated", "delta_dpfp2"): {40: 0.001, 200: 0.085, 400: 0.001},
}
"""What the logs in the paper's repository, ischlag/fast-weight-transformers at ebe13ea, end with, by associations.

Texts with repeated keys are half as long there where they are measured as where they are learned."""


def main() -> None:
    """Read the options, train what is not trained yet, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="+", default=MECHANISMS, help="RULE_FEATURES, as the default; or softmax")
    parser.add_argument("--associations", nargs="+", type=int, default=(20, 100, 200, 400, 600))
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--folder", type=Path, default=Path("outputs/capacity"))
    arguments = parser.parse_args()

    for mechanism in arguments.mechanisms:
        if mechanism != "softmax":
            config_of(mechanism)
    runs = [
        {"keys": keys, "mechanism": mechanism, "associations": length, "steps": arguments.steps, "seed": seed}
        for seed, keys, length, mechanism in product(
            arguments.seeds, arguments.experiments, sorted(arguments.associations), arguments.mechanisms
        )
    ]
    rows = make_rows(runs, train, arguments.folder / "runs.json", "training")
    write_report(arguments.folder, "capacity", {"rows": rows}, format_table(rows), plot_capacity)


def train(keys: str, mechanism: str, associations: int, steps: int, seed: int) -> dict[str, Any]:
    """Learn what keys and queries are; then the loss ½‖answer − value‖² of all questions about new texts."""
    torch.manual_seed(seed)
    count = associations if keys == "different" else max(1, associations // 2)
    learned = torch.randn(count, WIDTH), torch.randn(count, WIDTH), torch.zeros(count)
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in learned], lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        loss = loss_of(mechanism, *learned, *new_text(keys, associations, count))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = [loss_of(mechanism, *learned, *new_text(keys, associations, count)).item() for _ in range(10)]
    return {"loss": mean(losses)}


def new_text(keys: str, associations: int, count: int) -> tuple[Tensor, Tensor]:
    """Which of the keys and of as many values stand in each pair, [associations]."""
    if keys == "different":
        return torch.randperm(count), torch.randperm(count)
    return torch.randint(count, (associations,)), torch.randint(count, (associations,))


def loss_of(mechanism: str, keys: Tensor, queries: Tensor, strength: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """The mean loss of asking for every key that stands in a text.

    Args:
        keys, queries: learned, [count, width].
        strength: of each key where it is written, before its sigmoid.
        chosen, values: of the text, [associations].
    """
    asked = chosen.unique()
    last = torch.full((len(keys),), -1).scatter_reduce(0, chosen, torch.arange(len(chosen)), "amax")
    one_hot = F.one_hot(values, len(keys)).float()
    found = read(mechanism, keys[chosen], one_hot, strength[chosen], queries[asked])
    return (found - one_hot[last[asked]]).square().sum(-1).mean() / 2


def read(mechanism: str, keys: Tensor, values: Tensor, strength: Tensor, queries: Tensor) -> Tensor:
    """What is found under each query after all pairs were written one after the other, [queries, values]."""
    if mechanism == "softmax":
        return torch.softmax(queries @ keys.T / math.sqrt(WIDTH), dim=-1) @ values
    config = config_of(mechanism)
    asked = features_of(queries, config)
    if config.rule == "sum":  # as in linear attention: written whole, and divided by the sum of all weights
        values, strength = F.pad(values, (0, 1), value=1.0), torch.full_like(strength, math.inf)
    written = Writes(features_of(keys, config), values, strength, torch.full_like(strength, -math.inf))
    weights = torch.zeros(1, 1, asked.shape[-1], values.shape[-1])
    after, _ = advance(weights, Writes(*(part[None, None] for part in written)), config.rule)
    found = asked @ after[0, 0]
    return found[:, :-1] / (found[:, -1:] + 1e-6) if config.rule == "sum" else found


def config_of(mechanism: str) -> FastWeightMemoryConfig:
    """The fast weights of that name, as `delta_dpfp2`.

    Raises:
        UserError: there are none.
    """
    rule, _, features = mechanism.partition("_")
    kind = features.rstrip("0123456789")
    try:
        return FastWeightMemoryConfig(rule=rule, features=kind, dpfp_order=int(features[len(kind) :] or 1))
    except ValueError as error:
        raise UserError(f"--mechanisms {mechanism}: name a rule and features, as {', '.join(MECHANISMS)}") from error


def format_table(rows: list[CapacityRun]) -> str:
    """The loss of each mechanism by the number of associations, the published one in brackets, in Markdown."""
    lengths = sorted({row["associations"] for row in rows})
    lines = [f"| keys | mechanism | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 2) + "|"]
    for keys, mechanism in dict.fromkeys((row["keys"], row["mechanism"]) for row in rows):
        published, cells = PUBLISHED.get((keys, mechanism), {}), []
        for length in lengths:
            chosen = (keys, mechanism, length)
            losses = [row["loss"] for row in rows if (row["keys"], row["mechanism"], row["associations"]) == chosen]
            cells.append(format_mean(losses, 3) + (f" ({published[length]:.3f})" if length in published else ""))
        lines.append(f"| {keys} | {mechanism.replace('_', ', ')} | {' | '.join(cells)} |")
    for size in sorted(
        {feature_size(WIDTH, config_of(row["mechanism"])) for row in rows if row["mechanism"] != "softmax"}
    ):
        cells = [f"{max(0, (1 - size / length) / 2):.3f}" for length in lengths]
        lines.append(f"| different | *{size} features at best* | {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"½‖answer − value‖², the mean over all questions about ten new texts after {rows[0]['steps']} steps, and over "
        f"seeds {', '.join(map(str, seeds))} ± half the range; in brackets the published one. Who answers nothing has "
        "0.5. At best: what so many features leave of so many different keys, (1 − features / keys) / 2.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main)
