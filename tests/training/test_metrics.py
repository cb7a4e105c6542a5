"""What is measured: means over tokens; the file is strict JSON, survives a kill, and is cut back at resume."""

import errno
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from infformer.training.metrics import DeviceMeter, MetricsLog, StepMetrics, read_metrics, summarise


def measured(loss: float, scored: int, read: int, seconds: float, **others: float) -> StepMetrics:
    rates = {"train/learning_rate": others.pop("rate", 0.1)}
    return StepMetrics(loss, others, 10 * loss, scored, read, seconds, rates)


class TestSummary:
    def test_means_are_over_tokens(self):
        """Not over steps: of two steps the second has scored three times as much."""
        line = summarise([measured(4.0, 10, 40, 0.5, divergence=1.0), measured(2.0, 30, 60, 1.5, divergence=0.5)])
        assert line["train/loss"] == pytest.approx((10 * 4.0 + 30 * 2.0) / 40)
        assert line["train/divergence"] == pytest.approx((10 * 1.0 + 30 * 0.5) / 40)
        assert line["train/perplexity"] == pytest.approx(math.exp(2.5))

    def test_speed_is_of_all_tokens_in_all_the_time(self):
        line = summarise([measured(4.0, 10, 40, 0.5), measured(2.0, 30, 60, 1.5)])
        assert line["train/tokens_per_second"] == 100 / 2

    def test_the_rest_is_of_the_last_step(self):
        line = summarise([measured(4.0, 10, 40, 0.5, rate=0.2), measured(2.0, 30, 60, 1.5, rate=0.3)])
        assert (line["train/gradient_norm"], line["train/learning_rate"]) == (20.0, 0.3)

    def test_a_diverged_step_is_seen(self):
        assert math.isnan(summarise([measured(math.nan, 1, 1, 1), measured(1.0, 1, 1, 1)])["train/loss"])
        assert summarise([measured(1e6, 1, 1, 1)])["train/perplexity"] == math.exp(700)

    def test_a_device_is_measured_by_what_it_reaches(self, monkeypatch):
        allocated = [3 * 2**30, 2**30]
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated[0])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.pop(0))
        meter = DeviceMeter(torch.device("cuda"), flops_of_a_token=6e9, peak_flops=4e14)
        assert meter.line(20_000) == {"train/device_bytes": 3 * 2**30, "train/flops_of_peak": pytest.approx(0.3)}
        assert meter.line(20_000)["train/device_bytes"] == 2**30  # since the line before

    @pytest.mark.parametrize("loss", [0.1 + 0.2, 1e-320, 2**0.5, math.inf])
    def test_what_a_checkpoint_holds_of_a_step_is_that_step(self, loss):
        step = measured(loss, 3, 4, 0.1, divergence=1 / 3)
        assert StepMetrics(**json.loads(json.dumps(asdict(step)))) == step


def fail_on_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_what_is_written_is_read_back(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write(1, 512, **{"train/loss": 3.25, "train/segments": 4})
    log.write(step=2, tokens=1024, **{"train/loss": torch.tensor(3.0)})
    assert read_metrics(log.path) == [
        {"step": 1, "tokens": 512, "train/loss": 3.25, "train/segments": 4},
        {"step": 2, "tokens": 1024, "train/loss": 3.0},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_run_still_writes_strict_json(tmp_path, value):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, 512, **{"train/loss": value})
    strict = json.loads(log.path.read_text(), parse_constant=fail_on_constant)
    assert strict["train/loss"] is None
    assert math.isnan(read_metrics(log.path)[0]["train/loss"])


def test_truncation_keeps_the_checkpoint_s_step_and_what_came_before(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write(step, 512 * step, **{"train/loss": 1.0 / step})
    log.write(3, 512 * 3, **{"validation/loss": 0.5})
    before = log.path.read_text().splitlines()
    log.truncate_after(3)
    assert log.path.read_text().splitlines() == [*before[:3], before[5]]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_last_line_is_not_read_and_goes_at_resume(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, 512, **{"train/loss": 2.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "tok')
    assert [record["step"] for record in read_metrics(log.path)] == [1]
    log.truncate_after(100)
    log.write(2, 1024, **{"train/loss": 1.5})
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]


def test_a_disk_that_is_full_for_a_while_costs_its_lines_and_one_warning(tmp_path, monkeypatch, caplog):
    """Also where it took the half of one: what is written later can be read."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, 512, **{"train/loss": 2.0})
    with log.path.open("ab") as file:
        file.write(b'{"step": 2, "text": "wh')

    def refuse(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as full:
        full.setattr(Path, "open", refuse)
        log.write(2, 1024)
        log.append({"step": 3})
    assert len(caplog.records) == 1
    assert "metrics.jsonl cannot be written (" in caplog.text
    log.write(4, 2048)
    assert [record["step"] for record in read_metrics(log.path)] == [1, 4]


def test_a_failed_truncation_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, 512)
    log.write(2, 1024)
    before = log.path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        log.truncate_after(1)
    assert log.path.read_bytes() == before


def test_truncating_a_run_without_metrics_does_nothing(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").truncate_after(10)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 1}\n{"step": \n{"step": 3, "tokens": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
