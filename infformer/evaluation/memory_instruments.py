"""What a model's long-term memories hold and do while it reads one document.

Each measure is a function of one segment as it was read; `inspect_document` reads a document once and takes them all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, starmap
from typing import cast

import numpy as np
import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Density, Gaussian, TruncatedParabola, match_moments
from infformer.evaluation.streaming import EvaluationError
from infformer.memory.long_term import LongTermMemory, LongTermState, Reading
from infformer.memory.memory import Memory
from infformer.memory.short_term import ShortTermMemory, ShortTermState
from infformer.memory.state import MemoryState, ModelState
from infformer.models.base import LayerRead, MemoryModel
from infformer.models.streaming import TextSegment, stream
from infformer.progress import follow
from infformer.results import (
    DensityFigure,
    Explained,
    InspectedOptions,
    Inspection,
    LossesWithoutLayers,
    Readings,
    Reconstruction,
    Writings,
)

PLACES = 64
"""Equal parts of [0, 1] in which the samples of sticky memories are counted."""


@dataclass(frozen=True)
class ReadSegment:
    """One segment of one document as a model read it."""

    number: int
    """From 0."""
    input_ids: Tensor
    """[1, length]."""
    targets: Tensor
    """[1, length]."""
    before: ModelState
    """The state that it was read with."""
    after: ModelState
    """The state after it was read and, if it was complete, written."""
    nats: float
    """Negative log-likelihood of a token, the mean over the segment."""
    intermediates: tuple[LayerRead, ...]
    """Of each layer, in the order of the memories."""


@torch.no_grad()
def inspect_document(
    model: MemoryModel,
    tokens: Tensor,
    segments: int = 64,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Inspection:
    """Read a document from an empty memory and take all measures. The model is left in evaluation mode.

    Each segment is read once, and again without each of the memories. The memory needed is constant but for the hidden
    states of the past, which the reconstruction is held against: 2 · width bytes for each token and chosen layer.

    Args:
        model: with long-term memories.
        tokens: of the document, int64 [tokens].
        segments: read so many of its segments at most.
        layers: numbers of the layers that are looked at, from 0; all that have a long-term memory if not given.
        progress: say how far it is.

    Raises:
        EvaluationError: there is no such memory or layer, or nothing would be read from memory.
    """
    memories = long_term_memories(model)
    numbers = _choose_layers(memories, layers)
    count = _count_segments(model, len(tokens), segments)
    chosen = [list(memories).index(number) for number in numbers]
    config = memories[numbers[0]].config
    length, cached = memories[numbers[0]].signal.segment_length, model.short_term_length
    writes = min(count, (len(tokens) - 1) // length) - cached // length

    pasts = [WrittenPast(memories[number]) for number in numbers]
    leaving: deque[list[Tensor]] = deque()  # read but not written yet: still in the short-term memory
    reading: Readings = {
        "segment": [], "tokens": [],
        "centre": [], "centre_spread": [], "width": [], "width_spread": [], "tokens_back": [],
        "contribution": [],
        "nats": [], "nats_without_layer": [], "nats_without_memory": [],
    }  # fmt: skip
    writing: Writings = {"segment": [], "sampled_places": []}
    reconstruction: list[Reconstruction] = []
    nats = 0.0
    model.eval()
    for segment in follow(read_segments(model, tokens, count), "inspecting", "segments", count, progress):
        intermediates = [segment.intermediates[index] for index in chosen]
        readings = [_reading(trace) for trace in intermediates]
        written = _segments_written(segment.before)
        nats += segment.nats * segment.input_ids.shape[1]
        if written:
            reading["segment"].append(segment.number)
            reading["tokens"].append(segment.input_ids.shape[1])
            figures = [density_figures(read, past, cached) for read, past in zip(readings, pasts, strict=True)]
            for name in figures[0]:
                reading[name].append([of_layer[name] for of_layer in figures])
            reading["contribution"].append([contribution(trace) for trace in intermediates])
            losses = losses_without_layers(model, segment, chosen)
            reading["nats"].append(losses["nats"])
            reading["nats_without_layer"].append(losses["nats_without_layer"])
            reading["nats_without_memory"].append(losses["nats_without_memory"])
        leaving.append([cast(Tensor, trace.hidden) for trace in intermediates])
        if _segments_written(segment.after) == written:
            continue
        if written and config.sticky:
            sampled = [sampled_places(memories[number], read) for number, read in zip(numbers, readings, strict=True)]
            writing["segment"].append(segment.number)
            writing["sampled_places"].append(sampled)
        for past, hidden, read in zip(pasts, leaving.popleft(), readings, strict=True):
            past.write(hidden, read.attention)
        written += 1
        if written == writes or written & (written - 1) == 0:
            states = [_long_term(segment.after.layers[index]) for index in chosen]
            explained = [past.reconstruct(state) for past, state in zip(pasts, states, strict=True)]
            reconstruction.append(
                {
                    "segments": written,
                    "tokens_back": [cached + (age + 0.5) * length for age in range(written)],
                    "limit": min(1.0, config.basis_functions / (written * length)),
                    "total": [of_layer["total"] for of_layer in explained],
                    "by_age": [of_layer["by_age"] for of_layer in explained],
                }
            )
    predicted = min(count * length, len(tokens) - 1)
    return {
        "document": {"tokens": predicted, "segments": count, "nats": nats / predicted},
        "memory": {
            "segment_length": length,
            **cast(InspectedOptions, asdict(config)),
            "short_term_length": cached,
            "layers": numbers,
        },
        "reading": reading,
        "writing": writing if writing["segment"] else {},
        "reconstruction": reconstruction,
    }


def long_term_memories(model: MemoryModel) -> dict[int, LongTermMemory]:
    """A model's continuous memories by the numbers of their layers, also those behind a short-term memory."""

    def behind(memory: Memory | None) -> Memory | None:
        return memory.behind if isinstance(memory, ShortTermMemory) else memory

    found = {number: behind(memory) for number, memory in model.layer_memories().items()}
    return {number: memory for number, memory in found.items() if isinstance(memory, LongTermMemory)}


