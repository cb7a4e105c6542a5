"""The parts of a layer: attention with positions that are distances, Transformer-XL's or rotary ones; feed-forward;
the residual stream around each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.activations import ACT2FN

from infformer.memory.memory import KeyValues, LayerHeads, split_heads
from infformer.models.mechanisms import Mechanism


@dataclass(frozen=True)
class BlockSizes:
    """The sizes and choices of a layer's parts; those of `DecoderConfig` that have the same names."""

    hidden_size: int
    heads: int
    head_size: int
    key_size: int
    feed_forward_size: int
    activation: str
    positions: str
    normalization: str
    normalization_placement: str
    norm_epsilon: float
    dropout: float
    attention_dropout: float

    @classmethod
    def of(cls, config: Any, **others: Any) -> Self:
        """Those of an architecture, with what it does not say."""
        others["heads"] = config.num_attention_heads
        names = [field.name for field in fields(cls) if field.name not in others]
        return cls(**{name: getattr(config, name) for name in names}, **others)

    def begin(self, hidden: Tensor) -> Stream:
        """The residual stream before the first layer."""
        return Stream(hidden, hidden if self.normalization_placement == "dual" else None)

    def new_final_norm(self) -> nn.Module | None:
        """The norm behind the last layer; None where each part has ended in one."""
        return None if self.normalization_placement == "post" else self.new_norm()

    def new_norm(self) -> nn.Module:
        """A norm of the residual stream."""
        kind = nn.LayerNorm if self.normalization == "layer" else nn.RMSNorm
        return kind(self.hidden_size, eps=self.norm_epsilon)


class Stream(NamedTuple):
    """The residual stream between two parts of a model."""

    hidden: Tensor
    """What the parts see, or see through their norms, [batch, length, hidden]."""
    total: Tensor | None = None
    """With dual norms: what entered the first layer and all that was added since, without any norm."""

    def end(self, norm: nn.Module | None) -> Tensor:
        """What leaves the last layer.

        Args:
            norm: that of the sum, where there is one; None where norms stand after the parts.
        """
        if norm is None:
            return self.hidden
        return cast(Tensor, norm(self.hidden) if self.total is None else self.hidden + norm(self.total))


