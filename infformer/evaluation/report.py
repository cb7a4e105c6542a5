"""Results as a file and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from infformer.durable import write_text
from infformer.evaluation.comparison import tally, verdict, verdict_on_memory
from infformer.evaluation.streaming import describe_protocol
from infformer.results import (
    CONTINUOUS_CACHE,
    DOCUMENT_UNIGRAM,
    MEMORY_OF_ANOTHER_DOCUMENT,
    MEMORY_OFF,
    MEMORY_SHUFFLED_IN_TIME,
    PARTS,
    RECENCY,
    BaselineSettings,
    Comparison,
    Difference,
    Figures,
    PositionRatio,
    RecencyRatio,
    Results,
)


def write_results(path: Path, results: Mapping[str, object]) -> None:
    """Write `results.json`, at once or not at all. As JSON has no infinity and no NaN, both are written as null."""
    write_text(path, json.dumps(_strict(results), indent=1, ensure_ascii=False, allow_nan=False))


def format_table(results: Results) -> str:
    """The figures of a run, one situation a line, each beside the protocol that it was measured by."""
    controls, baselines = results["controls"], results.get("baselines", {})
    situations: dict[str, Figures | None] = {
        "before training": results.get("before"),
        "after training" if results.get("before") else "this model": results,
        "  its memory off": controls.get(MEMORY_OFF),
        "  another document's memory": controls.get(MEMORY_OF_ANOTHER_DOCUMENT),
        "  its memory shuffled in time": controls.get(MEMORY_SHUFFLED_IN_TIME),
        "  a continuous cache instead": baselines.get(CONTINUOUS_CACHE),
        "  the document's unigram instead": baselines.get(DOCUMENT_UNIGRAM),
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
    for name, control in [*controls.items(), *baselines.items()]:
        difference = control["difference"]
        interval = difference["interval"]
        spread = "" if interval is None else f" (95 %: {interval[0]:+.4f} to {interval[1]:+.4f})"
        chosen = _tell_settings(baselines[name]["settings"]) if name in baselines else ""
        lines.append(
            f"{name.replace('_', ' ')}{chosen}: {difference['nats_per_token']:+.4f} nats per token{spread}, "
            f"{tally(difference, 'worse')}"
        )
    judged = verdict_on_memory(results)
    if judged is not None:
        lines.append(judged)
    recency = [
        f"{place['nll'] / place['tokens']:.3f} {RECENCY[place['previous_occurrence']]} ({place['tokens']:,})"
        for place in results["by_recency"]
        if place["tokens"]
    ]
    lines.append("nats per token that occurred last: " + ", ".join(recency))
    lines.append(
        f"{results['documents']} documents, {results['tokens']:,} tokens, {results['words']:,} words, "
        f"{results['bytes']:,} bytes; {results['protocol']['reset']}; intervals over documents"
    )
    return "\n".join(lines)


def _tell_settings(settings: BaselineSettings) -> str:
    share = f"a share of {settings['weight']:g}"
    if settings["size"] is None:
        return f" ({share})"
    return f" (of {settings['size']:,} tokens, sharpness {settings['sharpness']:g}, {share})"


def format_comparison(comparison: Comparison) -> str:
    """What `compare` found, as a table and a verdict."""
    lines = []
    for name, run in (("A", comparison["a"]), ("B", comparison["b"])):
        lines.append(
            f"{name}: perplexity {run['perplexity']['token']:.3f} per token, "
            f"{run['perplexity']['word']:.2f} per word ({run['protocol']})  {_from_here(run['checkpoint'])}"
        )
    lines.append(f"{'B less A':<34} {'nats per token':>15} {'95 % interval':>24} {'tokens':>12}")
    rows: list[tuple[str, int, Difference | PositionRatio | RecencyRatio]]
    rows = [("all tokens", comparison["tokens"], comparison["difference"])]
    parts = comparison["parts"]
    if parts is not None:
        rows += [(f"  {name}", comparison["tokens"], parts[part]) for part, name in PARTS.items()]
    rows += [(f"  tokens {row['from']:,} to {row['to']:,}", row["tokens"], row) for row in comparison["by_position"]]
    rows += [(f"  last {RECENCY[row['previous_occurrence']]}", row["tokens"], row) for row in comparison["by_recency"]]
    for name, tokens, row in rows:
        if tokens:
            interval = row["interval"]
            spread = "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
            lines.append(f"{name:<34} {row['nats_per_token']:>+15.4f} {spread:>24} {tokens:>12,}")
    lines.append(verdict(comparison))
    return "\n".join(lines)


def _from_here(checkpoint: str) -> str:
    """A path below the working directory as it would be typed there; any other, and names on the hub, as they are."""
    path = Path(checkpoint)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else checkpoint


def _strict(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
