"""Sequences are drawn and sorted as by a literal loop, and the stream loses nothing of them."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infformer.data import IGNORED, DataError, Segment
from infformer.tasks.sorting_sequences import SPLITS, SortingConfig, SortingStream, draw_sequences

LENGTH, SYMBOLS = 12, 5
INPUTS = LENGTH + SYMBOLS
CONFIG = SortingConfig(length=LENGTH, symbols=SYMBOLS)


def same(one: Segment, other: Segment) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in ((getattr(one, field.name), getattr(other, field.name)) for field in fields(Segment))
    )


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
    assert draw_sequences(CONFIG, "test", [], 7).shape == (0, INPUTS + 1)
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


@pytest.mark.parametrize("segment_length", [1, 4, 5, 6, 7, 17, 20])
def test_a_step_is_a_sequence_in_segments(segment_length: int) -> None:
    """Also where the answer begins with a segment (4, 6), straddles two (7) or more, or is in the only one."""
    stream = SortingStream(CONFIG, 3, segment_length, seed=2)
    for step in range(3):
        numbers = torch.arange(3 * step, 3 * step + 3)
        tokens = torch.from_numpy(draw_sequences(CONFIG, "train", numbers.numpy(), 2))
        segments = stream.next_step()
        assert len(segments) == -(-INPUTS // segment_length)
        for index, segment in enumerate(segments):
            start = index * segment_length
            length = min(segment_length, INPUTS - start)
            assert segment.lengths.tolist() == [length] * 3
            assert segment.starts.tolist() == [start] * 3
            assert segment.reset.tolist() == [index == 0] * 3
            assert segment.reads.tolist() == [step * len(segments) + index] * 3
            assert segment.lanes.tolist() == [0, 1, 2]
            assert torch.equal(segment.documents, numbers)
            assert segment.global_tokens == int((segment.shift_labels != IGNORED).sum())
            assert torch.equal(segment.input_ids, tokens[:, start : start + length])
            assert segment.shift_labels.shape == (3, length)
            for place in range(length):
                scored = LENGTH <= start + place < INPUTS
                expected = tokens[:, start + place + 1] if scored else torch.full((3,), IGNORED)
                assert torch.equal(segment.shift_labels[:, place], expected)
        assert sum(segment.global_tokens for segment in segments) == 3 * SYMBOLS


def length_of(step: list[Segment], symbols: int = SYMBOLS) -> int:
    """Of the sequences of a step."""
    return sum(int(segment.lengths[0]) for segment in step) - symbols


def test_a_step_has_one_of_several_lengths_the_shorter_the_likelier() -> None:
    lengths = [5, 20, 40]
    stream = SortingStream(SortingConfig(symbols=SYMBOLS, training_lengths=lengths), 1, 7, seed=2)
    drawn = [length_of(stream.next_step()) for _ in range(400)]
    for step, length in enumerate(drawn):
        # 8/11, 2/11 and 1/11: in proportion to 1/length.
        uniform = np.random.default_rng([2, step]).random()
        assert length == lengths[int(uniform >= 8 / 11) + int(uniform >= 10 / 11)]
    read = [length * drawn.count(length) for length in lengths]
    assert read == pytest.approx([sum(read) / 3] * 3, rel=0.25)


def test_sequences_of_several_lengths_are_whole() -> None:
    config = SortingConfig(symbols=SYMBOLS, training_lengths=[3, 8, 15])
    stream = SortingStream(config, 3, 7, seed=2)
    seen = set()
    for step in range(30):
        segments = stream.next_step()
        length = length_of(segments)
        tokens = torch.from_numpy(draw_sequences(config, "train", range(3 * step, 3 * step + 3), 2, length))
        inputs, labels = (torch.cat([getattr(s, n) for s in segments], dim=1) for n in ("input_ids", "shift_labels"))
        assert torch.equal(inputs[:, : length + SYMBOLS], tokens[:, :-1])
        assert torch.equal(labels[:, length : length + SYMBOLS], tokens[:, length + 1 :])
        assert int((labels != IGNORED).sum()) == 3 * SYMBOLS
        assert [segment.reset.all().item() for segment in segments] == [True] + [False] * (len(segments) - 1)
        seen.add(length)
    assert seen == {3, 8, 15}


def test_no_read_is_ever_that_of_another() -> None:
    """The random numbers of sticky memories are drawn by it."""
    stream = SortingStream(SortingConfig(symbols=SYMBOLS, training_lengths=[3, 8, 15]), 2, 7, seed=2)
    reads = [int(read) for _ in range(20) for segment in stream.next_step() for read in segment.reads.unique()]
    assert reads == list(range(len(reads)))


@pytest.mark.parametrize("config", [CONFIG, SortingConfig(symbols=SYMBOLS, training_lengths=[3, 8, 15])])
def test_shares_together_are_the_whole(config: SortingConfig) -> None:
    whole = SortingStream(config, 4, 7, seed=2)
    parts = [SortingStream(config, 4, 7, seed=2, share=share) for share in (range(2, 4), [1], range(1))]
    for _ in range(3):
        for segment, *pieces in zip(whole.next_step(), *(part.next_step() for part in parts), strict=True):
            assert all(piece.global_tokens == segment.global_tokens for piece in pieces)
            for field in fields(Segment):
                if field.name != "global_tokens":
                    joined = torch.cat([getattr(piece, field.name) for piece in pieces])
                    assert torch.equal(joined, getattr(segment, field.name)[[2, 3, 1, 0]]), field.name


@pytest.mark.parametrize(("size", "lanes"), [(6, 2), (7, 3), (3, 8), (1, 2)])
def test_a_limited_number_of_sequences_comes_again_in_another_order(size: int, lanes: int) -> None:
    config = SortingConfig(length=LENGTH, symbols=SYMBOLS, training_sequences=size)
    stream = SortingStream(config, lanes, INPUTS, seed=2)
    steps = [stream.next_step()[0] for _ in range(5 * size)]
    numbers = torch.cat([segment.documents for segment in steps])
    epochs = numbers.view(-1, size).tolist()
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 2
    tokens = torch.from_numpy(draw_sequences(config, "train", numbers.numpy(), 2))
    assert torch.equal(torch.cat([segment.input_ids for segment in steps]), tokens[:, :-1])


@pytest.mark.parametrize(("size", "lengths"), [(None, []), (5, []), (None, [3, 8, 15])])
def test_resumed_at_any_step_is_never_stopped(size: int | None, lengths: list[int]) -> None:
    config = SortingConfig(length=LENGTH, training_lengths=lengths, symbols=SYMBOLS, training_sequences=size)

    def stream(share: range | None = None) -> SortingStream:
        return SortingStream(config, 3, 7, seed=2, share=share)

    running, part = stream(), stream(range(2, 3))
    states = []
    steps = []
    for _ in range(6):
        states.append(json.loads(json.dumps(running.state_dict())))
        assert part.state_dict() == states[-1]  # it knows nothing of the share
        steps.append(running.next_step())
        part.next_step()
    for step, state in enumerate(states):
        resumed = stream()
        resumed.load_state_dict(state)
        for then in steps[step:]:
            assert all(same(*pair) for pair in zip(resumed.next_step(), then, strict=True))


@pytest.mark.parametrize(
    ("option", "changes", "config"),
    [
        ("training.batch_size", {"lanes": 2}, {}),
        ("training.segment_length", {"segment_length": 5}, {}),
        ("seed", {"seed": 3}, {}),
        ("task.length", {}, {"length": 13}),
        ("task.training_lengths", {}, {"training_lengths": [5, 7]}),
        ("task.symbols", {}, {"symbols": 6}),
        ("task.training_sequences", {}, {"training_sequences": None}),
    ],
)
def test_a_state_of_another_run_is_refused(option: str, changes: dict[str, int], config: dict[str, Any]) -> None:
    options = {"lanes": 3, "segment_length": 4, "seed": 2}
    settings = {"length": LENGTH, "training_lengths": [5], "symbols": SYMBOLS, "training_sequences": 100}
    state = SortingStream(SortingConfig(**settings), **options).state_dict()
    other = SortingStream(SortingConfig(**(settings | config)), **(options | changes))
    ((name, value),) = (changes | config).items()
    with pytest.raises(DataError) as error:
        other.load_state_dict(state)
    assert f"{option}: the run to be resumed had {(options | settings)[name]}" in str(error.value)
    assert f"this one has {'null' if value is None else value}" in str(error.value)


def test_an_option_that_decides_nothing_about_the_stream_may_change() -> None:
    state = SortingStream(CONFIG, 3, 4, seed=2).state_dict()
    other = SortingConfig(length=LENGTH, symbols=SYMBOLS, test_sequences=5, evaluation_lengths=[50])
    SortingStream(other, 3, 4, seed=2).load_state_dict(state)
