"""The one loop that reads text segment by segment without learning from it: measurements and generation share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from infformer.memory.state import ModelState

if TYPE_CHECKING:
    from infformer.data.segments import Segment
    from infformer.models.base import MemoryModel


class TextSegment(NamedTuple):
    """The next tokens of each row, [batch, length]; by default all are real, no row begins, and nothing is scored."""

    input_ids: Tensor
    targets: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None


SegmentT = TypeVar("SegmentT", bound="Segment | TextSegment")


@contextmanager
def reading(model: MemoryModel, precision: torch.dtype = torch.float32) -> Iterator[None]:
    """A model reads in evaluation mode, without gradients and under autocast; it stays in evaluation mode.

    Products of float32 are those of float32 also where training rounds their operands: a figure depends on the model
    alone. Not in PyTorch's inference mode: engines that cut up weights keep what they put together here for training.
    """
    model.eval()
    in_training = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
            yield
    finally:
        torch.set_float32_matmul_precision(in_training)


def stream(
    model: MemoryModel,
    segments: Iterable[SegmentT],
    state: ModelState | None = None,
    carry: Callable[[SegmentT, ModelState | None, Any], Any] = lambda segment, before, after: after,
    **wanted: Any,
) -> Iterator[tuple[Any, Any]]:
    """Read segments one after the other, each with the state after the one before; within `reading`.

    Args:
        state: before the first; empty if not given.
        carry: what goes on of a segment, the state before it and the one after it; the latter if not given.
        wanted: what else `forward` is asked for.

    Yields:
        The state that a segment was read with, before its `reset`, and the output, which holds the one after it.
    """
    for segment in segments:
        output = model(
            segment.input_ids,
            state=state,
            reset=segment.reset,
            targets=segment.targets,
            lengths=segment.lengths,
            **wanted,
        )
        yield state, output
        state = carry(segment, state, output.state)


def remember(model: MemoryModel, segments: Iterable[TextSegment], state: ModelState | None = None) -> Any:
    """The state after segments, of which no logits are needed; the one before if there are none."""
    for _, output in stream(model, segments, state, return_logits=False):
        state = output.state
    return state
