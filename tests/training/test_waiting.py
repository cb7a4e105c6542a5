"""What a step measured is read when it is logged, and nothing waits for the device before; on the processor, by an
optimiser that is told on the device, as one is on a GPU, whether a step was finite."""

import json
import math
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW

from infformer.training import optimization, step, trainer
from infformer.training.metrics import read_metrics
from infformer.training.trainer import TrainingFailedError

WAITING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Calls of a tensor that need its numbers."""
QUIET = {"data.validation": None, "data.test": None, "evaluation.before": False, "training.evaluate_every": None}
LATE = {**QUIET, "training.log_every": 4, "training.checkpoint_every": None}


@pytest.fixture(autouse=True)
def told_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "AdamW", lambda groups, **options: AdamW(groups, **{**options, "fused": True}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The calls by which the package, or accelerate for it, asks for numbers in the main thread."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("infformer", "accelerate")) and threading.current_thread() is threading.main_thread():
                calls[f"{name} in {caller}"] += 1
            return original(tensor, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WAITING:
            patch.setattr(Tensor, name, counting(name))
        yield calls


def test_a_step_between_two_logs_waits_for_nothing(configure, train, tmp_path, monkeypatch):
    """But for the check of lengths, which on a GPU is made there."""
    monkeypatch.setattr("infformer.models.base.check_lengths", lambda lengths, least, most: None)
    found: list[Counter[str]] = []
    timed_step = trainer.Trainer._timed_step

    def step_counted(run: trainer.Trainer) -> Any:
        with counted() as calls:
            taken = timed_step(run)
        found.append(calls)
        return taken

    monkeypatch.setattr(trainer.Trainer, "_timed_step", step_counted)
    train(configure(tmp_path, LATE))
    assert found == [Counter()] * 8


def test_the_count_sees_what_waits():
    with counted() as calls:
        step.read_steps([step.StepMeasurement(torch.ones(3), (), 1, True)])
    assert calls == {"tolist in infformer.training.step": 1}


def weights(folder: Path) -> dict[str, Tensor]:
    (newest,) = sorted(folder.glob("checkpoints/step-????????"))[-1:]
    return load_file(newest / "model" / "model.safetensors")


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_is_read_late_is_what_would_have_been_read_at_once(configure, train, tmp_path, monkeypatch, log_every):
    changes = {**QUIET, "training.log_every": log_every}
    train(configure(tmp_path / "late", changes))
    monkeypatch.setattr(step, "is_told_on_device", lambda *arguments: False)
    train(configure(tmp_path / "at once", changes))
    late, at_once = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("late", "at once"))
    for line in (*late, *at_once):
        line.pop("train/tokens_per_second", None)
    assert late == at_once
    assert len(late) == math.ceil(8 / log_every)
    found, expected = weights(tmp_path / "late"), weights(tmp_path / "at once")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [json.loads((run / "checkpoints/step-00000008/state.json").read_text()) for run in tmp_path.iterdir()]
    assert states[0]["tokens"] == states[1]["tokens"]


@pytest.mark.parametrize("bad", [3, 4])
def test_a_step_that_is_not_finite_is_named_when_it_is_read_and_changed_nothing(
    configure, train, tmp_path, monkeypatch, bad
):
    """Nor did those after it, whose own loss is finite."""
    kept: list[dict[str, Tensor]] = []
    train_step = trainer.train_step

    def poisoned(accelerator: Any, model: Any, optimizer: Any, parts: list, *others: Any) -> Any:
        if len(kept) == bad - 1:
            broken = [part.memory.map_tensors(lambda tensor: tensor * math.nan) for part in parts]
            parts = [replace(part, memory=memory) for part, memory in zip(parts, broken, strict=True)]
        after, measured = train_step(accelerator, model, optimizer, parts, *others)
        kept.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return [memory.map_tensors(torch.zeros_like) for memory in after], measured

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_step", poisoned)
        with pytest.raises(TrainingFailedError) as failed:
            train(configure(tmp_path, {**LATE, "training.checkpoint_every": 6, "training.log_every": 5}))
    message = str(failed.value)
    assert f"step {bad}: the loss is nan. This process was reading lane 0: 'train " in message
    assert all(f"lane {lane}: 'train " in message for lane in range(4))
    assert len(kept) == 5
    for name, tensor in kept[bad - 2].items():
        assert not torch.equal(tensor, kept[bad - 3][name]) or bad == 3
        assert all(torch.equal(tensor, after[name]) for after in kept[bad - 1 :]), name
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_a_run_that_goes_on_from_between_two_logs_is_the_run_that_never_stopped(configure, train, tmp_path):
    steady = {**QUIET, "training.log_every": 3, "schedule.name": "constant"}
    train(configure(tmp_path / "whole", steady))
    train(configure(tmp_path / "moved", {**steady, "training.max_steps": 4}))
    train(configure(tmp_path / "moved", {**steady, "resume": "auto"}))
    whole, moved = weights(tmp_path / "whole"), weights(tmp_path / "moved")
    assert all(torch.equal(tensor, moved[name]) for name, tensor in whole.items())
