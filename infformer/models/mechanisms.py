"""Mechanisms of attention: the functions of `infformer.attention`, each with what it learns or draws.

To add one: write the function, and a class here that says what it is called and calls it. Its options are the arguments
of the class; `model.architecture.attention=performer`, or `{kind: performer, features: 64}`, chooses it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.attention.features import linear_attention, orthogonal_directions, performer_attention
from infformer.attention.low_rank import linformer_attention, synthesizer_attention
from infformer.attention.patterns import (
    big_bird_attention,
    fixed_attention,
    local_attention,
    strided_attention,
    window_attention,
)
from infformer.attention.reformer import reformer_attention
from infformer.attention.sinkhorn import sinkhorn_attention
from infformer.attention.softmax import softmax_attention
from infformer.continuous.attention import continuous_attention
from infformer.errors import ModelError
from infformer.memory.fast_weights import Writes, advance
from infformer.memory.memory import DerivedBuffers, split_heads
from infformer.models.architecture_options import check_choice, check_number, check_size

NOTHING = -1e4
"""Before a sigmoid or a softplus: no strength, no forgetting."""


@dataclass(frozen=True)
class AttentionShape:
    """Where a mechanism stands."""

    hidden_size: int
    heads: int
    head_size: int
    longest: int
    """Positions of the longest text."""
    causal: bool = False
    """Hide from each position what comes after it."""
    layer: int = 0


class Mechanism(nn.Module):
    """How the positions of a text attend to each other."""

    kind: ClassVar[str]
    """What it is called in options."""
    has_causal_form: ClassVar[bool] = True
    has_keys: ClassVar[bool] = True
    """Whether it looks at keys; otherwise a layer makes none, and hands on the queries in their place."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.causal, self.layer = shape.causal, shape.layer

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        """Attend, [batch, heads, length, size].

        Args:
            hidden: what queries, keys and values were made of, [batch, length, hidden].
            query, key, value: [batch, heads, length, size].
            real: which positions are not padding, bool [batch, length]; None: all.
        """
        raise NotImplementedError


class Softmax(Mechanism):
    """Softmax over all positions."""

    kind = "softmax"

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return softmax_attention(query, key, value, real, self.causal)


class Local(Mechanism):
    """Softmax within blocks.

    Args:
        block: positions of a block.
    """

    kind = "local"

    def __init__(self, shape: AttentionShape, block: int = 64) -> None:
        super().__init__(shape)
        _check_at_least(1, block=block)
        self.block = block

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return local_attention(query, key, value, self.block, real, self.causal)


class Sparse(Mechanism):
    """Sparse Transformer's fixed pattern.

    Args:
        block: positions of a block, which see each other.
        summaries: the last positions of every block, which all see.
    """

    kind = "sparse"

    def __init__(self, shape: AttentionShape, block: int = 64, summaries: int = 4) -> None:
        super().__init__(shape)
        _check_at_least(1, block=block, summaries=summaries)
        if summaries > block:
            raise ModelError(
                f"model.architecture.attention.summaries={summaries}: a block has {block} positions; set it to as many "
                "at most"
            )
        self.block, self.summaries = block, summaries

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return fixed_attention(query, key, value, self.block, self.summaries, real, self.causal)


class Strided(Mechanism):
    """Sparse Transformer's strided pattern.

    Args:
        stride: how far a position sees on either side, and between those that it sees beyond.
    """

    kind = "strided"

    def __init__(self, shape: AttentionShape, stride: int = 64) -> None:
        super().__init__(shape)
        _check_at_least(1, stride=stride)
        self.stride = stride

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return strided_attention(query, key, value, self.stride, real, self.causal)


