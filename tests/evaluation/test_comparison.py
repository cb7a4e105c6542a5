"""Two results compared document by document."""

import copy
import json
import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from infformer.errors import UserError
from infformer.evaluation.comparison import compare, tally, verdict, verdict_on_memory
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
        "-0.0100 to -0.0100; better on 5 of 5 documents; what of that is specific to the document is not known (A and "
        "B: measured without controls (controls=false))."
    )


def test_no_difference_can_be_told_from_itself(with_results):
    found = compare(with_results, with_results)
    assert found["difference"]["nats_per_token"] == 0
    assert found["difference"]["better"] == found["difference"]["worse"] == 0
    assert verdict(found).startswith("No difference can be told")
    assert "; better on 0 of 5 documents, equal on 5; what of that is" in verdict(found)


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
    assert told.endswith(". Measure both on 5 documents or more.")


def controlled(results: dict, another: float, off: float) -> dict:
    """The same results, with another document's memory and with none by so much dearer."""
    shifts = {"memory_off": off, "memory_of_another_document": another}
    return {**results, "controls": {name: shifted(results, *[shift] * 5) for name, shift in shifts.items()}}


class TestTheParts:
    """Of what a model is better: by its document, by the presence of a memory, and by all else."""

    def test_they_are_differences_between_situations_and_add_up(self, without_results, model, documents, evaluator):
        measured = measure(evaluator(model), documents, controls=True, checkpoint="with")
        found = compare(without_results, measured)
        own, off = measured["nll"], measured["controls"]["memory_off"]["nll"]
        another = measured["controls"]["memory_of_another_document"]["nll"]
        expected = {
            "specific": own - another,
            "presence": another - off,
            "without_memory": off - without_results["nll"],
        }
        for part, nats in expected.items():
            assert found["parts"][part]["nats_per_token"] == pytest.approx(nats / measured["tokens"])
        assert sum(part["nats_per_token"] for part in found["parts"].values()) == pytest.approx(
            found["difference"]["nats_per_token"]
        )
        # A control of the same length is better by so much on each document: the interval is of these differences.
        assert compare(measured, without_results)["parts"]["specific"]["interval"] == pytest.approx(
            [-bound for bound in reversed(found["parts"]["specific"]["interval"])]
        )

    def test_a_gain_that_any_memory_brings_is_named_in_the_verdict(self, with_results, without_results):
        """As a real model of 30 layers had it: +0.0112 without memory, +0.0001 with another document's."""
        better = controlled(shifted(without_results, *[-0.0112] * 5), 0.00001, 0.0112)
        better["protocol"] = with_results["protocol"]
        told = verdict(compare(without_results, better))
        assert told.startswith(
            "B reads better than A, but by nothing that can be told to be specific to the document: -0.0112 nats per "
            "token (perplexity -1.11 %), "
        )
        assert told.endswith(
            "Of that, -0.0000 (95 %: -0.0000 to -0.0000) is specific to the document, -0.0112 (95 %: -0.0112 to "
            "-0.0112) the mere presence of a memory, and +0.0000 (95 %: +0.0000 to +0.0000) is there with memories off."
        )
        judged = verdict_on_memory(better)
        assert judged.endswith("its mere presence: nothing that it gains can be told to be specific to the document")

    def test_a_gain_that_only_its_own_memory_brings_is_named_too(self, with_results, without_results):
        better = controlled(shifted(without_results, *[-0.5] * 5), 0.25, 0.125)
        better["protocol"] = with_results["protocol"]
        told = verdict(compare(without_results, better))
        assert told.startswith("B reads better than A, in part by what is specific to the document: -0.5000 nats")
        assert "Of that, -0.2500 (95 %: -0.2500 to -0.2500) is specific to the document, +0.1250 (95 %" in told
        assert verdict_on_memory(better) == (
            "the memory changes -0.2500 (95 %: -0.2500 to -0.2500) nats per token by what is specific to the document, "
            "+0.1250 (95 %: +0.1250 to +0.1250) by its mere presence: it gains by its document"
        )

    def test_between_two_memories_they_are_differences_of_differences(self, with_results):
        one, other = controlled(with_results, 0.5, 0.5), controlled(with_results, 0.75, 0.25)
        parts = compare(one, other)["parts"]
        found = [parts[part]["nats_per_token"] for part in ("specific", "presence", "without_memory")]
        assert found == pytest.approx([-0.25, 0.5, -0.25])

    def test_models_without_memory_have_none_and_say_nothing(self, without_results):
        found = compare(without_results, shifted(without_results, *[-0.01] * 5))
        assert found["parts"] is None
        assert verdict(found).endswith("; better on 5 of 5 documents.")
        assert verdict_on_memory(without_results) is None

    def test_runs_without_controls_say_so(self, without_results, with_results):
        found = compare(without_results, with_results)
        assert found["parts"] is None
        assert "is not known (B: measured without controls (controls=false))." in verdict(found)
        assert verdict_on_memory(with_results).endswith("not known: measured without controls (controls=false)")

    def test_a_single_document_has_no_other(self, model, documents_of, evaluator):
        results = measure(evaluator(model), documents_of("ship"), controls=True, checkpoint="here")
        assert verdict_on_memory(results).endswith("measured on 1 document, too few for another document's memory")


