"""The experiments of published size do run: two steps of one lane, on very little to learn from."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TWO_STEPS = ("training.max_steps=2", "training.batch_size=1", "training.log_every=1", "training.checkpoint_every=null")

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Trains in a process of its own, whose gigabytes are free afterwards; returns the results."""

    def start(experiment: str, *options: str) -> dict[str, Any]:
        folder = tmp_path / "run"
        command = [sys.executable, "train.py", f"experiment={experiment}", f"output_dir={folder}", *TWO_STEPS, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in metrics if "train/loss" in line]
        assert len(losses) == 2
        assert all(map(math.isfinite, losses))
        return json.loads((folder / "results.json").read_text())

    yield start
    shutil.rmtree(tmp_path)  # the weights of a language model here are gigabytes


@pytest.mark.parametrize("memory", ["none", "short_term", "compressive", "long_term", "sticky"])
def test_sorting(run, memory):
    """All three lengths have these sizes; a sequence is cut short here, but goes beyond a segment."""
    sequences = ["task.length=1500", "task.validation_sequences=2", "task.test_sequences=2"]
    (figures,) = run("sorting_4k", f"model/memory={memory}", *sequences)["lengths"]
    assert (figures["length"], figures["sequences"]) == (1500, 2)
    assert math.isfinite(figures["nll"])
    window = 1024 if memory == "none" else 2048
    assert f"last_{window}" in figures["ideal_counters"]


@pytest.mark.parametrize("row", ["transformer_xl", "compressive", "infformer", "infformer_sticky"])
def test_language_modelling_from_scratch(run, tmp_path, row):
    """With all the words of WikiText-103, though few of them occur."""
    document = tmp_path / "document.txt"
    document.write_text((ROOT / "LICENSE").read_text()[:4000])
    documents = [f"data.{split}={document}" for split in ("train", "test")]
    documents += ["data.source=files", "data.validation=null", "data.articles=false", f"data.cache_dir={tmp_path}"]
    results = run(f"wt103_{row}", "+model.architecture.vocab_size=267735", *documents)
    assert results["protocol"]["segment"] == 150
    assert results["tokens"] > 4 * 150  # so that there was something to remember
    # Two steps from the uniform distribution.
    assert results["nll"] / results["tokens"] < math.log(267_735)
    assert results["controls"]["memory_off"]["nll"] != results["nll"]
