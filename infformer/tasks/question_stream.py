"""The questions that a model learns from, as the segments of its lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from infformer.data.lanes import IGNORE_INDEX, Segment, check_identity
from infformer.tasks.questions import Integers, QuestionSource


class QuestionStream:
    """Questions without end: in one step every lane reads a new one, from an empty memory.

    Lane l of step s reads the question number s · lanes + l of the stream, on whichever process. The questions of a
    step are equally long; of several lengths each step draws one, with a probability ∝ 1/length, so that as much is
    read of each.

    Args:
        source: of the questions.
        lanes: lanes of the global batch.
        segment_length: inputs of a segment.
        seed: decides on the questions and their order.
        rank_rows: the lanes whose segments are wanted; None: all.

    Raises:
        DataError: there are no questions of one of the lengths.
    """

    def __init__(
        self,
        source: QuestionSource,
        lanes: int,
        segment_length: int,
        seed: int,
        rank_rows: Sequence[int] | None = None,
    ) -> None:
        self._source = source
        self._lanes = lanes
        self._segment_length = segment_length
        self._seed = seed
        self._rank_rows = np.arange(lanes) if rank_rows is None else np.array(rank_rows, dtype=np.int64)
        self._step = 0
        self._reads = 0
        # What a saved state must agree with, by the option that says it.
        self._identity: dict[str, Any] = {
            "training.batch_size": lanes,
            "training.segment_length": segment_length,
            "seed": seed,
            **source.identity,
        }
        for length in source.training_lengths:
            source.draw_training(np.zeros(1, dtype=np.int64), seed, length)  # what cannot be asked is said at once

    def next_step(self) -> list[Segment]:
        """The next question of every lane of this process, in segments, of which the last may be shorter."""
        numbers = self._numbers()
        # Of all lanes, as every process must know how many tokens are asked for in all of them.
        questions = self._source.draw_training(numbers, self._seed, self._length())
        tokens = torch.from_numpy(questions.tokens)
        end = questions.answers.shape[1]
        labels = tokens[:, -end:].masked_fill(~torch.from_numpy(questions.asked), IGNORE_INDEX)
        labels = F.pad(labels, (tokens.shape[1] - 1 - end, 0), value=IGNORE_INDEX)
        segments = []
        for index, (segment_inputs, segment_labels) in enumerate(
            zip(
                tokens[:, :-1].split(self._segment_length, dim=1),
                labels.split(self._segment_length, dim=1),
                strict=True,
            )
        ):
            rows = len(self._rank_rows)
            segments.append(
                Segment(
                    input_ids=segment_inputs[self._rank_rows],
                    targets=segment_labels[self._rank_rows],
                    lengths=torch.full((rows,), segment_inputs.shape[1]),
                    reset=torch.full((rows,), index == 0),
                    documents=torch.from_numpy(numbers[self._rank_rows]),
                    starts=torch.full((rows,), index * self._segment_length),
                    reads=torch.full((rows,), self._reads + index),
                    lanes=torch.from_numpy(self._rank_rows.copy()),
                    global_tokens=int((segment_labels != IGNORE_INDEX).sum()),
                )
            )
        self._step += 1
        self._reads += len(segments)
        return segments

    def state_dict(self) -> dict[str, Any]:
        """Where the reading stands, as JSON; it is the same on every process, and fits any number of them."""
        return {"identity": dict(self._identity), "step": self._step, "reads": self._reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the state was taken.

        Raises:
            DataError: the state was taken with other options.
        """
        check_identity(state["identity"], self._identity, "stream")
        self._step, self._reads = state["step"], state["reads"]

    def describe(self) -> str:
        """What there is to learn from, in words."""
        size = self._source.training_sequences
        lengths = ", ".join(f"{length:,}" for length in self._source.training_lengths)
        return f"{'ever new' if size is None else f'{size:,}'} sequences of length {lengths} to learn from"

    def _length(self) -> int:
        """Of this step's questions."""
        lengths = np.array(self._source.training_lengths, dtype=np.float64)
        often = (1 / lengths) / (1 / lengths).sum()
        return int(np.random.default_rng([self._seed, self._step]).choice(lengths, p=often))

    def _numbers(self) -> Integers:
        """Of the questions that the lanes of the global batch read in this step."""
        places = np.arange(self._step * self._lanes, (self._step + 1) * self._lanes)
        size = self._source.training_sequences
        if size is None:
            return places
        epochs, places = np.divmod(places, size)
        first, last = epochs[0], epochs[-1]
        orders = [np.random.default_rng([self._seed, epoch]).permutation(size) for epoch in range(first, last + 1)]
        return np.stack(orders)[epochs - first, places]
