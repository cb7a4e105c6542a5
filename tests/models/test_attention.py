"""Attention by distance equals its own sum over pairs of entries; gradients too."""

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infformer.models.block import Attention, BlockSizes, encode_positions

BATCH, LENGTH, HIDDEN, HEADS, HEAD = 2, 7, 10, 3, 4
CONTEXTS = {  # how many tokens ask, and how many entries at the front are not real in each row
    "a part of the context": (4, (3, 0)),
    "all of it": (LENGTH, (0, 0)),
    "one token": (1, (6, 2)),
    "a part, memories not full": (3, (1, 4)),
}
every_context = pytest.mark.parametrize(("queries", "unreal"), CONTEXTS.values(), ids=CONTEXTS)
BuildAttention = Callable[..., Attention]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def build_attention() -> BuildAttention:
    def build(positions: str = "relative", dropout: float = 0.0) -> Attention:
        attention = Attention(
            BlockSizes(HIDDEN, HEADS, HEAD, HEAD, 8, "relu", positions, "layer", "pre", 1e-5, dropout, dropout)
        ).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.6, generator=generator)
        return attention

    return build


def mask(queries: int, unreal: tuple[int, ...]) -> Tensor:
    """[batch, 1, queries, length], entry by entry."""
    allowed = torch.zeros(BATCH, 1, queries, LENGTH, dtype=torch.bool)
    for row, first in enumerate(unreal):
        for query in range(queries):
            for entry in range(first, LENGTH - queries + query + 1):
                allowed[row, 0, query, entry] = True
    return allowed


def sinusoid(distance: int, width: int) -> list[float]:
    """Sines, then cosines, as Transformer-XL has them."""
    angles = [distance / 10000 ** (2 * k / width) for k in range(math.ceil(width / 2))]
    return [*map(math.sin, angles), *map(math.cos, angles)][:width]


def rotated(vector: Tensor, place: int) -> Tensor:
    """The pairs (k, k + HEAD/2) as complex numbers, turned."""
    half = HEAD // 2
    turns = torch.tensor([cmath.exp(1j * place / 10000 ** (2 * k / HEAD)) for k in range(half)], dtype=torch.complex128)
    turned = torch.complex(vector[:half], vector[half:]) * turns
    return torch.cat([turned.real, turned.imag])


def relative_score(attention: Attention, head: int, asking: Tensor, entry: Tensor, i: int, j: int) -> Tensor:
    """The four terms of Transformer-XL's equation, each on its own."""
    rows = slice(head * HEAD, (head + 1) * HEAD)
    query = attention.query.weight[rows] @ asking
    key = attention.key.weight[rows] @ entry
    distance = attention.distance.weight[rows] @ torch.tensor(sinusoid(i - j, HIDDEN), dtype=torch.float64)
    content_bias, distance_bias = attention.content_bias[head, 0], attention.distance_bias[head, 0]
    return (query @ key + query @ distance + content_bias @ key + distance_bias @ distance) / math.sqrt(HEAD)


def rotary_score(attention: Attention, head: int, asking: Tensor, entry: Tensor, i: int, j: int) -> Tensor:
    rows = slice(head * HEAD, (head + 1) * HEAD)
    query, key = attention.query.weight[rows] @ asking, attention.key.weight[rows] @ entry
    return rotated(query, i) @ rotated(key, j) / math.sqrt(HEAD)


def attend_literally(attention: Attention, hidden: Tensor, context: Tensor, allowed: Tensor) -> Tensor:
    """A sum over the entries that a query may see, query by query."""
    score = rotary_score if attention.rotary else relative_score
    queries = hidden.shape[1]
    rows = []
    for row in range(BATCH):
        for query in range(queries):
            i = LENGTH - queries + query
            visible = [j for j in range(LENGTH) if allowed[row, 0, query, j]]
            heads = []
            for head in range(HEADS):
                scores = [score(attention, head, hidden[row, query], context[row, j], i, j) for j in visible]
                weights = torch.stack(scores).softmax(0)
                value = attention.value.weight[head * HEAD : (head + 1) * HEAD]
                heads.append(
                    sum(weight * (value @ context[row, j]) for weight, j in zip(weights, visible, strict=True))
                )
            rows.append(attention.output.weight @ torch.cat(heads))
    return torch.stack(rows).view(BATCH, queries, HIDDEN)


