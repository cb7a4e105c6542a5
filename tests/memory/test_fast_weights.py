"""Fast weights against a plain loop over tokens, against explicit attention, and what their rules promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.memory import fast_weights
from infformer.memory.fast_weights import (
    FORGETTING,
    FastWeightMemory,
    FastWeightMemoryConfig,
    FastWeightState,
    Writes,
    advance,
    features_of,
)
from infformer.memory.memory import Earlier, MemoryOutput, SegmentContext

BATCH, HEADS, LENGTH, HEAD, FEATURES = 2, 3, 21, 4, 5
HIDDEN = HEADS * HEAD
EVERY_ROW = torch.ones(BATCH, dtype=torch.bool)
every_rule = pytest.mark.parametrize("rule", ["delta", "sum"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_writes(length: int = LENGTH) -> Writes:
    keys = F.normalize(random(BATCH, HEADS, length, FEATURES, seed=1), dim=-1)
    values = random(BATCH, HEADS, length, HEAD, seed=2)
    return Writes(keys, values, random(BATCH, HEADS, length, seed=3), random(BATCH, HEADS, length, seed=4) - 2)


def advance_literally(weights: Tensor, writes: Writes, rule: str, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: what stands there fades, the token changes it, the token reads."""
    found = []
    for token in range(queries.shape[2]):
        key, value, strength, forgetting = (part[:, :, token] for part in writes)
        strength = torch.sigmoid(strength).unsqueeze(-1)
        weights = weights * torch.exp(-F.softplus(forgetting))[..., None, None]
        there = torch.einsum("bhfv,bhf->bhv", weights, key)
        change = strength * (value - there if rule == "delta" else value)
        weights = weights + torch.einsum("bhf,bhv->bhfv", key, change)
        found.append(torch.einsum("bhfv,bhf->bhv", weights, queries[:, :, token]))
    return weights, torch.stack(found, dim=2)


@every_rule
@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_chunks_are_a_loop_over_tokens(monkeypatch, rule, chunk):
    monkeypatch.setattr(fast_weights, "CHUNK", chunk)
    weights, writes = random(BATCH, HEADS, FEATURES, HEAD, seed=5), random_writes()
    queries = F.normalize(random(BATCH, HEADS, LENGTH, FEATURES, seed=6), dim=-1)
    expected = advance_literally(weights, writes, rule, queries)
    torch.testing.assert_close(advance(weights, writes, rule, queries), expected, rtol=1e-12, atol=1e-12)
    after, read = advance(weights, writes, rule)
    torch.testing.assert_close(after, expected[0], rtol=1e-12, atol=1e-12)
    assert read is None


@pytest.mark.parametrize("features", ["plain", "elu", "dpfp"])
def test_the_sum_rule_is_linear_attention(features):
    """Without a past, at full strength and without forgetting: values weighted by φ(q)·φ(k), of all tokens so far."""
    config = FastWeightMemoryConfig(features=features)
    queries, keys = (features_of(random(BATCH, HEADS, LENGTH, HEAD, seed=seed), config) for seed in (1, 2))
    values, certain = random(BATCH, HEADS, LENGTH, HEAD, seed=3), torch.full((BATCH, HEADS, LENGTH), 40.0).double()
    writes = Writes(keys, values, certain, -certain)
    _, read = advance(torch.zeros(BATCH, HEADS, keys.shape[-1], HEAD, dtype=torch.float64), writes, "sum", queries)
    scores = (queries @ keys.mT).tril()
    torch.testing.assert_close(read, scores @ values, rtol=1e-12, atol=1e-12)
    if (
        features != "plain"
    ):  # a normaliser changes no direction, so that it would cancel out in the norm of what is read
        normalised = scores / scores.sum(-1, keepdim=True).clamp(min=1e-300) @ values
        torch.testing.assert_close(F.normalize(read, dim=-1), F.normalize(normalised, dim=-1), rtol=1e-9, atol=1e-9)


@every_rule
def test_a_second_value_under_a_key_replaces_the_first_by_the_delta_rule_alone(rule):
    key, values = F.normalize(random(1, 1, 1, FEATURES), dim=-1).expand(-1, -1, 2, -1), random(1, 1, 2, HEAD, seed=1)
    certain = torch.full((1, 1, 2), 40.0).double()
    after, _ = advance(torch.zeros(1, 1, FEATURES, HEAD).double(), Writes(key, values, certain, -certain), rule)
    expected = values[:, :, 1] if rule == "delta" else values.sum(2)
    torch.testing.assert_close((key[:, :, :1] @ after).squeeze(2), expected, rtol=1e-12, atol=1e-12)


