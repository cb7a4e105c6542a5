"""Room for what was badly predicted: losses are carried along with the signal, and what costs more gets more of it."""

import pytest
import torch
from torch import Tensor

from infformer.continuous.density import Gaussian
from infformer.evaluation.memory_instruments import WrittenPast
from infformer.memory.long_term import LongTermState
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import SegmentContext
from infformer.memory.sticky import moved_losses, with_new_losses

LENGTH, BINS = 12, 32
EVEN = Gaussian(torch.full((1, 1, 1), 0.5).double(), torch.full((1, 1, 1), 1e6).double())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write(memory, state: LongTermState, hidden: Tensor, losses: Tensor, complete: Tensor | None = None):
    """As a model does: the segment, and then its losses."""
    complete = torch.ones(len(hidden), dtype=torch.bool) if complete is None else complete
    context = SegmentContext(complete)
    output = memory(hidden, state, context, memory.prepare(state, context))
    return output, memory.write_by_losses(output.state, output.pending, losses)


class TestNewLosses:
    @pytest.mark.parametrize("length", [3, 12, 100])
    def test_each_bin_behind_the_past_has_the_mean_of_the_tokens_that_stand_there(self, length):
        new, contraction = random(2, length).abs(), torch.tensor([0.0, 0.6], dtype=torch.float64)
        found = with_new_losses(torch.full((2, BINS), -1.0, dtype=torch.float64), new, contraction)
        for row, first in enumerate(contraction.tolist()):
            for place in range(BINS):
                if (place + 0.5) / BINS <= first:
                    assert found[row, place] == -1
                    continue
                left, right = max(place / BINS, first), (place + 1) / BINS
                total = 0.0
                for token in range(length):
                    ends = [first + (1 - first) * edge / length for edge in (token, token + 1)]
                    total += float(new[row, token]) * max(0.0, min(right, ends[1]) - max(left, ends[0]))
                assert float(found[row, place]) == pytest.approx(total / (right - left), abs=1e-9)

    def test_losses_of_the_past_go_where_its_samples_go(self):
        """Sample m of M, taken at positions[m], comes to τ(m + ½)/M."""
        losses = random(2, BINS).abs()
        positions = random(2, 40, seed=1).sigmoid().sort(dim=-1).values
        contraction = torch.tensor([0.5, 0.75], dtype=torch.float64)
        moved = moved_losses(losses, positions, contraction)
        for row, rate in enumerate(contraction.tolist()):
            for place in range(int(rate * BINS)):
                sample = int((place + 0.5) / BINS / rate * 40)
                assert moved[row, place] == losses[row, int(positions[row, sample] * BINS)]


class TestMemory:
    @pytest.mark.parametrize("contraction", ["constant", "uniform"])
    def test_where_all_is_predicted_alike_nothing_moves(self, build_memory, contraction):
        memory = build_memory(sticky=True, sticky_by="loss", contraction=contraction)
        state = memory.initial_state(2)
        for seed in range(4):
            _, state = write(memory, state, random(2, LENGTH, 6, seed=seed), torch.full((2, LENGTH), 2.5))
        torch.testing.assert_close(state.losses, torch.full_like(state.losses, 2.5))
        positions = memory.past_positions(EVEN, losses=state.losses)
        torch.testing.assert_close(positions, ((torch.arange(20) + 0.5) / 20).double().expand(2, -1))

    @pytest.mark.parametrize("sticky_by", ["loss", "both"])
    def test_what_was_badly_predicted_gets_more_room(self, build_memory, sticky_by):
        memory = build_memory(sticky=True, sticky_by=sticky_by, contraction="uniform", past_samples=64)
        losses = torch.full((1, LENGTH), 0.5, dtype=torch.float64)
        losses[:, 4:8] = 4.0
        state, past = memory.initial_state(1), WrittenPast(memory)
        for seed in range(3):
            hidden = random(1, LENGTH, 6, seed=seed)
            before = state.losses
            output, state = write(memory, state, hidden, losses)
            past.write(hidden, EVEN if sticky_by == "both" else output.reading.attention, before)
        rooms = past.places[:LENGTH].diff()
        assert rooms[4:7].mean() > 4 * torch.cat([rooms[:3], rooms[8:]]).mean()

    def test_both_is_the_product_of_attention_and_losses(self, build_memory):
        memory = build_memory(sticky=True, sticky_by="both")
        attention = Gaussian(torch.full((1, 1, 1), 0.2).double(), torch.full((1, 1, 1), 0.05).double())
        losses = random(1, BINS).abs() + 0.1
        memory_of = {by: build_memory(sticky=True, sticky_by=by) for by in ("attention", "loss")}
        product = memory_of["attention"].histogram(attention) * memory_of["loss"].histogram(attention, losses)
        torch.testing.assert_close(memory.histogram(attention, losses), product / product.sum())

    def test_a_row_that_is_not_written_keeps_its_losses(self, build_memory):
        memory = build_memory(sticky=True, sticky_by="loss")
        _, state = write(memory, memory.initial_state(2), random(2, LENGTH, 6), random(2, LENGTH).abs())
        rows = torch.tensor([True, False])
        _, after = write(memory, state, random(2, LENGTH, 6, seed=1), random(2, LENGTH, seed=1).abs(), rows)
        assert torch.equal(after.losses[1], state.losses[1])
        assert not torch.equal(after.losses[0], state.losses[0])

    def test_a_past_that_is_shuffled_takes_its_losses_along(self, build_memory):
        memory = build_memory(sticky=True, sticky_by="loss")
        _, state = write(memory, memory.initial_state(2), random(2, LENGTH, 6), random(2, LENGTH).abs())
        shuffled = memory.shuffle_time(state, memory.time_shuffle())
        blocks = state.losses.unflatten(-1, (16, 2))
        for block in range(16):
            assert torch.equal(shuffled.losses.unflatten(-1, (16, 2))[:, block], blocks[:, (5 * block + 3) % 16])


def test_losses_without_stickiness_are_refused():
    with pytest.raises(ValueError, match=r"^model.memory.sticky_by=loss: without model.memory.sticky=true"):
        LongTermMemoryConfig(sticky_by="loss")
