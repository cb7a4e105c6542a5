"""Layers of one kind are compiled once, for training."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def compile_by_kind(layers: list[nn.Module], cut_up: bool) -> None:
    """Compile each layer in place, those of a kind with the same graphs.

    What only reads, with segments of any length, stays as it is. Gradients are sent to other processes layer by layer
    anyway: graphs need not be cut for that.

    Args:
        cut_up: their weights lie on several processes; then layers of several kinds stay as they are.
    """
    torch._dynamo.config.optimize_ddp = False
    kinds: dict[Hashable, list[nn.Module]] = {}
    for layer in layers:
        hooked = [name for name, part in layer.named_modules() if part._forward_hooks]
        kinds.setdefault((type(layer), *hooked), []).append(layer)
    if cut_up and len(kinds) > 1:
        logger.warning("layers of %d kinds whose weights are cut up are not compiled", len(kinds))
        return
    for alike in kinds.values():
        _compile_for_training(alike)


def _compile_for_training(layers: list[nn.Module]) -> None:
    """Compile layers of one kind, with graphs of their own: nobody else's are taken for theirs.

    Graphs are kept by the code that they were made of, and are not told apart by hooks.
    """

    def call(layer: nn.Module, *args: Any, **options: Any) -> Any:
        return layer._call_impl(*args, **options)

    call.__code__ = call.__code__.replace()
    compiled = torch.compile(call, dynamic=False)

    def choose(layer: nn.Module, *args: Any, **options: Any) -> Any:
        return (compiled if layer.training else call)(layer, *args, **options)

    for layer in layers:
        layer._compiled_call_impl = partial(choose, layer)
