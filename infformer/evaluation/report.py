"""Results as a file and as a table."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, at once or not at all. As JSON has no infinity and no NaN, both are written as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(_strict(results), indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)


def format_table(results: dict[str, Any]) -> str:
    """The figures of a run, one situation a line, and the protocol that they were measured by."""
    controls = results.get("controls") or {}
    situations = {
        "before training": results.get("before"),
        "after training" if results.get("before") else "this model": results,
        "  its memory off": controls.get("memory_off"),
        "  another document's memory": controls.get("memory_of_another_document"),
    }
    lines = [f"{'':<28} {'per token':>11} {'per word':>11} {'bits/byte':>11}"]
    for name, figures in situations.items():
        if figures is not None:
            perplexity = figures["perplexity"]
            lines.append(
                f"{name:<28} {perplexity['token']:>11.3f} {perplexity['word']:>11.2f} {figures['bits_per_byte']:>11.4f}"
            )
    protocol = results["protocol"]
    lines.append(
        f"perplexity on {results['documents']} documents, {results['tokens']:,} tokens, {results['words']:,} words, "
        f"{results['bytes']:,} bytes; disjoint segments of {protocol['segment']} tokens, {protocol['reset']}, "
        f"{protocol['dtype']}"
    )
    return "\n".join(lines)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
