"""Documents as a task: what a step reads, where it stands, and what is measured by which documents."""

import copy
import json
import math
import re
from collections.abc import Callable
from functools import partial
from unittest.mock import ANY

import pytest
import torch

from infformer.data.options import DataConfig
from infformer.data.segments import Lanes
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.errors import DataError
from infformer.evaluation.memory_instruments import inspect_document
from infformer.evaluation.perplexity import evaluate, evaluate_controls
from infformer.evaluation.streaming import EvaluationError, Evaluator, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks import language_modelling
from infformer.tasks.language_modelling import DocumentStream, LanguageModelling
from infformer.tasks.task import Material

SEGMENT, LANES = 16, 4


@pytest.fixture(scope="module")
def documents(configure, tokenizer, tmp_path_factory) -> dict[str, TokenizedDocuments]:
    data = configure(tmp_path_factory.mktemp("run")).data
    return {split: tokenize_documents(data, split, tokenizer) for split in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def evaluator(backbone) -> Evaluator:
    """Of a model with a memory that matters."""
    torch.manual_seed(2)
    memory = LongTermMemoryConfig(basis_functions=8, widths=[0.05, 0.1], past_samples=16)
    model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), memory, segment_length=SEGMENT)
    for parameter in model.memories.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Evaluator(model=model, protocol=ReadingProtocol(SEGMENT))


@pytest.fixture(scope="module")
def material(documents, evaluator, tokenizer) -> Callable[..., Material]:
    """What the task is made of, with all documents or those of some splits."""

    def make(splits: tuple[str, ...] = ("train", "validation", "test"), **options) -> Material:
        chosen = {split: documents[split] for split in splits}
        data = DataConfig(segments_per_visit=3)
        return Material(
            evaluator,
            tokenizer,
            chosen,
            data,
            **{"lanes": LANES, "rank_rows": range(LANES), "segment_length": SEGMENT, **options},
        )

    return make


@pytest.fixture(scope="module")
def stream(material) -> Callable[..., DocumentStream]:
    return lambda **options: DocumentStream(material(**options))


@pytest.fixture(scope="module")
def make(material) -> Callable[..., LanguageModelling]:
    return lambda *splits, **options: LanguageModelling(material(*splits, **options))


class TestAStep:
    def test_a_step_is_the_next_segments_of_the_lanes(self, documents, stream):
        lanes = Lanes(documents["train"], LANES, SEGMENT, seed=0, segments_per_visit=3)
        stream = stream(bptt_segments=3)
        for _ in range(4):
            step = stream.next_step()
            assert len(step) == 3
            for segment in step:
                expected = next(lanes)
                assert torch.equal(segment.input_ids, expected.input_ids)
                assert torch.equal(segment.targets, expected.targets)

    def test_a_stream_goes_on_where_another_process_stood(self, stream):
        """Its state is JSON, and the same whatever the share."""
        whole, half = stream(bptt_segments=2), stream(bptt_segments=2, rank_rows=range(2, 4))
        for _ in range(5):
            whole.next_step()
            half.next_step()
        state = json.loads(json.dumps(half.state_dict()))
        assert state == whole.state_dict()
        resumed = stream(bptt_segments=2)
        resumed.load_state_dict(state)
        for segment, expected in zip(resumed.next_step(), whole.next_step(), strict=True):
            assert torch.equal(segment.input_ids, expected.input_ids)
            assert torch.equal(segment.reads, expected.reads)

    def test_a_state_of_other_lanes_is_refused(self, stream):
        other = stream(lanes=2, rank_rows=range(2))
        with pytest.raises(DataError, match=r"training\.batch_size: the run to be resumed had 4, this one has 2"):
            other.load_state_dict(stream().state_dict())

    def test_a_segment_is_located_in_the_documents(self, documents, stream):
        """Each line names a lane and a place where the lane's tokens are found."""
        train = documents["train"]
        for segment in stream(bptt_segments=4, rank_rows=range(1, 3)).next_step():
            for row, place in enumerate(stream().locate(segment)):
                lane, name, start = re.fullmatch(r"lane (\d+): '(.*)' at token (\d+)", place).groups()
                length = int(segment.lengths[row])
                tokens = train.tokens(train.ids.index(name), int(start), int(start) + length)
                assert int(lane) == row + 1
                assert segment.input_ids[row, :length].tolist() == tokens.tolist()

    def test_a_stream_says_how_much_there_is_to_learn_from(self, documents, stream):
        tokens = sum(documents["train"].token_counts.tolist())
        steps = math.ceil(tokens / (LANES * SEGMENT * 2))
        assert stream(bptt_segments=2).describe() == (
            f"6 documents, {tokens:,} tokens to learn from, in about {steps:,} steps once"
        )


