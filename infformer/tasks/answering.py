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

from infformer.models.generation import Place, read_on
from infformer.models.streaming import reading
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
    """Ask a model with teacher forcing; it is left in evaluation mode. All processes together."""
    outcome = np.zeros((2, *questions.answers.shape))
    with reading(evaluator.model, evaluator.protocol.precision):
        for rows, counted, end, scores, place in _batches(evaluator, questions, title):
            outcome[:, rows[:counted]] = _answer_forced(evaluator, end, scores, place)[:, :counted]
    right, nats = evaluator.of_all_processes(outcome)[:, questions.asked]
    return Forced(right == 1, nats.astype(np.float32))


def answer(evaluator: Evaluator, questions: Questions, title: str) -> Answers:
    """Ask a model with teacher forcing and running free, and read the text once. It is left in evaluation mode.

    All processes together.
    """
    outcome = np.zeros((3, *questions.answers.shape))
    asked_anywhere = np.any(questions.asked, axis=0)
    with reading(evaluator.model, evaluator.protocol.precision):
        for rows, counted, end, scores, place in _batches(evaluator, questions, title):
            asked = torch.from_numpy(questions.asked[rows]).to(end.device)
            outcome[:2, rows[:counted]] = _answer_forced(evaluator, end, scores, place)[:, :counted]
            free = _answer_freely(evaluator, end, scores, place, asked, asked_anywhere)
            outcome[2, rows[:counted]] = free[:counted].cpu()
    right, nats, free_running = evaluator.of_all_processes(outcome)[:, questions.asked]
    return Answers(Forced(right == 1, nats.astype(np.float32)), free_running.astype(np.int64))


def _read(evaluator: Evaluator, tokens: Tensor, place: Place, scored: int = 1) -> tuple[Tensor, Place]:
    return read_on(evaluator.model, tokens, evaluator.protocol.segment_length, place, scored)


def _answer_forced(evaluator: Evaluator, end: Tensor, scores: Tensor, place: Place) -> NDArray[np.float64]:
    """Whether the last tokens are predicted, and their nats, [2, rows, end].

    Args:
        end: the last tokens, [rows, end].
        scores: of the first of them.
        place: where the rows stand before it.
    """
    if end.shape[1] > 1:
        later, _ = _read(evaluator, end[:, :-1], place, scored=end.shape[1] - 1)
        scores = torch.cat([scores, later], dim=1)
    scores = scores.float()
    nats = F.cross_entropy(scores.transpose(1, 2), end, reduction="none")
    right = scores.argmax(dim=-1) == end
    return torch.stack([right.to(nats.dtype), nats]).cpu().numpy()


def _answer_freely(
    evaluator: Evaluator, end: Tensor, scores: Tensor, place: Place, asked: Tensor, asked_anywhere: NDArray[np.bool_]
) -> Tensor:
    """The last tokens, [rows, end]: the model's own where they are asked for, the true ones elsewhere.

    Args:
        end, scores, place: as above.
        asked: which tokens are asked for in each of these rows, bool [rows, end].
        asked_anywhere: which are in any row of any process, [end]; so all processes read the same number of times.
    """
    given: list[Tensor] = []
    read = 0
    for number, token in enumerate(end.unbind(dim=1)):
        if asked_anywhere[number]:
            if read < number:
                scores, place = _read(evaluator, torch.stack(given[read:], dim=1), place)
                read = number
            token = torch.where(asked[:, number], scores[:, -1].argmax(dim=-1), token)
        given.append(token)
    return torch.stack(given, dim=1)


def _batches(
    evaluator: Evaluator, questions: Questions, title: str
) -> Iterator[tuple[Integers, int, Tensor, Tensor, Place]]:
    """Read the questions of this process up to what is asked.

    Returns:
        Which questions, how many of them count, their last tokens, the scores of the first of these, and where the rows
        stand before it.
    """
    processes, numbers = evaluator.processes, np.arange(len(questions.tokens))
    total = len(numbers[processes.rank :: processes.world_size]) * questions.tokens.shape[1]
    with Pace(title, total, "tokens", processes.progress) as pace:
        for rows, counted in evaluator.shares(numbers):
            tokens = torch.from_numpy(questions.tokens[rows]).to(evaluator.model.device)
            length = questions.answers.shape[1]
            text, end = tokens.split([tokens.shape[1] - length, length], dim=1)
            place = Place()
            for segment in text.split(evaluator.protocol.segment_length, dim=1):
                scores, place = _read(evaluator, segment, place)
                pace.advance(counted * segment.shape[1])
            yield rows, counted, end, scores, place
            pace.advance(counted * length)
