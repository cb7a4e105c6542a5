"""Each option of `eval.py` reaches what it says: the figures are those of a reader that was made by hand."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from infformer.commands import eval as eval_command
from infformer.config import EvaluationRunConfig
from infformer.data.options import DataConfig
from infformer.data.tokenization import tokenize_documents
from infformer.evaluation.perplexity import evaluate
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.loading import load_pretrained
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks import language_modelling
from infformer.tasks.associative_recall import AssociativeRecallConfig
from infformer.tasks.haystack import PasskeyConfig


@dataclass
class Evaluation:
    """What one call of `eval.py` found, and how it read."""

    results: dict[str, Any]
    printed: str
    shapes: set[tuple[int, int]]
    """Rows and tokens of what the model read at once."""


Evaluate = Callable[..., Evaluation]


@pytest.fixture(scope="module")
def checkpoint(model_folder, tokenizer, tmp_path_factory) -> Path:
    """A model whose memory does something, with its tokenizer."""
    torch.manual_seed(2)
    model = load_pretrained(str(model_folder), LongTermMemoryConfig(0, 8, [0.05, 0.1], 16), segment_length=16)
    for parameter in model.memories.parameters():
        nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(texts, token_cache) -> DataConfig:
    files = {split: str(texts / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return DataConfig(source="files", **files, cache_dir=str(token_cache))


@pytest.fixture
def evaluate_with(checkpoint, data, tmp_path, monkeypatch, capsys) -> Evaluate:
    """`eval.py` with some options."""
    shapes: set[tuple[int, int]] = set()
    forward = InfformerForCausalLM.forward

    def noted(self: InfformerForCausalLM, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        shapes.add(tuple(input_ids.shape))
        return forward(self, input_ids, *arguments, **options)

    def start(**options: Any) -> Evaluation:
        monkeypatch.setattr(InfformerForCausalLM, "forward", noted)
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: None)  # nobody looks at it
        folder = str(tmp_path / f"found {len(list(tmp_path.iterdir()))}")
        typed = {"checkpoint": str(checkpoint), "data": data, "output_dir": folder, "controls": False, **options}
        eval_command.run(EvaluationRunConfig(**typed))
        results = json.loads((Path(typed["output_dir"]) / "results.json").read_text())
        return Evaluation(results, capsys.readouterr().out, shapes)

    return start


@pytest.fixture(scope="module")
def by_hand(checkpoint, data, tokenizer) -> Callable[..., float]:
    """The nats of the test documents, read as said."""

    @cache
    def read(**options: Any) -> float:
        config = InfformerForCausalLM.config_class.from_pretrained(checkpoint)
        config.segment_length = options.get("segment_length", 16)
        model = InfformerForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        documents = tokenize_documents(data, "test", tokenizer)
        protocol = ReadingProtocol(**{"segment_length": 16, **options})
        return evaluate(Evaluator(model=model, protocol=protocol), documents)["nll"]

    return read


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("stride", 4, {"stride": 4}),
        ("warmup_documents", 2, {"warmup_documents": 2}),
        ("segment_length", 8, {"segment": 8, "stride": 8}),
        ("precision", "bfloat16", {"dtype": "bfloat16"}),
    ],
)
def test_documents_are_read_as_asked(evaluate_with, by_hand, option, value, said):
    found = evaluate_with(**{option: value}).results
    expected = by_hand(**{option: torch.bfloat16 if value == "bfloat16" else value})
    assert found["nll"] == pytest.approx(expected, rel=1e-7)
    assert abs(expected - by_hand()) > 1e-6 * expected
    protocol = {"segment": 16, "stride": 16, "warmup_documents": 0, "dtype": "float32"}
    assert found["protocol"].items() >= {**protocol, **said}.items()


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 1), (8, 4)])
def test_so_many_documents_are_read_side_by_side(evaluate_with, by_hand, batch_size, rows):
    """Of four documents four at most."""
    found = evaluate_with(batch_size=batch_size)
    assert found.shapes == {(rows, 16), (1, 1)}  # and one token, by which it is seen what a window holds
    assert found.results["nll"] == pytest.approx(by_hand(), rel=1e-5)


@pytest.mark.parametrize(("split", "documents"), [("train", 6), ("validation", 2), ("test", 4)])
def test_the_documents_of_the_split_are_read(evaluate_with, split, documents):
    found = evaluate_with(split=split).results
    assert [document["id"] for document in found["per_document"]] == [f"{split} {n}" for n in range(documents)]


def test_only_so_many_documents_are_read(evaluate_with, data):
    some = DataConfig(source="files", test=data.test, max_documents=3, cache_dir=data.cache_dir)
    assert evaluate_with(data=some).results["documents"] == 3


def test_controls_are_measured_as_asked(evaluate_with):
    assert evaluate_with(controls=False).results["controls"] == {}
    found = evaluate_with(controls=True)
    assert found.results["controls"].keys() == {"memory_off", "memory_of_another_document", "memory_shuffled_in_time"}
    assert "memory off" in found.printed


def test_baselines_are_chosen_on_validation_documents_and_stand_beside_the_model(evaluate_with):
    assert "baselines" not in evaluate_with(baselines=False).results
    found = evaluate_with(baselines=True)
    assert found.results["baselines"].keys() == {"continuous_cache", "document_unigram"}
    assert "continuous cache" in found.printed


def test_a_tokenizer_may_come_from_elsewhere(evaluate_with, by_hand, checkpoint, model_folder, tmp_path):
    """The model's own folder has none."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((checkpoint / name).read_bytes())
    bare = str(tmp_path / "bare")
    found = evaluate_with(checkpoint=bare, tokenizer=str(model_folder)).results
    assert found["nll"] == pytest.approx(by_hand(), rel=1e-6)
    assert found["protocol"]["checkpoint"] == bare


