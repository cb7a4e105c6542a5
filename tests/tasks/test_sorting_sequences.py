"""Sequences are drawn and sorted as by a literal loop."""

from collections.abc import Sequence

import numpy as np
import pytest

from infformer.data import DataError
from infformer.data.options import SPLITS
from infformer.tasks.sorting_sequences import SortingConfig, SortingQuestions, as_questions, draw_sequences

LENGTH, SYMBOLS = 12, 5
CONFIG = SortingConfig(length=LENGTH, symbols=SYMBOLS)


def drawn_literally(seed: int, split: int, number: int, length: int, symbols: int) -> list[int]:
    random = np.random.Generator(np.random.Philox(key=[seed, split], counter=[0, 0, length, number]))
    weights = random.integers(1, 10, size=(2, symbols))
    initial, final = weights[0] / weights[0].sum(), weights[1] / weights[1].sum()
    sequence = []
    for j, uniform in enumerate(random.random(length), start=1):
        probabilities = (1 - j / length) * initial + j / length * final
        symbol, reached = 0, probabilities[0]
        while uniform >= reached:
            symbol += 1
            reached += probabilities[symbol]
        sequence.append(symbol)
    return sequence


def sorted_literally(sequence: Sequence[int], symbols: int) -> list[int]:
    def rank(symbol: int) -> tuple[int, int]:
        count = list(sequence).count(symbol)
        return -count, list(sequence).index(symbol) if count else symbol

    return sorted(range(symbols), key=rank)


@pytest.mark.parametrize(("length", "symbols"), [(1, 2), (1, 20), (7, 20), (40, 3), (500, 20)])
@pytest.mark.parametrize("split", SPLITS)
def test_sequences_and_answers_are_the_literal_ones(length: int, symbols: int, split: str) -> None:
    config = SortingConfig(length=length, symbols=symbols)
    for number, row in enumerate(draw_sequences(config, split, range(30), 3).tolist()):
        assert row[:length] == drawn_literally(3, SPLITS.index(split), number, length, symbols)
        assert row[length] == symbols == config.vocabulary_size - 1
        assert row[length + 1 :] == sorted_literally(row[:length], symbols)


def test_what_is_frequent_drifts() -> None:
    sequences = draw_sequences(SortingConfig(symbols=4), "train", range(200), 0, length=2000)[:, :2000]
    beginnings, ends = (
        np.stack([(part == symbol).mean(axis=1) for symbol in range(4)], axis=1)
        for part in (sequences[:, :200], sequences[:, -200:])
    )
    # Beginnings and ends follow distributions that have nothing to do with each other, but for a twentieth of mixture.
    assert abs(np.corrcoef(beginnings.ravel(), ends.ravel())[0, 1]) < 0.2
    assert beginnings.mean(axis=0) == pytest.approx(0.25, abs=0.03)
    assert ends.std(axis=0) == pytest.approx(beginnings.std(axis=0), abs=0.03)
    assert beginnings.std() > 0.09  # and what is frequent is so by far: 200 draws of a quarter alone would give 0.03


def test_a_sequence_depends_on_its_number_alone() -> None:
    whole = draw_sequences(CONFIG, "test", range(20), 7)
    assert (draw_sequences(CONFIG, "test", [13, 2, 13], 7) == whole[[13, 2, 13]]).all()
    assert draw_sequences(CONFIG, "test", [], 7).shape == (0, LENGTH + 1 + SYMBOLS)
    assert (draw_sequences(SortingConfig(symbols=SYMBOLS), "test", range(20), 7, length=LENGTH) == whole).all()
    assert len(np.unique(whole, axis=0)) == 20


@pytest.mark.parametrize("changes", [{"seed": 8}, {"split": "train"}, {"length": 101}])
def test_other_seeds_splits_and_lengths_are_other_sequences(changes: dict[str, int | str]) -> None:
    config = SortingConfig(symbols=SYMBOLS)
    options = {"split": "test", "seed": 7, "length": 100}
    one = draw_sequences(config, numbers=range(50), **options)[:, :100]
    other = draw_sequences(config, numbers=range(50), **(options | changes))[:, :100]
    # Where two sequences have nothing to do with each other, they agree at every fifth place or a little more.
    assert (one == other).mean() < 0.3


def test_bad_options() -> None:
    with pytest.raises(DataError, match="split=valid: choose one of train, validation, test"):
        draw_sequences(CONFIG, "valid", [0], 0)
    with pytest.raises(DataError, match="length=0: a sequence has at least 1 symbol"):
        draw_sequences(CONFIG, "test", [0], 0, length=0)
    for option in ("length", "training_sequences", "validation_sequences", "test_sequences"):
        with pytest.raises(ValueError, match=f"task.{option}=0: must be at least 1"):
            SortingConfig(**{option: 0})
    with pytest.raises(ValueError, match=r"task.symbols=1: must be at least 2"):
        SortingConfig(symbols=1)
    for option in ("training_lengths", "evaluation_lengths"):
        with pytest.raises(ValueError, match=rf"task.{option}=\[10, 0\]: each must be at least 1"):
            SortingConfig(**{option: [10, 0]})


def test_the_answer_is_asked_for_whole():
    sequences = draw_sequences(CONFIG, "test", range(4), 7)
    questions = as_questions(sequences, SYMBOLS)
    assert (questions.tokens == sequences).all()
    assert questions.answers.tolist() == [[0] * SYMBOLS] * 4
    assert questions.true_answers.reshape(4, SYMBOLS).tolist() == sequences[:, LENGTH + 1 :].tolist()


def test_what_is_learned_from():
    source = SortingQuestions(SortingConfig(length=9, symbols=SYMBOLS, training_sequences=7))
    assert (source.training_lengths, source.training_sequences) == ([9], 7)
    several = SortingConfig(length=9, symbols=SYMBOLS, training_lengths=[3, 5])
    assert SortingQuestions(several).training_lengths == [3, 5]
    drawn = SortingQuestions(several).draw_training(np.array([4, 1]), 2, 5)
    assert (drawn.tokens == draw_sequences(several, "train", [4, 1], 2, 5)).all()
