"""Many runs of train.py, one after the other, that go on where they were stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

TRAIN = Path(__file__).parents[1] / "train.py"


def run_all(runs: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Make every run, or what is left of it; a run that has its results is not made again.

    Args:
        runs: the options of each run, by its name.
        folder: where the runs' folders are.

    Returns:
        What `results.json` of each run holds.
    """
    for name, options in tqdm(runs.items(), unit="run", disable=None):
        if not (folder / name / "results.json").exists():
            command = [
                sys.executable,
                str(TRAIN),
                *options,
                f"name={name}",
                f"output_dir={folder / name}",
                "resume=auto",
            ]
            print(f"== {name}: {' '.join(options)}", flush=True)
            finished = subprocess.run(command)
            if finished.returncode != 0:
                sys.exit(
                    f"error: the run {name} stopped with exit status {finished.returncode}; the same command goes on"
                )
    return {name: json.loads((folder / name / "results.json").read_text(encoding="utf-8")) for name in runs}
