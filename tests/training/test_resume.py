"""A run that was stopped, however it was stopped, goes on as if it had not been."""

import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from infformer.data.tokenization import tokenize_documents
from infformer.durable import write_text
from infformer.evaluation.perplexity import evaluate
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.language_modelling import LanguageModelling
from infformer.tasks.sorting import SortingConfig
from infformer.tasks.task import Validation
from infformer.training import checkpoint, trainer
from infformer.training.checkpoint import (
    FORMAT,
    CheckpointWriter,
    TrainingState,
    newest_checkpoint,
    validate_checkpoint,
)
from infformer.training.metrics import read_metrics
from infformer.training.resuming import RunError
from infformer.training.supervision import StopSignals
from infformer.training.sweep import read_runs
from infformer.training.trainer import EXIT_CODE, TrainingFailedError, TrainingStopped

ROOT = Path(__file__).parents[2]
STEPS, LAST_CHECKPOINT = 8, 6
"""Steps of a run here, and the step of the newest checkpoint of the run that was killed in its last step."""


class Killed(BaseException):
    """As if by SIGKILL: nothing in a run may catch it."""


def records(folder: Path) -> list[dict[str, float]]:
    """All that a run measured, except for how fast it was."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "train/tokens_per_second"} for line in lines]


def results(folder: Path) -> dict[str, Any]:
    """What it found in the end, except for how fast it was."""
    found = json.loads((folder / "results.json").read_text())
    del found["protocol"]["checkpoint"]
    found.get("cost", {}).pop("seconds_per_token", None)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, moments, memories."""
    return {
        f"{path.name}.{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(checkpoint: Path, other: Path) -> None:
    one, another = tensors(checkpoint), tensors(other)
    assert one.keys() == another.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, another[name]), name


def assert_same_run(folder: Path, other: Path) -> None:
    assert records(folder) == records(other)
    assert results(folder) == results(other)
    last = f"checkpoints/step-{records(other)[-1]['step']:08d}"
    assert_same_tensors(folder / last, other / last)


def remove_from_state(checkpoint_folder: Path, name: str) -> None:
    """As if a version had written the checkpoint that did not know of this."""
    state, manifest = checkpoint_folder / "state.json", checkpoint_folder / "manifest.json"
    state.write_text(json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != name}))
    said = json.loads(manifest.read_text())
    said["files"]["state.json"] = {"bytes": state.stat().st_size, "crc32": checkpoint._checksum(state)}
    said["crc32"] = checkpoint._checksum_of(said["files"])
    manifest.write_text(json.dumps(said))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoints(folder: Path) -> list[int]:
    """The steps of all checkpoints; every one of them must be whole, and nothing else lie beside them."""
    found = sorted(path for path in (folder / "checkpoints").iterdir() if path.name != "best")
    assert [validate_checkpoint(path) for path in found] == [None] * len(found)
    return [int(path.name.removeprefix("step-")) for path in found]


def wait_for_checkpoints() -> None:
    """Until nothing is written in the background: threads of this process, unlike a killed one's, would go on."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


@contextmanager
def interrupted(after: int, how: Callable[[], None]) -> Iterator[None]:
    """Something happens when this many steps have been made, in the middle of the next one.

    Every step takes longer than a checkpoint takes to be written; so each gets its name after the step that follows it.
    """
    made = 0

    def step(*arguments: Any) -> Any:
        nonlocal made
        wait_for_checkpoints()
        if made == after:
            how()
        made += 1
        return train_step(*arguments)

    train_step = trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        yield


def die() -> None:
    raise Killed


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(configure, train, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(configure(folder))
    return folder


@pytest.fixture(scope="module")
def killed(configure, train, tmp_path_factory) -> Path:
    """The folder of the same run, killed in its last step."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with interrupted(STEPS - 1, die), pytest.raises(Killed):
        train(configure(folder))
    assert [record["step"] for record in records(folder)][-1] == STEPS - 1
    assert checkpoints(folder)[-1] == LAST_CHECKPOINT
    return folder


@pytest.fixture
def folder(killed, tmp_path) -> Path:
    """A copy of the killed run's folder."""
    return Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))


