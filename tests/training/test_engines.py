"""Every engine, on two processes, learns what one process learns; and a command in a process of its own."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from infformer.config import CHOICES, EngineConfig, GrowthConfig, RunConfig
from infformer.memory.options import MemoryConfig
from infformer.training import trainer
from infformer.training.metrics import read_metrics
from infformer.training.trainer import EXIT_CODE, TrainingStopped

pytestmark = pytest.mark.processor
ROOT = Path(__file__).parents[2]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
SELDOM = ("fsdp2", "zero1", "zero3_offload")
"""Those that `-m slow` runs."""
STOPPED_AFTER = {"zero3": 3, "fsdp2": 4, "zero2": 6, "ddp": 7}
"""Steps after which a run moves on from each of these engines on two processes."""
TWO = {"training.gradient_accumulation": 1, "evaluation.before": False}
"""Changes to a run on two processes, each with one of the two parts of a step."""
COMPILED = ("ddp", "fsdp2", "zero2")
"""Engines whose layers are compiled too."""
DEEPSPEED = find_spec("deepspeed") is not None
"""Whether it is installed: the engines that need it run, or are skipped, each by itself."""


def cases(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; an engine of DeepSpeed's is tested where that is installed."""

    def marks(name: str) -> list[pytest.MarkDecorator]:
        needs = [pytest.mark.needs("deepspeed")] if name.startswith("zero") else []
        return [*needs, *([pytest.mark.slow] if name in SELDOM else [])]

    return [pytest.param(name, marks=marks(name)) for name in names]


def installed(names: Iterable[str]) -> list[str]:
    return [name for name in names if DEEPSPEED or not name.startswith("zero")]


def engine(name: str, patience: float = 60.0) -> EngineConfig:
    """As `engine=` chooses it, but that even the smallest weight is cut up."""
    chosen = replace(deepcopy(CHOICES["engine"][name]), patience=patience)
    if name.startswith("zero3"):
        chosen.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return chosen


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]


