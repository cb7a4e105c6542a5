"""How a model answers: it reads each text segment by segment, and is asked for the tokens of the answers.

*Teacher forced*, each token is predicted from the true tokens before it. *Free running*, it is predicted from the
model's own answers before it; where nothing is asked, the true tokens stand. What a model answers does not depend on
which questions are read side by side, nor on how many processes share them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from infformer.memory.state import ModelState
from infformer.models.streaming import TextSegment, reading, remember, stream
from infformer.progress import Pace
from infformer.tasks.questions import Integers, Questions

if TYPE_CHECKING:
    from infformer.evaluation.streaming import Evaluator


@dataclass(frozen=True)
class Forced:
    """Teacher-forced answers to the tokens that are asked for, one question after the other."""

    right: NDArray[np.bool_]
    """[asked]; the true token is the most likely one."""
    nats: NDArray[np.float32]
    """[asked]; negative log-likelihood of the true token."""


@dataclass(frozen=True)
class Answers:
    """The answers to some questions, the same on every process."""

    forced: Forced
    free: Integers
    """[asked]; the tokens that the model gives free running, the most likely one each time."""


def answer_forced(evaluator: Evaluator, questions: Questions, title: str) -> Forced:
    """Ask a model with teacher forcing; it is left in evaluation mode. All processes together.

    Args:
        title: of the progress bar.
    """
    outcome = np.zeros((2, *questions.answers.shape))
    with reading(evaluator.model, evaluator.protocol.precision):
        for rows, counted, tokens in _batches(evaluator, questions, title):
            memory, start = _read_text(evaluator, tokens, questions.answers.shape[1])
            found = _answer_forced(evaluator, tokens, memory, start, questions.answers.shape[1])
            outcome[:, rows[:counted]] = found[:, :counted]
    right, nats = _of_all_processes(evaluator, outcome)[:, questions.asked]
    return Forced(right == 1, nats.astype(np.float32))


def answer(evaluator: Evaluator, questions: Questions, title: str) -> Answers:
    """Ask a model with teacher forcing and running free, and read the text once. It is left in evaluation mode.

    All processes together.

    Args:
        title: of the progress bar.
    """
    outcome = np.zeros((3, *questions.answers.shape))
    asked_anywhere = np.any(questions.asked, axis=0)
    with reading(evaluator.model, evaluator.protocol.precision):
        for rows, counted, tokens in _batches(evaluator, questions, title):
            asked = torch.from_numpy(questions.asked[rows]).to(tokens.device)
            memory, start = _read_text(evaluator, tokens, asked.shape[1])
            forced = _answer_forced(evaluator, tokens, memory, start, asked.shape[1])
            free = _answer_freely(evaluator, tokens, memory, start, asked, asked_anywhere).cpu()
            outcome[:2, rows[:counted]] = forced[:, :counted]
            outcome[2, rows[:counted]] = free[:counted]
    right, nats, free_running = _of_all_processes(evaluator, outcome)[:, questions.asked]
    return Answers(Forced(right == 1, nats.astype(np.float32)), free_running.astype(np.int64))


def _answer_forced(
    evaluator: Evaluator, tokens: Tensor, memory: ModelState | None, start: int, end: int
) -> NDArray[np.float64]:
    """Whether the last `end` tokens are predicted, and their nats, [2, rows, end]; `memory` is the state at `start`."""
    logits: list[Tensor] = []
    first = tokens.shape[1] - 1 - end  # the input from which the first of them is predicted
    for _, output in stream(evaluator.model, _segments(evaluator, tokens[:, start:-1]), memory):
        logits.append(output.logits[:, max(first - start, 0) :])
        start += output.logits.shape[1]
    scores, true = torch.cat(logits, dim=1).float(), tokens[:, -end:]
    nats = F.cross_entropy(scores.transpose(1, 2), true, reduction="none")
    right = scores.argmax(dim=-1) == true
    return torch.stack([right.to(nats.dtype), nats]).cpu().numpy()


def _answer_freely(
    evaluator: Evaluator,
    tokens: Tensor,
    memory: ModelState | None,
    start: int,
    asked: Tensor,
    asked_anywhere: NDArray[np.bool_],
) -> Tensor:
    """The last tokens, [rows, end]: the model's own where they are asked for, the true ones elsewhere.

    Args:
        asked: which tokens are asked for in each of these rows, bool [rows, end].
        asked_anywhere: which are in any row of any process, [end]; so all processes read the same number of times.
    """
    first = tokens.shape[1] - asked.shape[1]
    segment = tokens[:, start:first]
    given: list[Tensor] = []
    for place in range(asked.shape[1]):
        token = tokens[:, first + place]
        whole = segment.shape[1] == evaluator.protocol.segment_length
        if whole or asked_anywhere[place]:
            ((_, output),) = stream(evaluator.model, [TextSegment(segment)], memory)
            token = torch.where(asked[:, place], output.logits[:, -1].argmax(dim=-1), token)
            if whole:
                memory, segment = output.state, segment[:, :0]
        given.append(token)
        segment = torch.cat([segment, token.unsqueeze(1)], dim=1)
    return torch.stack(given, dim=1)


def _read_text(evaluator: Evaluator, tokens: Tensor, end: int) -> tuple[ModelState | None, int]:
    """Read the segments before the one from which the first of the last `end` tokens is predicted.

    Returns:
        The memory, and the input that comes next.
    """
    start = (tokens.shape[1] - 1 - end) // evaluator.protocol.segment_length * evaluator.protocol.segment_length
    text = _segments(evaluator, tokens[:, :start]) if start else ()
    return remember(evaluator.model, text), start


def _segments(evaluator: Evaluator, tokens: Tensor) -> Iterator[TextSegment]:
    return map(TextSegment, tokens.split(evaluator.protocol.segment_length, dim=1))


def _batches(evaluator: Evaluator, questions: Questions, title: str) -> Iterator[tuple[Integers, int, Tensor]]:
    """The questions of this process, as many side by side as the evaluator allows.

    Every process gets the same number of batches: one that has no more questions reads the first of all once more, and
    it does not count.

    Returns:
        Which questions, how many of them count, and their tokens.
    """
    processes = evaluator.processes
    own = np.arange(processes.rank, len(questions.tokens), processes.world_size)
    side_by_side = -(-evaluator.batch_size // processes.world_size)
    total = len(own) * questions.tokens.shape[1]
    with Pace(title, total, "tokens", processes.progress) as pace:
        for first in range(0, -(-len(questions.tokens) // processes.world_size), side_by_side):
            rows = own[first : first + side_by_side]
            read = rows if len(rows) else np.zeros(1, dtype=np.int64)
            tokens = torch.from_numpy(questions.tokens[read]).to(evaluator.model.device)
            yield read, len(rows), tokens
            processes.after_segment()
            pace.advance(len(rows) * tokens.shape[1])


def _of_all_processes(evaluator: Evaluator, outcome: NDArray[np.float64]) -> NDArray[np.float32]:
    """What all processes found: the sum of what each found, zero for the questions of others, which is exact."""
    own = torch.from_numpy(outcome.astype(np.float32)).to(evaluator.model.device)
    summed: NDArray[np.float32] = evaluator.processes.reduce(own).cpu().numpy()
    return summed
