import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from infformer.data.segments import IGNORE_INDEX, Lanes, Segment
from infformer.data.tokenization import TokenizedDocuments
from infformer.errors import DataError

Make = Callable[..., TokenizedDocuments]
LENGTHS = (23, 2, 40, 11, 6, 17, 29, 5)


def take(segments: Iterable[Segment], count: int) -> list[Segment]:
    return list(itertools.islice(segments, count))


def same(one: Segment, other: Segment) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in ((getattr(one, field.name), getattr(other, field.name)) for field in fields(Segment))
    )


def targets(segments: Iterable[Segment]) -> list[int]:
    """The predicted tokens, lane by lane within each segment."""
    return [token for segment in segments for token in segment.targets.flatten().tolist() if token != IGNORE_INDEX]


def all_targets(lengths: Iterable[int]) -> Counter[int]:
    return Counter(1000 * (document + 1) + t for document, length in enumerate(lengths) for t in range(1, length))


def visits(segments: Iterable[Segment]) -> list[tuple[int, int, int]]:
    """(document, first input, inputs) of the visits, in the order in which they were begun."""
    order: list[tuple[int, int]] = []
    sizes: Counter[tuple[int, int]] = Counter()
    current: dict[int, tuple[int, int]] = {}
    for step, segment in enumerate(segments):
        for row, lane in enumerate(segment.lanes.tolist()):
            if not segment.lengths[row]:
                continue
            if segment.reset[row]:
                current[lane] = (step, lane)
                order.append((int(segment.documents[row]), int(segment.starts[row])))
                sizes[step, lane] = 0
            sizes[current[lane]] += int(segment.lengths[row])
    return [(*visit, size) for visit, size in zip(order, (sizes[key] for key in sizes), strict=True)]


