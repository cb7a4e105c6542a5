"""One optimiser step: every lane of this process reads its next segments, then the weights change once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from infformer.data.lanes import Segment
from infformer.memory.state import MemoryState
from infformer.models.chunked_loss import NOT_SCORED
from infformer.models.outputs import MemoryModelOutput
from infformer.training.runtime import Accelerator


@dataclass(frozen=True)
class StepResult:
    """What a step measured; the same on every process."""

    loss: float
    """Nats per token, mean over the scored tokens of the global batch, without auxiliary losses."""
    auxiliary_losses: dict[str, float]
    """By name, already weighted."""
    gradient_norm: float
    """Before clipping."""
    scored_tokens: int
    """Tokens predicted by the global batch."""
    read_tokens: int
    """Tokens read by the global batch; more, where a task scores only a part of what is read."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient that is not a number; the weights are as they were before the step."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    parts: Sequence[Sequence[Segment]],
    memories: Sequence[MemoryState],
    gradient_clipping: float | None,
    sticky_offsets: Sequence[Sequence[Tensor | None]],
) -> tuple[list[MemoryState], StepResult]:
    """Forward, backward and update.

    The loss is the mean over all scored tokens of the global batch: it does not depend on how lanes are spread over
    processes and parts, although padding differs from lane to lane.

    A segment in which nothing is scored, in the whole global batch, reaches the loss through memory alone. It is read
    without a graph, so that a task which scores only the end of what is read pays for no backward pass through what
    comes before: gradients flow neither through such a segment nor past it, and it adds no auxiliary loss.

    Args:
        model: the prepared model.
        parts: the lanes of this process, cut into parts that are in memory one after the other; of each part its next
            segments, through which gradients flow together. At least one of them scores something.
        memories: each part's memory.
        sticky_offsets: of each part and segment; None for deterministic sampling.

    Returns:
        Each part's memory after its last segment, without graph, and what was measured.

    Raises:
        NonFiniteError: before the weights are touched.
    """
    scored_tokens = sum(segment.global_tokens for segment in parts[0])
    total_nats = torch.zeros((), device=accelerator.device)
    read_tokens = torch.zeros((), device=accelerator.device)
    auxiliary: dict[str, Tensor] = {}
    after = []
    for index, (segments, memory, offsets) in enumerate(zip(parts, memories, sticky_offsets, strict=True)):
        last = index == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            objective = torch.zeros((), device=accelerator.device)
            for segment, offset in zip(segments, offsets, strict=True):
                output = _read(model, segment, memory, offset)
                assert output.memory is not None
                memory = output.memory
                read_tokens += segment.lengths.sum()
                if segment.global_tokens == 0:
                    continue
                assert output.token_losses is not None
                assert output.auxiliary_losses is not None
                nats = output.token_losses.sum()
                share = (segment.shift_labels != NOT_SCORED).sum() / scored_tokens
                objective = objective + nats / scored_tokens + share * sum(output.auxiliary_losses.values())
                total_nats += nats.detach()
                for name, value in output.auxiliary_losses.items():
                    auxiliary[name] = auxiliary.get(name, 0) + share * value.detach()
            # Data parallel averages the gradients of the processes; the loss is a sum over them.
            accelerator.backward(objective * accelerator.num_processes)
        after.append(memory.detach())
    # Also the count of tokens as float32, which is exact up to 16 million.
    sums = accelerator.reduce(torch.stack([total_nats, read_tokens, *auxiliary.values()]), reduction="sum").tolist()
    loss = sums[0] / scored_tokens
    norm = float(accelerator.clip_grad_norm_(model.parameters(), gradient_clipping or math.inf))
    # With float16 an infinite gradient is how the scaler finds its scale; the optimiser then skips the step itself.
    if not math.isfinite(loss) or not (math.isfinite(norm) or accelerator.mixed_precision == "fp16"):
        optimizer.zero_grad()
        raise NonFiniteError(f"the loss is {loss}, the gradient's norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return after, StepResult(
        loss=loss,
        auxiliary_losses=dict(zip(auxiliary, sums[2:], strict=True)),
        gradient_norm=norm,
        scored_tokens=scored_tokens,
        read_tokens=int(sums[1]),
    )


def _read(model: nn.Module, segment: Segment, memory: MemoryState, sticky_offsets: Tensor | None) -> MemoryModelOutput:
    """Read a segment; without a graph, losses and logits where nothing is scored in the whole global batch."""
    scored = segment.global_tokens > 0
    with torch.set_grad_enabled(scored):
        return model(
            segment.input_ids,
            memory=memory,
            reset=segment.reset,
            shift_labels=segment.shift_labels if scored else None,
            lengths=segment.lengths,
            sticky_offsets=sticky_offsets,
            return_logits=False,
        )


def draw_sticky_offsets(segment: Segment, samples: int, seed: int) -> Tensor:
    """Random offsets for the sticky memories of a segment, in [0, 1), float32, [lanes, samples].

    A counter-based generator keyed by the lane, with the lane's number of segments as counter: the draw belongs to the
    lane and to its place in its stream, whatever the process; a resumed run draws the same.
    """
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, lane], counter=[0, 0, 0, read])).random(samples, np.float32)
        for lane, read in zip(segment.lanes.tolist(), segment.reads.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(draws)).to(segment.input_ids.device)
