"""What is installed from a wheel works outside a checkout: the package, its commands, the sample and the groups."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
TEXT = ("data.max_held_out_characters=4000", "data.cache_dir=tokens")
SMALL = (
    *TEXT, "data.max_document_characters=4000", "data.segments_per_visit=2", "training.batch_size=2",
    "evaluation.controls=false", "evaluation.inspected_segments=0",
)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.needs("setuptools")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel of this tree was installed; it was built of a copy, in which setuptools may leave what it likes."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(ROOT / "infformer", source / "infformer", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What a command prints that is typed in an empty folder."""
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "book.txt").write_text("It was a dark and stormy night. " * 50, encoding="utf-8")

    def typed(*words: str) -> str:
        done = subprocess.run(
            words, cwd=place, env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return typed


def test_what_is_imported_is_what_was_installed(run: Callable[..., str], installed: Path) -> None:
    printed = run(sys.executable, "-c", "import infformer; print(infformer.__file__)")
    assert printed.strip() == str(installed / "infformer" / "__init__.py")


def test_the_installed_commands_train_measure_and_write(run: Callable[..., str], installed: Path) -> None:
    train, measure, write = (str(installed / "bin" / f"infformer-{name}") for name in ("train", "eval", "generate"))
    assert "after training" in run(train, *SMALL, "training.max_steps=2")
    launch = (*ACCELERATE, "-m", "infformer.commands.train")
    assert "after training" in run(*launch, *SMALL, "training.max_steps=3", "resume=auto")
    checkpoint = "checkpoint=outputs/tiny/checkpoints/best"
    assert "this model" in run(measure, checkpoint, "data=sample", *TEXT, "controls=false")
    assert run(write, checkpoint, "document=book.txt", "prompt=And so", "tokens=4").strip()
