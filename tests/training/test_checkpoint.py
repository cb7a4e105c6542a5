"""What a checkpoint holds, and what it does not grow by."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from infformer.training.checkpoint import remove_old_checkpoints

LANES, LAYERS, BASIS_FUNCTIONS, WIDTH = 4, 2, 8, 16


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
    assert kinds <= {".safetensors", ".json", ".txt", ".jinja"}
    assert set(json.loads((checkpoints[-1] / "manifest.json").read_text())["files"]) == {
        str(path.relative_to(checkpoints[-1]))
        for path in checkpoints[-1].rglob("*")
        if path.is_file() and path.name != "manifest.json"
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
