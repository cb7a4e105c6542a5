"""Results as a file and as a table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
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
    lines = [f"{'':<28}{'per token':>12}{'per word':>12}{'bits/byte':>12}"]
    for name, figures in situations.items():
        if figures is not None:
            perplexity = figures["perplexity"]
            lines.append(
                f"{name:<28}{perplexity['token']:>12.3f}{perplexity['word']:>12.2f}{figures['bits_per_byte']:>12.4f}"
            )
    protocol = results["protocol"]
    lines.append(
        f"perplexity on {results['documents']} documents, {results['tokens']:,} tokens, {results['words']:,} words, "
        f"{results['bytes']:,} bytes; disjoint segments of {protocol['segment']} tokens, {protocol['reset']}, "
        f"{protocol['dtype']}"
    )
    return "\n".join(lines)
