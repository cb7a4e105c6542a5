"""A model that was trained is shared with a card, which says what it is, what it learned, and what was measured."""

from __future__ import annotations

import copy
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

import infformer.hub
from infformer.config import RunConfig
from infformer.data.options import DataConfig
from infformer.errors import UserError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.card import model_card
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.classification import ClassificationConfig
from infformer.training.card import write_cards
from infformer.training.checkpoint import validate_checkpoint

MEMORY = LongTermMemoryConfig(basis_functions=8, past_samples=16)


@pytest.fixture
def model(backbone) -> InfformerForCausalLM:
    return InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), MEMORY, segment_length=16)


@pytest.fixture(scope="module")
def run(train, configure, tmp_path_factory) -> Path:
    """The folder of a run that was measured with its controls."""
    folder = tmp_path_factory.mktemp("run")
    train(configure(folder, {"training.max_steps": 2, "evaluation.controls": True, "name": "whales"}))
    return folder


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def card_of_step(model: InfformerForCausalLM, config: RunConfig, folder: Path) -> Path:
    """The card of a checkpoint that was not measured."""
    checkpoint = folder / "checkpoints" / "step-00000005"
    (checkpoint / "model").mkdir(parents=True, exist_ok=True)
    write_cards(model, config, 5, 1000, checkpoint, "")
    return checkpoint / "model" / "README.md"


def test_the_card_of_a_run_says_what_was_learned_and_measured(run):
    text = (run / "checkpoints" / "best" / "model" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "infformer"
    for part in (
        "# whales", "A `gpt2` with a memory", "| `basis_functions` | 8 |", "train: `train.jsonl`", "2 steps of 4 lanes",
        "after training", "its memory off", "another document's memory", "disjoint segments of 16, float32",
    ):  # fmt: skip
        assert part in text
    assert str(run) not in text
    assert validate_checkpoint(run / "checkpoints" / "best") is None


def test_what_a_card_shows_opens_the_model_in_its_folder(run, monkeypatch):
    folder = run / "checkpoints" / "best" / "model"
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(code_of((folder / "README.md").read_text()), names)
    assert names["state"].layers[0].segments.tolist() == [1]  # type: ignore[attr-defined] # one whole segment of two


def test_a_checkpoint_that_was_not_measured_has_no_figures(model, configure, tmp_path):
    best, last = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (3, 5))
    for checkpoint in (best, last):
        (checkpoint / "model").mkdir(parents=True)
    write_cards(model, configure(tmp_path), 5, 1000, best, "perplexity 7.0")
    assert "perplexity 7.0" in (best / "model" / "README.md").read_text()
    text = (last / "model" / "README.md").read_text()
    assert "perplexity 7.0" not in text
    assert "The run's figures are those of step-00000003" in text


def test_a_model_of_symbols_is_shown_without_a_tokenizer(tmp_path, monkeypatch):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = DecoderForCausalLM(DecoderConfig(**sizes, memory=MEMORY, segment_length=16))
    decoder.save_pretrained(tmp_path)
    card = model_card(decoder, reads_text=False)
    assert "okenizer" not in card
    monkeypatch.chdir(tmp_path)
    exec(code_of(card), {})


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("text", {"train": "texts/mine.csv"}, "train: `mine.csv`."),
        ("listops", {}, "Examples of `listops` of Long-Range Arena, drawn by seed 0."),
        ("pathfinder", {"path": "texts"}, "The released archive of Long-Range Arena."),
        ("bytes", {"source": "hub", "repository": "someone/films"}, "`someone/films`; train: `train`"),
    ],
)
def test_a_card_says_what_examples_were_learned(model, configure, tmp_path, kind, data, said):
    config = configure(tmp_path)
    config.task, config.data = ClassificationConfig(kind), DataConfig(**data)
    assert said in card_of_step(model, config, tmp_path).read_text()


def test_a_dataset_and_a_backbone_of_the_hub_are_named_and_no_folder_here(model, configure, tmp_path):
    changes = {"data.source": "hub", "data.repository": "someone/books", "data.subset": "old"}
    model.backbone.config.name_or_path = "someone/gpt"
    for repository, named in (("someone/books", ["someone/books"]), (str(tmp_path), None)):
        config = configure(tmp_path, {**changes, "data.repository": repository})
        card = ModelCard.load(card_of_step(model, config, tmp_path))
        assert (card.data.datasets, card.data.base_model) == (named, "someone/gpt")
        assert str(tmp_path.parent) not in card.content


def test_a_card_goes_with_its_model_until_that_is_trained_on(model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    assert "with a memory of fixed size" in (tmp_path / "new" / "README.md").read_text()
    (tmp_path / "new" / "README.md").write_text("# measured")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    loaded.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == "# measured"
    loaded.train().save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text().startswith("---\nlibrary_name: infformer")


class TestTheHub:
    """What its client is asked, by a double of it."""

    @pytest.fixture
    def hub(self, monkeypatch, tmp_path) -> SimpleNamespace:
        hub = SimpleNamespace(has_card=False, asked=[], files={})

        def create_repo(api: HfApi, repo_id: str, **options: object) -> SimpleNamespace:
            hub.asked.append((repo_id, options))
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(api: HfApi, *, repo_id: str, folder_path: str, **options: object) -> str:
            hub.asked.append((repo_id, options))
            hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

        monkeypatch.setattr(HfApi, "whoami", lambda *_, **__: {"name": "someone"})
        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: hub.has_card)
        return hub

    def test_a_model_is_pushed_with_its_card_which_names_it(self, hub, model):
        assert model.push_to_hub("whales", private=True, revision="first") == "https://hub/someone/whales"
        (name, creating), (pushed, pushing) = hub.asked
        assert (name, creating["private"], pushed, pushing["revision"]) == ("whales", True, "someone/whales", "first")
        assert {"config.json", "model.safetensors", "README.md"} <= hub.files.keys()
        assert 'place = "someone/whales"' in hub.files["README.md"].decode()

    def test_a_card_that_is_on_the_hub_stays(self, hub, model):
        hub.has_card = True
        model.push_to_hub("whales")
        assert "model.safetensors" in hub.files
        assert "README.md" not in hub.files

    def test_a_hub_that_refuses_is_told_of_in_a_sentence(self, hub, model, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise OSError("401: who are you?")

        monkeypatch.setattr(HfApi, "upload_folder", refuse)
        with pytest.raises(UserError, match=r"repo_id=whales: .*who are you.*a name that is yours"):
            model.push_to_hub("whales")

    def test_a_hub_that_never_answers_is_not_waited_for(self, model, monkeypatch):
        monkeypatch.setattr(infformer.hub, "PATIENCE", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(HfApi, "whoami", lambda api: socket.create_connection(silent.getsockname()).recv(1))
            with pytest.raises(UserError, match=r"repo_id=whales: .*does not answer.*hf auth login"):
                model.push_to_hub("whales")

    def test_saving_does_not_push_past_the_card(self, model, tmp_path):
        with pytest.raises(UserError, match=r"call model\.push_to_hub"):
            model.save_pretrained(tmp_path, push_to_hub=True)
