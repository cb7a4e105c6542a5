"""From the nats of every token to the figures of `results.json`.

Words (runs of non-blanks) and bytes (UTF-8) are counted on the original text, so figures per word and per byte can be
compared between tokenizers. Intervals are over documents: those who wrote other documents would have found other
figures, and tokens of one document are not independent of each other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.streaming import Evaluator, TokenLosses
from infformer.results import RECENCY, Figures, Interval, Position, Ratio


def figures_of(evaluator: Evaluator, documents: TokenizedDocuments, nats: TokenLosses) -> Figures:
    """What a model's nats say.

    Args:
        evaluator: by which they were read.
        nats: of every token, as `read_documents` returns them.
    """
    tokens = documents.token_counts - 1
    words, bytes_ = documents.word_counts, documents.byte_counts
    edges, places = position_edges(int(tokens.max())), place_edges(evaluator.protocol.segment_length)
    by_position = np.zeros((2, len(documents), len(edges) - 1))
    by_place = np.zeros((2, len(documents), len(places) - 1))
    by_recency = np.zeros((2, len(documents), len(RECENCY)))
    for document, losses in enumerate(np.split(nats.astype(np.float64), np.cumsum(tokens)[:-1])):
        bins = np.searchsorted(edges, np.arange(len(losses)), side="right") - 1
        by_position[:, document] = _count(bins, losses, len(edges) - 1)
        place = np.arange(len(losses)) - _windows(evaluator, len(losses))
        by_place[:, document] = _count(np.searchsorted(places, place, side="right") - 1, losses, len(places) - 1)
        text = documents.tokens(document, 0, len(losses) + 1)
        by_recency[:, document] = _count(_recency(evaluator, text), losses, len(RECENCY))
    by_document = by_position[1].sum(axis=1)
    nll = float(by_document.sum())
    return {
        "tokens": int(tokens.sum()),
        "words": int(words.sum()),
        "bytes": int(bytes_.sum()),
        "documents": len(documents),
        "nll": nll,
        "perplexity": {"token": exp(nll / tokens.sum()), "word": exp(nll / max(int(words.sum()), 1))},
        "perplexity_interval": {"token": _interval(by_document, tokens), "word": _interval(by_document, words)},
        "bits_per_byte": nll / (math.log(2) * max(int(bytes_.sum()), 1)),
        "by_position": _positions(edges, by_position),
        "by_place": _positions(places, by_place),
        "by_recency": [
            {"previous_occurrence": name, "tokens": int(count), "nll": float(loss)}
            for name, count, loss in zip(RECENCY, *by_recency.sum(axis=1), strict=True)
        ],
        "per_document": [
            {
                "id": documents.ids[document],
                "tokens": int(tokens[document]),
                "words": int(words[document]),
                "bytes": int(bytes_[document]),
                "nll": float(by_document[document]),
                "by_position": by_position[:, document].T.tolist(),
                "by_place": by_place[:, document].T.tolist(),
                "by_recency": by_recency[:, document].T.tolist(),
            }
            for document in range(len(documents))
        ],
    }


def position_edges(longest: int) -> NDArray[np.int64]:
    """Edges of the bins of distance from a document's beginning: 0, 64, 128, 256, … up to the longest document."""
    edges = [0, 64]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return np.array(edges, dtype=np.int64)


def place_edges(segment_length: int) -> NDArray[np.int64]:
    """Edges of the bins of places in a window: 0, 4, 16, 64, … and its end; the first tokens stand apart."""
    edges = [0, 4]
    while edges[-1] < segment_length:
        edges.append(4 * edges[-1])
    return np.array([*edges[:-1], segment_length], dtype=np.int64)


def ratio_of(values: NDArray[Any], counts: NDArray[Any]) -> Ratio:
    """sum(values) / sum(counts) over documents, with its interval; see `interval_of_ratio`."""
    total = counts.sum()
    return {
        "nats_per_token": float(values.sum() / total) if total else None,
        "interval": interval_of_ratio(values, counts),
    }


def interval_of_ratio(values: NDArray[Any], counts: NDArray[Any]) -> Interval | None:
    """Of 95 %, of sum(values) / sum(counts) over documents: the jackknife, with Student's distribution.

    The standard error is that of the ratios with each of the n documents left out; with n − 1 degrees of freedom the
    interval is as wide as few documents make it. Documents in which nothing was counted say nothing and are none.

    Args:
        values, counts: of each document, [documents].

    Returns:
        None for less than two documents.
    """
    values, counts = values[counts > 0], counts[counts > 0]
    documents = len(values)
    if documents < 2:
        return None
    ratio = values.sum() / counts.sum()
    without = (values.sum() - values) / (counts.sum() - counts)
    error = math.sqrt((documents - 1) / documents * np.square(without - without.mean()).sum())
    reach = float(stdtrit(documents - 1, 0.975)) * error
    return [float(ratio - reach), float(ratio + reach)]


def _count(classes: NDArray[np.int64], losses: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """Tokens and nats of each class, [2, number]."""
    return np.stack([np.bincount(classes, minlength=number), np.bincount(classes, losses, minlength=number)])


def _positions(edges: NDArray[np.int64], by_document: NDArray[np.float64]) -> list[Position]:
    """The classes between some edges, of their tokens and nats in each document, [2, documents, classes]."""
    return [
        {"from": int(first), "to": int(last), "tokens": int(count), "nll": float(loss)}
        for first, last, count, loss in zip(edges[:-1], edges[1:], *by_document.sum(axis=1), strict=True)
    ]


def _recency(evaluator: Evaluator, text: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each token of a document but the first, the index in `RECENCY`, [tokens]."""
    previous = previous_occurrences(text)[1:]
    visible = np.maximum(0, _windows(evaluator, len(previous)) - evaluator.model.short_term_length)
    return np.where(previous < 0, 2, np.where(previous >= visible, 0, 1))


def _windows(evaluator: Evaluator, tokens: int) -> NDArray[np.int64]:
    """Where the window begins in which each token is predicted, the first to reach so far, [tokens]."""
    inputs = np.arange(tokens)
    segment, stride = evaluator.protocol.segment_length, evaluator.protocol.step
    return np.maximum(0, -(-(inputs + 1 - segment) // stride)) * stride


def previous_occurrences(text: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each token occurred last before its place, or -1: int64 [tokens]."""
    order = np.argsort(text, kind="stable")
    same = text[order[1:]] == text[order[:-1]]
    previous = np.full(len(text), -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def _interval(nats: NDArray[Any], counts: NDArray[Any]) -> Interval | None:
    interval = interval_of_ratio(nats, counts)
    return None if interval is None else [exp(bound) for bound in interval]


def exp(nats: float) -> float:
    """e to the power of the nats, infinite where that is more than a number can hold."""
    return math.inf if nats >= 700 else math.exp(nats)
