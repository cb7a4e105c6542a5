"""One optimiser step: every lane of this process reads its next segments, then the weights change once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from infformer.data.segments import Segment
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModelOutput
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.training.metrics import StepResult
from infformer.training.runtime import Accelerator


@dataclass(frozen=True)
class Microbatch:
    """Lanes of this process that are read side by side in one step."""

    segments: Sequence[Segment]
    """The next segments of these lanes, through which gradients flow together."""
    memory: ModelState
    noise: Sequence[Tensor | None]
    """Random numbers for each segment; None for deterministic sampling."""
    without_memory: Sequence[Tensor | None]
    """Lanes that read each segment without their memory; None: no lane does."""
    dropout_seed: int


class NonFiniteError(ArithmeticError):
    """A loss or a gradient that is not a number."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    microbatches: Sequence[Microbatch],
    gradient_clipping: float | None,
) -> tuple[list[ModelState], StepResult]:
    """Make one optimiser step: forward, backward and update.

    The loss is the mean over all scored tokens of the global batch: it does not depend on how lanes are spread over
    processes and microbatches, although padding differs from lane to lane.

    A segment in which nothing is scored, in the whole global batch, reaches the loss through memory alone. It is read
    without a graph, so that a task which scores only the end of what is read pays for no backward pass through what
    comes before: gradients flow neither through such a segment nor past it, and it adds no auxiliary loss.

    Args:
        model: the prepared model.
        microbatches: the lanes of this process, cut into pieces that are in memory one after the other. At least one of
            their segments scores something.

    Returns:
        Each microbatch's memory after its last segment, without graph, and what was measured.

    Raises:
        NonFiniteError: on all processes. Before the weights are touched; with DeepSpeed, which does backward and update
            in one, a gradient that is not finite is found after them.
    """
    scored_tokens = sum(segment.global_tokens for segment in microbatches[0].segments)
    measured = torch.zeros(2, device=accelerator.device)  # nats, tokens read
    auxiliary: dict[str, Tensor] = {}
    after = []
    loss, sums = math.nan, list[float]()
    for index, microbatch in enumerate(microbatches):
        # Dropout belongs to the lanes of a microbatch, whichever process has them.
        torch.manual_seed(microbatch.dropout_seed)
        with accelerator.accumulate(model):
            memory, objective = microbatch.memory, torch.zeros((), device=accelerator.device)
            drawn = zip(microbatch.segments, microbatch.noise, microbatch.without_memory, strict=True)
            for segment, noise, without_memory in drawn:
                output = _read(model, segment, memory, noise, without_memory)
                assert output.state is not None
                memory = output.state
                measured[1] += segment.lengths.sum()
                if segment.global_tokens == 0:
                    continue
                assert output.token_losses is not None
                assert output.auxiliary_losses is not None
                nats = output.token_losses.sum()
                share = (segment.targets != IGNORE_INDEX).sum() / scored_tokens
                objective = objective + nats / scored_tokens + share * sum(output.auxiliary_losses.values())
                measured[0] += nats.detach()
                for name, value in output.auxiliary_losses.items():
                    auxiliary[name] = auxiliary.get(name, 0) + share * value.detach()
            after.append(memory.detach())
            if index == len(microbatches) - 1:
                # Also the count of tokens as float32, which is exact up to 16 million.
                own = torch.stack([*measured, *auxiliary.values()])
                sums = accelerator.reduce(own, reduction="sum").tolist()
                loss = sums[0] / scored_tokens
                if not math.isfinite(loss):
                    optimizer.zero_grad()
                    raise NonFiniteError(f"the loss is {loss}")
            # Data parallel averages over processes, accelerate over microbatches; the loss is a sum over both.
            accelerator.backward(objective * accelerator.num_processes * accelerator.gradient_accumulation_steps)
    clipped = accelerator.clip_grad_norm_(model.parameters(), gradient_clipping or math.inf)
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)  # before it was clipped
    # With float16 an infinite gradient is how the scaler finds its scale; the optimiser then skips the step itself.
    if not (math.isfinite(norm) or accelerator.mixed_precision == "fp16"):
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


def _read(
    model: nn.Module, segment: Segment, memory: ModelState, noise: Tensor | None, without_memory: Tensor | None
) -> MemoryModelOutput:
    """Read a segment; without a graph, losses and logits where nothing is scored in the whole global batch."""
    scored = segment.global_tokens > 0
    with torch.set_grad_enabled(scored):
        return model(
            segment.input_ids,
            state=memory,
            reset=segment.reset,
            targets=segment.targets if scored else None,
            lengths=segment.lengths,
            noise=noise,
            without_memory=without_memory,
            return_logits=False,
        )


def draw_noise(segment: Segment, samples: int, seed: int) -> Tensor:
    """Random offsets for the sticky memories of a segment, in [0, 1), float32, [lanes, samples].

    A counter-based generator keyed by the lane, with the lane's number of segments as counter: the draw belongs to the
    lane and to its place in its stream, whatever the process; a resumed run draws the same.
    """
    return _draw(segment, samples, seed, 0)


def draw_without_memory(segment: Segment, share: float, seed: int) -> Tensor:
    """Lanes that read a segment without their memory, bool [lanes]: so many, drawn like the offsets, beside them."""
    return _draw(segment, 1, seed, 1).squeeze(-1) < share


def _draw(segment: Segment, samples: int, seed: int, purpose: int) -> Tensor:
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, lane], counter=[0, 0, purpose, read])).random(
            samples, np.float32
        )
        for lane, read in zip(segment.lanes.tolist(), segment.reads.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(draws)).to(segment.input_ids.device)


def dropout_seed(seed: int, step: int, first_lane: int) -> int:
    """The seed of dropout in one microbatch of one step: every process knows it, also after a stop."""
    return int(np.random.SeedSequence([seed, step, first_lane]).generate_state(1, np.uint64)[0])
