"""∞-former's long-term memory (Martins, Marinho & Martins, ACL 2022, arXiv 2109.00301) of one layer.

The past is a continuous signal X̄(t) = Bᵀψ(t) on [0, 1]. Writing a segment contracts the old signal to the front part
of [0, 1], puts the new one behind it and fits N coefficients to both. Reading gives every query a density p on the
signal and returns its expectation. The cost of both does not depend on how much has been written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.attention.features import type_of_products
from infformer.continuous.density import (
    Density,
    Gaussian,
    Gibbs,
    Slots,
    TruncatedParabola,
    match_moments,
    variance_divergence,
)
from infformer.memory.memory import Memory, MemoryOutput, SegmentContext, apply_linear, split_heads
from infformer.memory.signal import ContinuousSignal, WriteOperators
from infformer.memory.state import MemoryState
from infformer.memory.sticky import attention_histogram, moved_losses, warped_positions, with_new_losses
from infformer.memory.time_shuffle import shuffled_bins

if TYPE_CHECKING:
    from infformer.memory.long_term_options import LongTermMemoryConfig

MINIMAL_VARIANCE = 1e-4
"""Floor of the affine read's variance, as in the published code."""


@dataclass(frozen=True)
class LongTermState(MemoryState):
    """A layer's signal between two segments."""

    coefficients: Tensor
    """B, float32, shape [batch, N, hidden]."""
    segments: Tensor
    """How many segments each row has written; int64, shape [batch]; 0 is an empty memory."""
    losses: Tensor | None = None
    """Nats of the tokens in each bin of [0, 1], shape [batch, bins]; None where nobody asks for them."""


class PendingLosses(NamedTuple):
    """What waits for the losses of a segment's tokens."""

    written: Tensor
    """Rows that were written, bool [batch]."""
    contraction: Tensor
    """Where their segment begins, [batch]."""


class Projected(NamedTuple):
    """What all tokens of a segment need of a state in order to read it."""

    placing: Tensor
    """By which a token finds its place: two directions in the space of hidden states for each head, shape
    [batch, 2, heads, hidden], with an affine read, else the keys, shape [batch, heads, N, head]."""
    values: Tensor
    """Shape [batch, heads, N, head]. Of a Gibbs read keys and values are those of the signal at its points."""
    log_tokens: Tensor | None = None
    """The logarithm of how many tokens each key stands for, [batch, N]; None: all for as many."""
    queries: Tensor | None = None
    """Of the segment's earlier tokens, where they are asked for again; shape [batch, heads, earlier, head]."""


class Reading(NamedTuple):
    """What a segment read."""

    context: Tensor
    """To be added to the output of self-attention, shape [batch, queries, hidden]."""
    attention: Density
    """Where each head of each query looked, shape [batch, heads, queries]."""
    written: Tensor | None = None
    """What is written after it, [batch, T, width], if these are not hidden states."""
    losses: Tensor | None = None
    """Those of the past, as `LongTermState` has them."""


