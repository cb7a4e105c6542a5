"""How fast it is, as ratios of what ran side by side.

python scripts/benchmark.py decoder                     # a training step with short-term memory, against one without

Contestants take turns, step by step, in one process; of each the median is taken, after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from infformer.memory.layer import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM


def main() -> None:
    """Read the options and run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    decoder = commands.add_parser("decoder", help="the decoder with short-term memory, against the same without")
    decoder.add_argument("--positions", choices=("relative", "rotary"), default="relative")
    decoder.add_argument("--layers", type=int, default=4)
    decoder.add_argument("--hidden", type=int, default=256)
    decoder.add_argument("--heads", type=int, default=4)
    decoder.add_argument("--vocabulary", type=int, default=4096)
    decoder.add_argument("--segment", type=int, default=128)
    decoder.add_argument("--memory", type=int, default=128)
    decoder.add_argument("--batch", type=int, default=8)
    decoder.add_argument("--rounds", type=int, default=20)
    decoder.set_defaults(compare=compare_decoders)
    arguments = parser.parse_args()
    arguments.compare(arguments)


def compare_decoders(arguments: argparse.Namespace) -> None:
    """Training steps with and without short-term memory, beside what the attention lengths let one expect."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    lengths = {"without": 0, "with": arguments.memory}
    steps = {name: _training_step(arguments, length, device) for name, length in lengths.items()}
    seconds = _median_seconds(steps, arguments.rounds, device)
    work = {name: _multiplications(arguments, length) for name, length in lengths.items()}
    tokens = arguments.batch * arguments.segment
    for name, length in lengths.items():
        print(
            f"{name:<8} short-term memory of {length:>5} tokens: {tokens / seconds[name]:>10,.0f} tokens/s, "
            f"{1e3 * seconds[name]:.1f} ms a step, {work[name] / 1e6:.2f} M multiplications a token"
        )
    attention = (arguments.memory + arguments.segment) / arguments.segment
    print(
        f"throughput with / without: {seconds['without'] / seconds['with']:.3f}; by the multiplications "
        f"{work['without'] / work['with']:.3f}; by the attention lengths alone {1 / attention:.3f} ({device}, "
        f"{arguments.positions} positions)"
    )


def _multiplications(arguments: argparse.Namespace, memory: int) -> float:
    """Of one token of a forward pass, all layers and the vocabulary; backward takes twice as many again.

    Queries, outputs and feed-forward are computed for the segment, keys and values for all that attention sees. Scores
    and sums take one multiplication each per entry and channel, scores by distance one more.
    """
    hidden, seen = arguments.hidden, memory + arguments.segment
    by_segment = 2 * hidden**2 + 8 * hidden**2
    by_context = 2 * hidden**2 * seen / arguments.segment
    attention = (3 if arguments.positions == "relative" else 2) * seen * hidden
    return arguments.layers * (by_segment + by_context + attention) + arguments.vocabulary * hidden


def _training_step(arguments: argparse.Namespace, memory: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward and update, with a memory that is full."""
    config = DecoderConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        feed_forward_size=4 * arguments.hidden,
        positions=arguments.positions,
        memory=MemoryConfig(arguments.segment, memory) if memory else None,
    )
    model = DecoderForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(arguments.vocabulary, (arguments.batch, arguments.segment), device=device)
    full = None
    for _ in range(-(-memory // arguments.segment)):
        with torch.no_grad():
            full = model(tokens, memory=full, return_logits=False).memory

    def step() -> None:
        loss = model(tokens, shift_labels=tokens, memory=full).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _median_seconds(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Of each contestant, in turns; the first fifth of the rounds is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[rounds // 5 :]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
