"""What a model's memories hold and do while it reads one document.

What any memory gains is measured by its own interface, `Memory.without_past`; more can be shown of one whose past is a
continuous signal. Each measure is a function of one segment as it was read; `inspect_document` reads a document once
and takes them all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, starmap
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Density, Gaussian, Gibbs, TruncatedParabola, match_moments
from infformer.evaluation.figures import ratio_of
from infformer.evaluation.streaming import EvaluationError
from infformer.memory.long_term import LongTermMemory, LongTermState, Reading
from infformer.memory.memory import Memory
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.segment_read import LayerRead
from infformer.models.streaming import TextSegment, stream
from infformer.progress import Pace
from infformer.results import (
    Costs,
    DensityFigure,
    Explained,
    InspectedMemory,
    Inspection,
    Ratio,
    Readings,
    Reconstruction,
    Source,
    Stretch,
    Writings,
)

STRETCH = 64
"""Tokens of a stretch of text that is shown, at most."""
PASSAGE, PASSAGES, SHOWN = 16, 256, 3
"""Tokens of a passage of the past that is shown, at least; how many there are, at most; and how many are shown."""
PLACES = 64
"""Equal parts of [0, 1] in which the samples of sticky memories are counted."""


@dataclass(frozen=True)
class ReadSegment:
    """One segment of one document as a model read it."""

    number: int
    """From 0."""
    start: int
    """The number of its first token in the document, from 0."""
    input_ids: Tensor
    """[1, length]."""
    targets: Tensor
    """[1, length]."""
    before: ModelState
    """The state that it was read with."""
    after: ModelState
    """The state after it was read and, if it was complete, written."""
    token_losses: Tensor
    """Negative log-likelihood of each token, [length]."""
    intermediates: tuple[LayerRead, ...]
    """Of each layer, in the order of the memories."""


@torch.no_grad()
def inspect_document(
    model: MemoryModel,
    tokens: Tensor,
    segments: int = 64,
    layers: Sequence[int] | None = None,
    progress: bool = True,
    decode: Callable[[list[int]], str] | None = None,
    after_segment: Callable[[], None] = lambda: None,
) -> Inspection:
    """Read a document from an empty memory and take all measures. The model is left in evaluation mode.

    Each segment is read three times: as it is, without the memories, and without that of one layer, which is another
    in every segment; but twice where all layers have to see alike. Of memory it needs, for signals, the hidden states
    of the past, which the reconstruction is held against: 2 · width bytes for each token and chosen layer.

    Args:
        model: with memories.
        tokens: of the document, int64 [tokens].
        segments: read so many of its segments at most.
        layers: numbers of the layers that are looked at, from 0; if not given, a few of `inspected_memories`.
        progress: say how far it is.
        decode: from tokens to text, to show what the memories gained of which tokens.
        after_segment: called whenever a segment has been read.

    Raises:
        EvaluationError: there is no such memory or layer, or nothing would be read from memory.
    """
    memories = inspected_memories(model)
    numbers = _choose_layers(memories, layers)
    count = _count_segments(model, len(tokens), segments)
    places = {number: place for place, number in enumerate(model.layer_memories())}
    chosen, every = [places[number] for number in numbers], [places[number] for number in memories]
    length, cached = cast(int, model.segment_length), model.short_term_length
    writes = min(count, (len(tokens) - 1) // length) - cached // length
    predicted = min(count * length, len(tokens) - 1)

    own = [memories[number] for number in numbers]
    signals = SignalInstruments.of(own, length, cached, writes)
    stretches = None if decode is None else Stretches(tokens, decode, signals)
    rows: list[dict[str, Any]] = []  # one for each segment that is read from memory
    nats = 0.0
    model.eval()
    with Pace("inspecting", predicted, "tokens", progress) as pace:
        for segment in read_segments(model, tokens, count):
            reads = [segment.intermediates[index] for index in chosen]
            nats += float(segment.token_losses.sum())
            if not _is_empty(own[0], segment.before.layers[chosen[0]]):
                without = losses_without(model, segment, every)
                turn = len(rows) % len(chosen)
                one = None if model.layers_see_alike else float(losses_without(model, segment, [chosen[turn]]).mean())
                row: dict[str, Any] = {
                    "segment": segment.number,
                    "tokens": segment.input_ids.shape[1],
                    "nats": float(segment.token_losses.mean()),
                    "nats_without_layer": [one if turn == each else None for each in range(len(chosen))],
                    "nats_without_memory": float(without.mean()),
                }
                if all(read.memory.context is not None for read in reads):
                    row["contribution"] = [contribution(read) for read in reads]
                if signals is not None:
                    row |= signals.look(reads)
                rows.append(row)
                if stretches is not None:
                    stretches.look(segment, without - segment.token_losses, reads)
            if signals is not None:
                signals.follow(segment, reads, [segment.after.layers[index] for index in chosen])
            after_segment()
            pace.advance(segment.input_ids.shape[1])
    reading = cast(Readings, {name: [row[name] for row in rows if name in row] for name in Readings.__annotations__})
    return {
        "document": {"tokens": predicted, "segments": count, "nats": nats / predicted},
        "memory": cast(
            InspectedMemory,
            {
                "kind": model.config.memory_config.kind,
                **asdict(model.config.memory_config),
                "segment_length": length,
                "short_term_length": cached,
                "layers": numbers,
            },
        ),
        "reading": reading,
        "costs": costs_without(reading),
        "stretches": [] if stretches is None else stretches.found(),
        "writing": {} if signals is None else signals.writing,
        "reconstruction": [] if signals is None else signals.reconstruction,
    }


def inspected_memories(model: MemoryModel) -> dict[int, Memory]:
    """The memories that are looked into, by layer: those behind a short-term one, or all where nothing is behind it."""
    memories = model.layer_memories()
    return {layer: memory for layer, memory in memories.items() if _stands_behind(memory)} or memories


def few_layers(numbers: Sequence[int]) -> list[int]:
    """Four of them at most, evenly apart, with the first and the last."""
    if len(numbers) <= 4:
        return list(numbers)
    return [numbers[round(index * (len(numbers) - 1) / 3)] for index in range(4)]


def costs_without(reading: Readings) -> Costs:
    """By how much nats are above those with all memories, per token, with intervals over segments."""

    def ratio(nats: Sequence[float | None]) -> Ratio:
        rows = zip(nats, reading["nats"], reading["tokens"], strict=True)
        read = [((off - on) * tokens, tokens) for off, on, tokens in rows if off is not None]
        return ratio_of(*np.array(read).reshape(-1, 2).T)

    by_layer = zip(*reading["nats_without_layer"], strict=True)
    return {
        "without_memory": ratio(reading["nats_without_memory"]),
        "without_layer": [ratio(nats) for nats in by_layer],
    }


@dataclass
class SignalInstruments:
    """What more is measured of memories that are continuous signals, segment by segment.

    Args:
        memories: of the layers.
        pasts: what each of them has written.
        segment_length: tokens of a segment.
        short_term_length: tokens between what was written last and the segment.
        writes: how many there will be: the reconstruction is measured after the last.
    """

    memories: Sequence[Memory]
    pasts: list[WrittenPast]
    segment_length: int
    short_term_length: int
    writes: int
    writing: Writings = field(default_factory=lambda: Writings())
    reconstruction: list[Reconstruction] = field(default_factory=list)
    _leaving: deque[list[Tensor]] = field(default_factory=deque)
    """Read but not written yet: still in the short-term memory."""

    @classmethod
    def of(
        cls, memories: Sequence[Memory], segment_length: int, short_term_length: int, writes: int
    ) -> SignalInstruments | None:
        """Those of memories, or of what stands behind them; None if these are no signals."""
        innermost = [memory.innermost(memory.initial_state(1))[0] for memory in memories]
        if not all(memory.is_signal for memory in innermost):
            return None
        pasts = [WrittenPast(cast(LongTermMemory, memory)) for memory in innermost]
        return cls(memories, pasts, segment_length, short_term_length, writes)

    def look(self, reads: Sequence[LayerRead]) -> dict[str, list[list[float]]]:
        """Where the heads look, each figure of each layer and head."""
        figures = [
            density_figures(_reading(read), past, self.short_term_length)
            for read, past in zip(reads, self.pasts, strict=True)
        ]
        return {name: [of_layer[name] for of_layer in figures] for name in figures[0]}

    def follow(self, segment: ReadSegment, reads: Sequence[LayerRead], states: Sequence[Any]) -> None:
        """Follow what was written after a segment, if anything was.

        Args:
            reads, states: of the layers, and what they hold now.
        """
        written = self.pasts[0].segments
        self._leaving.append([cast(Tensor, read.hidden) for read in reads])
        if written == self.writes or len(self._leaving) * self.segment_length <= self.short_term_length:
            return
        if written and self.pasts[0].memory.config.sticky:
            sampled = [
                sampled_places(past.memory, _reading(read)) for past, read in zip(self.pasts, reads, strict=True)
            ]
            self.writing.setdefault("segment", []).append(segment.number)
            self.writing.setdefault("sampled_places", []).append(sampled)
        for past, hidden, read in zip(self.pasts, self._leaving.popleft(), reads, strict=True):
            kept = _reading(read).written
            past.write(hidden if kept is None else kept, _reading(read).attention, _reading(read).losses)
        written += 1
        if written == self.writes or written & (written - 1) == 0:
            explained = [
                past.reconstruct(memory.innermost(state)[1])
                for memory, past, state in zip(self.memories, self.pasts, states, strict=True)
            ]
            self.reconstruction.append(
                {
                    "segments": written,
                    "tokens_back": [
                        self.short_term_length + (age + 0.5) * self.segment_length for age in range(written)
                    ],
                    "best": [of_layer["best"] for of_layer in explained],
                    "total": [of_layer["total"] for of_layer in explained],
                    "by_age": [of_layer["by_age"] for of_layer in explained],
                }
            )

    def sources(self, reads: Sequence[LayerRead], queries: slice) -> list[tuple[int, int, float]]:
        """The passages that some tokens of a segment look at most: first token, end, share of all that is in memory."""
        size = max(PASSAGE, -(-len(self.pasts[0].places) // PASSAGES))
        shares = torch.stack(
            [past.looked_at(_part(_reading(read), queries), size) for read, past in zip(reads, self.pasts, strict=True)]
        ).mean(0)
        shares /= shares.sum()  # densities may reach beyond the memory's ends
        ends = [min((passage + 1) * size, len(self.pasts[0].places)) for passage in range(len(shares))]
        best = sorted(range(len(shares)), key=lambda passage: -float(shares[passage]))[:SHOWN]
        found: list[tuple[int, int, float]] = []
        for passage in sorted(best):
            first, share = passage * size, float(shares[passage])
            if found and found[-1][1] == first:  # it goes on
                first, share = found[-1][0], found.pop()[2] + share
            found.append((first, ends[passage], share))
        return sorted(found, key=lambda source: -source[2])


class Stretches:
    """The stretch of the document in which memories gained most, and the one in which they gained least.

    Args:
        tokens: of the document.
        decode: from tokens to text.
        signals: to say where the memories looked.
    """

    def __init__(self, tokens: Tensor, decode: Callable[[list[int]], str], signals: SignalInstruments | None) -> None:
        self.tokens, self.decode, self.signals = tokens.tolist(), decode, signals
        self._found: dict[int, Stretch] = {}

    def look(self, segment: ReadSegment, gains: Tensor, reads: Sequence[LayerRead]) -> None:
        """See whether a segment holds a stretch that is more or less than those before.

        Args:
            gains: of each token, [length].
        """
        size = min(STRETCH, len(gains))
        for first in range(0, len(gains) - size + 1, size):
            part = slice(first, first + size)
            gain = float(gains[part].mean())
            for sign in (1, -1):
                if sign not in self._found or sign * gain > sign * self._found[sign]["gain"]:
                    self._found[sign] = self._show(segment.start + first, gains[part].tolist(), reads, part)

    def found(self) -> list[Stretch]:
        """Most, and least."""
        return [self._found[sign] for sign in (1, -1)]

    def _show(self, first: int, gains: list[float], reads: Sequence[LayerRead], queries: slice) -> Stretch:
        scored = first + 1  # each place predicts the token after it
        sources: list[Source] = []
        if self.signals is not None:
            written = len(self.signals.pasts[0].places)
            sources = [
                {
                    "first": begin,
                    "tokens_back": scored - begin,
                    "share": share,
                    "even_share": (end - begin) / written,
                    "text": self.decode(self.tokens[begin:end]),
                }
                for begin, end, share in self.signals.sources(reads, queries)
            ]
        return {
            "first": scored,
            "gain": sum(gains) / len(gains),
            "pieces": pieces_of_text(self.tokens[scored : scored + len(gains)], self.decode),
            "gains": gains,
            "sources": sources,
        }


def pieces_of_text(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token; a character of several tokens is that of its last."""
    pieces, told = [], ""
    for end in range(1, len(tokens) + 1):
        text = decode(list(tokens[:end]))
        if text.endswith("\ufffd") and end < len(tokens):
            pieces.append("")
            continue
        pieces.append(text[len(told) :])
        told = text
    return pieces


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
        start, losses = number * cast(int, model.segment_length), output.token_losses[0]
        yield ReadSegment(number, start, input_ids, targets, before, output.state, losses, output.intermediates)


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
    if isinstance(attention, Gibbs):
        mean, variance = attention.moments()
        return mean, variance.sqrt()
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
    assert trace.memory.context is not None
    norms = trace.memory.context.float().norm(dim=-1), trace.attended.float().norm(dim=-1)
    return float((norms[0] / norms[1]).mean())


