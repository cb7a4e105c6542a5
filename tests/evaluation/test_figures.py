"""The figures of given nats, counted by literal loops; and those of a model."""

import math

import numpy as np
import pytest
import scipy

from infformer.evaluation.figures import figures_of, interval_of_ratio, place_edges, previous_occurrences
from infformer.evaluation.perplexity import evaluate
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM

SEGMENT = 16


@pytest.fixture
def nats(documents) -> np.ndarray:
    count = int((documents.token_counts - 1).sum())
    return np.random.default_rng(0).gamma(2, size=count).astype(np.float32)


def places(documents, nats):
    """(document, position of the input, nats) of every token."""
    values = iter(nats.tolist())
    return [
        (document, position, next(values))
        for document in range(len(documents))
        for position in range(documents.token_counts[document] - 1)
    ]


def test_words_and_bytes_are_those_of_the_text(model, documents, evaluator, originals):
    figures = evaluate(evaluator(model), documents)
    assert figures["documents"] == len(originals)
    assert figures["words"] == sum(len(text.split()) for text in originals.values())
    assert figures["bytes"] == sum(len(text.encode()) for text in originals.values())
    assert figures["tokens"] == figures["bytes"]  # here a token is a byte, and the one that begins is not scored
    for entry in figures["per_document"]:
        text = originals[entry["id"]]
        assert entry["tokens"] == entry["bytes"] == len(text.encode())
        assert entry["words"] == len(text.split())


def test_perplexities_are_those_of_the_sums(model, documents, evaluator):
    figures = evaluate(evaluator(model), documents)
    assert figures["perplexity"]["token"] == pytest.approx(math.exp(figures["nll"] / figures["tokens"]))
    assert figures["perplexity"]["word"] == pytest.approx(math.exp(figures["nll"] / figures["words"]))
    assert figures["bits_per_byte"] == pytest.approx(figures["nll"] / math.log(2) / figures["bytes"])


def test_figures_by_document_are_sums_over_it(model, documents, evaluator, nats):
    figures = figures_of(evaluator(model), documents, nats)
    assert [entry["id"] for entry in figures["per_document"]] == documents.ids
    for document, entry in enumerate(figures["per_document"]):
        assert entry["nll"] == pytest.approx(sum(loss for at, _, loss in places(documents, nats) if at == document))
    assert figures["nll"] == pytest.approx(nats.sum(dtype=np.float64), rel=1e-12)


def test_figures_by_position_are_sums_over_the_stretch(model, documents, evaluator, nats):
    figures = figures_of(evaluator(model), documents, nats)
    assert [(entry["from"], entry["to"]) for entry in figures["by_position"]] == [
        (0, 64), (64, 128), (128, 256),
    ]  # fmt: skip
    assert 128 < documents.token_counts.max() <= 256
    for index, entry in enumerate(figures["by_position"]):
        inside = [place for place in places(documents, nats) if entry["from"] <= place[1] < entry["to"]]
        assert entry["tokens"] == len(inside)
        assert entry["nll"] == pytest.approx(sum(loss for *_, loss in inside))
        for document, one in enumerate(figures["per_document"]):
            losses = [loss for at, _, loss in inside if at == document]
            assert one["by_position"][index] == pytest.approx([len(losses), sum(losses)])


@pytest.mark.parametrize(("stride", "short_term"), [(16, 0), (4, 0), (1, 0), (16, 16), (16, 40)])
def test_figures_by_recency_are_sums_over_what_occurred_last_there(
    model, documents, evaluator, nats, stride, short_term
):
    """Attention sees the window in which a token is scored, and the short-term memory before that."""
    if short_term:
        memory = MemoryConfig(short_term)
        model = DecoderForCausalLM(
            DecoderConfig(300, 16, 1, 2, feed_forward_size=16, memory=memory, segment_length=SEGMENT)
        )
    figures = figures_of(evaluator(model, stride=stride), documents, nats)
    expected = {"within_window": [0, 0.0], "beyond_window": [0, 0.0], "never": [0, 0.0]}
    for document, position, loss in places(documents, nats):
        tokens = documents.tokens(document, 0, int(documents.token_counts[document])).tolist()
        begin = 0
        while position >= begin + SEGMENT:
            begin += stride
        before = [at for at in range(position + 1) if tokens[at] == tokens[position + 1]]
        if not before:
            name = "never"
        else:
            name = "within_window" if before[-1] >= begin - short_term else "beyond_window"
        expected[name][0] += 1
        expected[name][1] += loss
    found = {entry["previous_occurrence"]: [entry["tokens"], entry["nll"]] for entry in figures["by_recency"]}
    assert found.keys() == expected.keys()
    for name, (tokens, loss) in expected.items():
        assert tokens > 0
        assert found[name] == pytest.approx([tokens, loss])
    for index, entry in enumerate(figures["by_recency"]):
        total = np.sum([one["by_recency"][index] for one in figures["per_document"]], axis=0)
        assert total.tolist() == pytest.approx([entry["tokens"], entry["nll"]])


