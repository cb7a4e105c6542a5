"""What leaves the short-term memory of a layer is what the memory behind it gets."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term import LongTermMemoryConfig, LongTermState
from infformer.memory.memory import ContentAttention, Memory, MemoryOutput, SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.short_term import ShortTermState
from infformer.memory.state import MemoryState

BATCH, SEGMENT, HIDDEN, HEADS, RATE = 3, 12, 6, 3, 4
EVERY_ROW = torch.ones(BATCH, dtype=torch.bool)
Build = Callable[..., Memory]
LONG_TERM = {
    "plain": {},
    "sticky": {"sticky": True},
    "uniform": {"contraction": "uniform"},
    "uniform, sticky, by content": {"contraction": "uniform", "sticky": True, "read": "slots"},
}
KINDS = {
    "short": {"short_term_length": 17},
    "compressive": {"short_term_length": SEGMENT, "compressive": {}},
    "long": {"long_term": {}},
    "short and long": {"short_term_length": SEGMENT, "long_term": {"sticky": True}},
}
every_long_term = pytest.mark.parametrize("options", LONG_TERM.values(), ids=LONG_TERM)
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture
def build(small_config) -> Build:
    """A trained memory in the place of a new one; `long_term` are options of the small configuration."""

    def make(short_term_length: int = 0, compressive: dict | None = None, long_term: dict | None = None) -> Memory:
        if compressive is not None:
            options = {"short_term_length": short_term_length, "length": 5, "rate": RATE, **compressive}
            config: MemoryConfig = CompressiveMemoryConfig(**options)
        elif long_term is not None:
            config = small_config(**long_term, short_term_length=short_term_length)
        else:
            config = MemoryConfig(short_term_length)
        memory = config.build(HIDDEN, HEADS, layers=1, segment_length=SEGMENT)[0].double()
        generator = torch.Generator().manual_seed(0)
        for parameter in memory.parameters():
            nn.init.normal_(parameter, std=0.6, generator=generator)
        return memory

    return make


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segments(count: int) -> list[Tensor]:
    return [random(BATCH, SEGMENT, HIDDEN, seed=seed) for seed in range(count)]


def empty(memory: Memory) -> MemoryState:
    return memory.initial_state(BATCH).map_tensors(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )


def long(state: MemoryState) -> LongTermState:
    """The state of the long-term memory, alone or behind another."""
    return state.behind if isinstance(state, ShortTermState) else state


def attention_of(queries: Tensor) -> ContentAttention:
    def attend(entries: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(queries @ entries.mT / math.sqrt(HIDDEN), dim=-1)
        return weights @ entries, weights.unsqueeze(1)

    return attend


def step(
    memory: Memory, hidden: Tensor, state: MemoryState, complete: Tensor = EVERY_ROW, noise: Tensor | None = None
) -> MemoryOutput:
    """Read a segment, and write it."""
    context = SegmentContext(complete, noise, attention_of(hidden))
    return memory(hidden, state, context, memory.prepare(state, context))


class TestShortTerm:
    @pytest.mark.parametrize("length", [1, 5, SEGMENT, 30])
    def test_keeps_the_last_hidden_states(self, build, length):
        memory = build(length)
        state, text = empty(memory), torch.cat(segments(4), dim=1)
        for number, hidden in enumerate(segments(4), start=1):
            state = step(memory, hidden, state).state
            read = text[:, : number * SEGMENT]
            assert torch.equal(state.short_term.entries[:, -read.shape[1] :], read[:, -length:])
            assert state.short_term.filled.tolist() == [min(length, number * SEGMENT)] * BATCH


class TestCompressed:
    def test_what_leaves_the_short_term_memory_compressed(self, build):
        """Means of 4, from the third segment on; of 6 entries at the fourth, 5 have room."""
        memory = build(2 * SEGMENT, {"function": "mean"})
        state, text = empty(memory), segments(5)
        means = torch.cat(text, dim=1).unflatten(1, (-1, RATE)).mean(2)
        for number, hidden in enumerate(text):
            written = step(memory, hidden, state)
            state = written.state
            entries = max(number - 1, 0) * SEGMENT // RATE
            assert state.behind.filled.tolist() == [min(entries, 5)] * BATCH
            torch.testing.assert_close(
                state.behind.entries[:, 5 - min(entries, 5) :], means[:, max(entries - 5, 0) : entries]
            )
            assert (state.behind.entries[:, : 5 - min(entries, 5)] == 0).all()
            assert written.losses["reconstruction"].shape == (BATCH, SEGMENT)
            assert ((written.losses["reconstruction"] > 0) == (number >= 2)).all()

    def test_a_segment_is_compressed_to_more_entries_than_there_is_room_for(self, build):
        memory = build(SEGMENT, {"function": "mean", "rate": 2})
        state = empty(memory)
        for hidden in segments(2):
            state = step(memory, hidden, state).state
        means = segments(1)[0].unflatten(1, (-1, 2)).mean(2)
        torch.testing.assert_close(state.behind.entries, means[:, -5:])

    def test_the_convolution_learns_from_the_error_alone(self, build):
        """Not from what the next segments read: the queue holds no graph."""
        memory = build(SEGMENT, {"function": "convolution"})
        state = empty(memory)
        for hidden in segments(2):
            written = step(memory, hidden.requires_grad_(), state)
            state = written.state
        assert not any(tensor.requires_grad for tensor in state.named_tensors().values())
        assert written.losses["reconstruction"].requires_grad
        for parameter in memory.parameters():
            (gradient,) = torch.autograd.grad(written.losses["reconstruction"].sum(), parameter, retain_graph=True)
            assert (gradient != 0).all()

    @pytest.mark.parametrize("function", ["convolution", "mean", "max", "most_used"])
    def test_rows_that_are_not_full_have_no_error(self, build, function):
        """Row 0 is full, row 1 is not yet, row 2 is full and idle."""
        memory = build(SEGMENT, {"function": function})
        first = step(memory, segments(1)[0], empty(memory), complete=torch.tensor([True, False, True])).state
        written = step(memory, segments(2)[1], first, complete=torch.tensor([True, True, False]))
        assert (written.losses["reconstruction"][0] > 0).all()
        assert (written.losses["reconstruction"][1:] == 0).all()
        assert written.state.behind.filled.tolist() == [SEGMENT // RATE, 0, 0]
        assert written.state.short_term.filled.tolist() == [SEGMENT] * 3


class TestLongTerm:
    @pytest.mark.parametrize("short_term_segments", [0, 1, 2])
    @pytest.mark.parametrize("with_noise", [False, True])
    @every_long_term
    def test_gets_what_has_left_the_short_term_memory(self, build, options, short_term_segments, with_noise):
        """As a long-term memory alone that is given the segments by hand, when they leave."""
        memory = build(short_term_segments * SEGMENT, long_term=options)
        long_term, text = memory.behind if short_term_segments else memory, segments(5)
        state, by_hand = empty(memory), empty(long_term)
        for number, hidden in enumerate(text):
            noise = random(BATCH, 20, seed=number).sigmoid() if with_noise else None
            state = step(memory, hidden, state, noise=noise).state
            if number >= short_term_segments:
                leaving = text[number - short_term_segments]
                operators, attention = (
                    long_term.signal.operators(by_hand.segments),
                    long_term.read(hidden, by_hand).attention,
                )
                by_hand = long_term.write(leaving, by_hand, operators, attention, noise)
            assert torch.equal(long(state).coefficients, by_hand.coefficients)
            assert long(state).segments.tolist() == [max(number + 1 - short_term_segments, 0)] * BATCH
        assert by_hand.coefficients.abs().max() > 0.01

    @every_long_term
    def test_rows_that_begin_at_different_times(self, build, options):
        """Each row as if it were alone; row 1 begins a segment later, row 2 is idle in between."""
        memory, text = build(SEGMENT, long_term=options), segments(5)
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
        assert long(state).segments.tolist() == [4, 3, 3]

    def test_gradients_pass_where_there_is_no_short_term_memory(self, build):
        """Within a step; a short-term memory keeps hidden states without their graph, as in Transformer-XL."""
        for length, flows in ((0, True), (SEGMENT, False)):
            memory = build(length, long_term={})
            state, text = empty(memory), [hidden.requires_grad_() for hidden in segments(2)]
            for hidden in text:
                state = step(memory, hidden, state).state
            for gradient in torch.autograd.grad(long(state).coefficients.sum(), text, materialize_grads=True):
                assert ((gradient.abs().sum(-1) > 0) == flows).all()

    def test_reads_as_the_long_term_memory_does(self, build):
        memory = build(SEGMENT, long_term={})
        filled = LongTermState(random(BATCH, 16, HIDDEN, seed=9), torch.tensor([1, 2, 3]))
        state = ShortTermState(empty(memory).short_term, filled)
        hidden = segments(1)[0]
        assert torch.equal(step(memory, hidden, state).context, memory.behind.read(hidden, filled).context)


class TestRows:
    @every_kind
    def test_rows_that_are_not_whole_stay_as_they_are(self, build, options):
        memory = build(**options)
        state = empty(memory)
        for hidden in segments(3):
            state = step(memory, hidden, state).state
        after = step(memory, segments(4)[3], state, torch.tensor([False, True, False])).state
        for name, tensor in state.named_tensors().items():
            assert torch.equal(after.named_tensors()[name][[0, 2]], tensor[[0, 2]]), name
        changed = [n for n, t in state.named_tensors().items() if not torch.equal(after.named_tensors()[n][1], t[1])]
        assert changed

    @every_kind
    def test_the_state_goes_to_a_file_and_back(self, build, options):
        """Queues of no length and absent parts included; also as more and as fewer rows."""
        memory = build(**options)
        state = empty(memory)
        for hidden in segments(3):
            state = step(memory, hidden, state).state
        named = state.named_tensors()
        assert any(name.endswith("coefficients") for name in named) == ("long_term" in options)
        restored = empty(memory).with_tensors(named)
        joined = type(state).concatenate(state.split(BATCH))
        twice = empty(memory).with_tensors({name: torch.cat([tensor, tensor]) for name, tensor in named.items()})
        for other in (restored, joined, *twice.split(2)):
            assert list(other.named_tensors()) == list(named)
            for name, tensor in other.named_tensors().items():
                assert tensor.dtype == named[name].dtype
                assert torch.equal(tensor, named[name]), name


class TestConfig:
    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            (MemoryConfig, {"short_term_length": -1}, r"short_term_length=-1: must not be negative"),
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

    def test_every_kind_is_known_to_whoever_imports_memories(self):
        """In a process in which nothing else was imported."""
        text = "from infformer.memory.options import MemoryConfig; print(*(kind.kind for kind in MemoryConfig.kinds()))"
        command, root = [sys.executable, "-c", text], Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=True)
        assert set(done.stdout.split()) == {"short_term", "compressive", "long_term"}

    @pytest.mark.parametrize("stored", [{"kind": "nothing"}, {}, {"kind": "long_term", "no_such": 1}])
    def test_a_stored_configuration_of_another_kind_is_refused(self, stored):
        with pytest.raises(ValueError, match=r"memory\.kind=|no_such"):
            MemoryConfig.from_json(stored)
