"""How likely a continuation is after a context of any length, which is read segment by segment with its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from infformer.evaluation.streaming import Evaluator
from infformer.memory.state import ModelState
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.streaming import TextSegment, reading, remember, stream
from infformer.progress import Pace


class Continuation(NamedTuple):
    """What is to be scored, and what it comes after."""

    context: Sequence[int]
    """Token ids, at least one."""
    tokens: Sequence[int]
    """Token ids."""


class Score(NamedTuple):
    """How a model finds a continuation."""

    log_likelihood: float
    """In nats, the sum over its tokens."""
    greedy: bool
    """Whether each of its tokens is the most likely one after those before it."""


def score_continuations(evaluator: Evaluator, requests: Sequence[Continuation], title: str) -> list[Score]:
    """Score each continuation. The model is left in evaluation mode.

    What is read is the context with the continuation after it, from an empty memory, in disjoint segments counted from
    the context's first token. The whole segments in which nothing is scored are read once for all requests that begin
    with them, so the choices of a question share the reading of its context.

    Args:
        evaluator: contexts, and then continuations, are read `batch_size` at a time; the scores do not depend on it.
        title: of the progress bar.

    Returns:
        Scores in the order of the requests.
    """
    model, segment_length = evaluator.model, evaluator.protocol.segment_length
    by_beginning: dict[tuple[int, ...], list[int]] = defaultdict(list)
    unread: list[Continuation] = []
    for number, (context, tokens) in enumerate(requests):
        whole = (len(context) - 1) // segment_length * segment_length
        by_beginning[tuple(context[:whole])].append(number)
        unread.append(Continuation(context[whole:], tokens))
    beginnings = sorted(by_beginning, key=len, reverse=True)  # the longest first, so that rows end together
    scores: dict[int, Score] = {}
    with (
        reading(model, evaluator.protocol.precision),
        Pace(title, len(requests), "requests", evaluator.processes.progress) as pace,
    ):
        for first in range(0, len(beginnings), evaluator.batch_size):
            side_by_side = beginnings[first : first + evaluator.batch_size]
            memory = model.initial_state(len(side_by_side))
            memory = remember(model, _segments(evaluator, side_by_side), memory)
            following = [(row, number) for row, begun in enumerate(side_by_side) for number in by_beginning[begun]]
            following.sort(key=lambda pair: sum(map(len, unread[pair[1]])), reverse=True)
            for start in range(0, len(following), evaluator.batch_size):
                rows, numbers = zip(*following[start : start + evaluator.batch_size], strict=True)
                own = memory.select_rows(torch.tensor(rows, device=model.device))
                scores.update(zip(numbers, _score(evaluator, [unread[number] for number in numbers], own), strict=True))
                pace.advance(len(numbers))
    return [scores[number] for number in range(len(requests))]


def _score(evaluator: Evaluator, requests: Sequence[Continuation], memory: ModelState) -> list[Score]:
    """Scores of what follows a memory each."""
    inputs = [[*context, *tokens][:-1] for context, tokens in requests]
    targets = [[IGNORE_INDEX] * (len(context) - 1) + [*tokens] for context, tokens in requests]
    nats = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    segments = list(_segments(evaluator, inputs, targets))
    outputs = stream(evaluator.model, segments, memory, return_logits=True)
    for segment, (_, output) in zip(segments, outputs, strict=True):
        # On the CPU before it becomes float64, which not every accelerator has.
        nats += output.token_losses.cpu().double().sum(dim=1)
        right = (output.logits.argmax(dim=-1) == segment.targets) | (segment.targets == IGNORE_INDEX)
        greedy &= right.all(dim=1).cpu()
    return [Score(-loss, likely) for loss, likely in zip(nats.tolist(), greedy.tolist(), strict=True)]


def _segments(
    evaluator: Evaluator, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None = None
) -> Iterator[TextSegment]:
    """Rows of unequal length, segment by segment; after a row's end its length is 0."""
    segment_length, device = evaluator.protocol.segment_length, evaluator.model.device

    def pad(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, padding).to(device)

    for start in range(0, max(map(len, inputs)), segment_length):
        cut = slice(start, start + segment_length)
        lengths = torch.tensor([len(row[cut]) for row in inputs], device=device)
        scored = None if targets is None else pad([row[cut] for row in targets], IGNORE_INDEX)
        yield TextSegment(pad([row[cut] for row in inputs], 0), scored, lengths)
