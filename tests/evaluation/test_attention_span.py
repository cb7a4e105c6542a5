"""The required attention span, where it is known."""

import numpy as np
import pytest
import torch

from infformer.data.examples import Examples
from infformer.evaluation import attention_span
from infformer.evaluation.attention_span import attention_spans, measure_attention_span, spans_of
from infformer.models.encoder import ClassifierConfig, TextClassifier


def new_classifier(**options):
    torch.manual_seed(0)
    return TextClassifier(ClassifierConfig(vocab_size=20, hidden_size=16, longest=64, **options)).eval()


@pytest.mark.parametrize("rows", [7, 256])
def test_even_attention_looks_a_third_of_the_text_away(monkeypatch, rows):
    monkeypatch.setattr(attention_span, "ROWS_AT_ONCE", rows)
    model = new_classifier()
    for layer in model.layers:
        layer.query.weight.data.zero_()
    texts = torch.ones(3, 41, dtype=torch.long)
    assert attention_spans(model, [texts]) == pytest.approx([(41**2 - 1) / (3 * 41)] * 2)
    texts[:, 20:] = 0  # padding
    assert attention_spans(model, [texts]) == pytest.approx([(20**2 - 1) / (3 * 20)] * 2)


def test_attention_to_itself_alone_looks_nowhere():
    key = 100 * torch.eye(30).expand(1, 1, 30, 30)
    assert spans_of(key, key, torch.ones(1, 30, dtype=torch.bool)).abs().max() < 1e-6


def test_the_mean_is_over_all_positions_of_all_texts():
    model = new_classifier()
    short, long = torch.randint(1, 20, (1, 9)), torch.randint(1, 20, (1, 50))
    spans = [attention_spans(model, [texts]) for texts in (short, long)]
    together = attention_spans(model, [short, long])
    for layer in range(2):
        assert together[layer] == pytest.approx((9 * spans[0][layer] + 50 * spans[1][layer]) / 59)


def new_examples(*lengths):
    ends = np.cumsum(lengths)
    bounds = np.stack([ends - lengths, ends], axis=1)[:, None]
    return Examples(["no", "yes"], 1, np.zeros(len(lengths), np.int64), "", np.ones(ends[-1], np.uint8), bounds)


def test_examples_are_measured_beside_what_even_attention_has(monkeypatch):
    model = new_classifier()
    for layer in model.layers:
        layer.query.weight.data.zero_()
    found = measure_attention_span(model, new_examples(9, 50, 30))
    assert found["examples"] == 3
    assert found["layers"] == pytest.approx([found["even"]] * 2)
    monkeypatch.setattr(attention_span, "MOST_WEIGHTS", 9**2 + 50**2)
    found = measure_attention_span(model, new_examples(9, 50, 30))
    assert (found["examples"], found["even"]) == (2, pytest.approx((9**2 + 50**2 - 2) / (3 * 59)))


def test_other_mechanisms_have_no_span():
    assert measure_attention_span(new_classifier(attention="linear"), new_examples(9)) is None