class TestGoesOnExactly:
    @pytest.mark.parametrize("after", [1, pytest.param(5, marks=pytest.mark.slow)])
    def test_a_run_that_was_killed_goes_on_exactly(self, configure, train, whole, tmp_path, after):
        """Before its first checkpoint, it begins again."""
        with interrupted(after, die), pytest.raises(Killed):
            train(configure(tmp_path))
        train(configure(tmp_path, {"resume": "auto"}))
        assert_same_run(tmp_path, whole)

    def test_a_run_that_was_killed_again_and_again_goes_on_exactly(self, configure, train, whole, tmp_path):
        for made in (3, 1, 2, 1):
            with interrupted(made, die), pytest.raises(Killed):
                train(configure(tmp_path, {"resume": "auto"}))
        train(configure(tmp_path, {"resume": "auto"}))
        assert_same_run(tmp_path, whole)

    def test_a_run_that_was_asked_to_stop_goes_on_exactly(self, configure, train, whole, tmp_path):
        number = signal.SIGTERM
        with interrupted(4, lambda: os.kill(os.getpid(), number)), pytest.raises(TrainingStopped) as stopped:
            train(configure(tmp_path))
        assert stopped.value.number == number
        assert str(stopped.value) == f"stopped by signal {number:d} after step 5; resume=auto goes on from there"
        assert checkpoints(tmp_path)[-1] == 5
        train(configure(tmp_path, {"resume": "auto"}))
        assert_same_run(tmp_path, whole)

    @pytest.mark.parametrize(
        ("evaluation", "time", "after"),
        [
            ("measure_before", 1, 0),
            ("validate", 1, 3),
            pytest.param("validate", 3, STEPS, marks=pytest.mark.slow),
            ("measure", 1, STEPS),
        ],
    )
    def test_an_evaluation_is_left_when_asked_to_stop_and_made_again(
        self, configure, train, whole, tmp_path, monkeypatch, evaluation, time, after
    ):
        """It is left after the segment that is being read, not after the last."""
        times, segments = 0, 0
        original, raise_if_agreed = getattr(LanguageModelling, evaluation), StopSignals.raise_if_agreed

        def evaluate(task: LanguageModelling, *arguments: Any) -> Any:
            nonlocal times
            times += 1
            return original(task, *arguments)

        def count(signals: StopSignals) -> None:
            nonlocal segments
            segments += times == time
            if segments == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            raise_if_agreed(signals)

        with monkeypatch.context() as patched:
            patched.setattr(LanguageModelling, evaluation, evaluate)
            patched.setattr(StopSignals, "raise_if_agreed", count)
            with pytest.raises(TrainingStopped, match=f"after step {after};"):
                train(configure(tmp_path))
        assert segments == 2
        if after:
            assert checkpoints(tmp_path)[-1] == after
            assert ("train/loss" in records(tmp_path)[-1]) == (evaluation == "validate")
        train(configure(tmp_path, {"resume": "auto"}))
        assert_same_run(tmp_path, whole)

    def test_a_line_of_metrics_is_the_mean_of_its_steps_also_where_a_checkpoint_is_between_them(
        self, configure, train, tmp_path
    ):
        """The checkpoint holds the steps that the next line will be the mean of: here two, and then one."""
        changes = {"training.log_every": 3, "evaluation.before": False, "data.validation": None}
        train(configure(tmp_path / "whole", changes))
        assert [line["step"] for line in records(tmp_path / "whole")] == [3, 6, STEPS]
        for made, newest in ((3, 2), (3, 4)):
            with interrupted(made, die), pytest.raises(Killed):
                train(configure(tmp_path / "killed", {**changes, "resume": "auto"}))
            assert checkpoints(tmp_path / "killed")[-1] == newest
        train(configure(tmp_path / "killed", {**changes, "resume": "auto"}))
        assert_same_run(tmp_path / "killed", tmp_path / "whole")

    def test_a_checkpoint_that_was_still_being_written_is_not_in_the_way(self, configure, train, whole, tmp_path):
        """Neither the half of it nor what was there before."""
        with interrupted(4, die), pytest.raises(Killed):
            train(configure(tmp_path))
        unfinished = tmp_path / "checkpoints" / "step-00000004.partial"
        halve(unfinished / "model" / "model.safetensors")
        (unfinished / "process-00007.safetensors").write_bytes(b"of a run on more processes")
        train(configure(tmp_path, {"resume": "auto"}))
        assert_same_run(tmp_path, whole)
        assert not list((tmp_path / "checkpoints").glob("*.partial"))

    def test_a_run_of_a_version_that_had_fewer_options_goes_on(self, configure, train, whole, folder):
        config = OmegaConf.load(folder / "config.yaml")
        del config["model"]["lora"], config["training"]["memory_dropout"]
        OmegaConf.save(config, folder / "config.yaml")
        remove_from_state(folder / "checkpoints" / f"step-{LAST_CHECKPOINT:08d}", "held_out")
        with pytest.raises(RunError, match=r"training\.memory_dropout was 0\.0, is 0\.5"):
            train(configure(folder, {"resume": "auto", "training.memory_dropout": 0.5}))
        train(configure(folder, {"resume": "auto"}))
        assert_same_run(folder, whole)

    def test_a_finished_run_only_measures_again(self, configure, train, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run", symlinks=True)
        (tmp_path / "run" / "results.json").unlink()
        train(configure(tmp_path / "run", {"resume": "auto"}))
        assert_same_run(tmp_path / "run", whole)

    def test_a_run_goes_on_from_a_path_into_another_folder(self, configure, train, whole, killed, tmp_path):
        train(configure(tmp_path / "other", {"resume": str(killed / "checkpoints" / f"step-{LAST_CHECKPOINT:08d}")}))
        after = [record for record in records(whole) if record["step"] > LAST_CHECKPOINT]
        assert records(tmp_path / "other") == after

    def test_samples_are_not_written_twice(self, configure, train, tmp_path):
        changes = {"training.sample_every": 2, "training.sample_tokens": 3, "training.checkpoint_every": 3}
        changes |= {"training.max_steps": 6, "data.test": None}
        with interrupted(4, die), pytest.raises(Killed):
            train(configure(tmp_path, changes))
        train(configure(tmp_path, {**changes, "resume": "auto"}))
        samples = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in samples] == [2, 4, 6]

    def test_what_was_not_measured_before_training_is_not_measured_later(self, configure, train, tmp_path):
        changes = {"training.max_steps": 4, "data.validation": None}
        with interrupted(3, die), pytest.raises(Killed):
            train(configure(tmp_path, {**changes, "evaluation.before": False}))
        assert train(configure(tmp_path, {**changes, "resume": "auto"}))["before"] is None

    def test_a_run_that_goes_on_by_other_documents_compares_no_figures_of_those_before(
        self, configure, train, texts, folder, caplog
    ):
        """The best checkpoint is one of those that were measured by the new ones; of the others there were more."""
        splits = {"validation": "test", "test": "validation"}
        swapped = {f"data.{split}": str(texts / f"{other}.jsonl") for split, other in splits.items()}
        found = train(configure(folder, {"resume": "auto", **swapped}))
        assert (len(found["per_document"]), found["before"]) == (2, None)
        assert (folder / "checkpoints" / "best").resolve().name == f"step-{STEPS:08d}"
        for split in splits:
            assert f"data.{split} was " in caplog.text

    def test_a_run_goes_on_though_held_out_files_hold_other_texts_and_compares_no_figures_of_those_before(
        self, configure, train, texts, tmp_path, caplog
    ):
        held_out = {split: tmp_path / f"{split}.jsonl" for split in ("validation", "test")}
        for split, file in held_out.items():
            shutil.copy(texts / f"{split}.jsonl", file)
        changes = {f"data.{split}": str(file) for split, file in held_out.items()}
        train(configure(tmp_path / "run", changes))
        for split, other in {"validation": "test", "test": "validation"}.items():
            shutil.copy(texts / f"{other}.jsonl", held_out[split])
        found = train(configure(tmp_path / "run", {**changes, "resume": "auto", "training.max_steps": STEPS + 1}))
        assert (len(found["per_document"]), found["before"]) == (2, None)
        assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == f"step-{STEPS + 1:08d}"
        for split, file in held_out.items():
            assert f"data.{split}={file} holds another text than it did" in caplog.text

    def test_a_run_that_becomes_longer_has_no_results_until_it_is_through_but_those_before_are_kept(
        self, configure, train, whole, tmp_path
    ):
        """Its config.yaml is that of the longer one, and who reads both would take them for that one's."""
        shutil.copytree(whole, tmp_path / "run", symlinks=True)
        before = results(tmp_path / "run")
        longer = {"resume": "auto", "training.max_steps": STEPS + 2}
        with interrupted(1, die), pytest.raises(Killed):
            train(configure(tmp_path / "run", longer))
        assert read_runs([tmp_path / "run"]) == ([], [tmp_path / "run"])
        (tmp_path / "run" / f"results-step-{STEPS:08d}.json").rename(tmp_path / "results.json")
        assert results(tmp_path) == before
        train(configure(tmp_path / "run", longer))
        assert results(tmp_path / "run") != before

    def test_a_run_goes_on_under_another_gradient_checkpointing_and_longer(self, configure, train, whole, folder):
        changes = {"training.gradient_checkpointing": True, "training.max_steps": 10, "training.log_every": 2}
        train(configure(folder, {"resume": "auto", **changes}))
        assert [record["step"] for record in records(folder) if "train/loss" in record] == [1, 2, 3, 4, 5, 6, 8, 10]
        assert records(folder)[:8] == records(whole)[:8]