def encoding(positions: str) -> Tensor:
    """`encode_positions` in double precision, from its definition."""
    if positions == "relative":
        table = [sinusoid(LENGTH - 1 - column, HIDDEN) for column in range(LENGTH)]
    else:
        table = [sinusoid(place, HEAD)[HEAD // 2 :] + sinusoid(place, HEAD)[: HEAD // 2] for place in range(LENGTH)]
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@every_context
def test_attention_equals_the_explicit_sum(build_attention, positions, queries, unreal):
    attention, allowed = build_attention(positions), mask(queries, unreal)
    hidden = random(BATCH, queries, HIDDEN, seed=2).requires_grad_()
    context = random(BATCH, LENGTH, HIDDEN, seed=3).requires_grad_()
    attended = attention(hidden, context, allowed, encoding(positions))
    literal = attend_literally(attention, hidden, context, allowed)
    torch.testing.assert_close(attended, literal, rtol=1e-11, atol=1e-12)

    inputs = {"hidden": hidden, "context": context, **dict(attention.named_parameters())}
    weights = random(BATCH, queries, HIDDEN, seed=4)
    ours = torch.autograd.grad((attended * weights).sum(), list(inputs.values()))
    theirs = torch.autograd.grad((literal * weights).sum(), list(inputs.values()))
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, msg=name)
        assert other.abs().max() > 1e-3, name


class TestPositions:
    @pytest.mark.parametrize("width", [1, 5, 8])
    def test_encoded_distances_are_sines_and_cosines(self, width):
        expected = torch.tensor([sinusoid(distance, width) for distance in reversed(range(9))])
        encoded = encode_positions(9, width, "relative", torch.device("cpu"))
        assert encoded.shape == (9, width)
        torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("width", [2, 8])
    def test_encoded_places_are_cosines_and_sines(self, width):
        cosines, sines = encode_positions(9, width, "rotary", torch.device("cpu")).chunk(2, dim=-1)
        expected = torch.tensor([sinusoid(place, width) for place in range(9)])
        torch.testing.assert_close(torch.cat([sines, cosines], dim=-1), expected, rtol=1e-5, atol=1e-6)

    def test_a_distance_is_encoded_the_same_in_every_context(self):
        short, long = (encode_positions(length, 6, "relative", torch.device("cpu")) for length in (5, 300))
        assert torch.equal(short, long[-5:])


class TestAttentionByContent:
    @pytest.mark.parametrize("positions", ["relative", "rotary"])
    def test_attention_by_content_equals_the_explicit_sum(self, build_attention, positions):
        """Neither positions nor biases, nor the output projection; every entry is seen."""
        attention = build_attention(positions)
        hidden, entries = random(BATCH, 3, HIDDEN), random(BATCH, 5, HIDDEN, seed=1)
        read, weights = attention.attend_by_content(hidden, entries)
        assert read.shape == (BATCH, 3, HEADS * HEAD)
        assert weights.shape == (BATCH, HEADS, 3, 5)
        for row in range(BATCH):
            for head in range(HEADS):
                part = slice(head * HEAD, (head + 1) * HEAD)
                for query in range(3):
                    asked = attention.query.weight[part] @ hidden[row, query]
                    scores = [asked @ attention.key.weight[part] @ entry / math.sqrt(HEAD) for entry in entries[row]]
                    expected = torch.stack(scores).softmax(0)
                    value = sum(
                        weight * (attention.value.weight[part] @ entry)
                        for weight, entry in zip(expected, entries[row], strict=True)
                    )
                    torch.testing.assert_close(weights[row, head, query], expected)
                    torch.testing.assert_close(read[row, query, part], value)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_the_mean_under_dropout_is_attention_without(build_attention, positions):
    """4096 draws: a standard error of each number that is known from the draws themselves."""
    attention = build_attention(positions, dropout=0.3).train()
    hidden, context = random(1, 1, HIDDEN, seed=2), random(1, LENGTH, HIDDEN, seed=3)
    allowed, places = mask(1, (0, 0))[:1], encoding(positions)
    torch.manual_seed(0)
    draws = attention(hidden.expand(4096, -1, -1), context.expand(4096, -1, -1), allowed, places)[:, 0]
    error = draws.std(0) / math.sqrt(len(draws))
    expected = build_attention(positions)(hidden, context, allowed, places)[0, 0]
    assert ((draws.mean(0) - expected).abs() < 4 * error).all()
    assert torch.equal(attention.eval()(hidden, context, allowed, places)[0, 0], expected)
