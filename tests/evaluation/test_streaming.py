"""What is read is what a literal loop over one document at a time reads, whatever is read side by side with it."""

import copy
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from infformer.data.sources import Document
from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.perplexity import evaluate, evaluate_controls, measure
from infformer.evaluation.streaming import EvaluationError, describe_protocol, partners, read_documents
from infformer.evaluation.streaming import with_memory as with_memory_of
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.segment_read import MemoryModelOutput
from infformer.models.streaming import reading
from infformer.results import Figures

SEGMENT = 16
CONTROLS = {
    "memory_off": "none",
    "memory_of_another_document": "another",
    "memory_shuffled_in_time": "shuffled",
}
Read = Callable[..., MemoryModelOutput]
"""A model, or what takes the same."""
Window = tuple[int, Tensor, Tensor]


def windows(documents: TokenizedDocuments, document: int, stride: int = SEGMENT) -> Iterator[Window]:
    """Where each window begins, what it reads, and what it scores: what none before it did."""
    tokens = torch.from_numpy(documents.tokens(document, 0, int(documents.token_counts[document])))
    previous = 0
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + SEGMENT, len(tokens) - 1)
        yield begin, tokens[begin:end].unsqueeze(0), tokens[previous + 1 : end + 1]
        previous = end
        if end == len(tokens) - 1:
            break


def memories(
    model: Read, documents: TokenizedDocuments, document: int, memory: ModelState | None
) -> list[ModelState | None]:
    """What is remembered at the beginning of a document, and after each of its disjoint segments."""
    found = [memory]
    for _, inputs, _ in windows(documents, document):
        found.append(model(inputs, state=found[-1]).state)
    return found


