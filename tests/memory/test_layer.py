"""What leaves one memory of a layer is what the next one gets."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.compressive import CompressiveMemoryConfig, ContentAttention
from infformer.memory.layer import LayerMemory, LayerState, MemoryConfig, Written
from infformer.memory.long_term import ContinuousSignal, LongTermMemoryConfig, LongTermState

BATCH, SEGMENT, HIDDEN, HEADS, RATE = 3, 12, 6, 3, 4
EVERY_ROW = torch.ones(BATCH, dtype=torch.bool)
CPU = torch.device("cpu")
BuildLayer = Callable[..., LayerMemory]
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
def build_layer(small_config) -> BuildLayer:
    """A trained layer in the place of a new one; `long_term` are options of the small configuration."""

    def build(
        short_term_length: int = 0, compressive: dict | None = None, long_term: dict | None = None
    ) -> LayerMemory:
        config = MemoryConfig(
            SEGMENT,
            short_term_length,
            None if compressive is None else CompressiveMemoryConfig(**{"length": 5, "rate": RATE, **compressive}),
            None if long_term is None else small_config(**long_term),
        )
        signal = None if config.long_term is None else ContinuousSignal(config.long_term)
        layer = LayerMemory(config, HIDDEN, HEADS, signal).double()
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.6, generator=generator)
        return layer

    return build


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segments(count: int) -> list[Tensor]:
    return [random(BATCH, SEGMENT, HIDDEN, seed=seed) for seed in range(count)]


def empty(layer: LayerMemory) -> LayerState:
    return layer.initial_state(BATCH, CPU).map_tensors(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )


def attention_of(queries: Tensor) -> ContentAttention:
    def attend(entries: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(queries @ entries.mT / math.sqrt(HIDDEN), dim=-1)
        return weights @ entries, weights.unsqueeze(1)

    return attend


def step(
    layer: LayerMemory, hidden: Tensor, state: LayerState, whole: Tensor = EVERY_ROW, offsets: Tensor | None = None
) -> Written:
    """Read a segment, then write it."""
    reading = layer.read(hidden, state)
    operators = None
    if layer.long_term is not None:
        operators = layer.long_term.signal.operators(state.long_term.segments)
    return layer.write(hidden, state, whole, reading, operators, offsets, attention_of(hidden))


class TestNothing:
    def test_a_layer_without_memories_remembers_nothing(self, build_layer):
        layer = build_layer()
        state = empty(layer)
        written = step(layer, segments(1)[0], state)
        assert layer.read(segments(1)[0], state) is None
        assert list(layer.parameters()) == []
        assert written.reconstruction is None
        assert written.state.long_term is None
        for name, tensor in written.state.named_tensors().items():
            assert torch.equal(tensor, state.named_tensors()[name])


class TestShortTerm:
    @pytest.mark.parametrize("length", [1, 5, SEGMENT, 30])
    def test_keeps_the_last_hidden_states(self, build_layer, length):
        layer = build_layer(length)
        state, text = empty(layer), torch.cat(segments(4), dim=1)
        for number, hidden in enumerate(segments(4), start=1):
            state = step(layer, hidden, state).state
            read = text[:, : number * SEGMENT]
            assert torch.equal(state.short_term.entries[:, -read.shape[1] :], read[:, -length:])
            assert state.short_term.filled.tolist() == [min(length, number * SEGMENT)] * BATCH


class TestCompressed:
    def test_what_leaves_the_short_term_memory_compressed(self, build_layer):
        """Means of 4, from the third segment on; of 6 entries at the fourth, 5 have room."""
        layer = build_layer(2 * SEGMENT, {"function": "mean"})
        state, text = empty(layer), segments(5)
        means = torch.cat(text, dim=1).unflatten(1, (-1, RATE)).mean(2)
        for number, hidden in enumerate(text):
            written = step(layer, hidden, state)
            state = written.state
            entries = max(number - 1, 0) * SEGMENT // RATE
            assert state.compressed.filled.tolist() == [min(entries, 5)] * BATCH
            torch.testing.assert_close(
                state.compressed.entries[:, 5 - min(entries, 5) :], means[:, max(entries - 5, 0) : entries]
            )
            assert (state.compressed.entries[:, : 5 - min(entries, 5)] == 0).all()
            assert written.reconstruction.shape == (BATCH, SEGMENT)
            assert ((written.reconstruction > 0) == (number >= 2)).all()

    def test_a_segment_is_compressed_to_more_entries_than_there_is_room_for(self, build_layer):
        layer = build_layer(SEGMENT, {"function": "mean", "rate": 2})
        state = empty(layer)
        for hidden in segments(2):
            state = step(layer, hidden, state).state
        means = segments(1)[0].unflatten(1, (-1, 2)).mean(2)
        torch.testing.assert_close(state.compressed.entries, means[:, -5:])

    def test_the_convolution_learns_from_the_error_alone(self, build_layer):
        """Not from what the next segments read: the queue holds no graph."""
        layer = build_layer(SEGMENT, {"function": "convolution"})
        state = empty(layer)
        for hidden in segments(2):
            written = step(layer, hidden.requires_grad_(), state)
            state = written.state
        assert not any(tensor.requires_grad for tensor in state.named_tensors().values())
        assert written.reconstruction.requires_grad
        for parameter in layer.parameters():
            (gradient,) = torch.autograd.grad(written.reconstruction.sum(), parameter, retain_graph=True)
            assert (gradient != 0).all()

    @pytest.mark.parametrize("function", ["convolution", "mean", "max", "most_used"])
    def test_rows_that_are_not_full_have_no_error(self, build_layer, function):
        """Row 0 is full, row 1 is not yet, row 2 is full and idle."""
        layer = build_layer(SEGMENT, {"function": function})
        first = step(layer, segments(1)[0], empty(layer), whole=torch.tensor([True, False, True])).state
        written = step(layer, segments(2)[1], first, whole=torch.tensor([True, True, False]))
        assert (written.reconstruction[0] > 0).all()
        assert (written.reconstruction[1:] == 0).all()
        assert written.state.compressed.filled.tolist() == [SEGMENT // RATE, 0, 0]
        assert written.state.short_term.filled.tolist() == [SEGMENT] * 3


class TestLongTerm:
    @pytest.mark.parametrize("short_term_segments", [0, 1, 2])
    @pytest.mark.parametrize("random_offsets", [False, True])
    @every_long_term
    def test_gets_what_has_left_the_short_term_memory(self, build_layer, options, short_term_segments, random_offsets):
        """As a long-term memory alone that is given the segments by hand, when they leave."""
        layer = build_layer(short_term_segments * SEGMENT, long_term=options)
        long_term, text = layer.long_term, segments(5)
        state, by_hand = empty(layer), empty(layer).long_term
        for number, hidden in enumerate(text):
            offsets = random(BATCH, 20, seed=number).sigmoid() if random_offsets else None
            state = step(layer, hidden, state, offsets=offsets).state
            if number >= short_term_segments:
                leaving = text[number - short_term_segments]
                operators, attention = (
                    long_term.signal.operators(by_hand.segments),
                    long_term.read(hidden, by_hand).attention,
                )
                by_hand = long_term.write(leaving, by_hand, operators, attention, offsets)
            assert torch.equal(state.long_term.coefficients, by_hand.coefficients)
            assert state.long_term.segments.tolist() == [max(number + 1 - short_term_segments, 0)] * BATCH
        assert by_hand.coefficients.abs().max() > 0.01

    @every_long_term
    def test_rows_that_begin_at_different_times(self, build_layer, options):
        """Each row as if it were alone; row 1 begins a segment later, row 2 is idle in between."""
        layer, text = build_layer(SEGMENT, long_term=options), segments(5)
        written = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
        state = empty(layer)
        for hidden, whole in zip(text, written, strict=True):
            state = step(layer, hidden, state, whole).state
        for row in range(BATCH):
            index = torch.tensor([row])
            alone = empty(layer).select_rows(index)
            for hidden, whole in zip(text, written[:, row], strict=True):
                if whole:
                    alone = step(layer, hidden[index], alone, EVERY_ROW[:1]).state
            for name, tensor in alone.named_tensors().items():
                torch.testing.assert_close(state.select_rows(index).named_tensors()[name], tensor, msg=name)
        assert state.long_term.segments.tolist() == [4, 3, 3]

    def test_gradients_pass_where_there_is_no_short_term_memory(self, build_layer):
        """Within a step; a short-term memory keeps hidden states without their graph, as in Transformer-XL."""
        for length, flows in ((0, True), (SEGMENT, False)):
            layer = build_layer(length, long_term={})
            state, text = empty(layer), [hidden.requires_grad_() for hidden in segments(2)]
            for hidden in text:
                state = step(layer, hidden, state).state
            for gradient in torch.autograd.grad(state.long_term.coefficients.sum(), text, materialize_grads=True):
                assert ((gradient.abs().sum(-1) > 0) == flows).all()

    def test_reads_as_the_long_term_memory_does(self, build_layer):
        layer = build_layer(SEGMENT, long_term={})
        filled = LongTermState(random(BATCH, 16, HIDDEN, seed=9), torch.tensor([1, 2, 3]))
        state = LayerState(empty(layer).short_term, empty(layer).compressed, filled)
        hidden = segments(1)[0]
        assert torch.equal(layer.read(hidden, state).context, layer.long_term.read(hidden, filled).context)


class TestRows:
    @every_kind
    def test_rows_that_are_not_whole_stay_as_they_are(self, build_layer, options):
        layer = build_layer(**options)
        state = empty(layer)
        for hidden in segments(3):
            state = step(layer, hidden, state).state
        after = step(layer, segments(4)[3], state, torch.tensor([False, True, False])).state
        for name, tensor in state.named_tensors().items():
            assert torch.equal(after.named_tensors()[name][[0, 2]], tensor[[0, 2]]), name
        changed = [n for n, t in state.named_tensors().items() if not torch.equal(after.named_tensors()[n][1], t[1])]
        assert changed

    @every_kind
    def test_the_state_goes_to_a_file_and_back(self, build_layer, options):
        """Queues of no length and absent parts included; also as more and as fewer rows."""
        layer = build_layer(**options)
        state = empty(layer)
        for hidden in segments(3):
            state = step(layer, hidden, state).state
        named = state.named_tensors()
        assert ("long_term.coefficients" in named) == ("long_term" in options)
        restored = empty(layer).with_tensors(named)
        joined = LayerState.concatenate(state.split(BATCH))
        twice = empty(layer).with_tensors({name: torch.cat([tensor, tensor]) for name, tensor in named.items()})
        for other in (restored, joined, *twice.split(2)):
            assert list(other.named_tensors()) == list(named)
            for name, tensor in other.named_tensors().items():
                assert tensor.dtype == named[name].dtype
                assert torch.equal(tensor, named[name]), name


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"segment_length": 0}, r"training\.segment_length=0: must be at least 1"),
            ({"short_term_length": -1}, r"model\.short_term_length=-1: must not be negative"),
            (
                {"compressive": CompressiveMemoryConfig(), "long_term": LongTermMemoryConfig()},
                r"model\.compressive and model\.memory exclude each other: set one of them to null",
            ),
            (
                {"compressive": CompressiveMemoryConfig()},
                r"model\.short_term_length=0: a compressed memory keeps what leaves .* such as 512",
            ),
            (
                {"short_term_length": 700, "compressive": CompressiveMemoryConfig()},
                r"model\.short_term_length=700: .* make it a multiple of training\.segment_length=512",
            ),
            (
                {"short_term_length": 700, "long_term": LongTermMemoryConfig()},
                r"model\.short_term_length=700: .* make it a multiple of training\.segment_length=512",
            ),
            (
                {"short_term_length": 512, "compressive": CompressiveMemoryConfig(rate=7)},
                r"model\.compressive\.rate=7 does not divide training\.segment_length=512: choose a rate that does",
            ),
            (
                {"segment_length": 64, "long_term": LongTermMemoryConfig()},
                r"model\.memory\.segment_length=512 is not training\.segment_length=64: set the latter",
            ),
        ],
    )
    def test_an_error_names_the_option_and_what_to_do(self, options, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            MemoryConfig(**options)

    def test_a_short_term_memory_alone_has_any_length(self):
        assert MemoryConfig(segment_length=512, short_term_length=700).short_term_length == 700