@pytest.fixture(scope="module")
def one(configure, train, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(configure(folder))
    return folder


@pytest.fixture(scope="module")
def eight_lanes(without_dropout) -> dict[str, Any]:
    """Changes to a run whose losses do not depend on how its lanes are split: no dropout but that of memories."""
    quiet = {"training.checkpoint_every": None, "data.validation": None, "data.test": None, "evaluation.before": False}
    lanes = {"training.batch_size": 8, "training.memory_dropout": 0.3}
    return {"training.max_steps": 8, **lanes, **quiet, **without_dropout}


@pytest.fixture(scope="module")
def growing(one_layer_folder) -> dict[str, Any]:
    """Changes to a run of a decoder that becomes larger in the middle of its books."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 20}
    kinds = {"positions": "rotary", "normalization": "rms", "normalization_placement": "pre", "dropout": 0.0}
    model = {"model.pretrained": None, "model.tokenizer": str(one_layer_folder), "model.memory": MemoryConfig(16)}
    growth = [GrowthConfig(2, num_hidden_layers=2), GrowthConfig(3, hidden_size=18, num_attention_heads=3)]
    quiet = {"data.validation": None, "data.test": None, "training.max_steps": 5}
    return {**model, "model.architecture": {"model_type": "decoder", **sizes, **kinds}, "growth": growth, **quiet}


Runs = dict[str, tuple[RunConfig | list[str], dict[str, Any] | None]]
"""By their names: what is run, and what goes wrong with it."""


@dataclass
class Launched:
    """What came of the runs on two processes, each with one of the two parts of a step."""

    root: Path
    """The folders of all of them, by name."""
    outcomes: dict[str, str | int | None]
    """What went wrong with each by its name: nothing, what it said, or a process that did not survive; of a command
    its exit code."""
    said: str
    """All that was written to stderr."""


@pytest.fixture(scope="module")
def launched(configure, train, options_of, eight_lanes, growing, tmp_path_factory) -> Launched:
    """The same run by the engines; one that moves between them; and some with which something goes wrong."""
    root = tmp_path_factory.mktemp("launched")
    runs: Runs = {}

    def add(name: str, changes: dict[str, Any], folder: str = "", step: int = 0, how: str = "") -> None:
        config = configure(root / (folder or name), {**TWO, **changes})
        runs[name] = config, {"process": 1, "step": step, "how": how} if how else None

    for name in installed(ENGINES):
        if name not in SELDOM:
            add(name, {"engine": engine(name), "training.evaluate_every": 4, "training.checkpoint_every": 4})
    with interrupted(2), pytest.raises(TrainingStopped):
        train(configure(root / "moving", {"evaluation.before": False}))
    made = 2
    for name in installed(STOPPED_AFTER):
        moves = {"resume": "auto", "engine": engine(name)}
        add(f"moving by {name}", moves, "moving", step=STOPPED_AFTER[name] - made, how="term")
        made = STOPPED_AFTER[name]
    add("two in two parts each", {"training.gradient_accumulation": 2, **eight_lanes})
    add("growing", growing)
    add("killed", {}, step=5, how="kill")
    add("not a number", {}, step=3, how="nan")
    add("hanging", {"engine": engine("ddp", patience=10.0)}, step=3, how="sleep")
    runs["command"] = options_of(configure(root / "command")), {"process": 0, "step": 3, "how": "term"}
    add("taken", {})
    (root / "taken").mkdir()
    (root / "taken" / "notes.txt").touch()

    return launch(root, runs)


@pytest.fixture(scope="module")
def seldom(configure, tmp_path_factory) -> Launched:
    """The same run by the other engines."""
    root = tmp_path_factory.mktemp("seldom")
    chosen = installed(SELDOM)
    return launch(root, {name: (configure(root / name, {**TWO, "engine": engine(name)}), None) for name in chosen})


@pytest.fixture(scope="module")
def compiled(configure, tmp_path_factory) -> Launched:
    """The run by several engines with compiled layers, which takes the processors longer."""
    root, changes = tmp_path_factory.mktemp("compiled"), {**TWO, "training.compile": True}
    chosen = {name: {**changes, "engine": engine(name, patience=400.0)} for name in installed(COMPILED)}
    return launch(root, {name: (configure(root / name, own), None) for name, own in chosen.items()})


def launch(root: Path, runs: Runs) -> Launched:
    (root / "runs").write_bytes(pickle.dumps(list(runs.values())))
    command = [sys.executable, Path(__file__).with_name("processes.py"), root / "runs", root / "outcomes"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with (root / "said").open("w") as said:
        subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, stdout=said, stderr=said, timeout=400, check=False
        )
    outcomes = json.loads((root / "outcomes").read_text())
    return Launched(root, dict(zip(runs, outcomes, strict=True)), (root / "said").read_text())


@pytest.mark.parametrize("name", cases(ENGINES))
def test_an_engine_learns_what_one_process_learns(request: pytest.FixtureRequest, one: Path, name: str) -> None:
    """Dropout and stickiness included, and measured alike."""
    launched: Launched = request.getfixturevalue("seldom" if name in SELDOM else "launched")
    assert launched.outcomes[name] is None, launched.said
    assert losses(launched.root / name) == pytest.approx(losses(one), rel=1e-6)
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (launched.root / name, one))
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(COMPILED))
def test_compiled_layers_learn_what_one_process_learns(compiled: Launched, one: Path, name: str) -> None:
    assert compiled.outcomes[name] is None, compiled.said
    assert losses(compiled.root / name) == pytest.approx(losses(one), rel=1e-6)


def test_a_process_that_is_killed_costs_nothing(configure, train, launched: Launched, one: Path) -> None:
    assert launched.outcomes["killed"] is False
    assert len(losses(launched.root / "killed")) < 8
    train(configure(launched.root / "killed", {"resume": "auto"}))
    assert losses(launched.root / "killed") == pytest.approx(losses(one), rel=1e-6)


def test_a_command_that_a_signal_ends_exits_with_99_and_goes_on(configure, train, launched, one) -> None:
    assert launched.outcomes["command"] == EXIT_CODE, launched.said
    number = int(signal.SIGTERM)
    assert f"\nstopped by signal {number} after step 3; resume=auto goes on from there\n" in launched.said
    assert len(losses(launched.root / "command")) == 3
    train(configure(launched.root / "command", {"resume": "auto"}))
    assert losses(launched.root / "command") == pytest.approx(losses(one), rel=1e-6)


def test_a_run_moves_between_engines_and_from_one_process_to_two_and_back(configure, train, launched, one) -> None:
    """In the middle of it, and it is the run that never moved."""
    for name in installed(STOPPED_AFTER):
        assert f"after step {STOPPED_AFTER[name]}" in str(launched.outcomes[f"moving by {name}"]), launched.said
    train(configure(launched.root / "moving", {"resume": "auto"}))
    assert losses(launched.root / "moving") == pytest.approx(losses(one), rel=1e-6)
    lines = read_metrics(launched.root / "moving" / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))


def test_eight_lanes_learn_the_same_however_they_are_split(configure, train, launched, eight_lanes, tmp_path) -> None:
    train(configure(tmp_path, {**eight_lanes, "training.gradient_accumulation": 1}))
    assert launched.outcomes["two in two parts each"] is None, launched.said
    assert losses(launched.root / "two in two parts each") == pytest.approx(losses(tmp_path), rel=1e-6)
    assert len(losses(tmp_path)) == 8


def test_two_processes_grow_alike(configure, train, launched, growing, tmp_path) -> None:
    assert launched.outcomes["growing"] is None, launched.said
    train(configure(tmp_path, growing))
    assert losses(launched.root / "growing") == pytest.approx(losses(tmp_path), rel=1e-6)


def test_a_loss_that_is_no_number_in_one_process_stops_all(launched: Launched) -> None:
    assert "the loss is nan" in str(launched.outcomes["not a number"])
    assert len(losses(launched.root / "not a number")) == 2


def test_what_one_process_refuses_all_refuse(launched: Launched) -> None:
    assert "holds notes.txt" in str(launched.outcomes["taken"])


def test_a_process_that_hangs_is_named(launched: Launched) -> None:
    assert launched.outcomes["hanging"] is False
    assert "process 1 computes (step 2)" in launched.said
    assert "processes.py" in launched.said  # where it hangs: its stack


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
def test_auto_is_what_accelerate_was_configured_for(
    configure, options_of, one: Path, tmp_path: Path, name: str
) -> None:
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
def test_a_run_that_is_killed_at_random_is_the_same(tmp_path: Path, name: str) -> None:
    """The soak script in short."""
    command = [sys.executable, "scripts/soak.py", "--engines", name, "--kills", "3", "--steps", "24"]
    found = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "the same to the last bit" in found.stdout


@pytest.mark.slow
@pytest.mark.needs("hydra-submitit-launcher")
def test_a_sweep_makes_every_run(configure, options_of, tmp_path: Path) -> None:
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
