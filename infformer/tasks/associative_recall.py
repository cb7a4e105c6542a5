"""Associative recall: pairs of a key and its value, then some of the keys, each followed by its value.

    | key value key value … key value | key value … key value

All keys of a text are different, and every key that is asked for belongs to one pair. The separator | is the token 0,
the keys are the next ones, then come the values. Nothing but pairs stands in the text: a longer one has more of them to
remember.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infformer.data.options import SPLITS
from infformer.errors import DataError
from infformer.options import check_at_least
from infformer.tasks.questions import NOT_ASKED, Floats, Integers, Questions, random_of
from infformer.tasks.retrieval import RetrievalConfig, RetrievalSource
from infformer.tasks.task import Material


@dataclass
class AssociativeRecallConfig(RetrievalConfig):
    """The task of recalling the values of keys."""

    keys: int = 512
    """How many keys there are; a text cannot have more pairs."""
    values: int = 64
    """How many values there are."""
    queries: int = 16
    """How many keys are asked for at the end of each text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, "task.", self, "keys", "queries")
        check_at_least(2, "task.", self, "values")

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are: the separator, the keys and the values."""
        return 1 + self.keys + self.values

    def build_source(self, material: Material) -> RetrievalSource:
        identity = {f"task.{name}": getattr(self, name) for name in ("keys", "values", "queries")}
        return RetrievalSource("associative recall", self.queries, 1 / self.values, identity, SPLITS, self.draw)

    def draw(self, split: str, numbers: Sequence[int] | Integers, seed: int, length: int, depths: Floats) -> Questions:
        """Draw as `DrawAtDepths` says. The pair at depth d of n pairs is the one nearest to (n - 1) d, counted from 0.

        Where two keys would be the same, the second is of the nearest other pair.
        """
        keys, values, queries = self.keys, self.values, self.queries
        pairs = self._pairs(length)
        tokens = np.zeros((len(numbers), length), dtype=np.int64)
        for row, number, wanted in zip(tokens, numbers, depths, strict=True):
            random = random_of(seed, split, length, number)
            text = row[1 : 1 + 2 * pairs].reshape(pairs, 2)
            text[:, 0] = 1 + random.permutation(keys)[:pairs]
            text[:, 1] = 1 + keys + random.integers(values, size=pairs)
            row[2 + 2 * pairs :].reshape(queries, 2)[:] = text[_nearest_free(wanted * (pairs - 1), pairs)]
        answers = np.full((len(numbers), 2 * queries - 1), NOT_ASKED)
        answers[:, ::2] = np.arange(queries)
        return Questions(tokens, answers)

    def _pairs(self, length: int) -> int:
        """How many pairs stand before the second separator in a text of this length.

        Raises:
            DataError: there is no text of this length.
        """
        queries = self.queries
        pairs, odd = divmod(length - 2 - 2 * queries, 2)
        if odd or pairs < queries:
            raise DataError(
                f"a length of {length:,} (task.lengths, task.training_lengths): task.queries={queries} with as many "
                f"pairs and two separators take {2 + 4 * queries} tokens, and every further pair 2; choose even "
                "lengths of at least that"
            )
        if pairs > self.keys:
            raise DataError(
                f"task.keys={self.keys}: a text of {length:,} tokens has {pairs:,} pairs, each with a key of "
                f"its own: set task.keys={pairs} or more, or choose shorter lengths"
            )
        return pairs


def _nearest_free(places: Floats, pairs: int) -> list[int]:
    """For each place the nearest pair that no earlier place has taken; of two the earlier one."""
    free = np.ones(pairs, dtype=np.bool_)
    taken = []
    for place in places:
        taken.append(int(np.where(free, np.abs(np.arange(pairs) - place), np.inf).argmin()))
        free[taken[-1]] = False
    return taken
