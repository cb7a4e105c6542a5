"""ULMFiT's three stages, each of which begins with what the one before has learned."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infformer.config import CONF, RunConfig
from infformer.errors import ModelError
from infformer.models.loading import load_pretrained, load_trained
from infformer.training.command_line import compose

SMALL = [
    "training.max_steps=2", "training.batch_size=4", "training.evaluate_every=null", "training.checkpoint_every=null",
    "evaluation.before=false", "evaluation.controls=false", "evaluation.inspected_segments=0",
]  # fmt: skip
MODELS = {
    # A stock model with a memory, and a decoder.
    "wrapped": ["model=tiny", "model/memory=long_term"],
    "decoder": [
        "model=decoder", "model.architecture.hidden_size=16", "model.architecture.num_hidden_layers=1",
        "model.architecture.num_attention_heads=2", "model.architecture.feed_forward_size=16",
    ],
}  # fmt: skip


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that name a table for each split."""
    monkeypatch.setenv("INFFORMER_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(8):
                rest = " ".join(random.choice(["film", "plot", "actor"], size=random.integers(20, 60)))
                writer.writerow([f"{('good', 'bad')[number % 2]} {rest}", ("good", "bad")[number % 2]])
    return [f"data.train={tmp_path}/train.csv", "data.validation=null", f"data.test={tmp_path}/test.csv"]


@pytest.mark.parametrize("model", [pytest.param("wrapped", marks=pytest.mark.slow), "decoder"])
def test_three_stages_run_one_from_what_the_other_has_learned(reviews, train, tmp_path, model):
    def run(stage: str, *options: str) -> Any:
        typed = [f"experiment=ulmfit_{stage}", *SMALL, *options, f"output_dir={tmp_path / stage}"]
        return train(compose("train", RunConfig, CONF, typed))

    def weights(stage: str) -> dict[str, torch.Tensor]:
        return load_file(next((tmp_path / stage / "checkpoints").glob("step-*")) / "model" / "model.safetensors")

    short = ["data.train=train", "data.max_documents=4", "data.max_document_characters=1000"]
    held_out = ["data.validation=null", "data.test=null"]
    run("general", *MODELS[model], *short, *held_out, "training.segment_length=64")
    run("task", f"model.pretrained={tmp_path / 'general'}", "data=text", *reviews[:2], "data.test=null",
        "optimizer.learning_rate=0", "optimizer.memory_learning_rate=0", "optimizer.gate_learning_rate=0")  # fmt: skip
    general, task = weights("general"), weights("task")
    assert general.keys() == task.keys()
    assert all(torch.equal(tensor, task[name]) for name, tensor in general.items())
    results = run("classifier", f"model.pretrained={tmp_path / 'task'}", *reviews)
    assert (results["examples"], results["classes"]) == (8, 2)
    own, remembers = weights("classifier"), re.compile(r"\bmemor(y|ies)\.")
    read = {name.removeprefix("reader."): tensor for name, tensor in own.items() if name.startswith("reader.")}
    assert read.keys() == task.keys()
    # In the first steps the head and the memories learn alone; what stands above the layers is the head's.
    above = re.compile(r"ln_f|final_norm")
    for name, tensor in read.items():
        if not (remembers.search(name) or above.search(name)):
            assert torch.equal(tensor, task[name]), name
    assert load_trained(str(tmp_path / "classifier")).config.labels == ["bad", "good"]
    with pytest.raises(ModelError, match="is a classifier, and no language model"):
        load_pretrained(str(tmp_path / "classifier"))