class LongTermMemory(Memory):
    """The learned part of one layer's long-term memory.

    What is written and where is read are computed in float32, whatever the type of the input, of the weights, and of
    autocast. Under autocast, what is read is a product of its type: of the values' projection, of the expectations and
    of the output's projection.

    Args:
        heads: attention heads; must divide the width.
        signal: basis and operators, shared between layers.
    """

    gate: Any
    """Of what is written, with an input gate."""

    def __init__(self, config: LongTermMemoryConfig, hidden_size: int, heads: int, signal: ContinuousSignal) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.signal = signal
        self.is_signal = True
        self.noise_size = config.past_samples * config.sticky + bool(config.training_rates)
        self.needs_losses = config.sticky_by != "attention"
        self.learns_by_writing = config.input_gate or config.key_convolution > 0
        self.loss_weights = {"divergence": config.divergence_weight}
        self.width = hidden_size
        self._add_parameters()
        if config.read == "affine":
            # w_μ and w_σ: two linear functions of the N scores of a query.
            self.placement = nn.Linear(config.basis_functions, 2, bias=False)
        if config.input_gate:
            self.gate = nn.Conv1d(hidden_size, hidden_size, kernel_size=3, padding=1)
        self.reset_parameters()

    def _add_parameters(self) -> None:
        """Those that what is stored asks for."""
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.output = nn.Linear(self.width, self.width, bias=False)

    def _reset_own(self) -> None:
        """Small random projections; an output of zero, so that a new memory changes nothing until it is trained."""
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def reset_parameters(self) -> None:
        self._reset_own()
        if self.config.read == "affine":
            bound = 1 / math.sqrt(self.config.basis_functions)
            nn.init.uniform_(self.placement.weight, -bound, bound)
        if self.config.input_gate:
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    def initial_state(self, batch: int) -> LongTermState:
        """An empty memory for `batch` rows."""
        signal = self.signal.centres
        return LongTermState(
            signal.new_zeros(batch, self.config.basis_functions, self.width),
            torch.zeros(batch, dtype=torch.int64, device=signal.device),
            signal.new_zeros(batch, self.config.sticky_bins) if self.needs_losses else None,
        )

    def prepare(self, state: LongTermState, context: SegmentContext) -> WriteOperators | None:
        """The operators of the write: all layers have written equally many segments."""
        return None if context.complete is None else self.signal.operators(state.segments, context.noise)

    def forward(
        self, hidden: Tensor, state: LongTermState, context: SegmentContext, shared: WriteOperators | None
    ) -> MemoryOutput:
        projected = self.project(state) if context.earlier is None else context.earlier.projected
        reading, projected = self.read_segment(hidden, state, context, projected)
        written, pending = state, None
        if state.losses is not None:
            reading = reading._replace(losses=state.losses)
        if shared is not None:
            attention = reading.attention if context.earlier is None else self.place_whole(hidden, context, projected)
            new = self.new_samples(hidden, context) if reading.written is None else reading.written
            written = self.write(new, state, shared, attention, context.noise, context.complete)
            if state.losses is not None and context.complete is not None:
                pending = PendingLosses(context.complete, shared.contraction)
        losses = {}
        if context.scored:
            written_to = context.visible(state.segments.unsqueeze(-1) > 0)
            losses["divergence"] = self.divergence(reading.attention) * written_to
        return MemoryOutput(written, reading.context, losses, reading, projected, pending)

    def write_by_losses(self, state: LongTermState, pending: PendingLosses, losses: Tensor) -> LongTermState:
        assert state.losses is not None
        new = with_new_losses(state.losses, losses.to(state.losses), pending.contraction.to(state.losses))
        return replace(state, losses=torch.where(pending.written.unsqueeze(-1), new, state.losses))

    def read_segment(
        self, hidden: Tensor, state: LongTermState, context: SegmentContext, projected: Projected
    ) -> tuple[Reading, Projected]:
        """What the tokens read, and what the next tokens of the segment will need."""
        return self.read(hidden, state, projected), projected

    def place_whole(self, hidden: Tensor, context: SegmentContext, projected: Projected) -> Density:
        """Where all tokens of a segment looked that comes in pieces, of which `hidden` is the last."""
        return self.place(context.whole(hidden), projected)

    def new_samples(self, hidden: Tensor, context: SegmentContext) -> Tensor:
        """What is written, [batch, T, width]."""
        return context.written(hidden)

    def project(self, state: LongTermState) -> Projected:
        """What all tokens of a segment need of the memory before it, computed once.

        An affine read places a token by w·s, of its scores s = K_h q_h/√d_h on the N keys, and w·s is
        (wᵀB) W_K^h q_h/√d_h. So two mixtures of the coefficients stand for the N keys, and pushed through the heads'
        query projections they are two directions a head in the space of x.
        """
        coefficients = state.coefficients
        operands = type_of_products(coefficients)
        with torch.autocast(coefficients.device.type, enabled=False):
            of_keys, of_values = self.signal.looked_at(coefficients)
            if self.config.read == "affine":
                mixtures = self.placement.weight.to(of_keys) @ of_keys  # [batch, 2, hidden]
                keys = apply_linear(self.key, mixtures).unflatten(-1, (self.heads, -1))  # [batch, 2, heads, head]
                query_weight = self.query.weight.to(coefficients).unflatten(0, (self.heads, -1))
                placing = torch.einsum("bkhe,hed->bkhd", keys, query_weight) / math.sqrt(keys.shape[-1])
            else:
                placing = split_heads(apply_linear(self.key, of_keys), self.heads)
            values = split_heads(apply_linear(self.value, of_values.to(operands)), self.heads)
            values = values.contiguous()  # which many tokens read, one by one
            return Projected(placing, values, log_tokens=self.signal.log_tokens(state.segments))

    def read(self, hidden: Tensor, state: LongTermState, projected: Projected | None = None) -> Reading:
        """What tokens of a segment see of the past segments; exactly zero where the memory is empty.

        z_h = rᵀ B W_V^h with r_j = E_p[ψ_j]; context = [z_1 … z_H] W_O.

        Args:
            hidden: [batch, queries, hidden], any floating type.
            state: the memory before this segment.
            projected: what `project` makes of it, if that was done before.
        """
        projected = self.project(state) if projected is None else projected
        attention = self.place(hidden, projected)
        with torch.autocast(hidden.device.type, enabled=False):
            expected = attention.read(self.signal.grid, projected.values)
            return Reading(apply_linear(self.output, expected.transpose(1, 2).flatten(2)), attention)

    def place(self, hidden: Tensor, projected: Projected) -> Density:
        """Where each head of each token looks, shape [batch, heads, queries]; the arguments are those of `read`.

        An affine read has μ = sigmoid(w_μ·s) and σ² = softplus(w_σ·s); see `project`.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(projected.placing.dtype)
            if self.config.read == "affine":
                directions = projected.placing.flatten(1, 2)
                return self.density((directions @ hidden.mT).unflatten(1, (2, self.heads)))
            queries = split_heads(apply_linear(self.query, hidden), self.heads)
            return self.density(self.scores(queries, projected))

    def scores(self, queries: Tensor, projected: Projected) -> Tensor:
        """βqᵀk/√d_h + log n of queries [batch, heads, queries, head], keys of n tokens: [batch, heads, queries, N]."""
        scores = queries @ projected.placing.mT / (math.sqrt(queries.shape[-1]) / self.config.sharpness)
        return scores if projected.log_tokens is None else scores + projected.log_tokens[:, None, None]

    def density(self, scores: Tensor) -> Density:
        """Where it is looked, by scores.

        Args:
            scores: for each key, [batch, heads, queries, N]; with an affine read w_μ·s and w_σ·s alone,
                [batch, 2, heads, queries].
        """
        config = self.config
        if config.read == "affine":
            mean, variance = torch.sigmoid(scores[:, 0]), F.softplus(scores[:, 1]).clamp(min=MINIMAL_VARIANCE)
        elif config.read == "gibbs":
            return Gibbs.of_scores(scores)
        else:
            weights = torch.softmax(scores, dim=-1)
            if config.read == "slots":
                return Slots(weights)
            mean, variance = match_moments(weights, self.signal.basis)
        return Gaussian(mean, variance) if config.density == "gaussian" else TruncatedParabola(mean, variance)

    def write(
        self,
        hidden: Tensor,
        state: LongTermState,
        operators: WriteOperators,
        attention: Density,
        noise: Tensor | None = None,
        complete: Tensor | None = None,
    ) -> LongTermState:
        """The memory after a segment: B' = G_pastᵀ Ψ(t) B + G_newᵀ X.

        Args:
            hidden: X, the segment, [batch, T, hidden].
            state: the memory before it.
            operators: `signal.operators(state.segments)`; the same for all layers of a model.
            attention: where the segment looked when it read `state`; sticky memories sample the past there.
            noise: random offsets of those samples in [0, 1), [batch, M]; deterministic if not given.
            complete: rows to write, bool [batch]; the others stay as they are. All if not given.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = self.gated(hidden.to(state.coefficients.dtype))
            positions = self.past_positions(attention, noise, state.losses).to(hidden)
            carried = self.signal.carried(operators, positions)
            coefficients = carried @ state.coefficients + operators.new.mT @ hidden
            losses = state.losses
            if losses is not None:
                losses = moved_losses(losses, positions, operators.contraction.to(losses))
        segments = state.segments + 1
        if complete is not None:
            coefficients = torch.where(complete.view(-1, 1, 1), coefficients, state.coefficients)
            segments = torch.where(complete, segments, state.segments)
            if losses is not None and state.losses is not None:
                losses = torch.where(complete.unsqueeze(-1), losses, state.losses)
        return LongTermState(coefficients, segments, losses)

    def gated(self, hidden: Tensor) -> Tensor:
        """What is written of a segment [batch, T, hidden]: X ⊙ sigmoid(Conv1d(X)) with an input gate, else X itself."""
        if not self.config.input_gate:
            return hidden
        bias = self.gate.bias.to(hidden)
        convolved = F.conv1d(hidden.mT, self.gate.weight.to(hidden), bias, padding=1)
        return hidden * torch.sigmoid(convolved.mT)

    def past_positions(self, attention: Density, noise: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        """Where a write samples the old signal: ascending, shape [M], or [batch, M] with stickiness.

        Args:
            attention: where the segment looked,
            noise: the random offsets, as for `write`,
            losses: and those of the past, if room is given by them.
        """
        if not self.config.sticky:
            return self.signal.past_places
        with torch.no_grad():
            samples = self.config.past_samples
            offsets = None if noise is None else noise[:, :samples]
            return warped_positions(self.histogram(attention, losses), samples, offsets)

    def histogram(self, attention: Density, losses: Tensor | None = None) -> Tensor:
        """By which a sticky past is resampled, [batch, bins]."""
        config = self.config
        if config.sticky_by == "attention" or losses is None:
            return attention_histogram(attention, self.signal.basis, config.sticky_bins)
        mass = losses.clamp(min=1e-3)  # where all is foreseen, all is alike
        if config.sticky_by == "both":
            mass = mass * attention_histogram(attention, self.signal.basis, config.sticky_bins)
        return mass / mass.sum(-1, keepdim=True)

    def moved_places(self, places: Tensor, segments: int, attention: Density, losses: Tensor | None = None) -> Tensor:
        """Where the tokens written so far lie after one more write.

        Args:
            places: where they lie now, in the order of the text, shape [segments · T]; empty before the first write.
            segments: how many segments were written so far.
            attention: where the segment looked, one row; the past is resampled with the deterministic offsets.
            losses: of the past, [1, bins], if room is given by them.

        Returns:
            Their places and behind them those of the new segment, shape [(segments + 1) · T]. The past moves from x to
            τx, with stickiness to τcdf(x), as published to τ(cdf(x) + ½/M); token i = 1…T of the segment comes to
            τ + (1 − τ)i/T, of a first segment to (i − ½)/T.
        """
        histogram = self.histogram(attention, losses) if self.config.sticky else None
        return self.signal.moved_places(places, segments, histogram)

    def time_shuffle(self) -> Tensor | None:
        return self.signal.time_shuffle()

    def shuffle_time(self, state: LongTermState, shuffle: Any) -> LongTermState:
        with torch.autocast(state.coefficients.device.type, enabled=False):
            coefficients = self.signal.shuffle(state.coefficients, state.segments, shuffle)
        losses = None if state.losses is None else shuffled_bins(state.losses)
        return replace(state, coefficients=coefficients, losses=losses)

    def divergence(self, attention: Density) -> Tensor:
        """How far the densities' variance is from the prior's, mean over heads, [batch, queries]; 0 without one."""
        if isinstance(attention, Slots | Gibbs):
            return attention.weights.new_zeros(()).expand(attention.weights.shape[0], attention.weights.shape[2])
        return variance_divergence(attention.variance, self.config.prior_standard_deviation**2).mean(dim=1)
