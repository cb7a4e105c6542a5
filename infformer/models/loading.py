"""Models and tokenizers from folders and from the hub, with errors that say what to do."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from infformer.errors import ModelError, in_one_line
from infformer.memory.options import MemoryConfig
from infformer.models.adapters import LoraConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.document_classifier import DocumentClassifier, DocumentClassifierConfig
from infformer.models.encoder import ClassifierConfig, TextClassifier
from infformer.models.folders import load, load_config, load_weights, model_folder
from infformer.models.pretrained import InfformerConfig, InfformerForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load_pretrained(
    name: str,
    memory: MemoryConfig | None = None,
    memory_layers: list[int] | str | None = None,
    segment_length: int = 512,
    lora: LoraConfig | None = None,
    **kwargs: Any,
) -> InfformerForCausalLM:
    """A pretrained causal language model with a new memory beside its attention, or with none but its own.

    Args:
        name: a model's folder, a run's or its checkpoint, or the name of a model on the hub. One that has a memory
            keeps it, and gets no other.
        lora: new adapters in it; those of a run that had some are part of its weights from then on.
        kwargs: for `from_pretrained`, such as a `dtype` or a `quantization_config`.

    Raises:
        ModelError: no model there; the hub cannot be reached; or the model has a memory of its own already, or one of
            other segments.
    """
    folder = model_folder(name)
    config = load_config(folder, "model.pretrained")
    if isinstance(config, InfformerConfig) and (
        kwargs.get("quantization_config") or hasattr(config, "quantization_config")
    ):
        raise ModelError(
            f"model.pretrained={name} is a run's, and its backbone cannot be quantised, or quantised anew, as it lies "
            "there; begin with the stock model, or export its backbone first: python scripts/export.py CHECKPOINT "
            "FOLDER --what backbone"
        )
    if isinstance(config, InfformerConfig) and config.memory is None:
        wrapped = load_weights(InfformerForCausalLM, config, folder, "model.pretrained", **kwargs)
        return InfformerForCausalLM.from_backbone(wrapped.stock_backbone(), memory, memory_layers, segment_length, lora)
    is_bare = memory is None and memory_layers is None and (lora is None or lora.rank is None)
    if isinstance(config, InfformerConfig) and is_bare:
        model: InfformerForCausalLM = load_weights(InfformerForCausalLM, config, folder, "model.pretrained", **kwargs)
        model.check_segment_length(segment_length, "training.segment_length")
        return model
    if isinstance(config, InfformerConfig):
        raise ModelError(
            f"model.pretrained={name} has a memory already; to train that on, type model/memory=none and nothing else "
            "that stands beside a backbone; to begin with its backbone alone, export that first: python "
            "scripts/export.py CHECKPOINT FOLDER --what backbone"
        )
    if isinstance(config, ClassifierConfig | DocumentClassifierConfig):
        raise ModelError(
            f"model.pretrained={name} is a classifier, and no language model; give the model that it was made from, or "
            "to go on training it use resume="
        )
    if isinstance(config, DecoderConfig):
        raise ModelError(
            f"model.pretrained={name} is a {config.model_type} from scratch, beside which no memory stands; to go on "
            "training it use resume="
        )
    backbone = load_weights(AutoModelForCausalLM, config, folder, "model.pretrained", **kwargs)
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers, segment_length, lora)


def load_decoder(name: str, segment_length: int, **unwanted: Any) -> DecoderForCausalLM:
    """A decoder with its own memories, to be trained on by a run of its own.

    Args:
        name: a folder of its model, of a run or of a checkpoint.
        segment_length: that its memories have to have.
        unwanted: options of `model` that stand beside a model of others.

    Raises:
        ModelError: no decoder there, or one of other segments; or there is such an option.
    """
    for option, value in unwanted.items():
        if value is not None:
            raise ModelError(
                f"model.{option}={value}: model.pretrained={name} is a decoder from scratch, which brings its own "
                "memories and takes nothing beside them; leave it out, with model/memory=none"
            )
    folder = model_folder(name)
    model = load_weights(DecoderForCausalLM, load_config(folder, "model.pretrained"), folder, "model.pretrained")
    model.check_segment_length(segment_length, "training.segment_length")
    return model


def load_trained(
    name: str, segment_length: int | None = None, short_term_length: int | None = None
) -> InfformerForCausalLM | DecoderForCausalLM | TextClassifier | DocumentClassifier:
    """A model to be measured: one of ours with its memory, or any causal language model without.

    Args:
        name: a run's folder or a checkpoint of it, a model's folder, or the name of a model on the hub.
        segment_length: tokens of a segment, for a memory other than those it was trained with. None: the same.
        short_term_length: the same for the length of a short-term memory; a model without any memory gets one.

    Raises:
        ModelError: no model there, the hub cannot be reached, or the model cannot have such a memory.
    """
    folder = model_folder(name)
    config = load_config(folder, "checkpoint")
    if isinstance(config, ClassifierConfig) and short_term_length is None:
        return load_weights(TextClassifier, config, folder, "checkpoint")
    if isinstance(config, DocumentClassifierConfig) and short_term_length is None:
        return load_weights(DocumentClassifier, config, folder, "checkpoint")
    ours = isinstance(config, DecoderConfig | InfformerConfig)
    memory: MemoryConfig | None = config.memory_config if ours else None
    if memory is None and not isinstance(config, DecoderConfig):
        loaded = load_weights(InfformerForCausalLM if ours else AutoModelForCausalLM, config, folder, "checkpoint")
        if ours and short_term_length is None:
            return loaded
        short_term = None if short_term_length is None else MemoryConfig(short_term_length=short_term_length)
        return InfformerForCausalLM.from_backbone(
            loaded.stock_backbone() if ours else loaded, short_term, segment_length=segment_length or 512
        )
    if short_term_length is not None and (memory is None or not memory.short_term_length):
        raise ModelError(f"short_term_length={short_term_length}: {name} has no short-term memory; set it to null")
    if memory is not None:
        length = segment_length or config.segment_length
        try:
            memory = replace(memory, short_term_length=short_term_length or memory.short_term_length)
            memory.check_segment_length(length)
        except ValueError as error:
            said = str(error).replace("training.segment", "segment").replace("model.memory.short_term", "short_term")
            raise ModelError(
                f"{name} with segment_length={length}, short_term_length={memory.short_term_length}: {said}"
            ) from error
        config.memory, config.segment_length = memory.to_json(), length
    kind = DecoderForCausalLM if isinstance(config, DecoderConfig) else InfformerForCausalLM
    return load_weights(kind, config, folder, "checkpoint")


def new_model(
    architecture: dict[str, Any],
    memory: MemoryConfig | None = None,
    memory_layers: list[int] | str | None = None,
    segment_length: int = 512,
    attention: str | None = None,
) -> InfformerForCausalLM:
    """A stock model from scratch, from the fields of its configuration, with a memory beside its attention.

    Raises:
        ModelError: fields, or a kernel, of which transformers and torch cannot make a model.
    """
    try:
        config = AutoConfig.for_model(**architecture)
        backbone = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:  # whatever values that cannot be make the libraries raise
        options = f"model.architecture={architecture}" + ("" if attention is None else f" model.attention={attention}")
        raise ModelError(f"{options}: no model can be made of this: {in_one_line(error)}") from error
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers, segment_length)


def new_decoder(
    architecture: dict[str, Any], memory: MemoryConfig | None = None, segment_length: int = 512
) -> DecoderForCausalLM:
    """A decoder from scratch, from the fields of its configuration.

    Raises:
        ModelError: an option that a decoder does not have, or a value that it cannot have.
    """
    fields = {name: value for name, value in architecture.items() if name != "model_type"}
    known = {*inspect.signature(DecoderConfig).parameters, "bos_token_id", "eos_token_id"} - {
        "memory",
        "segment_length",
        "kwargs",
    }
    for name in fields.keys() - known:
        raise ModelError(
            f"model.architecture.{name}={fields[name]}: a decoder has no such option; it has {', '.join(sorted(known))}"
        )
    return DecoderForCausalLM(DecoderConfig(**fields, memory=memory, segment_length=segment_length))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's configuration says of its vocabulary: size, and the tokens that begin and end a text."""
    from infformer.data.tokenization import vocabulary_size  # whose room imports `datasets`

    return {
        "vocab_size": vocabulary_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def load_tokenizer(name: str, option: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub; of a folder that does not say which kind it is, a GPT-2's."""
    folder = model_folder(name)
    files = {file.name for file in Path(folder).expanduser().glob("*")}
    is_bare = {"vocab.json", "merges.txt"} <= files and not files & {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = load(GPT2Tokenizer if is_bare else AutoTokenizer, folder, option)
    if len(tokenizer) < 2:
        raise ModelError(
            f"{option}={name}: there is no tokenizer in this folder, no tokenizer.json and no vocab.json; name another "
            "folder for it by model.tokenizer= (eval.py, generate.py and scripts: tokenizer=)"
        )
    return tokenizer


def has_tokenizer(name: str) -> bool:
    """Whether a tokenizer lies in a folder, or belongs to a model on the hub, where every language model has one."""
    folder = Path(model_folder(name)).expanduser()
    return not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER_FILES)


def check_vocabulary(model: MemoryModel, tokenizer: PreTrainedTokenizerBase, option: str = "model.tokenizer") -> None:
    """Make sure that a tokenizer is the model's: each token the one that the model learned under its number.

    The model may have more embeddings than there are tokens, as many do to come to a round number, and the tokenizer
    more tokens than the one in the model's folder, if they have embeddings.

    Args:
        option: that names a tokenizer, for the message.

    Raises:
        ModelError: it is another.
    """
    from infformer.data.tokenization import vocabulary_size  # whose room imports `datasets`

    remedy = f"they do not belong together; set {option}= to the tokenizer that the model was trained with"
    tokens, known = vocabulary_size(tokenizer), model.vocabulary_size
    if tokens > known or known - tokens > max(1024, known // 20):
        raise ModelError(f"the tokenizer has {tokens} tokens and the model knows {known}: {remedy}")
    folder = Path(str(model.name_or_path or getattr(model, "backbone", model).name_or_path))
    if folder != Path(tokenizer.name_or_path) and any((folder / name).is_file() for name in TOKENIZER_FILES):
        own = load_tokenizer(str(folder))
        meant = own.get_vocab()
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
            if meant.get(token, number) != number:
                raise ModelError(
                    f"the tokenizer's {token!r} is number {number}, in the model's folder {meant[token]}: {remedy}"
                )
        if absent := meant.keys() - tokenizer.get_vocab().keys():
            raise ModelError(f"the tokenizer has no {min(absent)!r}, which the model's folder has: {remedy}")
        expected = {"bos_token": own.bos_token_id, "eos_token": own.eos_token_id}
    else:
        expected = {"bos_token": model.config.bos_token_id, "eos_token": model.config.eos_token_id}
    for name, number in expected.items():
        given = getattr(tokenizer, f"{name}_id")
        possible = number if isinstance(number, list) else [number]
        if None not in (given, number) and given not in possible:
            raise ModelError(f"the tokenizer's {name} is number {given}, the model's {number}: {remedy}")
