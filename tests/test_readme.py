"""What the README tells a reader to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from infformer.config import EvaluationRunConfig, RunConfig, register_schemas

register_schemas()

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line]
COMMANDS = [command.strip() for line in LINES for command in line.split("&&")]
RUNS = [command for command in COMMANDS if "train.py" in command or "eval.py" in command]

SMALL = (
    "training.max_steps=2", "training.batch_size=2", "data.max_document_characters=4000",
    "data.max_held_out_characters=4000", "data.segments_per_visit=2", "evaluation.controls=false",
)  # fmt: skip


def options(command: str) -> list[str]:
    words = shlex.split(command)
    return words[[word.endswith(".py") for word in words].index(True) + 1 :]


def run(script: str, *arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_one_that_is_run_somewhere() -> None:
    """By the tests here, or by .ci/run, which installs the package and runs pytest."""
    others = {command for command in COMMANDS if command not in RUNS}
    assert others == {
        "pip install -e '.[dev]' -c constraints.txt",
        "python -m pytest",
        "python scripts/reproduce_sorting.py",  # tests/test_scripts.py
        "python scripts/compare.py outputs/control outputs/tiny",  # tests/evaluation/test_comparison.py
        "python scripts/inspect_memory.py outputs/tiny/checkpoints/best sample",  # tests/test_inspect_memory.py
    }


@pytest.mark.parametrize("command", RUNS)
def test_the_options_of_a_command_are_known(command: str) -> None:
    kind, schema = ("train", RunConfig) if "train.py" in command else ("eval", EvaluationRunConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        whole = compose(kind, options(command), return_hydra_config=True)
    HydraConfig.instance().set_config(whole)
    composed = OmegaConf.masked_copy(whole, [name for name in whole if name != "hydra"])
    OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The default, cut short: the run's folder and what was printed."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return folder, run("train.py", *SMALL[:-1], f"output_dir={folder}")


def test_the_default_prints_its_table(tiny_run: tuple[Path, str]) -> None:
    printed = tiny_run[1]
    situations = ("its memory off", "another document's memory", "its memory shuffled in time")
    number = r"\d+\.\d+"
    for row in ("before training", "after training", *situations):
        figures = rf"{number} +{number} – {number} +{number} +{number}  disjoint segments of 64, float32"
        assert re.search(rf"^ *{row} +{figures}$", printed, re.MULTILINE), printed
    assert (tiny_run[0] / "inspection" / "reconstruction.png").exists()


def test_its_checkpoint_is_measured(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    command = next(command for command in RUNS if "eval.py" in command and "outputs/tiny" in command)
    chosen = [option.replace("outputs/tiny", str(tiny_run[0])) for option in options(command)]
    printed = run("eval.py", *chosen, "data.max_held_out_characters=4000", f"output_dir={tmp_path}")
    assert "another document's memory" in printed
    assert (tmp_path / "results.json").exists()


def test_text_of_ones_own(tmp_path: Path) -> None:
    command = next(command for command in RUNS if "data=text" in command)
    (tmp_path / "books").mkdir()
    (tmp_path / "infformer").symlink_to(ROOT / "infformer")
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text("It was a dark and stormy night. " * 100, encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text('{"text": "It was a bright and quiet morning."}\n', encoding="utf-8")
    run("train.py", *options(command), *SMALL, cwd=tmp_path)
    assert (tmp_path / "outputs" / "mine" / "checkpoints" / "best").exists()


def test_the_python_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = (block for kind, block in BLOCKS if kind == "python")
    names: dict[str, object] = {}
    exec(example, names)
    assert names["output"].memory.layers[0].segments.tolist() == [8]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_default_as_it_is(tmp_path: Path) -> None:
    """The table that README shows: what is learned is worth something, and it is the document's own past that is."""
    run("train.py", f"output_dir={tmp_path}")
