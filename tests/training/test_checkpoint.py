"""What a checkpoint holds, what it does not grow by, and that none is used that is damaged."""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infformer.errors import ModelError
from infformer.models.loading import load_trained
from infformer.tasks.haystack import PasskeyConfig
from infformer.tasks.language_modelling import LanguageModelling
from infformer.tasks.task import Validation
from infformer.training import trainer
from infformer.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Progress,
    model_tensors,
    newest_checkpoint,
    point_to_best,
    remove_old_checkpoints,
    validate_checkpoint,
)
from infformer.training.resuming import RunError, find_checkpoint, forget_figures_of_other_texts
from infformer.training.trainer import TrainingFailedError

LANES, LAYERS, BASIS_FUNCTIONS, WIDTH = 4, 1, 8, 16
EVERY_SECOND = {"training.evaluate_every": 2, "evaluation.before": False, "data.test": None}


@pytest.fixture(scope="module")
def checkpoints(configure, train, tmp_path_factory) -> list[Path]:
    """Of steps 2, 4, 6 and 8 of one run."""
    folder = tmp_path_factory.mktemp("run")
    quiet = {"evaluation.before": False, "data.test": None, "data.validation": None}
    train(configure(folder, {"training.keep_checkpoints": 9, **quiet}))
    found = sorted((folder / "checkpoints").glob("step-*"))
    assert len(found) == 4
    return found


def test_memory_is_a_fixed_number_of_numbers(checkpoints: list[Path]) -> None:
    for checkpoint in checkpoints:
        stored = load_file(checkpoint / "process-00000.safetensors")
        coefficients = sum(tensor.numel() for name, tensor in stored.items() if name.endswith("coefficients"))
        assert coefficients == LANES * LAYERS * BASIS_FUNCTIONS * WIDTH
        bookkeeping = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("coefficients"))
        assert bookkeeping == LANES * LAYERS + LANES  # segments written, of each layer; numbers of the lanes
    sizes = {(checkpoint / "process-00000.safetensors").stat().st_size for checkpoint in checkpoints}
    assert len(sizes) == 1


def test_moments_are_stored_by_the_names_of_the_weights(checkpoints: list[Path]) -> None:
    moments = load_file(checkpoints[-1] / "optimizer.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoints[-1] / "model")
    parameters = dict(model.named_parameters())
    assert moments.keys() == {f"{name}.{kind}" for name in parameters for kind in ("step", "exp_avg", "exp_avg_sq")}
    for name, parameter in parameters.items():
        assert moments[f"{name}.exp_avg"].shape == parameter.shape
        assert moments[f"{name}.step"] == 8


def test_nothing_needs_unpickling(checkpoints: list[Path]) -> None:
    kinds = {path.suffix for path in checkpoints[-1].rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".txt", ".jinja", ".md"}
    assert set(json.loads((checkpoints[-1] / "manifest.json").read_text())["files"]) == {
        str(path.relative_to(checkpoints[-1]))
        for path in checkpoints[-1].rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "README.md")  # a card is written anew in the end
    }


def test_removing_old_ones_leaves_what_another_process_has_begun(checkpoints: list[Path], tmp_path: Path) -> None:
    for checkpoint in checkpoints:
        shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    begun = tmp_path / "step-00000009.partial"
    begun.mkdir()
    (begun / "process-00001.safetensors").touch()
    remove_old_checkpoints(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoints[-1].name, begun.name}
    assert (begun / "process-00001.safetensors").exists()