ASKED = {"lengths": [40, 24], "depths": [0.0, 1.0], "test_questions": 3}


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> DataConfig:
    """Long enough to hide something in them; the splits differ in their lengths."""
    folder = tmp_path_factory.mktemp("books")
    for split, lines in (("validation", 25), ("test", 30)):
        (folder / f"{split}.txt").write_text("The white whale rose, and nobody saw it. " * lines)
    places = {split: str(folder / f"{split}.txt") for split in ("validation", "test")}
    return DataConfig(source="files", **places, cache_dir=str(folder / "cache"))


class TestATask:
    """Each of its options, and those of `eval.py` that a task has too."""

    def test_a_task_is_asked_as_its_options_say(self, evaluate_with):
        task = AssociativeRecallConfig(**ASKED, keys=40, values=8, queries=2)
        found = evaluate_with(task=task)
        cells = found.results["cells"]
        assert [(cell["length"], cell["depth"], cell["answers"]) for cell in cells] == [
            (length, depth, 6) for length in (40, 24) for depth in (0.0, 1.0)
        ]
        assert found.results["chance"] == 1 / 8
        assert found.results["controls"] == {}
        assert "40" in found.printed

    def test_texts_of_a_task_are_read_as_asked(self, evaluate_with):
        task = AssociativeRecallConfig(**ASKED, keys=40, values=8, queries=2)
        found = evaluate_with(task=task, segment_length=8, precision="bfloat16", batch_size=4, controls=True)
        assert found.results["protocol"].items() >= {"segment": 8, "window": 8, "dtype": "bfloat16"}.items()
        assert {rows for rows, _ in found.shapes} == {2, 4}  # of three texts at two depths four, and then two
        assert max(tokens for _, tokens in found.shapes) == 8
        assert found.results["controls"].keys() == {"memory_off"}

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_something_is_hidden_in_the_documents_of_the_split(self, evaluate_with, books, split, monkeypatch):
        asked = []
        original = eval_command.tokenize_documents
        monkeypatch.setattr(
            eval_command,
            "tokenize_documents",
            lambda data, chosen, *others: asked.append((data, chosen)) or original(data, chosen, *others),
        )
        found = evaluate_with(
            task=PasskeyConfig(lengths=[200], depths=[0.5], test_questions=1), data=books, split=split
        )
        assert asked == [(books, split)]
        assert found.results["cells"][0]["answers"] == 1


def test_an_evaluation_that_is_killed_while_it_draws_can_be_made_again(evaluate_with, tmp_path, monkeypatch):
    """Its figures lie there already, and must not lie beside the record of others."""
    folder = tmp_path / "found"
    typed = {"output_dir": str(folder), "overwrite": True}
    evaluate_with(**typed, split="validation")

    def killed(results: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(language_modelling, "plot_results", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_with(**typed)
    assert json.loads((folder / "results.json").read_text())["documents"] == 4
    assert evaluate_with(output_dir=str(folder)).results["documents"] == 4
