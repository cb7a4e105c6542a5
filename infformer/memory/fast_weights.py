"""Fast weights (Schlag, Irie & Schmidhuber, ICML 2021, arXiv 2102.11174): a matrix a head, written by outer products.

Every token that is written adds its value under its key; every token that reads asks the matrix by its query. With the
sum rule that is linear attention (Katharopoulos et al., arXiv 2006.16236); with the delta rule a value replaces what
stood under its key, and the matrix forgets nothing else. Both fade a little, as far as they learn to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.memory.memory import Memory, MemoryOutput, SegmentContext, apply_linear, split_heads
from infformer.memory.options import MemoryConfig, own_heads
from infformer.memory.state import MemoryState
from infformer.options import check_at_least, check_choices

CHUNK = 64
"""Tokens whose changes are found by one triangular solve."""
FORGETTING = -10.0
"""Where the decay begins: half of what is written is left after 15,000 tokens."""


@dataclass
class FastWeightMemoryConfig(MemoryConfig):
    """What one memory of fast weights is."""

    kind: ClassVar[str] = "fast_weight"
    training: ClassVar[dict[str, Any]] = {"bptt_segments": 2}

    rule: str = "delta"
    """`delta`: a token changes what its key finds towards its value, as far as it is written. `sum`: it adds its value,
    so that keys must be far apart: linear attention."""
    features: str = "plain"
    """What a key and a query become before their length is made 1: `plain`, as they are; `elu`, elu + 1; `dpfp`, of
    `dpfp_order` times twice as many numbers, most of them zero, so that more keys have room."""
    dpfp_order: int = 1
    """ν of the features `dpfp`."""
    key_convolution: int = 4
    """A key sees so many tokens, its own and those before it in the segment, each channel by itself; so a value can
    stand under the token before it. 0: its own alone."""
    strength: str = "content"
    """How strongly a token is written, from 0 to 1. `content`: as its hidden state says. `loss`: besides the more, the
    less it was expected where it was read."""
    within_segment: bool = False
    """A token also reads what the tokens before it, and itself, have written of its own segment. It then stands beside
    attention as linear attention, also where there is no past."""
    heads: int | None = None
    """How many matrices share the model's width. Null: as many as attention has heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            "model.memory.",
            self,
            rule=("delta", "sum"),
            features=("plain", "elu", "dpfp"),
            strength=("content", "loss"),
        )
        check_at_least(1, "model.memory.", self, "dpfp_order", "heads")
        check_at_least(0, "model.memory.", self, "key_convolution")
        if self.within_segment and self.strength == "loss":
            raise ValueError(
                "model.memory.strength=loss with model.memory.within_segment=true: within a segment losses are not "
                "known yet; set one of the two to its default"
            )
        if self.within_segment and self.short_term_length:
            raise ValueError(
                f"model.memory.short_term_length={self.short_term_length} with model.memory.within_segment=true: what "
                "stands in a short-term memory is not written yet, and would be missing between the past and the "
                "segment; set model.memory.short_term_length=0"
            )

    def check_training(self, bptt_segments: int) -> None:
        if bptt_segments == 1 and not self.within_segment:
            raise ValueError(
                "training.bptt_segments=1: fast weights learn what to write from what later segments read, and nothing "
                "where gradients stay in one segment; set training.bptt_segments=2 or more"
            )

    def with_short_term_length(self, default: int) -> FastWeightMemoryConfig:
        return super().with_short_term_length(0 if self.within_segment else default)

    def build_behind(self, hidden_size: int, heads: int, layers: int, segment_length: int) -> list[Memory]:
        heads = own_heads(self.heads, heads, hidden_size, "fast weights")
        return [FastWeightMemory(self, hidden_size, heads) for _ in range(layers)]


@dataclass(frozen=True)
class FastWeightState(MemoryState):
    """A layer's fast weights between two segments."""

    weights: Tensor
    """Wᵀ of each head, float32, shape [batch, heads, features, head]."""


class Writes(NamedTuple):
    """What some tokens write; the first three axes are [batch, heads, length]."""

    keys: Tensor
    """φ(k), of length 1, [batch, heads, length, features]."""
    values: Tensor
    """[batch, heads, length, head]."""
    strength: Tensor
    """β before its sigmoid."""
    forgetting: Tensor
    """By how much all that stands there fades, before its softplus: the factor is exp(−softplus)."""


class PendingWrites(NamedTuple):
    """What waits for the losses of its tokens."""

    complete: Tensor
    """Rows that are written, bool [batch]."""
    writes: Writes
    surprise: Tensor
    """How much stronger a token is written for each nat, [batch, heads]."""


