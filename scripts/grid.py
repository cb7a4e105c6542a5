"""Many runs, one after the other, that go on where they were stopped, and the means of what they found."""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from types import FrameType
from typing import Any

from infformer.durable import write_text
from infformer.evaluation.report import write_results
from infformer.progress import follow

TRAIN = Path(__file__).parents[1] / "train.py"


def new_parser(description: str | None, folder: str, seeds: Sequence[int] = (0, 1)) -> argparse.ArgumentParser:
    """The options of every script that makes a grid of runs, by default in this folder and with these seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("options", nargs="*", help="of train.py, for all runs")
    return parser


def add_memories(parser: argparse.ArgumentParser, memories: Mapping[str, list[str]], default: list[str]) -> None:
    """Which memories are rows: some of these, and others by their options; see `chosen_memories`."""
    parser.add_argument("--memories", nargs="*", choices=memories, default=default, metavar="MEMORY")
    parser.add_argument(
        "--row", nargs="+", action="append", default=[], metavar="NAME OPTION", help="another memory, by its options"
    )


def chosen_memories(arguments: argparse.Namespace, memories: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The options of each row, by its name."""
    return {name: memories[name] for name in arguments.memories} | {name: row for name, *row in arguments.row}


def write_report(
    folder: Path, name: str, found: Any, table: str, plot: Callable[[Path], list[Path]] = lambda path: []
) -> None:
    """Write what was found, in JSON and as a table in Markdown, print the table, and draw.

    Args:
        name: of both files.
        plot: from the file in JSON to figures.
    """
    write_results(folder / f"{name}.json", found)
    write_text(folder / f"{name}.md", table)
    print(table)
    for figure in plot(folder / f"{name}.json"):
        print(f"drawn: {figure}")


def run_all(runs: dict[str, list[str]], folder: Path, until: float = math.inf) -> dict[str, Any]:
    """Make every run, or what is left of it; one that has its results, by the same options, is not made again.

    Args:
        runs: the options of each run, by its name.
        folder: where the runs' folders are.
        until: by `time.monotonic`; then the run that is under way writes a checkpoint and ends, and no other begins.

    Returns:
        What `results.json` of each run holds that is whole; nothing of one that measures no test.

    Raises:
        SystemExit: a run failed or was stopped.
    """
    whole = []
    for name, options in follow(runs.items(), "training", "runs", len(runs)):
        done, asked = folder / name / "options.json", json.dumps(options, indent=1)
        if done.exists() and done.read_text(encoding="utf-8") == asked:
            whole.append(name)
            continue
        if time.monotonic() >= until:
            break
        print(f"== {name}: {' '.join(options)}", flush=True)
        where = [f"name={name}", f"output_dir={json.dumps(str(folder / name))}", "resume=auto"]
        status = _train([*options, *where], until)
        if status != 0 and time.monotonic() >= until:
            break
        if status != 0:
            sys.exit(f"error: the run {name} ended with exit status {status}; the same command goes on with it")
        # What is written last says that the run is whole. Asked for something else, train.py goes on or says why not.
        done.write_text(asked, encoding="utf-8")
        whole.append(name)
    files = {name: folder / name / "results.json" for name in whole}
    return {name: json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for name, file in files.items()}


def check_measured(options: Sequence[str]) -> None:
    """Make sure, before any run, that runs with these options measure what a table is made of.

    Raises:
        SystemExit: they do not.
    """
    if "data.test=null" in options:
        sys.exit("error: data.test=null: the table is of what runs measure at their end; name documents to test on")


def make_rows(runs: Sequence[dict[str, Any]], make: Callable[..., dict[str, Any]], path: Path, what: str) -> list[Any]:
    """Make every short run of this process, or what is left of them.

    Args:
        runs: the options of each.
        make: what finds its figures; it takes the options by their names.
        path: a file in JSON that keeps the rows, each as soon as it is whole; rows of other runs stay in it.
        what: is done, for the line that says how far it is.

    Returns:
        The options and the figures of each run, in the order of the runs.
    """
    kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    def row_of(run: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in kept if run.items() <= row.items()), None)

    missing = [run for run in runs if row_of(run) is None]
    for run in follow(missing, what, "runs", len(missing)):
        kept.append({**run, **make(**run)})
        write_results(path, {"rows": kept})
    return [row for run in runs if (row := row_of(run)) is not None]


def _train(options: list[str], until: float) -> int:
    """One run of train.py: its exit status. Who stops this script stops the run, which writes a checkpoint first."""
    process = subprocess.Popen([sys.executable, str(TRAIN), *options])

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # A terminal sends its SIGINT to both.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # or `nohup` said that both go on
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, pass_on)
    try:
        try:
            return process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def format_mean(values: list[float], decimals: int = 2, mean: Callable[[list[float]], float] = fmean) -> str:
    """The mean over seeds, and half of what lies between the lowest and the highest, if anything: `0.75 ± 0.02`."""
    if not values:
        return "–"
    spread = (max(values) - min(values)) / 2
    return f"{mean(values):.{decimals}f}" + (f" ± {spread:.{decimals}f}" if round(spread, decimals) > 0 else "")


def format_perplexity(values: list[float]) -> str:
    """The same of perplexities, whose mean is that of their nats, as in a sweep: the geometric one."""
    return format_mean(values, mean=geometric_mean)
