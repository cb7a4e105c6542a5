"""Examples as arrays of tokens, each of one class, on disk: what a classifier learns from and is measured by.

An example is a text, a pair of texts or an image. Token 0 is padding, and occurs in none of them: bytes, grey levels
and symbols are one more than their value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from infformer.data.cache import find_or_make
from infformer.data.files import in_utf8
from infformer.errors import DataError

BYTES = 257
"""How many tokens there are where texts are bytes, or images grey levels: padding and 256 values."""

_SUMMARY = "summary.json"
_NAMED = 10  # classes named in a message

Tokens = NDArray[np.int64]


class Example(NamedTuple):
    """One example, before its class is a number."""

    place: str
    """Where it was found, in words for an error."""
    texts: tuple[NDArray[np.integer], ...]
    """The tokens of its text, or of both of a pair."""
    label: str


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split; `len()` is how many there are."""

    classes: list[str]
    """What the classes are called; an example's class is the number of one."""
    texts: int
    """1, or 2 where an example is a pair."""
    labels: Tokens
    """[examples]; their classes."""
    fingerprint: str
    """Changes with the examples and their order, and with nothing else."""
    _tokens: NDArray[np.integer]
    _bounds: Tokens
    """[examples, texts, 2]; where each text begins and ends."""

    @cached_property
    def lengths(self) -> Tokens:
        """Tokens of each text, [examples, texts]."""
        return self._bounds[..., 1] - self._bounds[..., 0]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    def __len__(self) -> int:
        return len(self.labels)

    def text(self, number: int, which: int = 0) -> Tokens:
        """The tokens of one of an example's texts."""
        start, end = self._bounds[number, which]
        return self._tokens[start:end].astype(np.int64)

    def some(self, most: int | None) -> Self:
        """At most so many of them, drawn from all the same way every time: those of one class may stand together."""
        if most is None or most >= len(self):
            return self
        chosen = np.random.default_rng(0).permutation(len(self))[:most]
        return replace(
            self,
            labels=self.labels[chosen],
            fingerprint=f"{most} of {self.fingerprint}",
            _bounds=self._bounds[chosen],
        )

    def batch(
        self, numbers: Sequence[int] | Tokens, least: int = 1, towers: int | None = None
    ) -> tuple[Tokens, Tokens]:
        """Some examples side by side, each text padded to the longest among them, [examples, towers · length].

        Args:
            least: to which length texts are padded at least.
            towers: how many texts the model reads apart; if there are more, they are read as one, with a token of
                padding between two, which does not depend on what is beside them. None: all.

        Returns:
            The tokens, and how many there are in each row up to its last text's end, [examples].
        """
        towers = towers or self.texts
        texts = [[self.text(int(number), which) for which in range(self.texts)] for number in numbers]
        if towers < self.texts:
            texts = [[np.concatenate([part for text in own for part in ([0], text)][1:])] for own in texts]
        lengths = np.array([[len(text) for text in own] for own in texts])
        tokens = np.zeros((*lengths.shape, max(least, int(lengths.max()))), dtype=np.int64)
        for place in np.ndindex(lengths.shape):
            tokens[place][: lengths[place]] = texts[place[0]][place[1]]
        return tokens.reshape(len(numbers), -1), (towers - 1) * tokens.shape[2] + lengths[:, -1]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Those that were written into a folder; their tokens are read when they are needed."""
        summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        ends = np.load(folder / "ends.npy")
        starts = np.concatenate([[0], ends[:-1]])
        return cls(
            classes=summary["classes"],
            texts=summary["texts"],
            labels=np.load(folder / "labels.npy"),
            fingerprint=summary["fingerprint"],
            _tokens=np.memmap(folder / "tokens.bin", dtype=summary["dtype"], mode="r"),
            _bounds=np.stack([starts, ends], axis=-1).reshape(-1, summary["texts"], 2),
        )


def keep_examples(
    folder: Path, examples: Iterable[Example], vocabulary_size: int, classes: Sequence[str] | None, source: str
) -> Examples:
    """The examples of a folder of the cache, which is made of these if it is not there.

    Args:
        vocabulary_size: how many tokens there may be.
        classes: what they may be; None: those that occur.
        source: where they are from, in words for an error.

    Raises:
        DataError: there are none, one is empty or of no known class, or they cannot be kept there.
    """
    find_or_make(folder, lambda place: _write(place / folder.name, examples, vocabulary_size, classes, source))
    return Examples.open(folder)


def in_order(labels: Iterable[str]) -> list[str]:
    """Different labels in the order of their numbers if all are numbers, else of their letters."""
    different = set(labels)
    if all(label.removeprefix("-").isdecimal() for label in different):
        return sorted(different, key=lambda label: (int(label), label))
    return sorted(different)


def bytes_of(text: str, length: int, place: str) -> NDArray[np.integer]:
    """The first `length` bytes of a text as tokens.

    Raises:
        DataError: it holds half a character.
    """
    return np.frombuffer(in_utf8(text, place)[:length], dtype=np.uint8).astype(np.uint16) + 1


def _write(
    folder: Path, examples: Iterable[Example], vocabulary_size: int, classes: Sequence[str] | None, source: str
) -> Path:
    folder.mkdir()
    labels: list[str] = []
    ends: list[int] = []
    dtype = np.min_scalar_type(vocabulary_size - 1)
    known, digest, written, texts = None if classes is None else set(classes), xxhash.xxh3_128(), 0, 1
    with (folder / "tokens.bin").open("wb") as file:
        for place, tokens, label in examples:
            for what, is_there in (("text", all(map(len, tokens))), ("label", label.strip())):
                if not is_there:
                    raise DataError(f"{place}: the {what} is empty; remove the example, or write what it says.")
            if known is not None and label not in known:
                more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
                raise DataError(
                    f"{place}: the label {label!r} is none of the classes that are learned "
                    f"({', '.join(list(classes or ())[:_NAMED])}{more}); mend or remove the example, or learn from "
                    "examples of this class too."
                )
            texts = len(tokens)
            for own in tokens:
                content = own.astype(dtype).tobytes()
                file.write(content)
                digest.update(content)
                written += len(own)
                ends.append(written)
            labels.append(label)
    if not labels:
        raise DataError(f"{source}: there are no examples; name files that hold some.")
    names = in_order(labels) if classes is None else list(classes)
    if len(names) < 2:
        raise DataError(f"{source}: all examples are of the class {names[0]!r}; there is nothing to tell apart.")
    number = {name: index for index, name in enumerate(names)}
    digest.update(json.dumps([labels, ends, names]).encode())
    np.save(folder / "labels.npy", np.array([number[label] for label in labels], dtype=np.int64))
    np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
    summary = {"classes": names, "texts": texts, "dtype": str(dtype), "fingerprint": digest.hexdigest()}
    (folder / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    return folder