@cache
@torch.no_grad()
def literally(
    model: Read, documents: TokenizedDocuments, stride: int = SEGMENT, memory_of: str = "own", warmup: int = 0
) -> list[np.ndarray]:
    """The nats of every token of every document, read one window at a time.

    What a window may see of a memory was written before its end.
    """
    losses = []
    for document in range(len(documents)):
        before, past = None, [None]
        for other in range(document - warmup, document):
            before = memories(model, documents, other % len(documents), before)[-1]
        if memory_of != "none":
            owner = partners(documents)[document] if memory_of == "another" else document
            past = memories(model, documents, owner, before)
        if memory_of == "shuffled":
            past = [None, *map(model.shuffle_time, past[1:])]
        nats = []
        for begin, inputs, targets in windows(documents, document, stride):
            written = min(-(-begin // SEGMENT), len(past) - 1)  # segments that hold all that is before the window
            scored = model(inputs, state=past[written]).logits[0, -len(targets) :].double().log_softmax(-1)
            nats.append(-scored.gather(1, targets.unsqueeze(1)).squeeze(1).numpy())
        losses.append(np.concatenate(nats))
    return losses


def by_document(figures: Figures) -> dict[str, float]:
    return {entry["id"]: entry["nll"] for entry in figures["per_document"]}


def assert_same(figures: Figures, losses: list[np.ndarray], documents: TokenizedDocuments, relative: float) -> None:
    expected = dict(zip(documents.ids, (loss.sum() for loss in losses), strict=True))
    assert by_document(figures) == pytest.approx(expected, rel=relative)
    assert figures["nll"] == pytest.approx(sum(expected.values()), rel=relative)


@pytest.fixture(scope="module")
def stock(backbone) -> Read:
    """Whose logits come from transformers alone."""
    return lambda inputs, state: backbone(inputs)


@pytest.fixture(scope="module")
def few(documents_of) -> TokenizedDocuments:
    return documents_of("exact", "short", "wind")


@pytest.fixture(scope="module")
def own(model, evaluator, documents) -> Figures:
    return evaluate(evaluator(model), documents)


@pytest.fixture(scope="module")
def controls(model, evaluator, documents) -> dict[str, Figures]:
    return evaluate_controls(evaluator(model), documents)


class TestWhateverIsReadSideBySide:
    """And whatever the stride."""

    @pytest.mark.parametrize(("batch_size", "stride"), [(2, SEGMENT), (7, SEGMENT), (3, 4)])
    def test_a_model_with_memory_costs_what_a_literal_loop_says(self, model, evaluator, documents, batch_size, stride):
        figures = evaluate(evaluator(model, batch_size, stride=stride), documents)
        assert_same(figures, literally(model, documents, stride), documents, 1e-5)

    @pytest.mark.parametrize(("batch_size", "stride"), [(1, 8), (3, 1)])
    def test_windows_of_few_documents_cost_what_a_literal_loop_says(self, model, evaluator, few, batch_size, stride):
        figures = evaluate(evaluator(model, batch_size, stride=stride), few)
        assert_same(figures, literally(model, few, stride), few, 1e-5)

    @pytest.mark.parametrize(("batch_size", "stride"), [(2, SEGMENT), (7, 3), (3, 8)])
    def test_a_model_without_memory_costs_what_the_stock_one_does(
        self, without_memory, stock, evaluator, documents, batch_size, stride
    ):
        figures = evaluate(evaluator(without_memory, batch_size, stride=stride), documents)
        assert_same(figures, literally(stock, documents, stride, "none"), documents, 1e-6)

    @pytest.mark.parametrize(("names", "batch_size", "stride"), [("documents", 2, SEGMENT), ("few", 3, 8)])
    def test_controls_cost_what_a_literal_loop_says(self, request, model, evaluator, names, batch_size, stride):
        documents = request.getfixturevalue(names)
        found = evaluate_controls(evaluator(model, batch_size, stride=stride), documents)
        assert found.keys() == CONTROLS.keys()
        for control, memory_of in CONTROLS.items():
            assert_same(found[control], literally(model, documents, stride, memory_of), documents, 1e-5)

    @pytest.mark.parametrize("options", [{"contraction": "uniform", "read": "moments"}, {"read": "slots"}])
    def test_rows_of_every_memory_may_have_written_different_numbers_of_segments(
        self, with_memory, evaluator, documents, options
    ):
        other = with_memory(**options)
        assert_same(evaluate(evaluator(other), documents), literally(other, documents), documents, 1e-5)

    def test_every_figure_is_the_same_at_every_order_of_the_documents(
        self, model, own, controls, documents, documents_of, evaluator
    ):
        """Also with another document's memory, which is that of the same other one."""
        moved = documents_of(*documents.ids[:1:-1], *documents.ids[:2])
        others = {"own": evaluate(evaluator(model), moved), **evaluate_controls(evaluator(model), moved)}
        for name, figures in {"own": own, **controls}.items():
            assert [entry["id"] for entry in others[name]["per_document"]] == moved.ids
            assert by_document(others[name]) == pytest.approx(by_document(figures), rel=1e-5)
            assert others[name]["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-5)


class TestControls:
    def test_the_memory_matters_here(self, own, controls):
        """So that the other tests mean something: the four situations differ by far more than these allow."""
        figures = [own["nll"], *(control["nll"] for control in controls.values())]
        assert min(abs(one - other) for one in figures for other in figures if one is not other) > 5e-4 * own["nll"]

    def test_a_document_without_a_whole_segment_before_its_end_is_the_same_in_all(self, own, controls):
        for control in controls.values():
            assert by_document(control)["short"] == by_document(own)["short"]

    def test_partners_are_others_and_each_is_one_document_s(self, documents, documents_of):
        for warmup, names in ((0, documents.ids), (0, documents.ids[:2]), (1, documents.ids)):
            found = partners(documents_of(*names), warmup)
            assert sorted(found) == list(range(len(names)))
            assert all(abs(other - document) > warmup for document, other in enumerate(found))

    def test_a_text_that_is_there_twice_is_not_its_own_partner(self, tokenizer, originals):
        names = ("short", "ship", "wind", "ship", "short", "wind")
        texts = [Document(str(number), originals[name]) for number, name in enumerate(names)]
        found = partners(TokenizedDocuments.from_texts(texts, tokenizer, tokenizer.bos_token_id))
        assert sorted(found) == list(range(6))
        assert all(names[other] != names[document] for document, other in enumerate(found))

    def test_one_document_has_no_other(self, model, documents_of, evaluator):
        found = evaluate_controls(evaluator(model), documents_of("exact"))
        assert found.keys() == CONTROLS.keys() - {"memory_of_another_document"}

    def test_a_model_without_memory_has_none(self, without_memory, documents, evaluator):
        assert evaluate_controls(evaluator(without_memory), documents) == {}


class TestWarmUp:
    @pytest.mark.parametrize(("names", "batch_size", "stride"), [("documents", 2, SEGMENT), ("few", 8, 8)])
    def test_the_memory_is_that_of_the_documents_before(
        self, request, with_memory, evaluator, names, batch_size, stride
    ):
        """In float64: through so many segments of so wild a memory, rounding errors grow."""
        documents = request.getfixturevalue(names)
        model = with_memory(sticky=True, sticky_bins=16).double()
        read = evaluator(model, batch_size, warmup_documents=2, stride=stride)
        warm = read_documents(read, documents, with_memory_of(read), "warm")
        expected = literally(model, documents, stride, warmup=2)
        np.testing.assert_allclose(warm, np.concatenate(expected), rtol=1e-5)

    def test_another_document_has_others_before_it(self, model, documents, evaluator):
        """With 5 documents there is room for 1 warm-up document, not for 2."""
        beginnings = documents.beginnings(100)
        controls = [evaluate_controls(evaluator(model, 7, warmup_documents=count), beginnings) for count in (1, 2)]
        assert ["memory_of_another_document" in found for found in controls] == [True, False]


class TestWhatCannotBeRead:
    @pytest.mark.parametrize("stride", [0, -1, 17])
    def test_a_stride_beyond_the_segment_is_refused(self, model, evaluator, stride):
        with pytest.raises(EvaluationError, match=f"stride={stride}: .* at least 1 and at most 16 tokens"):
            evaluator(model, stride=stride)

    def test_a_stride_that_does_not_divide_what_is_written_is_refused(self, model, evaluator, without_memory):
        with pytest.raises(EvaluationError, match="stride=5 does not divide segment_length=16"):
            evaluator(model, stride=5)
        evaluator(without_memory, stride=5)

    def test_a_stride_beside_a_short_term_memory_is_refused(self, evaluator):
        config = DecoderConfig(20, 16, 1, 2, feed_forward_size=16, memory=MemoryConfig(16), segment_length=SEGMENT)
        with pytest.raises(EvaluationError, match="stride=8: a short-term memory is a sliding window already"):
            evaluator(DecoderForCausalLM(config), stride=8)

    def test_warming_up_no_memory_is_refused(self, evaluator, without_memory):
        with pytest.raises(EvaluationError, match="warmup_documents=2: this model has no memory"):
            evaluator(without_memory, warmup_documents=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "disjoint segments of 16, float32"),
        ({"stride": 16}, "disjoint segments of 16, float32"),
        ({"stride": 4, "precision": torch.bfloat16}, "windows of 16, stride 4, bfloat16"),
        ({"warmup_documents": 3}, "disjoint segments of 16, after 3 documents, float32"),
    ],
)
def test_a_protocol_is_said_in_a_few_words(model, evaluator, options, words):
    assert describe_protocol(evaluator(model, **options).protocol.as_json()) == words


def test_shares_add_up(model, few, evaluator):
    """Two processes: each reads its lanes, and the sums of both are the nats."""
    whole = read_documents(evaluator(model, 4), few, with_memory_of(evaluator(model, 4)), "whole")
    sums: list[Tensor] = []
    first = evaluator(model, 4, rank=0, world_size=2, reduce=lambda tensor: sums.append(tensor) or tensor)
    read_documents(first, few, with_memory_of(first), "first")
    second = evaluator(model, 4, rank=1, world_size=2, reduce=lambda tensor: tensor + sums[0])
    together = read_documents(second, few, with_memory_of(second), "second")
    assert 0 < sums[0].count_nonzero() < len(whole)
    np.testing.assert_allclose(together, whole, rtol=1e-5, atol=1e-6)


class TestAfterSegment:
    @pytest.mark.parametrize(("stride", "worlds"), [(8, (1, 2)), (None, (7,))])
    def test_after_segment_is_called_equally_often_on_one_process_as_on_several(
        self, model, few, evaluator, stride, worlds
    ):
        """Also on one that has less to read, or nothing; so they can agree there. Of 7, four have nothing at all."""
        events: list[str] = []
        share = {"stride": stride, "after_segment": lambda: events.append("called")}
        told = []
        with model.register_forward_hook(lambda *_: events.append("read")):
            for processes in worlds:
                for process in range(processes):
                    events.clear()
                    read = evaluator(model, 2, rank=process, world_size=processes, **share)
                    read_documents(read, few, with_memory_of(read), "some")
                    told.append(list(events))
        assert told == [["read", "called"] * (len(told[0]) // 2)] * sum(worlds)
        assert len(told[0]) > 2

    def test_after_segment_may_cut_a_reading_short(self, model, few, evaluator):
        """After as many segments as were read until then; the next reading begins anew."""

        def stop() -> None:
            nonlocal left
            left -= 1
            if not left:
                raise InterruptedError

        left, forwards = 3, []
        read = evaluator(model, after_segment=stop)
        with model.register_forward_hook(lambda *_: forwards.append(None)), pytest.raises(InterruptedError):
            read_documents(read, few, with_memory_of(read), "some")
        assert len(forwards) == 3
        assert torch.is_grad_enabled()
        left, plain = 10**6, evaluator(model)
        again = read_documents(read, few, with_memory_of(read), "again")
        assert (again == read_documents(plain, few, with_memory_of(plain), "plain")).all()


def test_bfloat16_is_near_float32_and_another_figure(model, own, documents, evaluator):
    rounded = evaluate(evaluator(model, precision=torch.bfloat16), documents)["nll"]
    assert rounded != own["nll"]
    assert rounded == pytest.approx(own["nll"], rel=0.01)


def test_reading_rounds_no_operands_of_float32_products_and_training_does_so_again_after_it(without_memory):
    torch.set_float32_matmul_precision("high")
    try:
        with reading(without_memory):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_measuring_leaves_the_model_and_the_random_numbers_as_before(with_memory, few, evaluator):
    model = with_memory()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    measure(evaluator(model), few, controls=True, checkpoint="here")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