def sampled_places(memory: LongTermMemory, reading: Reading) -> list[float]:
    """Where a write after this reading samples the past: the share of the samples in each of 64 equal parts of [0, 1].

    Evenly would be 1/64 everywhere. Sample m of M, by the deterministic offsets of evaluation, stands for the share
    from (m − 1)/M to m/M and lies in its middle; between two samples it is linear, so that parts of fewer samples than
    one get their share too.
    """
    positions = memory.past_positions(reading.attention, losses=reading.losses).flatten().double().cpu().numpy()
    middles = (np.arange(len(positions)) + 0.5) / len(positions)
    edges = np.linspace(0, 1, PLACES + 1)
    below = np.interp(edges, [0, *positions, 1], [0, *middles, 1])
    shares: list[float] = np.diff(below).tolist()
    return shares


@torch.no_grad()
def losses_without(model: MemoryModel, segment: ReadSegment, layers: Sequence[int]) -> Tensor:
    """What the tokens of a segment cost if some memories are empty when it is read: how much they are needed.

    The true memory is carried on, so this is of this segment alone.

    Args:
        layers: indices of the memories that are taken away.
    """
    memories = model.layer_memories().values()
    states = [
        memory.without_past(state) if index in layers else state
        for index, (memory, state) in enumerate(zip(memories, segment.before.layers, strict=True))
    ]
    output = model(segment.input_ids, state=ModelState(tuple(states)), targets=segment.targets)
    losses: Tensor = output.token_losses[0]
    return losses


