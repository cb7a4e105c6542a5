"""Models and tokenizers from folders and from the hub, with errors that say what to do."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from infformer.hub import WITHOUT_A_NETWORK, problem_with_the_hub
from infformer.memory.layer import MemoryConfig
from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.memory_model import MemoryModel, ModelError
from infformer.models.pretrained import InfformerConfig, InfformerForCausalLM

PACKAGE = Path(__file__).parents[1]
SHIPPED = "infformer/checkpoints/"
"""How what comes with the package is named, from wherever it is asked for."""


def load_pretrained(
    name: str,
    memory: LongTermMemoryConfig | None = None,
    memory_layers: list[int] | None = None,
    **kwargs: Any,
) -> InfformerForCausalLM:
    """A pretrained causal language model with a new memory beside its attention, or with none.

    Args:
        name: a folder, or the name of a model on the hub.
        kwargs: for `from_pretrained`.

    Raises:
        ModelError: no model there; the hub cannot be reached; or the model has a memory of its own already.
    """
    config = _load(AutoConfig, name, "model.pretrained")
    if isinstance(config, InfformerConfig):
        raise ModelError(
            f"model.pretrained={name} has a memory already; to go on training it use resume=, to begin with its "
            "backbone alone export that first: python scripts/export_backbone.py CHECKPOINT FOLDER"
        )
    if isinstance(config, DecoderConfig):
        raise ModelError(
            f"model.pretrained={name} is a decoder from scratch, which brings its own memories; to go on training it "
            "use resume="
        )
    backbone = _load(AutoModelForCausalLM, name, "model.pretrained", dtype=torch.float32, **kwargs)
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers)


def load_trained(
    name: str, segment_length: int | None = None, short_term_length: int | None = None
) -> InfformerForCausalLM | DecoderForCausalLM:
    """A model to be measured: one of ours with its memory, or any causal language model without.

    Args:
        name: a checkpoint of a run, a model folder, or the name of a model on the hub.
        segment_length: tokens of a segment, for a memory other than those it was trained with. None: the same.
        short_term_length: the same for the length of a decoder's short-term memory.

    Raises:
        ModelError: no model there, the hub cannot be reached, or the model cannot have such a memory.
    """
    folder = model_folder(name)
    config = _load(AutoConfig, folder, "checkpoint")
    caches = isinstance(config, DecoderConfig) and config.memory_config.short_term_length > 0
    if short_term_length is not None and not caches:
        raise ModelError(f"short_term_length={short_term_length}: {name} has no short-term memory; set it to null")
    if isinstance(config, DecoderConfig):
        memory = config.memory_config
        length = segment_length or memory.segment_length
        long_term = memory.long_term and replace(memory.long_term, segment_length=length)
        cached = short_term_length or memory.short_term_length
        try:
            memory = MemoryConfig(length, cached, memory.compressive, long_term)
        except ValueError as error:
            said = str(error).replace("training.segment", "segment").replace("model.short_term", "short_term")
            raise ModelError(f"{name} with segment_length={length}, short_term_length={cached}: {said}") from error
        config.memory = asdict(memory) if config.memory else None
        return _load(DecoderForCausalLM, folder, "checkpoint", config=config, dtype=torch.float32)
    if not isinstance(config, InfformerConfig):
        return InfformerForCausalLM.from_backbone(
            _load(AutoModelForCausalLM, folder, "checkpoint", dtype=torch.float32)
        )
    if config.memory is not None and segment_length is not None:
        config.memory = {**config.memory, "segment_length": segment_length}
    return _load(InfformerForCausalLM, folder, "checkpoint", config=config, dtype=torch.float32)


def new_model(
    architecture: dict[str, Any],
    memory: LongTermMemoryConfig | None = None,
    memory_layers: list[int] | None = None,
    attention: str | None = None,
) -> InfformerForCausalLM:
    """A stock model from scratch, from the fields of its configuration, with a memory beside its attention."""
    try:
        config = AutoConfig.for_model(**architecture)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.architecture={architecture}: {error}") from error
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers)


def new_decoder(architecture: dict[str, Any], memory: MemoryConfig | None = None) -> DecoderForCausalLM:
    """A decoder from scratch, from the fields of its configuration.

    Raises:
        ModelError: an option that a decoder does not have, or a value that it cannot have.
    """
    fields = {name: value for name, value in architecture.items() if name != "model_type"}
    known = {*inspect.signature(DecoderConfig).parameters, "bos_token_id", "eos_token_id"} - {"memory", "kwargs"}
    for name in fields.keys() - known:
        raise ModelError(
            f"model.architecture.{name}={fields[name]}: a decoder has no such option; it has {', '.join(sorted(known))}"
        )
    return DecoderForCausalLM(DecoderConfig(**fields, memory=memory))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's configuration says of its vocabulary: size, and the tokens that begin and end a text."""
    from infformer.data.encoding import vocabulary_size  # whose room imports `datasets`

    return {
        "vocab_size": vocabulary_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def load_tokenizer(name: str, option: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub."""
    tokenizer = _load(AutoTokenizer, model_folder(name), option)
    if len(tokenizer) < 2:
        raise ModelError(
            f"{option}={name}: the tokenizer there is empty; give a folder with tokenizer.json or vocab.json"
        )
    return tokenizer


def load_config(name: str, option: str) -> PreTrainedConfig:
    """The configuration of a model, of which nothing else is read.

    Raises:
        ModelError: no model there, or the hub cannot be reached.
    """
    return _load(AutoConfig, model_folder(name), option)


def check_fit(model: MemoryModel, tokenizer: PreTrainedTokenizerBase, option: str = "model.tokenizer") -> None:
    """Make sure that the model has an embedding for every token.

    Args:
        option: that names a tokenizer, for the message.

    Raises:
        ModelError: it has not.
    """
    from infformer.data.encoding import vocabulary_size  # whose room imports `datasets`

    tokens, known = vocabulary_size(tokenizer), model.vocabulary_size
    if tokens > known:
        raise ModelError(
            f"the tokenizer has {tokens} tokens and the model knows {known}: they do not belong together; set "
            f"{option}= to the tokenizer that the model was trained with"
        )


def model_folder(name: str) -> str:
    """The folder of the model in a checkpoint of a run; any other folder or name as it is."""
    inside = Path(name) / "model"
    return str(inside) if inside.is_dir() else name


def _load(kind: Any, name: str, option: str, **kwargs: Any) -> Any:
    path = Path(name).expanduser()
    if name.startswith(SHIPPED) and not path.exists():
        path = PACKAGE.parent / name
    problem = None
    if path.is_dir():
        name = str(path)
        if "tokenizer" not in option and not (path / "config.json").is_file():
            raise ModelError(f"{option}={name}: this folder is no model, it has no config.json")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{option}={name}: there is no such folder (seen from {Path.cwd()})")
    else:
        problem = problem_with_the_hub("model", name, option)
    try:
        loaded = kind.from_pretrained(name, local_files_only=problem is not None, **kwargs)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        if problem is not None:
            raise ModelError(
                f"{option}={name}: {problem}, and no earlier download of it was found. To work without a network set "
                f"{option}= to a local folder, {WITHOUT_A_NETWORK}"
            ) from error
        reason = " ".join(str(error).split())
        raise ModelError(f"{option}={name}: no {kind.__name__} could be loaded from there: {reason}") from error
    if isinstance(loaded, nn.Module):
        _check_finite(loaded, f"{option}={name}")
    return loaded


def _check_finite(model: nn.Module, what: str) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(
                f"{what}: the weights {name} there are not finite (NaN or infinite), so nothing that the model says "
                "means anything; take an earlier checkpoint"
            )