def advance(weights: Tensor, writes: Writes, rule: str, queries: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Write tokens one after the other, computed in chunks, and read after each.

    Wᵢ = αᵢWᵢ₋₁ + uᵢφ(kᵢ)ᵀ, by the sum rule with uᵢ = βᵢvᵢ, by the delta rule with uᵢ = βᵢ(vᵢ − αᵢWᵢ₋₁φ(kᵢ)). There the
    changes of a chunk solve a triangular system, as those before a token decide on its own.

    Args:
        weights: before them, [batch, heads, features, head].
        rule: `delta` or `sum`.
        queries: φ(q) of the same tokens, of the shape of the keys; each reads after its token is written.

    Returns:
        The weights after them, and what was read, [batch, heads, length, head]; None without queries.
    """
    strengths, decays = torch.sigmoid(writes.strength), -F.softplus(writes.forgetting)
    parts = [writes.keys, writes.values, strengths, decays, writes.keys if queries is None else queries]
    found = []
    for keys, values, strength, decay, asked in zip(*(part.split(CHUNK, dim=2) for part in parts), strict=True):
        faded = decay.cumsum(-1)
        since = faded.unsqueeze(-1) - faded.unsqueeze(-2)  # from a token to a later one
        later = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).tril()
        left = since.masked_fill(~later, -math.inf).exp()
        whole = faded.exp().unsqueeze(-1)
        changes = strength.unsqueeze(-1) * values
        if rule == "delta":
            changes = changes - strength.unsqueeze(-1) * whole * (keys @ weights)
            system = strength.unsqueeze(-1) * (left * (keys @ keys.mT)).tril(-1)
            changes = torch.linalg.solve_triangular(system, changes, upper=False, unitriangular=True)
        if queries is not None:
            found.append(whole * (asked @ weights) + (left * (asked @ keys.mT)) @ changes)
        weights = whole[..., -1:, :] * weights + (left[..., -1:, :].mT * keys).mT @ changes
    return weights, torch.cat(found, dim=2) if found else None


class Writing(nn.Module):
    """What a hidden state writes: key, value, strength and decay."""

    def __init__(self, config: FastWeightMemoryConfig, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.strength = nn.Linear(hidden_size, heads, bias=False)
        self.forgetting = nn.Linear(hidden_size, heads, bias=False)
        self.strength_offset = nn.Parameter(torch.empty(heads))
        self.forgetting_offset = nn.Parameter(torch.empty(heads))
        if config.key_convolution:
            self.convolution = nn.Conv1d(
                hidden_size, hidden_size, config.key_convolution, groups=hidden_size, bias=False
            )
        if config.strength == "loss":
            self.surprise = nn.Parameter(torch.empty(heads))

    def reset_parameters(self) -> None:
        """Small random projections; a key is that of its own token; tokens are written by half, and fade hardly."""
        for projection in (self.key, self.value, self.strength, self.forgetting):
            nn.init.normal_(projection.weight, std=0.02)
        if self.config.key_convolution:
            nn.init.zeros_(self.convolution.weight)
            nn.init.ones_(self.convolution.weight[..., -1])
        self.reset_numbers()

    def reset_numbers(self) -> None:
        """Those that are added to what projections say."""
        nn.init.zeros_(self.strength_offset)
        nn.init.constant_(self.forgetting_offset, FORGETTING)
        if self.config.strength == "loss":
            nn.init.ones_(self.surprise)

    def forward(self, hidden: Tensor) -> Writes:
        """What tokens [batch, length, hidden] write; a key sees no token before the first of them."""
        keys = apply_linear(self.key, hidden)
        if self.config.key_convolution:
            weight = self.convolution.weight.to(keys)
            padded = F.pad(keys.mT, (self.config.key_convolution - 1, 0))
            keys = F.conv1d(padded, weight, groups=weight.shape[0]).mT
        return Writes(
            features_of(split_heads(keys, self.heads), self.config),
            split_heads(apply_linear(self.value, hidden), self.heads),
            (apply_linear(self.strength, hidden) + self.strength_offset.to(hidden)).mT,
            (apply_linear(self.forgetting, hidden) + self.forgetting_offset.to(hidden)).mT,
        )


class FastWeightMemory(Memory):
    """The learned part of one layer's fast weights, which are computed in float32 whatever autocast chooses.

    What is read passes a norm of each head, in which a normaliser of linear attention would cancel out, and a gate that
    begins at zero.

    Args:
        heads: attention heads; must divide the width.
    """

    learns_by_writing = True

    def __init__(self, config: FastWeightMemoryConfig, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.needs_losses = config.strength == "loss"
        self.reads_segment = config.within_segment
        self.writing = Writing(config, hidden_size, heads)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.scale = nn.Parameter(torch.empty(hidden_size))
        self.gate = nn.Parameter(torch.empty(heads))
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random projections, behind a gate that is shut: a new memory changes nothing until it is trained."""
        self.writing.reset_parameters()
        for projection in (self.query, self.output):
            nn.init.normal_(projection.weight, std=0.02)
        self.reset_numbers()

    def reset_numbers(self) -> None:
        self.writing.reset_numbers()
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.gate)

    def initial_state(self, batch: int) -> FastWeightState:
        head = self.query.in_features // self.heads
        return FastWeightState(torch.zeros(batch, self.heads, feature_size(head, self.config), head))

    def forward(self, hidden: Tensor, state: FastWeightState, context: SegmentContext, shared: Any) -> MemoryOutput:
        weights = state.weights
        with torch.autocast(hidden.device.type, enabled=False):
            own = hidden.to(weights.dtype)
            queries = features_of(split_heads(apply_linear(self.query, own), self.heads), self.config)
            after: Tensor | None = None
            if self.config.within_segment:
                after, read = self._read_segment(own, queries, weights, context)
            else:
                read = queries @ weights
            added = self.combine(read)
            if context.complete is None:
                return MemoryOutput(state, added, projected=after)
            if after is not None and context.without_memory is None:
                return MemoryOutput(state.replace_rows(context.complete, FastWeightState(after)), added)
            writes = self.writing(context.written(hidden).to(weights.dtype))
            if self.needs_losses:
                surprise = self.writing.surprise.to(weights) * weights.new_ones(len(weights), 1)
                return MemoryOutput(state, added, pending=PendingWrites(context.complete, writes, surprise))
            return MemoryOutput(self.write(state, writes, context.complete), added)

    def write(self, state: FastWeightState, writes: Writes, complete: Tensor) -> FastWeightState:
        """The state after tokens of some rows (bool, [batch]); the others stay as they are."""
        with torch.autocast(state.weights.device.type, enabled=False):
            weights, _ = advance(state.weights, writes, self.config.rule)
        return state.replace_rows(complete, FastWeightState(weights))

    def write_by_losses(self, state: FastWeightState, pending: PendingWrites, losses: Tensor) -> FastWeightState:
        """A token is written the more strongly, the larger its loss is beside the mean of its segment."""
        writes, losses = pending.writes, losses.to(state.weights)
        above = (losses - losses.mean(-1, keepdim=True)).unsqueeze(1)
        strength = writes.strength + pending.surprise.unsqueeze(-1) * above
        return self.write(state, writes._replace(strength=strength), pending.complete)

    def combine(self, read: Tensor) -> Tensor:
        """What is added, [batch, length, hidden], of what each head read, [batch, heads, length, head]; 0 for zeros."""
        normed = F.rms_norm(read, read.shape[-1:], eps=1e-6) * torch.tanh(self.gate.to(read)).view(-1, 1, 1)
        return apply_linear(self.output, normed.transpose(1, 2).flatten(2) * self.scale.to(read))

    def shuffle_time(self, state: FastWeightState, shuffle: Any) -> FastWeightState:
        """The same: a matrix does not say when its parts were written."""
        return state

    def _read_segment(
        self, hidden: Tensor, queries: Tensor, weights: Tensor, context: SegmentContext
    ) -> tuple[Tensor, Tensor]:
        """The weights after the tokens of a segment so far, and what those that are read now have read."""
        length = hidden.shape[1]
        if context.without_memory is not None:
            weights = weights.masked_fill(context.without_memory.view(-1, 1, 1, 1), 0)
        if context.earlier is not None:
            weights = context.earlier.projected
        seen = context.whole(hidden)[:, -(length + max(0, self.config.key_convolution - 1)) :]
        writes = Writes(*(part[:, :, -length:] for part in self.writing(seen.to(hidden.dtype))))
        after, read = advance(weights, writes, self.config.rule, queries)
        assert read is not None
        return after, read


def features_of(vectors: Tensor, config: FastWeightMemoryConfig) -> Tensor:
    """φ of keys or queries [..., head], of length 1, or zero where there is nothing: [..., features]."""
    if config.features == "elu":
        vectors = F.elu(vectors) + 1
    elif config.features == "dpfp":
        signs = F.relu(torch.cat([vectors, -vectors], dim=-1))
        vectors = torch.cat([signs * signs.roll(-shift, -1) for shift in range(1, config.dpfp_order + 1)], dim=-1)
    return F.normalize(vectors, dim=-1)


def feature_size(head: int, config: FastWeightMemoryConfig) -> int:
    """How many features a key of so many numbers has."""
    return 2 * config.dpfp_order * head if config.features == "dpfp" else head
