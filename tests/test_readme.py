"""What the README tells a reader to type does what the README says; `test_documented_commands.py` tries its options."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainingArguments

from infformer.commands import generate
from infformer.config import CONF, GenerationRunConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.training.command_line import compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line]
COMMANDS = [command.strip() for line in LINES for command in line.split("&&")]
EXAMPLES = [block for kind, block in BLOCKS if kind == "python"]
RUNS = [command for command in COMMANDS if "train.py" in command or "eval.py" in command]

TABLES = [block for kind, block in BLOCKS if not kind]
"""What the README shows of what is printed: by the default, and by the comparison with its control."""
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")

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


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The default, cut short: the run's folder and what was printed."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return folder, run("train.py", *SMALL[:-1], f"output_dir={folder}")


@pytest.mark.slow
def test_the_default_prints_its_table(tiny_run: tuple[Path, str]) -> None:
    printed = tiny_run[1]
    situations = ("its memory off", "another document's memory", "its memory shuffled in time")
    number = r"\d+\.\d+"
    for row in ("before training", "after training", *situations):
        figures = rf"{number} +{number} – {number} +{number} +{number}  disjoint segments of 64, float32"
        assert re.search(rf"^ *{row} +{figures}$", printed, re.MULTILINE), printed
    assert (tiny_run[0] / "inspection" / "reconstruction.png").exists()


@pytest.mark.slow
def test_its_checkpoint_is_measured(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    command = next(command for command in RUNS if "eval.py" in command and "outputs/tiny" in command)
    chosen = [option.replace("outputs/tiny", str(tiny_run[0])) for option in options(command)]
    printed = run("eval.py", *chosen, "data.max_held_out_characters=4000", f"output_dir={tmp_path}")
    assert "another document's memory" in printed
    assert (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_text_of_ones_own(tmp_path: Path) -> None:
    command = next(command for command in RUNS if "data=text" in command)
    (tmp_path / "books").mkdir()
    (tmp_path / "infformer").symlink_to(ROOT / "infformer")
    for number in range(23):
        text = f"It was a dark and stormy night, the {number}th of them. " * 50
        (tmp_path / "books" / f"{number}.txt").write_text(text, encoding="utf-8")
    run("train.py", *options(command), *SMALL, cwd=tmp_path)
    folder = tmp_path / "outputs" / "mine"
    assert (folder / "checkpoints" / "best").exists()
    assert json.loads((folder / "results.json").read_text())["documents"] == 10


def test_the_python_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(EXAMPLES[0], names)
    assert names["output"].state.layers[0].segments.tolist() == [8]  # type: ignore[attr-defined]


def below(heading: str) -> str:
    """The example in Python under a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return example


def save_stand_in(model_folder: Path, place: Path) -> None:
    """A model in place of that of the README's run, which takes minutes."""
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16)
    folder = place / "outputs" / "tiny" / "checkpoints" / "best" / "model"
    InfformerForCausalLM.from_backbone(model_folder, memory, segment_length=16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)


def test_what_was_trained_is_loaded_and_writes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_stand_in(model_folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(below("Load what you trained"), names)
    exec(below("Generate"), names)
    text = capsys.readouterr().out
    assert text.startswith("It was a dark and stormy night. " * 50)
    assert len(text) > 32 * 50 + 10
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 50, encoding="utf-8")
    (command,) = (command for command in COMMANDS if "generate.py" in command)
    generate.run(compose("generate", GenerationRunConfig, CONF, options(command)))
    assert capsys.readouterr().out
    assert (tmp_path / "book.safetensors").exists()


def two_segments(model: Any) -> torch.Tensor:
    """The logits of a second one, after what the first has left."""
    tokens = torch.arange(1, 33).view(1, 32)
    with torch.no_grad():
        return model(tokens[:, 16:], state=model(tokens[:, :16]).state).logits


@pytest.mark.needs("peft")
def test_what_peft_trains_is_saved_and_loaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_stand_in(model_folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(below("Load what you trained"), names)
    before, after = below("With PEFT").split("peft_model.save_pretrained")
    exec(before, names)
    model = names["peft_model"].eval()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name.split(".memories.")[1][0] for name in trained if ".memories." in name} == {"0", "1"}
    begun = {name: tensor.clone() for name, tensor in trained.items()}
    tokens, optimizer = torch.arange(1, 33).view(1, 32), torch.optim.SGD(trained.values(), lr=10.0)
    for _ in range(3):  # what begins at zero keeps what stands before it from learning at first
        state = model(tokens[:, :16]).state
        model(tokens[:, 16:], labels=tokens[:, 16:], state=state).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, tensor in trained.items() if torch.equal(tensor, begun[name])]
    exec("peft_model.save_pretrained" + after, names)
    opened = names["model"].eval()
    assert opened is not model
    assert torch.equal(two_segments(opened), two_segments(model))
    assert not torch.equal(
        two_segments(model), two_segments(names["AutoModelForCausalLM"].from_pretrained(names["folder"]))
    )


