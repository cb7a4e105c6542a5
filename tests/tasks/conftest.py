"""Models of which it is known how well they sort, and how well they remember."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infformer.memory.state import MemoryState
from infformer.models.segment_cache import SegmentCache
from infformer.models.segment_read import MemoryModelOutput


@dataclass(frozen=True)
class Tally(MemoryState):
    """What a row has read: how often, where first (from 1; 0: nowhere), which symbols were answered, and how much."""

    counts: Tensor
    first: Tensor
    answered: Tensor
    length: Tensor


class Model(nn.Module):
    """As little of a `MemoryModel` as sorting is measured by: whole segments are written to memory, nothing else is."""

    device = torch.device("cpu")
    short_term_length = 2

    def __init__(self, symbols: int, segment_length: int) -> None:
        super().__init__()
        self.symbols = symbols
        self.vocabulary_size = symbols + 1
        self.segment_length = segment_length

    def forward(
        self,
        input_ids: Tensor,
        state: Tally | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        segment_cache: SegmentCache | None = None,
        use_cache: bool = False,
    ) -> MemoryModelOutput:
        rows, length = input_ids.shape
        length += 0 if segment_cache is None else segment_cache.length
        assert not self.training
        assert rows >= 1
        assert 1 <= length <= self.segment_length
        if state is None:
            state = Tally(*torch.zeros(3, rows, self.symbols, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
        tally = (state if segment_cache is None else segment_cache.attention).map_tensors(Tensor.clone)
        answers = torch.stack([self.answer(tokens, tally) for tokens in input_ids.T], dim=1)
        output = MemoryModelOutput(state=tally if length == self.segment_length else state)
        if use_cache and length < self.segment_length:
            output.segment_cache = SegmentCache(tally, (), length)
        if return_logits is not False:
            output.logits = 5.0 * nn.functional.one_hot(answers, self.vocabulary_size)[:, -logits_to_keep:]
        return output

    def answer(self, tokens: Tensor, tally: Tally) -> Tensor:
        """What follows after one more token of each row, [rows]; the tally is brought up to date."""
        raise NotImplementedError


class Counter(Model):
    """Counts without fail, and never answers the same symbol twice."""

    def answer(self, tokens: Tensor, tally: Tally) -> Tensor:
        answers = []
        for row, token in enumerate(tokens.tolist()):
            counts, first, answered = tally.counts[row], tally.first[row], tally.answered[row]
            if token == self.symbols:
                answered += 1  # 1: not answered yet, 0: still reading, 2: answered
            elif answered[0]:
                answered[token] += 1
            else:
                tally.length[row] += 1
                counts[token] += 1
                if not first[token]:
                    first[token] = tally.length[row]

            def rank(symbol: int, counts: Tensor = counts, first: Tensor = first, answered: Tensor = answered) -> tuple:
                return int(answered[symbol]) > 1, -int(counts[symbol]), int(first[symbol]), symbol

            answers.append(min(range(self.symbols), key=rank))
        return torch.tensor(answers)


class Stubborn(Model):
    """Always answers symbol 3."""

    def answer(self, tokens: Tensor, tally: Tally) -> Tensor:
        return torch.full_like(tokens, 3)


@dataclass(frozen=True)
class Past(MemoryState):
    """All that a row has read, [rows, tokens]."""

    tokens: Tensor


class Witness(nn.Module):
    """Remembers every whole segment, and says what followed what it reads now when it read it before."""

    device = torch.device("cpu")
    has_memory = True
    short_term_length = 0

    def __init__(self, vocabulary_size: int, segment_length: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.segment_length = segment_length

    def forward(
        self,
        input_ids: Tensor,
        state: Past | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        segment_cache: SegmentCache | None = None,
        use_cache: bool = False,
    ) -> MemoryModelOutput:
        length = input_ids.shape[1] + (0 if segment_cache is None else segment_cache.length)
        assert not self.training
        assert 1 <= length <= self.segment_length
        read = state if segment_cache is None else segment_cache.attention
        past = Past(input_ids if read is None else torch.cat([read.tokens, input_ids], dim=1))
        output = MemoryModelOutput(state=past if length == self.segment_length else state)
        if use_cache and length < self.segment_length:
            output.segment_cache = SegmentCache(past, (), length)
        if return_logits is not False:
            said = torch.from_numpy(np.stack([what_followed(row) for row in past.tokens.numpy()]))
            said = said[:, -input_ids.shape[1] :][:, -logits_to_keep:]
            output.logits = 5.0 * nn.functional.one_hot(said, self.vocabulary_size)
        return output


def what_followed(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each token the one that followed after the longest stretch before that ends alike; 0 if there is none."""
    said = np.zeros_like(tokens)
    alike = np.zeros(len(tokens), dtype=np.int64)  # how many tokens up to each place are those up to the present one
    for place, token in enumerate(tokens):
        alike = np.where(tokens == token, np.concatenate([[0], alike[:-1]]) + 1, 0)
        if place and alike[:place].any():
            said[place] = tokens[alike[:place].argmax() + 1]
    return said


@pytest.fixture(scope="session")
def witness() -> Callable[[int, int], Witness]:
    """A model that forgets nothing: `witness(vocabulary_size, segment_length)`."""
    return Witness


@pytest.fixture(scope="session")
def counter() -> Callable[[int, int], Model]:
    """A model that counts: `counter(symbols, segment_length)`."""
    return Counter


@pytest.fixture(scope="session")
def stubborn() -> Callable[[int, int], Model]:
    """A model that always answers symbol 3: `stubborn(symbols, segment_length)`."""
    return Stubborn
