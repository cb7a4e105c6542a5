"""What a comparison found: as a table, and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.arithmetic import Work
from benchmarks.machine import Machine
from benchmarks.measuring import summarize
from infformer.durable import write_text
from infformer.results import BenchmarkFigures, BenchmarkLine, BenchmarkOptions


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
    figures: BenchmarkFigures = field(default_factory=BenchmarkFigures)


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
    options: dict[str, Any]
    """Sizes and choices."""
    results: list[Result]
    ratios: list[Ratio]
    profiles: dict[str, str] = field(default_factory=dict)
    """Tables of operators, by contestant; where asked for."""

    def write(self, path: Path, machine: Machine) -> None:
        """As JSON lines: of each contestant and part, and of each ratio, one line with all that it takes to read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[Mapping[str, object]] = [self._describe(result, machine) for result in self.results]
        shared = {"comparison": self.name, "machine": machine.describe(), "options": self.options}
        for ratio in self.ratios:
            median, lower, upper = summarize(ratio.values)
            statistics = {"ratio": ratio.values, "median_ratio": median, "quartiles_ratio": [lower, upper]}
            lines.append({**shared, "kind": "ratio", "name": ratio.name, **statistics})
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def format(self, machine: Machine) -> str:
        """Tables to be read, with the floors on this machine."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        cells = [_cells(result, machine) for result in self.results]
        names = list(dict.fromkeys(name for row in cells for name in row))
        tables = [format_table(names, [[row.get(name, "") for name in names] for row in cells])]
        if self.ratios:
            rows = [[ratio.name, *_spread(ratio.values, "{:.3f}".format)] for ratio in self.ratios]
            tables.append(format_table(["ratio", "median", "quartiles"], rows))
        profiles = [f"{name}\n{table}" for name, table in self.profiles.items()]
        return "\n\n".join([f"{self.name}: {options}\n{machine}", *tables, *profiles])

    def _describe(self, result: Result, machine: Machine) -> BenchmarkLine:
        median, lower, upper = summarize(result.seconds)
        line: BenchmarkLine = {
            "comparison": self.name,
            "machine": machine.describe(),
            "options": cast(BenchmarkOptions, self.options),
            "kind": "part" if result.part else "contestant",
            "name": result.name,
            "seconds": result.seconds,
            "median_seconds": median,
            "quartiles_seconds": [lower, upper],
            **result.figures,
        }
        if result.work is not None:
            line["flops"], line["bytes"] = result.work.flops, result.work.bytes
            line["floor_seconds"] = result.work.floor(machine)
        return line


def with_speeds(seconds: Mapping[str, list[float]], tokens: int) -> list[Result]:
    """What each contestant took, and how many tokens a second that is."""
    return [
        Result(name, values, figures={"tokens_per_second": tokens / summarize(values).median})
        for name, values in seconds.items()
    ]


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


def _cells(result: Result, machine: Machine) -> dict[str, str]:
    """A row of the table, by the names of its columns."""
    seconds = summarize(result.seconds).median
    median, quartiles = _spread(result.seconds, format_seconds)
    cells = {"": "  " * result.part + result.name, "median": median, "quartiles": quartiles}
    if result.work is not None:
        floor = result.work.floor(machine)
        cells |= {"floor": format_seconds(floor), "× floor": f"{seconds / floor:.2f}"}
        if result.work.flops:
            speed = result.work.flops / seconds
            cells |= {"GFLOP/s": f"{speed / 1e9:,.1f}", "of peak": f"{speed / machine.matmul_flops:.3f}"}
    for name, value in result.figures.items():
        if isinstance(value, int | float):
            is_size = name.endswith("_bytes")
            cells[name] = f"{value / 2**20:,.1f} MiB" if is_size else f"{value:,.{1 if value < 100 else 0}f}"
    return cells


def _spread(values: list[float], form: Callable[[float], str]) -> tuple[str, str]:
    summary = summarize(values)
    return form(summary.median), f"{form(summary.lower)} – {form(summary.upper)}"
