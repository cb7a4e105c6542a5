"""Attention by distance equals its own sum over pairs of entries; gradients too."""

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infformer.models.block import Attention, BlockSizes, encode_positions, rotate, shift_to_entries

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
            BlockSizes(HIDDEN, HEADS, HEAD, 8, "relu", positions, "layer", "pre", dropout, dropout)
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


def test_relative_attention_has_four_terms_and_rotary_two_maps(build_attention):
    names = dict(build_attention("relative").named_parameters()).keys()
    extra = {"distance.weight", "content_bias", "distance_bias"}
    assert names - dict(build_attention("rotary").named_parameters()).keys() == extra


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_what_is_not_allowed_has_no_part(build_attention, positions):
    """Whatever stands there."""
    attention, allowed = build_attention(positions), mask(3, (1, 4))
    hidden, context = random(BATCH, 3, HIDDEN, seed=2), random(BATCH, LENGTH, HIDDEN, seed=3)
    expected = attention(hidden, context, allowed, encoding(positions))
    other = context.clone()
    other[0, :1], other[1, :4] = 1e3, -1e3
    assert torch.equal(attention(hidden, other, allowed, encoding(positions)), expected)


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


class TestRotation:
    def test_a_rotation_is_a_turn_of_complex_numbers(self):
        heads = random(BATCH, HEADS, LENGTH, HEAD)
        turned = rotate(heads, encoding("rotary"))
        for place in range(LENGTH):
            expected = torch.stack(
                [torch.stack([rotated(vector, place) for vector in row]) for row in heads[:, :, place]]
            )
            torch.testing.assert_close(turned[:, :, place], expected, rtol=1e-12, atol=1e-13)

    def test_a_score_depends_on_the_distance_alone(self):
        """The same query and the same key everywhere: scores are constant along the diagonals, and nowhere else."""
        query, key = (random(HEAD, seed=seed).expand(1, 1, LENGTH, HEAD) for seed in (0, 1))
        scores = (rotate(query, encoding("rotary")) @ rotate(key, encoding("rotary")).mT)[0, 0]
        for offset in range(1 - LENGTH, LENGTH):
            diagonal = scores.diagonal(offset)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-13)
        assert len(set(scores[0].tolist())) == LENGTH

    def test_lengths_of_vectors_stay(self):
        heads = random(BATCH, HEADS, LENGTH, HEAD)
        torch.testing.assert_close(rotate(heads, encoding("rotary")).norm(dim=-1), heads.norm(dim=-1))


@pytest.mark.parametrize("queries", [1, 3, 6, 7])
def test_shift_equals_a_gather_where_it_matters(queries):
    """Bit for bit: numbers are moved, none is computed."""
    scores = random(BATCH, HEADS, queries, LENGTH)
    shifted = shift_to_entries(scores)
    assert shifted.shape == scores.shape
    for query in range(queries):
        place = LENGTH - queries + query
        for entry in range(place + 1):
            column = LENGTH - 1 - (place - entry)
            assert torch.equal(shifted[..., query, entry], scores[..., query, column])


class TestAttentionByContent:
    @pytest.mark.parametrize("positions", ["relative", "rotary"])
    def test_attention_equals_the_explicit_sum(self, build_attention, positions):
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

    def test_gradients_reach_the_entries_alone(self, build_attention):
        attention = build_attention()
        hidden, entries = random(BATCH, 3, HIDDEN).requires_grad_(), random(BATCH, 5, HIDDEN, seed=1).requires_grad_()
        read, weights = attention.attend_by_content(hidden, entries)
        (read.square().sum() + weights.square().sum()).backward()
        assert (entries.grad.abs().sum(-1) > 0).all()
        assert hidden.grad is None
        assert all(parameter.grad is None for parameter in attention.parameters())


class TestDropout:
    @pytest.mark.parametrize("positions", ["relative", "rotary"])
    def test_dropout_is_in_training_alone(self, build_attention, positions):
        plain, dropping = build_attention(positions), build_attention(positions, dropout=0.5)
        hidden, context = random(BATCH, 4, HIDDEN, seed=2), random(BATCH, LENGTH, HIDDEN, seed=3)
        asked = (hidden, context, mask(4, (3, 0)), encoding(positions))
        assert torch.equal(dropping.eval()(*asked), plain(*asked))
        torch.manual_seed(0)
        one, other = dropping.train()(*asked), dropping(*asked)
        assert not torch.equal(one, other)
        assert not torch.equal(one, plain(*asked))

    def test_the_mean_under_dropout_is_attention_without(self, build_attention):
        """4096 draws: a standard error of each number that is known from the draws themselves."""
        attention = build_attention(dropout=0.3).train()
        hidden, context = random(1, 1, HIDDEN, seed=2), random(1, LENGTH, HIDDEN, seed=3)
        many = (hidden.expand(4096, -1, -1), context.expand(4096, -1, -1), mask(1, (0, 0))[:1], encoding("relative"))
        torch.manual_seed(0)
        draws = attention(*many)[:, 0]
        error = draws.std(0) / math.sqrt(len(draws))
        expected = attention.eval()(hidden, context, *many[2:])[0, 0]
        assert ((draws.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_a_short_type_is_near_the_exact_one(build_attention, positions):
    """The encoding stays in float32 wherever the weights go."""
    attention, allowed = build_attention(positions), mask(4, (3, 0))
    hidden, context = random(BATCH, 4, HIDDEN, seed=2), random(BATCH, LENGTH, HIDDEN, seed=3)
    exact = attention(hidden, context, allowed, encoding(positions))
    encoded = encode_positions(LENGTH, encoding(positions).shape[1], positions, torch.device("cpu"))
    rounded = attention.to(torch.bfloat16)(hidden.bfloat16(), context.bfloat16(), allowed, encoded)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()
