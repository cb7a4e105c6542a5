"""Real text in which sentences are hidden, to be asked for at its end: a pass key, or needles in a book.

Passkey: a number that stands somewhere in a long text, after Mohtashami & Jaggi, Landmark Attention,
https://arxiv.org/abs/2305.16300; here the text is real.

Needle: a sentence that has nothing to do with a book is hidden in it, and at the end it is begun anew, after Kamradt,
https://github.com/gkamradt/LLMTest_NeedleInAHaystack. Sentences are put together from parts, so that no end can be
guessed from its beginning: a model that has not read the sentence, or does not remember it, cannot know its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from infformer.data.tokenization import Encoder, vocabulary_size
from infformer.errors import DataError
from infformer.tasks.questions import NOT_ASKED, Floats, Integers, Questions, random_of
from infformer.tasks.retrieval import RetrievalConfig, RetrievalSource
from infformer.tasks.task import Material

END_OF_A_SENTENCE = re.compile(r"([.!?][\"'”’)]*|\n)\s*$")
LONGEST_SENTENCE = 256
"""Tokens; within as many from a place drawn at random a sentence ends, in ordinary text."""
MOST_SHIFT = 0.05
"""How far from its depth a sentence is put at most, to stand between two others, as a part of the text."""

CITIES = (
    "Lisbon", "Prague", "Oslo", "Cairo", "Boston", "Naples", "Dublin", "Vienna", "Athens", "Geneva", "Bombay", "Quebec",
    "Havana", "Warsaw", "Madrid", "Tokyo",
)  # fmt: skip
TIMES = (
    "on a rainy afternoon", "on a winter morning", "after a long journey", "before the shops open", "on a Sunday",
    "in the first days of spring", "when the streets are empty", "after a good dinner",
)  # fmt: skip
PASTIMES = (
    "read", "draw the passers-by", "listen to the rain", "drink a cup of tea", "write a letter home", "play chess",
    "count the boats", "learn a song", "eat a ripe pear", "sleep for an hour", "feed the sparrows", "mend a coat",
    "talk with the gardener", "look at old maps", "wait for the moon", "tell stories",
)  # fmt: skip
PLACES = (
    "in the old library of the observatory", "under the chestnut trees", "on the steps of the museum",
    "behind the fish market", "at the window of a small hotel", "in the garden of the convent",
    "on the bridge by the mill", "beside the brass fountain", "in the last carriage of the tram",
    "on the roof of the theatre", "in the yard of the printing house", "at the foot of the lighthouse",
    "in the hall of mirrors", "on the green bench by the canal", "in the tower of the town hall",
    "at the far end of the harbour",
)  # fmt: skip

BEGINNINGS = len(CITIES) * len(TIMES)
ENDS = len(PASTIMES) * len(PLACES)


@dataclass(frozen=True)
class Needle:
    """Sentences to be hidden, and how they are asked for."""

    sentences: Sequence[str]
    """The first stands at the depth that is asked for, those after it at random places behind it, in their order."""
    question: str
    answer: str
    """What follows the question."""
    others: Sequence[Sequence[str]] = ()
    """Sentences that nobody asks for, at random places anywhere, in the order of each sequence."""


def occasion(number: int) -> str:
    """One of `BEGINNINGS`."""
    city, time = divmod(number, len(TIMES))
    return f"{CITIES[city]} {TIMES[time]}"


@lru_cache(maxsize=1)
def ends_of_sentences(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Which tokens end a sentence, [vocabulary]."""
    pieces = tokenizer.batch_decode([[token] for token in range(vocabulary_size(tokenizer))])
    return np.array([END_OF_A_SENTENCE.search(piece) is not None for piece in pieces])


