"""How fast it is, as ratios of what ran side by side.

python scripts/benchmark.py decoder                     # a training step with short-term memory, against one without
python scripts/benchmark.py evaluation                  # what eval.py does, against the forward passes alone

Contestants take turns, step by step, in one process; of each the median is taken, after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import infformer
from infformer.data.options import DataConfig
from infformer.data.reading import read_once
from infformer.data.tokenization import tokenize_documents
from infformer.evaluation.perplexity import evaluate
from infformer.evaluation.reading import Reader
from infformer.memory.layer import MemoryConfig
from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.loading import load_tokenizer
from infformer.models.pretrained import InfformerForCausalLM


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
    evaluation = commands.add_parser("evaluation", help="perplexity with all its figures, against forward passes alone")
    evaluation.add_argument("--layers", type=int, default=12)
    evaluation.add_argument("--hidden", type=int, default=768)
    evaluation.add_argument("--heads", type=int, default=12)
    evaluation.add_argument("--vocabulary", type=int, default=50257)
    evaluation.add_argument("--segment", type=int, default=512)
    evaluation.add_argument("--documents", type=int, default=2, help="read side by side; up to 4")
    evaluation.add_argument("--segments", type=int, default=4, help="of each document")
    evaluation.add_argument("--rounds", type=int, default=5)
    evaluation.set_defaults(compare=compare_evaluation)
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


def compare_evaluation(arguments: argparse.Namespace) -> None:
    """Documents, bookkeeping and figures, without controls, beside the same segments read by the model alone."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    backbone = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=arguments.vocabulary,
            n_positions=arguments.segment,
            n_embd=arguments.hidden,
            n_layer=arguments.layers,
            n_head=arguments.heads,
        )
    )
    segment = arguments.segment
    memory = LongTermMemoryConfig(segment, basis_functions=segment, past_samples=segment, sticky=True)
    model = InfformerForCausalLM.from_backbone(backbone, memory).to(device).eval()
    tokenizer = load_tokenizer(str(Path(infformer.__file__).parent / "checkpoints" / "tiny"))
    novels = tokenize_documents(DataConfig(source="sample", max_documents=arguments.documents), "test", tokenizer)
    documents = novels.beginnings(len(novels) * (arguments.segments * segment + 1))
    reader = Reader(model, segment, len(documents), progress=False)
    segments = [read.to(device) for read in read_once(documents, len(documents), segment)]

    @torch.inference_mode()
    def forward_alone() -> None:
        memory = None
        for read in segments:
            memory = model(
                read.input_ids, memory=memory, reset=read.reset, shift_labels=read.shift_labels, lengths=read.lengths
            ).memory

    def whole_evaluation() -> None:
        evaluate(reader, documents)

    contestants = {"forward alone": forward_alone, "evaluation": whole_evaluation}
    seconds = _median_seconds(contestants, arguments.rounds, device)
    tokens = int((documents.token_counts - 1).sum())
    for name, taken in seconds.items():
        print(f"{name:<14} {tokens / taken:>10,.0f} tokens/s, {taken:.3f} s for {tokens:,} tokens")
    ratio = seconds["evaluation"] / seconds["forward alone"]
    print(f"evaluation / forward alone: {ratio:.3f} ({device}, {len(documents)} documents side by side)")


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