@pytest.fixture
def root(checkpoints: list[Path], tmp_path: Path) -> Path:
    """Copies of the two newest."""
    for checkpoint in checkpoints[-2:]:
        shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / checkpoint.name)
    shutil.copy(checkpoints[0].parents[1] / "config.yaml", tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another content, in a file of the same kind."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)


def swap(tensors: dict[str, Any]) -> None:
    """Two of the same size, in a file of the same size."""
    one, other = (f"backbone.transformer.h.0.{norm}.weight.exp_avg" for norm in ("ln_1", "ln_2"))
    tensors[one], tensors[other] = tensors[other], tensors[one]


JSON = ("state.json", "manifest.json", "model/config.json", "model/tokenizer.json")
TENSORS = ("model/model.safetensors", "optimizer.safetensors", "process-00000.safetensors")
DAMAGES: dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]] = {
    "emptied": (JSON + TENSORS, lambda path: path.write_bytes(b"")),
    "cut": (JSON + TENSORS, lambda path: path.write_bytes(path.read_bytes()[:-10])),
    "a bit flipped": (JSON + TENSORS, flip),
    "no object": (JSON + TENSORS, lambda path: path.write_text("[" + " " * (path.stat().st_size - 2) + "]")),
    "missing": (JSON + TENSORS, lambda path: path.unlink()),
    "a folder": (JSON + TENSORS, lambda path: (path.unlink(), path.mkdir())),
    "of another checkpoint": (
        TENSORS,
        lambda path: shutil.copy(str(path).replace("step-00000008", "step-00000006"), path),
    ),
    "a key less": (JSON, lambda path: edit(path, lambda content: content.pop(next(iter(content))))),
    "a file less": (("manifest.json",), lambda path: edit(path, lambda content: content["files"].pop(TENSORS[2]))),
    "a moment less": (("optimizer.safetensors",), lambda path: edit(path, lambda moments: moments.popitem())),
    "two moments swapped": (("optimizer.safetensors",), lambda path: edit(path, swap)),
    "twice": ((TENSORS[2],), lambda path: shutil.copy(path, path.with_name("process-00001.safetensors"))),
}
"""Of which files it is tried, and how it is done; also where names and sizes remain."""


class TestDamage:
    @pytest.mark.parametrize(("damage", "name"), [(damage, name) for damage in DAMAGES for name in DAMAGES[damage][0]])
    def test_a_damaged_checkpoint_is_passed_over(self, root: Path, caplog, damage: str, name: str) -> None:
        DAMAGES[damage][1](root / "step-00000008" / name)
        assert newest_checkpoint(root) == root / "step-00000006"
        assert f"{root / 'step-00000008'} is passed over: " in caplog.text

    def test_a_damaged_checkpoint_that_was_asked_for_is_refused(self, root: Path, configure, tmp_path: Path) -> None:
        flip(root / "step-00000008" / TENSORS[1])
        config = configure(tmp_path / "new", {"resume": str(root / "step-00000008")})
        with pytest.raises(RunError, match=r"cannot be gone on from: optimizer\.safetensors is damaged"):
            find_checkpoint(config, tmp_path / "new")

    def test_a_checkpoint_of_an_earlier_format_names_who_reads_it(self, root: Path, configure, tmp_path: Path) -> None:
        """Up to format 3 a manifest held nothing but sizes; nothing is begun anew over such checkpoints."""
        for folder in root.iterdir():
            (folder / "manifest.json").write_text('{"state.json": 1}')
            (folder / "state.json").write_text('{"format": 3}')
        with pytest.raises(RunError, match=r"its format is 3, this version reads 5; the version that wrote it"):
            find_checkpoint(configure(root.parent, {"resume": "auto"}), root.parent)

    def test_weights_that_cannot_be_read_are_an_error_in_words(self, root: Path) -> None:
        (root / "step-00000008" / TENSORS[0]).write_bytes(b"")
        with pytest.raises(CheckpointError, match="step-00000008 cannot be read"):
            model_tensors(root / "step-00000008", None)  # type: ignore[arg-type]


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(configure, train, tmp_path: Path, monkeypatch) -> None:
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        made.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        made.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    train(configure(tmp_path, {"training.max_steps": 1, "data.validation": None, "data.test": None}))
    folder = tmp_path / "checkpoints" / "step-00000001"
    named = made.index(("replace", str(folder)))
    partial = folder.with_name(f"{folder.name}.partial")
    written = {str(partial / path.relative_to(folder)) for path in (folder, *folder.rglob("*"))}
    assert len(written) > 8
    before = {path for what, path in made[:named] if what == "fsync"}
    # What `write_text` writes is synchronised under a temporary name.
    assert written <= before | {path.removesuffix(".partial") for path in before}
    assert made[named + 1] == ("fsync", str(folder.parent))


