"""The figures are those of a literal loop over one document at a time, whatever is read side by side with it."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infformer.data import DataConfig, TokenizedDocuments, tokenize_documents
from infformer.evaluation.perplexity import Reader, evaluate, evaluate_controls, measure
from infformer.evaluation.report import format_table, write_results
from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 16
TEXTS = {
    "ship": "the ship went over the deep sea " * 12,
    "short": "a whale",
    "naïve": "Über dem Wasser, naïve – “night” … " * 5,
    "exact": "x" * 3 * SEGMENT,
    "wind": "wind in the harpoon\n\nof a   captain " * 3,
}
"""Among them a document of less than a segment, and one that ends where a segment does."""


@pytest.fixture(scope="module")
def documents_of(tokenizer, tmp_path_factory) -> Callable[..., TokenizedDocuments]:
    def tokenize(*names: str) -> TokenizedDocuments:
        folder = tmp_path_factory.mktemp("texts")
        lines = [json.dumps({"id": name, "text": TEXTS[name]}) + "\n" for name in names]
        (folder / "test.jsonl").write_text("".join(lines))
        config = DataConfig(source="files", test=str(folder / "test.jsonl"), cache_dir=str(folder))
        return tokenize_documents(config, "test", tokenizer)

    return tokenize


@pytest.fixture(scope="module")
def documents(documents_of) -> TokenizedDocuments:
    return documents_of(*TEXTS)


def with_memory(backbone: nn.Module, **options) -> InfformerForCausalLM:
    """A model whose memory does something."""
    sizes = {"segment_length": SEGMENT, "basis_functions": 8, "widths": [0.05, 0.1], "past_samples": 16}
    model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), LongTermMemoryConfig(**{**sizes, **options}))
    torch.manual_seed(2)
    for parameter in model.memories.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def model(backbone) -> InfformerForCausalLM:
    return with_memory(backbone, sticky=True, sticky_bins=16)


@pytest.fixture(scope="module")
def without_memory(backbone) -> InfformerForCausalLM:
    return InfformerForCausalLM.from_backbone(copy.deepcopy(backbone))


def reader(model: InfformerForCausalLM, batch_size: int = 3, **options) -> Reader:
    return Reader(model, SEGMENT, batch_size, progress=False, **options)


def cut(documents: TokenizedDocuments, document: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs and the targets of each segment."""
    tokens = torch.from_numpy(documents.tokens(document, 0, int(documents.token_counts[document])))
    for start in range(0, len(tokens) - 1, SEGMENT):
        targets = tokens[start + 1 : start + 1 + SEGMENT]
        yield tokens[start : start + len(targets)].unsqueeze(0), targets


def nats(logits: Tensor, targets: Tensor) -> np.ndarray:
    return -logits[0].double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).numpy()


@cache
@torch.no_grad()
def literally(model: InfformerForCausalLM, documents: TokenizedDocuments, memory_of: str) -> list[np.ndarray]:
    """The nats of every token of every document, read one segment of one document at a time."""
    model.eval()
    memories, losses = [], []
    for document in range(len(documents)):
        memory, own = None, [None]
        for inputs, _ in cut(documents, document):
            memory = model(inputs, memory=memory).memory
            own.append(memory)
        memories.append(own)
    for document in range(len(documents)):
        past = {
            "own": memories[document],
            "another": memories[(document + 1) % len(documents)],
            "none": [None],
        }[memory_of]
        losses.append(
            np.concatenate(
                [
                    nats(model(inputs, memory=past[min(number, len(past) - 1)]).logits, targets)
                    for number, (inputs, targets) in enumerate(cut(documents, document))
                ]
            )
        )
    return losses


def by_document(figures: dict) -> dict[str, float]:
    return {entry["id"]: entry["nll"] for entry in figures["per_document"]}


def assert_same(figures: dict, losses: list[np.ndarray], documents: TokenizedDocuments, relative: float) -> None:
    expected = dict(zip(documents.ids, (loss.sum() for loss in losses), strict=True))
    assert by_document(figures) == pytest.approx(expected, rel=relative)
    assert figures["nll"] == pytest.approx(sum(expected.values()), rel=relative)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
