"""Models of which it is known how well they sort."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.state import MemoryState
from infformer.models.outputs import MemoryModelOutput


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

    def __init__(self, symbols: int, segment_length: int) -> None:
        super().__init__()
        self.symbols = symbols
        self.vocabulary_size = symbols + 1
        self.segment_length = segment_length

    def forward(
        self, input_ids: Tensor, memory: Tally | None = None, return_logits: bool | None = None
    ) -> MemoryModelOutput:
        rows, length = input_ids.shape
        assert not self.training
        assert rows >= 1
        assert 1 <= length <= self.segment_length
        if memory is None:
            memory = Tally(*torch.zeros(3, rows, self.symbols, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
        tally = memory.map_tensors(Tensor.clone)
        answers = torch.stack([self.answer(tokens, tally) for tokens in input_ids.T], dim=1)
        output = MemoryModelOutput(memory=tally if length == self.segment_length else memory)
        if return_logits is not False:
            output.logits = 5.0 * nn.functional.one_hot(answers, self.vocabulary_size)
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


@pytest.fixture(scope="session")
def counter() -> Callable[[int, int], Model]:
    """A model that counts: `counter(symbols, segment_length)`."""
    return Counter


@pytest.fixture(scope="session")
def stubborn() -> Callable[[int, int], Model]:
    """A model that always answers symbol 3: `stubborn(symbols, segment_length)`."""
    return Stubborn
