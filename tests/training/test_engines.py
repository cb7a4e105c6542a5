"""Every engine, on two processes, learns what one process learns."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from infformer.config import CHOICES, EngineConfig, RunConfig
from infformer.training import trainer
from infformer.training.metrics import read_metrics
from infformer.training.trainer import TrainingStopped

ROOT = Path(__file__).parents[2]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
DEEPSPEED = find_spec("deepspeed") is not None
"""Whether it is installed: the engines that need it run, or are skipped, each by itself."""
Launch = Callable[..., "Launched"]


def cases(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; an engine of DeepSpeed's is tested where that is installed."""
    return [
        pytest.param(name, marks=pytest.mark.needs("deepspeed") if name.startswith("zero") else ()) for name in names
    ]


def installed(names: Iterable[str]) -> list[str]:
    return [name for name in names if DEEPSPEED or not name.startswith("zero")]


def engine(name: str) -> EngineConfig:
    """As `engine=` chooses it, but that even the smallest weight is cut up."""
    chosen = replace(deepcopy(CHOICES["engine"][name]), patience=60)
    if name.startswith("zero3"):
        chosen.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return chosen


@dataclass
class Launched:
    """What came of some runs on two processes."""

    outcomes: list[str | None]
    """What went wrong with each, None where nothing did; shorter than the runs if a process did not survive."""
    errors: str
    """All that was written to stderr."""


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Make these runs on two processes, one after the other; `faults` says by number what goes wrong (processes.py)."""

    def start(runs: list[RunConfig], faults: dict[int, dict[str, Any]] | None = None) -> Launched:
        folder = tmp_path_factory.mktemp("runs")
        entries = []
        for number, config in enumerate(runs):
            path = folder / f"{number}.yaml"
            path.write_bytes(pickle.dumps(config))
            entries.append([str(path), (faults or {}).get(number)])
        (folder / "runs.json").write_text(json.dumps(entries))
        command = ["--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("processes.py"))]
        with (folder / "errors").open("w") as errors:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *command, str(folder / "runs.json")],
                cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=errors, stderr=errors, timeout=400, check=False,
            )  # fmt: skip
        outcomes = [Path(path).with_suffix(".outcome") for path, _ in entries]
        return Launched(
            [json.loads(path.read_text()) for path in outcomes if path.exists()], (folder / "errors").read_text()
        )

    return start


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]


@pytest.fixture(scope="module")
def one(configure, train, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(configure(folder))
    return folder


@pytest.fixture(scope="module")
def finished(configure, launch, tmp_path_factory) -> dict[str, Path]:
    """The folders of the same run by every engine on two processes, each with one of the two parts of a step.

    And of one more, of which a process is killed: it ends what was launched.
    """
    root = tmp_path_factory.mktemp("engines")
    names = installed(ENGINES)
    runs = [configure(root / name, {"engine": engine(name), "training.gradient_accumulation": 1}) for name in names]
    runs.append(configure(root / "killed", {"engine": engine("ddp"), "training.gradient_accumulation": 1}))
    launched = launch(runs, {len(names): {"process": 1, "step": 5, "how": "kill"}})
    assert launched.outcomes == [None] * len(names), launched.errors
    return {name: root / name for name in [*names, "killed"]}


@pytest.mark.parametrize("name", cases(ENGINES))
def test_learns_what_one_process_learns(finished: dict[str, Path], one: Path, name: str) -> None:
    """Dropout and stickiness included, and measured alike."""
    assert losses(finished[name]) == pytest.approx(losses(one), rel=1e-6)
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (finished[name], one))
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


def test_a_process_that_is_killed_costs_nothing(configure, train, finished: dict[str, Path], one: Path) -> None:
    assert len(losses(finished["killed"])) < 8
    train(configure(finished["killed"], {"resume": "auto"}))
    assert losses(finished["killed"]) == pytest.approx(losses(one), rel=1e-6)


@pytest.fixture(scope="module")
def without_dropout(tokenizer, tmp_path_factory) -> Path:
    """A model folder."""
    folder = tmp_path_factory.mktemp("without dropout")
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


STOPPED_AFTER = {"zero3": 3, "fsdp2": 4, "zero2": 6, "ddp": 7}
"""Steps after which a run moves on from each of these engines on two processes."""


def long_run(model: Path) -> dict[str, Any]:
    """Fifty steps of eight lanes; dropout is off, as it belongs to lanes that are read side by side."""
    steps = {"training.max_steps": 50, "training.batch_size": 8, "training.evaluate_every": 50}
    quiet = {"training.checkpoint_every": None, "data.test": None, "evaluation.before": False}
    return {**steps, **quiet, "model.pretrained": str(model)}


@pytest.fixture(scope="module")
def moved(configure, train, launch, without_dropout, tmp_path_factory) -> tuple[Path, str]:
    """The folders of what was made on two processes, and of what began on one; what the two wrote to stderr.

    In the last run a process hangs: it ends what was launched.
    """
    root = tmp_path_factory.mktemp("moved")
    with interrupted(2), pytest.raises(TrainingStopped):
        train(configure(root / "moving"))
    two = {"training.gradient_accumulation": 1, "resume": "auto"}
    stopped_after = {name: STOPPED_AFTER[name] for name in installed(STOPPED_AFTER)}
    runs = [configure(root / "moving", {**two, "engine": engine(name)}) for name in stopped_after]
    made = [after - before for before, after in pairwise([2, *stopped_after.values()])]
    faults = {number: {"process": 1, "step": steps, "how": "term"} for number, steps in enumerate(made)}
    for parts in (1, 2):
        split = {"training.gradient_accumulation": parts, **long_run(without_dropout)}
        runs.append(configure(root / f"two in {parts}", split))
    runs.append(configure(root / "not a number", {"training.gradient_accumulation": 1}))
    faults[len(runs) - 1] = {"process": 1, "step": 3, "how": "nan"}
    (root / "taken").mkdir()
    (root / "taken" / "notes.txt").touch()
    runs.append(configure(root / "taken", {"training.gradient_accumulation": 1}))
    hanging = {"training.gradient_accumulation": 1, "engine": replace(engine("ddp"), patience=10.0)}
    faults[len(runs)] = {"process": 1, "step": 3, "how": "sleep"}
    launched = launch([*runs, configure(root / "hanging", hanging)], faults)
    assert len(launched.outcomes) == len(runs), launched.errors
    for after, outcome in zip(stopped_after.values(), launched.outcomes, strict=False):
        assert outcome is not None
        assert f"after step {after}" in outcome
    assert launched.outcomes[-4:-2] == [None, None], launched.errors
    assert "the loss is nan" in str(launched.outcomes[-2])
    assert "holds notes.txt" in str(launched.outcomes[-1])  # told by one process to the other, and both go on
    train(configure(root / "moving", {"resume": "auto"}))
    return root, launched.errors


class TestMoves:
    """Between engines, between numbers of processes and between parts of a step, in the middle of a run."""

    def test_from_one_process_to_two_and_back(self, moved: tuple[Path, str], one: Path) -> None:
        folder = moved[0] / "moving"
        assert losses(folder) == pytest.approx(losses(one), rel=1e-6)
        steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]
        assert steps == list(range(1, 9))

    @pytest.mark.parametrize("parts", [1, 2])
    def test_eight_lanes_however_they_are_split(self, configure, train, moved, without_dropout, parts: int) -> None:
        folder = moved[0] / f"one before {parts}"
        train(configure(folder, {**long_run(without_dropout), "training.gradient_accumulation": 1}))
        assert losses(moved[0] / f"two in {parts}") == pytest.approx(losses(folder), rel=1e-6)
        assert len(losses(folder)) == 50

    def test_a_loss_that_is_no_number_in_one_process_stops_all(self, moved: tuple[Path, str]) -> None:
        assert len(losses(moved[0] / "not a number")) == 2

    def test_a_process_that_hangs_is_named(self, moved: tuple[Path, str]) -> None:
        errors = moved[1]
        assert "process 1 computes (step 2)" in errors
        assert "processes.py" in errors  # where it hangs: its stack


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """SIGTERM comes in this step, counted from 1."""
    made = 0

    def step(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    train_step = trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        yield


ACCELERATE = {
    "zero2": ["--use_deepspeed", "--zero_stage", "2", "--mixed_precision", "no"],
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "no"],
}
"""Options of `accelerate launch`."""


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(ACCELERATE))
def test_what_accelerate_was_configured_for(configure, options_of, one: Path, tmp_path: Path, name: str) -> None:
    config = configure(tmp_path / "run", {"training.gradient_accumulation": 1})
    command = ["accelerate", "launch", "--num_processes", "2", "--main_process_port", "0", *ACCELERATE[name]]
    launched = subprocess.run(
        [*command, "train.py", *options_of(config)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert launched.returncode == 0, launched.stderr
    assert f"2 process(es), engine {name}" in launched.stderr + launched.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(["one", "ddp", "fsdp2", "zero2", "zero3", "accelerate", "torchrun"]))
def test_killed_at_random(tmp_path: Path, name: str) -> None:
    """The soak script in short."""
    command = [sys.executable, "scripts/soak.py", "--engines", name, "--kills", "3", "--steps", "24"]
    found = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "the same to the last bit" in found.stdout


@pytest.mark.slow
@pytest.mark.needs("hydra-submitit-launcher")
def test_a_sweep(configure, options_of, tmp_path: Path) -> None:
    """Through submitit, on this machine."""
    options = [option for option in options_of(configure(tmp_path)) if not option.startswith(("seed=", "output_dir="))]
    sweep = ["hydra/launcher=submitit_local", f"hydra.sweep.dir={json.dumps(str(tmp_path / 'sweep'))}", "seed=0,1"]
    folder = f"output_dir={tmp_path}/run_${{hydra:job.num}}"
    found = subprocess.run(
        [sys.executable, "train.py", "-m", *sweep, *options, folder],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert len(losses(tmp_path / "run_0")) == len(losses(tmp_path / "run_1")) == 8
