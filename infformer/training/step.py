"""One optimiser step: every lane of this process reads its next segments, then the weights change once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from infformer.data.segments import Segment
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.segment_read import MemoryModelOutput
from infformer.training.metrics import StepResult
from infformer.training.runtime import Accelerator, is_zero


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

    @property
    def kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Of each segment whether anything is scored in it, in the whole global batch, and whether it is learned."""
        return tuple((segment.global_tokens > 0, segment.is_learned) for segment in self.segments)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Microbatch:
        """The same microbatch with `function` applied to every tensor."""

        def drawn(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if tensor is None else function(tensor) for tensor in tensors]

        return Microbatch(
            [segment.map_tensors(function) for segment in self.segments],
            self.memory.map_tensors(function),
            drawn(self.noise),
            drawn(self.without_memory),
            self.dropout_seed,
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        found: list[Tensor] = []
        self.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found


@dataclass(frozen=True)
class PassResult:
    """What the forward and the backward pass of a microbatch leave, beside gradients."""

    memory: ModelState
    """After its last segment, without graph."""
    sums: Tensor
    """Nats, tokens read, and the auxiliary losses, float32."""
    auxiliary: Sequence[str]
    """The names of the auxiliary losses."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient that is not a number.

    Args:
        index: which of the steps that are read together.
    """

    def __init__(self, loss: float, norm: float | None = None, index: int = 0) -> None:
        super().__init__(f"the loss is {loss}" + ("" if norm is None else f", the gradient's norm {norm}"))
        self.index = index


@dataclass(frozen=True)
class StepMeasurement:
    """What one optimiser step measured, on its device until somebody reads it; the same on every process."""

    numbers: Tensor
    """Nats, tokens read, the auxiliary losses and the gradient's norm, float32."""
    auxiliary: Sequence[str]
    """The names of the auxiliary losses."""
    scored_tokens: int
    checked: bool
    """`train_step` has looked at them: the step was made of finite numbers."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    microbatches: Sequence[Microbatch],
    gradient_clipping: float | None,
    recorder: Callable[[Microbatch, int, bool], PassResult] | None = None,
) -> tuple[list[ModelState], StepMeasurement]:
    """Make one optimiser step: forward, backward and update.

    Nothing waits for the device where the optimiser can be told there to leave the weights as they are: what was
    measured is read when it is wanted, by `read_steps`, which then finds a loss that is not finite. Every other
    optimiser is only called once it is known that loss and gradient are.

    The loss is the mean over all scored tokens of the global batch: it does not depend on how lanes are spread over
    processes and microbatches, although padding differs from lane to lane.

    A segment in which nothing is scored, in the whole global batch, reaches the loss through memory alone. It is read
    without a graph, so that a task which scores only the end of what is read pays for no backward pass through what
    comes before: gradients flow neither through such a segment nor past it, and it adds no auxiliary loss. A memory
    that learns by writing learns from just these gradients: with one they flow, and so they do where a task says it.

    Args:
        model: the prepared model.
        microbatches: the lanes of this process, cut into pieces that are in memory one after the other. At least one of
            their segments scores something.
        recorder: makes the passes instead, where the optimiser is told on the device; see `recording`.

    Returns:
        Each microbatch's memory after its last segment, without graph, and what was measured.

    Raises:
        NonFiniteError: on all processes, unless `read_steps` does. Before the weights are touched; with DeepSpeed,
            which does backward and update in one, a gradient that is not finite is found after them.
    """
    told_on_device = is_told_on_device(accelerator, model, optimizer)
    scored_tokens = sum(segment.global_tokens for segment in microbatches[0].segments)
    total = _Sums(accelerator.device)
    after = []
    loss, sums = math.nan, total.nats
    for index, microbatch in enumerate(microbatches):
        # Dropout belongs to the lanes of a microbatch, whichever process has them.
        torch.manual_seed(microbatch.dropout_seed)
        with accelerator.accumulate(model):
            if recorder is not None:
                made = recorder(microbatch, scored_tokens, index == 0)
                after.append(made.memory)
                total.add(made)
                sums = total.stacked()
                continue
            memory, objective = _forward(model, microbatch, scored_tokens, total)
            after.append(memory.detach())
            if index == len(microbatches) - 1:
                # Also the count of tokens as float32, which is exact up to 16 million.
                sums = accelerator.reduce(total.stacked(), reduction="sum")
                if not told_on_device:
                    loss = float(sums[0]) / scored_tokens
                    if not math.isfinite(loss):
                        optimizer.zero_grad()
                        raise NonFiniteError(loss)
            _backward(accelerator, objective)
    clipped = accelerator.clip_grad_norm_(model.parameters(), gradient_clipping or math.inf)
    whole = clipped.full_tensor() if isinstance(clipped, DTensor) else clipped
    norm = torch.as_tensor(whole, dtype=sums.dtype, device=sums.device)  # before it was clipped
    numbers = torch.cat([sums, norm.view(1)])
    if told_on_device:
        _hold_back(optimizer, numbers)
    # With float16 an infinite gradient is how the scaler finds its scale; the optimiser then skips the step itself.
    elif not (accelerator.mixed_precision == "fp16" or math.isfinite(norm)):
        optimizer.zero_grad()
        raise NonFiniteError(loss, float(norm))
    optimizer.step()
    optimizer.zero_grad()
    return after, StepMeasurement(numbers, tuple(total.auxiliary), scored_tokens, not told_on_device)


def make_pass(accelerator: Accelerator, model: nn.Module) -> Callable[[Microbatch, Tensor], PassResult]:
    """The forward and the backward pass of one microbatch, without a look at its loss between the two."""

    def compute(microbatch: Microbatch, scored_tokens: Tensor) -> PassResult:
        sums = _Sums(accelerator.device)
        memory, objective = _forward(model, microbatch, scored_tokens, sums)
        _backward(accelerator, objective)
        return PassResult(memory.detach(), sums.stacked(), tuple(sums.auxiliary))

    return compute


class _Sums:
    """What is added up over the segments of a step, on its device."""

    def __init__(self, device: torch.device) -> None:
        self.nats, self.read = torch.zeros(2, device=device)
        self.auxiliary: dict[str, Tensor] = {}

    def add_auxiliary(self, name: str, value: Tensor) -> None:
        self.auxiliary[name] = self.auxiliary.get(name, 0) + value

    def add(self, made: PassResult) -> None:
        nats, read, *auxiliary = made.sums
        self.nats, self.read = self.nats + nats, self.read + read
        for name, value in zip(made.auxiliary, auxiliary, strict=True):
            self.add_auxiliary(name, value)

    def stacked(self) -> Tensor:
        return torch.stack([self.nats, self.read, *self.auxiliary.values()])


def _forward(
    model: nn.Module, microbatch: Microbatch, scored_tokens: int | Tensor, sums: _Sums
) -> tuple[ModelState, Tensor]:
    """The memory after a microbatch, and what it adds to the objective; with what is measured added to the sums."""
    memory, objective = microbatch.memory, torch.zeros((), device=sums.nats.device)
    drawn = zip(microbatch.segments, microbatch.noise, microbatch.without_memory, strict=True)
    for segment, noise, without_memory in drawn:
        output = _read(model, segment, memory, noise, without_memory)
        assert output.state is not None
        memory = output.state
        sums.read = sums.read + segment.lengths.sum()
        if segment.global_tokens == 0:
            continue
        assert output.token_losses is not None
        assert output.auxiliary_losses is not None
        nats = output.token_losses.sum()
        share = (segment.targets != IGNORE_INDEX).sum() / scored_tokens
        objective = objective + nats / scored_tokens + share * sum(output.auxiliary_losses.values())
        sums.nats = sums.nats + nats.detach()
        for name, value in output.auxiliary_losses.items():
            sums.add_auxiliary(name, share * value.detach())
    return memory, objective


def _backward(accelerator: Accelerator, objective: Tensor) -> None:
    """Data parallel averages over processes, accelerate over microbatches; the loss is a sum over both."""
    accelerator.backward(objective * accelerator.num_processes * accelerator.gradient_accumulation_steps)


def read_steps(steps: Sequence[StepMeasurement]) -> list[StepResult]:
    """Wait until the device has made these steps, and read what they measured, all at once.

    Raises:
        NonFiniteError: a loss or a gradient is not finite. That step, and all after it, left the weights as they were.
    """
    results = []
    for index, (step, numbers) in enumerate(zip(steps, torch.stack([s.numbers for s in steps]).tolist(), strict=True)):
        nats, read, *auxiliary, norm = numbers
        loss = nats / step.scored_tokens
        if not (step.checked or all(map(math.isfinite, numbers))):
            raise NonFiniteError(loss, norm if math.isfinite(loss) else None, index)
        named = dict(zip(step.auxiliary, auxiliary, strict=True))
        results.append(StepResult(loss, named, norm, step.scored_tokens, int(read)))
    return results


def is_told_on_device(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether the optimiser leaves the weights as they are where a number on the device says so.

    Those that torch calls fused do, for the sake of scaled gradients in float16; not for weights that are cut up.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    cut_up = is_zero(accelerator) or isinstance(model, FSDPModule)
    return fused and not cut_up and accelerator.mixed_precision != "fp16"


def _hold_back(optimizer: Any, numbers: Tensor) -> None:
    """Let the optimiser leave the weights as they are from the first step on of which a number is not finite."""
    fused = getattr(optimizer, "optimizer", optimizer)  # out of what accelerate wraps around it
    bad = 1 - numbers.isfinite().all().float()
    before = getattr(fused, "found_inf", None)
    fused.found_inf = bad if before is None else torch.maximum(before, bad)


def _read(
    model: nn.Module, segment: Segment, memory: ModelState, noise: Tensor | None, without_memory: Tensor | None
) -> MemoryModelOutput:
    """Read a segment; without losses, logits and perhaps a graph where nothing is scored in the whole global batch."""
    scored = segment.global_tokens > 0
    own = cast(MemoryModel, getattr(model, "module", model))
    with torch.set_grad_enabled(scored or segment.is_learned or own.learns_by_writing):
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
    """Random offsets for the sticky memories of a segment on the host, in [0, 1), float32, [lanes, samples].

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
    return torch.from_numpy(np.stack(draws))


def dropout_seed(seed: int, step: int, first_lane: int) -> int:
    """The seed of dropout in one microbatch of one step: every process knows it, also after a stop."""
    return int(np.random.SeedSequence([seed, step, first_lane]).generate_state(1, np.uint64)[0])
