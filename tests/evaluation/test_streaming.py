"""What is read is what a literal loop over one document at a time reads, whatever is read side by side with it."""

import copy
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from infformer.data import TokenizedDocuments
from infformer.evaluation.perplexity import evaluate, evaluate_controls, measure
from infformer.evaluation.streaming import EvaluationError, describe_protocol, partners, read_documents
from infformer.evaluation.streaming import with_memory as with_memory_of
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM
from infformer.results import Figures

SEGMENT = 16


def cut(documents: TokenizedDocuments, document: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs and the targets of each segment."""
    tokens = torch.from_numpy(documents.tokens(document, 0, int(documents.token_counts[document])))
    for start in range(0, len(tokens) - 1, SEGMENT):
        targets = tokens[start + 1 : start + 1 + SEGMENT]
        yield tokens[start : start + len(targets)].unsqueeze(0), targets


def nats(logits: Tensor, targets: Tensor) -> np.ndarray:
    return -logits[0].double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).numpy()


CONTROLS = {
    "memory_off": "none",
    "memory_of_another_document": "another",
    "memory_shuffled_in_time": "shuffled",
}


@cache
@torch.no_grad()
def literally(model: InfformerForCausalLM, documents: TokenizedDocuments, memory_of: str) -> list[np.ndarray]:
    """The nats of every token of every document, read one segment of one document at a time."""
    model.eval()
    memories, losses = [], []
    for document in range(len(documents)):
        memory, own = None, [None]
        for inputs, _ in cut(documents, document):
            memory = model(inputs, state=memory).state
            own.append(memory)
        memories.append(own)
    for document in range(len(documents)):
        past = {
            "own": memories[document],
            "another": memories[partners(documents)[document]],
            "shuffled": [None, *map(model.shuffle_time, memories[document][1:])],
            "none": [None],
        }[memory_of]
        losses.append(
            np.concatenate(
                [
                    nats(model(inputs, state=past[min(number, len(past) - 1)]).logits, targets)
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


@pytest.fixture(scope="module")
def own(model, evaluator, documents) -> Figures:
    return evaluate(evaluator(model), documents)


@pytest.fixture(scope="module")
def controls(model, evaluator, documents) -> dict[str, Figures]:
    return evaluate_controls(evaluator(model), documents)


@pytest.mark.parametrize("batch_size", [2, 7])
class TestWhateverIsReadSideBySide:
    def test_own_memory(self, model, evaluator, documents, batch_size):
        assert_same(
            evaluate(evaluator(model, batch_size), documents), literally(model, documents, "own"), documents, 1e-5
        )

    def test_no_memory_in_the_model(self, without_memory, backbone, documents, batch_size, evaluator):
        with torch.no_grad():
            losses = [
                np.concatenate([nats(backbone(inputs).logits, targets) for inputs, targets in cut(documents, document)])
                for document in range(len(documents))
            ]
        assert_same(evaluate(evaluator(without_memory, batch_size), documents), losses, documents, 1e-6)

    def test_controls(self, model, documents, batch_size, evaluator):
        controls = evaluate_controls(evaluator(model, batch_size), documents)
        for control, memory_of in CONTROLS.items():
            assert_same(controls.pop(control), literally(model, documents, memory_of), documents, 1e-5)
        assert not controls

    def test_order_of_documents(self, model, own, documents, documents_of, batch_size, evaluator):
        other = evaluate(evaluator(model, batch_size), documents_of(*reversed(documents.ids)))
        assert [entry["id"] for entry in other["per_document"]] == list(reversed(documents.ids))
        assert by_document(other) == pytest.approx(by_document(own), rel=1e-5)


class TestControls:
    def test_the_memory_matters_here(self, own, controls):
        """So that the other tests mean something: the three situations differ by far more than these allow."""
        figures = [own["nll"], *(control["nll"] for control in controls.values())]
        assert min(abs(one - other) for one in figures for other in figures if one is not other) > 5e-4 * own["nll"]

    def test_a_document_without_a_whole_segment_before_its_end_is_the_same_in_all(self, own, controls):
        for control in controls.values():
            assert by_document(control)["short"] == by_document(own)["short"]

    def test_every_figure_is_the_same_at_every_order_of_the_documents(
        self, model, controls, documents, documents_of, evaluator
    ):
        """Also with another document's memory, which is that of the same other one."""
        assert controls.keys() == CONTROLS.keys()
        moved = documents_of(*documents.ids[:1:-1], *documents.ids[:2])
        for control, others in evaluate_controls(evaluator(model), moved).items():
            assert by_document(others) == pytest.approx(by_document(controls[control]), rel=1e-5)
            assert others["perplexity"] == pytest.approx(controls[control]["perplexity"], rel=1e-5)

    def test_partners_are_others_and_each_is_one_document_s(self, documents, documents_of):
        for warmup, names in ((0, documents.ids), (0, documents.ids[:2]), (1, documents.ids)):
            found = partners(documents_of(*names), warmup)
            assert sorted(found) == list(range(len(names)))
            assert all(abs(other - document) > warmup for document, other in enumerate(found))

    def test_one_document_has_no_other(self, model, documents_of, evaluator):
        assert evaluate_controls(evaluator(model), documents_of("ship")).keys() == {
            "memory_off",
            "memory_shuffled_in_time",
        }

    def test_a_model_without_memory_has_none(self, without_memory, documents, evaluator):
        assert evaluate_controls(evaluator(without_memory), documents) == {}


@pytest.mark.parametrize("options", [{"contraction": "uniform"}, {"read": "slots"}, {"read": "moments"}])
def test_every_kind_of_memory(with_memory, documents, options, evaluator):
    """Rows that have written different numbers of segments are read side by side."""
    other = with_memory(**options)
    assert_same(evaluate(evaluator(other), documents), literally(other, documents, "own"), documents, 1e-5)


@torch.no_grad()
def slide(model: InfformerForCausalLM, documents: TokenizedDocuments, stride: int) -> list[np.ndarray]:
    """Window by window, one document at a time; what a window may see of the memory was written before its end."""
    model.eval()
    losses = []
    for document in range(len(documents)):
        memories = [None]
        for inputs, _ in cut(documents, document):
            memories.append(model(inputs, state=memories[-1]).state)
        tokens = torch.from_numpy(documents.tokens(document, 0, int(documents.token_counts[document])))
        found, previous = [], 0
        for begin in range(0, len(tokens) - 1, stride):
            end = min(begin + SEGMENT, len(tokens) - 1)
            written = -(-begin // SEGMENT)  # whole segments that hold all that is before the window
            logits = model(tokens[begin:end].unsqueeze(0), state=memories[written]).logits
            found.append(nats(logits[:, previous - begin :], tokens[previous + 1 : end + 1]))
            previous = end
            if end == len(tokens) - 1:
                break
        losses.append(np.concatenate(found))
    return losses


class TestSlidingWindow:
    @pytest.mark.parametrize(("stride", "batch_size"), [(4, 3), (8, 1)])
    def test_with_memory(self, model, documents, evaluator, stride, batch_size):
        read = evaluator(model, batch_size, stride=stride)
        assert_same(evaluate(read, documents), slide(model, documents, stride), documents, 1e-5)

    @pytest.mark.parametrize("stride", [3, 8])
    def test_of_a_stock_model(self, without_memory, backbone, documents, evaluator, stride):
        """Its logits come from transformers alone."""
        with torch.no_grad():
            expected = []
            for document in range(len(documents)):
                tokens = torch.from_numpy(documents.tokens(document, 0, int(documents.token_counts[document])))
                total, previous = [], 0
                for begin in range(0, len(tokens) - 1, stride):
                    end = min(begin + SEGMENT, len(tokens) - 1)
                    logits = backbone(tokens[begin:end].unsqueeze(0)).logits
                    total.append(nats(logits[:, previous - begin :], tokens[previous + 1 : end + 1]))
                    previous = end
                    if end == len(tokens) - 1:
                        break
                expected.append(np.concatenate(total))
        assert_same(evaluate(evaluator(without_memory, stride=stride), documents), expected, documents, 1e-6)

    def test_controls(self, model, documents, evaluator):
        """Where nothing is ever written, a window reads as in a model without memory."""
        read = evaluator(model, 7, stride=4)
        controls = evaluate_controls(read, documents)
        with torch.no_grad():
            backbone = InfformerForCausalLM.from_backbone(copy.deepcopy(model.backbone)).eval()
        assert_same(controls["memory_off"], slide(backbone, documents, 4), documents, 1e-5)
        own = evaluate(read, documents)["nll"]
        assert all(abs(control["nll"] - own) > 5e-4 * own for control in controls.values())


class TestWarmUp:
    @pytest.mark.parametrize(("batch_size", "stride"), [(2, None), (8, 8)])
    def test_the_memory_of_the_documents_before(self, with_memory, documents, evaluator, batch_size, stride):
        """In float64: through so many segments of so wild a memory, rounding errors grow."""
        model = with_memory(sticky=True, sticky_bins=16).double()
        warm_evaluator = evaluator(model, batch_size, warmup_documents=2, stride=stride)
        warm = read_documents(warm_evaluator, documents, with_memory_of(warm_evaluator), "warm")
        expected = []
        with torch.no_grad():
            for document in range(len(documents)):
                memory = None
                for other in (document - 2, document - 1):
                    for inputs, _ in cut(documents, other % len(documents)):
                        memory = model(inputs, state=memory).state
                memories = [memory]
                for inputs, _ in cut(documents, document):
                    memories.append(model(inputs, state=memories[-1]).state)
                tokens = torch.from_numpy(documents.tokens(document, 0, int(documents.token_counts[document])))
                previous, step = 0, stride or SEGMENT
                for begin in range(0, len(tokens) - 1, step):
                    end = min(begin + SEGMENT, len(tokens) - 1)
                    logits = model(tokens[begin:end].unsqueeze(0), state=memories[-(-begin // SEGMENT)]).logits
                    expected.append(nats(logits[:, previous - begin :], tokens[previous + 1 : end + 1]))
                    previous = end
                    if end == len(tokens) - 1:
                        break
        np.testing.assert_allclose(warm, np.concatenate(expected), rtol=1e-5)

    def test_another_document_has_others_before_it(self, model, documents, evaluator):
        """With 5 documents there is room for 1 warm-up document, not for 2."""
        controls = [evaluate_controls(evaluator(model, 7, warmup_documents=count), documents) for count in (1, 2)]
        assert ["memory_of_another_document" in found for found in controls] == [True, False]


class TestWhatCannotBeRead:
    @pytest.mark.parametrize("stride", [0, -1, 17])
    def test_a_stride_beyond_the_segment(self, model, evaluator, stride):
        with pytest.raises(EvaluationError, match=f"stride={stride}: .* at least 1 and at most 16 tokens"):
            evaluator(model, stride=stride)

    def test_a_stride_that_does_not_divide_what_is_written(self, model, evaluator, without_memory):
        with pytest.raises(EvaluationError, match="stride=5 does not divide segment_length=16"):
            evaluator(model, stride=5)
        evaluator(without_memory, stride=5)

    def test_a_stride_beside_a_short_term_memory(self, evaluator):
        config = DecoderConfig(20, 16, 1, 2, feed_forward_size=16, memory=MemoryConfig(16), segment_length=SEGMENT)
        with pytest.raises(EvaluationError, match="stride=8: a short-term memory is a sliding window already"):
            evaluator(DecoderForCausalLM(config), stride=8)

    def test_warming_up_no_memory(self, evaluator, without_memory):
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
def test_a_protocol_in_words(model, evaluator, options, words):
    assert describe_protocol(evaluator(model, **options).protocol.as_json()) == words


def test_shares_add_up(model, documents, evaluator):
    """Two processes: each reads its lanes, and the sums of both are the nats."""
    whole = read_documents(evaluator(model, 4), documents, with_memory_of(evaluator(model, 4)), "whole")
    sums: list[Tensor] = []
    first = evaluator(model, 4, rank=0, world_size=2, reduce=lambda tensor: sums.append(tensor) or tensor)
    read_documents(first, documents, with_memory_of(first), "first")
    second = evaluator(model, 4, rank=1, world_size=2, reduce=lambda tensor: tensor + sums[0])
    together = read_documents(second, documents, with_memory_of(second), "second")
    assert 0 < sums[0].count_nonzero() < len(whole)
    np.testing.assert_allclose(together, whole, rtol=1e-5, atol=1e-6)


class TestAfterSegment:
    @pytest.mark.parametrize(("stride", "batch_size", "processes"), [(4, 4, 2), (None, 2, 7)])
    def test_is_called_equally_often_on_every_process(self, model, documents, evaluator, stride, batch_size, processes):
        """Also on one that has less to read, or nothing; so they can agree there. With 7, two have nothing at all."""
        events: list[str] = []
        share = {"stride": stride, "world_size": processes, "after_segment": lambda: events.append("called")}
        hook = model.register_forward_hook(lambda *_: events.append("read"))
        told = []
        for process in range(processes):
            events.clear()
            read = evaluator(model, batch_size, rank=process, **share)
            read_documents(read, documents, with_memory_of(read), "some")
            told.append(list(events))
        hook.remove()
        assert told == [["read", "called"] * (len(told[0]) // 2)] * processes
        assert len(told[0]) > 2

    def test_may_cut_a_reading_short(self, model, documents, evaluator):
        """After as many segments as were read until then; the next reading begins anew."""

        def stop() -> None:
            nonlocal left
            left -= 1
            if not left:
                raise InterruptedError

        left, forwards = 3, []
        hook = model.register_forward_hook(lambda *_: forwards.append(None))
        read = evaluator(model, after_segment=stop)
        with pytest.raises(InterruptedError):
            read_documents(read, documents, with_memory_of(read), "some")
        hook.remove()
        assert len(forwards) == 3
        assert torch.is_grad_enabled()
        left, plain = 10**6, evaluator(model)
        again = read_documents(read, documents, with_memory_of(read), "again")
        assert (again == read_documents(plain, documents, with_memory_of(plain), "plain")).all()


def test_in_bfloat16(model, documents, evaluator):
    exact = evaluate(evaluator(model), documents)["nll"]
    rounded = evaluate(evaluator(model, precision=torch.bfloat16), documents)["nll"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


def test_the_model_is_as_before(with_memory, documents_of, evaluator):
    model, documents = with_memory(), documents_of("exact", "wind")
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    measure(evaluator(model), documents, controls=True, checkpoint="here")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
