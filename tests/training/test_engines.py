"""Every engine, on two processes, learns what one process learns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from infformer.config import EngineConfig, RunConfig
from infformer.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
Launch = Callable[..., list[str | None]]


def engine(name: str) -> EngineConfig:
    """As `conf/engine/` has it, but that even the smallest weight is cut up."""
    options: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "engine" / f"{name}.yaml"))
    if name.startswith("zero3"):
        options["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return EngineConfig(**options, patience=30)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run these configurations on two processes; what went wrong with each, None where nothing did."""

    def start(runs: list[RunConfig], faults: dict[int, dict[str, Any]] | None = None) -> list[str | None]:
        folder = tmp_path_factory.mktemp("runs")
        entries = []
        for number, config in enumerate(runs):
            path = folder / f"{number}.yaml"
            OmegaConf.save(OmegaConf.structured(config), path)
            entries.append([str(path), (faults or {}).get(number)])
        (folder / "runs.json").write_text(json.dumps(entries))
        command = ["torchrun", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("processes.py"))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *command[1:], str(folder / "runs.json")],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        outcomes = [Path(path).with_suffix(".outcome") for path, _ in entries]
        assert all(path.exists() for path in outcomes), finished.stderr[-6000:]
        return [json.loads(path.read_text()) for path in outcomes]

    return start


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]


@pytest.fixture(scope="module")
def finished(configure, train, launch, tmp_path_factory) -> dict[str, Path]:
    """The folders of one run by every engine on two processes, and on one."""
    root = tmp_path_factory.mktemp("engines")
    runs = [
        configure(root / name, {"engine": engine(name), "training.gradient_accumulation": 1}) for name in ENGINES
    ]
    assert launch(runs) == [None] * len(ENGINES)
    train(configure(root / "one"))
    return {name: root / name for name in (*ENGINES, "one")}


@pytest.mark.parametrize("name", ENGINES)
def test_learns_what_one_process_learns(finished: dict[str, Path], name: str) -> None:
    assert losses(finished[name]) == pytest.approx(losses(finished["one"]), rel=1e-6)