DECODER = {
    "model_type": "decoder", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "feed_forward_size": 20, "dropout": 0.2, "attention_dropout": 0.2,
}  # fmt: skip
LONG_TERM = {
    "short_term_length": 16, "basis_functions": 8, "widths": [0.05, 0.1], "past_samples": 16, "sticky_bins": 16,
}  # fmt: skip
DECODER_MEMORIES = {
    "short-term": MemoryConfig(20),
    "compressive": CompressiveMemoryConfig(16, length=6, rate=4),
    "long-term": LongTermMemoryConfig(**LONG_TERM, sticky=False),
    "sticky": LongTermMemoryConfig(**LONG_TERM, sticky=True),
    "keys and values, sticky by loss, of drawn rates": LongTermMemoryConfig(
        **LONG_TERM, stores="keys_values", read="gibbs", sticky=True, sticky_by="both", training_rates=[0.25, 0.75]
    ),
    "dyadic keys and values": LongTermMemoryConfig(
        16, 8, stores="keys_values", read="slots", combination="joint", contraction="dyadic", levels=4
    ),
    "fast weights": FastWeightMemoryConfig(16, strength="loss"),
}
PARTS_OF_STICKY = ("short-term", "long-term")
"""Memories of which all that is kept is kept by the sticky one too."""