class TestWhatIsMeasured:
    def test_validation_measures_the_validation_documents(self, documents, make, evaluator):
        figures = evaluate(evaluator, documents["validation"])
        measured = make().validate()
        assert measured.loss == figures["nll"] / figures["tokens"]
        perplexity = figures["perplexity"]["token"]
        assert measured.metrics == {"validation/loss": measured.loss, "validation/perplexity": perplexity}
        assert measured.text == f"validation perplexity {perplexity:.3f} per token (disjoint segments of 16, float32)"

    def test_validation_reads_the_beginnings_alone_where_they_are_asked_for(self, documents, make, evaluator):
        figures = evaluate(evaluator, documents["validation"].beginnings(50))
        assert figures["tokens"] < sum(documents["validation"].token_counts - 1)
        assert make(max_validation_tokens=50).validate().loss == figures["nll"] / figures["tokens"]

    def test_the_test_documents_are_measured_before_and_after(self, documents, make, evaluator):
        figures = evaluate(evaluator, documents["test"])
        assert make().measure_before() == figures
        measured = make().measure("somewhere")
        assert {name: measured[name] for name in figures} == figures
        controls = evaluate_controls(evaluator, documents["test"])
        assert measured["controls"] == {name: {**controls[name], "difference": ANY} for name in controls}
        assert measured["controls"]["memory_off"]["nll"] != figures["nll"]
        assert measured["protocol"]["checkpoint"] == "somewhere"

    def test_only_what_is_asked_for_is_measured(self, make):
        assert make(before=False).measure_before() is None
        assert make(controls=False).measure("somewhere")["controls"] == {}

    def test_without_documents_nothing_is_measured(self, make):
        task = make(("train",), max_validation_tokens=50)
        assert task.validate() is None
        assert task.measure_before() is task.measure("somewhere") is None

    def test_the_report_is_a_file_a_table_and_figures(self, make, tmp_path, monkeypatch, capsys):
        drawn = [tmp_path / "figure.png"]
        monkeypatch.setattr(language_modelling, "plot_results", lambda path: drawn if path.exists() else [])
        task = make()
        results = {**task.measure("somewhere"), "before": task.measure_before()}
        assert task.report(results, tmp_path) == drawn
        assert json.loads((tmp_path / "results.json").read_text()) == results
        table = capsys.readouterr().out
        assert re.search(rf"before training +{results['before']['perplexity']['token']:.3f} ", table)
        assert "another document's memory" in table


def test_the_headline_holds_the_final_figures_and_what_the_controls_cost(make):
    task = make()
    results = task.measure("here")
    headline = task.headline(results)
    assert headline["test/loss"] == results["nll"] / results["tokens"]
    assert headline["test/perplexity"] == results["perplexity"]["token"]
    for name, control in results["controls"].items():
        assert headline[f"test/rise_by_{name}"] == control["difference"]["nats_per_token"]
    parts = headline["test/change_specific_to_the_document"], headline["test/change_by_presence_of_a_memory"]
    assert sum(parts) == pytest.approx(-headline["test/rise_by_memory_off"])


class TestInspection:
    """Writes nothing, so that every process can make it."""

    def test_the_longest_test_document_is_inspected(self, documents, make, evaluator, tokenizer):
        test = documents["test"]
        longest = int(test.token_counts.argmax())
        tokens = torch.from_numpy(test.tokens(longest, 0, int(test.token_counts[longest])))
        found = make(inspected_segments=3).inspect()
        assert found["document"]["segments"] == 3
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        assert found == inspect_document(evaluator.model, tokens, 3, progress=False, decode=decode)
        assert "".join(found["stretches"][0]["pieces"]) in tokenizer.decode(tokens)
        assert json.loads(json.dumps(found)) == found

    def test_without_segments_documents_or_a_long_term_memory_nothing_is_inspected(
        self, documents, make, tokenizer, backbone
    ):
        assert make(inspected_segments=0).inspect() is None
        assert make(("train", "validation"), inspected_segments=3).inspect() is None
        stock = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone))
        evaluator = Evaluator(model=stock, protocol=ReadingProtocol(SEGMENT))
        assert LanguageModelling(Material(evaluator, tokenizer, documents, inspected_segments=3)).inspect() is None

    def test_a_document_that_is_too_short_is_not_inspected(self, documents, make, evaluator, monkeypatch, caplog):
        def refuse(*arguments: object, **options: object) -> None:
            raise EvaluationError("it has only 1 segment")

        monkeypatch.setattr(language_modelling, "inspect_document", refuse)
        with caplog.at_level("INFO"):
            assert make(inspected_segments=3).inspect() is None
        assert "the memory is not looked into: it has only 1 segment" in caplog.text


class TestASample:
    def test_a_sample_goes_on_with_a_validation_document(self, documents, make, tokenizer):
        prompt, _, sampled = make().sample(3, 9).partition(" ⟶ ")
        assert prompt == tokenizer.decode(documents["validation"].tokens(0, 0, 2 * SEGMENT))
        assert sampled

    def test_a_sample_goes_on_with_what_is_learned_from_where_nothing_else_is(self, documents, make, tokenizer):
        prompt = make(("train",)).sample(3, 9).partition(" ⟶ ")[0]
        assert prompt == tokenizer.decode(documents["train"].tokens(0, 0, 2 * SEGMENT))

    def test_a_sample_is_drawn_by_the_step_alone(self, make):
        before = torch.get_rng_state()
        once, again, later = (make().sample(step, 9) for step in (3, 3, 4))
        assert once == again != later
        assert torch.equal(torch.get_rng_state(), before)
