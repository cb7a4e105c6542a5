"""Perplexity of documents: of a model with its memory, and in situations in which that memory cannot help."""

from __future__ import annotations

from typing import Any

from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.comparison import paired_difference
from infformer.evaluation.figures import figures_of
from infformer.evaluation.reading import (
    Read,
    Reader,
    read_documents,
    with_memory,
    with_memory_of_another_document,
    with_shuffled_memory,
    without_memory,
)


def measure(reader: Reader, documents: TokenizedDocuments, controls: bool, checkpoint: str) -> dict[str, Any]:
    """All that `results.json` says of a model: the figures, those of the controls if wished, and the protocol.

    Args:
        checkpoint: where the model comes from, for the record.
    """
    figures = evaluate(reader, documents, "test")
    found = evaluate_controls(reader, documents) if controls else {}
    for control in found.values():
        control["difference"] = paired_difference(figures["per_document"], control["per_document"])
    return {
        **figures,
        "controls": found,
        "protocol": {
            **reader.protocol,
            "documents": documents.fingerprint,
            "memory": getattr(reader.model.config, "memory", None),
            "checkpoint": checkpoint,
        },
    }


def evaluate(reader: Reader, documents: TokenizedDocuments, title: str = "reading") -> dict[str, Any]:
    """The figures of documents that are read with memory; see `figures_of`. The model is left in evaluation mode."""
    return figures_of(reader, documents, read_documents(reader, documents, with_memory(reader), title))


def evaluate_controls(reader: Reader, documents: TokenizedDocuments) -> dict[str, Any]:
    """The same figures of the same model where its memory cannot help.

    `memory_off`: every segment is read with an empty memory. `memory_of_another_document`: with the memory that another
    document (see `partners`) had at the same distance from its beginning; needs two documents (2 w + 2 with w warm-up
    documents) and is
    left out where there are fewer. `memory_shuffled_in_time`: with the document's own, its past in another order.
    """
    if not reader.model.has_memory:
        return {}
    situations: dict[str, Read] = {"memory_off": without_memory(reader)}
    if len(documents) >= 2 * reader.warmup_documents + 2:
        situations["memory_of_another_document"] = with_memory_of_another_document(reader, documents)
    situations["memory_shuffled_in_time"] = with_shuffled_memory(reader)
    return {
        name: figures_of(reader, documents, read_documents(reader, documents, read, name.replace("_", " ")))
        for name, read in situations.items()
    }
