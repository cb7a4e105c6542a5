"""Results as a file and as tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from infformer.durable import write_text
from infformer.evaluation.comparison import tally, verdict
from infformer.evaluation.reading import describe_protocol

RECENCY_IN_WORDS = {"within_window": "within the window", "beyond_window": "before the window", "never": "nowhere"}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, at once or not at all. As JSON has no infinity and no NaN, both are written as null."""
    write_text(path, json.dumps(_strict(results), indent=1, ensure_ascii=False, allow_nan=False))


def format_table(results: dict[str, Any]) -> str:
    """The figures of a run, one situation a line, each beside the protocol that it was measured by."""
    controls = results.get("controls") or {}
    situations = {
        "before training": results.get("before"),
        "after training" if results.get("before") else "this model": results,
        "  its memory off": controls.get("memory_off"),
        "  another document's memory": controls.get("memory_of_another_document"),
        "  its memory shuffled in time": controls.get("memory_shuffled_in_time"),
    }
    protocol = describe_protocol(results["protocol"])
    lines = [f"{'perplexity':<30} {'per token':>11} {'(95 %)':>19} {'per word':>11} {'bits/byte':>11}  protocol"]
    for name, figures in situations.items():
        if figures is not None:
            perplexity, interval = figures["perplexity"], figures["perplexity_interval"]["token"]
            spread = "" if interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}"
            lines.append(
                f"{name:<30} {perplexity['token']:>11.3f} {spread:>19} {perplexity['word']:>11.2f} "
                f"{figures['bits_per_byte']:>11.4f}  {protocol}"
            )
    for name, control in controls.items():
        difference = control["difference"]
        interval = difference["interval"]
        spread = "" if interval is None else f" (95 %: {interval[0]:+.4f} to {interval[1]:+.4f})"
        lines.append(
            f"{name.replace('_', ' ')}: {difference['nats_per_token']:+.4f} nats per token{spread}, "
            f"{tally(difference, 'worse')}"
        )
    recency = [
        f"{place['nll'] / place['tokens']:.3f} {RECENCY_IN_WORDS[place['previous_occurrence']]} ({place['tokens']:,})"
        for place in results["by_recency"]
        if place["tokens"]
    ]
    lines.append("nats per token that occurred last: " + ", ".join(recency))
    lines.append(
        f"{results['documents']} documents, {results['tokens']:,} tokens, {results['words']:,} words, "
        f"{results['bytes']:,} bytes; {results['protocol']['reset']}; intervals over documents"
    )
    return "\n".join(lines)


def format_comparison(comparison: dict[str, Any]) -> str:
    """What `compare` found, as a table and a verdict."""
    lines = []
    for name in ("a", "b"):
        run = comparison[name]
        lines.append(
            f"{name.upper()}: perplexity {run['perplexity']['token']:.3f} per token, "
            f"{run['perplexity']['word']:.2f} per word ({comparison['protocol']})  {_from_here(run['checkpoint'])}"
        )
    lines.append(f"{'B less A':<34} {'nats per token':>15} {'95 % interval':>24} {'tokens':>12}")
    rows = [("all tokens", {**comparison["difference"], "tokens": comparison["tokens"]})]
    rows += [(f"  tokens {place['from']:,} to {place['to']:,}", place) for place in comparison["by_position"]]
    rows += [(f"  last {RECENCY_IN_WORDS[place['previous_occurrence']]}", place) for place in comparison["by_recency"]]
    for name, row in rows:
        if row["tokens"]:
            interval = row["interval"]
            spread = "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
            lines.append(f"{name:<34} {row['nats_per_token']:>+15.4f} {spread:>24} {row['tokens']:>12,}")
    lines.append(verdict(comparison))
    return "\n".join(lines)


def _from_here(checkpoint: str) -> str:
    """A path below the working directory as it would be typed there; any other, and names on the hub, as they are."""
    path = Path(checkpoint)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else checkpoint


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
