"""Passes that are recorded make the steps of those that are not; on the processor, with a recording that computes anew
where a CUDA graph replays: what is tested is all that happens around it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW

from infformer.models.base import MemoryModel
from infformer.training import optimization, recording, trainer
from infformer.training.metrics import read_metrics
from infformer.training.recording import EAGER_PASSES, RecordingError
from infformer.training.step import PassResult

QUIET = {"data.test": None, "evaluation.before": False, "training.compile": "graphs"}


@pytest.fixture
def records(monkeypatch) -> list[int]:
    """For each recording the number of its replays, which write what it returned, and nothing is there before."""
    monkeypatch.setattr(optimization, "AdamW", lambda groups, **options: AdamW(groups, **{**options, "fused": True}))
    monkeypatch.setattr(MemoryModel, "compile_layers", lambda model: None)
    monkeypatch.setattr(trainer, "check_recording", lambda *arguments: None)
    replays: list[int] = []
    made: list[recording.Recorder] = []
    begin = recording.Recorder.__init__

    def remembered(recorder, *arguments) -> None:
        begin(recorder, *arguments)
        made.append(recorder)

    def record(compute: Callable[[], PassResult], stream: None) -> tuple[Callable[[], None], PassResult]:
        parameters, number = made[-1]._parameters, len(replays)
        replays.append(0)
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        first = all(gradient is None for gradient in before)
        with torch.random.fork_rng():
            result = compute()
        if not first:  # in place, and undone: a recording computes nothing
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad.copy_(gradient)
        outputs = [result.sums, *result.memory.named_tensors().values()]
        for tensor in outputs:
            tensor.zero_()

        def replay() -> None:
            replays[number] += 1
            gradients = [parameter.grad for parameter in parameters]
            if first:
                for parameter in parameters:
                    parameter.grad = None
            again = compute()
            for tensor, new in zip(outputs, [again.sums, *again.memory.named_tensors().values()], strict=True):
                tensor.copy_(new)
            if first:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    gradient.copy_(parameter.grad)
                    parameter.grad = gradient

        return replay, result

    monkeypatch.setattr(recording.Recorder, "__init__", remembered)
    monkeypatch.setattr(recording, "record", record)
    return replays


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step-00000008" / "model" / "model.safetensors")


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_recorded_passes_make_the_same_steps(configure, train, tmp_path, monkeypatch, records, parts):
    """Over resets, beginnings, stickiness' random numbers, dropout, evaluations, and several microbatches."""
    changes = {**QUIET, "training.gradient_accumulation": parts}
    train(configure(tmp_path / "recorded", changes))
    assert records == [8 - EAGER_PASSES] * parts
    monkeypatch.setattr(trainer, "Recorder", lambda *arguments: None)
    train(configure(tmp_path / "computed", changes))
    recorded, computed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("recorded", "computed"))
    for line in (*recorded, *computed):
        line.pop("train/tokens_per_second", None)
    assert len(recorded) == len(computed)
    for one, other in zip(recorded, computed, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    found, expected = weights(tmp_path / "recorded"), weights(tmp_path / "computed")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_recorded_says_so(configure, train, tmp_path, monkeypatch, records):
    def record(compute: Callable[[], PassResult], stream: None) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recording, "record", record)
    with pytest.raises(RecordingError, match=r"training.compile=graphs: .* \(operation not permitted .*\); set it to"):
        train(configure(tmp_path, QUIET))


def test_recording_is_refused_without_a_cuda_device(configure, train, tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryModel, "compile_layers", lambda model: None)
    with pytest.raises(RecordingError, match=r"training.compile=graphs on cpu: what one CUDA device computes"):
        train(configure(tmp_path, QUIET))
