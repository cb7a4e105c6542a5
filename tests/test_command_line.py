"""Bad input ends at once, with exit code 1, a message that says what to do, no traceback, and nothing harmed."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import constants
from hydra.core.global_hydra import GlobalHydra
from transformers import PreTrainedTokenizerFast

import eval as eval_command
import train as train_command
from infformer.hub import problem_with_the_hub
from infformer.training import loop, run

ROOT = Path(__file__).parents[1]
CLOSED_PORT = "http://127.0.0.1:9"
Refused = Callable[..., str]


@pytest.fixture
def start(monkeypatch, capsys) -> Iterator[Callable[..., tuple[object, str]]]:
    """`train.py` or `eval.py` in this process: its exit code, and all that a user would see of it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(command, *options: str) -> tuple[object, str]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", "--config-path", str(ROOT / "conf"), *options])
        code: object = 0
        try:
            command.main()
        except SystemExit as ended:
            code = ended.code
        shown = capsys.readouterr()
        # The interpreter prints a text, and exits with 1.
        return (1, shown.err + code) if isinstance(code, str) else (code, shown.err)

    yield call
    GlobalHydra.instance().clear()
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def train_refused(start, configure, options_of, tmp_path) -> Refused:
    """The message with which a small run is refused for some options."""

    def message(*options: str) -> str:
        typed = options_of(configure(tmp_path / "run"))
        began = time.monotonic()
        code, text = start(train_command, *typed, *options)
        assert time.monotonic() - began < 15
        assert code == 1
        assert "Traceback" not in text
        assert not (tmp_path / "run").exists()
        return " ".join(text.split())

    return message


@pytest.fixture
def eval_refused(start, texts, model_folder, token_cache, tmp_path) -> Refused:
    """The same of an evaluation."""

    def message(*options: str) -> str:
        typed = [
            "data=text",
            f"data.test={texts}/test.jsonl",
            f"data.cache_dir={token_cache}",
            f"checkpoint={model_folder}",
            f"output_dir={tmp_path / 'found'}",
        ]
        code, text = start(eval_command, *typed, *options)
        assert code == 1
        assert "Traceback" not in text
        assert not (tmp_path / "found").exists()
        return " ".join(text.split())

    return message


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("training.max_stepz=3", ["training.max_stepz", "Key 'max_stepz' not in"]),
        ("training.max_steps=many", ["max_steps", "'many'", "Integer"]),
        ("training.max_steps=0", ["training.max_steps=0", "at least 1"]),
        ("training.precision=float8", ["training.precision=float8", "float32, bfloat16, float16"]),
        ("training.precision=float16", ["training.precision=float16", "use bfloat16 or float32"]),
        ("optimizer.name=sgd", ["optimizer.name=sgd", "adamw, adam"]),
        ("schedule.final_ratio=2", ["schedule.final_ratio=2", "between 0 and 1"]),
        ("model=nothing", ["model/nothing", "tiny", "gpt2_ltm"]),
        ("data.source=internet", ["data.source=internet", "sample, hub, files"]),
        ("model.memory.read=all", ["model.memory.read=all", "affine, moments, slots"]),
        ("model.memory.basis_functions=9", ["model.memory.basis_functions=9", "the 2 widths", "take a multiple"]),
        ("model.memory_layers=[0,7]", ["model.memory_layers=[0, 7]", "layers 0 to 1"]),
        ("model.pretrained=null", ["model.pretrained=", "model.architecture=", "give one"]),
        ("model.pretrained=./nowhere", ["model.pretrained=./nowhere", "no such folder"]),
        ("training.segment_length=17", ["segment_length=16", "training.segment_length=17", "set the latter"]),
        ("training.batch_size=64", ["training.batch_size=64", "smaller batch"]),
        ("training.batch_size=3", ["training.batch_size=3", "training.gradient_accumulation=2", "multiple of 2"]),
        ("resume=nowhere", ["resume=nowhere", "cannot be gone on from", "nowhere"]),
        ("data.train=nowhere.txt", ["data.train=nowhere.txt", "no such file"]),
        ("data.train=null", ["data.train=null", "needs train documents"]),
        ("seed=-1", ["seed=-1", "from 0 to"]),
    ],
)
def test_training_refuses(train_refused, option, says):
    message = train_refused(option)
    assert all(part in message for part in says), message


@pytest.mark.parametrize("memory", ["model.memory=null", "model.memory.segment_length=17"])
def test_a_segment_longer_than_the_positions_of_the_model(train_refused, memory):
    message = train_refused("training.segment_length=17", memory)
    assert "segment_length=17" in message
    assert "16 positions" in message


