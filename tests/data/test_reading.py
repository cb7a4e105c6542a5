from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from infformer.data.segments import IGNORE_INDEX, Segment, read_once
from infformer.data.tokenization import TokenizedDocuments
from infformer.errors import DataError

Make = Callable[..., TokenizedDocuments]
LENGTHS = (23, 2, 40, 11, 6, 17, 29, 5)
"""Of the documents; token t of document d is 1000 (d + 1) + t."""


def targets(segments: Iterable[Segment]) -> Counter[int]:
    """The predicted tokens."""
    return Counter(token for segment in segments for token in segment.targets.flatten().tolist() if token >= 0)


ALL_TARGETS = Counter(1000 * (document + 1) + t for document, length in enumerate(LENGTHS) for t in range(1, length))


def rows_of(segments: Iterable[Segment], lane: int = 0) -> list[tuple[list[int], list[int], bool]]:
    """Inputs, labels without what is not scored, and reset, of one lane's segments."""
    return [
        (
            segment.input_ids[lane, : segment.lengths[lane]].tolist(),
            [label for label in segment.targets[lane].tolist() if label != IGNORE_INDEX],
            bool(segment.reset[lane]),
        )
        for segment in segments
    ]


@pytest.mark.parametrize(("lanes", "stride"), [(1, None), (3, 4), (8, 3), (11, 2), (3, 1), (1, 3), (8, None)])
def test_every_token_is_scored_once(documents_of, lanes, stride):
    segments = list(read_once(documents_of(*LENGTHS), lanes, 4, stride=stride))
    assert targets(segments) == ALL_TARGETS
    begun = [int(document) for segment in segments for document in segment.documents[segment.reset]]
    assert begun == sorted(range(8), key=lambda document: -LENGTHS[document])
    assert all(segment.global_tokens == int((segment.targets != IGNORE_INDEX).sum()) > 0 for segment in segments)
    for segment in segments:
        for row in range(lanes):
            length, start, document = (
                int(value[row]) for value in (segment.lengths, segment.starts, segment.documents)
            )
            expected = 1000 * (document + 1) + start + torch.arange(length)
            assert torch.equal(segment.input_ids[row, :length], expected)
            scored = segment.targets[row] != IGNORE_INDEX
            assert torch.equal(segment.targets[row][scored], expected[scored[:length]] + 1)
            assert bool(segment.reset[row]) == (length > 0 and start == 0)


def test_disjoint_segments_score_all_that_they_read(documents_of):
    """Segment by segment: 9 inputs are 4, 4 and 1."""
    read = rows_of(read_once(documents_of(10), 1, 4))
    assert [len(inputs) for inputs, _, _ in read] == [4, 4, 1]
    assert [label for _, labels, _ in read for label in labels] == list(range(1001, 1010))
    assert all(len(inputs) == len(labels) for inputs, labels, _ in read)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_sliding_windows_are_those_of_the_literal_recipe(documents_of, stride):
    """From begin to begin + 4 at every stride, what the window before did not score, until the end is reached."""
    for length in (2, 4, 5, 6, 9, 10, 11, 12, 13):
        tokens = 1000 + np.arange(length)
        expected, previous = [], 0
        for begin in range(0, length - 1, stride):
            end = min(begin + 4, length - 1)
            expected.append((tokens[begin:end].tolist(), tokens[previous + 1 : end + 1].tolist(), begin == 0))
            previous = end
            if end == length - 1:
                break
        assert rows_of(read_once(documents_of(length), 1, 4, stride=stride)) == expected


@pytest.mark.parametrize(("lanes", "stride"), [(1, 2), (2, None), (5, 2)])
def test_warm_up_documents_are_read_before_and_not_scored(documents_of, lanes, stride):
    lengths = (9, 3, 6)
    documents = documents_of(*lengths)
    segments = list(read_once(documents, lanes, 4, stride=stride, warmup_documents=2))
    plain = list(read_once(documents, 1, 4, stride=stride))
    chains: dict[int, list[tuple[int, list[int], list[int]]]] = {}
    for lane in range(lanes):
        for segment in segments:
            if not segment.lengths[lane]:
                continue
            if segment.reset[lane]:
                first = int(segment.documents[lane])
                chains[first] = []
            chains[first].append(
                (
                    int(segment.documents[lane]),
                    segment.input_ids[lane, : segment.lengths[lane]].tolist(),
                    [label for label in segment.targets[lane].tolist() if label != IGNORE_INDEX],
                )
            )
    assert sorted(chains) == [0, 1, 2]
    for first, chain in chains.items():
        scored = (first + 2) % 3
        expected = []
        for document in (first, (first + 1) % 3):
            tokens = 1000 * (document + 1) + np.arange(lengths[document])
            expected += [
                (document, tokens[start : min(start + 4, len(tokens) - 1)].tolist(), [])
                for start in range(0, len(tokens) - 1, 4)
            ]
        expected += [
            (scored, inputs, labels) for inputs, labels, _ in rows_of(s for s in plain if s.documents[0] == scored)
        ]
        assert chain == expected


def test_not_enough_documents_to_warm_up_with_are_refused(documents_of):
    with pytest.raises(DataError, match="warmup_documents=2: there are 2 documents, so at most 1 others"):
        next(read_once(documents_of(5, 6), 2, 4, warmup_documents=2))


def test_idle_lanes_are_empty(documents_of):
    segments = list(read_once(documents_of(9, 3), 3, 4))
    assert len(segments) == 2
    last = segments[1]
    assert last.lengths.tolist() == [4, 0, 0]
    assert last.documents.tolist() == [0, -1, -1]
    assert last.reset.tolist() == [False, False, False]
    assert segments[0].reset.tolist() == [True, True, False]
    assert last.reads.tolist() == [1, 1, 0]
    assert last.lanes.tolist() == [0, 1, 2]
    assert (last.input_ids[1:] == 0).all()
    assert (last.targets[1:] == IGNORE_INDEX).all()


def test_shares_stay_together(documents_of):
    documents = documents_of(9, 3, 30)
    whole = list(read_once(documents, 3, 4))
    for lane in range(3):
        part = list(read_once(documents, 3, 4, rank_rows=range(lane, lane + 1)))
        assert len(part) == len(whole)
        for a, b in zip(part, whole, strict=True):
            assert a.global_tokens == b.global_tokens
            for name in ("input_ids", "targets", "lengths", "reset", "documents", "starts", "reads", "lanes"):
                assert torch.equal(getattr(a, name)[0], getattr(b, name)[lane])
