"""Two tasks after RULER, https://arxiv.org/abs/2404.06654, in real text; what is asked for stands among its like.

Multikey: some keys have numbers, and one key is asked for. Who looks for a number alone finds the wrong one.

Variable tracking: some numbers are handed from name to name, and all names of one number are asked for. It stands
beside the first of them only, so the others cannot be found without following the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import perm
from string import ascii_uppercase

import numpy as np

from infformer.options import check_at_least
from infformer.tasks.haystack import BEGINNINGS, Haystack, Needle, occasion
from infformer.tasks.retrieval import RetrievalConfig, RetrievalSource
from infformer.tasks.task import Material

LETTERS = 3
"""Of a variable's name."""


@dataclass
class MultikeyConfig(RetrievalConfig):
    """The task of finding the numbers of one key among those of others in the text of `data`."""

    keys: int = 4
    """How many keys there are; one of them is asked for, and the others stand anywhere."""
    values: int = 1
    """How many numbers each key has, each in a sentence of its own; they are asked for in the order of the text. The
    first stands at the depth, the others anywhere behind it."""
    digits: int = 5
    """How many digits a number has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.keys <= BEGINNINGS:
            raise ValueError(f"task.keys={self.keys}: must be from 1 to {BEGINNINGS}, which are all different")
        check_at_least(1, "task.", self, "values")
        _check_numbers(self.digits, self.keys * self.values)

    def build_source(self, material: Material) -> RetrievalSource:
        haystack = Haystack(self._write, one_document=False, material=material)
        identity = {f"task.{name}": getattr(self, name) for name in ("keys", "values", "digits")}
        return haystack.source("multikey", 1, 1 / perm(_count(self.digits), self.values), identity)

    def _write(self, random: np.random.Generator) -> list[Needle]:
        """The key that is asked for, drawn uniformly as the others are; all numbers are different."""
        drawn = random.choice(BEGINNINGS, size=self.keys, replace=False)
        beginnings = [f"Lucky numbers of {occasion(int(key))}:" for key in drawn]
        numbers = _draw_numbers(random, self.digits, self.keys * self.values).reshape(self.keys, self.values)
        sentences = [
            [f"{beginning} {number}." for number in own] for beginning, own in zip(beginnings, numbers, strict=True)
        ]
        return [Needle(sentences[0], beginnings[0], f" {', '.join(map(str, numbers[0]))}.", sentences[1:])]


@dataclass
class VariableTrackingConfig(RetrievalConfig):
    """The task of finding all names of a number in the text of `data`."""

    chains: int = 2
    """How many numbers there are, each with names of its own; one of them is asked for, the others stand anywhere."""
    hops: int = 2
    """How often a number is handed on, each time to one more name. The number stands at the depth, and each name
    somewhere behind the one that it follows."""
    digits: int = 5
    """How many digits a number has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, "task.", self, "chains")
        check_at_least(0, "task.", self, "hops")
        names = len(ascii_uppercase) ** LETTERS
        if self.chains * (self.hops + 1) > names:
            raise ValueError(
                f"task.chains={self.chains} of task.hops={self.hops} have {self.chains * (self.hops + 1):,} names, and "
                f"there are {names:,}: choose fewer"
            )
        _check_numbers(self.digits, self.chains)

    def build_source(self, material: Material) -> RetrievalSource:
        haystack = Haystack(self._write, one_document=False, material=material)
        identity = {f"task.{name}": getattr(self, name) for name in ("chains", "hops", "digits")}
        chance = 1 / perm(len(ascii_uppercase) ** LETTERS, self.hops + 1)
        return haystack.source("variable tracking", 1, chance, identity)

    def _write(self, random: np.random.Generator) -> list[Needle]:
        """The number that is asked for, and its names in the order of the text; all names are different."""
        size = (self.chains, self.hops + 1)
        drawn = random.choice(len(ascii_uppercase) ** LETTERS, size=size, replace=False)
        names = [[_spell(int(name)) for name in chain] for chain in drawn]
        numbers = _draw_numbers(random, self.digits, self.chains)
        chains = []
        for own, number in zip(names, numbers, strict=True):
            given = [str(number), *(f"VAR {name}" for name in own[:-1])]
            chains.append([f"VAR {name} = {value}." for name, value in zip(own, given, strict=True)])
        question = f"The names of all variables with the value {numbers[0]} are"
        return [Needle(chains[0], question, f" {', '.join(names[0])}.", chains[1:])]


def _count(digits: int) -> int:
    """How many numbers have so many digits."""
    return 9 * 10 ** (digits - 1)


def _draw_numbers(random: np.random.Generator, digits: int, count: int) -> np.ndarray:
    """Different numbers, drawn uniformly from all that have so many digits."""
    return 10 ** (digits - 1) + random.choice(_count(digits), size=count, replace=False)


def _check_numbers(digits: int, count: int) -> None:
    if not 1 <= digits <= 18 or _count(digits) < count:
        raise ValueError(f"task.digits={digits}: must be from 1 to 18, and so many that there are {count} numbers")


def _spell(number: int) -> str:
    """A name of letters."""
    base = len(ascii_uppercase)
    return "".join(ascii_uppercase[number // base**place % base] for place in range(LETTERS))
