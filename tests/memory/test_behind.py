"""What leaves the short-term memory of a layer is what the memory behind it gets; and how memories are chosen."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import ContentAttention, Memory, MemoryOutput, SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.state import MemoryState

BATCH, SEGMENT, HIDDEN, HEADS = 3, 12, 6, 3
EVERY_ROW = torch.ones(BATCH, dtype=torch.bool)


def build(config: MemoryConfig) -> Memory:
    """A trained memory in the place of a new one."""
    memory = config.build(HIDDEN, HEADS, layers=1, segment_length=SEGMENT)[0].double()
    generator = torch.Generator().manual_seed(0)
    for parameter in memory.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return memory


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segments(count: int) -> list[Tensor]:
    return [random(BATCH, SEGMENT, HIDDEN, seed=seed) for seed in range(count)]


def empty(memory: Memory) -> MemoryState:
    return memory.initial_state(BATCH).map_tensors(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )


def attention_of(queries: Tensor) -> ContentAttention:
    def attend(entries: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(queries @ entries.mT / math.sqrt(HIDDEN), dim=-1)
        return weights @ entries, weights.unsqueeze(1)

    return attend


def step(memory: Memory, hidden: Tensor, state: MemoryState, complete: Tensor = EVERY_ROW) -> MemoryOutput:
    """Read a segment, and write it."""
    context = SegmentContext(complete, attend=attention_of(hidden))
    return memory(hidden, state, context, memory.prepare(state, context))


@pytest.mark.parametrize("rate", [4, 2])
def test_what_leaves_the_short_term_memory_is_compressed(rate):
    """Means of `rate`, from the third segment on, of which 5 have room: fewer than one segment makes, or more."""
    memory = build(CompressiveMemoryConfig(2 * SEGMENT, length=5, rate=rate, function="mean"))
    state, text = empty(memory), segments(5)
    means = torch.cat(text, dim=1).unflatten(1, (-1, rate)).mean(2)
    for number, hidden in enumerate(text):
        written = step(memory, hidden, state)
        state = written.state
        made = max(number - 1, 0) * SEGMENT // rate
        kept = min(made, 5)
        assert state.behind.filled.tolist() == [kept] * BATCH
        torch.testing.assert_close(state.behind.entries[:, 5 - kept :], means[:, made - kept : made])
        assert (state.behind.entries[:, : 5 - kept] == 0).all()
        assert written.losses["reconstruction"].shape == (BATCH, SEGMENT)
        assert ((written.losses["reconstruction"] > 0) == (number >= 2)).all()


@pytest.mark.parametrize("options", [{"sticky": True}, {"contraction": "uniform", "sticky": True, "read": "slots"}])
def test_each_row_is_written_as_if_it_were_alone(small_config, options):
    """Row 1 begins a segment later, row 2 is idle in between."""
    memory, text = build(small_config(**options, short_term_length=SEGMENT)), segments(5)
    written = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    state = empty(memory)
    for hidden, complete in zip(text, written, strict=True):
        state = step(memory, hidden, state, complete).state
    for row in range(BATCH):
        index = torch.tensor([row])
        alone = empty(memory).select_rows(index)
        for hidden, complete in zip(text, written[:, row], strict=True):
            if complete:
                alone = step(memory, hidden[index], alone, EVERY_ROW[:1]).state
        for name, tensor in alone.named_tensors().items():
            torch.testing.assert_close(state.select_rows(index).named_tensors()[name], tensor, msg=name)
    assert state.behind.segments.tolist() == [4, 3, 3]


class TestConfig:
    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            (MemoryConfig, {"short_term_length": -1}, r"short_term_length=-1: must be at least 0"),
            (MemoryConfig, {"short_term_length": 0}, r"short_term_length=0: .* choose model/memory=none"),
            (
                CompressiveMemoryConfig,
                {"short_term_length": 0},
                r"short_term_length=0: a compressed memory keeps what leaves .* multiple of the segment",
            ),
            (
                CompressiveMemoryConfig,
                {"short_term_length": 700},
                r"short_term_length=700: .* make it a multiple of training\.segment_length=512",
            ),
            (
                LongTermMemoryConfig,
                {"short_term_length": 700},
                r"short_term_length=700: .* make it a multiple of training\.segment_length=512",
            ),
            (
                CompressiveMemoryConfig,
                {"short_term_length": 512, "rate": 7},
                r"rate=7 does not divide training\.segment_length=512: choose a rate that does",
            ),
        ],
    )
    def test_an_error_names_the_option_and_what_to_do(self, kind, options, message):
        with pytest.raises(ValueError, match=rf"^model\.memory\.{message}"):
            kind(**options).check_segment_length(512)

    def test_a_short_term_memory_alone_has_any_length(self):
        MemoryConfig(700).check_segment_length(512)

    @pytest.mark.parametrize(
        "config", [MemoryConfig(3), CompressiveMemoryConfig(4, rate=2), LongTermMemoryConfig(read="slots")]
    )
    def test_a_stored_configuration_is_found_by_its_kind(self, config):
        assert MemoryConfig.from_json(json.loads(json.dumps(config.to_json()))) == config

    @pytest.mark.parametrize("stored", [{"kind": "nothing"}, {}, {"kind": "long_term", "no_such": 1}])
    def test_a_stored_configuration_of_another_kind_is_refused(self, stored):
        with pytest.raises(ValueError, match=r"memory\.kind=|no_such"):
            MemoryConfig.from_json(stored)
