"""A queue against a plain list for each row."""

import pytest
import torch
from torch import Tensor

from infformer.memory.short_term import Queue
from infformer.memory.time_shuffle import shuffled_entries

BATCH, HIDDEN = 3, 4


def entries(count: int, seed: int) -> Tensor:
    return torch.randn(BATCH, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rows(*written: int) -> Tensor:
    return torch.tensor([row in written for row in range(BATCH)])


EVERY_ROW = rows(0, 1, 2)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 12])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_queue_equals_a_list(length, count):
    """Rows are written at different times; what leaves a full queue leaves the list, in its order."""
    queue = Queue.empty(BATCH, length, HIDDEN)
    lists: list[list[Tensor]] = [[] for _ in range(BATCH)]
    for step, written in enumerate([(0, 1), (1,), (0, 1, 2), (), (1, 2), (0, 1, 2), (1,), (0, 1, 2)]):
        new = entries(count, seed=step)
        before = queue
        queue, leaving = queue.push(new, rows(*written))
        assert queue.length == length
        assert leaving.shape == new.shape
        for row in range(BATCH):
            if row in written:
                full = len(lists[row]) == length
                lists[row] += new[row]
                surplus = max(len(lists[row]) - length, 0)
                left, lists[row] = lists[row][:surplus], lists[row][surplus:]
                if full:
                    assert torch.equal(leaving[row], torch.stack(left))
            else:
                assert torch.equal(queue.entries[row], before.entries[row])
            real = queue.real[row]
            assert queue.filled[row] == len(lists[row]) == real.sum()
            for entry, expected in zip(queue.entries[row][real], lists[row], strict=True):
                assert torch.equal(entry, expected)
            assert (queue.entries[row][~real] == 0).all()
            assert real.tolist() == sorted(real.tolist())  # the newest at the end


def test_what_is_kept_has_no_gradient_and_what_leaves_has_its_own():
    queue, _ = Queue.empty(BATCH, 5, HIDDEN).push(entries(5, seed=0), EVERY_ROW)
    new = entries(7, seed=1).requires_grad_()
    after, leaving = queue.push(new, EVERY_ROW)
    assert not after.entries.requires_grad
    leaving.sum().backward()  # the 5 of the queue, and the first 2 of the new ones
    assert torch.equal(new.grad, (torch.arange(7) < 2).float().view(1, 7, 1).expand_as(new))


def test_a_queue_of_no_length_hands_everything_on():
    new = entries(3, seed=0).requires_grad_()
    after, leaving = Queue.empty(BATCH, 0, HIDDEN).push(new, rows(0, 2))
    assert torch.equal(leaving, new)
    assert leaving.requires_grad
    assert after.entries.shape == (BATCH, 0, HIDDEN)
    assert after.real.shape == (BATCH, 0)
    assert after.filled.tolist() == [0, 0, 0]


def test_the_old_queue_is_not_changed():
    queue, _ = Queue.empty(BATCH, 4, HIDDEN).push(entries(3, seed=0), EVERY_ROW)
    kept = queue.map_tensors(Tensor.clone)
    queue.push(entries(2, seed=1), EVERY_ROW)
    assert torch.equal(queue.entries, kept.entries)
    assert torch.equal(queue.filled, kept.filled)


def test_the_type_is_kept():
    """Whatever the type of the hidden states: rows of one state are of one type."""
    queue = Queue.empty(BATCH, 4, HIDDEN)
    after, leaving = queue.push(entries(4, seed=0).bfloat16(), EVERY_ROW)
    assert after.entries.dtype == queue.entries.dtype == torch.float32
    assert torch.equal(after.entries, entries(4, seed=0).bfloat16().float())
    assert leaving.dtype == torch.bfloat16


def test_a_reset_row_is_an_empty_one():
    queue, _ = Queue.empty(BATCH, 4, HIDDEN).push(entries(4, seed=0), EVERY_ROW)
    reset = queue.reset_rows(rows(1))
    assert reset.real.sum(1).tolist() == [4, 0, 4]
    again, _ = reset.push(entries(2, seed=1), EVERY_ROW)
    fresh, _ = Queue.empty(BATCH, 4, HIDDEN).push(entries(2, seed=1), EVERY_ROW)
    assert torch.equal(again.entries[1], fresh.entries[1])
    assert again.filled.tolist() == [4, 2, 4]


def test_a_queue_is_shuffled_in_time_row_by_row():
    """The order is that of `time_shuffle`; the numbers of the entries stand in the entries."""
    length = 18
    filled = torch.tensor([0, 7, 18])
    numbers = torch.arange(1.0, length + 1).view(1, -1, 1).expand(BATCH, -1, HIDDEN)
    queue = Queue(numbers * (numbers[..., 0] > length - filled.unsqueeze(-1)).unsqueeze(-1), filled)
    shuffled = queue.shuffle_time()
    assert torch.equal(shuffled.filled, filled)
    for row, order in enumerate(shuffled_entries(filled, length)):
        assert torch.equal(shuffled.entries[row], queue.entries[row, order])
    assert (shuffled.entries[0] == 0).all()
    assert not torch.equal(shuffled.entries[1], queue.entries[1])
