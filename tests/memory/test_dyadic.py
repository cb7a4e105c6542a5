"""Slots in levels of equal size: each holds the mean of the tokens of its age, however it came to that."""

import math

import pytest
import torch
from torch import Tensor

from infformer.continuous import naive
from infformer.continuous.density import Gaussian
from infformer.evaluation.memory_instruments import WrittenPast
from infformer.memory.dyadic import DyadicSignal
from infformer.memory.long_term import LongTermMemory, LongTermState
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import SegmentContext

SLOTS, LEVELS, LENGTH = 24, 4, 16
ATTENTION = Gaussian(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.1))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(length: int = LENGTH, slots: int = SLOTS, levels: int = LEVELS, **options) -> LongTermMemory:
    config = LongTermMemoryConfig(basis_functions=slots, contraction="dyadic", levels=levels, **options)
    signal = DyadicSignal(config, length).double()
    signal.reset_parameters()
    memory = LongTermMemory(config, 6, 2, signal).double()
    for seed, parameter in enumerate(memory.parameters()):
        parameter.data = random(*parameter.shape, seed=seed)
    return memory


def write(memory: LongTermMemory, segments: int, rows: int = 2) -> tuple[LongTermState, Tensor]:
    """The state after so many segments, and all of their tokens."""
    state, written = memory.initial_state(rows), []
    for seed in range(segments):
        hidden = random(rows, memory.signal.segment_length, 6, seed=seed)
        context = SegmentContext(torch.ones(rows, dtype=torch.bool))
        state = memory(hidden, state, context, memory.prepare(state, context)).state
        written.append(hidden)
    return state, torch.cat(written, dim=1)


def values_of(memory: LongTermMemory, state: LongTermState) -> Tensor:
    return state.coefficients / (math.sqrt(2 * math.pi) * memory.signal.widths[0])


class TestWrite:
    @pytest.mark.parametrize("segments", [1, 2, 3, 5, 9])
    def test_slots_are_the_means_of_all_that_was_written(self, segments):
        memory = build()
        state, written = write(memory, segments)
        expected = naive.dyadic_slots(written, SLOTS, LEVELS)
        torch.testing.assert_close(values_of(memory, state), expected, rtol=1e-12, atol=1e-12)

    def test_six_levels_of_128_reach_back_8064_tokens(self):
        signal = DyadicSignal(LongTermMemoryConfig(basis_functions=768, contraction="dyadic", levels=6), 512)
        assert signal.ages.max() + 2**5 == 8064
        assert signal.ages.tolist() == sorted(signal.ages.tolist(), reverse=True)

    def test_where_segments_do_not_fit_the_levels_nothing_is_lost_or_doubled_within_reach(self):
        """Slots at borders share tokens: the sum of all, each as often as a slot has tokens, is that of the tokens."""
        memory = build(length=10)
        state, written = write(memory, 5)
        of_slot = 2.0 ** torch.arange(LEVELS).repeat_interleave(SLOTS // LEVELS).flip(0)
        total = (of_slot.unsqueeze(-1) * values_of(memory, state)).sum(1)
        torch.testing.assert_close(total, written.sum(1), rtol=1e-11, atol=1e-11)

    def test_a_row_that_is_not_written_stays(self):
        memory = build()
        state, _ = write(memory, 2)
        context = SegmentContext(torch.tensor([True, False]))
        after = memory(random(2, LENGTH, 6), state, context, memory.prepare(state, context)).state
        assert torch.equal(after.coefficients[1], state.coefficients[1])
        assert not torch.equal(after.coefficients[0], state.coefficients[0])


class TestRead:
    @pytest.mark.parametrize("read", ["slots", "gibbs", "moments"])
    @pytest.mark.parametrize("segments", [1, 2, 6])
    def test_only_what_was_written_is_looked_at(self, read, segments):
        """After a segment of 16 tokens 6 + 5 slots hold something, after two 6 + 6 + 4."""
        memory = build(read=read)
        state, written = write(memory, segments)
        held = memory.signal.log_tokens(state.segments).exp()
        real = held > 0
        assert held.sum(-1).tolist() == pytest.approx([min(segments * LENGTH, 90)] * 2)
        assert real.sum(-1).tolist() == [{1: 11, 2: 16, 6: 24}[segments]] * 2
        assert (naive.dyadic_slots(written, SLOTS, LEVELS).abs().sum(-1) > 0).equal(real)
        attention = memory.read(random(2, 5, 6, seed=9), state).attention
        if read != "moments":
            assert (attention.weights.transpose(1, 3)[~real] == 0).all()
            torch.testing.assert_close(attention.weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))

    @pytest.mark.parametrize("read", ["slots", "gibbs"])
    def test_what_is_read_is_attention_on_all_tokens_each_as_its_slot_is(self, read):
        memory = build(read=read)
        state, written = write(memory, 6)
        hidden, slots = random(2, 5, 6, seed=9), naive.dyadic_slots(written, SLOTS, LEVELS)
        of_token = torch.arange(SLOTS).repeat_interleave(2 ** torch.arange(LEVELS).repeat_interleave(6).flip(0))
        tokens = slots[:, of_token]
        weights = naive.Weights(*(getattr(memory, name).weight for name in naive.Weights._fields))
        scores = naive.scores(hidden, tokens, weights.query, weights.key, 2)
        if read == "gibbs":  # both ends count half
            scores[..., (of_token == 0) | (of_token == SLOTS - 1)] -= math.log(2)
        expected = naive.context(scores.softmax(-1), tokens, weights)
        torch.testing.assert_close(memory.read(hidden, state).context, expected, rtol=1e-10, atol=1e-10)

    def test_an_empty_row_reads_exactly_nothing(self):
        memory = build(read="gibbs")
        assert (memory.read(random(2, 5, 6), memory.initial_state(2)).context == 0).all()

    def test_gradients_are_numerically_right(self):
        memory = build(slots=8, levels=2, length=4, read="gibbs")

        def function(first: Tensor, second: Tensor) -> Tensor:
            state = memory.initial_state(1)
            for hidden in (first, second):
                context = SegmentContext(torch.ones(1, dtype=torch.bool))
                output = memory(hidden, state, context, memory.prepare(state, context))
                state = output.state
            return output.context

        assert torch.autograd.gradcheck(function, [random(1, 4, 6, seed=seed).requires_grad_() for seed in (0, 1)])


