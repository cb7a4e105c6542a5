"""A memory that is passed on after its segment's backward pass still hangs on the graph which that pass has freed."""

from __future__ import annotations

import torch
from torch import Tensor

from infformer.errors import UserError
from infformer.memory.state import MemoryState


class BackwardError(UserError, RuntimeError):
    """A backward pass through segments whose graph is gone."""


def refuse_second_backward(hidden: Tensor, state: MemoryState) -> None:
    """Let a later backward pass that reaches a segment through its state say what is wrong, if that cannot go on.

    It cannot where an earlier pass went through the segment and freed its graph. One pass through the losses of several
    segments is what memories are trained by, and one that was told `retain_graph=True` frees nothing.

    Args:
        hidden: last hidden states of the segment, through which every pass goes that begins at its losses or logits.
        state: after the segment.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not hidden.requires_grad:
        return
    freed_by: list[int] = []

    def remember(_: Tensor) -> None:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            freed_by.append(torch._C._current_graph_task_id())

    def refuse(_: Tensor) -> None:
        if freed_by and torch._C._current_graph_task_id() not in freed_by:
            raise BackwardError(
                "state= was made by a segment whose backward pass is over: pass on output.state.detach(), or call "
                "backward once, on the sum of the segments' losses"
            )

    hidden.register_hook(remember)
    for tensor in state.named_tensors().values():
        if tensor.requires_grad:
            tensor.register_hook(refuse)