class TestWhateverIsReadSideBySide:
    def test_own_memory(self, model, documents, batch_size):
        assert_same(evaluate(reader(model, batch_size), documents), literally(model, documents, "own"), documents, 1e-5)

    def test_no_memory_in_the_model(self, without_memory, backbone, documents, batch_size):
        with torch.no_grad():
            losses = [
                np.concatenate([nats(backbone(inputs).logits, targets) for inputs, targets in cut(documents, document)])
                for document in range(len(documents))
            ]
        assert_same(evaluate(reader(without_memory, batch_size), documents), losses, documents, 1e-6)

    def test_controls(self, model, documents, batch_size):
        controls = evaluate_controls(reader(model, batch_size), documents)
        assert controls.keys() == {"memory_off", "memory_of_another_document"}
        assert_same(controls["memory_off"], literally(model, documents, "none"), documents, 1e-5)
        assert_same(controls["memory_of_another_document"], literally(model, documents, "another"), documents, 1e-5)

    def test_order_of_documents(self, model, documents, documents_of, batch_size):
        one = evaluate(reader(model), documents)
        other = evaluate(reader(model, batch_size), documents_of(*reversed(TEXTS)))
        assert [entry["id"] for entry in other["per_document"]] == list(reversed(TEXTS))
        assert by_document(other) == pytest.approx(by_document(one), rel=1e-5)


class TestControls:
    def test_the_memory_matters_here(self, model, documents):
        """So that the other tests mean something: the three situations differ by far more than these allow."""
        own = evaluate(reader(model), documents)
        controls = evaluate_controls(reader(model), documents)
        figures = [own["nll"], *(control["nll"] for control in controls.values())]
        assert min(abs(one - other) for one in figures for other in figures if one is not other) > 5e-4 * own["nll"]

    def test_a_document_without_a_whole_segment_before_its_end_is_the_same_in_all(self, model, documents):
        own = evaluate(reader(model), documents)
        for control in evaluate_controls(reader(model), documents).values():
            assert by_document(control)["short"] == by_document(own)["short"]

    def test_one_document_has_no_other(self, model, documents_of):
        assert evaluate_controls(reader(model), documents_of("ship")).keys() == {"memory_off"}

    def test_a_model_without_memory_has_none(self, without_memory, documents):
        assert evaluate_controls(reader(without_memory), documents) == {}


@pytest.mark.parametrize("options", [{"contraction": "uniform"}, {"read": "slots"}, {"read": "moments"}])
def test_every_kind_of_memory(backbone, documents, options):
    """Rows that have written different numbers of segments are read side by side."""
    other = with_memory(backbone, **options)
    assert_same(evaluate(reader(other), documents), literally(other, documents, "own"), documents, 1e-5)