def test_transformers_trainer_trains_a_memory(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = InfformerForCausalLM.from_backbone(
        model_folder, LongTermMemoryConfig(basis_functions=8, past_samples=16), segment_length=16
    )
    names: dict[str, Any] = {}
    exec(below("With the Hugging Face Trainer"), names)
    segments = [{"input_ids": (tokens := list(range(first, first + 16))), "labels": tokens} for first in range(1, 65)]
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "train_sampling_strategy": "sequential"}
    begun = {name: tensor.clone() for name, tensor in model.memories.named_parameters()}
    names["MemoryTrainer"](
        model, TrainingArguments(str(tmp_path), **options, report_to=[]), train_dataset=segments
    ).train()
    assert not [name for name, tensor in model.memories.named_parameters() if torch.equal(tensor, begun[name])]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder from which commands run as they are typed, and in which they may write."""
    for name in ("train.py", "eval.py", "generate.py", "infformer", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 50, encoding="utf-8")
    return tmp_path


def typed(command: str, folder: Path) -> str:
    """What a command prints that is typed in that folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_shown(printed: str, shown: str) -> None:
    """The lines are the same but for the last digits of their figures, which differ between processors; … is any."""

    def split(line: str) -> tuple[str, list[float]]:
        words = " ".join(NUMBER.sub(" # ", line).split())
        return words, [float(number.replace(",", "")) for number in NUMBER.findall(line)]

    lines = [split(line) for line in printed.splitlines()]
    for line in shown.splitlines():
        words, figures = split(line)
        close = pytest.approx(figures, rel=0.005, abs=0.003)
        assert words in ("…", "") or any(found == words and numbers == close for found, numbers in lines), (
            f"README shows\n{line}\nbut printed was\n{printed}"
        )


def test_a_figure_that_was_not_printed_is_noticed() -> None:
    printed = "before  62.645  54.588 – 71.387\n4 of 4 documents, 75,050 tokens, +0.0243 nats"
    assert_shown(printed, "before 62.640 54.588 – 71.4\n…\n4 of 4 documents, 75,051 tokens, +0.0240 nats")
    for wrong in (
        "before 63.2 54.588 – 71.387",
        "after 62.645 54.588 – 71.387",
        "3 of 4 documents, 75,050 tokens, +0.0243 nats",
    ):
        with pytest.raises(AssertionError, match="README shows"):
            assert_shown(printed, wrong)


@pytest.mark.slow
def test_the_figures_are_those_that_are_printed(checkout: Path) -> None:
    """And what follows a run in the README can be typed after it."""
    default, comparison = TABLES
    (first,) = (command for command in RUNS if command.startswith("python train.py") and not options(command))
    assert_shown(typed(first, checkout), default)
    (control,) = re.findall(r"`(python train\.py [^`]*name=control)`", README)
    typed(control, checkout)
    (compare,) = {command for command in COMMANDS if "compare.py" in command}
    assert f"`{compare}`" in README
    assert_shown(typed(compare, checkout), comparison)
    for command in COMMANDS:
        if "outputs/tiny" in command and command != compare:
            typed(command, checkout)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("accelerate launch")])
def test_what_is_launched_runs(checkout: Path, command: str) -> None:
    """On small stand-ins for what would be fetched from the hub."""
    (checkout / "wikitext").mkdir()
    article = ["", " = Moby = \n", "", *[" It was a dark and stormy night . \n"] * 100]
    for split in ("train", "validation", "test"):
        rows = [line.replace("Moby", f"Moby of {split} {number}") for number in range(2) for line in article]
        Dataset.from_dict({"text": rows}).to_parquet(checkout / "wikitext" / f"{split}.parquet")
    small = ["model.pretrained=infformer/checkpoints/tiny", "data.repository=./wikitext", "data.subset=null"]
    typed(" ".join([command, *small, *SMALL, "training.segment_length=64", "output_dir=run"]), checkout)
    assert (checkout / "run" / "checkpoints" / "best").exists()
