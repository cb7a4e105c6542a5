"""Runs that differ in a few options as one table: the best first, seeds pooled, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from infformer.config import RunConfig
from infformer.errors import UserError
from infformer.evaluation.comparison import check_comparable, difference_of, gain_parts
from infformer.evaluation.figures import exp, interval_of_ratio
from infformer.evaluation.report import write_results
from infformer.plots.sweep import plot_sweep
from infformer.results import Interval, Results, Sweep, SweepRow
from infformer.training.folder import marked, saved_options


class SweepError(UserError, ValueError):
    """Runs that cannot stand in one table."""


@dataclass(frozen=True)
class Run:
    """What a run was asked for and what it found."""

    folder: Path
    options: dict[str, object]
    """As they are typed, without those on which nothing that is found depends."""
    seed: int
    results: Mapping[str, Any]

    @property
    def memory(self) -> str:
        """The kind of its memory, in a word or two."""
        options = self.results["protocol"].get("memory") or {}
        return f"{'sticky ' if options.get('sticky') else ''}{options.get('kind', 'long_term')}"


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The runs that have their results, and the folders of those that do not have them yet.

    Raises:
        SweepError: a folder holds no run, or its files cannot be read.
    """
    runs, unfinished = [], []
    for folder in folders:
        if not (folder / "config.yaml").exists():
            raise SweepError(f"{folder}: there is no run (no config.yaml); name the folders of runs of train.py")
        if not (folder / "results.json").exists():
            unfinished.append(folder)
            continue
        try:
            options = saved_options(folder / "config.yaml")
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            seed = int(str(options.pop("seed")))
        except (OSError, ValueError, KeyError) as error:
            raise SweepError(f"{folder}: its config.yaml or results.json cannot be read ({error})") from error
        free = marked(options, RunConfig, "free")
        kept = {name: value for name, value in options.items() if name not in free}
        runs.append(Run(folder, kept, seed, results))
    return runs, unfinished


def summarise_runs(runs: Sequence[Run]) -> Sweep:
    """One row for all runs that differ in their seed alone, the best first.

    Raises:
        SweepError: there is nothing to compare, or the runs learned different tasks.
        EvaluationError: they were measured on different documents.
    """
    if not runs:
        raise SweepError("no run has its results yet: wait until one is through, or go on with it by resume=auto")
    kinds = {_kind(run) for run in runs}
    if len(kinds) > 1:
        raise SweepError(f"the runs learned different tasks ({', '.join(sorted(kinds))}): name those of one task")
    (kind,) = kinds
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.options, sort_keys=True, default=str), []).append(run)
    names = _names([group[0] for group in groups.values()])
    make = _perplexity_row if kind == "perplexity" else _accuracy_row
    if kind == "perplexity":
        for run in runs[1:]:
            check_comparable(_figures(runs[0]), _figures(run), across_protocols=True)
    pairs = [(make(name, group), group) for name, group in zip(names, groups.values(), strict=True)]
    pairs.sort(key=lambda pair: pair[0]["value"] if kind == "perplexity" else -pair[0]["value"])
    if kind == "perplexity":
        best = _pooled(pairs[0][1])
        tokens = np.array([document["tokens"] for document in _figures(runs[0])["per_document"]])  # of all of them
        for row, group in pairs[1:]:
            row["behind"] = difference_of(_pooled(group) - best, tokens)
    return {"measure": kind, "rows": [row for row, _ in pairs]}


def write_summary(folders: Sequence[Path], folder: Path) -> str:
    """Write `summary.json` and `summary.png`; the table, and what lies where, in words."""
    runs, unfinished = read_runs(folders)
    sweep = summarise_runs(runs)
    write_results(folder / "summary.json", sweep)
    drawn = plot_sweep(folder / "summary.json")
    lines = [format_sweep(sweep)]
    if unfinished:
        lines.append(f"without results yet: {', '.join(map(str, unfinished))}")
    lines.append(f"written to {folder / 'summary.json'}, drawn in {', '.join(map(str, drawn))}")
    return "\n".join(lines)


