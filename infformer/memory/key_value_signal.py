"""A long-term memory of keys and values: the signal of what a layer's own attention makes of the past.

It has no projections, and at most a short convolution over keys. Keys and values are kept before any rotation by
places, asked with the attention's queries before theirs, and what is read goes through its output projection.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.attention.features import type_of_products
from infformer.continuous.density import Density
from infformer.memory.long_term import LongTermMemory, LongTermState, Projected, Reading
from infformer.memory.memory import KeyValues, LayerHeads, SegmentContext
from infformer.memory.signal import ContinuousSignal

if TYPE_CHECKING:
    from infformer.memory.long_term_options import LongTermMemoryConfig


class KeyValueSignal(LongTermMemory):
    """One layer's.

    Args:
        config: what the memory is.
        heads: attention heads, each with a gate; heads of keys and values that are fewer are shared among them.
        key_values: heads of keys and values, and numbers of each head.
        signal: basis and operators, shared between layers.
    """

    def __init__(
        self, config: LongTermMemoryConfig, heads: int, key_values: tuple[int, int], signal: ContinuousSignal
    ) -> None:
        self.shape = key_values
        self.first_gate = 0.0 if config.combination == "gates" else -2.0
        super().__init__(config, 2 * key_values[0] * key_values[1], heads, signal)
        self.keeps_key_values = True

    def _add_parameters(self) -> None:
        self.gate = nn.Parameter(torch.empty(self.heads))
        if taps := self.config.key_convolution:
            numbers = math.prod(self.shape)
            self.convolution = nn.Conv1d(numbers, numbers, taps, groups=numbers, bias=False)

    def _reset_own(self) -> None:
        """A gate as good as shut, and keys as they are."""
        self.reset_numbers()
        if self.config.key_convolution:
            nn.init.zeros_(self.convolution.weight)
            nn.init.ones_(self.convolution.weight[..., -1])

    def reset_numbers(self) -> None:
        nn.init.constant_(self.gate, self.first_gate)

    def project(self, state: LongTermState) -> Projected:
        coefficients = state.coefficients
        operands = type_of_products(coefficients)
        with torch.autocast(coefficients.device.type, enabled=False):
            numbers = coefficients.shape[-1] // 2
            of_keys, of_values = self.signal.looked_at(coefficients)
            keys, values = (
                part.unflatten(-1, self.shape).transpose(1, 2).repeat_interleave(self.heads // self.shape[0], dim=1)
                for part in (of_keys[..., :numbers], of_values[..., numbers:])
            )
            if self.config.read == "affine":
                keys = (self.placement.weight.to(keys) @ keys).transpose(1, 2) / math.sqrt(keys.shape[-1])
            return Projected(keys, values.to(operands).contiguous(), log_tokens=self.signal.log_tokens(state.segments))

    def read_segment(
        self, hidden: Tensor, state: LongTermState, context: SegmentContext, projected: Projected
    ) -> tuple[Reading, Projected]:
        heads = cast(LayerHeads, context.heads)
        queries = heads.queries
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self._scores(queries, projected)
            attention = self.density(scores)
            expected = attention.read(self.signal.grid, projected.values)
            gate = self.gate.to(expected).view(-1, 1, 1)
            if self.config.combination == "gates":
                added = torch.tanh(gate) * expected
            else:
                attended, normaliser = heads.attended()
                share = torch.sigmoid(scores.logsumexp(-1) + gate.squeeze(-1) - normaliser).unsqueeze(-1)
                real = (state.segments > 0).view(-1, 1, 1, 1)
                added = torch.where(real, share * (expected - attended), 0)
        written = None if context.complete is None else self.new_samples(hidden, context)
        reading = Reading(heads.output(added.to(queries.dtype)), attention, written)
        if not self.config.sticky:
            return reading, projected
        earlier = () if projected.queries is None else (projected.queries,)
        return reading, projected._replace(queries=torch.cat([*earlier, queries], dim=2))

    def place_whole(self, hidden: Tensor, context: SegmentContext, projected: Projected) -> Density:
        with torch.autocast(hidden.device.type, enabled=False):
            queries = cast(LayerHeads, context.heads).queries if projected.queries is None else projected.queries
            return self.density(self._scores(queries, projected))

    def new_samples(self, hidden: Tensor, context: SegmentContext) -> Tensor:
        project = cast(LayerHeads, context.heads).project
        if project is None and context.leaving is not None:
            keys, values = context.leaving.chunk(2, dim=-1)
        else:
            pair = cast(KeyValues, context.key_values) if project is None else project(context.written(hidden))
            keys, values = (part.transpose(1, 2).flatten(2) for part in pair)
        return torch.cat([self.convolved(keys), values], dim=-1)

    def convolved(self, keys: Tensor) -> Tensor:
        """What is kept of keys [batch, length, numbers], if they are summed with those before them."""
        if not self.config.key_convolution:
            return keys
        weight = self.convolution.weight.to(keys)
        return F.conv1d(F.pad(keys.mT, (weight.shape[-1] - 1, 0)), weight, groups=len(weight)).mT

    def _scores(self, queries: Tensor, projected: Projected) -> Tensor:
        """What `density` is made of."""
        queries = queries.to(projected.placing.dtype)
        if self.config.read == "affine":
            return torch.einsum("bkhd,bhld->bkhl", projected.placing, queries)
        return self.scores(queries, projected)