class TestDecodersGoOnExactly:
    """With each memory, dropout, and gradients that stay in one segment."""

    @staticmethod
    def assert_goes_on(configure, train, folder, changes):
        changes = {**changes, "training.max_steps": 5, "evaluation.before": False, "data.validation": None}
        train(configure(folder / "whole", changes))
        with interrupted(3, die), pytest.raises(Killed):
            train(configure(folder / "killed", changes))
        newest = newest_checkpoint(folder / "killed" / "checkpoints")
        assert newest is not None
        assert newest.name == "step-00000002"
        train(configure(folder / "killed", {**changes, "resume": "auto"}))
        assert_same_run(folder / "killed", folder / "whole")

    @pytest.mark.parametrize(
        "memory",
        [
            pytest.param(memory, id=name, marks=[pytest.mark.slow] if name in PARTS_OF_STICKY else [])
            for name, memory in DECODER_MEMORIES.items()
        ],
    )
    def test_a_decoder_goes_on_exactly_in_documents(self, configure, train, one_layer_folder, tmp_path, memory):
        model = {"model.pretrained": None, "model.architecture": DECODER, "model.tokenizer": str(one_layer_folder)}
        segments = memory.training.get("bptt_segments", 1)
        changes = {**model, "training.bptt_segments": segments, "model.memory": memory}
        self.assert_goes_on(configure, train, tmp_path, changes)

    def test_a_decoder_goes_on_exactly_in_sequences_to_sort(self, configure, train, tmp_path, monkeypatch):
        monkeypatch.setattr("infformer.plots.sorting.plot_accuracy", lambda results: [])
        sequences = {"length": 40, "training_lengths": [10, 20, 60], "symbols": 5, "training_sequences": 20}
        task = SortingConfig(validation_sequences=3, test_sequences=3, evaluation_lengths=[50], **sequences)
        model = {"model.pretrained": None, "model.architecture": DECODER, "model.memory": DECODER_MEMORIES["sticky"]}
        self.assert_goes_on(configure, train, tmp_path, {**model, "task": task})