@pytest.mark.parametrize("step", [4, 6])
def test_weights_that_are_not_finite_are_never_saved(configure, train, tmp_path: Path, monkeypatch, step: int) -> None:
    """The update made them so, after a loss and a gradient that were finite; also if it was the last."""
    train_step, made = trainer.train_step, list[Any]()

    def poisoned(accelerator: Any, model: Any, *arguments: Any) -> Any:
        result = train_step(accelerator, model, *arguments)
        made.append(result)
        if len(made) == step:
            with torch.no_grad():
                dict(model.named_parameters())["backbone.transformer.ln_f.weight"][3] = torch.nan
        return result

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(TrainingFailedError) as failed:
        train(configure(tmp_path, {**EVERY_SECOND, "training.max_steps": 6}))
    message = str(failed.value)
    assert f"after step {step} backbone.transformer.ln_f.weight is not finite (NaN or infinite in 1 of 16" in message
    last = tmp_path / "checkpoints" / f"step-{step - 2:08d}"
    assert f"The last good checkpoint is {last}" in message
    assert "optimizer.learning_rate" in message
    assert newest_checkpoint(tmp_path / "checkpoints") == last
    assert (tmp_path / "checkpoints" / "best").resolve() == last
    assert not list((tmp_path / "checkpoints").glob(f"step-{step:08d}*"))


def test_a_validation_loss_that_is_no_number_is_never_the_best(configure, train, tmp_path, monkeypatch, caplog) -> None:
    losses = iter([float("nan"), 5.0, float("inf"), float("nan")])
    monkeypatch.setattr(LanguageModelling, "validate", lambda task: Validation(next(losses), {}, ""))
    train(configure(tmp_path, EVERY_SECOND))
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-00000004"
    assert "step 2: the validation loss is nan: never the best" in caplog.text


def test_weights_that_are_not_finite_are_not_measured(root: Path) -> None:
    path = root / "step-00000008" / TENSORS[0]
    tensors = load_file(path)
    tensors["backbone.transformer.wpe.weight"][2, 3] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"checkpoint=.*: the weights backbone.transformer.wpe.weight .* not finite"):
        load_trained(str(root / "step-00000008"))


def test_a_failure_in_the_moment_of_being_asked_is_no_whole_checkpoint(tmp_path: Path) -> None:
    """The thread that writes ends between two questions: whether there is an error, and whether it is alive."""
    writer = CheckpointWriter(tmp_path, Namespace(num_processes=1), keep=1)

    def fails() -> bool:
        writer._error = OSError("no room")
        return False

    writer._copy = Namespace(name="step-00000002", step=2, is_main=True, is_best=False)
    writer._thread = Namespace(is_alive=fails, join=lambda: None)
    with pytest.raises(CheckpointError, match="no room"):
        writer.finish(wait=False)


