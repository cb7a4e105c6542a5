"""Two results on the same documents: which model reads better, and how sure that is.

Documents differ far more from each other than two models do on one, so what is looked at is the difference on each
document, and the interval is over these differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infformer.evaluation.figures import interval_of_ratio
from infformer.evaluation.streaming import EvaluationError, describe_protocol
from infformer.results import Comparison, Difference, Document, Ratio, Results

COUNTS: tuple[Literal["documents", "tokens", "words", "bytes"], ...] = ("documents", "tokens", "words", "bytes")

FEWEST_DOCUMENTS = 5
"""That a verdict is given on: of fewer an interval is as wide as chance has it, and all may agree by chance."""

TIE = 5e-5
"""Nats per token: what is less is printed as 0.0000, and is no difference."""


def compare(a: Results, b: Results) -> Comparison:
    """By how much b is better or worse than a.

    Args:
        a, b: what two `results.json` hold.

    Raises:
        EvaluationError: they were measured on other documents or by another protocol.
    """
    check_comparable(a, b)
    documents = list(zip(a["per_document"], b["per_document"], strict=True))
    return {
        "protocol": describe_protocol(a["protocol"]),
        "documents": a["documents"],
        "tokens": a["tokens"],
        "a": {"checkpoint": a["protocol"]["checkpoint"], "perplexity": a["perplexity"]},
        "b": {"checkpoint": b["protocol"]["checkpoint"], "perplexity": b["perplexity"]},
        "difference": paired_difference(a["per_document"], b["per_document"]),
        "by_position": [
            {"from": place["from"], "to": place["to"], "tokens": tokens, **ratio}
            for index, place in enumerate(a["by_position"])
            for tokens, ratio in [_difference_in_class(documents, "by_position", index)]
        ],
        "by_recency": [
            {"previous_occurrence": place["previous_occurrence"], "tokens": tokens, **ratio}
            for index, place in enumerate(a["by_recency"])
            for tokens, ratio in [_difference_in_class(documents, "by_recency", index)]
        ],
        "per_document": [
            {"id": one["id"], "tokens": one["tokens"], "nats_per_token": (other["nll"] - one["nll"]) / one["tokens"]}
            for one, other in documents
        ],
    }


def paired_difference(a: list[Document], b: list[Document]) -> Difference:
    """Nats per token of b less those of a, on the same documents.

    On how many documents b is `better` or `worse`: on neither where the two differ by less than `TIE`.
    """
    differences = np.array([other["nll"] - one["nll"] for one, other in zip(a, b, strict=True)])
    tokens = np.array([one["tokens"] for one in a])
    ratio = _ratio(differences, tokens)
    assert ratio["nats_per_token"] is not None
    return {
        "nats_per_token": ratio["nats_per_token"],
        "interval": ratio["interval"],
        "documents": len(a),
        "better": int((differences <= -TIE * tokens).sum()),
        "worse": int((differences >= TIE * tokens).sum()),
    }


def check_comparable(a: Results, b: Results) -> None:
    """Make sure that two results are of the same documents, read by the same protocol.

    Raises:
        EvaluationError: they are not; it names what differs.
    """
    for name, run in (("first", a), ("second", b)):
        if "protocol" not in run or "documents" not in run["protocol"] or not run.get("per_document"):
            raise EvaluationError(
                f"the {name} results do not say how they were measured, document by document: they are not of eval.py, "
                "or of another version; measure again with eval.py"
            )
    one: Mapping[str, object] = a["protocol"]
    other: Mapping[str, object] = b["protocol"]
    for key in ("segment", "stride", "warmup_documents", "dtype"):
        if one[key] != other[key]:
            raise EvaluationError(
                f"the two were measured by different protocols: {key} is {one[key]} in the first and {other[key]} in "
                "the second; measure one of them again with eval.py by the protocol of the other"
            )
    for count in COUNTS:
        if a[count] != b[count]:
            raise EvaluationError(
                f"the two were measured on different documents: {a[count]} {count} in the first, {b[count]} in the "
                "second"
            )
    if [place["id"] for place in a["per_document"]] != [place["id"] for place in b["per_document"]]:
        raise EvaluationError("the two were measured on different documents: their names or their order differ")
    if one["documents"] != other["documents"]:
        raise EvaluationError(
            "the two were measured on different documents: equally many, of the same names, but of other tokens; was "
            "the tokenizer the same?"
        )


def verdict(comparison: Comparison) -> str:
    """What a comparison says, in a sentence or two."""
    difference = comparison["difference"]
    nats, interval, documents = difference["nats_per_token"], difference["interval"], difference["documents"]
    percent = 100 * math.expm1(nats)
    finding = f"{nats:+.4f} nats per token (perplexity {percent:+.2f} %)"
    if interval is None:
        return f"B differs from A by {finding} on the only document; one document tells nothing about others."
    low, high = interval
    told = (
        f"{finding}, 95 % interval over {documents} documents {low:+.4f} to {high:+.4f}; {tally(difference, 'better')}"
    )
    if documents < FEWEST_DOCUMENTS:
        return (
            f"No verdict, as {documents} documents are too few for one: B against A {told}. Measure both on "
            f"{FEWEST_DOCUMENTS} documents or more."
        )
    if low <= 0 <= high or abs(nats) < TIE:
        return f"No difference can be told: B against A {told}."
    return f"B reads {'better' if nats < 0 else 'worse'} than A: {told}."


def tally(difference: Difference, side: Literal["better", "worse"]) -> str:
    """On how many documents b is `better` or `worse`, as said by `side`, and on how many neither."""
    documents, equal = difference["documents"], difference["documents"] - difference["better"] - difference["worse"]
    return f"{side} on {difference[side]} of {documents} documents" + (f", equal on {equal}" if equal else "")


def _difference_in_class(
    documents: list[tuple[Document, Document]], breakdown: Literal["by_position", "by_recency"], index: int
) -> tuple[int, Ratio]:
    """In one class of tokens, such as the first 64 of each document."""
    pairs = [(one[breakdown][index], other[breakdown][index]) for one, other in documents]
    tokens = np.array([one[0] for one, _ in pairs])
    return int(tokens.sum()), _ratio(np.array([other[1] - one[1] for one, other in pairs]), tokens)


def _ratio(differences: NDArray[Any], tokens: NDArray[Any]) -> Ratio:
    total = tokens.sum()
    interval = interval_of_ratio(differences, tokens)
    return {
        "nats_per_token": float(differences.sum() / total) if total else None,
        "interval": None if interval is None else list(interval),
    }
