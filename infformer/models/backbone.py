"""Where a stock language model keeps its layers, their attention, its head and its positions: found, not listed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from infformer.errors import ModelError
from infformer.models.quantization import is_quantized

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "cache")
"""What models and their parts call a key-value cache; only attention, and what it is part of, is handed one."""


def arguments(module: nn.Module) -> set[str]:
    """The names of what a module's `forward` takes."""
    return set(inspect.signature(module.forward).parameters)


def cache_argument(module: nn.Module) -> str | None:
    """What a module calls its key-value cache: transformers 5.24 renamed that of models. None: it takes none."""
    return next((name for name in CACHE_ARGUMENTS if name in arguments(module)), None)


def find_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, from the first: the one list of as many modules as its configuration has layers.

    Raises:
        ModelError: it has no such list, or several.
    """
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = [m for m in backbone.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = [modules for modules in lists if all(cache_argument(layer) and _attentions(layer) for layer in modules)]
    if len(found) != 1:
        raise ModelError(
            f"backbone={type(backbone).__name__}: a memory stands beside the self-attention of every layer, so a list "
            f"of {count} layers with an attention that takes a key-value cache was looked for, and {len(found)} found; "
            "give a decoder such as GPT-2 or Llama, not an encoder, an encoder with a decoder or a state-space model"
        )
    return list(found[0])


def find_attention(layer: nn.Module) -> nn.Module:
    """The self-attention of a layer: the one outermost attention in it that takes hidden states and a key-value cache.

    Raises:
        ModelError: there are several.
    """
    found = _attentions(layer)
    if len(found) != 1:
        raise ModelError(
            f"a memory stands beside a layer's self-attention, and a {type(layer).__name__} has {len(found)} "
            "attentions that take hidden states and a key-value cache: give a model with one in each layer"
        )
    return found[0]


def _attentions(layer: nn.Module) -> list[nn.Module]:
    """The outermost attentions in a layer."""

    def outermost(module: nn.Module) -> list[nn.Module]:
        is_attention = "Attention" in type(module).__name__  # state-space layers take the same arguments
        if is_attention and cache_argument(module) and "hidden_states" in arguments(module):
            return [module]
        return [found for child in module.children() for found in outermost(child)]

    return [attention for child in layer.children() for attention in outermost(child)]


def find_attentions(backbone: PreTrainedModel) -> list[nn.Module]:
    """The self-attention of each layer, from the first."""
    return [find_attention(layer) for layer in find_layers(backbone)]


def key_value_shape(config: Any) -> tuple[int, int]:
    """Heads of the keys and values of a token, and numbers of each head; where layers differ, those of the first."""
    config = next(iter(getattr(config, "per_layer_config", ())), config)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        shared = 1  # Falcon's older architecture says it so
    return shared, getattr(config, "head_dim", None) or config.hidden_size // heads


def head(backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The scores of the next token: output embeddings times hidden states, scaled and capped as configured."""
    config, logits = backbone.config, backbone.get_output_embeddings()(hidden)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def plain_head(backbone: PreTrainedModel) -> Tensor | None:
    """The weight of a `head` that is one product with it and no more; None where it is more, or not whole."""
    module: Any = backbone.get_output_embeddings()
    is_hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    is_finished = any(getattr(backbone.config, name, None) is not None for name in names)
    is_product = type(module) is nn.Linear and "bias" not in dict(module.named_parameters())
    if is_hooked or is_finished or not is_product:
        return None
    return None if isinstance(module.weight, DTensor) else module.weight


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors differ by rounding alone, in their own precision or another."""
    return float((one - other).abs().max()) <= torch.finfo(dtype or one.dtype).eps ** 0.5 * float(one.abs().max())


def _difference(one: Tensor, other: Tensor) -> float:
    """How far keys [batch, heads, length, head] differ: in each channel as a part of its largest, the mean over all.

    A few channels may be a hundred times as large as the others, and turn the slowest.
    """
    largest = one.abs().amax(dim=(0, 1, 2)).float().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((one - other).abs().amax(dim=(0, 1, 2)).float() / largest).mean())


@contextmanager
def looked_at(backbone: PreTrainedModel) -> Iterator[None]:
    """Within it a model computes without dropout and gradients; then it is as it was."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)


def is_causal(backbone: PreTrainedModel) -> bool:
    """Whether no token sees those after it; found out by a look at the scores after the first of two."""
    tokens = torch.arange(2, device=backbone.device).unsqueeze(0)
    # Which channels eight bits leave out is decided by all tokens of a call, so that the first rounds otherwise.
    dtype = torch.bfloat16 if is_quantized(backbone) else None
    with looked_at(backbone):
        return _alike(backbone(tokens[:, :1]).logits, backbone(tokens).logits[:, :1], dtype)