class Residual(nn.Module):
    """The residual stream around a part: x + part(norm(x)) where norms stand before, norm(x + part(x)) where after.

    With dual norms, those of ResiDual (Xie et al., arXiv 2304.14802), they stand after, and the stream also keeps the
    sum of what was added, whose norm is added at the end.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.before = sizes.normalization_placement == "pre"
        self.norm = sizes.new_norm()
        self.dropout = nn.Dropout(sizes.dropout)

    def enter(self, stream: Stream) -> Tensor:
        """What the part sees."""
        return self.norm(stream.hidden) if self.before else stream.hidden

    def leave(self, stream: Stream, added: Tensor) -> Stream:
        """The stream after the part has added to it."""
        added = self.dropout(added)
        hidden = stream.hidden + added
        total = None if stream.total is None else stream.total + added
        # Made by its class: what `_replace` makes cannot leave a compiled layer in every version of PyTorch.
        return Stream(hidden if self.before else self.norm(hidden), total)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.expand = nn.Linear(sizes.hidden_size, sizes.feed_forward_size)
        self.activation = ACT2FN[sizes.activation]
        self.dropout = nn.Dropout(sizes.dropout)
        self.contract = nn.Linear(sizes.feed_forward_size, sizes.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.contract(self.dropout(self.activation(self.expand(hidden))))


class Attention(nn.Module):
    """Causal multi-head attention of the last tokens of a context on all of it.

    Args:
        mechanism: causal, of a context that is the segment alone, at rotary positions; None for softmax.
    """

    def __init__(self, sizes: BlockSizes, mechanism: Mechanism | None = None) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.heads = heads = sizes.heads
        self.rotary = sizes.positions == "rotary"
        self.dropout = sizes.attention_dropout
        hidden_size = sizes.hidden_size
        keys, values = heads * sizes.key_size, heads * sizes.head_size
        self.query = nn.Linear(hidden_size, keys, bias=False)
        has_keys = mechanism is None or mechanism.has_keys
        self.key = nn.Linear(hidden_size, keys, bias=False) if has_keys else None
        self.value = nn.Linear(hidden_size, values, bias=False)
        self.output = nn.Linear(values, hidden_size, bias=False)
        if not self.rotary:
            self.distance = nn.Linear(hidden_size, keys, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(heads, 1, sizes.key_size))
            self.distance_bias = nn.Parameter(torch.zeros(heads, 1, sizes.key_size))

    def forward(self, hidden: Tensor, context: Tensor, allowed: Tensor, encoding: Tensor) -> Tensor:
        """Attend.

        Args:
            hidden: the queries, [batch, queries, hidden]: the last entries of the context.
            context: [batch, length, hidden].
            allowed: which entry each query may see, bool [batch, 1, queries, length].
            encoding: of distances length − 1 … 0 (relative), or of places 0 … length − 1 (rotary); `encode_positions`.
        """
        if self.mechanism is not None:
            # What the last queries see may depend on those before them.
            query, (key, value) = self._heads(self.query, context), self._key_values(context)
            attended = self.mechanism(context, rotate(query, encoding), rotate(key, encoding), value, None)
            return self._join(attended[:, :, -hidden.shape[1] :])
        query, key, value, mask = self._kernel_inputs(hidden, context, allowed, encoding)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self._join(attended)

    def heads_of(self, hidden: Tensor, context: Tensor, allowed: Tensor, encoding: Tensor) -> LayerHeads:
        """What a memory of keys and values is told; the arguments are those of `forward`."""

        def attended() -> tuple[Tensor, Tensor]:
            query, key, value, mask = self._kernel_inputs(hidden, context, allowed, encoding)
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
            return scores.softmax(-1) @ value, scores.logsumexp(-1)

        queries = self._heads(self.query, hidden)
        queries = queries if self.rotary else queries + self.content_bias
        return LayerHeads(queries, self._join, attended, self._key_values)

    def _kernel_inputs(
        self, hidden: Tensor, context: Tensor, allowed: Tensor, encoding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, …, head], and what is added to scores, or which of them count."""
        query, (key, value) = self._heads(self.query, hidden), self._key_values(context)
        if self.rotary:
            return rotate(query, encoding[-query.shape[2] :]), rotate(key, encoding), value, allowed
        mask = self.distance_scores(query, encoding).masked_fill(~allowed, -math.inf)
        return query + self.content_bias, key, value, mask

    def _key_values(self, context: Tensor) -> KeyValues:
        return KeyValues(self._heads(self._key_projection, context), self._heads(self.value, context))

    @property
    def _key_projection(self) -> nn.Linear:
        """That of the queries, where a mechanism has no keys of their own."""
        return self.query if self.key is None else self.key

    def _join(self, heads: Tensor) -> Tensor:
        """[batch, heads, length, head] to [batch, length, hidden]."""
        return self.output(heads.transpose(1, 2).flatten(2))

    def distance_scores(self, query: Tensor, encoding: Tensor) -> Tensor:
        """Transformer-XL's terms (b) and (d): (q_i + v)ᵀ W_R R_{i−j} / √d_h, [batch, heads, queries, length].

        Exact where entry j is not after query i; elsewhere arbitrary.
        """
        distances = self.distance(encoding.to(query.dtype)).unflatten(-1, (self.heads, -1))  # [length, heads, head]
        query = (query + self.distance_bias) / math.sqrt(query.shape[-1])
        return shift_to_entries(torch.einsum("bhqe,lhe->bhql", query, distances))

    def attend_by_content(self, hidden: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Attention without positions, through which gradients reach the entries alone.

        Args:
            hidden: [batch, queries, hidden].
            entries: [batch, length, hidden].

        Returns:
            What is read, heads side by side [batch, queries, width], and the weights [batch, heads, queries, length].
        """
        query, key, value = (
            split_heads(F.linear(source, projection.weight.detach()), self.heads)
            for projection, source in (
                (self.query, hidden.detach()),
                (self._key_projection, entries),
                (self.value, entries),
            )
        )
        weights = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2), weights

    def _heads(self, projection: nn.Linear, hidden: Tensor) -> Tensor:
        """[batch, length, hidden] to [batch, heads, length, head]."""
        return split_heads(projection(hidden), self.heads)


def initialize(module: nn.Module, deviation: float | None = None) -> None:
    """Give what was not loaded normal weights, by default of deviation 1/√inputs of each matrix, and zero biases."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
        inputs = module.weight[0].numel()
        initialization.normal_(module.weight, std=1 / math.sqrt(inputs) if deviation is None else deviation)
    if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
        initialization.zeros_(module.bias)


def encode_positions(length: int, width: int, positions: str, device: torch.device) -> Tensor:
    """Sines and cosines [length, width], of the frequencies 10000^(−2k/width).

    `relative`: of the distances length − 1 … 0, sines first. `rotary`: of the places 0 … length − 1, cosines first, as
    `rotate` takes them.
    """
    frequencies = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    places = torch.arange(length, device=device, dtype=torch.float32)
    if positions == "rotary":
        angles = torch.outer(places, frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
    angles = torch.outer(places.flip(0), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]


def rotate(heads: Tensor, encoding: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): turn each pair (k, k + width/2) by its angle.

    Args:
        heads: [batch, heads, length, width].
        encoding: cosines and sines, [length, width].
    """
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = encoding.to(heads.dtype).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def shift_to_entries(scores: Tensor) -> Tensor:
    """From scores by distance to scores by entry, without a gather.

    Args:
        scores: [..., queries, length]; column c belongs to distance length − 1 − c. Query i is entry
            length − queries + i, so its score of entry j stands in column j + queries − 1 − i: each row has to move to
            the left by one place less than the row before.

    Returns:
        [..., queries, length]; exact for entries that are not after the query, arbitrary behind them.
    """
    queries, length = scores.shape[-2:]
    # With one more column, read again in rows of the old length, each row slides one place further than the last.
    padded = F.pad(scores, (1, 0)).flatten(-2)
    return padded[..., queries:].unflatten(-1, (queries, length))
