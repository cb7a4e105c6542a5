from collections.abc import Callable
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from infformer.continuous import naive
from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Gaussian
from infformer.errors import UserError
from infformer.memory.long_term import LongTermMemory, LongTermState
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import MemoryOutput, SegmentContext
from infformer.memory.signal import ContinuousSignal, WriteOperators
from infformer.memory.sticky import attention_histogram

READS = {
    "affine-gaussian": {"read": "affine", "density": "gaussian"},
    "affine-parabola": {"read": "affine", "density": "truncated_parabola"},
    "moments-gaussian": {"read": "moments", "density": "gaussian"},
    "moments-parabola": {"read": "moments", "density": "truncated_parabola"},
    "moments-sharp": {"read": "moments", "sharpness": 3.0},
    "slots": {"read": "slots"},
    "gibbs": {"read": "gibbs"},
    "gibbs-sharp": {"read": "gibbs", "sharpness": 2.0, "points": 23},
}
WRITES = {
    "constant": {},
    "constant-sticky": {"sticky": True},
    "constant-sticky-published": {"sticky": True, "sticky_placement": "published"},
    "constant-gate": {"input_gate": True},
    "uniform": {"contraction": "uniform"},
    "uniform-sticky": {"contraction": "uniform", "sticky": True},
    "uniform-gate": {"contraction": "uniform", "input_gate": True},
}
KINDS = {
    f"{read}, {write}": READS[read] | WRITES[write]
    for read, write in (
        ("affine-gaussian", "constant"),
        ("affine-gaussian", "uniform-sticky"),
        ("affine-parabola", "constant-sticky"),
        ("affine-parabola", "uniform"),
        ("moments-gaussian", "constant-sticky-published"),
        ("moments-gaussian", "uniform-gate"),
        ("moments-parabola", "constant-gate"),
        ("moments-parabola", "uniform-sticky"),
        ("slots", "constant-sticky"),
        ("slots", "uniform"),
        ("moments-sharp", "constant"),
        ("gibbs", "constant-sticky"),
        ("gibbs-sharp", "uniform"),
    )
}
"""A write knows of a read where it is sticky: each density decides on a sticky one, and on one that is not."""
every_read = pytest.mark.parametrize("read", READS.values(), ids=READS)
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


class Passage(NamedTuple):
    """What a memory made of a sequence of segments."""

    contexts: list[Tensor]
    divergences: list[Tensor]
    coefficients: Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def used_state(memory: LongTermMemory, segments: list[int], seed: int = 7) -> LongTermState:
    """A memory whose rows have read something, except where 0 segments were written."""
    empty = memory.initial_state(len(segments))
    filled = random(*empty.coefficients.shape, seed=seed).to(empty.coefficients) * 0.3
    written = torch.tensor(segments)
    return LongTermState(filled, written).reset_rows(written == 0)


def step(
    memory: LongTermMemory, hidden: Tensor, state: LongTermState, noise: Tensor | None = None
) -> tuple[MemoryOutput, LongTermState]:
    """Read a segment, and write it."""
    context = SegmentContext(torch.ones(len(hidden), dtype=torch.bool), noise)
    output = memory(hidden, state, context, memory.prepare(state, context))
    return output, output.state


def fast_passage(memory: LongTermMemory, segments: list[Tensor], state: LongTermState) -> Passage:
    contexts, divergences = [], []
    for hidden in segments:
        output, state = step(memory, hidden, state)
        contexts.append(output.context)
        divergences.append(output.losses["divergence"])
    return Passage(contexts, divergences, state.coefficients)


def naive_passage(memory: LongTermMemory, segments: list[Tensor], state: LongTermState) -> Passage:
    """The same, row by row, from the literal equations."""
    rows = [
        _naive_row(memory, [hidden[row : row + 1] for hidden in segments], state.coefficients[row : row + 1], count)
        for row, count in enumerate(state.segments.tolist())
    ]
    contexts = [torch.cat([row.contexts[k] for row in rows]) for k in range(len(segments))]
    divergences = [torch.cat([row.divergences[k] for row in rows]) for k in range(len(segments))]
    return Passage(contexts, divergences, torch.cat([row.coefficients for row in rows]))