class Longformer(Mechanism):
    """A window around each position, and first positions that see all and are seen by all.

    Args:
        window: positions of the window, half of them on either side.
        seen_by_all: how many first positions; they have projections of their own.
    """

    kind = "longformer"

    def __init__(self, shape: AttentionShape, window: int = 512, seen_by_all: int = 0) -> None:
        super().__init__(shape)
        _check_at_least(2, window=window)
        _check_at_least(0, seen_by_all=seen_by_all)
        self.reach, self.seen_by_all = window // 2, seen_by_all
        if seen_by_all:
            width = shape.heads * shape.head_size
            self.query = nn.Linear(shape.hidden_size, width, bias=False)
            self.key = nn.Linear(shape.hidden_size, width, bias=False)
            self.value = nn.Linear(shape.hidden_size, width, bias=False)

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        attended = window_attention(query, key, value, self.reach, self.seen_by_all, real, self.causal)
        if not self.seen_by_all:
            return attended
        first = hidden[:, : self.seen_by_all]
        query, key, value = (
            split_heads(projection(source), query.shape[1])
            for projection, source in ((self.query, first), (self.key, hidden), (self.value, hidden))
        )
        if self.causal:  # they see each other, and nothing after them
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            real = None if real is None else real[:, : query.shape[2]]
        return torch.cat([softmax_attention(query, key, value, real, self.causal), attended[:, :, query.shape[2] :]], 2)