@pytest.mark.parametrize("stride", [16, 4, 1])
def test_figures_by_place_are_sums_over_places_in_the_window(model, documents, evaluator, nats, stride):
    figures = figures_of(evaluator(model, stride=stride), documents, nats)
    expected = [[0, 0.0], [0, 0.0]]
    for _, position, loss in places(documents, nats):
        begin = 0
        while position >= begin + SEGMENT:
            begin += stride
        expected[position - begin >= 4][0] += 1
        expected[position - begin >= 4][1] += loss
    assert [(entry["from"], entry["to"]) for entry in figures["by_place"]] == [(0, 4), (4, SEGMENT)]
    for index, (tokens, loss) in enumerate(expected):
        assert tokens > 0
        total = np.sum([one["by_place"][index] for one in figures["per_document"]], axis=0)
        found = figures["by_place"][index]
        assert total.tolist() == pytest.approx([tokens, loss])
        assert [found["tokens"], found["nll"]] == pytest.approx([tokens, loss])


@pytest.mark.parametrize(("length", "edges"), [(3, [0, 3]), (8, [0, 4, 8]), (64, [0, 4, 16, 64])])
def test_the_first_places_of_a_window_stand_apart(length, edges):
    assert place_edges(length).tolist() == edges


def test_previous_occurrences_are_the_last_before():
    assert previous_occurrences(np.array([5, 3, 5, 5, 4, 3, 9])).tolist() == [-1, -1, 0, 2, -1, 1, -1]


def test_figures_of_beginnings_are_of_so_many_tokens(model, documents, evaluator):
    beginnings = documents.beginnings(200)
    figures = evaluate(evaluator(model), beginnings)
    assert figures["tokens"] == int((beginnings.token_counts - 1).sum()) <= 200


class TestInterval:
    @pytest.mark.parametrize("documents", [2, 4, 10])
    @pytest.mark.parametrize("lengths", ["alike", "from 50 to 500"])
    def test_an_interval_holds_the_true_ratio_as_often_as_it_says(self, documents, lengths):
        """Of documents drawn over and over: 95 %, also of few, which a bootstrap holds in 51 % (2) to 89 % (10)."""
        random = np.random.default_rng(1)
        shortest = 450 if lengths == "alike" else 50
        held = []
        for _ in range(2000):
            counts = random.integers(shortest, 500, documents)
            low, high = interval_of_ratio(counts * random.normal(3.0, 0.3, documents), counts)
            held.append(low <= 3.0 <= high)
        assert 0.92 <= np.mean(held) <= 0.97

    def test_an_interval_is_that_of_a_mean_where_all_are_equally_long(self):
        values = np.array([3.0, 4.0, 1.5, 3.5, 2.0])
        mean, error = values.mean(), values.std(ddof=1) / math.sqrt(5)
        expected = scipy.stats.t.interval(0.95, 4, mean, error)
        assert interval_of_ratio(7 * values, np.full(5, 7)) == pytest.approx(expected)

    def test_an_interval_scales_with_the_values(self):
        values, counts = np.array([30.0, 44.0, 10.0, 81.0]), np.array([10, 12, 5, 30])
        low, high = interval_of_ratio(values, counts)
        assert low < 165 / 57 < high
        assert interval_of_ratio(2 * values, counts) == pytest.approx([2 * low, 2 * high])

    def test_documents_that_are_all_alike_leave_no_doubt(self):
        assert interval_of_ratio(np.full(5, 6.0), np.full(5, 2)) == pytest.approx([3.0, 3.0])

    def test_one_document_tells_nothing(self):
        assert interval_of_ratio(np.array([3.0]), np.array([1])) is None

    def test_documents_in_which_nothing_was_counted_are_none(self):
        assert interval_of_ratio(np.zeros(3), np.zeros(3)) is None
        assert interval_of_ratio(np.array([3.0, 0.0]), np.array([1, 0])) is None
        values, counts = np.array([30.0, 44.0, 10.0]), np.array([10, 12, 5])
        assert interval_of_ratio(np.append(values, 0.0), np.append(counts, 0)) == interval_of_ratio(values, counts)

    def test_intervals_of_perplexity_are_those_of_its_logarithm(self, model, documents, evaluator, nats):
        figures = figures_of(evaluator(model), documents, nats)
        losses = np.array([entry["nll"] for entry in figures["per_document"]])
        for unit, counts in (("token", documents.token_counts - 1), ("word", documents.word_counts)):
            low, high = figures["perplexity_interval"][unit]
            assert low < figures["perplexity"][unit] < high
            assert [low, high] == pytest.approx(list(map(math.exp, interval_of_ratio(losses, counts))))
