"""Perplexity of documents: of a model with its memory, and in situations in which that memory cannot help."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.baselines import measure_baselines
from infformer.evaluation.comparison import paired_difference
from infformer.evaluation.figures import figures_of
from infformer.evaluation.streaming import (
    Evaluator,
    Situation,
    read_documents,
    with_memory,
    with_memory_of_another_document,
    with_shuffled_memory,
    without_memory,
)
from infformer.results import (
    MEMORY_OF_ANOTHER_DOCUMENT,
    MEMORY_OFF,
    MEMORY_SHUFFLED_IN_TIME,
    Cost,
    Figures,
    Results,
)


def measure(
    evaluator: Evaluator,
    documents: TokenizedDocuments,
    controls: bool,
    checkpoint: str,
    choose_baselines_on: TokenizedDocuments | None = None,
) -> Results:
    """All that `results.json` says of a model: the figures, those of the controls if wished, and the protocol.

    Args:
        checkpoint: where the model comes from, for the record.
        choose_baselines_on: validation documents; with them the baselines are measured too.
    """
    start = time.perf_counter()
    nats = read_documents(evaluator, documents, with_memory(evaluator), "test")
    seconds = time.perf_counter() - start
    figures = figures_of(evaluator, documents, nats)
    found = evaluate_controls(evaluator, documents) if controls else {}
    results: Results = {
        **figures,
        "controls": {
            name: {**control, "difference": paired_difference(figures["per_document"], control["per_document"])}
            for name, control in found.items()
        },
        "protocol": {
            **evaluator.protocol.as_json(),
            "documents": documents.fingerprint,
            "memory": getattr(evaluator.model.config, "memory", None),
            "checkpoint": checkpoint,
        },
        "cost": _cost(evaluator, seconds, figures["tokens"]),
    }
    if choose_baselines_on is not None:
        results["baselines"] = measure_baselines(evaluator, documents, choose_baselines_on, figures)
    return results


def evaluate(evaluator: Evaluator, documents: TokenizedDocuments, title: str = "reading") -> Figures:
    """The figures of documents that are read with memory; see `figures_of`. The model is left in evaluation mode."""
    return figures_of(evaluator, documents, read_documents(evaluator, documents, with_memory(evaluator), title))


def evaluate_controls(evaluator: Evaluator, documents: TokenizedDocuments) -> dict[str, Figures]:
    """The same figures of the same model where its memory cannot help.

    `memory_off`: every segment is read with an empty memory. `memory_of_another_document`: with the memory that another
    document (see `partners`) had at the same distance from its beginning; needs two documents (2 w + 2 with w warm-up
    documents) and is left out where there are fewer. `memory_shuffled_in_time`: with the document's own, its past in
    another order.
    """
    if not evaluator.model.has_memory:
        return {}
    situations: dict[str, Situation] = {MEMORY_OFF: without_memory(evaluator)}
    if len(documents) >= 2 * evaluator.protocol.warmup_documents + 2:
        situations[MEMORY_OF_ANOTHER_DOCUMENT] = with_memory_of_another_document(evaluator, documents)
    situations[MEMORY_SHUFFLED_IN_TIME] = with_shuffled_memory(evaluator)
    return {
        name: figures_of(evaluator, documents, read_documents(evaluator, documents, read, name.replace("_", " ")))
        for name, read in situations.items()
    }


def _cost(evaluator: Evaluator, seconds: float, tokens: int) -> Cost:
    model, processes = evaluator.model, evaluator.processes
    read = evaluator.read_a_token(use_cache=True)
    on_gpu = model.device.type == "cuda"
    return {
        "seconds_per_token": seconds * processes.world_size / tokens,
        "state_bytes": read.state.nbytes,
        "window_bytes": evaluator.protocol.segment_length * _bytes_of_a_token(read.segment_cache.attention),
        "batch_size": evaluator.batch_size,
        "processes": processes.world_size,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
    }


def _bytes_of_a_token(cache: Any) -> int:
    """What attention keeps of each token. In all tensors of a cache the places are the last axis but one."""
    kept = (
        cache
        if isinstance(cache, tuple)
        else [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    )
    return sum(tensor.nbytes // tensor.shape[-2] for tensor in kept if isinstance(tensor, Tensor))
