"""Pairs and queries as the layout says, the pairs asked for at their depths."""

import numpy as np
import pytest

from infformer.errors import DataError
from infformer.tasks.associative_recall import AssociativeRecallConfig

CONFIG = AssociativeRecallConfig(keys=30, values=4, queries=3)
LENGTH, PAIRS = 2 + 2 * 21 + 2 * 3, 21
SOURCE = CONFIG.build_source(None)


def depths(*rows: list[float]) -> np.ndarray:
    return np.array(rows)


def test_a_text_is_pairs_and_then_some_of_them_again():
    wanted = np.random.default_rng(0).random((40, 3))
    questions = SOURCE.draw("test", range(40), 7, LENGTH, wanted)
    assert questions.tokens.shape == (40, LENGTH)
    assert questions.answers.tolist() == [[0, -1, 1, -1, 2]] * 40
    for row, depth in zip(questions.tokens.tolist(), wanted, strict=True):
        assert row[0] == row[1 + 2 * PAIRS] == 0
        keys, values = row[1 : 1 + 2 * PAIRS : 2], row[2 : 2 + 2 * PAIRS : 2]
        assert len(set(keys)) == PAIRS
        assert all(1 <= key <= 30 for key in keys)
        assert all(31 <= value <= 34 for value in values)
        asked = row[2 + 2 * PAIRS :]
        places = [keys.index(key) for key in asked[::2]]
        assert [values[place] for place in places] == asked[1::2]
        assert len(set(places)) == 3
        assert places[0] == round(depth[0] * 20)
        assert all(abs(place - 20 * where) <= 2.5 for place, where in zip(places, depth, strict=True))
    assert questions.true_answers.tolist() == questions.tokens[:, [-5, -3, -1]].ravel().tolist()
    assert CONFIG.vocabulary_size == 35


def test_two_queries_at_one_depth_are_of_neighbours():
    (row,) = SOURCE.draw("test", [0], 7, LENGTH, depths([0.5, 0.5, 1])).tokens.tolist()
    keys = row[1 : 1 + 2 * PAIRS : 2]
    assert [keys.index(key) for key in row[2 + 2 * PAIRS :: 2]] == [10, 9, 20]


def test_a_text_depends_on_its_number_and_depths_alone():
    wanted = np.random.default_rng(1).random((20, 3))
    whole = SOURCE.draw("test", range(20), 7, LENGTH, wanted).tokens
    assert (SOURCE.draw("test", [13, 2], 7, LENGTH, wanted[[13, 2]]).tokens == whole[[13, 2]]).all()
    assert len(np.unique(whole, axis=0)) == 20
    # The same text, asked for other pairs.
    others = SOURCE.draw("test", range(20), 7, LENGTH, 1 - wanted).tokens
    assert (others[:, : 2 + 2 * PAIRS] == whole[:, : 2 + 2 * PAIRS]).all()
    assert (others != whole).any(axis=1).all()
    for changes in ({"split": "train"}, {"seed": 8}, {"length": LENGTH + 2}):
        options = {"split": "test", "seed": 7, "length": LENGTH} | changes
        assert (SOURCE.draw(numbers=range(20), depths=wanted, **options).tokens[:, :LENGTH] != whole).any(axis=1).all()


def test_depths_of_training_are_anywhere():
    source = AssociativeRecallConfig(keys=100, queries=1).build_source(None)
    tokens = source.draw_training(np.arange(400), 3, 204).tokens
    places = [row[1:201:2].index(row[-2]) for row in tokens.tolist()]
    assert np.histogram(places, bins=4, range=(0, 100))[0].tolist() == pytest.approx([100] * 4, abs=35)
    again = source.draw_training(np.array([17, 5]), 3, 204).tokens
    assert (again == tokens[[17, 5]]).all()


@pytest.mark.parametrize(
    ("length", "says"),
    [
        (13, r"a length of 13 \(task.lengths, .*task.queries=3 .* take 14 tokens"),
        (12, "a length of 12 .* choose even lengths of at least that"),
        (51, "a length of 51 .* choose even lengths"),
        (100, "task.keys=30: a text of 100 tokens has 46 pairs.* set task.keys=46 or more"),
    ],
)
def test_lengths_that_there_are_not_are_refused(length, says):
    SOURCE.draw("test", [0], 0, 14, depths([0, 0, 0]))
    with pytest.raises(DataError, match=says):
        SOURCE.draw("test", [0], 0, length, depths([0, 0, 0]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keys": 0}, "task.keys=0: must be at least 1"),
        ({"values": 1}, "task.values=1: must be at least 2"),
        ({"queries": 0}, "task.queries=0: must be at least 1"),
        ({"depths": [0.5, 1.5]}, r"task.depths=\[0.5, 1.5\]: name one at least, each from 0"),
        ({"depths": []}, r"task.depths=\[\]: name one"),
        ({"lengths": []}, r"task.lengths=\[\]: name one"),
        ({"training_lengths": [64, 0]}, r"task.training_lengths=\[64, 0\]: .* at least 1 token"),
        ({"test_questions": 0}, "task.test_questions=0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        AssociativeRecallConfig(**options)
