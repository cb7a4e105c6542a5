"""Kill a run again and again, and see whether it learns what a run learns that nobody disturbed.

python scripts/soak.py                                # every engine, 25 kills each: hours
python scripts/soak.py --engines one zero3 --kills 3
python scripts/soak.py -- model=gpt2_ltm data=pg19    # of your own; options of train.py after --

Of each engine one run is made in peace, and one in which a process drawn at random is killed (SIGKILL) at a time drawn
at random: while it starts, steps, measures or saves. What is left is started anew with resume=auto. `accelerate` and
`torchrun` are runs whose launcher alone is ended, by SIGTERM or SIGKILL; then what it had started has to end by itself
before the run goes on. In the end every line of metrics and every tensor of the last checkpoint must be the same to the
last bit. `--folder` holds both runs and `soak.json`, what came out.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from infformer.progress import follow
from infformer.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENGINES = {
    "one": (),
    **dict.fromkeys(("ddp", "fsdp2", "zero2", "zero3"), TORCHRUN),
    "accelerate": ("-m", "accelerate.commands.launch", "--num_processes", "1"),
    "torchrun": TORCHRUN,
}
"""By name, with what starts them; `one` is one process without a launcher."""
LAUNCHERS = ("accelerate", "torchrun")
"""Where the launcher is ended, not a process that it started."""
PATIENCE = 120
"""Seconds that what a launcher had started may live on without it; 30 are promised where nothing else is going on."""
SETTING = (
    "model=tiny_scratch", "model/memory=sticky", "model.architecture.resid_pdrop=0.1",
    "model.architecture.embd_pdrop=0.1",
    "training.segment_length=32", "training.batch_size=4", "training.bptt_segments=2", "training.log_every=3",
    "training.checkpoint_every=4", "training.evaluate_every=25", "training.sample_every=null", "data.test=null",
    "data.segments_per_visit=4", "evaluation.max_validation_tokens=1000", "evaluation.before=false",
    "evaluation.inspected_segments=0",
)  # fmt: skip
"""Small, but with all that has to survive: dropout, sticky memory, gradients through it, short visits."""


def main() -> None:
    """Read the options, make the runs, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kills", type=int, default=25, help="of each engine's run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="decides who is killed, and when")
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"))
    parser.add_argument("options", nargs="*", help="of train.py, instead of the small setting")
    arguments = parser.parse_args()
    options = [*(arguments.options or SETTING), f"training.max_steps={arguments.steps}", "resume=auto"]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.engines:
        outcome = soak(name, options, arguments.kills, arguments.steps, arguments.seed, arguments.folder)
        failed = failed or bool(outcome["different"])
        with (arguments.folder / "soak.json").open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")
        said = (
            f"DIFFERENT: {', '.join(outcome['different'][:5])}" if outcome["different"] else "the same to the last bit"
        )
        print(
            f"{name}: {outcome['kills']} kills in {outcome['steps']} steps, {outcome['while_starting']} of them before "
            f"the first new step, {outcome['steps_made_again']} steps made again, at most "
            f"{outcome['longest_end']:.0f} s until all had ended: {outcome['compared']} numbers and tensors compared, "
            f"{said}",
            flush=True,
        )
    sys.exit(1 if failed else 0)


