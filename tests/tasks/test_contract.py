"""A task of forty lines, which no file of the package knows of, learned and measured like every other.

Every test is in both kinds of model: a decoder from scratch, and GPT-2 with memories beside it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infformer.config import CONF, RunConfig
from infformer.data.segments import IGNORE_INDEX, Segment
from infformer.tasks.task import Evaluation, Material, TaskConfig, Validation, cut_texts
from infformer.training.command_line import compose
from infformer.training.metrics import read_metrics


# The task begins here.
@dataclass
class LastTokensConfig(TaskConfig):
    """The last tokens of a random text of three segments are asked for."""

    scored: int = 4
    vocabulary_size = 257

    def build_stream(self, material: Material) -> "RandomTexts":
        return RandomTexts(self.scored, material)

    def build_evaluation(self, material: Material) -> "CountedMeasures":
        return CountedMeasures()


@dataclass
class RandomTexts:
    scored: int
    material: Material
    state: dict[str, Any] = field(default_factory=lambda: {"steps": 0})

    def next_step(self) -> list[Segment]:
        steps, lanes = self.state["steps"], self.material.lanes
        tokens = torch.randint(257, (lanes, 49), generator=torch.Generator().manual_seed(steps))
        targets = torch.full((lanes, 48), IGNORE_INDEX)
        targets[:, -self.scored :] = tokens[:, -self.scored :]
        self.state = {"steps": steps + 1}
        return cut_texts(tokens[:, :-1], targets, range(lanes), self.material, reads=3 * steps)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(str)

    def describe(self) -> str:
        return "random texts"


class CountedMeasures(Evaluation):
    validations = 0

    def validate(self) -> Validation:
        self.validations += 1
        return Validation(abs(self.validations - 2), {"validation/number": self.validations}, "fine")

    def measure_before(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def measure(self, checkpoint: str) -> dict[str, Any]:
        return {"validations": self.validations, "checkpoint": checkpoint}

    def sample(self, step: int, tokens: int) -> str:
        return f"{tokens} tokens of step {step}"


# The task ends here.
DECODER = {"model_type": "decoder", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
MODELS = {
    "decoder": {
        "model.pretrained": None,
        "model.architecture": {**DECODER, "feed_forward_size": 20, "dropout": 0.1},
        "model.tokenizer": "none is asked for",
    },
    "gpt2": {},
}
CHANGES = {"schedule.name": "constant", "training.sample_every": 4, "training.sample_tokens": 5}


@pytest.fixture(scope="module")
def learn(configure, train) -> Callable[..., RunConfig]:
    """A run of that task: `learn(folder, model, changes)`."""

    def start(folder: Path, model: str, changes: dict[str, Any] | None = None) -> None:
        config = configure(folder, {**CHANGES, **MODELS[model], **(changes or {})})
        config.task = LastTokensConfig()
        train(config)

    return start


@pytest.fixture(scope="module", params=MODELS)
def learned(request, learn, tmp_path_factory) -> tuple[str, Path]:
    """The model, and the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    learn(folder, request.param)
    return request.param, folder


def test_a_task_is_trained_and_measured_in_its_own_way(learned):
    folder = learned[1]
    lines = read_metrics(folder / "metrics.jsonl")
    validations = {line["step"]: line["validation/number"] for line in lines if "validation/number" in line}
    assert validations == {3: 1, 6: 2, 8: 3}  # the second is the best
    training = [line for line in lines if "train/loss" in line]
    assert [line["tokens"] for line in training] == [4 * 48 * step for step in range(1, 9)]
    assert training[-1]["train/divergence"] > 0
    best = folder / "checkpoints" / "step-00000006"
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("sizes")["memory_parameters"] > 0
    assert results == {
        "validations": 3,
        "checkpoint": str(best.resolve()),
        "before": {"validations": 0},
    }
    written = {path.name for path in (best / "model").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= written
    assert not [name for name in written if "token" in name]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": step, "text": f"5 tokens of step {step}"} for step in (4, 8)]


def test_a_task_resumed_equals_one_never_stopped(learned, learn, tmp_path):
    model, folder = learned
    learn(tmp_path, model, {"training.max_steps": 5})
    learn(tmp_path, model, {"resume": "auto"})

    def losses(place: Path) -> list[float]:
        return [line["train/loss"] for line in read_metrics(place / "metrics.jsonl") if "train/loss" in line]

    assert losses(tmp_path) == losses(folder)
    expected, found = (
        load_file(place / "checkpoints" / "step-00000008" / "model" / "model.safetensors")
        for place in (folder, tmp_path)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_task_leaves_out_what_it_does_not_measure():
    nothing = Evaluation()
    assert nothing.validate() is nothing.sample(1, 2) is nothing.inspect() is None
    assert nothing.measure_before() is nothing.measure("here") is None


@pytest.mark.parametrize("model", ["tiny", "decoder"])
def test_a_task_of_ones_own_is_chosen_by_one_word(add_choice, model):
    add_choice("task", "last_tokens", LastTokensConfig())
    config = compose("train", RunConfig, CONF, [f"model={model}", "task=last_tokens", "task.scored=2"])
    assert config.task == LastTokensConfig(scored=2)
