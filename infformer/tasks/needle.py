"""Needle in a book: a sentence that has nothing to do with the book is hidden in it, and at the end it is begun anew.

After Kamradt, https://github.com/gkamradt/LLMTest_NeedleInAHaystack. Sentences are put together from parts, so that no
end can be guessed from its beginning: who has not read the sentence, or does not remember it, cannot know its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from infformer.data.tokenization import TokenizedDocuments
from infformer.tasks.haystack import Haystack, Needle
from infformer.tasks.retrieval_questions import RetrievalConfig

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


@dataclass
class NeedleConfig(RetrievalConfig):
    """Finding sentences in one document of `data`, which has to be as long as the text."""

    needles: int = 1
    """How many are hidden, each at a depth of its own, and asked for one after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.needles <= BEGINNINGS:
            raise ValueError(
                f"task.needles={self.needles}: must be from 1 to {BEGINNINGS}, which all begin differently"
            )


class NeedleInABook(Haystack):
    """Texts from one document each, with sentences that begin differently and end independently of that."""

    name = "needle in a book"
    one_document = True

    def __init__(
        self,
        config: NeedleConfig,
        documents: Mapping[str, TokenizedDocuments],
        tokenizer: PreTrainedTokenizerBase,
        beginning: bool,
    ) -> None:
        self._needles = config.needles
        identity = {"task.needles": config.needles}
        super().__init__(config, config.needles, 1 / ENDS, identity, documents, tokenizer, beginning)

    def write(self, random: np.random.Generator) -> list[Needle]:
        needles = []
        for beginning in random.choice(BEGINNINGS, size=self._needles, replace=False):
            city, time = divmod(int(beginning), len(TIMES))
            pastime, place = divmod(int(random.integers(ENDS)), len(PLACES))
            question = f"The best thing to do in {CITIES[city]} {TIMES[time]} is"
            answer = f" to {PASTIMES[pastime]} {PLACES[place]}."
            needles.append(Needle(question + answer, question, answer))
        return needles