class TestAcrossProtocols:
    """A memory behind short segments against the same text in a longer window."""

    @pytest.fixture(scope="class")
    @classmethod
    def windows(cls, without_memory, documents, evaluator):
        return measure(evaluator(without_memory, stride=4), documents, controls=False, checkpoint="windows")

    def test_both_protocols_and_both_costs_are_in_the_verdict(self, windows, with_results):
        costs = {"state_bytes": 3 * 2**20, "batch_size": 3, "processes": 1, "device": "cpu, 1 threads"}
        with_results = {**with_results, "cost": {**costs, "seconds_per_token": 0.0125, "window_bytes": 2**20}}
        windows = {**windows, "cost": {**costs, "seconds_per_token": 0.5, "window_bytes": 2**23}}
        told = verdict(compare(windows, with_results, across_protocols=True))
        assert told.endswith(
            " A read windows of 16, stride 4, float32, at 500 ms a token, with 11 MiB held for a text; B read disjoint "
            "segments of 16, float32, at 12.5 ms a token, with 4 MiB held for a text."
        )
        windows["cost"]["device"] = "another"
        told = verdict(compare(windows, with_results, across_protocols=True))
        assert told.endswith("The times are of other machines or batches.")
        del windows["cost"]
        told = verdict(compare(windows, with_results, across_protocols=True))
        assert "A read windows of 16, stride 4, float32, at a cost that was not recorded (measure again);" in told

    def test_positions_are_compared_and_recency_only_where_the_tokens_are_the_same(self, windows, with_results):
        found = compare(windows, with_results, across_protocols=True)
        assert found["protocol"] == "windows of 16, stride 4, float32 against disjoint segments of 16, float32"
        assert [place["tokens"] for place in found["by_position"]] == [
            place["tokens"] for place in with_results["by_position"]
        ]
        assert {place["previous_occurrence"] for place in found["by_recency"]} == {"never"}

    def test_other_documents_or_precisions_stay_refused(self, windows, with_results):
        other = {**windows, "protocol": {**windows["protocol"], "dtype": "bfloat16"}}
        with pytest.raises(EvaluationError, match="dtype is bfloat16 in the first and float32"):
            compare(other, with_results, across_protocols=True)

    def test_who_forgets_the_option_is_told_of_it(self, windows, with_results):
        with pytest.raises(
            EvaluationError, match=r"stride is 4 in the first .*, or compare .* with --across-protocols"
        ):
            compare(windows, with_results)


def test_a_token_costs_time_and_holds_a_state_and_a_window(model, documents, evaluator):
    """Two layers of 16 numbers, keys and values of 16 tokens, float32; beside them the state of one text."""
    results = measure(evaluator(model), documents, controls=False, checkpoint="here")
    cost = results["cost"]
    assert 0 < cost["seconds_per_token"] < 60
    assert cost["window_bytes"] == 16 * 2 * 2 * 16 * 4
    assert cost["state_bytes"] == sum(part.nbytes for part in model.initial_state(1).named_tensors().values()) > 0
    assert (cost["batch_size"], cost["processes"]) == (3, 1)


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
    typed = ["compare.py", str(tmp_path / "a"), str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", [*typed, "--folder", str(tmp_path / "found")])
    script.main()
    assert capsys.readouterr().out.splitlines()[-2] == verdict(compare(without_results, with_results))
    assert json.loads((tmp_path / "found" / "comparison.json").read_text()) == compare(without_results, with_results)
    assert (tmp_path / "found" / "comparison.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*typed[:2], str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"none: there are no results of eval\.py or train\.py that can be read"):
        script.main()


def test_a_perplexity_that_no_number_holds_is_compared_all_the_same(without_results, with_results, tmp_path):
    """As that per word of a text without blanks, which is one word; the file has null there."""
    files = []
    for name, results in {"a": without_results, "b": with_results}.items():
        own = copy.deepcopy(results)
        own["perplexity"] = {"token": math.inf, "word": math.inf}
        if name == "b":
            for document in own["per_document"]:
                document["nll"] += 1000 * document["tokens"]
        write_results(tmp_path / f"{name}.json", own)
        files.append(json.loads((tmp_path / f"{name}.json").read_text()))
    shown = format_comparison(compare(*files))
    assert shown.startswith("A: perplexity inf per token, inf per word (")
    assert "(perplexity +inf %)" in shown


def test_no_comparison_is_written_over_another(without_results, with_results, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "control" / "results.json", without_results)
    for name in ("long_term", "sticky", "sticky"):  # one after the other, and one again
        write_results(tmp_path / name / "results.json", with_results)
        assert f"drawn: outputs/comparison/control_{name}/comparison.png" in run_script("compare", "control", name)
    said = run_script("compare", "sticky", "long_term", "--folder", "outputs/comparison/control_sticky")
    assert said.startswith("error: --folder=outputs/comparison/control_sticky is not empty: name a new folder")


def test_the_figure_is_drawn_beside_the_comparison(comparison, tmp_path):
    write_results(tmp_path / "comparison.json", comparison)
    assert plot_comparison(tmp_path / "comparison.json") == [tmp_path / "comparison.png"]