class TestTrainingLessGoesOnExactly:
    @pytest.fixture
    def rotary(self, tokenizer, tmp_path) -> Path:
        """A model that can have a short-term memory, and its tokenizer."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        tokens = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
        LlamaForCausalLM(LlamaConfig(**sizes, **tokens, attention_dropout=0.1)).save_pretrained(tmp_path / "rotary")
        tokenizer.save_pretrained(tmp_path / "rotary")
        return tmp_path / "rotary"

    @pytest.mark.parametrize("lora", [{}, pytest.param({"rank": 2, "dropout": 0.2}, marks=pytest.mark.needs("peft"))])
    def test_a_run_with_a_short_term_memory_adapters_and_memory_dropout_goes_on_exactly(
        self, configure, train, base_config, rotary, tmp_path, lora
    ):
        changes = {"model.pretrained": str(rotary), "model.lora": lora, "training.memory_dropout": 0.4}
        changes["model.memory"] = replace(base_config["model"]["memory"], short_term_length=16)
        TestDecodersGoOnExactly.assert_goes_on(configure, train, tmp_path, changes)
        first, last = (tensors(tmp_path / "whole" / "checkpoints" / f"step-0000000{step}" / "model") for step in (4, 5))
        learned = {name for name in last if not torch.equal(first[name], last[name])}
        assert any("memories." in name for name in learned)
        assert any("backbone." in name for name in learned)
        assert not lora or all("memories." in name or ".lora_" in name for name in learned)

    @pytest.mark.parametrize(
        "weights",
        [{"model.dtype": "bfloat16"}]
        + [
            pytest.param({"model.quantization": bits}, marks=pytest.mark.needs("bitsandbytes"))
            for bits in ("4bit", "8bit")
        ],
    )
    def test_a_run_beside_a_frozen_backbone_of_few_bits_goes_on_exactly(self, configure, train, tmp_path, weights):
        TestDecodersGoOnExactly.assert_goes_on(
            configure, train, tmp_path, {"training.freeze_backbone": True, **weights}
        )


LONGER = {"training.max_steps": 24, "evaluation.before": False, "data.test": None, "data.validation": None}


@pytest.fixture(scope="module")
def longer(configure, train, tmp_path_factory) -> Path:
    """The folder of a longer run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    train(configure(folder, LONGER))
    return folder