EVEN, NARROW = (
    Gaussian(torch.full((1, 1, 1), mean), torch.full((1, 1, 1), variance))
    for mean, variance in ((0.5, 1e6), (0.3, 0.04))
)


def literal_form(config: LongTermMemoryConfig) -> tuple[float, bool]:
    """How far before the ends of their parts samples of the past stand, and whether zeros are fitted outside [0, 1]."""
    if config.contraction == "uniform":
        return 0.5, False
    return (0.5 if config.sticky and config.sticky_placement == "sampled" else 0.0), True


def _naive_row(memory: LongTermMemory, segments: list[Tensor], coefficients: Tensor, count: int) -> Passage:
    config, length = memory.config, memory.signal.segment_length
    grid = torch.linspace(0, 1, config.basis_functions // len(config.widths), dtype=torch.float64)
    basis = torch.tensor([(c, w) for c in grid for w in config.widths], dtype=torch.float64).unbind(dim=1)
    weights = naive.Weights(*(getattr(memory, name).weight for name in naive.Weights._fields))
    contexts, divergences = [], []
    for hidden in segments:
        context, divergence, cumulative = _naive_read(memory, hidden, coefficients, weights, basis)
        contexts.append(context)
        divergences.append(divergence * (count > 0))
        data = naive.gate(hidden, memory.gate.weight, memory.gate.bias) if config.input_gate else hidden
        if count == 0:
            operator = naive.first_operator(length, basis, config.ridge, literal_form(config)[1])
            coefficients = naive.write(None, data, operator, basis)
        else:
            contraction = count / (count + 1) if config.contraction == "uniform" else config.contraction_rate
            stands_for = (
                count * memory.signal.segment_length / config.past_samples if config.contraction == "uniform" else 1.0
            )
            before, zeros = literal_form(config)
            operator = naive.next_operator(
                memory.signal.segment_length,
                config.past_samples,
                contraction,
                basis,
                config.ridge,
                stands_for,
                before,
                zeros,
            )
            positions = (torch.arange(1, config.past_samples + 1).double() - before) / config.past_samples
            if config.sticky:
                mass = naive.histogram(cumulative, config.sticky_bins).detach()
                positions = naive.resample(mass, config.past_samples)
            coefficients = naive.write(coefficients, data, operator, basis, positions)
        count += 1
    return Passage(contexts, divergences, coefficients)


def _naive_read(
    memory: LongTermMemory, hidden: Tensor, coefficients: Tensor, weights: naive.Weights, basis: naive.Basis
) -> tuple[Tensor, Tensor, naive.Cumulative]:
    config, heads = memory.config, memory.heads
    if config.read == "slots":
        context, alpha = naive.slots_read(hidden, coefficients, weights, heads, basis)
        return context, hidden.new_zeros(1, hidden.shape[1]), naive.slots_cumulative(alpha, basis)
    if config.read == "gibbs":
        points = torch.linspace(0, 1, config.points or config.basis_functions, dtype=torch.float64)
        context, density = naive.gibbs_read(hidden, coefficients, weights, heads, basis, points, config.sharpness)
        return context, hidden.new_zeros(1, hidden.shape[1]), naive.gibbs_cumulative(density, points)
    expectation, cumulative = {
        "gaussian": (naive.gaussian_expectation, naive.gaussian_cumulative),
        "truncated_parabola": (naive.truncated_parabola_expectation, naive.truncated_parabola_cumulative),
    }[config.density]
    if config.read == "affine":
        context, mean, variance = naive.affine_read(
            hidden, coefficients, weights, *memory.placement.weight, heads, basis, expectation
        )
    else:
        context, mean, variance = naive.moments_read(
            hidden, coefficients, weights, heads, basis, expectation, config.sharpness
        )
    divergence = naive.variance_divergence(variance, config.prior_standard_deviation).mean(1)
    return context, divergence, cumulative(mean, variance)


def scalar(passage: Passage) -> Tensor:
    """One number that depends on all of a passage, to differentiate."""
    results = [*passage.contexts, *passage.divergences, passage.coefficients]
    return sum((result * random(*result.shape, seed=seed)).sum() for seed, result in enumerate(results))


def gradients(passage: Passage, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(passage), inputs, materialize_grads=True)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_near(rounded: Tensor, exact: Tensor, tolerance: float = 1e-2) -> None:
    """As near as products of bfloat16 are."""
    assert (rounded.float() - exact).norm() <= tolerance * exact.norm()


class TestAgainstTheLiteralEquations:
    @every_kind
    def test_outputs_and_gradients_are_those_of_the_literal_equations(self, build_memory, options):
        """Three segments, chained; of the rows one is new, and the others have had 1 and 4 segments."""
        memory = build_memory(**options)
        segments = [random(3, 12, 6, seed=seed).requires_grad_() for seed in range(3)]
        state = used_state(memory, [0, 1, 4])
        state.coefficients.requires_grad_()
        inputs = [*segments, state.coefficients, *memory.parameters()]

        fast, literal = fast_passage(memory, segments, state), naive_passage(memory, segments, state)
        assert all(context.abs().max() > 1e-3 for context in fast.contexts)
        assert (fast.contexts[0][0] == 0).all()
        for k in range(3):
            assert_close(fast.contexts[k], literal.contexts[k])
            assert_close(fast.divergences[k], literal.divergences[k])
        assert_close(fast.coefficients, literal.coefficients)
        for tensor, one, other in zip(inputs, gradients(fast, inputs), gradients(literal, inputs), strict=True):
            # The literal form has no coefficients of a new row to differentiate by.
            rows = slice(1, None) if tensor is state.coefficients else slice(None)
            assert_close(one[rows], other[rows])
            assert one.isfinite().all()

    @every_read
    def test_every_weight_has_a_gradient(self, build_memory, read):
        """What the test above compares is not zero throughout."""
        memory = build_memory(**read, input_gate=True)
        passage = fast_passage(memory, [random(2, 12, 6, seed=seed) for seed in range(2)], used_state(memory, [1, 2]))
        for name, gradient in zip(
            dict(memory.named_parameters()), gradients(passage, list(memory.parameters())), strict=True
        ):
            assert gradient.abs().max() > 1e-6, name

    @every_read
    def test_random_offsets_reach_the_resampling(self, build_memory, read):
        memory = build_memory(**read, sticky=True)
        hidden, state = random(1, 12, 6), used_state(memory, [2])
        offsets = random(1, 20, seed=3).sigmoid()
        output, after = step(memory, hidden, state, noise=offsets)
        basis = memory.signal.basis
        positions = naive.resample(attention_histogram(output.reading.attention, basis, 32), 20, offsets)
        operator = naive.next_operator(12, 20, 0.5, basis, 0.5, before=0.5)
        expected = naive.write(state.coefficients, hidden, operator, basis, positions)
        assert_close(after.coefficients, expected)
        assert not torch.equal(after.coefficients, step(memory, hidden, state)[1].coefficients)


class TestDrawnRates:
    RATES: ClassVar[list[float]] = [0.25, 0.5, 0.875]

    @pytest.mark.parametrize("sticky", [False, True])
    def test_each_row_is_written_at_the_rate_that_its_last_random_number_draws(self, build_memory, sticky):
        """As a memory is that has no other, and without random numbers at its own."""
        memory = build_memory(training_rates=self.RATES, contraction_rate=0.6, sticky=sticky)
        hidden, state = random(4, 12, 6), used_state(memory, [2, 1, 0, 3])
        assert memory.noise_size == 1 + 20 * sticky
        noise = torch.rand(4, memory.noise_size, generator=torch.Generator().manual_seed(0)).double()
        noise[:, -1] = torch.tensor([0.0, 0.5, 0.9, 0.999])
        _, after = step(memory, hidden, state, noise)
        for row, rate in enumerate([0.25, 0.5, 0.875, 0.875]):
            alone = build_memory(contraction_rate=rate, sticky=sticky)
            _, expected = step(alone, hidden, state, noise[:, :20] if sticky else None)
            assert_close(after.coefficients[row], expected.coefficients[row])
        _, measured = step(memory, hidden, state)
        _, own = step(build_memory(contraction_rate=0.6, sticky=sticky), hidden, state)
        assert torch.equal(measured.coefficients, own.coefficients)


class TestPrecision:
    @every_kind
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_rounds_what_is_read_and_neither_the_state_nor_the_densities(self, build_memory, options, dtype):
        memory = build_memory(torch.float32, **options)
        hidden, state = random(2, 12, 6, dtype=torch.float32), used_state(memory, [1, 3])
        output, after = step(memory, hidden, state)
        with torch.autocast("cpu", dtype=dtype):
            cast, cast_after = step(memory, hidden, state)
        assert cast.context.dtype == dtype
        assert_near(cast.context, output.context)
        assert cast_after.coefficients.dtype == torch.float32
        assert torch.equal(cast_after.coefficients, after.coefficients)
        for one, other in zip(cast.reading.attention, output.reading.attention, strict=True):
            assert torch.equal(one, other)

    @every_kind
    def test_gradients_under_autocast_are_those_of_float32_but_for_rounding(self, build_memory, options):
        """Of two segments, the first of which is read from the memory by the second."""
        memory = build_memory(torch.float32, **options)
        segments = [random(2, 12, 6, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(2)]
        inputs = [*segments, *memory.parameters()]
        exact = gradients(fast_passage(memory, segments, used_state(memory, [1, 3])), inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            passage = fast_passage(memory, segments, used_state(memory, [1, 3]))
        rounded = gradients(passage, inputs)
        assert_near(torch.cat([one.flatten() for one in rounded]), torch.cat([one.flatten() for one in exact]))
        for one, other in zip(rounded, exact, strict=True):
            assert one.dtype == torch.float32
            assert_near(one, other, 2e-2)  # of so few numbers some are a difference of larger ones

    @pytest.mark.parametrize(
        ("options", "dtype"), [*((each, torch.bfloat16) for each in KINDS.values()), ({"sticky": True}, torch.float16)]
    )
    def test_a_model_in_half_precision_rounds_weights_and_hidden_states_alone(self, build_memory, options, dtype):
        memory = build_memory(torch.float32, **options)
        operators = {name: buffer.clone() for name, buffer in memory.signal.named_buffers()}
        memory.to(dtype)
        hidden, state = random(2, 12, 6).to(dtype), used_state(memory, [1, 3])
        for name, buffer in memory.signal.named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, operators[name])
        output, after = step(memory, hidden, state)
        exact = build_memory(torch.float32, **options)
        exact.load_state_dict(memory.state_dict())
        exact_output, exact_after = step(exact, hidden.float(), state)
        assert memory.query.weight.dtype == dtype
        assert output.context.dtype == after.coefficients.dtype == torch.float32
        assert torch.equal(output.context, exact_output.context)
        assert torch.equal(after.coefficients, exact_after.coefficients)

    def test_operators_are_computed_in_float64(self, small_config):
        """Far from what float32 makes of these normal equations."""
        config = small_config(ridge=1e-4)
        signal = ContinuousSignal(config, 12)
        basis = GaussianBasis.even_grid(config.basis_functions, config.widths)
        exact = naive.next_operator(12, 20, 0.5, basis, config.ridge)
        assert (torch.cat([signal.past[0], signal.new[0]]) - exact).norm() < 1e-6 * exact.norm()

    def test_a_signal_from_the_meta_device_is_filled_by_reset_parameters(self, small_config):
        with torch.device("meta"):
            signal = ContinuousSignal(small_config(), 12)
        signal.to_empty(device="cpu").reset_parameters()
        for name, buffer in ContinuousSignal(small_config(), 12).named_buffers():
            assert torch.equal(signal.get_buffer(name), buffer)


class TestContraction:
    def write_indicators(self, memory: LongTermMemory, segments: int) -> Tensor:
        """Segment k is the k-th unit vector at every token; the signal's values at 400 positions, [400, segments]."""
        state = memory.initial_state(1)
        for k in range(segments):
            hidden = torch.eye(segments, dtype=torch.float64)[k].expand(1, memory.signal.segment_length, -1)
            _, state = step(memory, hidden, state)
        positions = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        return memory.signal.basis.evaluate(positions) @ state.coefficients[0]

    @pytest.fixture
    def fine_memory(self, build_memory) -> Callable[..., LongTermMemory]:
        def build(segments: int, **options) -> LongTermMemory:
            return build_memory(
                hidden_size=segments,
                heads=1,
                segment_length=100,
                past_samples=400,
                basis_functions=100,
                widths=[0.01],
                ridge=0.01,
                **options,
            )

        return build

    @pytest.mark.parametrize("segments", [1, 2, 3, 5])
    def test_uniform_gives_every_segment_equal_room(self, fine_memory, segments):
        signal = self.write_indicators(fine_memory(segments, contraction="uniform"), segments)
        share = 400 // segments
        assert (signal.sum(0) / 400 - 1 / segments).abs().max() < 0.01
        for k in range(segments):
            inside = signal[round(k * 400 / segments) + 10 : round((k + 1) * 400 / segments) - 10]
            assert len(inside) > share / 2
            assert (inside[:, k] - 1).abs().max() < 0.1
            assert inside.sum(1).sub(inside[:, k]).abs().max() < 0.1

    def test_uniform_gives_every_token_equal_weight(self):
        """Also of many more tokens than coefficients: in the integral of the signal no token outweighs another."""
        config = LongTermMemoryConfig(None, 32, [0.02, 0.1], past_samples=128, contraction="uniform", ridge=1.0)
        signal, segments = ContinuousSignal(config, 32).double(), 250
        integral = naive.normal_cumulative((1 - signal.centres) / signal.widths)
        integral = integral - naive.normal_cumulative(-signal.centres / signal.widths)
        weights = []
        samples = signal.basis.evaluate(signal.past_steps)
        # Backwards: what the integral sees of each segment when it is written.
        for past, new in reversed(list(zip(*signal.operators(torch.arange(segments))[:2], strict=True))):
            weights.append((new.double() @ integral).sum())
            integral = samples.T @ (past.double() @ integral)
        shares = torch.stack(weights) * segments
        assert (shares - 1).abs().max() < 0.2

    @pytest.mark.parametrize("rate", [0.5, 0.75])
    def test_constant_fades_geometrically(self, fine_memory, rate):
        signal = self.write_indicators(fine_memory(5, contraction_rate=rate), 5)
        room = signal.sum(0) / 400
        expected = torch.tensor([rate**4] + [(1 - rate) * rate ** (4 - k) for k in range(1, 5)])
        assert (room - expected).abs().max() < 0.01


class TestManySegments:
    """Of two channels: a constant of 1, and the number of the token, counted in segments."""

    def read_all(self, memory: LongTermMemory, segments: int, attention: Gaussian) -> tuple[Tensor, Tensor, Tensor]:
        """What the memory holds on an even grid [400, 2], what at the places of all tokens, and these places."""
        state, places = memory.initial_state(1), torch.zeros(0, dtype=torch.float64)
        past, new, rates = memory.signal.operators(torch.arange(segments))  # all at once, which is much faster
        past = past.expand(segments, -1, -1)
        for segment in range(segments):
            operators = WriteOperators(past[[segment]], new[[segment]], rates[[segment]])
            stamps = segment + (torch.arange(32) + 0.5) / 32
            hidden = torch.stack([torch.ones(32), stamps], dim=-1).unsqueeze(0)
            state = memory.write(hidden, state, operators, attention)
            places = memory.moved_places(places, segment, attention)
        grid = (torch.arange(400) + 0.5) / 400
        signals = (memory.signal.basis.evaluate(at.float()) @ state.coefficients[0] for at in (grid, places))
        return *(signal.double() for signal in signals), places

    @pytest.fixture
    def two_channels(self, build_memory) -> Callable[..., LongTermMemory]:
        def build(**options) -> LongTermMemory:
            sizes = {"segment_length": 32, "basis_functions": 32, "past_samples": 32, "widths": []}
            memory = build_memory(torch.float32, hidden_size=2, heads=1, **sizes, **options)
            return memory.requires_grad_(False)

        return build

    @pytest.mark.parametrize("sticky", [False, True])
    @pytest.mark.parametrize("contraction", ["constant", "uniform"])
    def test_a_constant_stays_and_time_stamps_keep_order_and_place(self, two_channels, contraction, sticky):
        """Over 400 segments, under even attention, by which stickiness moves nothing."""
        memory = two_channels(contraction=contraction, sticky=sticky)
        grid, tokens, places = self.read_all(memory, 400, EVEN)
        # Zeros outside [0, 1], which constant contraction keeps as published, dent the two ends.
        inside = slice(40, -40) if contraction == "constant" else slice(None)
        assert abs(float(grid[:, 0].mean()) - 1) < 0.1
        assert (grid[inside, 0] - 1).abs().max() < 0.1
        assert (places.diff() > 0).all()
        stamps = (grid[:, 1] / grid[:, 0])[inside]
        assert (stamps.diff() > -1).all()
        told = tokens[:, 1] / tokens[:, 0]
        written = (torch.arange(len(told)).double() + 0.5) / 32
        if contraction == "uniform":
            assert (told - written).abs().max() < 8
        else:  # of a past that fades: the last segments, half of the memory and a quarter
            assert (told - written)[-64:].abs().max() < 0.5

    @pytest.mark.parametrize("attention", [EVEN, NARROW], ids=["even", "narrow"])
    @pytest.mark.parametrize("placement", ["sampled", "published"])
    def test_a_sticky_past_that_fades_loses_no_constant(self, two_channels, placement, attention):
        """Whatever is attended to; nothing of the first 70 of 100 segments is left."""
        grid, _, _ = self.read_all(two_channels(sticky=True, sticky_placement=placement), 100, attention)
        assert abs(float(grid[:, 0].mean()) - 1) < 0.1
        assert (grid[40:-40, 0] - 1).abs().max() < 0.15


class TestConfig:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("contraction", "linear"),
            ("read", "dot"),
            ("density", "laplace"),
            ("sticky_placement", "late"),
            ("basis_functions", 0),
            ("basis_functions", 17),
            ("basis_functions", 2),
            ("past_samples", -1),
            ("sticky_bins", 0),
            ("ridge", 0.0),
            ("ridge", 1e-09),
            ("prior_standard_deviation", -0.05),
            ("points", 20),
            ("training_rates", [0.5, 1.0]),
            ("sharpness", 0.0),
            ("sharpness", 20.0),
            ("contraction_rate", 0.0),
            ("contraction_rate", 1.0),
            ("widths", [0.1, 0.0]),
        ],
    )
    def test_an_error_names_the_option_and_the_value(self, small_config, option, value):
        with pytest.raises(ValueError, match=f"^model.memory.{option}=") as error:
            small_config(**{option: value})
        assert str(value) in str(error.value)

    def test_the_published_placement_of_a_past_that_lasts_is_refused(self, small_config):
        with pytest.raises(
            ValueError, match=r"^model.memory.sticky_placement=published .* take sticky_placement=sampled"
        ):
            small_config(contraction="uniform", sticky_placement="published")

    @pytest.mark.parametrize("contraction", ["uniform", "dyadic"])
    def test_a_rate_that_is_not_free_cannot_be_drawn(self, contraction):
        with pytest.raises(ValueError, match=r"^model.memory.training_rates=\[0.5\]: .*take contraction=constant"):
            LongTermMemoryConfig(training_rates=[0.5], contraction=contraction)

    def test_heads_that_do_not_divide_the_width_are_refused(self, small_config):
        with pytest.raises(UserError, match=r"num_attention_heads=4: .*hidden_size=6 among them"):
            small_config().build(6, 4, layers=1, segment_length=12)

    @pytest.mark.parametrize("segment_length", [1, 2, 7, 8, 511, 512])
    def test_every_segment_length_can_be_written(self, build_memory, segment_length):
        memory = build_memory(segment_length=segment_length)
        state = memory.initial_state(2)
        for seed in range(2):
            _, state = step(memory, random(2, segment_length, 6, seed=seed), state)
        assert state.coefficients.shape == (2, 16, 6)

    @pytest.mark.parametrize("functions", [4, 32, 512])
    def test_widths_follow_the_distance_between_centres(self, functions):
        widths = LongTermMemoryConfig(basis_functions=functions).widths
        distance = float(GaussianBasis.even_grid(functions, widths).centres[2])
        assert widths == pytest.approx([1.275 * distance, 2.55 * distance], rel=1e-3)

    def test_functions_that_cannot_have_two_widths_are_refused(self):
        for functions in (1, 2, 33):
            with pytest.raises(ValueError, match=rf"^model.memory.basis_functions={functions}\b"):
                LongTermMemoryConfig(basis_functions=functions)

    def test_the_defaults_are_the_published_ones(self):
        config = LongTermMemoryConfig()
        assert (config.basis_functions, config.past_samples) == (512, 512)
        assert (config.contraction_rate, config.ridge, config.divergence_weight) == (0.5, 0.5, 1e-6)
        assert config.widths == [0.005, 0.01]

    def test_checkpoints_hold_the_weights_alone(self, build_memory):
        weights = {f"{name}.weight" for name in ("query", "key", "value", "output", "placement", "gate")}
        assert set(build_memory(input_gate=True).state_dict()) == weights | {"gate.bias"}


