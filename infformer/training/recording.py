"""CUDA graphs: the forward and the backward pass of a microbatch, recorded once and replayed in every later step.

A replay costs the processor next to nothing, however many small kernels the pass has. It reads its inputs from where
they lay when it was recorded, and leaves gradients and outputs where it left them then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from infformer.errors import UserError
from infformer.training.runtime import Accelerator
from infformer.training.step import Microbatch, PassResult, is_told_on_device

EAGER_PASSES = 3
"""Before one is recorded: what is compiled, tuned or allocated once is so in these."""


class RecordingError(UserError, RuntimeError):
    """A pass that cannot be recorded."""


def check_recording(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, computes_twice: bool) -> None:
    """Make sure that passes can be recorded.

    Args:
        computes_twice: layers are computed again in the backward pass.

    Raises:
        RecordingError: they cannot.
    """
    for wrong, why in {
        f"on {accelerator.device.type}": accelerator.device.type != "cuda",
        f"with {accelerator.num_processes} processes": accelerator.num_processes > 1,
        "with training.gradient_checkpointing=true": computes_twice,
        "with this precision or engine": not is_told_on_device(accelerator, model, optimizer),
    }.items():
        if why:
            raise RecordingError(
                f"training.compile=graphs {wrong}: what one CUDA device computes in float32 or bfloat16, by "
                "engine=ddp, can be recorded; set it to true or false"
            )


@dataclass
class _Recording:
    replay: Callable[[], None]
    microbatch: Microbatch
    """Where a replay finds its inputs."""
    scored_tokens: Tensor
    result: PassResult
    """Where it leaves its outputs."""
    gradients: list[Tensor | None]
    """Of all parameters."""


class Recorder:
    """Makes the passes of a model on one CUDA device.

    Args:
        model: the prepared model.
        compute: reads a microbatch, given how many tokens a step scores, and goes backward.
    """

    def __init__(self, model: nn.Module, compute: Callable[[Microbatch, Tensor], PassResult]) -> None:
        self._parameters = list(model.parameters())
        self._compute = compute
        self._recordings: dict[Hashable, _Recording] = {}
        self._passes: dict[Hashable, int] = {}
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(self, microbatch: Microbatch, scored_tokens: int, first: bool) -> PassResult:
        """Like `compute`.

        Args:
            first: of its step: there are no gradients yet to which others are added.

        Raises:
            RecordingError: the device would have to be waited for.
        """
        given = microbatch.tensors()
        key = (first, microbatch.kinds, *(tensor.shape for tensor in given))
        scored = torch.full((), float(scored_tokens), device=self._parameters[0].device)
        self._passes[key] = self._passes.get(key, 0) + 1
        if self._passes[key] <= EAGER_PASSES:
            return self._beside(lambda: self._compute(microbatch, scored))
        if key not in self._recordings:
            self._recordings[key] = self._record(microbatch.map_tensors(torch.clone), scored)
        recording = self._recordings[key]
        for static, tensor in zip(recording.microbatch.tensors(), given, strict=True):
            static.copy_(tensor)
        recording.scored_tokens.copy_(scored)
        for parameter, gradient in zip(self._parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        recording.replay()
        # The next replay overwrites them.
        return PassResult(
            recording.result.memory.map_tensors(torch.clone), recording.result.sums.clone(), recording.result.auxiliary
        )

    def _beside(self, compute: Callable[[], PassResult]) -> PassResult:
        """On a stream of its own, as CUDA wants what comes before a recording."""
        if self._stream is None:
            return compute()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = compute()
        current.wait_stream(self._stream)
        return result

    def _record(self, microbatch: Microbatch, scored_tokens: Tensor) -> _Recording:
        try:
            replay, result = record(lambda: self._compute(microbatch, scored_tokens), self._stream)
        except RuntimeError as error:
            raise RecordingError(
                "training.compile=graphs: this model cannot be recorded, as it waits for the device while it computes "
                f"({str(error).splitlines()[0]}); set it to true"
            ) from error
        gradients = [parameter.grad for parameter in self._parameters]
        return _Recording(replay, microbatch, scored_tokens, result, gradients)


def record(
    compute: Callable[[], PassResult], stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], PassResult]:
    """A function that does on the device what a call would have done there, and where it leaves the outputs."""
    graph = torch.cuda.CUDAGraph()
    # On the stream of the passes before: what is left of them belongs to it. Other threads of this process, such as the
    # one that reads ahead, may allocate meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = compute()
    return graph.replay, result