@every_rule
def test_gradients_are_those_of_differences(monkeypatch, rule):
    monkeypatch.setattr(fast_weights, "CHUNK", 3)
    weights, writes = random(BATCH, HEADS, FEATURES, HEAD, seed=5), random_writes(5)
    parts = [
        part[:1, :1].clone().requires_grad_() for part in (weights, *writes, random(BATCH, HEADS, 5, FEATURES, seed=6))
    ]

    def compute(weights: Tensor, *rest: Tensor) -> Any:
        return advance(weights, Writes(*rest[:4]), rule, rest[4])

    assert torch.autograd.gradcheck(compute, parts)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpfp_is_what_its_definition_says(order):
    vectors = random(HEAD)
    signs = [max(float(value), 0) for value in [*vectors, *-vectors]]
    literal = [signs[i] * signs[(i + shift) % (2 * HEAD)] for shift in range(1, order + 1) for i in range(2 * HEAD)]
    found = features_of(vectors, FastWeightMemoryConfig(features="dpfp", dpfp_order=order))
    expected = torch.tensor(literal, dtype=torch.float64)
    torch.testing.assert_close(found, expected / expected.norm().clamp(min=1e-12))


def build(**options: Any) -> FastWeightMemory:
    """A trained memory in the place of a new one."""
    config = FastWeightMemoryConfig(**{"short_term_length": 0, **options})
    (memory,) = config.build(HIDDEN, HEADS, layers=1, segment_length=LENGTH)
    generator = torch.Generator().manual_seed(0)
    for parameter in memory.double().parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return memory


def empty(memory: FastWeightMemory) -> FastWeightState:
    return memory.initial_state(BATCH).map_tensors(Tensor.double)


def step(
    memory: FastWeightMemory, hidden: Tensor, state: FastWeightState, context: SegmentContext | None = None
) -> MemoryOutput:
    return memory(hidden, state, context or SegmentContext(EVERY_ROW), None)


