"""What lies in a model's folder, or on the hub: looked at before it is loaded, then whole and finite, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from infformer.errors import ModelError
from infformer.hub import WITHOUT_A_NETWORK, problem_with_the_hub
from infformer.models.base import MemoryModel, dtype_of

PACKAGE = Path(__file__).parents[1]
SHIPPED = "infformer/checkpoints/"
"""How what comes with the package is named, from wherever it is asked for."""
LARGEST_CONFIG = 2**24
"""Bytes of a config.json that is still read."""


def model_folder(name: str) -> str:
    """The folder of the model in a checkpoint, in a run's `checkpoints`, or in a run's folder; any other name as it is.

    Of several checkpoints the best, and where none has been measured yet the newest.
    """
    given = Path(name).expanduser()
    for folder in (given, given / "checkpoints"):
        checkpoints = [folder, folder / "best", *sorted(folder.glob("step-????????"), reverse=True)]
        for checkpoint in checkpoints:
            if (checkpoint / "model").is_dir():
                return str(checkpoint / "model")
    return name


def load_config(name: str, option: str) -> PreTrainedConfig:
    """The configuration of a causal language model.

    Raises:
        ModelError: there is none, it cannot be read, or it is that of another kind of model.
    """
    name = model_folder(name)
    file = _place(name) / "config.json"
    if file.is_file():
        _check_json(file, option)
    config: PreTrainedConfig = load(AutoConfig, name, option)
    kind = type(config)
    # Those that were made to fill in words look at both sides of a token unless they are told not to.
    both_sides = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or both_sides or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{option}={name}: its config.json is that of a {config.model_type!r}, which is no causal language model; "
            "give a model that predicts the next token, such as a gpt2 or a llama"
        )
    return config


def load_weights(kind: Any, config: PreTrainedConfig, name: str, option: str, **kwargs: Any) -> Any:
    """A model with all of its weights, in float32 unless asked otherwise, or the model was made otherwise.

    Args:
        kind: a class of models, or `AutoModelForCausalLM`.
        config: what `load_config` returned.
        kwargs: for its `from_pretrained`.

    Raises:
        ModelError: the folder lacks weights, holds others than those of such a model, or some are not finite.
    """
    kwargs.setdefault("dtype", dtype_of(config))
    _check_size(config, name, option, None if "quantization_config" in kwargs else kwargs["dtype"])
    model, report = load(kind, name, option, config=config, output_loading_info=True, **kwargs)
    ours = isinstance(model, MemoryModel)
    for what, names in (("lacks", report["missing_keys"]), ("also holds", report["unexpected_keys"] if ours else ())):
        if names:
            raise ModelError(
                f"{option}={name}: its weights are not those of its config.json, it {what} {len(names)}, such as "
                f"{min(names)}; give the folder as it was saved"
            )
    check_finite(model, f"{option}={name}")
    return model


def check_finite(model: nn.Module, where: str) -> None:
    """Make sure that a model computes with numbers.

    Raises:
        ModelError: a weight that is none; it is named, after `where` it comes from.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ModelError(
                f"{where}: the weights {name} there are not finite (NaN or infinite), so nothing that the model says "
                "means anything; take an earlier checkpoint"
            )


def load(kind: Any, name: str, option: str, **kwargs: Any) -> Any:
    """What `kind.from_pretrained` makes of a folder or of a name on the hub, with errors that say what to do."""
    path = _place(name)
    problem = None
    if path.is_dir():
        name = str(path)
        if "tokenizer" not in option and not (path / "config.json").is_file():
            alone = (
                "; it holds memories alone: begin a run with them by model.memories=, or give them to attach_memories"
            )
            hint = alone if (path / "memories.json").is_file() else ""
            raise ModelError(f"{option}={name}: this folder is no model, it has no config.json{hint}")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{option}={name}: there is no such folder (seen from {Path.cwd()})")
    else:
        problem = problem_with_the_hub("model", name, option)
    try:
        return kind.from_pretrained(name, local_files_only=problem is not None, **kwargs)
    except ModelError as error:
        raise ModelError(f"{option}={name}: {error}") from error
    except Exception as error:  # whatever a broken folder makes the libraries raise
        if problem is not None:
            here = f"there is no such folder (seen from {Path.cwd()}), and on the hub: " if path.parent.is_dir() else ""
            raise ModelError(
                f"{option}={name}: {here}{problem}, and no earlier download of it was found. To work without a network "
                f"set {option}= to a local folder, {WITHOUT_A_NETWORK}"
            ) from error
        reason = " ".join(str(error).split())
        raise ModelError(f"{option}={name}: no {kind.__name__} could be loaded from there: {reason}") from error


def _place(name: str) -> Path:
    """Where a name is, if it is a folder's."""
    path = Path(name).expanduser()
    return PACKAGE.parent / name if name.startswith(SHIPPED) and not path.exists() else path


def _check_json(file: Path, option: str) -> None:
    """Make sure that a config.json is one, before a library makes of it what it can."""
    if file.stat().st_size > LARGEST_CONFIG:
        raise ModelError(f"{option}={file.parent}: its config.json has {file.stat().st_size:,} bytes: that is none")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{option}={file.parent}: its config.json cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError(
            f"{option}={file.parent}: its config.json does not say of which model_type the model is; give a folder "
            "that save_pretrained has written"
        )


def _check_size(config: PreTrainedConfig, name: str, option: str, dtype: torch.dtype | str | None) -> None:
    """Make sure that a folder can hold the weights that its config.json describes, and this machine's memory too.

    What a folder lacks is made up by transformers: all of a large model, where a config.json belongs to another folder.

    Args:
        dtype: in which they are loaded; another value where that, and so what they take, is not known yet.
    """
    folder = _place(name)
    stored = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    if not stored or hasattr(config, "quantization_config"):
        return
    stock = getattr(config, "backbone", config)  # the memories beside it are small
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(stock)
    except Exception as error:  # whatever sizes that do not fit make the libraries raise
        raise ModelError(
            f"{option}={name}: no model could be made from its config.json: {' '.join(str(error).split())}"
        ) from error
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > stored:  # one byte a weight is less than anyone stores
        raise ModelError(
            f"{option}={name}: its config.json describes {weights:,} weights, and the files beside it have only "
            f"{stored:,} bytes: they do not belong together; give the folder as it was saved"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if isinstance(dtype, torch.dtype) and (needed := weights * dtype.itemsize) > memory:
        raise ModelError(
            f"{option}={name}: its {weights:,} weights take {needed / 2**30:.0f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and this machine has {memory / 2**30:.0f}; give a smaller model"
        )