class TestInstruments:
    def test_tokens_lie_where_their_slots_do_and_the_newest_are_told_exactly(self):
        memory = build()
        past = WrittenPast(memory)
        state, written = write(memory, 7, rows=1)
        for hidden in written.split(LENGTH, dim=1):
            past.write(hidden, ATTENTION)
        places = past.places
        assert len(places) == 7 * LENGTH
        assert (places.diff() >= 0).all()
        told = (memory.signal.heights(places) @ state.coefficients[0]).flip(0)
        slots = naive.dyadic_slots(written, SLOTS, LEVELS)[0].flip(0)
        of_token = torch.arange(SLOTS).repeat_interleave(2 ** torch.arange(LEVELS).repeat_interleave(SLOTS // LEVELS))
        reached = min(len(told), len(of_token))
        torch.testing.assert_close(told[:reached], slots[of_token[:reached]], rtol=1e-10, atol=1e-10)
        explained = past.reconstruct(state)
        assert explained["by_age"][0] > explained["by_age"][-1]

    def test_a_shuffled_past_has_the_same_slots_in_another_order_and_an_empty_one_stays_empty(self):
        memory = build()
        state, _ = write(memory, 2)
        state = state.reset_rows(torch.tensor([False, True]))
        shuffled = memory.shuffle_time(state, memory.time_shuffle())
        assert torch.equal(shuffled.coefficients[1], state.coefficients[1])
        one, other = shuffled.coefficients[0], state.coefficients[0]
        assert torch.equal(one[:8], other[:8])  # 16 of 24 hold something
        assert not torch.equal(one, other)
        assert torch.equal(one.sort(dim=0).values, other.sort(dim=0).values)


class TestConfig:
    @pytest.mark.parametrize(
        ("option", "value"),
        [("levels", 5), ("levels", 0), ("sticky", True), ("points", 12), ("widths", [0.1])],
    )
    def test_an_error_names_the_option_and_the_value(self, option, value):
        with pytest.raises(ValueError, match=rf"^model.memory.{option}=") as error:
            LongTermMemoryConfig(**{"basis_functions": 24, "contraction": "dyadic", "levels": 4, option: value})
        assert str(value).lower() in str(error.value).lower()

    def test_a_stored_configuration_is_read_again(self):
        config = LongTermMemoryConfig(basis_functions=24, contraction="dyadic", levels=4)
        assert LongTermMemoryConfig.from_json(config.to_json()) == config
