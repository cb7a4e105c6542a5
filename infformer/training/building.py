"""What a run is made of, from its configuration: tokenizer, model, and the material of its task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from textwrap import shorten
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from infformer.config import RunConfig
from infformer.data.examples import Examples
from infformer.data.tokenization import (
    TokenizedDocuments,
    beginning_of_documents,
    tokenize_documents,
    warn_of_shared_documents,
)
from infformer.data.word_vocabulary import word_tokenizer
from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig
from infformer.models.document_classifier import DocumentClassifier
from infformer.models.encoder import ClassifierConfig, TextClassifier
from infformer.models.folders import load_config
from infformer.models.loading import (
    check_vocabulary,
    load_decoder,
    load_pretrained,
    load_tokenizer,
    new_decoder,
    new_model,
    vocabulary_of,
)
from infformer.models.memories import load_memories
from infformer.models.quantization import quantization_config
from infformer.tasks.task import Material
from infformer.training.growing import check_growth, grown
from infformer.training.runtime import Accelerator

logger = logging.getLogger(__name__)


def build_model(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Mapping[str, Examples] | None = None,
    step: int = 0,
) -> MemoryModel:
    """The model that a run trains.

    Args:
        tokenizer: None for a task without text.
        examples: of a task that has some.
        step: after which; it may have grown until then.

    Raises:
        ModelError, ValueError: it cannot be loaded or does not fit the tokenizer or the segment.
    """
    chosen, segment_length = config.model, config.training.segment_length
    model: MemoryModel
    if chosen.pretrained is not None and isinstance(load_config(chosen.pretrained, "model.pretrained"), DecoderConfig):
        names = ("memory", "memory_layers", "memories", "attention", "quantization")
        model = load_decoder(
            chosen.pretrained, segment_length, **{name: getattr(chosen, name) for name in names}, lora=chosen.lora.rank
        ).train()
    elif chosen.pretrained is not None:
        options: dict[str, Any] = {"dtype": getattr(torch, chosen.dtype)}
        if chosen.attention is not None:
            options["attn_implementation"] = chosen.attention
        if chosen.quantization is not None:
            options["quantization_config"] = quantization_config(chosen.quantization, options["dtype"])
        model = load_pretrained(
            chosen.pretrained, chosen.memory, chosen.memory_layers, segment_length, chosen.lora, **options
        )
        if chosen.memories is not None:
            load_memories(chosen.memories, model)
    else:
        if tokenizer is not None:
            vocabulary = vocabulary_of(tokenizer)
        else:
            vocabulary = config.task.sizes(chosen.is_classifier)
        architecture = {**vocabulary, **chosen.architecture}
        if chosen.is_classifier:
            classes = len(examples["train"].classes) if examples else 2
            model = TextClassifier(ClassifierConfig(**{"classes": classes, **architecture}))
        elif chosen.is_decoder:
            model = new_decoder(architecture, chosen.memory, segment_length)
        else:
            model = new_model(architecture, chosen.memory, chosen.memory_layers, segment_length, chosen.attention)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    model.check_segment_length(segment_length, "training.segment_length")
    if config.training.freeze_backbone:
        model.backbone.requires_grad_(False)
    if config.training.gradient_checkpointing:
        model.checkpoint_activations()
    if config.growth:
        check_growth(config.growth, model)
    for growth in config.growth:
        if growth.step <= step:
            model = grown(model, growth, config)
    if chosen.head.kind is None:
        return model
    return DocumentClassifier.on_top(model, chosen.head, examples["train"].classes if examples else ["0", "1"]).train()


def build_tokenizer(config: RunConfig, accelerator: Accelerator) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the documents; None for a task without text."""
    if not config.has_tokenizer:
        return None
    if config.model.tokenizer == "words":
        return word_tokenizer(config.data, accelerator.main_process_first())
    option = "model.pretrained" if config.model.tokenizer is None else "model.tokenizer"
    return load_tokenizer(config.model.tokenizer or str(config.model.pretrained), option)


def processes_of(accelerator: Accelerator, after_segment: Callable[[], None] = lambda: None) -> Processes:
    """The processes of a run, as they divide the texts of a measurement among them."""
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        reduce=lambda sums: accelerator.reduce(sums, reduction="sum"),
        progress=accelerator.is_main_process,
        after_segment=after_segment,
    )


def build_material(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: MemoryModel,
    accelerator: Accelerator,
    rank_rows: range,
    after_segment: Callable[[], None],
    examples: Mapping[str, Examples] | None = None,
) -> Material:
    """What the task of a run is made of: its documents as tokens, the lanes of this process, and what measures.

    Args:
        after_segment: called whenever a measurement has read a segment.
        examples: of a task that has some.
    """
    training, evaluation = config.training, config.evaluation
    documents: dict[str, TokenizedDocuments] = {}
    if tokenizer is not None and not config.task.has_examples:
        for split in config.data.splits:
            documents[split] = tokenize_documents(config.data, split, tokenizer, accelerator.main_process_first())
            documents[split].check_vocabulary(model.vocabulary_size)
        if accelerator.is_main_process:
            logger.info(beginning_of_documents(config.data, tokenizer))
            for split in config.data.drawn_splits:
                logger.info("held out for %s: %s", split, shorten(", ".join(documents[split].ids), 500))
            warn_of_shared_documents(documents)
    return Material(
        evaluator=Evaluator(
            model=model,
            protocol=ReadingProtocol(training.segment_length, precision=getattr(torch, training.precision)),
            batch_size=evaluation.batch_size,
            processes=processes_of(accelerator, after_segment),
        ),
        tokenizer=tokenizer,
        documents=documents,
        examples=examples or {},
        data=config.data,
        lanes=training.batch_size,
        rank_rows=rank_rows,
        segment_length=training.segment_length,
        bptt_segments=training.bptt_segments,
        seed=config.seed,
        before=evaluation.before,
        controls=evaluation.controls,
        baselines=evaluation.baselines,
        inspected_segments=evaluation.inspected_segments,
        max_validation_tokens=evaluation.max_validation_tokens,
    )
