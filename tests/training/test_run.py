"""Whole runs: what they leave behind, and what their options change and do not change."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from safetensors.torch import load_file

from infformer.config import CONF, ModelConfig, RunConfig
from infformer.tasks.language_modelling import LanguageModelling
from infformer.training import trainer
from infformer.training.command_line import compose
from infformer.training.metrics import read_metrics
from infformer.training.resuming import RunError

ROOT = Path(__file__).parents[2]
FIGURES = {
    "tokens", "words", "bytes", "documents", "nll", "perplexity", "perplexity_interval", "bits_per_byte", "by_position",
    "by_place", "by_recency", "per_document",
}  # fmt: skip


EVERYTHING = {
    "training.sample_every": 4, "training.sample_tokens": 9, "evaluation.inspected_segments": 4,
    "evaluation.controls": True,
}  # fmt: skip
"""All that a run can write."""


def losses(folder: Path) -> dict[int, float]:
    return {
        int(line["step"]): line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line
    }


SMALL = (
    "training.max_steps=2", "training.checkpoint_every=1", "training.batch_size=2", "data.max_document_characters=2000",
    "data.test=null", "data.validation=null", "evaluation.inspected_segments=0",
)  # fmt: skip
"""What makes a run of the commands of a page a short one."""


def changed(folder: Path) -> set[str]:
    """The weights that the second step of a run has changed."""
    first, second = (weights(folder / "checkpoints" / f"step-0000000{step}") for step in (1, 2))
    return {name for name in second if not torch.equal(first[name], second[name])}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(configure, train, tmp_path_factory) -> Path:
    """The folder of a run with all that a run can write."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())  # nobody looks at it
        train(configure(folder, EVERYTHING), plots=True)
    return folder


