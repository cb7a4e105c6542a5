"""Real text in which sentences are hidden, to be asked for at its end."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from infformer.data.errors import DataError
from infformer.data.tokenization import TokenizedDocuments
from infformer.tasks.questions import NOT_ASKED, Floats, Integers, Questions, random_of
from infformer.tasks.retrieval_questions import RetrievalConfig, RetrievalSource

END_OF_A_SENTENCE = re.compile(r"([.!?][\"'”’)]*|\n)\s*$")
LONGEST_SENTENCE = 256
"""Tokens; within as many from a place drawn at random a sentence ends, in ordinary text."""
MOST_SHIFT = 0.05
"""How far from its depth a sentence is put at most, to stand between two others, as a part of the text."""


@dataclass(frozen=True)
class Needle:
    """A sentence to be hidden, and how it is asked for."""

    sentence: str
    question: str
    answer: str
    """What follows the question."""


class Haystack(RetrievalSource):
    """Documents with needles in them: the text, then each question with its answer, a line each.

    The text begins with a sentence, and a needle stands between two, where sentences can be told apart.

    Args:
        config: of the task.
        needles: how many are hidden in a text.
        chance: how often a whole answer is right by chance.
        identity: what decides on the needles, by the options that say it.
        documents: by split, those that there are.
        tokenizer: of the documents and the needles.
        beginning: every document begins with a token that says so, and a text shall too.
    """

    one_document: bool
    """Take each text from one document. False: from as many as it needs, one after another."""

    def __init__(
        self,
        config: RetrievalConfig,
        needles: int,
        chance: float,
        identity: dict[str, Any],
        documents: Mapping[str, TokenizedDocuments],
        tokenizer: PreTrainedTokenizerBase,
        beginning: bool,
    ) -> None:
        if "train" in documents:
            identity = {**identity, "the documents (data.*, tokenizer)": documents["train"].fingerprint}
        super().__init__(config, needles, chance, identity)
        self._documents = documents
        self._tokenizer = tokenizer
        self._first = int(beginning)  # the first token of a document's text
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self._ends_sentence = np.array([END_OF_A_SENTENCE.search(piece) is not None for piece in pieces])

    @abstractmethod
    def write(self, random: np.random.Generator) -> list[Needle]:
        """The needles of one text."""

    def has(self, split: str) -> bool:
        return split in self._documents

    def draw(self, split: str, numbers: Sequence[int] | Integers, seed: int, length: int, depths: Floats) -> Questions:
        """As for every retrieval task. A needle is put at the end of the sentence nearest to its depth."""
        tokens, answers = [], []
        for number, wanted in zip(numbers, depths, strict=True):
            random = random_of(seed, split, length, number)
            needles = self.write(random)
            hidden = [self._encode(f"\n{needle.sentence}\n") for needle in needles]
            asked = [self._encode_question(needle) for needle in needles]
            beginning = self._documents[split].tokens(0, 0, self._first)
            questions = [question for question, _ in asked]
            rest = sum(map(len, [beginning, *hidden, *questions]))
            self._check(split, length, rest)
            text = self._text(split, random, length - rest)
            tokens.append(np.concatenate([beginning, *self._hide(hidden, text, wanted), *questions]))
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
                f"{rest:,} tokens already; choose lengths of at least that"
            )
        longest = int(self._documents[split].token_counts.max()) - self._first
        if self.one_document and length - rest > longest:
            raise DataError(
                f"a length of {length:,} (task.lengths, task.training_lengths): {length - rest:,} tokens of it are "
                f"text of one document, and the longest {split} document has {longest:,}; choose shorter lengths, "
                "longer documents (data=), or all of each (data.max_document_characters=null, "
                "data.max_held_out_characters=null)"
            )

    def _encode(self, text: str) -> Integers:
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if self._tokenizer.unk_token_id in tokens:
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
        """The text in pieces, with the needles between them."""
        ends = np.concatenate([[0], 1 + np.flatnonzero(self._ends_sentence[text]), [len(text)]])
        pieces, done = [], 0
        for needle in np.argsort(depths, kind="stable"):
            wanted = depths[needle] * len(text)
            place = int(ends[np.abs(ends - wanted).argmin()])
            if abs(place - wanted) > MOST_SHIFT * len(text):
                place = round(wanted)
            pieces += [text[done:place], hidden[needle]]
            done = place
        return [*pieces, text[done:]]

    def _text(self, split: str, random: np.random.Generator, length: int) -> Integers:
        """So many tokens of the documents of a split, from the beginning of a sentence on."""
        text = self._within_one(split, random, length) if self.one_document else self._across(split, random, length)
        ends = np.flatnonzero(self._ends_sentence[text[: len(text) - length]])
        start = int(ends[0]) + 1 if ends.size else 0
        return text[start : start + length]

    def _within_one(self, split: str, random: np.random.Generator, length: int) -> Integers:
        """At least so many tokens of one document."""
        documents = self._documents[split]
        counts = documents.token_counts - self._first
        (long_enough,) = np.nonzero(counts >= length)
        document = int(random.choice(long_enough))
        start = self._first + int(random.integers(counts[document] - length, endpoint=True))
        stop = min(start + length + LONGEST_SENTENCE, int(documents.token_counts[document]))
        return documents.tokens(document, start, stop)

    def _across(self, split: str, random: np.random.Generator, length: int) -> Integers:
        """More than so many tokens, from anywhere on, of one document after another."""
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
