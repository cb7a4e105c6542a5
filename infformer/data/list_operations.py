"""ListOps: nested lists of digits under minimum, maximum, median and sum modulo 10, whose value is asked for.

    [MAX 4 [MIN 2 3 ] 7 [MED 1 5 9 8 ] ]  has the value 7

The law is that of the code of Long-Range Arena (https://arxiv.org/abs/2011.04006): down to a depth of 10, a node is one
of the four operations with a probability of 1/4, on 2 to 10 nodes, else a digit; what is too short or too long is drawn
anew, and no tree stands there twice. The median of an even number of digits is the mean of the two in the middle,
rounded down.

Trees are drawn a few thousand at a time, level by level: where one of them ends is known before any token is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*map(str, range(10)), *OPERATIONS, "]")
"""The tokens are the numbers of these."""
MAX_DEPTH = 10
MAX_ARGUMENTS = 10

_OPERATION_SHARE = 0.25
_MINIMUM, _MAXIMUM, _MEDIAN, _SUM = range(10, 14)
_CLOSE = 14
_ROOTS_AT_A_TIME = 4096

Integers = NDArray[np.int64]
Tokens = NDArray[np.uint8]


class _Level(NamedTuple):
    """The nodes of one depth of many trees, those with the same parent beside each other."""

    tokens: Integers
    """Digits and operations."""
    arguments: Integers
    """How many each node of the level has below it; 0 for a digit."""


def draw_trees(shortest: int, longest: int, seed: int) -> Iterator[tuple[Tokens, int]]:
    """Different trees without end, the tokens and the value of each.

    Args:
        shortest, longest: a tree has more tokens than the one, and fewer than the other.
    """
    seen: set[bytes] = set()
    for batch in count():
        random = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, batch]))
        for tokens, value in _draw_batch(random, shortest, longest):
            digest = xxhash.xxh3_128_digest(tokens.tobytes())
            if digest not in seen:
                seen.add(digest)
                yield tokens, value


def _draw_batch(random: np.random.Generator, shortest: int, longest: int) -> Iterator[tuple[Tokens, int]]:
    levels = _draw_levels(random)
    sizes, values = _measure(levels)
    kept = (sizes[0] > shortest) & (sizes[0] < longest)
    tokens = _write(levels, sizes, kept)
    ends = np.cumsum(sizes[0][kept])
    yield from zip(np.split(tokens, ends[:-1]) if len(ends) else [], values[kept].tolist(), strict=True)


def _draw_levels(random: np.random.Generator) -> list[_Level]:
    levels, nodes = [], _ROOTS_AT_A_TIME
    for depth in range(1, MAX_DEPTH + 1):
        tokens = random.integers(10, size=nodes)
        arguments = np.zeros(nodes, dtype=np.int64)
        if depth < MAX_DEPTH:
            is_operation = random.random(nodes) <= _OPERATION_SHARE
            operations = int(is_operation.sum())
            tokens[is_operation] = random.integers(_MINIMUM, _CLOSE, size=operations)
            arguments[is_operation] = random.integers(2, MAX_ARGUMENTS, size=operations, endpoint=True)
        levels.append(_Level(tokens, arguments))
        nodes = int(arguments.sum())
        if not nodes:
            break
    return levels


def _measure(levels: list[_Level]) -> tuple[list[Integers], Integers]:
    """How many tokens each node of each level has with all below it, and the values of the roots."""
    sizes, values = [np.ones_like(levels[-1].tokens)], levels[-1].tokens
    for tokens, arguments in levels[-2::-1]:
        operations = np.flatnonzero(arguments)
        below, size, value = values, np.ones_like(tokens), tokens.copy()
        number = arguments[operations]
        first = np.cumsum(number) - number
        size[operations] = 2 + np.add.reduceat(sizes[0], first)
        # In ascending order among those with the same parent.
        ordered = np.sort(np.repeat(np.arange(len(number)), number) * 10 + below) % 10
        middle = (ordered[first + (number - 1) // 2] + ordered[first + number // 2]) // 2
        value[operations] = np.select(
            [tokens[operations] == _MINIMUM, tokens[operations] == _MAXIMUM, tokens[operations] == _MEDIAN],
            [ordered[first], ordered[first + number - 1], middle],
            np.add.reduceat(below, first) % 10,
        )
        sizes.insert(0, size)
        values = value
    return sizes, values


def _write(levels: list[_Level], sizes: list[Integers], kept: NDArray[np.bool_]) -> Tokens:
    """The tokens of the trees that are kept, one after another."""
    own = sizes[0][kept]
    written = np.empty(int(own.sum()), dtype=np.uint8)
    places = np.cumsum(own) - own  # where each node that is kept begins
    for depth, (tokens, arguments) in enumerate(levels):
        written[places] = tokens[kept]
        number = arguments[kept]
        operations = np.flatnonzero(number)
        begins, number = places[operations], number[operations]
        written[begins + sizes[depth][kept][operations] - 1] = _CLOSE
        if not len(number):
            break
        kept = np.repeat(kept, arguments)
        below = sizes[depth + 1][kept]
        first = np.cumsum(number) - number
        before = np.cumsum(below) - below  # of all on this level, so less what is before the first with this parent
        places = np.repeat(begins + 1 - before[first], number) + before
    return written
