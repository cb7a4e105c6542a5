"""The stream loses nothing of its questions, and goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from infformer.data.segments import IGNORE_INDEX, Segment
from infformer.errors import DataError
from infformer.tasks.associative_recall import AssociativeRecallConfig
from infformer.tasks.questions import QuestionStream
from infformer.tasks.sorting import SortingConfig, draw_sequences
from infformer.tasks.task import Material, TaskConfig

LENGTH, SYMBOLS = 12, 5
INPUTS = LENGTH + SYMBOLS
CONFIG = SortingConfig(length=LENGTH, symbols=SYMBOLS)


def stream_of(
    config: TaskConfig, lanes: int, segment_length: int, seed: int, rank_rows: Sequence[int] | None = None
) -> QuestionStream:
    rows = rank_rows or range(lanes)
    return config.build_stream(Material(None, lanes=lanes, seed=seed, rank_rows=rows, segment_length=segment_length))


def same(one: Segment, other: Segment) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in ((getattr(one, field.name), getattr(other, field.name)) for field in fields(Segment))
    )


@pytest.mark.parametrize("segment_length", [1, 4, 5, 6, 7, 17, 20])
def test_a_step_is_a_sequence_in_segments(segment_length):
    """Also where the answer begins with a segment (4, 6), straddles two (7) or more, or is in the only one."""
    stream = stream_of(CONFIG, 3, segment_length, seed=2)
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
            assert segment.global_tokens == int((segment.targets != IGNORE_INDEX).sum())
            assert torch.equal(segment.input_ids, tokens[:, start : start + length])
            assert segment.targets.shape == (3, length)
            for place in range(length):
                scored = LENGTH <= start + place < INPUTS
                expected = tokens[:, start + place + 1] if scored else torch.full((3,), IGNORE_INDEX)
                assert torch.equal(segment.targets[:, place], expected)
        assert sum(segment.global_tokens for segment in segments) == 3 * SYMBOLS


def length_of(step: list[Segment], symbols: int = SYMBOLS) -> int:
    """Of the sequences of a step."""
    return sum(int(segment.lengths[0]) for segment in step) - symbols


def test_a_step_has_one_of_several_lengths_the_shorter_the_likelier():
    lengths = [5, 20, 40]
    stream = stream_of(SortingConfig(symbols=SYMBOLS, training_lengths=lengths), 1, 7, seed=2)
    drawn = [length_of(stream.next_step()) for _ in range(400)]
    for step, length in enumerate(drawn):
        # 8/11, 2/11 and 1/11: in proportion to 1/length.
        uniform = np.random.default_rng([2, step]).random()
        assert length == lengths[int(uniform >= 8 / 11) + int(uniform >= 10 / 11)]
    read = [length * drawn.count(length) for length in lengths]
    assert read == pytest.approx([sum(read) / 3] * 3, rel=0.25)


def test_sequences_of_several_lengths_are_whole():
    config = SortingConfig(symbols=SYMBOLS, training_lengths=[3, 8, 15])
    stream = stream_of(config, 3, 7, seed=2)
    seen = set()
    for step in range(30):
        segments = stream.next_step()
        length = length_of(segments)
        tokens = torch.from_numpy(draw_sequences(config, "train", range(3 * step, 3 * step + 3), 2, length))
        inputs, labels = (torch.cat([getattr(s, n) for s in segments], dim=1) for n in ("input_ids", "targets"))
        assert torch.equal(inputs[:, : length + SYMBOLS], tokens[:, :-1])
        assert torch.equal(labels[:, length : length + SYMBOLS], tokens[:, length + 1 :])
        assert int((labels != IGNORE_INDEX).sum()) == 3 * SYMBOLS
        assert [segment.reset.all().item() for segment in segments] == [True] + [False] * (len(segments) - 1)
        seen.add(length)
    assert seen == {3, 8, 15}


def test_no_read_is_ever_that_of_another():
    """The random numbers of sticky memories are drawn by it."""
    stream = stream_of(SortingConfig(symbols=SYMBOLS, training_lengths=[3, 8, 15]), 2, 7, seed=2)
    reads = [int(read) for _ in range(20) for segment in stream.next_step() for read in segment.reads.unique()]
    assert reads == list(range(len(reads)))


@pytest.mark.parametrize("config", [CONFIG, SortingConfig(symbols=SYMBOLS, training_lengths=[3, 8, 15])])
def test_shares_together_are_the_whole(config):
    whole = stream_of(config, 4, 7, seed=2)
    parts = [stream_of(config, 4, 7, seed=2, rank_rows=rank_rows) for rank_rows in (range(2, 4), [1], range(1))]
    for _ in range(3):
        for segment, *pieces in zip(whole.next_step(), *(part.next_step() for part in parts), strict=True):
            assert all(piece.global_tokens == segment.global_tokens for piece in pieces)
            assert not any(piece.is_learned for piece in (segment, *pieces))
            for field in fields(Segment):
                if field.name not in ("global_tokens", "is_learned"):
                    joined = torch.cat([getattr(piece, field.name) for piece in pieces])
                    assert torch.equal(joined, getattr(segment, field.name)[[2, 3, 1, 0]]), field.name


@pytest.mark.parametrize(("size", "lanes"), [(6, 2), (7, 3), (3, 8), (1, 2)])
def test_a_limited_number_of_sequences_comes_again_in_another_order(size, lanes):
    config = SortingConfig(length=LENGTH, symbols=SYMBOLS, training_sequences=size)
    stream = stream_of(config, lanes, INPUTS, seed=2)
    steps = [stream.next_step()[0] for _ in range(5 * size)]
    numbers = torch.cat([segment.documents for segment in steps])
    epochs = numbers.view(-1, size).tolist()
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 2
    tokens = torch.from_numpy(draw_sequences(config, "train", numbers.numpy(), 2))
    assert torch.equal(torch.cat([segment.input_ids for segment in steps]), tokens[:, :-1])


@pytest.mark.parametrize(("size", "lengths"), [(None, []), (5, []), (None, [3, 8, 15])])
def test_resumed_at_any_step_is_never_stopped(size, lengths):
    config = SortingConfig(length=LENGTH, training_lengths=lengths, symbols=SYMBOLS, training_sequences=size)

    def stream(rank_rows: range | None = None) -> QuestionStream:
        return stream_of(config, 3, 7, seed=2, rank_rows=rank_rows)

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
def test_a_state_of_another_run_is_refused(option, changes, config):
    options = {"lanes": 3, "segment_length": 4, "seed": 2}
    settings = {"length": LENGTH, "training_lengths": [5], "symbols": SYMBOLS, "training_sequences": 100}
    state = stream_of(SortingConfig(**settings), **options).state_dict()
    other = stream_of(SortingConfig(**(settings | config)), **(options | changes))
    ((name, value),) = (changes | config).items()
    with pytest.raises(DataError) as error:
        other.load_state_dict(state)
    assert f"{option}: the run to be resumed had {(options | settings)[name]}" in str(error.value)
    assert f"this one has {'null' if value is None else value}" in str(error.value)


def test_an_option_that_decides_nothing_about_the_stream_may_change():
    state = stream_of(CONFIG, 3, 4, seed=2).state_dict()
    other = SortingConfig(length=LENGTH, symbols=SYMBOLS, test_sequences=5, evaluation_lengths=[50])
    stream_of(other, 3, 4, seed=2).load_state_dict(state)


def test_tokens_between_the_answers_are_not_scored():
    config = AssociativeRecallConfig(keys=20, values=3, queries=2, training_lengths=[16])
    questions = config.build_source(None).draw_training(np.arange(3), 2, 16)
    (segment,) = stream_of(config, 3, 15, seed=2, rank_rows=[1]).next_step()
    assert segment.global_tokens == 6
    assert segment.input_ids.tolist() == questions.tokens[1:2, :-1].tolist()
    value, _, other = questions.tokens[1, -3:].tolist()
    assert segment.targets.tolist() == [[IGNORE_INDEX] * 12 + [value, IGNORE_INDEX, other]]


def test_a_length_that_cannot_be_asked_is_refused_at_once():
    config = AssociativeRecallConfig(queries=2, training_lengths=[16, 8])
    with pytest.raises(DataError, match=r"a length of 8 .*task.queries=2 .* take 10 tokens"):
        stream_of(config, 3, 15, seed=2)


def test_a_stream_says_its_places_and_its_material_in_words():
    stream = stream_of(CONFIG, 4, 8, seed=2)
    stream.next_step()
    _, second, _ = stream.next_step()
    assert stream.locate(second) == [f"lane {lane}: sequence {4 + lane} at token 8" for lane in range(4)]
    assert stream_of(CONFIG, 3, 7, 2).describe() == "ever new sequences of length 12 to learn from"
    limited = SortingConfig(symbols=SYMBOLS, training_lengths=[64, 1024], training_sequences=8000)
    assert stream_of(limited, 3, 7, 2).describe() == "8,000 sequences of length 64, 1,024 to learn from"