class TestTimeShuffle:
    def test_a_shuffled_signal_is_within_blocks_the_old_one_of_another_block(self):
        config = LongTermMemoryConfig()
        signal = ContinuousSignal(config, 64)
        memory = LongTermMemory(config, 3, 1, signal)
        t = torch.linspace(0, 1, 1024, dtype=torch.float64)
        curve = torch.stack([torch.sin(9 * t), t.square(), torch.cos(30 * t)], dim=-1).float()
        coefficients = torch.linalg.lstsq(signal.basis.evaluate(t.float()), curve, driver="gelsd").solution
        state = LongTermState(coefficients.expand(2, -1, -1).clone(), torch.tensor([3, 0])).reset_rows(
            torch.tensor([False, True])
        )
        shuffled = memory.shuffle_time(state, signal.time_shuffle())
        assert torch.equal(shuffled.segments, state.segments)
        assert torch.equal(shuffled.coefficients[1], torch.zeros_like(coefficients))
        for block in range(16):
            # Where blocks meet the signal jumps, and basis functions of some width cannot follow.
            within = torch.linspace(0.3, 0.7, 9)
            new = signal.basis.evaluate((block + within) / 16) @ shuffled.coefficients[0]
            old = signal.basis.evaluate(((5 * block + 3) % 16 + within) / 16) @ coefficients
            torch.testing.assert_close(new, old, rtol=0, atol=0.03)


class TestMovedPlaces:
    @every_write
    def test_samples_of_the_past_and_tokens_stand_where_they_are_fitted(self, build_memory, write):
        memory = build_memory(**write)
        attention = memory.read(random(1, 12, 6), used_state(memory, [3])).attention
        sampled = memory.past_positions(attention).flatten()
        moved = memory.moved_places(sampled, 3, attention)
        contraction = 3 / 4 if memory.config.contraction == "uniform" else 0.5
        before, _ = literal_form(memory.config)
        expected = [contraction * (m - before) / 20 for m in range(1, 21)]
        expected += [contraction + (1 - contraction) * i / 12 for i in range(1, 13)]
        torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64))

    def test_a_first_segment_fills_all_of_it(self, build_memory):
        memory = build_memory()
        attention = memory.read(random(1, 12, 6), memory.initial_state(1)).attention
        places = memory.moved_places(torch.zeros(0, dtype=torch.float64), 0, attention)
        torch.testing.assert_close(places, (torch.arange(12, dtype=torch.float64) + 0.5) / 12)