class TestFigures:
    def test_words_and_bytes_are_those_of_the_text(self, model, documents):
        figures = evaluate(reader(model), documents)
        assert figures["documents"] == len(TEXTS)
        assert figures["words"] == sum(len(text.split()) for text in TEXTS.values())
        assert figures["bytes"] == sum(len(text.encode()) for text in TEXTS.values())
        assert figures["tokens"] == figures["bytes"]  # here a token is a byte, and the one that begins is not scored
        for entry in figures["per_document"]:
            text = TEXTS[entry["id"]]
            assert entry["tokens"] == entry["bytes"] == len(text.encode())
            assert entry["words"] == len(text.split())

    def test_ratios(self, model, documents):
        figures = evaluate(reader(model), documents)
        assert figures["perplexity"]["token"] == pytest.approx(math.exp(figures["nll"] / figures["tokens"]))
        assert figures["perplexity"]["word"] == pytest.approx(math.exp(figures["nll"] / figures["words"]))
        assert figures["bits_per_byte"] == pytest.approx(figures["nll"] / math.log(2) / figures["bytes"])

    def test_by_position(self, model, documents):
        figures = evaluate(reader(model), documents)
        losses = literally(model, documents, "own")
        longest = max(map(len, losses))
        bins = [(entry["from"], entry["to"]) for entry in figures["by_position"]]
        assert bins == [(0, 64), (64, 128), (128, 256), (256, 512)]
        assert longest <= 512
        for entry in figures["by_position"]:
            inside = np.concatenate([loss[entry["from"] : entry["to"]] for loss in losses])
            assert entry["tokens"] == len(inside)
            assert entry["nll"] == pytest.approx(inside.sum(), rel=1e-5)
        assert sum(entry["nll"] for entry in figures["by_position"]) == pytest.approx(figures["nll"], rel=1e-12)
        assert sum(entry["nll"] for entry in figures["per_document"]) == pytest.approx(figures["nll"], rel=1e-12)

    def test_shares_add_up(self, model, documents):
        """Two processes: each reads its lanes, and the sums of both make the figures."""
        whole = evaluate(reader(model, 4), documents)
        sums: list[Tensor] = []
        first = reader(model, 4, process=0, processes=2, reduce=lambda tensor: sums.append(tensor) or tensor)
        evaluate(first, documents)
        figures = evaluate(reader(model, 4, process=1, processes=2, reduce=lambda tensor: tensor + sums[0]), documents)
        assert 0 < sums[0][: len(documents)].count_nonzero() < len(documents)
        assert by_document(figures) == pytest.approx(by_document(whole), rel=1e-6)
        assert figures.keys() == whole.keys()
        assert [entry["tokens"] for entry in figures["by_position"]] == [
            entry["tokens"] for entry in whole["by_position"]
        ]

    def test_of_beginnings(self, model, documents):
        losses = literally(model, documents, "own")
        beginnings = documents.beginnings(200)
        figures = evaluate(reader(model), beginnings)
        counts = (beginnings.token_counts - 1).tolist()
        assert sum(counts) <= 200
        assert_same(figures, [loss[:count] for loss, count in zip(losses, counts, strict=True)], documents, 1e-5)

    def test_in_bfloat16(self, model, documents):
        exact = evaluate(reader(model), documents)["nll"]
        rounded = evaluate(reader(model, precision=torch.bfloat16), documents)["nll"]
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.01)

    def test_the_model_is_as_before(self, backbone, documents):
        model = with_memory(backbone)
        before = copy.deepcopy(model.state_dict())
        random = torch.get_rng_state()
        measure(reader(model), documents, controls=True, checkpoint="here")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)


class TestReport:
    def test_results_are_strict_json_and_a_table(self, model, documents, tmp_path: Path):
        results = measure(reader(model), documents, controls=True, checkpoint="here")
        write_results(tmp_path / "new" / "results.json", results)
        assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
        assert results["protocol"] == {
            "segment": SEGMENT,
            "stride": SEGMENT,
            "reset": "each document begins with an empty memory",
            "memory": model.config.memory,
            "dtype": "float32",
            "checkpoint": "here",
        }
        assert model.config.memory["segment_length"] == SEGMENT
        header, *rows, protocol = format_table({**results, "before": results}).splitlines()
        assert header.split() == ["per", "token", "per", "word", "bits/byte"]
        assert len(rows) == 4
        for row in rows:
            assert len([float(number) for number in row[28:].split()]) == 3
        assert "5 documents" in protocol
        assert "disjoint segments of 16 tokens" in protocol

    def test_a_hopeless_model(self, without_memory, documents, tmp_path):
        """Too bad for its perplexity to be a number: the file stays JSON that every reader opens."""
        hopeless = copy.deepcopy(without_memory)
        hopeless.backbone.lm_head.weight.data *= 1e5
        results = measure(reader(hopeless), documents, controls=False, checkpoint="here")
        assert results["perplexity"]["token"] == math.inf
        write_results(tmp_path / "results.json", results)

        def refuse(constant: str) -> float:
            raise AssertionError(f"{constant} is no JSON")

        read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
        assert read["perplexity"]["token"] is None
        assert read["nll"] == results["nll"]
        format_table(results)
