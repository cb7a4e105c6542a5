"""The page about a memory: made of a run's checkpoint and a text file, and errors that a user can mend."""

import html
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from infformer.errors import UserError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.plots import page

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("INFFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return import_module("inspect_memory")


@pytest.fixture(scope="module")
def checkpoint(backbone, tokenizer, tmp_path_factory) -> Path:
    """A checkpoint of a run, in which a model folder is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16, sticky=True)
    model = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_memory.py", *map(str, options)])
    script.main()


def test_the_page_needs_no_other_file(script, checkpoint, monkeypatch, tmp_path, capsys):
    (tmp_path / "whale.txt").write_text("the white whale under the deep sea " * 4)
    run(script, monkeypatch, checkpoint, "whale.txt", "--segments", 4, "--layers", 1, "--folder", tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"written to {tmp_path / 'page' / 'index.html'}" in capsys.readouterr().out
    found = json.loads((tmp_path / "page" / "inspection.json").read_text())
    assert (found["name"], found["document"]["segments"], found["memory"]["layers"]) == ("whale", 4, [1])
    pictures = sorted(path.stem for path in (tmp_path / "page").glob("*.png"))
    assert "sticky_samples" in pictures
    assert page.count('src="data:image/png;base64,') == len(pictures) == 7
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "64 tokens in 4 segments of 16" in page
    best, worst = found["stretches"]
    for stretch in (best, worst):
        assert "".join(stretch["pieces"]) in (tmp_path / "whale.txt").read_text()
        for source in stretch["sources"]:
            assert f"<blockquote>{html.escape(source['text'])}</blockquote>" in page
    assert page.count('<span style="background: rgba(') == len(best["pieces"]) + len(worst["pieces"])
    loss = found["reading"]["nats_without_memory"][0] - found["reading"]["nats"][0]
    assert loss == pytest.approx(0, abs=1e-6)  # a new memory adds nothing
    text = re.sub(r'src="data:[^"]*"', "", page.split("</style>")[1])  # a picture's letters may spell anything
    assert not re.search(r"\bnan\b|None|no value", text)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, (), "document=whale.txt: there is no such file"),
        ("", (), "whale.txt"),
        ("the sea", (), "the document has 8 tokens, and nothing is read from memory before token 17"),
        ("the sea " * 9, ("--segments", 1), "segments=1: nothing is read from memory before segment 2"),
        ("the sea " * 9, ("--layers", 2), r"layers=\[2\]: choose among"),
        ("the sea " * 9, ("--layers", "all", "1"), "--layers all: give the numbers of layers, from 0, or `all`"),
    ],
)
def test_what_cannot_be_inspected_is_refused(script, checkpoint, monkeypatch, tmp_path, text, options, message):
    if text is not None:
        (tmp_path / "whale.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        run(script, monkeypatch, checkpoint, "whale.txt", *options)
    assert not (tmp_path / "outputs").exists()


def test_all_layers_are_named_by_one_word(script, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())  # nobody looks at them
    (tmp_path / "whale.txt").write_text("the white whale under the deep sea " * 4)
    run(script, monkeypatch, checkpoint, "whale.txt", "--segments", 3, "--layers", "all", "--folder", tmp_path / "page")
    assert json.loads((tmp_path / "page" / "inspection.json").read_text())["memory"]["layers"] == [0, 1]


def test_tokens_are_blue_where_the_memory_gained_and_orange_where_it_cost():
    stretch = {
        "first": 1100, "gain": 0.25, "pieces": ["<a>", " b"], "gains": [1.0, -0.5],
        "sources": [{"first": 0, "tokens_back": 1100, "share": 0.25, "even_share": 0.125, "text": "a & b"}],
    }  # fmt: skip
    shown = page._show_stretch("Where", stretch)
    assert '<span style="background: rgba(0, 114, 178, 0.38)" title="+1.00 nats">&lt;a&gt;</span>' in shown
    assert '<span style="background: rgba(213, 94, 0, 0.19)" title="-0.50 nats"> b</span>' in shown
    assert "Tokens 1,100 to 1,102: +0.250 nats per token." in shown
    assert "1,100 tokens before, 25.0% of all in the memory that was looked at (evenly it would be 12.5%)" in shown
    assert "<blockquote>a &amp; b</blockquote>" in shown


def test_a_model_without_memory_is_refused(script, model_folder, monkeypatch):
    with pytest.raises(UserError, match="this model has no memory to look into"):
        run(script, monkeypatch, model_folder, "sample")