class TestTheFolder:
    def test_the_folder_says_what_the_run_was(self, finished, configure):
        config = OmegaConf.load(finished / "config.yaml")
        assert config.training.segment_length == 2 * config.model.memory.basis_functions == 16
        assert config.output_dir == str(finished)
        same = configure(finished, EVERYTHING)
        assert config == OmegaConf.to_container(OmegaConf.structured(same), resolve=True)
        versions = json.loads((finished / "versions.json").read_text())
        assert torch.__version__.split("+")[0] == versions["torch"].split("+")[0]  # not every build says for which card
        assert versions.keys() >= {"python", "git_revision", "infformer", "transformers", "accelerate", "datasets"}

    def test_metrics_are_of_every_step_and_validation(self, finished):
        lines = read_metrics(finished / "metrics.jsonl")
        training = [line for line in lines if "train/loss" in line]
        assert [line["step"] for line in training] == list(range(1, 9))
        assert training[0].keys() == {
            "step", "tokens", "train/loss", "train/perplexity", "train/divergence", "train/gradient_norm",
            "train/tokens_per_second", "train/learning_rate", "train/memory_learning_rate",
        }  # fmt: skip
        assert all(line["train/perplexity"] == pytest.approx(math.exp(line["train/loss"])) for line in training)
        assert training[-1]["train/loss"] < training[0]["train/loss"]
        validation = [line for line in lines if "validation/loss" in line]
        assert [line["step"] for line in validation] == [3, 6, 8]
        assert validation[0].keys() == {"step", "tokens", "validation/loss", "validation/perplexity"}
        assert all(
            line["validation/perplexity"] == pytest.approx(math.exp(line["validation/loss"])) for line in validation
        )

    def test_results_hold_the_figures_with_their_controls(self, finished, texts):
        results = json.loads((finished / "results.json").read_text())
        assert results.keys() == FIGURES | {"controls", "protocol", "before", "cost", "sizes"}
        assert results["controls"].keys() == {"memory_off", "memory_of_another_document", "memory_shuffled_in_time"}
        for figures in (results, results["before"], *results["controls"].values()):
            assert figures.keys() >= FIGURES
            assert figures["perplexity"].keys() == {"token", "word"}
            documents = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
            assert [entry["id"] for entry in figures["per_document"]] == [document["id"] for document in documents]
            assert figures["bytes"] == sum(len(document["text"]) for document in documents)
        assert results["nll"] < results["before"]["nll"]
        assert results["protocol"].keys() == {
            "segment", "stride", "warmup_documents", "reset", "dtype", "documents", "memory", "checkpoint",
        }  # fmt: skip
        assert results["protocol"]["checkpoint"] == str((finished / "checkpoints" / "best").resolve())

    def test_checkpoints_and_plots_are_there(self, finished):
        assert {path.name for path in (finished / "checkpoints").iterdir()} == {
            "step-00000006",
            "step-00000008",
            "best",
        }
        assert {path.name for path in (finished / "plots").iterdir()} == {
            "training.png",
            "loss_by_position.png",
            "gain_by_recency.png",
            "gain_by_document.png",
        }

    def test_what_the_memory_holds_is_there(self, finished):
        inspection = json.loads((finished / "inspection" / "inspection.json").read_text())
        assert inspection["document"]["segments"] == 4
        assert (finished / "inspection" / "reconstruction.png").exists()

    def test_samples_are_there(self, finished):
        samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
        assert [sample["step"] for sample in samples] == [4, 8]
        assert all("⟶" in sample["text"] for sample in samples)

    def test_samples_are_shown(self, configure, train, tmp_path, caplog):
        with caplog.at_level("INFO"):
            train(configure(tmp_path, {"training.max_steps": 1, "training.sample_every": 1, "data.test": None}))
        (sample,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert f"step 1  sample: {sample['text']}" in caplog.text

    def test_samples_do_not_change_what_is_learned(self, finished, configure, train, tmp_path):
        train(configure(tmp_path, {"training.evaluate_every": None, "evaluation.before": False}))
        assert losses(tmp_path) == losses(finished)


def test_a_run_that_is_configured_in_python_lies_in_the_folder_of_its_name():
    model = ModelConfig(pretrained="gpt2")
    assert RunConfig(model=model, name="mine").output_dir == "outputs/mine"
    assert RunConfig(model=model, name="mine", output_dir="elsewhere").output_dir == "elsewhere"


def test_a_run_ends_with_where_everything_lies(configure, train, tmp_path, capsys):
    train(configure(tmp_path / "run", {"training.max_steps": 1, "evaluation.inspected_segments": 2}))
    *_, table, where, figures, inspection, best, metrics = capsys.readouterr().out.splitlines()
    assert table.endswith("intervals over documents")
    assert where == f"everything lies in {tmp_path / 'run'}"
    names = [line.strip().split(":")[0] for line in (figures, inspection, best, metrics)]
    assert names == ["results.json", "inspection/index.html", "checkpoints/best", "metrics.jsonl"]


def test_whatever_becomes_of_the_inspection_the_results_are_there(configure, train, tmp_path, monkeypatch, capsys):
    def fail(self: LanguageModelling) -> None:
        raise MemoryError

    monkeypatch.setattr(LanguageModelling, "inspect", fail)
    with pytest.raises(MemoryError):
        train(configure(tmp_path / "run", {"training.max_steps": 1}))
    assert (tmp_path / "run" / "results.json").exists()
    assert "after training" in capsys.readouterr().out


class TestTheFinalFigures:
    """Of a run that is at its best after its first step, whose rate is zero, and spoils its weights afterwards."""

    @pytest.fixture(scope="class")
    @classmethod
    def spoilt(cls, configure, train, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("spoilt") / "run"
        changes = {
            "training.max_steps": 3,
            "training.evaluate_every": 1,
            "training.checkpoint_every": None,
            "schedule.warmup_steps": 1,
            "schedule.name": "constant",
            "optimizer.learning_rate": 10.0,
            "optimizer.memory_learning_rate": 10.0,
            "evaluation.inspected_segments": 2,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())  # nobody looks at it
            train(configure(folder, changes))
        return folder

    def test_the_final_figures_are_those_of_the_best_checkpoint(self, spoilt):
        """The weights before training, to the last bit; so its figures are those from before training."""
        lines = read_metrics(spoilt / "metrics.jsonl")
        first, *others = [line["validation/loss"] for line in lines if "validation/loss" in line]
        assert min(others) > first + 1
        results = json.loads((spoilt / "results.json").read_text())
        before = results.pop("before")
        assert {name: results[name] for name in before} == before
        assert results["protocol"]["checkpoint"] == str((spoilt / "checkpoints" / "best").resolve())
        assert Path(results["protocol"]["checkpoint"]).name == "step-00000001"

    def test_what_the_memory_holds_is_that_of_the_best_checkpoint(self, spoilt, texts):
        """A memory that was never trained adds nothing."""
        inspection = json.loads((spoilt / "inspection" / "inspection.json").read_text())
        assert np.array(inspection["reading"]["contribution"]).max() == 0


@pytest.fixture(scope="module")
def steady(without_dropout) -> dict[str, Any]:
    """Changes to a run whose losses depend on nothing random, nor on how many steps follow."""
    return {**without_dropout, "schedule.name": "constant", "training.max_steps": 6, "evaluation.before": False}


@pytest.fixture(scope="module")
def reference(configure, train, steady, tmp_path_factory) -> Path:
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(configure(folder, steady))
    return folder


class TestTheSameLosses:
    @pytest.mark.parametrize(
        "changes",
        [
            {"training.gradient_checkpointing": True, "evaluation.batch_size": 1, "training.evaluate_every": 1},
            pytest.param({"training.compile": True}, marks=pytest.mark.slow),
        ],
        ids=", ".join,
    )
    def test_losses_do_not_depend_on_how_they_are_computed(
        self, configure, train, steady, reference, tmp_path, changes
    ):
        results = train(configure(tmp_path, {**steady, **changes}))
        assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-6)
        assert results["nll"] == pytest.approx(json.loads((reference / "results.json").read_text())["nll"], rel=1e-6)

    def test_losses_do_not_depend_on_how_lanes_are_cut_nor_on_a_stop(
        self, configure, train, steady, reference, tmp_path, caplog
    ):
        """The only option of `training` that changes how a step is computed and may be another when a run goes on."""
        for steps, parts in ((2, 2), (4, 4), (6, 1)):
            cut = {"training.max_steps": steps, "training.gradient_accumulation": parts, "resume": "auto"}
            train(configure(tmp_path, {**steady, **cut}))
        assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-6)
        assert "the lanes are read in 4 microbatch(es) from here on, and were in 2" in caplog.text
        assert "only if every microbatch holds the same lanes" in caplog.text

    @pytest.mark.slow
    @pytest.mark.parametrize("bptt_segments", [1, 2])
    def test_losses_do_not_depend_on_how_many_processes_there_are(
        self, configure, train, options_of, without_dropout, tmp_path, bptt_segments
    ):
        """Also when the run of the two is gone on with by one, and the other way round."""
        changes = {**without_dropout, "training.bptt_segments": bptt_segments, "schedule.name": "constant"}
        train(configure(tmp_path / "one", changes))
        self.start_two(options_of(configure(tmp_path / "two", {**changes, "training.max_steps": 4})))
        train(configure(tmp_path / "two", {**changes, "training.max_steps": 6, "resume": "auto"}))
        self.start_two(options_of(configure(tmp_path / "two", {**changes, "resume": "auto"})))
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
        one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
        assert two["nll"] == pytest.approx(one["nll"], rel=1e-6)
        for name, control in one["controls"].items():
            assert two["controls"][name]["nll"] == pytest.approx(control["nll"], rel=1e-6)

    def start_two(self, options: list[str]) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr


