"""What a comparison found: as a table, and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arithmetic import Work
from benchmarks.machine import Machine
from benchmarks.measuring import Summary, summarize


@dataclass
class Result:
    """What one contestant took."""

    name: str
    seconds: list[float]
    """Of every round."""
    work: Work | None = None
    """By formula."""
    part: bool = False
    """A part of what another contestant does as a whole."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What else was measured or counted, by names with units: `peak_bytes`, `tokens_per_second`."""


@dataclass
class Ratio:
    """One contestant by another."""

    name: str
    values: list[float]
    """Of every round; a single one where nothing varies from round to round."""


@dataclass
class Comparison:
    """Everything that one command measured."""

    name: str
    machine: Machine
    options: dict[str, Any]
    """Sizes and choices."""
    results: list[Result]
    ratios: list[Ratio]
    profiles: dict[str, str] = field(default_factory=dict)
    """Tables of operators, by contestant; where asked for."""

    def write(self, path: Path) -> None:
        """As JSON lines: of each contestant and part, and of each ratio, one line with all that it takes to read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shared = {"comparison": self.name, "machine": self.machine.describe(), "options": self.options}
        lines = [shared | self._describe(result) for result in self.results]
        lines += [
            shared | {"kind": "ratio", "name": ratio.name, **_statistics("ratio", ratio.values)}
            for ratio in self.ratios
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.options.items())
        tables = [
            format_table(["", "median", "quartiles", *_columns(self.results)], list(map(self._row, self.results)))
        ]
        if self.ratios:
            rows = [[ratio.name, *_spread(summarize(ratio.values), "{:.3f}".format)] for ratio in self.ratios]
            tables.append(format_table(["ratio", "median", "quartiles"], rows))
        profiles = [f"{name}\n{table}" for name, table in self.profiles.items()]
        return "\n\n".join([f"{self.name}: {sizes}\n{self.machine}", *tables, *profiles])

    def _describe(self, result: Result) -> dict[str, Any]:
        line = {
            "kind": "part" if result.part else "contestant",
            "name": result.name,
            **_statistics("seconds", result.seconds),
            **result.figures,
        }
        if result.work is not None:
            line |= {"flops": result.work.flops, "bytes": result.work.bytes}
            line |= {"floor_seconds": result.work.floor(self.machine)}
        return line

    def _row(self, result: Result) -> list[str]:
        median, spread = _spread(summarize(result.seconds), format_seconds)
        row = ["  " * result.part + result.name, median, spread]
        seconds = summarize(result.seconds).median
        for column in _columns(self.results):
            match column:
                case "floor" | "× floor" | "GFLOP/s" | "of peak" if result.work is None or seconds == 0:
                    row.append("")
                case "floor":
                    row.append(format_seconds(result.work.floor(self.machine)))
                case "× floor":
                    floor = result.work.floor(self.machine)
                    row.append(f"{seconds / floor:.2f}" if floor else "")
                case "GFLOP/s":
                    row.append(f"{result.work.flops / seconds / 1e9:,.1f}" if result.work.flops else "")
                case "of peak":
                    share = result.work.flops / seconds / self.machine.matmul_flops
                    row.append(f"{share:.3f}" if share else "")
                case _:
                    row.append(_format_figure(column, result.figures.get(column)))
        return row


def paired(name: str, above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratio of two contestants in each round, in which both met the same machine."""
    return Ratio(name, [one / other for one, other in zip(above, below, strict=True)])


def format_table(names: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they have to be; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in [names, *rows])
    ]
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 100 else f"{seconds * factor:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _columns(results: list[Result]) -> list[str]:
    computed = ["floor", "× floor"] if any(result.work for result in results) else []
    computed += ["GFLOP/s", "of peak"] if any(result.work and result.work.flops for result in results) else []
    figures = {name: None for result in results for name, value in result.figures.items() if _is_shown(value)}
    return computed + list(figures)


def _is_shown(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _format_figure(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def _spread(summary: Summary, form: Any) -> tuple[str, str]:
    return form(summary.median), f"{form(summary.lower)} – {form(summary.upper)}"


def _statistics(unit: str, values: list[float]) -> dict[str, Any]:
    summary = summarize(values)
    return {unit: values, f"median_{unit}": summary.median, f"quartiles_{unit}": [summary.lower, summary.upper]}