class TestInAProcessOfItsOwn:
    """The same from outside: the command, from another folder; real signals, exit codes.

    All begin an interpreter anew, which imports for many seconds. One that does not is in `test_engines.py`.
    """

    @pytest.fixture
    def start(self, configure, options_of, tmp_path) -> Callable[..., subprocess.Popen]:
        def start() -> subprocess.Popen:
            options = options_of(configure(tmp_path / "run", {**LONGER, "resume": "auto"}))
            return subprocess.Popen(
                [sys.executable, ROOT / "train.py", *options],
                cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip

        return start

    def lines(self, folder: Path) -> int:
        path = folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGTERM, EXIT_CODE), (signal.SIGKILL, -9), (signal.SIGINT, EXIT_CODE)]
    )
    def test_a_process_ended_by_a_signal_goes_on_exactly(self, configure, train, start, longer, tmp_path, number, code):
        with start() as process:
            while (made := self.lines(tmp_path / "run")) < 7 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        assert made >= 7, errors
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        assert number == signal.SIGKILL or "resume=auto goes on from there" in errors
        assert self.lines(tmp_path / "run") < self.lines(longer)  # it was not finished
        train(configure(tmp_path / "run", {**LONGER, "resume": "auto"}))
        assert records(tmp_path / "run") == records(longer)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(3))
    def test_a_process_that_is_killed_at_random_times_is_done_in_the_end(self, start, longer, tmp_path, seed):
        delays = random.Random(seed)
        for _ in range(40):
            before = self.lines(tmp_path / "run")
            with start() as process:
                while self.lines(tmp_path / "run") <= before and process.poll() is None:
                    time.sleep(0.005)
                try:
                    process.communicate(timeout=delays.uniform(0.05, 1))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -9
            assert all(
                validate_checkpoint(path) is None for path in (tmp_path / "run/checkpoints").glob("step-????????")
            )
        assert process.returncode == 0
        assert records(tmp_path / "run") == records(longer)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class TestDamagedCheckpoints:
    """What is passed over, and why: test_checkpoint.py."""

    def test_the_run_goes_on_from_the_one_before_a_damaged_one(self, configure, train, whole, folder):
        """Also when no more checkpoints are kept than the damaged one, and when that one was the best."""
        halve(folder / "checkpoints" / f"step-{LAST_CHECKPOINT:08d}" / "model" / "model.safetensors")
        changes = {"resume": "auto", "training.keep_checkpoints": 1, "training.checkpoint_every": 1}
        with interrupted(2, die), pytest.raises(Killed):
            train(configure(folder, changes))
        assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-00000005"
        train(configure(folder, {"resume": "auto"}))
        assert_same_run(folder, whole)

    def test_without_a_whole_checkpoint_nothing_is_begun_anew(self, configure, train, folder):
        """What is there may be mended, or read by another version."""
        for path in (folder / "checkpoints").glob("step-*"):
            (path / "manifest.json").unlink()
        before = contents(folder)
        with pytest.raises(RunError, match=rf"output_dir={folder} holds checkpoints, and none .* step-00000006: "):
            train(configure(folder, {"resume": "auto"}))
        assert contents(folder) == before

    def test_a_checkpoint_of_another_format_is_passed_over(self, folder, caplog):
        manifest = folder / "checkpoints" / f"step-{LAST_CHECKPOINT:08d}" / "manifest.json"
        manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 9'))
        assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-00000004"
        assert f"{manifest.parent} is passed over: its format is 9, this version reads {FORMAT}" in caplog.text


class TestRefused:
    @pytest.mark.parametrize(
        ("option", "value", "then"),
        [
            ("optimizer.learning_rate", 0.5, 0.003),
            ("model.memory.ridge", 0.25, 0.5),
            ("model.memory", None, None),
            ("data.train", "/elsewhere.txt", "train.jsonl"),
            ("data.segments_per_visit", None, 3),
            ("training.bptt_segments", 1, 2),
            ("seed", 7, 0),
        ],
    )
    def test_another_configuration_is_refused(self, configure, train, folder, option, value, then):
        before = contents(folder)
        with pytest.raises(RunError, match=rf"{option}[.\w]* was .*{then if then is not None else ''}.*, is {value}"):
            train(configure(folder, {"resume": "auto", option: value}))
        assert contents(folder) == before

    def test_a_folder_that_holds_a_run_is_refused(self, configure, train, folder):
        before = contents(folder)
        with pytest.raises(RunError, match=f"output_dir={folder} already holds a run.*resume=auto"):
            train(configure(folder))
        assert contents(folder) == before

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("nowhere", r"there is no such folder \(seen from .*; type resume=auto"),
            (
                "run",
                r"this is the folder of a run; name one of its checkpoints, of which the newest is .*step-00000004",
            ),
            ("run/checkpoints", "this is the folder of a run"),
            ("run/checkpoints/step-00000006", "this checkpoint cannot be gone on from"),
        ],
    )
    def test_a_path_that_is_no_whole_checkpoint_is_refused(self, configure, train, folder, tmp_path, path, says):
        (folder / "checkpoints" / "step-00000006" / "optimizer.safetensors").unlink()
        with pytest.raises(RunError, match=f"resume={tmp_path / path}: {says}"):
            train(configure(tmp_path / "new", {"resume": str(tmp_path / path)}))
        assert not (tmp_path / "new").exists()

    def test_an_older_checkpoint_than_the_folder_holds_is_refused(self, configure, train, folder):
        before = contents(folder)
        with pytest.raises(RunError, match=f"output_dir={folder} holds another checkpoint already, step-00000006"):
            train(configure(folder, {"resume": str(folder / "checkpoints" / "step-00000004")}))
        assert contents(folder) == before

    def test_a_checkpoint_without_its_run_is_refused(self, configure, train, folder, tmp_path):
        lone = shutil.copytree(folder / "checkpoints" / "step-00000006", tmp_path / "lone")
        with pytest.raises(RunError, match=r"config\.yaml"):
            train(configure(tmp_path / "new", {"resume": str(lone)}))


