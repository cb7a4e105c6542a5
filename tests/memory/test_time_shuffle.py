"""The fixed order against blocks that are moved one by one."""

import itertools

import pytest
import torch

from infformer.memory.time_shuffle import shuffled_entries, shuffled_positions

SOURCES = [3, 8, 13, 2, 7, 12, 1, 6, 11, 0, 5, 10, 15, 4, 9, 14]


def test_no_block_stays_and_none_follows_the_one_it_followed():
    assert sorted(SOURCES) == list(range(16))
    assert all(block != source for block, source in enumerate(SOURCES))
    assert all(after != before + 1 for before, after in itertools.pairwise(SOURCES))


def test_positions_move_block_by_block():
    within = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    positions = torch.cat([(block + within) / 16 for block in range(16)])
    expected = torch.cat([(block + within) / 16 for block in SOURCES])
    torch.testing.assert_close(shuffled_positions(positions), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(shuffled_positions(positions.view(2, -1)), expected.view(2, -1), rtol=0, atol=1e-15)


def test_both_ends_stay_inside():
    positions = shuffled_positions(torch.tensor([0.0, 1.0]))
    assert positions.tolist() == [3 / 16, 15 / 16]


@pytest.mark.parametrize("each", [1, 3])
def test_entries_move_block_by_block(each):
    expected = [each * source + entry for source in SOURCES for entry in range(each)]
    assert shuffled_entries(torch.tensor([16 * each]), 16 * each)[0].tolist() == expected


def test_rows_that_are_filled_differently_are_shuffled_apart():
    length = 21
    filled = torch.tensor([0, 1, 2, 5, 16, 20, 21])
    order = shuffled_entries(filled, length)
    for row, count in enumerate(filled.tolist()):
        missing = length - count
        assert order[row, :missing].tolist() == list(range(missing))
        assert sorted(order[row, missing:].tolist()) == list(range(missing, length))
        assert torch.equal(order[row], shuffled_entries(filled[row : row + 1], length)[0])
        blocks = [(16 * (2 * (entry - missing) + 1)) // (2 * count) for entry in order[row, missing:].tolist()]
        assert blocks == sorted(blocks, key=SOURCES.index)
        if count > 1:
            assert order[row].tolist() != list(range(length))


def test_a_queue_without_places_has_no_order():
    assert shuffled_entries(torch.zeros(3, dtype=torch.int64), 0).shape == (3, 0)
