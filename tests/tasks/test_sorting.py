"""What is asked of a model that sorts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from infformer.data import DataError
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.tasks.sorting import HELD_OUT_SEED, Sorting
from infformer.tasks.sorting_accuracy import format_accuracy, measure_accuracy
from infformer.tasks.sorting_sequences import SortingConfig, draw_sequences

SEGMENT = 8
CONFIG = SortingConfig(length=18, symbols=5, validation_sequences=6, test_sequences=9, evaluation_lengths=[30, 18, 7])


@pytest.fixture
def sorting(counter: Callable) -> Sorting:
    return make(counter(5, SEGMENT))


def make(model: torch.nn.Module) -> Sorting:
    return Sorting(CONFIG, Evaluator(model=model, protocol=ReadingProtocol(SEGMENT), batch_size=4), window=10)


def test_validation_is_teacher_forced(sorting: Sorting, stubborn: Callable) -> None:
    perfect = sorting.validate()
    assert perfect.metrics == {"validation/loss": perfect.loss, "validation/accuracy": 1}
    assert perfect.loss == pytest.approx(np.log(1 + 5 * np.exp(-5)))
    assert "validation accuracy 1.000" in perfect.text
    poor = make(stubborn(5, SEGMENT)).validate()
    assert poor.metrics["validation/accuracy"] == pytest.approx(0.2)
    assert poor.loss == pytest.approx(perfect.loss + 0.8 * 5)


def test_the_final_figures_are_of_every_length(sorting: Sorting, stubborn: Callable) -> None:
    results = sorting.measure("here")
    assert [(figures["length"], figures["sequences"]) for figures in results["lengths"]] == [(18, 9), (30, 9), (7, 9)]
    assert all(figures["accuracy"] == figures["accuracy_free_running"] == 1 for figures in results["lengths"])
    assert results["protocol"] == {
        "segment": SEGMENT,
        "reset": "each sequence begins with an empty memory",
        "dtype": "float32",
        "checkpoint": "here",
    }
    model = stubborn(5, SEGMENT)
    sequences = draw_sequences(CONFIG, "test", range(9), HELD_OUT_SEED, length=30)
    expected = measure_accuracy(
        Evaluator(model=model, protocol=ReadingProtocol(SEGMENT)), sequences, 5, 10, HELD_OUT_SEED
    )
    assert make(model).measure("here")["lengths"][1] == expected


def test_the_report_is_a_file_a_table_and_a_figure(
    sorting: Sorting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = sorting.measure("here") | {"before": None}
    figures = sorting.report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert capsys.readouterr().out.splitlines() == format_accuracy(results).splitlines()
    assert [figure.relative_to(tmp_path).as_posix() for figure in figures] == ["plots/accuracy_by_position.png"]
    assert figures[0].is_file()


def test_a_sample_shows_what_is_true_and_what_is_said(sorting: Sorting, stubborn: Callable) -> None:
    (sequence,) = draw_sequences(CONFIG, "validation", [2], HELD_OUT_SEED)
    answer = " ".join(map(str, sequence[-5:]))
    assert sorting.sample(8, 64) == f"sequence 2: {answer}; the model: {answer}"
    assert make(stubborn(5, SEGMENT)).sample(2, 3) == f"sequence 2: {answer[:5]}; the model: 3 3 3"


def test_a_model_that_knows_too_few_tokens(counter: Callable) -> None:
    make(counter(6, SEGMENT))
    with pytest.raises(DataError, match=r"task.symbols=5: .* are 6 tokens, and the model knows 5: set .*vocab_size=6"):
        make(counter(4, SEGMENT))