class TestWhereItGoesOn:
    def test_another_end_changes_what_follows_and_says_so(self, root: Path, configure, caplog) -> None:
        config = configure(root.parent, {"resume": "auto", "training.max_steps": 12})
        assert find_checkpoint(config, root.parent) == root / "step-00000008"
        assert "training.max_steps was 8, is 12: schedule=cosine ends at max_steps, so from step 10 on" in caplog.text

    @pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
    def test_another_end_changes_nothing_for_a_schedule_without_end(
        self, root: Path, configure, caplog, schedule: str
    ) -> None:
        path = root.parent / "config.yaml"
        path.write_text(path.read_text().replace("name: cosine", f"name: {schedule}"))
        changes = {"resume": "auto", "training.max_steps": 12, "schedule.name": schedule}
        assert find_checkpoint(configure(root.parent, changes), root.parent) == root / "step-00000008"
        assert "max_steps" not in caplog.text

    def test_an_end_that_is_behind_it_is_refused(self, root: Path, configure) -> None:
        config = configure(root.parent, {"resume": "auto", "training.max_steps": 7})
        with pytest.raises(RunError, match=r"training.max_steps=7, and .*step-00000008 has made 8 already"):
            find_checkpoint(config, root.parent)

    @pytest.mark.parametrize(
        ("change", "forgets"),
        [
            ({"data.validation": "elsewhere.jsonl"}, ["data.validation"]),
            ({"data.test": "elsewhere.jsonl"}, ["data.test"]),
            ({"evaluation.max_validation_tokens": 9}, ["evaluation.max_validation_tokens"]),
            ({"task.validation_questions": 3}, ["task.validation_questions"]),
            ({"task.test_questions": 3}, ["task.test_questions"]),
            ({"task.lengths": [64]}, ["task.lengths", "task.lengths"]),
            ({"task.depths": [0.5]}, ["task.depths", "task.depths"]),
            ({"evaluation.batch_size": 3, "evaluation.before": False, "training.max_steps": 99}, []),
        ],
    )
    def test_what_other_texts_were_measured_by_is_forgotten(
        self, configure, tmp_path: Path, change: dict[str, Any], forgets: list[str]
    ) -> None:
        """And no more: a best checkpoint stays the best whatever it will be tested by."""
        progress = Progress(task={}, best_loss=1.5, best_step=4, results_before={"nll": 2.0})
        assert forget_figures_of_other_texts(configure(tmp_path, {"task": PasskeyConfig()}), {}, progress) == []
        saved = Progress(**json.loads(json.dumps(asdict(progress))))
        other = configure(tmp_path, {"task": PasskeyConfig(), **change})
        sentences = forget_figures_of_other_texts(other, {}, saved)
        assert [sentence.split(" was ")[0] for sentence in sentences] == forgets
        by_validation = any("best checkpoint" in sentence for sentence in sentences)
        assert (saved.best_loss, saved.best_step) == ((None, None) if by_validation else (1.5, 4))
        by_test = any("before training" in sentence for sentence in sentences)
        assert saved.results_before == (None if by_test else {"nll": 2.0})
        assert by_validation + by_test == len(forgets)
        assert forget_figures_of_other_texts(other, {}, saved) == []

    def test_a_checkpoint_that_does_not_say_which_texts_it_was_measured_by_forgets_nothing(
        self, configure, tmp_path: Path
    ) -> None:
        """It is of an earlier version; from then on it says so."""
        progress = Progress(task={}, best_loss=1.5, best_step=4, results_before={"nll": 2.0})
        assert forget_figures_of_other_texts(configure(tmp_path, {"data.test": None}), {"test": "a"}, progress) == []
        assert (progress.held_out["data.test"], progress.fingerprints) == (None, {"test": "a"})

    def test_what_was_taken_away_for_a_newer_one_comes_back(self, root: Path, configure) -> None:
        """The run was killed in between; that was its newest."""
        (root / "step-00000008").rename(root / "step-00000008.replaced")
        assert find_checkpoint(configure(root.parent, {"resume": "auto"}), root.parent) == root / "step-00000008"
        assert validate_checkpoint(root / "step-00000008") is None

    def test_best_is_what_the_checkpoint_says(self, root: Path) -> None:
        """The run was killed before it had changed the link."""
        (root / "best").symlink_to("step-00000006")
        point_to_best(root, 8)
        assert (root / "best").resolve() == root / "step-00000008"
        point_to_best(root, 3)  # it lies elsewhere
        assert (root / "best").resolve() == root / "step-00000008"

    @pytest.mark.parametrize("content", ["", "[1]", "a: [1", None])
    def test_a_configuration_that_cannot_be_read_is_said(self, root: Path, configure, content: str | None) -> None:
        path = root.parent / "config.yaml"
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(RunError, match=r"resume=auto: the configuration .*config.yaml"):
            find_checkpoint(configure(root.parent, {"resume": "auto"}), root.parent)