def no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*arguments: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_space_for_the_manifest(path: Path, text: str) -> None:
    if path.name == "manifest.json":
        no_space()
    write_text(path, text)


@contextmanager
def no_space_at_all() -> Iterator[None]:
    """The system itself writes no file beyond so many bytes, whoever asks."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def something_else(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("something else")


FAULTS = {
    "no space for the folder": partial(patch.object, Path, "mkdir", no_space),
    "no space for a file": partial(patch.object, checkpoint, "save_file", no_space),
    "no space for tensors": partial(patch.object, checkpoint, "save_file", no_space_for_tensors),
    "no space for the manifest": partial(patch.object, checkpoint, "write_text", no_space_for_the_manifest),
    "no space for the last name": partial(patch.object, os, "replace", no_space),
    "no space at all": no_space_at_all,
    "something else": partial(patch.object, InfformerForCausalLM, "save_pretrained", something_else),
}


class TestACheckpointThatCannotBeWritten:
    @staticmethod
    def at(step: int, fault: Callable[[], AbstractContextManager], monkeypatch: pytest.MonkeyPatch) -> None:
        """While the checkpoint of this step is written and named."""
        begin, finish = CheckpointWriter.begin, CheckpointWriter.finish
        written = 0

        def begin_and_wait(writer: CheckpointWriter, state: TrainingState, rank_rows: range) -> None:
            nonlocal written
            writer.finish(wait=True)
            written = state.progress.step
            with fault() if written == step else nullcontext():
                begin(writer, state, rank_rows)
                wait_for_checkpoints()

        def finish_without_space(writer: CheckpointWriter, wait: bool) -> None:
            with fault() if written == step else nullcontext():
                finish(writer, wait)

        monkeypatch.setattr(CheckpointWriter, "begin", begin_and_wait)
        monkeypatch.setattr(CheckpointWriter, "finish", finish_without_space)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_the_run_goes_on_without_a_checkpoint_that_cannot_be_written(
        self, configure, train, whole, folder, monkeypatch, caplog, fault
    ):
        """What is not whole is not called a checkpoint, and not in the way of the next."""
        self.at(7, FAULTS[fault], monkeypatch)
        train(configure(folder, {"resume": "auto", "training.checkpoint_every": 1}))
        assert "the checkpoint of step 7 could not be written" in caplog.text
        assert "The run goes on" in caplog.text
        assert ("something else" in caplog.text) == (fault == "something else")
        assert checkpoints(folder) == [LAST_CHECKPOINT, STEPS]
        assert_same_run(folder, whole)

    def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(self, configure, train, whole, folder, monkeypatch):
        with monkeypatch.context() as patched:
            self.at(STEPS, no_space_at_all, patched)
            with pytest.raises(TrainingFailedError, match=r"the checkpoint of step 8 could not be written.*make room"):
                train(configure(folder, {"resume": "auto"}))
        assert checkpoints(folder) == [4, LAST_CHECKPOINT]
        train(configure(folder, {"resume": "auto"}))
        assert_same_run(folder, whole)


EVERY_FOUR = {"training.checkpoint_every": 4, "data.validation": None, "data.test": None}


class TestInTheBackground:
    def test_what_is_written_late_is_of_its_step(self, configure, train, tmp_path, monkeypatch):
        train(configure(tmp_path / "whole", EVERY_FOUR))
        go_on, save = threading.Event(), checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: go_on.wait(60) and save(*arguments))
        named: list[list[str]] = []

        def step(*arguments: Any) -> Any:
            named.append([path.name for path in (tmp_path / "late" / "checkpoints").glob("step-????????")])
            if len(named) == 7:
                go_on.set()
                wait_for_checkpoints()
            return train_step(*arguments)

        train_step = trainer.train_step
        monkeypatch.setattr(trainer, "train_step", step)
        train(configure(tmp_path / "late", EVERY_FOUR))
        assert named == [[]] * 7 + [["step-00000004"]]
        for name in ("step-00000004", "step-00000008"):
            late, whole = (tmp_path / run / "checkpoints" / name for run in ("late", "whole"))
            assert json.loads((late / "state.json").read_text()) == json.loads((whole / "state.json").read_text())
            assert_same_tensors(late, whole)

    def test_the_next_checkpoint_waits_for_the_one_before(self, configure, train, whole, tmp_path, monkeypatch):
        """Slower than the steps between two checkpoints: each is written nevertheless, one after the other."""
        save, at_once = checkpoint.save_file, list[int]()

        def slowly(*arguments: Any) -> None:
            at_once.append(sum(thread.name == "checkpoint" for thread in threading.enumerate()))
            time.sleep(0.2)
            save(*arguments)

        monkeypatch.setattr(checkpoint, "save_file", slowly)
        train(configure(tmp_path))
        assert set(at_once) == {1}
        assert_same_run(tmp_path, whole)


class TestWhatIsKept:
    def test_the_last_ones_and_the_best_are_kept(self, configure, train, tmp_path, monkeypatch):
        losses = iter([5.0, 4.0, 2.0, 6.0, 7.0, 3.0, 8.0, 9.0])
        monkeypatch.setattr(LanguageModelling, "validate", lambda task: Validation(next(losses), {}, ""))
        every = {"training.evaluate_every": 1, "training.checkpoint_every": 1}
        found = train(configure(tmp_path, every))
        assert checkpoints(tmp_path) == [3, 7, 8]
        assert (tmp_path / "checkpoints" / "best").resolve().name == "step-00000003"
        assert found["protocol"]["checkpoint"] == str(tmp_path / "checkpoints" / "step-00000003")

    def test_without_validation_the_last_one_is_measured(self, configure, train, tmp_path):
        found = train(configure(tmp_path, {"data.validation": None}))
        assert checkpoints(tmp_path) == [6, 8]
        assert not (tmp_path / "checkpoints" / "best").exists()
        assert found["protocol"]["checkpoint"] == str(tmp_path / "checkpoints" / "step-00000008")

    def test_the_model_in_a_checkpoint_is_the_one_that_was_measured(self, configure, train, whole):
        best = whole / "checkpoints" / "best" / "model"
        model = AutoModelForCausalLM.from_pretrained(best)
        assert isinstance(model, InfformerForCausalLM)
        tokenizer = AutoTokenizer.from_pretrained(best)
        assert tokenizer.decode(tokenizer("the white whale")["input_ids"]) == "the white whale"
        documents = tokenize_documents(configure(whole).data, "test", tokenizer)
        figures = evaluate(Evaluator(model=model, protocol=ReadingProtocol(16)), documents)
        assert figures["nll"] == pytest.approx(results(whole)["nll"], rel=1e-6)


@pytest.mark.parametrize("sticky", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run(configure, train, tmp_path, monkeypatch, sticky):
    """The message says where, and what is left; from there the run can go on."""

    def poisoned(accelerator: Any, model: Any, optimizer: Any, parts: list, *others: Any) -> Any:
        if optimizer.state_dict()["state"] and int(optimizer.state_dict()["state"][0]["step"]) == 4:
            parts = [replace(part, memory=part.memory.map_tensors(lambda tensor: tensor * math.nan)) for part in parts]
        return train_step(accelerator, model, optimizer, parts, *others)

    changes = {"model.memory.sticky": sticky, "evaluation.before": False, "data.validation": None, "data.test": None}
    train_step = trainer.train_step
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_step", poisoned)
        with pytest.raises(TrainingFailedError) as failed:
            train(configure(tmp_path, changes))
    message = str(failed.value)
    assert re.search("step 5: the loss is (nan|.*, the gradient's norm nan)", message)  # a GPU skips what it cannot see
    assert all(f"lane {lane}: 'train " in message for lane in range(4))
    assert str(tmp_path / "checkpoints" / "step-00000004") in message
    assert "optimizer.learning_rate" in message
    train(configure(tmp_path, {**changes, "resume": "auto"}))
    assert [record["step"] for record in records(tmp_path) if "train/loss" in record] == list(range(1, STEPS + 1))