class TestMemory:
    def test_a_key_sees_the_tokens_before_it_and_no_later_one(self):
        memory = build(key_convolution=3)
        hidden = random(BATCH, LENGTH, HIDDEN)
        keys = F.linear(hidden, memory.writing.key.weight)
        kernel = memory.writing.convolution.weight[:, 0]  # [hidden, 3]
        literal = torch.stack(
            [
                sum(kernel[:, 2 - back] * keys[:, token - back] for back in range(3) if token >= back)
                for token in range(LENGTH)
            ],
            dim=1,
        )
        expected = F.normalize(literal.unflatten(-1, (HEADS, HEAD)), dim=-1).transpose(1, 2)
        torch.testing.assert_close(memory.writing(hidden).keys, expected)

    def test_what_is_read_is_of_length_one_a_number_before_its_scale_and_nothing_where_nothing_is(self):
        memory = build()
        with torch.no_grad():
            memory.output.weight.copy_(torch.eye(HIDDEN))
            memory.scale.fill_(1)
            memory.gate.fill_(100)
        first = step(memory, random(BATCH, LENGTH, HIDDEN), empty(memory))
        assert (first.context == 0).all()
        read = step(memory, random(BATCH, LENGTH, HIDDEN, seed=1), first.state).context
        squares = read.unflatten(-1, (HEADS, HEAD)).square().mean(-1)
        torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-3, atol=1e-3)

    def test_a_token_that_was_not_expected_is_written_more_strongly(self):
        """As if the strength of its content were larger by so much a nat above the mean of its segment."""
        memory, hidden = build(strength="loss"), random(BATCH, LENGTH, HIDDEN)
        losses = random(BATCH, LENGTH, seed=7).abs()
        output = step(memory, hidden, empty(memory))
        assert output.state.weights.abs().max() == 0
        after = memory.write_by_losses(output.state, output.pending, losses)
        writes = memory.writing(hidden)
        above = losses - losses.mean(1, keepdim=True)
        strength = writes.strength + memory.writing.surprise.view(1, -1, 1) * above.unsqueeze(1)
        expected, _ = advance(empty(memory).weights, writes._replace(strength=strength), "delta")
        torch.testing.assert_close(after.weights, expected)

    def test_rows_that_are_not_complete_are_not_written(self):
        memory = build()
        written = step(memory, random(BATCH, LENGTH, HIDDEN), empty(memory)).state
        context = SegmentContext(torch.tensor([True, False]))
        after = step(memory, random(BATCH, LENGTH, HIDDEN, seed=1), written, context).state
        assert torch.equal(after.weights[1], written.weights[1])
        assert not torch.equal(after.weights[0], written.weights[0])

    def test_a_token_reads_what_its_own_segment_has_written_up_to_it(self):
        """As a loop that writes a token and then reads it, from the state before the segment."""
        memory, hidden = build(within_segment=True), random(BATCH, LENGTH, HIDDEN)
        before = step(memory, random(BATCH, LENGTH, HIDDEN, seed=1), empty(memory)).state
        queries = features_of(
            F.linear(hidden, memory.query.weight).unflatten(-1, (HEADS, HEAD)).transpose(1, 2), memory.config
        )
        after, read = advance_literally(before.weights, memory.writing(hidden), "delta", queries)
        output = step(memory, hidden, before)
        torch.testing.assert_close(output.context, memory.combine(read), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output.state.weights, after, rtol=1e-12, atol=1e-12)

    def test_a_segment_in_pieces_is_read_as_the_whole_one(self):
        memory, hidden = build(within_segment=True), random(BATCH, LENGTH, HIDDEN)
        whole = step(memory, hidden, empty(memory))
        pieces, found, earlier = hidden.split([2, 1, 12, 6], dim=1), [], None
        for number, piece in enumerate(pieces):
            complete = EVERY_ROW if number == 3 else None
            output = step(memory, piece, empty(memory), SegmentContext(complete, earlier=earlier))
            earlier = Earlier(pieces[: number + 1], output.projected)
            found.append(output.context)
        torch.testing.assert_close(torch.cat(found, dim=1), whole.context, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output.state.weights, whole.state.weights, rtol=1e-12, atol=1e-12)

    def test_a_row_without_its_memory_still_reads_its_own_segment(self):
        memory, hidden = build(within_segment=True), random(BATCH, LENGTH, HIDDEN)
        before = step(memory, random(BATCH, LENGTH, HIDDEN, seed=1), empty(memory)).state
        context = SegmentContext(EVERY_ROW, without_memory=torch.tensor([True, False]))
        output = step(memory, hidden, before, context)
        torch.testing.assert_close(output.context[0], step(memory, hidden, empty(memory)).context[0])
        torch.testing.assert_close(output.context[1], step(memory, hidden, before).context[1])
        torch.testing.assert_close(output.state.weights, step(memory, hidden, before).state.weights)

    def test_a_new_memory_hardly_forgets(self):
        (memory,) = FastWeightMemoryConfig(0).build(HIDDEN, HEADS, layers=1, segment_length=LENGTH)
        kept = torch.exp(-F.softplus(memory.writing.forgetting_offset))
        assert (memory.writing.forgetting_offset == FORGETTING).all()
        assert (kept**15_000 > 0.49).all()
        assert (memory.gate == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "hebb"}, r"rule=hebb: choose one of delta, sum"),
        ({"features": "relu"}, r"features=relu: choose one of plain, elu, dpfp"),
        ({"strength": "all"}, r"strength=all: choose one of content, loss"),
        ({"dpfp_order": 0}, r"dpfp_order=0: must be at least 1"),
        ({"key_convolution": -1}, r"key_convolution=-1: must be at least 0"),
        ({"within_segment": True, "strength": "loss"}, r"strength=loss with .*losses are not known yet"),
        ({"within_segment": True, "short_term_length": 8}, r"short_term_length=8 with .*set .*short_term_length=0"),
    ],
)
def test_an_error_names_the_option_and_what_to_do(options, message):
    with pytest.raises(ValueError, match=rf"^model\.memory\.{message}"):
        FastWeightMemoryConfig(**options)


def test_fast_weights_learn_through_two_segments_or_within_one():
    FastWeightMemoryConfig().check_training(2)
    FastWeightMemoryConfig(within_segment=True).check_training(1)
    with pytest.raises(ValueError, match=r"training\.bptt_segments=1: .* set training\.bptt_segments=2 or more"):
        FastWeightMemoryConfig().check_training(1)
