"""What is left of the past, against a chain of least-squares problems in numpy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infformer.continuous.density import Gaussian
from infformer.evaluation.memory_instruments import WrittenPast
from infformer.memory.long_term import LongTermMemory, LongTermState
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.signal import ContinuousSignal

WIDTH, HEADS, SEGMENTS = 256, 2, 5
RIDGE, CONTRACTION = 0.5, 0.5
Array = NDArray[np.float64]


def new_memory(size: int, width: int = WIDTH, **options) -> LongTermMemory:
    config = LongTermMemoryConfig(basis_functions=size, past_samples=size, **options)
    return LongTermMemory(config, width, HEADS, ContinuousSignal(config, size))


def white_noise(size: int, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, size, width, generator=generator) for _ in range(SEGMENTS)]


def attention(size: int, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(1, HEADS, size, generator=generator)
    return Gaussian(mean, 0.01 + 0.02 * torch.rand(1, HEADS, size, generator=generator))


def follow(memory: LongTermMemory, segments: list[Tensor]) -> tuple[WrittenPast, LongTermState]:
    """What a memory has written, noted by the instrument and written in truth."""
    past, state = WrittenPast(memory), memory.initial_state(1)
    with torch.no_grad():
        for number, hidden in enumerate(segments):
            looked = attention(hidden.shape[1], seed=number)
            past.write(hidden, looked)
            state = memory.write(hidden, state, memory.signal.operators(state.segments), looked)
    return past, state


def evaluate(places: Array, size: int) -> Array:
    """Two normal densities at each of size/2 even centres, 1.275 and 2.55 times as wide as the centres are apart."""
    distance = 1 / (size / 2 - 1)
    columns = []
    for centre in np.linspace(0, 1, size // 2):
        for width in (round(1.275 * distance, 6), round(2.55 * distance, 6)):
            columns.append(np.exp(-((places - centre) ** 2) / (2 * width**2)) / (np.sqrt(2 * np.pi) * width))
    return np.stack(columns, axis=1)


def fit(places: Array, values: Array, outside: Array, size: int, weights: Array) -> Array:
    """argmin ‖√W(ΨB − X)‖² + ‖Ψ_outside B‖² + λ‖B‖² as the plain least squares of one augmented system."""
    roots = np.sqrt(weights)[:, None]
    design = np.concatenate([roots * evaluate(places, size), evaluate(outside, size), np.sqrt(RIDGE) * np.eye(size)])
    zeros = np.zeros((len(outside) + size, values.shape[1]))
    return np.linalg.lstsq(design, np.concatenate([roots * values, zeros]), rcond=None)[0]


def reconstruct_by_least_squares(segments: list[Array], contraction: str) -> tuple[list[float], float]:
    """R² of each segment, the newest first, and of all together."""
    size, uniform = len(segments[0]), contraction == "uniform"
    coefficients, places = np.zeros((size, segments[0].shape[1])), np.zeros(0)
    grid = np.arange(1, size + 1) / size
    sampled = grid - 0.5 / size if uniform else grid
    for number, hidden in enumerate(segments):
        if number == 0:
            middles = (np.arange(2 * size) - size // 2 + 0.5) / size
            places = middles[(middles > 0) & (middles < 1)]
            outside = np.zeros(0) if uniform else middles[(middles < 0) | (middles > 1)]
            coefficients = fit(places, hidden, outside, size, np.ones(size))
            continue
        rate = number / (number + 1) if uniform else CONTRACTION
        # As many samples as a segment has tokens stand for `number` segments.
        weights = np.repeat([number if uniform else 1, 1], size)
        margin = 1 / (3 * size)
        outside = np.linspace(-0.5 + margin, 1.5 - margin, 4 * size)
        outside = outside[((outside < 0) | (outside > 1)) & (not uniform)]
        new = rate + (1 - rate) * grid
        samples = evaluate(sampled, size) @ coefficients
        values = np.concatenate([samples, hidden])
        coefficients = fit(np.concatenate([rate * sampled, new]), values, outside, size, weights)
        places = np.concatenate([rate * places, new])
    written = np.concatenate(segments)
    errors = ((written - evaluate(places, size) @ coefficients) ** 2).sum(1)
    scatter = ((written - written.mean(0)) ** 2).sum(1)
    by_age = [
        1 - errors[start : start + size].sum() / scatter[start : start + size].sum()
        for start in range(0, len(written), size)
    ]
    return by_age[::-1], 1 - errors.sum() / scatter.sum()


@pytest.mark.parametrize("contraction", ["constant", "uniform"])
@pytest.mark.parametrize("size", [32, 64])
def test_white_noise_is_reconstructed_as_by_least_squares(size, contraction):
    """The published constants, scaled. No N coefficients explain more than N of the tokens."""
    segments = white_noise(size)
    past, state = follow(new_memory(size, contraction=contraction), segments)
    measured = past.reconstruct(state)
    by_age, total = reconstruct_by_least_squares([hidden[0].double().numpy() for hidden in segments], contraction)
    assert measured["by_age"] == pytest.approx(by_age, abs=1e-4)
    assert measured["total"] == pytest.approx(total, abs=1e-4)
    assert measured["total"] < measured["best"] <= 1 / SEGMENTS + 0.05
    assert 0.25 * size < measured["total"] * SEGMENTS * size <= size
    assert (measured["by_age"][0] > 2 * measured["by_age"][-1]) == (contraction == "constant")


def test_what_is_gated_is_held_against_what_is_gated():
    torch.manual_seed(0)
    memory = new_memory(32, input_gate=True)
    nn.init.normal_(memory.gate.weight, std=0.2)
    segments = white_noise(32)
    past, state = follow(memory, segments)
    with torch.no_grad():
        gated = [memory.gated(hidden)[0].double().numpy() for hidden in segments]
    by_age, _ = reconstruct_by_least_squares(gated, "constant")
    assert past.reconstruct(state)["by_age"] == pytest.approx(by_age, abs=1e-4)


@pytest.mark.parametrize("contraction", ["constant", "uniform"])
def test_sticky_memories_are_followed_to_where_the_past_is(contraction):
    """A signal that is smooth in time is found again where its tokens are said to be, and only there."""
    size = 64
    angles = torch.arange(SEGMENTS * size) / 40
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).repeat(1, 2).unsqueeze(0)
    past, state = follow(new_memory(size, 4, sticky=True, contraction=contraction), list(waves.split(size, dim=1)))
    assert (past.places.diff() >= 0).all()
    measured = past.reconstruct(state)
    assert min(measured["by_age"][:2]) > 0.9
    past.places = past.places.flip(0)
    assert past.reconstruct(state)["total"] < measured["total"] - 0.5


def test_a_past_without_differences_has_no_measure():
    past, state = follow(new_memory(32, 4), [torch.ones(1, 32, 4)] * SEGMENTS)
    assert past.reconstruct(state) == {"total": None, "by_age": [None] * SEGMENTS, "best": None}


@pytest.mark.parametrize("contraction", ["constant", "uniform"])
def test_the_best_fit_is_that_of_least_squares_to_all_tokens_where_they_lie_now(contraction):
    segments = white_noise(32, 24)
    past, state = follow(new_memory(32, 24, contraction=contraction), segments)
    written = np.concatenate([hidden[0].half().double().numpy() for hidden in segments])
    design = past.memory.signal.basis.evaluate(past.places.float()).double().numpy()
    rest = written - design @ np.linalg.lstsq(design, written, rcond=1e-6)[0]
    expected = 1 - (rest**2).sum() / ((written - written.mean(0)) ** 2).sum()
    assert past.reconstruct(state)["best"] == pytest.approx(expected, abs=1e-3)


def test_tokens_back_is_the_age_of_what_lies_there():
    past, _ = follow(new_memory(32, 4), white_noise(32, 4))
    ages = SEGMENTS * 32 - torch.arange(SEGMENTS * 32, dtype=torch.float64)
    torch.testing.assert_close(past.tokens_back(past.places[40:]), ages[40:])
    between = (past.places[99] + 3 * past.places[100]) / 4
    assert float(past.tokens_back(between)) == pytest.approx(SEGMENTS * 32 - 99.75)
    assert past.tokens_back(torch.tensor([1.0])).tolist() == [1]
    assert past.tokens_back(torch.tensor([-1.0, 2.0])).tolist() == [SEGMENTS * 32, 1]
    past.places = past.places[:1]  # of a single token
    assert past.tokens_back(torch.tensor([0.0, 1.0])).tolist() == [1, 1]
