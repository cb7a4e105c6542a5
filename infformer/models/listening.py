"""What a stock attention asks and is answered: caught where it hands queries, keys and values to its kernel.

For the time of a forward pass an attention has a copy of its configuration that names another kernel, which remembers
what it is given and calls the attention's own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from infformer.errors import ModelError
from infformer.memory.memory import KeyValues, LayerHeads
from infformer.models.backbone import Rotation, key_value_shape

KERNEL = "infformer_listening"


class Ear:
    """Listens to one attention of a backbone.

    Args:
        attention: that hands its kernel what it chose by its configuration.

    Raises:
        ModelError: it computes its scores by itself.
    """

    def __init__(self, attention: nn.Module) -> None:
        module = sys.modules[type(attention).__module__]
        if not (hasattr(module, "ALL_ATTENTION_FUNCTIONS") and hasattr(attention, "config")):
            raise _refusal(attention, "computes its scores by itself, so nobody is told its queries")
        width = getattr(attention.config, "hidden_size", None)
        self.outputs = [part for part in attention.children() if _numbers(part)[1] == width]
        if not self.outputs:
            raise _refusal(attention, "has no linear map to its output, for what is read to go through")
        self.attention: Any = attention
        config: Any = attention.config
        self.shape = config.num_attention_heads, key_value_shape(config)
        self.eager: Callable[..., Any] = getattr(module, "eager_attention_forward")  # noqa: B009, for any module
        self.heard: tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any], Tensor] | None = None

    def listen(self) -> Any:
        """Begin to.

        Returns:
            The configuration that the attention has otherwise.
        """
        self.heard = None
        before = self.attention.config
        if before._attn_implementation == KERNEL:  # a layer that is computed anew within the pass
            return before
        config = copy.copy(before)
        config._attn_implementation = KERNEL
        config.ear, config.kernel = self, before._attn_implementation
        self.attention.config = config
        return before

    def call(
        self,
        kernel: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The attention's own kernel; its arguments and what it returns are kept.

        Raises:
            ModelError: these are not the queries, keys and values of one attention, as its configuration says them.
        """
        heads, shape = self.shape
        if self.heard is not None:
            raise _refusal(module, "asks twice, of which a memory would hear one")
        if query.shape[1] != heads or any(part.shape[1::2] != shape for part in (key, value)):
            raise _refusal(
                module,
                f"asks with {query.shape[1]} heads, keys {list(key.shape[1::2])} and values {list(value.shape[1::2])}, "
                f"where its configuration says {heads} and {list(shape)}",
            )
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, self.eager)
        result = function(module, query, key, value, attention_mask, **options)
        self.heard = (query, key, value, attention_mask, options, result[0])
        return result

    def heads(self, rotation: Rotation | None, table: Tensor | None, past: int) -> tuple[LayerHeads, KeyValues]:
        """What the attention asked, and the keys and values of its segment so far, all without their rotation.

        Args:
            rotation, table: of the layer, and of the places of what stands before the segment and then of it.
            past: how many keys stand before the segment.
        """
        assert self.heard is not None
        query, key, value, mask, options, result = self.heard
        self.heard = None
        scale = options.get("scaling") or query.shape[-1] ** -0.5

        def unturned(heads: Tensor, first: int) -> Tensor:
            if rotation is None or table is None:
                return heads
            return rotation.turn_back(heads, table[:, :, first : first + heads.shape[2]])

        queries = unturned(query, key.shape[2] - query.shape[2]) * (scale * query.shape[-1] ** 0.5)
        pair = KeyValues(unturned(key[:, :, past:], past), value[:, :, past:])

        def attended() -> tuple[Tensor, Tensor]:
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = (query @ keys.mT).float() * scale
            if (cap := options.get("softcap")) is not None:
                scores = torch.tanh(scores / cap) * cap
            if mask is None or mask.dim() == 2:  # the kernel is causal by itself, and is told at most of padding
                seen = _seen_causally(scores, mask, options.get("sliding_window"))
                scores = scores.masked_fill(~seen, -torch.inf)
            elif mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask[..., : scores.shape[-1]], -torch.inf)
            else:
                scores = scores + mask[..., : scores.shape[-1]]
            normaliser = scores.logsumexp(-1)
            if (sinks := options.get("s_aux")) is not None:  # learned scores of nothing, such as GPT-OSS has
                normaliser = torch.logaddexp(normaliser, sinks.to(normaliser).unsqueeze(-1))
            return result.transpose(1, 2), normaliser

        return LayerHeads(queries, self._project, attended), pair

    def _project(self, heads: Tensor) -> Tensor:
        """The output projection, the last linear map of an attention from all its heads to its output, without bias."""
        joined = heads.transpose(1, 2).flatten(2)
        *_, last = (part for part in self.outputs if _numbers(part)[0] == joined.shape[-1])
        projected: Tensor = last(joined)
        if getattr(last, "bias", None) is None:
            return projected
        return projected - last(torch.zeros_like(joined[:1, :1]))


def _refusal(attention: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"model.memory.stores=keys_values: a {type(attention).__name__} {reason}; choose a backbone such as Llama or "
        "GPT-2, or model.memory.stores=hidden"
    )


def _seen_causally(scores: Tensor, real: Tensor | None, window: int | None) -> Tensor:
    """Which keys the last queries see, bool, broadcast to scores [batch, heads, queries, keys].

    Args:
        real: which keys are not padding, [batch, keys]; None: all.
        window: how many keys a query sees, its own among them; None: all up to it.
    """
    queries, keys = scores.shape[-2:]
    ones = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    seen = ones.tril(keys - queries)
    if window is not None:
        seen = seen & ones.triu(keys - queries - window + 1)
    return seen if real is None else seen & real.bool()[:, None, None, :keys]


def _numbers(module: nn.Module) -> tuple[int | None, int | None]:
    """How many numbers a linear map takes and returns; None for another module."""
    return (
        getattr(module, "in_features", None) or getattr(module, "nx", None),
        getattr(module, "out_features", None) or getattr(module, "nf", None),
    )


def _listening(module: Any, *tensors: Any, **options: Any) -> Any:
    """A kernel in transformers' sense."""
    return module.config.ear.call(module.config.kernel, module, *tensors, **options)


AttentionInterface.register(KERNEL, _listening)