class Haystack:
    """Documents with needles in them: the text, then each question with its answer, a line each.

    The text begins with a sentence, and a needle stands between two, where sentences can be told apart.

    Args:
        write: the needles of one text.
        one_document: take each text from one document; if not, from as many as it needs, one after another.
        material: the documents, and their tokenizer.
    """

    def __init__(
        self, write: Callable[[np.random.Generator], list[Needle]], one_document: bool, material: Material
    ) -> None:
        assert material.tokenizer is not None
        self._write = write
        self._one_document = one_document
        self._documents = material.documents
        self._unknown = material.tokenizer.unk_token_id
        self._encoder = Encoder(material.tokenizer)
        self._first = int(material.data.beginning_of_document)  # the first token of a document's text
        self._ends_sentence = ends_of_sentences(material.tokenizer)

    def source(self, name: str, needles: int, chance: float, identity: Mapping[str, object]) -> RetrievalSource:
        """The questions of a task, which depend on the documents too."""
        if "train" in self._documents:
            identity = {**identity, "the documents (data.*, tokenizer)": self._documents["train"].fingerprint}
        return RetrievalSource(name, needles, chance, identity, self._documents.keys(), self.draw)

    def draw(self, split: str, numbers: Sequence[int] | Integers, seed: int, length: int, depths: Floats) -> Questions:
        """Draw as `DrawAtDepths` says. A needle is put at the end of the sentence nearest to its depth."""
        tokens, answers = [], []
        for number, wanted in zip(numbers, depths, strict=True):
            random = random_of(seed, split, length, number)
            needles = self._write(random)
            sequences = [sequence for needle in needles for sequence in (needle.sentences, *needle.others)]
            hidden = [self._encode(f"\n{sentence}\n") for sequence in sequences for sentence in sequence]
            asked = [self._encode_question(needle) for needle in needles]
            beginning = self._documents[split].tokens(0, 0, self._first)
            questions = [question for question, _ in asked]
            rest = sum(map(len, [beginning, *hidden, *questions]))
            self._check(split, length, rest)
            text = self._text(split, random, length - rest)
            places = _places(random, needles, wanted)
            tokens.append(np.concatenate([beginning, *self._hide(hidden, text, places), *questions]))
            answers.append(
                np.concatenate(
                    [
                        np.where(np.arange(len(question)) < read, NOT_ASKED, which)
                        for which, (question, read) in enumerate(asked)
                    ]
                )
            )
        ends = [row[np.flatnonzero(row != NOT_ASKED)[0] :] for row in answers]
        longest = max(map(len, ends))
        padded = [np.pad(end, (longest - len(end), 0), constant_values=NOT_ASKED) for end in ends]
        return Questions(np.stack(tokens), np.stack(padded))

    def _check(self, split: str, length: int, rest: int) -> None:
        """Make sure that there are questions of this length, `rest` tokens of which are not text.

        Raises:
            DataError: there are none.
        """
        if length < rest:
            raise DataError(
                f"a length of {length:,} (task.lengths, task.training_lengths): what is hidden and what is asked take "
                f"{rest:,} tokens already, and in other texts some more; choose longer ones"
            )
        longest = int(self._documents[split].token_counts.max()) - self._first
        if self._one_document and length - rest > longest:
            raise DataError(
                f"a length of {length:,} (task.lengths, task.training_lengths): {length - rest:,} tokens of it are "
                f"text of one document, and the longest {split} document has {longest:,}; choose shorter lengths, "
                "longer documents (data=), or all of each (data.max_document_characters=null, "
                "data.max_held_out_characters=null)"
            )

    def _encode(self, text: str) -> Integers:
        (tokens,) = self._encoder([text.strip()], [text])
        if self._unknown in tokens:
            raise DataError(
                f"the tokenizer cannot write {text.strip()!r}, of which something is unknown to it: take a model whose "
                "tokenizer writes any text (model.tokenizer=, tokenizer=)"
            )
        return np.array(tokens, dtype=np.int64)

    def _encode_question(self, needle: Needle) -> tuple[Integers, int]:
        """A question with its answer, and how many of its tokens are those of the question alone."""
        alone, whole = self._encode(f"\n{needle.question}"), self._encode(f"\n{needle.question}{needle.answer}")
        shorter = min(len(alone), len(whole))
        different = np.flatnonzero(alone[:shorter] != whole[:shorter])
        return whole, int(different[0]) if different.size else shorter

    def _hide(self, hidden: list[Integers], text: Integers, depths: Floats) -> list[Integers]:
        """The text in pieces, with what is hidden between them."""
        ends = np.concatenate([[0], 1 + np.flatnonzero(self._ends_sentence[text]), [len(text)]])
        pieces, done = [], 0
        for which in np.argsort(depths, kind="stable"):
            wanted = depths[which] * len(text)
            place = int(ends[np.abs(ends - wanted).argmin()])
            if abs(place - wanted) > MOST_SHIFT * len(text):
                place = round(wanted)
            pieces += [text[done:place], hidden[which]]
            done = place
        return [*pieces, text[done:]]

    def _text(self, split: str, random: np.random.Generator, length: int) -> Integers:
        """`length` tokens of the documents of a split, from the beginning of a sentence on."""
        text = self._within_one(split, random, length) if self._one_document else self._across(split, random, length)
        ends = np.flatnonzero(self._ends_sentence[text[: len(text) - length]])
        start = int(ends[0]) + 1 if ends.size else 0
        return text[start : start + length]

    def _within_one(self, split: str, random: np.random.Generator, length: int) -> Integers:
        """At least `length` tokens of one document."""
        documents = self._documents[split]
        counts = documents.token_counts - self._first
        (long_enough,) = np.nonzero(counts >= length)
        document = int(random.choice(long_enough))
        start = self._first + int(random.integers(counts[document] - length, endpoint=True))
        stop = min(start + length + LONGEST_SENTENCE, int(documents.token_counts[document]))
        return documents.tokens(document, start, stop)

    def _across(self, split: str, random: np.random.Generator, length: int) -> Integers:
        """More than `length` tokens of one document after another, from a random place on."""
        documents = self._documents[split]
        counts = documents.token_counts - self._first
        ends = np.cumsum(counts)
        place = int(random.integers(ends[-1]))
        document = int(np.searchsorted(ends, place, side="right"))
        start = place - int(ends[document] - counts[document])
        parts, missing = [], length + LONGEST_SENTENCE
        while missing:
            stop = min(start + missing, int(counts[document]))
            parts.append(documents.tokens(document, self._first + start, self._first + stop))
            missing -= stop - start
            document, start = (document + 1) % len(documents), 0
        return np.concatenate(parts)