def _choose_layers(memories: dict[int, Memory], layers: Sequence[int] | None) -> list[int]:
    if not memories:
        raise EvaluationError(
            "this model has no memory to look into: give one that was trained with model/memory=long_term, for example"
        )
    if layers is None:
        return few_layers(list(memories))
    unknown = sorted(set(layers) - set(memories))
    if unknown or not layers:
        raise EvaluationError(f"layers={list(layers)}: choose among the layers that have a memory, {list(memories)}")
    return list(dict.fromkeys(layers))


def _stands_behind(memory: Memory) -> bool:
    """Whether the memory that is taken away stands behind another, which stays."""
    return memory.innermost(memory.initial_state(1))[0] is not memory


def _is_empty(memory: Memory, state: Any) -> bool:
    """Whether there is nothing in memory that could be taken away; the same in all layers, which write together."""
    _, innermost = memory.innermost(state)
    return not any(bool(tensor.any()) for tensor in innermost.named_tensors().values())


def _count_segments(model: MemoryModel, tokens: int, most: int) -> int:
    """How many segments are read; the last may be a part of one."""
    length = model.segment_length
    assert length is not None
    memory = next(iter(inspected_memories(model).values()))
    # Segments that are read before anything is in memory.
    before = 1 + (model.short_term_length // length if _stands_behind(memory) else 0)
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


def _part(reading: Reading, queries: slice) -> Density:
    """Where some of the queries looked."""
    attention = reading.attention
    return type(attention)(*(part[:, :, queries] for part in attention))


class WrittenPast:
    """What one layer has written of one document: every token's hidden state, and where in the memory it lies now.

    The hidden states are kept in float16 in the main memory: 2 · width bytes for each token.
    """

    def __init__(self, memory: LongTermMemory) -> None:
        self.memory = memory
        self._hidden: list[Tensor] = []
        self.places = torch.zeros(0, dtype=torch.float64)
        """In [0, 1], in the order of the text; float64, shape [tokens]."""

    @property
    def segments(self) -> int:
        """How many were written."""
        return len(self._hidden)

    def write(self, hidden: Tensor, attention: Density, losses: Tensor | None = None) -> None:
        """Follow a write.

        Args:
            hidden: what was written, before the input gate, [1, T, hidden].
            attention: where the segment looked that was read at that moment.
            losses: of the past, as they were then, where it is given room by them.
        """
        self.places = self.memory.moved_places(self.places, len(self._hidden), attention, losses)
        self._hidden.append(self.memory.gated(hidden.float())[0].half().cpu())

    def tokens_back(self, places: Tensor) -> Tensor:
        """How many tokens before the end of what was written lies what is at these places, of any shape.

        Between two tokens it is linear; a place outside [0, 1] counts as the nearest end.
        """
        tokens = len(self.places)
        places = places.to(self.places).clamp(self.places[0], self.places[-1])
        after = torch.searchsorted(self.places, places).clamp(max=tokens - 1)
        before = (after - 1).clamp(min=0)
        left, right = self.places[before], self.places[after]
        return tokens - (before + (places - left) / (right - left).clamp(min=torch.finfo(left.dtype).tiny))

    def looked_at(self, attention: Density, size: int) -> Tensor:
        """Which share of densities lies on each passage of so many tokens, the mean over heads and queries.

        Args:
            attention: of one row.
        """
        ends = torch.tensor(range(size, len(self.places), size), dtype=torch.int64)
        basis = self.memory.signal.basis
        borders = ((self.places[ends - 1] + self.places[ends]) / 2).to(basis.centres)
        inside = torch.cat([basis.centres.new_zeros(1), borders, basis.centres.new_ones(1)])
        return attention.cumulative(inside, basis).float().mean((0, 1, 2)).diff().cpu()

    def reconstruct(self, state: LongTermState) -> Explained:
        """How much of the past the signal still tells: R² = 1 − Σ‖x − X̄(p)‖² / Σ‖x − x̄‖².

        x is a hidden state as it was written, p its place now, X̄ the signal, x̄ the mean over all that was written. 1 is
        all of it, 0 no more than the mean; below 0 the mean would have been a better guess.

        Args:
            state: the layer's memory after the last write, one row.
        """
        coefficients, signal = state.coefficients[0], self.memory.signal
        mean = sum(hidden.to(coefficients).sum(0) for hidden in self._hidden) / len(self.places)
        errors, scatters = [], []
        size, norm = signal.centres.shape[0], 0.0  # of the best fit the normal equations, in float64
        gram = torch.zeros(size, size, dtype=torch.float64)
        product = torch.zeros(size, coefficients.shape[-1], dtype=torch.float64)
        for hidden, places in zip(self._hidden, self.places.chunk(len(self._hidden)), strict=True):
            written = hidden.to(coefficients)
            heights = signal.heights(places.to(coefficients))
            errors.append(float((written - heights @ coefficients).square().sum()))
            scatters.append(float((written - mean).square().sum()))
            exact, values = heights.cpu().double(), written.cpu().double()
            gram += exact.mT @ exact
            product += exact.mT @ values
            norm += float(values.square().sum())
        by_age = [_explained(error, scatter) for error, scatter in zip(errors, scatters, strict=True)]
        best = _explained(max(norm - _fitted(gram, product), 0.0), sum(scatters))
        return {"total": _explained(sum(errors), sum(scatters)), "by_age": by_age[::-1], "best": best}


def _fitted(gram: Tensor, product: Tensor) -> float:
    """How much of the sum of squares the least-squares fit explains: tr(Pᵀ G⁺ P) with G = ΨᵀΨ and P = ΨᵀX."""
    values, vectors = torch.linalg.eigh(gram)
    known = values > 1e-12 * values[-1]
    return float(((vectors[:, known].mT @ product).square().sum(1) / values[known]).sum())


def _explained(error: float, scatter: float) -> float | None:
    return 1 - error / scatter if scatter > 0 else None