def format_sweep(sweep: Sweep) -> str:
    """A line for each row, the best first."""
    perplexity = sweep["measure"] == "perplexity"
    heads = [sweep["measure"], "(95 %)", "seeds", "options"]
    if perplexity:
        heads[2:2] = ["behind the best, nats", "(95 %)", "specific to the document"]
    rows = [heads]
    for row in sweep["rows"]:
        cells = [f"{row['value']:.3f}", _spread(row["interval"], ".3f"), str(len(row["seeds"])), row["name"]]
        if perplexity:
            behind, specific = row["behind"], row["specific"]
            cells[2:2] = [
                "" if behind is None else f"{behind['nats_per_token']:+.4f}",
                "" if behind is None else _spread(behind["interval"], "+.4f"),
                "" if specific is None else f"{specific:+.4f}",
            ]
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    aligned = [
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)) + f"  {row[-1]}"
        for row in rows
    ]
    if perplexity:
        aligned.append(
            "perplexity per token, the mean of seeds; intervals over documents, of what is pooled over seeds"
        )
    else:
        aligned.append("the mean of seeds; intervals over seeds")
    return "\n".join(aligned)


def _kind(run: Run) -> str:
    if "perplexity" in run.results:
        return "perplexity"
    return "exact match" if "cells" in run.results else "accuracy"


def _figures(run: Run) -> Results:
    return cast(Results, run.results)


def _pooled(group: Sequence[Run]) -> np.ndarray[Any, Any]:
    """Nats of each document, the mean over seeds."""
    return np.mean([[document["nll"] for document in _figures(run)["per_document"]] for run in group], axis=0)


def _perplexity_row(name: str, group: Sequence[Run]) -> SweepRow:
    nats = _pooled(group)
    tokens = np.array([document["tokens"] for document in _figures(group[0])["per_document"]])
    interval = interval_of_ratio(nats, tokens)
    parts = [found["specific"]["nats_per_token"] for run in group if (found := gain_parts(_figures(run))) is not None]
    return {
        **_row(name, group),
        "value": exp(nats.sum() / tokens.sum()),
        "interval": None if interval is None else [exp(bound) for bound in interval],
        "by_seed": [_figures(run)["perplexity"]["token"] or math.inf for run in group],
        "specific": float(np.mean(parts)) if len(parts) == len(group) else None,
    }


def _accuracy_row(name: str, group: Sequence[Run]) -> SweepRow:
    values = np.array([_accuracy(run.results) for run in group])
    return {
        **_row(name, group),
        "value": float(values.mean()),
        "interval": interval_of_ratio(values, np.ones_like(values)),
        "by_seed": values.tolist(),
    }


def _row(name: str, group: Sequence[Run]) -> SweepRow:
    return {
        "name": name,
        "runs": [str(run.folder) for run in group],
        "seeds": [run.seed for run in group],
        "value": math.nan,
        "interval": None,
        "by_seed": [],
        "behind": None,
        "specific": None,
    }


def _accuracy(results: Mapping[str, Any]) -> float:
    """Of all answers of a retrieval task, of all lengths of sorting, of all examples."""
    if "cells" in results:
        cells = results["cells"]
        return float(np.average([cell["exact_match"] for cell in cells], weights=[cell["answers"] for cell in cells]))
    if "lengths" in results:
        return float(np.mean([figures["accuracy"] for figures in results["lengths"]]))
    return float(results["accuracy"])


def _names(runs: Sequence[Run]) -> list[str]:
    """By what each of the runs differs from the others, in the options as they are typed."""
    keys = dict.fromkeys(key for run in runs for key in run.options)
    groups = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    differing = [
        key
        for key in keys
        if len({json.dumps(run.options[key], default=str) for run in runs if key in run.options}) > 1 or key in groups
    ]
    names = []
    for run in runs:
        parts = []
        for key in differing:
            if key in run.options:
                value = run.options[key]
                parts.append(f"{key}={'null' if value is None else value}")
            elif key in groups:  # of other runs it is null
                parts.append(f"{key}={run.memory}" if key == "model.memory" else f"{key} as it is")
        names.append(" ".join(parts) or "all alike")
    return names


def _spread(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} – {interval[1]:{form}}"