class TestOptions:
    def test_freeze_backbone_trains_the_memory_alone(self, configure, train, tmp_path, one_layer_folder):
        changes = {"training.freeze_backbone": True, "training.checkpoint_every": 1, "training.max_steps": 3}
        train(configure(tmp_path, {**changes, "data.validation": None, "data.test": None}))
        stock = load_file(one_layer_folder / "model.safetensors")
        first, last = (weights(tmp_path / "checkpoints" / f"step-0000000{step}") for step in (2, 3))
        for name, tensor in stock.items():
            assert torch.equal(last[f"backbone.{name}"], tensor), name
        memory = [name for name in last if not name.startswith("backbone.")]
        assert len(memory) >= 5
        assert all(not torch.equal(first[name], last[name]) for name in memory)
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert "train/learning_rate" not in lines[0]
        assert lines[1]["train/memory_learning_rate"] > 0  # the warm-up begins at zero

    @pytest.mark.needs("peft")
    def test_what_the_page_shows_of_training_less_than_everything_runs(self, train, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        page = (ROOT / "docs" / "any_model.md").read_text(encoding="utf-8")
        section = page.split("\n## Train less than everything\n")[1].split("\n## ")[0]
        blocks = re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL)
        assert [kind for kind, _ in blocks] == ["bash", "python", "bash"]
        done: dict[str, Any] = {}
        for kind, block in blocks:
            if kind == "python":
                exec(block, done)
                continue
            for command in block.splitlines():
                options = shlex.split(command.removeprefix("python train.py "))
                train(compose("train", RunConfig, CONF, [*options, *SMALL]))
        assert done["model"].config.lora["rank"] == 8
        learned = {run: changed(tmp_path / "outputs" / run) for run in ("memory_alone", "adapters", "adapters_alone")}
        assert {run: {name.split(".")[0] for name in names} for run, names in learned.items()} == {
            "memory_alone": {"memories"},
            "adapters": {"memories", "backbone"},
            "adapters_alone": {"backbone"},
        }
        begun = weights(tmp_path / "outputs/adapters_on/checkpoints/step-00000001")
        trained = weights(tmp_path / "outputs/adapters/checkpoints/step-00000002")
        assert all(torch.equal(tensor, trained[name]) for name, tensor in begun.items())  # the first step's rate is 0

    def test_a_model_without_memory_learns(self, configure, train, tmp_path):
        results = train(configure(tmp_path, {"model.memory": None, "data.validation": None}))
        assert results["controls"] == {}
        assert results["nll"] < results["before"]["nll"]
        line = read_metrics(tmp_path / "metrics.jsonl")[0]
        assert line.keys().isdisjoint({"train/divergence", "train/memory_learning_rate"})

    def test_a_checkpoint_holds_the_memory_of_the_layers_that_have_one(self, configure, train, tmp_path, model_folder):
        changes = {"model.pretrained": str(model_folder), "model.memory_layers": [1], "training.max_steps": 1}
        train(configure(tmp_path, changes))
        names = {name for name in weights(tmp_path / "checkpoints" / "best") if "backbone" not in name}
        assert {name.split(".")[1] for name in names} == {"0"}

    def test_bfloat16_computes_and_stores_float32(self, configure, train, steady, reference, tmp_path):
        results = train(configure(tmp_path, {**steady, "training.precision": "bfloat16"}))
        assert losses(tmp_path) != losses(reference)
        assert losses(tmp_path) == pytest.approx(losses(reference), rel=0.01)
        assert results["protocol"]["dtype"] == "bfloat16"
        checkpoint = tmp_path / "checkpoints" / "best"
        assert {tensor.dtype for tensor in weights(checkpoint).values()} == {torch.float32}
        state = load_file(checkpoint / "process-00000.safetensors")
        memories = [
            tensor for name, tensor in state.items() if name.startswith("memory.") and tensor.is_floating_point()
        ]
        assert memories
        assert {tensor.dtype for tensor in memories} == {torch.float32}

    def test_without_test_documents_there_are_no_results(self, configure, train, tmp_path):
        assert train(configure(tmp_path, {"data.test": None, "training.max_steps": 1})) is None
        assert not (tmp_path / "results.json").exists()
        assert (tmp_path / "checkpoints" / "best").exists()

    def test_lanes_that_cannot_be_cut_into_parts_are_refused(self, configure, train, tmp_path):
        with pytest.raises(
            RunError, match=r"training\.batch_size=4 .*training\.gradient_accumulation=3: take a multiple of 3"
        ):
            train(configure(tmp_path / "run", {"training.gradient_accumulation": 3}))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("seed", [1, 2**31])
    def test_another_seed_is_another_run(self, configure, train, finished, tmp_path, seed):
        train(configure(tmp_path, {"seed": seed, "data.test": None, "training.max_steps": 1}))
        assert losses(tmp_path)[1] != losses(finished)[1]


def test_a_tracker_is_closed_also_when_the_run_fails(configure, train, tmp_path, monkeypatch):
    """What it still held back is not lost."""
    done: list[str] = []

    class Tracker(trainer.Tracker):
        def finish(self) -> None:
            done.append("finished")

    def fail(run: trainer.Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "open_tracker", lambda *arguments: Tracker())
    monkeypatch.setattr(trainer.Trainer, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        train(configure(tmp_path))
    assert done == ["finished"]
