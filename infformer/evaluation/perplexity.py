"""Perplexity of documents: of a model with its memory, and in situations in which that memory cannot help."""

from __future__ import annotations

from typing import Any

from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.comparison import paired_difference
from infformer.evaluation.figures import figures_of
from infformer.evaluation.reading import (
    Evaluator,
    Read,
    read_documents,
    with_memory,
    with_memory_of_another_document,
    with_shuffled_memory,
    without_memory,
)


def measure(evaluator: Evaluator, documents: TokenizedDocuments, controls: bool, checkpoint: str) -> dict[str, Any]:
    """All that `results.json` says of a model: the figures, those of the controls if wished, and the protocol.

    Args:
        checkpoint: where the model comes from, for the record.
    """
    figures = evaluate(evaluator, documents, "test")
    found = evaluate_controls(evaluator, documents) if controls else {}
    for control in found.values():
        control["difference"] = paired_difference(figures["per_document"], control["per_document"])
    return {
        **figures,
        "controls": found,
        "protocol": {
            **evaluator.protocol,
            "documents": documents.fingerprint,
            "memory": getattr(evaluator.model.config, "memory", None),
            "checkpoint": checkpoint,
        },
    }


def evaluate(evaluator: Evaluator, documents: TokenizedDocuments, title: str = "reading") -> dict[str, Any]:
    """The figures of documents that are read with memory; see `figures_of`. The model is left in evaluation mode."""
    return figures_of(evaluator, documents, read_documents(evaluator, documents, with_memory(evaluator), title))


def evaluate_controls(evaluator: Evaluator, documents: TokenizedDocuments) -> dict[str, Any]:
    """The same figures of the same model where its memory cannot help.

    `memory_off`: every segment is read with an empty memory. `memory_of_another_document`: with the memory that another
    document (see `partners`) had at the same distance from its beginning; needs two documents (2 w + 2 with w warm-up
    documents) and is
    left out where there are fewer. `memory_shuffled_in_time`: with the document's own, its past in another order.
    """
    if not evaluator.model.has_memory:
        return {}
    situations: dict[str, Read] = {"memory_off": without_memory(evaluator)}
    if len(documents) >= 2 * evaluator.warmup_documents + 2:
        situations["memory_of_another_document"] = with_memory_of_another_document(evaluator, documents)
    situations["memory_shuffled_in_time"] = with_shuffled_memory(evaluator)
    return {
        name: figures_of(evaluator, documents, read_documents(evaluator, documents, read, name.replace("_", " ")))
        for name, read in situations.items()
    }
