"""Passkey: a number that stands somewhere in a long text is asked for at its end.

After Mohtashami & Jaggi, Landmark Attention, https://arxiv.org/abs/2305.16300; here the text is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from infformer.data.tokenization import TokenizedDocuments
from infformer.tasks.haystack import Haystack, Needle
from infformer.tasks.retrieval_questions import RetrievalConfig


@dataclass
class PasskeyConfig(RetrievalConfig):
    """Finding a number in the text of `data`, of several documents where one is too short."""

    digits: int = 5
    """Of the number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.digits <= 18:
            raise ValueError(f"task.digits={self.digits}: must be from 1 to 18")

    @property
    def numbers(self) -> range:
        """All numbers of so many digits."""
        return range(10 ** (self.digits - 1), 10**self.digits)


class Passkey(Haystack):
    """Texts with one sentence in them, of a number drawn uniformly; the rest is as long as it has to be."""

    name = "passkey"
    one_document = False

    def __init__(
        self,
        config: PasskeyConfig,
        documents: Mapping[str, TokenizedDocuments],
        tokenizer: PreTrainedTokenizerBase,
        beginning: bool,
    ) -> None:
        self._numbers = config.numbers
        identity = {"task.digits": config.digits}
        super().__init__(config, 1, 1 / len(self._numbers), identity, documents, tokenizer, beginning)

    def write(self, random: np.random.Generator) -> list[Needle]:
        key = random.integers(self._numbers.start, self._numbers.stop)
        return [
            Needle(
                sentence=f"The pass key is {key}. Remember it. {key} is the pass key.",
                question="What is the pass key? The pass key is",
                answer=f" {key}",
            )
        ]