@torch.no_grad()
def read_segments(model: MemoryModel, tokens: Tensor, segments: int) -> Iterator[ReadSegment]:
    """A document segment by segment, from an empty memory.

    Args:
        model: with a memory.
        tokens: of the document, int64 [tokens].
        segments: at most so many.
    """
    state = model.initial_state(1)
    inputs, labels = (part.to(model.device).unsqueeze(0) for part in (tokens[:-1], tokens[1:]))
    pairs = zip(*(part.split(model.segment_length, dim=1) for part in (inputs, labels)), strict=True)
    cut = list(islice(pairs, segments))
    read = stream(model, starmap(TextSegment, cut), state, return_intermediates=True)
    for number, ((input_ids, targets), (before, output)) in enumerate(zip(cut, read, strict=True)):
        nats = float(output.token_losses.mean())
        yield ReadSegment(number, input_ids, targets, before, output.state, nats, output.intermediates)


def density_figures(reading: Reading, past: WrittenPast, short_term_length: int) -> dict[DensityFigure, list[float]]:
    """Where the heads of one layer looked while they read a segment, each figure of each head.

    Args:
        reading: of one row.
        past: what had been written.
        short_term_length: tokens between the newest that was written and the segment.
    """
    centre, width = (figure[0] for figure in centre_and_width(reading.attention, past.memory.signal.basis))
    mean = centre.mean(-1)
    return {
        "centre": mean.tolist(),
        "centre_spread": centre.std(-1, correction=0).tolist(),
        "width": width.mean(-1).tolist(),
        "width_spread": width.std(-1, correction=0).tolist(),
        "tokens_back": (short_term_length + past.tokens_back(mean)).tolist(),
    }


