"""A dry run says what the run then takes, and leaves nothing behind."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from infformer.config import CONF, RunConfig
from infformer.training import trainer
from infformer.training.command_line import compose
from infformer.training.forecast import (
    Forecast,
    checkpoints_to_keep,
    format_forecast,
    peak_of,
    tokens_to_measure,
)

BYTES = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def rows(table: str) -> dict[str, str]:
    """The table's values by what they are of."""
    return {line[:28].strip(): line[28:43].strip() for line in table.splitlines()}


def in_numbers(value: str) -> float:
    number, unit = value.split()
    return float(number.replace(",", "")) * BYTES[unit]


@pytest.fixture
def forecast(configure, train, tmp_path, capsys) -> Any:
    """The table of a dry run that would lie in `run`."""

    def make(changes: dict[str, Any]) -> str:
        assert train(configure(tmp_path / "run", {**changes, "dry_run": True})) is None
        return capsys.readouterr().out

    return make


class TestADryRun:
    def test_it_leaves_nothing_behind(self, forecast, tmp_path):
        forecast({"training.sample_every": 1, "training.evaluate_every": 1, "training.checkpoint_every": 1})
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_is_there_is_left_as_it_is(self, forecast, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
        forecast({})
        assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]

    def test_what_fails_leaves_nothing_behind(self, configure, train, tmp_path, monkeypatch):
        monkeypatch.setattr(trainer, "train_step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(configure(tmp_path / "run", {"dry_run": True}))
        assert list(tmp_path.iterdir()) == []

    def test_no_tracker_hears_of_it(self, forecast, monkeypatch):
        opened = []
        monkeypatch.setattr(trainer, "open_tracker", lambda config, *_: opened.append(config.name))
        forecast({})
        assert opened == ["none"]

    def test_it_makes_three_steps(self, forecast, monkeypatch):
        made = []
        step = trainer.train_step
        monkeypatch.setattr(trainer, "train_step", lambda *arguments: made.append(1) or step(*arguments))
        forecast({})
        assert len(made) == 3

    def test_sizes_and_checkpoints_are_those_of_the_run(self, forecast, configure, train, tmp_path):
        changes = {"training.max_steps": 6, "training.keep_checkpoints": 2}
        table = rows(forecast(changes))
        train(configure(tmp_path / "run", changes))
        sizes = json.loads((tmp_path / "run" / "results.json").read_text())["sizes"]
        assert table["parameters of the memory"] == f"{sizes['memory_parameters']:,}"
        assert table["parameters of the backbone"] == f"{sizes['backbone_parameters']:,}"
        assert in_numbers(table["weights"]) == pytest.approx(sizes["weight_bytes"], rel=0.01)
        assert in_numbers(table["states"]) == pytest.approx(4 * sizes["state_bytes"], rel=0.01)
        tensors = ["model/model.safetensors", "optimizer.safetensors", "process-00000.safetensors"]
        kept = list((tmp_path / "run" / "checkpoints").glob("step-*"))
        written = sum((folder / name).stat().st_size for folder in kept for name in tensors)
        each = in_numbers(table["checkpoints"]) / 3  # at most: the best may be one of the last two
        assert each == pytest.approx(written / len(kept), rel=0.15)

    def test_a_task_without_documents_has_a_forecast_too(self, train, tmp_path, capsys):
        small = ("task.lengths=[64]", "task.training_lengths=[40,64]", "task.test_questions=1", "training.batch_size=2")
        chosen = ("experiment=associative_recall_small", *small, f"output_dir={tmp_path}/run", "dry_run=true")
        train(compose("train", RunConfig, CONF, chosen))
        table = rows(capsys.readouterr().out)
        assert table["measuring"] == "?"
        assert in_numbers(table["activations and gradients"]) > 0


class TestWhatIsToCome:
    """Of a run of 8 steps that validates after 3, 6 and 8, and saves after 2, 4, 6 and 8."""

    DOCUMENTS: ClassVar[Any] = {
        "train": SimpleNamespace(token_counts=np.array([1000])),
        "validation": SimpleNamespace(token_counts=np.array([11, 21])),
        "test": type("Documents", (list,), {"token_counts": np.array([101, 201])})([0, 1]),
    }

    @pytest.mark.parametrize(
        ("changes", "done", "tokens"),
        [
            ({}, 0, 3 * 30 + 2 * 300),
            ({}, 3, 2 * 30 + 300),  # a run that goes on was measured before it began
            ({"evaluation.before": False}, 0, 3 * 30 + 300),
            ({"evaluation.controls": True}, 0, 3 * 30 + 7 * 300),
            ({"evaluation.max_validation_tokens": 8, "training.evaluate_every": None}, 0, 8 + 2 * 300),
        ],
    )
    def test_held_out_documents_are_counted_as_often_as_they_are_read(self, configure, tmp_path, changes, done, tokens):
        config = configure(tmp_path, changes)
        assert tokens_to_measure(config, self.DOCUMENTS, True, done) == tokens

    def test_controls_read_nothing_without_a_memory(self, configure, tmp_path):
        config = configure(tmp_path, {"evaluation.controls": True})
        assert tokens_to_measure(config, self.DOCUMENTS, False, 0) == 3 * 30 + 2 * 300

    @pytest.mark.parametrize(
        ("changes", "count"),
        [
            ({}, 3),
            ({"training.keep_checkpoints": 9}, 6),  # after 2, 3, 4, 6 and 8, which is not known so exactly
            ({"training.checkpoint_every": None}, 3),
            ({"training.checkpoint_every": None, "training.evaluate_every": None}, 1),
            ({"data.validation": None}, 2),
        ],
    )
    def test_the_last_checkpoints_are_kept_and_the_best(self, configure, tmp_path, changes, count):
        config = configure(tmp_path, changes)
        documents = {name: found for name, found in self.DOCUMENTS.items() if getattr(config.data, name) is not None}
        assert checkpoints_to_keep(config, documents, 0) == count


def test_the_table_says_what_is_not_of_one_process():
    sizes: Any = {
        "backbone_parameters": 1000, "memory_parameters": 100, "trained_parameters": 1100, "weight_bytes": 4400,
        "optimizer_bytes": 8800, "state_floats": [50, 50], "state_bytes": 416,
    }  # fmt: skip
    forecast = Forecast(sizes, 0, 4, 2, 10_000, 10**9, True, 100, 50.0, 2048.0, None, 3)
    table = format_forecast(forecast)
    assert rows(table)["all of these"] == "24.9 kB"  # 4400 + 8800 + 10,000 + 4 × 416
    assert "4 lanes, each 100 floats, 416 bytes (50 floats a layer)" in table
    assert rows(table)["training"] == "50 s"
    assert in_numbers(rows(table)["checkpoints"]) == pytest.approx(3 * (4400 + 8800 + 8 * 416), rel=0.01)
    without = format_forecast(replace(forecast, sizes={**sizes, "state_floats": [], "state_bytes": 0}))
    assert rows(without)["states"] == "0 bytes"


@pytest.mark.parametrize("width", [200, 400])
def test_the_peak_of_a_step_is_what_its_tensors_take(width):
    """Of a product whose input and output are kept, until there are gradients; moments that a first step makes are
    not counted."""
    layer, rows = nn.Linear(width, width, bias=False), 1000
    optimizer = torch.optim.AdamW(layer.parameters())

    def step() -> None:
        (layer(torch.randn(rows, width)) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    matrix = 4 * rows * width
    peak = peak_of(step, optimizer, torch.device("cpu"))
    assert 3 * matrix <= peak <= 5 * matrix + 2 * layer.weight.nbytes
    assert peak == peak_of(step, optimizer, torch.device("cpu"))
