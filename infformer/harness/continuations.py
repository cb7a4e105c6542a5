"""How likely a continuation is after a context of any length, which is read segment by segment with its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from infformer.evaluation.reading import Evaluator
from infformer.memory.state import ModelState
from infformer.models.chunked_loss import IGNORE_INDEX


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


@torch.inference_mode()
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
    evaluator.model.eval()
    device = evaluator.model.device
    by_beginning: dict[tuple[int, ...], list[int]] = defaultdict(list)
    unread: list[Continuation] = []
    for number, (context, tokens) in enumerate(requests):
        whole = (len(context) - 1) // evaluator.segment_length * evaluator.segment_length
        by_beginning[tuple(context[:whole])].append(number)
        unread.append(Continuation(context[whole:], tokens))
    beginnings = sorted(by_beginning, key=len, reverse=True)  # the longest first, so that rows end together
    scores: dict[int, Score] = {}
    with (
        torch.autocast(device.type, evaluator.precision, enabled=evaluator.precision != torch.float32),
        tqdm(total=len(requests), desc=title, disable=None if evaluator.progress else True) as bar,
    ):
        for first in range(0, len(beginnings), evaluator.batch_size):
            side_by_side = beginnings[first : first + evaluator.batch_size]
            memory = _read(evaluator, side_by_side)
            following = [(row, number) for row, begun in enumerate(side_by_side) for number in by_beginning[begun]]
            following.sort(key=lambda pair: sum(map(len, unread[pair[1]])), reverse=True)
            for start in range(0, len(following), evaluator.batch_size):
                rows, numbers = zip(*following[start : start + evaluator.batch_size], strict=True)
                own = memory.select_rows(torch.tensor(rows, device=device))
                scores.update(zip(numbers, _score(evaluator, [unread[number] for number in numbers], own), strict=True))
                bar.update(len(numbers))
    return [scores[number] for number in range(len(requests))]


def _read(evaluator: Evaluator, beginnings: Sequence[Sequence[int]]) -> ModelState:
    """The memory after beginnings of whole segments, which may be none."""
    memory = evaluator.model.initial_state(len(beginnings))
    for start in range(0, max(map(len, beginnings)), evaluator.segment_length):
        tokens, lengths = _segment(evaluator, beginnings, start, padding=0)
        memory = evaluator.model(tokens, state=memory, lengths=lengths, return_logits=False).state
    return memory


def _score(evaluator: Evaluator, requests: Sequence[Continuation], memory: ModelState) -> list[Score]:
    """Scores of what follows a memory each."""
    inputs = [[*context, *tokens][:-1] for context, tokens in requests]
    labels = [[IGNORE_INDEX] * (len(context) - 1) + [*tokens] for context, tokens in requests]
    nats = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    for start in range(0, max(map(len, inputs)), evaluator.segment_length):
        tokens, lengths = _segment(evaluator, inputs, start, padding=0)
        targets, _ = _segment(evaluator, labels, start, padding=IGNORE_INDEX)
        output = evaluator.model(tokens, state=memory, targets=targets, lengths=lengths, return_logits=True)
        memory = output.state
        # On the CPU before it becomes float64, which not every accelerator has.
        nats += output.token_losses.cpu().double().sum(dim=1)
        greedy &= ((output.logits.argmax(dim=-1) == targets) | (targets == IGNORE_INDEX)).all(dim=1).cpu()
    return [Score(-loss, likely) for loss, likely in zip(nats.tolist(), greedy.tolist(), strict=True)]


def _segment(evaluator: Evaluator, rows: Sequence[Sequence[int]], start: int, padding: int) -> tuple[Tensor, Tensor]:
    """The segment of each row that begins at `start`, [rows, length], and the lengths, [rows]; 0 after a row's end."""
    segments = [row[start : start + evaluator.segment_length] for row in rows]
    lengths = [len(segment) for segment in segments]
    padded = [[*segment, *[padding] * (max(lengths) - len(segment))] for segment in segments]
    device = evaluator.model.device
    return torch.tensor(padded, dtype=torch.long, device=device), torch.tensor(lengths, device=device)
