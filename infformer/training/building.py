"""What a run is made of, from its configuration: tokenizer, model, documents, task, evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedTokenizerBase

from infformer.config import RunConfig
from infformer.data.lanes import Lanes
from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents, warn_of_shared_documents
from infformer.data.word_vocabulary import word_tokenizer
from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
from infformer.models.base import MemoryModel
from infformer.models.loading import (
    check_vocabulary,
    load_pretrained,
    load_tokenizer,
    new_decoder,
    new_model,
    vocabulary_of,
)
from infformer.tasks.associative_recall import AssociativeRecall, AssociativeRecallConfig
from infformer.tasks.language_modelling import LanguageModelling
from infformer.tasks.needle import NeedleConfig, NeedleInABook
from infformer.tasks.passkey import Passkey, PasskeyConfig
from infformer.tasks.question_answering import QuestionAnswering
from infformer.tasks.question_stream import QuestionStream
from infformer.tasks.questions import QuestionSource
from infformer.tasks.retrieval import Retrieval
from infformer.tasks.retrieval_questions import RetrievalSource
from infformer.tasks.sorting import Sorting
from infformer.tasks.sorting_sequences import SortingConfig, SortingQuestions
from infformer.tasks.task import Examination, Task, TaskConfig
from infformer.training.runtime import Accelerator


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> MemoryModel:
    """The model that a run trains.

    Args:
        tokenizer: None for a task without text.

    Raises:
        ModelError, ValueError: it cannot be loaded or does not fit the tokenizer or the segment.
    """
    chosen, segment_length = config.model, config.training.segment_length
    model: MemoryModel
    if chosen.pretrained is not None:
        kernel = {} if chosen.attention is None else {"attn_implementation": chosen.attention}
        model = load_pretrained(chosen.pretrained, chosen.memory, chosen.memory_layers, segment_length, **kernel)
    else:
        if tokenizer is not None:
            vocabulary = vocabulary_of(tokenizer)
        else:
            vocabulary = {"vocab_size": config.task.vocabulary_size}
        architecture = {**vocabulary, **chosen.architecture}
        if chosen.is_decoder:
            model = new_decoder(architecture, chosen.memory, segment_length)
        else:
            model = new_model(architecture, chosen.memory, chosen.memory_layers, segment_length, chosen.attention)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    model.check_segment_length(segment_length)
    if config.training.freeze_backbone:
        model.backbone.requires_grad_(False)
    if config.training.gradient_checkpointing:
        model.checkpoint_activations()
    return model


def make_evaluator(
    accelerator: Accelerator,
    model: MemoryModel,
    segment_length: int,
    precision: str,
    documents: int,
    stride: int | None = None,
    warmup_documents: int = 0,
    after_segment: Callable[[], None] = lambda: None,
) -> Evaluator:
    """An evaluator of that many documents side by side, divided among the processes."""
    return Evaluator(
        model=model,
        protocol=ReadingProtocol(segment_length, stride, getattr(torch, precision), warmup_documents),
        batch_size=documents,
        processes=Processes(
            accelerator.process_index,
            accelerator.num_processes,
            reduce=lambda sums: accelerator.reduce(sums, reduction="sum"),
            progress=accelerator.is_main_process,
            after_segment=after_segment,
        ),
    )


def ask(
    task: TaskConfig,
    evaluator: Evaluator,
    controls: bool,
    data: DataConfig,
    documents: Mapping[str, TokenizedDocuments],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[QuestionSource, Examination]:
    """The questions of a task other than language modelling, and how a model is measured by them.

    Args:
        evaluator: of the texts.
        controls: measure also what the model knows without its memory.
        data, documents: those in which something is hidden, by split; `test` are those to measure by.
        tokenizer: of the documents; None for a task of symbols.

    Raises:
        DataError: the model, the documents or the tokenizer do not do for this task.
    """
    window = evaluator.protocol.segment_length + evaluator.model.short_term_length
    if isinstance(task, SortingConfig):
        return SortingQuestions(task), Sorting(task, evaluator, window)
    source: RetrievalSource
    if isinstance(task, AssociativeRecallConfig):
        source = AssociativeRecall(task)
    else:
        assert tokenizer is not None
        if isinstance(task, PasskeyConfig):
            source = Passkey(task, documents, tokenizer, data.beginning_of_document)
        else:
            assert isinstance(task, NeedleConfig)
            source = NeedleInABook(task, documents, tokenizer, data.beginning_of_document)
    return source, Retrieval(task, source, evaluator, window, controls, tokenizer)


def build_tokenizer(config: RunConfig, accelerator: Accelerator) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the documents; None for a task without text."""
    if config.task.vocabulary_size is not None:
        return None
    if config.model.tokenizer == "words":
        return word_tokenizer(config.data, accelerator.main_process_first())
    option = "model.pretrained" if config.model.tokenizer is None else "model.tokenizer"
    return load_tokenizer(config.model.tokenizer or str(config.model.pretrained), option)


def build_task(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: MemoryModel,
    accelerator: Accelerator,
    rank_rows: range,
    after_segment: Callable[[], None],
) -> Task:
    """What the model is to learn; every process reads its own lanes."""
    training, evaluation = config.training, config.evaluation
    evaluator = make_evaluator(
        accelerator,
        model,
        training.segment_length,
        training.precision,
        evaluation.batch_size,
        after_segment=after_segment,
    )
    documents: dict[str, TokenizedDocuments] = {}
    if tokenizer is not None:
        documents = {
            split: _tokenize(config, split, tokenizer, model, accelerator)
            for split in ("train", "validation", "test")
            if split == "train" or getattr(config.data, split) is not None
        }
        if accelerator.is_main_process:
            warn_of_shared_documents(documents)
    if not config.task.is_language_modelling:
        source, examination = ask(config.task, evaluator, evaluation.controls, config.data, documents, tokenizer)
        stream = QuestionStream(source, training.batch_size, training.segment_length, config.seed, rank_rows)
        return QuestionAnswering(stream, examination, tokenizer)
    assert tokenizer is not None
    lanes = Lanes(
        documents["train"],
        training.batch_size,
        training.segment_length,
        config.seed,
        shuffle=config.data.shuffle,
        segments_per_visit=config.data.segments_per_visit,
        rank_rows=rank_rows,
    )
    return LanguageModelling(
        tokenizer,
        documents,
        lanes,
        evaluator,
        bptt_segments=training.bptt_segments,
        before=evaluation.before,
        controls=evaluation.controls,
        inspected_segments=evaluation.inspected_segments,
        max_validation_tokens=evaluation.max_validation_tokens,
    )


def _tokenize(
    config: RunConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    model: MemoryModel,
    accelerator: Accelerator,
) -> TokenizedDocuments:
    documents = tokenize_documents(config.data, split, tokenizer, accelerator.main_process_first())
    documents.check_vocabulary(model.vocabulary_size)
    return documents