def _places(random: np.random.Generator, needles: Sequence[Needle], wanted: Floats) -> Floats:
    """The depths of all that is hidden, one needle after the other, of which each begins where it is wanted."""
    places: list[float] = []
    for needle, depth in zip(needles, wanted, strict=True):
        later = np.sort(random.random(len(needle.sentences) - 1))
        places += [depth, *(depth + (1 - depth) * later)]
        for sequence in needle.others:
            places += [*np.sort(random.random(len(sequence)))]
    return np.array(places)


@dataclass
class PasskeyConfig(RetrievalConfig):
    """The task of finding a number in the text of `data`, of several documents where one is too short."""

    digits: int = 5
    """How many digits the number has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.digits <= 18:
            raise ValueError(f"task.digits={self.digits}: must be from 1 to 18")

    def build_source(self, material: Material) -> RetrievalSource:
        haystack = Haystack(self._write, one_document=False, material=material)
        chance = 1 / (9 * 10 ** (self.digits - 1))
        return haystack.source("passkey", 1, chance, {"task.digits": self.digits})

    def _write(self, random: np.random.Generator) -> list[Needle]:
        """One sentence with a number, drawn uniformly from all that have `digits` digits."""
        key = random.integers(10 ** (self.digits - 1), 10**self.digits)
        return [
            Needle(
                sentences=[f"The pass key is {key}. Remember it. {key} is the pass key."],
                question="What is the pass key? The pass key is",
                answer=f" {key}",
            )
        ]


@dataclass
class NeedleConfig(RetrievalConfig):
    """The task of finding sentences in one document of `data`, which has to be as long as the text."""

    needles: int = 1
    """How many sentences are hidden, each at a depth of its own, and asked for one after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.needles <= BEGINNINGS:
            raise ValueError(
                f"task.needles={self.needles}: must be from 1 to {BEGINNINGS}, which all begin differently"
            )

    def build_source(self, material: Material) -> RetrievalSource:
        haystack = Haystack(self._write, one_document=True, material=material)
        return haystack.source("needle in a book", self.needles, 1 / ENDS, {"task.needles": self.needles})

    def _write(self, random: np.random.Generator) -> list[Needle]:
        """Sentences that begin differently and end independently of that."""
        needles = []
        for beginning in random.choice(BEGINNINGS, size=self.needles, replace=False):
            pastime, place = divmod(int(random.integers(ENDS)), len(PLACES))
            question = f"The best thing to do in {occasion(int(beginning))} is"
            answer = f" to {PASTIMES[pastime]} {PLACES[place]}."
            needles.append(Needle([question + answer], question, answer))
        return needles