def soak(name: str, options: list[str], kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Both runs of one engine, and how they differ."""
    draw = random.Random(f"{name} {seed}")
    peace, war = folder / f"{name}_undisturbed", folder / f"{name}_killed"
    with _start(name, options, peace) as process:
        _expect_success(process, peace)
    starting = again = 0
    longest = 0.0
    for killed in follow(range(kills), name, "kills", kills):
        before = last_step(war)
        # So far that the kills are spread over the run; one of five while the processes start.
        farther = 0 if draw.random() < 0.2 else draw.randint(1, max(1, 2 * (steps - before) // (kills - killed + 2)))
        with _start(name, options, war) as process:
            reached = _reach(process, war, before, farther, draw)
            if reached is None:
                sys.exit(f"error: {name} came to its end after {killed} kills; more --steps, or another --seed")
            longest = max(longest, _end_launcher(process, war, draw) if name in LAUNCHERS else _kill(process, draw))
        starting += reached <= before
        again += max(0, last_step(war) - _newest_checkpoint(war))
    with _start(name, options, war) as process:
        _expect_success(process, war)
    different, compared = compare(peace, war, steps)
    return {
        "engine": name, "kills": kills, "steps": steps, "while_starting": starting, "steps_made_again": again,
        "longest_end": longest, "compared": compared, "different": different,
    }  # fmt: skip


def compare(one: Path, other: Path, steps: int) -> tuple[list[str], int]:
    """What differs between two runs, by name, and how much was compared."""
    lines, others = ([_without_time(line) for line in read_metrics(run / "metrics.jsonl")] for run in (one, other))
    different = [f"step {line['step']:.0f}" for line, twin in zip(lines, others, strict=False) if line != twin]
    if len(lines) != len(others):
        different.append(f"{len(lines)} lines of metrics against {len(others)}")
    tensors, twins = (_tensors(run / "checkpoints" / f"step-{steps:08d}") for run in (one, other))
    different += sorted(tensors.keys() ^ twins.keys())
    different += [name for name in tensors.keys() & twins.keys() if not torch.equal(tensors[name], twins[name])]
    return different, sum(len(line) for line in lines) + len(tensors)


def last_step(run: Path) -> int:
    """Of the last line of metrics; 0 before the first."""
    path = run / "metrics.jsonl"
    return int(read_metrics(path)[-1]["step"]) if path.exists() and path.stat().st_size else 0


def _start(name: str, options: list[str], run: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that all of it can be ended together."""
    if name not in ("one", *LAUNCHERS):
        options = [f"engine={name}", *options]
    run.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *ENGINES[name], "train.py", *options, f"name={run.name}", _output_dir(run)],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _output_dir(run: Path) -> str:
    return f"output_dir={json.dumps(str(run.resolve()))}"


def _reach(process: subprocess.Popen[bytes], run: Path, before: int, farther: int, draw: random.Random) -> int | None:
    """Wait until a run has come so many steps farther, or is starting if that is none.

    Returns:
        The last step that it reported; None if it came to its end before.
    """
    deadline = time.monotonic() + (600 if farther else draw.uniform(0, 15))
    while last_step(run) < before + max(farther, 1) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if farther:
        time.sleep(draw.uniform(0, 0.5))
    if process.poll() == 0:
        return None
    if process.poll() is not None:
        sys.exit(
            f"error: the run ended by itself, with exit status {process.returncode}; see {run.parent}/{run.name}.log"
        )
    return last_step(run)


def _kill(process: subprocess.Popen[bytes], draw: random.Random) -> float:
    """Kill one of the processes: after how many seconds the run has ended."""
    began = time.monotonic()
    os.kill(draw.choice(_workers(process.pid) or [process.pid]), signal.SIGKILL)
    try:
        process.wait(60)  # the launcher ends the others
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.monotonic() - began


def _end_launcher(process: subprocess.Popen[bytes], run: Path, draw: random.Random) -> float:
    """End the launcher alone: after how many seconds everything that it had started has ended too."""
    began = time.monotonic()
    process.send_signal(draw.choice([signal.SIGTERM, signal.SIGKILL]))
    process.wait()
    while living := _processes_of(run):
        if time.monotonic() - began > PATIENCE:
            sys.exit(f"error: {living} live {PATIENCE} s after their launcher; see {run.parent}/{run.name}.log")
        time.sleep(0.05)
    return time.monotonic() - began


def _processes_of(run: Path) -> list[int]:
    """Those that have the run's folder on their command line."""
    found, typed = [], _output_dir(run).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if typed in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _workers(launcher: int) -> list[int]:
    """The processes that a launcher has started; none if it is no launcher, or has not come to it."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(number) for number in found]


def _expect_success(process: subprocess.Popen[bytes], run: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"error: exit status {process.returncode}; see {run.parent}/{run.name}.log")


def _newest_checkpoint(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????")), default=0)


def _without_time(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "train/tokens_per_second"}


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(checkpoint)}: {name}": tensor
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


if __name__ == "__main__":
    command.run(main)