class BigBird(Mechanism):
    """Blocks see their neighbours, the two outer blocks, and random ones, which each layer draws by its number.

    Args:
        block: positions of a block.
        random_blocks: how many random ones.
    """

    kind = "bigbird"
    has_causal_form = False

    def __init__(self, shape: AttentionShape, block: int = 64, random_blocks: int = 3) -> None:
        super().__init__(shape)
        _check_at_least(1, block=block)
        _check_at_least(0, random_blocks=random_blocks)
        self.block, self.random_blocks, self.blocks = block, random_blocks, -(-shape.longest // block)

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        # Of the longest text, so that what a text sees does not depend on its padding.
        order = torch.rand(self.blocks, self.blocks, generator=torch.Generator().manual_seed(self.layer))
        return big_bird_attention(query, key, value, self.block, order.to(query.device), self.random_blocks, real)


class Reformer(Mechanism):
    """Positions see those that hash into their bucket; keys are the queries, of length one.

    Where the borders of its chunks lie depends on all positions, so it hides nothing that comes later.

    Args:
        buckets: how many.
        chunk: how many sorted positions attend together, to each other and to the chunk before.
        rounds: of hashing. In training each pass draws its own, in measurements they are always the same.
    """

    kind = "reformer"
    has_causal_form = False
    has_keys = False

    def __init__(self, shape: AttentionShape, buckets: int = 64, chunk: int = 64, rounds: int = 2) -> None:
        super().__init__(shape)
        _check_at_least(1, buckets=buckets, chunk=chunk, rounds=rounds)
        if buckets % 2:
            raise ModelError(
                f"model.architecture.attention.buckets={buckets}: a bucket and its opposite are a pair; make it even"
            )
        self.chunk = chunk
        self.rotations = (shape.heads, rounds, shape.head_size, buckets // 2)

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        fixed = None if self.training else torch.Generator().manual_seed(self.layer)
        rotations = torch.randn(self.rotations, generator=fixed).to(query)
        return reformer_attention(query, value, rotations, self.chunk, real)


class Linformer(Mechanism):
    """Keys and values of all positions are mixed into a few.

    Args:
        rank: how many; one matrix mixes keys and values of all heads.
    """

    kind = "linformer"
    has_causal_form = False

    def __init__(self, shape: AttentionShape, rank: int = 32) -> None:
        super().__init__(shape)
        _check_at_least(1, rank=rank)
        self.mix = nn.Parameter(torch.randn(rank, shape.longest) / shape.longest**0.5)

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return linformer_attention(query, key, value, self.mix, self.mix, real)


class Performer(DerivedBuffers, Mechanism):
    """Positive random features of the softmax kernel.

    Args:
        features: how many.
        redraw: in training each pass draws its own features; measurements always have the same.
    """

    kind = "performer"
    directions: Tensor

    def __init__(self, shape: AttentionShape, features: int = 128, redraw: bool = False) -> None:
        super().__init__(shape)
        _check_at_least(1, features=features)
        self.size, self.redraw = (features, shape.head_size), redraw
        self.register_buffer("directions", torch.empty(self.size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the features, each layer its own, always the same."""
        with torch.device("cpu"):
            drawn = orthogonal_directions(*self.size, torch.Generator().manual_seed(self.layer))
        if not self.directions.is_meta:
            self.directions.copy_(drawn)

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        drawn = orthogonal_directions(*self.size) if self.redraw and self.training else self.directions
        return performer_attention(query, key, value, drawn.to(query), real, self.causal)


class Linear(Mechanism):
    """Features elu(x) + 1 in place of the softmax kernel."""

    kind = "linear"

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return linear_attention(query, key, value, real, self.causal)


class Sinkhorn(Mechanism):
    """A block sees itself and the block that is sorted to it.

    Args:
        block: positions of a block.
        iterations: of scaling rows and columns of the sorting matrix.
        temperature: the lower, the nearer is the sorting matrix to a permutation.
    """

    kind = "sinkhorn"
    has_causal_form = False

    def __init__(self, shape: AttentionShape, block: int = 64, iterations: int = 8, temperature: float = 0.75) -> None:
        super().__init__(shape)
        _check_at_least(1, block=block, iterations=iterations)
        check_number("attention.temperature", temperature, "more than 0", lambda value: value > 0)
        self.block, self.iterations, self.temperature = block, iterations, temperature

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return sinkhorn_attention(query, key, value, self.block, self.iterations, self.temperature, real)


class Synthesizer(Mechanism):
    """Scores that no product of query and key made.

    Args:
        scores: `dense`: made of each query by two linear maps. `factorized_dense`: products of two factors of √length
            numbers, which are made so. `random`: learned, the same for all texts. `factorized_random`: of low rank too.
        rank: of the random ones that are factorised.
    """

    kind = "synthesizer"
    has_keys = False

    def __init__(self, shape: AttentionShape, scores: str = "factorized_dense", rank: int = 8) -> None:
        super().__init__(shape)
        _check_at_least(1, rank=rank)
        check_choice("attention.scores", scores, ("dense", "factorized_dense", "random", "factorized_random"))
        heads, size, longest = shape.heads, shape.head_size, shape.longest
        self.made, self.side = scores, math.isqrt(longest - 1) + 1
        if scores == "random":
            self.scores = _learned(0.02, heads, longest, longest)
        elif scores == "factorized_random":
            self.left, self.right = _learned(1, heads, longest, rank), _learned(rank**-0.5, heads, rank, longest)
        else:
            outputs = longest if scores == "dense" else 2 * self.side
            self.first, self.second = (_learned(size**-0.5, heads, size, width) for width in (size, outputs))

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return synthesizer_attention(self._scores(query), value, real, self.causal)

    def _scores(self, query: Tensor) -> Tensor:
        """[batch or 1, heads, length, length]."""
        length = query.shape[2]
        if self.made == "random":
            return self.scores[:, :length, :length].unsqueeze(0)
        if self.made == "factorized_random":
            return (self.left[:, :length] @ self.right[:, :, :length]).unsqueeze(0)
        made = torch.relu(query @ self.first) @ self.second
        if self.made == "factorized_dense":
            coarse, fine = made.chunk(2, dim=-1)
            made = (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(-2)
        return made[..., :length]


def _learned(deviation: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(deviation * torch.randn(shape))


class Continuous(Mechanism):
    """∞-former's: the text is a signal of a few functions, and each query reads it with a density.

    Args:
        functions: N.
        widths: of the functions, as parts of the whole text.
        ridge: of the regression.
    """

    kind = "continuous"
    has_causal_form = False

    def __init__(
        self,
        shape: AttentionShape,
        functions: int = 128,
        widths: tuple[float, ...] = (0.01, 0.05),
        ridge: float = 0.5,
    ) -> None:
        super().__init__(shape)
        _check_at_least(1, functions=functions)
        check_number("attention.ridge", ridge, "more than 0", lambda value: value > 0)
        if not isinstance(widths, Sequence) or not widths:
            raise ModelError(f"model.architecture.attention.widths={widths}: give a list of one width at least")
        for width in widths:
            check_number("attention.widths", width, "more than 0", lambda value: value > 0)
        if functions % len(widths) or functions < 2 * len(widths):
            raise ModelError(
                f"model.architecture.attention.functions={functions}: make it a multiple of the {len(widths)} widths "
                f"{list(widths)}, and {2 * len(widths)} at least"
            )
        self.functions, self.widths, self.ridge = functions, tuple(widths), ridge

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return continuous_attention(query, key, value, self.functions, self.widths, self.ridge, real)


class FastWeight(Mechanism):
    """Fast weights: each position writes its value under its key, and reads what was written until then.

    Where nothing is hidden from a position, every other head reads the text backwards.

    Args:
        rule: `delta`, a value replaces what its key finds; `sum`, it is added to it.
    """

    kind = "fast_weight"

    def __init__(self, shape: AttentionShape, rule: str = "delta") -> None:
        super().__init__(shape)
        check_choice("attention.rule", rule, ("delta", "sum"))
        self.rule = rule
        self.strength = nn.Linear(shape.hidden_size, shape.heads)

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        strength = self.strength(hidden).mT
        if real is not None:
            strength = strength.masked_fill(~real.unsqueeze(1), NOTHING)
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        if self.causal:
            return self._read(query, key, value, strength).to(value)
        back = [tensor[:, 1::2].flip(2) for tensor in (query, key, value, strength)]
        attended = torch.empty_like(value)
        attended[:, ::2] = self._read(query[:, ::2], key[:, ::2], value[:, ::2], strength[:, ::2]).to(value)
        attended[:, 1::2] = self._read(*back).flip(2).to(value)
        return attended

    def _read(self, query: Tensor, key: Tensor, value: Tensor, strength: Tensor) -> Tensor:
        # As the memory, whatever autocast chooses: the triangular systems have no shorter type.
        own = torch.promote_types(value.dtype, torch.float32)
        query, key, value, strength = (tensor.to(own) for tensor in (query, key, value, strength))
        empty = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3])
        writes = Writes(key, value, strength, torch.full_like(strength, NOTHING))
        device = key.device.type
        has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            return cast(Tensor, advance(empty, writes, self.rule, query)[1])


def mechanism_kinds() -> dict[str, type[Mechanism]]:
    """All mechanisms by name."""
    return {kind.kind: kind for kind in Mechanism.__subclasses__()}


def build_mechanism(options: str | Mapping[str, Any], shape: AttentionShape) -> Mechanism:
    """The mechanism of a layer.

    Args:
        options: its name, or its name as `kind` with its own options.
        shape: of the layer.

    Raises:
        ModelError: there is no such mechanism, it has no such option, or it cannot stand there.
    """
    chosen: dict[str, Any] = {"kind": options} if isinstance(options, str) else dict(options)
    kinds = mechanism_kinds()
    name = chosen.pop("kind", None)
    check_choice("attention", name, sorted(kinds))
    kind = kinds[name]
    known = inspect.signature(kind).parameters.keys() - {"shape"}
    for option, value in chosen.items():
        if option not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise ModelError(f"model.architecture.attention.{option}={value}: {name} has no such option; {has}")
    if shape.causal and not kind.has_causal_form:
        causal = ", ".join(sorted(name for name, other in kinds.items() if other.has_causal_form))
        raise ModelError(
            f"model.architecture.attention={name}: it has no form that hides what comes after a position, which a "
            f"decoder needs; choose one of {causal}"
        )
    return kind(shape, **chosen)


def _check_at_least(least: int, **options: int) -> None:
    """Make sure that options are numbers from `least` on.

    Raises:
        ModelError: one is not.
    """
    for name, value in options.items():
        check_size(f"attention.{name}", value, least)
