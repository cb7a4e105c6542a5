"""Baselines that need no training, against the same sums written literally, one token after the other."""

import math

import numpy as np
import pytest
import torch

from infformer.evaluation.baselines import SIZES, WEIGHTS, Settings, measure_baselines, with_past
from infformer.evaluation.perplexity import evaluate, measure
from infformer.evaluation.report import format_table
from infformer.evaluation.streaming import read_documents, without_memory
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.results import CONTINUOUS_CACHE, DOCUMENT_UNIGRAM


def hidden_states(model, tokens: list[int]) -> list[torch.Tensor]:
    """By which each token but the first is predicted, of a model that reads segments of 16 without memory."""
    states = []
    for start in range(0, len(tokens) - 1, 16):
        segment = torch.tensor([tokens[start : min(start + 16, len(tokens) - 1)]])
        with torch.no_grad():
            output = model(segment, return_intermediates=True, return_logits=False)
        states += list(output.hidden[0].double())
    return states


def literally(model, documents, nats: np.ndarray, settings: Settings) -> list[float]:
    """The losses where what came before in the document is mixed in, by loops."""
    losses, read = [], iter(nats.tolist())
    for document in range(len(documents)):
        tokens = documents.tokens(document, 0, int(documents.token_counts[document])).tolist()
        states = torch.stack(hidden_states(model, tokens))
        for now in range(len(tokens) - 1):
            probability, target = math.exp(-next(read)), tokens[now + 1]
            first = 0 if settings.size is None else max(0, now - settings.size)
            cosines = torch.cosine_similarity(states[first:now], states[now], dim=-1).tolist()
            weights = [math.exp(settings.sharpness * cosine) for cosine in cosines]
            if weights:
                found = sum(weight for at, weight in enumerate(weights, first) if tokens[at + 1] == target)
                probability = (1 - settings.weight) * probability + settings.weight * found / sum(weights)
            losses.append(-math.log(probability))
    return losses


@pytest.mark.parametrize(
    ("settings", "batch_size"),
    [
        (Settings(5, 3.0, 0.3), 3),
        (Settings(40, 20.0, 0.1), 1),
        (Settings(1000, 0.0, 0.5), 3),
        (Settings(None, 0.0, 0.2), 1),
        (Settings(None, 0.0, 0.2), 3),
    ],
)
def test_losses_are_those_of_the_mixture_token_by_token(model, documents, evaluator, settings, batch_size):
    reader = evaluator(model, batch_size, progress=False)
    plain = read_documents(reader, documents, without_memory(reader), "plain")
    found = read_documents(reader, documents, with_past(reader, settings), "mixed")
    assert found == pytest.approx(literally(model, documents, plain, settings), rel=2e-5)
    assert np.abs(found - plain).max() > 0.01


def test_a_decoder_is_measured_as_well(documents, evaluator):
    torch.manual_seed(0)
    config = DecoderConfig(300, 16, 1, 2, feed_forward_size=16, memory=MemoryConfig(16), segment_length=16)
    decoder = DecoderForCausalLM(config).eval()
    reader, settings = evaluator(decoder, progress=False), Settings(30, 10.0, 0.3)
    plain = read_documents(reader, documents, without_memory(reader), "plain")
    found = read_documents(reader, documents, with_past(reader, settings), "mixed")
    assert found == pytest.approx(literally(decoder, documents, plain, settings), rel=2e-5)


def test_of_weight_zero_nothing_is_mixed_in(model, documents, evaluator):
    reader = evaluator(model, progress=False)
    plain = read_documents(reader, documents, without_memory(reader), "plain")
    assert np.allclose(read_documents(reader, documents, with_past(reader, Settings(64, 5.0)), ""), plain, atol=1e-6)


def test_windows_that_overlap_keep_each_token_once(without_memory, documents, evaluator):
    """A unigram does not look at states, so it is the same whatever the windows."""
    settings = Settings(None, 0.0, 1.0)
    shares = []
    for stride in (16, 4):
        reader = evaluator(without_memory, stride=stride, progress=False)
        shares.append(read_documents(reader, documents, with_past(reader, settings), ""))
    first = np.cumsum(documents.token_counts - 1)[:-1]
    for one, other in zip(*(np.split(each, first) for each in shares), strict=True):
        assert one[1:].tolist() == other[1:].tolist()  # before the second token there is only the model


def test_settings_are_the_best_of_the_validation_documents(model, documents, documents_of, evaluator):
    reader = evaluator(model, progress=False)
    validation = documents_of("short", "wind")
    found = measure_baselines(reader, documents, validation, evaluate(reader, documents))
    assert found.keys() == {CONTINUOUS_CACHE, DOCUMENT_UNIGRAM}
    for baseline in found.values():
        settings = Settings(*(baseline["settings"][name] for name in Settings._fields))
        assert settings.weight > 0  # these texts repeat themselves
        best = read_documents(reader, validation, with_past(reader, settings), "").sum()
        others = [settings._replace(weight=weight) for weight in WEIGHTS]
        if settings.size is not None:
            others += [settings._replace(size=size) for size in SIZES]
        for other in others:
            assert best <= read_documents(reader, validation, with_past(reader, other), "").sum() * (1 + 1e-6)
        nats = read_documents(reader, documents, with_past(reader, settings), "")
        assert baseline["nll"] == pytest.approx(nats.sum(dtype=np.float64), rel=1e-6)


def test_a_vocabulary_in_bands_is_counted_whole(documents_of, evaluator):
    config = DecoderConfig(300, 16, 1, 2, feed_forward_size=16, segment_length=16, adaptive_cutoffs=[100])
    reader, text = evaluator(DecoderForCausalLM(config), progress=False), documents_of("short")
    found = measure_baselines(reader, text, text, evaluate(reader, text))
    assert found[DOCUMENT_UNIGRAM]["settings"]["floats"] == 300
    settings = found[CONTINUOUS_CACHE]["settings"]
    assert settings["floats"] == 16 * settings["size"]


def test_results_and_table_hold_baselines_beside_controls(model, documents, documents_of, evaluator):
    reader = evaluator(model, progress=False)
    results = measure(reader, documents, True, "somewhere", documents_of("wind"))
    baseline = results["baselines"][CONTINUOUS_CACHE]
    expected = (baseline["nll"] - results["nll"]) / results["tokens"]
    assert baseline["difference"]["nats_per_token"] == pytest.approx(expected)
    assert baseline["difference"]["interval"] is not None
    table = format_table(results)
    assert "  a continuous cache instead " in table
    assert "  the document's unigram instead " in table
    settings = baseline["settings"]
    told = f"sharpness {settings['sharpness']:g}, a share of {settings['weight']:g}): {expected:+.4f} nats per token"
    assert told in table
    assert "baselines" not in measure(reader, documents, False, "somewhere")
