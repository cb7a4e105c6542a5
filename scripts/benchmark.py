"""How fast it is, as ratios of what ran side by side, and how near to what the arithmetic allows.

python scripts/benchmark.py all                   # every row that this machine can run, and has not yet
python scripts/benchmark.py layer                 # one layer's memory, read and written, against the literal equations
python scripts/benchmark.py step --parts          # a training step with memory, against one without, and its parts
python scripts/benchmark.py stream                # an endless document: late segments against early ones

Contestants take turns, round by round, in one process. A command prints medians, quartiles and ratios, and writes them
with every round's seconds as JSON lines; `stream`, `attention` and `step --parts` draw a figure. A floor is the time
that the arithmetic takes at the speed of a large matrix product, or the bytes at that of a large copy, both measured at
the end.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks import (
    answering,
    attentions,
    density_read,
    evaluating,
    generating,
    memory_layer,
    saving,
    short_term,
    streaming,
    training_loop,
    training_step,
)
from benchmarks.machine import PRECISIONS, Setting, measure_machine
from benchmarks.measuring import Clock

from infformer.durable import check_place, write_text
from infformer.errors import UserError
from infformer.plots.benchmark import plot_attentions, plot_context, plot_parts

ROWS_ON_CPU = {
    "read": "read",
    "write": "write",
    "density": "density",
    "layer": "layer",
    "step": "step --parts",
    "step_windows": "step --backbone rotary --windows 2 4 8 --layers 2 --rounds 5",
    "loop": "loop --rounds 10",
    "save": "save",
    "stream": "stream",
    "generate": "generate",
    "answers": "answers",
    "attention": "attention --alone 8192 16384",
}
"""What `all` runs without a GPU: its rows by name, each in a process of its own."""

_STEP = "step --precision bfloat16 --rounds 20"
_LOOP = "loop --precision bfloat16 --compile --graphs --every 10 --rounds 6 --control"
_LLAMA = "--backbone rotary --layers 30 --hidden 576 --heads 9 --key-value-heads 3 --vocabulary 49152 --batch 16"
_SMALL = "--layers 12 --hidden 768 --heads 12 --vocabulary 50257 --segment 512 --functions 512 --samples 512"

ROWS_ON_GPU = {
    "step_graphs": f"{_STEP} --batch 8 --compile --graphs",
    "step_graphs_32": f"{_STEP} --batch 32 --compile --graphs",
    "loop_32": f"{_LOOP} --batch 32",
    "loop_llama": f"{_LOOP} {_LLAMA}",
    "density": "density --precision bfloat16 --batch 8 --rounds 50",
    "step_compiled": f"{_STEP} --batch 8 --compile",
    "step_compiled_32": f"{_STEP} --batch 32 --compile",
    "step": f"{_STEP} --batch 8",
    "step_32": f"{_STEP} --batch 32",
    "loop": f"{_LOOP} --batch 8",
    "step_llama": f"{_STEP} {_LLAMA} --compile --graphs",
    "density_wide": "density --precision bfloat16 --batch 8 --rounds 50 --deviation 1",
    "step_parts": "step --parts --precision bfloat16 --batch 8 --rounds 20",
    "read": "read --precision bfloat16 --batch 8 --rounds 50",
    "layer": "layer --precision bfloat16 --batch 8 --rounds 50",
    "step_windows": "step --backbone rotary --windows 2 4 8 --precision bfloat16 --batch 8 --rounds 10",
    "stream": f"stream {_SMALL} --precision bfloat16 --segments 300",
    "generate": f"generate {_SMALL} --precision bfloat16 --windows 8 --warmup 1 --rounds 2",
    "attention": "attention --batch 8 --alone 8192 16384",
}
"""The same on one, what says most first; each in less than a minute (owed: on a GPU none was timed yet)."""


def main() -> None:
    """Read the options and run one comparison, or all."""
    options = parse_options()
    device = torch.device(options.device)
    if options.command == "all":
        sys.exit(run_all(device, options.folder, options.rows, options.options, options.again))
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(Clock(device, options.clock), options.precision)
    if device.type == "cuda" and options.precision == "bfloat16":
        torch.set_float32_matmul_precision("high")  # what is left of float32, as train.py has it
    comparison = options.compare(options, setting)
    machine = measure_machine(setting)
    print(f"\n{comparison.format(machine)}\n")
    path = options.json or options.folder / f"{options.command}.jsonl"
    comparison.write(path, machine)
    write_text(path.with_suffix(".command"), shlex.join(sys.argv[1:]))
    print(f"written: {path}")
    if options.command == "stream":
        print(f"drawn: {plot_context(path)}")
    if options.command == "attention":
        print(f"drawn: {plot_attentions(path)}")
    if options.command == "step" and options.parts:
        print(f"drawn: {plot_parts(path)}")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--folder", type=Path, default=Path("outputs/benchmark"), help="where results go")
    everywhere.add_argument(
        "--device", default=str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    )
    measured = argparse.ArgumentParser(add_help=False, parents=[everywhere])
    measured.add_argument("--precision", choices=PRECISIONS, default="float32", help="of autocast")
    measured.add_argument(
        "--compile", action="store_true", help="torch.compile what can be (not the literal equations)"
    )
    measured.add_argument("--threads", type=int, help="of the CPU; torch's choice without")
    measured.add_argument(
        "--clock", choices=("wall", "process"), default="wall", help="process: what this process had of the processors"
    )
    measured.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    measured.add_argument("--json", type=Path, help="the results file; FOLDER/COMMAND.jsonl without")
    measured.add_argument("--profile", action="store_true", help="print the operators that take the most time")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    memory_layer.add_commands(commands, [measured])
    for comparison in (
        attentions, density_read, training_step, training_loop, saving, streaming, generating, short_term, evaluating,
        answering,
    ):  # fmt: skip
        comparison.add_command(commands, [measured])
    every_row = commands.add_parser("all", help="every row that this machine can run", parents=[everywhere])
    every_row.add_argument("--rows", nargs="*", help=f"only some of {', '.join(ROWS_ON_GPU)}")
    every_row.add_argument(
        "--again", action="store_true", help="also rows whose results are in the folder already, by the same options"
    )
    every_row.add_argument("options", nargs="*", help="of all rows, after --, such as -- --threads 1 --clock process")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def run_all(
    device: torch.device, folder: Path, chosen: list[str] | None, options: list[str], again: bool = False
) -> int:
    """Every row in a process of its own, so that no row finds the memory of another; the exit status.

    A row whose results are there, by the same options, is left out, so that what was stopped goes on.

    Args:
        chosen: names of rows; all if not given.
        options: added to those of every row.
        again: no row is left out.
    """
    rows = ROWS_ON_GPU if device.type == "cuda" else ROWS_ON_CPU
    unknown = set(chosen or []) - rows.keys()
    if unknown:
        sys.exit(f"error: --rows {' '.join(sorted(unknown))}: choose from {', '.join(rows)}")
    failed = []
    for name, row in rows.items():
        if chosen and name not in chosen:
            continue
        path = folder / f"{name}.jsonl"
        command = [*shlex.split(row), "--device", str(device), "--json", str(path), *options]
        typed = path.with_suffix(".command")  # a comparison that was made alone may have the same place
        same = typed.exists() and typed.read_text(encoding="utf-8") == shlex.join(command)
        if path.exists() and same and not again:
            print(f"== {name}: already in {path}; --again measures it once more", flush=True)
            continue
        print(f"== {name}: python scripts/benchmark.py {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, __file__, *command], check=False).returncode
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
        if status != 0:
            failed.append(name)
    if failed:
        print(f"not measured: {', '.join(failed)}; the errors stand above", file=sys.stderr)
    return min(len(failed), 1)


def _check(parser: argparse.ArgumentParser, options: Any) -> None:
    """Before any long work."""
    for name, value in vars(options).items():
        smallest = 0 if name == "warmup" else 1
        values = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and not isinstance(number, bool) and number < smallest for number in values):
            parser.error(f"--{name} {' '.join(map(str, values))}: must be at least {smallest}")
    if options.command != "all" and options.hidden % options.heads:
        parser.error(f"--hidden {options.hidden} --heads {options.heads}: the heads must divide the width")
    if options.command != "all" and options.clock == "process" and options.device != "cpu":
        parser.error(f"--clock process --device {options.device}: only a processor has such a clock; take wall")
    try:
        given = getattr(options, "json", None)
        check_place("--json" if given else "--folder", given.parent if given else options.folder)
    except UserError as error:
        parser.error(str(error))
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    command.run(main)