def centre_and_width(attention: Density, basis: GaussianBasis) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each density, the shape of the densities.

    Those of the truncated parabola [a² − s²]₊/(2σ²), of which a³ = 3σ²/2, are μ and a/√5: ∫s²(a² − s²)ds / (2σ²) over
    its support is 2a⁵/(15σ²) = a²/5. Those of slots are the moments of their mixture.
    """
    if isinstance(attention, Gaussian):
        return attention.mean, attention.variance.sqrt()
    if isinstance(attention, TruncatedParabola):
        return attention.mean, attention.radius / math.sqrt(5)
    mean, variance = match_moments(attention.weights, basis)
    return mean, variance.sqrt()


def contribution(trace: LayerRead) -> float:
    """How much a layer's memory adds to its self-attention: ‖memory's context‖ / ‖self-attention's output‖.

    The norms are Euclidean, over the width of the model; the ratio is the mean over the segment's tokens.
    """
    assert trace.attended is not None
    norms = _reading(trace).context.float().norm(dim=-1), trace.attended.float().norm(dim=-1)
    return float((norms[0] / norms[1]).mean())


def sampled_places(memory: LongTermMemory, reading: Reading) -> list[float]:
    """Where a write after this reading samples the past: the share of the samples in each of 64 equal parts of [0, 1].

    Evenly would be 1/64 everywhere. Sample m of M, by the deterministic offsets of evaluation, stands for the share
    from (m − 1)/M to m/M and lies in its middle; between two samples it is linear, so that parts of fewer samples than
    one get their share too.
    """
    positions = memory.past_positions(reading.attention).flatten().double().cpu().numpy()
    middles = (np.arange(len(positions)) + 0.5) / len(positions)
    edges = np.linspace(0, 1, PLACES + 1)
    below = np.interp(edges, [0, *positions, 1], [0, *middles, 1])
    shares: list[float] = np.diff(below).tolist()
    return shares


@torch.no_grad()
def losses_without_layers(model: MemoryModel, segment: ReadSegment, layers: Sequence[int]) -> LossesWithoutLayers:
    """What a segment costs if long-term memories are empty when it is read: how much each is needed.

    The true memory is carried on, so a figure is of this segment alone.

    Args:
        layers: indices of the memories that are taken away one at a time.
    """

    def read(empty: Sequence[int]) -> float:
        states = [
            _without_long_term(state) if index in empty else state for index, state in enumerate(segment.before.layers)
        ]
        state = ModelState(tuple(states))
        return float(model(segment.input_ids, state=state, targets=segment.targets).token_losses.mean())

    return {
        "nats": segment.nats,
        "nats_without_layer": [read([index]) for index in layers],
        "nats_without_memory": read(range(len(segment.before.layers))),
    }


def _choose_layers(memories: dict[int, LongTermMemory], layers: Sequence[int] | None) -> list[int]:
    if not memories:
        raise EvaluationError(
            "this model has no long-term memory to look into: give one that was trained with model/memory=long_term or "
            "sticky"
        )
    if layers is None:
        return list(memories)
    unknown = sorted(set(layers) - set(memories))
    if unknown or not layers:
        raise EvaluationError(
            f"layers={list(layers)}: choose among the layers that have a long-term memory, {list(memories)}"
        )
    return list(dict.fromkeys(layers))


def _count_segments(model: MemoryModel, tokens: int, most: int) -> int:
    """How many segments are read; the last may be a part of one."""
    length = model.segment_length
    assert length is not None
    before = 1 + model.short_term_length // length  # segments that are read before anything is in memory
    if tokens < 2:
        raise EvaluationError(
            f"the document has {tokens} token{'s' * (not tokens)}: there is nothing to predict; give a longer one"
        )
    if tokens - 1 <= before * length:
        raise EvaluationError(
            f"the document has {tokens} tokens, and nothing is read from memory before token {before * length + 1}: a "
            f"segment has {length}, and {before} must have been read; give a longer one"
        )
    if most <= before:
        raise EvaluationError(
            f"segments={most}: nothing is read from memory before segment {before + 1}; take {before + 1} at least"
        )
    return min(most, -(-(tokens - 1) // length))


def _reading(trace: LayerRead) -> Reading:
    reading: Reading = trace.memory.reading
    return reading


def _long_term(state: MemoryState) -> LongTermState:
    """The state of a long-term memory, which may stand behind a short-term one."""
    long_term = state.behind if isinstance(state, ShortTermState) else state
    assert isinstance(long_term, LongTermState)
    return long_term


def _without_long_term(state: MemoryState) -> MemoryState:
    empty = _long_term(state).map_tensors(torch.zeros_like)
    return replace(state, behind=empty) if isinstance(state, ShortTermState) else empty


def _segments_written(state: ModelState) -> int:
    """All layers write at the same time."""
    return int(_long_term(state.layers[0]).segments)


class WrittenPast:
    """What one layer has written of one document: every token's hidden state, and where in the memory it lies now.

    The hidden states are kept in float16 in the main memory: 2 · width bytes for each token.

    Args:
        memory: the layer's.
    """

    def __init__(self, memory: LongTermMemory) -> None:
        self.memory = memory
        self._hidden: list[Tensor] = []
        self.places = torch.zeros(0, dtype=torch.float64)
        """In [0, 1], in the order of the text; float64, shape [tokens]."""

    def write(self, hidden: Tensor, attention: Density) -> None:
        """Follow a write.

        Args:
            hidden: what was written, before the input gate, [1, T, hidden].
            attention: where the segment looked that was read at that moment.
        """
        self.places = self.memory.moved_places(self.places, len(self._hidden), attention)
        self._hidden.append(self.memory.gated(hidden.float())[0].half().cpu())

    def tokens_back(self, places: Tensor) -> Tensor:
        """How many tokens before the end of what was written lies what is at these places, of any shape.

        Between two tokens it is linear; a place outside [0, 1] counts as the nearest end.
        """
        tokens = len(self.places)
        after = torch.searchsorted(self.places, places.to(self.places)).clamp(1, tokens - 1)
        left, right = self.places[after - 1], self.places[after]
        share = ((places.to(left) - left) / (right - left).clamp(min=torch.finfo(left.dtype).tiny)).clamp(0, 1)
        return tokens - (after - 1 + share)

    def reconstruct(self, state: LongTermState) -> Explained:
        """How much of the past the signal still tells: R² = 1 − Σ‖x − X̄(p)‖² / Σ‖x − x̄‖².

        x is a hidden state as it was written, p its place now, X̄ the signal, x̄ the mean over all that was written. 1 is
        all of it, 0 no more than the mean; below 0 the mean would have been a better guess.

        Args:
            state: the layer's memory after the last write, one row.
        """
        coefficients, basis = state.coefficients[0], self.memory.signal.basis
        mean = sum(hidden.to(coefficients).sum(0) for hidden in self._hidden) / len(self.places)
        errors, scatters = [], []
        for hidden, places in zip(self._hidden, self.places.chunk(len(self._hidden)), strict=True):
            written = hidden.to(coefficients)
            signal = basis.evaluate(places.to(coefficients)) @ coefficients
            errors.append(float((written - signal).square().sum()))
            scatters.append(float((written - mean).square().sum()))
        by_age = [_explained(error, scatter) for error, scatter in zip(errors, scatters, strict=True)]
        return {"total": _explained(sum(errors), sum(scatters)), "by_age": by_age[::-1]}


def _explained(error: float, scatter: float) -> float | None:
    return 1 - error / scatter if scatter > 0 else None
