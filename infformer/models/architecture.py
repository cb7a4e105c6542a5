"""A model is tried out without weights before it is made: what cannot be built, or cannot read, is found at once."""

from __future__ import annotations

import difflib
import math
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from infformer.errors import ModelError, in_one_line
from infformer.models.adapters import LoraConfig, find_targets, import_peft
from infformer.models.decoder import DecoderConfig
from infformer.models.loading import new_decoder

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
"""By the names that transformers has for all of its models."""


def try_architecture(architecture: dict[str, Any], attention: str | None = None) -> nn.Module:
    """A model of these fields that has shapes and no weights, and has read two tokens.

    Args:
        architecture: the fields of a configuration, `model_type` among them.
        attention: its kernel; None for transformers' choice.

    Raises:
        ModelError: there is no such model; the message names the field that is to blame.
    """
    kind = architecture.get("model_type")
    if kind not in CONFIG_MAPPING and kind != DecoderConfig.model_type:
        near = difflib.get_close_matches(str(kind), [*CONFIG_MAPPING, DecoderConfig.model_type], n=3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ModelError(
            f"model.architecture.model_type={kind}: transformers knows no such model{meant}; choose one that it has, "
            "such as gpt2 or llama, or decoder"
        )
    for name, value in architecture.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"model.architecture.{name}={value}: must be finite; set it to a number")
        least = 1 if name.endswith("_size") else 0
        if isinstance(value, int | float) and value < least and not name.endswith("_id"):
            raise ModelError(f"model.architecture.{name}={value}: must be at least {least}")
    try:
        return _try(architecture, attention)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers and torch make of values that cannot be
        raise ModelError(
            f"{_blame(architecture, attention)}: no such model can be built; choose another value "
            f"({in_one_line(error):.500})"
        ) from error


def try_kernel(config: PreTrainedConfig, attention: str | None) -> None:
    """Make sure that a model can have this attention kernel, before its weights are read.

    Raises:
        ModelError: it cannot.
    """
    if attention is None:
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:  # a kernel that is not known, or not installed
        raise ModelError(
            f"model.attention={attention}: this model cannot have this kernel; choose another, such as sdpa or eager, "
            f"or null ({in_one_line(error):.500})"
        ) from error


def try_adapters(config: PreTrainedConfig, lora: LoraConfig) -> None:
    """Make sure that a model can have these adapters, before its weights are read.

    Raises:
        ModelError: it cannot, or peft is not installed.
    """
    import_peft(lora)
    with torch.device("meta"):
        find_targets(AutoModelForCausalLM.from_config(config), lora)


def _try(architecture: dict[str, Any], attention: str | None) -> nn.Module:
    config: PreTrainedConfig | None = None
    names, sizes = {name: name for name in SIZES}, {name: architecture.get(name) for name in SIZES}
    if architecture["model_type"] != DecoderConfig.model_type:  # whose unknown options `new_decoder` refuses
        config = AutoConfig.for_model(**architecture)
        _refuse_unknown(architecture, config)
        names = {name: config.attribute_map.get(name, name) for name in SIZES}
        sizes = {name: getattr(config, name, None) for name in SIZES}
    for name, value in sizes.items():
        if isinstance(value, int) and value < 1:
            raise ModelError(f"model.architecture.{names[name]}={value}: must be at least 1")
    with torch.device("meta"), torch.no_grad():
        if config is None:
            model: Any = new_decoder(architecture)
        else:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with suppress(NotImplementedError):  # what depends on values, such as an adaptive vocabulary
            model.train()(torch.zeros(1, 2, dtype=torch.long))  # dropout is refused only where it is done
    return model


def _refuse_unknown(architecture: dict[str, Any], config: PreTrainedConfig) -> None:
    """A field that a configuration keeps, but that it does not have without it, is misspelt."""
    usual = type(config)().to_dict()
    known = {*usual, *config.attribute_map, "model_type", "attn_implementation"}
    for name, value in architecture.items():
        if name in known or hasattr(type(config), name):
            continue
        with_it = type(config)(**{name: value}).to_dict()
        if {key: kept for key, kept in with_it.items() if key != name} != usual:
            continue  # an older name, whose value goes elsewhere
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ModelError(
            f"model.architecture.{name}={value}: the configuration of {config.model_type} has no such field{meant}; "
            "leave it out"
        )


def _blame(architecture: dict[str, Any], attention: str | None) -> str:
    """The option without which there would be a model; all of them if there is no such."""
    if attention is not None:
        try:
            _try(architecture, None)
        except Exception:
            pass
        else:
            return f"model.attention={attention}"
    for blamed, value in architecture.items():
        rest = {name: kept for name, kept in architecture.items() if name != blamed}
        try:
            _try(rest, attention)
        except Exception:
            continue
        return f"model.architecture.{blamed}={value}"
    return f"model.architecture={architecture}"
