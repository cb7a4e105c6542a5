"""Frozen backbones whose weights take four or eight bits each, by bitsandbytes.

The only file that imports bitsandbytes, which transformers uses by itself.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from infformer.errors import ModelError

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # warns of every product of 8 bits

QUANTIZATIONS = ("4bit", "8bit")
OWN = ("memories", ".*lora_A", ".*lora_B")
"""The modules that stand beside a backbone and are not quantised, as they learn: patterns of their names."""


def check_installed(quantization: str) -> None:
    """Make sure that bitsandbytes is there.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401, the question is whether it can be
    except ImportError as error:
        raise ModelError(
            f"model.quantization={quantization} needs bitsandbytes: pip install 'infformer[bitsandbytes]' (in a "
            "checkout: pip install -e '.[bitsandbytes]')"
        ) from error


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """For the `from_pretrained` of a backbone.

    Args:
        quantization: `4bit` (NF4, arXiv 2305.14314) or `8bit` (LLM.int8(), arXiv 2208.07339).
        dtype: of all other weights, and of the products with those of four bits.
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether some of a model's weights take fewer bits than numbers do."""
    return getattr(model, "hf_quantizer", None) is not None or hasattr(model.config, "quantization_config")


def check_quantized(backbone: PreTrainedModel) -> None:
    """Make sure that a backbone, if it is quantised, can be saved beside a memory and loaded again.

    Raises:
        ModelError: it cannot.
    """
    method = getattr(backbone, "quantization_method", None)
    if is_quantized(backbone) and method != "bitsandbytes":
        raise ModelError(
            f"backbone={type(backbone).__name__} is quantised by {method}, and what is saved of it beside a memory "
            "could not be loaded again; have it quantised by bitsandbytes (model.quantization=4bit or 8bit), or call "
            "backbone.dequantize() first"
        )


def adopt_quantization(model: PreTrainedModel, backbone: PreTrainedModel) -> None:
    """Have a model whose backbone is quantised say so itself: transformers saves and loads by what the whole says."""
    if not is_quantized(backbone):
        return
    quantizer: Any = copy.copy(backbone.hf_quantizer)
    stored = copy.deepcopy(quantizer.quantization_config)
    stored.llm_int8_skip_modules = [*quantizer.modules_to_not_convert, *OWN]
    quantizer.quantization_config = model.config.quantization_config = stored
    model.hf_quantizer = quantizer
    copy_marks(backbone, model)


def copy_marks(quantized: PreTrainedModel, other: PreTrainedModel) -> None:
    """Have a model say what another says of how it is quantised: transformers and peft go by that."""
    for mark in ("quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(quantized, mark):
            setattr(other, mark, getattr(quantized, mark))