def is_head_known(backbone: PreTrainedModel) -> bool:
    """Whether `head` gives the model's own scores; found out by a look at those after one token."""
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=backbone.device)
    with looked_at(backbone):
        hidden = getattr(backbone.base_model(tokens, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != getattr(backbone.get_output_embeddings(), "in_features", None):
            return False  # the scores are made of something else
        return _alike(backbone(tokens, use_cache=False).logits, head(backbone, hidden))


class Rotation:
    """The rotation of keys by their places, as a backbone's attention makes it: rotary positions (arXiv 2104.09864).

    Args:
        backbone: that hands cosines and sines to its attention.
        attention: of one of its layers.
        layer: its number, by which some backbones choose among several tables.
    """

    def __init__(self, backbone: PreTrainedModel, attention: nn.Module, layer: int) -> None:
        self.encoder: Any = getattr(backbone.base_model, "rotary_emb", None)
        self.rotate: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        taken = [] if self.rotate is None else list(inspect.signature(self.rotate).parameters)
        self.known = self.encoder is not None and taken[:4] == ["q", "k", "cos", "sin"]
        self.kind = ""  # of the layer's table, where there are several
        if self.encoder is not None and "layer_type" in arguments(self.encoder):
            self.kind = backbone.config.layer_types[layer]

    def table(self, places: int, device: torch.device) -> Tensor:
        """Cosines and sines of the places 0 … places − 1, float32 [2, 1, places, width]; without the keys' scale."""
        numbers = torch.arange(places, device=device).unsqueeze(0)
        kind = {"layer_type": self.kind} if self.kind else {}
        table = torch.stack(self.encoder(torch.zeros(1, 1, 1, device=device), numbers, **kind))
        return table / table.norm(dim=0)

    def turn(self, keys: Tensor, table: Tensor) -> Tensor:
        """Turn keys by a table [2, 1, length, width].

        Args:
            keys: [batch, heads, length, head]; what is wider than the table stays as it is.
        """
        width = table.shape[-1]
        wide = keys[..., :width].float()
        turned = self.rotate(wide[:, :0], wide, *table)[1].to(keys.dtype)  # it wants queries: there are none
        return turned if width == keys.shape[-1] else torch.cat([turned, keys[..., width:]], dim=-1)

    def turn_back(self, keys: Tensor, table: Tensor) -> Tensor:
        """Undo `turn`."""
        cosines, sines = table
        return self.turn(keys, torch.stack([cosines, -sines]))


def find_rotations(backbone: PreTrainedModel, move: bool = True) -> list[int]:
    """The layers whose keys are rotated by their places; in all others they do not depend on these.

    Found out by a look at the keys of some tokens at two distances from the beginning.

    Args:
        move: what was read has to be moved back. If not, keys may know the places of embeddings, as GPT-2's do, whose
            attention rotates nothing.

    Raises:
        ModelError: in some layer they depend on places in another way, so what was read cannot be moved back; or they
            have other heads than the configuration says.
    """
    shape = list(key_value_shape(backbone.config))
    device, attentions = backbone.device, find_attentions(backbone)
    count, shift = 4, 3
    tokens = torch.arange(count, device=device).unsqueeze(0)
    keys: list[list[Any]] = []
    takes_places = "position_ids" in arguments(backbone.base_model)
    for first in (0, shift) if takes_places else (0, 0):
        cache = DynamicCache()
        places = {"position_ids": torch.arange(first, first + count, device=device)[None]} if takes_places else {}
        argument = str(cache_argument(backbone.base_model))
        with looked_at(backbone):
            backbone.base_model(tokens, **{argument: cache}, use_cache=True, **places)
        layers: list[Any] = cache.layers
        for layer in layers:
            found = [list(part.shape[1::2]) for part in (layer.keys, layer.values)]
            if found != [shape, shape]:
                raise ModelError(
                    f"model.memory: the cache of a {backbone.config.model_type!r} has keys {found[0]} and values "
                    f"{found[1]} where its configuration says {shape}; choose a backbone such as Llama, or a memory "
                    "that keeps hidden states: model.memory.stores=hidden with model.memory.short_term_length=0"
                )
        keys.append([layer.keys for layer in layers])
    rotated = []
    for layer, (near, far) in enumerate(zip(*keys, strict=True)):
        rotation = Rotation(backbone, attentions[layer], layer)
        if rotation.known:
            table = rotation.table(shift + count, device)
            back = rotation.turn_back(near, table[:, :, :count]), rotation.turn_back(far, table[:, :, shift:])
            if _difference(near, far) > _difference(*back):
                near, far = back
                rotated.append(layer)
        elif not move and rotation.encoder is None and rotation.rotate is None:
            continue
        if not _alike(near, far):
            raise ModelError(
                f"model.memory: what a {backbone.config.model_type!r} has read cannot be moved back: "
                f"its layer {layer} knows places neither by rotary positions nor by distances alone; choose a backbone "
                "such as Llama, or a memory that keeps no tokens as they were: model/memory=long_term, sticky or none, "
                "with model.memory.short_term_length=0"
            )
    return rotated
