"""What `docs/own_books.md` tells a beginner to type, and what `docs/glossary.md` says of options, is so."""

import gzip
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from infformer.commands import eval as evaluate
from infformer.commands import generate
from infformer.commands.train import train
from infformer.config import CONF, EvaluationRunConfig, GenerationRunConfig, RunConfig, options_of
from infformer.training.command_line import choices_of, compose

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_books.md"
TEXT = PAGE.read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
CASES = re.findall(r"^\| [^|]+ \| `(model=[^`]+)` \|", TEXT, re.MULTILINE)
"""The options of each row of its table."""
NAMED = re.findall(r"`([a-z][\w/.]*=[\w-]*)`", GLOSSARY)
"""The options that the glossary names."""
SHORT = "data.max_document_characters=2000"
STEPS = ("max_steps=4", "batch_size=2", "segment_length=32", "evaluate_every=2")
RUNS: dict[str, tuple[type[Any], Callable[[Any], object], list[str]]] = {
    "train.py": (RunConfig, train, [f"training.{option}" for option in STEPS] + [SHORT]),
    "eval.py": (EvaluationRunConfig, evaluate.run, [SHORT]),
    "generate.py": (GenerationRunConfig, generate.run, ["tokens=3"]),
}
"""The commands of the page, and by which options they are small."""
IN_SMALL = {
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "held_out=10": "held_out=8",
    "data.max_held_out_characters=60000": "data.max_held_out_characters=500",
    "length=512": "length=32",
    r"match_floats=\d+": "match_floats=20000",
}


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with twenty books, of which one is compressed."""
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(20):
        text = f"It was a dark and stormy night, the {number}th of them. " * 50
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b"Call me Ishmael. " * 100))
    (folder / ".hidden").write_text("no book")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.usefixtures("composed_quickly")
@pytest.mark.parametrize("case", CASES)
def test_the_options_of_each_case_are_known(case: str) -> None:
    compose("train", RunConfig, CONF, ["data=text", "data.train=books/*", "data.held_out=10", *case.split()])


def test_the_table_of_cases_is_looked_at_whole() -> None:
    table = TEXT.split("## Which options for what I have")[1].split("```")[0]
    assert len(CASES) == table.count("\n|") - 2 > 10


@pytest.mark.usefixtures("composed_quickly")
def test_every_option_of_the_glossary_is_known() -> None:
    known = {option for kind in (RunConfig, EvaluationRunConfig) for option, _ in options_of(kind)}
    for name, value in (option.split("=") for option in NAMED):
        assert name in known or choices_of(name, CONF), name
        if value:
            memory = [] if name == "model/memory" else ["model/memory=long_term"]
            compose("train", RunConfig, CONF, ["model=tiny", *memory, f"{name}={value}"])
    assert len(NAMED) > 40
    for file in re.findall(r"`((?:infformer|scripts)/[\w/]+\.py)`", GLOSSARY):
        assert (ROOT / file).exists(), file


def anchors_of(page: Path) -> set[str]:
    """By which the headings of a page are linked to."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for place, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text.replace("\n", " ")):
        linked = page.parent / place if place else page
        assert linked.exists(), place
        assert not anchor or anchor in anchors_of(linked), f"{place}#{anchor}"


def save_llama(folder: Path) -> None:
    """A stand-in for what would be fetched from the hub, with rotary positions."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "infformer" / "checkpoints" / "tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    first = tokenizer.bos_token_id
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=first, eos_token_id=first, **sizes)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_the_page_can_be_typed_from_beginning_to_end(
    books: Path, run_script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, as each command alone would be imported for seconds."""
    monkeypatch.setenv("INFFORMER_CACHE", str(books.parent / "cache"))
    Path("book.txt").write_text("It was a dark and stormy night. " * 50, encoding="utf-8")
    save_llama(Path("llama"))
    for command in COMMANDS:
        for real, small in IN_SMALL.items():
            command = re.sub(real, small, command)
        _, program, *options = shlex.split(command)
        if program in RUNS:
            kind, run, small = RUNS[program]
            run(compose(Path(program).stem, kind, CONF, [*options, *small]))
        else:
            assert "error" not in run_script(Path(program).stem, *options)
    assert Path("novels", "README.md").exists()
    assert Path("outputs", "books", "plots", "gain_by_document.png").exists()
