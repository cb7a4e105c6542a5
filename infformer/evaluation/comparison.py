"""Two results on the same documents: which model reads better, and how sure that is.

Documents differ far more from each other than two models do on one, so what is looked at is the difference on each
document, and the interval is over these differences.

What a memory gains has two parts, which its controls tell apart: what is specific to the document, by which its own
memory is better than another document's, and what the mere presence of a memory gains, by which another document's is
better than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infformer.evaluation.figures import exp, ratio_of
from infformer.evaluation.streaming import EvaluationError, describe_protocol
from infformer.results import (
    MEMORY_OF_ANOTHER_DOCUMENT,
    MEMORY_OFF,
    Compared,
    Comparison,
    Cost,
    Difference,
    Document,
    GainParts,
    Results,
)

COUNTS: tuple[Literal["documents", "tokens", "words", "bytes"], ...] = ("documents", "tokens", "words", "bytes")

FEWEST_DOCUMENTS = 5
"""That a verdict is given on: of fewer an interval is as wide as chance has it, and all may agree by chance."""

TIE = 5e-5
"""Nats per token: what is less is printed as 0.0000, and is no difference."""


def compare(a: Results, b: Results, across_protocols: bool = False) -> Comparison:
    """By how much b is better or worse than a.

    Args:
        a, b: what two `results.json` hold.
        across_protocols: their segments and windows may differ.

    Raises:
        EvaluationError: they were measured on other documents or by another protocol.
    """
    check_comparable(a, b, across_protocols)
    protocols = dict.fromkeys(describe_protocol(run["protocol"]) for run in (a, b))
    return {
        "protocol": " against ".join(protocols),
        "documents": a["documents"],
        "tokens": a["tokens"],
        "a": _compared(a),
        "b": _compared(b),
        "difference": paired_difference(a["per_document"], b["per_document"]),
        "parts": _parts(a, b),
        "by_position": _by_class(a, b, "by_position"),
        "by_place": _by_class(a, b, "by_place"),
        "by_recency": _by_class(a, b, "by_recency"),
        "per_document": [
            {"id": one["id"], "tokens": one["tokens"], "nats_per_token": (other["nll"] - one["nll"]) / one["tokens"]}
            for one, other in zip(a["per_document"], b["per_document"], strict=True)
        ],
    }


def paired_difference(a: list[Document], b: list[Document]) -> Difference:
    """Nats per token of b less those of a, on the same documents."""
    return difference_of(_nats(b) - _nats(a), np.array([one["tokens"] for one in a]))


def difference_of(differences: NDArray[Any], tokens: NDArray[Any]) -> Difference:
    """What one thing costs more than another on the same documents, per token, with its interval.

    On how many documents it is `better` or `worse`: on neither where the two differ by less than `TIE`.

    Args:
        differences: of the nats of each document, [documents].
        tokens: of each document, [documents].
    """
    ratio = ratio_of(differences, tokens)
    assert ratio["nats_per_token"] is not None
    return {
        "nats_per_token": ratio["nats_per_token"],
        "interval": ratio["interval"],
        "documents": len(tokens),
        "better": int((differences <= -TIE * tokens).sum()),
        "worse": int((differences >= TIE * tokens).sum()),
    }


def gain_parts(results: Results) -> GainParts | None:
    """The parts of what a model's memory gains; None without a memory, or without its controls.

    As differences from the model with its memory off: what is below 0 is gained.
    """
    nats = _situations(results)
    if nats is None or not has_memory(results):
        return None
    return _as_parts(nats, np.zeros_like(nats.off), results)


def has_memory(results: Results) -> bool:
    """Whether the model that was measured carries anything from one segment to the next."""
    return results["protocol"].get("memory") is not None


def check_comparable(a: Results, b: Results, across_protocols: bool = False) -> None:
    """Make sure that two results are of the same documents, read by the same protocol.

    Args:
        across_protocols: their segments and windows may differ.

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
        window = key in ("segment", "stride")
        if one[key] != other[key] and not (window and across_protocols):
            raise EvaluationError(
                f"the two were measured by different protocols: {key} is {one[key]} in the first and {other[key]} in "
                "the second; measure one of them again with eval.py by the protocol of the other"
                + (", or compare what they are with --across-protocols" if window else "")
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
    """What a comparison says, in a sentence or two: who reads better, by which part of its memory, at which cost."""
    difference = comparison["difference"]
    nats, interval, documents = difference["nats_per_token"], difference["interval"], difference["documents"]
    percent = 100 * (exp(nats) - 1)
    finding = f"{nats:+.4f} nats per token (perplexity {percent:+.2f} %)"
    rest = f"{_tell_parts(comparison)}.{_tell_costs(comparison)}"
    if interval is None:
        return f"B differs from A by {finding} on the only document; one document tells nothing about others{rest}"
    low, high = interval
    told = (
        f"{finding}, 95 % interval over {documents} documents {low:+.4f} to {high:+.4f}; {tally(difference, 'better')}"
    )
    if documents < FEWEST_DOCUMENTS:
        return (
            f"No verdict, as {documents} documents are too few for one: B against A {told}{rest} Measure both on "
            f"{FEWEST_DOCUMENTS} documents or more."
        )
    if low <= 0 <= high or abs(nats) < TIE:
        return f"No difference can be told: B against A {told}{rest}"
    if nats > 0:
        return f"B reads worse than A: {told}{rest}"
    how = ""
    if comparison["parts"] is not None:
        can_be_told = _gains(comparison["parts"]["specific"])
        how = ", in part by what is" if can_be_told else ", but by nothing that can be told to be"
        how += " specific to the document"
    return f"B reads better than A{how}: {told}{rest}"


def verdict_on_memory(results: Results) -> str | None:
    """What of its gain a memory owes to its document, in a sentence; None for a model without one."""
    if not has_memory(results):
        return None
    parts = gain_parts(results)
    if parts is None:
        return f"what of its memory's gain is specific to the document is not known: {_why_no_parts(results)}"
    specific, presence = parts["specific"], parts["presence"]
    if specific["documents"] < FEWEST_DOCUMENTS:
        judged = f"{specific['documents']} documents are too few for a verdict"
    elif _gains(specific):
        judged = "it gains by its document"
    else:
        judged = "nothing that it gains can be told to be specific to the document"
    return (
        f"the memory changes {_with_interval(specific)} nats per token by what is specific to the document, "
        f"{_with_interval(presence)} by its mere presence: {judged}"
    )


def tally(difference: Difference, side: Literal["better", "worse"]) -> str:
    """On how many documents b is `better` or `worse`, as said by `side`, and on how many neither."""
    documents, equal = difference["documents"], difference["documents"] - difference["better"] - difference["worse"]
    return f"{side} on {difference[side]} of {documents} documents" + (f", equal on {equal}" if equal else "")


class _Situations(NamedTuple):
    """Nats of each document: with its own memory, with another document's, and without any."""

    own: NDArray[Any]
    another: NDArray[Any]
    off: NDArray[Any]


def _situations(results: Results) -> _Situations | None:
    """A model without memory is the same in all three; None where a memory was measured without its controls."""
    own = _nats(results["per_document"])
    if not has_memory(results):
        return _Situations(own, own, own)
    controls = results.get("controls", {})
    found = [controls[name] for name in (MEMORY_OF_ANOTHER_DOCUMENT, MEMORY_OFF) if name in controls]
    if len(found) < 2 or not all(control.get("per_document") for control in found):
        return None
    return _Situations(own, *(_nats(control["per_document"]) for control in found))


def _parts(a: Results, b: Results) -> GainParts | None:
    """The parts of what b differs from a; None where neither has a memory, or one was measured without its controls."""
    one, other = _situations(a), _situations(b)
    if one is None or other is None or not (has_memory(a) or has_memory(b)):
        return None
    return _as_parts(_Situations(*(new - old for new, old in zip(other, one, strict=True))), other.off - one.off, a)


def _as_parts(nats: _Situations, without: NDArray[Any], results: Results) -> GainParts:
    tokens = np.array([document["tokens"] for document in results["per_document"]])
    return {
        "specific": difference_of(nats.own - nats.another, tokens),
        "presence": difference_of(nats.another - nats.off, tokens),
        "without_memory": difference_of(without, tokens),
    }


def _compared(results: Results) -> Compared:
    return {
        "checkpoint": results["protocol"]["checkpoint"],
        "perplexity": {  # null in a file: see `PerUnit`
            "token": results["perplexity"]["token"] or math.inf,
            "word": results["perplexity"]["word"] or math.inf,
        },
        "protocol": describe_protocol(results["protocol"]),
        "cost": results.get("cost"),
        "parts_unknown": _why_no_parts(results) if has_memory(results) and _situations(results) is None else None,
    }


def _why_no_parts(results: Results) -> str:
    if not results.get("controls"):
        return "measured without controls (controls=false)"
    documents = results["documents"]
    return f"measured on {documents} document{'s' * (documents > 1)}, too few for another document's memory"


def _gains(part: Difference) -> bool:
    """Whether it can be told that something is gained."""
    return part["interval"] is not None and part["interval"][1] < 0 and part["nats_per_token"] <= -TIE


def _tell_parts(comparison: Comparison) -> str:
    parts = comparison["parts"]
    unknown: dict[str, list[str]] = {}
    for name, run in _runs(comparison):
        if run["parts_unknown"]:
            unknown.setdefault(run["parts_unknown"], []).append(name)
    if unknown:
        reasons = "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in unknown.items())
        return f"; what of that is specific to the document is not known ({reasons})"
    if parts is None:
        return ""
    return (
        f". Of that, {_with_interval(parts['specific'])} is specific to the document, "
        f"{_with_interval(parts['presence'])} the mere presence of a memory, and "
        f"{_with_interval(parts['without_memory'])} is there with memories off"
    )


def _tell_costs(comparison: Comparison) -> str:
    """Protocol and cost of each, where they were not read alike."""
    if len({run["protocol"] for _, run in _runs(comparison)}) == 1:
        return ""
    told = [f"{name} read {run['protocol']}, {_tell_cost(run['cost'])}" for name, run in _runs(comparison)]
    costs = [run["cost"] for _, run in _runs(comparison) if run["cost"] is not None]
    unlike = len({(cost["device"], cost["processes"], cost["batch_size"]) for cost in costs}) > 1
    return f" {'; '.join(told)}.{' The times are of other machines or batches.' if unlike else ''}"


def _tell_cost(cost: Cost | None) -> str:
    if cost is None:
        return "at a cost that was not recorded (measure again)"
    held = (cost["state_bytes"] + cost["window_bytes"]) / 2**20
    return f"at {1000 * cost['seconds_per_token']:.3g} ms a token, with {held:.3g} MiB held for a text"


def _runs(comparison: Comparison) -> tuple[tuple[str, Compared], tuple[str, Compared]]:
    return ("A", comparison["a"]), ("B", comparison["b"])


def _with_interval(difference: Difference) -> str:
    interval = difference["interval"]
    spread = "" if interval is None else f" (95 %: {interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{difference['nats_per_token']:+.4f}{spread}"


def _nats(documents: list[Document]) -> NDArray[Any]:
    return np.array([document["nll"] for document in documents])


def _by_class(a: Results, b: Results, breakdown: Literal["by_position", "by_place", "by_recency"]) -> list[Any]:
    """The difference in each class of tokens, such as the first 64 of each document, that holds the same in both.

    Other windows see other tokens.
    """
    rows: list[Any] = []
    both = a.get(breakdown, []), b.get(breakdown, [])  # those of earlier versions have not all of them
    for index, (place, _) in enumerate(zip(*both, strict=False)):
        documents = zip(a["per_document"], b["per_document"], strict=True)
        pairs = [(one[breakdown][index], other[breakdown][index]) for one, other in documents]
        if all(one[0] == other[0] for one, other in pairs):
            tokens = np.array([one[0] for one, _ in pairs])
            named = {name: value for name, value in place.items() if name not in ("tokens", "nll")}
            ratio = ratio_of(np.array([other[1] - one[1] for one, other in pairs]), tokens)
            rows.append({**named, "tokens": int(tokens.sum()), **ratio})
    return rows