@pytest.mark.parametrize("segments_per_visit", [None, 1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_predicts_every_token_exactly_once(documents_of, segments_per_visit, shuffle):
    documents = documents_of(*LENGTHS)
    tokens = int((documents.token_counts - 1).sum())
    lanes = Lanes(documents, 1, 4, 7, shuffle=shuffle, segments_per_visit=segments_per_visit)
    for epoch in range(3):  # one lane: an epoch ends where its number of tokens is reached
        read: list[int] = []
        while len(read) < tokens:
            assert lanes.state_dict()["epoch"] <= epoch
            read += targets([next(lanes)])
        assert Counter(read) == all_targets(LENGTHS)


@pytest.mark.parametrize("segments_per_visit", [None, 2])
def test_several_lanes_read_the_queue_without_gaps(documents_of, segments_per_visit):
    documents = documents_of(*LENGTHS)
    single = visits(take(Lanes(documents, 1, 4, 7, segments_per_visit=segments_per_visit), 400))
    several = visits(take(Lanes(documents, 3, 4, 7, segments_per_visit=segments_per_visit), 100))
    several = several[:-20]  # some of the last have not been read to their end
    assert len(several) > 5 * len(LENGTHS)
    assert several == single[: len(several)]


def test_inputs_targets_and_padding_line_up(documents_of):
    for segment in take(Lanes(documents_of(*LENGTHS), 4, 6, 1, segments_per_visit=2), 60):
        assert segment.input_ids.shape == segment.targets.shape == (4, 6)
        assert segment.global_tokens == int((segment.targets != IGNORE_INDEX).sum()) == int(segment.lengths.sum())
        for row in range(4):
            length, first = int(segment.lengths[row]), 1000 * (int(segment.documents[row]) + 1) + segment.starts[row]
            assert length >= 1
            assert torch.equal(segment.input_ids[row, :length], first + torch.arange(length))
            assert torch.equal(segment.targets[row, :length], first + 1 + torch.arange(length))
            assert (segment.input_ids[row, length:] == 0).all()
            assert (segment.targets[row, length:] == IGNORE_INDEX).all()


@pytest.mark.parametrize("segments_per_visit", [None, 2])
def test_a_lane_goes_on_where_it_was_unless_reset(documents_of, segments_per_visit):
    lanes, length = 3, 4
    ends: dict[int, tuple[int, int]] = {}
    reads = [0] * lanes
    for segment in take(Lanes(documents_of(*LENGTHS), lanes, length, 5, segments_per_visit=segments_per_visit), 80):
        assert segment.reads.tolist() == reads
        for lane in range(lanes):
            place = (int(segment.documents[lane]), int(segment.starts[lane]))
            if lane not in ends or (segments_per_visit and segment.reset[lane]):
                assert segment.reset[lane]
            else:
                document, end = ends[lane]
                finished = end == LENGTHS[document] - 1
                assert bool(segment.reset[lane]) == finished
                assert place == ((document, end) if not finished else (place[0], 0))
            ends[lane] = (place[0], place[1] + int(segment.lengths[lane]))
            reads[lane] += 1


def test_a_visit_is_left_after_so_many_segments(documents_of):
    lanes = Lanes(documents_of(200, 150), 1, 5, 11, segments_per_visit=4)
    read = visits(take(lanes, 800))[:-1]
    assert max(size for _, _, size in read) == 20
    # Only the first visit of a document, and its last, may be shorter.
    assert all(start == 0 or start + size == (199, 149)[document] for document, start, size in read if size < 20)
    first_cuts = {size for document, start, size in read if start == 0 and document == 0}
    assert len(first_cuts) > 5  # another one each epoch
    assert min(first_cuts) < 10


def test_in_order_means_every_epoch_alike_and_from_the_start(documents_of):
    read = visits(take(Lanes(documents_of(12, 5), 1, 4, 3, shuffle=False, segments_per_visit=2), 9))
    assert read[:6] == [(0, 0, 8), (0, 8, 3), (1, 0, 4)] * 2


def test_seeds_and_epochs_differ(documents_of):
    documents = documents_of(*LENGTHS)

    def order(seed: int) -> list[int]:
        return [document for document, _, _ in visits(take(Lanes(documents, 1, 50, seed), 24))]

    assert order(1) == order(1)
    assert order(1) != order(2)
    epochs = [tuple(order(1)[first : first + 8]) for first in (0, 8, 16)]
    assert len(set(epochs)) == 3
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)


@pytest.mark.parametrize("segments_per_visit", [None, 2])
def test_shares_together_are_the_whole(documents_of, segments_per_visit):
    documents = documents_of(*LENGTHS)
    whole = take(Lanes(documents, 5, 4, 9, segments_per_visit=segments_per_visit), 50)
    for shares in ([range(2), range(2, 5)], [range(0, 5, 2), range(1, 5, 2)], [range(5)]):
        parts = [
            take(Lanes(documents, 5, 4, 9, segments_per_visit=segments_per_visit, rank_rows=rank_rows), 50)
            for rank_rows in shares
        ]
        for segment, *pieces in zip(whole, *parts, strict=True):
            assert all(piece.global_tokens == segment.global_tokens for piece in pieces)
            lanes = torch.cat([piece.lanes for piece in pieces])
            assert sorted(lanes.tolist()) == list(range(5))
            for name in ("input_ids", "targets", "lengths", "reset", "documents", "starts", "reads"):
                joined = torch.cat([getattr(piece, name) for piece in pieces])
                assert torch.equal(joined, getattr(segment, name)[lanes]), name


@pytest.mark.parametrize("segments_per_visit", [None, 2])
def test_resumed_at_any_step_is_never_stopped(documents_of, segments_per_visit):
    documents = documents_of(*LENGTHS)

    def lanes(rank_rows: range | None = None) -> Lanes:
        return Lanes(documents, 3, 4, 13, segments_per_visit=segments_per_visit, rank_rows=rank_rows)

    steps = 60
    whole = take(lanes(), steps)
    running, half = lanes(), lanes(range(1, 2))
    for step in range(steps):
        state = json.loads(json.dumps(running.state_dict()))
        assert state == json.loads(json.dumps(half.state_dict()))  # it knows nothing of the share
        resumed = lanes()
        resumed.load_state_dict(state)
        assert all(same(*pair) for pair in zip(take(resumed, 12), whole[step : step + 12], strict=False))
        other = lanes(range(2, 3))
        other.load_state_dict(state)
        assert torch.equal(next(other).input_ids, whole[step].input_ids[2:])
        next(running)
        next(half)
    assert running.state_dict()["epoch"] >= 2


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("training.batch_size", {"lanes": 2}),
        ("training.segment_length", {"segment_length": 5}),
        ("seed", {"seed": 2}),
        ("data.shuffle", {"shuffle": False}),
        ("data.segments_per_visit", {"segments_per_visit": None}),
    ],
)
def test_a_state_of_another_run_is_refused(documents_of, option, changes):
    options = {"lanes": 3, "segment_length": 4, "seed": 1, "shuffle": True, "segments_per_visit": 2}
    state = Lanes(documents_of(*LENGTHS), **options).state_dict()
    other = Lanes(documents_of(*LENGTHS), **(options | changes))
    (name, value) = next(iter(changes.items()))
    with pytest.raises(DataError) as error:
        other.load_state_dict(state)
    assert f"{option}: the run to be resumed had {options[name]}" in str(error.value)
    assert f"this one has {'null' if value is None else value}" in str(error.value)


def test_a_state_of_other_documents_is_refused(documents_of):
    state = Lanes(documents_of(*LENGTHS), 3, 4, 1).state_dict()
    with pytest.raises(DataError, match=r"the documents .*had print, this one has another"):
        Lanes(documents_of(*LENGTHS, fingerprint="another"), 3, 4, 1).load_state_dict(state)


def test_fewer_visits_than_lanes_are_refused(documents_of):
    documents = documents_of(10, 9)
    with pytest.raises(DataError, match=r"training.batch_size=3.* 2 documents make only 2 .*segments_per_visit=null"):
        Lanes(documents, 3, 4, 1)
    Lanes(documents, 2, 4, 1)
    Lanes(documents, 5, 4, 1, segments_per_visit=1)  # 9 inputs are 3 segments, 8 are 2
    with pytest.raises(DataError, match=r"training.batch_size=6.* make only 5 .*segments_per_visit=1"):
        Lanes(documents, 6, 4, 1, segments_per_visit=1)


def test_a_segment_moves_as_a_whole(documents_of):
    segment = next(Lanes(documents_of(9, 3), 2, 4, 1))
    moved = segment.to("meta")
    assert all(value.device.type == "meta" for value in vars(moved).values() if isinstance(value, Tensor))
    assert (moved.global_tokens, moved.is_learned) == (segment.global_tokens, segment.is_learned)
    assert same(segment, segment.to("cpu"))
    assert {name: value.dtype for name, value in vars(segment).items() if isinstance(value, Tensor)} == {
        name: torch.bool if name == "reset" else torch.int64
        for name in vars(segment)
        if name not in ("global_tokens", "is_learned")
    }
