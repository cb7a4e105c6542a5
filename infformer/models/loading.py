"""Models and tokenizers from folders and from the hub, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from infformer.hub import WITHOUT_A_NETWORK, problem_with_the_hub
from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.memory_model import MemoryModel, ModelError
from infformer.models.pretrained import InfformerConfig, InfformerForCausalLM


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
    backbone = _load(AutoModelForCausalLM, name, "model.pretrained", dtype=torch.float32, **kwargs)
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers)


def load_trained(name: str, segment_length: int | None = None) -> InfformerForCausalLM:
    """A model to be measured: one of ours with its memory, or any causal language model without.

    Args:
        name: a checkpoint of a run, a model folder, or the name of a model on the hub.
        segment_length: tokens of a segment, for a memory other than those it was trained with. None: the same.

    Raises:
        ModelError: no model there, or the hub cannot be reached.
    """
    folder = model_folder(name)
    config = _load(AutoConfig, folder, "checkpoint")
    if not isinstance(config, InfformerConfig):
        return InfformerForCausalLM.from_backbone(
            _load(AutoModelForCausalLM, folder, "checkpoint", dtype=torch.float32)
        )
    if config.memory is not None and segment_length is not None:
        config.memory = {**config.memory, "segment_length": segment_length}
    return _load(InfformerForCausalLM, folder, "checkpoint", config=config, dtype=torch.float32)


def new_model(
    architecture: dict[str, Any],
    vocabulary: PreTrainedTokenizerBase,
    memory: LongTermMemoryConfig | None = None,
    memory_layers: list[int] | None = None,
    attention: str | None = None,
) -> InfformerForCausalLM:
    """A model from scratch, its vocabulary that of the tokenizer unless the architecture says otherwise."""
    fields = {
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        **architecture,
    }
    try:
        config = AutoConfig.for_model(**fields)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.architecture={architecture}: {error}") from error
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers)


def load_tokenizer(name: str, option: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub."""
    tokenizer = _load(AutoTokenizer, model_folder(name), option)
    if len(tokenizer) < 2:
        raise ModelError(
            f"{option}={name}: the tokenizer there is empty; give a folder with tokenizer.json or vocab.json"
        )
    return tokenizer


def check_fit(model: MemoryModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the model has an embedding for every token.

    Raises:
        ModelError: it has not.
    """
    if len(tokenizer) > model.vocabulary_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model knows {model.vocabulary_size}: they do not "
            "belong together; set model.tokenizer= to the tokenizer that the model was trained with"
        )


def model_folder(name: str) -> str:
    """The folder of the model in a checkpoint of a run; any other folder or name as it is."""
    inside = Path(name) / "model"
    return str(inside) if inside.is_dir() else name


def _load(kind: Any, name: str, option: str, **kwargs: Any) -> Any:
    path = Path(name).expanduser()
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
        return kind.from_pretrained(name, local_files_only=problem is not None, **kwargs)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        if problem is not None:
            raise ModelError(
                f"{option}={name}: {problem}, and no earlier download of it was found. To work without a network set "
                f"{option}= to a local folder, {WITHOUT_A_NETWORK}"
            ) from error
        reason = " ".join(str(error).split())
        raise ModelError(f"{option}={name}: no {kind.__name__} could be loaded from there: {reason}") from error
