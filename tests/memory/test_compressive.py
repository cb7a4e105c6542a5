"""Compression against loops, and what its reconstruction loss can reach."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.compressive import FUNCTIONS, Compression, CompressiveMemoryConfig, ContentAttention

BATCH, LENGTH, HIDDEN, RATE, QUERIES = 2, 12, 5, 3, 4
every_function = pytest.mark.parametrize("function", FUNCTIONS)
BuildCompression = Callable[..., Compression]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_of(queries: Tensor) -> ContentAttention:
    """One head without projections."""

    def attend(entries: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(queries @ entries.mT / math.sqrt(HIDDEN), dim=-1)
        return weights @ entries, weights.unsqueeze(1)

    return attend


@pytest.fixture
def build_compression() -> BuildCompression:
    def build(function: str = "convolution") -> Compression:
        compression = Compression(CompressiveMemoryConfig(rate=RATE, function=function), HIDDEN).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in compression.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        return compression

    return build


def compress_literally(compression: Compression, leaving: Tensor, usage: Tensor) -> Tensor:
    """Entry by entry.

    Args:
        usage: attention that each hidden state gets, [batch, length].
    """
    rows = []
    for hidden, used in zip(leaving, usage.tolist(), strict=True):
        groups = [hidden[start : start + RATE] for start in range(0, LENGTH, RATE)]
        match compression.config.function:
            case "mean":
                compressed = [sum(group) / RATE for group in groups]
            case "max":
                compressed = [torch.stack([max(group[:, axis]) for axis in range(HIDDEN)]) for group in groups]
            case "convolution":
                weight, bias = compression.convolution.weight, compression.convolution.bias
                compressed = [bias + sum(weight[:, :, k] @ group[k] for k in range(RATE)) for group in groups]
            case "most_used":
                ranked = sorted(range(LENGTH), key=lambda place: used[place], reverse=True)
                compressed = [hidden[place] for place in sorted(ranked[: LENGTH // RATE])]
        rows.append(torch.stack(compressed))
    return torch.stack(rows)


@every_function
def test_compression_equals_a_loop(build_compression, function):
    compression, leaving = build_compression(function), random(BATCH, LENGTH, HIDDEN)
    attend = attention_of(random(BATCH, QUERIES, HIDDEN, seed=2))
    compressed, error = compression(leaving, attend)
    usage = torch.stack([sum(row) / QUERIES for row in attend(leaving)[1][:, 0]])
    expected = compress_literally(compression, leaving, usage)
    assert compressed.shape == (BATCH, LENGTH // RATE, HIDDEN)
    torch.testing.assert_close(compressed, expected, rtol=1e-12, atol=1e-13)

    for row in range(BATCH):
        for query in range(QUERIES):
            whole, parts = attend(leaving)[0][row, query], attend(expected)[0][row, query]
            literal = sum((whole[axis] - parts[axis]) ** 2 for axis in range(HIDDEN)) / HIDDEN
            torch.testing.assert_close(error[row, query], literal, rtol=1e-11, atol=1e-13)
            assert error[row, query] > 1e-4


def test_the_most_used_stay_in_the_order_of_the_text(build_compression):
    """Usage is the mean over heads and queries; 4 of 12 stay, the most used one is the last of them."""
    leaving = random(BATCH, LENGTH, HIDDEN)
    weights = torch.full((BATCH, 2, QUERIES, LENGTH), 0.01)
    for row, places in enumerate([(11, 0, 5, 7), (4, 3, 2, 1)]):
        for rank, place in enumerate(places):
            weights[row, rank % 2, rank, place] = 1 - rank / 8  # each by one query of one head
    compressed, _ = build_compression("most_used")(leaving, lambda entries: (entries[:, :QUERIES], weights))
    assert torch.equal(compressed[0], leaving[0, [0, 5, 7, 11]])
    assert torch.equal(compressed[1], leaving[1, [1, 2, 3, 4]])


@every_function
def test_no_gradient_goes_back_into_the_past(build_compression, function):
    compression, leaving = build_compression(function), random(BATCH, LENGTH, HIDDEN).requires_grad_()
    compressed, error = compression(leaving, attention_of(random(BATCH, QUERIES, HIDDEN, seed=2)))
    learned = function == "convolution"
    assert compressed.requires_grad == error.requires_grad == learned
    if learned:
        error.sum().backward()
        assert all((parameter.grad != 0).all() for parameter in compression.parameters())
    assert leaving.grad is None


def test_the_error_falls_when_the_convolution_learns_from_it(build_compression):
    compression, leaving = build_compression(), random(BATCH, LENGTH, HIDDEN)
    attend = attention_of(random(BATCH, QUERIES, HIDDEN, seed=2))
    optimizer = torch.optim.Adam(compression.parameters(), lr=0.02)
    errors = []
    for _ in range(100):
        optimizer.zero_grad()
        error = compression(leaving, attend)[1].mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.1 * errors[0]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"function": "median"}, r"function=median: choose one of convolution, mean, max, most_used"),
            ({"length": 0}, r"length=0: must be at least 1"),
            ({"rate": -1}, r"rate=-1: must be at least 1"),
            ({"reconstruction_weight": -0.5}, r"reconstruction_weight=-0\.5: must be at least 0"),
        ],
    )
    def test_options_that_cannot_be_are_refused(self, options, message):
        with pytest.raises(ValueError, match=rf"^model\.memory\.{message}$"):
            CompressiveMemoryConfig(**options)