def test_a_folder_that_is_no_model(train_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = train_refused(f"model.pretrained={tmp_path / 'empty'}")
    assert f"model.pretrained={tmp_path / 'empty'}: this folder is no model, it has no config.json" in message


def test_a_broken_model(train_refused, model_folder, tmp_path):
    (tmp_path / "broken").mkdir()
    for path in model_folder.iterdir():
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"model.pretrained={tmp_path / 'broken'}" in train_refused(f"model.pretrained={tmp_path / 'broken'}")


def test_a_tokenizer_of_another_model(train_refused, tokenizer, tmp_path):
    larger = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<s>")
    larger.add_tokens([f"word{number}" for number in range(10)])
    larger.save_pretrained(tmp_path / "larger")
    message = train_refused(f"model.tokenizer={tmp_path / 'larger'}")
    assert "the tokenizer has 267 tokens and the model knows 257" in message
    assert "model.tokenizer=" in message


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("split=dev", ["split=dev", "train, validation, test"]),
        ("batch_size=0", ["batch_size=0", "at least 1"]),
        ("segment_length=17", ["segment_length=17", "16"]),
        ("checkpoint=./nowhere", ["checkpoint=./nowhere", "no such folder"]),
        ("tokenizer=./nowhere", ["tokenizer=./nowhere", "no such folder"]),
        ("data.test=null", ["data.test=null", "needs test documents"]),
        ("control=false", ["Key 'control' not in"]),
    ],
)
def test_evaluation_refuses(eval_refused, option, says):
    message = eval_refused(option)
    assert all(part in message for part in says), message


def test_an_evaluation_of_nothing(start):
    code, text = start(eval_command)
    assert code == 1
    assert "checkpoint" in text
    assert "Traceback" not in text


class TestAHubThatCannotBeReached:
    @pytest.fixture(autouse=True)
    def closed(self, monkeypatch) -> None:
        problem_with_the_hub.cache_clear()
        monkeypatch.setattr(constants, "ENDPOINT", CLOSED_PORT)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def test_for_a_model(self, train_refused):
        message = train_refused("model.pretrained=someone/something")
        assert f"model.pretrained=someone/something: {CLOSED_PORT} cannot be reached" in message
        assert all(way in message for way in ("local folder", "HF_HOME", "HF_HUB_OFFLINE=1", "HF_ENDPOINT="))

    def test_for_documents(self, train_refused):
        message = train_refused("data.source=hub", "data.repository=someone/texts", "data.train=train")
        assert "data.repository=someone/texts" in message
        assert f"{CLOSED_PORT} cannot be reached" in message
        assert all(way in message for way in ("local folder", "HF_HOME", "HF_HUB_OFFLINE=1", "HF_ENDPOINT="))


class TestExitCodes:
    def test_a_run_that_was_stopped(self, start, configure, options_of, tmp_path, monkeypatch):
        def stop(config: object) -> None:
            raise loop.TrainingStopped(signal.SIGINT, tmp_path / "step-00000001")

        monkeypatch.setattr(run, "run", stop)
        code, text = start(train_command, *options_of(configure(tmp_path / "run")))
        assert code == 128 + signal.SIGINT
        assert "step-00000001" in text
        assert "resume=auto" in text

    def test_a_run_that_failed(self, start, configure, options_of, tmp_path, monkeypatch):
        def fail(config: object) -> None:
            raise loop.TrainingFailedError("step 3: the loss is nan")

        monkeypatch.setattr(run, "run", fail)
        code, text = start(train_command, *options_of(configure(tmp_path / "run")))
        assert (code, text.strip()) == (1, "error: step 3: the loss is nan")

    def test_a_run_that_is_done(self, start, configure, options_of, tmp_path):
        changes = {"training.max_steps": 1, "data.test": None, "data.validation": None}
        code, _ = start(train_command, *options_of(configure(tmp_path / "run", changes)))
        assert code == 0
        assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()

    def test_in_a_process_of_its_own(self, configure, options_of, tmp_path):
        """As a user sees it, without a network."""
        options = [*options_of(configure(tmp_path / "run")), "model.pretrained=someone/something"]
        environment = {**os.environ, "HF_ENDPOINT": CLOSED_PORT, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "train.py", *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 1
        assert f"error: model.pretrained=someone/something: {CLOSED_PORT} cannot be reached" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_an_evaluation_of_a_checkpoint(start, configure, train, texts, tmp_path):
    """What `train.py` found in the end, `eval.py` finds again."""
    results = train(configure(tmp_path / "run"))
    options = ["data=text", f"data.test={texts}/test.jsonl", f"checkpoint={tmp_path}/run/checkpoints/best"]
    code, text = start(eval_command, *options, f"output_dir={tmp_path}/found", "batch_size=3")
    assert code == 0, text
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert found["nll"] == pytest.approx(results["nll"], rel=1e-6)
    assert found["controls"].keys() == results["controls"].keys()
    assert (tmp_path / "found" / "plots" / "loss_by_position.png").exists()
