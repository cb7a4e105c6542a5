"""What norms do to gradients at initialisation, and which placement learns without a warm-up; tables and a figure.

python scripts/reproduce_norms.py
python scripts/reproduce_norms.py --initializer-range 0.02 --trained-depths --folder outputs/norms_002
python scripts/reproduce_norms.py --depths 6 12 --seeds 2 --trained-depths 12 --learning-rate 3e-4

The settings of arXiv 2002.04745: one head, matrices of width × width, uniform attention; then the text that ships, byte
by byte, with attention that learns and no limit to gradients. Stop it whenever you like: the same command goes on.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from grid import format_mean, make_rows, write_report
from torch import Tensor, nn

from infformer.data.options import DataConfig
from infformer.data.sources import read_documents
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.plots.norms import plot_norms
from infformer.results import NormResults, NormTraining

PLACEMENTS = ("post", "pre", "dual")
NORMS = {"layer": "LayerNorm", "rms": "RMSNorm"}
LAST = 20
"""Steps whose mean loss is that of the end."""


def main() -> None:
    """Read the options, measure what is not measured yet, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=(6, 12, 24, 48), help="at initialisation")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=8, help="whose mean is taken at initialisation")
    parser.add_argument("--initializer-range", type=float, help="of weights there; default: 1/√width")
    parser.add_argument("--trained-depths", nargs="*", type=int, default=(24, 6), help="none: nothing is trained")
    parser.add_argument("--trained-norms", nargs="+", choices=NORMS, default=("layer",))
    parser.add_argument("--trained-width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=160, help="of training")
    parser.add_argument("--warmups", nargs="+", type=int, default=(0, 80), help="steps of each")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--training-seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--folder", type=Path, default=Path("outputs/norms"))
    arguments = parser.parse_args()

    kinds = [{"placement": placement, "normalization": norm} for norm, placement in product(NORMS, PLACEMENTS)]
    of_start = {"width": arguments.width, "seeds": arguments.seeds, "initializer_range": arguments.initializer_range}
    starts = [{**kind, "depth": depth, **of_start} for kind, depth in product(kinds, arguments.depths)]
    of_training = {
        "width": arguments.trained_width,
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
    }
    trainings = [
        {**kind, **of_training, "depth": depth, "warmup": warmup, "seed": seed}
        for seed, depth, kind, warmup in product(
            arguments.training_seeds, arguments.trained_depths, kinds, arguments.warmups
        )
        if kind["normalization"] in arguments.trained_norms
    ]
    kept = arguments.folder / "runs.json"
    results: NormResults = {
        "initialisation": make_rows(starts, at_initialisation, kept, "initialising"),
        "training": make_rows(trainings, train, kept, "training"),
        "byte_frequencies": byte_frequencies(),
    }
    write_report(arguments.folder, "norms", results, format_tables(results), plot_norms)


def at_initialisation(
    placement: str, normalization: str, depth: int, width: int, seeds: int, initializer_range: float | None
) -> dict[str, Any]:
    """Of each layer the norm of the gradient of its last map, and ‖x‖²/d of what its last part adds up to.

    With dual norms besides how far two identities are from holding: what the model says without the norm of the sum,
    against a model with norms after the sum; the sum, against what entered and all that was added.
    """
    gradients, squares = torch.zeros(depth), torch.zeros(depth)
    sizes: dict[str, Any] = {
        "depth": depth, "width": width, "normalization": normalization, "initializer_range": initializer_range,
    }  # fmt: skip
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = new_model(placement, uniform=True, **sizes)
        layers: list[Any] = list(model.layers)
        added = [inputs_of(layer.feed_forward_residual.dropout) for layer in layers]
        normed = [inputs_of(layer.feed_forward_residual.norm) for layer in layers]
        tokens = torch.randint(model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(seed))
        model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
        for number, layer in enumerate(layers):
            gradients[number] += layer.feed_forward.contract.weight.grad.norm() / seeds
            stream = normed[number][0] + (added[number][0] if placement == "pre" else 0)
            squares[number] += stream.detach().square().sum(-1).mean() / width / seeds
    found: dict[str, Any] = {"gradients": gradients.tolist(), "squares": squares.tolist()}
    if placement == "dual":
        post = new_model("post", uniform=True, **sizes).double()
        found["identities"] = identities(model.double(), post, tokens)
    return found


@torch.no_grad()
def identities(dual: DecoderForCausalLM, post: DecoderForCausalLM, tokens: Tensor) -> dict[str, float]:
    """How far the two are from holding, as parts of the largest number that is compared; it changes the models."""
    layers: list[Any] = list(dual.layers)
    residuals = [residual for layer in layers for residual in (layer.attention_residual, layer.feed_forward_residual)]
    assert dual.final_norm is not None
    added, total = [inputs_of(residual.dropout) for residual in residuals], inputs_of(dual.final_norm)
    entered = inputs_of(layers[0].attention.query)
    dual(tokens)
    expected = entered[0] + torch.stack([part[0] for part in added]).sum(0)
    post.load_state_dict(dual.state_dict(), strict=False)
    for parameter in dual.final_norm.parameters():
        nn.init.zeros_(parameter)
    logits = post(tokens).logits
    return {
        "without_norm": float((dual(tokens).logits - logits).abs().max() / logits.abs().max()),
        "sum": float((total[0] - expected).abs().max() / expected.abs().max()),
    }


def new_model(
    placement: str, depth: int, width: int, normalization: str, initializer_range: float | None = None,
    uniform: bool = False,
) -> DecoderForCausalLM:  # fmt: skip
    """A decoder for bytes.

    Args:
        uniform: with attention that is the mean of the past at first, and matrices of width × width.
    """
    model = DecoderForCausalLM(
        DecoderConfig(
            vocab_size=256, hidden_size=width, num_hidden_layers=depth, num_attention_heads=1 if uniform else 2,
            feed_forward_size=width if uniform else 2 * width, positions="rotary", normalization=normalization,
            normalization_placement=placement, dropout=0.0, initializer_range=initializer_range,
        )
    )  # fmt: skip
    if uniform:
        attention: Any
        for attention in (layer.attention for layer in model.layers):
            nn.init.zeros_(attention.query.weight)
            nn.init.zeros_(attention.key.weight)
    return model


def inputs_of(module: nn.Module) -> list[Tensor]:
    """What it is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


def train(
    placement: str, normalization: str, depth: int, width: int, steps: int, warmup: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    """The loss of each step of learning by Adam, in nats per byte, 8 stretches of 32 bytes a step."""
    torch.manual_seed(seed)
    model = new_model(placement, depth, width, normalization)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))
    text, places = sample_bytes(), torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - 32, (8, 1), generator=places)
        stretches = text[starts + torch.arange(33)].long()
        loss = model(stretches[:, :-1], targets=stretches[:, 1:], return_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {"losses": losses}


@cache
def sample_bytes() -> Tensor:
    """The novels that ship, one after the other."""
    texts = (document.text for document in read_documents(DataConfig(), "train"))
    return torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8)


def byte_frequencies() -> float:
    """The loss of who knows nothing but how often each byte occurs, in nats."""
    counts = torch.bincount(sample_bytes().int()).double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def format_tables(results: NormResults) -> str:
    """Gradients by placement and depth, the two identities, and where training ended, in Markdown."""
    rows = results["initialisation"]
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    heads = " | ".join(f"depth {depth}" for depth in depths)
    lines = [f"| placement | norm | {heads} | ‖x‖²/d, depth {depths[-1]} |", "|---" * (len(depths) + 3) + "|"]
    for placement, norm in product(PLACEMENTS, NORMS):
        own = [row for row in rows if (row["placement"], row["normalization"]) == (placement, norm)]
        cells = [" / ".join(f"{value:.2f}" for value in _ends(row["gradients"])) for row in own]
        squares = " / ".join(f"{value:.3g}" for value in _ends(own[-1]["squares"]))
        lines.append(f"| {placement} | {NORMS[norm]} | {' | '.join(cells)} | {squares} |")
    worst = {
        name: max(row["identities"][name] for row in rows if "identities" in row) for name in ("without_norm", "sum")
    }
    lines += [
        "",
        "Norm of the gradient of the last map of the feed-forward part in the first / middle / last layer, and ‖x‖²/d "
        f"of what that part adds up to there, at first, the mean over {rows[0]['seeds']} seeds. In float64 "
        f"dual norms without the norm of the sum differ from norms after the sum by {worst['without_norm']:.1g} of the "
        f"largest logit, the sum from all that was added by {worst['sum']:.1g}.",
    ]
    trainings = results["training"]
    if trainings:
        lines += ["", *_training_table(trainings, results["byte_frequencies"])]
    return "\n".join(lines) + "\n"


def _training_table(rows: Sequence[NormTraining], frequencies: float) -> list[str]:
    columns = sorted({(row["depth"], row["warmup"]) for row in rows})
    heads = " | ".join(
        f"depth {depth}, " + (f"{warmup} steps of warm-up" if warmup else "no warm-up") for depth, warmup in columns
    )
    lines = [f"| placement | norm | {heads} |", "|---" * (len(columns) + 2) + "|"]
    for placement, norm in product(PLACEMENTS, dict.fromkeys(row["normalization"] for row in rows)):
        cells = []
        for column in columns:
            ends = [
                mean(math.nan if loss is None else loss for loss in row["losses"][-LAST:])
                for row in rows
                if (row["placement"], row["normalization"], row["depth"], row["warmup"]) == (placement, norm, *column)
            ]
            stuck = sum(not end < frequencies - 0.1 for end in ends)
            cells.append(format_mean(ends) + (f" ({stuck} of {len(ends)} stuck)" if stuck else ""))
        lines.append(f"| {placement} | {NORMS[norm]} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Loss in nats per byte, the mean of the last {LAST} of {rows[0]['steps']} steps and over seeds "
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))} ± half the range; width {rows[0]['width']}, "
        f"rate {rows[0]['learning_rate']:g}. Stuck: not 0.1 below {frequencies:.3f}, the loss of who knows nothing but "
        "how often each byte occurs.",
    ]


def _ends(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, the middle and the last."""
    return values[0], values[len(values) // 2], values[-1]


if __name__ == "__main__":
    command.run(main)
