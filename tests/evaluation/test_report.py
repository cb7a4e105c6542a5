"""Results as strict JSON, and tables in which no perplexity stands without its protocol."""

import copy
import json
import math

import pytest

from infformer.evaluation.perplexity import measure
from infformer.evaluation.report import format_table, write_results

SEGMENT = 16


@pytest.fixture(scope="module")
def results(model, documents, evaluator):
    return measure(evaluator(model), documents, controls=True, checkpoint="here")


def test_results_are_strict_json(results, tmp_path, model, documents):
    write_results(tmp_path / "new" / "results.json", results)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    assert results["protocol"] == {
        "segment": SEGMENT,
        "stride": SEGMENT,
        "warmup_documents": 0,
        "reset": "each document begins with an empty memory",
        "dtype": "float32",
        "documents": documents.fingerprint,
        "memory": model.config.memory,
        "checkpoint": "here",
    }
    assert model.config.segment_length == SEGMENT


def test_the_difference_that_a_control_makes(results):
    for control in results["controls"].values():
        expected = (control["nll"] - results["nll"]) / results["tokens"]
        assert control["difference"]["nats_per_token"] == pytest.approx(expected)


def test_results_of_a_hopeless_model_are_strict_json(without_memory, documents, tmp_path, evaluator):
    """Too bad for its perplexity to be a number: the file stays JSON that every evaluator opens."""
    hopeless = copy.deepcopy(without_memory)
    hopeless.backbone.lm_head.weight.data *= 1e5
    results = measure(evaluator(hopeless), documents, controls=False, checkpoint="here")
    assert results["perplexity"]["token"] == math.inf
    write_results(tmp_path / "results.json", results)

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read["perplexity"]["token"] is None
    assert read["nll"] == results["nll"]
    format_table(results)
