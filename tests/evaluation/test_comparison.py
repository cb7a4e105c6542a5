"""Two results compared document by document."""

import copy
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from infformer.evaluation.comparison import compare, tally, verdict
from infformer.evaluation.perplexity import measure
from infformer.evaluation.report import format_comparison, write_results
from infformer.evaluation.streaming import EvaluationError
from infformer.plots.comparison import plot_comparison

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def with_results(model, documents, evaluator):
    return measure(evaluator(model), documents, controls=False, checkpoint="with")


@pytest.fixture(scope="module")
def without_results(without_memory, documents, evaluator):
    return measure(evaluator(without_memory), documents, controls=False, checkpoint="without")


@pytest.fixture(scope="module")
def comparison(without_results, with_results):
    return compare(without_results, with_results)


def test_the_difference_is_that_of_the_perplexities(comparison, without_results, with_results):
    total = with_results["nll"] - without_results["nll"]
    assert comparison["difference"]["nats_per_token"] == pytest.approx(total / with_results["tokens"])
    low, high = comparison["difference"]["interval"]
    assert low < comparison["difference"]["nats_per_token"] < high
    for side, sign in (("better", -1), ("worse", 1)):
        told = sum(sign * one["nats_per_token"] >= 5e-5 for one in comparison["per_document"])
        assert comparison["difference"][side] == told


def test_classes_of_tokens_add_up(comparison):
    whole = comparison["difference"]["nats_per_token"] * comparison["tokens"]
    for breakdown in ("by_position", "by_recency"):
        parts = [one for one in comparison[breakdown] if one["tokens"]]
        assert sum(one["tokens"] for one in parts) == comparison["tokens"]
        assert sum(one["nats_per_token"] * one["tokens"] for one in parts) == pytest.approx(whole)


def test_pairing_sees_what_the_two_intervals_hide(with_results):
    """Documents differ by much, the models on each by the same little."""
    better = copy.deepcopy(with_results)
    for document in better["per_document"]:
        document["nll"] -= 0.01 * document["tokens"]
    found = compare(with_results, better)
    assert found["difference"]["nats_per_token"] == pytest.approx(-0.01)
    assert found["difference"]["interval"] == pytest.approx([-0.01, -0.01])
    low, high = with_results["perplexity_interval"]["token"]
    assert np.log(high) - np.log(low) > 0.02
    assert verdict(found) == (
        "B reads better than A: -0.0100 nats per token (perplexity -1.00 %), 95 % interval over 5 documents "
        "-0.0100 to -0.0100; better on 5 of 5 documents."
    )


def test_no_difference_can_be_told_from_itself(with_results):
    found = compare(with_results, with_results)
    assert found["difference"]["nats_per_token"] == 0
    assert found["difference"]["better"] == found["difference"]["worse"] == 0
    assert verdict(found).startswith("No difference can be told")
    assert verdict(found).endswith("better on 0 of 5 documents, equal on 5.")


def shifted(results: dict, *nats: float) -> dict:
    """The same results, each document's tokens by so much dearer."""
    other = copy.deepcopy(results)
    for document, shift in zip(other["per_document"], nats, strict=True):
        document["nll"] += shift * document["tokens"]
    return other


def test_documents_that_differ_by_less_than_is_printed_are_equal(with_results):
    found = compare(with_results, shifted(with_results, 4e-5, -4e-5, 0.0, 6e-5, -0.01))
    assert (found["difference"]["better"], found["difference"]["worse"]) == (1, 1)
    assert tally(found["difference"], "better") == "better on 1 of 5 documents, equal on 3"
    assert tally(found["difference"], "worse") == "worse on 1 of 5 documents, equal on 3"


def test_a_difference_that_is_printed_as_nothing_is_none(with_results):
    """However sure it is."""
    found = compare(with_results, shifted(with_results, *[-1e-5] * 5))
    assert found["difference"]["interval"][1] < 0
    assert verdict(found).startswith("No difference can be told: B against A -0.0000 nats per token")


def first_documents(results: dict, count: int) -> dict:
    """The results of the first documents alone."""
    documents = copy.deepcopy(results["per_document"][:count])
    return {**results, "documents": count, "per_document": documents}


@pytest.mark.parametrize("count", [2, 4])
def test_fewer_than_five_documents_get_no_verdict(with_results, count):
    better = shifted(with_results, *[-0.01] * 5)
    told = verdict(compare(first_documents(with_results, count), first_documents(better, count)))
    assert told.startswith(f"No verdict, as {count} documents are too few for one: B against A -0.0100 nats per token")
    assert f"95 % interval over {count} documents -0.0100 to -0.0100; better on {count} of {count} documents" in told
    assert told.endswith("Measure both on 5 documents or more.")


def test_one_document_gets_no_interval(model, documents_of, evaluator):
    results = measure(evaluator(model), documents_of("ship"), controls=False, checkpoint="here")
    assert results["perplexity_interval"] == {"token": None, "word": None}
    found = compare(results, results)
    assert found["difference"]["interval"] is None
    assert "one document tells nothing about others" in verdict(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol.segment": 32}, "segment is 16 in the first and 32 in the second"),
        ({"protocol.stride": 4}, "stride is 16 in the first and 4 in the second"),
        ({"protocol.warmup_documents": 1}, "warmup_documents is 0 in the first and 1"),
        ({"protocol.dtype": "bfloat16"}, "dtype is float32 in the first and bfloat16"),
        ({"documents": 4}, "5 documents in the first, 4 in the second"),
        ({"tokens": 7}, "tokens in the first, 7 in the second"),
        ({"protocol.documents": "other"}, "of other tokens; was the tokenizer the same"),
        ({"per_document": []}, "the second results do not say how they were measured"),
        ({"protocol": {"segment": 16}}, "the second results do not say how they were measured"),
    ],
)
def test_what_cannot_be_compared_is_refused(with_results, change, message):
    other = copy.deepcopy(with_results)
    for key, value in change.items():
        *parents, last = key.split(".")
        inner = other
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    with pytest.raises(EvaluationError, match=message):
        compare(with_results, other)


def test_documents_of_other_names_are_refused(with_results):
    other = copy.deepcopy(with_results)
    other["per_document"].reverse()
    with pytest.raises(EvaluationError, match="their names or their order differ"):
        compare(with_results, other)


def test_a_checkpoint_below_the_working_directory_is_named_from_there(comparison, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    elsewhere = {**comparison["b"], "checkpoint": "/elsewhere/best"}
    here = {**comparison["a"], "checkpoint": str(tmp_path / "outputs" / "control")}
    first, second, *_ = format_comparison({**comparison, "a": here, "b": elsewhere}).splitlines()
    assert first.endswith("  outputs/control")
    assert second.endswith("  /elsewhere/best")


def test_the_script_prints_and_writes_the_comparison(without_results, with_results, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    script = import_module("compare")
    write_results(tmp_path / "a" / "results.json", without_results)
    write_results(tmp_path / "b.json", with_results)
    typed = ["compare.py", str(tmp_path / "a"), str(tmp_path / "b.json"), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", typed)
    script.main()
    assert capsys.readouterr().out.splitlines()[-2] == verdict(compare(without_results, with_results))
    assert json.loads((tmp_path / "comparison.json").read_text()) == compare(without_results, with_results)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*typed[:2], str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"none: there are no results of eval\.py or train\.py that can be read"):
        script.main()


def test_the_figure_is_drawn_beside_the_comparison(comparison, tmp_path):
    write_results(tmp_path / "comparison.json", comparison)
    assert plot_comparison(tmp_path / "comparison.json") == [tmp_path / "comparison.png"]
