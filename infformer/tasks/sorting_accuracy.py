"""How many places of the answer a model gets right, when it sorts symbols by their frequency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from infformer.evaluation.perplexity import Reader
from infformer.memory.state import MemoryState
from infformer.models.outputs import MemoryModelOutput
from infformer.tasks.ideal_counters import ideal_counters


@torch.inference_mode()
def measure_accuracy(
    reader: Reader, sequences: NDArray[np.int64], symbols: int, window: int, seed: int
) -> dict[str, Any]:
    """All that is measured on sequences of one length. The model is left in evaluation mode.

    Args:
        sequences: with their answers, [sequences, length + 1 + symbols]; all processes together.
        symbols: how many there are.
        window: how many of the last symbols a model without long-term memory would see.
        seed: of the ideal counters.

    Returns:
        `length`, `sequences`, what `evaluate_teacher_forced` returns, `accuracy_free_running` (by position too), where
        each place of the answer is predicted from the model's own answers before it, and the accuracies of the
        `ideal_counters`.
    """
    reader.model.eval()
    length = sequences.shape[1] - symbols - 1
    sums = torch.zeros(3, symbols, dtype=torch.float64)
    for tokens in _batches(reader, sequences, f"{length:,} symbols"):
        memory, first = _read_before_answer(reader, tokens, symbols)
        forced = _answer_forced(reader, tokens, memory, first, symbols)
        free = _answer_freely(reader, tokens, memory, first, symbols) == tokens[:, -symbols:]
        # On the CPU before it becomes float64, which not every accelerator has.
        sums += torch.stack([*forced, free]).cpu().double().sum(dim=1)
    accuracy, nll, free_running = _means(reader, sums, len(sequences))
    return {
        "length": length,
        "sequences": len(sequences),
        "nll": nll.mean().item(),
        "accuracy": accuracy.mean().item(),
        "accuracy_by_position": accuracy.tolist(),
        "accuracy_free_running": free_running.mean().item(),
        "accuracy_free_running_by_position": free_running.tolist(),
        "ideal_counters": ideal_counters(sequences, symbols, window, seed),
    }


@torch.inference_mode()
def evaluate_teacher_forced(
    reader: Reader, sequences: NDArray[np.int64], symbols: int, title: str = "teacher forced"
) -> dict[str, Any]:
    """Accuracy where each place of the answer is predicted from the true places before it, as published.

    Returns:
        `nll` (nats per symbol of the answer), `accuracy`, `accuracy_by_position` [symbols].
    """
    reader.model.eval()
    sums = torch.zeros(2, symbols, dtype=torch.float64)
    for tokens in _batches(reader, sequences, title):
        memory, first = _read_before_answer(reader, tokens, symbols)
        sums += torch.stack(_answer_forced(reader, tokens, memory, first, symbols)).cpu().double().sum(dim=1)
    accuracy, nll = _means(reader, sums, len(sequences))
    return {"nll": nll.mean().item(), "accuracy": accuracy.mean().item(), "accuracy_by_position": accuracy.tolist()}


@torch.inference_mode()
def answer_freely(reader: Reader, tokens: Tensor, symbols: int) -> Tensor:
    """The model's answers, the most likely token at each place, [rows, symbols].

    Args:
        tokens: sequences with their answers, int64 [rows, length + 1 + symbols], on the model's device; the answers are
            not looked at.
    """
    reader.model.eval()
    memory, first = _read_before_answer(reader, tokens, symbols)
    return _answer_freely(reader, tokens, memory, first, symbols)


def _answer_forced(
    reader: Reader, tokens: Tensor, memory: MemoryState | None, first: int, symbols: int
) -> list[Tensor]:
    """Which places are right, and the nats of each, both [rows, symbols], after what is before token `first`."""
    logits: list[Tensor] = []
    for segment in tokens[:, first:-1].split(reader.segment_length, dim=1):
        output = _read(reader, segment, memory)
        assert output.logits is not None
        memory = output.memory
        logits.append(output.logits)
    scores, answers = torch.cat(logits, dim=1)[:, -symbols:], tokens[:, -symbols:]
    nats = F.cross_entropy(scores.float().transpose(1, 2), answers, reduction="none")
    return [scores.argmax(dim=-1) == answers, nats]


def _answer_freely(reader: Reader, tokens: Tensor, memory: MemoryState | None, first: int, symbols: int) -> Tensor:
    """The most likely token at each place, after what is before token `first`."""
    segment = tokens[:, first:-symbols]
    answers: list[Tensor] = []
    while len(answers) < symbols:
        output = _read(reader, segment, memory)
        assert output.logits is not None
        answers.append(output.logits[:, -1].argmax(dim=-1))
        if segment.shape[1] == reader.segment_length:
            memory, segment = output.memory, segment[:, :0]
        segment = torch.cat([segment, answers[-1].unsqueeze(1)], dim=1)
    return torch.stack(answers, dim=1)


def _read_before_answer(reader: Reader, tokens: Tensor, symbols: int) -> tuple[MemoryState | None, int]:
    """Read the segments before the one that ends in the separator, or goes beyond it; the memory, and where that is."""
    separator = tokens.shape[1] - symbols - 1
    first = separator // reader.segment_length * reader.segment_length
    memory: MemoryState | None = None
    for start in range(0, first, reader.segment_length):
        segment = tokens[:, start : start + reader.segment_length]
        memory = _read(reader, segment, memory, return_logits=False).memory
    return memory, first


def _read(
    reader: Reader, segment: Tensor, memory: MemoryState | None, return_logits: bool | None = None
) -> MemoryModelOutput:
    with torch.autocast(segment.device.type, reader.precision, enabled=reader.precision != torch.float32):
        return reader.model(segment, memory=memory, return_logits=return_logits)


def _batches(reader: Reader, sequences: NDArray[np.int64], title: str) -> Iterator[Tensor]:
    """The sequences of this process, as many side by side as the reader allows, on the model's device."""
    share = torch.from_numpy(sequences[reader.process :: reader.processes])
    rows = -(-reader.batch_size // reader.processes)
    silent = None if reader.progress else True
    with tqdm(total=share.numel(), desc=title, unit="tok", unit_scale=True, disable=silent) as bar:
        for first in range(0, len(share), rows):
            tokens = share[first : first + rows].to(reader.model.device)
            yield tokens
            bar.update(tokens.numel())


def _means(reader: Reader, sums: Tensor, sequences: int) -> Tensor:
    return reader.reduce(sums.to(reader.model.device)).cpu() / sequences


def format_accuracy(results: dict[str, Any]) -> str:
    """A table of what `Sorting.measure` found: a line for each length, a column for the model and for each counter."""
    lengths, protocol = results["lengths"], results["protocol"]
    names = ["this model", *(name.replace("_", " ") for name in lengths[0]["ideal_counters"])]
    lines = [f"{'length':<8}" + "".join(f"{name:>17}" for name in names)]
    for figures in lengths:
        columns = [figures, *figures["ideal_counters"].values()]
        cells = [f"{column['accuracy']:.3f} / {column['accuracy_free_running']:.3f}" for column in columns]
        lines.append(f"{figures['length']:<8,}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append(
        f"accuracy teacher forced / free running, on {lengths[0]['sequences']} sequences of each length; segments of "
        f"{protocol['segment']} tokens, {protocol['reset']}, {protocol['dtype']}"
    )
    return "\n".join(lines)
